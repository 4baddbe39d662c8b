//! Refcount blocks: counts of 1 to 64 bits ("Refcount structure" in the specification).

/// Bits 9..=63 of a refcount table entry: host offset of a block.
pub(crate) const TABLE_OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// The width of one count: `1 << order` bits, `order <= 6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Width {
    order: u32,
}

impl Width {
    pub(crate) fn from_order(order: u32) -> Option<Self> {
        (order <= 6).then_some(Self { order })
    }

    pub(crate) fn order(self) -> u32 {
        self.order
    }

    pub(crate) fn bits(self) -> u32 {
        1 << self.order
    }

    /// Counts in one block.
    pub(crate) fn entries(self, cluster_size: u64) -> u64 {
        cluster_size * 8 / u64::from(self.bits())
    }

    /// The largest count that fits.
    pub(crate) fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Reads count `index` of a block; 0 past its end.
    pub(crate) fn load(self, block: &[u8], index: u64) -> u64 {
        let bits = u64::from(self.bits());
        if bits < 8 {
            let byte = block.get((index * bits / 8) as usize).copied().unwrap_or(0);
            let shift = (index % (8 / bits)) * bits;
            return (u64::from(byte) >> shift) & self.max();
        }
        let bytes = (bits / 8) as usize;
        let start = index as usize * bytes;
        let field = block.get(start..start + bytes).unwrap_or(&[]);
        field.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
    }

    /// Stores `value` (at most [`Width::max`]) as count `index` of a block.
    pub(crate) fn store(self, block: &mut [u8], index: u64, value: u64) {
        let bits = u64::from(self.bits());
        if bits < 8 {
            if let Some(byte) = block.get_mut((index * bits / 8) as usize) {
                let shift = (index % (8 / bits)) * bits;
                let mask = (self.max() << shift) as u8;
                *byte = (*byte & !mask) | ((value << shift) as u8 & mask);
            }
            return;
        }
        let bytes = (bits / 8) as usize;
        let start = index as usize * bytes;
        if let Some(field) = block.get_mut(start..start + bytes) {
            for (byte, shift) in field.iter_mut().rev().zip((0..).step_by(8)) {
                *byte = (value >> shift) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_stored_beside_each_other() {
        for order in 0..=6 {
            let width = Width::from_order(order).unwrap();
            let mut block = [0; 512];
            let entries = width.entries(512);
            let value = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & width.max();
            for index in 0..entries {
                width.store(&mut block, index, value(index));
            }
            for index in 0..entries {
                assert_eq!(width.load(&block, index), value(index), "order {order}, count {index}");
            }
        }
        assert_eq!(Width::from_order(7), None);
    }

    #[test]
    fn narrow_counts_fill_a_byte_from_its_lowest_bits() {
        let mut block = [0; 2];
        Width::from_order(1).unwrap().store(&mut block, 1, 3);
        assert_eq!(block, [0b1100, 0]);
        let mut block = [0; 4];
        Width::from_order(4).unwrap().store(&mut block, 1, 0x1234);
        assert_eq!(block, [0, 0, 0x12, 0x34]);
    }
}
