//! L1 and L2 tables in memory: which entries are newer than the disk, and what a flush has to write.
//!
//! One mutex guards the whole mapping. It is never held across I/O: a table that is not here is read without it and put in
//! afterwards, and a flush works on a clone.

use crate::sync::atomic::{AtomicUsize, Ordering};
use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::format::entry::{self, L2Entry};
use crate::format::header::Header;
use crate::geometry::{ENTRY, Geometry, SECTOR};
use crate::l1::L1;
use crate::references::entries;
use crate::storage::Storage;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};

/// A set of sectors of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sectors(Vec<u64>);

impl Sectors {
    fn empty(table_bytes: u64) -> Self {
        Self(vec![0; (table_bytes / SECTOR).div_ceil(64) as usize])
    }

    fn insert(&mut self, sector: usize) {
        self.0[sector / 64] |= 1 << (sector % 64);
    }

    fn contains(&self, sector: usize) -> bool {
        self.0[sector / 64] >> (sector % 64) & 1 != 0
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Moves all members out.
    fn take(&mut self) -> Self {
        let taken = self.clone();
        self.0.fill(0);
        taken
    }

    /// Runs `[first, end)` of neighbouring members.
    fn runs(&self) -> Vec<(usize, usize)> {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for sector in (0..self.0.len() * 64).filter(|sector| self.contains(*sector)) {
            match runs.last_mut() {
                Some((_, end)) if *end == sector => *end += 1,
                _ => runs.push((sector, sector + 1)),
            }
        }
        runs
    }
}

/// One L2 table.
#[derive(Debug)]
pub(crate) struct Table {
    /// Where it lies, or will lie.
    host: u64,
    entries: Box<[u64]>,
    /// The L1 on disk points at it: a completed flush wrote it, or it came from disk.
    linked: bool,
    /// Sectors changed since the last clone.
    dirty: Sectors,
    /// Sectors of the clone that a flush is writing.
    flushing: Sectors,
    /// For eviction: the clock at the last use.
    used: u64,
}

impl Table {
    fn is_clean(&self) -> bool {
        self.linked && self.dirty.is_empty() && self.flushing.is_empty()
    }

    /// Host offset and bytes of each run of the sectors that a flush is writing, as the entries are now.
    fn flushing_runs(&self) -> Vec<(u64, Vec<u8>)> {
        let run = |(first, end): (usize, usize)| {
            let per_sector = (SECTOR / ENTRY) as usize;
            let raw = &self.entries[first * per_sector..end * per_sector];
            (self.host + first as u64 * SECTOR, raw.iter().flat_map(|entry| entry.to_be_bytes()).collect())
        };
        self.flushing.runs().into_iter().map(run).collect()
    }
}

#[derive(Debug)]
struct State {
    l1: L1,
    tables: HashMap<usize, Table>,
    loading: HashSet<usize>,
    clock: u64,
}

/// The mapping of one image.
#[derive(Debug)]
pub(crate) struct Tables {
    geometry: Geometry,
    header: Header,
    /// Tables kept in memory while they are clean; dirty ones stay whatever their number.
    keep: usize,
    /// Tables that are not clean, so that a request can ask without the lock.
    unclean: AtomicUsize,
    state: Mutex<State>,
    loaded: Condvar,
}

/// One L2 table under the mapping lock.
pub(crate) struct TableView<'a> {
    tables: &'a Tables,
    state: MutexGuard<'a, State>,
    l1_index: usize,
}

/// A table must be read first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotHere;

/// What a flush has to write for one table.
#[derive(Debug)]
pub(crate) struct TableClone {
    pub(crate) l1_index: usize,
    pub(crate) host: u64,
    pub(crate) linked: bool,
    /// Host offset and bytes of each run of changed sectors.
    pub(crate) runs: Vec<(u64, Vec<u8>)>,
}

impl Tables {
    /// `l1` as decoded from disk.
    pub(crate) fn new(header: &Header, l1: L1, cache_bytes: usize) -> Self {
        let keep = (cache_bytes / header.geometry.cluster_size() as usize).max(2);
        let state = State { l1, tables: HashMap::new(), loading: HashSet::new(), clock: 0 };
        Self {
            geometry: header.geometry,
            header: header.clone(),
            keep,
            unclean: AtomicUsize::new(0),
            state: Mutex::new(state),
            loaded: Condvar::new(),
        }
    }

