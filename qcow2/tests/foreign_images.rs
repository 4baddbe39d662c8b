//! Images of every kind that QEMU makes, one case each: read byte by byte as QEMU reads them, checked as QEMU checks them,
//! and, where that is allowed, changed by us and still clean. How each respects the other's locks: `foreign.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells its figures"
)]

mod support;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blockyard_qcow2::{Access, Durability, Error, Image, OpenOptions, ZeroMode};
use support::{
    KIB, MIB, assert_clean, assert_reads_as, folder, join, open, pattern, qemu_check, qemu_create, qemu_io, succeed,
    text,
};

const SIZE: u64 = 3 * MIB + 512;

/// What we may do with an image, beyond reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Write,
    /// Refused for writing, by the rules of what this engine maintains.
    ReadOnly,
}

/// Makes one image at a path in a folder of its own.
type Recipe = Box<dyn Fn(&Path)>;

struct Case {
    name: String,
    allowed: Use,
    make: Recipe,
}

fn case(name: impl Into<String>, allowed: Use, make: impl Fn(&Path) + 'static) -> Case {
    Case { name: name.into(), allowed, make: Box::new(make) }
}

fn beside(image: &Path, name: &str) -> PathBuf {
    image.with_file_name(name)
}

/// Data, zeroes of both kinds, and a hole, in every image that begins empty.
fn fill(image: &Path) {
    qemu_io(
        image,
        &[
            "write -q -P 7 100k 300k",
            "write -q -z 1M 256k",
            "write -q -z -u 1500k 128k",
            "write -q -P 9 1530k 1k",
            "discard -q 200k 64k",
            "write -q -P 3 3145728 512",
            "write -q -P 4 2M 66k",
        ],
    );
}

fn create(image: &Path, options: &str) {
    qemu_create(image, options, SIZE);
}

/// Data that compresses, data that does not, holes, and a last cluster that is only partly used.
fn source() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    bytes[..300_000].fill(0x41);
    bytes[700_001..1_200_001].copy_from_slice(&pattern(1, 500_000));
    bytes[1_500_000..2_000_000].copy_from_slice(&b"compressible text ".repeat(27_778)[..500_000]);
    bytes[SIZE as usize - 777..].copy_from_slice(&pattern(2, 777));
    bytes
}

fn convert(image: &Path, more: &[&str], options: &str) {
    let raw = beside(image, "source.raw");
    std::fs::write(&raw, source()).unwrap();
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    arguments.extend(more);
    arguments.extend([text(&raw), text(image)]);
    succeed("qemu-img", &arguments);
}

