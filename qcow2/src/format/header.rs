//! The header cluster: fixed fields, extensions and the backing file name ("Header", "Header extensions").

pub use super::backing::{Backing, BackingFormat};
use super::backing::{NAME_MAX, backing, backing_name};
use super::feature_names::feature_names;
use super::refcount::Width;
use super::{be32, be64};
use crate::error::{Error, Result};
use crate::geometry::{ENTRY, Geometry};

/// `QFI\xfb`.
const MAGIC: u32 = 0x5146_49fb;
/// Header bytes that we write; QEMU writes the same.
const LENGTH: usize = 112;
/// Incompatible bit 0: refcounts may be wrong, everything else is right.
pub(crate) const DIRTY: u64 = 1 << 0;
/// Incompatible bit 1: metadata is damaged.
pub(crate) const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible bit 3: the compression type is not deflate.
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;

const EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const KNOWN_EXTENSIONS: [u32; 5] =
    [EXTENSION_BACKING_FORMAT, EXTENSION_FEATURE_NAMES, EXTENSION_BITMAPS, EXTENSION_ENCRYPTION, EXTENSION_DATA_FILE];
/// Compatible bit 0: QEMU may postpone updates of the refcounts.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear bit 0: the bitmaps extension is valid.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear bit 1: the external data file can be read as a raw image.
const RAW_EXTERNAL_DATA: u64 = 1 << 1;
/// What a bitmaps extension is renamed to before the first write: an unknown type, ignored by every reader.
pub(crate) const EXTENSION_RETIRED_BITMAPS: u32 = 0x6279_6e6f;

/// Byte offsets in the header of the fields that change while an image is in use; all lie in the first sector.
pub(crate) mod field {
    /// u64: virtual size.
    pub(crate) const SIZE: usize = 24;
    /// u32: entries of the L1 table.
    pub(crate) const L1_ENTRIES: usize = 36;
    /// u64: host offset of the L1 table.
    pub(crate) const L1_OFFSET: usize = 40;
    /// u64: host offset of the refcount table.
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    /// u32: clusters of the refcount table.
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    /// u64: features without which an image must not be opened.
    pub(crate) const INCOMPATIBLE: usize = 72;
    /// u64: features that a writer that does not know them must clear.
    pub(crate) const AUTOCLEAR: usize = 88;
}

/// Limits checked before anything is allocated.
pub(crate) const L1_BYTES_MAX: u64 = 32 << 20;
pub(crate) const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const EXTENSIONS_MAX: usize = 64;

/// The decoded header of an image that this engine can read.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    /// 2 or 3.
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    pub(crate) backing: Option<Backing>,
    /// Entries; covers the virtual size.
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) refcount_width: Width,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression_type: u8,
    /// Byte offset of the type field of a bitmaps extension.
    pub(crate) bitmaps_extension: Option<usize>,
}

/// The cluster size that a header claims, from its first 24 bytes, so that the caller can read the whole header cluster.
pub(crate) fn cluster_size(start: &[u8]) -> Result<u64> {
    if be32(start, 0) != Some(MAGIC) {
        return Err(Error::NotQcow2);
    }
    let bits = be32(start, 20).ok_or(Error::NotQcow2)?;
    if !(9..=21).contains(&bits) {
        return Err(Error::corrupt("header field cluster_bits", 20, u64::from(bits), "must be 9 to 21"));
    }
    Ok(1 << bits)
}

