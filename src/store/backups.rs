//! The tables `backups` and `backup_disks`: one row per job and one per disk of it.
//!
//! Every change of a job's state goes through [`change_state`]: a compare-and-set on the old state with its event, so that
//! a terminal state never changes and no change is ever untold.

mod list;
mod row;

use serde_json::json;

use super::column::signed;
use super::events::{self, Actor};
use super::{Connection, StoreError};
use crate::clock::UtcTime;
use crate::export::meter::Reading;
use crate::id::{BackupId, VmId};
use crate::words::{DiskState, FailureCode, JobResult, JobState};

pub use list::{Filter, list};
pub use row::{BackupDiskRow, BackupRow, NodeOutcome};

/// A change of state was refused because the row is elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The job is not in the state the caller believed, or the rules forbid the step.
    #[error("backup {id} cannot go from {from} to {to}")]
    Refused {
        /// The job.
        id: BackupId,
        /// What the caller believed.
        from: JobState,
        /// What it wanted.
        to: JobState,
    },
}

/// A step of a job from one state to the next.
#[derive(Clone, Debug)]
pub struct Change<'a> {
    /// The job.
    pub id: &'a BackupId,
    /// Its VM, for the event.
    pub vm_id: &'a VmId,
    /// The state it must be in.
    pub from: JobState,
    /// The state it gets.
    pub to: JobState,
    /// The result beside the state.
    pub result: JobResult,
    /// Why it failed; `None` keeps what is stored.
    pub code: Option<FailureCode>,
    /// The same for people; `None` keeps what is stored.
    pub message: Option<&'a str>,
    /// Who caused it.
    pub by: Actor,
}

/// Stores a new job with its disks. The caller has the leases in the same transaction.
///
/// # Errors
/// The database's.
pub async fn insert(
    connection: &mut Connection,
    backup: &BackupRow,
    disks: &[BackupDiskRow],
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO backups (id, vm_id, repository_id, vm_name, requested_type, backup_type, state, result, boot_id, \
         policy_id, tags, warnings, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&backup.id)
    .bind(&backup.vm_id)
    .bind(&backup.repository_id)
    .bind(&backup.vm_name)
    .bind(backup.requested_type)
    .bind(backup.backup_type)
    .bind(backup.state)
    .bind(backup.result)
    .bind(&backup.boot_id)
    .bind(&backup.policy_id)
    .bind(row::json_text(&backup.tags)?)
    .bind(row::json_text(&backup.warnings)?)
    .bind(backup.created_at)
    .execute(&mut *connection)
    .await?;
    for disk in disks {
        sqlx::query(
            "INSERT INTO backup_disks (backup_id, disk_id, device_key, vmdk_uuid, vmdk_path, size_bytes, backup_type, \
             reason, parent_id, from_change_id, port, export_name, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(&backup.id)
        .bind(disk.disk_id)
        .bind(disk.device_key)
        .bind(&disk.vmdk_uuid)
        .bind(&disk.vmdk_path)
        .bind(signed(disk.size_bytes)?)
        .bind(disk.backup_type)
        .bind(disk.reason)
        .bind(&disk.parent_id)
        .bind(&disk.from_change_id)
        .bind(disk.port)
        .bind(&disk.export_name)
        .bind(disk.state)
        .execute(&mut *connection)
        .await?;
    }
    let data = json!({
        "job_id": backup.id, "vm_context_id": backup.vm_id, "from": null, "state": backup.state,
        "result": backup.result, "code": null, "by": Actor::User.as_str(),
    });
    events::append(connection, "job.state", backup.id.as_str(), &data, Actor::User, backup.created_at).await?;
    tell_warnings(connection, &backup.id, &backup.warnings, Actor::User).await
}

/// Whether a job had an export of this name on this port and is not over, or was over only after `since`.
///
/// # Errors
/// The database's.
pub async fn has_had_export(
    connection: &mut Connection,
    port: u16,
    export_name: &str,
    since: UtcTime,
) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM backup_disks JOIN backups ON backups.id = backup_disks.backup_id \
         WHERE port = ? AND export_name = ? AND (completed_at IS NULL OR completed_at > ?))",
    )
    .bind(port)
    .bind(export_name)
    .bind(since)
    .fetch_one(connection)
    .await?)
}

