//! From the call to the node until the last disk is sealed: the loop in which a job waits for its client.
//!
//! Three things can happen: the node answers, the client completes a disk, or the exports have news. After each the job
//! looks at everything it knows ([`deadline::decide`]) and sleeps until the next thing is due.

use std::pin::Pin;
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::deadline::{self, Decision, Limits, NodePhase, Seen};
use super::ending::{CompleteError, End, Failed, Sealed, StartNews};
use super::job::{Completer, Job, Order};
use super::plan;
use crate::clock::UtcTime;
use crate::config;
use crate::node::{JobKnown, NodeClient, StartOutcome, StartRequest};
use crate::store::backups::{self, NodeOutcome};
use crate::store::events::{self, Actor};
use crate::words::{FailureCode, JobState};

/// How often a node that gave no clear answer is asked whether it knows the job. A guess: often enough that a launched
/// client is soon known, rarely enough for a node that is in trouble.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// A task that ends with whoever holds this.
struct Background(JoinHandle<()>);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Job {
    /// Calls the node once and serves its client until every disk is sealed.
    pub(super) async fn transfer(&mut self) -> Result<(), End> {
        let node = self.node()?;
        let request = self.start_request();
        let mut call: Pin<Box<_>> = Box::pin({
            let node = node.clone();
            async move { node.start(&request).await }
        });
        let limits = Limits::new(&self.shared.config.jobs);
        let mut phase = NodePhase::Calling;
        let mut started_noted = false;
        let mut warned = false;
        let mut status: Option<Background> = None;
        loop {
            self.refuse_failed_disks()?;
            if !started_noted && self.signals.last_life().is_some() {
                self.note_started().await?;
                started_noted = true;
            }
            if self.state() == JobState::Starting
                && self.disks.iter().any(|disk| disk.export.meter().reading().ever_connected)
            {
                self.advance(JobState::Transferring, Actor::Client).await?;
            }
            let unrecorded = self.note_disks().await;
            let wake = match deadline::decide(&self.seen(phase, warned), &limits, Instant::now()) {
                Decision::Wait(wake) => wake,
                Decision::Stall => {
                    self.advance(JobState::Stalled, Actor::Clock).await?;
                    self.signals.wake_on_life();
                    continue;
                }
                Decision::Resume => {
                    self.advance(JobState::Transferring, Actor::Client).await?;
                    continue;
                }
                Decision::Warn => {
                    self.alert_no_client().await?;
                    warned = true;
                    continue;
                }
                Decision::Fail(code) => return Err(overdue(code).into()),
            };
            tokio::select! {
                biased;
                outcome = &mut call, if phase == NodePhase::Calling => {
                    phase = self.node_answered(outcome).await?;
                    if matches!(phase, NodePhase::Ambiguous(_)) {
                        status = Some(self.ask_until_known(node.clone()));
                    }
                }
                Some(order) = self.orders.recv() => {
                    if self.obey(order).await? {
                        if phase == NodePhase::Calling {
                            // A node that takes longer to answer than its client to copy: it did start one.
                            self.set_node_outcome(NodeOutcome::Accepted).await?;
                            self.tell_starter(StartNews::Started { warnings: Vec::new() });
                        }
                        return Ok(());
                    }
                }
                () = self.signals.changed() => {}
                () = sleep_until(wake.into_iter().chain(unrecorded).min()) => {}
            }
            if status.as_ref().is_some_and(|asking| asking.0.is_finished()) && matches!(phase, NodePhase::Ambiguous(_))
            {
                self.set_node_outcome(NodeOutcome::Accepted).await?;
                phase = NodePhase::Accepted(Instant::now());
            }
        }
    }

    fn node(&self) -> Result<NodeClient, Failed> {
        self.shared.node(&self.facts.vm.node).cloned().ok_or_else(|| {
            Failed::new(FailureCode::NodeUnreachable, format!("node {} is not configured", self.facts.vm.node))
        })
    }

