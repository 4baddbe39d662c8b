//! What a job is going to do with each disk, decided before anything is touched.
//!
//! From the inventory's disks and the newest point to the list of exports and the string that tells the node where they are.
//! Every rule that can refuse a job for its disks is here. Pure: whether the image of a parent can be built upon is asked of
//! the caller.

use std::collections::BTreeMap;

use crate::config;
use crate::id::BackupId;
use crate::repository::layout;
use crate::store::points::{ChainImage, PointDiskRow, PointRow};
use crate::store::vms::VmDisk;
use crate::words::point::{PointState, Trust};
use crate::words::{BackupType, RequestedType, TypeReason};

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
    /// What it builds upon; nothing for a full.
    pub parent: Option<Parent>,
    /// Why it does or does not.
    pub reason: TypeReason,
    /// The name of its export.
    pub export_name: String,
}

/// The image that an incremental builds upon. Chosen once: the backing file, the beginning of the delta and the depth of the
/// chain all come from the same row of the same point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The point that holds it.
    pub point_id: BackupId,
    /// The image in the point's folder.
    pub file: String,
    /// The state of the disk in change tracking that it holds, where the delta begins.
    pub change_id: String,
    /// How many images the chain has with it on top.
    pub chain_depth: u32,
}

impl Parent {
    /// The name of the backing file.
    pub fn backing_name(&self) -> String {
        layout::backing_name(&self.point_id, &self.file)
    }
}

impl DiskPlan {
    /// Full or overlay.
    pub fn backup_type(&self) -> BackupType {
        if self.parent.is_some() { BackupType::Incremental } else { BackupType::Full }
    }

    /// How many images its chain has.
    pub fn chain_depth(&self) -> u32 {
        self.parent.as_ref().map_or(1, |parent| parent.chain_depth + 1)
    }
}

/// The newest point of this VM in this repository, with its disks: no other can be a parent.
#[derive(Clone, Debug)]
pub struct Newest {
    /// The point.
    pub point: PointRow,
    /// Its disks, each with its chain from this point down.
    pub disks: Vec<(PointDiskRow, Vec<ChainImage>)>,
}

impl Newest {
    /// What the point has of this disk.
    pub fn disk(&self, disk_id: u32) -> Option<&PointDiskRow> {
        self.find(disk_id).map(|(disk, _)| disk)
    }

    fn find(&self, disk_id: u32) -> Option<&(PointDiskRow, Vec<ChainImage>)> {
        self.disks.iter().find(|(disk, _)| disk.disk_id == disk_id)
    }
}

/// Refuses to build upon a point by what is recorded of it.
pub(super) fn refuse_unfit(state: PointState, trust: Trust) -> Result<(), TypeReason> {
    match (trust, state) {
        (Trust::Suspect, _) => Err(TypeReason::ParentSuspect),
        (Trust::Corrupt, _) => Err(TypeReason::ParentCorrupt),
        (_, PointState::Committed) => Ok(()),
        (_, PointState::Missing | PointState::Deleting | PointState::Deleted) => Err(TypeReason::ParentMissing),
    }
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
    #[error("no disk of the VM can be incremental ({reason}): ask for \"auto\" or \"full\"")]
    NoParent {
        /// Why not, for the first disk.
        reason: TypeReason,
    },
}

/// The disks that are present now, in ascending order of number.
///
/// # Errors
/// Nothing to back up, disks that the backup client would mix up, and sizes no disk has.
pub fn present(inventory: Vec<VmDisk>) -> Result<Vec<VmDisk>, PlanError> {
    let mut present: Vec<VmDisk> = inventory.into_iter().filter(|disk| disk.present).collect();
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
    Ok(present)
}

/// What the type of each disk depends on.
#[derive(Clone, Debug)]
pub struct Choice {
    /// What the caller asked for.
    pub requested: RequestedType,
    /// What could be built upon.
    pub newest: Option<Newest>,
    /// How many images a chain may have.
    pub max_chain_depth: u32,
}

