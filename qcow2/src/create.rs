//! Making a new image: body first, header last, so that a crash in between leaves a file that no one takes for an image.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::allocate::HOST_OFFSET_END;
use crate::backing::refuse_dirty_base;
use crate::compressed::Compression;
use crate::error::{Error, Result};
use crate::format::header::{
    Backing, COMPRESSION_TYPE, Header, L1_BYTES_MAX, LAZY_REFCOUNTS, REFCOUNT_TABLE_BYTES_MAX,
};
use crate::format::refcount::Width;
use crate::geometry::{ENTRY, Geometry};
use crate::preallocate::{Layout, preallocate};
use crate::refcounts::{self, RefcountTable};
use crate::references::Counts;
use crate::storage::{FileStorage, Storage};

/// The shape of a new image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes: a multiple of 512, at most what an L1 table of 32 MiB can map (64 TiB and more from 16 KiB
    /// clusters on, 128 GiB with 512-byte clusters).
    pub size: u64,
    /// A power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Width of one refcount: 1, 2, 4, 8, 16, 32 or 64.
    pub refcount_bits: u32,
    /// What lies below, its format always said. Its file is opened when the image is, not now; but a base that is there and
    /// was not closed is refused.
    pub backing: Option<Backing>,
    /// How clusters are compressed, should any be.
    pub compression: Compression,
    /// Says that QEMU may postpone updates of the refcounts. This engine always does, and keeps the mark.
    pub lazy_refcounts: bool,
    /// What is made ready ahead of the first write; without a backing file only, whose data it would hide.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// 64 KiB clusters, 16-bit refcounts, deflate, no backing file, nothing preallocated: what QEMU's tools make by default.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: 65536,
            refcount_bits: 16,
            backing: None,
            compression: Compression::Deflate,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// What of an image is made ready when it is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preallocation {
    /// Nothing: clusters get space when they are written.
    Off,
    /// Every cluster has its place in the file, and all tables name it; the places themselves stay holes.
    Metadata,
    /// As `Metadata`, and the file system has reserved the space. An error where it cannot.
    Falloc,
    /// As `Metadata`, and zeroes are written to every place.
    Full,
}

/// Creates a version 3 image at a path that must not exist yet. The file can be read by its owner only (mode 0600).
///
/// # Durability
/// The image and its name are on stable storage when this returns. After a crash before that, the path is absent or not
/// an image. On an error the file is removed.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let header = plan(options)?;
    options.backing.as_ref().map(|backing| refuse_dirty_base(backing, path)).transpose()?;
    let file = create_file(path)?;
    let created = write_image(&FileStorage::new(file), header, options.preallocation).and_then(|()| sync_parent(path));
    if created.is_err() {
        // The error that is reported is the first one; a file that cannot even be removed is not an image either.
        let _ = std::fs::remove_file(path);
    }
    created
}

/// A new, empty file for reading and writing; one that exists, or a link in its place, is refused. It will hold a disk with all
/// that is on it: only its owner may read it, until somebody decides otherwise.
pub(crate) fn create_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path)
        .map_err(|source| Error::Open { path: path.to_owned(), source })
}

/// As [`create`], on storage that is empty so far. That a backing image was closed is the caller's business.
///
/// # Durability
/// The image is durable when this returns; its name is the caller's business.
pub fn create_on(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    write_image(storage, plan(options)?, options.preallocation)
}