    fn start_request(&self) -> StartRequest {
        let facts = &self.facts;
        let nbd = &self.shared.config.nbd;
        StartRequest {
            job_id: facts.id.to_string(),
            vm_name: facts.vm.name.clone(),
            vcenter_host: facts.vm.vcenter.clone(),
            vcenter_user: self.vcenter_user.clone(),
            vcenter_password: self.password.clone(),
            vm_path: facts.vm.path.clone(),
            nbd_host: nbd.advertise_host.clone(),
            nbd_targets: facts.targets(nbd),
            backup_type: facts.backup_type.to_string(),
            previous_change_id: facts.previous_change_id().unwrap_or_default().to_owned(),
        }
    }

    fn seen(&self, node: NodePhase, warned: bool) -> Seen {
        let disconnected_since = self
            .disks
            .iter()
            .filter(|disk| disk.sealed.is_none() && disk.export.meter().reading().changed)
            .filter_map(|disk| disk.export.meter().disconnected_since())
            .min();
        Seen { state: self.state(), node, warned, last_life: self.signals.last_life(), disconnected_since }
    }

    /// Ends the job as soon as an image failed or a completed disk was written to: neither can become good again.
    pub(super) fn refuse_failed_disks(&self) -> Result<(), Failed> {
        for running in &self.disks {
            let disk_id = running.disk.plan.disk_id;
            if let Some(failure) = running.export.meter().failure() {
                tracing::error!(job_id = %self.facts.id, disk_id, error = failure.text, "an image failed");
                let failed = if failure.no_space {
                    Failed::new(FailureCode::InsufficientStorage, format!("disk {disk_id}: the repository is full"))
                } else {
                    Failed::new(FailureCode::ImageFailed, format!("disk {disk_id}: writing the image failed"))
                };
                return Err(failed.at_disk(disk_id));
            }
            if running.export.meter().late_change() {
                let message = format!("disk {disk_id} was written to after it had been completed");
                return Err(Failed::new(FailureCode::WriteAfterComplete, message).by(Actor::Client).at_disk(disk_id));
            }
        }
        Ok(())
    }

