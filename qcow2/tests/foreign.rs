//! QEMU as judge: it reads what we wrote, we read and change what it wrote, and each respects the other's locks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::Write;
use std::process::{Command, Stdio};

use blockyard_qcow2::{Access, CreateOptions, Durability, Error, Image, OpenOptions, ZeroMode};
use support::{
    KIB, MIB, assert_clean, assert_reads_as, folder, fresh, join, open, over, pattern, qemu_create, qemu_io, run,
    succeed, text,
};

const LATER: Durability = Durability::OnFlush;

#[test]
fn images_of_every_cluster_size_and_refcount_width_are_clean() {
    let folder = folder();
    for cluster_bits in 9..=21 {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            let path = join(&folder, "image.qcow2");
            let size = 3 * MIB + 512;
            let options = CreateOptions { cluster_size: 1 << cluster_bits, refcount_bits, ..CreateOptions::new(size) };
            let image = fresh(&path, &options);
            let mut bytes = vec![0; size as usize];
            for (seed, (offset, length)) in [(1, 700_000), (MIB - 3, 5), (size - 1000, 1000)].into_iter().enumerate() {
                let data = pattern(seed as u64, length);
                image.write(offset, &data, LATER).unwrap();
                bytes[offset as usize..offset as usize + length].copy_from_slice(&data);
            }
            image.close().unwrap();
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn an_untouched_image_is_clean_whatever_its_size() {
    let folder = folder();
    for (number, (size, cluster_size)) in
        [(0, 65536), (512, 512), (128 << 30, 512), (64 << 40, 65536), (64 << 40, 16384), (1 << 30, 2 << 20)]
            .into_iter()
            .enumerate()
    {
        let path = join(&folder, &format!("{number}.qcow2"));
        blockyard_qcow2::create(&path, &CreateOptions { cluster_size, ..CreateOptions::new(size) }).unwrap();
        assert_clean(&path);
        let information = succeed("qemu-img", &["info", "--output=json", text(&path)]);
        assert!(information.contains(&format!("\"virtual-size\": {size}")), "{information}");
    }
}

#[test]
fn images_made_by_qemu_are_changed_and_stay_clean() {
    let folder = folder();
    for (number, options) in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
        "preallocation=metadata",
        "preallocation=falloc",
    ]
    .into_iter()
    .enumerate()
    {
        let path = join(&folder, &format!("{number}.qcow2"));
        qemu_create(&path, options, 8 * MIB);
        qemu_io(&path, &["write -q -P 7 100k 300k", "write -q -z 1M 128k", "discard -q 200k 64k"]);
        let mut bytes = vec![0; 8 << 20];
        open(&path, Access::ReadOnly).read(0, &mut bytes).unwrap();
        assert!(bytes[100 << 10..200 << 10].iter().all(|byte| *byte == 7), "{options}");

        let image = open(&path, Access::ReadWrite);
        let data = pattern(number as u64, 500_000);
        image.write(150_001, &data, LATER).unwrap();
        bytes[150_001..650_001].copy_from_slice(&data);
        image.zero(120 * KIB, 40 * KIB, ZeroMode::Unmap, LATER).unwrap();
        bytes[120 << 10..160 << 10].fill(0);
        image.close().unwrap();
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
    }
}

#[test]
fn images_of_every_kind_that_qemu_makes_are_read_right() {
    let folder = folder();
    let size = 6 * MIB + 512;
    let mut bytes = vec![0; size as usize];
    // Data that compresses, data that does not, holes, and a cluster that is only partly used.
    bytes[..300_000].fill(0x41);
    bytes[700_001..1_700_001].copy_from_slice(&pattern(1, 1_000_000));
    bytes[3_000_000..3_500_000].copy_from_slice(&b"compressible text ".repeat(27_778)[..500_000]);
    bytes[size as usize - 777..].copy_from_slice(&pattern(2, 777));
    let raw = join(&folder, "source.raw");
    std::fs::write(&raw, &bytes).unwrap();
    let mut kinds: Vec<(&str, String)> = vec![("", "compat=0.10".into()), ("", "extended_l2=on".into())];
    for cluster_size in ["512", "4k", "64k", "2M"] {
        for compression in ["zlib", "zstd"] {
            kinds.push(("-c", format!("cluster_size={cluster_size},compression_type={compression}")));
        }
        for refcount_bits in ["1", "8", "64"] {
            kinds.push(("", format!("cluster_size={cluster_size},refcount_bits={refcount_bits}")));
        }
    }
    kinds.push(("-c", "extended_l2=on,cluster_size=128k".into()));
    for (compress, options) in kinds {
        let path = join(&folder, "image.qcow2");
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)];
        if !compress.is_empty() {
            arguments.insert(1, compress);
        }
        succeed("qemu-img", &arguments);
        let image = open(&path, Access::ReadOnly);
        let mut found = vec![0xee; size as usize];
        image.read(0, &mut found).unwrap();
        assert!(found == bytes, "{options}");
        for (offset, length) in [(1, 100), (299_990, 20), (700_000, 70_000), (size - 10, 10)] {
            let mut part = vec![0xee; length];
            image.read(offset, &mut part).unwrap();
            assert!(part == bytes[offset as usize..offset as usize + length], "{options}: {length} at {offset}");
        }
        let report = image.check().unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{options}: {report:?}");
    }
}

