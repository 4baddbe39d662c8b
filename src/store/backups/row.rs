//! The rows of `backups` and `backup_disks` as values.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::StoreError;
use crate::store::column::unsigned;
use crate::words::{BackupType, DiskState, FailureCode, JobResult, JobState, RequestedType, TypeReason, UnknownWord};

/// What is known about the one call to the node; absent while it was never tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeOutcome {
    /// About to be called; after a restart this means "perhaps launched".
    Intended,
    /// It said that it launched a client, or a client was seen.
    Accepted,
    /// It said that it did not.
    Rejected,
    /// Nothing was sent.
    Unreachable,
    /// Nobody knows.
    Ambiguous,
}

impl NodeOutcome {
    /// Whether a backup client may have been started, and may have left a snapshot.
    pub fn may_have_launched(self) -> bool {
        matches!(self, Self::Intended | Self::Accepted | Self::Ambiguous)
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Intended => "intended",
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
            Self::Unreachable => "unreachable",
            Self::Ambiguous => "ambiguous",
        }
    }
}

impl std::fmt::Display for NodeOutcome {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl std::str::FromStr for NodeOutcome {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        [Self::Intended, Self::Accepted, Self::Rejected, Self::Unreachable, Self::Ambiguous]
            .into_iter()
            .find(|outcome| outcome.as_str() == word)
            .ok_or_else(|| UnknownWord { kind: "NodeOutcome", word: word.to_owned() })
    }
}

/// One job.
#[derive(Clone, Debug)]
pub struct BackupRow {
    /// Its id, and that of its restore point.
    pub id: BackupId,
    /// Whose backup it is.
    pub vm_id: VmId,
    /// Where it goes.
    pub repository_id: RepositoryId,
    /// The VM's name at the start.
    pub vm_name: String,
    /// What was asked for.
    pub requested_type: RequestedType,
    /// What it is: full when every disk is.
    pub backup_type: BackupType,
    /// Where it is.
    pub state: JobState,
    /// What became of it.
    pub result: JobResult,
    /// Why it failed.
    pub code: Option<FailureCode>,
    /// The same for people.
    pub message: Option<String>,
    /// What became of the call to the node.
    pub node_outcome: Option<NodeOutcome>,
    /// The process start that runs it.
    pub boot_id: String,
    /// The caller's policy.
    pub policy_id: Option<String>,
    /// The caller's words.
    pub tags: BTreeMap<String, String>,
    /// What the caller should know.
    pub warnings: Vec<String>,
    /// When it was accepted.
    pub created_at: UtcTime,
    /// When the backup client first showed itself.
    pub started_at: Option<UtcTime>,
    /// When it ended.
    pub completed_at: Option<UtcTime>,
}

/// One disk of a job.
#[derive(Clone, Debug)]
pub struct BackupDiskRow {
    /// Our number of it.
    pub disk_id: u32,
    /// VMware's.
    pub device_key: u32,
    /// The identity of the VMDK.
    pub vmdk_uuid: Option<String>,
    /// Its path in the datastore.
    pub vmdk_path: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// Full or overlay.
    pub backup_type: BackupType,
    /// What was observed.
    pub effective_type: Option<String>,
    /// Why it has its type.
    pub reason: TypeReason,
    /// The point below it.
    pub parent_id: Option<BackupId>,
    /// The state its delta begins at.
    pub from_change_id: Option<String>,
    /// The state this backup holds.
    pub change_id: Option<String>,
    /// The port its listener is bound to.
    pub port: Option<u16>,
    /// The name of its export.
    pub export_name: Option<String>,
    /// Where it is.
    pub state: DiskState,
    /// What went wrong with it.
    pub error_message: Option<String>,
    /// Distinct bytes written or zeroed.
    pub covered_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Bytes zeroed.
    pub zeroed_bytes: u64,
    /// Of that, in large requests, what was data in the last usable point.
    pub zeroed_over_data_bytes: u64,
    /// Bytes equal to the parent's and not stored.
    pub identical_bytes: u64,
    /// When it was sealed.
    pub sealed_at: Option<UtcTime>,
}

impl FromRow<'_, SqliteRow> for BackupRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            vm_id: row.try_get("vm_id")?,
            repository_id: row.try_get("repository_id")?,
            vm_name: row.try_get("vm_name")?,
            requested_type: row.try_get("requested_type")?,
            backup_type: row.try_get("backup_type")?,
            state: row.try_get("state")?,
            result: row.try_get("result")?,
            code: row.try_get("code")?,
            message: row.try_get("message")?,
            node_outcome: row.try_get("node_outcome")?,
            boot_id: row.try_get("boot_id")?,
            policy_id: row.try_get("policy_id")?,
            tags: json(row, "tags")?,
            warnings: json(row, "warnings")?,
            created_at: row.try_get("created_at")?,
            started_at: row.try_get("started_at")?,
            completed_at: row.try_get("completed_at")?,
        })
    }
}

impl FromRow<'_, SqliteRow> for BackupDiskRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            disk_id: row.try_get("disk_id")?,
            device_key: row.try_get("device_key")?,
            vmdk_uuid: row.try_get("vmdk_uuid")?,
            vmdk_path: row.try_get("vmdk_path")?,
            size_bytes: unsigned(row, "size_bytes")?,
            backup_type: row.try_get("backup_type")?,
            effective_type: row.try_get("effective_type")?,
            reason: row.try_get("reason")?,
            parent_id: row.try_get("parent_id")?,
            from_change_id: row.try_get("from_change_id")?,
            change_id: row.try_get("change_id")?,
            port: row.try_get("port")?,
            export_name: row.try_get("export_name")?,
            state: row.try_get("state")?,
            error_message: row.try_get("error_message")?,
            covered_bytes: unsigned(row, "covered_bytes")?,
            written_bytes: unsigned(row, "written_bytes")?,
            zeroed_bytes: unsigned(row, "zeroed_bytes")?,
            zeroed_over_data_bytes: unsigned(row, "zeroed_over_data_bytes")?,
            identical_bytes: unsigned(row, "identical_bytes")?,
            sealed_at: row.try_get("sealed_at")?,
        })
    }
}

pub(super) fn json_text<T: Serialize>(value: &T) -> Result<String, StoreError> {
    Ok(serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))?)
}

fn json<T: DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<T, sqlx::Error> {
    serde_json::from_str(row.try_get(column)?)
        .map_err(|error| sqlx::Error::ColumnDecode { index: column.to_owned(), source: error.into() })
}
