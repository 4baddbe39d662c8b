//! The VM at one moment: what a backup must bring back, and what changed since the moment before.
//!
//! A disk changes without its file being touched: the writes are laid over it. They are made blindly, as to a disk whose
//! file system nobody knows, and so are different data, zeroes, single sectors and the last one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::DemoError;
use super::content::Content;
use super::data::Data;
use super::disks::DemoDisk;
use crate::node::fake::{FakeDisk, Source};

/// Change tracking knows blocks of this size.
const TRACKED_BYTES: u64 = 64 << 10;
const SECTOR: u64 = 512;
/// Where a disk changes: evenly over all of it.
const PLACES: u64 = 24;
/// How much changes there, in turn.
const LENGTHS: [u64; 4] = [SECTOR, 8 << 10, 64 << 10, 256 << 10];
/// Of so many places one is zeroed.
const ZEROED: u64 = 3;

/// All disks of the VM at one moment, in the order of the VM.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// 1 for the disks as they were given.
    number: usize,
    disks: Vec<(u32, FakeDisk)>,
}

impl State {
    /// The disks as they are.
    pub(super) fn first(disks: &[DemoDisk]) -> Self {
        let disks = disks.iter().map(|disk| {
            let source = Source::File { path: disk.path.clone(), size_bytes: disk.size_bytes };
            (disk.device_key, FakeDisk::new(source, change_id(disk.device_key, 1)))
        });
        Self { number: 1, disks: disks.collect() }
    }

    /// The state after this one: something has changed on every disk.
    pub(super) fn next(&self) -> Self {
        let number = self.number + 1;
        let disks = self.disks.iter().zip(0..).map(|((key, disk), index)| {
            let size_bytes = disk.source.size_bytes();
            let writes = writes(size_bytes, number as u64, &mut Data::new((number as u64) << 8 | index));
            let changed = tracked(&writes, size_bytes);
            // Whoever has an older state is told what changed since that, too.
            let older =
                disk.changes.iter().map(|(since, ranges)| (since.clone(), joined(ranges.iter().chain(&changed))));
            let changes = older.chain([(disk.change_id.clone(), changed.clone())]).collect();
            let source = Source::Changed { before: Arc::new(disk.source.clone()), writes: writes.into() };
            (*key, FakeDisk { source, change_id: change_id(*key, number), changes })
        });
        Self { number, disks: disks.collect() }
    }

    /// Its place among the states.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// The disks as the node finds them in a snapshot.
    pub(super) fn snapshot(&self) -> BTreeMap<u32, FakeDisk> {
        self.disks.iter().cloned().collect()
    }

    /// How many bytes of each disk a backup will receive: what has changed, or all of it at first.
    pub(super) fn expected_bytes(&self) -> Vec<u64> {
        let expected = |key: u32, disk: &FakeDisk| match disk.changes.get(&change_id(key, self.number - 1)) {
            Some(ranges) => ranges.iter().map(|(_, length)| length).sum(),
            None => disk.source.size_bytes(),
        };
        self.disks.iter().map(|(key, disk)| expected(*key, disk)).collect()
    }

    /// Reads every disk and keeps its hash: what restores are held against.
    ///
    /// # Errors
    /// A disk cannot be read.
    pub(super) async fn contents(&self) -> Result<Vec<Content>, DemoError> {
        let mut contents = Vec::with_capacity(self.disks.len());
        for (disk_id, (_, disk)) in self.disks.iter().enumerate() {
            let content = Content::of_source(&disk.source).await;
            contents.push(content.map_err(|source| DemoError::SourceUnreadable { disk_id, source })?);
        }
        Ok(contents)
    }
}

/// One history for each disk, and a number that grows with every state of it.
fn change_id(device_key: u32, number: usize) -> String {
    format!("52 de 6d 6f 00 00 {device_key:04x}/{number}")
}

