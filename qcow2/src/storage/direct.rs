//! The way around the page cache (`O_DIRECT`) for payload, and for large reads of what it does not have: nothing is
//! copied, no page of the cache is touched for the first time, nothing is left for a sync to write back. Where each write keeps a
//! thread waiting, small ones gain from the cache, which merges them; small reads gain from what it reads ahead.
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
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// So many large reads in a row do not look into the page cache first, after one that looked in vain: a look at what is not
/// there makes the kernel read it, beside the read that then goes around. (A read that was tried without waiting before counts twice.)
const BLIND_READS: u32 = 128;

/// A second open file description of an image file, without the page cache.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) file: File,
    alignment: Alignment,
    page: u64,
    /// It was refused after all: the page cache serves from then on.
    is_refused: AtomicBool,
    /// Large reads that will not look into the page cache first.
    blind: AtomicU32,
}

impl Direct {
    /// The smallest read that goes around the page cache. (Measured cold, in GiB/s: 256 KiB by eight threads 0.8 to 1.9 through
    /// the cache and 1.7 to 2.3 around it, 1 MiB by one thread 0.6 and 1.6; 64 KiB by four threads 1.1 around it.)
    pub(super) const READ_BYTES_MIN: usize = 128 << 10;

    /// Not where the file system takes no part, or does not say what it demands (before Linux 6.1, and some network file
    /// systems, of whose coherence nothing is known).
    pub(super) fn begin(file: &File) -> Result<Self, NoDirect> {
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
        let refused = |error: io::Error| NoDirect::Refused { errno: error.raw_os_error().unwrap_or(0) };
        let is_writable = rustix::fs::fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::RDWR));
        let options = OpenOptions::new().read(true).write(is_writable).custom_flags(flags).open(path);
        let (is_refused, blind) = (AtomicBool::new(false), AtomicU32::new(0));
        Ok(Self { file: options.map_err(refused)?, alignment, page: page as u64, is_refused, blind })
    }

    /// What it demands, as long as nothing was refused.
    pub(super) fn alignment(&self) -> Result<Alignment, NoDirect> {
        if self.is_refused.load(Ordering::Acquire) { Err(NoDirect::RefusedLater) } else { Ok(self.alignment) }
    }

    /// See [`super::Storage::block_size`].
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// Whether these slices are worth a thread that waits until they are written this way, one behind the other.
    pub(super) fn takes_blocking(&self, offset: u64, slices: &[IoSlice<'_>]) -> bool {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        length >= Way::DIRECT_BYTES_MIN && self.takes(offset, slices)
    }

    /// Whether these slices can be written this way, one behind the other.
    pub(super) fn takes(&self, offset: u64, slices: &[IoSlice<'_>]) -> bool {
        let Alignment { block, memory } = self.alignment;
        let fits = |slice: &IoSlice<'_>| {
            (slice.len() as u64).is_multiple_of(block) && slice.as_ptr().addr().is_multiple_of(memory)
        };
        offset.is_multiple_of(block) && slices.iter().all(fits) && !self.is_refused.load(Ordering::Acquire)
    }

    /// Whether this is to be read this way, if the page cache does not have it.
    pub(super) fn takes_read(&self, offset: u64, buffer: &[u8]) -> bool {
        let Alignment { block, memory } = self.alignment;
        offset.is_multiple_of(block)
            && (buffer.len() as u64).is_multiple_of(block)
            && buffer.as_ptr().addr().is_multiple_of(memory)
            && !self.is_refused.load(Ordering::Acquire)
    }

    /// Counts a large read, or another try of the same; whether it should look into the page cache first.
    pub(super) fn count_read(&self) -> bool {
        // Of reads side by side each may count for the other: a look more or less.
        match self.blind.load(Ordering::Relaxed) {
            0 => true,
            left => {
                self.blind.store(left - 1, Ordering::Relaxed);
                false
            }
        }
    }

    /// A large read looked in vain.
    pub(super) fn not_in_cache(&self) {
        self.blind.store(BLIND_READS, Ordering::Relaxed);
    }

    /// The page cache is about to have something.
    pub(super) fn look_again(&self) {
        self.blind.store(0, Ordering::Relaxed);
    }

    /// Leaves everything to the page cache from now on.
    pub(super) fn refuse(&self) {
        self.is_refused.store(true, Ordering::Release);
    }
}
