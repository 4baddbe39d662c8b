//! Discovery: which disks a VM has by what its node finds in vCenter, taken over into the inventory.
//!
//! The answer counts as if an operator had described the same disks (`PUT /vms/{id}`), with the same rule for which disk is
//! which. An answer that cannot be relied upon changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::backup::plan::inventory_name;
use crate::config::Config;
use crate::id::VmId;
use crate::login::{Login, LoginError};
use crate::node::NodeClient;
use crate::node::discover::{DiscoverError, DiscoverRequest};
use crate::node::discovered::{DiscoveredDisk, Wanted};
use crate::store::vms::{self, DiskDescription, ReplacedDisks, Vm, VmDisk};
use crate::store::{Store, StoreError};

/// What discovery needs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Discovery {
    config: Arc<Config>,
    store: Store,
    nodes: Arc<BTreeMap<String, NodeClient>>,
}

/// A VM after a discovery.
#[derive(Clone, Debug)]
pub struct Refreshed {
    /// The VM.
    pub vm: Vm,
    /// All disks that it ever had, in the order of their numbers.
    pub disks: Vec<VmDisk>,
    /// What is not as it was before, in the same order.
    pub changes: Vec<DiskChange>,
}

/// What became of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskChange {
    /// The VM has it, and had it not.
    Appeared(VmDisk),
    /// The VM had it, and has it no more.
    Gone(VmDisk),
    /// It has another size.
    Resized {
        /// As it is.
        disk: VmDisk,
        /// What it had, in bytes.
        before_bytes: u64,
    },
    /// Something else that is known of it changed.
    Described(VmDisk),
}

