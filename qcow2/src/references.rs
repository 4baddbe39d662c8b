//! Who owns which host cluster, counted from the tables on disk: the ground truth for refcounts, checks and the tree's
//! validation before it is written to.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, Result};
use crate::format::be64;
use crate::format::entry::{L2Entry, decode_l1};
use crate::format::header::Header;
use crate::format::refcount::TABLE_OFFSET;
use crate::geometry::ENTRY;
use crate::refcounts::RefcountTable;
use crate::snapshots;
use crate::storage::Storage;

/// Clusters per chunk of the map below: 512 bytes of bits, so that references strewn over a sparse file cost little each.
const CHUNK: u64 = 1 << 12;

/// Counts per host cluster, compact for the common case: one bit says "at least one", a map holds what is beyond that.
/// Absent chunks are all zero, so a sparse file of many TiB costs what it uses.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    ones: BTreeMap<u64, Box<[u64]>>,
    beyond: HashMap<u64, u64>,
}

impl Counts {
    pub(crate) fn load(&self, cluster: u64) -> u64 {
        let word = self.ones.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK / 64) as usize]);
        if word >> (cluster % 64) & 1 == 0 {
            return 0;
        }
        1 + self.beyond.get(&cluster).copied().unwrap_or(0)
    }

    /// Adds one reference and returns the count before.
    pub(crate) fn add(&mut self, cluster: u64) -> u64 {
        let chunk = self.ones.entry(cluster / CHUNK).or_insert_with(|| vec![0; (CHUNK / 64) as usize].into());
        let word = &mut chunk[(cluster % CHUNK / 64) as usize];
        let bit = 1 << (cluster % 64);
        if *word & bit == 0 {
            *word |= bit;
            return 0;
        }
        let beyond = self.beyond.entry(cluster).or_insert(0);
        *beyond += 1;
        *beyond
    }

    /// Takes one reference away, where there is one.
    pub(crate) fn remove(&mut self, cluster: u64) {
        if let Some(beyond) = self.beyond.get_mut(&cluster) {
            *beyond -= 1;
            if *beyond == 0 {
                self.beyond.remove(&cluster);
            }
        } else if let Some(chunk) = self.ones.get_mut(&(cluster / CHUNK)) {
            chunk[(cluster % CHUNK / 64) as usize] &= !(1 << (cluster % 64));
        }
    }

    /// Runs `[first, end)` of clusters without references, below `end`.
    pub(crate) fn unused_runs(&self, end: u64) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut free = 0;
        for (cluster, _) in self.used(0, end) {
            if free < cluster {
                runs.push((free, cluster));
            }
            free = cluster + 1;
        }
        if free < end {
            runs.push((free, end));
        }
        runs
    }

    /// Words of the bit map that are not zero, in order: the first cluster of each, and its 64 bits.
    fn words(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let chunks = self.ones.range(first / CHUNK..end.div_ceil(CHUNK).max(first / CHUNK));
        chunks
            .flat_map(|(index, chunk)| (index * CHUNK..).step_by(64).zip(chunk.iter().copied()))
            .filter(move |(base, word)| *word != 0 && base + 64 > first && *base < end)
    }

    /// Clusters of `[first, end)` that have references, in order, with their counts.
    pub(crate) fn used(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let bits =
            |(base, word): (u64, u64)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| base + bit);
        let clusters = self.words(first, end).flat_map(bits).filter(move |cluster| (first..end).contains(cluster));
        clusters.map(|cluster| (cluster, 1 + self.beyond.get(&cluster).copied().unwrap_or(0)))
    }

    /// How many groups of `clusters` neighbours (a power of two, at least 64) have a reference.
    pub(crate) fn groups(&self, clusters: u64) -> u64 {
        let mut last = None;
        let is_first = |group: &u64| last.replace(*group) != Some(*group);
        self.words(0, u64::MAX).map(|(base, _)| base / clusters).filter(is_first).count() as u64
    }

    /// Whether any cluster of `[first, end)` has a reference.
    pub(crate) fn any(&self, first: u64, end: u64) -> bool {
        self.used(first, end).next().is_some()
    }
}

