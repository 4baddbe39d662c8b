//! Who owns which host cluster, counted from the tables on disk: the ground truth for refcounts, checks and the tree's
//! validation before it is written to.

use std::collections::BTreeMap;

use crate::counts::Clusters;
pub(crate) use crate::counts::Counts;
use crate::error::{Error, Result};
use crate::format::be64;
use crate::format::entry::{L2Entry, decode_l1};
use crate::format::header::Header;
use crate::format::refcount::TABLE_OFFSET;
use crate::geometry::ENTRY;
use crate::refcounts::RefcountTable;
use crate::snapshots;
use crate::storage::Storage;

/// Bytes of a table looked at in one go.
const PIECE: u64 = 64 << 10;
/// L2 tables that the active disk and its snapshots may have together, for a check: 2 TiB of disk with 4 KiB clusters.
const SNAPSHOT_TABLES_MAX: usize = 1 << 20;

/// What a walk through L1 and L2 found.
#[derive(Debug, Default)]
pub(crate) struct References {
    pub(crate) counts: Counts,
    /// Clusters that entries of the active tables with the COPIED bit refer to.
    copied: Counts,
    /// Clusters that entries of the active tables without it refer to.
    uncopied: Counts,
    /// Clusters of structures with one owner: header, L1 tables, refcounts, snapshot table, bitmaps.
    exclusive: Clusters,
    /// Clusters that are L2 tables.
    tables: Clusters,
    /// Refcount table entries that lead nowhere, in order: their blocks count as absent.
    pub(crate) bad_blocks: Vec<usize>,
    /// What the active tables map.
    pub(crate) mapped: MappedClusters,
    /// Rules broken, in the order in which they were met.
    pub(crate) faults: Faults,
    /// Faults that are no more than a COPIED bit missing from an L1 entry.
    pub(crate) not_copied: u64,
}

/// Guest clusters with a host cluster, and how they lie.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MappedClusters {
    /// All of them: data, compressed data, kept zero clusters.
    pub(crate) allocated: u64,
    pub(crate) compressed: u64,
    /// Clusters that do not follow in the file on the one before them in their table, and all compressed ones.
    pub(crate) fragmented: u64,
    /// Where the next one would lie that follows on the last one of this table.
    next: Option<u64>,
}

impl MappedClusters {
    fn add(&mut self, times: u64, host: u64, cluster_size: u64) {
        self.allocated += times;
        self.fragmented += times * u64::from(self.next.is_some_and(|next| next != host));
        self.next = Some(host + cluster_size);
    }

    fn add_compressed(&mut self, times: u64) {
        self.allocated += times;
        self.compressed += times;
        self.fragmented += times;
    }
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
const NO_DATA_HERE: &str = "data must not lie in the file's own structures";

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

    /// Whether an entry without the COPIED bit refers to a cluster that has no other owner (any more).
    pub(crate) fn lacks_copied_bits(&self) -> bool {
        self.uncopied.used(0, u64::MAX).any(|(cluster, _)| self.counts.load(cluster) == 1)
    }

    /// Takes the clusters of a range, which lies inside the file, for a structure that shares them with nobody. Returns
    /// whether that is so.
    pub(crate) fn claim_all(&mut self, structure: &'static str, offset: u64, bytes: u64, cluster_size: u64) -> bool {
        let before = self.faults.count;
        for host in (offset..offset + bytes).step_by(cluster_size as usize) {
            self.claim(host / cluster_size, || Error::corrupt(structure, offset, host, ONE_OWNER));
        }
        self.faults.count == before
    }

    fn note_copied(&mut self, uses: Uses, cluster: u64, copied: bool) {
        if copied { &mut self.copied } else { &mut self.uncopied }.add_times(cluster, uses.active);
    }

    fn claim(&mut self, cluster: u64, fault: impl FnOnce() -> Error) -> bool {
        self.exclusive.insert(cluster);
        let free = self.counts.add(cluster) == 0;
        if !free {
            self.faults.push(fault());
        }
        free
    }

    /// Counts references to payload; one to a structure of the file is a fault.
    fn count_payload(&mut self, uses: Uses, cluster: u64, fault: impl Fn(&'static str) -> Error, rule: &'static str) {
        let shared = self.counts.add_times(cluster, uses.all) > 0;
        if self.exclusive.contains(cluster) || self.tables.contains(cluster) {
            self.faults.push(fault(NO_DATA_HERE));
        } else if shared && self.copied.load(cluster) > 0 {
            self.faults.push(fault(rule));
        }
    }
}

/// How often something is referred to.
#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    /// By all L1 tables.
    all: u64,
    /// By the active one: only there do COPIED bits mean anything.
    active: u64,
}

