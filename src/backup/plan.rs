//! What a job is going to do with each disk, decided before anything is touched.
//!
//! Pure: from the inventory's disks and the newest usable point to the list of exports and the string that tells the
//! node where they are. Every rule that can refuse a job for its disks is here.

use std::collections::BTreeMap;

use super::state::{BackupType, RequestedType, TypeReason};
use crate::config;
use crate::repository::layout;
use crate::store::points::PointDiskRow;
use crate::store::vms::VmDisk;

/// How many images a chain may have. This version writes images without a backing file only, so every chain has one.
const CHAIN_LIMIT: u32 = 1;
/// Disks are made of sectors.
const SECTOR_BYTES: u64 = 512;

/// One disk of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    /// Our number of it.
    pub disk_id: u32,
    /// VMware's, by which the backup client finds its target.
    pub device_key: u32,
    /// The identity of the VMDK.
    pub vmdk_uuid: Option<String>,
    /// Its path in the datastore.
    pub vmdk_path: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// Full or overlay.
    pub backup_type: BackupType,
    /// Why.
    pub reason: TypeReason,
    /// The name of its export.
    pub export_name: String,
}

/// Why the disks of a VM cannot be backed up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// There is nothing to back up.
    #[error("the VM has no disks in the inventory")]
    NoDisks,
    /// The backup client could not find the disk's target.
    #[error("disk {disk_id} has no device key")]
    KeyMissing {
        /// Which one.
        disk_id: u32,
    },
    /// The backup client would write one disk over the other.
    #[error("disks {first} and {second} have the same device key {device_key}")]
    KeyDuplicate {
        /// The key.
        device_key: u32,
        /// One of them.
        first: u32,
        /// The other.
        second: u32,
    },
    /// No disk has such a size.
    #[error("disk {disk_id} has {size_bytes} bytes; a disk has a positive multiple of 512")]
    SizeInvalid {
        /// Which one.
        disk_id: u32,
        /// What the inventory says.
        size_bytes: u64,
    },
    /// An incremental was asked for and no disk has anything to build upon.
    #[error(
        "no disk of the VM can be incremental ({reason}; this version keeps chains of one image): ask for \"auto\" or \"full\""
    )]
    NoParent {
        /// Why not, for the first disk.
        reason: TypeReason,
    },
}

/// Plans the disks that are present now, in ascending order of number. `parent` are the disks of the newest usable point of
/// this VM in this repository, when there is one.
///
/// # Errors
/// Nothing to back up, disks that the backup client would mix up, sizes no disk has, or no parent for an incremental.
pub fn disks(
    inventory: &[VmDisk],
    parent: Option<&[PointDiskRow]>,
    requested: RequestedType,
    export_name: impl Fn(u32) -> String,
) -> Result<Vec<DiskPlan>, PlanError> {
    let mut present: Vec<&VmDisk> = inventory.iter().filter(|disk| disk.present).collect();
    present.sort_by_key(|disk| disk.disk_id);
    if present.is_empty() {
        return Err(PlanError::NoDisks);
    }
    let mut keys = BTreeMap::new();
    for disk in &present {
        if disk.device_key == 0 {
            return Err(PlanError::KeyMissing { disk_id: disk.disk_id });
        }
        if disk.size_bytes == 0 || !disk.size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(PlanError::SizeInvalid { disk_id: disk.disk_id, size_bytes: disk.size_bytes });
        }
        if let Some(first) = keys.insert(disk.device_key, disk.disk_id) {
            return Err(PlanError::KeyDuplicate { device_key: disk.device_key, first, second: disk.disk_id });
        }
    }
    let plans: Vec<DiskPlan> = present
        .into_iter()
        .map(|disk| DiskPlan {
            disk_id: disk.disk_id,
            device_key: disk.device_key,
            vmdk_uuid: disk.vmdk_uuid.clone(),
            vmdk_path: disk.vmdk_path.clone(),
            size_bytes: disk.size_bytes,
            backup_type: BackupType::Full,
            reason: full_reason(disk, parent, requested),
            export_name: export_name(disk.disk_id),
        })
        .collect();
    match (requested, plans.first()) {
        (RequestedType::Incremental, Some(first)) => Err(PlanError::NoParent { reason: first.reason }),
        _ => Ok(plans),
    }
}

