//! The one way out for failure, cancel and shutdown; a restart takes its second half.
//!
//! In reverse order of the start: connections are refused, requests in flight answered, sockets closed, images dropped, the
//! staged directory removed, ports, slot and leases given back, and only then is the terminal state recorded. Every
//! step can be repeated; one that fails does not hold up the others and is tried again until it succeeds.

use std::io;
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;

use super::ending::{CompleteError, End, StartNews};
use super::job::{Job, Stop};
use super::{blocking::Work, commit};
use crate::clock::UtcTime;
use crate::config::KeepFailed;
use crate::id::{BackupId, VmId};
use crate::repository::directory;
use crate::repository::layout::BackupPaths;
use crate::store::backups::{self, BackupRow, Change, ChangeError, DiskUpdate};
use crate::store::events::{self, Actor};
use crate::store::{Store, StoreError, leases};
use crate::words::{DiskState, FailureCode, JobResult, JobState};

/// How long requests in flight may take when the whole service is going down.
const SHUTDOWN_DRAIN: Duration = Duration::from_secs(2);

impl Job {
    /// Gives everything back and records how the job ended.
    pub(super) async fn undo(&mut self, end: End) {
        let id = self.facts.id.clone();
        match &end {
            End::Failed(failed) => tracing::error!(job_id = %id, code = %failed.code, "{}", failed.message),
            End::Cancelled => tracing::info!(job_id = %id, "backup cancelled"),
        }
        let store = self.shared.store.clone();
        if let Err(error) = begin(&store, &id, &end).await {
            tracing::error!(job_id = %id, %error, "the end of a backup could not be recorded yet");
        }
        self.show_ending(&end);
        self.close_listeners(self.drain_limit()).await;
        // Numbers for the record, before the exports go.
        let disks: Vec<_> = self
            .disks
            .iter()
            .filter(|running| running.sealed.is_none())
            .map(|running| (running.disk.plan.disk_id, running.export.meter().reading()))
            .collect();
        self.disks.clear();
        self.work.finished().await;
        let paths = self.facts.paths.clone();
        let leftovers = Leftovers::of(&end, self.shared.config.jobs.keep_failed);
        let mut removed = clear(&mut self.work, &paths, leftovers).await;
        self.ports.clear();
        if let Err(error) = release(&store, &id).await {
            tracing::error!(job_id = %id, %error, "the leases of a backup could not be given back yet");
        }
        self.slot = None;

        let mut pause = commit::first_pause();
        loop {
            if removed {
                match finish(&store, &id, &end, &disks).await {
                    Ok(()) => break,
                    Err(error) => tracing::error!(job_id = %id, %error, "the end of a backup is not recorded yet"),
                }
            }
            // Whoever waits learns that it failed; the job stays visible as failing until nothing is left of it.
            self.answer(&end);
            commit::rest(&mut pause).await;
            removed = removed || clear(&mut self.work, &paths, leftovers).await;
        }
        self.view.send_modify(|view| {
            (view.state, view.result) = terminal(&end);
        });
        self.presence = None;
        self.answer(&end);
    }

    /// Refuses new connections and requests on all disks, waits for those in flight, closes all sockets.
    pub(super) async fn close_listeners(&mut self, drain: Duration) {
        for running in &self.disks {
            running.export.refuse();
        }
        let listeners = self.disks.iter_mut().filter_map(|running| running.listener.take());
        let mut stops: JoinSet<()> = listeners.map(|listener| listener.stop(drain)).collect();
        while stops.join_next().await.is_some() {}
    }

    fn drain_limit(&self) -> Duration {
        match *self.handle.stop.borrow() {
            Some(Stop::Shutdown) => SHUTDOWN_DRAIN,
            Some(Stop::Cancel) | None => Duration::from_secs(self.shared.config.jobs.cancel_s),
        }
    }

    fn show_ending(&self, end: &End) {
        self.view.send_modify(|view| match end {
            End::Failed(failed) => {
                view.state = JobState::Failing;
                view.code = Some(failed.code);
                view.message = Some(failed.message.clone());
            }
            End::Cancelled => view.state = JobState::Cancelling,
        });
    }

    fn answer(&mut self, end: &End) {
        self.tell_starter(StartNews::Ended(end.clone()));
        if let Some(completer) = self.completer.take() {
            let state = if *end == End::Cancelled { JobState::Cancelled } else { JobState::Failed };
            let error = match end {
                End::Failed(failed) => CompleteError::Failed(failed.clone()),
                End::Cancelled => CompleteError::Ended { id: self.facts.id.clone(), state },
            };
            // A client that hung up has nothing to be told.
            let _ = completer.reply.send(Err(error));
        }
    }
}

/// Gets the staged data out of the way, as the configuration wants it.
async fn clear(work: &mut Work, paths: &BackupPaths, leftovers: Leftovers) -> bool {
    let staged = paths.clone();
    let cleared = work.run(move || leftovers.clear(&staged)).await;
    if let Err::<(), io::Error>(error) = &cleared {
        tracing::error!(path = %paths.staged.display(), %error, "staged data could not be removed yet");
    }
    cleared.is_ok()
}

/// What becomes of what a job staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leftovers {
    Removed,
    Kept,
}

impl Leftovers {
    /// A failure is kept where the configuration says so, but never what is in the way of the next backup.
    pub(super) fn of(end: &End, keep: KeepFailed) -> Self {
        match end {
            End::Failed(failed) => Self::of_failed(Some(failed.code), keep),
            End::Cancelled => Self::Removed,
        }
    }

    /// The same for a job that is over, by its record.
    pub(super) fn of_ended(row: &BackupRow, keep: KeepFailed) -> Self {
        if row.state == JobState::Failed { Self::of_failed(row.code, keep) } else { Self::Removed }
    }

