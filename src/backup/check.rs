//! Everything that can refuse a backup before anything is touched, in the order of the contract: VM, disks, repository, what
//! can be built upon, login, node, space. Whether the VM is free is asked last, by claiming it.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::Shared;
use super::plan::{self, Choice, DiskPlan, Newest, PlanError};
use super::start::{NewBackup, StartError, VmChoice};
use crate::config::{ExportNames, Node};
use crate::id::new_ulid;
use crate::login::Login;
use crate::points::chain::{RecordedChain, Settling};
use crate::points::folder::FolderError;
use crate::repositories::promises::Promise;
use crate::repository::{directory, layout};
use crate::secret::Secret;
use crate::store::points::{self, ChainImage};
use crate::store::repositories::{self, Repository};
use crate::store::vms::{self, Vm, VmDisk};
use crate::store::{Connection, StoreError, backups};
use crate::words::{BackupType, RequestedType, TypeReason};

/// A first incremental is expected to store one twentieth of its disk: a guess, for a day of an ordinary machine.
const INCREMENTAL_SHARE: u64 = 20;
/// Memory for tables while a chain is opened to be looked at: nothing is read through it.
const EXAMINE_CACHE_BYTES: usize = 1 << 20;

/// Everything that was found when the request was checked.
pub(super) struct Checked {
    pub(super) vm: Vm,
    pub(super) repository: Repository,
    pub(super) plans: Vec<DiskPlan>,
    pub(super) username: String,
    pub(super) password: Secret,
    pub(super) node: Node,
    pub(super) estimated_bytes: u64,
    /// The room for that.
    pub(super) promise: Promise,
    /// Disks in the order in which they were copied last time.
    pub(super) last_order: Vec<u32>,
    /// What the newest point has and this backup will not have.
    pub(super) warnings: Vec<String>,
}

/// All checks, in the order of the contract, without any side effect.
pub(super) async fn check(shared: &Shared, new: &NewBackup) -> Result<Checked, StartError> {
    let mut connection = shared.store.read().await?;
    let vm = find_vm(&mut connection, &new.vm).await?;
    let repository = repositories::find(&mut connection, &new.repository_id)
        .await?
        .ok_or_else(|| StartError::RepositoryNotFound(new.repository_id.clone()))?;
    let disks = plan::present(vms::disks(&mut connection, &vm.id).await?)?;
    drop(connection);
    check_repository(shared, &repository).await?;
    // Only now: the repository may just have told of points and jobs that were not known.
    let last_order = backups::last_seal_order(&mut *shared.store.read().await?, &vm.id).await?;
    let (plans, newest) = plan(shared, &vm, &repository, &disks, new.requested_type).await?;
    let estimated_bytes = estimate(shared, &plans, newest.as_ref());
    let Login { username, password, .. } = Login::read(&shared.config, &vm).await?;
    let node = shared.config.nodes.get(&vm.node).cloned().filter(|_| shared.node(&vm.node).is_some());
    let node = node.ok_or_else(|| StartError::NodeUnknown { vm_name: vm.name.clone(), node: vm.node.clone() })?;
    let promise = claim_space(shared, &repository, estimated_bytes).await?;
    let warnings = gone(&plans, newest.as_ref());
    Ok(Checked { vm, repository, plans, username, password, node, estimated_bytes, promise, last_order, warnings })
}

/// That a VM has a disk less may be so, or be what was wrongly told of it: a backup without it is a success that somebody should
/// look at.
fn gone(plans: &[DiskPlan], newest: Option<&Newest>) -> Vec<String> {
    let before = newest.into_iter().flat_map(|newest| &newest.disks).map(|(disk, _)| disk);
    let gone = before.filter(|disk| !plans.iter().any(|plan| plan.disk_id == disk.disk_id));
    gone.map(|disk| {
        let (disk_id, device_key) = (disk.disk_id, disk.device_key);
        format!(
            "disk_gone: disk {disk_id} (device key {device_key}) is in the newest restore point and not in this backup"
        )
    })
    .collect()
}

/// The VM that the caller names.
pub(super) async fn find_vm(connection: &mut Connection, choice: &VmChoice) -> Result<Vm, StartError> {
    match choice {
        VmChoice::Id(id) => vms::find(connection, id).await?.ok_or_else(|| StartError::VmNotFound(id.to_string())),
        VmChoice::Name(name) => {
            let mut found = vms::find_by_name(connection, name).await?;
            if found.len() > 1 {
                let ids = found.into_iter().map(|vm| vm.id).collect();
                return Err(StartError::VmAmbiguous { name: name.clone(), ids });
            }
            found.pop().ok_or_else(|| StartError::VmNotFound(name.clone()))
        }
    }
}

async fn newest(connection: &mut Connection, vm: &Vm, repository: &Repository) -> Result<Option<Newest>, StoreError> {
    let Some(point) = points::newest(connection, &vm.id, &repository.id).await? else { return Ok(None) };
    let mut disks = Vec::new();
    for disk in points::disks(connection, &point.id).await? {
        let chain = points::chain(connection, &point.id, disk.disk_id).await?;
        disks.push((disk, chain));
    }
    Ok(Some(Newest { point, disks }))
}

/// Plans the disks upon the newest point, which is handed back. A point below may be made anew at this moment: what does not
/// fit is looked at again as long as that explains it.
async fn plan(
    shared: &Shared,
    vm: &Vm,
    repository: &Repository,
    disks: &[VmDisk],
    requested: RequestedType,
) -> Result<(Vec<DiskPlan>, Option<Newest>), StartError> {
    let max_chain_depth = shared.config.storage.max_chain_depth;
    let mut settling = Settling::new(&shared.store);
    loop {
        let newest = newest(&mut *shared.store.snapshot().await?, vm, repository).await?;
        let choice = Choice { requested, newest, max_chain_depth };
        let Planned { plans, newest, chains } = choose(shared, vm, repository, disks.to_vec(), choice).await?;
        if let (Chains::Unfit, Some(newest)) = (chains, &newest) {
            let read: Vec<_> = newest.disks.iter().map(|(disk, chain)| (disk.disk_id, chain.as_slice())).collect();
            if settling.look_again(&newest.point.id, &read).await? {
                continue;
            }
        }
        return Ok((plans?, newest));
    }
}

