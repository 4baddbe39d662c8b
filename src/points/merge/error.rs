//! Why a point was not made anew, for logs and for callers.

use std::io;
use std::path::PathBuf;

use blockyard_qcow2 as qcow2;

use crate::id::{BackupId, RepositoryId};
use crate::repository::manifest::ManifestError;
use crate::store::StoreError;
use crate::words::point::{PointState, Trust};

/// Why a point was not made anew. Nothing was changed then, but where it is said.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// There is no such point, or only its record.
    #[error("there is no point {0}")]
    NotFound(BackupId),
    /// It, or something below it, is not there as it was committed.
    #[error("the point {point} is {state}")]
    NotCommitted {
        /// Which one.
        point: BackupId,
        /// What it is.
        state: PointState,
    },
    /// All its disks are full.
    #[error("the point {0} has no parent")]
    NoParent(BackupId),
    /// What would be copied is known to be wrong, or may be.
    #[error("the point {point} is {trust}")]
    Untrusted {
        /// Which one.
        point: BackupId,
        /// What is known of it.
        trust: Trust,
    },
    /// Something else works on its files.
    #[error("the point {point} is in use by {holder}")]
    Busy {
        /// Which one.
        point: BackupId,
        /// The id of the task.
        holder: String,
    },
    /// Something lies where the point would be made anew, and is not proven to be needless. It is left alone.
    #[error("what an earlier merge of {point} left must be looked at first: {reason}")]
    Leftover {
        /// Which one.
        point: BackupId,
        /// Why it is not removed.
        reason: String,
    },
    /// The repository cannot be used now.
    #[error("the repository {id} cannot be used: {reason}")]
    RepositoryUnavailable {
        /// Which one.
        id: RepositoryId,
        /// Why.
        reason: String,
    },
    /// Too little is free (`insufficient_storage`).
    #[error("a merge needs {needed_bytes} bytes in the repository {id}, and {free_bytes} are free beyond the reserve")]
    InsufficientStorage {
        /// Where.
        id: RepositoryId,
        /// As much as the images that are merged have now.
        needed_bytes: u64,
        /// What there is beyond `storage.min_free_bytes`.
        free_bytes: u64,
    },
    /// The repository became full on the way (`insufficient_storage`).
    #[error("the repository {0} became full during a merge")]
    StorageFull(RepositoryId),
    /// The file system cannot do it at all.
    #[error(
        "the file system of {} cannot exchange two folders in one step (renameat2 with RENAME_EXCHANGE): move the repository \
         to ext4, XFS, Btrfs or another local file system of Linux, or keep what the points build upon",
        path.display()
    )]
    NoExchange {
        /// The folder of the VM.
        path: PathBuf,
    },
    /// The chain on disk is not the one that is recorded.
    #[error("disk {disk_id} of {point} does not lie upon what its record says")]
    Mismatch {
        /// Whose disk.
        point: BackupId,
        /// Which one.
        disk_id: u32,
    },
    /// An image cannot be read or made.
    #[error("disk {disk_id}: {source}")]
    Image {
        /// Which one.
        disk_id: u32,
        /// What the engine says.
        source: qcow2::Error,
    },
    /// What was made does not read as what it was to replace. There is an alert.
    #[error("disk {disk_id} would read differently from byte {offset} on")]
    Unequal {
        /// Which one.
        disk_id: u32,
        /// The first byte.
        offset: u64,
    },
    /// The point's own manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The file system failed.
    #[error("the repository failed: {0}")]
    Files(#[from] io::Error),
    /// The database failed. Where the exchange was made before, the next start records it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The service is stopping.
    #[error("the service is stopping")]
    Stopping,
    /// A bug.
    #[error("the merge ended by a panic")]
    Panicked,
}

impl MergeError {
    /// The same for callers: without what may name paths.
    pub fn public(&self) -> String {
        match self {
            Self::NoExchange { .. } => "the file system cannot exchange two folders in one step".to_owned(),
            Self::Image { disk_id, .. } => format!("disk {disk_id}: an image cannot be read or made"),
            Self::Manifest(_) => "the manifest of the point cannot be used".to_owned(),
            Self::Files(error) => format!("the repository failed ({})", error.kind()),
            Self::Store(_) => "the database failed".to_owned(),
            Self::Leftover { point, .. } => format!("what an earlier merge of {point} left must be looked at first"),
            other => other.to_string(),
        }
    }
}