/// Plans the disks that [`present`] returned. `examine` looks at the images of a chain that would do by their records, for a
/// disk of this size, and says why they do not after all.
///
/// # Errors
/// An incremental was asked for and no disk can be one.
pub fn disks(
    present: &[VmDisk],
    choice: &Choice,
    examine: impl Fn(&[ChainImage], u64) -> Result<(), TypeReason>,
    export_name: impl Fn(u32) -> String,
) -> Result<Vec<DiskPlan>, PlanError> {
    let plans: Vec<DiskPlan> = present
        .iter()
        .map(|disk| {
            let (parent, reason) = match parent(disk, choice, &examine) {
                Ok(parent) => (Some(parent), TypeReason::ParentOk),
                Err(reason) => (None, reason),
            };
            DiskPlan {
                disk_id: disk.disk_id,
                device_key: disk.device_key,
                vmdk_uuid: disk.vmdk_uuid.clone(),
                vmdk_path: disk.vmdk_path.clone(),
                size_bytes: disk.size_bytes,
                parent,
                reason,
                export_name: export_name(disk.disk_id),
            }
        })
        .collect();
    match (choice.requested, plans.first()) {
        (RequestedType::Incremental, Some(first)) if job_type(&plans) == BackupType::Full => {
            Err(PlanError::NoParent { reason: first.reason })
        }
        _ => Ok(plans),
    }
}

/// What a job is: full when every disk is.
pub fn job_type<'a>(plans: impl IntoIterator<Item = &'a DiskPlan>) -> BackupType {
    let all_full = plans.into_iter().all(|plan| plan.parent.is_none());
    if all_full { BackupType::Full } else { BackupType::Incremental }
}

