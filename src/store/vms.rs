//! VMs and their disks.
//!
//! A disk number is given once per disk identity and never again: rows of disks that went away stay, marked absent, and
//! take their number back when the same disk returns.

use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use super::column::{signed, unsigned};
use super::{Connection, Listing, Page, StoreError};
use crate::clock::UtcTime;
use crate::id::{BackupId, VmId};

/// Device keys are signed 32-bit numbers on VMware's side.
pub const DEVICE_KEY_MAX: u32 = i32::MAX as u32;
/// Most units a virtual controller has: 64 on NVMe and paravirtual SCSI, from 0.
pub const UNIT_MAX: u32 = 63;
/// Sizes are multiples of it.
pub const SECTOR_BYTES: u64 = 512;
/// Largest size of a disk: what fits a signed 64-bit offset, in whole sectors.
pub const DISK_SIZE_MAX: u64 = i64::MAX as u64 / SECTOR_BYTES * SECTOR_BYTES;

/// A VM as it is kept.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Identity of the VM.
    pub id: VmId,
    /// For display; several VMs may share one.
    pub name: String,
    /// Host name of its vCenter.
    pub vcenter: String,
    /// Inventory path; the last segment is the name that the backup client uses.
    pub path: String,
    /// UUID in vCenter, where known.
    pub uuid: Option<String>,
    /// Name of its node in the configuration.
    pub node: String,
    /// Name of its credential in the configuration.
    pub credential: Option<String>,
    /// Its folder in every repository, fixed at the first backup.
    pub dir: Option<String>,
    /// Grows with every replacement of the description, and of the disks if that changes them.
    pub revision: i64,
    /// When it was added.
    pub created_at: UtcTime,
}

/// A disk as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDisk {
    /// Our number of this disk within its VM.
    pub disk_id: u32,
    /// VMware's number.
    pub device_key: u32,
    /// Unit on its controller, where known.
    pub unit_number: Option<u32>,
    /// UUID of the VMDK, where known.
    pub vmdk_uuid: Option<String>,
    /// Datastore path of the VMDK, where known.
    pub vmdk_path: Option<String>,
    /// Capacity, a multiple of 512.
    pub size_bytes: u64,
    /// Whether the VM has it now.
    pub present: bool,
}

/// What an operator says about a VM.
#[derive(Clone, Debug)]
pub struct VmDescription {
    /// See [`Vm::name`].
    pub name: String,
    /// See [`Vm::vcenter`].
    pub vcenter: String,
    /// See [`Vm::path`].
    pub path: String,
    /// See [`Vm::uuid`].
    pub uuid: Option<String>,
    /// See [`Vm::node`].
    pub node: String,
    /// See [`Vm::credential`].
    pub credential: Option<String>,
    /// All its disks.
    pub disks: Vec<DiskDescription>,
}

/// What an operator says about a disk: keys and sizes are checked, keys are unique.
#[derive(Clone, Debug)]
pub struct DiskDescription {
    /// See [`VmDisk::device_key`].
    pub device_key: u32,
    /// See [`VmDisk::unit_number`].
    pub unit_number: Option<u32>,
    /// See [`VmDisk::vmdk_uuid`].
    pub vmdk_uuid: Option<String>,
    /// See [`VmDisk::vmdk_path`].
    pub vmdk_path: Option<String>,
    /// See [`VmDisk::size_bytes`].
    pub size_bytes: u64,
}

/// Which VMs a list shows.
#[derive(Clone, Debug, Default)]
pub struct VmFilter {
    /// Only VMs of exactly this name.
    pub name: Option<String>,
}

impl FromRow<'_, SqliteRow> for Vm {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            vcenter: row.try_get("vcenter")?,
            path: row.try_get("path")?,
            uuid: row.try_get("uuid")?,
            node: row.try_get("node")?,
            credential: row.try_get("credential")?,
            dir: row.try_get("dir")?,
            revision: row.try_get("revision")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