/// What a walk through L1 and L2 found.
#[derive(Debug, Default)]
pub(crate) struct References {
    pub(crate) counts: Counts,
    /// Clusters that entries of the active tables with the COPIED bit refer to.
    copied: Counts,
    /// Clusters that entries of the active tables without it refer to.
    uncopied: Counts,
    /// Data clusters, compressed ones included; kept zero clusters not.
    pub(crate) data_clusters: u64,
    pub(crate) compressed_clusters: u64,
    /// Rules broken, in the order in which they were met.
    pub(crate) faults: Faults,
    /// Faults that are no more than a COPIED bit missing from an L1 entry.
    pub(crate) not_copied: u64,
    /// Highest used host byte plus one.
    pub(crate) end: u64,
}

/// Broken rules: all are counted, the first ones are kept, so that no image can fill the memory with its faults.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    pub(crate) first: Vec<Error>,
    pub(crate) count: u64,
}

impl Faults {
    const KEPT: usize = 32;

    fn push(&mut self, fault: Error) {
        self.count += 1;
        if self.first.len() < Self::KEPT {
            self.first.push(fault);
        }
    }

    /// The first fault, as an error.
    pub(crate) fn refuse(self) -> Result<()> {
        self.first.into_iter().next().map_or(Ok(()), Err)
    }
}

const NOT_COPIED: &str = "a table with one owner has the COPIED bit";
const ONE_OWNER: &str = "each cluster of the file has one owner";

impl References {
    /// How many entries of the active tables that refer to a cluster have a COPIED bit which does not fit its refcount.
    pub(crate) fn wrong_copied_bits(&self, cluster: u64, refcount: u64) -> u64 {
        let wrong = if refcount == 1 { &self.uncopied } else { &self.copied };
        wrong.load(cluster)
    }

    /// Whether nothing is broken but what follows from the tables: then refcounts and COPIED bits can be set right.
    pub(crate) fn is_repairable(&self) -> bool {
        self.faults.count == self.not_copied
    }

    fn claim_all(&mut self, structure: &'static str, offset: u64, bytes: u64, cluster_size: u64) {
        for host in (offset..offset + bytes).step_by(cluster_size as usize) {
            self.claim(host / cluster_size, || Error::corrupt(structure, offset, host, ONE_OWNER));
            self.end = self.end.max(host + cluster_size);
        }
    }

    fn note_copied(&mut self, tree: Tree, cluster: u64, copied: bool) {
        if tree == Tree::Active {
            if copied { &mut self.copied } else { &mut self.uncopied }.add(cluster);
        }
    }

    /// References that others may have too.
    pub(crate) fn shared(&mut self, offset: u64, bytes: u64, cluster_size: u64) {
        for cluster in offset / cluster_size..(offset + bytes).div_ceil(cluster_size) {
            self.counts.add(cluster);
        }
    }

    fn claim(&mut self, cluster: u64, fault: impl FnOnce() -> Error) {
        if self.counts.add(cluster) > 0 {
            self.faults.push(fault());
        }
    }
}

