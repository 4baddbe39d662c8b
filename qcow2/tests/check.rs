//! Check and repair, against QEMU's judgement of the same damaged image.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

mod support;

use std::path::Path;

use blockyard_qcow2::{Access, CreateOptions, Durability, Error, check, repair};
use support::{MIB, assert_clean, assert_reads_as, folder, fresh, join, open, pattern, qemu_check, run, succeed, text};

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

type Damage = fn(&Sample, &mut Vec<u8>);

fn flip(bytes: &mut [u8], at: usize, mask: u8) {
    bytes[at] ^= mask;
}

#[test]
fn damage_that_the_tables_explain_is_counted_as_qemu_does_and_repaired() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    let cases: [(&str, Damage); 8] = [
        ("a refcount too high", |sample, bytes| flip(bytes, sample.refcount_block + 2 * 5, 1)),
        ("a leaked cluster", |_, bytes| bytes.extend([0; 4096])),
        ("a refcount of zero", |sample, bytes| bytes[sample.refcount_block + 2 * 6 + 1] = 0),
        ("all refcounts zero", |sample, bytes| bytes[sample.refcount_block..sample.refcount_block + 4096].fill(0)),
        ("a data cluster without COPIED", |sample, bytes| flip(bytes, sample.l2, 0x80)),
        ("a table without COPIED", |sample, bytes| flip(bytes, sample.l1, 0x80)),
        ("the dirty bit", |_, bytes| bytes[79] |= 1),
        ("the corrupt bit", |_, bytes| bytes[79] |= 2),
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
        assert!(!report.is_clean() && report.corrupt == (name == "the corrupt bit"), "{name}: {report:?}");
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
    // Errors and leaks by our count and by QEMU's; why they differ is told at `CheckReport`.
    let cases: [(&str, Damage, [u64; 2], [u64; 2]); 4] = [
        ("two owners", |sample, bytes| bytes.copy_within(sample.l2..sample.l2 + 8, sample.l2 + 8), [2, 1], [1, 1]),
        ("data past the end", |sample, bytes| bytes[sample.l2 + 4] = 0x7f, [1, 1], [2, 1]),
        ("reserved bits", |sample, bytes| bytes[sample.l2 + 7] |= 2, [1, 1], [1, 0]),
        ("a table past the end", |sample, bytes| bytes[sample.l1 + 4] = 0x7f, [1, 27], [2, 27]),
    ];
    for (name, damage, ours, theirs) in cases {
        let mut bytes = sample.bytes.clone();
        damage(&sample, &mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        let report = check(&path).unwrap();
        assert!(report.errors > 0 && !report.details.is_empty(), "{name}: {report:?}");
        assert_eq!([report.errors, report.leaks], ours, "{name}");
        assert_eq!(<[u64; 2]>::from(qemu_check(&path)), theirs, "{name}");
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

/// What neither QEMU nor we make, but both accept.
#[test]
fn a_cluster_that_two_entries_share_is_copied_before_one_of_them_is_written() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    let mut bytes = sample.bytes.clone();
    let entry = |index: usize| sample.l2 + index * 8..sample.l2 + index * 8 + 8;
    let cluster = |bytes: &[u8], index| u64::from_be_bytes(bytes[entry(index)].try_into().unwrap()) << 1 >> 13;
    let (kept, dropped) = (cluster(&bytes, 0) as usize, cluster(&bytes, 1) as usize);
    bytes[entry(0)].copy_from_slice(&(kept as u64 * 4096).to_be_bytes());
    bytes.copy_within(entry(0), entry(1).start);
    bytes[sample.refcount_block + 2 * kept + 1] = 2;
    bytes[sample.refcount_block + 2 * dropped + 1] = 0;
    std::fs::write(&path, &bytes).unwrap();
    assert_clean(&path);

    let mut content = sample.content.clone();
    content.copy_within(0..4096, 4096);
    content[100..300].fill(7);
    let image = open(&path, Access::ReadWrite);
    image.write(100, &[7; 200], Durability::OnFlush).unwrap();
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &content);
}

#[test]
fn a_clean_image_is_not_touched_by_a_repair() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    assert!(repair(&path).unwrap().is_clean());
    assert!(std::fs::read(&path).unwrap() == sample.bytes);
}

