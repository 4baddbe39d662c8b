//! Writes of what is there already: left out where asked for, and never at the price of a byte.
//!
//! `SCALE` multiplies the number of random workloads, `SEED` repeats one.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells its figures"
)]

#[path = "support/power_cut.rs"]
mod power_cut;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/recorder.rs"]
mod recorder;
#[path = "support/requests.rs"]
mod requests;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockyard_qcow2::{Access, Backing, BackingFormat, CompressionLevel, CreateOptions, Durability, ExtentKind};
use blockyard_qcow2::{Identical, Image, OpenOptions, ZeroMode};
use recorder::{Recorder, blank};
use sim_disk::Clock;
use support::{KIB, MIB, assert_clean, assert_reads_as, folder, fresh, join, over, pattern, wordy};

const LATER: Durability = Durability::OnFlush;

fn skipping() -> OpenOptions {
    OpenOptions { identical: Identical::Skip, ..OpenOptions::new(Access::ReadWrite) }
}

fn open(path: &Path) -> Image {
    open_compressing(path, None)
}

fn open_compressing(path: &Path, compress: Option<CompressionLevel>) -> Image {
    Image::open(path, &OpenOptions { compress, ..skipping() }).unwrap()
}

fn overlay(folder: &tempfile::TempDir, name: &str, below: &str, size: u64) -> PathBuf {
    let path = join(folder, name);
    blockyard_qcow2::create(&path, &over(below, size)).unwrap();
    path
}

/// Bytes of clusters that the image itself stores.
fn stored(image: &Image) -> u64 {
    let extents = image.map(0, image.size(), usize::MAX).unwrap();
    let own = extents.iter().filter(|extent| extent.depth == 1 && extent.kind == ExtentKind::Data);
    own.map(|extent| extent.length).sum()
}

#[test]
fn an_unchanged_full_copy_into_an_overlay_stores_nothing_and_one_changed_byte_stores_one_cluster() {
    let folder = folder();
    let size = 8 * MIB;
    let mut bytes = pattern(1, 4 << 20);
    bytes.resize(size as usize, 0);
    let base = fresh(&join(&folder, "base.qcow2"), &CreateOptions::new(size));
    base.write(0, &bytes[..4 << 20], LATER).unwrap();
    base.close().unwrap();
    let path = overlay(&folder, "overlay.qcow2", "base.qcow2", size);
    let copy = |image: &Image, bytes: &[u8]| {
        for (index, piece) in bytes.chunks(1 << 20).enumerate() {
            image.write(index as u64 * MIB, piece, LATER).unwrap();
        }
    };
    let image = open(&path);
    copy(&image, &bytes);
    assert_eq!((stored(&image), image.identical_bytes()), (0, size));
    image.close().unwrap();
    let length = path.metadata().unwrap().len();
    assert!(length <= 5 * 64 * KIB, "{length} bytes: not even an L2 table is needed");
    let image = open(&path);
    bytes[3_333_333] ^= 1;
    copy(&image, &bytes);
    assert_eq!((stored(&image), image.identical_bytes()), (64 * KIB, size - 64 * KIB));
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
    // Unasked, everything is stored.
    let image = Image::open(&path, &OpenOptions::new(Access::ReadWrite)).unwrap();
    copy(&image, &bytes);
    assert_eq!((stored(&image), image.identical_bytes()), (size, 0));
    image.close().unwrap();
}

