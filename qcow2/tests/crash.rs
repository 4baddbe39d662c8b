//! Power cuts, enumerated: every short workload is recorded on a simulated disk, every state that a crash may leave is
//! rebuilt, and each is judged sector by sector, by a reader that shares no code with the engine, and a sample by QEMU.
//!
//! `SCALE` multiplies the number of random workloads; with 6 there are more than 5,000,000 states.
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
#[path = "support/requests.rs"]
mod requests;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;
#[path = "support/workload.rs"]
mod workload;

use std::collections::HashSet;
use std::io::IoSlice;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{Access, CreateOptions, Durability, Image, create_on};
use power_cut::crash_states;
use reader::read_disk;
use sim_disk::{Clock, Content, SimDisk, now};
use support::{assert_reads_as, folder, scale, succeed, text};
use workload::{ALPHABET, CACHE, MORE_STARTS, Run, SIZE, STARTS, Start, Step, Trouble};

fn run(start: Start, steps: &[Step], trouble: Trouble) -> (usize, Option<String>) {
    let mut run = Run::new(start, trouble);
    run.steps(steps);
    run.judge()
}

/// Does something for each of many, on both cores.
fn for_each<T: Sync>(list: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(item) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

type Workload = (Start, Vec<Step>, Trouble);

/// Runs workloads; returns the number of states. Panics at the first illegal one.
fn judge_all(workloads: &[Workload]) -> usize {
    let states = AtomicUsize::new(0);
    for_each(workloads, |(start, steps, trouble)| {
        let (count, fault) = run(*start, steps, *trouble);
        assert_eq!(fault, None, "{start:?} {steps:?} {trouble:?}");
        states.fetch_add(count, Ordering::Relaxed);
    });
    let states = states.into_inner();
    println!("{} workloads, {states} crash states, 0 illegal", workloads.len());
    states
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

fn random_workload(seed: u64, length: usize, starts: &[Start]) -> (Start, Vec<Step>) {
    let mut random = fastrand::Rng::with_seed(seed);
    let steps = (0..length).map(|_| ALPHABET[random.usize(..ALPHABET.len())]).collect();
    (starts[random.usize(..starts.len())], steps)
}

#[test]
fn no_crash_of_any_short_workload_loses_or_invents_a_byte() {
    let short = sequences(3);
    let steps = ALPHABET.len();
    assert_eq!(short.len(), steps + steps * steps + steps * steps * steps);
    let of = |start: &Start| short.iter().map(|steps| (*start, steps.clone(), Trouble::default())).collect::<Vec<_>>();
    let states = judge_all(&STARTS.iter().flat_map(of).collect::<Vec<_>>());
    assert!(states >= 200_000, "only {states} crash states");
}

#[test]
fn no_crash_of_a_long_random_workload_loses_or_invents_a_byte() {
    let starts = [&STARTS[..], &MORE_STARTS].concat();
    let of = |seed| {
        let (start, steps) = random_workload(seed, 20, &starts);
        (start, steps, Trouble::default())
    };
    let states = judge_all(&(0..2000 * scale()).map(of).collect::<Vec<_>>());
    assert!(states >= 200_000, "only {states} crash states");
}

#[test]
fn after_a_failed_sync_nothing_is_answered_and_no_crash_loses_what_was_flushed_before() {
    let mut workloads: Vec<Workload> = Vec::new();
    for failing in 0..8 {
        let trouble = Trouble { failing_sync: Some(failing), ..Trouble::default() };
        for start in STARTS {
            workloads.extend(sequences(2).into_iter().map(|steps| (start, steps, trouble)));
        }
        for seed in 0..50 * scale() {
            let (start, steps) = random_workload(failing * 1_000_000 + seed, 12, &MORE_STARTS);
            workloads.push((start, steps, trouble));
        }
    }
    let states = judge_all(&workloads);
    assert!(states >= 20_000, "only {states} crash states");
}

#[test]
fn an_image_opened_again_after_a_failed_sync_shows_what_the_disk_has() {
    for failing in 1..6 {
        for steps in sequences(2) {
            let mut run = Run::new(STARTS[2], Trouble { failing_sync: Some(failing), ..Trouble::default() });
            run.steps(&steps);
            if let Some(truth) = run.disk.truth() {
                run.forget_image();
                let image = run.open();
                let truth = run.read(&truth).unwrap();
                let mut found = vec![0; truth.len()];
                image.read(0, &mut found).unwrap();
                assert!(found == truth, "{steps:?}: shows what the page cache had");
            }
        }
    }
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

#[test]
fn no_byte_changes_before_what_other_writers_vouch_for_is_withdrawn() {
    let clock: Clock = Arc::new(AtomicU64::new(0));
    let open = |disk: &Arc<SimDisk>| Image::open_on(disk.clone(), Access::ReadWrite, None, CACHE).unwrap();
    let made = Arc::new(SimDisk::new(clock.clone(), Content::default()));
    create_on(&*made, &CreateOptions { cluster_size: 512, ..CreateOptions::new(SIZE as u64) }).unwrap();
    let image = open(&made);
    image.write(0, &[1; 4096], Durability::OnFlush).unwrap();
    image.close().unwrap();
    // Bitmaps that are up to date, and something that nobody knows.
    made.write(88, &mut [IoSlice::new(&0x21_u64.to_be_bytes())]).unwrap();
    let base = made.content();
    let before = read_disk(&base, &[]).unwrap();

    let disk = Arc::new(SimDisk::new(clock.clone(), base.clone()));
    let image = open(&disk);
    image.write(512, &[2; 1024], Durability::OnFlush).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    let (mut vouched, mut withdrawn) = (0, 0);
    crash_states(&base, &disk.calls(), now(&clock), 0, |state| {
        let mut autoclear = [0; 8];
        state.content.read(88, &mut autoclear);
        if autoclear == [0; 8] {
            withdrawn += 1;
        } else {
            vouched += 1;
            assert!(read_disk(&state.content, &[]).unwrap() == before, "changed, and vouched for all the same");
        }
    });
    assert!(vouched > 0 && withdrawn > 0, "{vouched} {withdrawn}");
}

/// How many states QEMU judges.
const JUDGED_BY_QEMU: usize = 1000;

#[test]
fn qemu_repairs_what_a_crash_leaves_without_a_change_of_content() {
    let folder = folder();
    let starts = [&STARTS[..], &MORE_STARTS].concat();
    let states: Mutex<Vec<(usize, Content, Vec<u8>)>> = Mutex::default();
    let seeds: Vec<u64> = (0..200).collect();
    let wanted = JUDGED_BY_QEMU * scale().min(10) as usize;
    for_each(&seeds, |seed| {
        let number = *seed as usize % starts.len();
        let (_, steps) = random_workload(1 << 32 | seed, 12, &starts);
        let mut run = Run::new(starts[number], Trouble::default());
        run.steps(&steps);
        let (mut seen, mut all) = (HashSet::new(), Vec::new());
        run.states(|state| {
            if seen.insert(state.content.digest()) {
                all.push(state.content);
            }
        });
        let mut random = fastrand::Rng::with_seed(*seed);
        random.shuffle(&mut all);
        let chosen = all.into_iter().take(wanted / 200).map(|content| {
            let bytes = run.read(&content).unwrap();
            (number, content, bytes)
        });
        states.lock().unwrap().extend(chosen);
    });
    // One folder per start: the images name their backing file.
    for (number, start) in starts.iter().enumerate() {
        let here = folder.path().join(number.to_string());
        std::fs::create_dir(&here).unwrap();
        if start.below > 0 {
            let (raw, below) = (here.join("below.raw"), here.join("below.qcow2"));
            std::fs::write(&raw, start.below_bytes()).unwrap();
            succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&below)]);
        }
    }
    let states = states.into_inner().unwrap();
    let numbered: Vec<_> = states.iter().enumerate().collect();
    for_each(&numbered, |(index, (number, content, bytes))| {
        judge_by_qemu(&folder.path().join(number.to_string()).join(format!("{index}.qcow2")), content, bytes);
    });
    println!("{} crash states judged by QEMU, 0 refused or changed", states.len());
    assert!(states.len() >= wanted * 9 / 10 && states.len() >= JUDGED_BY_QEMU, "only {} states", states.len());
}