/// What came of looking at the newest point.
struct Planned {
    plans: Result<Vec<DiskPlan>, PlanError>,
    newest: Option<Newest>,
    chains: Chains,
}

/// Whether the images that were looked at are as they are recorded.
#[derive(Clone, Copy)]
enum Chains {
    Fit,
    Unfit,
}

/// Plans the disks, on a thread where it may wait for the images of the newest point.
async fn choose(
    shared: &Shared,
    vm: &Vm,
    repository: &Repository,
    disks: Vec<VmDisk>,
    choice: Choice,
) -> Result<Planned, StartError> {
    let secret = (shared.config.nbd.export_names == ExportNames::Unguessable).then(new_secret);
    let (root, vm_name) = (PathBuf::from(&repository.path), vm.name.clone());
    let planned = tokio::task::spawn_blocking(move || {
        let chains = Cell::new(Chains::Fit);
        let examine =
            |chain: &[ChainImage], size| examine(&root, chain, size).inspect_err(|_| chains.set(Chains::Unfit));
        let plans = plan::disks(&disks, &choice, examine, |disk_id| match &secret {
            Some(secret) => layout::unguessable_export_name(&vm_name, secret, disk_id),
            None => layout::export_name(&vm_name, disk_id),
        });
        Planned { plans, newest: choice.newest, chains: chains.get() }
    });
    planned.await.map_err(|_| StartError::Panicked)
}

/// Whether a chain can be built upon. What is damaged beyond what [`RecordedChain`] sees is for a verification to find.
fn examine(repository: &Path, images: &[ChainImage], size_bytes: u64) -> Result<(), TypeReason> {
    let chain = RecordedChain { repository, images, size_bytes };
    let unfit = match chain.open(EXAMINE_CACHE_BYTES) {
        Ok(_) => return Ok(()),
        Err(unfit) => unfit,
    };
    tracing::warn!(top = ?chain.top(), error = %unfit, "a chain cannot be built upon");
    if unfit.is_missing() { Err(TypeReason::ParentMissing) } else { Err(TypeReason::ParentCorrupt) }
}

/// Something for an export name that nobody can guess: 80 random bits of a ULID are what the names have room for.
pub(super) fn new_secret() -> String {
    new_ulid().to_string()
}

/// What the job is expected to store: as much as the last full of a disk, twice its last incremental, or a share of its size.
fn estimate(shared: &Shared, plans: &[DiskPlan], newest: Option<&Newest>) -> u64 {
    let ratio = shared.config.storage.full_estimate_ratio;
    plans
        .iter()
        .map(|plan| {
            let last = newest.and_then(|newest| newest.disk(plan.disk_id));
            match (plan.backup_type(), last) {
                (BackupType::Full, Some(disk)) if disk.backup_type == BackupType::Full => disk.file_bytes,
                // Rounding hundreds of bytes of an estimate away is what an estimate is for.
                (BackupType::Full, _) => (plan.size_bytes as f64 * ratio) as u64,
                (BackupType::Incremental, Some(disk)) if disk.backup_type == BackupType::Incremental => {
                    disk.file_bytes.saturating_mul(2)
                }
                (BackupType::Incremental, _) => plan.size_bytes / INCREMENTAL_SHARE,
            }
        })
        .sum()
}

/// The repository is ours, and can be written.
async fn check_repository(shared: &Shared, repository: &Repository) -> Result<(), StartError> {
    let unavailable = |reason: String| StartError::RepositoryUnavailable { id: repository.id.clone(), reason };
    if !repository.enabled {
        return Err(unavailable("it is disabled".to_owned()));
    }
    shared.repositories.own(repository).await.map_err(|error| refused(error, repository))?;
    let writable = |path: &Path| rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK);
    let writable = shared.repositories.ask(repository, writable).await.map_err(|error| refused(error, repository))?;
    writable.map_err(|error| unavailable(error.kind().to_string()))
}

fn refused(error: FolderError, repository: &Repository) -> StartError {
    match error {
        FolderError::Unavailable { reason, .. } => {
            StartError::RepositoryUnavailable { id: repository.id.clone(), reason }
        }
        FolderError::NotFound(id) => StartError::RepositoryNotFound(id),
        FolderError::Store(error) => error.into(),
        FolderError::Panicked => StartError::Panicked,
    }
}

/// What is free, less the reserve and what running jobs and merges are still expected to store, covers the estimate: it is this
/// job's from now on.
async fn claim_space(shared: &Shared, repository: &Repository, needed_bytes: u64) -> Result<Promise, StartError> {
    let promise = shared.repositories.promise(&repository.id, needed_bytes);
    let measured = shared.repositories.ask(repository, directory::space).await;
    let (free, _) = measured.map_err(|error| refused(error, repository))?.map_err(|error| {
        StartError::RepositoryUnavailable { id: repository.id.clone(), reason: error.kind().to_string() }
    })?;
    let free_bytes = free.saturating_sub(promise.earlier_bytes()).saturating_sub(shared.config.storage.min_free_bytes);
    if free_bytes < needed_bytes {
        return Err(StartError::InsufficientStorage { id: repository.id.clone(), needed_bytes, free_bytes });
    }
    Ok(promise)
}
