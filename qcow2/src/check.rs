//! Checking an image against its own tables. Never changes anything.

use std::path::Path;

use crate::bitmaps;
use crate::error::{Error, Result};
use crate::format::header::CORRUPT;
use crate::image::read_header;
use crate::lock::{self, Access};
use crate::refcounts::{self, RefcountTable};
use crate::references;
use crate::regular_file;
use crate::storage::{FileStorage, Storage};

/// What a check found.
///
/// The numbers are those of `qemu-img check` (corruptions, leaks, allocated, compressed and fragmented clusters, end of the
/// image) for clean images of every kind, and for damage that the tables explain. They differ for entries that break a rule:
/// - An entry that claims a cluster with another owner is an error here, beside the refcount that is too low; QEMU reports
///   the refcount alone.
/// - An entry that points past the end of the file is one error here. QEMU counts it again as a refcount that is too low.
/// - Of an entry with reserved bits nothing is believed: what it refers to may be leaked here, and is not counted as
///   allocated. QEMU follows it all the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Broken rules, and clusters whose refcount is below their references: data is at risk.
    pub errors: u64,
    /// Clusters whose refcount is above their references: space is lost, data is not.
    pub leaks: u64,
    /// Guest clusters that have a place in the file: data, compressed data, and zeroes that keep their space. Those of
    /// snapshots are not counted.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those of them that do not follow in the file on the one before them in their table; compressed ones always count.
    pub fragmented_clusters: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// End of the used part of the file in bytes: clusters that leaked are used.
    pub image_end: u64,
    /// The image was not closed; its refcounts mean nothing until it is repaired.
    pub dirty: bool,
    /// The image is marked as damaged, whatever else was found: it is not written to until it is repaired.
    pub corrupt: bool,
    /// The first broken rules, in words.
    pub details: Vec<String>,
}

impl CheckReport {
    /// No errors, no leaks, closed, not marked as damaged.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0 && !self.dirty && !self.corrupt
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
        allocated_clusters: found.mapped.allocated,
        compressed_clusters: found.mapped.compressed,
        fragmented_clusters: found.mapped.fragmented,
        total_clusters: header.geometry.clusters(),
        image_end: differences.end.saturating_mul(header.geometry.cluster_size()),
        dirty: header.is_dirty(),
        corrupt: header.incompatible & CORRUPT != 0,
        details: found.faults.first.iter().map(Error::to_string).collect(),
    })
}
