//! What a demo prints at its end, or when it is ready for requests.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::content::Content;
use super::copy::{CopiedDisk, Point};
use super::damage::Damage;
use super::disks::DemoDisk;
use super::folder::Folder;
use super::merge::Merge;
use super::restore::Restore;
use super::stage::{REPOSITORY_ID, Stage, VM_NAME};
use super::state::State;
use super::verify::{Verification, VerifiedPoint};
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Format, Output, table};

/// The points that were made, and how they came back.
#[derive(Debug)]
pub(super) struct Made {
    /// In the order in which they were made.
    pub(super) points: [Point; 3],
    pub(super) restores: Vec<Restore>,
    pub(super) verified: Verification,
}

/// What happened to the copy of the repository.
#[derive(Debug)]
pub(super) struct Aged {
    pub(super) merge: Merge,
    /// Of what was left after it.
    pub(super) restores: Vec<Restore>,
    /// Of the same points, before the damage.
    pub(super) verified: Verification,
    pub(super) damage: Damage,
}

/// All that happened.
#[derive(Debug)]
pub(super) struct Story<'a> {
    pub(super) disks: &'a [DemoDisk],
    pub(super) made: Made,
    pub(super) aged: Aged,
}

impl Story<'_> {
    /// Ok only if everything came out as it must: all disks came back as they were, before and after the merge, the merge
    /// happened, and the flipped bit was found, and nothing before it.
    pub(super) fn exit(&self) -> Exit {
        let Self { made, aged, .. } = self;
        let sound = made.verified.sound && aged.verified.sound;
        if self.all_equal() && sound && aged.merge.happened && aged.damage.found { Exit::Ok } else { Exit::Failed }
    }

    fn restores(&self) -> impl Iterator<Item = &Restore> {
        self.made.restores.iter().chain(&self.aged.restores)
    }

    fn all_equal(&self) -> bool {
        self.restores().all(Restore::is_equal)
    }
}

/// The table of all restores, and what else happened.
pub(super) fn result(story: &Story<'_>, folder: &Folder, output: &Output) -> Result<(), CliError> {
    let Story { disks, made, aged } = story;
    let document = json!({
        "vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "success": story.exit() == Exit::Ok,
        "kept": folder.is_kept().then(|| folder.path()),
        "disks": disks.iter().enumerate().map(disk_document).collect::<Vec<_>>(),
        "points": made.points.iter().map(|point| point_document(point, folder)).collect::<Vec<_>>(),
        "restores": made.restores.iter().flat_map(restore_documents).collect::<Vec<_>>(),
        "equal": story.all_equal(),
        "verified": [verification_document(&made.verified), verification_document(&aged.verified)],
        "merge": {
            "removed": aged.merge.removed, "into": aged.merge.into, "happened": aged.merge.happened,
            "detail": aged.merge.detail, "freed_bytes": aged.merge.freed_bytes, "seconds": seconds(aged.merge.time),
            "restores": aged.restores.iter().flat_map(restore_documents).collect::<Vec<_>>(),
        },
        "damage": {
            "file": aged.damage.file.file_name().map(|name| name.to_string_lossy()), "byte": aged.damage.byte,
            "found": aged.damage.found, "verification": verification_document(&aged.damage.verification),
        },
    });
    output.answer(&document, |_| text(story, folder, output))
}

fn disk_document((disk_id, disk): (usize, &DemoDisk)) -> Value {
    json!({
        "disk_id": disk_id, "device_key": disk.device_key, "source": disk.path, "size_bytes": disk.size_bytes,
    })
}

fn point_document(point: &Point, folder: &Folder) -> Value {
    let disk = |(disk_id, (disk, content)): (usize, (&CopiedDisk, &Content))| {
        json!({
            "disk_id": disk_id, "effective_type": disk.effective_type, "covered_bytes": disk.covered_bytes,
            "written_bytes": disk.written_bytes, "stored_bytes": disk.image.stored_bytes,
            "sha256_source": content.digest.to_string(), "image": folder.is_kept().then_some(&disk.image.path),
        })
    };
    json!({
        "point": point.number, "backup_id": point.backup_id, "backup_type": point.backup_type,
        "result": point.result, "seconds": seconds(point.time), "covered_bytes": point.covered_bytes(),
        "stored_bytes": point.stored_bytes(),
        "disks": point.disks.iter().zip(&point.contents).enumerate().map(disk).collect::<Vec<_>>(),
    })
}

fn restore_documents(restore: &Restore) -> impl Iterator<Item = Value> {
    restore.disks.iter().enumerate().map(|(disk_id, disk)| {
        json!({
            "point": restore.number, "backup_id": restore.backup_id, "disk_id": disk_id,
            "read_bytes": disk.restored.size_bytes, "stored_bytes": disk.stored_bytes, "seconds": seconds(disk.time),
            "sha256_source": disk.source.digest.to_string(), "sha256_restored": disk.restored.digest.to_string(),
            "equal": disk.is_equal(),
        })
    })
}

