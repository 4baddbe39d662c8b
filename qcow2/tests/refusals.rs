//! What is refused, with an error that says why, and nothing changed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::symlink;
use std::path::Path;

use blockyard_qcow2::{
    Access, Backing, BackingFormat, CreateOptions, Durability, Error, Image, OpenOptions, Result, ZeroMode, create,
};
use support::{MIB, folder, fresh, join, open, over, run, succeed, text};

fn try_open(path: &Path, access: Access) -> Result<Image> {
    Image::open(path, &OpenOptions::new(access))
}

#[test]
fn a_file_without_the_magic_is_not_an_image_whatever_its_name() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    for content in [&b""[..], b"QFI", b"QFI\xfa", &[0; 4096], b"#!/bin/sh\n"] {
        std::fs::write(&path, content).unwrap();
        assert!(matches!(try_open(&path, Access::ReadOnly), Err(Error::NotQcow2)), "{content:?}");
    }
    assert!(matches!(try_open(&join(&folder, "absent"), Access::ReadOnly), Err(Error::Open { .. })));
    assert!(try_open(folder.path(), Access::ReadOnly).is_err(), "a folder");
}

#[test]
fn create_refuses_what_the_format_cannot_hold_and_leaves_no_file() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let good = CreateOptions::new(MIB);
    let name = |length| Some(Backing { name: "n".repeat(length), format: BackingFormat::Raw });
    for options in [
        CreateOptions { size: 513, ..good.clone() },
        CreateOptions { size: u64::MAX - 511, ..good.clone() },
        CreateOptions { size: (128 << 30) + 512, cluster_size: 512, ..good.clone() },
        CreateOptions { cluster_size: 256, ..good.clone() },
        CreateOptions { cluster_size: 65537, ..good.clone() },
        CreateOptions { cluster_size: 4 << 20, ..good.clone() },
        CreateOptions { refcount_bits: 0, ..good.clone() },
        CreateOptions { refcount_bits: 3, ..good.clone() },
        CreateOptions { refcount_bits: 128, ..good.clone() },
        CreateOptions { backing: name(1024), ..good.clone() },
        CreateOptions { backing: name(400), cluster_size: 512, ..good.clone() },
    ] {
        assert!(matches!(create(&path, &options), Err(Error::InvalidOption { .. })), "{options:?}");
        assert!(!path.exists());
    }
    create(&path, &good).unwrap();
    assert!(matches!(create(&path, &good), Err(Error::Open { .. })), "an existing file is never overwritten");
}

#[test]
fn ranges_past_the_end_are_refused_and_change_nothing() {
    let folder = folder();
    let image = fresh(&join(&folder, "image.qcow2"), &CreateOptions::new(MIB));
    for (offset, length) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 5, 100)] {
        let data = vec![1; length as usize];
        let later = Durability::OnFlush;
        for outcome in [
            image.write(offset, &data, later),
            image.read(offset, &mut data.clone()),
            image.zero(offset, length, ZeroMode::Unmap, later),
            image.discard(offset, length, later),
            image.map(offset, length, 1).map(drop),
        ] {
            assert!(matches!(outcome, Err(Error::OutOfRange { .. })), "{offset}+{length}: {outcome:?}");
        }
    }
    image.write(MIB, &[], Durability::OnFlush).unwrap();
    image.zero(0, 0, ZeroMode::Keep, Durability::OnFlush).unwrap();
}

#[test]
fn a_read_only_image_refuses_changes_and_a_closed_one_everything() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions::new(MIB));
    image.close().unwrap();
    image.close().unwrap();
    assert!(matches!(image.write(0, &[1], Durability::OnFlush), Err(Error::Closed)));
    assert!(matches!(image.read(0, &mut [0]), Err(Error::Closed)));
    assert!(matches!(image.flush(), Err(Error::Closed)));

    let image = open(&path, Access::ReadOnly);
    assert!(matches!(image.write(0, &[1], Durability::OnFlush), Err(Error::ReadOnly)));
    assert!(matches!(image.discard(0, 512, Durability::OnFlush), Err(Error::ReadOnly)));
    image.flush().unwrap();
}

#[test]
fn an_image_that_was_only_read_is_not_touched() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    create(&path, &CreateOptions::new(MIB)).unwrap();
    let before = (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().modified().unwrap());
    let image = open(&path, Access::ReadWrite);
    image.read(0, &mut [0; 4096]).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    let after = (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().modified().unwrap());
    assert!(before == after);
}

#[test]
fn backing_names_that_lead_elsewhere_are_refused() {
    let folder = folder();
    let inside = join(&folder, "vm");
    std::fs::create_dir(&inside).unwrap();
    let elsewhere = join(&folder, "elsewhere.qcow2");
    create(&elsewhere, &CreateOptions::new(MIB)).unwrap();
    symlink(&elsewhere, inside.join("link.qcow2")).unwrap();
    symlink(folder.path(), inside.join("folder")).unwrap();
    succeed("mkfifo", &[text(&inside.join("fifo"))]);
    std::fs::create_dir(inside.join("directory")).unwrap();
    for (number, name) in [
        "../elsewhere.qcow2",
        "./.././elsewhere.qcow2",
        "link.qcow2",
        "folder/elsewhere.qcow2",
        text(&elsewhere),
        "json:{}",
        "nbd:localhost:10809",
        "fifo",
        "directory",
        "absent.qcow2",
        "/dev/null",
    ]
    .into_iter()
    .enumerate()
    {
        let path = inside.join(format!("overlay{number}.qcow2"));
        create(&path, &over(name, MIB)).unwrap();
        let refused = try_open(&path, Access::ReadOnly);
        assert!(matches!(refused, Err(Error::Backing { .. } | Error::Open { .. })), "{name}: {refused:?}");
        // The caller may allow more of the file system, and then only links stay forbidden.
        let options =
            OpenOptions { backing_root: Some(folder.path().to_owned()), ..OpenOptions::new(Access::ReadOnly) };
        let allowed = Image::open(&path, &options).is_ok();
        assert_eq!(allowed, name.contains("elsewhere") && !name.starts_with('/') && !name.contains("folder"), "{name}");
    }
}

