//! `blockyard backup`: start one, wait for it, watch it, look at them, cancel one.

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::client::Client;
use super::size::readable;
use super::vm::text;
use super::{CliError, Exit, Output, table, watch};
use crate::id::{BackupId, VmId};

/// How long one question for the end of a backup may stay open, in seconds: what the service allows.
const WAIT_S: &str = "60";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Back up all disks of a VM from one snapshot.
    Start(Start),
    /// List backups, newest first.
    List(List),
    /// Show a backup and its disks.
    Show(Named),
    /// Follow a backup until it is over, also across breaks of the link; the exit code then tells how it went.
    Watch(Named),
    /// Stop a backup and remove what it made.
    Cancel(Named),
}

#[derive(Debug, Args)]
pub(super) struct Start {
    /// Name or id of the VM.
    #[arg(value_name = "VM")]
    vm: String,
    /// Id of the repository.
    #[arg(long)]
    repository: String,
    /// Auto does whatever is possible and cheapest.
    #[arg(long = "type", value_enum, default_value_t = Type::Auto)]
    backup_type: Type,
    /// Something to remember with the backup, repeatable.
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
    tags: Vec<(String, String)>,
    /// Wait for the end; the exit code then tells how it went.
    #[arg(long)]
    wait: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    Full,
    Incremental,
    Auto,
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Only backups of VMs of this name.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Only backups into this repository.
    #[arg(long, value_name = "ID")]
    repository: Option<String>,
    /// Only backups with this status: pending, running, completed, failed or cancelled.
    #[arg(long)]
    status: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// Id of the backup.
    id: String,
}

fn tag(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

pub(super) async fn run(command: Command, output: &Output) -> Result<Exit, CliError> {
    let client = Client::from_environment()?;
    match command {
        Command::Start(arguments) => return start(&client, &arguments, output).await,
        Command::List(list) => {
            let filters = [("vm_name", &list.vm), ("repository_id", &list.repository), ("status", &list.status)];
            let query: Vec<(&str, &str)> =
                filters.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?))).collect();
            output.answer(&client.list("backups", &query).await?, render_list)?;
        }
        Command::Show(named) => {
            let backup = client.get(&path_of(&named.id)?, &[]).await?;
            output.answer(&backup, render)?;
        }
        Command::Watch(named) => return watch::run(&client, &path_of(&named.id)?, output).await,
        Command::Cancel(named) => {
            let backup = client.post(&format!("{}/cancel", path_of(&named.id)?), &json!({})).await?;
            output.done(&backup, |backup| format!("{} is {}", text(&backup["backup_id"]), text(&backup["state"])))?;
        }
    }
    Ok(Exit::Ok)
}

async fn start(client: &Client, arguments: &Start, output: &Output) -> Result<Exit, CliError> {
    let field = if arguments.vm.parse::<VmId>().is_ok() { "vm_context_id" } else { "vm_name" };
    let backup_type = match arguments.backup_type {
        Type::Full => "full",
        Type::Incremental => "incremental",
        Type::Auto => "auto",
    };
    let tags: Map<String, Value> =
        arguments.tags.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
    let mut body = json!({"repository_id": arguments.repository, "backup_type": backup_type, "tags": tags});
    body[field] = arguments.vm.as_str().into();
    let started = client.post("/backups/vm", &body).await?;
    if !arguments.wait {
        output.done(&started, |started| format!("{} {}", text(&started["backup_id"]), text(&started["status"])))?;
        return Ok(Exit::Ok);
    }
    let path = path_of(text(&started["backup_id"]))?;
    output.note(&format!("{} {}", text(&started["backup_id"]), text(&started["status"])));
    let mut state = String::new();
    let backup = loop {
        let backup = client.get(&path, &[("wait", WAIT_S)]).await?;
        if ["committed", "failed", "cancelled"].contains(&text(&backup["state"])) {
            break backup;
        }
        if backup["state"] != *state {
            state = text(&backup["state"]).to_owned();
            output.note(&format!("{state} …"));
        }
    };
    output.answer(&backup, render)?;
    Ok(match text(&backup["result"]) {
        "success" => Exit::Ok,
        "warning" => Exit::Warnings,
        _ => Exit::Failed,
    })
}

/// The path of a backup. An id is one step of it; whatever else was written names no backup.
fn path_of(id: &str) -> Result<String, CliError> {
    match id.parse::<BackupId>() {
        Ok(id) => Ok(format!("/backups/{id}")),
        Err(_) => Err(CliError::NotFound { noun: "backup", name: id.to_owned() }),
    }
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), readable)
}

fn render_list(document: &Value) -> String {
    let rows: Vec<Vec<String>> = rows(&document["backups"])
        .iter()
        .map(|backup| {
            let texts = ["backup_id", "vm_name", "repository_id", "backup_type", "state", "created_at"];
            let texts = texts.map(|field| text(&backup[field]).to_owned());
            texts.into_iter().chain([format!("{}%", backup["progress_percent"])]).collect()
        })
        .collect();
    table::render(&["id", "vm", "repository", "type", "state", "created", "done"], &rows)
}

fn render(backup: &Value) -> String {
    let fields = ["backup_id", "vm_name", "repository_id", "backup_type", "state", "result", "code", "error_message"];
    let times = ["created_at", "started_at", "completed_at"];
    let mut lines: Vec<String> =
        fields.iter().chain(&times).map(|field| format!("{field:<13} {}", text(&backup[field]))).collect();
    lines.extend(rows(&backup["warnings"]).iter().map(|warning| format!("warning       {}", text(warning))));
    let disks: Vec<Vec<String>> = rows(&backup["disks"])
        .iter()
        .map(|disk| {
            let numbers = ["size_bytes", "covered_bytes", "written_bytes", "zeroed_bytes"];
            let id = disk["disk_id"].to_string();
            let words = ["state", "reason"].map(|field| text(&disk[field]).to_owned());
            [id].into_iter().chain(words).chain(numbers.map(|field| bytes(&disk[field]))).collect()
        })
        .collect();
    lines.push(String::new());
    lines.push(table::render(&["disk", "state", "reason", "size", "covered", "written", "zeroed"], &disks));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_pairs() {
        assert_eq!(tag("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(tag("a").is_err());
    }
}
