//! Where a guest byte lives in the two-level tables: pure arithmetic, checked where a file could make it wrap.

/// Bytes that the crash model treats as written atomically: one sector of the disk.
pub(crate) const SECTOR: u64 = 512;

/// Bytes of one entry of the L1 table, the refcount table, and of a standard L2 table.
pub(crate) const ENTRY: u64 = 8;

/// Subclusters of a cluster with an extended L2 entry.
pub(crate) const SUBCLUSTERS: u64 = 32;

/// The shape of one image: cluster size and virtual size decide everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// `9 <= cluster_bits <= 21`.
    pub(crate) cluster_bits: u32,
    /// Virtual size in bytes, at most 2^63 - 1.
    pub(crate) size: u64,
    /// Extended L2 entries: 16 bytes, with 32 subclusters each.
    pub(crate) extended: bool,
}

impl Geometry {
    pub(crate) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Index of the guest cluster that holds the byte.
    pub(crate) fn cluster_of(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    pub(crate) fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// First guest byte of a cluster.
    pub(crate) fn start_of(self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    /// Entries of one L2 table; also the number of clusters that one L1 entry maps.
    pub(crate) fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Bytes of one L2 entry.
    pub(crate) fn l2_entry_size(self) -> u64 {
        if self.extended { 2 * ENTRY } else { ENTRY }
    }

    /// The unit in which an L2 entry can differ: the cluster, or a 32nd of it.
    pub(crate) fn unit(self) -> u64 {
        if self.extended { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    pub(crate) fn l1_index(self, cluster: u64) -> usize {
        (cluster / self.l2_entries()) as usize
    }

    pub(crate) fn l2_index(self, cluster: u64) -> usize {
        (cluster % self.l2_entries()) as usize
    }

    /// L1 entries needed for the virtual size.
    pub(crate) fn l1_entries(self) -> u64 {
        self.size.div_ceil(self.cluster_size()).div_ceil(self.l2_entries())
    }

    /// Clusters of the virtual disk, the last one perhaps partial.
    pub(crate) fn clusters(self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }

    /// `bytes` rounded up to whole clusters; callers bound `bytes` far below 2^63.
    pub(crate) fn round_up(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size()) * self.cluster_size()
    }

    /// Splits `[offset, offset + length)` at the borders of L2 tables, so that each piece needs one table.
    pub(crate) fn by_table(self, offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
        let span = self.l2_entries() * self.cluster_size();
        let end = offset + length;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let piece = (span - at % span).min(end - at);
            let start = at;
            at += piece;
            Some((start, piece))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_l2_table_of_64_kib_maps_512_mib() {
        let geometry = Geometry { cluster_bits: 16, size: 1 << 40, extended: false };
        assert_eq!(geometry.l1_entries(), 2048);
        assert_eq!(geometry.l1_index(geometry.cluster_of(512 << 20)), 1);
        assert_eq!(geometry.l2_index(geometry.cluster_of((512 << 20) - 1)), 8191);
    }

    #[test]
    fn a_range_is_cut_at_table_borders_and_covers_itself() {
        let geometry = Geometry { cluster_bits: 9, size: 1 << 20, extended: false };
        let pieces: Vec<_> = geometry.by_table(32_000, 70_000).collect();
        assert_eq!(pieces, [(32_000, 768), (32_768, 32_768), (65_536, 32_768), (98_304, 3_696)]);
    }
}
