//! Pruning a repository: what its rules say of each point, and doing it.
//!
//! The rules themselves are in [`retention`]. Here every step is decided anew, in the transaction that
//! records it, so that a protection, a pin or a finding that came meanwhile counts. From the newest point to the oldest: what is
//! kept takes up, one after the other, the changes of the points below it before it takes up a whole disk. A point that
//! cannot go does not stop the others. When it is done by itself is in `automatic`.

mod automatic;

use std::collections::BTreeMap;

use super::Points;
use super::delete::{DeleteError, Reach};
use super::merge::MergeError;
use super::retention::{self, Attempt, Candidate, Decision, Verdict};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::events::Actor;
use crate::store::points::{self, DiskLink};
use crate::store::{Connection, StoreError, leases, repositories};

/// How often a point is tried again that somebody came to hold between the decision and the merge. A guess: each time is bad luck.
const BUSY_MAX: u32 = 8;

/// Why a repository was not pruned.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// No repository has this id.
    #[error("there is no repository {0}")]
    RepositoryNotFound(RepositoryId),
    /// It is not there, or not ours.
    #[error("repository {id} cannot be used: {reason}")]
    RepositoryUnavailable {
        /// The repository.
        id: RepositoryId,
        /// Why, without paths.
        reason: String,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task ended by a panic.
    #[error("the prune ended by a panic")]
    Panicked,
}

/// What a prune does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It tells what it would do.
    DryRun,
    /// It does it, on behalf of somebody.
    Apply(Actor),
}

/// What became, or would become, of one point.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whose point.
    pub vm_id: VmId,
    /// The VM's name.
    pub vm_name: String,
    /// When it was committed.
    pub committed_at: UtcTime,
    /// What was decided about it, and why.
    pub verdict: Verdict,
    /// Bytes of images that go: all of a point that is deleted; of one that is merged, in a dry run, what both images may hold,
    /// an estimate of what becomes free (zeroes stored as data go too), and afterwards what did. 0 for one that stays.
    pub frees_bytes: u64,
    /// Why it stays although no rule keeps it.
    pub error: Option<String>,
}

/// The points of one VM in a repository and what the rules say of them, as of one transaction.
struct Scene {
    candidates: Vec<Candidate>,
    links: Vec<DiskLink>,
    verdicts: Vec<Verdict>,
}

impl Scene {
    /// The number and the length of the image of each disk of a point.
    fn images(&self, id: &BackupId) -> BTreeMap<u32, u64> {
        let of_point = self.links.iter().filter(|link| link.point_id == *id);
        of_point.map(|link| (link.disk_id, link.file_bytes)).collect()
    }

    fn bytes(&self, id: &BackupId) -> u64 {
        self.images(id).values().sum()
    }

    /// What letting a point go frees, at most.
    fn frees_bytes(&self, verdict: &Verdict) -> u64 {
        match &verdict.decision {
            Decision::Keep => 0,
            Decision::Delete => self.bytes(&verdict.id),
            Decision::Merge { into } => {
                let above = self.images(into);
                let below = self.images(&verdict.id);
                below.iter().map(|(disk, bytes)| above.get(disk).map_or(*bytes, |above| *bytes.min(above))).sum()
            }
        }
    }

    fn committed_at(&self, id: &BackupId) -> Option<UtcTime> {
        self.candidates.iter().find(|point| point.id == *id).map(|point| point.committed_at)
    }
}

/// The points of one VM in one repository, and what a prune has done with them so far.
struct Pruning {
    repository: RepositoryId,
    vm_id: VmId,
    vm_name: String,
    done: Vec<Outcome>,
    /// Points that could not go, and why.
    failed: BTreeMap<BackupId, String>,
    /// How often a point could not be merged because of somebody who had not been there when it was decided.
    busy: BTreeMap<BackupId, u32>,
    /// Points that nothing builds upon any more: what did, and the bytes of both before.
    merged: BTreeMap<BackupId, (BackupId, u64)>,
}

impl Pruning {
    fn outcome(&self, scene: &Scene, verdict: &Verdict) -> Outcome {
        Outcome {
            vm_id: self.vm_id.clone(),
            vm_name: self.vm_name.clone(),
            committed_at: scene.committed_at(&verdict.id).unwrap_or_else(UtcTime::now),
            frees_bytes: scene.frees_bytes(verdict),
            error: self.failed.get(&verdict.id).cloned(),
            verdict: verdict.clone(),
        }
    }