/// A base of this size in the format, full of data.
fn base(image: &Path, format: &str, size: u64) -> PathBuf {
    let base = beside(image, "base");
    let raw = beside(image, "base.raw");
    std::fs::write(&raw, pattern(5, size as usize)).unwrap();
    succeed("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&base)]);
    base
}

fn overlay(image: &Path, format: &str, base_size: u64, options: &str) {
    base(image, format, base_size);
    create(image, &format!("backing_file=base,backing_fmt={format}{options}"));
    fill(image);
}

/// Writes, flushes, and is killed before it could close the image.
fn kill_writer(image: &Path) {
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "qcow2", text(image)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
    let mut await_prompt = || {
        let mut said = Vec::new();
        while !said.ends_with(b"qemu-io> ") {
            let mut byte = [0];
            output.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
    };
    await_prompt();
    // One by one: it takes one line whenever there is something to read. With the next prompt the command is done.
    for command in ["write -q -P 5 300k 500k\n", "flush\n", "write -q -P 6 2M 100k\n", "flush\n"] {
        input.write_all(command.as_bytes()).unwrap();
        await_prompt();
    }
    qemu.kill().unwrap();
    qemu.wait().unwrap();
}

fn set_dirty_bit(image: &Path) {
    let mut bytes = std::fs::read(image).unwrap();
    bytes[79] |= 1;
    std::fs::write(image, bytes).unwrap();
}

fn every_case() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut created = |options: String, allowed| {
        cases.push(case(options.clone(), allowed, move |image| {
            create(image, &options);
            fill(image);
        }));
    };
    for cluster in ["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1M", "2M"] {
        created(format!("cluster_size={cluster}"), Use::Write);
    }
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        created(format!("refcount_bits={bits},cluster_size=4k"), Use::Write);
    }
    created("compat=0.10".into(), Use::ReadOnly);
    created("compat=0.10,cluster_size=512".into(), Use::ReadOnly);
    created("compat=1.1".into(), Use::Write);
    created("lazy_refcounts=on".into(), Use::Write);
    for preallocation in ["off", "metadata", "falloc", "full"] {
        created(format!("preallocation={preallocation}"), Use::Write);
        created(format!("preallocation={preallocation},cluster_size=1k"), Use::Write);
    }
    for cluster in ["16k", "64k", "2M"] {
        created(format!("extended_l2=on,cluster_size={cluster}"), Use::ReadOnly);
    }
    created("extended_l2=on,preallocation=metadata".into(), Use::ReadOnly);

    let mut converted = |more: &'static [&'static str], options: String, allowed| {
        let name = format!("convert {more:?} {options}");
        cases.push(case(name, allowed, move |image| convert(image, more, &options)));
    };
    for cluster in ["512", "4k", "64k", "2M"] {
        for compression in ["zlib", "zstd"] {
            converted(&["-c"], format!("cluster_size={cluster},compression_type={compression}"), Use::Write);
        }
    }
    converted(&["-c"], "compat=0.10".into(), Use::ReadOnly);
    converted(&["-c"], "extended_l2=on,cluster_size=128k".into(), Use::ReadOnly);
    converted(&["-c"], "refcount_bits=1".into(), Use::Write);
    converted(&["-S", "0"], "cluster_size=64k".into(), Use::Write);
    converted(&[], "compression_type=zstd".into(), Use::Write);
    converted(&["-W", "-m", "4"], "preallocation=metadata".into(), Use::Write);

    for (format, base_size) in
        [("qcow2", SIZE), ("qcow2", MIB), ("qcow2", SIZE + MIB), ("raw", SIZE), ("raw", MIB + 512), ("raw", SIZE + MIB)]
    {
        for (options, allowed) in [("", Use::Write), (",extended_l2=on", Use::ReadOnly)] {
            let name = format!("over {base_size} bytes of {format}{options}");
            cases.push(case(name, allowed, move |image| overlay(image, format, base_size, options)));
        }
    }
    cases.push(case("convert -B", Use::Write, |image| {
        base(image, "qcow2", SIZE);
        let changed = beside(image, "changed.raw");
        let mut bytes = pattern(5, SIZE as usize);
        bytes[400_000..500_000].fill(1);
        bytes[MIB as usize..2 * MIB as usize].fill(0);
        std::fs::write(&changed, bytes).unwrap();
        // It looks the base up in its working directory.
        let output = Command::new("qemu-img")
            .current_dir(image.parent().unwrap())
            .args(["convert", "-f", "raw", "-O", "qcow2", "-B", "base", "-F", "qcow2", text(&changed), text(image)])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }));
    cases.push(case("a chain of three", Use::Write, |image| {
        base(image, "qcow2", MIB);
        let middle = beside(image, "middle");
        create(&middle, "backing_file=base,backing_fmt=qcow2,cluster_size=4k");
        fill(&middle);
        create(image, "backing_file=middle,backing_fmt=qcow2,cluster_size=128k");
        qemu_io(image, &["write -q -P 1 50k 100k", "write -q -z 300k 10k", "discard -q 2M 256k"]);
    }));
    cases.push(case("bitmaps", Use::Write, |image| {
        create(image, "cluster_size=64k");
        for (name, granularity) in [("nightly", "65536"), ("a fine one", "4096")] {
            succeed("qemu-img", &["bitmap", "--add", "-g", granularity, "-f", "qcow2", text(image), name]);
        }
        fill(image);
    }));
    cases.push(case("a bitmap that is switched off", Use::Write, |image| {
        create(image, "cluster_size=4k");
        succeed("qemu-img", &["bitmap", "--add", "--disable", "-f", "qcow2", text(image), "idle"]);
        fill(image);
    }));
    cases.push(case("internal snapshots", Use::ReadOnly, |image| {
        create(image, "cluster_size=4k");
        fill(image);
        succeed("qemu-img", &["snapshot", "-c", "first", text(image)]);
        qemu_io(image, &["write -q -P 8 150k 300k", "discard -q 1M 1M"]);
        succeed("qemu-img", &["snapshot", "-c", "second", text(image)]);
        qemu_io(image, &["write -q -P 2 0 64k"]);
    }));
    cases.push(case("a snapshot gone back to", Use::ReadOnly, |image| {
        create(image, "cluster_size=64k");
        fill(image);
        succeed("qemu-img", &["snapshot", "-c", "before", text(image)]);
        qemu_io(image, &["write -q -P 8 0 2M"]);
        succeed("qemu-img", &["snapshot", "-a", "before", text(image)]);
    }));
    cases.push(case("a snapshot taken away", Use::Write, |image| {
        create(image, "cluster_size=64k");
        succeed("qemu-img", &["snapshot", "-c", "gone", text(image)]);
        fill(image);
        succeed("qemu-img", &["snapshot", "-d", "gone", text(image)]);
    }));
    cases.push(case("resized", Use::Write, |image| {
        succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(image), "1M"]);
        qemu_io(image, &["write -q -P 5 1000k 24k"]);
        succeed("qemu-img", &["resize", "-q", "-f", "qcow2", text(image), &SIZE.to_string()]);
        fill(image);
    }));
    cases.push(case("a killed writer with lazy refcounts", Use::Write, |image| {
        create(image, "lazy_refcounts=on,cluster_size=4k");
        fill(image);
        kill_writer(image);
    }));
    cases.push(case("a killed writer", Use::Write, |image| {
        create(image, "cluster_size=64k");
        kill_writer(image);
    }));
    cases.push(case("the dirty bit set", Use::Write, |image| {
        create(image, "cluster_size=64k");
        fill(image);
        set_dirty_bit(image);
    }));
    cases
}

