//! The table of damages: each row a name and an image, in groups that the names begin with.

#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, clippy::precedence, reason = "a test fails by panicking; offsets are cluster times size")]

use super::damaged::{
    Bytes, COMPRESSED, COPIED, PLAIN, Shape, compress, compressed_entry, content, place, put_refcount, sample,
};

pub struct Case {
    pub name: String,
    pub image: Bytes,
}

#[derive(Default)]
pub struct Cases(pub Vec<Case>);

impl Cases {
    pub fn add(&mut self, name: impl Into<String>, shape: Shape, damage: impl FnOnce(&mut Bytes)) {
        let mut image = sample(shape);
        damage(&mut image);
        self.0.push(Case { name: name.into(), image });
    }
}

/// Everything but the cases that are about backing files, whose companions `corrupt_backing` makes.
pub fn all() -> Cases {
    let mut cases = Cases::default();
    sound(&mut cases);
    header_fields(&mut cases);
    truncations(&mut cases);
    extensions(&mut cases);
    features(&mut cases);
    entries(&mut cases);
    refcounts(&mut cases);
    compressed(&mut cases);
    subclusters(&mut cases);
    cases
}

const OLD: Shape = Shape { version: 2, ..PLAIN };
const EXTENDED: Shape = Shape { extended: true, cluster_bits: 14, ..PLAIN };

fn sound(cases: &mut Cases) {
    for (name, shape) in [
        ("plain", PLAIN),
        ("version 2", OLD),
        ("extended L2", EXTENDED),
        ("zstd", Shape { zstd: true, ..PLAIN }),
        ("clusters of 512 bytes, counts of 64 bits", Shape { cluster_bits: 9, refcount_order: 6, ..PLAIN }),
        ("clusters of 64 KiB, counts of 32 bits", Shape { cluster_bits: 16, refcount_order: 5, ..PLAIN }),
    ] {
        cases.add(format!("sound: {name}"), shape, |_| {});
    }
}

/// Offset, bytes and name of each field.
const FIELDS: [(u64, usize, &str); 19] = [
    (0, 4, "magic"),
    (4, 4, "version"),
    (8, 8, "backing_file_offset"),
    (16, 4, "backing_file_size"),
    (20, 4, "cluster_bits"),
    (24, 8, "size"),
    (32, 4, "crypt_method"),
    (36, 4, "l1_size"),
    (40, 8, "l1_table_offset"),
    (48, 8, "refcount_table_offset"),
    (56, 4, "refcount_table_clusters"),
    (60, 4, "nb_snapshots"),
    (64, 8, "snapshots_offset"),
    (72, 8, "incompatible_features"),
    (80, 8, "compatible_features"),
    (88, 8, "autoclear_features"),
    (96, 4, "refcount_order"),
    (100, 4, "header_length"),
    (104, 8, "compression_type and padding"),
];

fn header_fields(cases: &mut Cases) {
    for (at, bytes, name) in FIELDS {
        let max = u64::MAX >> (64 - 8 * bytes);
        let (cluster, end) = (4096, place::END * 4096);
        let values = [
            ("0", 0),
            ("1", 1),
            ("2", 2),
            ("max", max),
            ("max - 1", max - 1),
            ("2^31", 1 << 31),
            ("the sign bit", max / 2 + 1),
            ("misaligned", 0x3201),
            ("its own offset", at),
            ("the header's cluster", cluster),
            ("the L2 table", place::L2 * cluster),
            ("the end of the file", end),
            ("the end but one cluster", end - cluster),
            ("beyond the file", end + 8 * cluster),
        ];
        for (what, value) in values {
            cases.add(format!("header: {name} = {what}"), PLAIN, |image| {
                image.put(at, &value.to_be_bytes()[8 - bytes..]);
            });
        }
    }
    for version in [4u32, 9, 0x300] {
        cases.add(format!("header: version = {version}"), PLAIN, |image| image.put32(4, version));
    }
    for bits in [8u32, 13, 16, 21, 22, 63, 64] {
        cases.add(format!("header: cluster_bits = {bits}"), PLAIN, |image| image.put32(20, bits));
    }
}

fn truncations(cases: &mut Cases) {
    for length in 0..=112 {
        cases.add(format!("cut: to {length} bytes"), PLAIN, |image| image.cut(length));
    }
    for sectors in 1..place::END * 8 {
        cases.add(format!("cut: to {sectors} sectors"), PLAIN, |image| image.cut(sectors * 512));
    }
}

