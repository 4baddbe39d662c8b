//! Every call to the storage fails in turn, once and for ever: the request that needed it fails, a failed write or sync
//! poisons the image for good, and nothing that was flushed is lost.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells its figures"
)]
#![allow(dead_code, reason = "the simulated disk can do more than is needed here")]

#[path = "support/faulty.rs"]
mod faulty;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockyard_qcow2::{Access, CreateOptions, Durability, Error, Image, Result, ZeroMode, create_on};
use faulty::{Fault, Faulty, KINDS, Kind};
use reader::read_disk;
use sim_disk::{Content, SimDisk};
use support::pattern;

const SIZE: usize = 80 * 1024;
const SECTOR: usize = 512;
const CACHE: usize = 1 << 20;

/// What each sector may read as: its value at the last flush, or anything asked for since.
struct Allowed {
    flushed: Vec<u8>,
    since: Vec<Vec<u8>>,
}

impl Allowed {
    fn new() -> Self {
        Self { flushed: vec![0; SIZE], since: Vec::new() }
    }

    fn newest(&self) -> Vec<u8> {
        self.since.last().unwrap_or(&self.flushed).clone()
    }

    fn attempt(&mut self, range: std::ops::Range<usize>, bytes: &[u8]) {
        let mut next = self.newest();
        next[range].copy_from_slice(bytes);
        self.since.push(next);
    }

    fn flushed(&mut self) {
        self.flushed = self.newest();
        self.since.clear();
    }

    fn assert_allows(&self, found: &[u8], context: &str) {
        for (sector, value) in found.chunks(SECTOR).enumerate() {
            let range = sector * SECTOR..sector * SECTOR + value.len();
            let legal =
                std::iter::once(&self.flushed).chain(&self.since).any(|version| version[range.clone()] == *value);
            assert!(legal, "{context}: sector {sector} was lost or changed");
        }
    }
}

/// A workload that makes every kind of call; stops at the first error.
fn workload(image: &Image, allowed: &mut Allowed) -> Result<()> {
    let later = Durability::OnFlush;
    let write = |allowed: &mut Allowed, offset: usize, length: usize, durability| {
        let data = pattern((offset + length) as u64, length);
        allowed.attempt(offset..offset + length, &data);
        image.write(offset as u64, &data, durability)
    };
    write(allowed, 1000, 5000, later)?;
    write(allowed, 40_000, 700, later)?;
    image.flush()?;
    allowed.flushed();
    write(allowed, 2000, 300, later)?;
    write(allowed, 1024, 512, Durability::BeforeReply)?;
    write(allowed, 60_000, 9000, later)?;
    allowed.attempt(1024..4096, &[0; 3072]);
    image.zero(1024, 3072, ZeroMode::Unmap, later)?;
    allowed.attempt(40_448..40_960, &[0; 512]);
    image.discard(40_448, 512, later)?;
    image.flush()?;
    allowed.flushed();
    let mut found = vec![0; SIZE];
    image.read(0, &mut found)?;
    assert_eq!(found, allowed.newest());
    write(allowed, 5, 3000, later)?;
    image.close()?;
    allowed.flushed();
    Ok(())
}

fn image_on(storage: Arc<Faulty>) -> Result<Image> {
    Image::open_on(storage, Access::ReadWrite, None, CACHE)
}

fn new_disk() -> Arc<SimDisk> {
    let disk = SimDisk::new(Arc::new(AtomicU64::new(0)), Content::default());
    create_on(&disk, &CreateOptions { cluster_size: 512, ..CreateOptions::new(SIZE as u64) }).unwrap();
    Arc::new(disk)
}

/// Runs the workload with one fault. Returns whether the fault happened.
fn run(fault: Fault) -> bool {
    let context = format!("{fault:?}");
    let disk = new_disk();
    let storage = Arc::new(Faulty::new(disk.clone(), Some(fault)));
    let image = match image_on(storage.clone()) {
        Ok(image) => image,
        Err(_) => {
            assert!(storage.fired(), "{context}: the image cannot be opened although nothing failed");
            return true;
        }
    };
    let mut allowed = Allowed::new();
    let outcome = workload(&image, &mut allowed);
    if !storage.fired() {
        outcome.unwrap();
        return false;
    }
    let changing = matches!(fault.kind, Kind::Write | Kind::WriteDurable | Kind::Sync | Kind::SetLength);
    match &outcome {
        // Space that cannot be given back is kept, and look-ahead that does not fit is done without.
        Ok(()) => assert!(matches!(fault.kind, Kind::Punch | Kind::Reserve), "{context}: a failure was swallowed"),
        Err(error) => assert!(image.poison().is_some() || !changing, "{context}: not poisoned by {error}"),
    }
    storage.heal();
    if image.poison().is_some() {
        // For good, although the fault is gone.
        for _ in 0..2 {
            assert!(image.write(0, &[1], Durability::OnFlush).is_err(), "{context}");
            assert!(image.flush().is_err(), "{context}");
            assert!(image.zero(0, 512, ZeroMode::Keep, Durability::OnFlush).is_err(), "{context}");
        }
        let _ = image.close();
    } else if outcome.is_err() {
        // The request that failed changed nothing, and the image goes on.
        image.write(70_000, &[7; 100], Durability::OnFlush).unwrap();
        image.close().unwrap();
        allowed.attempt(70_000..70_100, &[7; 100]);
    }
    drop(image);

    // What is on the disk is legal, and can be opened and made whole again.
    let found = read_disk(&disk.content(), &[]).unwrap_or_else(|rule| panic!("{context}: {rule}"));
    allowed.assert_allows(&found, &context);
    let again = Image::open_on(disk.clone(), Access::ReadWrite, None, CACHE).unwrap();
    again.close().unwrap();
    assert!(again.check().unwrap().errors == 0, "{context}");
    assert_eq!(read_disk(&disk.content(), &[]).unwrap(), found, "{context}: the repair changed the content");
    true
}

#[test]
fn every_failing_call_is_reported_and_nothing_flushed_is_lost() {
    let mut cases = 0;
    for kind in KINDS {
        for error in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
            for (for_ever, half) in [(false, false), (true, false), (false, true)] {
                for call in 1.. {
                    if !run(Fault { kind, call, error, for_ever, half }) {
                        break;
                    }
                    cases += 1;
                }
            }
        }
    }
    println!("{cases} cases");
    assert!(cases >= 300, "only {cases} cases");
}

#[test]
fn a_refused_reservation_answers_no_space_and_leaves_a_healthy_image() {
    let disk = new_disk();
    let fault = Fault { kind: Kind::Reserve, call: 1, error: io::ErrorKind::StorageFull, for_ever: true, half: false };
    let storage = Arc::new(Faulty::new(disk.clone(), Some(fault)));
    let image = image_on(storage.clone()).unwrap();
    for _ in 0..3 {
        let refused = image.write(0, &[1; 4096], Durability::OnFlush);
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    }
    assert_eq!(image.poison(), None);
    storage.heal();
    image.write(0, &[1; 4096], Durability::BeforeReply).unwrap();
    image.close().unwrap();
    assert!(image.check().unwrap().is_clean());
}
