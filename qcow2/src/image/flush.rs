//! Flush: the two barriers. `docs/durability.md` argues why the order below loses nothing.

use crate::sync::atomic::Ordering;
use std::io::IoSlice;

use super::Image;
use crate::error::Result;
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
    /// The L1 as it is on disk: host offset of each table, 0 for none.
    disk_l1: Vec<u64>,
    /// `Image::changes` as of the last completed flush: `0 <= covered <= changes`.
    covered: u64,
}

impl FlushState {
    pub(super) fn new(disk_l1: Vec<u64>) -> Self {
        Self { disk_l1, covered: 0 }
    }
}

impl Image {
    /// Makes every change that returned before this call, on any thread, durable.
    ///
    /// # Durability
    /// A crash after the return loses nothing of what was written before the call. An error means that the image is
    /// poisoned: what was written since the last successful flush may be lost, and no later flush will succeed.
    pub fn flush(&self) -> Result<()> {
        let _operation = self.reading()?;
        self.flush_changes()
    }

    /// As [`Image::flush`], inside an operation.
    pub(super) fn flush_changes(&self) -> Result<()> {
        let due = self.changes.load(Ordering::SeqCst);
        let mut state = lock(&self.flush);
        self.refuse_poisoned()?;
        if state.covered >= due {
            // Nothing happened since, or the flush that we waited for took it along.
            return Ok(());
        }
        // Everything counted up to this moment is in the clone or was written in place, and its payload has an id by now.
        let observe = || (self.changes.load(Ordering::SeqCst), self.write_behind.last_id());
        let (clones, (covered, payload)) = self.tables.clone_dirty(observe);
        self.write_clones(&clones, payload, &mut state.disk_l1)?;
        self.tables.flushed(&clones);
        state.covered = covered;
        Ok(())
    }

    fn write_clones(&self, clones: &[TableClone], payload: u64, disk_l1: &mut [u64]) -> Result<()> {
        // (a) Tables that nothing on disk points at yet.
        for clone in clones.iter().filter(|clone| !clone.linked) {
            self.write_table(clone)?;
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
        for clone in clones.iter().filter(|clone| clone.linked) {
            self.write_table(clone)?;
        }
        let mut sectors = Vec::new();
        for clone in clones.iter().filter(|clone| !clone.linked) {
            disk_l1[clone.l1_index] = clone.host;
            sectors.push(l1_sector(disk_l1, clone.l1_index).0);
        }
        sectors.sort_unstable();
        sectors.dedup();
        for sector in sectors {
            let (offset, bytes) = l1_sector(disk_l1, (sector / 8) as usize);
            self.store(self.header.l1_offset + offset, &mut [IoSlice::new(&bytes)])?;
        }
        // B2: the entries are durable.
        if mutant!("no_b2") {
            return Ok(());
        }
        self.sync()
    }

    fn write_table(&self, clone: &TableClone) -> Result<()> {
        for (offset, bytes) in &clone.runs {
            self.store(*offset, &mut [IoSlice::new(bytes)])?;
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
