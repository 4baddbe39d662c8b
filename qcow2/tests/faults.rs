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
#![allow(dead_code, reason = "what it shares with other tests can do more than is needed here")]

#[path = "support/deadline.rs"]
mod deadline;
#[path = "support/faulty.rs"]
mod faulty;
#[path = "support/guest.rs"]
mod guest;
#[path = "support/quota.rs"]
mod quota;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;
#[path = "support/volatile_disk.rs"]
mod volatile_disk;
#[path = "support/workloads.rs"]
mod workloads;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use blockyard_qcow2::{Access, Durability, Error, Image, Result, ZeroMode, create_on};
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
fn run(workload: &Workload, prepared: &Prepared, faults: &[Fault], has_queue: bool) -> bool {
    let context = format!("{}, queue: {has_queue}, {faults:?}", workload.name);
    let disk = Arc::new(VolatileDisk::new(prepared.image.clone()));
    let mut guest = prepared.guest(disk.clone(), faults, has_queue);
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
            // The image goes on; whether a part of the failed request was done is open.
            guest.write(136 * 512, 512, Durability::OnFlush).unwrap();
            guest.read_after_failure(&context);
            guest.image().unwrap().close().unwrap();
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
    let mut guest = prepared.guest(disk, &[], false);
    (workload.run)(&mut guest).unwrap();
    KINDS.into_iter().map(|kind| (kind, guest.storage.calls(kind))).collect()
}

/// Runs cases on all cores, half of them with a queue; returns how many of them met their faults.
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
                    // Not in step with the variants, of which each call has as many.
                    let has_queue = number / 3 % 2 == 0;
                    let fired = within_deadline(&context, move || run(workload, &prepared, &faults, has_queue));
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
        assert!(met * 2 >= count, "{}: {met} of {count}", workload.name);
        total += met;
    }
    println!("{total} cases");
    assert!(total >= 2_000, "only {total} cases");
}

#[test]
fn two_faults_are_no_worse_than_one() {
    let (scale, seed) = (support::scale(), support::seed().unwrap_or(1));
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

type Request = (&'static str, fn(&Image) -> Result<()>);

const REQUESTS: [Request; 7] = [
    ("a write into a part of a cluster", |image| image.write(33_001, &[7; 100], Durability::OnFlush)),
    ("a write across tables", |image| image.write(32_001, &[7; 3000], Durability::BeforeReply)),
    ("zeroes in a part of a cluster", |image| image.zero(33_001, 100, ZeroMode::Unmap, Durability::OnFlush)),
    ("a discard", |image| image.discard(0, SIZE as u64, Durability::OnFlush)),
    ("a read", |image| image.read(0, &mut vec![0; SIZE])),
    ("a map", |image| image.map(0, SIZE as u64, usize::MAX).map(drop)),
    ("a check", |image| image.check().map(drop)),
];

#[test]
fn a_read_that_fails_ends_its_request_with_the_place_and_nothing_else() {
    let prepared = prepare(Start::OverRaw);
    let disk = Arc::new(VolatileDisk::new(prepared.image.clone()));
    let mut guest = prepared.guest(disk.clone(), &[], false);
    guest.open().unwrap();
    for offset in [10, 20_000, 33_500, 50_000, 70_000] {
        guest.write(offset, 700, Durability::OnFlush).unwrap();
    }
    guest.close().unwrap();
    let prepared = Prepared {
        image: disk.written(),
        content: guest.allowed.newest(),
        below: prepared.below,
        taken: prepared.taken,
    };
    let mut cases = 0;
    for (name, request) in REQUESTS {
        for in_backing in [false, true] {
            for call in 1.. {
                let context = format!("{name}, read {call}, in backing: {in_backing}");
                let disk = Arc::new(VolatileDisk::new(prepared.image.clone()));
                let mut guest = prepared.guest(disk, &[], false);
                let below = Arc::new(Faulty::new(guest.backing.take().unwrap(), &[]));
                guest.backing = Some(below.clone());
                guest.open().unwrap();
                let storage = if in_backing { below } else { guest.storage.clone() };
                storage.fail_later(Fault { kind: Kind::Read, call, errno: Errno::EIO, for_ever: true, short: true });
                let outcome = request(guest.image().unwrap());
                let failures = storage.failures();
                let Some(first) = failures.first() else {
                    outcome.unwrap();
                    break;
                };
                match outcome {
                    Err(Error::Io { operation: "read", offset, source }) => {
                        assert_eq!(offset, first.offset, "{context}");
                        assert_eq!(source.raw_os_error(), Some(Errno::EIO as i32), "{context}");
                    }
                    other => panic!("{context}: {other:?}"),
                }
                storage.heal();
                assert_eq!(guest.image().unwrap().poison(), None, "{context}");
                request(guest.image().unwrap()).unwrap();
                guest.image().unwrap().close().unwrap();
                assert!(guest.image().unwrap().check().unwrap().is_clean(), "{context}");
                cases += 1;
            }
        }
    }
    println!("{cases} cases");
    assert!(cases >= 30, "only {cases} cases");
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
                        let prepared = Prepared {
                            image: bytes.clone(),
                            content: vec![0; SIZE],
                            below: Vec::new(),
                            taken: HashSet::new(),
                        };
                        match Image::open_on(disk, Access::ReadOnly, None, 1024) {
                            Err(Error::NotQcow2) => assert!(created.is_err(), "{fault:?}"),
                            // Over a base it is not opened without one.
                            Err(Error::Backing { .. }) if start == Start::OverRaw => {}
                            Err(other) => panic!("{fault:?}: {other}"),
                            Ok(_) => {
                                let guest = prepared.guest(Arc::new(VolatileDisk::default()), &[], false);
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
