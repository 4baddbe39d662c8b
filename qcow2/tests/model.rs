//! The engine against a byte array: seeded sequences of operations on chains of up to three images, content, holes
//! and block status compared all along. A part of them is made on files and judged by readers that share no code with the engine.
//!
//! `SCALE` multiplies the number of sequences, `SEED` repeats one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

#[path = "support/readers.rs"]
mod readers;
mod support;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockyard_qcow2::storage::MemoryStorage;
use blockyard_qcow2::{
    Access, Caching, Compression, CompressionLevel, CreateOptions, Durability, ExtentKind, Identical, Image, Layer,
    OpenOptions, Preallocation, ZeroMode, create, create_on,
};
use readers::{Chain, READERS};
use support::{folder, join, mapped_holes, over, read_sparse};

const SEQUENCES: u64 = 5_000;
/// Of one image; a chain of three gets up to three times as many.
const OPERATIONS: u32 = 60;
/// Every how many sequences the result lies in files, for the other readers.
const JUDGE_EVERY: u64 = 25;
/// Of those, every second one is made such that every reader can read it.
const JUDGE_BY_ALL_EVERY: u64 = 2 * JUDGE_EVERY;

/// Where the bytes of one image are.
#[derive(Clone, Debug)]
enum Place {
    Memory(Arc<MemoryStorage>),
    File(PathBuf),
}

/// One image of a chain and what it must read as.
#[derive(Debug)]
struct Disk {
    place: Place,
    bytes: Vec<u8>,
}

/// Opens the last image of a chain over all the others.
fn open_chain(chain: &[Disk], options: &OpenOptions) -> Image {
    let (top, below) = chain.split_last().unwrap();
    match &top.place {
        Place::File(path) => Image::open(path, options).unwrap(),
        Place::Memory(storage) => {
            let read_only = OpenOptions { access: Access::ReadOnly, ..options.clone() };
            let layer = || Layer::Image(Box::new(open_chain(below, &read_only)));
            let below = (!below.is_empty()).then(layer);
            Image::open_on_with(storage.clone(), below, options).unwrap()
        }
    }
}

/// The shape of a sequence's images.
struct Shape {
    cluster_size: u32,
    refcount_bits: u32,
    /// Virtual sizes, the lowest image first.
    sizes: Vec<u64>,
    /// All images of a chain must stay of one size.
    may_grow: bool,
    compression: Compression,
    /// Of the lowest image.
    preallocation: Preallocation,
    /// How each image is opened for writing.
    options: OpenOptions,
}

impl Shape {
    fn random(random: &mut fastrand::Rng, for_all_readers: bool) -> Self {
        let bits = match random.u8(..32) {
            0 => 21,
            1..8 => 16,
            8..18 => 12,
            _ if for_all_readers => 12,
            _ => 9,
        };
        // Enough clusters for a second L2 table where that is cheap.
        let most = match bits {
            21 => 3,
            16 => 24,
            12 => [80, 80, 80, 600][random.usize(..4)],
            _ => 160,
        };
        let clusters = random.u64(1..=most);
        let cluster_size = 1u32 << bits;
        let size = clusters * u64::from(cluster_size) - random.u64(..u64::from(cluster_size) / 512) * 512;
        let mut sizes = vec![size];
        for _ in 0..random.u32(..if bits == 21 { 2 } else { 3 }) {
            // A shorter image below reads as zeroes past its end; qcow2-rs cannot do that.
            sizes.push(if for_all_readers { size } else { size + random.u64(..4) * 512 });
        }
        let preallocations = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
        let levels = [CompressionLevel::Fast, CompressionLevel::Balanced, CompressionLevel::Small];
        Self {
            cluster_size,
            // Only such as can count shared clusters let compressed clusters be written.
            refcount_bits: if random.bool() { 16 } else { 1 << random.u32(..=6) },
            sizes,
            may_grow: !for_all_readers,
            compression: if random.bool() && !for_all_readers { Compression::Zstd } else { Compression::Deflate },
            preallocation: if random.u8(..8) == 0 { preallocations[random.usize(..3)] } else { Preallocation::Off },
            options: OpenOptions {
                cache_bytes: if random.bool() { 0 } else { 64 << 20 },
                compress: (random.u8(..4) == 0).then(|| levels[random.usize(..3)]),
                identical: if random.u8(..4) == 0 { Identical::Skip } else { Identical::Write },
                caching: if random.bool() { Caching::Auto } else { Caching::PageCache },
                ..OpenOptions::new(Access::ReadWrite)
            },
        }
    }
}