    /// The table of an L1 entry, read from disk if need be; `None` when there is none.
    pub(crate) fn view(&self, storage: &dyn Storage, l1_index: usize) -> Result<Option<TableView<'_>>> {
        let mut state = lock(&self.state);
        loop {
            let host = state.l1.get(l1_index);
            if host == 0 {
                return Ok(None);
            }
            state.clock += 1;
            let now = state.clock;
            if let Some(table) = state.tables.get_mut(&l1_index) {
                table.used = now;
                return Ok(Some(TableView { tables: self, state, l1_index }));
            }
            if !state.loading.insert(l1_index) {
                state = wait(&self.loaded, state);
                continue;
            }
            drop(state);
            let read = self.read(storage, host);
            state = lock(&self.state);
            state.loading.remove(&l1_index);
            self.loaded.notify_all();
            let table = read?;
            self.evict(&mut state);
            state.tables.insert(l1_index, table);
        }
    }

    /// As [`Tables::view`], without reading it: `Err` if it is not here.
    pub(crate) fn glance(&self, l1_index: usize) -> std::result::Result<Option<TableView<'_>>, NotHere> {
        let state = lock(&self.state);
        if state.l1.get(l1_index) == 0 {
            return Ok(None);
        }
        if state.tables.contains_key(&l1_index) {
            Ok(Some(TableView { tables: self, state, l1_index }))
        } else {
            Err(NotHere)
        }
    }

    /// The table of an L1 entry, made at `host` when there is none. Returns whether `host` was taken.
    pub(crate) fn make(&self, l1_index: usize, host: u64) -> bool {
        let mut state = lock(&self.state);
        if state.l1.get(l1_index) != 0 || !state.l1.set(l1_index, host) {
            return false;
        }
        let entries = vec![0; (self.geometry.cluster_size() / ENTRY) as usize].into();
        let table = self.table(host, entries, false);
        self.unclean.fetch_add(1, Ordering::Relaxed);
        self.evict(&mut state);
        state.tables.insert(l1_index, table);
        true
    }

    /// What a clone would hold if it were taken now, for a mistake that tests make.
    pub(crate) fn live_runs(&self, clone: &TableClone) -> Vec<(u64, Vec<u8>)> {
        lock(&self.state).tables.get(&clone.l1_index).map(Table::flushing_runs).unwrap_or_default()
    }

    /// The L1 as it is in memory, for a mistake that tests make (`mutants.rs`): it knows tables that no disk has.
    pub(crate) fn live_l1(&self) -> L1 {
        lock(&self.state).l1.clone()
    }

    /// Makes room for tables up to an L1 of `entries` entries.
    pub(crate) fn grow(&self, entries: usize) {
        let l1 = &mut lock(&self.state).l1;
        l1.resize(entries.max(l1.len()));
    }

    pub(crate) fn has(&self, l1_index: usize) -> bool {
        lock(&self.state).l1.get(l1_index) != 0
    }

    /// Whether half of the memory for tables holds changes, so that a flush should make some of it droppable.
    pub(crate) fn is_crowded(&self) -> bool {
        self.unclean.load(Ordering::Relaxed) > self.keep / 2
    }

    /// Takes everything that is newer than the disk, and what `observe` returns in the same moment. The tables stay dirty
    /// until [`Tables::flushed`].
    pub(crate) fn clone_dirty<T>(&self, observe: impl FnOnce() -> T) -> (Vec<TableClone>, T) {
        let mut state = lock(&self.state);
        let mut clones = Vec::new();
        for (l1_index, table) in state.tables.iter_mut().filter(|(_, table)| !table.dirty.is_empty()) {
            table.flushing = table.dirty.take();
            let runs = table.flushing_runs();
            clones.push(TableClone { l1_index: *l1_index, host: table.host, linked: table.linked, runs });
            if mutant!("clean_before_b2") {
                table.linked = true;
                table.flushing.take();
            }
        }
        clones.sort_by_key(|clone| clone.host);
        (clones, observe())
    }

    /// The clones are durable, and so are the links to them.
    pub(crate) fn flushed(&self, clones: &[TableClone]) {
        let mut state = lock(&self.state);
        for clone in clones {
            if let Some(table) = state.tables.get_mut(&clone.l1_index) {
                table.linked = true;
                table.flushing.take();
                self.unclean.fetch_sub(usize::from(table.is_clean()), Ordering::Relaxed);
            }
        }
    }

    fn read(&self, storage: &dyn Storage, host: u64) -> Result<Table> {
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        storage.read(host, &mut bytes).map_err(Error::io("read", host))?;
        let length = storage.length().map_err(Error::io("fstat", 0))?;
        let entries: Box<[u64]> = entries(&bytes).collect();
        let size = self.geometry.l2_entry_size();
        for (index, words) in entries.chunks_exact((size / ENTRY) as usize).enumerate() {
            if words.iter().any(|word| *word != 0) {
                let at = host + index as u64 * size;
                L2Entry::decode(words, self.geometry, self.header.version, at)?.refuse_outside(
                    &self.header,
                    words,
                    at,
                    length,
                )?;
            }
        }
        Ok(self.table(host, entries, true))
    }

    fn table(&self, host: u64, entries: Box<[u64]>, linked: bool) -> Table {
        let bytes = self.geometry.cluster_size();
        let (dirty, flushing) = (Sectors::empty(bytes), Sectors::empty(bytes));
        Table { host, entries, linked, dirty, flushing, used: 0 }
    }

    /// Makes room for one more table by dropping the clean one that was used longest ago.
    fn evict(&self, state: &mut State) {
        while state.tables.len() >= self.keep {
            let clean = state.tables.iter().filter(|(_, table)| table.is_clean());
            let Some(oldest) = clean.min_by_key(|(_, table)| table.used).map(|(index, _)| *index) else { return };
            state.tables.remove(&oldest);
        }
    }
}

