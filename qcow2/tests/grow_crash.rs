//! Power cuts while a disk grows: every state that may be left has the old size or the new one, and legal content.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

#[path = "support/power_cut.rs"]
mod power_cut;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/requests.rs"]
mod requests;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{Access, CreateOptions, Durability, Image, Layer, create_on};
use power_cut::{CrashState, crash_states};
use reader::read_disk;
use requests::Requests;
use sim_disk::{Clock, Content, SimDisk, now};
use support::{KIB, assert_reads_as, folder, join, over, pattern, succeed, text};

const LATER: Durability = Durability::OnFlush;
const CACHE: usize = 1 << 20;
const OLD: u64 = 21 * KIB + 512;

/// What the image starts from; lengths in bytes of the layer below, 0 for none.
#[derive(Clone, Copy, Debug)]
struct Start {
    cluster_size: u32,
    below: u64,
    /// Written to and closed once before.
    reopened: bool,
}

const STARTS: [Start; 7] = [
    Start { cluster_size: 512, below: 0, reopened: false },
    Start { cluster_size: 512, below: 0, reopened: true },
    Start { cluster_size: 4096, below: 0, reopened: true },
    // Longer than any size of the overlay, ending in the grown range, and ending before it.
    Start { cluster_size: 512, below: 200 * KIB, reopened: false },
    Start { cluster_size: 4096, below: 200 * KIB, reopened: true },
    Start { cluster_size: 4096, below: 30 * KIB, reopened: false },
    Start { cluster_size: 512, below: 10 * KIB, reopened: true },
];

/// Within the last cluster of 4 KiB, within the L1 of 512-byte clusters (32 KiB), and past it by more than two tables.
const SIZES: [u64; 3] = [22 * KIB, 31 * KIB, 100 * KIB + 512];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The last 700 bytes of the old disk.
    WriteTail,
    WriteMiddle,
    Flush,
    Grow,
    /// From the old disk into the new range.
    WriteAcross,
    /// Growing again, by a little more than a table.
    GrowAgain,
    Close,
}

use Step::{Close, Flush, Grow, GrowAgain, WriteAcross, WriteMiddle, WriteTail};

const WORKLOADS: [&[Step]; 10] = [
    &[Grow],
    &[WriteTail, Grow, WriteAcross],
    &[WriteTail, Flush, Grow, WriteAcross, Flush],
    &[WriteMiddle, Flush, WriteTail, Grow, Close],
    &[WriteMiddle, Grow, WriteAcross, GrowAgain],
    &[Grow, GrowAgain, WriteAcross, Close],
    &[WriteTail, WriteMiddle, Grow, Flush, WriteTail, Close],
    &[WriteTail, Grow, WriteAcross, Flush, WriteMiddle, GrowAgain, Close],
    &[WriteMiddle, WriteTail, Flush, WriteMiddle, Grow, WriteMiddle, WriteAcross, Flush],
    &[Flush, WriteTail, Grow, GrowAgain, WriteMiddle, WriteAcross],
];

/// A workload being run and recorded.
struct Run {
    clock: Clock,
    disk: Arc<SimDisk>,
    base: Content,
    below: Vec<u8>,
    image: Image,
    model: Vec<u8>,
    requests: Requests,
    /// Issue, reply and size of each grow.
    sizes: Vec<(u64, u64, u64)>,
    seed: u64,
}

fn layer(clock: &Clock, bytes: &[u8]) -> Option<Layer> {
    if bytes.is_empty() {
        return None;
    }
    let raw = SimDisk::new(clock.clone(), Content::default());
    raw.write(0, &mut [std::io::IoSlice::new(bytes)]).unwrap();
    Some(Layer::Raw { storage: Arc::new(raw), size: bytes.len() as u64 })
}