fn extensions(cases: &mut Cases) {
    const FORMAT: u32 = 0xe279_2aca;
    const NAMES: u32 = 0x6803_f857;
    const BITMAPS: u32 = 0x2385_2875;
    const UNKNOWN: u32 = 0x1234_5678;
    let wide = Shape { cluster_bits: 17, ..PLAIN };
    let mut add = |name: &str, shape: Shape, list: &[(u32, u32)]| {
        cases.add(format!("extension: {name}"), shape, |image| {
            let mut at = 112;
            for (kind, length) in list {
                image.put32(at, *kind);
                image.put32(at + 4, *length);
                at += 8 + u64::from(*length).next_multiple_of(8).min(48);
            }
        });
    };
    for (what, kind) in
        [("backing format", FORMAT), ("feature names", NAMES), ("bitmaps", BITMAPS), ("unknown", UNKNOWN)]
    {
        for length in [0, 7, 23, 24, 25, 48, 3970, 4000, 1 << 31, u32::MAX, u32::MAX - 6] {
            add(&format!("{what} of {length} bytes"), PLAIN, &[(kind, length)]);
        }
        add(&format!("{what} twice"), PLAIN, &[(kind, 24), (kind, 24)]);
    }
    add("encryption", PLAIN, &[(0x0537_be77, 16)]);
    add("data file", PLAIN, &[(0x4441_5441, 8)]);
    for count in [63, 64, 65, 1000, 10_000] {
        let list: Vec<_> = (0..count).map(|number| (UNKNOWN + number, 0)).collect();
        add(&format!("{count} of them"), wide, &list);
    }
    cases.add("extension: unterminated", PLAIN, |image| image.put(112, &[1; 4096 - 112]));
    cases.add("extension: past the backing name", PLAIN, |image| {
        image.name_backing(b"base", b"raw");
        image.put32(116, 100);
    });
    cases.add("extension: none, the name at once", PLAIN, |image| {
        image.put64(8, 112);
        image.put32(16, 4);
        image.put(112, b"base");
    });
}

fn features(cases: &mut Cases) {
    for bit in 0..64 {
        cases.add(format!("feature: incompatible bit {bit}"), PLAIN, |image| image.put64(72, 1 << bit));
    }
    for bit in [0, 1, 2, 31, 63] {
        cases.add(format!("feature: compatible bit {bit}"), PLAIN, |image| image.put64(80, 1 << bit));
        cases.add(format!("feature: autoclear bit {bit}"), PLAIN, |image| image.put64(88, 1 << bit));
    }
    cases.add("feature: dirty and corrupt", PLAIN, |image| image.put64(72, 3));
}

