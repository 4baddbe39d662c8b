//! The refcount structures on disk: read to be checked, and set to the counted references when an image is created or
//! closed. Counts are set, never incremented, so that a session leaves them right whatever it found.
//!
//! Setting happens only while the dirty bit is durable (or before the image has a header): until the header says that they
//! are valid, nobody trusts them, so blocks may be rewritten in place.

use std::io::IoSlice;

use crate::error::{Error, Result};
use crate::format::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use crate::format::refcount::{TABLE_OFFSET, Width};
use crate::geometry::{ENTRY, Geometry};
use crate::references::{Counts, References, read_table};
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
        let mut entries = read_table(storage, offset, clusters * header.geometry.cluster_size() / ENTRY)?;
        let used = entries.iter().rposition(|entry| *entry != 0).map_or(0, |last| last + 1);
        entries.truncate(used);
        Ok(Self { offset, clusters, entries })
    }
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
    loop {
        let blocks = (end / cluster).div_ceil(per_block) as usize;
        if table.entries.len() < blocks {
            table.entries.resize(blocks, 0);
        }
        let before = end;
        for (index, entry) in table.entries.iter_mut().enumerate() {
            let first = index as u64 * per_block;
            if *entry == 0 && counts.any(first, first + per_block) {
                *entry = end;
                counts.add(end / cluster);
                end += cluster;
            }
        }
        let needed = (table.entries.len() as u64 * ENTRY).div_ceil(cluster).max(1);
        if needed > table.clusters {
            (table.offset / cluster..table.offset / cluster + table.clusters).for_each(|old| counts.remove(old));
            table.offset = end;
            // One cluster to spare: the blocks that describe this table may need a few more entries.
            table.clusters = needed + u64::from(needed > 1);
            (end / cluster..end / cluster + table.clusters).for_each(|new| {
                counts.add(new);
            });
            end += table.clusters * cluster;
        }
        if end == before {
            break;
        }
    }
    if table.clusters * cluster > REFCOUNT_TABLE_BYTES_MAX {
        return Err(Error::unsupported("images whose refcount table would pass 8 MiB"));
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
        block.fill(0);
        let first = index as u64 * per_block;
        for (used, count) in counts.used(first, first + per_block) {
            if count > width.max() {
                let bits = width.bits();
                return Err(Error::unsupported(format!("{count} references with refcounts of {bits} bits")));
            }
            width.store(&mut block, used - first, count);
        }
        let host = entry & TABLE_OFFSET;
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
    /// Entries whose COPIED bit does not fit the refcount: a writer would be misled.
    pub(crate) wrong_copied_bits: u64,
}

impl Differences {
    /// Clusters `[first, end)` have no refcount block: every count is 0.
    fn add_uncounted(&mut self, found: &References, first: u64, end: u64) {
        for (used, _) in found.counts.used(first, end) {
            self.too_low += 1;
            self.wrong_copied_bits += found.wrong_copied_bits(used, 0);
        }
    }
}

/// Compares block by block, where there is a block or a reference: the length of a sparse file costs nothing.
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
    let mut block = vec![0; cluster as usize];
    for (index, entry) in table.entries.iter().enumerate() {
        let (first, host) = (index as u64 * per_block, entry & TABLE_OFFSET);
        if host == 0 || !host.is_multiple_of(cluster) {
            differences.add_uncounted(found, first, first + per_block);
            continue;
        }
        storage.read(host, &mut block).map_err(Error::io("read", host))?;
        let mut used = found.counts.used(first, first + per_block).peekable();
        for position in 0..per_block {
            let stored = width.load(&block, position);
            let counted = used.next_if(|(cluster, _)| *cluster == first + position).map_or(0, |(_, count)| count);
            differences.too_low += u64::from(stored < counted);
            differences.too_high += u64::from(stored > counted);
            if counted > 0 {
                differences.wrong_copied_bits += found.wrong_copied_bits(first + position, stored);
            }
        }
    }
    differences.add_uncounted(found, table.entries.len() as u64 * per_block, u64::MAX);
    Ok(differences)
}
