//! What was received for a disk, as a digest that can be taken again from the disk.
//!
//! The disk is cut into pieces of 64 KiB, which clients send in any order. What was received of a piece has a digest of its bytes and
//! its place, unless it is all zero; the mark of a window of pieces is the exclusive-or of theirs, so that neither order nor a table
//! of pieces matters, and zeroes cost nothing. The root is the BLAKE3 of all marks and of the ranges that they are of. Pieces that come in parts are put together, a few
//! at a time. A window has no mark when bytes of it came twice or were discarded, as only the image knows what won, and when more
//! pieces of it were open at once than are kept. Nothing else is lost by that.
//!
//! Marks tell damage, not forgery: who can write an image can write the manifest that holds them.

use serde::{Deserialize, Serialize};

use super::coverage::Run;
use crate::digest::Digest;

/// Bytes of a piece; the last one of a disk may be shorter.
pub const PIECE_BYTES: u64 = 64 << 10;
/// No window is smaller: one mark takes 70 bytes of a manifest.
const WINDOW_BYTES_MIN: u64 = 64 << 20;
/// No disk has more windows.
const WINDOWS_MAX: u64 = 1 << 10;

/// How many pieces are put together at once: a megabyte for each disk. Clients send one after the other on each of a few
/// connections.
const OPEN_MAX: usize = 16;
/// The unit of the bytes that are received, and of [`Sectors`].
const SECTOR_BYTES: u64 = 512;

/// The exclusive-or of the digests of pieces.
pub type Mark = [u8; 32];

/// Which sectors of a piece were received, the first in the lowest bit.
type Sectors = u128;

/// What stands for a window without a mark where the root is computed.
const UNKNOWN: Digest = Digest::new([0xff; 32]);

/// The pieces of one write, taken before its buffer goes to the image.
#[derive(Debug)]
pub struct Pieces {
    /// The window of the first mark.
    first: usize,
    marks: Vec<Mark>,
    /// Parts of a piece at the beginning and the end.
    parts: Vec<(u64, Vec<u8>)>,
}

/// The marks of one disk in the making: 32 KiB at most, and the open pieces.
#[derive(Clone, Debug)]
pub struct Received {
    size_bytes: u64,
    window_bytes: u64,
    windows: Vec<Option<Mark>>,
    /// The one that was opened first comes first.
    open: Vec<Open>,
}

/// A piece of which parts were received.
#[derive(Clone, Debug)]
struct Open {
    place: u64,
    bytes: Vec<u8>,
    sectors: Sectors,
}

/// The same as it is kept in a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceivedMarks {
    /// Always [`PIECE_BYTES`] in this format.
    pub piece_bytes: u64,
    /// Bytes of a window, a multiple of 1 MiB; the last one may be shorter.
    pub window_bytes: u64,
    /// The marks in the order of the disk; null where there is none.
    pub windows: Vec<Option<Digest>>,
    /// BLAKE3 of the marks, 32 bytes each, 32 times 255 where there is none, and of the ranges that were received: offset and length of
    /// each, 8 bytes, the lowest first.
    pub root: Digest,
}

impl Received {
    /// Nothing received yet for a disk of this size.
    pub fn new(size_bytes: u64) -> Self {
        let window_bytes = window_bytes(size_bytes);
        let windows = vec![Some(Mark::default()); size_bytes.div_ceil(window_bytes) as usize];
        Self { size_bytes, window_bytes, windows, open: Vec::new() }
    }

    /// A write is done whose pieces were these; `once` says that none of its bytes had been received before.
    pub fn written(&mut self, offset: u64, length: u64, pieces: Option<&Pieces>, once: bool) {
        let Some(Pieces { first, marks, parts }) = pieces.filter(|_| once) else { return self.forget(offset, length) };
        for (window, mark) in self.windows.iter_mut().skip(*first).zip(marks) {
            if let Some(known) = window {
                combine(known, mark);
            }
        }
        for (place, bytes) in parts {
            self.part(*place, bytes.len() as u64, Some(bytes));
        }
    }

    /// Zeroes are done.
    pub fn zeroed(&mut self, offset: u64, length: u64, once: bool) {
        if !once || !are_sectors(offset, length) {
            return self.forget(offset, length);
        }
        let (head, whole) = parts(offset, length, self.size_bytes);
        for (place, end) in [(offset, head), (whole, offset + length)].into_iter().filter(|(place, end)| place < end) {
            self.part(place, end - place, None);
        }
    }