impl Run {
    fn new(start: Start, ignored_syncs: &[u64]) -> Self {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let below = pattern(9, start.below as usize);
        let plain = if below.is_empty() { CreateOptions::new(OLD) } else { over("below", OLD) };
        let setup = Arc::new(SimDisk::new(clock.clone(), Content::default()));
        create_on(&*setup, &CreateOptions { cluster_size: start.cluster_size, ..plain }).unwrap();
        let mut initial = below.clone();
        initial.resize(OLD as usize, 0);
        if start.reopened {
            let image = Image::open_on(setup.clone(), Access::ReadWrite, layer(&clock, &below), CACHE).unwrap();
            let data = pattern(8, 9000);
            let at = OLD as usize - data.len();
            image.write(at as u64, &data, LATER).unwrap();
            image.close().unwrap();
            initial[at..].copy_from_slice(&data);
        }
        let base = setup.content();
        let mut disk = SimDisk::new(clock.clone(), base.clone());
        disk.ignored_syncs = ignored_syncs.to_vec();
        let disk = Arc::new(disk);
        let image = Image::open_on(disk.clone(), Access::ReadWrite, layer(&clock, &below), CACHE).unwrap();
        let (model, requests, sizes) = (initial.clone(), Requests::new(initial), vec![(0, 0, OLD)]);
        Self { clock, disk, base, below, image, model, requests, sizes, seed: 0 }
    }

    fn step(&mut self, step: Step, size: u64) {
        self.seed += 1;
        match step {
            WriteTail => self.write(OLD - 700, 700),
            WriteMiddle => self.write(5000, 3000),
            WriteAcross => self.write(OLD - 300, (self.image.size() - OLD) as usize + 300),
            Flush => drop(self.barrier(Image::flush)),
            Close => drop(self.barrier(Image::close)),
            Grow | GrowAgain => {
                let wanted = if step == Grow { size } else { self.image.size() + 35 * KIB };
                let (issued, replied) = self.barrier(|image| image.grow(wanted));
                self.model.resize(wanted as usize, 0);
                self.sizes.push((issued, replied, wanted));
            }
        }
    }

    fn write(&mut self, offset: u64, length: usize) {
        let data = pattern(self.seed, length);
        self.model[offset as usize..offset as usize + length].copy_from_slice(&data);
        let issued = now(&self.clock);
        self.image.write(offset, &data, LATER).unwrap();
        self.requests.changed((issued, now(&self.clock)), &self.model, offset as usize, length, false);
    }

    /// Something that makes durable what came before it; returns its issue and reply.
    fn barrier(&mut self, operation: impl FnOnce(&Image) -> blockyard_qcow2::Result<()>) -> (u64, u64) {
        let issued = now(&self.clock);
        operation(&self.image).unwrap();
        let replied = now(&self.clock);
        self.requests.flushed(issued, replied);
        (issued, replied)
    }

    fn size_is_legal(&self, size: u64, time: u64) -> bool {
        let replied = self.sizes.iter().filter(|(_, replied, _)| *replied < time).map(|(_, _, size)| *size).max();
        let issued = self.sizes.iter().filter(|(issued, _, _)| *issued < time).map(|(_, _, size)| *size).max();
        Some(size) >= replied && Some(size) <= issued && self.sizes.iter().any(|(_, _, known)| *known == size)
    }

    /// The first thing that is wrong with a crash state.
    fn fault(&self, state: &CrashState) -> Option<String> {
        let found = match read_disk(&state.content, &self.below) {
            Ok(found) => found,
            Err(rule) => return Some(rule),
        };
        for time in [state.earliest + 1, state.latest] {
            if !self.size_is_legal(found.len() as u64, time) {
                return Some(format!("{} bytes at time {time}", found.len()));
            }
        }
        self.requests.illegal_sector(&found, state).or_else(|| self.fault_of_repair(state, &found))
    }

    /// The engine opens it, closes it clean with the same content, and growing works as if nothing had been.
    fn fault_of_repair(&self, state: &CrashState, found: &[u8]) -> Option<String> {
        let disk = Arc::new(SimDisk::new(self.clock.clone(), state.content.clone()));
        for size in [found.len() as u64, 180 * KIB] {
            let image = match Image::open_on(disk.clone(), Access::ReadWrite, layer(&self.clock, &self.below), CACHE) {
                Ok(image) => image,
                Err(error) => return Some(format!("cannot be opened: {error}")),
            };
            let mut expected = found.to_vec();
            expected.resize(size as usize, 0);
            if let Err(error) = image.grow(size).and_then(|()| image.close()) {
                return Some(format!("cannot be grown to {size} and closed: {error}"));
            }
            let report = image.check().unwrap();
            if report.errors > 0 || report.dirty || (report.leaks > 0 && size > found.len() as u64) {
                return Some(format!("is not clean: {report:?}"));
            }
            match read_disk(&disk.content(), &self.below) {
                Ok(after) if after == expected => {}
                Ok(_) => return Some(format!("reads differently after growing to {size}")),
                Err(rule) => return Some(format!("after growing to {size}: {rule}")),
            }
        }
        None
    }

