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
#[path = "support/recorded_guest.rs"]
mod guest;
#[path = "support/history.rs"]
mod history;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/registers.rs"]
mod registers;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use blockyard_qcow2::{Durability, ZeroMode};
use explore::explore;
use guest::{Guest, Shape};
use registers::Registers;
use sim_disk::{Clock, Content, now};

const WRITERS: u64 = 3;
const STEPS: usize = 7;

/// Tables of 512-byte clusters map 64 sectors: six of them.
const TABLES: usize = 6 * 64 + 1;
const SPOTS: &[usize] = &[0, 8, 60, 128, 192, 256, 320, 381];
const SHAPES: [Shape; 7] = [
    // Two tables, and everybody at the border between them.
    Shape { cluster: 512, sectors: 128, below: 128, is_reopened: true, spots: &[60, 65] },
    Shape { cluster: 512, sectors: TABLES, below: 0, is_reopened: false, spots: SPOTS },
    Shape { cluster: 512, sectors: TABLES, below: TABLES, is_reopened: false, spots: SPOTS },
    Shape { cluster: 512, sectors: TABLES, below: 200, is_reopened: true, spots: SPOTS },
    Shape { cluster: 4096, sectors: 73, below: 0, is_reopened: true, spots: &[0, 4, 16, 69] },
    Shape { cluster: 4096, sectors: 73, below: 73, is_reopened: false, spots: &[0, 4, 16, 69] },
    Shape { cluster: 4096, sectors: 73, below: 43, is_reopened: false, spots: &[0, 4, 38, 69] },
];

/// A run of `1..=4` sectors at or near one of the spots.
fn place(shape: &Shape, random: &mut fastrand::Rng) -> (usize, usize) {
    let spot = shape.spots[random.usize(..shape.spots.len())];
    if random.bool() {
        // The same place again and again.
        return (spot, 2);
    }
    let first = (spot + random.usize(..4)).min(shape.sectors - 1);
    (first, random.usize(1..=4).min(shape.sectors - first))
}

fn work(guest: &Guest, mut random: fastrand::Rng) {
    for _ in 0..STEPS {
        let (first, sectors) = place(guest.shape, &mut random);
        let durability = if random.u8(..4) == 0 { Durability::BeforeReply } else { Durability::OnFlush };
        match random.u8(..16) {
            0 | 1 => guest.flush(),
            2..4 => guest.read(first, sectors),
            6 => guest.zero(first, sectors, ZeroMode::Keep, durability),
            7 | 8 => guest.zero(first, sectors, ZeroMode::Unmap, durability),
            9 => guest.discard(first, sectors, durability),
            _ => guest.write(first, sectors, durability),
        };
    }
}

/// One session with all its threads, on `base`; returns the number of crash points, and what they may have left.
fn session(
    shape: &'static Shape,
    clock: &Clock,
    base: &Content,
    random: &mut fastrand::Rng,
    first_id: u64,
) -> Result<(usize, Registers), String> {
    // A slow disk has more payload on its way.
    let slowness = [1, 4, 12][random.usize(..3)];
    let guest = Guest::new(shape, clock, base, first_id, slowness)?;
    let mut threads = Vec::new();
    for _ in 0..WRITERS {
        let (guest, random) = (guest.clone(), random.fork());
        threads.push(shuttle::thread::spawn(move || work(&guest, random)));
    }
    let flusher = guest.clone();
    threads.push(shuttle::thread::spawn(move || assert!((0..3).all(|_| flusher.flush()))));
    let (reader, mut places) = (guest.clone(), random.fork());
    threads.push(shuttle::thread::spawn(move || {
        // Everything, while the first writes come: a table is looked up when the bytes of the one before have arrived.
        reader.read(0, shape.sectors);
        for _ in 0..4 {
            let (first, sectors) = place(shape, &mut places);
            reader.read(first, sectors);
            // Across a border of tables: the second is looked up when the bytes of the first have arrived.
            reader.read(60, 8);
        }
    }));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    if random.u8(..4) == 0 {
        guest.close()?;
    }
    guest.judge()
}

/// One run: a session, and now and then another one on what a crash left of it.
fn run(seed: u64) -> Result<usize, String> {
    let shape = &SHAPES[seed as usize % SHAPES.len()];
    let mut random = fastrand::Rng::with_seed(seed);
    let clock: Clock = Arc::new(AtomicU64::new(0));
    let base = shape.first_content(&clock);
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

#[test]
fn no_crash_in_the_middle_of_concurrent_work_loses_or_invents_a_byte() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let outcome = explore(RUNS * support::scale() as usize, run);
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
