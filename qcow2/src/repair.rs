//! Repairing an image: what can be known for certain from its tables is set right, nothing is guessed.
//!
//! Refcounts, leaks, COPIED bits and the dirty bit follow from the tables. Two owners of one cluster, or a table that points
//! outside the file, do not: which of them is wrong cannot be known, so such an image is left as it is.

use std::io::IoSlice;
use std::path::Path;

use crate::check::{CheckReport, check_on};
use crate::error::{Error, Result};
use crate::finish::{finish, put64};
use crate::format::entry::{COPIED, L2Entry, decode_l1};
use crate::format::header::{DIRTY, Header, field};
use crate::geometry::ENTRY;
use crate::image::{read_header, refuse_read_only_features};
use crate::lock::{self, Access};
use crate::refcounts::{self, RefcountTable};
use crate::references::{self, Counts, each_entry, entries};
use crate::regular_file;
use crate::storage::{FileStorage, Storage};

/// Makes an image clean if that can be done without guessing, and returns what a check found before. The disk's content
/// does not change.
///
/// An image that is clean already is not touched. A mark that says it is corrupt goes. An error means that the image cannot
/// be repaired; it is then as before, or, after a failed write, dirty.
///
/// # Durability
/// The repair is on stable storage when this returns. A crash on the way leaves a dirty image with the same content.
pub fn repair(path: &Path) -> Result<CheckReport> {
    let file = regular_file::open(path, Access::ReadWrite)?;
    lock::lock(&file, path, Access::ReadWrite)?;
    repair_on(&FileStorage::new(file))
}

/// As [`repair`], on any storage that nobody else uses.
///
/// # Durability
/// As for [`repair`].
pub fn repair_on(storage: &dyn Storage) -> Result<CheckReport> {
    let (header, mut sector) = read_header(storage)?;
    refuse_read_only_features(&header)?;
    if header.is_dirty() {
        // After a failed writeback the page cache may show what the disk never got.
        storage.sync_data().map_err(Error::io("fdatasync", 0))?;
        storage.drop_cache().map_err(Error::io("fadvise", 0))?;
    }
    let before = check_on(storage)?;
    if before.is_clean() {
        return Ok(before);
    }
    // The refcount structures are kept if they are sound and their numbers are all that is wrong.
    let kept = if header.is_dirty() { None } else { Some(RefcountTable::load(storage, &header)?) };
    let sound =
        |table: &RefcountTable| references::count(storage, &header, Some(table)).map(|found| found.is_repairable());
    let kept = match kept {
        Some(table) if sound(&table)? => Some(table),
        _ => None,
    };
    let mut found = references::count(storage, &header, kept.as_ref())?;
    if !found.is_repairable() {
        found.faults.refuse()?;
    }
    let end = header.geometry.round_up(storage.length().map_err(Error::io("fstat", 0))?);
    refcounts::refuse_unwritable(header.geometry, header.refcount_width, &found.counts, end)?;

    put64(&mut sector, field::INCOMPATIBLE, header.incompatible | DIRTY);
    put64(&mut sector, field::AUTOCLEAR, 0);
    storage.write(0, &mut [IoSlice::new(&sector[..])]).map_err(Error::io("write", 0))?;
    storage.sync_data().map_err(Error::io("fdatasync", 0))?;
    set_copied_bits(storage, &header, &found.counts)?;
    finish(storage, &header, &mut sector, kept.unwrap_or_default(), &mut found.counts, end)?;
    Ok(before)
}

/// Gives every table and every data cluster with one owner its COPIED bit, and takes it from those with several.
pub(crate) fn set_copied_bits(storage: &dyn Storage, header: &Header, counts: &Counts) -> Result<()> {
    let geometry = header.geometry;
    let right = |raw: u64, host: u64| {
        let single = counts.load(host / geometry.cluster_size()) == 1;
        if single { raw | COPIED } else { raw & !COPIED }
    };
    let put =
        |at: u64, raw: u64| storage.write(at, &mut [IoSlice::new(&raw.to_be_bytes())]).map_err(Error::io("write", at));
    let mut table = vec![0; geometry.cluster_size() as usize];
    each_entry(storage, header.l1_offset, u64::from(header.l1_entries), |at, raw| {
        let Some((host, _)) = decode_l1(raw, geometry, at)? else { return Ok(()) };
        if right(raw, host) != raw {
            put(at, right(raw, host))?;
        }
        if storage.is_hole(host, geometry.cluster_size()) {
            return Ok(());
        }
        storage.read(host, &mut table).map_err(Error::io("read", host))?;
        for (index, raw) in entries(&table).enumerate() {
            let at = host + index as u64 * ENTRY;
            match L2Entry::decode(&[raw], geometry, header.version, at)? {
                L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. } if right(raw, host) != raw => {
                    put(at, right(raw, host))?;
                }
                _ => {}
            }
        }
        Ok(())
    })
}
