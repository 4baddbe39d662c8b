//! Data as a disk in use has it: what is written into generated disks, and what changes on them.

/// The most that is made at once.
pub(super) const PIECE: usize = 1 << 20;
/// Bytes of a piece that carry a stamp of their own, so that no two clusters are the same.
const PAGE: usize = 4096;

/// Bytes that no compression shrinks, different at every place. The random part is made once: each page differs from
/// the others by its stamp.
pub(super) struct Data {
    piece: Vec<u8>,
    stamp: u64,
}

impl Data {
    /// Data that is the same in every run, and differs from that of every other seed.
    pub(super) fn new(seed: u64) -> Self {
        // Xorshift (Marsaglia, 2003), whose state is never 0.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut piece = Vec::with_capacity(PIECE);
        while piece.len() < PIECE {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            piece.extend_from_slice(&state.to_le_bytes());
        }
        Self { piece, stamp: seed << 32 }
    }

    /// The next bytes, at most [`PIECE`].
    pub(super) fn next(&mut self, length: usize) -> &[u8] {
        let bytes = &mut self.piece[..length.min(PIECE)];
        for page in bytes.chunks_mut(PAGE) {
            self.stamp += 1;
            page[..8].copy_from_slice(&self.stamp.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_the_same_in_every_run_and_different_at_every_place() {
        let made = || {
            let mut data = Data::new(7);
            [data.next(PAGE).to_vec(), data.next(PAGE).to_vec()]
        };
        assert_eq!(made(), made());
        assert_ne!(made()[0], made()[1]);
        assert_ne!(made()[0], Data::new(8).next(PAGE));
    }
}
