//! What the NBD layer sees of disks, put on record: that they are connected, written to, disconnected and back, and how much came.
//!
//! The job looks after each change that its exports signal. What it missed in between it records too, in order, so that the
//! record and the events show every step of a disk. It is a record only: what the job decides it decides by the exports.

use std::time::Duration;

use tokio::time::Instant;

use super::job::{Job, RunningDisk, observed};
use crate::export::meter::Reading;
use crate::id::BackupId;
use crate::store::backups::{self, DiskUpdate};
use crate::store::{Connection, StoreError};
use crate::words::DiskState;

/// How long a disk that comes and goes rests between two records, so that a client that does nothing but reconnect does not
/// fill the database. A guess: a person sees no difference.
const REST: Duration = Duration::from_secs(1);

/// How old the counts of a disk on record may be while it is written to: what a process that is killed leaves of them. A guess: a
/// few writes to the database, and near enough for a person.
const COUNTS_INTERVAL: Duration = Duration::from_secs(5);

/// What is recorded of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noted {
    state: DiskState,
    at: Instant,
    counts: Reading,
    counted_at: Instant,
}

impl Noted {
    /// Its listener accepts connections.
    pub(super) fn listening() -> Self {
        let now = Instant::now();
        Self { state: DiskState::Listening, at: now, counts: Reading::default(), counted_at: now }
    }

    /// When what is seen may be recorded: nothing when it is on record.
    fn due(self, seen: DiskState) -> Option<Instant> {
        let flaps = matches!(self.state, DiskState::Disconnected);
        (!steps(self.state, seen).is_empty()).then_some(if flaps { self.at + REST } else { self.at })
    }

    /// When the counts are to be looked at again: nothing while nobody writes and all is on record.
    fn counts_due(self, reading: &Reading) -> Option<Instant> {
        let may_differ = counts(reading) != counts(&self.counts) || observed(reading) == DiskState::Writing;
        may_differ.then_some(self.counted_at + COUNTS_INTERVAL)
    }

    /// When to look at the disk again.
    fn wake(self, reading: &Reading) -> Option<Instant> {
        self.due(observed(reading)).into_iter().chain(self.counts_due(reading)).min()
    }

    /// What the record is to be now: nothing while it is good as it is.
    fn next(self, reading: &Reading, now: Instant) -> Option<Self> {
        let counted = Self { counts: *reading, counted_at: now, ..self };
        let seen = observed(reading);
        if self.due(seen).is_some_and(|at| at <= now) {
            return Some(Self { state: seen, at: now, ..counted });
        }
        self.counts_due(reading).filter(|at| *at <= now).map(|_| counted)
    }
}

/// What of a reading is on record.
fn counts(reading: &Reading) -> [u64; 5] {
    let Reading { written_bytes, zeroed_bytes, zeroed_over_data_bytes, identical_bytes, covered_bytes, .. } = *reading;
    [written_bytes, zeroed_bytes, zeroed_over_data_bytes, identical_bytes, covered_bytes]
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
    /// Records what the exports show. Returns when there will be something to look at that nobody tells.
    pub(super) async fn note_disks(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let read = |running: &RunningDisk| running.export.meter().reading();
        // From its completion on the barrier keeps the record of a disk.
        let is_open = |running: &RunningDisk| !running.export.gate().is_closed();
        let open = self.disks.iter().enumerate().filter(|(_, running)| is_open(running));
        let next = |(index, running): (usize, &RunningDisk)| Some((index, running.noted.next(&read(running), now)?));
        let due: Vec<(usize, Noted)> = open.filter_map(next).collect();
        if let Err(error) = self.record(&due).await {
            // Hours of copying are not given up for a line in a record; what is missing is recorded later.
            tracing::warn!(job_id = %self.facts.id, %error, "the states of disks are not recorded yet");
            return Some(now + REST);
        }
        for (index, noted) in due {
            self.disks[index].noted = noted;
        }
        let open = self.disks.iter().filter(|running| is_open(running));
        open.filter_map(|running| running.noted.wake(&read(running))).min()
    }

    async fn record(&self, due: &[(usize, Noted)]) -> Result<(), StoreError> {
        let is_news = |(index, next): &&(usize, Noted)| {
            let noted = self.disks[*index].noted;
            (noted.state, counts(&noted.counts)) != (next.state, counts(&next.counts))
        };
        let news: Vec<_> = due.iter().filter(is_news).collect();
        if news.is_empty() {
            return Ok(());
        }
        let mut transaction = self.store().write().await?;
        for (index, next) in news {
            self.note_disk(&mut transaction, *index, next.state).await?;
            let disk_id = self.disks[*index].disk.plan.disk_id;
            let update = DiskUpdate { measured: Some(next.counts), ..DiskUpdate::state_only(disk_id, next.state) };
            backups::update_disk(&mut transaction, &self.facts.id, &update).await?;
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
        let noted = Noted { state: DiskState::Disconnected, at: now, ..Noted::listening() };
        assert_eq!(noted.due(DiskState::Writing), Some(now + REST));
        assert_eq!(noted.due(DiskState::Disconnected), None);
        let writing = Noted { state: DiskState::Writing, at: now, ..Noted::listening() };
        assert_eq!(writing.due(DiskState::Disconnected), Some(now), "that a client is gone is told at once");
    }

    #[tokio::test(start_paused = true)]
    async fn counts_are_recorded_every_few_seconds_while_a_disk_is_written_to() {
        let idle = Reading { connections: 2, ever_connected: true, ..Reading::default() };
        let connected = Noted::listening().next(&idle, Instant::now()).unwrap();
        assert_eq!((connected.state, connected.wake(&idle)), (DiskState::Connected, None));
        let busy = Reading { changed: true, written_bytes: 512, covered_bytes: 512, ..idle };
        let writing = connected.next(&busy, Instant::now()).unwrap();
        assert_eq!((writing.state, counts(&writing.counts)), (DiskState::Writing, [512, 0, 0, 0, 512]));
        let more = Reading { written_bytes: 1024, ..busy };
        assert_eq!(writing.wake(&more), Some(Instant::now() + COUNTS_INTERVAL));
        assert!(writing.next(&more, Instant::now()).is_none());
        tokio::time::advance(COUNTS_INTERVAL).await;
        let counted = writing.next(&more, Instant::now()).unwrap();
        assert_eq!((counted.state, counted.counts.written_bytes), (DiskState::Writing, 1024));
        assert_eq!(counted.wake(&more), Some(Instant::now() + COUNTS_INTERVAL), "a write wakes nobody");
    }
}
