//! `blockyard repo`: the folders that backups go to.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::Client;
use super::size::readable;
use super::vm::text;
use super::{CliError, Exit, Output, table};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Add a folder that exists as a repository.
    Add(Add),
    /// List all repositories.
    List,
    /// Show a repository.
    Show(Show),
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
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// Id of the repository.
    id: String,
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
            // An id is one step of a path; whatever else was written names no repository.
            if id.parse::<crate::id::RepositoryId>().is_err() {
                return Err(CliError::NotFound { noun: "repository", name: id });
            }
            let repository = client.get(&format!("/repositories/{id}"), &[]).await?;
            output.answer(&repository, |repository| render(std::slice::from_ref(repository)))?;
        }
    }
    Ok(Exit::Ok)
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
