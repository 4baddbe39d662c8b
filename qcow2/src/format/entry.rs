//! L1 and L2 entries ("Cluster mapping" in the specification).

use super::header::Header;
use crate::error::{Error, Result};
use crate::geometry::Geometry;

/// Bit 63 of L1 and standard L2 entries: the refcount is exactly one, so the cluster may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry (version 3): the cluster reads as zeroes.
const ZERO: u64 = 1;
/// Bits 9..=55: host offset of a cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What one L2 entry says about its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// Reads as the backing file, or as zeroes.
    Unallocated,
    /// Reads as zeroes, whatever lies below; with `host`, a cluster of the file is kept for it (its content is stale).
    Zero { host: Option<u64>, copied: bool },
    /// Host cluster at byte offset `host`; `copied`: its refcount is one.
    Data { host: u64, copied: bool },
    /// Compressed data: byte offset and the number of bytes up to the end of its last sector.
    Compressed { host: u64, length: u64 },
    /// 32 subclusters with a state each (extended L2 entries), over a host cluster or without one.
    Subclusters { host: Option<u64>, copied: bool, states: Subclusters },
}

/// The second word of an extended entry: bit x says that subcluster x is allocated, bit 32 + x that it reads as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Subclusters(u64);

impl Subclusters {
    pub(crate) fn is_allocated(self, index: u64) -> bool {
        self.0 >> index & 1 == 1
    }

    pub(crate) fn reads_zero(self, index: u64) -> bool {
        self.0 >> (32 + index) & 1 == 1
    }
}

impl L2Entry {
    /// Decodes an entry. `words` holds one word, or two with extended entries; `at` is the host offset of the entry itself,
    /// for the error.
    pub(crate) fn decode(words: &[u64], geometry: Geometry, version: u32, at: u64) -> Result<Self> {
        match *words {
            [raw] => Self::decode_standard(raw, geometry, version, at),
            [raw, states] => Self::decode_extended(raw, states, geometry, version, at),
            _ => Ok(Self::Unallocated),
        }
    }

    /// Refuses an entry that leads out of a file of `file_length` bytes, or to the structures that its header names. The
    /// last cluster of a file may be cut short.
    pub(crate) fn refuse_outside(self, header: &Header, words: &[u64], at: u64, file_length: u64) -> Result<()> {
        let (host, bytes) = match self {
            Self::Data { host, .. } | Self::Subclusters { host: Some(host), .. } => (host, 1),
            Self::Compressed { host, length } => (host, length),
            _ => return Ok(()),
        };
        let raw = words.first().copied().unwrap_or(0);
        let last = (host + bytes - 1) / header.geometry.cluster_size() * header.geometry.cluster_size();
        if last >= file_length {
            return Err(Error::corrupt("L2 entry", at, raw, "must lead to a cluster of the file"));
        }
        if header.is_structure(host) || header.is_structure(last) {
            return Err(Error::corrupt("L2 entry", at, raw, "data must not lie in the file's own structures"));
        }
        Ok(())
    }

    fn decode_extended(raw: u64, states: u64, geometry: Geometry, version: u32, at: u64) -> Result<Self> {
        let corrupt = |rule| Err(Error::corrupt("subcluster bitmap", at + 8, states, rule));
        if raw & (ZERO | COMPRESSED) == ZERO {
            return Err(Error::corrupt("L2 entry", at, raw, "extended entries have no zero bit"));
        }
        let (host, copied) = match Self::decode_standard(raw, geometry, version, at)? {
            Self::Data { host, copied } => (Some(host), copied),
            Self::Compressed { .. } if states != 0 => return corrupt("a compressed cluster has no subclusters"),
            compressed @ Self::Compressed { .. } => return Ok(compressed),
            _ => (None, false),
        };
        let (allocated, zero) = (states & 0xffff_ffff, states >> 32);
        if allocated & zero != 0 {
            return corrupt("a subcluster is allocated or reads as zeroes, not both");
        }
        if allocated != 0 && host.is_none() {
            return corrupt("an allocated subcluster needs a host cluster");
        }
        if states == 0 && host.is_none() {
            return Ok(Self::Unallocated);
        }
        Ok(Self::Subclusters { host, copied, states: Subclusters(states) })
    }

