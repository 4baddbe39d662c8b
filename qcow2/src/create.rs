//! Making a new image: body first, header last, so that a crash in between leaves a file that no one takes for an image.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::header::{Backing, Header, L1_BYTES_MAX};
use crate::format::refcount::Width;
use crate::geometry::{ENTRY, Geometry};
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
    /// What lies below; its file is opened when the image is, not now.
    pub backing: Option<Backing>,
}

impl CreateOptions {
    /// 64 KiB clusters, 16-bit refcounts, no backing file: what QEMU's tools make by default.
    pub fn new(size: u64) -> Self {
        Self { size, cluster_size: 65536, refcount_bits: 16, backing: None }
    }
}

/// Creates a version 3 image at a path that must not exist yet.
///
/// # Durability
/// The image and its name are on stable storage when this returns. After a crash before that, the path is absent or not
/// an image. On an error the file is removed.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let header = plan(options)?;
    let file = create_file(path)?;
    let created = write_image(&FileStorage::new(file), header).and_then(|()| sync_parent(path));
    if created.is_err() {
        // The error that is reported is the first one; a file that cannot even be removed is not an image either.
        let _ = std::fs::remove_file(path);
    }
    created
}

/// A new, empty file for reading and writing; one that exists, or a link in its place, is refused.
pub(crate) fn create_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path)
        .map_err(|source| Error::Open { path: path.to_owned(), source })
}

/// As [`create`], on storage that is empty so far.
///
/// # Durability
/// The image is durable when this returns; its name is the caller's business.
pub fn create_on(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    write_image(storage, plan(options)?)
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
    if !options.size.is_multiple_of(512) || options.size > i64::MAX as u64 {
        return invalid("size", "must be a multiple of 512 bytes, below 2^63");
    }
    let cluster_bits = options.cluster_size.trailing_zeros();
    let geometry = Geometry { cluster_bits, size: options.size, extended: false };
    if geometry.l1_entries() * ENTRY > L1_BYTES_MAX {
        return invalid("size", "is more than images of this cluster size can map (the L1 table ends at 32 MiB)");
    }
    let Some(refcount_width) = Width::from_order(options.refcount_bits.trailing_zeros()) else {
        return invalid("refcount bits", "must be 1, 2, 4, 8, 16, 32 or 64");
    };
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
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression_type: 0,
        bitmaps_extension: None,
    };
    header.encode()?; // finds a backing name that does not fit before anything is written
    Ok(header)
}

fn write_image(storage: &dyn Storage, mut header: Header) -> Result<()> {
    let geometry = header.geometry;
    let mut counts = Counts::default();
    let body = geometry.cluster_size() + geometry.round_up(u64::from(header.l1_entries) * ENTRY);
    (0..body / geometry.cluster_size()).for_each(|cluster| {
        counts.add(cluster);
    });
    let empty = RefcountTable::default();
    let (table, end) = refcounts::set(storage, geometry, header.refcount_width, empty, &mut counts, body)?;
    storage.set_length(end).map_err(Error::io("ftruncate", end))?;
    storage.sync_data().map_err(Error::io("fdatasync", 0))?;

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
