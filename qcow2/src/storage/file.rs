//! A real file, through the page cache, and around it for large transfers.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::direct::Direct;
use super::ring::{self, Ring};
use super::{Mode, NoDirect, NoRing, Reservation, Storage, WriteQueue};
use crate::geometry::SECTOR;

/// Linux reads ahead so many bytes, unless told otherwise, and of a longer advice it takes no more.
const READ_AHEAD: u64 = 128 << 10;

/// What went through the page cache is sent on to the disk whenever so much has come in writes of at least so many bytes:
/// otherwise the disk rests until the next sync, which then takes as long as all of them. Smaller writes stay, to be joined. Not for
/// each write: the advice may have the kernel disturb every processor. (`docs/performance.md`, "Early writeback".)
const WRITE_BACK_BYTES: u64 = 8 << 20;
const WRITE_BACK_MIN: usize = 64 << 10;

/// One open file description for the whole session: locks, cached writes and syncs all go through it, because the kernel
/// reports a failed writeback to each description once. Direct transfers report their own failures.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// Of a file that is only read, from the first large read on: a chain of images that are hardly read has one description
    /// each.
    direct: OnceLock<Result<Arc<Direct>, NoDirect>>,
    ring: Result<(), NoRing>,
    block_size: u64,
    /// Bytes of large writes in the page cache that were not sent on.
    cached: AtomicU64,
}

impl FileStorage {
    /// Uses a file that is open for what will be asked of it, through the page cache. Locks are the caller's business,
    /// until the end: they are given up with the storage.
    pub fn new(file: File) -> Self {
        Self::with(file, Err(NoDirect::NotAsked).into(), Err(NoRing::NotAsked))
    }

    /// As [`FileStorage::new`], for a file that is open for writing: writes, and large reads of what the page cache does not
    /// have, go around it where the file system takes part, in memory that begins at a page.
    pub fn with_direct_access(file: File) -> Self {
        let ring = ring::probe();
        let direct = Direct::begin(&file).map(Arc::new);
        Self::with(file, direct.into(), ring)
    }

    /// As [`FileStorage::new`], for a file that is only read: large reads of what the page cache does not have go around it,
    /// as in [`FileStorage::with_direct_access`].
    pub fn with_direct_reads(file: File) -> Self {
        Self::with(file, OnceLock::new(), Err(NoRing::NotAsked))
    }

    fn with(file: File, direct: OnceLock<Result<Arc<Direct>, NoDirect>>, ring: Result<(), NoRing>) -> Self {
        // Settled here: a way that is found later is for reads only.
        let block_size = match direct.get() {
            Some(Ok(direct)) => direct.page(),
            Some(Err(_)) | None => SECTOR,
        };
        Self { file, direct, ring, block_size, cached: AtomicU64::new(0) }
    }

    /// How payload is written, and why not in a faster way.
    pub fn mode(&self) -> Mode {
        let direct = self.direct().and_then(|direct| direct.alignment());
        Mode { direct, ring: self.ring }
    }

    /// Whether large transfers go around the page cache.
    pub fn has_direct_access(&self) -> bool {
        self.direct().is_ok()
    }

    fn direct(&self) -> Result<&Arc<Direct>, NoDirect> {
        let direct = self.direct.get_or_init(|| Direct::begin(&self.file).map(Arc::new));
        direct.as_ref().map_err(|why| *why)
    }

    /// The way around the page cache, for a read that is large enough for it.
    fn direct_for(&self, offset: u64, buffer: &[u8]) -> Option<&Direct> {
        let is_large = buffer.len() >= Direct::READ_BYTES_MIN;
        let direct = if is_large { self.direct().ok() } else { None };
        direct.map(|direct| &**direct).filter(|direct| direct.takes_read(offset, buffer))
    }

    /// Reads at least a byte, if there is one.
    fn read_some(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(direct) = self.direct_for(offset, buffer) {
            if self.read_cached(offset, buffer) {
                return Ok(buffer.len());
            }
            match direct.file.read_at(buffer, offset) {
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => direct.refuse(),
                result => return result,
            }
        }
        self.file.read_at(buffer, offset)
    }

    fn write_back_early(&self, written: u64) {
        if self.cached.fetch_add(written, Ordering::Relaxed) + written >= WRITE_BACK_BYTES {
            self.cached.store(0, Ordering::Relaxed);
            // Only a hint: a failed writeback is told by the next sync. What is clean is dropped, too.
            let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        }
    }

    fn write_with(&self, mut offset: u64, mut slices: &mut [IoSlice<'_>], flags: ReadWriteFlags) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0); // drops leading empty slices
        while !slices.is_empty() {
            // The kernel takes at most 1024 slices in one call.
            let batch = slices.get(..1024).unwrap_or(slices);
            let direct = self.direct().ok().filter(|direct| direct.takes_blocking(offset, batch));
            match rustix::io::pwritev2(direct.map_or(&self.file, |direct| &direct.file), batch, offset, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) if mutant!("short_write_ignored") => return Ok(()),
                Ok(written) => {
                    if direct.is_none() && flags.is_empty() && written >= WRITE_BACK_MIN {
                        self.write_back_early(written as u64);
                    }
                    offset += written as u64;
                    IoSlice::advance_slices(&mut slices, written);
                }
                Err(Errno::INTR) => {}
                Err(errno) => match direct {
                    Some(direct) if errno == Errno::INVAL => direct.refuse(),
                    _ => return Err(errno.into()),
                },
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
    fn read(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read_some(offset, buffer) {
                Ok(0) => {
                    buffer.fill(0);
                    return Ok(());
                }
                Ok(read) => {
                    offset += read as u64;
                    buffer = buffer.split_at_mut(read).1;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let direct = self.direct_for(offset, buffer);
        if direct.is_some_and(|direct| !direct.count_read()) {
            return false;
        }
        let length = buffer.len();
        // Short at the end of the file, or of what is cached. An error means waiting, or tells itself to whoever reads in earnest.
        let slices = &mut [IoSliceMut::new(buffer)];
        let read = rustix::io::preadv2(&self.file, slices, offset, ReadWriteFlags::NOWAIT);
        let is_whole = read.is_ok_and(|read| read == length);
        if let Some(direct) = direct.filter(|_| !is_whole) {
            direct.not_in_cache();
        }
        is_whole
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
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Reservation::Unsupported),
                Err(Errno::INTR) => continue,
                Err(errno) => Err(errno.into()),
            };
        }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, length) {
                Err(Errno::INTR) => {}
                punched => return Ok(punched?),
            }
        }
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

    fn prefetch(&self, offset: u64, length: u64) {
        if let Some(Ok(direct)) = self.direct.get() {
            direct.look_again();
        }
        let end = offset.saturating_add(length);
        let mut at = offset;
        while let Some(step) = NonZeroU64::new(end.saturating_sub(at).min(READ_AHEAD)) {
            if rustix::fs::fadvise(&self.file, at, Some(step), Advice::WillNeed).is_err() {
                return;
            }
            at += step.get();
        }
    }

    fn is_hole(&self, offset: u64, length: u64) -> bool {
        // Moves the cursor of the description, which nobody uses.
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset.saturating_add(length),
            Err(errno) => errno == Errno::NXIO,
        }
    }

    fn queue(self: Arc<Self>) -> Option<Box<dyn WriteQueue>> {
        let direct = self.direct().ok().filter(|_| self.ring.is_ok())?.clone();
        Some(Box::new(Ring::new(self, direct).ok()?))
    }

    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn unlock(&self) {
        crate::lock::unlock(&self.file);
    }
}
