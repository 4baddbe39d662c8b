//! The states of disks that the NBD layer brings about, put on record: connected, writing, disconnected and back.
//!
//! The job looks after each change that its exports signal. What it missed in between it records too, in order, so that the
//! record and the events show every step of a disk. It is a record only: what the job decides it decides by the exports.

use std::time::Duration;

use tokio::time::Instant;

use super::job::{Job, observed};
use super::state::DiskState;
use crate::id::BackupId;
use crate::store::backups::{self, DiskUpdate};
use crate::store::{Connection, StoreError};

/// How long a disk that comes and goes rests between two records, so that a client that does nothing but reconnect does not
/// fill the database. A guess: a person sees no difference.
const REST: Duration = Duration::from_secs(1);

/// What is recorded of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noted {
    state: DiskState,
    at: Instant,
}

impl Noted {
    /// Its listener accepts connections.
    pub(super) fn listening() -> Self {
        Self { state: DiskState::Listening, at: Instant::now() }
    }

    /// When what is seen may be recorded: nothing when it is on record.
    fn due(self, seen: DiskState) -> Option<Instant> {
        let flaps = matches!(self.state, DiskState::Disconnected);
        (!steps(self.state, seen).is_empty()).then_some(if flaps { self.at + REST } else { self.at })
    }
}

/// The states that lead from one to another, without the first.
fn steps(from: DiskState, to: DiskState) -> &'static [DiskState] {
    use DiskState::{Connected, Disconnected, Listening, Writing};
    match (from, to) {
        (Listening, Connected) => &[Connected],
        (Listening, Writing) => &[Connected, Writing],
        (Listening, Disconnected) => &[Connected, Writing, Disconnected],
        (Connected | Disconnected, Writing) => &[Writing],
        (Connected, Disconnected) => &[Writing, Disconnected],
        (Writing, Disconnected) => &[Disconnected],
        _ => &[],
    }
}

impl Job {
    /// Records what the exports show. Returns when there will be something to record that had to wait.
    pub(super) async fn note_disks(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut wake = None;
        let mut due: Vec<(usize, DiskState)> = Vec::new();
        for (index, running) in self.disks.iter().enumerate() {
            // From its completion on the barrier keeps the record.
            if running.export.gate().is_closed() {
                continue;
            }
            let seen = observed(&running.export.meter().reading());
            match running.noted.due(seen) {
                Some(at) if at > now => wake = Some(wake.map_or(at, |earlier: Instant| earlier.min(at))),
                Some(_) => due.push((index, seen)),
                None => {}
            }
        }
        if due.is_empty() {
            return wake;
        }
        match self.record_states(&due).await {
            Ok(()) => {
                for (index, state) in due {
                    self.disks[index].noted = Noted { state, at: now };
                }
                wake
            }
            Err(error) => {
                // Hours of copying are not given up for a line in a record; what is missing is recorded later.
                tracing::warn!(job_id = %self.facts.id, %error, "the states of disks are not recorded yet");
                Some(now + REST)
            }
        }
    }

    async fn record_states(&self, due: &[(usize, DiskState)]) -> Result<(), StoreError> {
        let mut transaction = self.store().write().await?;
        for (index, seen) in due {
            self.note_disk(&mut transaction, *index, *seen).await?;
        }
        transaction.commit().await
    }

    /// Brings the record of one disk to what was seen of it.
    pub(super) async fn note_disk(
        &self,
        transaction: &mut Connection,
        index: usize,
        seen: DiskState,
    ) -> Result<(), StoreError> {
        let running = &self.disks[index];
        let id: &BackupId = &self.facts.id;
        for state in steps(running.noted.state, seen) {
            let update = DiskUpdate::state_only(running.disk.plan.disk_id, *state);
            backups::update_disk(transaction, id, &update).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_that_was_missed_is_recorded_in_order() {
        use DiskState::{Connected, Disconnected, Listening, Writing};
        assert_eq!(steps(Listening, Disconnected), [Connected, Writing, Disconnected]);
        assert_eq!(steps(Connected, Disconnected), [Writing, Disconnected]);
        assert_eq!(steps(Disconnected, Writing), [Writing]);
        for state in [Listening, Connected, Writing, Disconnected] {
            assert_eq!(steps(state, state), []);
            assert!(steps(state, Listening).is_empty(), "nothing listens a second time");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_only_comes_and_goes_is_recorded_once_a_second() {
        let now = Instant::now();
        let noted = Noted { state: DiskState::Disconnected, at: now };
        assert_eq!(noted.due(DiskState::Writing), Some(now + REST));
        assert_eq!(noted.due(DiskState::Disconnected), None);
        let writing = Noted { state: DiskState::Writing, at: now };
        assert_eq!(writing.due(DiskState::Disconnected), Some(now), "that a client is gone is told at once");
    }
}