/// Why the inventory is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// No VM has this id.
    #[error("there is no VM {0}")]
    VmNotFound(VmId),
    /// There is no login for the VM's vCenter.
    #[error(transparent)]
    Login(#[from] LoginError),
    /// The VM's node is not in the configuration.
    #[error("VM {vm_name} is read by node {node}, which is not configured")]
    NodeUnknown {
        /// The VM.
        vm_name: String,
        /// The node.
        node: String,
    },
    /// It gave no usable answer.
    #[error("the disks of VM {vm_name} are not known, node {node} was asked: {source}")]
    Node {
        /// The VM.
        vm_name: String,
        /// The node.
        node: String,
        /// What became of the question.
        source: DiscoverError,
    },
    /// The VM was described anew after the node was asked, and the answer says something else.
    #[error("VM {0} was changed while its node was asked: what it answered may be older")]
    ChangedMeanwhile(String),
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Discovery {
    /// Discovery through these nodes, by the names they have in the configuration.
    pub fn new(config: Arc<Config>, store: Store, nodes: Arc<BTreeMap<String, NodeClient>>) -> Self {
        Self { config, store, nodes }
    }

    /// Asks the VM's node which disks it has, and brings the inventory to that in one transaction. Its revision grows only if
    /// something changes. `within` is how long the caller can wait, where that is less than the configuration allows.
    ///
    /// A job of the VM that runs goes on with the disks it began with.
    ///
    /// # Cancellation
    /// Dropped before the end nothing has changed.
    ///
    /// # Errors
    /// No usable answer, or the VM was changed meanwhile. The inventory is as it was.
    pub async fn refresh(&self, id: &VmId, within: Option<Duration>) -> Result<Refreshed, RefreshError> {
        let not_found = || RefreshError::VmNotFound(id.clone());
        let asked = vms::find(&mut *self.store.read().await?, id).await?.ok_or_else(not_found)?;
        let disks = self.ask(&asked, within).await?;

        let mut transaction = self.store.write().await?;
        let vm = vms::find(&mut transaction, id).await?.ok_or_else(not_found)?;
        let ReplacedDisks { before, now } = vms::replace_disks(&mut transaction, id, &disks).await?;
        let changes = changes(&before, &now);
        if vm.revision != asked.revision && (before != now || vm.path != asked.path || vm.vcenter != asked.vcenter) {
            return Err(RefreshError::ChangedMeanwhile(vm.name));
        }
        let vm = vms::find(&mut transaction, id).await?.ok_or_else(not_found)?;
        if before != now {
            transaction.commit().await?;
        }
        for change in &changes {
            tracing::info!(vm = vm.name, %id, ?change, "a disk is not as it was");
        }
        Ok(Refreshed { vm, disks: now, changes })
    }

    async fn ask(&self, vm: &Vm, within: Option<Duration>) -> Result<Vec<DiskDescription>, RefreshError> {
        let login = Login::read(&self.config, vm).await?;
        let node = self.nodes.get(&vm.node);
        let node = node.ok_or_else(|| RefreshError::NodeUnknown { vm_name: vm.name.clone(), node: vm.node.clone() })?;
        let name = inventory_name(&vm.path);
        let request = DiscoverRequest {
            vcenter: vm.vcenter.clone(),
            username: login.username,
            password: login.password,
            datacenter: login.datacenter.unwrap_or_else(|| datacenter(&vm.path).to_owned()),
            filter: is_plain(name).then(|| name.to_owned()),
        };
        let wanted = Wanted { path: vm.path.clone(), name: name.to_owned() };
        let disks = node.discover(&request, wanted, within).await.map_err(|source| RefreshError::Node {
            vm_name: vm.name.clone(),
            node: vm.node.clone(),
            source,
        })?;
        Ok(disks.into_iter().map(describe).collect())
    }
}

/// The first segment of an inventory path.
fn datacenter(path: &str) -> &str {
    path.split('/').find(|segment| !segment.is_empty()).unwrap_or_default()
}

/// Whether a name stands for itself, be it taken as a text, as part of one, or as a pattern of any kind.
fn is_plain(name: &str) -> bool {
    name.chars().all(|character| character.is_alphanumeric() || matches!(character, '-' | '_' | '.' | ' '))
}

fn describe(disk: DiscoveredDisk) -> DiskDescription {
    DiskDescription {
        device_key: disk.device_key,
        unit_number: disk.unit_number,
        vmdk_uuid: None,
        vmdk_path: disk.vmdk_path.map(without_snapshot),
        size_bytes: disk.size_bytes,
    }
}

/// The path of a disk without the number that VMware gives to the files of its snapshots, `db-000001.vmdk`: a disk stays the
/// same one while there is a snapshot.
fn without_snapshot(path: String) -> String {
    const DIGITS: usize = 6;
    let base = path.strip_suffix(".vmdk").and_then(|stem| {
        let (base, number) = stem.rsplit_once('-')?;
        let is_number = number.len() == DIGITS && number.bytes().all(|byte| byte.is_ascii_digit());
        (is_number && !base.is_empty() && !base.ends_with(['/', ' '])).then(|| format!("{base}.vmdk"))
    });
    base.unwrap_or(path)
}

/// What is not as it was. Both are all disks that the VM had by then, in the order of their numbers.
fn changes(before: &[VmDisk], now: &[VmDisk]) -> Vec<DiskChange> {
    let changed = |disk: &VmDisk| {
        let old = before.iter().find(|old| old.disk_id == disk.disk_id);
        match (old.filter(|old| old.present), disk.present) {
            (None, true) => Some(DiskChange::Appeared(disk.clone())),
            (Some(_), false) => Some(DiskChange::Gone(disk.clone())),
            (Some(old), true) if old.size_bytes != disk.size_bytes => {
                Some(DiskChange::Resized { disk: disk.clone(), before_bytes: old.size_bytes })
            }
            (Some(old), true) if old != disk => Some(DiskChange::Described(disk.clone())),
            (None, false) | (Some(_), true) => None,
        }
    };
    now.iter().filter_map(changed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_snapshots_are_those_of_their_disk() {
        let rows = [
            ("[ds1] db/db-000001.vmdk", "[ds1] db/db.vmdk"),
            ("[ds1] db/db_1-000123.vmdk", "[ds1] db/db_1.vmdk"),
            ("[ds1] db/db-1-000001.vmdk", "[ds1] db/db-1.vmdk"),
            ("[ds1] db/db-000001-000002.vmdk", "[ds1] db/db-000001.vmdk"),
            ("[ds1] db/db.vmdk", "[ds1] db/db.vmdk"),
            ("[ds1] db/db-00001.vmdk", "[ds1] db/db-00001.vmdk"),
            ("[ds1] db/db-0000001.vmdk", "[ds1] db/db-0000001.vmdk"),
            ("[ds1] db/db-00000x.vmdk", "[ds1] db/db-00000x.vmdk"),
            ("[ds1] db/-000001.vmdk", "[ds1] db/-000001.vmdk"),
            ("[ds1] -000001.vmdk", "[ds1] -000001.vmdk"),
            ("-000001.vmdk", "-000001.vmdk"),
            ("000001.vmdk", "000001.vmdk"),
            ("[ds1] db/db-000001.VMDK", "[ds1] db/db-000001.VMDK"),
            ("", ""),
        ];
        for (path, base) in rows {
            assert_eq!(without_snapshot(path.to_owned()), base, "{path}");
        }
    }

    #[test]
    fn names_that_could_be_patterns_do_not_filter() {
        for plain in ["db-server", "web 01_b.old", "Prüfung 北京"] {
            assert!(is_plain(plain), "{plain}");
        }
        for other in ["db*", "a%2fb", "db?", "[db]", "db (1)", "db+", "a|b", "a\\b", "^db", "a,b"] {
            assert!(!is_plain(other), "{other}");
        }
    }

    #[test]
    fn datacenter_is_the_first_segment_of_the_path() {
        assert_eq!(datacenter("/DC1/vm/prod/db"), "DC1");
        assert_eq!(datacenter("//DC 2/vm/db"), "DC 2");
        assert_eq!(datacenter("/"), "");
    }

    #[test]
    fn a_disk_appears_goes_is_resized_or_described_anew() {
        let disk = |disk_id: u32, size_bytes, present| VmDisk {
            disk_id,
            device_key: 2000 + disk_id,
            unit_number: None,
            vmdk_uuid: None,
            vmdk_path: None,
            size_bytes,
            present,
        };
        let before =
            [disk(0, 512, true), disk(1, 512, true), disk(2, 512, false), disk(3, 512, false), disk(4, 512, true)];
        let named = VmDisk { unit_number: Some(1), ..disk(4, 512, true) };
        let now = [
            disk(0, 1024, true),
            disk(1, 512, false),
            disk(2, 512, true),
            disk(3, 512, false),
            named.clone(),
            disk(5, 512, true),
        ];
        let expected = [
            DiskChange::Resized { disk: now[0].clone(), before_bytes: 512 },
            DiskChange::Gone(now[1].clone()),
            DiskChange::Appeared(now[2].clone()),
            DiskChange::Described(named),
            DiskChange::Appeared(now[5].clone()),
        ];
        assert_eq!(changes(&before, &now), expected);
        assert_eq!(changes(&now, &now), []);
    }
}
