//! Power cuts in the middle of concurrent work: several writers, readers and a flusher under a seeded scheduler, the disk's
//! own calls interrupted in the middle, and then a crash at every moment, judged sector by sector. Some runs go on with what
//! a crash left.
//!
//! `SCALE` multiplies the number of runs, `SEED` repeats one batch of them. Built only with the feature `shuttle`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells its figures"
)]

#[path = "support/explore.rs"]
mod explore;
#[path = "support/history.rs"]
mod history;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/registers.rs"]
mod registers;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{Access, CreateOptions, Durability, Image, Layer, ZeroMode, create_on};
use explore::explore;
use history::{Event, Flush, History, Read, SECTOR, Value, mark, sector_of, value_of};
use reader::read_disk;
use registers::Registers;
use sim_disk::{Clock, Content, SimDisk, now};
use support::over;

const WRITERS: u64 = 3;
const STEPS: usize = 7;
/// So few tables stay in memory that those of 512-byte clusters come and go.
const CACHE: usize = 0;
/// The marks of the backing file and of what a reopened image held.
const BELOW: u64 = 1 << 20;
const BEFORE: u64 = 2 << 20;

/// What a run works on.
struct Shape {
    cluster: usize,
    /// Of the disk, and of the backing file; 0: none.
    sectors: usize,
    below: usize,
    is_reopened: bool,
    /// Where writers meet: first sectors of small regions.
    spots: &'static [usize],
}

/// Tables of 512-byte clusters map 64 sectors: six of them.
const TABLES: usize = 6 * 64 + 1;
const SPOTS: &[usize] = &[0, 8, 60, 128, 192, 256, 320, 381];
const SHAPES: [Shape; 6] = [
    Shape { cluster: 512, sectors: TABLES, below: 0, is_reopened: false, spots: SPOTS },
    Shape { cluster: 512, sectors: TABLES, below: TABLES, is_reopened: false, spots: SPOTS },
    Shape { cluster: 512, sectors: TABLES, below: 200, is_reopened: true, spots: SPOTS },
    Shape { cluster: 4096, sectors: 73, below: 0, is_reopened: true, spots: &[0, 4, 16, 69] },
    Shape { cluster: 4096, sectors: 73, below: 73, is_reopened: false, spots: &[0, 4, 16, 69] },
    Shape { cluster: 4096, sectors: 73, below: 43, is_reopened: false, spots: &[0, 4, 38, 69] },
];

/// One session on one disk, shared by its threads.
struct Session {
    shape: &'static Shape,
    clock: Clock,
    image: Image,
    history: Mutex<History>,
    next_id: AtomicU64,
}

fn disk_of(clock: &Clock, content: Content) -> SimDisk {
    SimDisk::new(clock.clone(), content)
}

fn below_of(shape: &Shape, clock: &Clock) -> (Vec<Value>, Option<Layer>) {
    let values: Vec<Value> = (0..shape.below).map(|sector| mark(BELOW, sector)).collect();
    if values.is_empty() {
        return (values, None);
    }
    let bytes: Vec<u8> = values.iter().flat_map(|value| sector_of(*value)).collect();
    let raw = disk_of(clock, Content::default()).quiet();
    raw.write(0, &mut [IoSlice::new(&bytes)]).unwrap();
    (values, Some(Layer::Raw { storage: Arc::new(raw), size: bytes.len() as u64 }))
}

/// A new image, or one that was written to and closed.
fn first_content(shape: &Shape, clock: &Clock) -> Content {
    let disk = Arc::new(disk_of(clock, Content::default()).quiet());
    let (size, cluster_size) = ((shape.sectors * SECTOR) as u64, shape.cluster as u32);
    let (_, below) = below_of(shape, clock);
    let plain = if below.is_some() { over("below.qcow2", size) } else { CreateOptions::new(size) };
    create_on(&*disk, &CreateOptions { cluster_size, ..plain }).unwrap();
    if shape.is_reopened {
        let image = Image::open_on(disk.clone(), Access::ReadWrite, below, CACHE).unwrap();
        for sector in shape.spots.iter().flat_map(|spot| *spot..spot + 4) {
            let bytes = sector_of(mark(BEFORE, sector));
            image.write((sector * SECTOR) as u64, &bytes, Durability::OnFlush).unwrap();
        }
        image.close().unwrap();
    }
    disk.content()
}

