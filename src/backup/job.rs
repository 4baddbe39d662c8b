//! A running job: what everyone may know of it, and the task that owns everything it holds.
//!
//! One task per job owns its slot, ports, listeners, images and staged files, takes orders from a channel, and ends by
//! committing or by undoing. Because nothing else can touch them, a step never races with another, a caller that hangs up
//! changes nothing, and there is one way out for failure, cancel and shutdown.
//!
//! The steps are in files of their own: `prepare`, `transfer`, `seal`, `commit`, `undo`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::sync::{mpsc, oneshot, watch};

use super::Shared;
use super::blocking::Work;
use super::ending::{CompleteError, End, Failed, Sealed, StartNews};
use super::next_disk;
use super::noted::Noted;
use super::plan::DiskPlan;
use super::registry::{Presence, Slot};
use crate::clock::UtcTime;
use crate::export::ImageExport;
use crate::export::gate::Gate;
use crate::export::meter::{Meter, Reading};
use crate::export::signals::Signals;
use crate::id::BackupId;
use crate::listeners::ports::BoundPort;
use crate::listeners::{DiskListener, ListenerFigures};
use crate::repositories::promises::Promise;
use crate::repository::layout::BackupPaths;
use crate::secret::Secret;
use crate::store::Store;
use crate::store::backups::{self, Change};
use crate::store::events::Actor;
use crate::store::repositories::Repository;
use crate::store::vms::Vm;
use crate::words::{BackupType, DiskState, FailureCode, JobResult, JobState, RequestedType};

/// What was decided when the job was accepted. Never changes.
#[derive(Debug)]
pub struct JobFacts {
    /// The id of the job, and of its restore point.
    pub id: BackupId,
    /// The VM as the inventory described it.
    pub vm: Vm,
    /// Where it goes.
    pub repository: Repository,
    /// Where its files are.
    pub paths: BackupPaths,
    /// What the caller asked for.
    pub requested_type: RequestedType,
    /// What it is: full when every disk is.
    pub backup_type: BackupType,
    /// The caller's policy.
    pub policy_id: Option<String>,
    /// The caller's words.
    pub tags: BTreeMap<String, String>,
    /// What the caller should know.
    pub warnings: Vec<String>,
    /// When it was accepted.
    pub created_at: UtcTime,
    /// Its disks, in ascending order of number.
    pub disks: Vec<JobDisk>,
    /// How many bytes it is expected to store.
    pub estimated_bytes: u64,
    /// The order in which the VM's disks were copied last time.
    pub last_order: Vec<u32>,
}

/// One disk of a job with its port.
#[derive(Clone, Debug)]
pub struct JobDisk {
    /// What is done with it.
    pub plan: DiskPlan,
    /// The port its listener is bound to.
    pub port: u16,
    /// The port that clients are told, which a tunnel may shift.
    pub advertised_port: u16,
    /// The image of the disk in its newest usable point, which the job has pinned: what large zeroes are held against.
    pub known_image: Option<PathBuf>,
}

/// Where a job is. Kept equal to the database, which is written first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    /// Where it is.
    pub state: JobState,
    /// What became of it.
    pub result: JobResult,
    /// Why it failed, as soon as that is known.
    pub code: Option<FailureCode>,
    /// The same for people.
    pub message: Option<String>,
}

/// How to reach a running job.
#[derive(Debug)]
pub struct JobHandle {
    facts: Arc<JobFacts>,
    view: watch::Receiver<JobView>,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) stop: watch::Sender<Option<Stop>>,
    signals: Arc<Signals>,
    /// Set once, when the listeners accept connections.
    pub(super) live: OnceLock<Vec<LiveDisk>>,
}

/// What can be seen of a disk while its job runs.
#[derive(Clone, Debug)]
pub struct LiveDisk {
    /// Its number.
    pub disk_id: u32,
    /// Its size.
    pub size_bytes: u64,
    /// Whether every byte of it must come.
    pub backup_type: BackupType,
    /// Its numbers. Not its export: the image belongs to the job alone, and is closed with it.
    pub meter: Arc<Meter>,
    /// The door of its image, which knows how long requests were inside.
    pub gate: Arc<Gate>,
    /// Its listener's figures.
    pub figures: ListenerFigures,
    /// Whether it is sealed.
    pub(super) sealed: Arc<AtomicBool>,
}

impl LiveDisk {
    /// Where the disk is, given what the database says: between listening and draining the NBD layer knows best.
    pub fn state(&self, stored: DiskState) -> DiskState {
        use DiskState as S;
        match stored {
            S::Listening | S::Connected | S::Writing | S::Disconnected => observed(&self.meter.reading()),
            S::Allocated | S::Draining | S::Sealed | S::Failed => stored,
        }
    }

