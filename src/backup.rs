//! The backup job: from one request to one restore point of all disks of a VM, or to nothing at all.
//!
//! [`Backups`] is what the rest of the service sees. A request passes `check` and is accepted in `start`; from then on one task
//! per job ([`job`]) owns everything the job holds and takes it through `prepare`, `transfer`, `seal` and `commit`, or out
//! by `undo`. `recover` does the same for jobs of a process that died. Pure parts have no task: [`plan`],
//! `next_disk`, [`deadline`].

mod blocking;
mod check;
mod commit;
pub mod deadline;
pub mod ending;
pub mod idempotency;
pub mod job;
mod next_disk;
mod noted;
pub mod plan;
mod prepare;
pub mod progress;
mod recover;
mod refresh;
mod registry;
mod seal;
mod start;
mod sweep;
mod transfer;
mod undo;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::words::{DiskState, FailureCode, JobState};
use ending::{CompleteError, Failed, Sealed};
use idempotency::KeysInUse;
use job::{Job, JobHandle, JobView, Order, Stop};
use registry::Registry;

use crate::config::Config;
use crate::discovery::Discovery;
use crate::id::BackupId;
use crate::listeners::ListenerOptions;
use crate::listeners::ports::PortPool;
use crate::node::{NodeClient, NodeClientError};
use crate::repositories::Repositories;
use crate::store::{Store, StoreError, backups};

pub(crate) use commit::point_disk;
pub use recover::RecoverError;
pub(crate) use recover::{Waiting, settle_waiting};
pub use start::{NewBackup, StartError, Started, VmChoice};
pub(crate) use sweep::sweep;

/// How long a stopping service waits for its jobs to be undone. The listeners are cut after two seconds; the rest is
/// removing files.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

/// The jobs of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Backups {
    shared: Arc<Shared>,
}

/// What all jobs share.
#[derive(Debug)]
struct Shared {
    config: Arc<Config>,
    store: Store,
    /// Names this process start; leases of another one are void.
    boot_id: String,
    registry: Arc<Registry>,
    keys: Arc<KeysInUse>,
    ports: PortPool,
    listeners: ListenerOptions,
    repositories: Repositories,
    nodes: Arc<BTreeMap<String, NodeClient>>,
    discovery: Discovery,
}

impl Shared {
    fn node(&self, name: &str) -> Option<&NodeClient> {
        self.nodes.get(name)
    }
}

/// What became of a request to cancel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// The undo is running.
    Running,
    /// The job is over; the view says how.
    Over,
}

/// What a sign of life from a callback met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// A running job, which took it as such.
    Running,
    /// A job that is over.
    Ended,
    /// Nothing.
    Unknown,
}

/// Where the delta of a disk of a running job begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousChangeId {
    /// The job.
    pub job: BackupId,
    /// Nothing when the whole disk must be copied.
    pub change_id: Option<String>,
}

