//! What a disk reads as, held against what was received for it: the marks in the manifest, taken when the bytes came in, are taken
//! again from the blocks of the disk as they are read.

use crate::export::coverage::{Coverage, Run};
use crate::export::received::{Mark, PIECE_BYTES, ReceivedMarks, combine, piece_digest};
use crate::repository::manifest::ManifestDisk;

/// How a block was looked at.
#[derive(Clone, Copy, Debug)]
pub enum Block<'a> {
    /// It was read.
    Read(&'a [u8]),
    /// It holds no data.
    Zero,
    /// It is the parent's, and was not read.
    Inherited,
}

/// Windows of a disk in the making, in the order of the disk.
#[derive(Debug)]
pub struct Witness<'a> {
    marks: &'a ReceivedMarks,
    size_bytes: u64,
    /// What was received, in ascending order; ranges that lie before the block at hand are gone.
    ranges: std::iter::Peekable<std::vec::IntoIter<Run>>,
    window: usize,
    mark: Mark,
    /// Whether all that was received for the window was looked at.
    is_whole: bool,
    /// Bytes of the window that were.
    seen_bytes: u64,
    testimony: Testimony,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Testimony {
    /// How many received bytes were held against their marks.
    pub compared_bytes: u64,
    /// The first window that does not read as it was received: offset and length in bytes.
    pub differs: Option<Run>,
}

impl<'a> Witness<'a> {
    /// For a disk as its manifest tells it; nothing where no marks were taken.
    pub fn new(disk: &'a ManifestDisk) -> Option<Self> {
        let marks = disk.received.as_ref().filter(|marks| marks.defect(disk.size_bytes, &disk.coverage).is_none())?;
        // Whoever wrote the manifest: in order, and none upon another.
        let ranges: Vec<Run> = disk.coverage.iter().copied().collect::<Coverage>().runs().collect();
        Some(Self {
            marks,
            size_bytes: disk.size_bytes,
            ranges: ranges.into_iter().peekable(),
            window: 0,
            mark: Mark::default(),
            is_whole: true,
            seen_bytes: 0,
            testimony: Testimony::default(),
        })
    }

    /// The next block, of at most 1 MiB.
    pub fn see(&mut self, offset: u64, length: u64, block: Block<'_>) {
        let window = (offset / self.marks.window_bytes) as usize;
        if window != self.window {
            self.close_window();
            self.window = window;
        }
        let is_marked = self.marks.windows.get(window).is_some_and(Option::is_some);
        let block_end = offset.saturating_add(length);
        while let Some(&(start, run_length)) = self.ranges.peek() {
            let (from, to) = (start.max(offset), start.saturating_add(run_length).min(block_end));
            if from < to && is_marked {
                self.see_range(from, to, offset, block);
            }
            if start.saturating_add(run_length) > block_end {
                break;
            }
            self.ranges.next();
        }
    }

    fn see_range(&mut self, from: u64, to: u64, offset: u64, block: Block<'_>) {
        self.seen_bytes += to - from;
        let read = match block {
            Block::Zero => return,
            Block::Inherited => None,
            Block::Read(bytes) => bytes.get((from - offset) as usize..(to - offset) as usize),
        };
        let Some(bytes) = read else {
            self.is_whole = false;
            return;
        };
        let (head, rest) = bytes.split_at((from.next_multiple_of(PIECE_BYTES).min(to) - from) as usize);
        let mut place = from;
        for piece in std::iter::once(head).chain(rest.chunks(PIECE_BYTES as usize)) {
            if let Some(digest) = piece_digest(place, piece) {
                combine(&mut self.mark, &digest);
            }
            place += piece.len() as u64;
        }
    }

    fn close_window(&mut self) {
        let mark = std::mem::take(&mut self.mark);
        let (is_whole, seen_bytes) =
            (std::mem::replace(&mut self.is_whole, true), std::mem::take(&mut self.seen_bytes));
        let Some(expected) = self.marks.windows.get(self.window).copied().flatten().filter(|_| is_whole) else {
            return;
        };
        self.testimony.compared_bytes += seen_bytes;
        if *expected.as_bytes() != mark {
            let start = self.window as u64 * self.marks.window_bytes;
            let length = self.marks.window_bytes.min(self.size_bytes - start);
            self.testimony.differs.get_or_insert((start, length));
        }
    }

    /// The last block was seen.
    pub fn end(&mut self) {
        self.close_window();
    }

