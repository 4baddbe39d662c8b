//! `blockyard point`: the restore points that backups left.

mod verify;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::size::readable;
use super::vm::text;
use super::{CliError, Exit, Format, Output, table};
use crate::clock::UtcTime;
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
    /// Keep a restore point until a date, whatever the rules and whoever wants to delete it.
    Protect(Protect),
    /// Delete restore points with their files.
    Delete(Delete),
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

#[derive(Debug, Args)]
pub(super) struct Protect {
    /// Id of the restore point.
    id: String,
    /// When the protection ends: a time such as 2027-01-01T00:00:00Z, or a day, which is its beginning in UTC.
    #[arg(long, value_name = "DATE", value_parser = date, required_unless_present = "off")]
    until: Option<UtcTime>,
    /// End the protection now.
    #[arg(long, conflicts_with = "until")]
    off: bool,
    /// Also when a protection that still lasts becomes shorter by it.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct Delete {
    /// Ids of restore points. They are deleted newest first, so that a chain can be given in any order.
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

fn date(text: &str) -> Result<UtcTime, String> {
    let midnight = format!("{text}T00:00:00Z");
    text.parse()
        .or_else(|_| midnight.parse())
        .map_err(|_| "write a day such as 2027-01-01, or a time with an offset such as 2027-01-01T00:00:00Z".to_owned())
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
        Command::Protect(Protect { id, until, off: _, force }) => {
            let body = json!({"until": until, "force": force});
            let point = client.post(&format!("{}/protect", path_of(&id)?), &body).await?;
            output.done(&point, |point| match point["protected_until"].as_str() {
                Some(until) => format!("{} is protected until {until}", text(&point["id"])),
                None => format!("{} is not protected", text(&point["id"])),
            })?;
        }
        Command::Delete(Delete { ids }) => return delete(&client, ids, output).await,
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

/// Deletes what can be deleted. One that cannot does not stop the others; the exit code is that of the first conflict, else of the
/// first failure.
async fn delete(client: &Client, mut ids: Vec<String>, output: &Output) -> Result<Exit, CliError> {
    // All are read before the first one goes.
    ids.iter().try_for_each(|id| path_of(id).map(drop))?;
    // Ids grow with time, and what builds upon a point is newer than that.
    ids.sort_unstable_by(|one, other| other.cmp(one));
    ids.dedup();
    let (mut deleted, mut refused, mut exits) = (Vec::new(), Vec::new(), Vec::new());
    for id in ids {
        match client.delete(&path_of(&id)?).await {
            Ok(_) => deleted.push(Value::from(id)),
            Err(ClientError::Refused { status, detail, document }) => {
                let error = ClientError::Refused { status, detail, document: document.clone() };
                exits.push(error.exit());
                refused.push(json!({"id": id, "problem": document}));
                if output.format() == Format::Text {
                    output.failure(&error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    output.done(&json!({"deleted": deleted, "refused": refused}), |document| {
        let deleted = rows(&document["deleted"]).iter().map(|id| format!("deleted {}", text(id)));
        deleted.collect::<Vec<_>>().join("\n")
    })?;
    let conflict = exits.iter().find(|exit| **exit == Exit::Conflict).or(exits.first());
    Ok(conflict.copied().unwrap_or(Exit::Ok))
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
            let texts = ["id", "vm_name", "repository_id", "backup_type", "state", "trust", "committed_at"];
            let texts = texts.map(|field| text(&point[field]).to_owned());
            texts.into_iter().chain([readable(size)]).collect()
        })
        .collect();
    table::render(&["id", "vm", "repository", "type", "state", "trust", "committed", "size"], &rows)
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
        "compared_bytes",
        "protected_until",
        "committed_at",
        "path",
    ];
    let value = |field: &str| match &point[field] {
        Value::Number(_) => bytes(&point[field]),
        other => text(other).to_owned(),
    };
    let mut lines: Vec<String> = fields.iter().map(|field| format!("{field:<15} {}", value(field))).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_days_or_times_with_an_offset() {
        let midnight: UtcTime = "2027-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(date("2027-01-01"), Ok(midnight));
        assert_eq!(date("2027-01-01T01:00:00+01:00"), Ok(midnight));
        for wrong in ["", "2027", "2027-13-01", "tomorrow", "2027-01-01T00:00:00"] {
            assert!(date(wrong).is_err(), "{wrong}");
        }
    }
}
