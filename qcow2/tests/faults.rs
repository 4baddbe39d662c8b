//! Every call to the storage fails in turn, once and for ever: the failure is reported at the latest by the next flush or
//! close, a failed write or sync poisons the image for good, and nothing that was flushed is lost.
//!
//! `SCALE` adds pairs of faults; `SEED` chooses them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells its figures"
)]

#[path = "support/deadline.rs"]
mod deadline;
#[path = "support/faulty.rs"]
mod faulty;
#[path = "support/guest.rs"]
mod guest;
#[path = "support/reader.rs"]
mod reader;
#[allow(dead_code, reason = "the simulated disk can do more than is needed here")]
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;
#[path = "support/volatile_disk.rs"]
mod volatile_disk;
#[path = "support/workloads.rs"]
mod workloads;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use blockyard_qcow2::{Access, Durability, Error, Image, create_on};
use deadline::within_deadline;
use faulty::{Fault, Faulty, KINDS, Kind};
use nix::errno::Errno;
use volatile_disk::VolatileDisk;
use workloads::{Prepared, SIZE, Start, WORKLOADS, Workload, options, prepare};

/// A failing call, and whether it does a half of its work, and whether all later ones fail too.
const VARIANTS: [(Errno, bool, bool); 8] = [
    (Errno::EIO, false, false),
    (Errno::EIO, true, false),
    (Errno::ENOSPC, false, false),
    (Errno::ENOSPC, true, false),
    (Errno::EINTR, false, false),
    (Errno::EINTR, true, false),
    (Errno::EIO, false, true),
    (Errno::ENOSPC, true, true),
];

fn faults_at(kind: Kind, call: u64) -> impl Iterator<Item = Fault> {
    let transfers = matches!(kind, Kind::Read | Kind::Write | Kind::WriteDurable);
    let fits = move |(_, _, short): &(Errno, bool, bool)| transfers || !short;
    VARIANTS.into_iter().filter(fits).map(move |(errno, for_ever, short)| Fault { kind, call, errno, for_ever, short })
}

/// Runs a workload with these faults and judges everything that can be seen. Returns whether a fault happened.
fn run(workload: &Workload, prepared: &Prepared, faults: &[Fault]) -> bool {
    let context = format!("{}, {faults:?}", workload.name);
    let disk = Arc::new(VolatileDisk::new(prepared.image.clone()));
    let mut guest = prepared.guest(disk.clone(), faults);
    let outcome = (workload.run)(&mut guest);
    let failures = guest.storage.failures();
    if failures.is_empty() {
        outcome.unwrap();
    } else {
        match &outcome {
            // Space that cannot be given back is kept, and look-ahead that does not fit is done without.
            Ok(()) => {
                let harmless = failures.iter().all(|failure| matches!(failure.kind, Kind::Punch | Kind::Reserve));
                assert!(harmless, "{context}: a failure was swallowed");
            }
            Err(error) => guest.assert_right_error(error, &context),
        }
        guest.storage.heal();
        let poison = guest.image.as_ref().and_then(Image::poison);
        if poison.is_some() {
            guest.assert_poisoned(&context);
        } else if outcome.is_err() && guest.image.is_some() {
            assert!(!failures.iter().any(|failure| failure.kind.is_change()), "{context}: not poisoned");
            // The request that failed changed nothing for good, and the image goes on.
            guest.write(70_000, 100, Durability::OnFlush).unwrap();
            guest.read_after_failure(&context);
            guest.close().unwrap();
        }
    }
    // The process is gone; the machine goes on, or loses what was not synced.
    guest.image = None;
    prepared.assert_legal(&guest, &disk.written(), &guest.allowed, &format!("{context}, all written"));
    prepared.assert_legal(&guest, &disk.durable(), &guest.allowed, &format!("{context}, power cut"));
    !failures.is_empty()
}

/// How often each kind is called when nothing fails.
fn calls(workload: &Workload, prepared: &Prepared) -> Vec<(Kind, u64)> {
    let disk = Arc::new(VolatileDisk::new(prepared.image.clone()));
    let mut guest = prepared.guest(disk, &[]);
    (workload.run)(&mut guest).unwrap();
    KINDS.into_iter().map(|kind| (kind, guest.storage.calls(kind))).collect()
}

