//! Images that are small on disk and claim, or refer to, far more than they hold; and chains of images.

#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, clippy::precedence, reason = "a test fails by panicking; offsets are cluster times size")]

use std::path::Path;

use super::damaged::{Bytes, COPIED, PLAIN, Shape, content, place, sample};
use super::damages::Cases;

const WIDE: Shape = Shape { cluster_bits: 16, ..PLAIN };
const NARROW: Shape = Shape { cluster_bits: 9, refcount_order: 6, ..PLAIN };
const HUGE: Shape = Shape { cluster_bits: 21, ..PLAIN };

/// Files of these are not compared byte by byte, and no foreign tool judges them: it would need minutes.
pub fn bombs(cases: &mut Cases) {
    cases.add("bomb: an L1 table of 32 MiB, all holes", WIDE, |image| move_l1(image, 1 << 22, Vec::new()));
    cases.add("bomb: an L1 table of 32 MiB, every entry the same table", WIDE, |image| {
        move_l1(image, 1 << 22, numbers(1 << 22, |_| COPIED | place::L2 << 16));
    });
    cases.add("bomb: 131072 tables, each in a hole of its own", WIDE, |image| {
        move_l1(image, 1 << 17, numbers(1 << 17, |index| COPIED | (1024 + index) << 16));
        image.length = (1024 + (1 << 17)) << 16;
    });
    cases.add("bomb: a refcount table of 8 MiB, every entry the same block", WIDE, |image| {
        let at = image.length.next_multiple_of(1 << 16);
        image.put64(48, at);
        image.put32(56, 128);
        image.put(at, &numbers(1 << 20, |_| place::REFCOUNT_BLOCK << 16));
    });
    cases.add("bomb: a refcount table of 8 MiB, every block a hole of its own", HUGE, |image| {
        let at = image.length.next_multiple_of(1 << 21);
        image.put64(48, at);
        image.put32(56, 4);
        image.put(at, &numbers(1 << 18, |index| (64 + index) << 21));
        image.length = (64 + (1 << 18)) << 21;
    });
    cases.add("bomb: 65536 snapshots in a hole", WIDE, |image| snapshots(image, 65_536, &[]));
    cases.add("bomb: 65536 snapshots, all with the same L1 table of 32 MiB", WIDE, |image| {
        let entry = [&(64u64 << 16).to_be_bytes()[..], &(1u32 << 22).to_be_bytes(), &[0; 28]].concat();
        snapshots(image, 65_536, &entry.repeat(65_536));
    });
    cases.add("bomb: 1000 snapshots, all with the active L1 table", WIDE, |image| {
        let entry = [&(place::L1 << 16).to_be_bytes()[..], &2u32.to_be_bytes(), &[0; 28]].concat();
        snapshots(image, 1000, &entry.repeat(1000));
    });
    for chunks in [60_000, 70_016] {
        cases.add(format!("bomb: references strewn over {chunks} chunks of a huge file"), NARROW, |image| {
            let tables = chunks / 64;
            let first = image.length.next_multiple_of(512);
            move_l1(image, tables, numbers(tables, |index| COPIED | (first + 1 + 512 * index).next_multiple_of(512)));
            let at = first.next_multiple_of(512);
            image.put(at, &numbers(tables * 64, |index| COPIED | ((1 << 20) + (index << 12) + 5) << 9));
            move_l1(image, tables, numbers(tables, |index| COPIED | (at + 512 * index)));
            image.length = ((1 << 20) + (chunks << 12)) << 9;
        });
    }
    cases.add("bomb: a file whose refcounts would not fit into a table of 8 MiB", NARROW, |image| {
        image.length = (16 << 40) - 4096;
    });
    for (name, count, bytes, tables) in
        [("a directory of 64 MiB in a hole", 65_535, 65_535 * 1024, 0), ("a table of a GiB", 1, 24, 0x0800_0000)]
    {
        cases.add(format!("bomb: bitmaps, {name}"), WIDE, |image| {
            image.put64(88, 1);
            image.put32(112, 0x2385_2875);
            image.put32(116, 24);
            image.put32(120, count);
            image.put64(128, bytes);
            image.put64(136, 64 << 16);
            image.put64(64 << 16, 128 << 16);
            image.put32((64 << 16) + 8, tables);
            image.length = 8 << 30;
        });
    }
    cases.add("bomb: millions of subclusters, every other one zero", Shape { extended: true, ..HUGE }, |image| {
        let pair =
            |index: u64| if index.is_multiple_of(2) { COPIED | place::DATA << 21 } else { 0xaaaa_aaaa_5555_5555 };
        image.put(place::L2 << 21, &numbers(1 << 18, pair));
    });
    cases.add("bomb: 100 tables of 2 MiB in holes", HUGE, |image| {
        move_l1(image, 100, numbers(100, |index| COPIED | (64 + index) << 21));
        image.length = 164 << 21;
    });
}