impl FromRow<'_, SqliteRow> for VmDisk {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            disk_id: row.try_get("disk_id")?,
            device_key: row.try_get("device_key")?,
            unit_number: row.try_get("unit_number")?,
            vmdk_uuid: row.try_get("vmdk_uuid")?,
            vmdk_path: row.try_get("vmdk_path")?,
            size_bytes: unsigned(row, "size_bytes")?,
            present: row.try_get("present")?,
        })
    }
}

/// Whether a kept disk is the described one: the device key and the VMDK's UUID, or its path while one side has no UUID.
/// With nothing to compare on one side only they count as two disks: a wrong "same" would put one disk's changes onto
/// another's image, a wrong "other" costs a full copy.
fn is_same_disk(kept: &VmDisk, described: &DiskDescription) -> bool {
    kept.device_key == described.device_key
        && match (&kept.vmdk_uuid, &described.vmdk_uuid) {
            (Some(kept), Some(described)) => kept.eq_ignore_ascii_case(described),
            (kept_uuid, described_uuid) => match (&kept.vmdk_path, &described.vmdk_path) {
                (Some(kept), Some(described)) => kept == described,
                (None, None) => kept_uuid.is_none() && described_uuid.is_none(),
                _ => false,
            },
        }
}

/// Adds a VM. One that was removed and kept for its backups comes back with its id and disk numbers when vCenter, path and
/// UUID are the same.
///
/// # Errors
///
/// [`StoreError::Exists`] when a VM with this vCenter and path is there.
pub async fn insert(connection: &mut Connection, vm: &VmDescription) -> Result<VmId, StoreError> {
    let removed: Option<VmId> = sqlx::query_scalar(
        "SELECT id FROM vms WHERE vcenter = ?1 AND path = ?2 AND uuid IS NOT DISTINCT FROM ?3 AND removed_at IS NOT NULL \
         ORDER BY removed_at DESC LIMIT 1",
    )
    .bind(&vm.vcenter)
    .bind(&vm.path)
    .bind(&vm.uuid)
    .fetch_optional(&mut *connection)
    .await?;
    let id = match removed {
        Some(id) => {
            sqlx::query("UPDATE vms SET removed_at = NULL WHERE id = ?1").bind(&id).execute(&mut *connection).await?;
            replace(connection, &id, vm).await?;
            return Ok(id);
        }
        None => VmId::new(),
    };
    sqlx::query(
        "INSERT INTO vms (id, name, vcenter, path, uuid, node, credential, revision, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 1, ?8)",
    )
    .bind(&id)
    .bind(&vm.name)
    .bind(&vm.vcenter)
    .bind(&vm.path)
    .bind(&vm.uuid)
    .bind(&vm.node)
    .bind(&vm.credential)
    .bind(UtcTime::now())
    .execute(&mut *connection)
    .await?;
    put_disks(connection, &id, &vm.disks).await?;
    Ok(id)
}

/// Replaces the description of a VM that exists; its revision grows.
///
/// # Errors
///
/// [`StoreError::Exists`] when another VM has the new vCenter and path.
pub async fn replace(connection: &mut Connection, id: &VmId, vm: &VmDescription) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE vms SET name = ?2, vcenter = ?3, path = ?4, uuid = ?5, node = ?6, credential = ?7, \
         revision = revision + 1 WHERE id = ?1",
    )
    .bind(id)
    .bind(&vm.name)
    .bind(&vm.vcenter)
    .bind(&vm.path)
    .bind(&vm.uuid)
    .bind(&vm.node)
    .bind(&vm.credential)
    .execute(&mut *connection)
    .await?;
    put_disks(connection, id, &vm.disks).await
}

/// The disks of a VM around a replacement of them: all that it ever had, in the order of their numbers.
#[derive(Clone, Debug)]
pub struct ReplacedDisks {
    /// As they were.
    pub before: Vec<VmDisk>,
    /// As they are.
    pub now: Vec<VmDisk>,
}

/// Replaces the disks of a VM that exists, as [`replace`] does. Its revision grows only if that changes something.
pub async fn replace_disks(
    connection: &mut Connection,
    id: &VmId,
    described: &[DiskDescription],
) -> Result<ReplacedDisks, StoreError> {
    let before = disks(connection, id).await?;
    put_disks(connection, id, described).await?;
    let now = disks(connection, id).await?;
    if now != before {
        let grow = sqlx::query("UPDATE vms SET revision = revision + 1 WHERE id = ?1").bind(id);
        grow.execute(connection).await?;
    }
    Ok(ReplacedDisks { before, now })
}