/// An event per warning. Warnings are texts that begin with a word and a colon.
async fn tell_warnings(
    connection: &mut Connection,
    id: &BackupId,
    warnings: &[String],
    by: Actor,
) -> Result<(), StoreError> {
    for warning in warnings {
        let (word, detail) = warning.split_once(": ").unwrap_or(("warning", warning));
        let data = json!({ "job_id": id, "warning": word, "detail": detail, "by": by.as_str() });
        events::append(connection, "job.warning", id.as_str(), &data, by, UtcTime::now()).await?;
    }
    Ok(())
}

/// Stores a job that was committed by another database, with its disks. Its point tells of it.
///
/// # Errors
/// The database's.
pub async fn insert_committed(
    connection: &mut Connection,
    backup: &BackupRow,
    disks: &[BackupDiskRow],
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO backups (id, vm_id, repository_id, vm_name, requested_type, backup_type, state, result, boot_id, \
         tags, warnings, created_at, completed_at) VALUES (?, ?, ?, ?, ?, ?, 'committed', ?, ?, ?, ?, ?, ?)",
    )
    .bind(&backup.id)
    .bind(&backup.vm_id)
    .bind(&backup.repository_id)
    .bind(&backup.vm_name)
    .bind(backup.requested_type)
    .bind(backup.backup_type)
    .bind(backup.result)
    .bind(&backup.boot_id)
    .bind(row::json_text(&backup.tags)?)
    .bind(row::json_text(&backup.warnings)?)
    .bind(backup.created_at)
    .bind(backup.completed_at)
    .execute(&mut *connection)
    .await?;
    for disk in disks {
        sqlx::query(
            "INSERT INTO backup_disks (backup_id, disk_id, device_key, vmdk_uuid, vmdk_path, size_bytes, backup_type, \
             effective_type, reason, parent_id, from_change_id, change_id, state, covered_bytes, written_bytes, \
             zeroed_bytes, zeroed_over_data_bytes, identical_bytes, sealed_at) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'sealed', ?, ?, ?, ?, ?, ?)",
        )
        .bind(&backup.id)
        .bind(disk.disk_id)
        .bind(disk.device_key)
        .bind(&disk.vmdk_uuid)
        .bind(&disk.vmdk_path)
        .bind(signed(disk.size_bytes)?)
        .bind(disk.backup_type)
        .bind(&disk.effective_type)
        .bind(disk.reason)
        .bind(&disk.parent_id)
        .bind(&disk.from_change_id)
        .bind(&disk.change_id)
        .bind(signed(disk.covered_bytes)?)
        .bind(signed(disk.written_bytes)?)
        .bind(signed(disk.zeroed_bytes)?)
        .bind(signed(disk.zeroed_over_data_bytes)?)
        .bind(signed(disk.identical_bytes)?)
        .bind(disk.sealed_at)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Takes a folder name for a VM, unless it has one or another VM has this one; returns the name the VM has then.
///
/// # Errors
/// The database's.
pub async fn claim_directory(connection: &mut Connection, vm: &VmId, name: &str) -> Result<Option<String>, StoreError> {
    sqlx::query("UPDATE OR IGNORE vms SET dir = ? WHERE id = ? AND dir IS NULL")
        .bind(name)
        .bind(vm)
        .execute(&mut *connection)
        .await?;
    Ok(sqlx::query_scalar("SELECT dir FROM vms WHERE id = ?").bind(vm).fetch_one(connection).await?)
}

/// The folder of a VM, also when the VM was removed from the inventory.
///
/// # Errors
/// The database's.
pub async fn directory_of(connection: &mut Connection, vm: &VmId) -> Result<Option<String>, StoreError> {
    let directory: Option<Option<String>> =
        sqlx::query_scalar("SELECT dir FROM vms WHERE id = ?").bind(vm).fetch_optional(connection).await?;
    Ok(directory.flatten())
}

/// Moves a job from one state to the next, with its event.
///
/// # Errors
/// [`ChangeError::Refused`] when the job is elsewhere or the rules forbid the step; nothing was changed then.
pub async fn change_state(connection: &mut Connection, change: &Change<'_>) -> Result<(), ChangeError> {
    let refused = || ChangeError::Refused { id: change.id.clone(), from: change.from, to: change.to };
    if !change.from.may_become(change.to) {
        return Err(refused());
    }
    let at = UtcTime::now();
    let stored: Option<Option<FailureCode>> = sqlx::query_scalar(
        "UPDATE backups SET state = ?, result = ?, code = COALESCE(?, code), message = COALESCE(?, message), \
         completed_at = COALESCE(?, completed_at) WHERE id = ? AND state = ? RETURNING code",
    )
    .bind(change.to)
    .bind(change.result)
    .bind(change.code)
    .bind(change.message)
    .bind(change.to.is_terminal().then_some(at))
    .bind(change.id)
    .bind(change.from)
    .fetch_optional(&mut *connection)
    .await
    .map_err(StoreError::from)?;
    let Some(code) = stored else { return Err(refused()) };
    let data = json!({
        "job_id": change.id, "vm_context_id": change.vm_id, "from": change.from, "state": change.to,
        "result": change.result, "code": code, "by": change.by.as_str(),
    });
    events::append(connection, "job.state", change.id.as_str(), &data, change.by, at).await?;
    Ok(())
}

/// Notes that the first sign of life of the backup client was seen; later calls change nothing.
///
/// # Errors
/// The database's.
pub async fn set_started(connection: &mut Connection, id: &BackupId, at: UtcTime) -> Result<(), StoreError> {
    sqlx::query("UPDATE backups SET started_at = COALESCE(started_at, ?) WHERE id = ?")
        .bind(at)
        .bind(id)
        .execute(connection)
        .await?;
    Ok(())
}

/// Notes what became of the one call to the node.
///
/// # Errors
/// The database's.
pub async fn set_node_outcome(
    connection: &mut Connection,
    id: &BackupId,
    outcome: NodeOutcome,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE backups SET node_outcome = ? WHERE id = ?").bind(outcome).bind(id).execute(connection).await?;
    Ok(())
}

/// Adds warnings to those of a job, with an event for each.
///
/// # Errors
/// The database's.
pub async fn add_warnings(connection: &mut Connection, id: &BackupId, more: &[String]) -> Result<(), StoreError> {
    let Some(backup) = find(connection, id).await? else { return Ok(()) };
    let mut warnings = backup.warnings;
    warnings.extend_from_slice(more);
    sqlx::query("UPDATE backups SET warnings = ? WHERE id = ?")
        .bind(row::json_text(&warnings)?)
        .bind(id)
        .execute(&mut *connection)
        .await?;
    tell_warnings(connection, id, more, Actor::Service).await
}

/// Stores where a disk is and what was measured, with its event when the state is another than before.
///
/// # Errors
/// The database's.
pub async fn update_disk(connection: &mut Connection, id: &BackupId, disk: &DiskUpdate<'_>) -> Result<(), StoreError> {
    let before: DiskState = sqlx::query_scalar("SELECT state FROM backup_disks WHERE backup_id = ? AND disk_id = ?")
        .bind(id)
        .bind(disk.disk_id)
        .fetch_one(&mut *connection)
        .await?;
    let at = UtcTime::now();
    let measured = |number: fn(&Reading) -> u64| disk.measured.as_ref().map(number).map(signed).transpose();
    sqlx::query(
        "UPDATE backup_disks SET state = ?, covered_bytes = COALESCE(?, covered_bytes), \
         written_bytes = COALESCE(?, written_bytes), zeroed_bytes = COALESCE(?, zeroed_bytes), \
         zeroed_over_data_bytes = COALESCE(?, zeroed_over_data_bytes), \
         identical_bytes = COALESCE(?, identical_bytes), effective_type = COALESCE(?, effective_type), \
         change_id = COALESCE(?, change_id), sealed_at = COALESCE(?, sealed_at) \
         WHERE backup_id = ? AND disk_id = ?",
    )
    .bind(disk.state)
    .bind(measured(|reading| reading.covered_bytes)?)
    .bind(measured(|reading| reading.written_bytes)?)
    .bind(measured(|reading| reading.zeroed_bytes)?)
    .bind(measured(|reading| reading.zeroed_over_data_bytes)?)
    .bind(measured(|reading| reading.identical_bytes)?)
    .bind(disk.effective_type)
    .bind(disk.change_id)
    .bind((disk.state == DiskState::Sealed && before != DiskState::Sealed).then_some(at))
    .bind(id)
    .bind(disk.disk_id)
    .execute(&mut *connection)
    .await?;
    if before != disk.state {
        let by = caused_by(disk.state);
        let data = json!({
            "job_id": id, "disk_id": disk.disk_id, "from": before, "state": disk.state, "by": by.as_str(),
        });
        events::append(connection, "disk.state", id.as_str(), &data, by, at).await?;
    }
    Ok(())
}

/// Notes what went wrong with one disk.
///
/// # Errors
/// The database's.
pub async fn set_disk_error(
    connection: &mut Connection,
    id: &BackupId,
    disk_id: u32,
    message: &str,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE backup_disks SET error_message = ? WHERE backup_id = ? AND disk_id = ?")
        .bind(message)
        .bind(id)
        .bind(disk_id)
        .execute(connection)
        .await?;
    Ok(())
}

/// Who brings a disk into a state.
fn caused_by(state: DiskState) -> Actor {
    match state {
        DiskState::Connected | DiskState::Writing | DiskState::Disconnected | DiskState::Draining => Actor::Client,
        DiskState::Allocated | DiskState::Listening | DiskState::Sealed | DiskState::Failed => Actor::Service,
    }
}

/// What is known of one disk now.
#[derive(Clone, Copy, Debug)]
pub struct DiskUpdate<'a> {
    /// Which one.
    pub disk_id: u32,
    /// Where it is.
    pub state: DiskState,
    /// What its export has seen; `None` keeps what is stored.
    pub measured: Option<Reading>,
    /// What was observed; `None` keeps what is stored.
    pub effective_type: Option<&'a str>,
    /// The change id sent with `/complete`; `None` keeps what is stored.
    pub change_id: Option<&'a str>,
}