    /// Where the disk is, as far as can be seen without the database, while its job is not ending.
    pub fn state_seen(&self) -> DiskState {
        if self.sealed.load(Ordering::Acquire) {
            DiskState::Sealed
        } else if self.gate.is_closed() {
            DiskState::Draining
        } else {
            observed(&self.meter.reading())
        }
    }
}

/// Where a disk is by what passed at its export, from its first listening until it is completed.
pub(super) fn observed(reading: &Reading) -> DiskState {
    match (reading.ever_connected, reading.changed, reading.connections) {
        (false, ..) => DiskState::Listening,
        (true, false, _) => DiskState::Connected,
        (true, true, 0) => DiskState::Disconnected,
        (true, true, _) => DiskState::Writing,
    }
}

/// Why a job must stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// A caller asked.
    Cancel,
    /// The service is going down.
    Shutdown,
}

/// What the backup client or a caller wants of a job.
#[derive(Debug)]
pub(super) enum Order {
    /// A disk is copied.
    Complete {
        /// Which one.
        disk_id: u32,
        /// The state of the disk in change tracking.
        change_id: Option<String>,
        /// Who waits for the seal.
        reply: oneshot::Sender<Result<Sealed, CompleteError>>,
    },
}

/// What a job owns and does. Dropping it gives back everything but files and rows; `undo` and `commit` see to those.
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) facts: Arc<JobFacts>,
    pub(super) handle: Arc<JobHandle>,
    pub(super) password: Secret,
    pub(super) vcenter_user: String,
    pub(super) signals: Arc<Signals>,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) view: watch::Sender<JobView>,
    /// Who waits for the answer to the start request.
    pub(super) starter: Option<oneshot::Sender<StartNews>>,
    /// Who waits for the disk that is being sealed.
    pub(super) completer: Option<Completer>,
    /// File system steps that were begun and may outlive the future that began them.
    pub(super) work: Work,
    /// Bound, and not yet served.
    pub(super) ports: Vec<BoundPort>,
    /// Served, in the order of the facts.
    pub(super) disks: Vec<RunningDisk>,
    pub(super) slot: Option<Slot>,
    pub(super) presence: Option<Presence>,
}

/// Who waits for a seal.
pub(super) struct Completer {
    pub(super) disk_id: u32,
    pub(super) reply: oneshot::Sender<Result<Sealed, CompleteError>>,
}

/// A disk that is being served.
pub(super) struct RunningDisk {
    pub(super) disk: JobDisk,
    pub(super) export: ImageExport,
    /// Gone once its sockets are closed.
    pub(super) listener: Option<DiskListener>,
    /// The state that is recorded, until it is completed.
    pub(super) noted: Noted,
    pub(super) sealed: Option<SealedDisk>,
}

/// What is known of a disk once its image is closed.
#[derive(Clone, Debug)]
pub(super) struct SealedDisk {
    pub(super) change_id: Option<String>,
    pub(super) effective_type: String,
    /// Digest of the first MiB, unless that is all zero.
    pub(super) head: Option<[u8; 32]>,
    /// What the operator must know.
    pub(super) warnings: Vec<String>,
}

/// What a new job is made of.
pub(super) struct NewJob {
    pub(super) facts: Arc<JobFacts>,
    pub(super) vcenter_user: String,
    pub(super) password: Secret,
    pub(super) ports: Vec<BoundPort>,
    pub(super) slot: Slot,
    pub(super) promise: Promise,
}

impl Job {
    /// A job whose rows are stored; the receiver hears what the node decided.
    pub(super) fn new(shared: &Arc<Shared>, new: NewJob) -> (Self, Arc<JobHandle>, oneshot::Receiver<StartNews>) {
        let (view, seen) =
            watch::channel(JobView { state: JobState::Accepted, result: JobResult::None, code: None, message: None });
        // A client completes one disk at a time; the rest of the room is for repeats.
        let (sender, orders) = mpsc::channel(16);
        let (starter, news) = oneshot::channel();
        let signals = Arc::new(Signals::default());
        let handle = Arc::new(JobHandle {
            facts: Arc::clone(&new.facts),
            view: seen,
            orders: sender,
            stop: watch::Sender::new(None),
            signals: Arc::clone(&signals),
            live: OnceLock::new(),
        });
        let presence = shared.registry.enter(Arc::clone(&handle), new.promise);
        let job = Self {
            shared: Arc::clone(shared),
            facts: new.facts,
            handle: Arc::clone(&handle),
            password: new.password,
            vcenter_user: new.vcenter_user,
            signals,
            orders,
            view,
            starter: Some(starter),
            completer: None,
            work: Work::default(),
            ports: new.ports,
            disks: Vec::new(),
            slot: Some(new.slot),
            presence: Some(presence),
        };
        (job, handle, news)
    }

