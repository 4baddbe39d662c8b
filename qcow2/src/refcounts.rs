//! The refcount structures on disk: read to be checked, and set to the counted references when an image is created or
//! closed. Counts are set, never incremented, so that a session leaves them right whatever it found.
//!
//! Setting happens only while the dirty bit is durable (or before the image has a header): until the header says that they
//! are valid, nobody trusts them, so blocks may be rewritten in place.

use std::io::IoSlice;

use crate::counts::Counts;
use crate::error::{Error, Result};
use crate::format::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use crate::format::refcount::{TABLE_OFFSET, Width};
use crate::geometry::{ENTRY, Geometry};
use crate::references::{References, each_entry};
use crate::storage::Storage;

/// Where the refcount table lies, and what it says.
#[derive(Clone, Debug, Default)]
pub(crate) struct RefcountTable {
    pub(crate) offset: u64,
    pub(crate) clusters: u64,
    /// One entry per block, reserved bits included; may be shorter than the table on disk, whose rest is zero.
    pub(crate) entries: Vec<u64>,
}

impl RefcountTable {
    pub(crate) fn load(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let (offset, clusters) = (header.refcount_table_offset, u64::from(header.refcount_table_clusters));
        let mut entries = Vec::new();
        each_entry(storage, offset, clusters * header.geometry.cluster_size() / ENTRY, |at, raw| {
            entries.resize(((at - offset) / ENTRY) as usize, 0);
            entries.push(raw);
            Ok(())
        })?;
        Ok(Self { offset, clusters, entries })
    }
}

/// The longest file, refcount structures included, that a refcount table of 8 MiB can describe and entries can point into.
fn file_length_max(geometry: Geometry, per_block: u64) -> u64 {
    (REFCOUNT_TABLE_BYTES_MAX / ENTRY * per_block).saturating_mul(geometry.cluster_size()).min(1 << 56)
}

/// The length of a file once refcount structures for all of it are appended at `end`: an upper bound.
fn length_with_refcounts(geometry: Geometry, per_block: u64, end: u64) -> u64 {
    let cluster = geometry.cluster_size();
    // The structures describe themselves as well, so one block more for every `per_block` of them.
    let blocks = (end / cluster).div_ceil(per_block);
    let blocks = blocks + blocks.div_ceil(per_block - 1) + 2;
    let table = (blocks * ENTRY).div_ceil(cluster) + 2;
    end + (blocks + table) * cluster
}

/// Refuses what [`set`] could not write for a file that ends at `end`; found out before anything is changed.
pub(crate) fn refuse_unwritable(geometry: Geometry, width: Width, counts: &Counts, end: u64) -> Result<()> {
    let per_block = width.entries(geometry.cluster_size());
    if length_with_refcounts(geometry, per_block, end) > file_length_max(geometry, per_block) {
        return Err(Error::unsupported("images whose refcount table would pass 8 MiB"));
    }
    refuse_too_many(width, counts)
}

/// Refuses counts that do not fit into their width.
pub(crate) fn refuse_too_many(width: Width, counts: &Counts) -> Result<()> {
    if counts.highest() > width.max() {
        let (count, bits) = (counts.highest(), width.bits());
        return Err(Error::unsupported(format!("{count} references with refcounts of {bits} bits")));
    }
    Ok(())
}

/// Makes the refcounts on disk equal to `counts`, which must hold every reference of the file but those of new refcount
/// structures; these are appended at `end` and counted too. Returns the table and the new end of used host space.
pub(crate) fn set(
    storage: &dyn Storage,
    geometry: Geometry,
    width: Width,
    mut table: RefcountTable,
    counts: &mut Counts,
    mut end: u64,
) -> Result<(RefcountTable, u64)> {
    let cluster = geometry.cluster_size();
    let per_block = width.entries(cluster);
    refuse_too_many(width, counts)?;
    let clusters_max = REFCOUNT_TABLE_BYTES_MAX / cluster;
    loop {
        let blocks = (end / cluster).div_ceil(per_block) as usize;
        if blocks as u64 * ENTRY > REFCOUNT_TABLE_BYTES_MAX {
            return Err(Error::unsupported("images whose refcount table would pass 8 MiB"));
        }
        if table.entries.len() < blocks {
            table.entries.resize(blocks, 0);
        }
        let before = end;
        for group in counts.groups(per_block) {
            if let Some(entry) = table.entries.get_mut(group as usize).filter(|entry| **entry == 0) {
                *entry = end;
                counts.add(end / cluster);
                end += cluster;
            }
        }
        let needed = (table.entries.len() as u64 * ENTRY).div_ceil(cluster).max(1);
        if needed > table.clusters {
            (table.offset / cluster..table.offset / cluster + table.clusters).for_each(|old| counts.remove(old));
            table.offset = end;
            // Some to spare: the blocks that describe this table need entries, too. Of the smallest blocks, 64 counts each, one
            // cluster of the table names those of 4,096 clusters.
            let spare = if needed > 1 { 1 + needed / 2048 } else { 0 };
            table.clusters = (needed + spare).min(clusters_max);
            (end / cluster..end / cluster + table.clusters).for_each(|new| {
                counts.add(new);
            });
            end += table.clusters * cluster;
        }
        if end == before {
            break;
        }
    }
    write(storage, geometry, width, &table, counts)?;
    Ok((table, end))
}

