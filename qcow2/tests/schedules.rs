//! Small races under many schedules: few threads meet on one cluster, one table, one flush, or the close. Whatever the order,
//! reads fit the history, a crash at any moment leaves what it may, and the image closes clean.
//!
//! `SCALE` multiplies the number of schedules, `SEED` repeats one batch. Built only with the feature `shuttle`.
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

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockyard_qcow2::{Access, Durability, Image, ZeroMode};
use explore::explore;
use guest::{Guest, Shape};
use sim_disk::{Clock, SimDisk};

const LATER: Durability = Durability::OnFlush;
const NOW: Durability = Durability::BeforeReply;
/// Schedules of each race.
const SCHEDULES: usize = 1500;

/// Two clusters of eight sectors, all of them backed.
const OVERLAY: Shape = Shape { cluster: 4096, sectors: 16, below: 16, is_reopened: false, spots: &[0] };
/// The same without backing, the first half written before.
const WRITTEN: Shape = Shape { cluster: 4096, sectors: 16, below: 0, is_reopened: true, spots: &[0, 4] };
/// Six tables, of which four fit in memory.
const TABLES: Shape = Shape { cluster: 512, sectors: 6 * 64, below: 0, is_reopened: false, spots: &[0] };

type Thread = fn(&Guest);

/// Runs threads against each other under many schedules, closes, and judges.
fn race(name: &str, shape: &'static Shape, threads: &'static [Thread]) {
    let outcome = explore(SCHEDULES * support::scale() as usize, move |seed| {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let guest = Guest::new(shape, &clock, &shape.first_content(&clock), 1, 1 + seed as usize % 4)?;
        let running: Vec<_> = threads
            .iter()
            .map(|thread| {
                let guest = guest.clone();
                shuttle::thread::spawn(move || thread(&guest))
            })
            .collect();
        running.into_iter().for_each(|thread| thread.join().unwrap());
        guest.read(0, shape.sectors);
        guest.close()?;
        Ok(guest.judge()?.0)
    });
    println!("{name}: {} schedules, {} crash points, {:?}", outcome.schedules, outcome.counted, outcome.fault);
    assert_eq!(outcome.fault, None, "{name}: repeat with SEED=<the number>");
    assert!(std::env::var("SEED").is_ok() || outcome.schedules >= SCHEDULES, "{name}: {outcome:?}");
}

#[test]
fn two_first_writers_of_one_cluster_both_keep_their_bytes() {
    race(
        "two first writers",
        &OVERLAY,
        &[
            |guest| {
                guest.write(1, 2, LATER);
                guest.write(2, 1, LATER);
            },
            |guest| {
                guest.write(3, 2, LATER);
                guest.flush();
            },
            |guest| {
                guest.read(0, 8);
                guest.write(6, 4, LATER);
            },
        ],
    );
}

#[test]
fn a_partial_write_beside_a_zero_of_the_same_cluster_is_never_lost() {
    race(
        "partial write against zero",
        &OVERLAY,
        &[
            |guest| {
                guest.write(1, 2, LATER);
                guest.write(2, 2, LATER);
            },
            |guest| {
                guest.zero(3, 13, ZeroMode::Unmap, LATER);
                guest.zero(0, 8, ZeroMode::Keep, LATER);
                guest.flush();
            },
            |guest| {
                guest.write(5, 1, NOW);
            },
        ],
    );
}

#[test]
fn two_partial_zeroes_of_one_cluster_are_both_kept() {
    race(
        "two partial zeroes",
        &OVERLAY,
        &[
            |guest| {
                guest.zero(1, 2, ZeroMode::Unmap, LATER);
            },
            |guest| {
                guest.zero(4, 2, ZeroMode::Keep, LATER);
            },
        ],
    );
}

#[test]
fn a_flush_of_one_thread_covers_what_was_answered_on_another() {
    race(
        "flush epochs",
        &WRITTEN,
        &[
            |guest| {
                guest.write(0, 3, LATER);
                guest.write(9, 1, LATER);
                guest.flush();
            },
            |guest| {
                guest.flush();
                guest.write(2, 1, NOW);
                guest.flush();
            },
            |guest| {
                guest.write(12, 2, LATER);
                guest.flush();
                guest.write(12, 1, LATER);
            },
        ],
    );
}