async fn put_disks(connection: &mut Connection, vm: &VmId, described: &[DiskDescription]) -> Result<(), StoreError> {
    let kept = disks(connection, vm).await?;
    sqlx::query("UPDATE vm_disks SET present = 0 WHERE vm_id = ?1").bind(vm).execute(&mut *connection).await?;
    let mut next_id = kept.iter().map(|disk| disk.disk_id + 1).max().unwrap_or(0);
    let mut described: Vec<&DiskDescription> = described.iter().collect();
    described.sort_by_key(|disk| disk.device_key);
    for disk in described {
        // Of several former disks with one key the latest is meant.
        let disk_id = match kept.iter().rev().find(|kept| is_same_disk(kept, disk)) {
            Some(kept) => kept.disk_id,
            None => {
                next_id += 1;
                next_id - 1
            }
        };
        sqlx::query(
            "INSERT INTO vm_disks (vm_id, disk_id, device_key, unit_number, vmdk_uuid, vmdk_path, size_bytes, present) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 1) \
             ON CONFLICT (vm_id, disk_id) DO UPDATE SET unit_number = excluded.unit_number, \
             vmdk_uuid = COALESCE(excluded.vmdk_uuid, vmdk_uuid), vmdk_path = COALESCE(excluded.vmdk_path, vmdk_path), \
             size_bytes = excluded.size_bytes, present = 1",
        )
        .bind(vm)
        .bind(disk_id)
        .bind(disk.device_key)
        .bind(disk.unit_number)
        .bind(&disk.vmdk_uuid)
        .bind(&disk.vmdk_path)
        .bind(signed(disk.size_bytes)?)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// The VM, unless it was removed.
pub async fn find(connection: &mut Connection, id: &VmId) -> Result<Option<Vm>, StoreError> {
    let vm = sqlx::query_as("SELECT * FROM vms WHERE id = ?1 AND removed_at IS NULL").bind(id);
    Ok(vm.fetch_optional(connection).await?)
}

/// All VMs of exactly this name, newest first.
pub async fn find_by_name(connection: &mut Connection, name: &str) -> Result<Vec<Vm>, StoreError> {
    let vms = sqlx::query_as("SELECT * FROM vms WHERE name = ?1 AND removed_at IS NULL ORDER BY id DESC").bind(name);
    Ok(vms.fetch_all(connection).await?)
}

/// Id of the VM with this vCenter and path.
pub async fn find_by_path(connection: &mut Connection, vcenter: &str, path: &str) -> Result<Option<VmId>, StoreError> {
    let id = sqlx::query_scalar("SELECT id FROM vms WHERE vcenter = ?1 AND path = ?2 AND removed_at IS NULL");
    Ok(id.bind(vcenter).bind(path).fetch_optional(connection).await?)
}

/// One page of the VMs.
pub async fn list(
    connection: &mut Connection,
    filter: &VmFilter,
    page: &Page<VmId>,
) -> Result<Listing<Vm, VmId>, StoreError> {
    let total: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM vms WHERE removed_at IS NULL AND (?1 IS NULL OR name = ?1)")
            .bind(&filter.name)
            .fetch_one(&mut *connection)
            .await?;
    let rows = sqlx::query_as(
        "SELECT * FROM vms WHERE removed_at IS NULL AND (?1 IS NULL OR name = ?1) AND (?2 IS NULL OR id < ?2) \
         ORDER BY id DESC LIMIT ?3",
    )
    .bind(&filter.name)
    .bind(&page.after)
    .bind(page.fetch_limit())
    .fetch_all(connection)
    .await?;
    Ok(page.listing(rows, total.unsigned_abs(), |vm: &Vm| vm.id.clone()))
}

/// All disks that the VM ever had, in the order of their numbers.
pub async fn disks(connection: &mut Connection, vm: &VmId) -> Result<Vec<VmDisk>, StoreError> {
    let disks = sqlx::query_as("SELECT * FROM vm_disks WHERE vm_id = ?1 ORDER BY disk_id").bind(vm);
    Ok(disks.fetch_all(connection).await?)
}

/// The job that is backing the VM up now, if one is.
pub async fn active_backup(connection: &mut Connection, vm: &VmId) -> Result<Option<BackupId>, StoreError> {
    let id = sqlx::query_scalar(
        "SELECT id FROM backups WHERE vm_id = ?1 AND state NOT IN ('committed', 'cancelled', 'failed') \
         ORDER BY id DESC LIMIT 1",
    );
    Ok(id.bind(vm).fetch_optional(connection).await?)
}

/// Removes a VM from the inventory. Its row stays, out of sight, while backups refer to it.
pub async fn remove(connection: &mut Connection, id: &VmId) -> Result<(), StoreError> {
    let has_backups: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM backups WHERE vm_id = ?1)")
        .bind(id)
        .fetch_one(&mut *connection)
        .await?;
    if has_backups {
        sqlx::query("UPDATE vms SET removed_at = ?2 WHERE id = ?1")
            .bind(id)
            .bind(UtcTime::now())
            .execute(connection)
            .await?;
    } else {
        sqlx::query("DELETE FROM vm_disks WHERE vm_id = ?1").bind(id).execute(&mut *connection).await?;
        sqlx::query("DELETE FROM vms WHERE id = ?1").bind(id).execute(connection).await?;
    }
    Ok(())
}

/// A VM and its disks as a restore point knew them.
#[derive(Clone, Debug)]
pub struct RememberedVm<'a> {
    /// See [`Vm::id`].
    pub id: &'a VmId,
    /// See [`Vm::name`].
    pub name: &'a str,
    /// See [`Vm::vcenter`].
    pub vcenter: &'a str,
    /// See [`Vm::path`].
    pub path: &'a str,
    /// See [`Vm::uuid`].
    pub uuid: Option<&'a str>,
    /// See [`Vm::dir`].
    pub dir: &'a str,
    /// Its disks; whether they are present is not looked at.
    pub disks: &'a [VmDisk],
}