    /// Something happened to these bytes that no mark can tell.
    pub fn forget(&mut self, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        let first = (offset / self.window_bytes) as usize;
        let behind = offset.saturating_add(length).div_ceil(self.window_bytes) as usize;
        for window in self.windows.iter_mut().take(behind).skip(first) {
            *window = None;
        }
        let (windows, window_bytes) = (&self.windows, self.window_bytes);
        self.open.retain(|open| windows.get((open.place / window_bytes) as usize).is_some_and(Option::is_some));
    }

    /// Takes a part of one piece, or zeroes, and closes the piece when that was the last one.
    fn part(&mut self, place: u64, length: u64, bytes: Option<&[u8]>) {
        let start = place - place % PIECE_BYTES;
        let window = (start / self.window_bytes) as usize;
        if self.windows.get(window).is_none_or(Option::is_none) {
            return;
        }
        let piece_bytes = PIECE_BYTES.min(self.size_bytes - start) as usize;
        let at = self.open.iter().position(|open| open.place == start).unwrap_or_else(|| {
            self.open.push(Open { place: start, bytes: vec![0; piece_bytes], sectors: 0 });
            self.open.len() - 1
        });
        let Some(open) = self.open.get_mut(at) else { return };
        let (from, to) = ((place - start) as usize, (place - start + length) as usize);
        if let (Some(bytes), Some(range)) = (bytes, open.bytes.get_mut(from..to)) {
            range.copy_from_slice(bytes);
        }
        let sector = SECTOR_BYTES as usize;
        (from / sector..to / sector).for_each(|sector| open.sectors |= 1 << sector);
        if open.sectors.count_ones() as usize == piece_bytes / sector {
            let open = self.open.remove(at);
            if let Some(Some(mark)) = self.windows.get_mut(window) {
                open.close(mark);
            }
        } else if self.open.len() > OPEN_MAX
            && let Some(oldest) = self.open.first().map(|open| open.place)
        {
            self.forget(oldest, 1);
        }
    }

    /// The marks, for the manifest, with the ranges that were received.
    pub fn marks(&self, coverage: &[Run]) -> ReceivedMarks {
        let mut windows = self.windows.clone();
        for open in &self.open {
            if let Some(Some(mark)) = windows.get_mut((open.place / self.window_bytes) as usize) {
                open.close(mark);
            }
        }
        let windows: Vec<Option<Digest>> = windows.into_iter().map(|mark| mark.map(Digest::from)).collect();
        let root = root_over(&windows, coverage);
        ReceivedMarks { piece_bytes: PIECE_BYTES, window_bytes: self.window_bytes, windows, root }
    }
}

impl Open {
    /// Adds each run of sectors that was received to the mark of the window.
    fn close(&self, mark: &mut Mark) {
        let mut sector = 0;
        while let Some(left) = self.sectors.checked_shr(sector).filter(|left| *left != 0) {
            let start = sector + left.trailing_zeros();
            let behind = start + (self.sectors >> start).trailing_ones();
            let range = start as usize * SECTOR_BYTES as usize..behind as usize * SECTOR_BYTES as usize;
            let place = self.place + range.start as u64;
            if let Some(digest) = self.bytes.get(range).and_then(|bytes| piece_digest(place, bytes)) {
                combine(mark, &digest);
            }
            sector = behind;
        }
    }
}

impl Pieces {
    /// Of a write to a disk of this size; nothing when it holds no whole sectors.
    pub fn of(offset: u64, bytes: &[u8], size_bytes: u64) -> Option<Self> {
        let end = offset.checked_add(bytes.len() as u64)?;
        if !are_sectors(offset, bytes.len() as u64) || end > size_bytes {
            return None;
        }
        let (head, tail) = parts(offset, bytes.len() as u64, size_bytes);
        let (head_bytes, rest) = bytes.split_at_checked((head - offset) as usize)?;
        let (whole, tail_bytes) = rest.split_at_checked((tail - head) as usize)?;
        let parts = [(offset, head_bytes), (tail, tail_bytes)].into_iter().filter(|(_, part)| !part.is_empty());
        let parts = parts.map(|(place, part)| (place, part.to_vec())).collect();
        let window_bytes = window_bytes(size_bytes);
        let first = head / window_bytes;
        let mut marks = Vec::new();
        for (place, piece) in (head..tail).step_by(PIECE_BYTES as usize).zip(whole.chunks(PIECE_BYTES as usize)) {
            let window = (place / window_bytes - first) as usize;
            marks.resize(window + 1, Mark::default());
            if let (Some(mark), Some(digest)) = (marks.get_mut(window), piece_digest(place, piece)) {
                combine(mark, &digest);
            }
        }
        Some(Self { first: first as usize, marks, parts })
    }
}