fn judge_by_qemu(path: &Path, content: &Content, bytes: &[u8]) {
    let mut file = vec![0; content.length() as usize];
    content.read(0, &mut file);
    std::fs::write(path, &file).unwrap();
    succeed("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(path)]);
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
    assert_reads_as(path, bytes);
    std::fs::remove_file(path).unwrap();
}

/// The harness must find what it is there to find: an engine without one of its barriers.
#[test]
fn each_missing_barrier_is_found() {
    let step = |name: &str| *ALPHABET.iter().find(|step| step.name() == name).unwrap();
    let (write, flush) = (step("write a cluster"), step("flush"));
    let without = |sync| Trouble { ignored_sync: Some(sync), ..Trouble::default() };
    // Over a backing file, so that zeroes which nobody wrote show.
    let start = STARTS[2];
    // The syncs of these steps: 0 the dirty bit, 1 and 2 the barriers of the flush, then those of the close. Without the
    // first, B1 stands in for it here: it guards what autoclear bits promise, of which these images have none.
    let steps = [write, flush, step("write across tables"), flush, step("close, open again")];
    assert_eq!(run(start, &steps, Trouble::default()).1, None);
    for (missing, name) in [(1, "B1"), (2, "B2"), (3, "B1 of the second flush"), (5, "B3"), (6, "B4")] {
        assert!(run(start, &steps, without(missing)).1.is_some(), "an engine without {name} passes");
    }
    assert!(run(STARTS[4], &[write, flush], without(1)).1.is_some(), "the one sync of a flush in place");
}
