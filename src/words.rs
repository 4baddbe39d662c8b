//! The words that records, manifests and answers share. Here those of a job's life: its states, those of its disks, how it ended, and
//! which change may follow which; those of a restore point are in `point`. Below everything else: nothing of a job or a store is known.
//!
//! Pure: no database, no clock. The store writes a change only when [`JobState::may_become`] allows it and the row still
//! has the old state, so that a terminal state never changes.

pub mod point;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Makes the text form of a fieldless enum: `as_str`, `Display`, and `FromStr` for what the database gives back.
macro_rules! words {
    ($name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $name {
            /// Every value, in the order of the contract.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable word of the API and the database.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::words::UnknownWord;

            fn from_str(word: &str) -> Result<Self, $crate::words::UnknownWord> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err($crate::words::UnknownWord { kind: stringify!($name), word: word.to_owned() }),
                }
            }
        }
    };
}

pub(crate) use words;

/// A word that this version does not know, usually from a newer database.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is no {kind} of this version")]
pub struct UnknownWord {
    /// Which list of words was asked.
    pub kind: &'static str,
    /// What was found.
    pub word: String,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Rows and VM slot are stored, nothing else has happened.
    Accepted,
    /// Ports, images and listeners are being made.
    Preparing,
    /// The node is being called, or was, and no client has connected.
    Starting,
    /// A client has connected.
    Transferring,
    /// No sign of life for `jobs.idle_s`.
    Stalled,
    /// The last disk is being drained, proven and made durable.
    Sealing,
    /// All disks are sealed; the restore point is being published.
    Committing,
    /// The restore point exists. Terminal.
    Committed,
    /// Someone asked to stop; the undo runs.
    Cancelling,
    /// Stopped on request, nothing left. Terminal.
    Cancelled,
    /// Something went wrong; the undo runs.
    Failing,
    /// Ended without a restore point, nothing left. Terminal.
    Failed,
}

words!(JobState {
    Accepted = "accepted",
    Preparing = "preparing",
    Starting = "starting",
    Transferring = "transferring",
    Stalled = "stalled",
    Sealing = "sealing",
    Committing = "committing",
    Committed = "committed",
    Cancelling = "cancelling",
    Cancelled = "cancelled",
    Failing = "failing",
    Failed = "failed",
});

impl JobState {
    /// Whether nothing can follow.
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Committed | Self::Cancelled | Self::Failed)
    }

    /// Whether the job is over or on its way out, so that callers may no longer drive it.
    pub const fn is_ending(self) -> bool {
        matches!(self, Self::Cancelling | Self::Failing) || self.is_terminal()
    }

    /// Whether `next` may follow.
    ///
    /// Failing and cancelling are possible from every state before the rename; a job in `committing` can still fail while
    /// its manifest is being written, and once renamed it only goes forward (the job itself knows which).
    pub const fn may_become(self, next: Self) -> bool {
        use JobState as S;
        match next {
            S::Accepted => false,
            S::Preparing => matches!(self, S::Accepted),
            S::Starting => matches!(self, S::Preparing),
            S::Transferring => matches!(self, S::Starting | S::Stalled),
            S::Stalled => matches!(self, S::Transferring),
            S::Sealing => matches!(self, S::Transferring | S::Stalled),
            S::Committing => matches!(self, S::Sealing),
            // From any state: a restart may find the renamed directory whatever the row says.
            S::Committed => !self.is_terminal(),
            S::Cancelling => {
                matches!(self, S::Accepted | S::Preparing | S::Starting | S::Transferring | S::Stalled | S::Sealing)
            }
            S::Cancelled => matches!(self, S::Cancelling),
            S::Failing => !self.is_terminal() && !matches!(self, S::Failing | S::Cancelling),
            S::Failed => matches!(self, S::Failing),
        }
    }

    /// The word that older callers know.
    pub const fn old_status(self) -> OldStatus {
        match self {
            Self::Accepted | Self::Preparing => OldStatus::Pending,
            Self::Committed => OldStatus::Completed,
            Self::Failed => OldStatus::Failed,
            Self::Cancelled => OldStatus::Cancelled,
            Self::Starting
            | Self::Transferring
            | Self::Stalled
            | Self::Sealing
            | Self::Committing
            | Self::Cancelling
            | Self::Failing => OldStatus::Running,
        }
    }
}

/// The vocabulary of `status` in answers, kept for callers of the incumbent hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OldStatus {
    /// Not yet at the node.
    Pending,
    /// Under way.
    Running,
    /// A restore point exists.
    Completed,
    /// Ended without one.
    Failed,
    /// Stopped on request.
    Cancelled,
}

words!(OldStatus {
    Pending = "pending",
    Running = "running",
    Completed = "completed",
    Failed = "failed",
    Cancelled = "cancelled",
});

/// What became of a job; `none` until there is proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobResult {
    /// Not over yet.
    None,
    /// A complete, durable restore point.
    Success,
    /// The same, and something the operator must know.
    Warning,
    /// No restore point.
    Failed,
    /// No restore point, on request.
    Cancelled,
}

words!(JobResult {
    None = "none",
    Success = "success",
    Warning = "warning",
    Failed = "failed",
    Cancelled = "cancelled",
});

/// Where one disk of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// A row, nothing else.
    Allocated,
    /// Its listener accepts connections.
    Listening,
    /// A client has passed the handshake.
    Connected,
    /// A client has written or zeroed.
    Writing,
    /// It was being written and its last connection is gone.
    Disconnected,
    /// `/complete` came; requests in flight finish, later ones are refused.
    Draining,
    /// Durable, checked, closed.
    Sealed,
    /// The job did not get that far.
    Failed,
}

