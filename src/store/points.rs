//! The tables `restore_points` and `point_disks`: what committed jobs left, in the order of their commits.

use std::path::{Path, PathBuf};

use serde_json::json;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, QueryBuilder, Row};

use super::column::{signed, unsigned};
use super::events::{self, Actor};
use super::{Connection, Listing, Page, StoreError};
use crate::backup::state::BackupType;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::points::state::{PointState, Trust};

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

/// One image of a chain: that of a disk in one point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainImage {
    /// The point's folder, relative to the repository.
    pub dir: String,
    /// Whether the point's files are there.
    pub state: PointState,
    /// As in [`PointRow`].
    pub trust: Trust,
    /// The image in the point's folder.
    pub file: String,
    /// Its length.
    pub file_bytes: u64,
}

impl FromRow<'_, SqliteRow> for ChainImage {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            dir: row.try_get("dir")?,
            state: row.try_get("state")?,
            trust: row.try_get("trust")?,
            file: row.try_get("file")?,
            file_bytes: unsigned(row, "file_bytes")?,
        })
    }
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

/// Stores a point with its disks and its event; returns its sequence.
///
/// # Errors
/// The database's.
pub async fn insert(connection: &mut Connection, point: &NewPoint<'_>) -> Result<i64, StoreError> {
    let sequence: i64 = sqlx::query_scalar("SELECT COALESCE(max(sequence), 0) + 1 FROM restore_points")
        .fetch_one(&mut *connection)
        .await?;
    sqlx::query(
        "INSERT INTO restore_points (id, vm_id, repository_id, sequence, dir, state, trust, committed_at, generation) \
         VALUES (?, ?, ?, ?, ?, 'committed', ?, ?, ?)",
    )
    .bind(point.id)
    .bind(point.vm_id)
    .bind(point.repository_id)
    .bind(sequence)
    .bind(point.dir)
    .bind(point.trust)
    .bind(point.committed_at)
    .bind(point.generation)
    .execute(&mut *connection)
    .await?;
    for disk in point.disks {
        sqlx::query(
            "INSERT INTO point_disks (point_id, disk_id, device_key, vmdk_uuid, vmdk_path, size_bytes, backup_type, file, \
             file_bytes, change_id, parent_id, chain_depth, effective_type, from_change_id, identical_bytes, digest, \
             content_digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(point.id)
        .bind(disk.disk_id)
        .bind(disk.device_key)
        .bind(&disk.vmdk_uuid)
        .bind(&disk.vmdk_path)
        .bind(signed(disk.size_bytes)?)
        .bind(disk.backup_type)
        .bind(&disk.file)
        .bind(signed(disk.file_bytes)?)
        .bind(&disk.change_id)
        .bind(&disk.parent_id)
        .bind(disk.chain_depth)
        .bind(&disk.effective_type)
        .bind(&disk.from_change_id)
        .bind(disk.identical_bytes.map(signed).transpose()?)
        .bind(&disk.digest)
        .bind(&disk.content_digest)
        .execute(&mut *connection)
        .await?;
    }
    // What was below when the job began may have been merged meanwhile.
    refresh_depths(connection, point.id).await?;
    let data = json!({
        "point_id": point.id, "repository_id": point.repository_id, "sequence": sequence, "disks": point.disks.len(),
        "parents": point.disks.iter().map(|disk| &disk.parent_id).collect::<Vec<_>>(), "trust": point.trust,
    });
    events::append(connection, "point.committed", point.id.as_str(), &data, Actor::Service, point.committed_at).await?;
    Ok(sequence)
}

/// The longest chain that is followed when depths are counted: above what the engine opens, so that only a circle in a
/// damaged database reaches it.
const DEPTH_MAX: u32 = 1000;

/// Counts anew how many images lie under the disks of a point and of all that is built upon it.
///
/// # Errors
/// The database's.
pub async fn refresh_depths(connection: &mut Connection, id: &BackupId) -> Result<(), StoreError> {
    sqlx::query(
        "WITH RECURSIVE above (point_id, disk_id, depth) AS ( \
             SELECT own.point_id, own.disk_id, \
                    CASE WHEN own.parent_id IS NULL THEN 1 ELSE COALESCE(below.chain_depth + 1, own.chain_depth) END \
             FROM point_disks AS own LEFT JOIN point_disks AS below \
                  ON below.point_id = own.parent_id AND below.disk_id = own.disk_id \
             WHERE own.point_id = ?1 \
             UNION \
             SELECT child.point_id, child.disk_id, above.depth + 1 FROM point_disks AS child \
             JOIN above ON child.parent_id = above.point_id AND child.disk_id = above.disk_id WHERE above.depth < ?2) \
         UPDATE point_disks SET chain_depth = above.depth FROM above \
         WHERE point_disks.point_id = above.point_id AND point_disks.disk_id = above.disk_id",
    )
    .bind(id)
    .bind(DEPTH_MAX)
    .execute(connection)
    .await?;
    Ok(())
}

/// What a merge makes of one disk of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergedDisk {
    /// Which one.
    pub disk_id: u32,
    /// Full or overlay.
    pub backup_type: BackupType,
    /// The length of its image.
    pub file_bytes: u64,
    /// The point below it.
    pub parent_id: Option<BackupId>,
    /// Where its delta begins.
    pub from_change_id: Option<String>,
}

