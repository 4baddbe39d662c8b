//! What a guest asked of an image and when it was answered, byte by byte, and what that allows a sector to read as after a
//! crash. For recordings of one thread; where several share an image: `history.rs`.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::power_cut::CrashState;

const SECTOR: usize = 512;

/// A write, zero or discard.
struct Change {
    issued: u64,
    /// For ever, if it failed.
    replied: u64,
    first_sector: usize,
    /// What its sectors read as afterwards.
    sectors: Vec<[u8; SECTOR]>,
    /// Durable by itself.
    durable: bool,
}

/// Everything that was asked, in order.
pub struct Requests {
    /// The disk before; it reads as zeroes past its end.
    initial: Vec<u8>,
    changes: Vec<Change>,
    /// Issue and reply of whatever makes durable what was answered before it.
    barriers: Vec<(u64, u64)>,
}

impl Requests {
    pub fn new(initial: Vec<u8>) -> Self {
        Self { initial, changes: Vec::new(), barriers: Vec::new() }
    }

    /// A change of `length` bytes at `offset`, after which the disk is to read as `model`.
    pub fn changed(&mut self, times: (u64, u64), model: &[u8], offset: usize, length: usize, durable: bool) {
        let first_sector = offset / SECTOR;
        let end = (offset + length).next_multiple_of(SECTOR);
        let sectors =
            model[first_sector * SECTOR..end].chunks(SECTOR).map(|sector| sector.try_into().unwrap()).collect();
        let (issued, replied) = times;
        self.changes.push(Change { issued, replied, first_sector, sectors, durable });
    }

    /// A flush, or what contains one.
    pub fn flushed(&mut self, issued: u64, replied: u64) {
        self.barriers.push((issued, replied));
    }

    /// When each change was issued.
    pub fn changes_issued(&self) -> impl Iterator<Item = u64> {
        self.changes.iter().map(|change| change.issued)
    }

    /// The first sector of a disk after a crash that reads as nothing it may.
    pub fn illegal_sector(&self, found: &[u8], state: &CrashState) -> Option<String> {
        let times = [state.earliest + 1, state.latest];
        found.chunks(SECTOR).enumerate().find_map(|(sector, value)| {
            let time = times.into_iter().find(|time| !self.is_legal(sector, value, *time))?;
            Some(format!("sector {sector} reads as something illegal at time {time}"))
        })
    }

    /// Judges what a sector reads as after a crash at `time`.
    fn is_legal(&self, sector: usize, value: &[u8], time: u64) -> bool {
        let covers =
            |change: &&Change| (change.first_sector..change.first_sector + change.sectors.len()).contains(&sector);
        let here = || self.changes.iter().filter(covers);
        let is_durable = |change: &Change| {
            let flushed = |&(issued, replied): &(u64, u64)| issued > change.replied && replied < time;
            (change.durable && change.replied < time) || self.barriers.iter().any(flushed)
        };
        // The issue time of the newest durable change: whatever was replied before it is gone.
        let barrier = here().filter(|change| is_durable(change)).map(|change| change.issued).max();
        let zeroes = [0; SECTOR];
        let initial = self.initial.get(sector * SECTOR..(sector + 1) * SECTOR).unwrap_or(&zeroes);
        if barrier.is_none() && value == initial {
            return true;
        }
        here().any(|change| {
            change.issued < time
                && barrier.is_none_or(|barrier| change.replied >= barrier)
                && change.sectors[sector - change.first_sector] == value
        })
    }
}
