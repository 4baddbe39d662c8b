//! The facts of an image's header, for people and tools.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::header::{Backing, CORRUPT};
use crate::image::read_header;
use crate::lock::Access;
use crate::regular_file;
use crate::storage::{FileStorage, Storage};

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Format version: 2 or 3.
    pub version: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Width of one refcount in bits.
    pub refcount_bits: u32,
    /// What lies below.
    pub backing: Option<Backing>,
    /// The image was not closed, or is in use right now.
    pub dirty: bool,
    /// The image is marked as damaged.
    pub corrupt: bool,
    /// Refcounts may be written lazily.
    pub lazy_refcounts: bool,
    /// zstd instead of deflate for compressed clusters.
    pub zstd: bool,
    /// Entries of 16 bytes, which tell of parts of a cluster too. Such an image is read only.
    pub extended_l2: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// Bytes that the file occupies on its file system.
    pub disk_bytes: u64,
}

/// Reads the header of an image, also of one in use: nothing is locked.
pub fn info(path: &Path) -> Result<ImageInfo> {
    let file = regular_file::open(path, Access::ReadOnly)?;
    let facts = file.metadata().map_err(|source| Error::Open { path: path.to_owned(), source })?;
    Ok(ImageInfo { disk_bytes: facts.blocks() * 512, ..info_on(&FileStorage::new(file))? })
}

/// As [`info`], on any storage; `disk_bytes` is the length of the file, because a storage does not tell more.
pub fn info_on(storage: &dyn Storage) -> Result<ImageInfo> {
    let (header, _) = read_header(storage)?;
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    Ok(ImageInfo {
        version: header.version,
        size: header.geometry.size,
        cluster_size: header.geometry.cluster_size(),
        refcount_bits: header.refcount_width.bits(),
        dirty: header.is_dirty(),
        corrupt: header.incompatible & CORRUPT != 0,
        lazy_refcounts: header.compatible & 1 != 0,
        zstd: header.compression_type == 1,
        extended_l2: header.geometry.extended,
        snapshots: header.snapshots,
        backing: header.backing,
        file_length: length,
        disk_bytes: length,
    })
}
