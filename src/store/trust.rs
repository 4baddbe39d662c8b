//! What is known of the content of restore points, in the tables `restore_points` and `point_disks`: digests, trust, and which
//! point is to be read next.

use serde_json::json;
use sqlx::Row;

use super::events::{self, Actor};
use super::points::PointRow;
use super::{Connection, StoreError};
use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::words::point::Trust;

/// Changes the trust in a point, with its event.
///
/// # Errors
/// The database's.
pub async fn change(
    connection: &mut Connection,
    point: &PointRow,
    to: Trust,
    reason: Option<&str>,
    at: UtcTime,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE restore_points SET trust = ?, trust_reason = ? WHERE id = ?")
        .bind(to)
        .bind(reason)
        .bind(&point.id)
        .execute(&mut *connection)
        .await?;
    let data = json!({
        "point_id": point.id, "repository_id": point.repository_id, "from": point.trust, "to": to, "reason": reason,
    });
    events::append(connection, "point.trust", point.id.as_str(), &data, Actor::Service, at).await?;
    Ok(())
}

/// Notes that a verification of a point came to a result, and how many bytes it compared with what was received, where it read the
/// disks.
///
/// # Errors
/// The database's.
pub async fn set_verified(
    connection: &mut Connection,
    id: &BackupId,
    compared_bytes: Option<u64>,
    at: UtcTime,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE restore_points SET verified_at = ?, compared_bytes = COALESCE(?, compared_bytes) WHERE id = ?")
        .bind(at)
        .bind(compared_bytes.map(u64::cast_signed))
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// Notes that what a verification found of a point may not be so any more. What is known to be wrong stays known.
///
/// # Errors
/// The database's.
pub async fn forget_verified(connection: &mut Connection, point: &PointRow, at: UtcTime) -> Result<(), StoreError> {
    sqlx::query("UPDATE restore_points SET verified_at = NULL WHERE id = ?")
        .bind(&point.id)
        .execute(&mut *connection)
        .await?;
    if point.trust == Trust::Verified {
        change(connection, point, Trust::Unverified, None, at).await?;
    }
    Ok(())
}

/// Records what an image and the virtual disk in it hash to; nothing for an image that nobody has read.
///
/// # Errors
/// The database's.
pub async fn set_digests(
    connection: &mut Connection,
    id: &BackupId,
    disk_id: u32,
    digests: Option<(&str, &str)>,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE point_disks SET digest = ?, content_digest = ? WHERE point_id = ? AND disk_id = ?")
        .bind(digests.map(|(image, _)| image))
        .bind(digests.map(|(_, content)| content))
        .bind(id)
        .bind(disk_id)
        .execute(connection)
        .await?;
    Ok(())
}

/// The points that nobody has verified since their commit, oldest first.
///
/// # Errors
/// The database's.
pub async fn never_verified(connection: &mut Connection) -> Result<Vec<BackupId>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT id FROM restore_points WHERE state = 'committed' AND verified_at IS NULL ORDER BY sequence",
    )
    .fetch_all(connection)
    .await?)
}

/// The points whose last verification, or else their commit, is older than a time: those that have waited longest first.
///
/// # Errors
/// The database's.
pub async fn older_than(connection: &mut Connection, time: UtcTime) -> Result<Vec<BackupId>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT id FROM restore_points WHERE state = 'committed' AND COALESCE(verified_at, committed_at) < ? \
         ORDER BY COALESCE(verified_at, committed_at), sequence",
    )
    .bind(time)
    .fetch_all(connection)
    .await?)
}

/// How many points that are there have each trust.
///
/// # Errors
/// The database's.
pub async fn counts(connection: &mut Connection) -> Result<Vec<(Trust, u64)>, StoreError> {
    let rows =
        sqlx::query("SELECT trust, count(*) AS points FROM restore_points WHERE state = 'committed' GROUP BY trust")
            .fetch_all(connection)
            .await?;
    rows.iter().map(|row| Ok((row.try_get("trust")?, row.try_get::<i64, _>("points")?.unsigned_abs()))).collect()
}
