//! Whether two disks hold the same bytes, however each of them stores them.

use crate::disk::{Disk, Pass};
use crate::error::Result;
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
    let (mut passes, mut buffers) = ((Pass::new(first), Pass::new(second)), (Vec::new(), Vec::new()));
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
        buffers.0.resize(length, 0);
        buffers.1.resize(length, 0);
        passes.0.read(at, &mut buffers.0)?;
        passes.1.read(at, &mut buffers.1)?;
        if let Some(index) = first_difference(&buffers.0, &buffers.1) {
            let offset = at + index as u64;
            let value = |bytes: &[u8], size| bytes.get(index).copied().filter(|_| offset < size);
            let difference =
                Difference { offset, first: value(&buffers.0, sizes.0), second: value(&buffers.1, sizes.1) };
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
