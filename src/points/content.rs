//! The digest of a virtual disk's content: a root over blocks that can be taken in any order and from any copy of the disk.
//!
//! The disk is cut into blocks of 1 MiB, the last one shorter. A leaf is the BLAKE3 of the bytes of a block, and the root the
//! BLAKE3 of all leaves, one behind the other. Pure; `leaves` beside it takes them from an image.

use crate::digest::Digest;

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// How many blocks a disk of this size has.
pub fn blocks(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_BYTES)
}

/// The leaf of so many zeroes, at most a block.
pub fn leaf_of_zeroes(length: u64) -> Digest {
    Digest::of(&vec![0; usize::try_from(length.min(BLOCK_BYTES)).unwrap_or(0)])
}

/// A root in the making: leaves are added in the order of the disk.
#[derive(Clone, Debug, Default)]
pub struct Root(blake3::Hasher);

impl Root {
    /// Adds the leaf of the next block.
    pub fn add(&mut self, leaf: Digest) {
        self.0.update(leaf.as_bytes());
    }

    /// The root over what was added.
    pub fn finish(&self) -> Digest {
        self.0.finalize().into()
    }
}

/// The root of a disk of these bytes.
pub fn root_of(disk: &[u8]) -> Digest {
    let mut root = Root::default();
    disk.chunks(usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX)).for_each(|block| root.add(Digest::of(block)));
    root.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_the_hash_of_the_hashes_of_blocks() {
        let disk: Vec<u8> = (0..3 * BLOCK_BYTES / 2).map(|index| (index % 251) as u8).collect();
        let (first, second) = disk.split_at(1 << 20);
        let mut leaves = blake3::hash(first).as_bytes().to_vec();
        leaves.extend_from_slice(blake3::hash(second).as_bytes());
        assert_eq!(root_of(&disk).to_string(), blake3::hash(&leaves).to_string());
        assert_eq!(blocks(disk.len() as u64), 2);
        assert_eq!(leaf_of_zeroes(512), Digest::of(&[0; 512]));
    }
}