impl ReceivedMarks {
    /// Why they cannot be those of a disk of this size of which these ranges were received; nothing when they can.
    pub fn defect(&self, size_bytes: u64, coverage: &[Run]) -> Option<&'static str> {
        if self.piece_bytes != PIECE_BYTES {
            return Some("what was received for it is marked in pieces of another length");
        }
        if self.window_bytes == 0
            || !self.window_bytes.is_multiple_of(1 << 20)
            || self.windows.len() as u64 != size_bytes.div_ceil(self.window_bytes)
        {
            return Some("the marks of what was received for it do not fit its size");
        }
        (root_over(&self.windows, coverage) != self.root)
            .then_some("the marks of what was received for it, or its coverage, do not have their root")
    }
}

/// The digest of what was received of a piece, at its place in bytes from the beginning of the disk; nothing for zeroes.
pub fn piece_digest(place: u64, piece: &[u8]) -> Option<Mark> {
    if is_zero(piece) {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(piece).update(&place.to_le_bytes());
    Some(hasher.finalize().into())
}

/// Combines the digest of a piece with those of others.
pub fn combine(mark: &mut Mark, digest: &Mark) {
    for (byte, other) in mark.iter_mut().zip(digest) {
        *byte ^= other;
    }
}

/// Marks are nothing without the ranges that they are of.
fn root_over(windows: &[Option<Digest>], coverage: &[Run]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for window in windows {
        hasher.update(window.as_ref().unwrap_or(&UNKNOWN).as_bytes());
    }
    for (offset, length) in coverage {
        hasher.update(&offset.to_le_bytes()).update(&length.to_le_bytes());
    }
    hasher.finalize().into()
}

/// A power of two, so that no piece lies in two windows.
fn window_bytes(size_bytes: u64) -> u64 {
    let fitting = size_bytes.div_ceil(WINDOWS_MAX).checked_next_power_of_two().unwrap_or(1 << 63);
    fitting.max(WINDOW_BYTES_MIN)
}

fn are_sectors(offset: u64, length: u64) -> bool {
    offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES)
}

/// Where the whole pieces of a range begin, behind a part of one, and where they end, before another part. The last piece of a disk
/// is whole when it is all that there is.
fn parts(offset: u64, length: u64, size_bytes: u64) -> (u64, u64) {
    let end = offset + length;
    let head = offset.next_multiple_of(PIECE_BYTES).min(end);
    let tail = if end == size_bytes && head < end { end } else { (end - end % PIECE_BYTES).max(head) };
    (head, tail)
}

