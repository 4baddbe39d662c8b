//! `blockyard restore`: disks of restore points served for others, or copied to where they are needed.
//!
//! Both commands are clients of the REST API and of the NBD listeners that it makes; neither touches a repository.

mod copy;
mod disk;
mod error;
mod export;
mod file;
mod image;
mod raw;
mod remote;

use clap::{Arg, Subcommand};
use serde_json::Value;

pub(super) use error::RestoreCommandError;

use super::client::{Client, ClientError};
use super::{CliError, Exit, Output};
use crate::id::BackupId;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve disks of a restore point over NBD until Ctrl-C, and print how to copy them.
    ///
    /// Without --disk all of them. The exports end with the command; should it be killed, when they were not used for restore.ttl_s.
    Export(export::Export),
    /// Copy a disk of a restore point into a file or to an NBD server, and compare what arrived with what was read.
    ///
    /// --output names what to make: a file, or the export of an NBD server (nbd://HOST:PORT/NAME, nbd+unix:///NAME?socket=PATH).
    /// Given once more as --output json, the end is told as a document.
    ///
    /// Exits with 1 when a byte cannot be read or written, and with 6 when the copy is not what was backed up; a file is
    /// removed then, but for the latter with --accept-damage. While it is being made it is called FILE.partial.
    Raw(raw::Raw),
}

/// `--output` of all commands as `restore raw` has it; it takes the same.
pub(super) fn named_target(output: Arg) -> Arg {
    output
        .value_name("TARGET")
        .hide_default_value(true)
        .help("What to make: a file, or the export of an NBD server (nbd://…). Once more as `text` or `json`: how to tell of it")
}

impl Command {
    /// Whether `--output` may name what is made.
    pub(super) fn takes_target(&self) -> bool {
        matches!(self, Self::Raw(_))
    }
}

/// Runs a command; `targets` are the values of `--output` that are no format.
pub(super) async fn run(command: Command, targets: &[String], output: &Output) -> Result<Exit, CliError> {
    match (command, targets) {
        (Command::Export(export), _) => export::run(export, output).await,
        (Command::Raw(raw), [target]) => Box::pin(raw::run(raw, target.clone(), output)).await,
        (Command::Raw(_), _) => Err(RestoreCommandError::OneTarget.into()),
    }
}

/// An export that this command made; it lasts until it is ended or was not used for a while.
#[derive(Debug)]
struct Made {
    document: Value,
}

impl Made {
    async fn make(client: &Client, point: &str, body: &Value) -> Result<Self, ClientError> {
        Ok(Self { document: client.post(&format!("/points/{point}/exports"), body).await? })
    }

    fn text(&self, field: &str) -> &str {
        self.document[field].as_str().unwrap_or_default()
    }

    fn warnings(&self) -> impl Iterator<Item = &str> {
        self.document["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str)
    }

    async fn renew(&self, client: &Client) -> Result<Value, ClientError> {
        client.post(&format!("/exports/{}/renew", self.text("id")), &Value::Null).await
    }

    /// Ends it. One that is over already, or a service that is gone, is as good.
    async fn end(&self, client: &Client) {
        let _ = client.delete(&format!("/exports/{}", self.text("id"))).await;
    }
}

/// An id is one step of a path; whatever else was written names no point.
fn check_id(point: &str) -> Result<(), CliError> {
    let not_found = |_| CliError::NotFound { noun: "restore point", name: point.to_owned() };
    point.parse::<BackupId>().map(drop).map_err(not_found)
}
