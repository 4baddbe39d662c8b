//! Payload between the moment it is acknowledged and the moment it is in the file: bounded, merged, and visible to readers
//! all the while.
//!
//! One thread per image keeps many writes under way where the storage can ([`Storage::queue`]), a few threads write where it
//! cannot. They begin when there is enough for the effort, or when somebody waits. Two runs here never share a block ([`Storage::block_size`]): whoever brings one that
//! does waits until the older is in the file, so that writes of a block reach it in the order in which they were issued. A
//! flush waits for what was brought before it ([`WriteBehind::drain`]). The first failed write poisons the image, and what
//! it held is unreadable from then on.

use std::collections::{BTreeMap, HashMap};
use std::io::IoSlice;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::payload::{Payload, Piece};
use crate::poison::Poison;
use crate::room::Room;
use crate::storage::{Storage, WriteQueue};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait, wait_timeout};

/// Threads that write, per image, where the storage takes one write per thread: one would leave the disk idle while it
/// comes back for more.
const WORKERS: usize = 2;
/// The longest run that neighbouring payload is merged into. (`docs/performance.md`, "Run length".)
const RUN_BYTES: u64 = 1 << 20;
/// Bytes under way at once in a queue, except for one run alone.
const UNDER_WAY_BYTES: u64 = 8 << 20;
/// Idle threads begin when so much waits, or so many writes, or somebody waits for one, or a thread has looked on for so long:
/// waking a thread for each small write would cost more than the write. (`docs/performance.md`, "Late start".)
const START_BYTES: u64 = 256 << 10;
const START_WRITES: usize = 64;
const START_AFTER: Duration = Duration::from_millis(5);
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
    /// Takes in what lies behind it. It keeps the id of its oldest write: a flush that waits for that one waits for all.
    fn append(&mut self, length: u64, pieces: Vec<Piece>) {
        self.length += length;
        self.pieces.extend(pieces);
    }
}

#[derive(Debug, Default)]
struct State {
    /// Of the storage.
    block_size: u64,
    /// Runs by host offset: those that wait, and those that somebody is writing. No two share a block.
    queued: BTreeMap<u64, Run>,
    submitted: BTreeMap<u64, Submitted>,
    /// `id` and host offset of every run above.
    ids: BTreeMap<u64, u64>,
    last_id: u64,
    /// Host offset and length of what could not be written.
    failed: Vec<(u64, u64)>,
    /// Where the last run taken ended: the next is the first one behind it.
    cursor: u64,
    taken: u64,
    /// Payload bytes in `queued`, and writes that were brought since it was last empty.
    queued_bytes: u64,
    queued_writes: usize,
    idle_workers: usize,
    /// Threads that wait for a run to leave.
    waiting: usize,
    is_stopping: bool,
}

/// A run that somebody is writing.
#[derive(Clone, Debug)]
struct Submitted {
    length: u64,
    id: u64,
    payload: Payload,
}

#[derive(Debug)]
struct Shared {
    storage: Arc<dyn Storage>,
    poison: Arc<Poison>,
    room: Arc<Room>,
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
        let overlaps = |at: u64, run_length: u64, pieces: &[Piece]| {
            let (first, last) = self.blocks(at, run_length);
            let is_edge = mutant!("filling_no_overlap") && has_edge(at, run_length, pieces, offset, length);
            first < end && start < last && !is_edge
        };
        // Runs are sorted and apart: only the last one that begins before the end can reach into the range.
        let queued = self.queued.range(..end).next_back();
        let submitted = self.submitted.range(..end).next_back();
        queued.is_some_and(|(at, run)| overlaps(*at, run.length, &run.pieces))
            || submitted.is_some_and(|(at, run)| overlaps(*at, run.length, run.payload.pieces()))
    }

    /// Whether there is reason to write now.
    fn is_due(&self) -> bool {
        !self.queued.is_empty()
            && (self.waiting > 0 || self.queued_bytes >= START_BYTES || self.queued_writes >= START_WRITES)
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
        self.queued_bytes += length;
        self.queued_writes += 1;
        if let Some((at, before)) = self.queued.range_mut(..offset).next_back()
            && at + before.length == offset
            && before.length + length <= RUN_BYTES
        {
            if mutant!("merged_as_new") {
                self.ids.remove(&before.id);
                self.ids.insert(id, *at);
                before.id = id;
            }
            before.append(length, pieces);
            return;
        }
        self.ids.insert(id, offset);
        self.queued.insert(offset, Run { length, id, pieces });
    }

    /// The next run to write, now submitted, and how many runs went into it: in the order of the file, but now and then the
    /// oldest, which a stream that always goes on behind the cursor would keep waiting for ever, with everybody who waits
    /// for it.
    fn take(&mut self) -> Option<(u64, Payload, usize)> {
        self.taken += 1;
        let is_queued = |offset: &&u64| self.queued.contains_key(offset);
        let oldest = if self.taken.is_multiple_of(OLDEST_EVERY) { self.ids.values().find(is_queued) } else { None };
        let next = oldest.or_else(|| self.queued.range(self.cursor..).map(|(offset, _)| offset).next());
        let offset = *next.or_else(|| self.queued.keys().next())?;
        let mut run = self.queued.remove(&offset)?;
        let mut merged = 1;
        while let Some(next) = self.queued.get(&(offset + run.length))
            && run.length + next.length <= RUN_BYTES
            && let Some(Run { length, id, pieces }) = self.queued.remove(&(offset + run.length))
        {
            self.ids.remove(&run.id.max(id));
            run.id = run.id.min(id);
            run.append(length, pieces);
            merged += 1;
        }
        self.ids.insert(run.id, offset);
        self.cursor = offset + run.length;
        self.queued_bytes -= run.length;
        if self.queued.is_empty() {
            self.queued_writes = 0;
        }
        let payload = Payload::new(run.pieces);
        self.submitted.insert(offset, Submitted { length: run.length, id: run.id, payload: payload.clone() });
        Some((offset, payload, merged))
    }
}

