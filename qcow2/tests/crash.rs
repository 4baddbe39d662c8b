//! Power cuts, enumerated: every short workload is recorded on a simulated disk, every state that a crash may leave is
//! rebuilt, and each is judged sector by sector, by a reader that shares no code with the engine.
//!
//! `SCALE` multiplies the number of random workloads.
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
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use blockyard_qcow2::{Access, CreateOptions, Durability, Image, Layer, ZeroMode, create_on};
use power_cut::{CrashState, crash_states};
use reader::{is_closed, read_disk};
use sim_disk::{Clock, Content, SimDisk, now};
use support::{over, pattern};

const SECTOR: usize = 512;
const CACHE: usize = 1 << 20;

/// One step of a workload, in units that make steps meet: tables of 512-byte clusters map 32 KiB each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    WriteCluster,
    WritePart,
    WriteAcross,
    WriteDurable,
    WriteElsewhere,
    ZeroKeep,
    ZeroUnmap,
    ZeroDurable,
    Discard,
    Flush,
    Reopen,
}

const ALPHABET: [Step; 11] = [
    Step::WriteCluster,
    Step::WritePart,
    Step::WriteAcross,
    Step::WriteDurable,
    Step::WriteElsewhere,
    Step::ZeroKeep,
    Step::ZeroUnmap,
    Step::ZeroDurable,
    Step::Discard,
    Step::Flush,
    Step::Reopen,
];

/// What the image starts from.
#[derive(Clone, Copy, Debug)]
enum Start {
    Fresh { cluster_size: u32 },
    OverFullBacking,
    OverShortBacking,
    Reopened,
}

const STARTS: [Start; 5] = [
    Start::Fresh { cluster_size: 512 },
    Start::Fresh { cluster_size: 4096 },
    Start::OverFullBacking,
    Start::OverShortBacking,
    Start::Reopened,
];

const SIZE: usize = 72 * 1024 + 512;

/// What the guest did: when it was asked, when it was answered, and what its sectors read as afterwards.
struct Event {
    issued: u64,
    replied: u64,
    first_sector: usize,
    sectors: Vec<[u8; SECTOR]>,
    durable: bool,
}

struct Flush {
    issued: u64,
    replied: u64,
    /// The image was closed, not only flushed.
    close: bool,
}

/// A workload being run and recorded.
struct Run {
    clock: Clock,
    disk: Arc<SimDisk>,
    base: Content,
    backing: Vec<u8>,
    image: Option<Image>,
    initial: Vec<u8>,
    model: Vec<u8>,
    events: Vec<Event>,
    flushes: Vec<Flush>,
    seed: u64,
}

impl Run {
    fn new(start: Start, ignored_syncs: &[u64]) -> Self {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let backing_bytes = match start {
            Start::OverFullBacking => SIZE,
            Start::OverShortBacking => 20_000,
            _ => 0,
        };
        let backing = pattern(77, backing_bytes);
        let options = match start {
            Start::Fresh { cluster_size } => CreateOptions { cluster_size, ..CreateOptions::new(SIZE as u64) },
            Start::Reopened => CreateOptions { cluster_size: 512, ..CreateOptions::new(SIZE as u64) },
            _ => CreateOptions { cluster_size: 512, ..over("below.qcow2", SIZE as u64) },
        };
        let setup = Arc::new(SimDisk::new(clock.clone(), Content::default()));
        create_on(&*setup, &options).unwrap();
        let mut model = backing.clone();
        model.resize(SIZE, 0);
        if let Start::Reopened = start {
            let image = Image::open_on(setup.clone(), Access::ReadWrite, None, CACHE).unwrap();
            let data = pattern(78, 40_000);
            image.write(300, &data, Durability::OnFlush).unwrap();
            model[300..40_300].copy_from_slice(&data);
            image.close().unwrap();
        }
        let base = setup.content();
        let mut disk = SimDisk::new(clock.clone(), base.clone());
        disk.ignored_syncs = ignored_syncs.to_vec();
        let mut run = Self {
            disk: Arc::new(disk),
            clock,
            base,
            backing,
            image: None,
            initial: model.clone(),
            model,
            events: Vec::new(),
            flushes: Vec::new(),
            seed: 0,
        };
        run.image = Some(run.open());
        run
    }

