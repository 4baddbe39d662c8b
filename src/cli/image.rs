//! `blockyard image`: qcow2 images without a service, in the spirit of `qemu-img`, one file per command.

mod check;
mod compare;
mod create;
mod flatten;
mod grow;
mod info;
mod map;
pub(super) mod work;

use std::path::Path;

use blockyard_qcow2::{Access, BackingFormat, Disk};
use clap::{Subcommand, ValueEnum};

use super::below::Below;
use super::image_error::ImageError;
use super::{CliError, Exit, Output};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create an empty image. An existing file is never overwritten.
    Create(create::Create),
    /// Show what an image says about itself, also one that is in use.
    Info(info::Info),
    /// Look for errors and leaks; nothing is changed.
    ///
    /// Exits with 0 when the image is clean; 2 when it has errors, is marked as corrupt, or was not closed and has new
    /// clusters (their refcounts are written at the close); 3 when it has leaks only, or was merely not closed; and otherwise
    /// when it cannot be checked.
    Check(check::Check),
    /// Set right what follows from the tables: refcounts, leaks, an image that was not closed. Nothing is guessed, and the
    /// disk's content does not change.
    Repair(check::Repair),
    /// Show where each part of the disk comes from.
    Map(map::Map),
    /// Compare two disks byte by byte. What the longer one has more must be zeroes.
    ///
    /// Exits with 0 when they are equal, 1 when they differ, and 2 or more when they cannot be compared.
    Compare(compare::Compare),
    /// Merge an image and all that lies below it into one new file. An existing file is never overwritten.
    ///
    /// While it is being made the file is called TARGET.partial; an error or Ctrl-C removes it.
    Flatten(flatten::Flatten),
    /// Make the disk of an image larger.
    Grow(grow::Grow),
}

/// Formats of a disk; they are never guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Qcow2,
    Raw,
}

impl Format {
    fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

impl From<Format> for BackingFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => Self::Qcow2,
            Format::Raw => Self::Raw,
        }
    }
}

impl From<BackingFormat> for Format {
    fn from(format: BackingFormat) -> Self {
        match format {
            BackingFormat::Qcow2 => Self::Qcow2,
            BackingFormat::Raw => Self::Raw,
        }
    }
}

const NOT_CLOSED: &str = "the image was not closed: this is what was flushed";

/// Opens a whole disk for reading.
fn disk(below: &Below, image: &Path, format: Format, output: &Output) -> Result<Disk, CliError> {
    let (path, options) = below.options(image, Access::ReadOnly)?;
    let disk = Disk::open(&path, format.into(), &options).map_err(|error| ImageError::of(image, error))?;
    if disk.is_dirty() {
        output.note(&format!("{}: {NOT_CLOSED}", image.display()));
    }
    Ok(disk)
}

pub(super) async fn run(command: Command, output: &Output) -> Result<Exit, CliError> {
    match command {
        // Short work on local files: nothing else runs beside it in this process.
        Command::Create(create) => create::run(&create, output),
        Command::Info(info) => info::run(&info, output),
        Command::Check(check) => check::run(&check, output),
        Command::Repair(repair) => check::run_repair(&repair, output),
        Command::Map(map) => map::run(&map, output),
        Command::Grow(grow) => grow::run(&grow, output),
        // As long as the disks are large.
        Command::Compare(compare) => compare::run(compare, output).await,
        Command::Flatten(flatten) => flatten::run(flatten, output).await,
    }
}