/// The top image under test; the last disk of the chain is its own.
struct Subject {
    chain: Vec<Disk>,
    image: Image,
    options: OpenOptions,
    may_grow: bool,
}

/// What a sequence is made of. A new kind of request gets a line here, one in [`OPERATIONS_BY_WEIGHT`], and its arm in
/// [`Subject::apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Write,
    /// What is there already.
    WriteAgain,
    ZeroKeep,
    ZeroUnmap,
    Discard,
    Grow,
    Flush,
    Read,
    Status,
    Reopen,
    /// Dropped after a flush, as a crash would leave it.
    ReopenUnclosed,
}

const OPERATIONS_BY_WEIGHT: [(u32, Operation); 11] = [
    (46, Operation::Write),
    (4, Operation::WriteAgain),
    (2, Operation::Grow),
    (8, Operation::ZeroKeep),
    (10, Operation::ZeroUnmap),
    (10, Operation::Discard),
    (10, Operation::Flush),
    (8, Operation::Read),
    (5, Operation::Status),
    (4, Operation::Reopen),
    (2, Operation::ReopenUnclosed),
];

fn any_operation(random: &mut fastrand::Rng) -> Operation {
    let total: u32 = OPERATIONS_BY_WEIGHT.iter().map(|(weight, _)| weight).sum();
    let mut pick = random.u32(..total);
    for (weight, operation) in OPERATIONS_BY_WEIGHT {
        if pick < weight {
            return operation;
        }
        pick -= weight;
    }
    unreachable!("the pick is below the sum of the weights")
}

/// An offset and a length that like borders: of sectors, clusters, tables and the disk.
fn any_range(random: &mut fastrand::Rng, size: u64, cluster: u64) -> (u64, u64) {
    let edge = |random: &mut fastrand::Rng| {
        let unit = [1, 512, cluster, cluster * cluster / 8][random.usize(..4)];
        let base = random.u64(..=size / unit) * unit;
        base.saturating_add_signed(random.i64(-2..=2)).min(size)
    };
    let (from, to) = (edge(random), edge(random));
    let longest = (20 * cluster).min(cluster.max(256 << 10) + 3);
    (from.min(to), from.abs_diff(to).min(longest))
}

