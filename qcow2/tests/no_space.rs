//! A disk that fills up at every possible moment: a request that is refused by a reservation leaves a healthy image,
//! whatever fails later poisons it, and nothing that was flushed is lost. Then the space comes back.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells its figures"
)]
#![allow(dead_code, reason = "what it shares with the tests of single faults can do more than is needed here")]

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

use std::sync::Arc;

use blockyard_qcow2::{Durability, Error, Image};
use deadline::within_deadline;
use quota::Quota;
use volatile_disk::VolatileDisk;
use workloads::{Prepared, WORKLOADS, Workload, prepare};

/// Far more than any workload takes.
const PLENTY: u64 = 1 << 20;

/// What a workload came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// A request was refused, the image is healthy.
    Refused,
    Poisoned,
    /// Before there was an open image.
    NotOpened,
}

fn run(workload: &Workload, prepared: &Prepared, budget: u64, can_reserve: bool) -> End {
    let context = format!("{}, {budget} blocks, can reserve: {can_reserve}", workload.name);
    let disk = Arc::new(VolatileDisk::new(prepared.image.clone()));
    let quota = Arc::new(Quota::new(disk.clone(), prepared.taken.clone(), budget, can_reserve));
    let mut guest = prepared.guest(quota.clone(), &[], false);
    let outcome = (workload.run)(&mut guest);
    let poison = guest.image.as_ref().and_then(Image::poison).map(str::to_owned);
    let end = match (&outcome, &poison) {
        (Ok(()), poison) => {
            assert_eq!(*poison, None, "{context}");
            End::Complete
        }
        (Err(Error::NoSpace { .. }), None) => End::Refused,
        (Err(error), _) => {
            // Payload that was acknowledged and could not be stored cannot be read any more.
            let is_lost = poison.is_some() && matches!(error, Error::Io { operation: "read", .. });
            assert!(error.is_no_space() || is_lost, "{context}: {error}");
            if guest.image.is_none() { End::NotOpened } else { End::Poisoned }
        }
    };
    quota.grant(PLENTY);
    match end {
        End::Refused => {
            // Nothing was lost, and the same life can begin again on the same open image, now that there is room.
            let image = guest.image().unwrap();
            image.flush().unwrap();
            image.write(136 * 512, &[7; 512], Durability::BeforeReply).unwrap();
            image.close().unwrap();
            assert!(image.check().unwrap().is_clean(), "{context}");
        }
        End::Poisoned => guest.assert_poisoned(&context),
        End::Complete | End::NotOpened => {}
    }
    guest.image = None;
    let mut allowed = guest.allowed.clone();
    if end == End::Refused {
        allowed.attempt(136 * 512, &[7; 512]);
    }
    prepared.assert_legal(&guest, &disk.written(), &allowed, &format!("{context}, all written"));
    let content = prepared.assert_legal(&guest, &disk.durable(), &allowed, &format!("{context}, power cut"));
    // With room, the next session has everything it needs.
    let again = Prepared { image: disk.durable(), content, below: prepared.below.clone(), taken: quota.taken() };
    let mut next = again.guest(Arc::new(VolatileDisk::new(again.image.clone())), &[], false);
    (workload.run)(&mut next).unwrap_or_else(|error| panic!("{context}, again: {error}"));
    end
}

#[test]
fn a_disk_that_fills_up_at_any_moment_loses_nothing_that_was_flushed() {
    let mut total = 0;
    for workload in &WORKLOADS {
        let prepared = Arc::new(prepare(workload.start));
        for can_reserve in [true, false] {
            let mut ends = Vec::new();
            for budget in 0.. {
                let prepared = prepared.clone();
                let context = format!("{}, {budget} blocks, can reserve: {can_reserve}", workload.name);
                ends.push(within_deadline(&context, move || run(workload, &prepared, budget, can_reserve)));
                if ends.ends_with(&[End::Complete; 3]) {
                    break;
                }
            }
            let count = |end| ends.iter().filter(|found| **found == end).count();
            let (refused, poisoned) = (count(End::Refused), count(End::Poisoned));
            println!(
                "{}, can reserve: {can_reserve}: {} budgets, {refused} refused, {poisoned} poisoned",
                workload.name,
                ends.len()
            );
            if can_reserve {
                // What is left to poison: tables that lie in holes of the file, refcounts that a repair makes anew.
                assert!(refused > poisoned && poisoned <= 3, "a full disk is found before anything changes");
            } else {
                assert_eq!(refused, 0, "who cannot reserve meets a full disk by writing");
            }
            total += ends.len();
        }
    }
    println!("{total} cases");
    assert!(total >= 500, "only {total} cases");
}
