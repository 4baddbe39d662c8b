//! Comparing disks, with `qemu-img compare` as judge.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    reason = "a test fails by panicking and tells its figures"
)]

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockyard_qcow2::storage::FileStorage;
use blockyard_qcow2::{
    Access, BackingFormat, Comparison, CreateOptions, Difference, Disk, Durability, Error, Image, OpenOptions,
    Progress, Result, compare,
};
use faulty::{Fault, Faulty, Kind};
use nix::errno::Errno;
use support::{KIB, MIB, folder, fresh, join, over, pattern, run, succeed, text};

const LATER: Durability = Durability::OnFlush;

fn disk(path: &Path) -> Disk {
    let raw = path.extension().is_some_and(|extension| extension == "raw");
    let format = if raw { BackingFormat::Raw } else { BackingFormat::Qcow2 };
    Disk::open(path, format, &OpenOptions::new(Access::ReadOnly)).unwrap()
}

fn on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn compared(first: &Path, second: &Path) -> Comparison {
    compare(&disk(first), &disk(second), &mut on).unwrap()
}

/// Both ways round: equal or not as QEMU says, and where; returns the difference.
fn judged(first: &Path, second: &Path) -> Option<Difference> {
    let format = |path: &Path| if path.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
    let verdict = |first: &Path, second: &Path| {
        let formats = ["compare", "-f", format(first), "-F", format(second), text(first), text(second)];
        let output = run("qemu-img", &formats);
        let found = compared(first, second).difference;
        assert_eq!(output.status.code(), Some(i32::from(found.is_some())), "{output:?} {found:?}");
        if let Some(difference) = found {
            // QEMU names the sector, or, past the end of the shorter disk, the first of several.
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let at: u64 = said.split("at offset ").nth(1).unwrap().trim_end().trim_end_matches('!').parse().unwrap();
            assert_eq!(at / 512, difference.offset / 512, "{said}");
        }
        found
    };
    let (there, back) = (verdict(first, second), verdict(second, first));
    assert_eq!(there.map(|d| (d.offset, d.first, d.second)), back.map(|d| (d.offset, d.second, d.first)));
    there
}

fn raw(folder: &tempfile::TempDir, name: &str, length: u64, parts: &[(u64, Vec<u8>)]) -> PathBuf {
    use std::os::unix::fs::FileExt;
    let path = join(folder, name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(length).unwrap();
    parts.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).unwrap());
    path
}

#[test]
fn the_same_bytes_are_equal_however_they_are_stored() {
    let folder = folder();
    let (one, two) = (pattern(1, 300_000), pattern(2, 70_000));
    let flat = raw(&folder, "flat.raw", 5 * MIB, &[(1000, one.clone()), (3 * MIB + 7, two.clone())]);
    let base =
        fresh(&join(&folder, "base.qcow2"), &CreateOptions { cluster_size: 4096, ..CreateOptions::new(5 * MIB) });
    base.write(1000, &one, LATER).unwrap();
    base.write(2 * MIB, &two, LATER).unwrap();
    base.close().unwrap();
    drop(base);
    let overlay = join(&folder, "overlay.qcow2");
    let top = fresh(&overlay, &over("base.qcow2", 5 * MIB));
    top.discard(2 * MIB, MIB, LATER).unwrap();
    top.write(3 * MIB + 7, &two, LATER).unwrap();
    // Zeroes that are data.
    top.write(4 * MIB, &vec![0; 200_000], LATER).unwrap();
    top.close().unwrap();
    drop(top);
    let compressed = join(&folder, "compressed.qcow2");
    succeed("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", text(&flat), text(&compressed)]);
    for other in [&overlay, &compressed, &flat] {
        assert_eq!(judged(&flat, other), None, "{other:?}");
    }
    assert_eq!(compared(&flat, &overlay).sizes, (5 * MIB, 5 * MIB));
}

#[test]
fn the_first_byte_that_differs_is_named_with_both_values() {
    let folder = folder();
    let data = pattern(3, 2 << 20);
    let first = raw(&folder, "first.raw", 3 * MIB + 512, &[(512 * KIB, data.clone())]);
    let places = [0, 1, 511, 512 * KIB, MIB - 1, MIB, 2 * MIB + 4095, 2 * MIB + 4096, 3 * MIB + 511];
    for place in places {
        let second = join(&folder, "second.qcow2");
        succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&first), text(&second)]);
        let before = if (512 * KIB..512 * KIB + data.len() as u64).contains(&place) {
            data[(place - 512 * KIB) as usize]
        } else {
            0
        };
        let image = support::open(&second, Access::ReadWrite);
        image.write(place, &[before ^ 0xff], LATER).unwrap();
        // A later difference is not the first one.
        image.write(3 * MIB + 511, &[7], LATER).unwrap();
        image.close().unwrap();
        drop(image);
        let expected = match place == 3 * MIB + 511 {
            true => Difference { offset: place, first: Some(0), second: Some(7) },
            false => Difference { offset: place, first: Some(before), second: Some(before ^ 0xff) },
        };
        assert_eq!(judged(&first, &second), Some(expected));
    }
    println!("{} places", places.len());
}