fn numbers(count: u64, number: impl Fn(u64) -> u64) -> Vec<u8> {
    (0..count).flat_map(|index| number(index).to_be_bytes()).collect()
}

/// Puts an L1 table behind the file, with a virtual size that needs all of it.
fn move_l1(image: &mut Bytes, entries: u64, table: Vec<u8>) {
    let (cluster, bits) = (image.cluster(), u64::from(image.shape.cluster_bits));
    let at = image.length.next_multiple_of(cluster);
    image.put64(24, entries << (2 * bits - 3));
    image.put32(36, entries as u32);
    image.put64(40, at);
    image.length = at + (entries * 8).next_multiple_of(cluster);
    image.pieces.push((at, table));
}

fn snapshots(image: &mut Bytes, count: u32, table: &[u8]) {
    image.put32(60, count);
    image.put64(64, 32 << 16);
    image.pieces.push((32 << 16, table.to_vec()));
    image.length = 1024 << 16;
}

/// Chains in `folder`, whose upper image is to be called `top`; the last word says whether it can be opened.
pub const CHAINS: [(&str, &str, bool); 18] = [
    ("chain: over a raw file", "base.raw", true),
    ("chain: over a raw file that begins with the magic", "magic.raw", true),
    ("chain: 64 deep", "deep1.qcow2", true),
    ("chain: 64 deep, each with an L1 table of 32 MiB", "deep1.qcow2", true),
    ("chain: 65 deep", "deep1.qcow2", false),
    ("chain: missing", "absent", false),
    ("chain: absolute", "/dev/zero", false),
    ("chain: a folder above", "../base.raw", false),
    ("chain: json", "json:{\"file.filename\":\"base.raw\"}", false),
    ("chain: nbd", "nbd:localhost:1", false),
    ("chain: a FIFO", "fifo", false),
    ("chain: a folder", "folder", false),
    ("chain: a symbolic link", "link", false),
    ("chain: a symbolic link to a device", "device", false),
    ("chain: itself", "image.qcow2", false),
    ("chain: a circle", "circle.qcow2", false),
    ("chain: no format", "base.raw", false),
    ("chain: an unknown format", "base.raw", false),
];

/// The upper image of a chain; its companions are made in `folder`.
pub fn chain(folder: &Path, name: &str, below: &str) -> Bytes {
    let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, folder.join(name)).unwrap();
    let over = |shape: Shape, name: &str, format: &[u8]| {
        let mut image = sample(shape);
        image.name_backing(name.as_bytes(), format);
        image
    };
    std::fs::write(folder.join("base.raw"), content(1, 100_000)).unwrap();
    std::fs::write(folder.join("magic.raw"), [&b"QFI\xfb\0\0\0\x03"[..], &content(2, 100_000)].concat()).unwrap();
    std::fs::create_dir(folder.join("folder")).unwrap();
    link("base.raw", "link");
    link("/dev/zero", "device");
    super::succeed("mkfifo", &[super::text(&folder.join("fifo"))]);
    over(PLAIN, "image.qcow2", b"qcow2").write_to(&folder.join("circle.qcow2"));
    if below == "deep1.qcow2" {
        let last = if name.contains("65") { 64 } else { 63 };
        let fat = name.contains("each");
        for depth in 1..=last {
            let shape = if fat { WIDE } else { PLAIN };
            let next = format!("deep{}.qcow2", depth + 1);
            let mut image = if depth == last { sample(shape) } else { over(shape, &next, b"qcow2") };
            if fat {
                move_l1(&mut image, 1 << 22, Vec::new());
            }
            image.write_to(&folder.join(format!("deep{depth}.qcow2")));
        }
    }
    match name {
        "chain: no format" => {
            let mut image = sample(PLAIN);
            image.put64(8, 120);
            image.put32(16, 8);
            image.put(120, b"base.raw");
            image
        }
        "chain: an unknown format" => over(PLAIN, below, b"vmdk"),
        _ if below.ends_with(".raw") => over(PLAIN, below, b"raw"),
        _ if below.ends_with(".qcow2") => over(PLAIN, below, b"qcow2"),
        _ => over(PLAIN, below, b"raw"),
    }
}
