//! The engine against a byte array: seeded sequences of operations, content and block status compared all along.
//!
//! `SCALE` multiplies the number of sequences, `SEED` repeats one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::PathBuf;

use blockyard_qcow2::{Access, CreateOptions, Durability, ExtentKind, Image, ZeroMode};
use support::{assert_clean, assert_reads_as, folder, join, open, over, pattern};

const SEQUENCES: u64 = 400;
const OPERATIONS: u32 = 60;
/// Every how many sequences QEMU judges the result too.
const JUDGE_EVERY: u64 = 20;

/// One image under test and what it must read as.
struct Subject {
    path: PathBuf,
    image: Image,
    bytes: Vec<u8>,
}

impl Subject {
    fn check_content(&self) {
        let mut content = vec![0xee; self.bytes.len()];
        self.image.read(0, &mut content).unwrap();
        let wrong = content.iter().zip(&self.bytes).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "first wrong byte");
    }

    fn check_map(&self) {
        let extents = self.image.map(0, self.image.size(), usize::MAX).unwrap();
        let mut at = 0;
        for extent in extents {
            assert_eq!(extent.offset, at, "extents follow each other");
            assert!(extent.length > 0);
            at += extent.length;
            if extent.kind != ExtentKind::Data {
                let range = extent.offset as usize..at as usize;
                assert!(self.bytes[range].iter().all(|byte| *byte == 0), "{extent:?} must read as zeroes");
            }
        }
        assert_eq!(at, self.image.size());
    }

    fn reopen(self) -> Self {
        self.image.close().unwrap();
        let report = self.image.check().unwrap();
        assert!(report.is_clean(), "{report:?}");
        let Self { path, image, bytes } = self;
        drop(image);
        Self { image: open(&path, Access::ReadWrite), path, bytes }
    }
}

/// An offset and a length that like borders: of sectors, clusters, tables and the disk.
fn range(random: &mut fastrand::Rng, size: u64, cluster: u64) -> (u64, u64) {
    let edge = |random: &mut fastrand::Rng| {
        let unit = [1, 512, cluster, cluster * cluster / 8][random.usize(..4)];
        let base = random.u64(..=size / unit) * unit;
        base.saturating_add_signed(random.i64(-2..=2)).min(size)
    };
    let (from, to) = (edge(random), edge(random));
    (from.min(to), from.abs_diff(to).min(20 * cluster))
}

fn step(random: &mut fastrand::Rng, subject: &mut Subject) {
    let cluster = subject.image.cluster_size();
    let (offset, length) = range(random, subject.image.size(), cluster);
    let durability = if random.u8(..8) == 0 { Durability::BeforeReply } else { Durability::OnFlush };
    let span = offset as usize..(offset + length) as usize;
    match random.u8(..10) {
        0..=4 => {
            let data = pattern(random.u64(..), length as usize);
            subject.image.write(offset, &data, durability).unwrap();
            subject.bytes[span].copy_from_slice(&data);
        }
        5 | 6 => {
            let mode = if random.bool() { ZeroMode::Keep } else { ZeroMode::Unmap };
            subject.image.zero(offset, length, mode, durability).unwrap();
            subject.bytes[span].fill(0);
        }
        7 => {
            subject.image.discard(offset, length, durability).unwrap();
            let start = offset.next_multiple_of(cluster) as usize;
            let end = offset + length;
            let end = if end == subject.image.size() { end } else { end / cluster * cluster } as usize;
            if start < end {
                subject.bytes[start..end].fill(0);
            }
        }
        8 => subject.image.flush().unwrap(),
        _ => {
            let mut data = vec![0xee; length as usize];
            subject.image.read(offset, &mut data).unwrap();
            assert_eq!(data, subject.bytes[span]);
        }
    }
}

fn run_sequence(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = folder();
    let cluster_bits = [9, 9, 12, 16][random.usize(..4)];
    let cluster_size = 1u32 << cluster_bits;
    let size = (random.u64(1..=80) * u64::from(cluster_size) + random.u64(..3) * 512).next_multiple_of(512);
    let refcount_bits = 1 << random.u32(..=6);
    let mut subject = None;
    for layer in 0..=random.u32(..3) {
        let path = join(&folder, &format!("layer{layer}.qcow2"));
        let below: Option<Subject> = subject.take();
        // Layers differ in size: a shorter one below reads as zeroes past its end.
        let layer_size = if layer == 0 { size } else { size + random.u64(..3) * 512 };
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            ..match &below {
                Some(below) => over(below.path.file_name().unwrap().to_str().unwrap(), layer_size),
                None => CreateOptions::new(layer_size),
            }
        };
        let mut bytes = below.map_or(Vec::new(), |below| {
            below.image.close().unwrap();
            below.bytes
        });
        blockyard_qcow2::create(&path, &options).unwrap();
        bytes.resize(layer_size as usize, 0);
        let mut current = Subject { image: open(&path, Access::ReadWrite), path, bytes };
        for _ in 0..random.u32(..OPERATIONS) {
            step(&mut random, &mut current);
            if random.u8(..20) == 0 {
                current = current.reopen();
            }
        }
        current.check_content();
        current.check_map();
        subject = Some(current);
    }
    let subject = subject.unwrap().reopen();
    subject.check_content();
    subject.check_map();
    subject.image.close().unwrap();
    if seed.is_multiple_of(JUDGE_EVERY) {
        assert_clean(&subject.path);
        assert_reads_as(&subject.path, &subject.bytes);
    }
}

#[test]
fn seeded_sequences_read_as_a_byte_array_would() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    if let Some(seed) = number("SEED") {
        return run_sequence(seed);
    }
    for seed in 0..SEQUENCES * number("SCALE").unwrap_or(1) {
        let outcome = std::panic::catch_unwind(|| run_sequence(seed));
        assert!(outcome.is_ok(), "sequence {seed} failed; SEED={seed} repeats it");
    }
}
