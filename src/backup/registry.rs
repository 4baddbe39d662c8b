//! The jobs of this process: who holds which VM, and how to reach a running job.
//!
//! A [`Slot`] is the right to back up one VM. It is claimed before anything else is taken and dropped when everything else
//! has been given back, so at most one job per VM, and per inventory name, ever has resources. A [`Presence`] is the
//! time in which a job can be reached; the last one going tells whoever waits for the service to be idle.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::job::JobHandle;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::repositories::promises::Promise;
use crate::words::JobState;

/// Slots and running jobs.
#[derive(Debug, Default)]
pub(super) struct Registry {
    inner: Mutex<Inner>,
    /// Whether no slot is held and no job is present.
    idle: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Inner {
    closed: bool,
    slots: BTreeMap<BackupId, Claim>,
    jobs: BTreeMap<BackupId, Arc<JobHandle>>,
    tasks: BTreeMap<BackupId, AbortHandle>,
    /// Jobs that could be reached once, by their last state.
    ended: BTreeMap<JobState, u64>,
}

/// What a job claims.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    /// The VM.
    pub(super) vm_id: VmId,
    /// The name by which the backup client asks for change ids.
    pub(super) inventory_name: String,
    /// The node that reads it.
    pub(super) node: String,
    /// The repository it goes to.
    pub(super) repository_id: RepositoryId,
}

/// How many jobs may run at once; `None` is no limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capacity {
    /// In this process.
    pub(super) total: u32,
    /// On the claim's node.
    pub(super) node: Option<u32>,
    /// Into the claim's repository.
    pub(super) repository: Option<u32>,
}

/// Why a claim was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The service is stopping.
    Closed,
    /// A job of this VM runs.
    Vm(BackupId),
    /// A job of another VM with this inventory name runs.
    Name(BackupId),
    /// As many run as may; the word says where.
    Capacity(&'static str, u32),
}

/// The right to back up one VM, until dropped.
#[derive(Debug)]
pub(super) struct Slot {
    id: BackupId,
    registry: Arc<Registry>,
}

/// A job that can be reached, until dropped.
#[derive(Debug)]
pub(super) struct Presence {
    id: BackupId,
    registry: Arc<Registry>,
    /// The room that is the job's as long.
    _promise: Promise,
}

