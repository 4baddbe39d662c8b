//! The digest of a virtual disk's content: a root over blocks that can be taken in any order and from any copy of the disk.
//!
//! The disk is cut into blocks of 1 MiB, the last one shorter. A leaf is the BLAKE3 of the bytes of a block, and the root the
//! BLAKE3 of all leaves, one behind the other.

use std::fmt;

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// The digest of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf([u8; blake3::OUT_LEN]);

impl Leaf {
    /// That of these bytes.
    pub fn of(block: &[u8]) -> Self {
        Self(*blake3::hash(block).as_bytes())
    }

    /// That of so many zeroes, at most a block.
    pub fn of_zeroes(length: u64) -> Self {
        let zeroes = vec![0; usize::try_from(length.min(BLOCK_BYTES)).unwrap_or(0)];
        Self::of(&zeroes)
    }
}

/// A root in the making: leaves are added in the order of the disk.
#[derive(Clone, Debug, Default)]
pub struct Root(blake3::Hasher);

impl Root {
    /// Adds the leaf of the next block.
    pub fn add(&mut self, leaf: Leaf) {
        self.0.update(&leaf.0);
    }

    /// The root over what was added.
    pub fn finish(&self) -> ContentDigest {
        ContentDigest(*self.0.finalize().as_bytes())
    }
}

/// The root over all blocks of a disk; printed in hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentDigest([u8; blake3::OUT_LEN]);

impl ContentDigest {
    /// That of a disk of these bytes.
    pub fn of(disk: &[u8]) -> Self {
        let mut root = Root::default();
        disk.chunks(usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX)).for_each(|block| root.add(Leaf::of(block)));
        root.finish()
    }
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
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
        assert_eq!(ContentDigest::of(&disk).to_string(), blake3::hash(&leaves).to_string());
        assert_eq!(Leaf::of_zeroes(512), Leaf::of(&[0; 512]));
    }
}