/// Why this disk is full.
fn full_reason(disk: &VmDisk, parent: Option<&[PointDiskRow]>, requested: RequestedType) -> TypeReason {
    if requested == RequestedType::Full {
        return TypeReason::RequestedFull;
    }
    let Some(parent) = parent else { return TypeReason::FirstBackup };
    let Some(before) = parent.iter().find(|before| before.disk_id == disk.disk_id) else {
        return TypeReason::DiskNew;
    };
    if !same_identity(disk, before) {
        TypeReason::IdentityChanged
    } else if before.size_bytes != disk.size_bytes {
        TypeReason::SizeChanged
    } else if before.change_id.is_none() {
        TypeReason::NoChangeId
    } else {
        debug_assert!(before.chain_depth >= CHAIN_LIMIT, "a chain has at least one image");
        TypeReason::ChainDepth
    }
}

fn same_identity(disk: &VmDisk, before: &PointDiskRow) -> bool {
    disk.device_key == before.device_key
        && match (&disk.vmdk_uuid, &before.vmdk_uuid) {
            (Some(now), Some(then)) => now.eq_ignore_ascii_case(then),
            _ => disk.vmdk_path == before.vmdk_path,
        }
}

/// [`config::Nbd::target`] for every disk, joined by commas: the form the backup client parses.
///
/// Names and hosts hold neither commas nor colons, so splitting gives back exactly these targets.
pub fn targets(disks: &[DiskPlan], nbd: &config::Nbd, ports: impl Fn(usize) -> u16) -> String {
    disks
        .iter()
        .enumerate()
        .map(|(index, disk)| nbd.target(disk.device_key, ports(index), &disk.export_name))
        .collect::<Vec<_>>()
        .join(",")
}

/// The name by which the backup client asks for change ids: the last segment of the inventory path.
pub fn inventory_name(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path)
}