/// Walks header, L1, every L2 table, those of snapshots too, and, where they are to be kept, the refcount structures. Faults are collected, not
/// returned: the caller decides whether they forbid what it is about to do. An error means that the file could not be read.
pub(crate) fn count(storage: &dyn Storage, header: &Header, refcounts: Option<&RefcountTable>) -> Result<References> {
    let geometry = header.geometry;
    let cluster_size = geometry.cluster_size();
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    let mut found = References { end: cluster_size, ..References::default() };
    found.counts.add(0);

    let inside = |host: u64| host < length;
    found.claim_all("L1 table", header.l1_offset, u64::from(header.l1_entries) * ENTRY, cluster_size);
    if let Some(table) = refcounts {
        found.claim_all("refcount table", table.offset, table.clusters * cluster_size, cluster_size);
        for (index, entry) in table.entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let (at, host) = (table.offset + index as u64 * ENTRY, entry & TABLE_OFFSET);
            let fault = |rule| Error::corrupt("refcount table entry", at, *entry, rule);
            if host % cluster_size != 0 || entry & !TABLE_OFFSET != 0 || !inside(host) {
                found.faults.push(fault("must be a multiple of the cluster size, inside the file, reserved bits zero"));
                continue;
            }
            found.claim(host / cluster_size, || fault(ONE_OWNER));
            found.end = found.end.max(host + cluster_size);
        }
    }

    let walk = Walk { storage, header, length };
    walk.l1(&mut found, Tree::Active, header.l1_offset, u64::from(header.l1_entries))?;
    let snapshots = snapshots::load(storage, header, length)?;
    found.shared(header.snapshots_offset, snapshots.bytes, cluster_size);
    for (offset, entries) in snapshots.l1_tables {
        found.shared(offset, entries * ENTRY, cluster_size);
        walk.l1(&mut found, Tree::Snapshot, offset, entries)?;
    }
    Ok(found)
}

/// Whose tables are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tree {
    Active,
    /// COPIED bits mean nothing in there.
    Snapshot,
}

/// A walk from an L1 table down to the data clusters.
struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    /// Length of the file: a reference is legal when its first byte is inside, the last cluster perhaps being cut short.
    length: u64,
}

impl Walk<'_> {
    fn l1(&self, found: &mut References, tree: Tree, offset: u64, entries: u64) -> Result<()> {
        let cluster_size = self.header.geometry.cluster_size();
        let mut table = vec![0; cluster_size as usize];
        for (index, raw) in read_table(self.storage, offset, entries)?.iter().enumerate() {
            let at = offset + index as u64 * ENTRY;
            let fault = |rule| Error::corrupt("L1 entry", at, *raw, rule);
            let (host, copied) = match decode_l1(*raw, self.header.geometry, at) {
                Ok(None) => continue,
                Ok(Some(table)) => table,
                Err(error) => {
                    found.faults.push(error);
                    continue;
                }
            };
            if host >= self.length {
                found.faults.push(fault("the table must be inside the file"));
                continue;
            }
            if self.header.snapshots > 0 {
                // Tables and clusters may belong to several snapshots; then only counting makes sense.
                found.counts.add(host / cluster_size);
            } else {
                if !copied {
                    found.faults.push(fault(NOT_COPIED));
                    found.not_copied += 1;
                }
                found.claim(host / cluster_size, || fault(ONE_OWNER));
            }
            found.note_copied(tree, host / cluster_size, copied);
            found.end = found.end.max(host + cluster_size);
            self.storage.read(host, &mut table).map_err(Error::io("read", host))?;
            self.l2(found, tree, &table, host);
        }
        Ok(())
    }

    fn l2(&self, found: &mut References, tree: Tree, table: &[u8], table_host: u64) {
        let geometry = self.header.geometry;
        let cluster_size = geometry.cluster_size();
        let words: Vec<u64> = entries(table).collect();
        let size = geometry.l2_entry_size();
        for (index, words) in words.chunks_exact((size / ENTRY) as usize).enumerate() {
            let Some(&raw) = words.first().filter(|_| words.iter().any(|word| *word != 0)) else { continue };
            let at = table_host + index as u64 * size;
            let fault = |rule| Error::corrupt("L2 entry", at, raw, rule);
            let (host, copied) = match L2Entry::decode(words, geometry, self.header.version, at) {
                Ok(
                    L2Entry::Unallocated | L2Entry::Zero { host: None, .. } | L2Entry::Subclusters { host: None, .. },
                ) => {
                    continue;
                }
                Ok(L2Entry::Compressed { host, length }) => {
                    self.compressed(found, host, length, fault);
                    continue;
                }
                Ok(L2Entry::Data { host, copied } | L2Entry::Subclusters { host: Some(host), copied, .. }) => {
                    found.data_clusters += 1;
                    (host, copied)
                }
                Ok(L2Entry::Zero { host: Some(host), copied }) => (host, copied),
                Err(error) => {
                    found.faults.push(error);
                    continue;
                }
            };
            if host >= self.length {
                found.faults.push(fault("the cluster must be inside the file"));
                continue;
            }
            let cluster = host / cluster_size;
            let shared = found.counts.add(cluster) > 0;
            found.note_copied(tree, cluster, copied);
            if shared && found.copied.load(cluster) > 0 {
                found.faults.push(fault("a cluster with the COPIED bit has one owner"));
            }
            found.end = found.end.max(host + cluster_size);
        }
    }

    fn compressed(&self, found: &mut References, host: u64, bytes: u64, fault: impl Fn(&'static str) -> Error) {
        let cluster_size = self.header.geometry.cluster_size();
        found.data_clusters += 1;
        found.compressed_clusters += 1;
        let last = (host + bytes - 1) / cluster_size;
        if last * cluster_size >= self.length {
            found.faults.push(fault("compressed data must end in a cluster of the file"));
            return;
        }
        for cluster in host / cluster_size..=last {
            if found.counts.add(cluster) > 0 && found.copied.load(cluster) > 0 {
                found.faults.push(fault("compressed data must not share a cluster that has the COPIED bit"));
            }
        }
        found.end = found.end.max((last + 1) * cluster_size);
    }
}