/// Runs cases on all cores; returns how many of them met their faults.
fn run_all(workload: &'static Workload, cases: Vec<Vec<Fault>>) -> usize {
    let prepared = Arc::new(prepare(workload.start));
    let (next, met) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let cases = Arc::new(cases);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(faults) = cases.get(number).cloned() else { return };
                    let prepared = prepared.clone();
                    let context = format!("{}, {faults:?}", workload.name);
                    let fired = within_deadline(&context, move || run(workload, &prepared, &faults));
                    met.fetch_add(usize::from(fired), Ordering::Relaxed);
                }
            });
        }
    });
    met.into_inner()
}

#[test]
fn every_failing_call_is_reported_in_time_and_nothing_flushed_is_lost() {
    let mut total = 0;
    for workload in &WORKLOADS {
        let prepared = prepare(workload.start);
        let calls = calls(workload, &prepared);
        let at = |(kind, count): &(Kind, u64)| {
            let kind = *kind;
            (1..=*count).flat_map(move |call| faults_at(kind, call)).map(|fault| vec![fault]).collect::<Vec<_>>()
        };
        let cases: Vec<Vec<Fault>> = calls.iter().flat_map(at).collect();
        let count = cases.len();
        let met = run_all(workload, cases);
        println!("{}: {count} cases, {met} of them met their fault; calls: {calls:?}", workload.name);
        // Payload is merged as it comes, so the number of writes is not the same in every run.
        assert!(met * 10 >= count * 9, "{}: {met} of {count}", workload.name);
        total += met;
    }
    println!("{total} cases");
    assert!(total >= 2_000, "only {total} cases");
}

#[test]
fn two_faults_are_no_worse_than_one() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let (scale, seed) = (number("SCALE").unwrap_or(1), number("SEED").unwrap_or(1));
    println!("SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut total = 0;
    for workload in &WORKLOADS {
        let calls = calls(workload, &prepare(workload.start));
        let called: Vec<(Kind, u64)> = calls.into_iter().filter(|(_, count)| *count > 0).collect();
        let mut any = || {
            let (kind, count) = called[random.usize(..called.len())];
            let faults: Vec<Fault> = faults_at(kind, random.u64(1..=count)).collect();
            faults[random.usize(..faults.len())]
        };
        let cases = (0..100 * scale).map(|_| vec![any(), any()]).collect();
        total += run_all(workload, cases);
    }
    println!("{total} pairs met at least one of their faults");
    assert!(total as u64 >= 400 * scale);
}

#[test]
fn an_image_that_could_not_be_created_is_none_or_an_empty_one() {
    static CASES: AtomicU64 = AtomicU64::new(0);
    for start in [Start::Fresh, Start::OverRaw] {
        for kind in KINDS {
            for call in 1.. {
                let mut happened = false;
                for fault in faults_at(kind, call) {
                    let disk = Arc::new(VolatileDisk::default());
                    let storage = Faulty::new(disk.clone(), &[fault]);
                    let created = create_on(&storage, &options(start));
                    happened |= !storage.failures().is_empty();
                    assert_eq!(created.is_err(), !storage.failures().is_empty(), "{fault:?}: {created:?}");
                    for bytes in [disk.written(), disk.durable()] {
                        let disk = Arc::new(VolatileDisk::new(bytes.clone()));
                        let prepared = Prepared { image: bytes.clone(), content: vec![0; SIZE], below: Vec::new() };
                        match Image::open_on(disk, Access::ReadOnly, None, 1024) {
                            Err(Error::NotQcow2) => assert!(created.is_err(), "{fault:?}"),
                            // Over a base it is not opened without one.
                            Err(Error::Backing { .. }) if start == Start::OverRaw => {}
                            Err(other) => panic!("{fault:?}: {other}"),
                            Ok(_) => {
                                let guest = prepared.guest(Arc::new(VolatileDisk::default()), &[]);
                                prepared.assert_legal(&guest, &bytes, &guest.allowed, &format!("{fault:?}"));
                            }
                        }
                    }
                    CASES.fetch_add(1, Ordering::Relaxed);
                }
                if !happened {
                    break;
                }
            }
        }
    }
    println!("{} cases", CASES.load(Ordering::Relaxed));
    assert!(CASES.load(Ordering::Relaxed) >= 50);
}
