//! A real file, through the page cache or around it.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::ReadWriteFlags;

use super::direct::{self, Direct};
use super::{Reservation, Storage};
use crate::geometry::SECTOR;
use crate::sync::atomic::{AtomicBool, Ordering};

/// One open file description for the whole session: locks, writes and syncs all go through it, because the kernel
/// reports a failed writeback to each description once.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    direct: Option<Direct>,
    /// A direct write was refused: the page cache serves from then on.
    is_refused: AtomicBool,
}

impl FileStorage {
    /// Uses a file that is open for what will be asked of it, through the page cache. Locks are the caller's business,
    /// until the end: they are given up with the storage.
    pub fn new(file: File) -> Self {
        Self { file, direct: None, is_refused: AtomicBool::new(false) }
    }

    /// As [`FileStorage::new`], around the page cache where the file system takes part. What does not begin and end at the
    /// blocks of the device, or does not lie so in memory, makes a detour through aligned memory; a write that ends inside
    /// a block extends the file to the end of that block.
    pub fn direct(file: File) -> Self {
        let direct = Direct::begin(&file);
        Self { file, direct, is_refused: AtomicBool::new(false) }
    }

    /// Whether transfers go around the page cache.
    pub fn is_direct(&self) -> bool {
        self.active().is_some()
    }

    fn active(&self) -> Option<&Direct> {
        self.direct.as_ref().filter(|_| !self.is_refused.load(Ordering::Acquire))
    }

    fn write_with(&self, mut offset: u64, mut slices: &mut [IoSlice<'_>], flags: ReadWriteFlags) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0); // drops leading empty slices
        while !slices.is_empty() {
            if let Some(direct) = self.active().filter(|direct| !direct.all_fit(offset, slices)) {
                let (start, blocks) = direct.gather(offset, slices, |at, block| self.read(at, block))?;
                return self.write_with(start, &mut [IoSlice::new(blocks.as_ref())], flags);
            }
            // The kernel takes at most 1024 slices in one call.
            let batch = slices.get(..1024).unwrap_or(slices);
            match rustix::io::pwritev2(&self.file, batch, offset, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) if mutant!("short_write_ignored") => return Ok(()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut slices, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                // Some network file systems say only now that they take no part.
                Err(rustix::io::Errno::INVAL) if self.is_direct() => {
                    direct::end(&self.file)?;
                    self.is_refused.store(true, Ordering::Release);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Whole blocks into memory that fits, or anything through the page cache.
    fn read_blocks(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    return Ok(());
                }
                Ok(read) => {
                    offset += read as u64;
                    buffer = buffer.split_at_mut(read).1;
                    if self.active().is_some_and(|direct| !offset.is_multiple_of(direct.block_size)) {
                        // The file ends inside a block.
                        buffer.fill(0);
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for FileStorage {
    /// Closing the file would do it, unless another thread is starting a process just now: the child holds a copy of the
    /// descriptor, and with it the locks, until it runs its program.
    fn drop(&mut self) {
        crate::lock::unlock(&self.file);
    }
}

impl Storage for FileStorage {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.active().filter(|direct| !direct.fits(offset, buffer)) {
            None => self.read_blocks(offset, buffer),
            Some(direct) => {
                let (start, mut blocks) = direct.around(offset, buffer.len() as u64);
                self.read_blocks(start, blocks.as_mut())?;
                let skipped = (offset - start) as usize;
                buffer.copy_from_slice(&blocks.as_ref()[skipped..skipped + buffer.len()]);
                Ok(())
            }
        }
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.write_with(offset, slices, ReadWriteFlags::empty())
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        match self.write_with(offset, slices, ReadWriteFlags::DSYNC) {
            // File systems that cannot do it say so before they transfer anything.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.write_with(offset, slices, ReadWriteFlags::empty())?;
                self.file.sync_data()
            }
            result => result,
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        loop {
            return match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, length) {
                Ok(()) => Ok(Reservation::Done),
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(Reservation::Unsupported),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => Err(errno.into()),
            };
        }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, length)?)
    }

    fn data_run(&self, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
        use rustix::io::Errno;
        if offset >= end {
            return Ok(None);
        }
        // Moves the cursor of the file, which nothing here uses.
        let seek = |to| loop {
            match rustix::fs::seek(&self.file, to) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        };
        let start = match seek(SeekFrom::Data(offset)) {
            Ok(start) => start.max(offset),
            // Nothing but holes up to the end of the file.
            Err(Errno::NXIO) => return Ok(None),
            // A file system that does not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Some((offset, end - offset))),
            Err(errno) => return Err(errno.into()),
        };
        if start >= end {
            return Ok(None);
        }
        let stop = match seek(SeekFrom::Hole(start)) {
            Ok(stop) if stop > start => stop.min(end),
            // Cut short meanwhile, or not known: reading tells.
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => end,
            Err(errno) => return Err(errno.into()),
        };
        Ok(Some((start, stop - start)))
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    fn is_hole(&self, offset: u64, length: u64) -> bool {
        // Moves the cursor of the description, which nobody uses.
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset.saturating_add(length),
            Err(errno) => errno == rustix::io::Errno::NXIO,
        }
    }

    fn block_size(&self) -> u64 {
        self.direct.as_ref().map_or(SECTOR, |direct| direct.block_size)
    }

    fn unlock(&self) {
        crate::lock::unlock(&self.file);
    }
}
