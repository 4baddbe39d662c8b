//! `blockyard point`: the restore points that backups left.

mod verify;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::client::Client;
use super::size::readable;
use super::vm::text;
use super::{CliError, Exit, Output, table};
use crate::id::BackupId;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List restore points, newest first.
    List(List),
    /// Show a restore point and its images.
    Show(Show),
    /// Read a restore point and all that it builds upon, and hold it against what was committed.
    ///
    /// Exits with 0 when all of it is, 3 when there are warnings, 6 when something is damaged or missing, and 1 when it could not
    /// be read.
    Verify(verify::Verify),
    /// Compare the disks of two restore points by their digests; no image is read.
    ///
    /// Exits with 0 when they are equal, 1 when they differ, and 3 when digests of one were never taken.
    Compare(verify::Compare),
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Only points in this repository.
    #[arg(long, value_name = "ID")]
    repository: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// Id of the restore point, which is that of its backup.
    id: String,
}

pub(super) async fn run(command: Command, output: &Output) -> Result<Exit, CliError> {
    let client = Client::from_environment()?;
    match command {
        Command::List(List { repository }) => {
            let query: Vec<(&str, &str)> = repository.iter().map(|id| ("repository_id", id.as_str())).collect();
            output.answer(&client.list("points", &query).await?, render_list)?;
        }
        Command::Show(Show { id }) => {
            output.answer(&client.get(&path_of(&id)?, &[]).await?, render)?;
        }
        Command::Verify(verify) => return verify::verify(&client, &verify, output).await,
        Command::Compare(compare) => return verify::compare(&client, &compare, output).await,
    }
    Ok(Exit::Ok)
}

/// The path of a point. An id is one step of it; whatever else was written names no point.
fn path_of(id: &str) -> Result<String, CliError> {
    match id.parse::<BackupId>() {
        Ok(id) => Ok(format!("/points/{id}")),
        Err(_) => Err(CliError::NotFound { noun: "restore point", name: id.to_owned() }),
    }
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), readable)
}

fn render_list(document: &Value) -> String {
    let rows: Vec<Vec<String>> = rows(&document["points"])
        .iter()
        .map(|point| {
            let size: u64 = rows(&point["disks"]).iter().filter_map(|disk| disk["file_bytes"].as_u64()).sum();
            let texts = ["id", "vm_name", "repository_id", "backup_type", "trust", "committed_at"];
            let texts = texts.map(|field| text(&point[field]).to_owned());
            texts.into_iter().chain([readable(size)]).collect()
        })
        .collect();
    table::render(&["id", "vm", "repository", "type", "trust", "committed", "size"], &rows)
}

fn render(point: &Value) -> String {
    let fields = [
        "id",
        "vm_name",
        "repository_id",
        "backup_type",
        "state",
        "trust",
        "trust_reason",
        "verified_at",
        "committed_at",
        "path",
    ];
    let mut lines: Vec<String> = fields.iter().map(|field| format!("{field:<13} {}", text(&point[field]))).collect();
    let disks: Vec<Vec<String>> = rows(&point["disks"])
        .iter()
        .map(|disk| {
            let id = disk["disk_id"].to_string();
            let texts = ["file", "backup_type", "change_id"].map(|field| text(&disk[field]).to_owned());
            let numbers = ["size_bytes", "file_bytes"].map(|field| bytes(&disk[field]));
            [id].into_iter().chain(texts).chain(numbers).collect()
        })
        .collect();
    lines.push(String::new());
    lines.push(table::render(&["disk", "file", "type", "change id", "size", "stored"], &disks));
    for disk in rows(&point["disks"]) {
        let [digest, content] = ["digest", "content_digest"].map(|field| text(&disk[field]));
        lines.push(format!("disk {}: image {digest}, content {content}", disk["disk_id"]));
    }
    lines.join("\n")
}