    fn of_failed(code: Option<FailureCode>, keep: KeepFailed) -> Self {
        match keep {
            KeepFailed::Quarantine if code != Some(FailureCode::InsufficientStorage) => Self::Kept,
            _ => Self::Removed,
        }
    }

    /// Repeatable, whatever was done before.
    pub(super) fn clear(self, paths: &BackupPaths) -> io::Result<()> {
        match self {
            Self::Removed => directory::remove_staged(paths),
            Self::Kept => {
                directory::quarantine_staged(paths)?;
                tracing::warn!(path = %paths.quarantined.display(), "what a failed backup wrote is kept");
                Ok(())
            }
        }
    }
}

fn terminal(end: &End) -> (JobState, JobResult) {
    match end {
        End::Failed(_) => (JobState::Failed, JobResult::Failed),
        End::Cancelled => (JobState::Cancelled, JobResult::Cancelled),
    }
}

/// Records that a job is ending and why, unless that is recorded already.
pub(super) async fn begin(store: &Store, id: &BackupId, end: &End) -> Result<(), ChangeError> {
    let mut transaction = store.write().await?;
    if let Some(row) = backups::find(&mut transaction, id).await? {
        begin_in(&mut transaction, &row, end).await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// As [`begin`], inside a transaction; returns the state the row has then.
async fn begin_in(
    transaction: &mut crate::store::Connection,
    row: &BackupRow,
    end: &End,
) -> Result<JobState, ChangeError> {
    if row.state.is_ending() {
        return Ok(row.state);
    }
    let (to, failed, by) = match end {
        End::Failed(failed) => (JobState::Failing, Some(failed), failed.by),
        End::Cancelled => (JobState::Cancelling, None, Actor::User),
    };
    let change = Change {
        id: &row.id,
        vm_id: &row.vm_id,
        from: row.state,
        to,
        result: JobResult::None,
        code: failed.map(|failed| failed.code),
        message: failed.map(|failed| failed.message.as_str()),
        by,
    };
    backups::change_state(transaction, &change).await?;
    if let Some((disk_id, failed)) = failed.and_then(|failed| Some((failed.disk_id?, failed))) {
        backups::set_disk_error(transaction, &row.id, disk_id, &failed.message).await?;
    }
    if let Some(failed) = failed.filter(|failed| failed.code == FailureCode::ImageFailed) {
        alert_image(transaction, row, &failed.message).await?;
    }
    if row.node_outcome.is_some_and(backups::NodeOutcome::may_have_launched) {
        alert_snapshot(transaction, &row.id, &row.vm_id, &row.vm_name).await?;
    }
    Ok(to)
}

/// A disk, a file system or this program does what it must not: a person should look before the next backup.
async fn alert_image(
    transaction: &mut crate::store::Connection,
    row: &BackupRow,
    message: &str,
) -> Result<(), StoreError> {
    let data = json!({
        "alert": "image_failed", "job_id": row.id, "vm_context_id": row.vm_id, "vm_name": row.vm_name,
        "repository_id": row.repository_id, "detail": message,
    });
    events::append(transaction, "alert", row.id.as_str(), &data, Actor::Service, UtcTime::now()).await?;
    Ok(())
}

/// The node has no call that stops a client or cleans up after it, so a person may have to.
async fn alert_snapshot(
    transaction: &mut crate::store::Connection,
    id: &BackupId,
    vm_id: &VmId,
    vm_name: &str,
) -> Result<(), StoreError> {
    tracing::warn!(job_id = %id, vm_name, "a snapshot may be left on the VM");
    let data = json!({
        "alert": "snapshot_may_be_left", "job_id": id, "vm_context_id": vm_id, "vm_name": vm_name,
        "detail": "The backup client cannot be stopped from here. If it died, its snapshot stays on the VM until the \
                   next backup of this VM removes it.",
    });
    events::append(transaction, "alert", id.as_str(), &data, Actor::Service, UtcTime::now()).await?;
    Ok(())
}

/// Deletes the record of what a job held.
pub(super) async fn release(store: &Store, id: &BackupId) -> Result<(), StoreError> {
    let mut transaction = store.write().await?;
    leases::release_all(&mut transaction, id.as_str()).await?;
    transaction.commit().await?;
    Ok(())
}

/// Records the terminal state, in whatever state before it the row is.
pub(super) async fn finish(
    store: &Store,
    id: &BackupId,
    end: &End,
    disks: &[(u32, crate::export::meter::Reading)],
) -> Result<(), ChangeError> {
    let mut transaction = store.write().await?;
    let row = backups::load(&mut transaction, id).await?;
    if row.state.is_terminal() {
        return Ok(());
    }
    let from = begin_in(&mut transaction, &row, end).await?;
    let (to, result) = if from == JobState::Cancelling {
        (JobState::Cancelled, JobResult::Cancelled)
    } else {
        (JobState::Failed, JobResult::Failed)
    };
    for disk in backups::disks(&mut transaction, id).await? {
        let measured = disks.iter().find(|(disk_id, _)| *disk_id == disk.disk_id).map(|(_, reading)| *reading);
        let update = DiskUpdate { measured, ..DiskUpdate::state_only(disk.disk_id, DiskState::Failed) };
        backups::update_disk(&mut transaction, id, &update).await?;
    }
    let change = Change { id, vm_id: &row.vm_id, from, to, result, code: None, message: None, by: Actor::Service };
    backups::change_state(&mut transaction, &change).await?;
    leases::release_all(&mut transaction, id.as_str()).await?;
    transaction.commit().await?;
    Ok(())
}
