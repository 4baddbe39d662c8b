//! What commands print: answers to standard output, everything else to standard error.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::client::ClientError;
use super::{CliError, Exit};
use crate::telemetry::Chain;

/// Form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs: one document.
    Json,
}

/// Where a command prints to, and in which form.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
    quiet: bool,
}

impl Output {
    /// Output in this form; `quiet` leaves notes away.
    pub fn new(format: Format, quiet: bool) -> Self {
        Self { format, quiet }
    }

    /// The form asked for.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Prints what was asked for: the document, or the text made of it.
    pub fn answer(&self, document: &Value, text: impl FnOnce(&Value) -> String) -> Result<(), CliError> {
        match self.format {
            Format::Text => self.line(text(document).trim_end()),
            Format::Json => self.line(&format!("{document:#}")),
        }
    }

    /// Prints what was done: the document, or a note that `--quiet` leaves away. An empty one says that nothing was.
    pub fn done(&self, document: &Value, note: impl FnOnce(&Value) -> String) -> Result<(), CliError> {
        match self.format {
            Format::Text if self.quiet => Ok(()),
            Format::Text => {
                let note = note(document);
                if note.is_empty() { Ok(()) } else { self.line(&note) }
            }
            Format::Json => self.line(&format!("{document:#}")),
        }
    }

    /// Whether notes are printed at all: not when they were declined, and not around a document.
    pub fn has_notes(&self) -> bool {
        self.format == Format::Text && !self.quiet
    }

    /// Tells on standard error what is going on, unless nobody wants to know.
    pub fn note(&self, note: &str) {
        if self.has_notes() {
            // A note that nobody can read is not missed.
            let _ = writeln!(io::stderr().lock(), "{note}");
        }
    }

    /// Prints one line. A reader that has gone away (a closed pipe) is no error.
    pub fn line(&self, line: &str) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(|source| CliError::Output { source }),
        }
    }

    /// Tells on standard error why the command failed; in JSON the service's own document where there is one.
    pub fn failure(&self, error: &CliError) -> ExitCode {
        let text = match (self.format, error) {
            (Format::Text, _) => format!("blockyard: {}", Chain(error)),
            (Format::Json, CliError::Client(ClientError::Refused { document, .. })) => format!("{document:#}"),
            (Format::Json, _) => format!("{:#}", json!({"error": Chain(error).to_string()})),
        };
        // With standard error gone only the exit code is left to tell.
        let _ = writeln!(io::stderr().lock(), "{text}");
        Exit::into(error.exit())
    }
}