impl Backups {
    /// The jobs of a new process. Call [`Self::recover`] before anything else.
    ///
    /// # Errors
    /// A node whose HTTP client cannot be made.
    pub fn new(
        config: Arc<Config>,
        store: Store,
        repositories: Repositories,
        listeners: ListenerOptions,
        boot_id: &str,
    ) -> Result<Self, NodeClientError> {
        let mut nodes = BTreeMap::new();
        for (name, node) in &config.nodes {
            let connect_timeout = Duration::from_secs(node.connect_timeout_s);
            let client = NodeClient::new(&node.url, connect_timeout, Duration::from_secs(node.request_timeout_s))?;
            nodes.insert(name.clone(), client);
        }
        let nodes = Arc::new(nodes);
        let discovery = Discovery::new(Arc::clone(&config), store.clone(), Arc::clone(&nodes));
        let shared = Shared {
            ports: PortPool::new(config.nbd.bind),
            listeners,
            registry: Arc::new(Registry::new()),
            keys: Arc::default(),
            boot_id: boot_id.to_owned(),
            config,
            store,
            repositories,
            nodes,
            discovery,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Ends the jobs of earlier processes: forward where a restore point was published, else as failed.
    ///
    /// # Errors
    /// The database fails, or another hub works on one of the repositories.
    pub async fn recover(&self) -> Result<(), RecoverError> {
        recover::recover(&self.shared).await
    }

    /// A running job.
    pub fn find(&self, id: &BackupId) -> Option<Arc<JobHandle>> {
        self.shared.registry.find(id)
    }

    /// All running jobs, oldest first.
    pub fn running(&self) -> Vec<Arc<JobHandle>> {
        self.shared.registry.all()
    }

    /// How many jobs of this process ended in each terminal state.
    pub fn ended(&self) -> BTreeMap<JobState, u64> {
        self.shared.registry.ended()
    }

    /// The running job of the VM with this inventory name, by which the backup client knows it.
    fn find_by_inventory_name(&self, name: &str) -> Option<Arc<JobHandle>> {
        self.running().into_iter().find(|job| plan::inventory_name(&job.facts().vm.path) == name)
    }

    /// Where the delta of a disk begins, for the backup client that asks by the VM's inventory name and the number of a disk.
    /// The question is a sign of life of the job.
    pub fn previous_change_id(&self, inventory_name: &str, disk_id: Option<u32>) -> Option<PreviousChangeId> {
        let job = self.find_by_inventory_name(inventory_name)?;
        job.sign_of_life();
        let predict = self.shared.config.jobs.predict_next_disk;
        let change_id = disk_id.and_then(|disk_id| job.previous_change_id(disk_id, predict)).map(str::to_owned);
        Some(PreviousChangeId { job: job.facts().id.clone(), change_id })
    }

    /// Discovery through the nodes that the jobs use.
    pub fn discovery(&self) -> &Discovery {
        &self.shared.discovery
    }

    /// Ports that this process has leased.
    pub fn leased_ports(&self) -> Vec<u16> {
        self.shared.ports.leased()
    }

    /// Asks a job to stop, and waits until it has begun to, or is over.
    ///
    /// # Errors
    /// There is no such job, or the database fails.
    pub async fn cancel(&self, id: &BackupId) -> Result<Option<Cancelled>, StoreError> {
        let Some(job) = self.find(id) else {
            let row = backups::find(&mut *self.shared.store.read().await?, id).await?;
            return Ok(row.map(|_| Cancelled::Over));
        };
        job.stop.send_if_modified(|stop| stop.is_none() && stop.replace(Stop::Cancel).is_none());
        let mut view = job.watch();
        let ending = view.wait_for(|view| view.state.is_ending()).await.map(|view| view.state);
        // The channel ends with the job's task, after its last state was shown.
        Ok(Some(match ending {
            Ok(state) if !state.is_terminal() => Cancelled::Running,
            _ => Cancelled::Over,
        }))
    }

    /// Completes a disk: drains, proves, seals it, and commits the whole VM with the last one.
    ///
    /// # Cancellation
    /// The seal runs to its end when the future is dropped.
    ///
    /// # Errors
    /// See [`CompleteError`].
    pub async fn complete(
        &self,
        id: &BackupId,
        disk_id: u32,
        change_id: Option<String>,
    ) -> Result<Sealed, CompleteError> {
        if let Some(job) = self.find(id) {
            job.sign_of_life();
            let (reply, answer) = oneshot::channel();
            let order = Order::Complete { disk_id, change_id: change_id.clone(), reply };
            if job.orders.send(order).await.is_ok()
                && let Ok(answer) = answer.await
            {
                return answer;
            }
            // The job ended while the order waited; its record tells how.
        }
        self.completed_before(id, disk_id, change_id).await
    }

    /// The answer to a completion for a job that no task runs any more.
    async fn completed_before(
        &self,
        id: &BackupId,
        disk_id: u32,
        change_id: Option<String>,
    ) -> Result<Sealed, CompleteError> {
        let mut connection = self.shared.store.read().await?;
        let row = backups::find(&mut connection, id).await?.ok_or_else(|| CompleteError::NotFound(id.clone()))?;
        let disks = backups::disks(&mut connection, id).await?;
        let disk = disks.iter().find(|disk| disk.disk_id == disk_id);
        let disk = disk.ok_or_else(|| CompleteError::NoSuchDisk { id: id.clone(), disk_id })?;
        if row.state != JobState::Committed {
            return Err(CompleteError::Ended { id: id.clone(), state: row.state });
        }
        if disk.change_id != change_id {
            return Err(CompleteError::ChangeIdConflict { disk_id });
        }
        let sealed = disks.iter().filter(|disk| disk.state == DiskState::Sealed).count();
        Ok(Sealed { disk_id, change_id, sealed, disks: disks.len() })
    }

    /// Takes a sign of life of the backup client. It never changes a state.
    ///
    /// # Errors
    /// The database fails.
    pub async fn sign_of_life(&self, id: &BackupId) -> Result<Known, StoreError> {
        if let Some(job) = self.find(id) {
            job.sign_of_life();
            return Ok(Known::Running);
        }
        let row = backups::find(&mut *self.shared.store.read().await?, id).await?;
        Ok(if row.is_some() { Known::Ended } else { Known::Unknown })
    }

    /// Refuses new jobs from now on.
    pub fn refuse_new(&self) {
        self.shared.registry.close();
    }

    /// Refuses new jobs, lets running ones go on for `patience`, then undoes the rest. Returns when none is left, or when
    /// undoing takes too long; what is left then is done by the next start.
    pub async fn drain(&self, patience: Duration) {
        self.refuse_new();
        if tokio::time::timeout(patience, self.shared.registry.emptied()).await.is_ok() {
            return;
        }
        for job in self.running() {
            tracing::warn!(job_id = %job.facts().id, "the service is stopping; the backup is undone");
            job.stop.send_if_modified(|stop| stop.is_none() && stop.replace(Stop::Shutdown).is_none());
        }
        if tokio::time::timeout(UNDO_LIMIT, self.shared.registry.emptied()).await.is_err() {
            tracing::error!("some jobs could not be undone in time; the next start will");
        }
    }

    /// Ends the tasks of all jobs where they are, as a kill would. Sockets close, files and rows stay for the next start.
    pub(crate) fn abandon(&self) {
        self.shared.registry.abort();
    }
}

/// Runs a job in a task of its own. Should that panic, the job is ended from its record, as after a restart.
fn supervise(shared: &Arc<Shared>, job: Job) {
    let shared = Arc::clone(shared);
    let id = job.facts.id.clone();
    let running = tokio::spawn(job.run());
    shared.registry.remember(&id, running.abort_handle());
    tokio::spawn(async move {
        match running.await {
            Err(ended) if ended.is_panic() => tracing::error!(job_id = %id, "the task of a job panicked"),
            Ok(()) | Err(_) => return,
        }
        let settled = async {
            let row = backups::find(&mut *shared.store.read().await?, &id).await?;
            match row {
                Some(row) if !row.state.is_terminal() => {
                    let failed = Failed::new(FailureCode::ImageFailed, "the job ended by a panic");
                    end(&shared, &row, &failed).await
                }
                _ => Ok(()),
            }
        };
        if let Err(error) = settled.await {
            tracing::error!(job_id = %id, %error, "a job that panicked could not be ended; the next start will");
        }
    });
}

/// Ends a job that panicked, as soon as its files tell what it came to.
async fn end(shared: &Shared, row: &backups::BackupRow, failed: &Failed) -> Result<(), RecoverError> {
    let mut pause = commit::first_pause();
    loop {
        let keep_failed = shared.config.jobs.keep_failed;
        match recover::settle(&shared.repositories, &shared.store, keep_failed, row, failed.clone()).await {
            Ok(Waiting::Nobody) => return Ok(()),
            Ok(Waiting::Jobs) => {}
            Err(RecoverError::Folder(error)) => tracing::error!(job_id = %row.id, %error, "a job that panicked waits"),
            Err(error) => return Err(error),
        }
        commit::rest(&mut pause).await;
    }
}

impl JobHandle {
    /// Why the job is on its way out, when it is.
    fn failure(&self) -> Option<Failed> {
        let JobView { code, message, .. } = self.view();
        code.map(|code| Failed::new(code, message.unwrap_or_default()))
    }

    /// What the job is still expected to store.
    fn outstanding_bytes(&self) -> u64 {
        let stored: u64 = self.live().iter().map(|disk| disk.meter.reading().written_bytes).sum();
        self.facts().estimated_bytes.saturating_sub(stored)
    }
}
