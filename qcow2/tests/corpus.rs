//! The corpora of the fuzz targets, and every finding so far, replayed: `fuzz/seeds/` holds the inputs, those of the two
//! targets that take a whole image in one folder.
//!
//! `WRITE_SEEDS=1 cargo test -p blockyard-qcow2 --test corpus` writes the seeds that are generated here; what a fuzzer found
//! is added by hand.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]

#[path = "support/damaged.rs"]
mod damaged;
#[path = "support/fuzzed.rs"]
mod fuzzed;
mod support;

use std::path::{Path, PathBuf};

use damaged::{Bytes, PLAIN, Shape, place, put_refcount, sample};
use support::pattern;

fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target)
}

/// Small images of every shape, sound and not.
fn images() -> Vec<(&'static str, Bytes)> {
    let small = Shape { cluster_bits: 9, ..PLAIN };
    let mut images = vec![
        ("plain", sample(small)),
        ("zstd", sample(Shape { zstd: true, ..small })),
        ("version-2", sample(Shape { version: 2, ..small })),
        ("counts-of-64-bits", sample(Shape { refcount_order: 6, ..small })),
    ];
    let mut damage = |name, change: fn(&mut Bytes)| {
        let mut image = sample(small);
        change(&mut image);
        images.push((name, image));
    };
    damage("dirty", |image| image.put64(72, 1));
    damage("corrupt", |image| image.put64(72, 2));
    damage("leak", |image| put_refcount(image, place::END, 1));
    damage("refcount-too-low", |image| put_refcount(image, place::DATA, 0));
    damage("not-copied", |image| image.put64(place::L2 * 512, place::DATA * 512));
    damage("over-raw", |image| image.name_backing(b"below", b"raw"));
    damage("shared", |image| {
        for index in 0..2 {
            image.put64(place::L2 * 512 + index * 8, place::DATA * 512);
        }
    });
    damage("bitmaps", |image| {
        let at = place::END * 512;
        image.put64(88, 1);
        image.put(112, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24, 0, 0, 0, 1, 0, 0, 0, 0]);
        image.put64(128, 32);
        image.put64(136, at);
        image.put64(at, at + 512);
        image.put(at + 8, &[0, 0, 0, 1, 0, 0, 0, 2, 1, 16, 0, 1, 0, 0, 0, 0, b'b']);
        image.put64(at + 512, at + 1024);
        image.put(at + 1024, &[1; 512]);
        (place::END..place::END + 3).for_each(|cluster| put_refcount(image, cluster, 1));
    });
    damage("snapshot", |image| {
        let at = place::END * 512;
        image.put32(60, 1);
        image.put64(64, at);
        image.put64(at, at + 512);
        image.put(at + 8, &[0, 0, 0, 2, 0, 1, 0, 1]);
        image.put(at + 40, b"1n");
        image.put64(at + 512, place::L2 * 512);
        image.put64(at + 520, (place::L2 + 1) * 512);
        // Everything has two owners, so nothing is COPIED, but what is compressed never was.
        for entry in [place::L1 * 64, place::L1 * 64 + 1].into_iter().chain(place::L2 * 64..(place::L2 + 2) * 64) {
            let top = image.bytes[entry as usize * 8];
            image.put(entry * 8, &[top & 0x7f]);
        }
        (place::L2..place::LAST + 1).for_each(|cluster| put_refcount(image, cluster, 2));
        put_refcount(image, place::COMPRESSED, 4);
        (place::END..place::END + 2).for_each(|cluster| put_refcount(image, cluster, 1));
    });
    images
}

fn write_seeds() {
    for target in ["qcow2_header", "qcow2_image"] {
        std::fs::create_dir_all(seeds(target)).unwrap();
        for (name, image) in images() {
            // The tables have to be inside the file, also where only the header is looked at.
            let kept = if target == "qcow2_header" { 2048 } else { image.bytes.len() };
            std::fs::write(seeds(target).join(name), &image.bytes[..kept]).unwrap();
        }
    }
    std::fs::create_dir_all(seeds("qcow2_ops_vs_model")).unwrap();
    for seed in 0..8 {
        std::fs::write(seeds("qcow2_ops_vs_model").join(format!("random-{seed}")), pattern(seed, 400)).unwrap();
    }
}

fn replay(target: &str, run: fn(&[u8])) {
    let mut count = 0;
    for entry in std::fs::read_dir(seeds(target)).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if std::panic::catch_unwind(|| run(&bytes)).is_err() {
            panic!("{} is a finding", path.display());
        }
        count += 1;
    }
    println!("{target}: {count} inputs");
    assert!(count >= 8, "{target}: only {count} inputs");
}

#[test]
fn every_input_that_a_fuzzer_kept_or_found_is_survived() {
    if std::env::var_os("WRITE_SEEDS").is_some() {
        write_seeds();
    }
    replay("qcow2_header", fuzzed::header);
    replay("qcow2_image", fuzzed::open_and_read);
    replay("qcow2_image", fuzzed::check_and_repair);
    replay("qcow2_ops_vs_model", fuzzed::operations);
}

#[test]
fn the_samples_that_are_meant_to_be_sound_are() {
    use blockyard_qcow2::{check_on, storage::MemoryStorage};
    for (name, image) in images() {
        let report = check_on(&MemoryStorage::with_content(image.bytes, 1 << 30)).unwrap();
        let damaged = ["dirty", "corrupt", "leak", "refcount-too-low", "not-copied", "shared"].contains(&name);
        assert_eq!(report.is_clean(), !damaged, "{name}: {report:?}");
    }
}
