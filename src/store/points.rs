//! The tables `restore_points` and `point_disks`: what committed jobs left, in the order of their commits. Here they are stored,
//! looked up and listed; what builds upon what is in `chain`, and what retention and deletion ask in `retention`.

mod chain;
mod retention;
mod row;

use std::path::{Path, PathBuf};

use serde_json::json;
use sqlx::QueryBuilder;

use super::column::signed;
use super::events::{self, Actor};
use super::{Connection, Listing, Page, StoreError};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::words::point::PointState;

pub use chain::{ChainImage, MergedDisk, ancestry, chain, children, record_merge, refresh_depths};
pub use retention::{DiskLink, all_of, is_worked_on, links_of, set_protection, vms_in};
pub use row::{NewPoint, PointDiskRow, PointRow};

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