fn verification_document(verification: &Verification) -> Value {
    let point =
        |point: &VerifiedPoint| json!({"backup_id": point.backup_id, "trust": point.trust, "files": point.files});
    json!({
        "sound": verification.sound, "read_bytes": verification.read_bytes, "seconds": seconds(verification.time),
        "points": verification.points.iter().map(point).collect::<Vec<_>>(),
    })
}

fn text(story: &Story<'_>, folder: &Folder, output: &Output) -> String {
    let headings = ["point", "disk", "read", "stored", "seconds", "SHA-256 source", "SHA-256 restored", "equal"];
    let rows: Vec<Vec<String>> = story.restores().flat_map(cells).collect();
    let table = table::render(&headings, &rows);
    if output.has_notes() { [table, String::new(), summary(story, folder)].join("\n") } else { table }
}

fn cells(restore: &Restore) -> impl Iterator<Item = Vec<String>> {
    restore.disks.iter().enumerate().map(|(disk_id, disk)| {
        vec![
            restore.name.clone(),
            disk_id.to_string(),
            readable(disk.restored.size_bytes),
            readable(disk.stored_bytes),
            format!("{:.1}", disk.time.as_secs_f64()),
            disk.source.digest.prefix(),
            disk.restored.digest.prefix(),
            if disk.is_equal() { "yes" } else { "NO" }.to_owned(),
        ]
    })
}

fn summary(story: &Story<'_>, folder: &Folder) -> String {
    let Story { made: Made { points, .. }, aged, .. } = story;
    let tried: Vec<_> = story.restores().flat_map(|restore| &restore.disks).collect();
    let equal = tried.iter().filter(|disk| disk.is_equal()).count();
    [
        format!("{equal} of {} equal, byte for byte", counted(tried.len(), "restored disk")),
        aged.merge.detail.clone(),
        damage(&aged.damage, points),
        "Everything but the appliance and its vCenter was real: a stand-in in this process sent the disks.".to_owned(),
        kept(&points[2], folder),
    ]
    .join("\n")
}

/// One line about a backup.
pub(super) fn backup(point: &Point) -> String {
    format!(
        "point {}: {}, {} received, {} stored, {:.1} s",
        point.number,
        point.backup_type,
        readable(point.covered_bytes()),
        readable(point.stored_bytes()),
        point.time.as_secs_f64(),
    )
}

/// One line about a verification that should find nothing.
pub(super) fn verified(verification: &Verification) -> String {
    let outcome = if verification.sound {
        "all are what was committed".to_owned()
    } else {
        let reasons: Vec<&str> = verification.points.iter().filter_map(|point| point.reason.as_deref()).collect();
        format!("NOT all are what was committed ({})", reasons.join("; "))
    };
    let (points, bytes) = (counted(verification.points.len(), "point"), readable(verification.read_bytes));
    format!("{points} verified: {outcome}; {bytes} read, {:.1} s", verification.time.as_secs_f64())
}

fn damage(damage: &Damage, points: &[Point]) -> String {
    let name = |id: &str| match points.iter().find(|point| point.backup_id == id) {
        Some(point) => format!("point {}", point.number),
        None => id.to_owned(),
    };
    let state = |point: &VerifiedPoint| format!("{} is {}", name(&point.backup_id), point.trust);
    let states: Vec<String> = damage.verification.points.iter().map(state).collect();
    let file = damage.file.file_name().unwrap_or_default().display();
    let found = if damage.found { "was found" } else { "was NOT found" };
    format!("a flipped bit in {file} of the merged point {found}: {}", states.join(", "))
}

/// Where to look, with the newest point as an example.
fn kept(newest: &Point, folder: &Folder) -> String {
    if !folder.is_kept() {
        return "Everything is removed; --keep DIR keeps repository, database and disks.".to_owned();
    }
    let commands = newest.disks.iter().map(|disk| {
        let image = quoted(&disk.image.path);
        format!("\n  qemu-img info --backing-chain {image}\n  qemu-img check {image}")
    });
    let newest =
        format!("The three points are in {}. The newest:{}", folder.path().display(), commands.collect::<String>());
    format!("{newest}\n{}", kept_service(folder))
}

/// How what was kept is looked at later.
pub(super) fn kept_service(folder: &Folder) -> String {
    let (token_file, program) = (quoted(&folder.state().join("token")), program());
    format!(
        "To serve them again, to list and to restore from them (there is no appliance then, so nothing can be backed up):\n  \
         {}\nand in another terminal:\n  export BLOCKYARD_TOKEN_FILE={token_file}\n  {program} point list\n  \
         {program} restore export POINT",
        serve_command(&folder.configuration_file()),
    )
}

/// The command that serves what was kept.
pub(super) fn serve_command(configuration: &Path) -> String {
    format!("{} serve --config {}", program(), quoted(configuration))
}

