//! The seam below the engine: positional access to one image file, whatever holds its bytes.
//!
//! No cursor, no seek. A write is durable after a later successful sync that began after the write ended, or at once with
//! [`Storage::write_durable`].

mod direct;
mod file;
mod memory;
mod mode;
mod ring;

use std::fmt::Debug;
use std::io::{self, IoSlice};
use std::sync::Arc;

pub use file::FileStorage;
pub use memory::MemoryStorage;
pub use mode::{Alignment, Mode, NoDirect, NoRing, Way};

use crate::geometry::SECTOR;
pub use crate::payload::Payload;

/// What became of a request to reserve space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// The range has space and reads as zeroes where nothing was written; the file reaches at least to its end.
    Done,
    /// The file system cannot reserve; a write may meet a full disk.
    Unsupported,
}

/// Positional access to an image file by any number of threads.
///
/// Transfers are whole: an implementation goes on after short transfers and interruptions, and an error means that an
/// unknown part may have been transferred.
pub trait Storage: Send + Sync + Debug {
    /// Fills the buffer; bytes past the end of the file read as zeroes.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// As [`Storage::read`], if all of it is in memory; otherwise `false`, and what the buffer holds is arbitrary.
    fn read_cached(&self, _offset: u64, _buffer: &mut [u8]) -> bool {
        false
    }

    /// Writes the slices one behind the other, extending the file where needed.
    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()>;

    /// As [`Storage::write`], durable on return; covers these bytes only, not earlier writes.
    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()>;

    /// Makes all writes that ended before this call durable, with the file's length.
    fn sync_data(&self) -> io::Result<()>;

    /// Length of the file in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Cuts or extends the file; new bytes read as zeroes.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Reserves space for a range that nothing was ever written to.
    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation>;

    /// Gives the space of a range back to the file system where it can; the range then reads as zeroes.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// The first bytes of `[offset, end)` that may be something else than zeroes, as offset and length; `None` when all are
    /// known to be zeroes without reading them.
    ///
    /// Storage that knows no holes holds data everywhere.
    fn data_run(&self, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
        Ok((offset < end).then(|| (offset, end - offset)))
    }

    /// Drops cached pages, so that the next read shows what the disk holds.
    fn drop_cache(&self) -> io::Result<()>;

    /// The range will be read soon. A hint: what becomes of it is nobody's business, and storage may ignore it.
    fn prefetch(&self, _offset: u64, _length: u64) {}

    /// Bytes, a power of two, that the storage reads and writes at once: two writes that share such a block must not run
    /// at once.
    fn block_size(&self) -> u64 {
        SECTOR
    }

    /// Whether a range is known to hold no data, and to read as zeroes, without reading it. `false` is always right.
    fn is_hole(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    /// A way to keep many writes under way from one thread, which makes it itself; `None`: each takes a thread of its own.
    fn queue(self: Arc<Self>) -> Option<Box<dyn WriteQueue>> {
        None
    }

    /// Releases the locks held on the file.
    ///
    /// Without effect for storage that knows no locks.
    fn unlock(&self) {}
}

/// Writes under way, begun and ended apart and in any order. None of them overlap.
///
/// Dropping it waits for them.
pub trait WriteQueue: Send {
    /// Begins to write a payload at `offset` of the file, which names it until it has ended. Returns whether something has to
    /// end before more can be begun.
    fn begin(&mut self, offset: u64, payload: Payload) -> bool;

    /// Waits until some of what is under way has ended, and tells which, each as [`Storage::write`] would.
    fn wait(&mut self, ended: &mut Vec<(u64, io::Result<()>)>);
}