    /// Runs the job to its end.
    pub(super) async fn run(mut self) {
        if let Err(end) = Box::pin(self.live()).await {
            Box::pin(self.undo(end)).await;
        }
    }

    async fn live(&mut self) -> Result<(), End> {
        let mut stop = StopWatch(self.handle.stop.subscribe());
        tokio::select! {
            biased;
            end = stop.stopped() => return Err(end),
            copied = async {
                self.prepare().await?;
                self.transfer().await
            } => copied?,
        }
        // From here on the job is not stopped any more: it commits or finds out that it cannot.
        self.commit().await
    }

    /// Where the job is.
    pub(super) fn state(&self) -> JobState {
        self.view.borrow().state
    }

    /// Moves the job to its next state: first in the database, then for everyone to see.
    pub(super) async fn advance(&self, to: JobState, by: Actor) -> Result<(), Failed> {
        let from = self.state();
        let mut transaction = self.shared.store.write().await?;
        let change = Change {
            id: &self.facts.id,
            vm_id: &self.facts.vm.id,
            from,
            to,
            result: JobResult::None,
            code: None,
            message: None,
            by,
        };
        backups::change_state(&mut transaction, &change).await?;
        transaction.commit().await?;
        self.show(to);
        Ok(())
    }

    /// Shows a state that the database has.
    pub(super) fn show(&self, state: JobState) {
        tracing::info!(job_id = %self.facts.id, state = %state, "backup state");
        self.view.send_modify(|view| view.state = state);
    }

    pub(super) fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Tells the caller of the start request, if nobody has yet.
    pub(super) fn tell_starter(&mut self, news: StartNews) {
        if let Some(starter) = self.starter.take() {
            // A caller that hung up does not want to know.
            let _ = starter.send(news);
        }
    }
}

/// Waits for the order to stop.
struct StopWatch(watch::Receiver<Option<Stop>>);

impl StopWatch {
    async fn stopped(&mut self) -> End {
        let stop = match self.0.wait_for(Option::is_some).await {
            Ok(stop) => *stop,
            // The sender is in the handle, which the job itself holds.
            Err(_) => None,
        };
        match stop {
            Some(Stop::Cancel) => End::Cancelled,
            Some(Stop::Shutdown) | None => {
                Failed::new(FailureCode::ServiceRestart, "the service was stopped while the backup ran").into()
            }
        }
    }
}

impl JobHandle {
    /// What was decided when the job was accepted.
    pub fn facts(&self) -> &Arc<JobFacts> {
        &self.facts
    }

    /// Where the job is.
    pub fn view(&self) -> JobView {
        self.view.borrow().clone()
    }

    /// Changes of state, as they come.
    pub fn watch(&self) -> watch::Receiver<JobView> {
        self.view.clone()
    }

    /// What can be seen of its disks; empty until they listen.
    pub fn live(&self) -> &[LiveDisk] {
        self.live.get().map_or(&[], Vec::as_slice)
    }

    /// Where the delta of a disk begins; nothing when it is copied whole, or is not in this job. With `predict`, disk 0 means
    /// the disk that comes next ([`next_disk`]).
    pub(super) fn previous_change_id(&self, disk_id: u32, predict: bool) -> Option<&str> {
        let disk_id = if disk_id == 0 && predict { self.meant_by_zero()? } else { disk_id };
        let disk = self.facts.disks.iter().find(|disk| disk.plan.disk_id == disk_id)?;
        disk.plan.parent.as_ref().map(|parent| parent.change_id.as_str())
    }

    fn meant_by_zero(&self) -> Option<u32> {
        let progress = |disk: &JobDisk| {
            let live = self.live().iter().find(|live| live.disk_id == disk.plan.disk_id);
            next_disk::Progress {
                disk_id: disk.plan.disk_id,
                device_key: disk.plan.device_key,
                connected: live.is_some_and(|live| live.meter.reading().connections > 0),
                sealed: live.is_some_and(|live| live.sealed.load(Ordering::Acquire)),
            }
        };
        let disks: Vec<_> = self.facts.disks.iter().map(progress).collect();
        next_disk::meant_by_zero(&disks, &self.facts.last_order)
    }

    /// Notes a sign of life of the backup client.
    pub fn sign_of_life(&self) {
        self.signals.change();
    }
}