/// What a state changes on a disk.
fn writes(size_bytes: u64, number: u64, data: &mut Data) -> Vec<(u64, Vec<u8>)> {
    let region = (size_bytes / PLACES / TRACKED_BYTES * TRACKED_BYTES).max(SECTOR);
    let places = LENGTHS.into_iter().cycle().zip(0..PLACES).map(|(length, place)| {
        // Another block in each state; short writes begin within one.
        let within = if length < TRACKED_BYTES { 3 * SECTOR } else { 0 };
        ((place * region + number * TRACKED_BYTES + within) % size_bytes, length, place % ZEROED == 0)
    });
    let last_sector = (size_bytes - SECTOR, SECTOR, false);
    let write = |(offset, length, zeroed): (u64, u64, bool)| {
        // All lengths are small.
        let length = length.min(size_bytes - offset) as usize;
        (offset, if zeroed { vec![0; length] } else { data.next(length).to_vec() })
    };
    places.chain([last_sector]).map(write).collect()
}

/// The blocks that hold these writes, as offset and length in ascending order.
fn tracked(writes: &[(u64, Vec<u8>)], size_bytes: u64) -> Vec<(u64, u64)> {
    let block = |offset: u64| offset / TRACKED_BYTES * TRACKED_BYTES;
    let blocks: Vec<(u64, u64)> = writes
        .iter()
        .map(|(offset, data)| {
            let (begin, end) = (block(*offset), block(offset + data.len() as u64 + TRACKED_BYTES - 1).min(size_bytes));
            (begin, end - begin)
        })
        .collect();
    joined(blocks.iter())
}

/// All that is in any of these ranges, as offset and length in ascending order.
fn joined<'a>(ranges: impl Iterator<Item = &'a (u64, u64)>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = ranges.map(|(offset, length)| (*offset, offset + length)).collect();
    ranges.sort_unstable();
    ranges.dedup_by(|later, earlier| {
        let joins = later.0 <= earlier.1;
        if joins {
            earlier.1 = earlier.1.max(later.1);
        }
        joins
    });
    ranges.into_iter().map(|(start, end)| (start, end - start)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(size_bytes: usize) -> State {
        let disk = FakeDisk::new(Source::Bytes(vec![9; size_bytes].into()), change_id(2000, 1));
        State { number: 1, disks: vec![(2000, disk)] }
    }

    #[tokio::test]
    async fn every_change_is_tracked_on_disks_of_any_size() {
        for size in [512, 4096, (1 << 20) + 512, (8 << 20) + 512 * 3] {
            let mut before = state(size);
            let first = before.clone();
            for _ in 0..2 {
                let after = before.next();
                let [old, new] = [&before, &after].map(|state| state.disks[0].1.clone());
                let bytes = [old.source.read(0, size).await.unwrap(), new.source.read(0, size).await.unwrap()];
                assert_eq!(new.source.size_bytes(), size as u64);
                assert_ne!(bytes[0], bytes[1], "nothing changed");
                carry(&new, &old.change_id, &bytes[0], &bytes[1]);
                let first = &first.disks[0].1;
                carry(&new, &first.change_id, &first.source.read(0, size).await.unwrap(), &bytes[1]);
                before = after;
            }
        }
    }

    /// Holds that what is tracked since a state makes of its bytes those of the new one.
    #[track_caller]
    fn carry(new: &FakeDisk, since: &str, old_bytes: &[u8], new_bytes: &[u8]) {
        let mut carried = old_bytes.to_vec();
        let mut position = None;
        for (offset, length) in &new.changes[since] {
            assert!(position.is_none_or(|end| end < *offset), "not in order");
            position = Some(offset + length);
            let range = *offset as usize..(offset + length) as usize;
            carried[range.clone()].copy_from_slice(&new_bytes[range]);
        }
        assert!(carried == new_bytes, "a change of {} bytes since {since} is not tracked", new_bytes.len());
    }

    #[test]
    fn little_of_a_large_disk_changes() {
        let size = 64 << 20;
        let next = state(size).next();
        assert!(next.expected_bytes()[0] * 10 < size as u64, "{:?}", next.expected_bytes());
        assert_eq!(state(size).expected_bytes(), [size as u64]);
    }
}