    fn decode_standard(raw: u64, geometry: Geometry, version: u32, at: u64) -> Result<Self> {
        let corrupt = |rule| Err(Error::corrupt("L2 entry", at, raw, rule));
        if raw & COMPRESSED != 0 {
            if raw & COPIED != 0 {
                return corrupt("a compressed cluster must not have the COPIED bit");
            }
            let offset_bits = 62 - (geometry.cluster_bits - 8);
            let host = raw & ((1 << offset_bits) - 1) & ((1 << 56) - 1);
            let sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
            let length = (sectors + 1) * 512 - host % 512;
            if host < geometry.cluster_size() {
                return corrupt("compressed data must not lie in the header cluster");
            }
            return Ok(Self::Compressed { host, length });
        }
        if raw & L2_RESERVED != 0 {
            return corrupt("reserved bits must be zero");
        }
        let host = raw & OFFSET;
        let copied = raw & COPIED != 0;
        if !host.is_multiple_of(geometry.cluster_size()) {
            return corrupt("the cluster's offset must be a multiple of the cluster size");
        }
        if host == 0 && copied && !mutant!("offset_0_is_data") {
            return corrupt("offset 0 is the header, it cannot be a data cluster");
        }
        if raw & ZERO != 0 {
            if version < 3 {
                return corrupt("version 2 has no zero clusters");
            }
            return Ok(Self::Zero { host: (host != 0).then_some(host), copied });
        }
        Ok(if host == 0 && !copied { Self::Unallocated } else { Self::Data { host, copied } })
    }
}

/// The entry of a cluster that reads as the backing file, or as zeroes.
pub(crate) const UNALLOCATED: u64 = 0;

/// The entry of a cluster that reads as zeroes and owns no space.
pub(crate) const ZERO_PLAIN: u64 = ZERO;

/// The entry of a cluster that reads as zeroes and keeps its host cluster, whose refcount is one.
pub(crate) fn zero_kept(host: u64) -> u64 {
    host | COPIED | ZERO
}

/// The entry of a data cluster whose refcount is one.
pub(crate) fn data(host: u64) -> u64 {
    if mutant!("l2_not_copied") { host } else { host | COPIED }
}

/// The entry of a compressed cluster whose `length` bytes (above 0) begin at byte `host`; `None` where offset or length do
/// not fit.
pub(crate) fn compressed(host: u64, length: u64, geometry: Geometry) -> Option<u64> {
    let offset_bits = 62 - (geometry.cluster_bits - 8);
    // Sectors after the one that holds the offset.
    let sectors = (host + length - 1) / 512 - host / 512;
    let fits = host < 1 << offset_bits.min(56) && sectors < 1 << (62 - offset_bits);
    fits.then_some(COMPRESSED | sectors << offset_bits | host)
}

/// Decodes an L1 entry into the host offset of its L2 table (`None`: no table) and its COPIED bit.
pub(crate) fn decode_l1(raw: u64, geometry: Geometry, at: u64) -> Result<Option<(u64, bool)>> {
    if raw & L1_RESERVED != 0 {
        return Err(Error::corrupt("L1 entry", at, raw, "reserved bits must be zero"));
    }
    let host = raw & OFFSET;
    if !host.is_multiple_of(geometry.cluster_size()) {
        return Err(Error::corrupt("L1 entry", at, raw, "the table's offset must be a multiple of the cluster size"));
    }
    if host == 0 {
        return if raw & COPIED == 0 {
            Ok(None)
        } else {
            Err(Error::corrupt("L1 entry", at, raw, "offset 0 is the header, it cannot be an L2 table"))
        };
    }
    Ok(Some((host, raw & COPIED != 0)))
}