    fn below(&self) -> Option<Layer> {
        if self.backing.is_empty() {
            return None;
        }
        let raw = SimDisk::new(self.clock.clone(), Content::default());
        let mut slices = [std::io::IoSlice::new(&self.backing)];
        blockyard_qcow2::storage::Storage::write(&raw, 0, &mut slices).unwrap();
        Some(Layer::Raw { storage: Arc::new(raw), size: self.backing.len() as u64 })
    }

    fn open(&self) -> Image {
        Image::open_on(self.disk.clone(), Access::ReadWrite, self.below(), CACHE).unwrap()
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn step(&mut self, step: Step) {
        self.seed += 1;
        let (later, now_) = (Durability::OnFlush, Durability::BeforeReply);
        match step {
            Step::WriteCluster => self.write(512, 512, later),
            Step::WritePart => self.write(700, 200, later),
            Step::WriteAcross => self.write(32 * 1024 - 700, 1500, later),
            Step::WriteDurable => self.write(600, 600, now_),
            Step::WriteElsewhere => self.write(66 * 1024, 2048, later),
            Step::ZeroKeep => self.zero(0, 1536, ZeroMode::Keep, later),
            Step::ZeroUnmap => self.zero(512, 1636, ZeroMode::Unmap, later),
            Step::ZeroDurable => self.zero(300, 5000, ZeroMode::Unmap, now_),
            Step::Discard => {
                let cluster = self.image().cluster_size() as usize;
                let end = 33 * 1024 / cluster * cluster;
                self.model[..end].fill(0);
                self.record(0, end, false, |image| image.discard(0, 33 * 1024, later));
            }
            Step::Flush => {
                let issued = now(&self.clock);
                self.image().flush().unwrap();
                self.flushes.push(Flush { issued, replied: now(&self.clock), close: false });
            }
            Step::Reopen => {
                let issued = now(&self.clock);
                self.image().close().unwrap();
                self.flushes.push(Flush { issued, replied: now(&self.clock), close: true });
                self.image = Some(self.open());
            }
        }
    }

    fn write(&mut self, offset: usize, length: usize, durability: Durability) {
        let data = pattern(self.seed, length);
        self.model[offset..offset + length].copy_from_slice(&data);
        let durable = durability == Durability::BeforeReply;
        self.record(offset, length, durable, |image| image.write(offset as u64, &data, durability));
    }

    fn zero(&mut self, offset: usize, length: usize, mode: ZeroMode, durability: Durability) {
        self.model[offset..offset + length].fill(0);
        let durable = durability == Durability::BeforeReply;
        self.record(offset, length, durable, |image| image.zero(offset as u64, length as u64, mode, durability));
    }

    fn record(
        &mut self,
        offset: usize,
        length: usize,
        durable: bool,
        operation: impl FnOnce(&Image) -> blockyard_qcow2::Result<()>,
    ) {
        let first_sector = offset / SECTOR;
        let sectors = self.model[first_sector * SECTOR..(offset + length).next_multiple_of(SECTOR)]
            .chunks(SECTOR)
            .map(|sector| sector.try_into().unwrap())
            .collect();
        let issued = now(&self.clock);
        operation(self.image()).unwrap();
        self.events.push(Event { issued, replied: now(&self.clock), first_sector, sectors, durable });
    }

    /// Judges what a sector reads as after a crash at `time`.
    fn sector_is_legal(&self, sector: usize, value: &[u8], time: u64) -> bool {
        let here = || {
            let covers =
                |event: &&Event| (event.first_sector..event.first_sector + event.sectors.len()).contains(&sector);
            self.events.iter().filter(covers)
        };
        let is_durable = |event: &Event| {
            let flushed = |flush: &Flush| flush.issued > event.replied && flush.replied < time;
            (event.durable && event.replied < time) || self.flushes.iter().any(flushed)
        };
        // The issue time of the newest durable change: whatever was replied before it is gone.
        let barrier = here().filter(|event| is_durable(event)).map(|event| event.issued).max();
        let initial = &self.initial[sector * SECTOR..(sector + 1) * SECTOR];
        if barrier.is_none() && value == initial {
            return true;
        }
        here().any(|event| {
            event.issued < time
                && barrier.is_none_or(|barrier| event.replied >= barrier)
                && event.sectors[sector - event.first_sector] == value
        })
    }

    /// Whether the image must be whole at that time: it was closed, and nothing was asked of it since.
    fn must_be_closed(&self, time: u64) -> bool {
        let close = self.flushes.iter().rfind(|flush| flush.close && flush.replied < time);
        let quiet = |close: &Flush| !self.events.iter().any(|event| (close.issued..time).contains(&event.issued));
        close.is_some_and(quiet)
    }

    /// The first thing that is wrong with a crash state.
    fn fault(&self, state: &CrashState) -> Option<String> {
        let found = match read_disk(&state.content, &self.backing) {
            Ok(found) => found,
            Err(rule) => return Some(rule),
        };
        for (sector, value) in found.chunks(SECTOR).enumerate() {
            for time in [state.earliest + 1, state.latest] {
                if !self.sector_is_legal(sector, value, time) {
                    return Some(format!("sector {sector} reads as something illegal at time {time}"));
                }
            }
        }
        // The engine itself: check agrees, and opening, closing and reading again changes nothing.
        let disk = Arc::new(SimDisk::new(self.clock.clone(), state.content.clone()));
        let closed = is_closed(&state.content);
        let opened = match Image::open_on(disk.clone(), Access::ReadWrite, self.below(), CACHE) {
            Ok(image) => image,
            Err(error) => return Some(format!("cannot be opened: {error}")),
        };
        if !closed && self.must_be_closed(state.latest) {
            return Some("was closed, and is dirty again".into());
        }
        if closed && opened.check().unwrap().errors > 0 {
            return Some("is marked as closed, but its refcounts are too low".into());
        }
        if let Err(error) = opened.close() {
            return Some(format!("cannot be closed: {error}"));
        }
        let report = opened.check().unwrap();
        if report.errors > 0 || report.dirty || (report.leaks > 0 && !closed) {
            return Some(format!("is not clean after the repair: {report:?}"));
        }
        match read_disk(&disk.content(), &self.backing) {
            Ok(after) if after == found => None,
            Ok(_) => Some("the repair changed the content".into()),
            Err(rule) => Some(format!("after the repair: {rule}")),
        }
    }

    /// Judges every crash state; returns how many there were, and the first fault.
    fn judge(&self) -> (usize, Option<String>) {
        let (mut states, mut fault) = (0, None);
        let mut seen = HashSet::new();
        let end = now(&self.clock);
        crash_states(&self.base, &self.disk.calls(), end, self.seed, |state| {
            states += 1;
            let mut hasher = DefaultHasher::new();
            (&state.content, state.earliest, state.latest).hash(&mut hasher);
            if fault.is_none() && seen.insert(hasher.finish()) {
                fault = self.fault(&state);
            }
        });
        (states, fault)
    }
}

fn run(start: Start, steps: &[Step], ignored_syncs: &[u64]) -> (usize, Option<String>) {
    let mut run = Run::new(start, ignored_syncs);
    steps.iter().for_each(|step| run.step(*step));
    run.judge()
}

/// Runs workloads on both cores; returns the number of states. Panics at the first illegal one.
fn judge_all(workloads: &[(Start, Vec<Step>)]) -> usize {
    let (next, states) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((start, steps)) = workloads.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (count, fault) = run(*start, steps, &[]);
                    assert_eq!(fault, None, "{start:?} {steps:?}");
                    states.fetch_add(count, Ordering::Relaxed);
                }
            });
        }
    });
    states.into_inner()
}

