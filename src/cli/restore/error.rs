//! Why a restore did not come to a good end.

use std::io;
use std::path::PathBuf;

use blockyard_nbd::client::{ClientError, UriError};

use super::disk::DiskError;
use crate::cli::{Exit, client};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum RestoreCommandError {
    /// Nothing is named that should be made, or several things.
    #[error("name what to make by --output, once: a file, or nbd://HOST:PORT/NAME (a file called json is ./json)")]
    OneTarget,
    /// The address of an export cannot be used.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// An NBD server does not let us in.
    #[error("{uri} cannot be used")]
    Connect {
        /// The export.
        uri: String,
        /// Why.
        source: ClientError,
    },
    /// A disk is to be written over NBD in a format that is one of files.
    #[error("--format qcow2 makes a file; an NBD server is written to as it is")]
    FormatOverNbd,
    /// The target does not take writes.
    #[error("{uri} is read-only")]
    TargetReadOnly {
        /// The export.
        uri: String,
    },
    /// The target is too small.
    #[error("{uri} has {target_bytes} bytes, and the disk has {size_bytes}")]
    TargetTooSmall {
        /// The export.
        uri: String,
        /// Its size.
        target_bytes: u64,
        /// What is needed.
        size_bytes: u64,
    },
    /// There is a file in the way.
    #[error("{} exists already; --force replaces it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Something that is no file is in the way.
    #[error("{} is not a file; write to a device through an NBD server of it", path.display())]
    NotAFile {
        /// What is there.
        path: PathBuf,
    },
    /// What an interrupted restore left, or what one makes that runs now.
    #[error("{} exists: a restore makes it now, or was killed; if none is running it may be removed", path.display())]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
    /// The target cannot be made, or not be finished.
    #[error("{target} cannot be made")]
    Make {
        /// The file.
        target: String,
        /// What went wrong.
        source: DiskError,
    },
    /// A file cannot get its name.
    #[error("{} cannot get its name", path.display())]
    Rename {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A part of the disk cannot be read.
    #[error("the disk cannot be read at offset {offset}")]
    Read {
        /// The first byte of the request, or the byte that the server named.
        offset: u64,
        /// What went wrong.
        source: DiskError,
    },
    /// A part of the target cannot be written.
    #[error("the target cannot be written at offset {offset}")]
    Write {
        /// The first byte of the request.
        offset: u64,
        /// What went wrong.
        source: DiskError,
    },
    /// What was written cannot be read back.
    #[error("what was written cannot be read back at offset {offset}")]
    ReadBack {
        /// The first byte of the request.
        offset: u64,
        /// What went wrong.
        source: DiskError,
    },
    /// The disk does not read as it did when its digest was taken.
    #[error(
        "the disk is not what was backed up: its content digest is {found}, and that of the restore point {expected}"
    )]
    NotThePoint {
        /// Of what was read.
        found: String,
        /// Of the restore point.
        expected: String,
    },
    /// The target does not hold what was written to it.
    #[error(
        "the target does not hold what was written to it: its content digest is {found}, and that of the disk {expected}"
    )]
    NotTheCopy {
        /// Of what was read back.
        found: String,
        /// Of what was written.
        expected: String,
    },
    /// The service ended the exports.
    #[error("the service ended the export")]
    Ended,
    /// The service is gone, and with it what it exported.
    #[error("the service has ended, and with it the exports")]
    ServiceEnded {
        /// How that was noticed.
        source: client::ClientError,
    },
}

impl RestoreCommandError {
    pub(in crate::cli) fn exit(&self) -> Exit {
        match self {
            Self::Uri(_)
            | Self::OneTarget
            | Self::FormatOverNbd
            | Self::TargetReadOnly { .. }
            | Self::TargetTooSmall { .. }
            | Self::NotAFile { .. } => Exit::Usage,
            Self::Exists { .. } | Self::Unfinished { .. } => Exit::Conflict,
            Self::ServiceEnded { .. } => Exit::Unreachable,
            Self::NotThePoint { .. } | Self::NotTheCopy { .. } => Exit::Damaged,
            Self::Connect { .. }
            | Self::Make { .. }
            | Self::Rename { .. }
            | Self::Read { .. }
            | Self::Write { .. }
            | Self::ReadBack { .. }
            | Self::Ended => Exit::Failed,
        }
    }
}