/// Makes sure that a VM of which there are restore points is known: one that is not is added as one that was removed from the
/// inventory, with its folder and the numbers of its disks, so that adding it again joins the two. Disks that the VM has now
/// stay as they are. Answers with the folder that the VM has.
///
/// # Errors
/// [`StoreError::Exists`] when another VM has the folder.
pub async fn remember(connection: &mut Connection, vm: &RememberedVm<'_>) -> Result<String, StoreError> {
    let now = UtcTime::now();
    sqlx::query(
        "INSERT INTO vms (id, name, vcenter, path, uuid, node, dir, revision, created_at, removed_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 1, ?8, ?8) \
         ON CONFLICT (id) DO UPDATE SET dir = COALESCE(dir, excluded.dir)",
    )
    .bind(vm.id)
    .bind(vm.name)
    .bind(vm.vcenter)
    .bind(vm.path)
    .bind(vm.uuid)
    .bind(crate::config::DEFAULT_NODE)
    .bind(vm.dir)
    .bind(now)
    .execute(&mut *connection)
    .await?;
    for disk in vm.disks {
        sqlx::query(
            "INSERT INTO vm_disks (vm_id, disk_id, device_key, vmdk_uuid, vmdk_path, size_bytes, present) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0) \
             ON CONFLICT (vm_id, disk_id) DO UPDATE SET device_key = excluded.device_key, vmdk_uuid = excluded.vmdk_uuid, \
             vmdk_path = excluded.vmdk_path, size_bytes = excluded.size_bytes WHERE present = 0",
        )
        .bind(vm.id)
        .bind(disk.disk_id)
        .bind(disk.device_key)
        .bind(&disk.vmdk_uuid)
        .bind(&disk.vmdk_path)
        .bind(signed(disk.size_bytes)?)
        .execute(&mut *connection)
        .await?;
    }
    Ok(sqlx::query_scalar("SELECT dir FROM vms WHERE id = ?1").bind(vm.id).fetch_one(connection).await?)
}
