//! The `leases` table: who owns a VM, an inventory name or a port right now, and who reads the files of a restore point.
//!
//! The owning values live in memory; these rows are their record, and the last line of defence against two jobs on one
//! VM. A row of another boot is void: the process that held the thing is gone, and the thing with it.

use super::{Connection, StoreError, points};
use crate::clock::UtcTime;
use crate::id::{BackupId, ExportId};

/// What can be owned, by one owner at a time but for pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseKind {
    /// A VM, by id.
    Vm,
    /// An inventory name, by which the backup client asks for change ids.
    Name,
    /// A TCP port.
    Port,
    /// A restore point whose files are in use, by id: it must not go meanwhile. Any number of owners may hold one.
    Pin,
}

impl LeaseKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Name => "name",
            Self::Port => "port",
            Self::Pin => "pin",
        }
    }
}

/// Takes a lease, or says whose it is.
///
/// # Errors
/// The database's. A key that is taken is no error but an answer.
pub async fn take(
    connection: &mut Connection,
    kind: LeaseKind,
    key: &str,
    owner: &str,
    boot_id: &str,
) -> Result<Result<(), BackupId>, StoreError> {
    if let Some(holder) = holder(connection, kind, key).await? {
        return Ok(Err(holder));
    }
    insert(connection, kind, key, owner, boot_id).await?;
    Ok(Ok(()))
}

/// The job that has a lease; not for pins, which many may have.
///
/// # Errors
/// The database's.
pub async fn holder(connection: &mut Connection, kind: LeaseKind, key: &str) -> Result<Option<BackupId>, StoreError> {
    Ok(sqlx::query_scalar("SELECT owner FROM leases WHERE kind = ? AND key = ?")
        .bind(kind.as_str())
        .bind(key)
        .fetch_optional(connection)
        .await?)
}

/// Takes a lease whoever has it: for things whose possession is proven otherwise, such as a port by its socket.
///
/// # Errors
/// The database's.
pub async fn take_over(
    connection: &mut Connection,
    kind: LeaseKind,
    key: &str,
    owner: &str,
    boot_id: &str,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leases WHERE kind = ? AND key = ?")
        .bind(kind.as_str())
        .bind(key)
        .execute(&mut *connection)
        .await?;
    insert(connection, kind, key, owner, boot_id).await
}

/// Holds a restore point and everything below it, beside all others who do: none of these files goes as long as the pins
/// are there. Whoever opens a chain pins it first.
///
/// # Errors
/// The database's.
pub async fn pin_chain(
    connection: &mut Connection,
    point: &BackupId,
    owner: &str,
    boot_id: &str,
) -> Result<(), StoreError> {
    for (below, _) in points::ancestry(connection, point).await? {
        insert(connection, LeaseKind::Pin, below.as_str(), owner, boot_id).await?;
    }
    Ok(())
}

/// Records an export of a restore point, which owns itself until `deadline`.
///
/// # Errors
/// The database's.
pub async fn record_export(
    connection: &mut Connection,
    export: &ExportId,
    deadline: UtcTime,
    boot_id: &str,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO leases (kind, key, owner, boot_id, deadline) VALUES ('export', ?, ?, ?, ?)")
        .bind(export)
        .bind(export)
        .bind(boot_id)
        .bind(deadline)
        .execute(connection)
        .await?;
    Ok(())
}

/// Moves the deadline of an export; one that is over stays so.
///
/// # Errors
/// The database's.
pub async fn set_export_deadline(
    connection: &mut Connection,
    export: &ExportId,
    deadline: UtcTime,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE leases SET deadline = ? WHERE kind = 'export' AND key = ?")
        .bind(deadline)
        .bind(export)
        .execute(connection)
        .await?;
    Ok(())
}

/// Who holds a restore point: ids of jobs, exports and tasks.
///
/// # Errors
/// The database's.
pub async fn holders(connection: &mut Connection, point: &BackupId) -> Result<Vec<String>, StoreError> {
    Ok(sqlx::query_scalar("SELECT DISTINCT owner FROM leases WHERE kind = 'pin' AND key = ? ORDER BY id")
        .bind(point)
        .fetch_all(connection)
        .await?)
}

/// Every pin: the point, and who holds it.
///
/// # Errors
/// The database's.
pub async fn pins(connection: &mut Connection) -> Result<Vec<(BackupId, String)>, StoreError> {
    Ok(sqlx::query_as("SELECT DISTINCT key, owner FROM leases WHERE kind = 'pin' ORDER BY key, owner")
        .fetch_all(connection)
        .await?)
}

async fn insert(
    connection: &mut Connection,
    kind: LeaseKind,
    key: &str,
    owner: &str,
    boot_id: &str,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO leases (kind, key, owner, boot_id) VALUES (?, ?, ?, ?)")
        .bind(kind.as_str())
        .bind(key)
        .bind(owner)
        .bind(boot_id)
        .execute(connection)
        .await?;
    Ok(())
}

/// Gives back everything an owner has. Repeatable.
///
/// # Errors
/// The database's.
pub async fn release_all(connection: &mut Connection, owner: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM leases WHERE owner = ?").bind(owner).execute(connection).await?;
    Ok(())
}

/// Removes the leases of every other boot and says how many there were.
///
/// # Errors
/// The database's.
pub async fn void_other_boots(connection: &mut Connection, boot_id: &str) -> Result<u64, StoreError> {
    let done = sqlx::query("DELETE FROM leases WHERE boot_id <> ?").bind(boot_id).execute(connection).await?;
    Ok(done.rows_affected())
}

/// How many leases there are.
///
/// # Errors
/// The database's.
pub async fn count(connection: &mut Connection) -> Result<u64, StoreError> {
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM leases").fetch_one(connection).await?;
    Ok(u64::try_from(count).unwrap_or(0))
}
