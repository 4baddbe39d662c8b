//! A chain copied into one new file that needs nothing below it: an image, or raw bytes.
//!
//! Only what is not zero is written. The file is built under a name of its own and gets its final one when it is whole, so
//! that not even a power cut leaves half a disk under the name that was asked for.

use std::fs::File;
use std::io::IoSlice;
use std::path::Path;

use crate::buffer::BufferPool;
use crate::create::{CreateOptions, create, create_file};
use crate::disk::{Disk, Pass};
use crate::error::{Error, Result};
use crate::geometry::SECTOR;
use crate::image::{Durability, Image, OpenOptions};
use crate::lock::{self, Access};
use crate::partial::{build, close_clean};
use crate::progress::{Watch, tell};
use crate::storage::{FileStorage, Storage};

/// Bytes read in one go, or one cluster where that is more.
pub(crate) const PIECE: u64 = 1 << 20;

/// Zeroes are left out of a raw file in blocks of so many bytes: what file systems keep holes in.
const RAW_BLOCK: u64 = 4096;

/// What a chain is copied into.
#[derive(Clone, Debug)]
pub enum Target {
    /// An image of this shape. Its size is the disk's, rounded up to sectors of 512 bytes; the size given is not looked at.
    Qcow2(CreateOptions),
    /// The bytes of the disk, with holes.
    Raw,
}

/// What was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// Virtual size of the new disk in bytes.
    pub size: u64,
    /// Bytes that were written to it, in whole clusters or blocks; the others are zeroes that take no space.
    pub written: u64,
}

/// Copies a disk, as it reads through its whole chain, into a new file at a path that must not exist yet.
///
/// The new file can be read by its owner only (mode 0600). While it is being made it is called `<path>.partial`, which must
/// not exist either: it is what a killed process or a power cut leaves. Every error, and every break from `watch`, ends the
/// copy and removes the file; a range that cannot be read is named ([`Error::Unreadable`]).
///
/// # Durability
/// The new file and its name are on stable storage when this returns, and an image has passed its check. After a crash
/// before that, the path is absent.
pub fn flatten(source: &Disk, path: &Path, target: &Target, watch: &mut Watch<'_>) -> Result<Flattened> {
    match target {
        Target::Qcow2(options) => {
            if options.backing.is_some() {
                let reason = "a flattened image has none".into();
                return Err(Error::InvalidOption { option: "backing file", reason });
            }
            let size = source.size().checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
            let shape = CreateOptions { size, ..options.clone() };
            build(path, |partial| create(partial, &shape), |partial, ()| fill_image(source, partial, watch))
        }
        Target::Raw => build(path, create_file, |partial, file| fill_raw(source, file, partial, watch)),
    }
}

fn fill_image(source: &Disk, partial: &Path, watch: &mut Watch<'_>) -> Result<Flattened> {
    let image = Image::open(partial, &OpenOptions::new(Access::ReadWrite))?;
    let write = |offset, data: &[u8]| image.write(offset, data, Durability::OnFlush);
    let written = copy(source, image.cluster_size(), write, watch)?;
    close_clean(&image)?;
    Ok(Flattened { size: image.size(), written })
}

fn fill_raw(source: &Disk, file: File, partial: &Path, watch: &mut Watch<'_>) -> Result<Flattened> {
    lock::lock(&file, partial, Access::ReadWrite)?;
    let storage = FileStorage::new(file);
    let size = source.size();
    storage.set_length(size).map_err(Error::io("ftruncate", size))?;
    let write =
        |offset, data: &[u8]| storage.write(offset, &mut [IoSlice::new(data)]).map_err(Error::io("write", offset));
    let written = copy(source, RAW_BLOCK, write, watch)?;
    storage.sync_data().map_err(Error::io("fdatasync", 0))?;
    Ok(Flattened { size, written })
}

/// Hands everything that is not zero to `write`, in runs of whole blocks but for the disk's end. Returns the bytes written.
fn copy(
    source: &Disk,
    block: u64,
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
    watch: &mut Watch<'_>,
) -> Result<u64> {
    let (size, piece) = (source.size(), PIECE.max(block));
    let mut pass = Pass::new(source);
    let mut buffer = BufferPool::shared().lend(piece as usize);
    let (mut at, mut written) = (0, 0);
    while at < size {
        tell(watch, at, size)?;
        let data = pass.skip(at)?.min(size);
        let start = data / piece * piece;
        if start > at {
            at = start;
            continue;
        }
        if data == size {
            break;
        }
        let (bytes, _) = buffer.as_mut().split_at_mut(piece.min(size - at) as usize);
        pass.read(at, bytes)?;
        for (index, run) in nonzero_runs(bytes, block as usize) {
            write(at + index as u64, run)?;
            written += run.len() as u64;
        }
        at += bytes.len() as u64;
    }
    tell(watch, size, size)?;
    Ok(written)
}

/// The runs of blocks that hold something else than zeroes, each with its index in bytes.
pub(crate) fn nonzero_runs(bytes: &[u8], block: usize) -> Vec<(usize, &[u8])> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (number, part) in bytes.chunks(block).enumerate().filter(|(_, part)| !is_zero(part)) {
        let start = number * block;
        match runs.last_mut() {
            Some((_, end)) if *end == start => *end += part.len(),
            _ => runs.push((start, start + part.len())),
        }
    }
    runs.into_iter().filter_map(|(start, end)| Some((start, bytes.get(start..end)?))).collect()
}

/// Eight words at a time, which the compiler turns into vector instructions.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|words| words.iter().fold(0, |seen, byte| seen | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_zeroes_are_left_out_and_neighbours_stay_together() {
        let mut bytes = vec![0; 700];
        for index in [0, 130, 255, 699] {
            bytes[index] = 1;
        }
        let runs: Vec<_> = nonzero_runs(&bytes, 128).iter().map(|(index, run)| (*index, run.len())).collect();
        assert_eq!(runs, [(0, 256), (640, 60)]);
        assert!(nonzero_runs(&[0; 700], 128).is_empty());
    }
}
