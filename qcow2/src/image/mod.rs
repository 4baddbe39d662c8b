//! One open image: the state that its operations share, and the life of a session from the first change to the close.
//!
//! Operations are blocking and take `&self`; any number of threads may run them at once. Each runs to its end, so there is
//! no half-done operation to cancel: an asynchronous caller that goes away ([`crate::AsyncImage`]) changes nothing.
//!
//! Lock order: `life` (shared by operations, exclusive for closing and growing), then room for payload, then one claim on
//! clusters, then the flush mutex, then the header's sector, then the mapping or the packing, then the allocator, the
//! write-behind or the state of the room. The mapping and what comes after it are never held across I/O on payload, nor is
//! the mapping across any I/O. The threads of the write-behind take no lock but its own and the room's, so whoever waits for
//! payload to arrive waits for the disk alone.

mod close;
mod compress;
mod flush;
mod grow;
mod identical;
mod map;
mod open;
mod prefetch;
mod read;
mod session;
mod write;
mod zero;

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::path::{Path, PathBuf};

use crate::allocate::Allocator;
use crate::backing::Layer;
use crate::cluster_lock::ClusterLocks;
use crate::compressed::{CompressionLevel, Inflated};
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::geometry::Geometry;
use crate::lock::Access;
use crate::packing::Packing;
use crate::poison::Poison;
use crate::room::Room;
use crate::storage::Storage;
use crate::sync::{Arc, Mutex, RwLock};
use crate::tables::Tables;
use crate::write_behind::WriteBehind;

pub use flush::Durability;
pub use identical::Identical;
pub use map::{Extent, ExtentKind};
pub use open::{Caching, OpenOptions};
pub(crate) use open::{read_header, refuse_read_only_features};
pub(crate) use read::Holes;
pub use zero::ZeroMode;

/// An open qcow2 image.
///
/// Dropping it without [`Image::close`] is what a crash would be: what was flushed is there, the dirty bit stays set, and
/// the close of the next session rebuilds the refcounts. The drop waits for writes that are under way, unless the image
/// was given to a [`crate::AsyncImage`].
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    access: Access,
    /// As of the opening; virtual size and L1 may have grown since (`Image::geometry`, `Image::current_header`).
    header: Header,
    /// Virtual size in bytes. Changed only by growing, which runs alone.
    size: AtomicU64,
    storage: Arc<dyn Storage>,
    backing: Option<Layer>,
    tables: Tables,
    allocator: Allocator,
    packing: Packing,
    compress: Option<CompressionLevel>,
    identical: Identical,
    /// Bytes of writes that were left out for it.
    identical_bytes: AtomicU64,
    clusters: ClusterLocks,
    inflated: Inflated,
    flush: Mutex<flush::FlushState>,
    /// Counts changes that are complete but not durable by themselves; a flush covers all up to a value of it.
    changes: AtomicU64,
    /// For payload until it is in the file.
    room: Arc<Room>,
    write_behind: WriteBehind,
    /// The first failure of a write or sync. Never cleared.
    poison: Arc<Poison>,
    session: session::Session,
    /// Held shared by every operation, exclusively by closing and growing.
    life: RwLock<()>,
    closed: AtomicBool,
}

impl Image {
    /// Virtual size in bytes; it may grow ([`Image::grow`]).
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub fn cluster_size(&self) -> u64 {
        self.geometry().cluster_size()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    /// Whether the image had not been closed when it was opened.
    pub fn is_dirty(&self) -> bool {
        self.header.is_dirty()
    }

    /// Where the image was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that were to be written, or zeroed as a part of a cluster, and were not stored because the image read the same
    /// ([`Identical::Skip`]), since it was opened.
    pub fn identical_bytes(&self) -> u64 {
        self.identical_bytes.load(Ordering::Relaxed)
    }

    /// The first failed write or sync, after which nothing is acknowledged any more.
    pub fn poison(&self) -> Option<&str> {
        self.poison.cause()
    }

    fn geometry(&self) -> Geometry {
        Geometry { size: self.size(), ..self.header.geometry }
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let end = if mutant!("range_wraps") { Some(offset.wrapping_add(length)) } else { offset.checked_add(length) };
        match end {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::OutOfRange { offset, length, size: self.size() }),
        }
    }

    pub(crate) fn poison_by_panic(&self) {
        self.poison.by_panic();
    }

    pub(crate) fn never_wait_when_dropped(&self) {
        self.write_behind.never_wait_when_dropped();
    }

    fn refuse_poisoned(&self) -> Result<()> {
        self.poison.refuse()
    }

    /// A change is complete; the next flush has something to do.
    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Writes metadata, in the calling thread; a failure poisons.
    fn store(&self, offset: u64, slices: &mut [std::io::IoSlice<'_>]) -> Result<()> {
        self.storage.write(offset, slices).map_err(|source| self.poison.by(Error::io("write", offset)(source)))
    }

    fn sync(&self) -> Result<()> {
        let again = |source| if mutant!("sync_retried") { self.storage.sync_data() } else { Err(source) };
        self.storage.sync_data().or_else(again).map_err(|source| self.poison.by(Error::io("fdatasync", 0)(source)))
    }
}