impl TableView<'_> {
    fn table(&self) -> &Table {
        // `view` hands this out only for a table that is there, and the lock has been held since.
        &self.state.tables[&self.l1_index]
    }

    /// The entry of a guest cluster of this table.
    pub(crate) fn entry(&self, cluster: u64) -> Result<L2Entry> {
        let geometry = self.tables.geometry;
        let (index, words) = (geometry.l2_index(cluster), (geometry.l2_entry_size() / ENTRY) as usize);
        let table = self.table();
        let at = table.host + index as u64 * geometry.l2_entry_size();
        L2Entry::decode(&table.entries[index * words..(index + 1) * words], geometry, self.tables.header.version, at)
    }

    /// Whether what this entry says is what the disk says, and will stay so whatever a running flush does.
    pub(crate) fn is_durable(&self, cluster: u64) -> bool {
        let sector = self.tables.geometry.l2_index(cluster) / (SECTOR / ENTRY) as usize;
        let table = self.table();
        table.linked && !table.dirty.contains(sector) && !table.flushing.contains(sector)
    }

    /// Changes the (standard) entry of a guest cluster of this table, in memory.
    pub(crate) fn set(&mut self, cluster: u64, raw: u64) {
        let index = self.tables.geometry.l2_index(cluster);
        if let Some(table) = self.state.tables.get_mut(&self.l1_index)
            && table.entries[index] != raw
        {
            self.tables.unclean.fetch_add(usize::from(table.is_clean()), Ordering::Relaxed);
            table.entries[index] = raw;
            table.dirty.insert(index / (SECTOR / ENTRY) as usize);
        }
    }
}

/// The L1 entries of one sector, encoded, with the sector's offset in the table.
pub(crate) fn l1_sector(disk_l1: &L1, l1_index: usize) -> (u64, [u8; SECTOR as usize]) {
    let per_sector = (SECTOR / ENTRY) as usize;
    let first = l1_index / per_sector * per_sector;
    let mut bytes = [0; SECTOR as usize];
    for (index, chunk) in (first..).zip(bytes.chunks_exact_mut(ENTRY as usize)) {
        let host = disk_l1.get(index);
        let raw = if host == 0 { entry::UNALLOCATED } else { entry::encode_l1(host) };
        chunk.copy_from_slice(&raw.to_be_bytes());
    }
    (first as u64 * ENTRY, bytes)
}
