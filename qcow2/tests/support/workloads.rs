//! Short lives of images that between them make every kind of call, to be cut short by failures.
#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::io::IoSlice;
use std::sync::Arc;

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{
    Access, Backing, BackingFormat, CompressionLevel, CreateOptions, Durability, Image, Result, ZeroMode, create_on,
};

use super::faulty::{Fault, Faulty};
use super::guest::{Allowed, Guest};
use super::quota::Quota;
use super::reader::{is_closed, read_disk};
use super::sim_disk::{Content, SimDisk};
use super::support::pattern;
use super::volatile_disk::{Bytes, VolatileDisk};

/// Virtual size: 160 clusters of 512 bytes, in three L2 tables.
pub const SIZE: usize = 80 * 1024;
const LATER: Durability = Durability::OnFlush;
const NOW: Durability = Durability::BeforeReply;

/// What a workload finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Fresh,
    OverRaw,
    Written,
    /// Written, flushed, and never closed.
    Unclosed,
    /// Larger clusters, that can be compressed, over raw bytes.
    Packed,
}

pub struct Workload {
    pub name: &'static str,
    pub start: Start,
    pub run: fn(&mut Guest) -> Result<()>,
}

pub const WORKLOADS: [Workload; 7] = [
    Workload { name: "fresh", start: Start::Fresh, run: fresh },
    Workload { name: "overlay", start: Start::OverRaw, run: overlay },
    Workload { name: "rewriting", start: Start::Written, run: rewriting },
    Workload { name: "not closed", start: Start::Unclosed, run: not_closed },
    Workload { name: "discards", start: Start::Written, run: discards },
    Workload { name: "packed", start: Start::Packed, run: packed },
    Workload { name: "long", start: Start::OverRaw, run: long },
];

fn fresh(guest: &mut Guest) -> Result<()> {
    guest.open()?;
    guest.write(1000, 5000, LATER)?;
    guest.write(40_000, 700, LATER)?;
    guest.flush()?;
    guest.write(2000, 300, LATER)?;
    guest.write(1024, 512, NOW)?;
    guest.write(60_000, 9000, LATER)?;
    guest.zero(1024, 3072, ZeroMode::Unmap, LATER)?;
    guest.discard(40_448, 512)?;
    guest.flush()?;
    guest.read_all()?;
    guest.write(5, 3000, LATER)?;
    guest.close()
}

fn overlay(guest: &mut Guest) -> Result<()> {
    guest.open()?;
    for offset in [10, 700, 33_000, 59_990, 70_001] {
        guest.write(offset, 100, LATER)?;
    }
    guest.zero(4000, 3000, ZeroMode::Keep, LATER)?;
    guest.zero(34_000, 100, ZeroMode::Unmap, LATER)?;
    guest.flush()?;
    guest.write(33_050, 3000, NOW)?;
    guest.discard(0, 1024)?;
    guest.write(300, 100, LATER)?;
    guest.read_all()?;
    guest.flush()?;
    guest.write(50_000, 1, NOW)?;
    guest.close()
}

fn rewriting(guest: &mut Guest) -> Result<()> {
    guest.open()?;
    guest.write(0, 2048, LATER)?;
    guest.write(5000, 200, NOW)?;
    guest.write(5100, 200, NOW)?;
    guest.flush()?;
    guest.write(4096, 20_000, LATER)?;
    guest.write(6000, 10, NOW)?;
    guest.write(30_000, 9000, LATER)?;
    guest.flush()?;
    guest.reopen()?;
    guest.write(512, 512, NOW)?;
    guest.write(31_000, 40_000, LATER)?;
    guest.close()
}

fn not_closed(guest: &mut Guest) -> Result<()> {
    guest.open()?;
    guest.write(20_000, 3000, LATER)?;
    guest.write(1, 600, NOW)?;
    guest.reopen_unclosed()?;
    guest.write(40_000, 3000, LATER)?;
    guest.reopen_unclosed()?;
    guest.read_all()?;
    guest.close()
}

fn discards(guest: &mut Guest) -> Result<()> {
    guest.open()?;
    for round in 0..3 {
        guest.discard(0, 9 * 512)?;
        guest.zero(20_000, 9000, ZeroMode::Unmap, LATER)?;
        guest.write(1000 + round, 4000, LATER)?;
        guest.zero(30_000, 600, ZeroMode::Keep, NOW)?;
        guest.write(20_500, 700, LATER)?;
        guest.flush()?;
        guest.discard(20_480, 20 * 512)?;
        guest.reopen()?;
    }
    guest.read_all()?;
    guest.close()
}

