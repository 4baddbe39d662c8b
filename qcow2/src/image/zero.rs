//! Zeroes and discards: entries for whole clusters, data only where a cluster is partly concerned.

use super::Image;
use super::flush::Durability;
use crate::error::Result;
use crate::format::entry::{self, L2Entry};

/// What becomes of the space of clusters that are zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroMode {
    /// Clusters that have space keep it.
    Keep,
    /// Space is given up; the file system gets it back when the image is closed.
    Unmap,
}

impl Image {
    /// Makes a range read as zeroes, whatever lies below; any offset, any length. Untouched space takes no room, and a
    /// range that reads as zeroes already is left as it is.
    ///
    /// # Durability
    /// As for [`Image::write`].
    pub fn zero(&self, offset: u64, length: u64, mode: ZeroMode, durability: Durability) -> Result<()> {
        self.check_range(offset, length)?;
        let _operation = self.writing()?;
        if mutant!("no_op_fua") && self.reads_zero(offset, length)? {
            return Ok(());
        }
        for (start, piece) in self.geometry().by_table(offset, length) {
            self.zero_step(start, piece, mode)?;
            self.flush_crowded()?;
        }
        self.settle(durability, false)
    }

    /// Whether [`Image::zero`] on this range would change tables only: whole clusters, the end of the disk ending one, and
    /// parts of clusters that read as zeroes as far as the tables tell. Changes nothing and reads tables at most, and those
    /// only for parts of clusters; `false` too when they cannot be read, or when the range is not inside the disk.
    ///
    /// It stays true until somebody writes to one of these clusters.
    pub fn zero_is_fast(&self, offset: u64, length: u64) -> bool {
        self.check_range(offset, length).is_ok() && self.parts_read_zero(offset, offset + length).unwrap_or(false)
    }

    /// Whether what is not a whole cluster of `[offset, end)` reads as zeroes.
    fn parts_read_zero(&self, offset: u64, end: u64) -> Result<bool> {
        let (start, stop) = self.whole_clusters(offset, end);
        let parts = if start < stop { [(offset, start), (stop, end)] } else { [(offset, end), (end, end)] };
        for (from, to) in parts {
            if from < to {
                let _operation = self.reading()?;
                if !self.reads_zero(from, to - from)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Gives back the space of the whole clusters inside a range; they then read as zeroes, never as the layer below.
    /// Partial clusters at the ends are left alone.
    ///
    /// # Durability
    /// As for [`Image::write`].
    pub fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        self.check_range(offset, length)?;
        let _operation = self.writing()?;
        let (start, end) = self.whole_clusters(offset, offset + length);
        if start < end {
            for (start, piece) in self.geometry().by_table(start, end - start) {
                self.zero_step(start, piece, ZeroMode::Unmap)?;
                self.flush_crowded()?;
            }
        }
        self.settle(durability, false)
    }

    /// The whole clusters of `[offset, end)`; the end of the disk counts as the end of a cluster.
    fn whole_clusters(&self, offset: u64, end: u64) -> (u64, u64) {
        let geometry = self.geometry();
        let start = geometry.round_up(offset);
        let stop = if end == self.size() { end } else { geometry.start_of(geometry.cluster_of(end)) };
        (start, stop)
    }

    /// One piece within one L2 table.
    fn zero_step(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        let geometry = self.geometry();
        let end = offset + length;
        let (first, last) = (geometry.cluster_of(offset), geometry.cluster_of(end - 1));
        let _exclusive = if mutant!("zero_shares") {
            self.clusters.shared(first, last)
        } else {
            self.clusters.exclusive(first, last)
        };
        let (start, stop) = self.whole_clusters(offset, end);
        if start >= stop {
            return self.zero_part(offset, end);
        }
        self.zero_part(offset, start)?;
        self.zero_clusters(geometry.cluster_of(start), geometry.cluster_of(stop - 1), mode)?;
        self.zero_part(stop, end)
    }

    /// Part of a cluster: written as data, unless it reads as zeroes. The check and the write it justifies happen under
    /// the same exclusive claim.
    pub(super) fn zero_part(&self, from: u64, to: u64) -> Result<()> {
        if from >= to || self.reads_zero(from, to - from)? {
            return Ok(());
        }
        // At most two parts of a cluster, or one: bounded by twice the cluster size.
        self.write_mapping(from, &self.filling(vec![0; (to - from) as usize]))
    }

    fn zero_clusters(&self, first: u64, last: u64, mode: ZeroMode) -> Result<()> {
        let geometry = self.geometry();
        let l1_index = geometry.l1_index(first);
        if !self.tables.has(l1_index) {
            let end = geometry.start_of(last + 1).min(self.size());
            if self.below_reads_zero(geometry.start_of(first), end - geometry.start_of(first))? {
                return Ok(());
            }
            self.make_tables(first, last)?;
        }
        for cluster in first..=last {
            let entry = match self.tables.view(&*self.storage, l1_index)? {
                Some(table) => table.entry(cluster)?,
                None => L2Entry::Unallocated,
            };
            if let Some(raw) = self.zeroed(cluster, entry, mode)? {
                if mutant!("discarded_reused")
                    && let (L2Entry::Data { host, .. }, ZeroMode::Unmap) = (entry, mode)
                {
                    self.allocator.reuse(host);
                }
                self.publish(cluster, raw)?;
            }
        }
        Ok(())
    }

    /// The entry that makes a cluster read as zeroes, `None` when it does already.
    fn zeroed(&self, cluster: u64, entry: L2Entry, mode: ZeroMode) -> Result<Option<u64>> {
        // Without a layer below, an absent entry says the same as a zero entry.
        let plain =
            if self.backing.is_some() && !mutant!("zero_as_absent") { entry::ZERO_PLAIN } else { entry::UNALLOCATED };
        Ok(match (entry, mode) {
            (L2Entry::Zero { host: None, .. }, _) | (L2Entry::Zero { .. }, ZeroMode::Keep) => None,
            (L2Entry::Data { host, copied: true }, ZeroMode::Keep) => Some(entry::zero_kept(host)),
            (L2Entry::Unallocated, _) => {
                let start = self.geometry().start_of(cluster);
                let length = self.cluster_size().min(self.size() - start);
                (!self.below_reads_zero(start, length)?).then_some(entry::ZERO_PLAIN)
            }
            // Images with subclusters are never open for writing.
            (L2Entry::Zero { .. } | L2Entry::Data { .. } | L2Entry::Compressed { .. }, _)
            | (L2Entry::Subclusters { .. }, _) => Some(plain),
        })
    }
}
