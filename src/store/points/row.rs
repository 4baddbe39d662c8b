//! One point and its disks as the database keeps them.

use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::column::unsigned;
use crate::words::BackupType;
use crate::words::point::{PointState, Trust};

/// One restore point.
#[derive(Clone, Debug)]
pub struct PointRow {
    /// The id of the job that made it.
    pub id: BackupId,
    /// Whose disks.
    pub vm_id: VmId,
    /// Where it is.
    pub repository_id: RepositoryId,
    /// The order of commits over the whole hub.
    pub sequence: u64,
    /// Its folder, relative to the repository.
    pub dir: String,
    /// Whether its files are there.
    pub state: PointState,
    /// What is known of its content.
    pub trust: Trust,
    /// Why it is suspect or corrupt.
    pub trust_reason: Option<String>,
    /// When it was last verified, whatever came of it.
    pub verified_at: Option<UtcTime>,
    /// Bytes of its disks that were held against what was received for them, when the disks were last read.
    pub compared_bytes: Option<u64>,
    /// Until when it may not be deleted.
    pub protected_until: Option<UtcTime>,
    /// When it was committed.
    pub committed_at: UtcTime,
    /// How often its images were made anew, as its manifest had it when that was last followed.
    pub generation: u32,
}

/// One disk of a restore point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointDiskRow {
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
    /// The image in the point's folder.
    pub file: String,
    /// Its length.
    pub file_bytes: u64,
    /// The state of the disk in change tracking.
    pub change_id: Option<String>,
    /// The point below it.
    pub parent_id: Option<BackupId>,
    /// How many images a read may pass.
    pub chain_depth: u32,
    /// What it became by the bytes that came; unknown of points that an older version recorded.
    pub effective_type: Option<String>,
    /// Where its delta begins.
    pub from_change_id: Option<String>,
    /// Bytes that came and were not stored, being equal to what lies below; as unknown as `effective_type`.
    pub identical_bytes: Option<u64>,
    /// BLAKE3 of the image file, in hexadecimal digits; nothing until it was taken.
    pub digest: Option<String>,
    /// The root over the content of the virtual disk; nothing until it was taken.
    pub content_digest: Option<String>,
}

impl FromRow<'_, SqliteRow> for PointRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            vm_id: row.try_get("vm_id")?,
            repository_id: row.try_get("repository_id")?,
            sequence: unsigned(row, "sequence")?,
            dir: row.try_get("dir")?,
            state: row.try_get("state")?,
            trust: row.try_get("trust")?,
            trust_reason: row.try_get("trust_reason")?,
            verified_at: row.try_get("verified_at")?,
            compared_bytes: row.try_get::<Option<i64>, _>("compared_bytes")?.map(i64::unsigned_abs),
            protected_until: row.try_get("protected_until")?,
            committed_at: row.try_get("committed_at")?,
            generation: row.try_get("generation")?,
        })
    }
}

impl FromRow<'_, SqliteRow> for PointDiskRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            disk_id: row.try_get("disk_id")?,
            device_key: row.try_get("device_key")?,
            vmdk_uuid: row.try_get("vmdk_uuid")?,
            vmdk_path: row.try_get("vmdk_path")?,
            size_bytes: unsigned(row, "size_bytes")?,
            backup_type: row.try_get("backup_type")?,
            file: row.try_get("file")?,
            file_bytes: unsigned(row, "file_bytes")?,
            change_id: row.try_get("change_id")?,
            parent_id: row.try_get("parent_id")?,
            chain_depth: row.try_get("chain_depth")?,
            effective_type: row.try_get("effective_type")?,
            from_change_id: row.try_get("from_change_id")?,
            identical_bytes: row.try_get::<Option<i64>, _>("identical_bytes")?.map(i64::unsigned_abs),
            digest: row.try_get("digest")?,
            content_digest: row.try_get("content_digest")?,
        })
    }
}

/// A point to be stored; the database gives the sequence.
#[derive(Clone, Debug)]
pub struct NewPoint<'a> {
    /// The id of the job.
    pub id: &'a BackupId,
    /// Whose disks.
    pub vm_id: &'a VmId,
    /// Where.
    pub repository_id: &'a RepositoryId,
    /// Its folder, relative to the repository.
    pub dir: &'a str,
    /// `unverified`, or `suspect` when something is known to be amiss.
    pub trust: Trust,
    /// When.
    pub committed_at: UtcTime,
    /// How often its images were made anew, as its manifest says.
    pub generation: u32,
    /// Its disks.
    pub disks: &'a [PointDiskRow],
}
