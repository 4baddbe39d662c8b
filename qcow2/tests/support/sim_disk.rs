//! A disk that records every call with its start and end, and can rebuild what a power cut may leave of it.
//!
//! A write is covered by a sync only if it ended before the sync began. Whatever no completed sync covers may be there,
//! be missing, or be torn at 512 bytes, each on its own.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "part of the tests that include it")]

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
    calls: Vec<Call>,
    syncs: u64,
}

#[derive(Debug)]
pub struct SimDisk {
    clock: Clock,
    state: Mutex<State>,
    /// Syncs, counted from 0, that are answered and do nothing: what the engine would be without that barrier.
    pub ignored_syncs: Vec<u64>,
}

impl SimDisk {
    pub fn new(clock: Clock, content: Content) -> Self {
        let state = State { view: content, ..State::default() };
        Self { clock, state: Mutex::new(state), ignored_syncs: Vec::new() }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state.lock().unwrap().calls.clone()
    }

    pub fn content(&self) -> Content {
        self.state.lock().unwrap().view.clone()
    }

    fn change(&self, change: Change, durable: bool) {
        let started = now(&self.clock);
        let mut state = self.state.lock().unwrap();
        state.view.apply(&change);
        let change = state.view.in_whole_sectors(change);
        let ended = now(&self.clock);
        state.calls.push(Call { started, ended, change: Some(change), durable });
    }
}

fn gather(slices: &[IoSlice<'_>]) -> Vec<u8> {
    slices.iter().flat_map(|slice| slice.iter().copied()).collect()
}

impl Storage for SimDisk {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.state.lock().unwrap().view.read(offset, buffer);
        Ok(())
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

/// One state that a crash may leave.
pub struct CrashState {
    pub content: Content,
    /// The crash cannot have been before this time: the last surviving call had begun.
    pub earliest: u64,
    /// Nor after this one: the next sync would have completed.
    pub latest: u64,
}

/// A write cut at the disk's sectors, which are written whole or not at all.
fn sectors(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let first = (512 - offset as usize % 512).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    let rest =
        rest.chunks(512).enumerate().map(move |(number, sector)| (offset + (first + number * 512) as u64, sector));
    std::iter::once((offset, head)).chain(rest)
}

/// How many pending calls are enumerated by all their subsets; with more, by prefixes, single ones and samples.
const ALL_SUBSETS: usize = 8;
const SAMPLES: usize = 64;

/// Every crash state of a recording that began with `base` durable.
pub fn crash_states(base: &Content, calls: &[Call], end: u64, seed: u64, mut visit: impl FnMut(CrashState)) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut durable = base.clone();
    let mut durable_since = 0;
    let mut pending: Vec<&Call> = Vec::new();
    for call in calls {
        if call.change.is_some() {
            pending.push(call);
            continue;
        }
        visit_epoch(&durable, &pending, durable_since, call.ended, &mut random, &mut visit);
        let (covered, rest): (Vec<_>, Vec<_>) = pending.into_iter().partition(|change| change.ended < call.started);
        covered.iter().for_each(|call| call.change.iter().for_each(|change| durable.apply(change)));
        durable_since = call.ended;
        pending = rest;
    }
    visit_epoch(&durable, &pending, durable_since, end, &mut random, &mut visit);
}

fn visit_epoch(
    durable: &Content,
    pending: &[&Call],
    since: u64,
    latest: u64,
    random: &mut fastrand::Rng,
    visit: &mut impl FnMut(CrashState),
) {
    let count = pending.len();
    let mut emit = |kept: &dyn Fn(usize) -> bool, torn: Option<usize>, random: &mut fastrand::Rng| {
        let last = (0..count).rev().find(|index| kept(*index));
        let earliest = last.map_or(since, |last| pending[last].started).max(since);
        let mut content = durable.clone();
        for (index, call) in pending.iter().enumerate() {
            // What is durable by itself cannot be missing once something later has begun.
            let forced = call.durable && call.ended < earliest;
            let Some(change) = call.change.as_ref().filter(|_| kept(index) || forced) else { continue };
            match (change, torn == Some(index) && !forced) {
                (Change::Write { offset, bytes }, true) => {
                    for (offset, sector) in sectors(*offset, bytes).filter(|_| random.bool()) {
                        content.apply(&Change::Write { offset, bytes: sector.to_vec() });
                    }
                }
                _ => content.apply(change),
            }
        }
        // A call that is durable by itself bounds the crash's time, if it is missing or torn.
        let partial = |index| !kept(index) || torn == Some(index);
        let bound = pending
            .iter()
            .enumerate()
            .filter(|(index, call)| call.durable && call.ended >= earliest && partial(*index));
        let bound = bound.map(|(_, call)| call.ended).min();
        visit(CrashState { content, earliest, latest: bound.unwrap_or(latest).min(latest) });
    };
    for prefix in 0..=count {
        emit(&|index| index < prefix, None, random);
        if prefix > 0 {
            emit(&|index| index < prefix, Some(prefix - 1), random);
        }
    }
    if count <= ALL_SUBSETS {
        for set in 0u32..1 << count {
            emit(&|index| set >> index & 1 == 1, None, random);
        }
    } else {
        for chosen in 0..count {
            emit(&|index| index != chosen, None, random);
            emit(&|index| index == chosen, None, random);
        }
        for _ in 0..SAMPLES {
            let mask: Vec<bool> = (0..count).map(|_| random.bool()).collect();
            emit(&|index| mask[index], Some(random.usize(..count)), random);
        }
    }
}