#[test]
fn parts_of_clusters_are_compared_too_with_every_kind_of_layer_below() {
    let folder = folder();
    let size = 16 * 64 * KIB;
    let cluster = 64 << 10;
    // Three layers: data, a zero entry over it, and a raw file that ends before the disk does.
    let raw = pattern(3, 5 * cluster + 1000);
    std::fs::write(join(&folder, "bottom.raw"), &raw).unwrap();
    let middle = join(&folder, "middle.qcow2");
    let backing = Some(Backing { name: "bottom.raw".into(), format: BackingFormat::Raw });
    let image = fresh(&middle, &CreateOptions { backing, ..CreateOptions::new(12 * 64 * KIB) });
    image.zero(64 * KIB, 64 * KIB, ZeroMode::Unmap, LATER).unwrap();
    image.write(8 * 64 * KIB + 512, &[9; 512], LATER).unwrap();
    image.close().unwrap();
    let path = overlay(&folder, "top.qcow2", "middle.qcow2", size);
    let image = open(&path);
    let mut bytes = vec![0; size as usize];
    image.read(0, &mut bytes).unwrap();
    image.zero(2 * 64 * KIB, 64 * KIB, ZeroMode::Unmap, LATER).unwrap();
    bytes[2 * cluster..3 * cluster].fill(0);
    for (offset, length) in
        [(0, 1), (100, 3 * cluster), (5 * cluster - 7, 2000), (8 * cluster, 8 * cluster), (0, 16 * cluster)]
    {
        image.write(offset as u64, &bytes[offset..offset + length], LATER).unwrap();
        assert_eq!(stored(&image), 0, "{offset}+{length}");
    }
    // One different byte anywhere is written, and nothing of its neighbours.
    for (changes, at) in
        [0, 2 * cluster + 5, 5 * cluster + 999, 5 * cluster + 1000, 15 * cluster].into_iter().enumerate()
    {
        bytes[at] ^= 0x55;
        image.write(0, &bytes, LATER).unwrap();
        let clusters = [1, 2, 3, 3, 4][changes];
        assert_eq!(stored(&image), clusters * 64 * KIB, "byte {at}");
    }
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
}

#[test]
fn what_has_space_of_its_own_is_written_even_if_it_reads_the_same() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    blockyard_qcow2::create(&path, &CreateOptions::new(MIB)).unwrap();
    let image = open(&path);
    image.write(0, &[0; 65_536], LATER).unwrap();
    assert_eq!(stored(&image), 0, "never written: reads as zeroes");
    image.write(0, &[1; 65_536], LATER).unwrap();
    image.zero(0, 65_536, ZeroMode::Keep, LATER).unwrap();
    assert_eq!(stored(&image), 0);
    image.write(0, &[0; 65_536], LATER).unwrap();
    assert_eq!(stored(&image), 64 * KIB, "a kept cluster is written again");
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &vec![0; 1 << 20]);
}

/// Random requests, most of them of what is there already, on a chain of three images, against a byte array.
fn run_sequence(seed: u64) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = folder();
    let cluster_size = [512u32, 4096, 65_536][random.usize(..3)];
    let cluster = u64::from(cluster_size);
    let size = random.u64(8..60) * cluster + random.u64(..3) * 512;
    let mut bytes = Vec::new();
    let mut skipped = 0;
    for layer in 0..3u64 {
        let size = if layer == 0 { size.saturating_sub(5 * cluster).max(cluster) } else { size };
        let path = join(&folder, &format!("{layer}.qcow2"));
        let shape = match layer {
            0 => CreateOptions::new(size),
            _ => over(&format!("{}.qcow2", layer - 1), size),
        };
        blockyard_qcow2::create(&path, &CreateOptions { cluster_size, ..shape }).unwrap();
        bytes.resize(size as usize, 0);
        let compress = random.bool().then_some(CompressionLevel::Fast);
        let mut image = open_compressing(&path, compress);
        for _ in 0..30 {
            let offset = random.u64(..size);
            let length = random.u64(1..6 * cluster).min(size - offset);
            let span = offset as usize..(offset + length) as usize;
            let durability = if random.u8(..8) == 0 { Durability::BeforeReply } else { LATER };
            match random.u8(..8) {
                0 => {
                    image.zero(offset, length, ZeroMode::Unmap, durability).unwrap();
                    bytes[span].fill(0);
                }
                1 => image.flush().unwrap(),
                2 => {
                    image.close().unwrap();
                    image = open_compressing(&path, compress);
                }
                kind => {
                    let before = stored(&image);
                    let mut data = bytes[span.clone()].to_vec();
                    if kind > 5 {
                        let at = random.usize(..data.len());
                        let make = if random.bool() { pattern } else { wordy };
                        data[at..].copy_from_slice(&make(random.u64(..), span.len() - at));
                    }
                    image.write(offset, &data, durability).unwrap();
                    assert!(kind > 5 || stored(&image) == before, "nothing changed and something was stored");
                    skipped += u64::from(kind <= 5);
                    bytes[span].copy_from_slice(&data);
                }
            }
        }
        let mut found = vec![1; size as usize];
        image.read(0, &mut found).unwrap();
        assert!(found == bytes, "layer {layer}");
        image.close().unwrap();
        if seed.is_multiple_of(10) {
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
        }
    }
    skipped
}

