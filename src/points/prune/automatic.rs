//! Pruning by itself: after each commit the rules of its repository are applied to its VM, once nobody has to be waited for. One VM
//! of a repository at a time; repositories do not wait for each other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use serde_json::json;
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::Instant;

use super::{Mode, PruneError};
use crate::clock::UtcTime;
use crate::id::{RepositoryId, VmId};
use crate::points::{Points, retention};
use crate::store::backups::{self, BackupRow};
use crate::store::events::{self, Actor};
use crate::store::{StoreError, leases, repositories};

/// The pause before what the database refused is tried again. A guess: nobody waits for it.
const RETRY: Duration = Duration::from_secs(5);

/// A VM that is to be pruned.
struct Due {
    /// Its last job.
    job: BackupRow,
    /// Who is waited for.
    holders: BTreeSet<String>,
    /// After a failure.
    not_before: Option<Instant>,
}

/// How a prune ended, and who has to be waited for.
type Ended = Result<BTreeSet<String>, StoreError>;

/// What the automatic prune has yet to do, and does.
#[derive(Default)]
struct Queue {
    /// The last event that was looked at.
    told: Option<i64>,
    /// By repository and VM.
    waiting: BTreeMap<(RepositoryId, VmId), Due>,
    running: JoinSet<Ended>,
    /// The job that each of them runs for.
    jobs: HashMap<task::Id, BackupRow>,
}

impl Queue {
    /// Those whose turn it is: of each repository one, while none of it runs.
    fn ready(&self, owners: &BTreeSet<String>) -> Vec<(RepositoryId, VmId)> {
        let (mut busy, now): (BTreeSet<_>, _) =
            (self.jobs.values().map(|job| job.repository_id.clone()).collect(), Instant::now());
        let is_ready = |due: &Due| due.holders.is_disjoint(owners) && due.not_before.is_none_or(|begin| begin <= now);
        let ready =
            self.waiting.iter().filter(|((repository, _), due)| is_ready(due) && busy.insert(repository.clone()));
        ready.map(|(key, _)| key.clone()).collect()
    }

    fn retry_at(&self) -> Option<Instant> {
        self.waiting.values().filter_map(|due| due.not_before).min()
    }

    fn ended(&mut self, ended: Result<(task::Id, Ended), JoinError>) {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let Some(job) = self.jobs.remove(&id) else { return };
        let (holders, not_before) = match ended {
            Ok((_, Ok(holders))) if holders.is_empty() => return,
            Ok((_, Ok(holders))) => (holders, None),
            Ok((_, Err(error))) => {
                tracing::error!(vm = job.vm_name, repository = %job.repository_id, %error, "retention could not be applied yet");
                (BTreeSet::new(), Some(Instant::now() + RETRY))
            }
            // A bug, which the next try would meet as well.
            Err(error) => {
                tracing::error!(vm = job.vm_name, repository = %job.repository_id, %error, "applying retention ended by a panic");
                return;
            }
        };
        // A job that was committed meanwhile is looked at without waiting for anybody.
        let key = (job.repository_id.clone(), job.vm_id.clone());
        self.waiting.entry(key).or_insert(Due { job, holders, not_before });
    }
}

impl Points {
    /// Prunes, on behalf of the repository's rules, the points of each VM after a job of it has committed. Outside the job: the VM
    /// can be backed up meanwhile. What was in use then, by the verification that follows a commit for instance, is looked at
    /// again when it is not. Ends when the service stops.
    pub async fn prune_after_commits(self) {
        let mut commits = self.shared.store.watch_commits();
        let mut stopping = self.shared.stopping.subscribe();
        let mut queue = Queue::default();
        loop {
            let failed = self.prune_queued(&mut queue).await.err();
            if let Some(error) = &failed {
                tracing::error!(%error, "retention could not be applied yet");
            }
            // Nothing of the queue was lost by that.
            let retry_at = if failed.is_some() { Some(Instant::now() + RETRY) } else { queue.retry_at() };
            tokio::select! {
                changed = commits.changed() => if changed.is_err() { return },
                Some(ended) = queue.running.join_next_with_id() => queue.ended(ended),
                () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {}
                _ = stopping.wait_for(|stopping| *stopping) => break,
            }
        }
        while queue.running.join_next().await.is_some() {}
    }

