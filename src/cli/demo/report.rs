//! What a demo prints at its end, or when it is ready for requests.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::copy::{Copied, CopiedDisk};
use super::disks::DemoDisk;
use super::folder::Folder;
use super::restore::Comparison;
use super::stage::{REPOSITORY_ID, Stage, VM_NAME};
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Format, Output, table};

/// Ok only if all disks came back as they were, and there were any.
pub(super) fn exit(compared: &[Comparison]) -> Exit {
    if !compared.is_empty() && compared.iter().all(Comparison::is_equal) { Exit::Ok } else { Exit::Failed }
}

/// The table, and where the images are.
pub(super) fn result(
    disks: &[DemoDisk],
    copied: &Copied,
    compared: &[Comparison],
    folder: &Folder,
    output: &Output,
) -> Result<(), CliError> {
    let rows: Vec<Row> = disks
        .iter()
        .zip(&copied.disks)
        .zip(compared)
        .enumerate()
        .map(|(index, ((disk, copy), compared))| Row { index, disk, copy, compared, kept: folder.is_kept() })
        .collect();
    let document = json!({
        "backup_id": copied.backup_id, "vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "backup_type": "full",
        "result": copied.result, "seconds": seconds(copied.time), "equal": exit(compared) == Exit::Ok,
        "kept": folder.is_kept().then(|| folder.path()),
        "disks": rows.iter().map(Row::document).collect::<Vec<_>>(),
    });
    output.answer(&document, |_| text(&rows, copied, folder))
}

/// One disk with all that is known of it.
struct Row<'a> {
    index: usize,
    disk: &'a DemoDisk,
    copy: &'a CopiedDisk,
    compared: &'a Comparison,
    kept: bool,
}

impl Row<'_> {
    fn document(&self) -> Value {
        json!({
            "disk_id": self.index, "device_key": self.disk.device_key, "source": self.disk.path,
            "size_bytes": self.disk.size_bytes, "covered_bytes": self.copy.covered_bytes,
            "written_bytes": self.copy.written_bytes, "stored_bytes": self.copy.stored_bytes,
            "copy_seconds": seconds(self.copy.time), "compare_seconds": seconds(self.compared.time),
            "sha256_source": self.compared.source.digest.to_string(),
            "sha256_restored": self.compared.restored.digest.to_string(),
            "restored_bytes": self.compared.restored.size_bytes, "equal": self.compared.is_equal(),
            "image": self.kept.then_some(&self.copy.image),
        })
    }

    fn cells(&self) -> Vec<String> {
        let Self { index, disk, copy, compared, .. } = self;
        vec![
            index.to_string(),
            disk.device_key.to_string(),
            readable(disk.size_bytes),
            readable(copy.covered_bytes),
            readable(copy.stored_bytes),
            format!("{:.1}", copy.time.as_secs_f64()),
            compared.source.digest.prefix(),
            compared.restored.digest.prefix(),
            if compared.is_equal() { "yes" } else { "NO" }.to_owned(),
        ]
    }
}

fn text(rows: &[Row<'_>], copied: &Copied, folder: &Folder) -> String {
    let headings =
        ["disk", "key", "size", "covered", "stored", "seconds", "SHA-256 source", "SHA-256 restored", "equal"];
    let cells: Vec<Vec<String>> = rows.iter().map(Row::cells).collect();
    let equal = rows.iter().filter(|row| row.compared.is_equal()).count();
    let covered = rows.iter().map(|row| row.copy.covered_bytes).sum();
    let stored = rows.iter().map(|row| row.copy.stored_bytes).sum();
    let mut lines = vec![
        table::render(&headings, &cells),
        String::new(),
        format!(
            "{equal} of {} equal; {} copied in {:.1} s, {} stored ({})",
            counted(rows.len()),
            readable(covered),
            copied.time.as_secs_f64(),
            readable(stored),
            copied.backup_id,
        ),
    ];
    if folder.is_kept() {
        lines.push(format!("The images are in {}:", copied.folder.display()));
        lines.extend(rows.iter().flat_map(|row| {
            let image = quoted(&row.copy.image);
            [format!("  qemu-img info {image}"), format!("  qemu-img check {image}")]
        }));
    } else {
        lines.push("The images are removed; --keep DIR keeps them.".to_owned());
    }
    lines.join("\n")
}

/// Where the service is, and requests to begin with.
pub(super) fn ready(stage: &Stage, disks: &[DemoDisk], output: &Output) -> Result<(), CliError> {
    let (url, token_file) = (stage.url(), stage.token_file());
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
        counted(disks.len()),
        quoted(token_file),
    ))
}

fn counted(disks: usize) -> String {
    if disks == 1 { "1 disk".to_owned() } else { format!("{disks} disks") }
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