/// For a mistake that tests make: whether a range lies in the first or the last piece of a run, as the filling around a
/// payload does. `at`: where the run begins.
fn has_edge(at: u64, run_length: u64, pieces: &[Piece], offset: u64, length: u64) -> bool {
    let (Some(head), Some(tail)) = (pieces.first(), pieces.last()) else { return false };
    let in_head = offset > at && offset + length <= at + head.len();
    pieces.len() > 1 && (in_head || offset >= at + run_length - tail.len())
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
        if state.idle_workers > 0 && !state.queued.is_empty() {
            self.work.notify_all();
        }
        state = wait(&self.done, state);
        state.waiting -= 1;
        state
    }

    /// Takes a submitted run out again. One that was not written stays unreadable for good.
    fn complete(&self, offset: u64, is_written: bool) {
        let mut state = lock(&self.state);
        let run = state.submitted.remove(&offset);
        if let Some(run) = &run {
            state.ids.remove(&run.id);
            if is_written {
                self.present.fetch_sub(1, Ordering::Release);
            } else {
                state.failed.push((offset, run.length));
            }
        }
        let is_awaited = state.waiting > 0;
        drop(state);
        // Perhaps the last owner of the payload: what its end sets off must not meet the lock.
        drop(run);
        if !is_written {
            self.room.open_to_all();
        }
        if is_awaited {
            self.done.notify_all();
        }
    }

    /// The next run to write, once there is reason to; `None` at the end.
    fn next(&self) -> Option<(u64, Payload)> {
        let mut state = lock(&self.state);
        let mut is_late = false;
        while !state.is_stopping {
            if (is_late || state.is_due())
                && let Some(next) = self.take(&mut state)
            {
                // One that went to sleep over an empty queue has no deadline of its own.
                if state.idle_workers > 0 && !state.queued.is_empty() {
                    self.work.notify_one();
                }
                return Some(next);
            }
            state.idle_workers += 1;
            (state, is_late) = if state.queued.is_empty() {
                (wait(&self.work, state), false)
            } else {
                wait_timeout(&self.work, state, START_AFTER)
            };
            state.idle_workers -= 1;
        }
        None
    }

    /// A run to write, if there is one.
    fn take(&self, state: &mut State) -> Option<(u64, Payload)> {
        let (offset, payload, merged) = state.take()?;
        self.present.fetch_sub(merged - 1, Ordering::Release);
        Some((offset, payload))
    }

    /// A run to write together with `under_way` bytes that are being written, if there is one and it is not the end.
    fn next_beside(&self, under_way: u64) -> Option<(u64, Payload)> {
        if under_way >= UNDER_WAY_BYTES {
            return None;
        }
        let mut state = lock(&self.state);
        if state.is_stopping { None } else { self.take(&mut state) }
    }

    /// Writes run by run.
    fn work(&self) {
        while let Some((offset, payload)) = self.next() {
            let mut writing = Writing { shared: self, offset, is_written: false };
            writing.end(self.storage.write(offset, &mut payload.slices()));
        }
    }

    /// Keeps a queue filled.
    fn work_with(&self, mut queue: Box<dyn WriteQueue>) {
        // By offset: no two runs under way begin at the same.
        let mut under_way: HashMap<u64, (Writing<'_>, u64)> = HashMap::new();
        let mut bytes = 0;
        let mut ended = Vec::new();
        loop {
            let next = if under_way.is_empty() { self.next() } else { self.next_beside(bytes) };
            let is_full = match next {
                Some((offset, payload)) => {
                    let length = payload.len();
                    bytes += length;
                    under_way.insert(offset, (Writing { shared: self, offset, is_written: false }, length));
                    queue.begin(offset, payload)
                }
                None if under_way.is_empty() => return,
                None => true,
            };
            if !is_full {
                continue;
            }
            queue.wait(&mut ended);
            for (offset, result) in ended.drain(..) {
                if let Some((mut writing, length)) = under_way.remove(&offset) {
                    bytes -= length;
                    writing.end(result);
                }
            }
        }
    }
}

