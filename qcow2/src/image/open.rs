//! Opening: lock first, believe nothing, and walk the whole tree before anything may be written.

use crate::sync::atomic::{AtomicBool, AtomicU64};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Image;
use super::flush::FlushState;
use super::identical::Identical;
use super::session::Session;
use crate::allocate::Allocator;
use crate::backing::{Chain, Layer};
use crate::cluster_lock::ClusterLocks;
use crate::compressed::{CompressionLevel, Inflated};
use crate::error::{Error, Result};
use crate::finish::HeaderSector;
use crate::format::entry::decode_l1;
use crate::format::header::{self, Backing, CORRUPT, Header};
use crate::geometry::{ENTRY, SECTOR};
use crate::l1::L1;
use crate::lock::{self, Access};
use crate::packing::Packing;
use crate::poison::Poison;
use crate::refcounts::{self, RefcountTable};
use crate::references::{self, each_entry};
use crate::regular_file;
use crate::room::Room;
use crate::storage::{FileStorage, Storage};
use crate::sync::{Arc, Mutex, RwLock};
use crate::tables::Tables;
use crate::write_behind::WriteBehind;

/// What an image far down a chain has for its L2 tables.
const CACHE_BYTES_MIN: usize = 1 << 20;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What will be done with it; decides the locks.
    pub access: Access,
    /// The folder that backing files must be in, or beneath; `None`: the image's own folder.
    pub backing_root: Option<PathBuf>,
    /// Memory for L2 tables in bytes; each layer below gets half of what the one above has. When half of it holds changes, the engine flushes by
    /// itself; one table of 64 KiB maps 512 MiB of disk.
    pub cache_bytes: usize,
    /// Compresses written clusters where that saves space: whole clusters that have none of their own yet, as in a full
    /// backup. Later writes to such a cluster make it an ordinary one. Without effect in images with clusters of 512 bytes,
    /// where nothing can be saved, or with refcounts of less than 16 bits, which cannot count the clusters that share a
    /// host cluster.
    pub compress: Option<CompressionLevel>,
    /// What becomes of written clusters that read the same already.
    pub identical: Identical,
    /// The way between the image, with all below it, and its files.
    pub caching: Caching,
}

/// Whether payload goes through the page cache of the system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Caching {
    /// Whatever is faster: writes, and large reads of what it does not have, go around it (`O_DIRECT`), where file system and
    /// cluster size allow it.
    #[default]
    Auto,
    /// All through it, for file systems whose direct access is not to be trusted.
    PageCache,
}

impl Caching {
    /// Uses a file that is only read.
    pub(crate) fn for_reading(self, file: File) -> FileStorage {
        match self {
            Self::Auto => FileStorage::with_direct_reads(file),
            Self::PageCache => FileStorage::new(file),
        }
    }
}

impl OpenOptions {
    /// Opens with 64 MiB of table cache, backing files in the image's own folder; everything written is stored, as it is.
    pub fn new(access: Access) -> Self {
        let (compress, identical, caching) = (None, Identical::default(), Caching::default());
        Self { access, backing_root: None, cache_bytes: 64 << 20, compress, identical, caching }
    }
}