words!(DiskState {
    Allocated = "allocated",
    Listening = "listening",
    Connected = "connected",
    Writing = "writing",
    Disconnected = "disconnected",
    Draining = "draining",
    Sealed = "sealed",
    Failed = "failed",
});

/// Why a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The node answered with a refusal.
    NodeRejected,
    /// No byte of the call left this machine.
    NodeUnreachable,
    /// The call may or may not have started a client, and none ever came.
    NodeOutcomeUnknown,
    /// The node accepted and no client ever came.
    NoClient,
    /// A disk was being written and its client did not come back.
    ClientDisconnected,
    /// No sign of life for too long.
    Stalled,
    /// A full disk was completed without all of its bytes.
    CoverageIncomplete,
    /// A delta over a gap in change tracking.
    EpochMismatch,
    /// A write, a sync or a structure check of an image failed.
    ImageFailed,
    /// The repository is full.
    InsufficientStorage,
    /// Ports, images and listeners were not ready in time.
    PrepareTimeout,
    /// A disk could not be made durable in time.
    SealTimeout,
    /// The database refused a step.
    DatabaseError,
    /// The service stopped or was killed while the job ran.
    ServiceRestart,
    /// A write came for a disk that was already completed.
    WriteAfterComplete,
}

words!(FailureCode {
    NodeRejected = "node_rejected",
    NodeUnreachable = "node_unreachable",
    NodeOutcomeUnknown = "node_outcome_unknown",
    NoClient = "no_client",
    ClientDisconnected = "client_disconnected",
    Stalled = "stalled",
    CoverageIncomplete = "coverage_incomplete",
    EpochMismatch = "epoch_mismatch",
    ImageFailed = "image_failed",
    InsufficientStorage = "insufficient_storage",
    PrepareTimeout = "prepare_timeout",
    SealTimeout = "seal_timeout",
    DatabaseError = "database_error",
    ServiceRestart = "service_restart",
    WriteAfterComplete = "write_after_complete",
});

/// What a caller may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RequestedType {
    /// Every byte of every disk.
    Full,
    /// Changes since a parent point, where there is one.
    Incremental,
    /// Whatever is possible and cheapest.
    Auto,
}

words!(RequestedType { Full = "full", Incremental = "incremental", Auto = "auto" });

/// What a disk, a job or a point is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BackupType {
    /// An image without a backing file.
    Full,
    /// An overlay on the parent point's image.
    Incremental,
}

words!(BackupType { Full = "full", Incremental = "incremental" });

/// Why a disk has the type it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TypeReason {
    /// The newest point has an image of the disk to build upon.
    ParentOk,
    /// The caller asked for a full.
    RequestedFull,
    /// There is no committed point of this VM in this repository.
    FirstBackup,
    /// The newest point does not have this disk.
    DiskNew,
    /// The disk has another size than in the newest point.
    SizeChanged,
    /// The number belongs to another disk than in the newest point.
    IdentityChanged,
    /// The newest point holds no change id of this disk.
    NoChangeId,
    /// The newest point, or one below it, is suspected of damage.
    ParentSuspect,
    /// The newest point, or one below it, is damaged: so it is recorded, or its image of the disk is not what was published.
    ParentCorrupt,
    /// Files of the newest point, or of one below it, are not there.
    ParentMissing,
    /// The chain of the parent has reached `storage.max_chain_depth`.
    ChainDepth,
}

words!(TypeReason {
    ParentOk = "parent_ok",
    RequestedFull = "requested_full",
    FirstBackup = "first_backup",
    DiskNew = "disk_new",
    SizeChanged = "size_changed",
    IdentityChanged = "identity_changed",
    NoChangeId = "no_change_id",
    ParentSuspect = "parent_suspect",
    ParentCorrupt = "parent_corrupt",
    ParentMissing = "parent_missing",
    ChainDepth = "chain_depth",
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_maps_to_a_known_old_status() {
        for &state in JobState::ALL {
            assert!(OldStatus::ALL.contains(&state.old_status()));
            assert_eq!(
                state.is_terminal(),
                matches!(state.old_status().as_str(), "completed" | "failed" | "cancelled")
            );
        }
    }

    #[test]
    fn a_terminal_state_never_changes() {
        for &state in JobState::ALL.iter().filter(|state| state.is_terminal()) {
            for &next in JobState::ALL {
                assert!(!state.may_become(next), "{state} -> {next}");
            }
        }
    }

    #[test]
    fn nothing_is_ever_accepted_twice_and_every_other_state_can_be_reached() {
        for &next in JobState::ALL {
            let reachable = JobState::ALL.iter().any(|state| state.may_become(next));
            assert_eq!(reachable, next != JobState::Accepted, "{next}");
        }
    }

    #[test]
    fn committing_is_past_cancelling() {
        assert!(!JobState::Committing.may_become(JobState::Cancelling));
        assert!(JobState::Sealing.may_become(JobState::Cancelling));
    }

    #[test]
    fn words_read_back_as_what_they_were() {
        for &state in JobState::ALL {
            assert_eq!(state.as_str().parse::<JobState>(), Ok(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        for &code in FailureCode::ALL {
            assert_eq!(code.as_str().parse::<FailureCode>(), Ok(code));
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
        assert!("green".parse::<JobState>().is_err());
    }
}