impl Header {
    /// Decodes the header cluster (or what the file has of it). `file_length` bounds every offset.
    pub(crate) fn decode(bytes: &[u8], file_length: u64) -> Result<Self> {
        let cluster_size = cluster_size(bytes)?;
        let truncated = || Error::corrupt("header", 0, bytes.len() as u64, "the file ends inside its header");
        let u32_at = |at| be32(bytes, at).ok_or_else(truncated);
        let u64_at = |at| be64(bytes, at).ok_or_else(truncated);

        let version = u32_at(4)?;
        let (header_length, incompatible, compatible, autoclear, refcount_order) = match version {
            2 => (72, 0, 0, 0, 4),
            3 => (u32_at(100)?, u64_at(72)?, u64_at(80)?, u64_at(88)?, u32_at(96)?),
            _ => return Err(Error::corrupt("header field version", 4, u64::from(version), "must be 2 or 3")),
        };
        if version == 3 && (header_length < 104 || header_length % 8 != 0 || u64::from(header_length) > cluster_size) {
            let rule = "must be a multiple of 8, at least 104, inside the first cluster";
            return Err(Error::corrupt("header field header_length", 100, u64::from(header_length), rule));
        }
        let compression_type = if header_length > 104 { bytes.get(104).copied().ok_or_else(truncated)? } else { 0 };
        refuse_unsupported(u32_at(32)?, incompatible, compression_type)?;

        if autoclear & RAW_EXTERNAL_DATA != 0 {
            let rule = "raw external data needs an external data file";
            return Err(Error::corrupt("header field autoclear_features", 88, autoclear, rule));
        }

        let extended = incompatible & EXTENDED_L2 != 0;
        if extended && cluster_size < 16384 {
            let rule = "extended L2 entries need clusters of at least 16 KiB";
            return Err(Error::corrupt("header field incompatible_features", 72, incompatible, rule));
        }
        let geometry = Geometry { cluster_bits: cluster_size.trailing_zeros(), size: u64_at(24)?, extended };
        let width = Width::from_order(refcount_order).ok_or_else(|| {
            Error::corrupt("header field refcount_order", 96, u64::from(refcount_order), "must be at most 6")
        })?;
        let header = Self {
            version,
            geometry,
            backing: None,
            l1_entries: u32_at(36)?,
            l1_offset: u64_at(40)?,
            refcount_table_offset: u64_at(field::REFCOUNT_TABLE_OFFSET)?,
            refcount_table_clusters: u32_at(field::REFCOUNT_TABLE_CLUSTERS)?,
            refcount_width: width,
            snapshots: u32_at(60)?,
            snapshots_offset: u64_at(64)?,
            incompatible,
            compatible,
            autoclear,
            compression_type,
            bitmaps_extension: None,
        };
        header.check_tables(file_length)?;
        header.with_extensions(bytes, header_length as usize, u64_at(8)?, u32_at(16)?)
    }