#[test]
fn subclusters_over_a_backing_file_are_read_one_by_one() {
    let folder = folder();
    let base = join(&folder, "base.qcow2");
    qemu_create(&base, "cluster_size=65536", MIB);
    qemu_io(&base, &["write -q -P 9 0 1M"]);
    let path = join(&folder, "overlay.qcow2");
    let options = "extended_l2=on,backing_file=base.qcow2,backing_fmt=qcow2";
    qemu_create(&path, options, MIB);
    qemu_io(&path, &["write -q -P 1 2k 2k", "write -q -z 10k 4k", "write -q -P 2 70k 100k", "discard -q 256k 64k"]);
    let mut bytes = vec![9; 1 << 20];
    for (from, to, value) in [(2, 4, 1), (10, 14, 0), (70, 170, 2), (256, 320, 0)] {
        bytes[from << 10..to << 10].fill(value);
    }
    let image = open(&path, Access::ReadOnly);
    let mut found = vec![0xee; 1 << 20];
    image.read(0, &mut found).unwrap();
    assert!(found == bytes);
    assert_reads_as(&path, &bytes);
}

#[test]
fn a_compressed_image_is_overwritten_without_harm_to_its_neighbours() {
    let folder = folder();
    let raw = join(&folder, "source.raw");
    let mut bytes = b"0123456789abcdef".repeat(256 * 1024);
    std::fs::write(&raw, &bytes).unwrap();
    for compression in ["zlib", "zstd"] {
        let path = join(&folder, "image.qcow2");
        let options = format!("compression_type={compression}");
        succeed("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)]);
        let image = open(&path, Access::ReadWrite);
        let data = pattern(4, 100_000);
        image.write(100_001, &data, LATER).unwrap();
        bytes[100_001..200_001].copy_from_slice(&data);
        image.zero(MIB, 128 * KIB, ZeroMode::Unmap, LATER).unwrap();
        bytes[1 << 20..(1 << 20) + (128 << 10)].fill(0);
        image.close().unwrap();
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
    }
}

#[test]
fn an_overlay_keeps_what_it_does_not_cover_and_its_base_is_untouched() {
    let folder = folder();
    let base = join(&folder, "base.qcow2");
    qemu_create(&base, "cluster_size=65536", 2 * MIB + 512);
    qemu_io(&base, &["write -q -P 3 0 2097664"]);
    let before = std::fs::read(&base).unwrap();

    let path = join(&folder, "overlay.qcow2");
    let size = 3 * MIB;
    let image = fresh(&path, &over("base.qcow2", size));
    let mut bytes = vec![3; 2 << 20];
    bytes.resize((2 << 20) + 512, 3);
    bytes.resize(size as usize, 0);
    let data = pattern(5, 100_000);
    image.write(30_001, &data, LATER).unwrap();
    bytes[30_001..130_001].copy_from_slice(&data);
    image.zero(MIB, 64 * KIB, ZeroMode::Unmap, LATER).unwrap();
    bytes[1 << 20..(1 << 20) + (64 << 10)].fill(0);
    image.zero(MIB + 100 * KIB, 1000, ZeroMode::Unmap, LATER).unwrap();
    bytes[(1 << 20) + (100 << 10)..(1 << 20) + (100 << 10) + 1000].fill(0);
    image.discard(MIB + 512 * KIB, 64 * KIB, LATER).unwrap();
    bytes[(1 << 20) + (512 << 10)..(1 << 20) + (576 << 10)].fill(0);
    image.close().unwrap();

    assert_clean(&path);
    assert_reads_as(&path, &bytes);
    assert!(std::fs::read(&base).unwrap() == before, "the base was changed");
}

#[test]
fn zeroes_over_untouched_space_take_no_room() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions::new(1 << 40));
    image.zero(0, 1 << 40, ZeroMode::Unmap, LATER).unwrap();
    image.discard(0, 1 << 40, LATER).unwrap();
    image.close().unwrap();
    assert_clean(&path);
    assert_eq!(blockyard_qcow2::check(&path).unwrap().allocated_clusters, 0);
    // Header, L1, refcount table and one block: a cluster each.
    assert!(blockyard_qcow2::info(&path).unwrap().disk_bytes < 512 * KIB);
}