/// Brings the record of a point to what a merge has published: its generation, its disks, the depths of all above it, what is trusted of it,
/// and the event. The digest of an image that was made anew is not known; that of the content stays what it is.
///
/// # Errors
/// The database's.
pub async fn record_merge(
    connection: &mut Connection,
    id: &BackupId,
    generation: u32,
    merged: &[BackupId],
    disks: &[MergedDisk],
) -> Result<(), StoreError> {
    for disk in disks {
        sqlx::query(
            "UPDATE point_disks SET backup_type = ?1, file_bytes = ?2, from_change_id = ?3, parent_id = ?4, \
             digest = CASE WHEN parent_id IS NOT DISTINCT FROM ?4 THEN digest END WHERE point_id = ?5 AND disk_id = ?6",
        )
        .bind(disk.backup_type)
        .bind(signed(disk.file_bytes)?)
        .bind(&disk.from_change_id)
        .bind(&disk.parent_id)
        .bind(id)
        .bind(disk.disk_id)
        .execute(&mut *connection)
        .await?;
    }
    refresh_depths(connection, id).await?;
    sqlx::query("UPDATE restore_points SET generation = ? WHERE id = ?")
        .bind(generation)
        .bind(id)
        .execute(&mut *connection)
        .await?;
    // Files that nobody has read since they were written.
    sqlx::query(
        "UPDATE restore_points SET trust = 'unverified', verified_at = NULL WHERE id = ? AND trust = 'verified'",
    )
    .bind(id)
    .execute(&mut *connection)
    .await?;
    let data = json!({
        "point_id": id, "generation": generation, "merged": merged,
        "parents": disks.iter().map(|disk| &disk.parent_id).collect::<Vec<_>>(),
    });
    events::append(connection, "point.merged", id.as_str(), &data, Actor::Service, UtcTime::now()).await?;
    Ok(())
}

/// The names of the images of all points in a repository that are there or missing.
///
/// # Errors
/// The database's.
pub async fn files_in(
    connection: &mut Connection,
    repository: &RepositoryId,
) -> Result<Vec<(BackupId, String)>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT point_id, file FROM point_disks JOIN restore_points ON id = point_id \
         WHERE repository_id = ? AND state IN ('committed', 'missing') ORDER BY sequence, disk_id",
    )
    .bind(repository)
    .fetch_all(connection)
    .await?)
}

