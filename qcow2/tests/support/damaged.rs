//! A small sound image made byte by byte, apart from the engine, so that a test knows where each structure lies and can
//! damage it; and files on disk from that.

#![allow(dead_code, unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, clippy::precedence, reason = "a test fails by panicking; offsets are cluster times size")]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;

/// Where the structures of [`sample`] lie, in clusters.
pub mod place {
    pub const REFCOUNT_TABLE: u64 = 1;
    pub const REFCOUNT_BLOCK: u64 = 2;
    pub const L1: u64 = 3;
    /// The first L2 table, then the second.
    pub const L2: u64 = 4;
    /// Three data clusters, a kept zero cluster, one of compressed data, and a data cluster of the second table.
    pub const DATA: u64 = 6;
    pub const KEPT_ZERO: u64 = 9;
    pub const COMPRESSED: u64 = 10;
    pub const LAST: u64 = 11;
    pub const END: u64 = 12;
}

/// What a sample is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub zstd: bool,
    pub extended: bool,
}

pub const PLAIN: Shape = Shape { version: 3, cluster_bits: 12, refcount_order: 4, zstd: false, extended: false };

/// An image file: bytes at offsets, zeroes (holes) elsewhere.
#[derive(Clone, Debug)]
pub struct Bytes {
    pub shape: Shape,
    pub bytes: Vec<u8>,
    /// Further pieces of a file that is too large to be held; `length` is then above `bytes.len()`.
    pub pieces: Vec<(u64, Vec<u8>)>,
    pub length: u64,
}

impl Bytes {
    pub fn cluster(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    pub fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at as usize..end].copy_from_slice(bytes);
        self.length = self.length.max(end as u64);
    }

    pub fn cut(&mut self, length: u64) {
        self.bytes.truncate(length as usize);
        self.length = length;
    }

    /// Puts a backing file name, with its format, where the extensions end.
    pub fn name_backing(&mut self, name: &[u8], format: &[u8]) {
        let mut extension = vec![0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, format.len() as u8];
        extension.extend_from_slice(format);
        extension.resize(extension.len().next_multiple_of(8), 0);
        extension.extend_from_slice(&[0; 8]);
        let at = if self.shape.version == 2 { 72 } else { 112 };
        self.put(at, &extension);
        let name_at = at + extension.len() as u64;
        self.put64(8, name_at);
        self.put32(16, name.len() as u32);
        self.put(name_at, name);
    }

    pub fn write_to(&self, path: &Path) {
        let mut file = File::create(path).unwrap();
        file.write_all(&self.bytes).unwrap();
        for (at, bytes) in &self.pieces {
            file.write_all_at(bytes, *at).unwrap();
        }
        file.set_len(self.length).unwrap();
    }
}

/// One cluster of content, different for each seed.
pub fn content(seed: u64, cluster: u64) -> Vec<u8> {
    super::pattern(seed, 64).into_iter().cycle().take(cluster as usize).collect()
}

pub fn compress(zstd: bool, plain: &[u8]) -> Vec<u8> {
    if zstd {
        return zstd::bulk::compress(plain, 3).unwrap();
    }
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

/// A compressed entry for `length` bytes at `host`.
pub fn compressed_entry(cluster_bits: u32, host: u64, length: u64) -> u64 {
    let sectors = (host % 512 + length).div_ceil(512) - 1;
    COMPRESSED | sectors << (62 - (cluster_bits - 8)) | host
}

/// A sound image of one and a half L2 tables: data, zero clusters of both kinds, two compressed clusters.
pub fn sample(shape: Shape) -> Bytes {
    let cluster = 1 << shape.cluster_bits;
    let words = if shape.extended { 2 } else { 1 };
    let per_table = cluster / 8 / words;
    let mut image = Bytes { shape, bytes: Vec::new(), pieces: Vec::new(), length: 0 };
    image.put32(0, 0x5146_49fb);
    image.put32(4, shape.version);
    image.put32(20, shape.cluster_bits);
    image.put64(24, per_table * cluster * 3 / 2);
    image.put32(36, 2);
    image.put64(40, place::L1 * cluster);
    image.put64(48, place::REFCOUNT_TABLE * cluster);
    image.put32(56, 1);
    if shape.version == 3 {
        image.put64(72, u64::from(shape.zstd) << 3 | u64::from(shape.extended) << 4);
        image.put32(96, shape.refcount_order);
        image.put32(100, 112);
        image.put(104, &[u8::from(shape.zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    image.put64(place::REFCOUNT_TABLE * cluster, place::REFCOUNT_BLOCK * cluster);
    for index in 0..2 {
        image.put64(place::L1 * cluster + index * 8, COPIED | (place::L2 + index) * cluster);
    }
    let entry = |table: u64, index: u64| (place::L2 + table) * cluster + index * 8 * words;
    // All subclusters allocated, where there are subclusters.
    let put_data = |image: &mut Bytes, at: u64, host: u64| {
        image.put64(at, COPIED | host * cluster);
        image.put(host * cluster, &content(host, cluster));
        if shape.extended {
            image.put64(at + 8, 0xffff_ffff);
        }
    };
    for index in 0..3 {
        put_data(&mut image, entry(0, index), place::DATA + index);
    }
    if shape.version == 3 && !shape.extended {
        image.put64(entry(0, 3), 1);
        image.put64(entry(0, 4), COPIED | place::KEPT_ZERO * cluster | 1);
    } else {
        put_data(&mut image, entry(0, 4), place::KEPT_ZERO);
    }
    image.put(place::KEPT_ZERO * cluster, &content(99, cluster));
    let mut host = place::COMPRESSED * cluster;
    for index in 5..7 {
        let stream = compress(shape.zstd, &content(index + 100, cluster));
        image.put64(entry(0, index), compressed_entry(shape.cluster_bits, host, stream.len() as u64));
        image.put(host, &stream);
        host += stream.len() as u64;
    }
    put_data(&mut image, entry(1, 0), place::LAST);
    for cluster in 0..place::END {
        put_refcount(&mut image, cluster, if cluster == place::COMPRESSED { 2 } else { 1 });
    }
    image.put(place::END * cluster - 1, &[7]);
    image
}

/// Stores a refcount of 16 bits or more.
pub fn put_refcount(image: &mut Bytes, cluster: u64, count: u64) {
    let bytes = (1u64 << image.shape.refcount_order) / 8;
    let at = place::REFCOUNT_BLOCK * image.cluster() + cluster * bytes;
    image.put(at, &count.to_be_bytes()[8 - bytes as usize..]);
}
