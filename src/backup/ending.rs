//! How things end, in types: a disk that was completed or why not, a job that failed or was cancelled, and what the caller
//! of the start request is told.

use crate::id::BackupId;
use crate::store::StoreError;
use crate::store::backups::ChangeError;
use crate::store::events::Actor;
use crate::words::{FailureCode, JobState};

/// A disk that was completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Its number.
    pub disk_id: u32,
    /// What is stored as its change id.
    pub change_id: Option<String>,
    /// How many disks are sealed now.
    pub sealed: usize,
    /// How many there are.
    pub disks: usize,
}

/// Why a disk was not completed.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// There is no such job.
    #[error("there is no backup {0}")]
    NotFound(BackupId),
    /// The job has no such disk.
    #[error("backup {id} has no disk {disk_id}")]
    NoSuchDisk {
        /// The job.
        id: BackupId,
        /// The number.
        disk_id: u32,
    },
    /// The job failed or was cancelled, or is about to be.
    #[error("backup {id} has ended ({state})")]
    Ended {
        /// The job.
        id: BackupId,
        /// Where it is.
        state: JobState,
    },
    /// The disk was completed with another change id.
    #[error("disk {disk_id} was completed with another change id")]
    ChangeIdConflict {
        /// The number.
        disk_id: u32,
    },
    /// No client ever connected to the disk's export.
    #[error("disk {disk_id} was never connected, so it cannot be complete")]
    NotConnected {
        /// The number.
        disk_id: u32,
    },
    /// The seal or the commit failed, and the job with it.
    #[error("{}", .0.message)]
    Failed(Failed),
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// The stable word.
    pub code: FailureCode,
    /// For people.
    pub message: String,
    /// Who caused it.
    pub(super) by: Actor,
    /// The disk that failed, unless it is the whole job.
    pub(super) disk_id: Option<u32>,
}

impl Failed {
    /// A failure that this service found.
    pub(crate) fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), by: Actor::Service, disk_id: None }
    }

    /// The same, caused by someone else.
    pub(super) fn by(mut self, actor: Actor) -> Self {
        self.by = actor;
        self
    }

    /// The same, found at one disk.
    pub(super) fn at_disk(mut self, disk_id: u32) -> Self {
        self.disk_id = Some(disk_id);
        self
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = &error as &dyn std::error::Error, "the database refused a step of a job");
        Self::new(FailureCode::DatabaseError, "the database refused a step of the job")
    }
}

impl From<ChangeError> for Failed {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Store(error) => error.into(),
            ChangeError::Refused { .. } => {
                tracing::error!(%error, "a job was changed by someone else");
                Self::new(FailureCode::DatabaseError, "the record of the job was changed by someone else")
            }
        }
    }
}

/// How a job that will not be committed ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It failed.
    Failed(Failed),
    /// Someone asked for it.
    Cancelled,
}

impl<T: Into<Failed>> From<T> for End {
    fn from(failure: T) -> Self {
        Self::Failed(failure.into())
    }
}

/// What the caller of the start request is told when the node has decided.
#[derive(Debug)]
pub(super) enum StartNews {
    /// The backup client was launched.
    Started {
        /// What the caller should know beyond the warnings of the request.
        warnings: Vec<String>,
    },
    /// It may have been; the job waits for a sign of life.
    Starting,
    /// The job is over, and everything has been given back.
    Ended(End),
}
