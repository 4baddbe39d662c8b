//! Pruning by itself: after each commit the rules of its repository are applied to its VM, once nobody has to be waited for.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::Mode;
use crate::clock::UtcTime;
use crate::id::{RepositoryId, VmId};
use crate::points::{Points, retention};
use crate::store::backups::{self, BackupRow};
use crate::store::events::{self, Actor};
use crate::store::{StoreError, leases, repositories};

/// What the automatic prune has yet to do.
#[derive(Default)]
struct Queue {
    /// The last event that was looked at.
    told: Option<i64>,
    /// The last job of each VM and repository that are to be pruned, and who is waited for.
    waiting: BTreeMap<(RepositoryId, VmId), (BackupRow, BTreeSet<String>)>,
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
            if let Err(error) = self.prune_queued(&mut queue).await {
                // What is left of the queue is looked at with the next commit.
                tracing::error!(%error, "retention could not be applied");
            }
            tokio::select! {
                changed = commits.changed() => if changed.is_err() { return },
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    /// Takes up what was committed since the last time, and prunes what nobody has to be waited for.
    async fn prune_queued(&self, queue: &mut Queue) -> Result<(), StoreError> {
        let mut connection = self.shared.store.read().await?;
        match queue.told {
            // Of what was committed before the start the rules are applied with the next commit.
            None => queue.told = Some(events::bounds(&mut connection).await?.1),
            Some(told) => {
                for (sequence, subject, data) in events::of_kind_after(&mut connection, "job.state", told).await? {
                    queue.told = Some(sequence);
                    // Imported points come with a record that began as committed: nothing was backed up.
                    if data["state"] == "committed"
                        && !data["from"].is_null()
                        && let Ok(id) = subject.parse()
                        && let Some(job) = backups::find(&mut connection, &id).await?
                    {
                        queue.waiting.insert((job.repository_id.clone(), job.vm_id.clone()), (job, BTreeSet::new()));
                    }
                }
            }
        }
        let owners: BTreeSet<String> =
            leases::pins(&mut connection).await?.into_iter().map(|(_, owner)| owner).collect();
        drop(connection);
        let ready = |(_, holders): &(BackupRow, BTreeSet<String>)| holders.is_disjoint(&owners);
        let keys: Vec<_> = queue.waiting.iter().filter(|(_, job)| ready(job)).map(|(key, _)| key.clone()).collect();
        for key in keys {
            let Some((job, _)) = queue.waiting.remove(&key) else { continue };
            let holders = self.prune_for(&job).await?;
            if !holders.is_empty() {
                queue.waiting.insert(key, (job, holders));
            }
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