/// Reads `entries` big-endian 64-bit values.
pub(crate) fn read_table(storage: &dyn Storage, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; (count * ENTRY) as usize];
    storage.read(offset, &mut bytes).map_err(Error::io("read", offset))?;
    Ok(entries(&bytes).collect())
}

/// The big-endian 64-bit values of a table.
pub(crate) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(ENTRY as usize).map(|chunk| be64(chunk, 0).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_strewn_over_an_exbibyte_cost_what_they_are() {
        let mut counts = Counts::default();
        let clusters = [0, 1 << 20, (1 << 44) - 1];
        for cluster in clusters {
            counts.add(cluster);
        }
        let runs = [(1, 1 << 20), ((1 << 20) + 1, (1 << 44) - 1), (1 << 44, 1 << 45)];
        assert_eq!(counts.unused_runs(1 << 45), runs);
        assert!(counts.used(0, u64::MAX).map(|(cluster, _)| cluster).eq(clusters));
        assert!(!counts.any(2, 1 << 20) && counts.any(2, u64::MAX));
    }

    #[test]
    fn counts_go_up_and_down_and_runs_without_owner_are_found() {
        let mut counts = Counts::default();
        for cluster in [0, 1, 3, 3, CHUNK, CHUNK + 70] {
            counts.add(cluster);
        }
        assert_eq!((counts.load(2), counts.load(3), counts.load(CHUNK)), (0, 2, 1));
        counts.remove(3);
        counts.remove(1);
        assert_eq!((counts.load(3), counts.load(1)), (1, 0));
        assert_eq!(counts.unused_runs(6), [(1, 3), (4, 6)]);
        assert_eq!(counts.unused_runs(CHUNK + 70), [(1, 3), (4, CHUNK), (CHUNK + 1, CHUNK + 70)]);
        assert_eq!(counts.used(1, CHUNK + 70).collect::<Vec<_>>(), [(3, 1), (CHUNK, 1)]);
        assert_eq!((counts.groups(64), counts.groups(CHUNK)), (3, 2));
        assert!(counts.any(CHUNK + 64, CHUNK + 128) && counts.any(CHUNK + 70, CHUNK + 71));
        assert!(!counts.any(CHUNK + 71, CHUNK + 200) && !counts.any(4, CHUNK));
    }
}