    /// Calls for every crash state of the recording.
    fn each_state(&self, mut visit: impl FnMut(&CrashState)) {
        let end = now(&self.clock);
        crash_states(&self.base, &self.disk.calls(), end, self.seed, |state| visit(&state));
    }
}

fn record(start: Start, steps: &[Step], size: u64, ignored_syncs: &[u64]) -> Run {
    let mut run = Run::new(start, ignored_syncs);
    steps.iter().for_each(|step| run.step(*step, size));
    run
}

fn first_fault(run: &Run) -> (usize, Option<String>) {
    let (mut states, mut fault) = (0, None);
    run.each_state(|state| {
        states += 1;
        if fault.is_none() {
            fault = run.fault(state);
        }
    });
    (states, fault)
}

#[test]
fn no_crash_while_a_disk_grows_leaves_another_size_or_an_illegal_byte() {
    let mut all = Vec::new();
    for start in STARTS {
        for size in SIZES {
            all.extend(WORKLOADS.map(|steps| (start, steps, size)));
        }
    }
    let judge = |part: &[(Start, &[Step], u64)]| -> usize {
        part.iter()
            .map(|(start, steps, size)| {
                let (states, fault) = first_fault(&record(*start, steps, *size, &[]));
                assert_eq!(fault, None, "{start:?} {steps:?} to {size}");
                states
            })
            .sum()
    };
    let (first, second) = all.split_at(all.len() / 2);
    let states = std::thread::scope(|scope| {
        let other = scope.spawn(|| judge(first));
        judge(second) + other.join().unwrap()
    });
    println!("{} workloads, {states} crash states, 0 illegal", all.len());
    assert_eq!(all.len(), 210);
    assert!(states >= 10_000, "only {states} crash states");
}

/// The harness must find what it is there to find.
#[test]
fn each_missing_barrier_of_a_grow_is_found() {
    let start = Start { cluster_size: 4096, below: 200 * KIB, reopened: true };
    // The syncs: 0 the dirty bit, then those of the grow.
    for (size, missing, name) in [
        (31 * KIB, 1, "B1"),
        (31 * KIB, 2, "B2, of the entries that hide the layer below"),
        (31 * KIB, 3, "the last one"),
    ] {
        let fault = |ignored: &[u64]| first_fault(&record(start, &[WriteMiddle, Grow, WriteAcross], size, ignored)).1;
        assert_eq!(fault(&[]), None);
        assert!(fault(&[missing]).is_some(), "growing without {name} passes");
    }
    // Past the L1, with nothing to hide: B1, B2, the new L1, the size.
    let start = Start { cluster_size: 512, below: 0, reopened: true };
    for (missing, name) in [(3, "the sync of the new L1"), (4, "the last one")] {
        let fault =
            |ignored: &[u64]| first_fault(&record(start, &[WriteMiddle, WriteTail, Grow], 100 * KIB, ignored)).1;
        assert_eq!(fault(&[]), None);
        assert!(fault(&[missing]).is_some(), "growing without {name} passes");
    }
}

#[test]
fn qemu_repairs_and_reads_what_a_crash_left() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let mut judged = 0;
    for (start, size) in [(STARTS[1], SIZES[2]), (STARTS[3], SIZES[2]), (STARTS[4], SIZES[1])] {
        let run = record(start, &[WriteTail, Grow, WriteAcross], size, &[]);
        std::fs::write(join(&folder, "below"), &run.below).unwrap();
        let mut number = 0;
        run.each_state(|state| {
            number += 1;
            if number % 6 != 0 {
                return;
            }
            let mut bytes = vec![0; state.content.length() as usize];
            state.content.read(0, &mut bytes);
            // The reader takes the layer below for raw bytes, whatever the name in the header says.
            if let Some(at) = bytes.windows(5).position(|window| window == b"qcow2").filter(|at| *at < 200) {
                bytes[at - 4..at + 5].copy_from_slice(b"\0\0\0\x03raw\0\0");
            }
            std::fs::write(&path, bytes).unwrap();
            let expected = read_disk(&state.content, &run.below).unwrap();
            // The first call repairs and says so, the second finds nothing.
            support::run("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(&path)]);
            succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
            assert_reads_as(&path, &expected);
            judged += 1;
        });
    }
    println!("{judged} crash states repaired and read by QEMU");
    assert!(judged >= 20, "only {judged}");
}
