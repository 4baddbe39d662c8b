//! How often each host cluster is referred to: compact where files are dense, and bounded where a file is not worth it.
//!
//! A hostile file can be sparse over many TiB and refer to one cluster here and one there. What such references may cost is
//! bounded by [`Clusters::BASE_CHUNKS`], beyond that by the number of references; a file that needs more is refused.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Error, Result};

/// Clusters per chunk of a set: 512 bytes of bits, so that references strewn over a sparse file cost little each.
const CHUNK: u64 = 1 << 12;
/// Clusters per page of counts beyond one.
const PAGE: u64 = 256;
/// A byte of a page that says "look into the map".
const MANY: u8 = u8::MAX;

/// A set of host clusters. Absent chunks are empty, so a sparse file of many TiB costs what it uses.
#[derive(Debug, Default)]
pub(crate) struct Clusters {
    chunks: BTreeMap<u64, Box<[u64]>>,
    members: u64,
    overflow: bool,
}

impl Clusters {
    /// Less than 40 MiB: enough for any file of 16 TiB with clusters of 64 KiB, however thinly it is used.
    const BASE_CHUNKS: u64 = 1 << 16;
    /// Members that pay for a further chunk: an eighth of what one can hold.
    const MEMBERS_PER_CHUNK: u64 = CHUNK / 8;

    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let word = self.chunks.get(&(cluster / CHUNK)).map_or(0, |chunk| chunk[(cluster % CHUNK / 64) as usize]);
        word >> (cluster % 64) & 1 != 0
    }

    /// Returns whether the cluster was not in the set.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        let (key, affordable) = (cluster / CHUNK, Self::BASE_CHUNKS + self.members / Self::MEMBERS_PER_CHUNK);
        if self.chunks.len() as u64 >= affordable && !self.chunks.contains_key(&key) {
            self.overflow = true;
            return true;
        }
        let chunk = self.chunks.entry(key).or_insert_with(|| vec![0; (CHUNK / 64) as usize].into());
        let word = &mut chunk[(cluster % CHUNK / 64) as usize];
        let bit = 1 << (cluster % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.members += u64::from(new);
        new
    }

    fn remove(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster / CHUNK)) {
            let word = &mut chunk[(cluster % CHUNK / 64) as usize];
            self.members -= *word >> (cluster % 64) & 1;
            *word &= !(1 << (cluster % 64));
        }
    }

    /// Whether any cluster of `[first, end)` is in the set.
    pub(crate) fn any(&self, first: u64, end: u64) -> bool {
        first < end
            && self.chunks.range(first / CHUNK..=(end - 1) / CHUNK).any(|(index, chunk)| {
                let base = index * CHUNK;
                let (low, high) = (first.max(base) - base, end.min(base + CHUNK) - base);
                if low % 64 == 0 && high % 64 == 0 {
                    return chunk[(low / 64) as usize..(high / 64) as usize].iter().any(|word| *word != 0);
                }
                (low..high).any(|bit| chunk[(bit / 64) as usize] >> (bit % 64) & 1 != 0)
            })
    }

    /// The members in `[first, end)`, in order.
    pub(crate) fn members(&self, first: u64, end: u64) -> impl Iterator<Item = u64> {
        let last = end.max(first + 1) - 1;
        let words = self.chunks.range(first / CHUNK..=last / CHUNK).flat_map(move |(index, chunk)| {
            let base = index * CHUNK;
            let (low, high) = ((first.max(base) - base) / 64, (last.min(base + CHUNK - 1) - base) / 64);
            let words = (low..).zip(&chunk[low as usize..=high as usize]).filter(|(_, word)| **word != 0);
            words.map(move |(at, word)| (base + at * 64, *word))
        });
        let bits =
            |(base, word): (u64, u64)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| base + bit);
        words.flat_map(bits).filter(move |cluster| (first..end).contains(cluster))
    }
}

/// Counts per host cluster: one bit says "at least one", pages hold what is beyond that, a map what is beyond a byte.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    ones: Clusters,
    beyond: HashMap<u64, Box<[u8]>>,
    many: HashMap<u64, u64>,
    overflow: bool,
}

impl Counts {
    /// Pages that any file may need, about 20 MiB; more of them must be paid for by members, as chunks are.
    const BASE_PAGES: u64 = 1 << 16;
    const MEMBERS_PER_PAGE: u64 = PAGE / 8;

    pub(crate) fn load(&self, cluster: u64) -> u64 {
        u64::from(self.ones.contains(cluster)) + self.load_beyond(cluster)
    }

    fn load_beyond(&self, cluster: u64) -> u64 {
        match self.beyond.get(&(cluster / PAGE)).map_or(0, |page| page[(cluster % PAGE) as usize]) {
            MANY => self.many.get(&cluster).copied().unwrap_or(0),
            count => u64::from(count),
        }
    }

    fn store_beyond(&mut self, cluster: u64, count: u64) {
        let affordable = Self::BASE_PAGES + self.ones.members / Self::MEMBERS_PER_PAGE;
        let key = cluster / PAGE;
        if self.beyond.len() as u64 >= affordable && !self.beyond.contains_key(&key) {
            self.overflow = true;
            return;
        }
        let page = self.beyond.entry(key).or_insert_with(|| vec![0; PAGE as usize].into());
        let byte = u8::try_from(count).unwrap_or(MANY);
        page[(cluster % PAGE) as usize] = byte;
        if byte == MANY {
            self.many.insert(cluster, count);
        } else {
            self.many.remove(&cluster);
        }
    }

    /// Adds one reference and returns the count before.
    pub(crate) fn add(&mut self, cluster: u64) -> u64 {
        self.add_times(cluster, 1)
    }