/// The newest point of a VM in a repository whose files are not meant to go. Whether it can be built upon is not decided here.
///
/// # Errors
/// The database's.
pub async fn newest(
    connection: &mut Connection,
    vm: &VmId,
    repository: &RepositoryId,
) -> Result<Option<PointRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT * FROM restore_points WHERE vm_id = ? AND repository_id = ? AND state NOT IN ('deleting', 'deleted') \
         ORDER BY sequence DESC LIMIT 1",
    )
    .bind(vm)
    .bind(repository)
    .fetch_optional(connection)
    .await?)
}

/// The newest point of a VM in a repository that has this disk and is not known to be amiss, and the disk's image in it, relative
/// to the repository.
///
/// # Errors
/// The database's.
pub async fn newest_usable_image(
    connection: &mut Connection,
    vm: &VmId,
    repository: &RepositoryId,
    disk_id: u32,
) -> Result<Option<(BackupId, PathBuf)>, StoreError> {
    let found: Option<(BackupId, String, String)> = sqlx::query_as(
        "SELECT id, dir, file FROM restore_points JOIN point_disks ON point_id = id \
         WHERE vm_id = ? AND repository_id = ? AND disk_id = ? AND state = 'committed' \
         AND trust NOT IN ('suspect', 'corrupt') ORDER BY sequence DESC LIMIT 1",
    )
    .bind(vm)
    .bind(repository)
    .bind(disk_id)
    .fetch_optional(connection)
    .await?;
    Ok(found.map(|(point, dir, file)| (point, Path::new(&dir).join(file))))
}

/// One point.
///
/// # Errors
/// The database's.
pub async fn find(connection: &mut Connection, id: &BackupId) -> Result<Option<PointRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM restore_points WHERE id = ?").bind(id).fetch_optional(connection).await?)
}

/// The disks of a point in ascending order of number.
///
/// # Errors
/// The database's.
pub async fn disks(connection: &mut Connection, id: &BackupId) -> Result<Vec<PointDiskRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM point_disks WHERE point_id = ? ORDER BY disk_id")
        .bind(id)
        .fetch_all(connection)
        .await?)
}

/// The images that a read of a disk of a point may pass, from its own down to the full.
///
/// # Errors
/// The database's.
pub async fn chain(connection: &mut Connection, id: &BackupId, disk_id: u32) -> Result<Vec<ChainImage>, StoreError> {
    // UNION, not UNION ALL: should a damaged database hold a circle, it ends where it began.
    Ok(sqlx::query_as(
        "WITH RECURSIVE chain (point_id, parent_id, file, file_bytes) AS ( \
             SELECT point_id, parent_id, file, file_bytes FROM point_disks WHERE point_id = ?1 AND disk_id = ?2 \
             UNION \
             SELECT below.point_id, below.parent_id, below.file, below.file_bytes FROM point_disks AS below \
             JOIN chain ON below.point_id = chain.parent_id AND below.disk_id = ?2) \
         SELECT dir, state, trust, file, file_bytes FROM chain JOIN restore_points ON id = point_id ORDER BY sequence DESC",
    )
    .bind(id)
    .bind(disk_id)
    .fetch_all(connection)
    .await?)
}

/// A point and all points below any of its disks, with their states; the order means nothing.
///
/// # Errors
/// The database's.
pub async fn ancestry(connection: &mut Connection, id: &BackupId) -> Result<Vec<(BackupId, PointState)>, StoreError> {
    Ok(sqlx::query_as(
        "WITH RECURSIVE below (id) AS ( \
             SELECT ? \
             UNION \
             SELECT parent_id FROM point_disks JOIN below ON point_id = below.id WHERE parent_id IS NOT NULL) \
         SELECT restore_points.id, state FROM restore_points JOIN below ON restore_points.id = below.id",
    )
    .bind(id)
    .fetch_all(connection)
    .await?)
}

/// The points that have a disk directly upon a disk of this one and are not deleted, oldest first.
///
/// # Errors
/// The database's.
pub async fn children(connection: &mut Connection, id: &BackupId) -> Result<Vec<BackupId>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT DISTINCT restore_points.id FROM point_disks JOIN restore_points ON restore_points.id = point_id \
         WHERE parent_id = ? AND restore_points.state <> 'deleted' ORDER BY sequence",
    )
    .bind(id)
    .fetch_all(connection)
    .await?)
}