/// The L1 entry of a table whose refcount is one.
pub(crate) fn encode_l1(host: u64) -> u64 {
    if mutant!("l1_not_copied") { host } else { host | COPIED }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { cluster_bits: 16, size: 1 << 30, extended: false };

    #[test]
    fn every_kind_survives_a_round_trip() {
        for (raw, entry) in [
            (UNALLOCATED, L2Entry::Unallocated),
            (ZERO_PLAIN, L2Entry::Zero { host: None, copied: false }),
            (zero_kept(0x50000), L2Entry::Zero { host: Some(0x50000), copied: true }),
            (data(0x50000), L2Entry::Data { host: 0x50000, copied: true }),
            (0x50000, L2Entry::Data { host: 0x50000, copied: false }),
        ] {
            assert_eq!(L2Entry::decode(&[raw], GEOMETRY, 3, 0).unwrap(), entry);
        }
    }

    #[test]
    fn compressed_entries_give_the_bytes_to_the_end_of_their_last_sector() {
        let raw = COMPRESSED | (3 << 54) | 0x5_0123;
        let expected = L2Entry::Compressed { host: 0x5_0123, length: 4 * 512 - 0x123 };
        assert_eq!(L2Entry::decode(&[raw], GEOMETRY, 3, 0).unwrap(), expected);
    }

    #[test]
    fn a_compressed_entry_gives_back_its_offset_and_the_sectors_that_its_bytes_touch() {
        for (host, length, read) in
            [(0x5_0000, 1, 512), (0x5_0123, 0xdd, 0xdd), (0x5_0123, 0xde, 0x2dd), (0x5_01ff, 1, 1)]
        {
            let raw = compressed(host, length, GEOMETRY).unwrap();
            assert_eq!(L2Entry::decode(&[raw], GEOMETRY, 3, 0).unwrap(), L2Entry::Compressed { host, length: read });
        }
        let large = Geometry { cluster_bits: 21, ..GEOMETRY };
        assert!(compressed((1 << 49) - 1, 1, large).is_some() && compressed(1 << 49, 1, large).is_none());
        assert!(compressed(1 << 55, 65_536, GEOMETRY).is_none(), "bits 54 and up are taken");
        let small = Geometry { cluster_bits: 9, ..GEOMETRY };
        assert!(compressed(512, 1024, small).is_some() && compressed(512, 1025, small).is_none());
        assert!(compressed((1 << 56) - 1, 1, small).is_some() && compressed(1 << 56, 1, small).is_none());
    }

    #[test]
    fn subclusters_have_a_state_each_and_contradictions_are_refused() {
        let extended = Geometry { extended: true, ..GEOMETRY };
        let decode = |raw, states| L2Entry::decode(&[raw, states], extended, 3, 0);
        let Ok(L2Entry::Subclusters { host: Some(0x50000), copied: true, states }) = decode(data(0x50000), 5 << 32 | 2)
        else {
            panic!("{:?}", decode(data(0x50000), 5 << 32 | 2));
        };
        assert!(states.is_allocated(1) && states.reads_zero(0) && states.reads_zero(2) && !states.is_allocated(3));
        assert_eq!(decode(0, 0).unwrap(), L2Entry::Unallocated);
        for (raw, states) in [(data(0x50000), 1 << 32 | 1), (0, 1), (COMPRESSED | 0x50000, 1), (0x50001, 0)] {
            assert!(decode(raw, states).is_err(), "{raw:#x} {states:#x}");
        }
    }

    #[test]
    fn corrupt_entries_are_refused() {
        for raw in [COPIED, COPIED | 1, 0x50200, 0x50002, 1 << 61, COMPRESSED | COPIED | 0x50000, COMPRESSED | 512] {
            assert!(L2Entry::decode(&[raw], GEOMETRY, 3, 0).is_err(), "{raw:#x}");
        }
        assert!(L2Entry::decode(&[1], GEOMETRY, 2, 0).is_err(), "zero cluster in version 2");
        for raw in [COPIED, 0x50200, 1, 1 << 60] {
            assert!(decode_l1(raw, GEOMETRY, 0).is_err(), "{raw:#x}");
        }
        assert_eq!(decode_l1(encode_l1(0x50000), GEOMETRY, 0).unwrap(), Some((0x50000, true)));
    }
}