#[test]
fn discarded_space_goes_back_to_the_file_system_at_the_close() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions::new(64 * MIB));
    image.write(0, &pattern(1, 32 << 20), LATER).unwrap();
    image.close().unwrap();
    let full = blockyard_qcow2::info(&path).unwrap().disk_bytes;
    let image = open(&path, Access::ReadWrite);
    image.discard(0, 31 * MIB, LATER).unwrap();
    image.close().unwrap();
    let rest = blockyard_qcow2::info(&path).unwrap().disk_bytes;
    assert!(rest < full / 8, "{full} bytes before, {rest} after");
    assert_clean(&path);
}

#[test]
fn an_image_that_was_not_closed_keeps_what_was_flushed_and_is_repaired_by_qemu_and_by_us() {
    let folder = folder();
    for repair_with_qemu in [true, false] {
        let path = join(&folder, "image.qcow2");
        let image = fresh(&path, &CreateOptions::new(16 * MIB));
        let data = pattern(9, 3_000_000);
        image.write(1_000_001, &data, LATER).unwrap();
        image.flush().unwrap();
        drop(image);

        let check = run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
        assert_eq!(check.status.code(), Some(2), "a plain check of a dirty image finds missing refcounts");
        assert!(blockyard_qcow2::check(&path).unwrap().dirty);
        let mut bytes = vec![0; 16 << 20];
        bytes[1_000_001..4_000_001].copy_from_slice(&data);
        assert_reads_as(&path, &bytes);
        if repair_with_qemu {
            succeed("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(&path)]);
        } else {
            open(&path, Access::ReadWrite).close().unwrap();
        }
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn qemu_is_refused_while_we_hold_an_image_for_writing() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions::new(MIB));
    let refused = run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"), "{refused:?}");
    let second = Image::open(&path, &OpenOptions::new(Access::ReadOnly));
    assert!(matches!(second, Err(Error::Locked { .. })), "{second:?}");
    assert_eq!(blockyard_qcow2::info(&path).unwrap().size, MIB, "the facts of a header need no lock");
    image.close().unwrap();
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
}

#[test]
fn qemu_may_read_but_not_write_what_we_read() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    blockyard_qcow2::create(&path, &CreateOptions::new(MIB)).unwrap();
    let _reader = open(&path, Access::ReadOnly);
    let _second = open(&path, Access::ReadOnly);
    succeed("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512", text(&path)]);
    let refused = run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", text(&path)]);
    assert!(!refused.status.success(), "{refused:?}");
}

#[test]
fn we_are_refused_while_qemu_writes() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    blockyard_qcow2::create(&path, &CreateOptions::new(MIB)).unwrap();
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "qcow2", text(&path)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = qemu.stdin.take().unwrap();
    input.write_all(b"length\n").unwrap();
    input.flush().unwrap();
    // Its answer shows that it has the image open.
    let mut answer = [0; 1];
    std::io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut answer).unwrap();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let refused = Image::open(&path, &OpenOptions::new(access));
        assert!(matches!(refused, Err(Error::Locked { .. })), "{refused:?}");
    }
    drop(input);
    qemu.wait().unwrap();
    open(&path, Access::ReadWrite);
}

#[test]
fn a_check_counts_what_snapshots_own() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    qemu_create(&path, "cluster_size=4096", 4 * MIB);
    for (number, name) in ["first", "second snapshot with a longer name", "3"].into_iter().enumerate() {
        let write = format!("write -q -P {} {}k 300k", number + 1, number * 200);
        qemu_io(&path, &[&write]);
        succeed("qemu-img", &["snapshot", "-c", name, text(&path)]);
    }
    qemu_io(&path, &["write -q -P 9 100k 50k", "discard -q 1M 1M"]);
    assert_clean(&path);
}

#[test]
fn bitmaps_are_retired_before_the_first_write_and_leave_no_leak() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    qemu_create(&path, "cluster_size=65536", 4 * MIB);
    for name in ["nightly", "a second one"] {
        succeed("qemu-img", &["bitmap", "--add", "-f", "qcow2", text(&path), name]);
        qemu_io(&path, &["write -q -P 3 1M 200k"]);
    }
    // As long as nobody writes without knowing them, they own their clusters.
    assert_clean(&path);
    assert!(blockyard_qcow2::repair(&path).unwrap().is_clean());
    assert!(succeed("qemu-img", &["info", "--output=json", text(&path)]).contains("nightly"));
    let image = open(&path, Access::ReadWrite);
    image.write(0, &pattern(1, 1000), LATER).unwrap();
    image.close().unwrap();
    assert_clean(&path);
    let information = succeed("qemu-img", &["info", "--output=json", text(&path)]);
    assert!(!information.contains("nightly"), "{information}");
    // Nor does a reader find them that looks for the extension alone: their clusters are free space by now.
    let header = std::fs::read(&path).unwrap();
    assert!(!header[..65_536].windows(4).any(|kind| kind == 0x2385_2875_u32.to_be_bytes()));
}
