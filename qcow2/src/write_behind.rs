//! Payload between the moment it is acknowledged and the moment it is in the file: bounded, merged, and visible to readers
//! all the while.
//!
//! A few threads per image write it. Two runs here never share a block ([`Storage::block_size`]): whoever brings one that
//! does waits until the older is in the file, so that writes of a block reach it in the order in which they were issued. A
//! flush waits for what was brought before it ([`WriteBehind::drain`]). The first failed write poisons the image, and what
//! it held is unreadable from then on.

use std::collections::BTreeMap;
use std::io::IoSlice;

use crate::error::{Error, Result};
use crate::payload::Piece;
use crate::poison::Poison;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait};

/// Threads that write, per image: one would leave the disk idle while it comes back for more. (A guess; to be measured with
/// the write path.)
const WORKERS: usize = 2;
/// The longest run that neighbouring payload is merged into. (A guess, as above: beyond it disks gain little.)
const RUN_BYTES: u64 = 2 << 20;
/// One run in so many is the oldest, wherever it lies.
const OLDEST_EVERY: u64 = 4;

/// Neighbouring bytes of the file, in memory.
#[derive(Debug)]
struct Run {
    length: u64,
    /// Of the oldest write in it.
    id: u64,
    pieces: Vec<Piece>,
}

impl Run {
    /// For a mistake that tests make: whether a range lies in the first or the last piece, as the filling around a payload
    /// does. `at`: where the run begins.
    fn has_edge(&self, at: u64, offset: u64, length: u64) -> bool {
        let (Some(head), Some(tail)) = (self.pieces.first(), self.pieces.last()) else { return false };
        let in_head = offset > at && offset + length <= at + head.len();
        self.pieces.len() > 1 && (in_head || offset >= at + self.length - tail.len())
    }
}

#[derive(Debug, Default)]
struct State {
    /// Of the storage.
    block_size: u64,
    /// Runs by host offset: those that wait, and those that somebody is writing. No two share a block.
    queued: BTreeMap<u64, Run>,
    submitted: BTreeMap<u64, Arc<Run>>,
    /// `id` and host offset of every run above.
    ids: BTreeMap<u64, u64>,
    last_id: u64,
    /// Host offset and length of what could not be written.
    failed: Vec<(u64, u64)>,
    /// Where the last run taken ended: the next is the first one behind it.
    cursor: u64,
    taken: u64,
    idle_workers: usize,
    /// Threads that wait for a run to leave.
    waiting: usize,
    is_stopping: bool,
}

#[derive(Debug)]
struct Shared {
    storage: Arc<dyn Storage>,
    poison: Arc<Poison>,
    state: Mutex<State>,
    /// Something is queued, or the end is near.
    work: Condvar,
    /// A run has left.
    done: Condvar,
    /// Runs and failures that a reader must look at.
    present: AtomicUsize,
}

/// The write-behind of one image; without threads until [`WriteBehind::start`].
#[derive(Debug)]
pub(crate) struct WriteBehind {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    /// See [`WriteBehind::never_wait_when_dropped`].
    leaves_threads: AtomicBool,
}

impl State {
    /// Whether a run shares a block with the range.
    fn is_taken(&self, offset: u64, length: u64) -> bool {
        let (start, end) = self.blocks(offset, length);
        let overlaps = |(at, run): (u64, &Run)| {
            let (first, last) = self.blocks(at, run.length);
            first < end && start < last && !(mutant!("filling_no_overlap") && run.has_edge(at, offset, length))
        };
        // Runs are sorted and apart: only the last one that begins before the end can reach into the range.
        let queued = self.queued.range(..end).next_back().map(|(at, run)| (*at, run));
        let submitted = self.submitted.range(..end).next_back().map(|(at, run)| (*at, &**run));
        queued.into_iter().chain(submitted).any(overlaps)
    }