fn packed(guest: &mut Guest) -> Result<()> {
    guest.compress = Some(CompressionLevel::Fast);
    guest.open()?;
    for cluster in 0..6 {
        guest.write_even(cluster * 4096, 4096, LATER)?;
    }
    guest.flush()?;
    guest.write_even(24 * 1024, 12 * 1024, NOW)?;
    guest.write(5000, 700, LATER)?;
    guest.write_even(40_000, 20_000, LATER)?;
    guest.flush()?;
    guest.discard(8192, 8192)?;
    guest.zero(4096, 100, ZeroMode::Unmap, LATER)?;
    guest.reopen()?;
    guest.write_even(60 * 1024, 8192, LATER)?;
    guest.write(30_000, 10, NOW)?;
    guest.read_all()?;
    guest.close()
}

fn long(guest: &mut Guest) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(20);
    guest.open()?;
    for step in 1..=70 {
        let offset = random.usize(..SIZE);
        let length = random.usize(1..4000).min(SIZE - offset);
        let durability = if random.u8(..6) == 0 { NOW } else { LATER };
        match random.u8(..10) {
            0..6 => guest.write(offset, length, durability)?,
            6 => guest.zero(offset, length, ZeroMode::Keep, durability)?,
            7 => guest.zero(offset, length, ZeroMode::Unmap, durability)?,
            8 => guest.discard(offset / 512 * 512, length / 512 * 512)?,
            _ => guest.flush()?,
        }
        match step {
            25 => guest.reopen()?,
            50 => guest.reopen_unclosed()?,
            _ => {}
        }
    }
    guest.read_all()?;
    guest.close()
}

/// An image to begin with, what it reads as, and the raw bytes below.
pub struct Prepared {
    pub image: Bytes,
    pub content: Vec<u8>,
    pub below: Vec<u8>,
    /// The blocks of the image that have space on a disk.
    pub taken: HashSet<u64>,
}

fn is_overlay(start: Start) -> bool {
    matches!(start, Start::OverRaw | Start::Packed)
}

pub fn options(start: Start) -> CreateOptions {
    let backing = is_overlay(start).then(|| Backing { name: "below".into(), format: BackingFormat::Raw });
    let cluster_size = if start == Start::Packed { 4096 } else { 512 };
    CreateOptions { cluster_size, backing, ..CreateOptions::new(SIZE as u64) }
}

pub fn prepare(start: Start) -> Prepared {
    let disk = Arc::new(VolatileDisk::default());
    let counted = Arc::new(Quota::new(disk.clone(), HashSet::new(), 1 << 30, true));
    create_on(&*counted, &options(start)).unwrap();
    let below = if is_overlay(start) { pattern(1, 60_000) } else { Vec::new() };
    let mut content = below.clone();
    content.resize(SIZE, 0);
    if matches!(start, Start::Written | Start::Unclosed) {
        let image = Image::open_on(counted.clone(), Access::ReadWrite, None, 1 << 20).unwrap();
        let data = pattern(2, 40_000);
        image.write(300, &data, LATER).unwrap();
        content[300..40_300].copy_from_slice(&data);
        image.flush().unwrap();
        if start == Start::Written {
            image.close().unwrap();
        }
    }
    Prepared { image: disk.written(), content, below, taken: counted.taken() }
}

impl Prepared {
    /// A guest on a copy of the image, whose storage will fail.
    pub fn guest(&self, disk: Arc<dyn Storage>, faults: &[Fault], has_queue: bool) -> Guest {
        let faulty = Faulty::new(disk, faults);
        let storage = Arc::new(if has_queue { faulty.with_queue() } else { faulty });
        let below = (!self.below.is_empty()).then(|| {
            let raw = VolatileDisk::default();
            raw.write(0, &mut [IoSlice::new(&self.below)]).unwrap();
            (Arc::new(raw) as Arc<dyn Storage>, self.below.len() as u64)
        });
        Guest::new(storage, below, &self.content)
    }

    /// The bytes of an image file hold what they may, and a session makes them a clean image with the same content.
    /// Returns that content.
    pub fn assert_legal(&self, guest: &Guest, bytes: &Bytes, allowed: &Allowed, context: &str) -> Vec<u8> {
        let found = read(bytes, &self.below).unwrap_or_else(|rule| panic!("{context}: {rule}"));
        allowed.assert_allows(&found, context);
        let disk = Arc::new(VolatileDisk::new(bytes.clone()));
        let image = guest.open_on(disk.clone()).unwrap();
        image.close().unwrap();
        let report = image.check().unwrap();
        assert!(report.is_clean(), "{context}: {report:?}");
        let repaired = disk.durable();
        assert!(is_closed(&content(&repaired)), "{context}");
        assert!(read(&repaired, &self.below).unwrap() == found, "{context}: the repair changed the content");
        found
    }
}

/// As the reader of the crash tests wants it.
fn content(bytes: &Bytes) -> Content {
    let disk = SimDisk::new(Arc::default(), Content::default());
    disk.write(0, &mut [IoSlice::new(bytes.start())]).unwrap();
    disk.set_length(bytes.length()).unwrap();
    disk.content()
}

/// The disk that an image file holds, read without the engine.
pub fn read(bytes: &Bytes, below: &[u8]) -> Result<Vec<u8>, String> {
    read_disk(&content(bytes), below)
}