#[test]
fn seeded_sequences_read_as_a_byte_array_would() {
    if let Some(seed) = support::seed() {
        run_sequence(seed);
        return;
    }
    let mut skipped = 0;
    for seed in 0..100 * support::scale() {
        let outcome = std::panic::catch_unwind(|| run_sequence(seed));
        skipped += outcome.unwrap_or_else(|_| panic!("sequence {seed} failed; SEED={seed} repeats it"));
    }
    println!("{skipped} writes of what was there");
    assert!(skipped > 2_000, "{skipped} writes of what was there");
}

#[test]
fn threads_that_write_the_same_and_something_else_into_one_cluster_lose_nothing() {
    let folder = folder();
    let (size, sector) = (4 * MIB, 512);
    let below = pattern(5, size as usize);
    let base = fresh(&join(&folder, "base.qcow2"), &CreateOptions::new(size));
    base.write(0, &below, LATER).unwrap();
    base.close().unwrap();
    let path = overlay(&folder, "overlay.qcow2", "base.qcow2", size);
    let image = open(&path);
    let changed = pattern(6, size as usize);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (image, below, changed) = (&image, &below, &changed);
            scope.spawn(move || {
                for index in (thread..size / sector).step_by(4) {
                    let span = (index * sector) as usize..((index + 1) * sector) as usize;
                    // There and back again, in sectors of its own: what was below is something new by then.
                    let versions = [below, changed, below, changed];
                    for version in &versions[..2 + (index / 4 % 3) as usize] {
                        image.write(index * sector, &version[span.clone()], LATER).unwrap();
                    }
                }
            });
        }
    });
    image.close().unwrap();
    let expected: Vec<u8> = (0..size / sector)
        .flat_map(|index| {
            let last_is_below = index / 4 % 3 == 1;
            let version = if last_is_below { &below } else { &changed };
            version[(index * sector) as usize..((index + 1) * sector) as usize].to_vec()
        })
        .collect();
    assert_clean(&path);
    assert_reads_as(&path, &expected);
}

const SIZE: usize = 40 * 512;

/// One step of a workload on clusters of 512 bytes over a full backing file.
#[derive(Clone, Copy, Debug)]
enum Step {
    WriteSame,
    WriteSameDurable,
    WriteOther,
    WriteMixed,
    Zero,
    WriteZeroesDurable,
    Flush,
    Reopen,
}

const ALPHABET: [Step; 8] = [
    Step::WriteSame,
    Step::WriteSameDurable,
    Step::WriteOther,
    Step::WriteMixed,
    Step::Zero,
    Step::WriteZeroesDurable,
    Step::Flush,
    Step::Reopen,
];

fn take(step: Step, recorder: &mut Recorder) {
    recorder.seed += 1;
    let now_durable = Durability::BeforeReply;
    let other = pattern(recorder.seed, 1500);
    match step {
        Step::WriteSame => recorder.write_again(300, 2000, LATER),
        Step::WriteSameDurable => recorder.write_again(0, 4096, now_durable),
        Step::WriteOther => recorder.write(700, &other, LATER),
        Step::WriteMixed => {
            recorder.write(0, &[&recorder.model[..1024], &other, &recorder.model[2524..6000]].concat(), LATER)
        }
        Step::Zero => recorder.zero(512, 3000, ZeroMode::Unmap, LATER),
        Step::WriteZeroesDurable => recorder.write(1024, &[0; 2048], now_durable),
        Step::Flush => recorder.flush(),
        Step::Reopen => recorder.reopen(),
    }
}

#[test]
fn no_crash_after_a_skipped_write_loses_what_it_found() {
    let (mut workloads, mut states) = (0, 0);
    for first in ALPHABET {
        for second in ALPHABET {
            for third in ALPHABET {
                let clock: Clock = Arc::new(AtomicU64::new(0));
                let shape = CreateOptions { cluster_size: 512, ..over("below.qcow2", SIZE as u64) };
                let (base, below) = (blank(&clock, &shape), pattern(7, SIZE));
                let mut recorder = Recorder::new(clock, base, below.clone(), below, skipping());
                [first, second, third].into_iter().for_each(|step| take(step, &mut recorder));
                let (count, fault) = recorder.judge();
                assert_eq!(fault, None, "{first:?} {second:?} {third:?}");
                states += count;
                workloads += 1;
            }
        }
    }
    println!("{workloads} workloads, {states} crash states");
    assert!(states >= 15_000, "{states} crash states");
}