const ACTIVE: Uses = Uses { all: 1, active: 1 };
const SNAPSHOT: Uses = Uses { all: 1, active: 0 };

/// Walks header, L1, every L2 table, those of snapshots too, and, where they are to be kept, the refcount structures.
/// Faults are collected, not returned: the caller decides whether they forbid what it is about to do. An error means that
/// the file could not be read, or that it is beyond the bounds of what can be counted.
///
/// A table is walked once, however many entries lead to it, so that the work is bounded by the file.
pub(crate) fn count(storage: &dyn Storage, header: &Header, refcounts: Option<&RefcountTable>) -> Result<References> {
    let geometry = header.geometry;
    let cluster_size = geometry.cluster_size();
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    let mut found = References::default();
    found.claim_all("header", 0, cluster_size, cluster_size);
    found.claim_all("L1 table", header.l1_offset, u64::from(header.l1_entries) * ENTRY, cluster_size);
    if let Some(table) = refcounts {
        found.claim_refcounts(table, cluster_size, length);
    }

    let walk = Walk { storage, header, length };
    let snapshots = snapshots::load(storage, header, length)?;
    if header.snapshots == 0 {
        walk.l1(&mut found, ACTIVE, header.l1_offset, u64::from(header.l1_entries), &mut |found, host, uses| {
            walk.l2(found, uses, host)
        })?;
    } else {
        // Tables and clusters may belong to several snapshots; each table is walked once, with the number of its owners.
        let mut tables = BTreeMap::<u64, Uses>::new();
        let mut collect = |_: &mut References, host: u64, uses: Uses| {
            let sum = tables.entry(host).or_default();
            *sum = Uses { all: sum.all + uses.all, active: sum.active + uses.active };
            if tables.len() > SNAPSHOT_TABLES_MAX {
                return Err(Error::unsupported("snapshots with more than 1048576 L2 tables"));
            }
            Ok(())
        };
        found.claim_all("snapshot table", header.snapshots_offset, snapshots.bytes, cluster_size);
        walk.l1(&mut found, ACTIVE, header.l1_offset, u64::from(header.l1_entries), &mut collect)?;
        for (offset, entries) in snapshots.l1_tables {
            if found.claim_all("L1 table of a snapshot", offset, entries * ENTRY, cluster_size) {
                walk.l1(&mut found, SNAPSHOT, offset, entries, &mut collect)?;
            }
        }
        for (host, uses) in tables {
            walk.l2(&mut found, uses, host)?;
        }
    }
    found.counts.refuse_overflow()?;
    Ok(found)
}

impl References {
    fn claim_refcounts(&mut self, table: &RefcountTable, cluster_size: u64, length: u64) {
        self.claim_all("refcount table", table.offset, table.clusters * cluster_size, cluster_size);
        for (index, entry) in table.entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let (at, host) = (table.offset + index as u64 * ENTRY, entry & TABLE_OFFSET);
            let fault = |rule| Error::corrupt("refcount table entry", at, *entry, rule);
            let sound = if host == 0 || host % cluster_size != 0 || entry & !TABLE_OFFSET != 0 || host >= length {
                self.faults.push(fault("must be a multiple of the cluster size, inside the file, reserved bits zero"));
                false
            } else {
                self.claim(host / cluster_size, || fault(ONE_OWNER))
            };
            if !sound {
                self.bad_blocks.push(index);
            }
        }
    }

    /// Counts a reference to an L2 table. Returns whether it is one, and not walked yet.
    fn claim_table(&mut self, uses: Uses, cluster: u64, snapshots: bool, fault: impl FnOnce() -> Error) -> bool {
        let before = self.counts.add_times(cluster, uses.all);
        let known = !self.tables.insert(cluster);
        let free = before == 0 || (snapshots && known && !self.exclusive.contains(cluster));
        if !free {
            self.faults.push(fault());
        }
        free
    }
}

/// A walk from an L1 table down to the data clusters.
struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    /// Length of the file: a reference is legal when its first byte is inside, the last cluster perhaps being cut short.
    length: u64,
}

