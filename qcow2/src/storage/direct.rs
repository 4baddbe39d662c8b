//! Access around the page cache (`O_DIRECT`): what it demands of offsets, lengths and memory, found out per file, and the
//! detour for transfers that do not meet it.
//!
//! Large transfers gain: nothing is copied, no page of the cache is touched for the first time, nothing has to be written
//! back later. Small ones lose what the cache would have merged.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

use crate::buffer::{Buffer, BufferPool};

/// Assumed where the kernel does not say (before 6.1, some file systems): right for all common disks.
const BLOCK: u64 = 4096;
/// More than any device asks for; what claims to need more is not used directly.
const BLOCK_MAX: u64 = 64 << 10;
/// Memory kept for detours.
const KEEP_BYTES: usize = 4 << 20;

/// What direct access to one file demands.
#[derive(Debug)]
pub(super) struct Direct {
    /// Offsets and lengths are multiples of it; a power of two.
    pub(super) block_size: u64,
    /// Memory begins at multiples of it; a power of two, at most a page.
    memory: usize,
    detours: BufferPool,
}

impl Direct {
    /// Switches an open file to direct access, if its file system takes part and a trial read succeeds. Otherwise the file
    /// is as before.
    pub(super) fn begin(file: &File) -> Option<Self> {
        let facts = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let said = facts.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        let (block_size, memory) = match (facts.stx_dio_offset_align, facts.stx_dio_mem_align) {
            // Said, and said to be impossible.
            (0, _) if said => return None,
            (block, memory) if said => (u64::from(block), memory as usize),
            _ => (BLOCK, BLOCK as usize),
        };
        let is_usable = block_size.is_power_of_two() && memory.is_power_of_two();
        if !is_usable || !(512..=BLOCK_MAX).contains(&block_size) || memory > BLOCK as usize {
            return None;
        }
        let flags = fcntl_getfl(file).ok()?;
        fcntl_setfl(file, flags | OFlags::DIRECT).ok()?;
        let direct = Self { block_size, memory, detours: BufferPool::new(KEEP_BYTES) };
        let mut trial = direct.detours.lend(block_size as usize);
        if file.read_at(trial.as_mut(), 0).is_err() && end(file).is_ok() {
            return None;
        }
        Some(direct)
    }

    /// Whether a read into this memory can be done as it is.
    pub(super) fn fits(&self, offset: u64, memory: &[u8]) -> bool {
        offset.is_multiple_of(self.block_size)
            && (memory.len() as u64).is_multiple_of(self.block_size)
            && memory.as_ptr().addr().is_multiple_of(self.memory)
    }

    /// Whether these slices can be written one behind the other as they are.
    pub(super) fn all_fit(&self, offset: u64, slices: &[IoSlice<'_>]) -> bool {
        slices.iter().all(|slice| self.fits(offset, slice))
    }

    /// The whole blocks around a range: offset, and memory for them.
    pub(super) fn around(&self, offset: u64, length: u64) -> (u64, Buffer) {
        let start = offset / self.block_size * self.block_size;
        let end = (offset + length).next_multiple_of(self.block_size);
        (start, self.detours.lend((end - start) as usize))
    }

    /// Whole blocks that hold the slices, and around them what is in the file, read by `read`.
    ///
    /// Nobody else may write to these blocks meanwhile ([`super::Storage::block_size`]).
    pub(super) fn gather(
        &self,
        offset: u64,
        slices: &[IoSlice<'_>],
        read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<(u64, Buffer)> {
        let length = slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        let (start, mut blocks) = self.around(offset, length);
        let block = self.block_size as usize;
        let bytes = blocks.as_mut();
        let (head, end) = ((offset - start) as usize, (offset - start + length) as usize);
        let last = bytes.len().saturating_sub(block);
        if head > 0 {
            read(start, &mut bytes[..block])?;
        }
        if end < bytes.len() && (last > 0 || head == 0) {
            read(start + last as u64, &mut bytes[last..])?;
        }
        let mut at = head;
        for slice in slices {
            bytes[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        Ok((start, blocks))
    }
}

/// Back to the page cache, for a file that turns out not to take direct access after all.
pub(super) fn end(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::DIRECT)?)
}
