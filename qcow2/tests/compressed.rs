//! Compressed writes: what is stored, how QEMU reads it, and what becomes of it by later writes and many threads.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockyard_qcow2::storage::FileStorage;
use blockyard_qcow2::{Access, Caching, CompressionLevel, CreateOptions, Durability, Image, OpenOptions, ZeroMode};
use support::{KIB, MIB, assert_clean, assert_reads_as, folder, join, pattern, succeed, text, wordy};

const LATER: Durability = Durability::OnFlush;
const LEVELS: [CompressionLevel; 3] = [CompressionLevel::Fast, CompressionLevel::Balanced, CompressionLevel::Small];

fn compressing(level: CompressionLevel) -> OpenOptions {
    OpenOptions { compress: Some(level), ..OpenOptions::new(Access::ReadWrite) }
}

fn open(path: &Path, level: CompressionLevel) -> Image {
    Image::open(path, &compressing(level)).unwrap()
}

/// A new image of a compression type, made by QEMU.
fn made_by_qemu(folder: &tempfile::TempDir, kind: &str, cluster_size: u64, size: u64) -> PathBuf {
    let path = join(folder, &format!("{kind}-{cluster_size}.qcow2"));
    let options = format!("compression_type={kind},cluster_size={cluster_size}");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&path), &size.to_string()]);
    path
}

/// Blocks of noise that come again at some distance, near or far.
fn repetitive(seed: u64, length: usize) -> Vec<u8> {
    let distance = [100, 4_095, 4_096, 4_097, 9_000, 33_000, 70_000][seed as usize % 7];
    let mut bytes = pattern(seed, distance).repeat(length.div_ceil(distance));
    bytes.truncate(length);
    bytes
}

fn some_bytes(seed: u64, length: usize) -> Vec<u8> {
    match seed % 5 {
        0 => pattern(seed, length),
        1 => repetitive(seed, length),
        2 => [wordy(seed, length / 2), pattern(seed, length - length / 2)].concat(),
        3 => vec![if seed.is_multiple_of(2) { 0 } else { 0xa5 }; length],
        _ => wordy(seed, length),
    }
}

