//! Flush: the two barriers. `docs/durability.md` argues why the order below loses nothing.

use crate::sync::atomic::Ordering;
use std::io::IoSlice;

use super::Image;
use crate::error::Result;
use crate::l1::L1;
use crate::sync::lock;
use crate::tables::{TableClone, l1_sector};

/// When a change must be on stable storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// At the next flush.
    OnFlush,
    /// Before the operation returns (FUA).
    BeforeReply,
}

/// What only a flush may touch; its mutex makes flushes run one at a time.
#[derive(Debug)]
pub(super) struct FlushState {
    /// Where the L1 lies.
    pub(super) l1_offset: u64,
    /// Entries of the L1 on disk.
    pub(super) l1_entries: usize,
    /// The L1 as it is on disk. Entries past `l1_entries` wait for a larger L1.
    pub(super) disk_l1: L1,
    /// `Image::changes` as of the last completed flush: `0 <= covered <= changes`.
    covered: u64,
}

impl FlushState {
    pub(super) fn new(l1_offset: u64, disk_l1: L1) -> Self {
        Self { l1_offset, l1_entries: disk_l1.len(), disk_l1, covered: 0 }
    }
}

impl Image {
    /// Makes every change that returned before this call, on any thread, durable.
    ///
    /// # Durability
    /// A crash after the return loses nothing of what was written before the call. An error means that the image is
    /// poisoned: what was written since the last successful flush may be lost, and no later flush will succeed.
    pub fn flush(&self) -> Result<()> {
        let mut operation = self.reading()?;
        operation.changes_image();
        self.flush_changes()
    }

    /// As [`Image::flush`], inside an operation.
    pub(super) fn flush_changes(&self) -> Result<()> {
        let due = self.changes.load(Ordering::SeqCst);
        if mutant!("empty_flush") && self.flush.try_lock().is_err() {
            return Ok(());
        }
        let mut state = lock(&self.flush);
        self.refuse_poisoned()?;
        if state.covered >= due {
            // Nothing happened since, or the flush that we waited for took it along.
            return Ok(());
        }
        // Everything counted up to this moment is in the clone or was written in place, and its payload has an id by now.
        let observe = || (self.changes.load(Ordering::SeqCst), self.write_behind.last_id());
        let (clones, (covered, mut payload)) = self.tables.clone_dirty(observe);
        // What is being packed into the same blocks as the clone's compressed clusters is drained with them.
        if self.packing.begin_flush() {
            payload = self.write_behind.last_id();
        }
        self.write_clones(&clones, payload, &mut state)?;
        self.tables.flushed(&clones);
        state.covered = if mutant!("covers_too_much") { self.changes.load(Ordering::SeqCst) } else { covered };
        Ok(())
    }

    fn write_clones(&self, clones: &[TableClone], payload: u64, state: &mut FlushState) -> Result<()> {
        // (a) Tables that nothing on disk points at yet.
        for clone in clones.iter().filter(|clone| !clone.linked && !mutant!("links_before_tables")) {
            self.write_runs(&clone.runs)?;
        }
        if !mutant!("no_drain") {
            self.write_behind.drain(payload)?;
        }
        // B1: payload, copy-on-write filling and new tables are durable before anything points at them.
        if !mutant!("no_b1") {
            self.sync()?;
        }
        if clones.is_empty() {
            return Ok(());
        }
        // (b) From the clone, never from the live tables: those may know entries whose payload B1 did not cover.
        for clone in clones.iter().filter(|clone| clone.linked || mutant!("links_before_tables")) {
            let live = if mutant!("live_l2") { self.tables.live_runs(clone) } else { Vec::new() };
            let runs = if live.is_empty() { &clone.runs } else { &live };
            self.write_runs(runs)?;
        }
        let mut sectors = Vec::new();
        for clone in clones.iter().filter(|clone| !clone.linked) {
            state.disk_l1.set(clone.l1_index, clone.host);
            // Tables past the L1 on disk are linked by the larger one that growing is about to write.
            if clone.l1_index < state.l1_entries {
                sectors.push(l1_sector(&state.disk_l1, clone.l1_index).0);
            }
        }
        sectors.sort_unstable();
        sectors.dedup();
        for sector in sectors {
            let live = mutant!("live_l1").then(|| self.tables.live_l1());
            let (offset, bytes) = l1_sector(live.as_ref().unwrap_or(&state.disk_l1), (sector / 8) as usize);
            self.store(state.l1_offset + offset, &mut [IoSlice::new(&bytes)])?;
        }
        // B2: the entries are durable.
        if mutant!("no_b2") {
            return Ok(());
        }
        self.sync()
    }

    fn write_runs(&self, runs: &[(u64, Vec<u8>)]) -> Result<()> {
        for (offset, bytes) in runs {
            self.store(*offset, &mut [IoSlice::new(bytes)])?;
        }
        Ok(())
    }

    /// Between the steps of an operation that changes many tables: makes some of their memory droppable when there is much.
    pub(super) fn flush_crowded(&self) -> Result<()> {
        if self.tables.is_crowded() {
            self.changed();
            self.flush_changes()?;
        }
        Ok(())
    }

    /// Ends an operation that changed something, unless `durable` says that it is on stable storage already.
    pub(super) fn settle(&self, durability: Durability, durable: bool) -> Result<()> {
        if durable {
            return Ok(());
        }
        self.changed();
        if durability == Durability::BeforeReply || self.tables.is_crowded() {
            return self.flush_changes();
        }
        Ok(())
    }
}
