//! The leaves of a virtual disk: BLAKE3 of each of its blocks of 1 MiB, computed from an open image, and read back from the file
//! that keeps them. Their concatenation hashes to the content root.
//!
//! A block that the image's own layer does not touch reads as in the parent, so its leaf is the parent's; a block without data
//! reads as zeroes. Neither is read. Memory does not grow with the disk.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use blockyard_qcow2::{self as qcow2, ExtentKind, Image};

use super::content::{BLOCK_BYTES, Root, blocks, leaf_of_zeroes};
use super::files;
use super::pace::{Reading, Stopped};
use super::witness::{self, Witness};
use crate::digest::Digest;

/// Bytes of a leaf.
const LEAF_BYTES: u64 = 32;
/// Guest bytes whose map is held in memory at once: one gibibyte, a thousand blocks.
const WINDOW: u64 = 1 << 30;
/// Extents that one map may return: bounds the memory.
const EXTENTS_MAX: usize = 4096;

/// Why the leaves of a disk could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LeavesError {
    /// The service stops.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The disk cannot be read.
    #[error(transparent)]
    Image(#[from] qcow2::Error),
    /// A file of leaves cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The leaves of a disk, one after the other, from the file that keeps them.
#[derive(Debug)]
pub struct Leaves {
    file: BufReader<File>,
    left: u64,
}

impl Leaves {
    /// Opens a file of leaves that belongs to a disk of this size and whose root is this one; nothing when there is none, or when
    /// it is not what was written.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn open(path: &Path, size_bytes: u64, root: &Digest) -> io::Result<Option<Self>> {
        let mut file = match files::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let left = blocks(size_bytes);
        if left.checked_mul(LEAF_BYTES) != Some(file.metadata()?.len()) {
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut file)?;
        if Digest::from(hasher.finalize()) != *root {
            return Ok(None);
        }
        io::Seek::rewind(&mut file)?;
        Ok(Some(Self { file: BufReader::new(file), left }))
    }

    /// The next leaf; nothing after the last one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next_leaf(&mut self) -> io::Result<Option<Digest>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let mut leaf = [0; LEAF_BYTES as usize];
        self.file.read_exact(&mut leaf)?;
        Ok(Some(leaf.into()))
    }
}

/// What the map says of one block.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// The image's own layer decides some of it.
    own: bool,
    /// Some of it is data, in whatever layer.
    data: bool,
}

/// Computes the leaves of an image with everything below it, writes them one after the other, and returns the root over them.
/// `below` are those of the parent's disk, of the same size, where they are known; `witness` is told of every block.
///
/// # Errors
/// See [`LeavesError`].
pub fn compute(
    image: &Image,
    mut below: Option<Leaves>,
    mut witness: Option<&mut Witness<'_>>,
    into: &mut dyn Write,
    reading: &Reading,
) -> Result<Digest, LeavesError> {
    let size = image.size();
    let mut root = Root::default();
    let mut buffer = vec![0; BLOCK_BYTES as usize];
    let whole_zero = leaf_of_zeroes(BLOCK_BYTES);
    let mut start = 0;
    while start < size {
        let end = start.saturating_add(WINDOW).min(size);
        let map = map(image, start, end)?;
        for (offset, block) in (start..end).step_by(BLOCK_BYTES as usize).zip(map) {
            let length = BLOCK_BYTES.min(size - offset);
            let inherited = match &mut below {
                Some(leaves) => leaves.next_leaf()?,
                None => None,
            };
            let piece = buffer.get_mut(..length as usize).unwrap_or_default();
            let (leaf, seen) = match inherited {
                Some(leaf) if !block.own => {
                    reading.skip(length)?;
                    (leaf, witness::Block::Inherited)
                }
                _ if block.data => {
                    image.read(offset, piece)?;
                    reading.read(length)?;
                    (Digest::of(piece), witness::Block::Read(piece))
                }
                _ => {
                    reading.skip(length)?;
                    let leaf = if length == BLOCK_BYTES { whole_zero } else { leaf_of_zeroes(length) };
                    (leaf, witness::Block::Zero)
                }
            };
            if let Some(witness) = &mut witness {
                witness.see(offset, length, seen);
            }
            into.write_all(leaf.as_bytes())?;
            root.add(leaf);
        }
        start = end;
    }
    if let Some(witness) = witness {
        witness.end();
    }
    Ok(root.finish())
}

/// What the map says of the blocks of a range that begins at one.
fn map(image: &Image, start: u64, end: u64) -> Result<Vec<Block>, qcow2::Error> {
    let mut map = vec![Block::default(); blocks(end - start) as usize];
    let mut at = start;
    while at < end {
        let extents = image.map(at, end - at, EXTENTS_MAX)?;
        for extent in &extents {
            let first = ((extent.offset - start) / BLOCK_BYTES) as usize;
            let behind = blocks(extent.offset + extent.length - start) as usize;
            for block in map.get_mut(first..behind).unwrap_or_default() {
                block.own |= extent.depth == 1;
                block.data |= extent.kind == ExtentKind::Data;
            }
        }
        // Something is covered by every map of a range that is not empty.
        at = extents.last().map_or(end, |last| last.offset + last.length);
    }
    Ok(map)
}