#[test]
fn a_discard_beside_an_overwrite_leaves_one_or_the_other() {
    race(
        "discard against overwrite",
        &WRITTEN,
        &[
            |guest| {
                guest.write(0, 8, LATER);
                guest.write(1, 1, NOW);
            },
            |guest| {
                guest.discard(0, 16, LATER);
                guest.flush();
            },
            |guest| {
                guest.read(0, 8);
                guest.discard(0, 8, NOW);
                guest.read(0, 8);
            },
        ],
    );
}

#[test]
fn a_table_that_leaves_memory_beside_a_flush_is_never_an_old_one() {
    fn touch(guest: &Guest, tables: [usize; 6]) {
        for table in tables {
            guest.write(table * 64 + 3, 1, LATER);
            guest.read(table * 64 + 3, 1);
        }
    }
    race(
        "eviction against flush",
        &TABLES,
        &[
            |guest| touch(guest, [0, 1, 2, 3, 4, 5]),
            |guest| touch(guest, [5, 3, 1, 0, 2, 4]),
            |guest| {
                guest.flush();
                guest.zero(3, 130, ZeroMode::Unmap, LATER);
                guest.flush();
            },
        ],
    );
}

#[test]
fn a_request_that_comes_late_is_done_before_the_close_or_refused() {
    race(
        "close against late requests",
        &OVERLAY,
        &[
            |guest| {
                // Each stops when it is refused.
                let one =
                    || guest.write(1, 9, LATER) && guest.zero(4, 2, ZeroMode::Keep, LATER) && guest.write(8, 1, NOW);
                let _ = (0..3).all(|_| one());
            },
            |guest| {
                let _ = (0..3).all(|_| guest.read(0, 16) && guest.flush());
            },
            |guest| {
                guest.write(0, 1, LATER);
                guest.close().unwrap();
            },
        ],
    );
}

#[test]
fn nothing_is_written_any_more_when_the_locks_are_given_up() {
    let scale = std::env::var("SCALE").map_or(1, |scale| scale.parse().unwrap());
    let outcome = explore(SCHEDULES * scale, |seed| {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let mut disk = SimDisk::new(clock.clone(), WRITTEN.first_content(&clock));
        // The first one makes the dirty bit durable.
        (disk.failing_sync, disk.slowness, disk.has_queue) = (Some(1), 1 + seed as usize % 4, seed % 8 < 4);
        let disk = Arc::new(disk);
        let image = Arc::new(Image::open_on(disk.clone(), Access::ReadWrite, None, 0).unwrap());
        image.write(0, &[1; 512], LATER).unwrap();
        let flusher = image.clone();
        let flush = shuttle::thread::spawn(move || flusher.flush().is_err());
        // Until it is refused; the last ones accepted are still on their way.
        let _ = (1..16).all(|write| image.write(write % 4 * 1024, &[1; 512], LATER).is_ok());
        let has_failed = flush.join().unwrap();
        assert!(has_failed && image.close().is_err());
        drop(image);
        match disk.late_changes() {
            0 => Ok(1),
            late => Err(format!("{late} writes after the unlocking")),
        }
    });
    println!("given up: {} schedules, {:?}", outcome.schedules, outcome.fault);
    assert_eq!(outcome.fault, None, "repeat with SEED=<the number>");
}

#[test]
fn bytes_of_one_sector_written_by_two_threads_are_both_kept() {
    let outcome = explore(SCHEDULES * support::scale() as usize, |_| {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let guest = Guest::new(&OVERLAY, &clock, &OVERLAY.first_content(&clock), 1, 1)?;
        let running: Vec<_> = (1..=3u64)
            .map(|thread| {
                let guest = guest.clone();
                shuttle::thread::spawn(move || {
                    let bytes = [thread as u8; 200];
                    guest.image.write(1000 + thread * 200, &bytes[..100], LATER).unwrap();
                    guest
                        .image
                        .write(1100 + thread * 200, &bytes[..100], if thread == 2 { NOW } else { LATER })
                        .unwrap();
                })
            })
            .collect();
        running.into_iter().for_each(|thread| thread.join().unwrap());
        guest.close()?;
        // Through a new session, from the file.
        let again = Guest::new(&OVERLAY, &clock, &guest.content(), 100, 1)?;
        let mut bytes = [0; 600];
        again.image.read(1200, &mut bytes).unwrap();
        let expected = [[1; 200], [2; 200], [3; 200]].concat();
        if bytes[..] == expected[..] { Ok(1) } else { Err(format!("read back as {bytes:?}")) }
    });
    println!("bytes of one sector: {} schedules, {:?}", outcome.schedules, outcome.fault);
    assert_eq!(outcome.fault, None, "repeat with SEED=<the number>");
}