fn values_of(content: &Content, below: &[Value]) -> Result<Vec<Value>, String> {
    let bytes: Vec<u8> = below.iter().flat_map(|value| sector_of(*value)).collect();
    Ok(read_disk(content, &bytes)?.chunks(SECTOR).map(value_of).collect())
}

impl Session {
    /// A run of `1..=4` sectors near one of the spots.
    fn place(&self, random: &mut fastrand::Rng) -> (usize, usize) {
        let spot = self.shape.spots[random.usize(..self.shape.spots.len())];
        let first = (spot + random.usize(..4)).min(self.shape.sectors - 1);
        (first, random.usize(1..=4).min(self.shape.sectors - first))
    }

    fn change(&self, random: &mut fastrand::Rng) {
        let (mut first, mut sectors) = self.place(random);
        let (offset, length) = ((first * SECTOR) as u64, (sectors * SECTOR) as u64);
        let durable = random.u8(..4) == 0;
        let durability = if durable { Durability::BeforeReply } else { Durability::OnFlush };
        let kind = random.u8(..10);
        let id = (kind < 6).then(|| self.next_id.fetch_add(1, Ordering::SeqCst));
        let mode = if kind == 6 { ZeroMode::Keep } else { ZeroMode::Unmap };
        let data: Vec<u8> =
            id.iter().flat_map(|id| (first..first + sectors).flat_map(|sector| sector_of(mark(*id, sector)))).collect();
        let issued = now(&self.clock);
        match kind {
            0..6 => self.image.write(offset, &data, durability).unwrap(),
            6..8 => self.image.zero(offset, length, mode, durability).unwrap(),
            _ => {
                self.image.discard(offset, length, durability).unwrap();
                let per_cluster = self.shape.cluster / SECTOR;
                let end = first + sectors;
                let end = if end == self.shape.sectors { end } else { end / per_cluster * per_cluster };
                first = first.next_multiple_of(per_cluster);
                sectors = end.saturating_sub(first);
                // Nothing is promised where nothing changes.
                first = if sectors == 0 { 0 } else { first };
            }
        }
        let event = Event { issued, replied: now(&self.clock), first_sector: first, sectors, id, durable };
        self.history.lock().unwrap().events.push(event);
    }

    fn flush(&self) {
        let issued = now(&self.clock);
        self.image.flush().unwrap();
        self.history.lock().unwrap().flushes.push(Flush { issued, replied: now(&self.clock) });
    }

    fn read(&self, random: &mut fastrand::Rng) {
        let (first_sector, sectors) = self.place(random);
        let mut bytes = vec![0; sectors * SECTOR];
        let issued = now(&self.clock);
        self.image.read((first_sector * SECTOR) as u64, &mut bytes).unwrap();
        let values = bytes.chunks(SECTOR).map(value_of).collect();
        let read = Read { issued, replied: now(&self.clock), first_sector, values };
        self.history.lock().unwrap().reads.push(read);
    }

    fn work(&self, mut random: fastrand::Rng) {
        for _ in 0..STEPS {
            match random.u8(..8) {
                0 => self.flush(),
                1 | 2 => self.read(&mut random),
                _ => self.change(&mut random),
            }
        }
    }
}