/// Every sequence of up to `length` steps.
fn sequences(length: usize) -> Vec<Vec<Step>> {
    let mut all: Vec<Vec<Step>> = Vec::new();
    let mut longest: Vec<Vec<Step>> = vec![Vec::new()];
    for _ in 0..length {
        let extended = longest.iter().flat_map(|steps| ALPHABET.map(|step| [steps.as_slice(), &[step]].concat()));
        longest = extended.collect();
        all.extend(longest.iter().cloned());
    }
    all
}

#[test]
fn no_crash_of_any_short_workload_loses_or_invents_a_byte() {
    let short = sequences(3);
    assert_eq!(short.len(), 11 + 121 + 1331);
    let workloads: Vec<_> = STARTS.iter().flat_map(|start| short.iter().map(|steps| (*start, steps.clone()))).collect();
    let states = judge_all(&workloads);
    println!("{} workloads, {states} crash states, 0 illegal", workloads.len());
    assert!(states >= 200_000, "only {states} crash states");
}

#[test]
fn no_crash_of_a_long_random_workload_loses_or_invents_a_byte() {
    let scale: u64 = std::env::var("SCALE").map_or(1, |scale| scale.parse().unwrap());
    let workloads: Vec<_> = (0..100 * scale)
        .map(|seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            let steps = (0..20).map(|_| ALPHABET[random.usize(..ALPHABET.len())]).collect();
            (STARTS[random.usize(..STARTS.len())], steps)
        })
        .collect();
    let states = judge_all(&workloads);
    println!("{} workloads, {states} crash states, 0 illegal", workloads.len());
    assert!(states >= 10_000, "only {states} crash states");
}