#[test]
fn what_a_longer_disk_has_more_must_be_zeroes() {
    let folder = folder();
    let short = raw(&folder, "short.raw", MIB + 512, &[(0, pattern(4, 1000))]);
    let long = raw(&folder, "long.raw", 4 * MIB, &[(0, pattern(4, 1000)), (3 * MIB, vec![0; 10_000])]);
    assert_eq!(judged(&short, &long), None);
    let longer = raw(&folder, "longer.raw", 4 * MIB, &[(0, pattern(4, 1000)), (2 * MIB + 100, vec![9])]);
    assert_eq!(judged(&short, &longer), Some(Difference { offset: 2 * MIB + 100, first: None, second: Some(9) }));
    // A byte behind the end of the short one, in the piece that it ends in.
    let near = raw(&folder, "near.raw", 4 * MIB, &[(0, pattern(4, 1000)), (MIB + 600, vec![5])]);
    assert_eq!(judged(&short, &near), Some(Difference { offset: MIB + 600, first: None, second: Some(5) }));
    let nothing = raw(&folder, "nothing.raw", 0, &[]);
    assert_eq!(judged(&nothing, &raw(&folder, "zeroes.raw", MIB, &[])), None);
    assert_eq!(judged(&nothing, &nothing), None);
}

#[test]
fn holes_of_many_tebibytes_cost_nothing() {
    let folder = folder();
    let sizes = 60_u64 << 40;
    let paths = ["one.qcow2", "two.qcow2"].map(|name| join(&folder, name));
    for path in &paths {
        let image = fresh(path, &CreateOptions::new(sizes));
        image.write(sizes - 1000, &pattern(5, 1000), LATER).unwrap();
        image.close().unwrap();
    }
    assert_eq!(compared(&paths[0], &paths[1]).difference, None);
}

#[test]
fn a_break_ends_a_comparison_wherever_it_comes() {
    let folder = folder();
    let path = raw(&folder, "disk.raw", 5 * MIB, &[(0, pattern(6, 5 << 20))]);
    let mut told = Vec::new();
    let complete = compare(&disk(&path), &disk(&path), &mut |progress| {
        told.push(progress);
        ControlFlow::Continue(())
    });
    assert_eq!(complete.unwrap().difference, None);
    assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
    assert_eq!(told.last(), Some(&Progress { done: 5 * MIB, total: 5 * MIB }));
    assert_eq!(told.len(), 6);
    for stop in 0..told.len() {
        let mut calls = 0;
        let ended = compare(&disk(&path), &disk(&path), &mut |_| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(ended, Err(Error::Cancelled)), "{stop}: {ended:?}");
        assert_eq!(calls, stop + 1);
    }
}

#[test]
fn a_read_that_fails_is_an_error_that_names_the_range_and_never_a_difference() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions { cluster_size: 4096, ..CreateOptions::new(8 * MIB) });
    for (seed, offset) in [(7, 0), (8, 3 * MIB), (9, 7 * MIB)] {
        image.write(offset, &pattern(seed, 600_000), LATER).unwrap();
    }
    image.close().unwrap();
    drop(image);
    let flat = raw(
        &folder,
        "flat.raw",
        8 * MIB,
        &[(0, pattern(7, 600_000)), (3 * MIB, pattern(8, 600_000)), (7 * MIB, pattern(9, 600_000))],
    );
    let mut cases = 0;
    for call in 1.. {
        let file = Arc::new(FileStorage::new(std::fs::File::open(&path).unwrap()));
        let fault = Fault { kind: Kind::Read, call, errno: Errno::EIO, for_ever: false, short: false };
        let storage = Arc::new(Faulty::new(file, &[fault]));
        let result: Result<Comparison> = Image::open_on(storage.clone(), Access::ReadOnly, None, 1 << 20)
            .and_then(|image| compare(&image.into(), &disk(&flat), &mut on));
        if storage.failures().is_empty() {
            assert_eq!(result.unwrap().difference, None);
            break;
        }
        // The first three reads are header and L1 table, by the opening.
        let named = matches!(&result, Err(Error::Unreadable { offset, length, .. })
            if *length > 0 && offset + length <= 8 * MIB);
        assert!(named || (call <= 3 && matches!(result, Err(Error::Io { .. }))), "read {call}: {result:?}");
        cases += 1;
    }
    println!("{cases} reads failed");
    assert!(cases > 8);
}
