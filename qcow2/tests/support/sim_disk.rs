//! A disk that records every call with its start and end, and can rebuild what a power cut may leave of it.
//!
//! A write is covered by a sync only if it ended before the sync began. Whatever no completed sync covers may be there,
//! be missing, or be torn at 512 bytes, each on its own. Where a scheduler explores interleavings, other threads may run in
//! the middle of every call.

#![allow(unreachable_pub, dead_code, clippy::unwrap_used, reason = "part of the tests that include it")]

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::{Reservation, Storage};

/// The clock that disk and guest operations share: every event gets a time of its own.
pub type Clock = Arc<AtomicU64>;

pub fn now(clock: &Clock) -> u64 {
    clock.fetch_add(1, Ordering::SeqCst) + 1
}

/// The bytes of a file; behind its length, and in holes, there are zeroes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Content {
    bytes: Vec<u8>,
    length: u64,
}

impl Content {
    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        let start = (offset as usize).min(self.bytes.len());
        let there = &self.bytes[start..(start + buffer.len()).min(self.bytes.len())];
        let (head, tail) = buffer.split_at_mut(there.len());
        head.copy_from_slice(there);
        tail.fill(0);
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

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { offset, bytes } => {
                let end = *offset as usize + bytes.len();
                if self.bytes.len() < end {
                    self.bytes.resize(end, 0);
                }
                self.bytes[*offset as usize..end].copy_from_slice(bytes);
                self.length = self.length.max(end as u64);
            }
            Change::Length(length) => {
                self.bytes.truncate(*length as usize);
                self.length = *length;
            }
            Change::Punch { offset, length } => {
                let end = ((offset + length) as usize).min(self.bytes.len());
                if let Some(range) = self.bytes.get_mut(*offset as usize..end) {
                    range.fill(0);
                }
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
    /// Durable at its end, by itself.
    pub durable: bool,
}

#[derive(Debug, Default)]
struct State {
    view: Content,
    /// In the order in which they took effect for readers.
    calls: Vec<Call>,
    syncs: u64,
    /// Host ranges of the writes under way, in whole sectors.
    in_flight: Vec<(u64, u64)>,
    collisions: Vec<(u64, u64)>,
}

#[derive(Debug)]
pub struct SimDisk {
    clock: Clock,
    state: Mutex<State>,
    /// Syncs, counted from 0, that are answered and do nothing: what the engine would be without that barrier.
    pub ignored_syncs: Vec<u64>,
    /// Never interrupted: for what a test makes beforehand.
    is_quiet: bool,
}

impl SimDisk {
    pub fn new(clock: Clock, content: Content) -> Self {
        let state = State { view: content, ..State::default() };
        Self { clock, state: Mutex::new(state), ignored_syncs: Vec::new(), is_quiet: false }
    }

    /// As it is, but never interrupted.
    pub fn quiet(self) -> Self {
        Self { is_quiet: true, ..self }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state.lock().unwrap().calls.clone()
    }

    pub fn content(&self) -> Content {
        self.state.lock().unwrap().view.clone()
    }

    /// Writes that were under way together although they share a sector: which of them the disk keeps is chance.
    pub fn collisions(&self) -> Vec<(u64, u64)> {
        self.state.lock().unwrap().collisions.clone()
    }

    /// Lets other threads run, where a scheduler decides who does.
    fn pause(&self) {
        #[cfg(feature = "shuttle")]
        if !self.is_quiet {
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
            state.view.apply(&change);
            let change = state.view.in_whole_sectors(change);
            state.calls.push(Call { started, ended: u64::MAX, change: Some(change), durable });
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
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.pause();
        self.state.lock().unwrap().view.read(offset, buffer);
        self.pause();
        Ok(())
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.change(Change::Write { offset, bytes: gather(slices) }, false);
        Ok(())
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
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
        if !self.ignored_syncs.contains(&number) {
            state.calls.push(Call { started, ended, change: None, durable: false });
        }
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().view.length)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(length), false);
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        let end = (offset + length).max(self.length()?);
        self.change(Change::Length(end), false);
        Ok(Reservation::Done)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Change::Punch { offset, length }, false);
        Ok(())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}