impl Walk<'_> {
    /// Hands every sound L2 table of an L1 table to `each`.
    fn l1(
        &self,
        found: &mut References,
        uses: Uses,
        offset: u64,
        entries: u64,
        each: &mut dyn FnMut(&mut References, u64, Uses) -> Result<()>,
    ) -> Result<()> {
        let cluster_size = self.header.geometry.cluster_size();
        let with_snapshots = self.header.snapshots > 0;
        each_entry(self.storage, offset, entries, |at, raw| {
            let fault = |rule| Error::corrupt("L1 entry", at, raw, rule);
            let (host, copied) = match decode_l1(raw, self.header.geometry, at) {
                Ok(None) => return Ok(()),
                Ok(Some(table)) => table,
                Err(error) => {
                    found.faults.push(error);
                    return Ok(());
                }
            };
            if host >= self.length {
                found.faults.push(fault("the table must be inside the file"));
                return Ok(());
            }
            if !copied && !with_snapshots {
                found.faults.push(fault(NOT_COPIED));
                found.not_copied += 1;
            }
            let sound = found.claim_table(uses, host / cluster_size, with_snapshots, || fault(ONE_OWNER));
            found.note_copied(uses, host / cluster_size, copied);
            if sound { each(found, host, uses) } else { Ok(()) }
        })
    }

    fn l2(&self, found: &mut References, uses: Uses, table_host: u64) -> Result<()> {
        let geometry = self.header.geometry;
        let cluster_size = geometry.cluster_size();
        if self.storage.is_hole(table_host, cluster_size) {
            return Ok(());
        }
        let mut table = vec![0; cluster_size as usize];
        self.storage.read(table_host, &mut table).map_err(Error::io("read", table_host))?;
        let size = geometry.l2_entry_size();
        found.mapped.next = None;
        for (index, bytes) in table.chunks_exact(size as usize).enumerate() {
            let words = [be64(bytes, 0).unwrap_or(0), be64(bytes, ENTRY as usize).unwrap_or(0)];
            if words == [0, 0] {
                continue;
            }
            let words = words.get(..(size / ENTRY) as usize).unwrap_or_default();
            self.l2_entry(found, uses, words, table_host + index as u64 * size);
        }
        Ok(())
    }

    fn l2_entry(&self, found: &mut References, uses: Uses, words: &[u64], at: u64) {
        let cluster_size = self.header.geometry.cluster_size();
        let raw = words.first().copied().unwrap_or(0);
        let fault = |rule| Error::corrupt("L2 entry", at, raw, rule);
        let (host, copied) = match L2Entry::decode(words, self.header.geometry, self.header.version, at) {
            Ok(L2Entry::Unallocated | L2Entry::Zero { host: None, .. } | L2Entry::Subclusters { host: None, .. }) => {
                return;
            }
            Ok(L2Entry::Compressed { host, length }) => {
                self.compressed(found, uses, host, length, fault);
                return;
            }
            Ok(
                L2Entry::Data { host, copied }
                | L2Entry::Zero { host: Some(host), copied }
                | L2Entry::Subclusters { host: Some(host), copied, .. },
            ) => (host, copied),
            Err(error) => {
                found.faults.push(error);
                return;
            }
        };
        found.mapped.add(uses.active, host, cluster_size);
        if host >= self.length {
            found.faults.push(fault("the cluster must be inside the file"));
            return;
        }
        found.note_copied(uses, host / cluster_size, copied);
        found.count_payload(uses, host / cluster_size, fault, "a cluster with the COPIED bit has one owner");
    }

    fn compressed(
        &self,
        found: &mut References,
        uses: Uses,
        host: u64,
        bytes: u64,
        fault: impl Fn(&'static str) -> Error,
    ) {
        let cluster_size = self.header.geometry.cluster_size();
        found.mapped.add_compressed(uses.active);
        let last = (host + bytes - 1) / cluster_size;
        if last * cluster_size >= self.length {
            found.faults.push(fault("compressed data must end in a cluster of the file"));
            return;
        }
        let last = if mutant!("straddling_counted_once") { host / cluster_size } else { last };
        for cluster in host / cluster_size..=last {
            let rule = "compressed data must not share a cluster that has the COPIED bit";
            found.count_payload(uses, cluster, &fault, rule);
        }
    }
}

/// Calls `each` with offset and value of every entry of a table that is not zero, holding only a piece of it in memory.
pub(crate) fn each_entry(
    storage: &dyn Storage,
    offset: u64,
    count: u64,
    mut each: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let end = offset + count * ENTRY;
    let mut piece = vec![0; PIECE.min(end - offset) as usize];
    for start in (offset..end).step_by(PIECE as usize) {
        let length = PIECE.min(end - start);
        if storage.is_hole(start, length) {
            continue;
        }
        let bytes = piece.get_mut(..length as usize).unwrap_or_default();
        storage.read(start, bytes).map_err(Error::io("read", start))?;
        for (index, raw) in entries(bytes).enumerate().filter(|(_, raw)| *raw != 0) {
            each(start + index as u64 * ENTRY, raw)?;
        }
    }
    Ok(())
}

/// The big-endian 64-bit values of a table.
pub(crate) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(ENTRY as usize).map(|chunk| be64(chunk, 0).unwrap_or(0))
}