    fn check_tables(&self, file_length: u64) -> Result<()> {
        let corrupt = |structure, at, value, rule| Err(Error::corrupt(structure, at, value, rule));
        let (size, cluster_size) = (self.geometry.size, self.geometry.cluster_size());
        let l1_bytes = u64::from(self.l1_entries) * ENTRY;
        if size > i64::MAX as u64 {
            return corrupt("header field size", 24, size, "must be below 2^63");
        }
        if l1_bytes > L1_BYTES_MAX || u64::from(self.l1_entries) < self.geometry.l1_entries() {
            let rule = "must cover the virtual size and be at most 32 MiB";
            return corrupt("header field l1_size", 36, u64::from(self.l1_entries), rule);
        }
        let inside = |offset: u64, length: u64| {
            offset >= cluster_size
                && offset.is_multiple_of(cluster_size)
                && offset < 1 << 56
                && offset + length <= file_length.next_multiple_of(cluster_size)
        };
        if self.l1_entries > 0 && !inside(self.l1_offset, l1_bytes) {
            let rule = "must be a multiple of the cluster size, behind the header and inside the file";
            return corrupt("header field l1_table_offset", 40, self.l1_offset, rule);
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster_size;
        if !(1..=REFCOUNT_TABLE_BYTES_MAX).contains(&table_bytes) {
            let value = u64::from(self.refcount_table_clusters);
            return corrupt("header field refcount_table_clusters", 56, value, "must be 1 cluster to 8 MiB");
        }
        // QEMU opens no image that breaks this, with snapshots or without.
        let offset = self.snapshots_offset;
        if !offset.is_multiple_of(cluster_size) || offset > i64::MAX as u64 || (self.snapshots > 0 && offset == 0) {
            let rule = "must be a multiple of the cluster size below 2^63, behind the header if there are snapshots";
            return corrupt("header field snapshots_offset", 64, self.snapshots_offset, rule);
        }
        if !inside(self.refcount_table_offset, table_bytes) {
            let rule = "must be a multiple of the cluster size, behind the header and inside the file";
            return corrupt("header field refcount_table_offset", 48, self.refcount_table_offset, rule);
        }
        Ok(())
    }

    fn with_extensions(mut self, bytes: &[u8], start: usize, name_at: u64, name_length: u32) -> Result<Self> {
        let cluster_size = self.geometry.cluster_size();
        let name = backing_name(bytes, name_at, name_length, cluster_size)?;
        if name.is_some() && name_at < start as u64 {
            let rule = "must lie behind the header";
            return Err(Error::corrupt("backing file name", name_at, u64::from(name_length), rule));
        }
        let end = if name_at == 0 { cluster_size } else { name_at }.min(bytes.len() as u64) as usize;
        let mut format = None;
        let mut seen = Vec::new();
        let mut at = start;
        while let (Some(kind), Some(length)) = (be32(bytes, at), be32(bytes, at + 4)) {
            let corrupt = |rule| Err(Error::corrupt("header extension", at as u64, u64::from(kind), rule));
            if kind == EXTENSION_END || at + 8 > end {
                break;
            }
            if seen.len() == EXTENSIONS_MAX {
                return corrupt("an image has at most 64 extensions");
            }
            // Of unknown ones there may be several: bitmaps that were retired twice, for instance.
            if KNOWN_EXTENSIONS.contains(&kind) && seen.contains(&kind) {
                return corrupt("a known extension must not occur twice");
            }
            let data_end = at + 8 + length as usize;
            let Some(data) = bytes.get(at + 8..data_end).filter(|_| data_end <= end) else {
                return corrupt("an extension must end before the backing file name and inside the first cluster");
            };
            match kind {
                EXTENSION_BACKING_FORMAT if length > 15 => return corrupt("no backing format has more than 15 bytes"),
                EXTENSION_BACKING_FORMAT => format = Some(data.to_vec()),
                EXTENSION_BITMAPS if length != 24 => return corrupt("the bitmaps extension has 24 bytes"),
                EXTENSION_BITMAPS => self.bitmaps_extension = Some(at),
                EXTENSION_ENCRYPTION => return Err(Error::unsupported("encrypted images")),
                EXTENSION_DATA_FILE => return Err(Error::unsupported("images with an external data file")),
                _ => {}
            }
            seen.push(kind);
            at = data_end.next_multiple_of(8);
        }
        self.backing = name.map(|name| backing(name, format.as_deref())).transpose()?;
        Ok(self)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether a host offset lies in the header or the L1 table. Where the refcounts are does not matter to a reader, who
    /// must be able to get at the data when they are what is broken.
    pub(crate) fn is_structure(&self, host: u64) -> bool {
        let cluster_size = self.geometry.cluster_size();
        let l1_bytes = (u64::from(self.l1_entries) * ENTRY).next_multiple_of(cluster_size);
        host < cluster_size || (host >= self.l1_offset && host - self.l1_offset < l1_bytes)
    }

    /// Encodes a version 3 header cluster. The caller has bounded cluster size, table sizes and the backing name.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        let push32 = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_be_bytes());
        let push64 = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_be_bytes());

        let extensions = self.encode_extensions();
        let name = self.backing.as_ref().map_or("", |backing| &backing.name);
        let name_at = LENGTH + extensions.len();
        push32(&mut out, MAGIC);
        push32(&mut out, 3);
        push64(&mut out, if name.is_empty() { 0 } else { name_at as u64 });
        push32(&mut out, name.len() as u32);
        push32(&mut out, self.geometry.cluster_bits);
        push64(&mut out, self.geometry.size);
        push32(&mut out, 0); // crypt_method: none
        push32(&mut out, self.l1_entries);
        push64(&mut out, self.l1_offset);
        push64(&mut out, self.refcount_table_offset);
        push32(&mut out, self.refcount_table_clusters);
        push32(&mut out, 0); // nb_snapshots
        push64(&mut out, 0); // snapshots_offset
        push64(&mut out, self.incompatible);
        push64(&mut out, self.compatible);
        push64(&mut out, self.autoclear);
        push32(&mut out, self.refcount_width.order());
        push32(&mut out, LENGTH as u32);
        push64(&mut out, u64::from(self.compression_type) << 56); // one byte, then padding
        out.extend_from_slice(&extensions);
        out.extend_from_slice(name.as_bytes());
        if name.len() > NAME_MAX || out.len() as u64 > self.geometry.cluster_size() {
            return Err(Error::InvalidOption {
                option: "backing",
                reason: "the name must fit into the first cluster, and into 1023 bytes".into(),
            });
        }
        Ok(out)
    }

