//! `blockyard point`: the restore points that backups left.

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
            // An id is one step of a path; whatever else was written names no point.
            if id.parse::<BackupId>().is_err() {
                return Err(CliError::NotFound { noun: "restore point", name: id });
            }
            output.answer(&client.get(&format!("/points/{id}"), &[]).await?, render)?;
        }
    }
    Ok(Exit::Ok)
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
    let fields = ["id", "vm_name", "repository_id", "backup_type", "state", "trust", "committed_at", "path"];
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
    lines.join("\n")
}
