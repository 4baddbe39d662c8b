//! A disk that records every call with its start and end, and can rebuild what a power cut may leave of it.
//!
//! A write is covered by a sync only if it ended before the sync began. Whatever no completed sync covers may be there,
//! be missing, or be torn, each on its own (`power_cut.rs`, `registers.rs`). Where a scheduler
//! explores interleavings, other threads may run in the middle of every call.

#![allow(unreachable_pub, dead_code, clippy::unwrap_used, reason = "part of the tests that include it")]

#[path = "out_of_order.rs"]
#[allow(clippy::duplicate_mod, reason = "some tests include both kinds of storage")]
mod out_of_order;

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::{Reservation, Storage, WriteQueue};
use out_of_order::OutOfOrder;

/// The clock that disk and guest operations share: every event gets a time of its own.
pub type Clock = Arc<AtomicU64>;

pub fn now(clock: &Clock) -> u64 {
    clock.fetch_add(1, Ordering::SeqCst) + 1
}

/// The bytes of a file; behind its length, and in holes, there are zeroes. Copies share what they do not change.
#[derive(Clone, Debug, Default)]
pub struct Content {
    pages: Vec<Option<Arc<Page>>>,
    length: u64,
}

const PAGE: usize = 4096;

#[derive(Clone, Debug)]
struct Page {
    bytes: [u8; PAGE],
    /// Of the bytes; 0 for zeroes.
    digest: u64,
}

fn mix(digest: u64, word: u64) -> u64 {
    (digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

impl Content {
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The same for equal content, different for different content as far as 64 bits can tell.
    pub fn digest(&self) -> u64 {
        let pages = self.pages.iter().enumerate();
        let used = pages.filter_map(|(index, page)| page.as_ref().map(|page| (index as u64 + 1, page.digest)));
        used.filter(|(_, digest)| *digest != 0).fold(self.length, |all, (index, digest)| mix(mix(all, index), digest))
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset as usize + done;
            let (index, within) = (at / PAGE, at % PAGE);
            let part = (PAGE - within).min(buffer.len() - done);
            match self.pages.get(index).and_then(Option::as_ref) {
                Some(page) => buffer[done..done + part].copy_from_slice(&page.bytes[within..within + part]),
                None => buffer[done..done + part].fill(0),
            }
            done += part;
        }
    }

    /// What reaches the disk for a write that begins or ends inside a sector: the whole sector, as the page cache has it.
    fn in_whole_sectors(&self, change: Change) -> Change {
        let Change::Write { offset, bytes } = change else { return change };
        let end = (offset + bytes.len() as u64).next_multiple_of(512).min(self.length);
        let offset = offset / 512 * 512;
        let mut bytes = vec![0; (end - offset) as usize];
        self.read(offset, &mut bytes);
        Change::Write { offset, bytes }
    }

    /// Changes a range of bytes, page by page; `part` gets each page's bytes and where in the range they are.
    fn change(&mut self, offset: u64, length: usize, part: impl Fn(&mut [u8], usize)) {
        let mut done = 0;
        while done < length {
            let at = offset as usize + done;
            let (index, within) = (at / PAGE, at % PAGE);
            let bytes = (PAGE - within).min(length - done);
            if self.pages.len() <= index {
                self.pages.resize(index + 1, None);
            }
            let page = self.pages[index].get_or_insert_with(|| Arc::new(Page { bytes: [0; PAGE], digest: 0 }));
            let page = Arc::make_mut(page);
            part(&mut page.bytes[within..within + bytes], done);
            let (words, _) = page.bytes.as_chunks::<8>();
            page.digest = words.iter().fold(0, |digest, word| mix(digest, u64::from_le_bytes(*word)));
            done += bytes;
        }
    }

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { offset, bytes } => {
                self.change(*offset, bytes.len(), |part, from| part.copy_from_slice(&bytes[from..from + part.len()]));
                self.length = self.length.max(offset + bytes.len() as u64);
            }
            Change::Length(length) => {
                if *length < self.length {
                    let end = (*length as usize).next_multiple_of(PAGE);
                    self.pages.truncate(end / PAGE);
                    if self.pages.len() * PAGE > *length as usize {
                        self.change(*length, end - *length as usize, |part, _| part.fill(0));
                    }
                }
                self.length = *length;
            }
            Change::Punch { offset, length } => {
                let end = ((offset + length) as usize).min(self.pages.len() * PAGE);
                self.change(*offset, end.saturating_sub(*offset as usize), |part, _| part.fill(0));
            }
        }
    }
}

#[derive(Clone, Debug)]
pub enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Length(u64),
    Punch { offset: u64, length: u64 },
}

#[derive(Clone, Debug)]
pub struct Call {
    pub started: u64,
    pub ended: u64,
    /// `None`: a sync.
    pub change: Option<Change>,
    /// A sync that failed: what it should have covered may be lost, and no later sync brings it back.
    pub has_failed: bool,
    /// Durable at its end, by itself.
    pub durable: bool,
}

#[derive(Debug, Default)]
struct State {
    /// As it was found, durable.
    base: Content,
    view: Content,
    /// In the order in which they took effect for readers.
    calls: Vec<Call>,
    syncs: u64,
    /// Host ranges of the writes under way, in whole sectors.
    in_flight: Vec<(u64, u64)>,
    collisions: Vec<(u64, u64)>,
    is_unlocked: bool,
    late_changes: usize,
}

