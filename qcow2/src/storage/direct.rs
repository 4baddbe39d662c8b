//! The way around the page cache (`O_DIRECT`) for large writes: nothing is copied, no page of the cache is touched for the
//! first time, nothing is left for a sync to write back. Small writes gain from the cache, which merges them, and reads find
//! what was written a moment ago; both stay there.
//!
//! The kernel keeps the two ways coherent as long as nobody writes one page by both at once: before a direct write it writes
//! back and afterwards it drops what the cache holds of those pages. That nobody does is the promise of
//! [`super::Storage::block_size`], which is a page here.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{AtFlags, OFlags, StatxFlags, statx};

use super::{Alignment, NoDirect, Way};
use crate::sync::atomic::{AtomicBool, Ordering};

/// A second open file description of an image file, for direct writes only.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) file: File,
    alignment: Alignment,
    page: u64,
    /// The smallest write that is worth it.
    least: usize,
    /// A direct write was refused after all: the page cache serves from then on.
    is_refused: AtomicBool,
}

impl Direct {
    /// Not where the file system takes no part, or does not say what it demands (before Linux 6.1, and some network file
    /// systems, of whose coherence nothing is known).
    pub(super) fn begin(file: &File, has_queue: bool) -> Result<Self, NoDirect> {
        let facts = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).map_err(|_| NoDirect::NotAnnounced)?;
        if facts.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
            return Err(NoDirect::NotAnnounced);
        }
        let (block, memory) = (u64::from(facts.stx_dio_offset_align), facts.stx_dio_mem_align as usize);
        let alignment = Alignment { block, memory };
        // Zeroes mean that there is none.
        if !block.is_power_of_two() || !memory.is_power_of_two() {
            return Err(NoDirect::None);
        }
        let page = rustix::param::page_size();
        if block > page as u64 || memory > page {
            return Err(NoDirect::Coarse(alignment));
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = (OFlags::DIRECT | OFlags::CLOEXEC).bits() as i32;
        let least = if has_queue { 0 } else { Way::DIRECT_BYTES_MIN };
        let refused = |error: io::Error| NoDirect::Refused { errno: error.raw_os_error().unwrap_or(0) };
        let file = OpenOptions::new().write(true).custom_flags(flags).open(path).map_err(refused)?;
        Ok(Self { file, alignment, page: page as u64, least, is_refused: AtomicBool::new(false) })
    }

    /// What it demands, as long as no write was refused.
    pub(super) fn alignment(&self) -> Result<Alignment, NoDirect> {
        if self.is_refused.load(Ordering::Acquire) { Err(NoDirect::RefusedLater) } else { Ok(self.alignment) }
    }

    /// See [`super::Storage::block_size`].
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// Whether these slices are to be written this way, one behind the other.
    pub(super) fn takes(&self, offset: u64, slices: &[IoSlice<'_>]) -> bool {
        let Alignment { block, memory } = self.alignment;
        let fits = |slice: &IoSlice<'_>| {
            (slice.len() as u64).is_multiple_of(block) && slice.as_ptr().addr().is_multiple_of(memory)
        };
        offset.is_multiple_of(block)
            && slices.iter().map(|slice| slice.len()).sum::<usize>() >= self.least
            && slices.iter().all(fits)
            && !self.is_refused.load(Ordering::Acquire)
    }

    /// Leaves everything to the page cache from now on.
    pub(super) fn refuse(&self) {
        self.is_refused.store(true, Ordering::Release);
    }
}