/// This program, as it was called.
fn program() -> String {
    let called = std::env::args_os().next();
    called.map_or_else(|| "blockyard".to_owned(), |called| quoted(Path::new(&called)))
}

/// One line about a change of the VM after a snapshot.
pub(super) fn changed(state: &State) -> String {
    format!(
        "{} of the disks of {VM_NAME} changed after the snapshot: the next backup stores that",
        readable(state.expected_bytes().iter().sum())
    )
}

/// Where the service is, and requests to begin with.
pub(super) fn ready(stage: &Stage, disks: &[DemoDisk], output: &Output) -> Result<(), CliError> {
    let (url, token_file) = (stage.hub().url(), stage.hub().token_file());
    if output.format() == Format::Json {
        let document = json!({
            "ready": true, "url": url, "token_file": token_file, "vm_name": VM_NAME, "repository_id": REPOSITORY_ID,
            "disks": disks.len(),
        });
        // On one line: whoever waits for it reads lines.
        return output.line(&document.to_string());
    }
    output.line(&format!("ready {url} token {}", token_file.display()))?;
    if !output.has_notes() {
        return Ok(());
    }
    let body = json!({"vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "backup_type": "auto"});
    output.line(&format!(
        "\nVM {VM_NAME} with {} and repository {REPOSITORY_ID} wait for requests until Ctrl-C. In another terminal:\n\n\
         URL={url}\n\
         auth=\"Authorization: Bearer $(cat {})\"\n\
         curl -s -H \"$auth\" -H 'Content-Type: application/json' $URL/api/v1/backups/vm -d '{body}'\n\
         curl -s -H \"$auth\" \"$URL/api/v1/backups?limit=1\"\n\
         \n\
         export BLOCKYARD_URL=$URL BLOCKYARD_TOKEN_FILE={}\n\
         {} point list\n\
         \n\
         After each backup something changes on every disk: the first is a full, and the same request again makes an incremental.\n\
         Every route, to look at and to try: {url}/docs",
        counted(disks.len(), "disk"),
        quoted(token_file),
        quoted(token_file),
        program(),
    ))
}

fn counted(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Seconds to the millisecond.
fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::restore::RestoredDisk;
    use crate::node::fake::Source;

    async fn content(byte: u8) -> Content {
        Content::of_source(&Source::Bytes([byte; 512].into())).await.unwrap()
    }

    async fn restore() -> Restore {
        let (source, restored) = (content(1).await, content(1).await);
        let disks = vec![RestoredDisk { source, restored, stored_bytes: 0, time: Duration::ZERO }];
        Restore { number: 1, name: "1".to_owned(), backup_id: "backup-1".to_owned(), disks }
    }

    fn verification() -> Verification {
        Verification { points: Vec::new(), read_bytes: 0, time: Duration::ZERO, sound: true }
    }

    /// A story in which everything went well.
    async fn story() -> Story<'static> {
        let point = |number| Point {
            number,
            contents: Vec::new(),
            backup_id: format!("backup-{number}"),
            backup_type: "full".to_owned(),
            result: "success".to_owned(),
            time: Duration::ZERO,
            disks: Vec::new(),
        };
        let merge = Merge {
            removed: "backup-1".to_owned(),
            into: "backup-2".to_owned(),
            happened: true,
            detail: String::new(),
            freed_bytes: 0,
            time: Duration::ZERO,
        };
        let damage = Damage { file: "disk-0.qcow2".into(), byte: 0, verification: verification(), found: true };
        let made = Made { points: [1, 2, 3].map(point), restores: vec![restore().await], verified: verification() };
        let aged = Aged { merge, restores: vec![restore().await], verified: verification(), damage };
        Story { disks: &[], made, aged }
    }

    #[tokio::test]
    async fn anything_that_is_not_as_it_must_be_makes_the_exit_code_one() {
        assert_eq!(story().await.exit(), Exit::Ok);
        type Fail = fn(&mut Story<'_>, Content);
        let failures: [(&str, Fail); 7] = [
            ("a disk differs", |story, other| story.made.restores[0].disks[0].restored = other),
            ("a disk differs after the merge", |story, other| story.aged.restores[0].disks[0].restored = other),
            ("no disk was restored", |story, _| story.made.restores[0].disks.clear()),
            ("a new point is not sound", |story, _| story.made.verified.sound = false),
            ("a merged point is not sound", |story, _| story.aged.verified.sound = false),
            ("nothing was merged", |story, _| story.aged.merge.happened = false),
            ("the flipped bit was not found", |story, _| story.aged.damage.found = false),
        ];
        for (name, fail) in failures {
            let mut story = story().await;
            fail(&mut story, content(2).await);
            assert_eq!(story.exit(), Exit::Failed, "{name}");
        }
    }

    #[test]
    fn paths_are_quoted_only_where_a_shell_needs_it() {
        assert_eq!(quoted(Path::new("/a/b-1.raw")), "/a/b-1.raw");
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