/// Every point of a repository that is not deleted.
///
/// # Errors
/// The database's.
pub async fn all_in(connection: &mut Connection, repository: &RepositoryId) -> Result<Vec<PointRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM restore_points WHERE repository_id = ? AND state <> 'deleted' ORDER BY sequence")
        .bind(repository)
        .fetch_all(connection)
        .await?)
}

/// The points, short of deleted ones, of VMs that had exactly this name when they were backed up, oldest first.
///
/// # Errors
/// The database's.
pub async fn of_name(connection: &mut Connection, vm_name: &str) -> Result<Vec<PointRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT restore_points.* FROM restore_points JOIN backups ON backups.id = restore_points.id \
         WHERE vm_name = ? AND restore_points.state <> 'deleted' ORDER BY sequence",
    )
    .bind(vm_name)
    .fetch_all(connection)
    .await?)
}

/// What there is, summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Points that are not deleted.
    pub points: u64,
    /// The length of their images together.
    pub bytes: u64,
    /// When the newest was committed.
    pub last_committed_at: Option<UtcTime>,
}

/// Sums up the points of VMs that had this name, in this repository; of all without.
///
/// # Errors
/// The database's.
pub async fn stats(
    connection: &mut Connection,
    vm_name: Option<&str>,
    repository: Option<&RepositoryId>,
) -> Result<Stats, StoreError> {
    let (points, bytes, last_committed_at): (i64, i64, Option<UtcTime>) = sqlx::query_as(
        "SELECT count(*), COALESCE(sum((SELECT sum(file_bytes) FROM point_disks WHERE point_id = restore_points.id)), 0), \
         max(committed_at) FROM restore_points JOIN backups ON backups.id = restore_points.id \
         WHERE restore_points.state <> 'deleted' AND (?1 IS NULL OR vm_name = ?1) \
         AND (?2 IS NULL OR restore_points.repository_id = ?2)",
    )
    .bind(vm_name)
    .bind(repository)
    .fetch_one(connection)
    .await?;
    Ok(Stats { points: points.unsigned_abs(), bytes: bytes.unsigned_abs(), last_committed_at })
}

/// Notes that files of a point are gone or all back, and tells. What is back was not read since: it is to be verified soon.
///
/// # Errors
/// The database's.
pub async fn set_presence(connection: &mut Connection, point: &PointRow, state: PointState) -> Result<(), StoreError> {
    set_state(connection, &point.id, state).await?;
    if state == PointState::Committed {
        super::trust::forget_verified(connection, point, UtcTime::now()).await?;
    }
    let alert = if state == PointState::Missing { "point_missing" } else { "point_back" };
    let data = json!({
        "alert": alert, "point_id": point.id, "repository_id": point.repository_id, "vm_context_id": point.vm_id,
        "from": point.state, "state": state, "path": point.dir,
    });
    events::append(connection, "alert", point.id.as_str(), &data, Actor::Service, UtcTime::now()).await?;
    Ok(())
}

/// Notes whether the files of a point are there.
///
/// # Errors
/// The database's.
pub async fn set_state(connection: &mut Connection, id: &BackupId, state: PointState) -> Result<(), StoreError> {
    sqlx::query("UPDATE restore_points SET state = ? WHERE id = ?").bind(state).bind(id).execute(connection).await?;
    Ok(())
}

/// Whether the files of a point are being removed or made anew: a task holds it, or it is recorded as deleting.
///
/// # Errors
/// The database's.
pub async fn is_worked_on(connection: &mut Connection, id: &BackupId) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM restore_points WHERE id = ?1 AND state = 'deleting') \
         OR EXISTS (SELECT 1 FROM leases WHERE kind = 'pin' AND key = ?1 AND owner LIKE 'task-%')",
    )
    .bind(id)
    .fetch_one(connection)
    .await?)
}

