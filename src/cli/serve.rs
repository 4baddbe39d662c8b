//! `blockyard serve`: the service in the foreground until it is told to stop.

use std::path::PathBuf;

use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::{CliError, Exit, Format, Output};
use crate::config::{Config, Environment};
use crate::serve::Service;
use crate::telemetry;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Configuration file; else BLOCKYARD_CONFIG, else /etc/blockyard/blockyard.toml when it exists.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) async fn run(arguments: Arguments, output: &Output) -> Result<Exit, CliError> {
    let config = Config::load(arguments.config.as_deref(), &Environment::of_the_process())?;
    telemetry::init(&config.server);
    raise_open_files_limit();
    // Listened for before anything is opened: a stop during the start is not lost.
    let mut stop = Stop::new()?;
    let token_file = config.token_file();
    let service = Service::start(config).await?;
    let ready = match output.format() {
        Format::Text => format!("ready {} token {}", service.url(), token_file.display()),
        Format::Json => json!({"ready": true, "url": service.url(), "token_file": token_file}).to_string(),
    };
    output.line(&ready)?;
    stop.wait().await;
    tokio::select! {
        () = service.stop() => Ok(Exit::Ok),
        // Asked twice means now; what was not ended is put in order by the next start.
        () = stop.wait() => Ok(Exit::Interrupted),
    }
}

/// Lets the process have as many open files as it may: a disk at the end of a long chain has two for each image of it, and the
/// soft limit of many systems, kept low for programs that use `select`, is reached by a single VM.
fn raise_open_files_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, files = limit.current, "the limit of open files cannot be raised");
    }
}

/// SIGTERM or SIGINT.
pub(super) struct Stop {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Stop {
    /// From now on the two signals no longer end the process.
    pub(super) fn new() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|source| CliError::Signals { source });
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Returns at the next of them.
    pub(super) async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
