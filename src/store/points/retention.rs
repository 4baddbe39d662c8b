//! What decides whether a point may go: the points of a VM with what links them, protection, and whether somebody works on one.

use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use super::PointRow;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::column::unsigned;
use crate::store::{Connection, StoreError};

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