fn compressed_clusters(path: &Path) -> u64 {
    let report = succeed("qemu-img", &["check", "--output=json", "-f", "qcow2", text(path)]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    report["compressed-clusters"].as_u64().unwrap_or(0)
}

/// Writes all of a disk of 40 clusters and a bit in requests of odd sizes, with flushes and a reopening between, then parts
/// of it again; QEMU judges what became of it.
fn write_and_let_qemu_judge(kind: &str, cluster_bits: u32) {
    let folder = folder();
    let cluster = 1u64 << cluster_bits;
    let clusters = if cluster_bits > 18 { 9 } else { 40 };
    let size = clusters * cluster + 512;
    let path = made_by_qemu(&folder, kind, cluster, size);
    let mut random = fastrand::Rng::with_seed(u64::from(cluster_bits));
    let mut bytes = vec![0; size as usize];
    let mut image = open(&path, LEVELS[cluster_bits as usize % 3]);
    let mut write = |image: &Image, offset: u64, length: u64, durability| {
        let data = some_bytes(random.u64(..), length as usize);
        image.write(offset, &data, durability).unwrap();
        bytes[offset as usize..(offset + length) as usize].copy_from_slice(&data);
        // Read back at once: it may be on its way still.
        let mut back = vec![0; length as usize];
        image.read(offset, &mut back).unwrap();
        assert!(back == data, "{kind} {cluster} at {offset}+{length}");
        random.u64(..)
    };
    let mut at = 0;
    let mut choice: u64 = 3;
    while at < size {
        let length = [cluster, 3 * cluster, cluster - 512 + 1, 5 * cluster][choice as usize % 4].min(size - at);
        choice = write(&image, at, length, if choice.is_multiple_of(7) { Durability::BeforeReply } else { LATER });
        at += length;
        if choice.is_multiple_of(5) {
            image.flush().unwrap();
        }
        if choice.is_multiple_of(11) {
            image.close().unwrap();
            image = open(&path, LEVELS[choice as usize % 3]);
        }
    }
    image.close().unwrap();
    assert_clean(&path);
    let (stored_small, possible) = (compressed_clusters(&path), cluster > 512);
    assert_eq!(stored_small > 0, possible, "{kind} {cluster}: {stored_small} compressed clusters");
    // Again: parts of clusters become ordinary ones, whole ones take new compressed space.
    let image = open(&path, CompressionLevel::Balanced);
    for round in 0..8u64 {
        let offset = (round * 4 * cluster + round % 3 * 512).min(size - 512);
        write(&image, offset, [512, cluster, 2 * cluster][round as usize % 3].min(size - offset), LATER);
    }
    image.zero(cluster, cluster / 2, ZeroMode::Unmap, LATER).unwrap();
    image.discard(2 * cluster, cluster, LATER).unwrap();
    image.close().unwrap();
    bytes[cluster as usize..(cluster + cluster / 2) as usize].fill(0);
    bytes[(2 * cluster) as usize..(3 * cluster) as usize].fill(0);
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
    // QEMU as a writer of what we left.
    let pattern = format!("write -P 0x77 {} {cluster}", 3 * cluster);
    succeed("qemu-io", &["-f", "qcow2", "-c", &pattern, text(&path)]);
    bytes[(3 * cluster) as usize..(4 * cluster) as usize].fill(0x77);
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
    let raw = join(&folder, "converted.raw");
    succeed("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&raw)]);
    assert!(std::fs::read(raw).unwrap() == bytes);
}

#[test]
fn qemu_reads_deflate_clusters_of_every_size() {
    (9..=21).for_each(|cluster_bits| write_and_let_qemu_judge("zlib", cluster_bits));
}

#[test]
fn qemu_reads_zstd_clusters_of_every_size() {
    (9..=21).for_each(|cluster_bits| write_and_let_qemu_judge("zstd", cluster_bits));
}

#[test]
fn qemu_reads_every_level_whatever_the_distance_of_repetitions() {
    for (kind, cluster) in [("zlib", 64 * KIB), ("zlib", 2 * MIB), ("zstd", 64 * KIB), ("zstd", 2 * MIB)] {
        let folder = folder();
        let path = made_by_qemu(&folder, kind, cluster, 21 * cluster);
        let mut bytes = Vec::new();
        for (index, level) in LEVELS.iter().enumerate() {
            let image = open(&path, *level);
            for seed in 0..7 {
                // The end is plain, so that a stream becomes smaller than its cluster also where the noise does not repeat
                // within the window.
                let mut data = repetitive(seed, cluster as usize);
                data[cluster as usize / 2..].fill(index as u8 + 1);
                image.write(bytes.len() as u64, &data, LATER).unwrap();
                bytes.extend(data);
            }
            image.close().unwrap();
        }
        assert_eq!(compressed_clusters(&path), 21, "{kind} {cluster}");
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
    }
}

#[test]
fn a_higher_level_makes_smaller_files() {
    for kind in ["zlib", "zstd"] {
        let lengths = LEVELS.map(|level| {
            let folder = folder();
            let path = made_by_qemu(&folder, kind, 64 * KIB, 2 * MIB);
            // Words of a small language, so that looking longer finds more.
            let mut random = fastrand::Rng::with_seed(1);
            let words: Vec<Vec<u8>> =
                (0..150).map(|_| (0..random.usize(3..12)).map(|_| random.u8(..)).collect()).collect();
            let mut data: Vec<u8> = Vec::new();
            while data.len() < 2 << 20 {
                data.extend(&words[random.usize(..words.len())]);
            }
            data.truncate(2 << 20);
            let image = open(&path, level);
            image.write(0, &data, LATER).unwrap();
            image.close().unwrap();
            assert_clean(&path);
            path.metadata().unwrap().len()
        });
        assert!(lengths[0] > lengths[1] && lengths[1] >= lengths[2] && lengths[0] < MIB * 9 / 5, "{kind}: {lengths:?}");
    }
}

#[test]
fn compressed_clusters_share_host_clusters_also_those_of_different_requests() {
    // Through the page cache alone requests go on at the next sector, and some reach over a border of host clusters.
    for caching in [Caching::PageCache, Caching::Auto] {
        let folder = folder();
        let path = made_by_qemu(&folder, "zlib", 64 * KIB, 16 * MIB);
        let options = OpenOptions { caching, ..compressing(CompressionLevel::Fast) };
        let image = Image::open(&path, &options).unwrap();
        let data = wordy(1, 64 << 10);
        for cluster in 0..256 {
            image.write(cluster * 64 * KIB, &data, LATER).unwrap();
            if cluster % 32 == 31 {
                image.flush().unwrap();
            }
        }
        image.close().unwrap();
        drop(image);
        assert_eq!(compressed_clusters(&path), 256);
        assert_clean(&path);
        assert_reads_as(&path, &data.repeat(256));
        let length = path.metadata().unwrap().len();
        assert!(length < 2 * MIB, "{length} bytes for 16 MiB that compress to a twentieth");
    }
}

#[test]
fn refcounts_too_narrow_for_shared_clusters_leave_the_clusters_uncompressed() {
    for (refcount_bits, compressed) in [(1, 0), (8, 0), (16, 32), (64, 32)] {
        let folder = folder();
        let path = join(&folder, "image.qcow2");
        blockyard_qcow2::create(&path, &CreateOptions { refcount_bits, ..CreateOptions::new(2 * MIB) }).unwrap();
        let image = open(&path, CompressionLevel::Fast);
        image.write(0, &vec![0; 2 << 20], LATER).unwrap();
        image.write(0, &vec![3; 2 << 20], LATER).unwrap();
        image.close().unwrap();
        assert_eq!(compressed_clusters(&path), compressed, "{refcount_bits} bits");
        assert_clean(&path);
        assert_reads_as(&path, &vec![3; 2 << 20]);
    }
}

#[test]
fn the_most_owners_that_a_host_cluster_can_have_fit_its_refcount() {
    let folder = folder();
    let path = made_by_qemu(&folder, "zstd", 64 * KIB, 512 * MIB);
    let image = open(&path, CompressionLevel::Fast);
    let zeroes = vec![0; 32 << 20];
    (0..16).for_each(|piece| image.write(piece * 32 * MIB, &zeroes, LATER).unwrap());
    image.close().unwrap();
    assert_eq!(compressed_clusters(&path), 8192);
    assert_clean(&path);
    assert!(path.metadata().unwrap().len() < MIB);
}

#[test]
fn a_full_disk_is_met_before_anything_changes() {
    let disk = Arc::new(FileStorage::new(tempfile::tempfile().unwrap()));
    blockyard_qcow2::create_on(&*disk, &CreateOptions::new(16 * MIB)).unwrap();
    let fault = faulty::Fault {
        kind: faulty::Kind::Reserve,
        call: 2,
        errno: nix::errno::Errno::ENOSPC,
        for_ever: true,
        short: false,
    };
    let storage = Arc::new(faulty::Faulty::new(disk, &[fault]));
    let image = Image::open_on_with(storage.clone(), None, &compressing(CompressionLevel::Fast)).unwrap();
    let mut bytes = vec![0; 16 << 20];
    let mut refused = 0;
    for piece in 0..16usize {
        // Noise in every second cluster: packed and ordinary space are both wanted.
        let data: Vec<u8> = (0..16).flat_map(|cluster| some_bytes(cluster % 2 * 4, 64 << 10)).collect();
        match image.write((piece << 20) as u64, &data, LATER) {
            Ok(()) => bytes[piece << 20..(piece + 1) << 20].copy_from_slice(&data),
            Err(error) => {
                assert!(error.is_no_space(), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0 && refused < 16, "{refused} refused");
    let mut back = vec![1; 16 << 20];
    image.read(0, &mut back).unwrap();
    assert!(back == bytes);
    storage.heal();
    image.close().unwrap();
    assert!(image.check().unwrap().is_clean());
}

#[test]
fn many_threads_pack_into_one_image_and_lose_nothing() {
    for kind in ["zlib", "zstd"] {
        let folder = folder();
        let size = 24 * MIB;
        let path = made_by_qemu(&folder, kind, 16 * KIB, size);
        let image = open(&path, CompressionLevel::Fast);
        let unit = 24 * KIB;
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let image = &image;
                scope.spawn(move || {
                    for index in (thread..size / unit).step_by(4) {
                        image.write(index * unit, &some_bytes(index, unit as usize), LATER).unwrap();
                        if index % 32 == thread {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        image.close().unwrap();
        let bytes: Vec<u8> = (0..size / unit).flat_map(|index| some_bytes(index, unit as usize)).collect();
        assert!(compressed_clusters(&path) > 0);
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
    }
}
