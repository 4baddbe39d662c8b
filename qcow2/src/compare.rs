//! Whether two disks hold the same bytes, however each of them stores them.

use crate::buffer::BufferPool;
use crate::disk::{Disk, Pass};
use crate::error::{Error, Result};
use crate::progress::{Watch, tell};

/// Bytes compared in one go.
const PIECE: u64 = 1 << 20;

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Virtual sizes in bytes of the first and the second disk.
    pub sizes: (u64, u64),
    /// The first byte that differs; `None` when the disks are equal.
    pub difference: Option<Difference>,
}

/// A byte that two disks do not agree about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Guest offset.
    pub offset: u64,
    /// The byte of the first disk; `None` past its end, where the other disk would have to read as zero.
    pub first: Option<u8>,
    /// The byte of the second disk, likewise.
    pub second: Option<u8>,
}

/// Compares two disks byte by byte. Where both have holes nothing is read. What the longer disk has past the end of the
/// shorter one must read as zeroes.
///
/// An error says that a disk cannot be read ([`crate::Error::Unreadable`]), or that `watch` wished an end
/// ([`crate::Error::Cancelled`]), and nothing about equality.
pub fn compare(first: &Disk, second: &Disk, watch: &mut Watch<'_>) -> Result<Comparison> {
    let sizes = (first.size(), second.size());
    let total = sizes.0.max(sizes.1);
    let mut passes = (Pass::new(first), Pass::new(second));
    let lend = || BufferPool::shared().lend(PIECE as usize);
    let mut buffers = (lend(), lend());
    let mut at = 0;
    while at < total {
        tell(watch, at, total)?;
        let data = passes.0.skip(at)?.min(passes.1.skip(at)?).min(total);
        let start = data / PIECE * PIECE;
        if start > at {
            at = start;
            continue;
        }
        if data == total {
            break;
        }
        let length = PIECE.min(total - at) as usize;
        let (left, _) = buffers.0.as_mut().split_at_mut(length);
        let (right, _) = buffers.1.as_mut().split_at_mut(length);
        // Side by side: each waits for its own file.
        let (reader, other) = (&mut passes.0, &mut passes.1);
        let (first_read, second_read) = std::thread::scope(|scope| {
            let reading = scope.spawn(|| reader.read(at, left));
            let second_read = other.read(at, right);
            (reading.join().unwrap_or(Err(Error::Panicked)), second_read)
        });
        first_read.and(second_read)?;
        if let Some(index) = first_difference(left, right) {
            let offset = at + index as u64;
            let value = |bytes: &[u8], size| bytes.get(index).copied().filter(|_| offset < size);
            let difference = Difference { offset, first: value(left, sizes.0), second: value(right, sizes.1) };
            return Ok(Comparison { sizes, difference: Some(difference) });
        }
        at += length as u64;
    }
    tell(watch, total, total)?;
    Ok(Comparison { sizes, difference: None })
}

/// Blocks are compared as a whole first, which is a memcmp.
fn first_difference(first: &[u8], second: &[u8]) -> Option<usize> {
    const BLOCK: usize = 4096;
    let blocks = first.chunks(BLOCK).zip(second.chunks(BLOCK));
    let (number, (first, second)) = blocks.enumerate().find(|(_, (first, second))| first != second)?;
    let within = first.iter().zip(second).position(|(first, second)| first != second)?;
    Some(number * BLOCK + within)
}