    fn encode_extensions(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut push = |kind: u32, data: &[u8]| {
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&(data.len() as u32).to_be_bytes());
            out.extend_from_slice(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        if let Some(backing) = &self.backing {
            push(EXTENSION_BACKING_FORMAT, backing.format.name().as_bytes());
        }
        if self.geometry.cluster_size() > 512 {
            push(EXTENSION_FEATURE_NAMES, &feature_names());
        }
        push(EXTENSION_END, &[]);
        out
    }
}

fn refuse_unsupported(crypt_method: u32, incompatible: u64, compression_type: u8) -> Result<()> {
    if crypt_method != 0 {
        return Err(Error::unsupported("encrypted images"));
    }
    let incompatible = if mutant!("external_data_accepted") { incompatible & !EXTERNAL_DATA } else { incompatible };
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(Error::unsupported("images with an external data file"));
    }
    let unknown = incompatible & !(DIRTY | CORRUPT | COMPRESSION_TYPE | EXTENDED_L2);
    if unknown != 0 {
        return Err(Error::unsupported(format!("unknown incompatible feature bits {unknown:#x}")));
    }
    if (compression_type != 0) != (incompatible & COMPRESSION_TYPE != 0) {
        let rule = "a compression type other than deflate and its feature bit go together";
        return Err(Error::corrupt("header field compression_type", 104, u64::from(compression_type), rule));
    }
    if compression_type > 1 {
        return Err(Error::unsupported(format!("compression type {compression_type}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            version: 3,
            geometry: Geometry { cluster_bits: 16, size: 1 << 30, extended: false },
            backing: Some(Backing { name: "base.qcow2".into(), format: BackingFormat::Qcow2 }),
            l1_entries: 2,
            l1_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            refcount_width: Width::from_order(4).unwrap(),
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: DIRTY,
            compatible: 0,
            autoclear: 0,
            compression_type: 0,
            bitmaps_extension: None,
        }
    }

    #[test]
    fn a_header_survives_a_round_trip() {
        let decoded = Header::decode(&header().encode().unwrap(), 0x40000).unwrap();
        assert_eq!(decoded.geometry, header().geometry);
        assert_eq!(decoded.backing, header().backing);
        assert!(decoded.is_dirty());
        assert_eq!((decoded.l1_entries, decoded.l1_offset), (2, 0x30000));
    }

    #[test]
    fn a_header_cut_anywhere_is_refused_and_never_panics() {
        let bytes = header().encode().unwrap();
        for length in 0..112 {
            assert!(Header::decode(&bytes[..length], 0x40000).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn each_field_out_of_bounds_is_refused() {
        for (at, value) in [
            (4, 4u32),
            (16, 5000),
            (20, 8),
            (20, 22),
            (32, 1),
            (36, 1),
            (36, u32::MAX),
            (56, 0),
            (56, u32::MAX),
            (76, 4),
            (76, 16),
            (76, 64),
            (76, 8),
            (96, 7),
            (100, 96),
            (100, 108),
            (100, u32::MAX),
            (40, 1),
            (44, 0x30001),
            (48, 1),
            (52, 0x10200),
            (24, u32::MAX),
            (8, 1),
        ] {
            let mut bytes = header().encode().unwrap();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            assert!(Header::decode(&bytes, 0x40000).is_err(), "{value:#x} at {at}");
        }
    }

    #[test]
    fn an_extension_that_reaches_past_its_area_is_refused() {
        let mut bytes = header().encode().unwrap();
        bytes[116..120].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(Header::decode(&bytes, 0x40000).is_err());
    }
}
