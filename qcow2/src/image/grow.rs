//! Growing the virtual disk: what the new range would reveal is hidden first, then one sector of the header tells the new
//! size. Only the top of a chain grows; what lies below is open read-only.

use std::io::IoSlice;

use super::Image;
use crate::backing::Layer;
use crate::create::check_size;
use crate::error::{Error, Result};
use crate::finish::{put32, put64};
use crate::format::entry::{self, L2Entry};
use crate::format::header::{Header, field};
use crate::geometry::{ENTRY, Geometry};
use crate::sync::atomic::Ordering;
use crate::sync::lock;

impl Image {
    /// Makes the disk larger; the new bytes read as zeroes, whatever lies below. `size` is in bytes, a multiple of 512, at
    /// most what [`crate::CreateOptions::size`] may be. The present size is accepted and changes nothing.
    ///
    /// Waits for running operations, and keeps new ones out until it is done.
    ///
    /// # Durability
    /// When this returns, the new size is on stable storage, and so is everything written before. A crash on the way
    /// leaves the old size or the new one. [`Error::WouldShrink`], [`Error::InvalidOption`], [`Error::NoSpace`] and errors
    /// of reading leave a healthy image of the old size; a failed write or sync poisons it.
    pub fn grow(&self, size: u64) -> Result<()> {
        let _operation = self.alone()?;
        let old = self.size();
        if size < old {
            return Err(Error::WouldShrink { size: old, wanted: size });
        }
        if size == old {
            return Ok(());
        }
        let geometry = Geometry { size, ..self.geometry() };
        check_size(geometry)?;
        self.session_alone()?;
        let l1_host = self.make_room_for_l1(geometry)?;
        self.hide(old, geometry)?;
        // Through B2: the payload of everything written so far, the zeroes, and the entries.
        self.changed();
        self.flush_changes()?;
        self.tell(geometry, l1_host)
    }

    /// Finds space for a larger L1 if the present one does not reach; in memory it reaches from now on.
    fn make_room_for_l1(&self, geometry: Geometry) -> Result<Option<u64>> {
        let needed = geometry.l1_entries() as usize;
        let mut state = lock(&self.flush);
        if needed <= state.l1_entries {
            return Ok(None);
        }
        let entries = needed.max(state.disk_l1.len());
        let clusters = geometry.round_up(entries as u64 * ENTRY) / geometry.cluster_size();
        let host = self.allocator.allocate(&*self.storage, clusters)?;
        state.disk_l1.resize(entries);
        self.tables.grow(entries);
        Ok(Some(host))
    }

    /// Makes `[old, size)` read as zeroes: neither the layers below may show there, nor what the file holds past its end.
    fn hide(&self, old: u64, geometry: Geometry) -> Result<()> {
        let size = geometry.size;
        let border = geometry.round_up(old).min(size);
        if !mutant!("grow_keeps_tail") {
            self.zero_part(old, border)?;
        }
        if mutant!("grow_reveals_backing") {
            return Ok(());
        }
        // Further out there is nothing: no layer below, no table.
        let below = self.backing.as_ref().map_or(0, Layer::size);
        let tables = u64::from(self.header.l1_entries).saturating_mul(geometry.l2_entries() * geometry.cluster_size());
        let reach = below.max(tables).min(size);
        if border >= reach {
            return Ok(());
        }
        for (start, length) in geometry.by_table(border, reach - border) {
            self.hide_in_table(start, length, size)?;
            self.flush_crowded()?;
        }
        Ok(())
    }

    /// One piece, from the start of a cluster on, within one L2 table.
    fn hide_in_table(&self, start: u64, length: u64, size: u64) -> Result<()> {
        let geometry = self.geometry();
        let (first, last) = (geometry.cluster_of(start), geometry.cluster_of(start + length - 1));
        let l1_index = geometry.l1_index(first);
        if !self.tables.has(l1_index) {
            if self.below_reads_zero(start, length)? {
                return Ok(());
            }
            self.make_tables(first, last)?;
        }
        for cluster in first..=last {
            let begin = geometry.start_of(cluster);
            let hidden = match self.entry(cluster)? {
                L2Entry::Zero { .. } => true,
                L2Entry::Unallocated => self.below_reads_zero(begin, geometry.cluster_size().min(size - begin))?,
                _ => false,
            };
            if !hidden {
                self.publish(cluster, entry::ZERO_PLAIN)?;
            }
        }
        Ok(())
    }

    /// The new L1, if there is one, and then, in one sector, size and L1.
    fn tell(&self, geometry: Geometry, l1_host: Option<u64>) -> Result<()> {
        let mut state = lock(&self.flush);
        let mut sector = lock(&self.session.sector);
        let mut grown = *sector;
        put64(&mut grown, field::SIZE, geometry.size);
        if let Some(host) = l1_host {
            let encode = |host: u64| if host == 0 { entry::UNALLOCATED } else { entry::encode_l1(host) };
            let hosts = (0..state.disk_l1.len()).map(|index| state.disk_l1.get(index));
            let bytes: Vec<u8> = hosts.flat_map(|host| encode(host).to_be_bytes()).collect();
            self.store(host, &mut [IoSlice::new(&bytes)])?;
            // Nothing may point at the new L1 before it is whole.
            if !mutant!("grow_no_l1_sync") {
                self.sync()?;
            }
            put64(&mut grown, field::L1_OFFSET, host);
            put32(&mut grown, field::L1_ENTRIES, state.disk_l1.len() as u32);
        }
        self.store(0, &mut [IoSlice::new(&grown[..])])?;
        self.sync()?;
        *sector = grown;
        if let Some(host) = l1_host {
            state.l1_offset = host;
            state.l1_entries = state.disk_l1.len();
        }
        self.size.store(geometry.size, Ordering::Release);
        Ok(())
    }

    /// The header with the size and the L1 of now.
    pub(super) fn current_header(&self) -> Header {
        let state = lock(&self.flush);
        Header {
            geometry: self.geometry(),
            l1_entries: state.l1_entries as u32,
            l1_offset: state.l1_offset,
            ..self.header.clone()
        }
    }
}