#[test]
fn a_circle_of_backing_files_is_refused() {
    let folder = folder();
    for (path, below) in [("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2"), ("self.qcow2", "self.qcow2")] {
        create(&join(&folder, path), &over(below, MIB)).unwrap();
    }
    for path in ["a.qcow2", "self.qcow2"] {
        let refused = try_open(&join(&folder, path), Access::ReadOnly);
        assert!(matches!(refused, Err(Error::Backing { .. } | Error::Locked { .. })), "{refused:?}");
    }
}

#[test]
fn a_raw_base_stays_raw_even_if_it_begins_like_an_image() {
    let folder = folder();
    let raw = join(&folder, "raw");
    create(&raw, &CreateOptions::new(MIB)).unwrap();
    let content = std::fs::read(&raw).unwrap();
    let backing = Some(Backing { name: "raw".into(), format: BackingFormat::Raw });
    let image =
        fresh(&join(&folder, "overlay.qcow2"), &CreateOptions { backing, ..CreateOptions::new(content.len() as u64) });
    let mut bytes = vec![0; content.len()];
    image.read(0, &mut bytes).unwrap();
    assert!(bytes == content);
}

#[test]
fn features_that_would_be_harmed_or_misread_are_refused() {
    let folder = folder();
    let make = |name: &str, options: &str| {
        let path = join(&folder, name);
        succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), "1M"]);
        path
    };
    let data_file = format!("data_file={}/data.raw", text(folder.path()));
    let data = make("data.qcow2", &data_file);
    assert!(matches!(try_open(&data, Access::ReadOnly), Err(Error::Unsupported { .. })));
    // The bit alone is enough, and so is each that nobody knows yet.
    let bits = join(&folder, "bits.qcow2");
    create(&bits, &CreateOptions::new(MIB)).unwrap();
    let plain = std::fs::read(&bits).unwrap();
    for bit in (5..64).chain([2]) {
        let mut bytes = plain.clone();
        bytes[72..80].copy_from_slice(&(1_u64 << bit).to_be_bytes());
        std::fs::write(&bits, &bytes).unwrap();
        assert!(matches!(try_open(&bits, Access::ReadOnly), Err(Error::Unsupported { .. })), "bit {bit}");
    }
    let luks = join(&folder, "luks.qcow2");
    let created = run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=secret",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            text(&luks),
            "1M",
        ],
    );
    assert!(created.status.success(), "{created:?}");
    assert!(matches!(try_open(&luks, Access::ReadOnly), Err(Error::Unsupported { .. })));

    let snapshot = make("snapshot.qcow2", "cluster_size=65536");
    succeed("qemu-img", &["snapshot", "-c", "before", text(&snapshot)]);
    let old = make("old.qcow2", "compat=0.10");
    let extended = make("extended.qcow2", "extended_l2=on");
    for path in [snapshot, old, extended] {
        try_open(&path, Access::ReadOnly).unwrap();
        assert!(matches!(try_open(&path, Access::ReadWrite), Err(Error::Unsupported { .. })), "{}", path.display());
    }
}

#[test]
fn an_image_whose_tables_overlap_is_refused_for_writing() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions { cluster_size: 512, ..CreateOptions::new(MIB) });
    image.write(0, &[7; 4096], Durability::OnFlush).unwrap();
    image.close().unwrap();
    drop(image);
    let good = std::fs::read(&path).unwrap();
    let l1_offset = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let l2_offset = (u64::from_be_bytes(good[l1_offset..l1_offset + 8].try_into().unwrap()) & !(1 << 63)) as usize;
    for (at, value, rule) in [
        (l2_offset, l1_offset as u64 | (1 << 63), "data in the L1 table"),
        (l2_offset, l2_offset as u64 | (1 << 63), "data in its own L2 table"),
        (l2_offset, (512 * 1000) | (1 << 63), "data past the end"),
        (l2_offset, 1 << 63, "data in the header"),
        (l1_offset, l1_offset as u64 | (1 << 63), "table in the L1 table"),
        (l1_offset, (512 * 1000) | (1 << 63), "table past the end"),
        (l1_offset, l2_offset as u64, "table without COPIED"),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
        std::fs::write(&path, &bad).unwrap();
        let refused = try_open(&path, Access::ReadWrite);
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{rule}: {refused:?}");
        assert!(blockyard_qcow2::check(&path).unwrap().errors > 0, "{rule}");
        assert!(std::fs::read(&path).unwrap() == bad, "{rule}: the refused image was changed");
    }
}