/// What this disk builds upon, or why it is full.
fn parent(
    disk: &VmDisk,
    choice: &Choice,
    examine: impl Fn(&[ChainImage], u64) -> Result<(), TypeReason>,
) -> Result<Parent, TypeReason> {
    if choice.requested == RequestedType::Full {
        return Err(TypeReason::RequestedFull);
    }
    let newest = choice.newest.as_ref().ok_or(TypeReason::FirstBackup)?;
    refuse_unfit(newest.point.state, newest.point.trust)?;
    let (before, chain) = newest.find(disk.disk_id).ok_or(TypeReason::DiskNew)?;
    if !same_identity(disk, before) {
        return Err(TypeReason::IdentityChanged);
    }
    if before.size_bytes != disk.size_bytes {
        return Err(TypeReason::SizeChanged);
    }
    let change_id = before.change_id.clone().ok_or(TypeReason::NoChangeId)?;
    if before.chain_depth >= choice.max_chain_depth {
        return Err(TypeReason::ChainDepth);
    }
    chain.iter().try_for_each(|image| refuse_unfit(image.state, image.trust))?;
    examine(chain, before.size_bytes)?;
    let (point_id, file) = (newest.point.id.clone(), before.file.clone());
    Ok(Parent { point_id, file, change_id, chain_depth: before.chain_depth })
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
            effective_type: None,
            from_change_id: None,
            identical_bytes: None,
            digest: None,
            content_digest: None,
        }
    }

    fn newest(disks: Vec<PointDiskRow>) -> Newest {
        let point = PointRow {
            id: "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB".parse().unwrap(),
            vm_id: "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z".parse().unwrap(),
            repository_id: "main".parse().unwrap(),
            sequence: 1,
            dir: "vm-4X7Z/backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB".into(),
            state: PointState::Committed,
            trust: Trust::Unverified,
            trust_reason: None,
            verified_at: None,
            compared_bytes: None,
            protected_until: None,
            committed_at: "2026-11-23T22:05:00Z".parse().unwrap(),
            generation: 0,
        };
        let image = ChainImage {
            dir: point.dir.clone(),
            state: PointState::Committed,
            trust: Trust::Unverified,
            file: "disk-0.qcow2".into(),
            file_bytes: 1,
        };
        Newest { point, disks: disks.into_iter().map(|disk| (disk, vec![image.clone(), image.clone()])).collect() }
    }

    fn choose(requested: RequestedType, newest: Option<Newest>) -> Choice {
        Choice { requested, newest, max_chain_depth: 2 }
    }

    fn plan_on(inventory: &[VmDisk], choice: &Choice) -> Result<Vec<DiskPlan>, PlanError> {
        disks(&present(inventory.to_vec())?, choice, |_, _| Ok(()), plain_export_name("vm"))
    }

    fn plan(inventory: &[VmDisk], requested: RequestedType) -> Result<Vec<DiskPlan>, PlanError> {
        plan_on(inventory, &choose(requested, None))
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
        let inventory = std::slice::from_ref(&now);
        let reason = |newest: Newest, requested| {
            let plan = plan_on(inventory, &choose(requested, Some(newest))).unwrap().remove(0);
            assert_eq!(plan.backup_type(), BackupType::Full);
            plan.reason
        };
        let auto = RequestedType::Auto;
        assert_eq!(plan(inventory, auto).unwrap()[0].reason, TypeReason::FirstBackup);
        assert_eq!(reason(newest(vec![same.clone()]), RequestedType::Full), TypeReason::RequestedFull);
        let disk_reason = |disk: PointDiskRow| reason(newest(vec![disk]), auto);
        assert_eq!(reason(newest(vec![]), auto), TypeReason::DiskNew);
        assert_eq!(disk_reason(PointDiskRow { size_bytes: 512, ..same.clone() }), TypeReason::SizeChanged);
        let other = PointDiskRow { vmdk_uuid: Some("other".into()), ..same.clone() };
        assert_eq!(disk_reason(other), TypeReason::IdentityChanged);
        assert_eq!(disk_reason(PointDiskRow { change_id: None, ..same.clone() }), TypeReason::NoChangeId);
        assert_eq!(disk_reason(PointDiskRow { chain_depth: 2, ..same.clone() }), TypeReason::ChainDepth);
        let point_reason = |change: fn(&mut PointRow)| {
            let mut newest = newest(vec![same.clone()]);
            change(&mut newest.point);
            reason(newest, auto)
        };
        assert_eq!(point_reason(|point| point.trust = Trust::Suspect), TypeReason::ParentSuspect);
        assert_eq!(point_reason(|point| point.trust = Trust::Corrupt), TypeReason::ParentCorrupt);
        assert_eq!(point_reason(|point| point.state = PointState::Missing), TypeReason::ParentMissing);
        let below = |change: fn(&mut ChainImage)| {
            let mut newest = newest(vec![same.clone()]);
            change(&mut newest.disks[0].1[1]);
            reason(newest, auto)
        };
        assert_eq!(below(|image| image.trust = Trust::Corrupt), TypeReason::ParentCorrupt);
        assert_eq!(below(|image| image.state = PointState::Missing), TypeReason::ParentMissing);
    }

    #[test]
    fn a_parent_comes_from_one_record_and_its_image_has_the_last_word() {
        let now = disk(0, 2000, 1024);
        let inventory = [now.clone(), disk(1, 2016, 512)];
        let choice = choose(RequestedType::Incremental, Some(newest(vec![before(&now)])));
        let plans = plan_on(&inventory, &choice).unwrap();
        let parent = plans[0].parent.clone().unwrap();
        assert_eq!(parent.backing_name(), "../backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB/disk-0.qcow2");
        assert_eq!((parent.change_id.as_str(), plans[0].chain_depth()), ("52/1", 2));
        assert_eq!((plans[0].reason, plans[1].reason), (TypeReason::ParentOk, TypeReason::DiskNew));
        assert_eq!(job_type(&plans), BackupType::Incremental);
        let damaged = disks(&inventory, &choice, |_, _| Err(TypeReason::ParentCorrupt), plain_export_name("vm"));
        assert_eq!(damaged, Err(PlanError::NoParent { reason: TypeReason::ParentCorrupt }));
    }

    #[test]
    fn incremental_without_a_parent_is_refused_with_the_reason() {
        let refused = plan(&[disk(0, 2000, 512)], RequestedType::Incremental);
        assert_eq!(refused, Err(PlanError::NoParent { reason: TypeReason::FirstBackup }));
    }

    #[test]
    fn targets_split_back_into_keys_and_urls() {
        let inventory = [disk(0, 2000, 512), disk(1, 2016, 512)];
        let choice = choose(RequestedType::Full, None);
        let plans = disks(&inventory, &choice, |_, _| Ok(()), plain_export_name("a,b:c%/d")).unwrap();
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