/// Sets or, with nothing, removes the protection of a point.
///
/// # Errors
/// The database's.
pub async fn set_protection(
    connection: &mut Connection,
    id: &BackupId,
    until: Option<UtcTime>,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE restore_points SET protected_until = ? WHERE id = ?")
        .bind(until)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// One disk of a point, as far as retention cares.
#[derive(Clone, Debug)]
pub struct DiskLink {
    /// The point.
    pub point_id: BackupId,
    /// The disk.
    pub disk_id: u32,
    /// The point that holds the image below.
    pub parent_id: Option<BackupId>,
    /// The length of the image.
    pub file_bytes: u64,
}

impl FromRow<'_, SqliteRow> for DiskLink {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            point_id: row.try_get("point_id")?,
            disk_id: row.try_get("disk_id")?,
            parent_id: row.try_get("parent_id")?,
            file_bytes: unsigned(row, "file_bytes")?,
        })
    }
}

/// The points of a VM in a repository that are not deleted, in the order of their commits.
///
/// # Errors
/// The database's.
pub async fn all_of(
    connection: &mut Connection,
    vm: &VmId,
    repository: &RepositoryId,
) -> Result<Vec<PointRow>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT * FROM restore_points WHERE vm_id = ? AND repository_id = ? AND state <> 'deleted' ORDER BY sequence",
    )
    .bind(vm)
    .bind(repository)
    .fetch_all(connection)
    .await?)
}

/// The disks of these points.
///
/// # Errors
/// The database's.
pub async fn links_of(
    connection: &mut Connection,
    vm: &VmId,
    repository: &RepositoryId,
) -> Result<Vec<DiskLink>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT point_id, disk_id, point_disks.parent_id, file_bytes FROM point_disks \
         JOIN restore_points ON restore_points.id = point_id \
         WHERE vm_id = ? AND repository_id = ? AND restore_points.state <> 'deleted' ORDER BY sequence, disk_id",
    )
    .bind(vm)
    .bind(repository)
    .fetch_all(connection)
    .await?)
}

/// The VMs that have points in a repository, with their names; also those that were removed from the inventory.
///
/// # Errors
/// The database's.
pub async fn vms_in(connection: &mut Connection, repository: &RepositoryId) -> Result<Vec<(VmId, String)>, StoreError> {
    Ok(sqlx::query_as(
        "SELECT DISTINCT vms.id, vms.name FROM vms JOIN restore_points ON vm_id = vms.id \
         WHERE repository_id = ? AND restore_points.state <> 'deleted' ORDER BY vms.name, vms.id",
    )
    .bind(repository)
    .fetch_all(connection)
    .await?)
}

/// Which points; all that are not deleted by default.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// By VM.
    pub vm_id: Option<VmId>,
    /// By repository.
    pub repository_id: Option<RepositoryId>,
}

/// One page of the points that match, in the reverse order of their commits.
///
/// # Errors
/// The database's.
pub async fn list(
    connection: &mut Connection,
    filter: &Filter,
    page: &Page<u64>,
) -> Result<Listing<PointRow, u64>, StoreError> {
    let restricted = |select: &str| {
        let mut query = QueryBuilder::new(select);
        query.push(" FROM restore_points WHERE state <> 'deleted'");
        if let Some(vm) = &filter.vm_id {
            query.push(" AND vm_id = ").push_bind(vm.clone());
        }
        if let Some(repository) = &filter.repository_id {
            query.push(" AND repository_id = ").push_bind(repository.clone());
        }
        query
    };
    let total: i64 = restricted("SELECT count(*)").build_query_scalar().fetch_one(&mut *connection).await?;
    let mut query = restricted("SELECT *");
    if let Some(before) = page.after {
        query.push(" AND sequence < ").push_bind(signed(before)?);
    }
    query.push(" ORDER BY sequence DESC LIMIT ").push_bind(page.fetch_limit());
    let points = query.build_query_as().fetch_all(connection).await?;
    Ok(page.listing(points, total.unsigned_abs(), |point: &PointRow| point.sequence))
}
