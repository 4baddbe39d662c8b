//! Starting a backup: everything is checked before anything is touched, then the job is accepted in one transaction and
//! goes its own way.
//!
//! The checks are in `check`. Ports are bound before the rows are written, so that a lack of them refuses
//! the request instead of failing a job; like the slot they are values that give themselves back on every way out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::check::{Checked, check, new_secret};
use super::ending::{End, Failed, StartNews};
use super::idempotency::IdempotencyKey;
use super::job::{Job, JobDisk, JobFacts, JobHandle, NewJob};
use super::plan::{self, DiskPlan, PlanError};
use super::refresh::refresh;
use super::registry::{Capacity, Claim, Refused, Slot};
use super::{Backups, Shared};
use crate::clock::UtcTime;
use crate::discovery::RefreshError;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::listeners::ports::{BoundPort, PortError};
use crate::login::LoginError;
use crate::repositories::promises::Promise;
use crate::repository::layout::{self, BackupPaths};
use crate::secret::Secret;
use crate::store::backups::{self, BackupDiskRow, BackupRow};
use crate::store::leases::{self, LeaseKind};
use crate::store::vms::Vm;
use crate::store::{Connection, StoreError, idempotency, points};
use crate::words::{DiskState, JobResult, JobState, RequestedType};

/// How late a client may come for a job that is over. A guess: one that was launched late or lost its way in a tunnel comes
/// within minutes, and the last disk of a long copy within hours.
const LATE_CLIENT_S: u64 = 24 * 3600;

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct NewBackup {
    /// Whose backup.
    pub vm: VmChoice,
    /// Where to.
    pub repository_id: RepositoryId,
    /// Which type.
    pub requested_type: RequestedType,
    /// Stored and echoed.
    pub policy_id: Option<String>,
    /// Stored and echoed.
    pub tags: BTreeMap<String, String>,
    /// What was found strange about the request.
    pub warnings: Vec<String>,
    /// By which the caller may repeat the request; stored with the job.
    pub idempotency_key: Option<IdempotencyKey>,
}

/// How a caller names a VM.
#[derive(Clone, Debug)]
pub enum VmChoice {
    /// By identity.
    Id(VmId),
    /// By name, which must be that of one VM only.
    Name(String),
}

/// A job that was accepted.
#[derive(Clone, Debug)]
pub struct Started {
    /// What was decided.
    pub facts: Arc<JobFacts>,
    /// Whether the node said that it launched a client; else the answer is not known yet.
    pub confirmed: bool,
    /// What the caller should know beyond the facts.
    pub warnings: Vec<String>,
}