impl Image {
    /// Opens an image and the chain below it, and locks them as QEMU does.
    ///
    /// For writing, every table is read and checked first: an image whose tree breaks a rule is refused, one that was not
    /// closed (dirty) is accepted, and its refcounts are rebuilt when it is closed.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let file = regular_file::open(path, options.access)?;
        let own_folder = || path.parent().unwrap_or(Path::new("")).to_owned();
        let root = options.backing_root.clone().unwrap_or_else(own_folder);
        let mut chain = Chain { root, caching: options.caching, seen: Vec::new() };
        chain.enter(path, &file)?;
        lock::lock(&file, path, options.access)?;
        let storage = match (options.caching, options.access) {
            (caching, Access::ReadOnly) => caching.for_reading(file),
            (Caching::Auto, Access::ReadWrite) if has_whole_pages(&file) => FileStorage::with_direct_access(file),
            (_, Access::ReadWrite) => FileStorage::new(file),
        };
        Ok(Self::open_file(storage, path, options.access, chain, options.cache_bytes)?.writing_as(options))
    }

    /// Opens a file that is locked already.
    pub(crate) fn open_file(
        storage: FileStorage,
        path: &Path,
        access: Access,
        chain: Chain,
        cache_bytes: usize,
    ) -> Result<Self> {
        // Half for each layer further down, so that the memory of a long chain has a bound.
        let below = |backing: &Backing| Layer::open(backing, path, chain, (cache_bytes / 2).max(CACHE_BYTES_MIN));
        Self::open_layers(Arc::new(storage), path, access, below, cache_bytes)
    }

    /// Opens an image on any storage. What lies below is given by the caller, for an image that names a backing file.
    pub fn open_on(
        storage: Arc<dyn Storage>,
        access: Access,
        below: Option<Layer>,
        cache_bytes: usize,
    ) -> Result<Self> {
        let given = |backing: &Backing| {
            below.ok_or_else(|| Error::Backing { name: backing.name.clone(), reason: "was not given".into() })
        };
        Self::open_layers(storage, Path::new(""), access, given, cache_bytes)
    }

    /// As [`Image::open_on`], with all options; `backing_root` has no meaning here.
    pub fn open_on_with(storage: Arc<dyn Storage>, below: Option<Layer>, options: &OpenOptions) -> Result<Self> {
        Ok(Self::open_on(storage, options.access, below, options.cache_bytes)?.writing_as(options))
    }

    fn writing_as(mut self, options: &OpenOptions) -> Self {
        self.compress = options.compress;
        self.identical = options.identical;
        self
    }

    fn open_layers(
        storage: Arc<dyn Storage>,
        path: &Path,
        access: Access,
        below: impl FnOnce(&Backing) -> Result<Layer>,
        cache_bytes: usize,
    ) -> Result<Self> {
        let (header, sector) = read_header(&*storage)?;
        let mut blocks = 0;
        if access == Access::ReadWrite {
            refuse_read_only_features(&header)?;
            if header.incompatible & CORRUPT != 0 {
                return Err(Error::unsupported("writing to an image that is marked corrupt; repair it first"));
            }
            if header.is_dirty() {
                // After a failed writeback the page cache may show what the disk never got.
                storage.sync_data().map_err(Error::io("fdatasync", 0))?;
                if !mutant!("cache_trusted") {
                    storage.drop_cache().map_err(Error::io("fadvise", 0))?;
                }
            }
            blocks = validate(&*storage, &header)?;
        }
        let l1 = read_l1(&*storage, &header)?;
        let backing = header.backing.as_ref().map(below).transpose()?;
        let length = storage.length().map_err(Error::io("fstat", 0))?;
        let geometry = header.geometry;
        let (poison, room) = (Arc::new(Poison::default()), Arc::new(Room::default()));
        let allocator = Allocator::new(geometry, header.refcount_width, geometry.round_up(length), blocks);
        if access == Access::ReadWrite && !allocator.can_finish() {
            return Err(Error::unsupported("writing to a file so long that its refcount table would pass 8 MiB"));
        }
        Ok(Self {
            path: path.to_owned(),
            access,
            backing,
            tables: Tables::new(&header, l1.clone(), cache_bytes),
            allocator,
            packing: Packing::default(),
            compress: None,
            identical: Identical::Write,
            identical_bytes: AtomicU64::new(0),
            clusters: ClusterLocks::default(),
            inflated: Inflated::default(),
            flush: Mutex::new(FlushState::new(header.l1_offset, l1)),
            changes: AtomicU64::new(0),
            write_behind: WriteBehind::new(storage.clone(), poison.clone(), room.clone()),
            room,
            poison,
            session: Session::new(sector),
            life: RwLock::new(()),
            closed: AtomicBool::new(false),
            size: AtomicU64::new(geometry.size),
            header,
            storage,
        })
    }
}

/// Whether each cluster has its pages for itself, so that payload and metadata never meet in one.
fn has_whole_pages(file: &File) -> bool {
    let mut start = [0; 24];
    // Whatever is wrong with the header is said when it is decoded.
    file.read_exact_at(&mut start, 0).is_ok()
        && header::cluster_size(&start).is_ok_and(|size| size >= rustix::param::page_size() as u64)
}

/// The decoded header and the first sector of the file.
pub(crate) fn read_header(storage: &dyn Storage) -> Result<(Header, HeaderSector)> {
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    let mut sector = [0; SECTOR as usize];
    storage.read(0, &mut sector).map_err(Error::io("read", 0))?;
    let cluster_size = header::cluster_size(&sector)?;
    let mut bytes = vec![0; cluster_size.min(length) as usize];
    storage.read(0, &mut bytes).map_err(Error::io("read", 0))?;
    Ok((Header::decode(&bytes, length)?, sector))
}

/// What section "Features" leaves to readers only.
pub(crate) fn refuse_read_only_features(header: &Header) -> Result<()> {
    if header.version < 3 {
        return Err(Error::unsupported("writing to version 2 images; convert to version 3 (compat=1.1) first"));
    }
    if header.geometry.extended {
        return Err(Error::unsupported("writing to an image with extended L2 entries (subclusters)"));
    }
    if header.snapshots > 0 {
        return Err(Error::unsupported("writing to an image with internal snapshots"));
    }
    Ok(())
}

/// Walks the whole tree; the first broken rule forbids writing. Returns how many refcount blocks it needs.
fn validate(storage: &dyn Storage, header: &Header) -> Result<u64> {
    // Of a dirty image the refcount structures mean nothing; closing makes them anew.
    let table = if header.is_dirty() { None } else { Some(RefcountTable::load(storage, header)?) };
    let found = references::count(storage, header, table.as_ref())?;
    found.faults.refuse()?;
    // What the close could not write down must not be begun.
    refcounts::refuse_too_many(header.refcount_width, &found.counts)?;
    Ok(found.counts.groups(header.refcount_width.entries(header.geometry.cluster_size())).len() as u64)
}

fn read_l1(storage: &dyn Storage, header: &Header) -> Result<L1> {
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    let entries = u64::from(header.l1_entries);
    L1::load(entries as usize, |table| {
        each_entry(storage, header.l1_offset, entries, |at, raw| {
            let Some((host, _)) = decode_l1(raw, header.geometry, at)? else { return Ok(()) };
            if host >= length || header.is_structure(host) {
                let rule = "the table must be inside the file, and not in one of its other structures";
                return Err(Error::corrupt("L1 entry", at, raw, rule));
            }
            table.set(((at - header.l1_offset) / ENTRY) as usize, host);
            Ok(())
        })
    })
}
