//! What a demo prints at its end, or when it is ready for requests.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::content::Content;
use super::copy::{CopiedDisk, Point};
use super::disks::DemoDisk;
use super::folder::Folder;
use super::restore::Restore;
use super::stage::{REPOSITORY_ID, Stage, VM_NAME};
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Format, Output, table};

/// All that happened.
#[derive(Debug)]
pub(super) struct Story<'a> {
    pub(super) disks: &'a [DemoDisk],
    /// In the order in which they were made.
    pub(super) points: Vec<Point>,
    /// In the order in which they were tried.
    pub(super) restores: Vec<Restore>,
}

impl Story<'_> {
    /// Ok only if every point that was made came back, each disk as its source was.
    pub(super) fn exit(&self) -> Exit {
        let came_back = |point: &Point| self.restores.iter().any(|restore| restore.backup_id == point.backup_id);
        let equal = self.restores.iter().all(Restore::is_equal);
        if equal && !self.points.is_empty() && self.points.iter().all(came_back) { Exit::Ok } else { Exit::Failed }
    }
}

/// The table of all restores, and what happened in between.
pub(super) fn result(story: &Story<'_>, folder: &Folder, output: &Output) -> Result<(), CliError> {
    let document = json!({
        "vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "equal": story.exit() == Exit::Ok,
        "kept": folder.is_kept().then(|| folder.path()),
        "disks": story.disks.iter().enumerate().map(disk_document).collect::<Vec<_>>(),
        "points": story.points.iter().map(|point| point_document(point, folder)).collect::<Vec<_>>(),
        "restores": story.restores.iter().flat_map(restore_documents).collect::<Vec<_>>(),
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
            "point": restore.name, "backup_id": restore.backup_id, "disk_id": disk_id,
            "read_bytes": disk.restored.size_bytes, "stored_bytes": disk.stored_bytes, "seconds": seconds(disk.time),
            "sha256_source": disk.source.digest.to_string(), "sha256_restored": disk.restored.digest.to_string(),
            "equal": disk.is_equal(),
        })
    })
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

fn text(story: &Story<'_>, folder: &Folder, output: &Output) -> String {
    let headings = ["point", "disk", "read", "stored", "seconds", "SHA-256 source", "SHA-256 restored", "equal"];
    let rows: Vec<Vec<String>> = story.restores.iter().flat_map(cells).collect();
    let table = table::render(&headings, &rows);
    if !output.has_notes() {
        return table;
    }
    [table, String::new(), summary(story, folder)].join("\n")
}

fn summary(story: &Story<'_>, folder: &Folder) -> String {
    let tried = story.restores.iter().flat_map(|restore| &restore.disks);
    let equal = tried.clone().filter(|disk| disk.is_equal()).count();
    let mut lines = vec![format!("{equal} of {} equal, byte for byte", counted(tried.count(), "restored disk"))];
    lines.push(match story.points.last() {
        Some(point) if folder.is_kept() => kept(point, folder),
        _ => "Everything is removed; --keep DIR keeps repository, database and disks.".to_owned(),
    });
    lines.join("\n")
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

/// Where to look, with the newest point as an example.
fn kept(point: &Point, folder: &Folder) -> String {
    let commands = point.disks.iter().map(|disk| {
        let image = quoted(&disk.image.path);
        format!("  qemu-img info --backing-chain {image}\n  qemu-img check {image}")
    });
    let lines: Vec<String> = [format!("Everything is in {}. The newest point:", folder.path().display())]
        .into_iter()
        .chain(commands)
        .collect();
    lines.join("\n")
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
    let body = json!({"vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "backup_type": "full"});
    output.line(&format!(
        "\nVM {VM_NAME} with {} and repository {REPOSITORY_ID} wait for requests until Ctrl-C. In another terminal:\n\n\
         URL={url}\n\
         auth=\"Authorization: Bearer $(cat {})\"\n\
         curl -s -H \"$auth\" -H 'Content-Type: application/json' $URL/api/v1/backups/vm -d '{body}'\n\
         curl -s -H \"$auth\" \"$URL/api/v1/backups?limit=1\"\n\
         \n\
         Every route, to look at and to try: {url}/docs",
        counted(disks.len(), "disk"),
        quoted(token_file),
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

    #[test]
    fn paths_are_quoted_only_where_a_shell_needs_it() {
        assert_eq!(quoted(Path::new("/a/b-1.raw")), "/a/b-1.raw");
        assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