    /// Adds references and returns the count before.
    pub(crate) fn add_times(&mut self, cluster: u64, times: u64) -> u64 {
        if times == 0 {
            return self.load(cluster);
        }
        let new = self.ones.insert(cluster);
        if new && times == 1 {
            return 0;
        }
        let before = if new { 0 } else { 1 + self.load_beyond(cluster) };
        self.store_beyond(cluster, before.saturating_add(times) - 1);
        before
    }

    /// Takes one reference away, where there is one.
    pub(crate) fn remove(&mut self, cluster: u64) {
        match self.load_beyond(cluster) {
            0 => self.ones.remove(cluster),
            beyond => self.store_beyond(cluster, beyond - 1),
        }
    }

    /// Whether any cluster of `[first, end)` has a reference.
    pub(crate) fn any(&self, first: u64, end: u64) -> bool {
        self.ones.any(first, end)
    }

    /// The clusters of `[first, end)` with references, in order, with their counts.
    pub(crate) fn used(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        self.ones.members(first, end).map(|cluster| (cluster, 1 + self.load_beyond(cluster)))
    }

    /// Runs `[first, end)` of clusters without references, below `end`.
    pub(crate) fn unused_runs(&self, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut next = 0;
        let borders = self.ones.members(0, end).chain(std::iter::once(end));
        borders.filter_map(move |used| {
            let run = (next, used);
            next = used + 1;
            (run.0 < run.1).then_some(run)
        })
    }

    /// The groups of `clusters` neighbours (a power of two, at least 64) in which there is a reference, in order.
    pub(crate) fn groups(&self, clusters: u64) -> Vec<u64> {
        let mut groups = Vec::new();
        for cluster in self.ones.members(0, u64::MAX) {
            let group = cluster / clusters;
            if groups.last() != Some(&group) {
                groups.push(group);
            }
        }
        groups
    }

    /// The highest count.
    pub(crate) fn highest(&self) -> u64 {
        let beyond = self.beyond.values().flat_map(|page| page.iter().copied()).filter(|count| *count != MANY).max();
        let many = self.many.values().copied().max().unwrap_or(0);
        u64::from(self.ones.members > 0) + many.max(u64::from(beyond.unwrap_or(0)))
    }

    /// Refuses counts that do not hold everything, because there was no memory for it.
    pub(crate) fn refuse_overflow(&self) -> Result<()> {
        if self.overflow || self.ones.overflow {
            return Err(Error::unsupported(
                "images that use a huge file so thinly that counting its clusters takes too much memory",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_up_and_down_and_runs_without_owner_are_found() {
        let mut counts = Counts::default();
        for cluster in [0, 1, 3, 3, CHUNK, CHUNK + 70] {
            counts.add(cluster);
        }
        assert_eq!((counts.load(2), counts.load(3), counts.load(CHUNK)), (0, 2, 1));
        assert_eq!((counts.groups(64), counts.groups(CHUNK)), (vec![0, 64, 65], vec![0, 1]));
        assert_eq!(counts.used(1, CHUNK + 1).collect::<Vec<_>>(), [(1, 1), (3, 2), (CHUNK, 1)]);
        counts.remove(3);
        counts.remove(1);
        assert_eq!((counts.load(3), counts.load(1)), (1, 0));
        assert_eq!(counts.unused_runs(6).collect::<Vec<_>>(), [(1, 3), (4, 6)]);
        assert!(counts.any(CHUNK + 64, CHUNK + 128) && counts.any(CHUNK + 70, CHUNK + 71));
        assert!(!counts.any(CHUNK + 71, CHUNK + 200) && !counts.any(4, CHUNK));
    }

    #[test]
    fn references_strewn_over_an_exbibyte_cost_what_they_are() {
        let mut counts = Counts::default();
        let clusters = [0, 1 << 20, (1 << 44) - 1];
        for cluster in clusters {
            counts.add(cluster);
        }
        let runs = [(1, 1 << 20), ((1 << 20) + 1, (1 << 44) - 1), (1 << 44, 1 << 45)];
        assert!(counts.unused_runs(1 << 45).eq(runs));
        assert!(counts.used(0, u64::MAX).map(|(cluster, _)| cluster).eq(clusters));
        assert!(!counts.any(2, 1 << 20) && counts.any(2, u64::MAX));
    }

    #[test]
    fn counts_beyond_a_byte_are_exact_in_both_directions() {
        let mut counts = Counts::default();
        assert_eq!(counts.add_times(7, 600), 0);
        assert_eq!((counts.add(7), counts.highest()), (600, 601));
        (0..600).for_each(|_| counts.remove(7));
        assert_eq!((counts.load(7), counts.highest()), (1, 1));
        counts.remove(7);
        assert_eq!((counts.load(7), counts.highest()), (0, 0));
    }

    #[test]
    fn references_strewn_over_a_huge_file_are_refused_before_they_fill_the_memory() {
        let mut counts = Counts::default();
        (0..Clusters::BASE_CHUNKS).for_each(|chunk| assert_eq!(counts.add(chunk * CHUNK), 0));
        counts.refuse_overflow().unwrap();
        // A few more are paid for by the members that there are.
        (0..1000).for_each(|chunk| assert_eq!(counts.add((1 << 40) + chunk * CHUNK), 0));
        assert!(matches!(counts.refuse_overflow(), Err(Error::Unsupported { .. })));
        assert!((counts.ones.chunks.len() as u64) < Clusters::BASE_CHUNKS + 1000);

        let mut dense = Counts::default();
        (0..100 * CHUNK).for_each(|cluster| assert_eq!(dense.add(cluster), 0));
        dense.refuse_overflow().unwrap();
    }
}