impl DiskUpdate<'_> {
    /// A new state and nothing else.
    pub fn state_only(disk_id: u32, state: DiskState) -> Self {
        Self { disk_id, state, measured: None, effective_type: None, change_id: None }
    }
}

/// One job.
///
/// # Errors
/// The database's, and words in the row that this version does not know.
pub async fn find(connection: &mut Connection, id: &BackupId) -> Result<Option<BackupRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM backups WHERE id = ?").bind(id).fetch_optional(connection).await?)
}

/// One job that must be there.
///
/// # Errors
/// As [`find`]; a row that is missing is a failure of the database.
pub async fn load(connection: &mut Connection, id: &BackupId) -> Result<BackupRow, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM backups WHERE id = ?").bind(id).fetch_one(connection).await?)
}

/// The disks of a job in ascending order of number.
///
/// # Errors
/// The database's, and words in the row that this version does not know.
pub async fn disks(connection: &mut Connection, id: &BackupId) -> Result<Vec<BackupDiskRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM backup_disks WHERE backup_id = ? ORDER BY disk_id")
        .bind(id)
        .fetch_all(connection)
        .await?)
}

/// The disks of the VM's last committed job in the order in which they were sealed.
///
/// # Errors
/// The database's.
pub async fn last_seal_order(connection: &mut Connection, vm: &VmId) -> Result<Vec<u32>, StoreError> {
    Ok(sqlx::query_scalar(
        "SELECT disk_id FROM backup_disks WHERE backup_id = \
         (SELECT id FROM backups WHERE vm_id = ? AND state = 'committed' ORDER BY id DESC LIMIT 1) \
         ORDER BY sealed_at, device_key",
    )
    .bind(vm)
    .fetch_all(connection)
    .await?)
}

/// The jobs that are not over, oldest first.
///
/// # Errors
/// The database's, and words in the rows that this version does not know.
pub async fn unfinished(connection: &mut Connection) -> Result<Vec<BackupRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM backups WHERE state NOT IN ('committed', 'cancelled', 'failed') ORDER BY id")
        .fetch_all(connection)
        .await?)
}

/// Removes the record of a job that is over and left no restore point, with all that belongs to it. Its events stay.
///
/// # Errors
/// The database's, also when the job has a restore point.
pub async fn remove(connection: &mut Connection, id: &BackupId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM idempotency_keys WHERE backup_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("DELETE FROM backup_disks WHERE backup_id = ?").bind(id).execute(&mut *connection).await?;
    sqlx::query("DELETE FROM backups WHERE id = ?").bind(id).execute(connection).await?;
    Ok(())
}