/// Bytes that are never zero: noise, or such as compress well.
fn payload(random: &mut fastrand::Rng, length: u64) -> Vec<u8> {
    if random.u8(..4) == 0 {
        return vec![random.u8(1..); length as usize];
    }
    let mut bytes = vec![0; length as usize];
    for chunk in bytes.chunks_mut(8) {
        let word = (random.u64(..) | 0x0101_0101_0101_0101).to_ne_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    bytes
}

impl Subject {
    fn create(shape: &Shape, layer: usize, mut chain: Vec<Disk>, folder: Option<&tempfile::TempDir>) -> Self {
        let size = shape.sizes[layer];
        let base = format!("layer{}.qcow2", layer.saturating_sub(1));
        let start = if layer == 0 { CreateOptions::new(size) } else { over(&base, size) };
        let options = CreateOptions {
            cluster_size: shape.cluster_size,
            refcount_bits: shape.refcount_bits,
            compression: shape.compression,
            preallocation: if layer == 0 { shape.preallocation } else { Preallocation::Off },
            ..start
        };
        let place = match folder {
            Some(folder) => {
                let path = join(folder, &format!("layer{layer}.qcow2"));
                create(&path, &options).unwrap();
                Place::File(path)
            }
            None => {
                let storage = Arc::new(MemoryStorage::default());
                create_on(&*storage, &options).unwrap();
                Place::Memory(storage)
            }
        };
        let mut bytes = chain.last().map_or(Vec::new(), |below| below.bytes.clone());
        bytes.resize(size as usize, 0);
        chain.push(Disk { place, bytes });
        let image = open_chain(&chain, &shape.options);
        Self { chain, image, options: shape.options.clone(), may_grow: shape.may_grow }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.chain.last_mut().unwrap().bytes
    }

    fn check_content(&mut self, range: Range<usize>) {
        let mut content = vec![0xee; range.len()];
        self.image.read(range.start as u64, &mut content).unwrap();
        let start = range.start;
        if content != self.bytes()[range.clone()] {
            let wrong =
                content.iter().zip(&self.bytes()[range.clone()]).position(|(found, expected)| found != expected);
            assert_eq!(wrong, None, "first wrong byte, counted from {start}");
        }
        let expected = &self.chain.last().unwrap().bytes[range];
        let holes = read_sparse(&self.image, start as u64, expected);
        assert_eq!(holes, mapped_holes(&self.image, start as u64, expected.len() as u64));
    }

    /// The block status covers a range exactly, and says of each layer what its bytes are.
    fn check_status(&self, range: Range<usize>, most: usize) {
        let bytes = &self.chain.last().unwrap().bytes;
        let extents = self.image.map(range.start as u64, range.len() as u64, most).unwrap();
        assert!(extents.len() <= most);
        let mut at = range.start as u64;
        for (index, extent) in extents.iter().enumerate() {
            assert_eq!(extent.offset, at, "extents follow each other");
            assert!(extent.length > 0);
            at += extent.length;
            let span = extent.offset as usize..at as usize;
            if extent.kind != ExtentKind::Data {
                assert!(bytes[span.clone()].iter().all(|byte| *byte == 0), "{extent:?} must read as zeroes");
            }
            match (self.chain.len() + 1).checked_sub(extent.depth as usize) {
                Some(layer) if extent.depth > 0 && layer > 0 => {
                    assert!(self.chain[layer - 1].bytes[span.clone()] == bytes[span], "{extent:?} lies elsewhere");
                }
                _ => assert_eq!((extent.depth, extent.kind), (0, ExtentKind::Zero), "{extent:?}: no such layer"),
            }
            if index > 0 {
                let before = &extents[index - 1];
                assert_ne!((before.kind, before.depth), (extent.kind, extent.depth), "neighbours are merged");
            }
        }
        assert!(at == range.end as u64 || extents.len() == most, "the status ends early, at {at}");
        assert!(at <= range.end as u64);
    }

    fn check_all(&mut self) {
        let all = 0..self.bytes().len();
        self.check_content(all.clone());
        self.check_status(all, usize::MAX);
    }

    fn reopen(&mut self) {
        self.image.close().unwrap();
        let report = self.image.check().unwrap();
        assert!(report.is_clean(), "{report:?}");
        self.image = open_chain(&self.chain, &self.options);
    }

    fn apply(&mut self, random: &mut fastrand::Rng, operation: Operation) {
        let cluster = self.image.cluster_size();
        let size = self.image.size();
        let (offset, length) = any_range(random, size, cluster);
        let durability = if random.u8(..8) == 0 { Durability::BeforeReply } else { Durability::OnFlush };
        let span = offset as usize..(offset + length) as usize;
        match operation {
            Operation::Write => {
                let data = payload(random, length);
                self.image.write(offset, &data, durability).unwrap();
                self.bytes()[span].copy_from_slice(&data);
            }
            Operation::WriteAgain => {
                let data = self.bytes()[span].to_vec();
                self.image.write(offset, &data, durability).unwrap();
            }
            Operation::Grow => {
                let grown = size + random.u64(..(3 * cluster).min(1 << 20) / 512) * 512;
                if self.may_grow {
                    self.image.grow(grown).unwrap();
                    self.chain.last_mut().unwrap().bytes.resize(grown as usize, 0);
                    assert_eq!(self.image.size(), grown);
                }
            }
            Operation::ZeroKeep | Operation::ZeroUnmap => {
                let mode = if operation == Operation::ZeroKeep { ZeroMode::Keep } else { ZeroMode::Unmap };
                self.image.zero(offset, length, mode, durability).unwrap();
                self.bytes()[span].fill(0);
            }
            Operation::Discard => {
                self.image.discard(offset, length, durability).unwrap();
                // Whole clusters; the end of the disk ends one.
                let start = offset.next_multiple_of(cluster) as usize;
                let end = offset + length;
                let end = if end == size { end } else { end / cluster * cluster } as usize;
                if start < end {
                    self.bytes()[start..end].fill(0);
                }
            }
            Operation::Flush => self.image.flush().unwrap(),
            Operation::Read => self.check_content(span),
            Operation::Status => self.check_status(span, if random.bool() { usize::MAX } else { random.usize(1..4) }),
            Operation::Reopen => self.reopen(),
            Operation::ReopenUnclosed => {
                self.image.flush().unwrap();
                // Its file would still be locked.
                drop(std::mem::replace(&mut self.image, stand_in()));
                self.image = open_chain(&self.chain, &self.options);
            }
        }
    }
}

/// An image to hold a place while another one is dropped.
fn stand_in() -> Image {
    let storage = Arc::new(MemoryStorage::default());
    create_on(&*storage, &CreateOptions::new(0)).unwrap();
    Image::open_on(storage, Access::ReadOnly, None, 0).unwrap()
}

/// How many sequences each of [`READERS`] has judged.
type Judged = [AtomicU64; READERS.len()];

fn run_sequence(seed: u64, judged: &Judged) {
    let mut random = fastrand::Rng::with_seed(seed);
    let for_all_readers = seed.is_multiple_of(JUDGE_BY_ALL_EVERY);
    let shape = Shape::random(&mut random, for_all_readers);
    let folder = seed.is_multiple_of(JUDGE_EVERY).then(folder);
    let mut chain = Vec::new();
    for layer in 0..shape.sizes.len() {
        let mut subject = Subject::create(&shape, layer, chain, folder.as_ref());
        for _ in 0..random.u32(..=OPERATIONS) {
            let operation = any_operation(&mut random);
            subject.apply(&mut random, operation);
        }
        subject.check_all();
        subject.reopen();
        subject.check_all();
        subject.image.close().unwrap();
        assert!(subject.image.check().unwrap().is_clean());
        chain = subject.chain;
    }
    let top = chain.last().unwrap();
    if let Place::File(path) = &top.place {
        let images = Chain::of(path);
        for (reader, count) in READERS.into_iter().zip(judged) {
            assert!(reader.accepts(&images) || !for_all_readers, "{reader:?} was to be able to read this");
            if reader.accepts(&images) {
                reader.judge(&images, &top.bytes);
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[test]
fn seeded_sequences_read_as_a_byte_array_would_and_so_say_three_other_readers() {
    let judged = Judged::default();
    if let Some(seed) = support::seed() {
        return run_sequence(seed, &judged);
    }
    let scale = support::scale();
    let sequences = SEQUENCES * scale;
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= sequences {
                        return;
                    }
                    let outcome = std::panic::catch_unwind(|| run_sequence(seed, &judged));
                    assert!(outcome.is_ok(), "sequence {seed} failed; SEED={seed} repeats it");
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let judged = judged.map(AtomicU64::into_inner);
    println!("{} sequences; judged by {READERS:?}: {judged:?}", done.load(Ordering::Relaxed));
    assert_eq!(done.into_inner(), sequences);
    assert!(judged.iter().all(|count| *count >= 100 * scale), "too few judgements: {judged:?}");
}