    /// Takes up what was committed since the last time, and begins to prune what nobody has to be waited for.
    async fn prune_queued(&self, queue: &mut Queue) -> Result<(), StoreError> {
        let mut connection = self.shared.store.read().await?;
        match queue.told {
            // Of what was committed before the start the rules are applied with the next commit.
            None => queue.told = Some(events::bounds(&mut connection).await?.1),
            Some(told) => {
                for (sequence, subject, data) in events::of_kind_after(&mut connection, "job.state", told).await? {
                    // Imported points come with a record that began as committed: nothing was backed up.
                    if data["state"] == "committed"
                        && !data["from"].is_null()
                        && let Ok(id) = subject.parse()
                        && let Some(job) = backups::find(&mut connection, &id).await?
                    {
                        let key = (job.repository_id.clone(), job.vm_id.clone());
                        queue.waiting.insert(key, Due { job, holders: BTreeSet::new(), not_before: None });
                    }
                    queue.told = Some(sequence);
                }
            }
        }
        let owners: BTreeSet<String> =
            leases::pins(&mut connection).await?.into_iter().map(|(_, owner)| owner).collect();
        drop(connection);
        for key in queue.ready(&owners) {
            let Some(Due { job, .. }) = queue.waiting.remove(&key) else { continue };
            let (points, of) = (self.clone(), job.clone());
            let task = queue.running.spawn(async move { points.prune_for(&of).await });
            queue.jobs.insert(task.id(), job);
        }
        Ok(())
    }

    /// Prunes after a job; who has to be waited for, as nothing else keeps a point that they hold.
    async fn prune_for(&self, job: &BackupRow) -> Result<BTreeSet<String>, StoreError> {
        let repository = repositories::find(&mut *self.shared.store.read().await?, &job.repository_id).await?;
        if !repository.is_some_and(|repository| retention::has_rules(&repository.retention)) {
            return Ok(BTreeSet::new());
        }
        let mut holders = BTreeSet::new();
        let mut failures = Vec::new();
        match self.prune(&job.repository_id, Some(&job.vm_id), Mode::Apply(Actor::Policy)).await {
            Err(PruneError::Store(error)) => return Err(error),
            Err(error) => failures.push(error.to_string()),
            Ok(outcomes) => {
                for outcome in outcomes {
                    holders.extend(outcome.verdict.held_by().into_iter().flatten());
                    failures.extend(outcome.error.map(|error| format!("{}: {error}", outcome.verdict.id)));
                }
            }
        }
        // What a stop has cut is taken up with the next commit.
        if !failures.is_empty() && !*self.shared.stopping.borrow() {
            self.alert(job, &failures).await?;
        }
        Ok(holders)
    }

    /// Nobody waits for the answer of an automatic prune, so what it could not do is told as an alert.
    async fn alert(&self, job: &BackupRow, failures: &[String]) -> Result<(), StoreError> {
        tracing::error!(vm = job.vm_name, repository = %job.repository_id, ?failures, "retention could not be applied");
        let data = json!({
            "alert": "retention_failed", "repository_id": job.repository_id, "vm_context_id": job.vm_id,
            "vm_name": job.vm_name, "failures": failures,
            "detail": "Restore points that no rule keeps are still there. `blockyard repo prune` tells why and tries again.",
        });
        let mut transaction = self.shared.store.write().await?;
        let subject = job.repository_id.as_str();
        events::append(&mut transaction, "alert", subject, &data, Actor::Policy, UtcTime::now()).await?;
        transaction.commit().await
    }
}