impl Registry {
    /// Claims a VM for the job `id`.
    pub(super) fn claim(self: &Arc<Self>, id: &BackupId, claim: Claim, capacity: Capacity) -> Result<Slot, Refused> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(Refused::Closed);
        }
        let holder = |matches: &dyn Fn(&Claim) -> bool| {
            inner.slots.iter().find(|(_, held)| matches(held)).map(|(holder, _)| holder.clone())
        };
        if let Some(holder) = holder(&|held| held.vm_id == claim.vm_id) {
            return Err(Refused::Vm(holder));
        }
        if let Some(holder) = holder(&|held| held.inventory_name == claim.inventory_name) {
            return Err(Refused::Name(holder));
        }
        let count = |matches: &dyn Fn(&Claim) -> bool| inner.slots.values().filter(|held| matches(held)).count();
        let limits = [
            ("service", Some(capacity.total), count(&|_| true)),
            ("node", capacity.node, count(&|held| held.node == claim.node)),
            ("repository", capacity.repository, count(&|held| held.repository_id == claim.repository_id)),
        ];
        for (place, limit, running) in limits {
            if let Some(limit) = limit
                && running >= limit as usize
            {
                return Err(Refused::Capacity(place, limit));
            }
        }
        inner.slots.insert(id.clone(), claim);
        self.report(&inner);
        Ok(Slot { id: id.clone(), registry: Arc::clone(self) })
    }

    /// The job that has the VM.
    pub(super) fn holder(&self, vm: &VmId) -> Option<BackupId> {
        let inner = self.lock();
        inner.slots.iter().find(|(_, held)| held.vm_id == *vm).map(|(holder, _)| holder.clone())
    }

    /// Makes a job reachable. What it was promised is from now on what it has not stored yet.
    pub(super) fn enter(self: &Arc<Self>, handle: Arc<JobHandle>, promise: Promise) -> Presence {
        let id = handle.facts().id.clone();
        let job = Arc::clone(&handle);
        promise.follow(move || job.outstanding_bytes());
        let mut inner = self.lock();
        inner.jobs.insert(id.clone(), handle);
        self.report(&inner);
        Presence { id, registry: Arc::clone(self), _promise: promise }
    }

    /// Keeps the means to end the task of a job that can be reached.
    pub(super) fn remember(&self, id: &BackupId, task: AbortHandle) {
        let mut inner = self.lock();
        if inner.jobs.contains_key(id) {
            inner.tasks.insert(id.clone(), task);
        }
    }

    /// Ends the tasks of all jobs where they are.
    pub(super) fn abort(&self) {
        let tasks = std::mem::take(&mut self.lock().tasks);
        tasks.values().for_each(AbortHandle::abort);
    }

    /// A job that can be reached.
    pub(super) fn find(&self, id: &BackupId) -> Option<Arc<JobHandle>> {
        self.lock().jobs.get(id).cloned()
    }

    /// All jobs that can be reached, oldest first.
    pub(super) fn all(&self) -> Vec<Arc<JobHandle>> {
        self.lock().jobs.values().cloned().collect()
    }

    /// How many jobs ended in each terminal state.
    pub(super) fn ended(&self) -> BTreeMap<JobState, u64> {
        self.lock().ended.clone()
    }

    /// Refuses every claim from now on.
    pub(super) fn close(&self) {
        self.lock().closed = true;
    }

    /// Whether claims are refused.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits until no slot is held and no job is present.
    pub(super) async fn emptied(&self) {
        let mut idle = self.idle.subscribe();
        // The sender is ours, so the channel cannot end while we look.
        let _ = idle.wait_for(|idle| *idle).await;
    }

    fn report(&self, inner: &Inner) {
        self.idle.send_replace(inner.slots.is_empty() && inner.jobs.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing claimed, nothing running.
    pub(super) fn new() -> Self {
        Self { inner: Mutex::default(), idle: watch::Sender::new(true) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        inner.slots.remove(&self.id);
        self.registry.report(&inner);
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        let state = inner.jobs.remove(&self.id).map(|job| job.view().state);
        // A job whose task was ended where it was is not over.
        if let Some(state) = state.filter(|state| state.is_terminal()) {
            *inner.ended.entry(state).or_default() += 1;
        }
        inner.tasks.remove(&self.id);
        self.registry.report(&inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOMY: Capacity = Capacity { total: 10, node: None, repository: None };

    fn claim(vm: &VmId, name: &str) -> Claim {
        Claim {
            vm_id: vm.clone(),
            inventory_name: name.into(),
            node: "default".into(),
            repository_id: "main".parse().unwrap(),
        }
    }

    #[test]
    fn a_vm_and_an_inventory_name_have_one_job_at_a_time() {
        let registry = Arc::new(Registry::new());
        let (vm, id) = (VmId::new(), BackupId::new());
        let slot = registry.claim(&id, claim(&vm, "db"), ROOMY).unwrap();
        let refused = registry.claim(&BackupId::new(), claim(&vm, "other"), ROOMY).unwrap_err();
        assert_eq!(refused, Refused::Vm(id.clone()));
        let refused = registry.claim(&BackupId::new(), claim(&VmId::new(), "db"), ROOMY).unwrap_err();
        assert_eq!(refused, Refused::Name(id));
        drop(slot);
        registry.claim(&BackupId::new(), claim(&vm, "db"), ROOMY).unwrap();
    }

    #[test]
    fn every_limit_on_its_own_refuses_a_claim() {
        let registry = Arc::new(Registry::new());
        let _held = registry.claim(&BackupId::new(), claim(&VmId::new(), "a"), ROOMY).unwrap();
        for (capacity, place) in [
            (Capacity { total: 1, ..ROOMY }, "service"),
            (Capacity { node: Some(1), ..ROOMY }, "node"),
            (Capacity { repository: Some(1), ..ROOMY }, "repository"),
        ] {
            let refused = registry.claim(&BackupId::new(), claim(&VmId::new(), "b"), capacity).unwrap_err();
            assert_eq!(refused, Refused::Capacity(place, 1));
        }
    }

    #[tokio::test]
    async fn a_closed_registry_takes_nothing_and_becomes_idle() {
        let registry = Arc::new(Registry::new());
        registry.emptied().await;
        let slot = registry.claim(&BackupId::new(), claim(&VmId::new(), "a"), ROOMY).unwrap();
        registry.close();
        let refused = registry.claim(&BackupId::new(), claim(&VmId::new(), "b"), ROOMY).unwrap_err();
        assert_eq!(refused, Refused::Closed);
        let waiting = tokio::spawn({
            let registry = Arc::clone(&registry);
            async move { registry.emptied().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(slot);
        waiting.await.unwrap();
    }
}
