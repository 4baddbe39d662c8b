//! Why a demo ended before its table.

use std::io;
use std::path::PathBuf;

use crate::cli::Exit;
use crate::cli::client::ClientError;

/// Why there is nothing to compare.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A given disk cannot be read.
    #[error("{} cannot be read", path.display())]
    DiskUnreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A given disk is a directory, a socket or the like.
    #[error("{} is neither a file nor a block device", path.display())]
    NotADisk {
        /// What was given.
        path: PathBuf,
    },
    /// No disk has such a size.
    #[error("{} has {size_bytes} bytes; a disk has a positive multiple of 512", path.display())]
    DiskSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// `--keep` names a folder with something in it.
    #[error("{} is not empty; --keep takes an empty folder or makes a new one", path.display())]
    KeepNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// `--keep` names what an earlier demo kept.
    #[error(
        "{} holds what an earlier demo kept: `{serve}` serves it; for a new demo name another folder, or remove it",
        path.display()
    )]
    KeepIsDemo {
        /// The folder.
        path: PathBuf,
        /// The command that serves it.
        serve: String,
    },
    /// A file or folder of the demo cannot be made.
    #[error("{} cannot be made", path.display())]
    Make {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The stand-in for the node cannot be started.
    #[error("the stand-in for the node cannot be started")]
    Node {
        /// What the system said.
        source: io::Error,
    },
    /// The demo's own service refused something, or did not answer.
    #[error(transparent)]
    Api(#[from] ClientError),
    /// The service answered something that is not in its description.
    #[error("the service did not say {what}")]
    Answer {
        /// What was missing.
        what: &'static str,
    },
    /// The backup did not end with a restore point.
    #[error("the backup ended as {state}: {message} ({code})")]
    Backup {
        /// `failed` or `cancelled`.
        state: String,
        /// The job's message.
        message: String,
        /// The job's code.
        code: String,
    },
    /// A disk cannot be read any more.
    #[error("disk {disk_id} cannot be read")]
    SourceUnreadable {
        /// Which one.
        disk_id: usize,
        /// What the system said.
        source: io::Error,
    },
    /// An image is not where the service says.
    #[error("{} cannot be used", path.display())]
    Image {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A disk of the restore point cannot be read over NBD.
    #[error("disk {disk_id} of the restore point cannot be read")]
    ReadBack {
        /// Which one.
        disk_id: usize,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Work on another thread ended by a panic.
    #[error("the demo ended by a panic")]
    Panicked,
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl DemoError {
    pub(in crate::cli) fn exit(&self) -> Exit {
        match self {
            Self::DiskUnreadable { source, .. } if source.kind() == io::ErrorKind::NotFound => Exit::NotFound,
            Self::DiskUnreadable { .. } | Self::NotADisk { .. } | Self::DiskSize { .. } => Exit::Usage,
            Self::KeepNotEmpty { .. } | Self::KeepIsDemo { .. } => Exit::Conflict,
            Self::Interrupted => Exit::Interrupted,
            // The service is the demo's own: whatever it refuses, the demo has failed.
            Self::Make { .. }
            | Self::Node { .. }
            | Self::Api(_)
            | Self::Answer { .. }
            | Self::Backup { .. }
            | Self::SourceUnreadable { .. }
            | Self::Image { .. }
            | Self::ReadBack { .. }
            | Self::Panicked => Exit::Failed,
        }
    }
}