    /// Whether a point that somebody held at the wrong moment is tried again: a few times, as others come and go.
    fn is_worth_another_turn(&mut self, id: &BackupId) -> bool {
        let tries = self.busy.entry(id.clone()).or_default();
        *tries += 1;
        *tries <= BUSY_MAX
    }

    /// A point that is gone.
    fn went(&mut self, scene: &Scene, verdict: &Verdict) {
        let mut outcome = self.outcome(scene, verdict);
        if let Some((into, before)) = self.merged.remove(&verdict.id) {
            outcome.frees_bytes = before.saturating_sub(scene.bytes(&into));
            outcome.verdict.decision = Decision::Merge { into };
        }
        self.done.push(outcome);
    }

    /// A point that stays although it should not.
    fn stays(&mut self, scene: &Scene, verdict: &Verdict, error: String) {
        tracing::warn!(point = %verdict.id, error, "retention could not let a restore point go");
        self.failed.insert(verdict.id.clone(), error);
        let kept = Verdict { id: verdict.id.clone(), decision: Decision::Keep, reasons: Vec::new() };
        let outcome = self.outcome(scene, &kept);
        self.done.push(outcome);
    }

    /// Everything that was done, and what the rules say of the rest; newest first.
    fn finished(mut self, scene: &Scene, mode: Mode) -> Vec<Outcome> {
        for verdict in &scene.verdicts {
            // One that failed stays for the reasons that it has now.
            self.done.retain(|outcome| outcome.verdict.id != verdict.id);
            let mut outcome = self.outcome(scene, verdict);
            if mode != Mode::DryRun && verdict.decision != Decision::Keep {
                outcome.verdict.decision = Decision::Keep;
                outcome.frees_bytes = 0;
                outcome.error = Some("the prune ended before its turn came".to_owned());
            }
            self.done.push(outcome);
        }
        self.done
            .sort_by(|one, other| (other.committed_at, &other.verdict.id).cmp(&(one.committed_at, &one.verdict.id)));
        self.done
    }
}

impl Points {
    /// Prunes a repository by its rules: all VMs that have points in it, or one. The outcomes are in the order of the VMs' names,
    /// of each VM its newest points first.
    ///
    /// # Cancellation
    /// A prune that is applied goes on when the future is dropped. It ends between two points when the service stops.
    ///
    /// # Errors
    /// See [`PruneError`]. What concerns one point only is told with it.
    pub async fn prune(
        &self,
        repository: &RepositoryId,
        vm: Option<&VmId>,
        mode: Mode,
    ) -> Result<Vec<Outcome>, PruneError> {
        let (points, repository, vm) = (self.clone(), repository.clone(), vm.cloned());
        let pruned = tokio::spawn(async move { points.prune_now(&repository, vm.as_ref(), mode).await });
        pruned.await.map_err(|_| PruneError::Panicked)?
    }

    async fn prune_now(
        &self,
        repository: &RepositoryId,
        vm: Option<&VmId>,
        mode: Mode,
    ) -> Result<Vec<Outcome>, PruneError> {
        let mut connection = self.shared.store.read().await?;
        if repositories::find(&mut connection, repository).await?.is_none() {
            return Err(PruneError::RepositoryNotFound(repository.clone()));
        }
        let mut vms = points::vms_in(&mut connection, repository).await?;
        drop(connection);
        vms.retain(|(id, _)| vm.is_none_or(|wanted| wanted == id));
        let by = match mode {
            Mode::DryRun => None,
            Mode::Apply(by) => Some((by, self.shared.pruning.take(repository).await)),
        };
        let reach = match &by {
            None => None,
            Some(_) => Some(self.usable(repository).await?),
        };
        let mut outcomes = Vec::new();
        for (vm_id, vm_name) in vms {
            let mut pruning = Pruning {
                repository: repository.clone(),
                vm_id,
                vm_name,
                done: Vec::new(),
                failed: BTreeMap::new(),
                busy: BTreeMap::new(),
                merged: BTreeMap::new(),
            };
            let scene = loop {
                if let (Some((by, _)), Some(reach)) = (&by, &reach) {
                    while !*self.shared.stopping.borrow() && self.prune_one(&mut pruning, reach, *by).await? {}
                }
                let scene = self.scene(&mut *self.shared.store.snapshot().await?, &pruning).await?;
                // What was in use a moment ago may be free by now, and nobody would come back for it.
                let is_done = scene.verdicts.iter().all(|verdict| verdict.decision == Decision::Keep);
                if is_done || by.is_none() || *self.shared.stopping.borrow() {
                    break scene;
                }
            };
            outcomes.extend(pruning.finished(&scene, mode));
        }
        Ok(outcomes)
    }

