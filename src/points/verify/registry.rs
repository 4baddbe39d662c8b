//! The verifications of this process: which are under way, whose turn it is, what they came to, and how a stop ends them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::id::{BackupId, TaskId};
use crate::points::Points;
use crate::points::pace::{Gate, Held};
use crate::points::verification::{Outcome, Phase, Verification};
use crate::store::{StoreError, trust};
use crate::words::point::Trust;

/// How long a stop waits for verifications; a file system that hangs must not hold it for ever.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The verifications of this process.
#[derive(Debug)]
pub struct Verifications {
    pub(in crate::points) gate: Arc<Gate>,
    pub(in crate::points) stopping: watch::Sender<bool>,
    turn: Semaphore,
    known: Mutex<Known>,
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Debug, Default)]
pub(super) struct Known {
    /// The last one of each point.
    pub(super) last: HashMap<BackupId, Arc<Verification>>,
    /// Those that are not over: whose pins are for reading only.
    pub(super) open: HashMap<TaskId, Arc<Verification>>,
    pub(super) totals: Totals,
}

/// What all verifications of this process came to.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// How many ended with each outcome.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// How long they read.
    pub time: Duration,
    /// How much.
    pub bytes: u64,
}

impl Verifications {
    /// None yet.
    pub fn new() -> Self {
        Self {
            gate: Arc::default(),
            stopping: watch::Sender::new(false),
            turn: Semaphore::new(1),
            known: Mutex::default(),
            tasks: Mutex::default(),
        }
    }

    pub(super) fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A point is going, and what was found of it is no news to anybody. One that is under way ends as it does.
    pub(in crate::points) fn forget(&self, id: &BackupId) {
        self.known().last.remove(id);
    }

    /// Runs in a task that a stop waits for.
    pub(in crate::points) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(work);
    }
}

impl Default for Verifications {
    fn default() -> Self {
        Self::new()
    }
}

impl Points {
    /// The running or the last verification of a point in this process.
    pub fn verification(&self, id: &BackupId) -> Option<Arc<Verification>> {
        self.shared.verifications.known().last.get(id).cloned()
    }

    /// Whether a verification reads this point now.
    pub fn is_verifying(&self, id: &BackupId) -> bool {
        let known = self.shared.verifications.known();
        known.open.values().any(|open| open.view().phase == Phase::Running && open.order.contains(id))
    }

    /// What all verifications of this process came to.
    pub fn verification_totals(&self) -> Totals {
        self.shared.verifications.known().totals.clone()
    }

    /// How many points have each trust.
    ///
    /// # Errors
    /// The database's.
    pub async fn trust_counts(&self) -> Result<Vec<(Trust, u64)>, StoreError> {
        trust::counts(&mut *self.shared.store.read().await?).await
    }

    /// Lets verifications stand still as long as the value lives, as one does whose file system hangs. For tests.
    pub fn hold_verifications(&self) -> Held {
        self.shared.verifications.gate.hold()
    }

    /// Ends what verifications are running and begins no more. Their pins are given back.
    pub async fn stop_verifications(&self) {
        self.abandon_verifications();
        let mut tasks =
            std::mem::take(&mut *self.shared.verifications.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let ended = tokio::time::timeout(STOP_LIMIT, async { while tasks.join_next().await.is_some() {} });
        if ended.await.is_err() {
            tracing::warn!("a verification did not end in time; its pins end with the process");
        }
    }

    /// Lets verifications end where they are; nobody waits for it.
    pub(crate) fn abandon_verifications(&self) {
        self.shared.verifications.gate.stop();
        self.shared.verifications.stopping.send_replace(true);
    }

    /// Waits until no other verification reads; nothing when the service stops.
    pub(in crate::points) async fn turn(&self) -> Option<tokio::sync::SemaphorePermit<'_>> {
        let mut stopping = self.shared.verifications.stopping.subscribe();
        tokio::select! {
            turn = self.shared.verifications.turn.acquire() => turn.ok(),
            _ = stopping.wait_for(|stopping| *stopping) => None,
        }
    }
}
