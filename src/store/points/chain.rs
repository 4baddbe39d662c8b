//! What builds upon what: the images below a disk, the points below and above a point, and what a merge changes of that.

use serde_json::json;
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::store::column::{signed, unsigned};
use crate::store::events::{self, Actor};
use crate::store::{Connection, StoreError};
use crate::words::BackupType;
use crate::words::point::{PointState, Trust};

/// One image of a chain: that of a disk in one point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainImage {
    /// The point's folder, relative to the repository.
    pub dir: String,
    /// Whether the point's files are there.
    pub state: PointState,
    /// As in [`PointRow`](super::PointRow).
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