/// A run that is being written: leaves, as written or as lost, whatever happens.
struct Writing<'a> {
    shared: &'a Shared,
    offset: u64,
    is_written: bool,
}

impl Writing<'_> {
    fn end(&mut self, result: std::io::Result<()>) {
        match result {
            Ok(()) => self.is_written = true,
            Err(_) if mutant!("failed_payload_ignored") => self.is_written = true,
            Err(source) => {
                self.shared.poison.by(Error::io("write", self.offset)(source));
            }
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.is_written {
            // After a failed write the poison is set already; this is for a panic on the way.
            self.shared.poison.by_panic();
        }
        self.shared.complete(self.offset, self.is_written);
    }
}

impl WriteBehind {
    pub(crate) fn new(storage: Arc<dyn Storage>, poison: Arc<Poison>, room: Arc<Room>) -> Self {
        let state = Mutex::new(State { block_size: storage.block_size(), ..State::default() });
        let present = AtomicUsize::new(0);
        let shared = Shared { storage, poison, room, state, work: Condvar::new(), done: Condvar::new(), present };
        Self { shared: Arc::new(shared), workers: Mutex::default(), leaves_threads: AtomicBool::new(false) }
    }

    /// Starts the threads; before the first payload comes.
    pub(crate) fn start(&self) -> Result<()> {
        let mut workers = lock(&self.workers);
        while workers.len() < WORKERS {
            let shared = self.shared.clone();
            let queue = if workers.is_empty() { shared.storage.clone().queue() } else { None };
            let has_queue = queue.is_some();
            let work = move || match queue {
                Some(queue) => shared.work_with(queue),
                None => shared.work(),
            };
            match thread::Builder::new().name("write-behind".into()).spawn(work) {
                Ok(worker) if has_queue => {
                    workers.push(worker);
                    break;
                }
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
        // An idle worker that has nothing at all waits without a deadline.
        let wake = state.idle_workers > 0 && (state.is_due() || state.queued_writes == 1);
        drop(state);
        if wake {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    /// Whether [`WriteBehind::put`] would not wait.
    pub(crate) fn is_free(&self, offset: u64, length: u64) -> bool {
        self.is_idle() || !lock(&self.shared.state).is_taken(offset, length)
    }

    /// Writes payload in the calling thread, so that it is durable by itself, in its turn among the writes of its blocks.
    pub(crate) fn write_durable(&self, offset: u64, piece: &Piece) -> Result<()> {
        let mut state = self.shared.admit(offset, piece.len())?;
        let id = state.new_id();
        state.ids.insert(id, offset);
        let payload = Payload::new(vec![piece.clone()]);
        state.submitted.insert(offset, Submitted { length: piece.len(), id, payload });
        self.shared.present.fetch_add(1, Ordering::Release);
        drop(state);
        let mut writing = Writing { shared: &self.shared, offset, is_written: false };
        let written = if mutant!("fua_as_plain_write") {
            self.shared.storage.write(offset, &mut [IoSlice::new(piece.bytes())])
        } else {
            self.shared.storage.write_durable(offset, &mut [IoSlice::new(piece.bytes())])
        };
        writing.is_written = written.is_ok();
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
        let mut collect = |at: u64, pieces: &[Piece]| {
            let mut at = at;
            for piece in pieces {
                if at < end && offset < at + piece.len() {
                    found.push((at, piece.clone()));
                }
                at += piece.len();
            }
            // Runs further down end before this one begins.
            at > offset
        };
        let _ = state.queued.range(..end).rev().all(|(at, run)| collect(*at, &run.pieces));
        let _ = state.submitted.range(..end).rev().all(|(at, run)| collect(*at, run.payload.pieces()));
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
            state.take().is_some_and(|(offset, ..)| offset == 0)
        });
        assert!(taken.is_some(), "not written while 100 newer runs were");
    }
}
