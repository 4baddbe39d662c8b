//! `blockyard repo`: the folders that backups go to.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::Client;
use super::size::readable;
use super::vm::text;
use super::{CliError, Exit, Output, retention, table};
use crate::id::RepositoryId;
use crate::repository::lock::MARKER_FILE;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Add a folder that exists as a repository.
    Add(Add),
    /// List all repositories.
    List,
    /// Show a repository.
    Show(Show),
    /// Hold a repository's folders against its records; exit code 3: something else is there, 6: a point is not intact.
    Check(Show),
    /// Record the restore points of a repository that are not known, from their manifests.
    Import(Import),
    /// Show or replace the rules by which restore points are kept. They are applied after every backup.
    Retention(retention::Retention),
    /// Tell, or do with --apply, what the rules say of every restore point.
    Prune(retention::Prune),
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// The folder, on the machine of the service.
    path: PathBuf,
    /// For display; the name of the folder when left out.
    #[arg(long)]
    name: Option<String>,
    /// Made from the name when left out.
    #[arg(long)]
    id: Option<String>,
    #[command(flatten)]
    rules: retention::Rules,
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// Id of the repository.
    id: String,
}

#[derive(Debug, Args)]
pub(super) struct Import {
    /// Id of the repository, or its folder on the machine of the service; a folder that is no repository yet becomes one, with the
    /// id that it is marked with.
    #[arg(value_name = "ID|PATH")]
    repository: String,
}

pub(super) async fn run(command: Command, output: &Output) -> Result<Exit, CliError> {
    let client = Client::from_environment()?;
    match command {
        Command::Add(add) => {
            let repository = client.post("/repositories", &description(&add)?).await?;
            output.done(&repository, |added| format!("added {} as {}", text(&added["path"]), text(&added["id"])))?;
        }
        Command::List => output.answer(&client.list("repositories", &[]).await?, |document| {
            let rows = document["repositories"].as_array().map(Vec::as_slice).unwrap_or_default();
            render(rows)
        })?,
        Command::Show(Show { id }) => {
            let id = known_id(&id)?;
            let repository = client.get(&format!("/repositories/{id}"), &[]).await?;
            output.answer(&repository, |repository| render(std::slice::from_ref(repository)))?;
        }
        Command::Check(Show { id }) => {
            let report = client.post(&format!("/repositories/{}/check", known_id(&id)?), &json!({})).await?;
            output.answer(&report, render_check)?;
            return Ok(match report["result"].as_str() {
                Some("clean") => Exit::Ok,
                Some("warnings") => Exit::Warnings,
                _ => Exit::Damaged,
            });
        }
        Command::Import(Import { repository }) => {
            let id = if repository.contains('/') {
                of_folder(&client, &repository).await?
            } else {
                known_id(&repository)?.to_owned()
            };
            let report = client.post(&format!("/repositories/{id}/import"), &json!({})).await?;
            output.answer(&report, render_import)?;
            let skipped = report["skipped"].as_array().is_some_and(|skipped| !skipped.is_empty());
            return Ok(if skipped { Exit::Warnings } else { Exit::Ok });
        }
        Command::Retention(wanted) => return retention::retention(&client, &wanted, output).await,
        Command::Prune(wanted) => return retention::prune(&client, &wanted, output).await,
    }
    Ok(Exit::Ok)
}

/// An id is put into a path: what cannot be one names no repository.
fn known_id(id: &str) -> Result<&str, CliError> {
    match id.parse::<RepositoryId>() {
        Ok(_) => Ok(id),
        Err(_) => Err(CliError::NotFound { noun: "repository", name: id.to_owned() }),
    }
}

/// The repository in a folder, which becomes one with the id of its marker when it is none yet.
async fn of_folder(client: &Client, folder: &str) -> Result<String, CliError> {
    let unreadable = |source| CliError::Unreadable { path: folder.into(), source };
    let path = std::path::absolute(folder).map_err(unreadable)?;
    let all = client.list("repositories", &[]).await?;
    let known = all["repositories"].as_array().into_iter().flatten();
    let mut known = known.filter(|repository| path == Path::new(text(&repository["path"])));
    if let Some(repository) = known.next() {
        return Ok(text(&repository["id"]).to_owned());
    }
    let marker = path.join(MARKER_FILE);
    let marked: Value = match std::fs::read(&marker) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| unreadable(error.into()))?,
        Err(source) => return Err(CliError::Unreadable { path: marker, source }),
    };
    let add =
        Add { path, name: None, id: marked["id"].as_str().map(str::to_owned), rules: retention::Rules::default() };
    let added = client.post("/repositories", &description(&add)?).await?;
    Ok(text(&added["id"]).to_owned())
}

fn render_check(report: &Value) -> String {
    let findings = report["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rows: Vec<Vec<String>> = findings
        .iter()
        .map(|finding| ["kind", "path", "detail"].map(|column| text(&finding[column]).to_owned()).to_vec())
        .collect();
    let sum = format!("{}: {} of {} points are intact", text(&report["result"]), report["intact"], report["points"]);
    if rows.is_empty() { sum } else { format!("{}\n{sum}", table::render(&["kind", "path", "detail"], &rows)) }
}

fn render_import(report: &Value) -> String {
    let skipped = report["skipped"].as_array().map(Vec::as_slice).unwrap_or_default();
    let imported = report["imported"].as_array().map_or(0, Vec::len);
    let sum = format!("imported {imported}, known before {}, skipped {}", report["known"], skipped.len());
    let rows: Vec<Vec<String>> = skipped
        .iter()
        .map(|skipped| ["path", "reason"].map(|column| text(&skipped[column]).to_owned()).to_vec())
        .collect();
    if rows.is_empty() { sum } else { format!("{}\n{sum}", table::render(&["path", "reason"], &rows)) }
}

fn description(add: &Add) -> Result<Value, CliError> {
    // The service asks for an absolute path; from a shell a relative one means the folder at hand.
    let unreadable = |source| CliError::Unreadable { path: add.path.clone(), source };
    let path = std::path::absolute(&add.path).map_err(unreadable)?;
    let folder_name = || path.file_name().map_or_else(|| "repository".to_owned(), |name| name.to_string_lossy().into());
    let mut body = json!({"name": add.name.clone().unwrap_or_else(folder_name), "path": path});
    if let Some(id) = &add.id {
        body["id"] = id.as_str().into();
    }
    let rules = add.rules.document();
    if !rules.is_empty() {
        body["retention"] = rules.into();
    }
    Ok(body)
}

fn render(repositories: &[Value]) -> String {
    let bytes = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), readable);
    let rows: Vec<Vec<String>> = repositories
        .iter()
        .map(|repository| {
            let enabled = if repository["enabled"] == true { "yes" } else { "no" };
            vec![
                text(&repository["id"]).to_owned(),
                text(&repository["name"]).to_owned(),
                enabled.to_owned(),
                bytes(&repository["free_bytes"]),
                bytes(&repository["total_bytes"]),
                text(&repository["path"]).to_owned(),
            ]
        })
        .collect();
    table::render(&["id", "name", "enabled", "free", "total", "path"], &rows)
}