/// The plain export name of a disk of this VM; see [`layout::export_name`].
pub fn plain_export_name(vm_name: &str) -> impl Fn(u32) -> String {
    move |disk_id| layout::export_name(vm_name, disk_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(disk_id: u32, device_key: u32, size_bytes: u64) -> VmDisk {
        VmDisk {
            disk_id,
            device_key,
            unit_number: None,
            vmdk_uuid: Some(format!("6000C29-{disk_id}")),
            vmdk_path: None,
            size_bytes,
            present: true,
        }
    }

    fn before(disk: &VmDisk) -> PointDiskRow {
        PointDiskRow {
            disk_id: disk.disk_id,
            device_key: disk.device_key,
            vmdk_uuid: disk.vmdk_uuid.clone(),
            vmdk_path: disk.vmdk_path.clone(),
            size_bytes: disk.size_bytes,
            backup_type: BackupType::Full,
            file: "disk-0.qcow2".into(),
            file_bytes: 1,
            change_id: Some("52/1".into()),
            parent_id: None,
            chain_depth: 1,
        }
    }

    fn plan(inventory: &[VmDisk], requested: RequestedType) -> Result<Vec<DiskPlan>, PlanError> {
        disks(inventory, None, requested, plain_export_name("vm"))
    }

    #[test]
    fn duplicate_or_missing_device_keys_and_impossible_sizes_are_refused() {
        let same = [disk(0, 2000, 512), disk(1, 2000, 512)];
        assert_eq!(
            plan(&same, RequestedType::Full),
            Err(PlanError::KeyDuplicate { device_key: 2000, first: 0, second: 1 })
        );
        assert_eq!(plan(&[disk(0, 0, 512)], RequestedType::Full), Err(PlanError::KeyMissing { disk_id: 0 }));
        for size_bytes in [0, 511, 513, 1 << 20 | 1] {
            let refused = plan(&[disk(3, 2000, size_bytes)], RequestedType::Full);
            assert_eq!(refused, Err(PlanError::SizeInvalid { disk_id: 3, size_bytes }));
        }
        assert_eq!(plan(&[], RequestedType::Full), Err(PlanError::NoDisks));
        let gone = VmDisk { present: false, ..disk(0, 2000, 512) };
        assert_eq!(plan(&[gone], RequestedType::Full), Err(PlanError::NoDisks));
    }

    #[test]
    fn disk_numbers_survive_gaps_second_controllers_and_more_than_ten_disks() {
        let mut inventory: Vec<VmDisk> = (0..12).rev().map(|id| disk(id, 2000 + id * 16, 512)).collect();
        inventory.retain(|disk| disk.disk_id != 3);
        inventory.push(disk(40, 16_000, 1024));
        let plans = plan(&inventory, RequestedType::Auto).unwrap();
        let ids: Vec<u32> = plans.iter().map(|plan| plan.disk_id).collect();
        assert_eq!(ids, [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 40]);
        assert_eq!(plans[11].export_name, "vm-disk40");
        assert_eq!(plans[11].device_key, 16_000);
    }

    #[test]
    fn every_full_disk_says_why() {
        let now = disk(0, 2000, 1024);
        let same = before(&now);
        let reason = |before: &[PointDiskRow], requested| {
            disks(std::slice::from_ref(&now), Some(before), requested, plain_export_name("vm")).unwrap()[0].reason
        };
        let auto = RequestedType::Auto;
        assert_eq!(plan(std::slice::from_ref(&now), auto).unwrap()[0].reason, TypeReason::FirstBackup);
        assert_eq!(reason(std::slice::from_ref(&same), RequestedType::Full), TypeReason::RequestedFull);
        assert_eq!(reason(&[], auto), TypeReason::DiskNew);
        assert_eq!(reason(&[PointDiskRow { size_bytes: 512, ..same.clone() }], auto), TypeReason::SizeChanged);
        let other = PointDiskRow { vmdk_uuid: Some("other".into()), ..same.clone() };
        assert_eq!(reason(&[other], auto), TypeReason::IdentityChanged);
        assert_eq!(reason(&[PointDiskRow { change_id: None, ..same.clone() }], auto), TypeReason::NoChangeId);
        assert_eq!(reason(&[same], auto), TypeReason::ChainDepth);
    }

    #[test]
    fn incremental_without_a_parent_is_refused_with_the_reason() {
        let refused = plan(&[disk(0, 2000, 512)], RequestedType::Incremental);
        assert_eq!(refused, Err(PlanError::NoParent { reason: TypeReason::FirstBackup }));
    }

    #[test]
    fn targets_split_back_into_keys_and_urls() {
        let inventory = [disk(0, 2000, 512), disk(1, 2016, 512)];
        let plans = disks(&inventory, None, RequestedType::Full, plain_export_name("a,b:c%/d")).unwrap();
        let targets = targets(&plans, &config::Nbd::default(), |index| 10_100 + index as u16);
        assert_eq!(targets, "2000:nbd://127.0.0.1:10100/a_b_c__d-disk0,2016:nbd://127.0.0.1:10101/a_b_c__d-disk1");
        assert_eq!(targets.split(',').count(), 2);
    }

    #[test]
    fn inventory_name_is_the_last_segment_of_the_path() {
        assert_eq!(inventory_name("/DC1/vm/prod/db-server"), "db-server");
        assert_eq!(inventory_name("db-server"), "db-server");
        assert_eq!(inventory_name("/DC1/vm/x/"), "x");
    }
}