#[derive(Debug)]
pub struct SimDisk {
    clock: Clock,
    state: Mutex<State>,
    /// Syncs, counted from 0, that are answered and do nothing: what the engine would be without that barrier.
    pub ignored_syncs: Vec<u64>,
    /// The sync, counted from 0, that fails.
    pub failing_sync: Option<u64>,
    /// Whether the file system can reserve space.
    pub can_reserve: bool,
    /// How many times a call lets other threads run, before and after it takes effect each.
    pub slowness: usize,
    /// Whether one thread keeps many writes under way, or each has a thread.
    pub has_queue: bool,
}

impl SimDisk {
    pub fn new(clock: Clock, content: Content) -> Self {
        let state = State { base: content.clone(), view: content, ..State::default() };
        Self {
            clock,
            state: Mutex::new(state),
            ignored_syncs: Vec::new(),
            failing_sync: None,
            can_reserve: true,
            slowness: 1,
            has_queue: true,
        }
    }

    /// As it is, but never interrupted: for what a test makes beforehand.
    pub fn quiet(self) -> Self {
        Self { slowness: 0, ..self }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state.lock().unwrap().calls.clone()
    }

    pub fn content(&self) -> Content {
        self.state.lock().unwrap().view.clone()
    }

    /// Whether a sync has failed.
    pub fn has_failed(&self) -> bool {
        self.state.lock().unwrap().calls.iter().any(|call| call.has_failed)
    }

    /// After a failed sync, what the disk has, whatever the page cache shows.
    pub fn truth(&self) -> Option<Content> {
        let state = self.state.lock().unwrap();
        let before = &state.calls[..state.calls.iter().position(|call| call.has_failed)?];
        let last = before.iter().rfind(|call| call.change.is_none()).map_or(0, |sync| sync.started);
        let covered = before.iter().filter(|call| call.ended < last || call.durable);
        let mut truth = state.base.clone();
        covered.filter_map(|call| call.change.as_ref()).for_each(|change| truth.apply(change));
        Some(truth)
    }

    /// Writes that were under way together although they share a sector: which of them the disk keeps is chance.
    pub fn collisions(&self) -> Vec<(u64, u64)> {
        self.state.lock().unwrap().collisions.clone()
    }

    /// Changes that took effect when the locks had been given up: somebody else may have the file by then.
    pub fn late_changes(&self) -> usize {
        self.state.lock().unwrap().late_changes
    }

    /// Lets other threads run, where a scheduler decides who does.
    fn pause(&self) {
        #[cfg(feature = "shuttle")]
        for _ in 0..self.slowness {
            shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
        }
    }

    fn change(&self, change: Change, durable: bool) {
        let range = match &change {
            Change::Write { offset, bytes } => {
                Some((offset / 512 * 512, (offset + bytes.len() as u64).next_multiple_of(512)))
            }
            _ => None,
        };
        let started = now(&self.clock);
        {
            let mut state = self.state.lock().unwrap();
            if let Some((start, end)) = range {
                let collision = state.in_flight.iter().find(|(first, last)| *first < end && start < *last).copied();
                state.collisions.extend(collision);
                state.in_flight.push((start, end));
            }
        }
        self.pause();
        let index = {
            let mut state = self.state.lock().unwrap();
            state.late_changes += usize::from(state.is_unlocked);
            state.view.apply(&change);
            let change = state.view.in_whole_sectors(change);
            state.calls.push(Call { started, ended: u64::MAX, change: Some(change), durable, has_failed: false });
            state.calls.len() - 1
        };
        self.pause();
        let mut state = self.state.lock().unwrap();
        state.calls[index].ended = now(&self.clock);
        if let Some(position) = state.in_flight.iter().position(|flying| Some(*flying) == range) {
            state.in_flight.swap_remove(position);
        }
    }
}

fn gather(slices: &[IoSlice<'_>]) -> Vec<u8> {
    slices.iter().flat_map(|slice| slice.iter().copied()).collect()
}

impl Storage for SimDisk {
    fn queue(self: Arc<Self>) -> Option<Box<dyn WriteQueue>> {
        self.has_queue.then(|| OutOfOrder::over(self.clone()))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.pause();
        self.state.lock().unwrap().view.read(offset, buffer);
        self.pause();
        Ok(())
    }

    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> bool {
        Storage::read(self, offset, buffer).is_ok()
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Ok(());
        }
        self.change(Change::Write { offset, bytes: gather(slices) }, false);
        Ok(())
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Ok(());
        }
        self.change(Change::Write { offset, bytes: gather(slices) }, true);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let started = now(&self.clock);
        self.pause();
        let mut state = self.state.lock().unwrap();
        let number = state.syncs;
        state.syncs += 1;
        let ended = now(&self.clock);
        let has_failed = self.failing_sync == Some(number);
        if !self.ignored_syncs.contains(&number) {
            state.calls.push(Call { started, ended, change: None, durable: false, has_failed });
        }
        if has_failed { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().view.length)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(length), false);
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        if !self.can_reserve {
            return Ok(Reservation::Unsupported);
        }
        let end = (offset + length).max(self.length()?);
        self.change(Change::Length(end), false);
        Ok(Reservation::Done)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Change::Punch { offset, length }, false);
        Ok(())
    }

    /// After a failed sync, what no successful one covered before is gone with the pages that showed it.
    fn drop_cache(&self) -> io::Result<()> {
        if let Some(truth) = self.truth() {
            self.state.lock().unwrap().view = truth;
        }
        Ok(())
    }

    fn unlock(&self) {
        self.state.lock().unwrap().is_unlocked = true;
    }
}