/// The disk as QEMU reads it.
fn qemu_view(image: &Path) -> Vec<u8> {
    let raw = beside(image, "view.raw");
    succeed("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)]);
    std::fs::read(raw).unwrap()
}

fn judge(case: &Case) {
    let name = &case.name;
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    (case.make)(&path);
    let before = std::fs::read(&path).unwrap();
    let mut view = qemu_view(&path);
    assert_eq!(view.len() as u64, SIZE, "{name}");

    let image = open(&path, Access::ReadOnly);
    let mut found = vec![0xee; SIZE as usize];
    image.read(0, &mut found).unwrap();
    let wrong = found.iter().zip(&view).position(|(ours, theirs)| ours != theirs);
    assert_eq!(wrong, None, "{name}: first byte that is read otherwise");
    for (offset, length) in [(1, 100), (99 * KIB, 2000), (700_000, 70_000), (MIB - 3, 7), (SIZE - 600, 600)] {
        let mut part = vec![0xee; length];
        image.read(offset, &mut part).unwrap();
        assert!(part == view[offset as usize..offset as usize + length], "{name}: {length} at {offset}");
    }
    let report = image.check().unwrap();
    drop(image);
    assert_eq!((report.errors, report.leaks), qemu_check(&path), "{name}: {report:?}");
    assert!(std::fs::read(&path).unwrap() == before, "{name}: reading changed the image");

    let for_writing = Image::open(&path, &OpenOptions::new(Access::ReadWrite));
    if case.allowed == Use::ReadOnly {
        assert!(matches!(for_writing, Err(Error::Unsupported { .. })), "{name}: {for_writing:?}");
        assert!(std::fs::read(&path).unwrap() == before, "{name}: a refusal changed the image");
        return;
    }
    let image = for_writing.unwrap();
    let data = pattern(6, 500_000);
    image.write(150_001, &data, Durability::OnFlush).unwrap();
    view[150_001..650_001].copy_from_slice(&data);
    image.zero(120 * KIB, 40 * KIB, ZeroMode::Unmap, Durability::OnFlush).unwrap();
    view[120 << 10..160 << 10].fill(0);
    image.zero(MIB, 300 * KIB, ZeroMode::Keep, Durability::BeforeReply).unwrap();
    view[1 << 20..(1 << 20) + (300 << 10)].fill(0);
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &view);
}

#[test]
fn images_made_by_qemu_are_read_and_checked_as_qemu_does_and_stay_clean_when_we_change_them() {
    let cases = every_case();
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let cases = every_case();
                while let Some(case) = cases.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    judge(case);
                }
            });
        }
    });
    println!("{} kinds of images", cases.len());
    assert!(cases.len() >= 40);
}
