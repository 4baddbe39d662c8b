//! Checking an image against its own tables. Never changes anything.

use std::path::Path;

use crate::bitmaps;
use crate::error::{Error, Result};
use crate::image::read_header;
use crate::lock::{self, Access};
use crate::refcounts::{self, RefcountTable};
use crate::references;
use crate::regular_file;
use crate::storage::{FileStorage, Storage};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Broken rules, and clusters whose refcount is below their references: data is at risk.
    pub errors: u64,
    /// Clusters whose refcount is above their references: space is lost, data is not.
    pub leaks: u64,
    /// Guest clusters that hold data.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// End of the used part of the file in bytes.
    pub image_end: u64,
    /// The image was not closed; its refcounts mean nothing until it is repaired.
    pub dirty: bool,
    /// The first broken rules, in words.
    pub details: Vec<String>,
}

impl CheckReport {
    /// No errors, no leaks, closed.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0 && !self.dirty
    }
}

/// Checks the image at a path, which nobody may be writing to. The layers below are not looked at.
pub fn check(path: &Path) -> Result<CheckReport> {
    let file = regular_file::open(path, Access::ReadOnly)?;
    lock::lock(&file, path, Access::ReadOnly)?;
    check_on(&FileStorage::new(file))
}

/// As [`check`], on any storage that nobody is writing to.
pub fn check_on(storage: &dyn Storage) -> Result<CheckReport> {
    let (header, _) = read_header(storage)?;
    let table = RefcountTable::load(storage, &header)?;
    let mut found = references::count(storage, &header, Some(&table))?;
    bitmaps::each_range(storage, &header, |structure, offset, bytes| {
        found.claim_all(structure, offset, bytes, header.geometry.cluster_size());
    })?;
    found.counts.refuse_overflow()?;
    let width = header.refcount_width;
    let differences = refcounts::compare(storage, header.geometry, width, &table, &found)?;
    Ok(CheckReport {
        // A table without its COPIED bit is among the wrong bits too.
        errors: found.faults.count - found.not_copied + differences.wrong_copied_bits + differences.too_low,
        leaks: differences.too_high,
        allocated_clusters: found.data_clusters,
        compressed_clusters: found.compressed_clusters,
        total_clusters: header.geometry.clusters(),
        image_end: found.end,
        dirty: header.is_dirty(),
        details: found.faults.first.iter().map(Error::to_string).collect(),
    })
}