/// Why there is no job, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No VM has this id or name.
    #[error("there is no VM {0}")]
    VmNotFound(String),
    /// Several VMs have this name.
    #[error("{} VMs are called {name}: name one by vm_context_id", ids.len())]
    VmAmbiguous {
        /// The name.
        name: String,
        /// Who has it.
        ids: Vec<VmId>,
    },
    /// No repository has this id.
    #[error("there is no repository {0}")]
    RepositoryNotFound(RepositoryId),
    /// The repository cannot be written now.
    #[error("repository {id} cannot be used: {reason}")]
    RepositoryUnavailable {
        /// The repository.
        id: RepositoryId,
        /// Why, without paths.
        reason: String,
    },
    /// Its disks cannot be backed up.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There is no login for the VM's vCenter.
    #[error(transparent)]
    Login(#[from] LoginError),
    /// The disks that the VM has now cannot be known.
    #[error(transparent)]
    Refresh(#[from] RefreshError),
    /// The VM's node is not in the configuration.
    #[error("VM {vm_name} is read by node {node}, which is not configured")]
    NodeUnknown {
        /// The VM.
        vm_name: String,
        /// The node.
        node: String,
    },
    /// The repository is too full.
    #[error("repository {id} has {free_bytes} bytes to spare and the backup is expected to need {needed_bytes}")]
    InsufficientStorage {
        /// The repository.
        id: RepositoryId,
        /// What the job is expected to store.
        needed_bytes: u64,
        /// What is free beyond the reserve and the running jobs.
        free_bytes: u64,
    },
    /// A job of this VM runs.
    #[error("VM {vm_name} is being backed up by {active}")]
    InProgress {
        /// The VM.
        vm_name: String,
        /// Its job.
        active: BackupId,
        /// Where that is, when it can be asked.
        state: Option<JobState>,
    },
    /// A job of another VM with the same inventory name runs.
    #[error("{active} backs up another VM that is called {name} in its inventory")]
    NameBusy {
        /// The name.
        name: String,
        /// The job.
        active: BackupId,
    },
    /// As many jobs run as may.
    #[error("{limit} backups are running, as many as the {place} may have")]
    TooManyJobs {
        /// What limits them.
        place: &'static str,
        /// How many it may have.
        limit: u32,
    },
    /// Not enough ports.
    #[error(transparent)]
    NoPorts(#[from] PortError),
    /// The file system of the database has no room for the record of a job.
    #[error("the file system of the hub's state is full")]
    StateFull,
    /// What the job was to build upon was taken away while it was accepted, each time it was planned.
    #[error("the restore points that the backup would build upon are being changed: try again")]
    ParentsChanging,
    /// The service is stopping.
    #[error("the service is stopping")]
    Draining,
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The job was accepted and failed at once. Everything has been given back.
    #[error("{}", failed.message)]
    Failed {
        /// The job.
        backup_id: BackupId,
        /// Why.
        failed: Failed,
    },
    /// The job was accepted and cancelled before it could begin.
    #[error("backup {0} was cancelled")]
    Cancelled(BackupId),
    /// A task ended by a panic.
    #[error("starting the backup ended by a panic")]
    Panicked,
}

impl StartError {
    /// The job that was made and is over; `None` when there never was one.
    pub fn backup_id(&self) -> Option<&BackupId> {
        match self {
            Self::Failed { backup_id, .. } | Self::Cancelled(backup_id) => Some(backup_id),
            _ => None,
        }
    }
}

/// How often a job is planned whose parents went between the check and the transaction that pins them. A deletion and a merge
/// of the same VM may each come in between; a third time is not bad luck.
const PLANS: usize = 3;

/// A job and who hears what becomes of its start.
struct Accepted {
    handle: Arc<JobHandle>,
    news: oneshot::Receiver<StartNews>,
}

impl Backups {
    /// Starts a backup and waits for the node's answer, at most `jobs.answer_within_s`.
    ///
    /// # Cancellation
    /// The job goes on when the future is dropped.
    ///
    /// # Errors
    /// Refusals before the job was accepted, and failures that were found before the time was up.
    pub async fn start(&self, new: NewBackup) -> Result<Started, StartError> {
        let deadline = Instant::now() + Duration::from_secs(self.shared.config.jobs.answer_within_s);
        let shared = Arc::clone(&self.shared);
        let accepted = tokio::spawn(async move { accept(&shared, new, deadline).await }).await;
        let Accepted { handle, news } = accepted.map_err(|_| StartError::Panicked)??;
        let facts = Arc::clone(handle.facts());
        match tokio::time::timeout_at(deadline, news).await {
            Ok(Ok(StartNews::Started { warnings })) => Ok(Started { facts, confirmed: true, warnings }),
            Ok(Ok(StartNews::Starting)) => Ok(Started { facts, confirmed: false, warnings: Vec::new() }),
            Ok(Ok(StartNews::Ended(End::Failed(failed)))) => {
                Err(StartError::Failed { backup_id: facts.id.clone(), failed })
            }
            Ok(Ok(StartNews::Ended(End::Cancelled))) => Err(StartError::Cancelled(facts.id.clone())),
            Ok(Err(_)) => Err(StartError::Panicked),
            // The time is up. A job that is on its way out has failed, even if it still holds something.
            Err(_) => match handle.failure() {
                Some(failed) => Err(StartError::Failed { backup_id: facts.id.clone(), failed }),
                None => Ok(Started { facts, confirmed: false, warnings: Vec::new() }),
            },
        }
    }
}

async fn accept(shared: &Arc<Shared>, new: NewBackup, deadline: Instant) -> Result<Accepted, StartError> {
    if shared.registry.is_closed() {
        return Err(StartError::Draining);
    }
    refresh(shared, &new.vm, deadline).await?;
    for _ in 1..PLANS {
        match accept_as_planned(shared, new.clone()).await {
            Err(StartError::ParentsChanging) => tracing::info!("a parent of a backup went; it is planned again"),
            accepted => return accepted,
        }
    }
    accept_as_planned(shared, new).await
}

async fn accept_as_planned(shared: &Arc<Shared>, new: NewBackup) -> Result<Accepted, StartError> {
    if shared.registry.is_closed() {
        return Err(StartError::Draining);
    }
    if !shared.store.has_room().await {
        return Err(StartError::StateFull);
    }
    let checked = check(shared, &new).await?;
    let id = BackupId::new();
    let slot = claim(shared, &id, &checked)?;
    let ports = shared.ports.lease(&shared.config.port_range(&checked.node).ports(), checked.plans.len())?;
    let Accepting { facts, username, password, promise } = record(shared, id, new, checked, &ports).await?;
    tracing::info!(job_id = %facts.id, vm = facts.vm.name, disks = facts.disks.len(), "backup accepted");
    let new_job = NewJob { facts, vcenter_user: username, password, ports, slot, promise };
    let (job, handle, news) = Job::new(shared, new_job);
    super::supervise(shared, job);
    Ok(Accepted { handle, news })
}

/// Takes the VM, or says who has it.
fn claim(shared: &Arc<Shared>, id: &BackupId, checked: &Checked) -> Result<Slot, StartError> {
    let name = plan::inventory_name(&checked.vm.path);
    let claim = Claim {
        vm_id: checked.vm.id.clone(),
        inventory_name: name.to_owned(),
        node: checked.vm.node.clone(),
        repository_id: checked.repository.id.clone(),
    };
    let capacity = Capacity {
        total: shared.config.jobs.max_running,
        node: Some(checked.node.max_running).filter(|&limit| limit > 0),
        repository: checked.repository.max_running,
    };
    shared.registry.claim(id, claim, capacity).map_err(|refused| match refused {
        Refused::Closed => StartError::Draining,
        Refused::Vm(active) => in_progress(shared, &checked.vm, active),
        Refused::Name(active) => StartError::NameBusy { name: name.to_owned(), active },
        Refused::Capacity(place, limit) => StartError::TooManyJobs { place, limit },
    })
}

pub(super) fn in_progress(shared: &Shared, vm: &Vm, active: BackupId) -> StartError {
    let state = shared.registry.find(&active).map(|job| job.view().state);
    StartError::InProgress { vm_name: vm.name.clone(), active, state }
}

/// What is left of the check once the job exists.
struct Accepting {
    facts: Arc<JobFacts>,
    username: String,
    password: Secret,
    promise: Promise,
}

/// The transaction that makes the job exist.
async fn record(
    shared: &Shared,
    id: BackupId,
    mut new: NewBackup,
    checked: Checked,
    ports: &[BoundPort],
) -> Result<Accepting, StartError> {
    let Checked {
        vm, repository, mut plans, username, password, estimated_bytes, last_order, promise, warnings, ..
    } = checked;
    new.warnings.extend(warnings);
    let boot_id = shared.boot_id.as_str();
    let mut transaction = shared.store.write().await?;
    for plan in &plans {
        if !parent_stands(plan, &mut transaction).await? {
            return Err(StartError::ParentsChanging);
        }
    }
    let directory_name = claim_directory(&mut transaction, &vm).await?;
    for (kind, key) in [(LeaseKind::Vm, vm.id.as_str()), (LeaseKind::Name, plan::inventory_name(&vm.path))] {
        if let Err(active) = leases::take(&mut transaction, kind, key, id.as_str(), boot_id).await? {
            return Err(match kind {
                LeaseKind::Name => StartError::NameBusy { name: key.to_owned(), active },
                _ => in_progress(shared, &vm, active),
            });
        }
    }
    for port in ports {
        leases::take_over(&mut transaction, LeaseKind::Port, &port.lease.port().to_string(), id.as_str(), boot_id)
            .await?;
    }
    let parents: BTreeSet<&BackupId> = plans.iter().filter_map(|plan| Some(&plan.parent.as_ref()?.point_id)).collect();
    for parent in parents {
        leases::pin_chain(&mut transaction, parent, id.as_str(), boot_id).await?;
    }
    let mut known_images = Vec::new();
    for plan in &plans {
        let known = points::newest_usable_image(&mut transaction, &vm.id, &repository.id, plan.disk_id).await?;
        if let Some((point, _)) = &known
            && plan.parent.as_ref().is_none_or(|parent| parent.point_id != *point)
        {
            leases::pin_chain(&mut transaction, point, id.as_str(), boot_id).await?;
        }
        known_images.push(known.map(|(_, image)| Path::new(&repository.path).join(image)));
    }
    let backup_type = plan::job_type(&plans);
    for (plan, bound) in plans.iter_mut().zip(ports) {
        fence_off(plan, &vm.name, bound.lease.port(), &mut transaction).await?;
    }
    let offset = shared.config.nbd.advertise_port_offset;
    let disks: Vec<JobDisk> = plans
        .into_iter()
        .zip(ports)
        .zip(known_images)
        .map(|((plan, bound), known_image)| {
            let port = bound.lease.port();
            // The configuration was refused if any port of the range could leave the numbers of TCP.
            let advertised_port = u16::try_from(i32::from(port) + offset).unwrap_or(port);
            JobDisk { plan, port, advertised_port, known_image }
        })
        .collect();
    let facts = JobFacts {
        paths: BackupPaths::new(Path::new(&repository.path), &directory_name, id.as_str()),
        id,
        vm,
        repository,
        requested_type: new.requested_type,
        backup_type,
        policy_id: new.policy_id,
        tags: new.tags,
        warnings: new.warnings,
        created_at: UtcTime::now(),
        disks,
        estimated_bytes,
        last_order,
    };
    let (backup, rows) = rows(&facts, boot_id);
    backups::insert(&mut transaction, &backup, &rows).await?;
    if let Some(IdempotencyKey { key, body_hash }) = &new.idempotency_key {
        idempotency::remove_expired(&mut transaction, facts.created_at).await?;
        let expires_at = facts.created_at.plus_seconds(shared.config.jobs.idempotency_ttl_s);
        idempotency::insert(&mut transaction, key, body_hash, &facts.id, expires_at).await?;
    }
    transaction.commit().await?;
    Ok(Accepting { facts: Arc::new(facts), username, password, promise })
}

/// Gives a disk a name that nobody knows yet where a client of an earlier job may still come to its port for the one that it has.
async fn fence_off(
    plan: &mut DiskPlan,
    vm_name: &str,
    port: u16,
    connection: &mut Connection,
) -> Result<(), StoreError> {
    let since = UtcTime::now().minus_seconds(LATE_CLIENT_S);
    if backups::has_had_export(connection, port, &plan.export_name, since).await? {
        plan.export_name = layout::unguessable_export_name(vm_name, &new_secret(), plan.disk_id);
    }
    Ok(())
}

/// Whether what a disk builds upon is still what it was when that was chosen. From here on the pins hold it.
async fn parent_stands(plan: &DiskPlan, connection: &mut Connection) -> Result<bool, StoreError> {
    let Some(parent) = &plan.parent else { return Ok(true) };
    let chain = points::chain(connection, &parent.point_id, plan.disk_id).await?;
    Ok(!chain.is_empty() && chain.iter().all(|image| plan::refuse_unfit(image.state, image.trust).is_ok()))
}

/// The folder of the VM: the one it has, or the first of its names that nobody has.
async fn claim_directory(connection: &mut Connection, vm: &Vm) -> Result<String, StoreError> {
    let mut last = String::new();
    for name in layout::vm_directory_names(&vm.name, vm.id.as_str()) {
        if let Some(directory) = backups::claim_directory(connection, &vm.id, &name).await? {
            return Ok(directory);
        }
        last = name;
    }
    // The last name ends in the whole id, which no other VM has.
    Ok(last)
}

fn rows(facts: &JobFacts, boot_id: &str) -> (BackupRow, Vec<BackupDiskRow>) {
    let backup = BackupRow {
        id: facts.id.clone(),
        vm_id: facts.vm.id.clone(),
        repository_id: facts.repository.id.clone(),
        vm_name: facts.vm.name.clone(),
        requested_type: facts.requested_type,
        backup_type: facts.backup_type,
        state: JobState::Accepted,
        result: JobResult::None,
        code: None,
        message: None,
        node_outcome: None,
        boot_id: boot_id.to_owned(),
        policy_id: facts.policy_id.clone(),
        tags: facts.tags.clone(),
        warnings: facts.warnings.clone(),
        created_at: facts.created_at,
        started_at: None,
        completed_at: None,
    };
    let disks = facts.disks.iter().map(|disk| BackupDiskRow {
        disk_id: disk.plan.disk_id,
        device_key: disk.plan.device_key,
        vmdk_uuid: disk.plan.vmdk_uuid.clone(),
        vmdk_path: disk.plan.vmdk_path.clone(),
        size_bytes: disk.plan.size_bytes,
        backup_type: disk.plan.backup_type(),
        effective_type: None,
        reason: disk.plan.reason,
        parent_id: disk.plan.parent.as_ref().map(|parent| parent.point_id.clone()),
        from_change_id: disk.plan.parent.as_ref().map(|parent| parent.change_id.clone()),
        change_id: None,
        port: Some(disk.port),
        export_name: Some(disk.plan.export_name.clone()),
        state: DiskState::Allocated,
        error_message: None,
        covered_bytes: 0,
        written_bytes: 0,
        zeroed_bytes: 0,
        zeroed_over_data_bytes: 0,
        identical_bytes: 0,
        sealed_at: None,
    });
    (backup, disks.collect())
}