    /// What came of it, after the end.
    pub fn testimony(&self) -> Testimony {
        self.testimony
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::export::received::{Pieces, Received};

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 130 * MIB + 512;
    /// Some pieces, in two blocks.
    const SMALL: u64 = MIB + 3 * PIECE_BYTES + 5 * 512;

    /// A disk that received data in its first and last mebibyte, and zeroes behind the first.
    fn disk() -> (Vec<u8>, ManifestDisk) {
        let mut bytes = vec![0; SIZE as usize];
        let mut received = Received::new(SIZE);
        for (offset, length) in [(0, MIB), (130 * MIB, 512)] {
            let piece = &mut bytes[offset as usize..(offset + length) as usize];
            piece.fill(3);
            received.written(offset, length, Pieces::of(offset, piece, SIZE).as_ref(), true);
        }
        received.zeroed(MIB, MIB, true);
        let mut disk = ManifestDisk::sample(SIZE);
        disk.coverage = vec![(0, 2 * MIB), (130 * MIB, 512)];
        disk.received = Some(received.marks(&disk.coverage));
        (bytes, disk)
    }

    fn testimony(bytes: &[u8], disk: &ManifestDisk, inherited: impl Fn(u64) -> bool) -> Testimony {
        let mut witness = Witness::new(disk).unwrap();
        for (index, block) in bytes.chunks(MIB as usize).enumerate() {
            let offset = index as u64 * MIB;
            let seen = match () {
                () if inherited(offset) => Block::Inherited,
                () if block.iter().all(|byte| *byte == 0) => Block::Zero,
                () => Block::Read(block),
            };
            witness.see(offset, block.len() as u64, seen);
        }
        witness.end();
        witness.testimony()
    }

    #[test]
    fn a_disk_that_reads_as_it_was_received_is_compared_whole() {
        let (bytes, disk) = disk();
        let whole = Testimony { compared_bytes: 2 * MIB + 512, differs: None };
        assert_eq!(testimony(&bytes, &disk, |_| false), whole);
        // What was not received may be anything, and need not be read.
        let mut other = bytes.clone();
        other[50 << 20] = 1;
        assert_eq!(testimony(&other, &disk, |_| false), whole);
        assert_eq!(testimony(&bytes, &disk, |offset| (2 * MIB..130 * MIB).contains(&offset)), whole);
    }

    #[test]
    fn any_byte_that_was_received_otherwise_names_its_window() {
        let (bytes, disk) = disk();
        for (at, window) in [
            (0, (0, 64 * MIB)),
            (MIB - 1, (0, 64 * MIB)),
            // It was zeroed.
            (2 * MIB - 1, (0, 64 * MIB)),
            (SIZE - 1, (128 * MIB, 2 * MIB + 512)),
        ] {
            let mut changed = bytes.clone();
            changed[at as usize] ^= 1;
            assert_eq!(testimony(&changed, &disk, |_| false).differs, Some(window), "{at}");
        }
        // Data that became zeroes.
        let mut changed = bytes;
        changed[..MIB as usize].fill(0);
        assert_eq!(testimony(&changed, &disk, |_| false).differs, Some((0, 64 * MIB)));
    }

    #[test]
    fn a_window_of_which_something_was_not_read_is_not_judged() {
        let (mut bytes, disk) = disk();
        bytes[0] ^= 1;
        assert_eq!(testimony(&bytes, &disk, |offset| offset == MIB), Testimony { compared_bytes: 512, differs: None });
    }

    proptest! {
        #[test]
        fn requests_of_any_shape_are_compared_to_the_last_byte(
            // Each leaves two pieces open at most.
            requests in prop::collection::vec((0_u64..SMALL / 512, 1_u64..300, any::<bool>()), 1..9),
            flipped in 0..SMALL,
        ) {
            let mut bytes = vec![0; SMALL as usize];
            let (mut received, mut coverage) = (Received::new(SMALL), Coverage::new());
            for (sector, sectors, is_data) in requests {
                let (offset, length) = (sector * 512, (sectors * 512).min(SMALL - sector * 512));
                // Only what is not there yet.
                if coverage.clone().add(offset, length) < length {
                    continue;
                }
                let piece = &mut bytes[offset as usize..(offset + length) as usize];
                if is_data {
                    piece.iter_mut().enumerate().for_each(|(index, byte)| *byte = (index / 700) as u8);
                    received.written(offset, length, Pieces::of(offset, piece, SMALL).as_ref(), true);
                } else {
                    received.zeroed(offset, length, true);
                }
                coverage.add(offset, length);
            }
            let ranges: Vec<Run> = coverage.runs().collect();
            let received = Some(received.marks(&ranges));
            let disk = ManifestDisk { coverage: ranges, received, ..ManifestDisk::sample(SMALL) };
            let whole = Testimony { compared_bytes: coverage.covered_bytes(), differs: None };
            prop_assert_eq!(testimony(&bytes, &disk, |_| false), whole);
            let is_covered = coverage.add(flipped / 512 * 512, 512) == 0;
            bytes[flipped as usize] ^= 1;
            prop_assert_eq!(testimony(&bytes, &disk, |_| false).differs.is_some(), is_covered);
        }
    }

    #[test]
    fn marks_that_do_not_fit_the_disk_say_nothing() {
        let (_, mut disk) = disk();
        disk.size_bytes += 64 * MIB;
        assert!(Witness::new(&disk).is_none());
        disk.received = None;
        assert!(Witness::new(&disk).is_none());
    }
}