/// Checks the options and lays out header and L1; the refcount structures follow behind them.
fn plan(options: &CreateOptions) -> Result<Header> {
    let invalid = |option, reason: &str| Err(Error::InvalidOption { option, reason: reason.into() });
    if !options.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&options.cluster_size) {
        return invalid("cluster size", "must be a power of two from 512 bytes to 2 MiB");
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return invalid("refcount bits", "must be 1, 2, 4, 8, 16, 32 or 64");
    }
    let cluster_bits = options.cluster_size.trailing_zeros();
    let geometry = Geometry { cluster_bits, size: options.size, extended: false };
    check_size(geometry)?;
    let Some(refcount_width) = Width::from_order(options.refcount_bits.trailing_zeros()) else {
        return invalid("refcount bits", "must be 1, 2, 4, 8, 16, 32 or 64");
    };
    if options.preallocation != Preallocation::Off {
        if options.backing.is_some() {
            return invalid("preallocation", "would hide what the backing file holds");
        }
        let layout = Layout::new(geometry);
        let blocks = layout.end.div_ceil(refcount_width.entries(geometry.cluster_size()) * geometry.cluster_size());
        // Twice: refcounts count themselves too, and at worst a block describes little more than itself.
        if layout.end > HOST_OFFSET_END || 2 * blocks * ENTRY > REFCOUNT_TABLE_BYTES_MAX {
            return invalid("preallocation", "needs a larger file than images of this cluster size can be");
        }
    }
    let is_zstd = options.compression == Compression::Zstd;
    let header = Header {
        version: 3,
        geometry,
        backing: options.backing.clone(),
        // A disk of size 0 has a table of one entry all the same: an offset of 0 would point at the header.
        l1_entries: geometry.l1_entries().max(1) as u32,
        l1_offset: geometry.cluster_size(),
        refcount_table_offset: 0,
        refcount_table_clusters: 0,
        refcount_width,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: if is_zstd { COMPRESSION_TYPE } else { 0 },
        compatible: if options.lazy_refcounts { LAZY_REFCOUNTS } else { 0 },
        autoclear: 0,
        compression_type: u8::from(is_zstd),
        bitmaps_extension: None,
    };
    header.encode()?; // finds a backing name that does not fit before anything is written
    Ok(header)
}

/// What every virtual size must be, at creation and when it grows.
pub(crate) fn check_size(geometry: Geometry) -> Result<()> {
    let invalid = |reason: &str| Err(Error::InvalidOption { option: "size", reason: reason.into() });
    if !geometry.size.is_multiple_of(512) || geometry.size > i64::MAX as u64 {
        return invalid("must be a multiple of 512 bytes, below 2^63");
    }
    if geometry.l1_entries() * ENTRY > L1_BYTES_MAX {
        return invalid("is more than images of this cluster size can map (the L1 table ends at 32 MiB)");
    }
    Ok(())
}

fn write_image(storage: &dyn Storage, mut header: Header, preallocation: Preallocation) -> Result<()> {
    let geometry = header.geometry;
    let mut body = geometry.cluster_size() + geometry.round_up(u64::from(header.l1_entries) * ENTRY);
    if preallocation != Preallocation::Off {
        body = preallocate(storage, geometry, preallocation)?;
    }
    let mut counts = Counts::default();
    (0..body / geometry.cluster_size()).for_each(|cluster| {
        counts.add(cluster);
    });
    let empty = RefcountTable::default();
    let (table, end) = refcounts::set(storage, geometry, header.refcount_width, empty, &mut counts, body)?;
    // The first flush will write into the L1, and must not be the one to find that the disk is full.
    let tables_end = header.l1_offset + geometry.round_up(u64::from(header.l1_entries) * ENTRY);
    if let Err(source) = storage.reserve(0, tables_end) {
        let error = Error::Io { operation: "fallocate", offset: 0, source };
        return Err(if error.is_no_space() { Error::NoSpace { offset: 0, length: tables_end } } else { error });
    }
    storage.set_length(end).map_err(Error::io("ftruncate", end))?;
    if !mutant!("header_before_tables") {
        storage.sync_data().map_err(Error::io("fdatasync", 0))?;
    }

    header.refcount_table_offset = table.offset;
    header.refcount_table_clusters = table.clusters as u32;
    storage.write(0, &mut [IoSlice::new(&header.encode()?)]).map_err(Error::io("write", 0))?;
    storage.sync_data().map_err(Error::io("fdatasync", 0))
}

/// Makes the name of a file durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let open = |source| Error::Open { path: parent.to_owned(), source };
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(open)
}