    /// A mistake that tests make: newer payload replaces what waits, also what a flush has promised to write.
    fn supersede(&mut self, offset: u64, length: u64) {
        if let Some(run) = self.queued.get(&offset).filter(|run| run.length == length) {
            self.ids.remove(&run.id);
            self.queued.remove(&offset);
        }
    }

    /// The blocks that a range lies in, as a range of bytes.
    fn blocks(&self, offset: u64, length: u64) -> (u64, u64) {
        (offset / self.block_size * self.block_size, (offset + length).next_multiple_of(self.block_size))
    }

    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn queue(&mut self, offset: u64, length: u64, pieces: Vec<Piece>) {
        let id = self.new_id();
        if let Some((at, before)) = self.queued.range_mut(..offset).next_back()
            && at + before.length == offset
            && before.length + length <= RUN_BYTES
        {
            // The run keeps the id of its oldest write: a flush that waits for that one waits for all of it.
            if mutant!("merged_as_new") {
                self.ids.remove(&before.id);
                self.ids.insert(id, *at);
                before.id = id;
            }
            before.length += length;
            before.pieces.extend(pieces);
            return;
        }
        self.ids.insert(id, offset);
        self.queued.insert(offset, Run { length, id, pieces });
    }

    /// The next run to write, now submitted: in the order of the file, but now and then the oldest, which a stream that
    /// always goes on behind the cursor would keep waiting for ever, with everybody who waits for it.
    fn take(&mut self) -> Option<(u64, Arc<Run>)> {
        self.taken += 1;
        let is_queued = |offset: &&u64| self.queued.contains_key(offset);
        let oldest = if self.taken.is_multiple_of(OLDEST_EVERY) { self.ids.values().find(is_queued) } else { None };
        let next = oldest.or_else(|| self.queued.range(self.cursor..).map(|(offset, _)| offset).next());
        let offset = *next.or_else(|| self.queued.keys().next())?;
        let run = Arc::new(self.queued.remove(&offset)?);
        self.cursor = offset + run.length;
        self.submitted.insert(offset, run.clone());
        Some((offset, run))
    }
}

impl Shared {
    /// Waits until the range shares no block with a run.
    fn admit(&self, offset: u64, length: u64) -> Result<MutexGuard<'_, State>> {
        let mut state = lock(&self.state);
        loop {
            self.poison.refuse()?;
            if mutant!("superseded") {
                state.supersede(offset, length);
            }
            if !state.is_taken(offset, length) {
                return Ok(state);
            }
            state = self.wait_for_one(state);
        }
    }

    /// Waits until a run has left.
    fn wait_for_one<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = wait(&self.done, state);
        state.waiting -= 1;
        state
    }

    /// Takes a submitted run out again. One that was not written stays unreadable for good.
    fn complete(&self, offset: u64, is_written: bool) {
        let mut state = lock(&self.state);
        if let Some(run) = state.submitted.remove(&offset) {
            state.ids.remove(&run.id);
            if is_written {
                self.present.fetch_sub(1, Ordering::Release);
            } else {
                state.failed.push((offset, run.length));
            }
        }
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.done.notify_all();
        }
    }

    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.is_stopping {
                return;
            }
            let Some((offset, run)) = state.take() else {
                state.idle_workers += 1;
                state = wait(&self.work, state);
                state.idle_workers -= 1;
                continue;
            };
            drop(state);
            let mut submitted = Submitted { shared: self, offset, is_written: false };
            submitted.is_written = match self.storage.write(offset, &mut slices(&run.pieces)) {
                Ok(()) => true,
                Err(_) if mutant!("failed_payload_ignored") => true,
                Err(source) => {
                    self.poison.by(Error::io("write", offset)(source));
                    false
                }
            };
            drop(submitted);
            state = lock(&self.state);
        }
    }
}

/// A run that is being written: leaves, as written or as lost, whatever happens.
struct Submitted<'a> {
    shared: &'a Shared,
    offset: u64,
    is_written: bool,
}

