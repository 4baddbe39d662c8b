//! What a header may hold beyond what this engine uses: kept, cleared or refused, each with its own error. Images are made by
//! us and patched, so that one thing at a time is different; those that QEMU makes: `foreign_images.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};

use blockyard_qcow2::{Access, CreateOptions, Durability, Error, Image, OpenOptions, check, info, repair};
use support::{MIB, assert_clean, assert_reads_as, folder, fresh, join, pattern};

const LATER: Durability = Durability::OnFlush;

/// Bytes to put into a file, with their offset.
type Patch = (usize, Vec<u8>);

/// A closed image of 1 MiB with clusters of 4 KiB, without extensions, and the header cluster's bytes patched.
fn patched(folder: &tempfile::TempDir, patches: &[Patch]) -> PathBuf {
    let path = join(folder, "image.qcow2");
    let _ = std::fs::remove_file(&path);
    let image = fresh(&path, &CreateOptions { cluster_size: 4096, ..CreateOptions::new(MIB) });
    image.write(0, &pattern(1, 10_000), LATER).unwrap();
    image.close().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[112..4096].fill(0);
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    std::fs::write(&path, bytes).unwrap();
    path
}

fn word(at: usize, value: u32) -> Patch {
    (at, value.to_be_bytes().to_vec())
}

fn double(at: usize, value: u64) -> Patch {
    (at, value.to_be_bytes().to_vec())
}

fn extension(at: usize, kind: u32, data: &[u8]) -> Patch {
    (at, [&kind.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat())
}

fn try_open(path: &Path, access: Access) -> Result<Image, Error> {
    Image::open(path, &OpenOptions::new(access))
}

#[test]
fn what_others_put_into_a_header_is_kept_and_autoclear_bits_are_cleared() {
    let folder = folder();
    let longer = [word(100, 120), (112, b"new one!".to_vec()), extension(120, 0x1234_5678, b"hello")];
    let bits = [double(80, 1 << 63 | 1 << 5 | 1), double(88, 1 << 7)];
    let path = patched(&folder, &[&longer[..], &bits].concat());
    let before = std::fs::read(&path).unwrap();
    assert!(info(&path).unwrap().lazy_refcounts);
    try_open(&path, Access::ReadOnly).unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "reading changed the image");

    let image = try_open(&path, Access::ReadWrite).unwrap();
    image.write(20_000, &[7; 512], LATER).unwrap();
    image.grow(2 * MIB).unwrap();
    image.close().unwrap();
    let after = std::fs::read(&path).unwrap();
    let parts =
        [("version", 4..8), ("features", 72..88), ("refcount order and length", 96..104), ("the rest", 104..4096)];
    for (name, range) in parts {
        assert_eq!(after[range.clone()], before[range], "{name}");
    }
    assert_eq!(after[88..96], [0; 8], "autoclear features");
    assert_clean(&path);
    let mut bytes = pattern(1, 10_000);
    bytes.resize(2 << 20, 0);
    bytes[20_000..20_512].fill(7);
    assert_reads_as(&path, &bytes);
}

#[test]
fn each_legal_image_that_is_refused_says_what_it_uses() {
    let folder = folder();
    let cases: [(&str, &[Patch]); 8] = [
        ("encrypted images", &[word(32, 1)]),
        ("encrypted images", &[word(32, 2)]),
        ("encrypted images", &[extension(112, 0x0537_be77, &[0; 16])]),
        ("an external data file", &[double(72, 1 << 2)]),
        ("an external data file", &[extension(112, 0x4441_5441, b"data.raw")]),
        ("unknown incompatible feature bits 0x20", &[double(72, 1 << 5)]),
        ("unknown incompatible feature bits 0x8000000000000000", &[double(72, 1 << 63)]),
        ("compression type 2", &[double(72, 1 << 3), (104, vec![2])]),
    ];
    for (said, patches) in cases {
        let path = patched(&folder, patches);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let refused = try_open(&path, access);
            assert!(matches!(&refused, Err(Error::Unsupported { feature }) if feature.contains(said)), "{refused:?}");
        }
        assert!(matches!(check(&path), Err(Error::Unsupported { .. })), "{said}");
        assert!(matches!(info(&path), Err(Error::Unsupported { .. })), "{said}");
    }
}

#[test]
fn each_field_that_breaks_a_rule_is_named_with_its_offset() {
    let folder = folder();
    let cases: [(&str, u64, &[Patch]); 17] = [
        ("version", 4, &[word(4, 1)]),
        ("version", 4, &[word(4, 4)]),
        ("cluster_bits", 20, &[word(20, 8)]),
        ("cluster_bits", 20, &[word(20, 22)]),
        ("size", 24, &[double(24, 1 << 63)]),
        ("l1_size", 36, &[word(36, 0)]),
        ("l1_size", 36, &[word(36, (4 << 20) + 1)]),
        ("l1_table_offset", 40, &[double(40, 0)]),
        ("l1_table_offset", 40, &[double(40, 4096 + 512)]),
        ("refcount_table_offset", 48, &[double(48, 1 << 40)]),
        ("refcount_table_clusters", 56, &[word(56, 0)]),
        ("refcount_table_clusters", 56, &[word(56, 2049)]),
        ("snapshots_offset", 64, &[double(64, 512)]),
        ("incompatible_features", 72, &[double(72, 1 << 4)]),
        ("autoclear_features", 88, &[double(88, 2)]),
        ("refcount_order", 96, &[word(96, 7)]),
        ("compression_type", 104, &[(104, vec![1])]),
    ];
    for (field, at, patches) in cases {
        let path = patched(&folder, patches);
        let refused = try_open(&path, Access::ReadOnly);
        let name = format!("header field {field}");
        let fits =
            matches!(&refused, Err(Error::Corrupt { structure, offset, .. }) if *structure == name && *offset == at);
        assert!(fits, "{field}: {refused:?}");
    }
}

#[test]
fn a_backing_format_is_never_guessed() {
    let folder = folder();
    std::fs::write(join(&folder, "base"), vec![1; 1 << 20]).unwrap();
    for (format, said) in [(None, "never guessed"), (Some(&b"vmdk"[..]), "unsupported format 'vmdk'")] {
        let mut patches = vec![double(8, 200), word(16, 4), (200, b"base".to_vec())];
        patches.extend(format.map(|format| extension(112, 0xe279_2aca, format)));
        let path = patched(&folder, &patches);
        let refused = try_open(&path, Access::ReadOnly);
        assert!(matches!(&refused, Err(Error::Backing { reason, .. }) if reason.contains(said)), "{refused:?}");
    }
}

#[test]
fn an_image_that_is_marked_corrupt_is_read_and_written_to_only_after_a_repair() {
    let folder = folder();
    let path = patched(&folder, &[double(72, 1 << 1)]);
    assert!(info(&path).unwrap().corrupt);
    let mut bytes = vec![0; 10_000];
    try_open(&path, Access::ReadOnly).unwrap().read(0, &mut bytes).unwrap();
    assert!(bytes == pattern(1, 10_000));
    let refused = try_open(&path, Access::ReadWrite);
    assert!(
        matches!(&refused, Err(Error::Unsupported { feature }) if feature.contains("marked corrupt")),
        "{refused:?}"
    );
    repair(&path).unwrap();
    assert!(!info(&path).unwrap().corrupt, "the mark is still there");
    try_open(&path, Access::ReadWrite).unwrap().write(0, &[1], LATER).unwrap();
}