fn write(
    storage: &dyn Storage,
    geometry: Geometry,
    width: Width,
    table: &RefcountTable,
    counts: &Counts,
) -> Result<()> {
    let cluster = geometry.cluster_size();
    let per_block = width.entries(cluster);
    let mut block = vec![0; cluster as usize];
    for (index, entry) in table.entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
        let (first, host) = (index as u64 * per_block, entry & TABLE_OFFSET);
        if !counts.any(first, first + per_block) && storage.is_hole(host, cluster) {
            // All its counts are zero already; a table full of such blocks must not make us fill a disk with zeroes.
            continue;
        }
        block.fill(0);
        for (cluster, count) in counts.used(first, first + per_block) {
            width.store(&mut block, cluster - first, count);
        }
        storage.write(host, &mut [IoSlice::new(&block)]).map_err(Error::io("write", host))?;
    }
    let mut bytes: Vec<u8> = table.entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.resize((table.clusters * cluster) as usize, 0);
    storage.write(table.offset, &mut [IoSlice::new(&bytes)]).map_err(Error::io("write", table.offset))
}

/// Differences between the refcounts on disk and what the tables say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// Clusters whose refcount is below their references: corruption.
    pub(crate) too_low: u64,
    /// Clusters whose refcount is above their references: leaks.
    pub(crate) too_high: u64,
    /// End of the last cluster that has a refcount or a reference, in clusters.
    pub(crate) end: u64,
    /// Entries whose COPIED bit does not fit the refcount: a writer would be misled.
    pub(crate) wrong_copied_bits: u64,
}

/// Compares block by block, then what has no block. The work is bounded by the tables and references there are, not by the
/// length of the file.
pub(crate) fn compare(
    storage: &dyn Storage,
    geometry: Geometry,
    width: Width,
    table: &RefcountTable,
    found: &References,
) -> Result<Differences> {
    let cluster = geometry.cluster_size();
    let per_block = width.entries(cluster);
    let mut differences = Differences::default();
    let mut absent = found.bad_blocks.clone();
    let mut block = vec![0; cluster as usize];
    for (index, entry) in table.entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
        let host = entry & TABLE_OFFSET;
        if found.bad_blocks.binary_search(&index).is_ok() {
            continue;
        }
        if storage.is_hole(host, cluster) {
            absent.push(index);
            continue;
        }
        storage.read(host, &mut block).map_err(Error::io("read", host))?;
        differences.compare_block(width, &block, found, index as u64 * per_block);
    }
    absent.sort_unstable();
    for (cluster, counted) in found.counts.used(0, u64::MAX) {
        let index = (cluster / per_block) as usize;
        if table.entries.get(index).is_none_or(|entry| *entry == 0) || absent.binary_search(&index).is_ok() {
            differences.note(found, cluster, 0, counted);
        }
    }
    Ok(differences)
}

impl Differences {
    /// `first`: the cluster of the block's first count.
    fn compare_block(&mut self, width: Width, block: &[u8], found: &References, first: u64) {
        let per_word = u64::from(64 / width.bits());
        for (word, bytes) in (0..).zip(block.chunks_exact(8)) {
            let positions = word * per_word..(word + 1) * per_word;
            let referenced = found.counts.any(first + positions.start, first + positions.end);
            if !referenced && bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            for position in positions {
                let counted = if referenced { found.counts.load(first + position) } else { 0 };
                self.note(found, first + position, width.load(block, position), counted);
            }
        }
    }

    fn note(&mut self, found: &References, cluster: u64, stored: u64, counted: u64) {
        if stored > 0 || counted > 0 {
            self.end = self.end.max(cluster + 1);
        }
        self.too_low += u64::from(stored < counted);
        self.too_high += u64::from(stored > counted);
        if counted > 0 {
            self.wrong_copied_bits += found.wrong_copied_bits(cluster, stored);
        }
    }
}