impl Drop for Submitted<'_> {
    fn drop(&mut self) {
        if !self.is_written {
            // After a failed write the poison is set already; this is for a panic on the way.
            self.shared.poison.by_panic();
        }
        self.shared.complete(self.offset, self.is_written);
    }
}

impl WriteBehind {
    pub(crate) fn new(storage: Arc<dyn Storage>, poison: Arc<Poison>) -> Self {
        let state = Mutex::new(State { block_size: storage.block_size(), ..State::default() });
        let present = AtomicUsize::new(0);
        let shared = Shared { storage, poison, state, work: Condvar::new(), done: Condvar::new(), present };
        Self { shared: Arc::new(shared), workers: Mutex::default(), leaves_threads: AtomicBool::new(false) }
    }

    /// Starts the threads; before the first payload comes.
    pub(crate) fn start(&self) -> Result<()> {
        let mut workers = lock(&self.workers);
        while workers.len() < WORKERS {
            let shared = self.shared.clone();
            match thread::Builder::new().name("write-behind".into()).spawn(move || shared.work()) {
                Ok(worker) => workers.push(worker),
                // One is enough to get on.
                Err(_) if !workers.is_empty() => break,
                Err(source) => return Err(Error::io("start a thread", 0)(source)),
            }
        }
        Ok(())
    }