/// One session with all its threads, on `base`; returns the recording, judged.
fn session(
    shape: &'static Shape,
    clock: &Clock,
    base: &Content,
    random: &mut fastrand::Rng,
    first_id: u64,
) -> Result<(usize, Registers), String> {
    let (below, layer) = below_of(shape, clock);
    let initial = values_of(base, &below)?;
    let disk = Arc::new(disk_of(clock, base.clone()));
    let started = now(clock);
    let image = Image::open_on(disk.clone(), Access::ReadWrite, layer, CACHE).map_err(|error| error.to_string())?;
    let history = Mutex::new(History { initial, ..History::default() });
    let session = Arc::new(Session { shape, clock: clock.clone(), image, history, next_id: AtomicU64::new(first_id) });
    let mut threads = Vec::new();
    for _ in 0..WRITERS {
        let (session, random) = (session.clone(), random.fork());
        threads.push(shuttle::thread::spawn(move || session.work(random)));
    }
    let flusher = session.clone();
    threads.push(shuttle::thread::spawn(move || (0..3).for_each(|_| flusher.flush())));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let ends_closed = random.u8(..4) == 0;
    if ends_closed {
        let issued = now(clock);
        session.image.close().map_err(|error| error.to_string())?;
        session.history.lock().unwrap().flushes.push(Flush { issued, replied: now(clock) });
        let report = session.image.check().unwrap();
        if !report.is_clean() {
            return Err(format!("closed, and not clean: {report:?}"));
        }
    }
    let session = Arc::into_inner(session).unwrap();
    drop(session.image);
    let calls = disk.calls();
    let history = session.history.into_inner().unwrap();
    if let Some((start, end)) = disk.collisions().first() {
        return Err(format!("two writes of {start}..{end} were under way together"));
    }
    let registers = Registers::new(base, &calls);
    let (moments, fault) = registers.judge(&calls, &history, &below);
    let end = now(clock);
    match fault {
        Some(fault) => Err(fault),
        None => {
            values_of(&registers.state(random.u64(started..end), random), &below)?;
            Ok((moments, registers))
        }
    }
}

/// One run: a session, and now and then another one on what a crash left of it.
fn run(seed: u64) -> Result<usize, String> {
    let shape = &SHAPES[seed as usize % SHAPES.len()];
    let mut random = fastrand::Rng::with_seed(seed);
    let clock: Clock = Arc::new(AtomicU64::new(0));
    let base = first_content(shape, &clock);
    let start = now(&clock);
    let (mut moments, registers) = session(shape, &clock, &base, &mut random, 1)?;
    if random.u8(..3) == 0 {
        let state = registers.state(random.u64(start..now(&clock)), &mut random);
        let (more, _) = session(shape, &clock, &state, &mut random, 1000)
            .map_err(|fault| format!("after a crash and more work: {fault}"))?;
        moments += more;
    }
    Ok(moments)
}

/// The mistakes are alive for the whole process: tests go one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How many runs there are by default.
const RUNS: usize = 3000;

fn scale() -> usize {
    std::env::var("SCALE").map_or(1, |scale| scale.parse().unwrap())
}

#[test]
fn no_crash_in_the_middle_of_concurrent_work_loses_or_invents_a_byte() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let outcome = explore(RUNS * scale(), run);
    println!("{} runs, {} crash points, illegal: {:?}", outcome.schedules, outcome.counted, outcome.fault);
    assert_eq!(outcome.fault, None, "repeat with SEED=<the number>");
    if std::env::var("SEED").is_err() {
        assert!(outcome.schedules >= 2000 && outcome.counted >= 30 * outcome.schedules, "{outcome:?}");
    }
}

/// What the runs must find within their default number: mistakes that no sequential workload shows.
#[cfg(feature = "mutants")]
const MISTAKES: [&str; 12] = [
    "no_b1",
    "no_b2",
    "no_drain",
    "live_l2",
    "live_l1",
    "fua_by_memory",
    "empty_flush",
    "no_op_fua",
    "clean_before_b2",
    "superseded",
    "filling_no_overlap",
    "pending_before_mapping",
];

#[cfg(feature = "mutants")]
#[test]
fn each_deep_mistake_is_found() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut missed = Vec::new();
    for name in MISTAKES {
        blockyard_qcow2::mutants::choose(Some(name));
        let outcome = explore(RUNS, run);
        blockyard_qcow2::mutants::choose(None);
        println!("{name}: found in run {} of {RUNS}: {:?}", outcome.schedules, outcome.fault);
        if outcome.fault.is_none() {
            missed.push(name);
        }
    }
    assert!(missed.is_empty(), "not found in {RUNS} runs: {missed:?}");
}