    async fn note_started(&self) -> Result<(), Failed> {
        let mut transaction = self.store().write().await?;
        backups::set_started(&mut transaction, &self.facts.id, UtcTime::now()).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Tells that the node accepted the job and nobody came: stale snapshots may be consolidating, or something is broken.
    async fn alert_no_client(&self) -> Result<(), Failed> {
        let facts = &self.facts;
        tracing::warn!(job_id = %facts.id, "the node accepted the job, but no backup client has shown itself yet");
        let data = json!({
            "alert": "no_client", "job_id": facts.id, "vm_context_id": facts.vm.id, "vm_name": facts.vm.name,
            "detail": "The node accepted the job, but no backup client has shown itself yet.",
        });
        let mut transaction = self.store().write().await?;
        events::append(&mut transaction, "alert", facts.id.as_str(), &data, Actor::Clock, UtcTime::now()).await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn set_node_outcome(&self, outcome: NodeOutcome) -> Result<(), Failed> {
        let mut transaction = self.store().write().await?;
        backups::set_node_outcome(&mut transaction, &self.facts.id, outcome).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// What the outcome of the call means for the job and for the caller who waits.
    async fn node_answered(&mut self, outcome: StartOutcome) -> Result<NodePhase, End> {
        let job_id = self.facts.id.clone();
        match outcome {
            StartOutcome::Accepted { malformed } => {
                tracing::info!(%job_id, malformed, "the node accepted the job");
                self.set_node_outcome(NodeOutcome::Accepted).await?;
                let mut warnings = Vec::new();
                if malformed {
                    warnings
                        .push("node_answer_malformed: the node accepted the job with an unreadable answer".to_owned());
                    self.add_warnings(&warnings).await?;
                }
                self.tell_starter(StartNews::Started { warnings });
                Ok(NodePhase::Accepted(Instant::now()))
            }
            StartOutcome::Rejected { status, text } => {
                self.set_node_outcome(NodeOutcome::Rejected).await?;
                let message = format!("the node answered {status}: {text}");
                Err(Failed::new(FailureCode::NodeRejected, message).into())
            }
            StartOutcome::Unreachable { text } => {
                self.set_node_outcome(NodeOutcome::Unreachable).await?;
                let message = format!("the node {} cannot be reached: {text}", self.facts.vm.node);
                Err(Failed::new(FailureCode::NodeUnreachable, message).into())
            }
            StartOutcome::Ambiguous { text } => {
                tracing::warn!(%job_id, text, "nobody knows whether the node started a client; waiting for one");
                let known = self.signals.last_life().is_some();
                self.set_node_outcome(if known { NodeOutcome::Accepted } else { NodeOutcome::Ambiguous }).await?;
                self.tell_starter(StartNews::Starting);
                Ok(NodePhase::Ambiguous(Instant::now()))
            }
        }
    }

    pub(super) async fn add_warnings(&self, more: &[String]) -> Result<(), Failed> {
        let mut transaction = self.store().write().await?;
        backups::add_warnings(&mut transaction, &self.facts.id, more).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Asks the node for the job until it knows it; "not found" proves nothing, as it may still be launching.
    fn ask_until_known(&self, node: NodeClient) -> Background {
        let signals = std::sync::Arc::clone(&self.signals);
        let job_id = self.facts.id.to_string();
        Background(tokio::spawn(async move {
            while node.status(&job_id).await != JobKnown::Yes {
                tokio::time::sleep(STATUS_INTERVAL).await;
            }
            signals.wake();
        }))
    }

    /// Does what the client asks; true when every disk is sealed.
    async fn obey(&mut self, order: Order) -> Result<bool, End> {
        let Order::Complete { disk_id, change_id, reply } = order;
        let Some(index) = self.disks.iter().position(|running| running.disk.plan.disk_id == disk_id) else {
            let _ = reply.send(Err(CompleteError::NoSuchDisk { id: self.facts.id.clone(), disk_id }));
            return Ok(false);
        };
        let running = &self.disks[index];
        if let Some(sealed) = &running.sealed {
            let answer = if sealed.change_id == change_id {
                Ok(self.sealed_answer(disk_id, change_id))
            } else {
                Err(CompleteError::ChangeIdConflict { disk_id })
            };
            let _ = reply.send(answer);
            return Ok(false);
        }
        if !running.export.meter().reading().ever_connected {
            let _ = reply.send(Err(CompleteError::NotConnected { disk_id }));
            return Ok(false);
        }
        if self.state() == JobState::Starting {
            self.advance(JobState::Transferring, Actor::Client).await?;
        }
        self.completer = Some(Completer { disk_id, reply });
        let last = self.disks.iter().filter(|running| running.sealed.is_none()).count() == 1;
        if last {
            self.advance(JobState::Sealing, Actor::Client).await?;
        }
        self.seal(index, change_id.clone()).await?;
        if !last && let Some(completer) = self.completer.take() {
            let _ = completer.reply.send(Ok(self.sealed_answer(disk_id, change_id)));
        }
        Ok(last)
    }

    pub(super) fn sealed_answer(&self, disk_id: u32, change_id: Option<String>) -> Sealed {
        let sealed = self.disks.iter().filter(|running| running.sealed.is_some()).count();
        Sealed { disk_id, change_id, sealed, disks: self.disks.len() }
    }
}

impl super::job::JobFacts {
    /// Where the delta of the lowest incremental disk begins.
    fn previous_change_id(&self) -> Option<&str> {
        let parent = self.disks.iter().find_map(|disk| disk.plan.parent.as_ref())?;
        Some(&parent.change_id)
    }

    /// The string that tells the backup client where each disk goes.
    pub fn targets(&self, nbd: &config::Nbd) -> String {
        let plans: Vec<_> = self.disks.iter().map(|disk| disk.plan.clone()).collect();
        plan::targets(&plans, nbd, |index| self.disks.get(index).map_or(0, |disk| disk.advertised_port))
    }
}

fn overdue(code: FailureCode) -> Failed {
    let message = match code {
        FailureCode::NoClient => "the node accepted the job, but no backup client ever showed itself",
        FailureCode::NodeOutcomeUnknown => "the node gave no clear answer, and no backup client showed itself",
        FailureCode::ClientDisconnected => {
            "the backup client left a disk in the middle of its copy and did not come back"
        }
        _ => "the backup client gave no sign of life for too long",
    };
    Failed::new(code, message).by(Actor::Clock)
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