    /// Takes payload for `offset` of the file. It is readable at once, and in the file after [`WriteBehind::drain`].
    ///
    /// Waits while older payload of the same blocks is not in the file.
    pub(crate) fn put(&self, offset: u64, pieces: Vec<Piece>) -> Result<()> {
        let length = pieces.iter().map(Piece::len).sum();
        let mut state = self.shared.admit(offset, length)?;
        let before = state.queued.len();
        state.queue(offset, length, pieces);
        if state.queued.len() > before {
            self.shared.present.fetch_add(1, Ordering::Release);
        }
        let wake = state.idle_workers > 0;
        drop(state);
        if wake {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    /// Writes payload in the calling thread, so that it is durable by itself, in its turn among the writes of its blocks.
    pub(crate) fn write_durable(&self, offset: u64, piece: &Piece) -> Result<()> {
        let mut state = self.shared.admit(offset, piece.len())?;
        let id = state.new_id();
        state.ids.insert(id, offset);
        let run = Run { length: piece.len(), id, pieces: vec![piece.clone()] };
        state.submitted.insert(offset, Arc::new(run));
        self.shared.present.fetch_add(1, Ordering::Release);
        drop(state);
        let mut submitted = Submitted { shared: &self.shared, offset, is_written: false };
        let written = if mutant!("fua_as_plain_write") {
            self.shared.storage.write(offset, &mut slices(std::slice::from_ref(piece)))
        } else {
            self.shared.storage.write_durable(offset, &mut slices(std::slice::from_ref(piece)))
        };
        submitted.is_written = written.is_ok();
        written.map_err(|source| self.shared.poison.by(Error::io("write", offset)(source)))
    }

    /// Whether a reader need not look here. Only true for what was mapped before the call.
    pub(crate) fn is_idle(&self) -> bool {
        self.shared.present.load(Ordering::Acquire) == 0
    }

    /// Of the newest payload taken so far, for [`WriteBehind::drain`].
    pub(crate) fn last_id(&self) -> u64 {
        lock(&self.shared.state).last_id
    }

    /// Waits until all payload up to `id` is in the file.
    pub(crate) fn drain(&self, id: u64) -> Result<()> {
        let mut state = lock(&self.shared.state);
        loop {
            self.shared.poison.refuse()?;
            if state.ids.first_key_value().is_none_or(|(oldest, _)| *oldest > id) {
                return Ok(());
            }
            state = self.shared.wait_for_one(state);
        }
    }

    /// Fills the buffer from `offset` of the file on, payload that is not there yet included. The caller has looked the
    /// mapping up before: payload that came later may or may not show.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let read = |at: u64, part: &mut [u8]| self.shared.storage.read(at, part).map_err(Error::io("read", at));
        if self.is_idle() {
            return read(offset, buffer);
        }
        let pending = self.pending(offset, buffer.len() as u64)?;
        if let [(at, piece)] = pending.as_slice()
            && *at <= offset
            && at + piece.len() >= offset + buffer.len() as u64
        {
            buffer.copy_from_slice(piece.part(offset - at, buffer.len() as u64).bytes());
            return Ok(());
        }
        read(offset, buffer)?;
        for (at, piece) in pending {
            let (start, end) = (at.max(offset), (at + piece.len()).min(offset + buffer.len() as u64));
            let part = &mut buffer[(start - offset) as usize..(end - offset) as usize];
            part.copy_from_slice(piece.part(start - at, end - start).bytes());
        }
        Ok(())
    }

    /// The pieces that reach into a range, with their host offsets.
    fn pending(&self, offset: u64, length: u64) -> Result<Vec<(u64, Piece)>> {
        let state = lock(&self.shared.state);
        let end = offset + length;
        let failed = |(at, length): &(u64, u64)| *at < end && offset < at + length;
        if state.failed.iter().any(failed) && !mutant!("failed_payload_readable") {
            let lost = std::io::Error::other("what was written there could not be stored");
            return Err(Error::io("read", offset)(lost));
        }
        let mut found = Vec::new();
        let mut collect = |at: u64, run: &Run| {
            let mut at = at;
            for piece in &run.pieces {
                if at < end && offset < at + piece.len() {
                    found.push((at, piece.clone()));
                }
                at += piece.len();
            }
            // Runs further down end before this one begins.
            at > offset
        };
        let _ = state.queued.range(..end).rev().all(|(at, run)| collect(*at, run));
        let _ = state.submitted.range(..end).rev().all(|(at, run)| collect(*at, run));
        Ok(found)
    }

    /// From now on, dropping this while something is being written does not wait for the end of that write.
    pub(crate) fn never_wait_when_dropped(&self) {
        self.leaves_threads.store(true, Ordering::Relaxed);
    }

    /// Ends the threads. Payload that is still queued is forgotten, as by a crash: whoever wants it drains first.
    pub(crate) fn stop(&self) {
        lock(&self.shared.state).is_stopping = true;
        self.shared.work.notify_all();
        for worker in std::mem::take(&mut *lock(&self.workers)) {
            // A worker that panicked has poisoned the image.
            let _ = worker.join();
        }
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        let leaves_threads = self.leaves_threads.load(Ordering::Relaxed);
        let mut state = lock(&self.shared.state);
        state.is_stopping = true;
        // Nobody will write it, so nobody need hold it until the disk comes back.
        let forgotten = std::mem::take(&mut state.queued);
        let is_writing = !state.submitted.is_empty();
        drop(state);
        drop(forgotten);
        if leaves_threads && is_writing {
            // They end after their write, and the last one closes the file.
            self.shared.work.notify_all();
        } else {
            self.stop();
        }
    }
}

fn slices(pieces: &[Piece]) -> Vec<IoSlice<'_>> {
    pieces.iter().map(|piece| IoSlice::new(piece.bytes())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overwrite_does_not_wait_for_the_end_of_a_stream() {
        let mut state = State { block_size: 512, ..State::default() };
        let payload = || vec![Piece::new(Arc::new(vec![1; 4096]))];
        let mut end = 1 << 20;
        let mut append = |state: &mut State| {
            state.queue(end, 4096, payload());
            // Not merged: a gap of one cluster each.
            end += 8192;
        };
        (0..8).for_each(|_| append(&mut state));
        let _ = state.take();
        state.queue(0, 4096, payload());
        let taken = (0..100).find(|_| {
            append(&mut state);
            state.take().is_some_and(|(offset, _)| offset == 0)
        });
        assert!(taken.is_some(), "not written while 100 newer runs were");
    }
}