/// In steps that a compiler turns into wide loads, ending at the first that is not zero.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 3 * WINDOW_BYTES_MIN + 5 * PIECE_BYTES + 512;

    fn fill(place: u64, length: u64, seed: u8) -> Vec<u8> {
        (0..length).map(|index| ((place + index) / 512) as u8 ^ seed).collect()
    }

    fn write(received: &mut Received, place: u64, length: u64, once: bool) {
        let bytes = fill(place, length, 7);
        received.written(place, length, Pieces::of(place, &bytes, SIZE).as_ref(), once);
    }

    #[test]
    fn neither_order_nor_the_length_of_requests_matters_and_zeroes_are_neutral() {
        let range = WINDOW_BYTES_MIN - 4 * PIECE_BYTES..WINDOW_BYTES_MIN + 4 * PIECE_BYTES;
        let mut whole = Received::new(SIZE);
        write(&mut whole, range.start, range.end - range.start, true);
        let mut single = Received::new(SIZE);
        for place in range.step_by(PIECE_BYTES as usize).collect::<Vec<_>>().into_iter().rev() {
            write(&mut single, place, PIECE_BYTES, true);
        }
        single.zeroed(2 * WINDOW_BYTES_MIN, PIECE_BYTES, true);
        let zeroes = vec![0; PIECE_BYTES as usize];
        single.written(0, PIECE_BYTES, Pieces::of(0, &zeroes, SIZE).as_ref(), true);
        assert_eq!(single.marks(&[]), whole.marks(&[]));
        assert_eq!(whole.marks(&[]).windows.iter().filter(|mark| **mark != Some([0; 32].into())).count(), 2);
        assert_eq!(whole.marks(&[]).defect(SIZE, &[]), None);
    }

    #[test]
    fn bytes_that_came_twice_or_not_in_sectors_or_were_discarded_leave_their_window_unknown() {
        let mut received = Received::new(SIZE);
        write(&mut received, SIZE - 512, 512, true);
        assert!(received.marks(&[]).windows.iter().all(Option::is_some));
        write(&mut received, 100, 512, true);
        received.zeroed(WINDOW_BYTES_MIN + PIECE_BYTES, PIECE_BYTES, false);
        received.forget(2 * WINDOW_BYTES_MIN, PIECE_BYTES);
        let marks = received.marks(&[]);
        let known: Vec<bool> = marks.windows.iter().map(Option::is_some).collect();
        assert_eq!(known, [false, false, false, true]);
        assert_eq!(marks.defect(SIZE, &[]), None);
        // Known again they never are.
        for window in 0..3 {
            write(&mut received, window * WINDOW_BYTES_MIN, 512, true);
        }
        assert_eq!((received.marks(&[]), received.open.len()), (marks, 0));
    }

    #[test]
    fn a_few_pieces_are_put_together_at_once_and_the_oldest_is_given_up() {
        let mut received = Received::new(SIZE);
        for piece in 0..OPEN_MAX as u64 {
            write(&mut received, 2 * WINDOW_BYTES_MIN + piece * PIECE_BYTES, 512, true);
        }
        assert!(received.marks(&[]).windows.iter().all(Option::is_some));
        write(&mut received, 0, 512, true);
        let known: Vec<bool> = received.marks(&[]).windows.iter().map(Option::is_some).collect();
        assert_eq!((known, received.open.len()), (vec![true, true, false, true], 1));
    }

    #[test]
    fn the_same_bytes_at_another_place_have_another_mark() {
        let mark = |place| {
            let mut received = Received::new(SIZE);
            let bytes = vec![9; PIECE_BYTES as usize];
            received.written(place, PIECE_BYTES, Pieces::of(place, &bytes, SIZE).as_ref(), true);
            received.marks(&[]).windows[0]
        };
        assert_ne!(mark(0), mark(PIECE_BYTES));
    }

    #[test]
    fn marks_that_are_not_those_of_the_disk_are_told() {
        let mut received = Received::new(SIZE);
        write(&mut received, 0, PIECE_BYTES, true);
        let marks = received.marks(&[]);
        assert!(marks.defect(SIZE + WINDOW_BYTES_MIN, &[]).is_some());
        assert!(marks.defect(SIZE, &[(0, 512)]).is_some());
        let mut changed = marks.clone();
        changed.windows[1] = None;
        assert!(changed.defect(SIZE, &[]).is_some());
        assert!(ReceivedMarks { window_bytes: 0, ..marks.clone() }.defect(SIZE, &[]).is_some());
        assert!(ReceivedMarks { piece_bytes: 512, ..marks }.defect(SIZE, &[]).is_some());
    }

    #[test]
    fn a_disk_of_any_size_has_a_thousand_windows_at_most() {
        for size in [0, 1, 512, 40 << 30, (64 << 30) + 512, 64 << 40, u64::MAX] {
            assert!(Received::new(size).windows.len() as u64 <= WINDOWS_MAX, "{size}");
        }
    }

    proptest! {
        #[test]
        fn bytes_are_zero_only_if_all_are(length in 0_usize..1000, at in 0_usize..1000, byte in 0_u8..2) {
            let mut bytes = vec![0; length];
            if let Some(changed) = bytes.get_mut(at) {
                *changed = byte;
            }
            prop_assert_eq!(is_zero(&bytes), at >= length || byte == 0);
        }
    }
}
