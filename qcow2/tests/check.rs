//! Check and repair, against QEMU's judgement of the same damaged image.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use blockyard_qcow2::{CreateOptions, Durability, Error, check, repair};
use support::{MIB, assert_clean, assert_reads_as, folder, fresh, join, pattern, run, text};

/// A clean image with data, and where its structures are.
struct Sample {
    bytes: Vec<u8>,
    content: Vec<u8>,
    l1: usize,
    l2: usize,
    refcount_table: usize,
    refcount_block: usize,
}

fn sample(path: &Path) -> Sample {
    let size = 4 * MIB;
    let image = fresh(path, &CreateOptions { cluster_size: 4096, ..CreateOptions::new(size) });
    let mut content = vec![0; size as usize];
    for (seed, offset) in [(1, 0), (2, 100_000), (3, 3_000_000)] {
        let data = pattern(seed, 50_000);
        image.write(offset as u64, &data, Durability::OnFlush).unwrap();
        content[offset..offset + data.len()].copy_from_slice(&data);
    }
    image.close().unwrap();
    let bytes = std::fs::read(path).unwrap();
    let number = |at: usize| (u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & !(1 << 63)) as usize;
    let (l1, refcount_table) = (number(40), number(48));
    Sample { l1, l2: number(l1), refcount_table, refcount_block: number(refcount_table), bytes, content }
}

/// Errors and leaks as QEMU counts them.
fn qemu_check(path: &Path) -> (u64, u64) {
    let output = run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(path)]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    (report["corruptions"].as_u64().unwrap_or(0), report["leaks"].as_u64().unwrap_or(0))
}

type Damage = fn(&Sample, &mut Vec<u8>);

fn flip(bytes: &mut [u8], at: usize, mask: u8) {
    bytes[at] ^= mask;
}

#[test]
fn damage_that_the_tables_explain_is_counted_as_qemu_does_and_repaired() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    let cases: [(&str, Damage); 7] = [
        ("a refcount too high", |sample, bytes| flip(bytes, sample.refcount_block + 2 * 5, 1)),
        ("a leaked cluster", |_, bytes| bytes.extend([0; 4096])),
        ("a refcount of zero", |sample, bytes| bytes[sample.refcount_block + 2 * 6 + 1] = 0),
        ("all refcounts zero", |sample, bytes| bytes[sample.refcount_block..sample.refcount_block + 4096].fill(0)),
        ("a data cluster without COPIED", |sample, bytes| flip(bytes, sample.l2, 0x80)),
        ("a table without COPIED", |sample, bytes| flip(bytes, sample.l1, 0x80)),
        ("the dirty bit", |_, bytes| bytes[79] |= 1),
    ];
    for (name, damage) in cases {
        let mut bytes = sample.bytes.clone();
        damage(&sample, &mut bytes);
        if name == "a leaked cluster" {
            let cluster = bytes.len() / 4096 - 1;
            bytes[sample.refcount_block + 2 * cluster + 1] = 1;
        }
        std::fs::write(&path, &bytes).unwrap();
        let report = check(&path).unwrap();
        assert_eq!((report.errors, report.leaks), qemu_check(&path), "{name}: {report:?}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{name}: a check must not change anything");
        let before = repair(&path).unwrap();
        assert_eq!(before, report, "{name}");
        assert_clean(&path);
        assert_reads_as(&path, &sample.content);
    }
}

#[test]
fn damage_that_could_only_be_guessed_at_is_reported_and_left_alone() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    let cases: [(&str, Damage); 4] = [
        ("two owners", |sample, bytes| bytes.copy_within(sample.l2..sample.l2 + 8, sample.l2 + 8)),
        ("data past the end", |sample, bytes| bytes[sample.l2 + 4] = 0x7f),
        ("reserved bits", |sample, bytes| bytes[sample.l2 + 7] |= 2),
        ("a table past the end", |sample, bytes| bytes[sample.l1 + 4] = 0x7f),
    ];
    for (name, damage) in cases {
        let mut bytes = sample.bytes.clone();
        damage(&sample, &mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let report = check(&path).unwrap();
        assert!(report.errors > 0 && !report.details.is_empty(), "{name}: {report:?}");
        assert!(qemu_check(&path).0 > 0, "{name}: QEMU finds it too");
        let refused = repair(&path);
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{name}: {refused:?}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{name}: a refused repair must not change anything");
    }
}

#[test]
fn refcount_structures_that_mean_nothing_are_made_anew() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    for (name, entry) in
        [("misaligned", 0x201), ("past the end", 1 << 40), ("on top of the L1 table", sample.l1 as u64)]
    {
        let mut bytes = sample.bytes.clone();
        bytes[sample.refcount_table..sample.refcount_table + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        assert!(check(&path).unwrap().errors > 0, "{name}");
        repair(&path).unwrap();
        assert_clean(&path);
        assert_reads_as(&path, &sample.content);
    }
}

#[test]
fn a_clean_image_is_not_touched_by_a_repair() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    assert!(repair(&path).unwrap().is_clean());
    assert!(std::fs::read(&path).unwrap() == sample.bytes);
}