    /// The repository as one whose files can be removed.
    async fn usable(&self, repository: &RepositoryId) -> Result<Reach, PruneError> {
        match self.reach(repository).await {
            Ok(Reach::Unavailable { id, reason }) => Err(PruneError::RepositoryUnavailable { id, reason }),
            Ok(reach) => Ok(reach),
            Err(DeleteError::Store(error)) => Err(error.into()),
            Err(_) => Err(PruneError::Panicked),
        }
    }

    /// What is there, and what the rules of the repository say of it now.
    async fn scene(&self, connection: &mut Connection, pruning: &Pruning) -> Result<Scene, StoreError> {
        let repository = repositories::find(connection, &pruning.repository).await?;
        // A repository that was removed meanwhile has no points, and no rules.
        let rules = repository.map(|repository| repository.retention).unwrap_or_default();
        let links = points::links_of(connection, &pruning.vm_id, &pruning.repository).await?;
        let pins = leases::pins(connection).await?;
        let rows = points::all_of(connection, &pruning.vm_id, &pruning.repository).await?;
        let candidates: Vec<Candidate> = rows
            .into_iter()
            .map(|row| Candidate {
                parents: links
                    .iter()
                    .filter(|link| link.point_id == row.id)
                    .filter_map(|link| link.parent_id.clone())
                    .collect(),
                holders: pins.iter().filter(|(pinned, _)| *pinned == row.id).map(|(_, owner)| owner.clone()).collect(),
                attempt: if pruning.failed.contains_key(&row.id) { Attempt::Failed } else { Attempt::None },
                id: row.id,
                committed_at: row.committed_at,
                sequence: row.sequence,
                state: row.state,
                trust: row.trust,
                protected_until: row.protected_until,
            })
            .collect();
        let verdicts = retention::decide(&candidates, &rules, UtcTime::now());
        Ok(Scene { candidates, links, verdicts })
    }

    /// Lets the newest point go that should; whether there was one.
    async fn prune_one(&self, pruning: &mut Pruning, reach: &Reach, by: Actor) -> Result<bool, StoreError> {
        let mut transaction = self.shared.store.write().await?;
        let scene = self.scene(&mut transaction, pruning).await?;
        let Some(verdict) = scene.verdicts.iter().find(|verdict| verdict.decision != Decision::Keep) else {
            return Ok(false);
        };
        let failed = match &verdict.decision {
            Decision::Merge { into } if pruning.merged.contains_key(&verdict.id) => {
                drop(transaction);
                Some(format!("{into} still builds upon it"))
            }
            Decision::Merge { into } => {
                drop(transaction);
                match self.merge(into).await {
                    Ok(_) => {
                        // The next turn finds it without children.
                        let before = scene.bytes(&verdict.id) + scene.bytes(into);
                        pruning.merged.insert(verdict.id.clone(), (into.clone(), before));
                        return Ok(true);
                    }
                    // Somebody came first. The next turn sees who, so that they are waited for, or that they are gone.
                    Err(MergeError::Busy { .. }) if pruning.is_worth_another_turn(&verdict.id) => return Ok(true),
                    Err(error) => {
                        tracing::warn!(point = %into, %error, "a point could not be made anew without its parent");
                        Some(error.public())
                    }
                }
            }
            Decision::Delete | Decision::Keep => {
                match self.begin_deletion(&mut transaction, &verdict.id, reach, by).await {
                    Ok(begun) => {
                        transaction.commit().await?;
                        self.finish_deletion(begun).await.err().map(|error| error.to_string())
                    }
                    Err(error) => Some(error.to_string()),
                }
            }
        };
        match failed {
            Some(error) => pruning.stays(&scene, verdict, error),
            None => pruning.went(&scene, verdict),
        }
        Ok(true)
    }
}