#[test]
fn a_crash_while_an_image_is_made_leaves_no_image_or_a_whole_one() {
    let clock: Clock = Arc::new(AtomicU64::new(0));
    let disk = SimDisk::new(clock.clone(), Content::default());
    create_on(&disk, &CreateOptions { cluster_size: 512, ..CreateOptions::new(SIZE as u64) }).unwrap();
    let mut whole = 0;
    crash_states(&Content::default(), &disk.calls(), now(&clock), 0, |state| {
        let disk = Arc::new(SimDisk::new(clock.clone(), state.content.clone()));
        match read_disk(&state.content, &[]) {
            Err(_) => assert!(Image::open_on(disk, Access::ReadOnly, None, CACHE).is_err()),
            Ok(found) => {
                whole += 1;
                assert!(found.iter().all(|byte| *byte == 0));
                let image = Image::open_on(disk, Access::ReadWrite, None, CACHE).unwrap();
                assert!(image.check().unwrap().is_clean());
            }
        }
    });
    assert!(whole > 0);
}

/// The harness must find what it is there to find: an engine without one of its barriers.
#[test]
fn each_missing_barrier_is_found() {
    use Step::{Flush, Reopen, WriteAcross, WriteCluster};
    // Over a backing file, so that zeroes which nobody wrote show.
    let start = Start::OverFullBacking;
    // The syncs of these steps: 0 the dirty bit, 1 and 2 the barriers of the flush, then those of the close. Without the
    // first, B1 stands in for it here: it guards what autoclear bits promise, of which these images have none.
    let steps = [WriteCluster, Flush, WriteAcross, Flush, Reopen];
    assert_eq!(run(start, &steps, &[]).1, None);
    for (missing, name) in [(1, "B1"), (2, "B2"), (3, "B1 of the second flush"), (5, "B3"), (6, "B4")] {
        let found = run(start, &steps, &[missing]).1;
        assert!(found.is_some(), "an engine without {name} passes");
    }
    assert!(run(Start::Reopened, &[WriteCluster, Flush], &[1]).1.is_some(), "the one sync of a flush in place");
}