/// Values that an entry of a table can have, for clusters of 4 KiB.
fn pointers() -> Vec<(String, u64)> {
    let at = |cluster: u64| cluster * 4096;
    let mut values: Vec<(String, u64)> = [
        ("offset 0", 0),
        ("the header", 1 << 9),
        ("the refcount table", at(place::REFCOUNT_TABLE)),
        ("the refcount block", at(place::REFCOUNT_BLOCK)),
        ("the L1 table", at(place::L1)),
        ("the first L2 table", at(place::L2)),
        ("the second L2 table", at(place::L2 + 1)),
        ("data of another entry", at(place::DATA + 1)),
        ("the kept zero cluster", at(place::KEPT_ZERO)),
        ("compressed data", at(place::COMPRESSED)),
        ("the last data cluster", at(place::LAST)),
        ("the end of the file", at(place::END)),
        ("a cluster beyond the end", at(place::END + 1)),
        ("far beyond", 1 << 40),
        ("the highest offset", 0x00ff_ffff_ffff_f000),
        ("a misaligned offset", at(place::DATA) + 512),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    values.extend((0..64).step_by(3).map(|bit| (format!("bit {bit} beside data"), at(place::DATA) ^ 1 << bit)));
    values
}

fn entries(cases: &mut Cases) {
    let tables = [("L1", place::L1), ("L2", place::L2), ("refcount table", place::REFCOUNT_TABLE)];
    for (name, value) in pointers() {
        for (table, host) in tables {
            cases.add(format!("{table} entry: {name}"), PLAIN, |image| image.put64(host * 4096, value));
            if table != "refcount table" {
                let copied = format!("{table} entry: {name}, COPIED");
                cases.add(copied, PLAIN, |image| image.put64(host * 4096, value | COPIED));
            }
        }
        cases.add(format!("L2 entry: {name}, COPIED, zero"), PLAIN, |image| {
            image.put64(place::L2 * 4096, value | COPIED | 1);
        });
    }
    cases.add("L1 entry: both lead to one table", PLAIN, |image| {
        image.put64(place::L1 * 4096 + 8, COPIED | place::L2 * 4096);
    });
    cases.add("L2 entry: two share data, refcount 2, not COPIED", PLAIN, |image| {
        for index in 0..2 {
            image.put64(place::L2 * 4096 + index * 8, place::DATA * 4096);
        }
        put_refcount(image, place::DATA, 2);
        put_refcount(image, place::DATA + 1, 0);
    });
    for (name, host) in [("L1 table", place::L1), ("L2 table", place::L2), ("refcount table", place::REFCOUNT_TABLE)] {
        cases.add(format!("L2 entry: the {name}, refcount 2, not COPIED"), PLAIN, |image| {
            image.put64(place::L2 * 4096, host * 4096);
            put_refcount(image, host, 2);
            put_refcount(image, place::DATA, 0);
        });
    }
    cases.add("L2 entry: a zero cluster in version 2", OLD, |image| image.put64(place::L2 * 4096, 1));
    cases.add("refcount table entry: the table on top of the L1 table", PLAIN, |image| {
        image.put64(48, place::L1 * 4096)
    });
}

fn refcounts(cases: &mut Cases) {
    for cluster in 0..place::END + 1 {
        for count in [0, 1, 2, 3, 0xffff] {
            let name = format!("refcount: {count} for cluster {cluster}");
            cases.add(name, PLAIN, |image| put_refcount(image, cluster, count));
        }
    }
    for order in 0..=6 {
        let name = format!("refcount: all bits set, {} wide", 1 << order);
        cases.add(name, Shape { refcount_order: order.max(3), ..PLAIN }, |image| {
            image.put32(96, order);
            image.put(place::REFCOUNT_BLOCK * 4096, &[0xff; 4096]);
        });
    }
}

fn compressed(cases: &mut Cases) {
    for zstd in [false, true] {
        let shape = Shape { zstd, ..PLAIN };
        let host = place::COMPRESSED * 4096;
        let entry = |length: u64| compressed_entry(12, host, length);
        let mut add = |name: &str, raw: u64, payload: &[u8]| {
            let name = format!("compressed {}: {name}", if zstd { "zstd" } else { "deflate" });
            cases.add(name, shape, |image| {
                image.put64(place::L2 * 4096 + 5 * 8, raw);
                image.put(host, &[0; 4096]);
                image.put(host, payload);
            });
        };
        let garbage = super::pattern(5, 4096);
        let good = compress(zstd, &content(105, 4096));
        add("garbage", entry(4096), &garbage);
        add("garbage behind a good start", entry(4096), &[&good[..good.len() / 2], &garbage[..1000]].concat());
        add("nothing but zeroes", entry(4096), &[]);
        add("cut short", entry(good.len() as u64), &good[..good.len() - 5]);
        add("half a cluster", entry(4096), &compress(zstd, &content(1, 2048)));
        add("a cluster and a half", entry(4096), &compress(zstd, &content(1, 6144)));
        let bomb = compress(zstd, &vec![0; 3 << 20]);
        add("a bomb", entry(4096), &bomb[..bomb.len().min(4096)]);
        add("one sector too few", entry(512), &super::pattern(9, 512));
        add("sectors into the next cluster", entry(8192), &good);
        add("offset in the header", COMPRESSED | 104, &good);
        add("offset in the L1 table", compressed_entry(12, place::L1 * 4096, 512), &good);
        add("offset past the end", compressed_entry(12, place::END * 4096, 512), &good);
        add("sectors past the end", compressed_entry(12, place::LAST * 4096 + 512, 4096), &good);
        add("the highest offset", COMPRESSED | ((1 << 56) - 512), &good);
        add("every bit", COMPRESSED | (COMPRESSED - 1), &good);
        add("COPIED", entry(512) | COPIED, &good);
    }
}

fn subclusters(cases: &mut Cases) {
    let (cluster, data) = (1 << 14, place::DATA << 14);
    for (name, raw, states) in [
        ("allocated and zero", data | COPIED, 1 << 32 | 1),
        ("all of both", data | COPIED, u64::MAX),
        ("allocated without an offset", 0, 1),
        ("zero without an offset", 0, u64::MAX << 32),
        ("neither, with an offset", data | COPIED, 0),
        ("alternating", data | COPIED, 0xaaaa_aaaa_5555_5555),
        ("the zero bit of standard entries", data | COPIED | 1, 0xffff_ffff),
        ("compressed with states", COMPRESSED | data, 1),
        ("past the end", COPIED | (place::END + 2) << 14, 0xffff_ffff),
        ("its own table", COPIED | place::L2 << 14, 0xffff_ffff),
    ] {
        cases.add(format!("subclusters: {name}"), EXTENDED, |image| {
            image.put64(place::L2 * cluster, raw);
            image.put64(place::L2 * cluster + 8, states);
        });
    }
}