/// The numbers that QEMU's check and ours have in common, by QEMU's names.
fn numbers(path: &Path) -> (Vec<u64>, Vec<u64>) {
    let report = check(path).unwrap();
    let ours = vec![
        report.errors,
        report.leaks,
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        report.image_end,
    ];
    let output = run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(path)]);
    let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let names = [
        "corruptions",
        "leaks",
        "allocated-clusters",
        "total-clusters",
        "compressed-clusters",
        "fragmented-clusters",
        "image-end-offset",
    ];
    (ours, names.map(|name| theirs[name].as_u64().unwrap_or(0)).to_vec())
}

#[test]
fn every_number_is_the_one_that_qemu_counts() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let scattered =
        ["write 5M 300k", "write 0 100k", "write -z 20k 30k", "write 100k 64k", "write 7M 5k", "write 6M 700k"];
    let mut kinds: Vec<String> = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=2M",
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=512",
        "extended_l2=on",
        "preallocation=metadata",
        "preallocation=full,cluster_size=4k",
        "lazy_refcounts=on",
    ]
    .map(str::to_owned)
    .to_vec();
    kinds.push("compression_type=zstd".into());
    let judge = |context: &str| {
        let (ours, theirs) = numbers(&path);
        assert_eq!(ours, theirs, "{context}");
    };
    for kind in &kinds {
        let _ = std::fs::remove_file(&path);
        succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", kind, text(&path), "9M"]);
        judge(kind);
        for (number, write) in scattered.iter().enumerate() {
            succeed("qemu-io", &["-f", "qcow2", "-c", write, text(&path)]);
            if number % 2 == 1 {
                judge(kind);
            }
        }
        // Compressed clusters between others; QEMU makes none over preallocated ones.
        if !kind.contains("preallocation") {
            let clusters = if kind.contains("2M") { "write -c 2M 2M" } else { "write -c 2M 512k" };
            succeed("qemu-io", &["-f", "qcow2", "-c", clusters, text(&path)]);
            judge(&format!("{kind}, compressed"));
        }
        succeed("qemu-io", &["-f", "qcow2", "-c", "discard 5M 100k", "-c", "write -z -u 0 64k", text(&path)]);
        judge(&format!("{kind}, discarded"));
        let is_old = kind.contains("0.10") || kind == "refcount_bits=1" || kind.contains("preallocation");
        if !is_old {
            succeed("qemu-img", &["bitmap", "-f", "qcow2", "--add", text(&path), "bits"]);
            succeed("qemu-io", &["-f", "qcow2", "-c", "write 3M 1M", text(&path)]);
            judge(&format!("{kind}, with a bitmap"));
        }
        if kind != "refcount_bits=1" {
            succeed("qemu-img", &["snapshot", "-c", "one", text(&path)]);
            judge(&format!("{kind}, with a snapshot"));
            succeed("qemu-io", &["-f", "qcow2", "-c", "write 50k 1M", text(&path)]);
            judge(&format!("{kind}, changed after a snapshot"));
        }
    }
    println!("{} kinds of image", kinds.len());
}

#[test]
fn an_image_of_ours_has_the_numbers_that_qemu_counts() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let sample = sample(&path);
    let (ours, theirs) = numbers(&path);
    assert_eq!(ours, theirs);
    // Behind everything else, a cluster that nobody refers to: it is leaked, and the image ends behind it.
    let mut bytes = sample.bytes.clone();
    bytes.extend([0; 3 * 4096]);
    let leaked = bytes.len() / 4096 - 2;
    bytes[sample.refcount_block + 2 * leaked + 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let (ours, theirs) = numbers(&path);
    assert_eq!(ours, theirs);
    assert_eq!((ours[1], ours[6]), (1, bytes.len() as u64 - 4096));
}
