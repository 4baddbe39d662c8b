//! Power cuts in the middle of packing: every short workload of compressed writes, and a watch over flushed bytes.
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
#[path = "support/recorder.rs"]
mod recorder;
#[path = "support/requests.rs"]
mod requests;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use blockyard_qcow2::{Access, Compression, CompressionLevel, CreateOptions, Durability, OpenOptions, ZeroMode};
use recorder::{Recorder, blank};
use sim_disk::Clock;
use support::{over, pattern, scale, wordy};

const LATER: Durability = Durability::OnFlush;

fn compressing() -> OpenOptions {
    OpenOptions { compress: Some(CompressionLevel::Fast), ..OpenOptions::new(Access::ReadWrite) }
}

/// One step of a workload on clusters of 4 KiB.
#[derive(Clone, Copy, Debug)]
enum Step {
    PackTwo,
    PackNext,
    PackMixed,
    PackTail,
    PackDurable,
    WritePart,
    ZeroUnmap,
    Flush,
    Reopen,
}

const ALPHABET: [Step; 9] = [
    Step::PackTwo,
    Step::PackNext,
    Step::PackMixed,
    Step::PackTail,
    Step::PackDurable,
    Step::WritePart,
    Step::ZeroUnmap,
    Step::Flush,
    Step::Reopen,
];

const CLUSTER: usize = 4096;
const SIZE: usize = 14 * CLUSTER + 512;

/// A fresh image, or one over a full backing file; deflate or zstd.
fn recorder(over_backing: bool, zstd: bool) -> Recorder {
    let clock: Clock = Arc::new(AtomicU64::new(0));
    let backing = if over_backing { pattern(77, SIZE) } else { Vec::new() };
    let shape = if over_backing { over("below.qcow2", SIZE as u64) } else { CreateOptions::new(SIZE as u64) };
    let compression = if zstd { Compression::Zstd } else { Compression::Deflate };
    let base = blank(&clock, &CreateOptions { cluster_size: CLUSTER as u32, compression, ..shape });
    let initial = if over_backing { backing.clone() } else { vec![0; SIZE] };
    Recorder::new(clock, base, backing, initial, compressing())
}

fn take(step: Step, recorder: &mut Recorder) {
    recorder.seed += 1;
    let seed = recorder.seed;
    match step {
        Step::PackTwo => recorder.write(0, &wordy(seed, 2 * CLUSTER), LATER),
        Step::PackNext => recorder.write(2 * CLUSTER, &wordy(seed, CLUSTER), LATER),
        Step::PackMixed => {
            let data = [wordy(seed, CLUSTER + 700), pattern(seed, CLUSTER), wordy(seed + 100, 2 * CLUSTER)].concat();
            recorder.write(3 * CLUSTER, &data, LATER);
        }
        Step::PackTail => recorder.write(14 * CLUSTER, &wordy(seed, 512), LATER),
        Step::PackDurable => recorder.write(CLUSTER, &wordy(seed, 2 * CLUSTER), Durability::BeforeReply),
        Step::WritePart => recorder.write(CLUSTER - 300, &pattern(seed, 800), LATER),
        Step::ZeroUnmap => recorder.zero(100, 3 * CLUSTER, ZeroMode::Unmap, LATER),
        Step::Flush => recorder.flush(),
        Step::Reopen => recorder.reopen(),
    }
}

/// Runs workloads on both cores; returns the numbers of crash states and of flushed ranges watched for rewrites.
fn judge_all(workloads: &[(bool, bool, Vec<Step>)]) -> (usize, usize) {
    let (next, states, watched) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((over_backing, zstd, steps)) = workloads.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut recorder = recorder(*over_backing, *zstd);
                    steps.iter().for_each(|step| take(*step, &mut recorder));
                    let (count, fault) = recorder.judge();
                    assert_eq!(fault, None, "backing {over_backing}, zstd {zstd}: {steps:?}");
                    let ranges = recorder.packed_bytes_at_risk().unwrap_or_else(|risk| panic!("{risk}: {steps:?}"));
                    states.fetch_add(count, Ordering::Relaxed);
                    watched.fetch_add(ranges, Ordering::Relaxed);
                }
            });
        }
    });
    (states.into_inner(), watched.into_inner())
}

#[test]
fn no_crash_of_a_short_workload_loses_a_packed_byte_or_puts_one_at_risk() {
    let mut workloads = Vec::new();
    for (over_backing, zstd) in [(false, false), (true, true)] {
        for a in ALPHABET {
            for b in ALPHABET {
                workloads.extend(ALPHABET.map(|c| (over_backing, zstd, vec![Step::PackTwo, a, b, c])));
            }
        }
    }
    let (states, watched) = judge_all(&workloads);
    println!("{} workloads, {states} crash states, {watched} flushed ranges", workloads.len());
    assert!(states >= 50_000 && watched >= 5_000, "{states} crash states, {watched} flushed ranges");
}

#[test]
fn no_crash_of_a_long_random_workload_loses_a_packed_byte_or_puts_one_at_risk() {
    let workloads: Vec<_> = (0..40 * scale())
        .map(|seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            let steps = (0..20).map(|_| ALPHABET[random.usize(..ALPHABET.len())]).collect();
            (random.bool(), random.bool(), steps)
        })
        .collect();
    let (states, watched) = judge_all(&workloads);
    println!("{} workloads, {states} crash states, {watched} flushed ranges", workloads.len());
    assert!(states >= 5_000 && watched >= 1_000, "{states} crash states, {watched} flushed ranges");
}

#[test]
fn flushes_beside_packing_threads_never_put_flushed_bytes_at_risk() {
    let mut watched = 0;
    for round in 0..40u64 {
        let clock: Clock = Arc::default();
        let size = 64 * CLUSTER;
        let compression = if round % 2 == 0 { Compression::Zstd } else { Compression::Deflate };
        let shape = CreateOptions { cluster_size: CLUSTER as u32, compression, ..CreateOptions::new(size as u64) };
        let base = blank(&clock, &shape);
        let recorder = Recorder::new(clock, base, Vec::new(), vec![0; size], compressing());
        std::thread::scope(|scope| {
            for thread in 0..3usize {
                let image = recorder.image();
                scope.spawn(move || {
                    for cluster in (thread..64).step_by(3) {
                        let data = wordy(round * 64 + cluster as u64, CLUSTER);
                        image.write((cluster * CLUSTER) as u64, &data, LATER).unwrap();
                        if cluster % 7 == 0 {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        recorder.image().close().unwrap();
        watched += recorder.packed_bytes_at_risk().unwrap();
        let expected: Vec<u8> = (0..64).flat_map(|cluster| wordy(round * 64 + cluster, CLUSTER)).collect();
        assert!(reader::read_disk(&recorder.disk.content(), &[]).unwrap() == expected, "round {round}");
    }
    println!("{watched} flushed ranges");
    assert!(watched >= 5_000, "{watched} flushed ranges");
}
