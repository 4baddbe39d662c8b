//! A chain becomes one file: the same bytes, clean, as small as it can be; or nothing at all.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    reason = "a test fails by panicking and tells its figures"
)]

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockyard_qcow2::storage::FileStorage;
use blockyard_qcow2::{
    Access, Backing, BackingFormat, CreateOptions, Disk, Durability, Error, Flattened, Image, Layer, OpenOptions,
    Progress, Result, Target, ZeroMode, check, compare, flatten, info,
};
use faulty::{Fault, Faulty, Kind};
use nix::errno::Errno;
use support::{KIB, MIB, assert_clean, folder, fresh, join, over, pattern, succeed, text};

const LATER: Durability = Durability::OnFlush;
const QCOW2: BackingFormat = BackingFormat::Qcow2;
const RAW: BackingFormat = BackingFormat::Raw;

fn disk(path: &Path, format: BackingFormat) -> Disk {
    Disk::open(path, format, &OpenOptions::new(Access::ReadOnly)).unwrap()
}

fn on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn qcow2(cluster_size: u32) -> Target {
    Target::Qcow2(CreateOptions { cluster_size, ..CreateOptions::new(0) })
}

fn flattened(source: &Disk, path: &Path, target: &Target) -> Flattened {
    flatten(source, path, target, &mut on).unwrap()
}

/// Names in the folder, sorted.
fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let mut names: Vec<String> =
        folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Three layers of different cluster sizes over a raw file, each shorter than the one above; returns the top.
fn chain(folder: &tempfile::TempDir) -> PathBuf {
    let base = std::fs::File::create(join(folder, "base.raw")).unwrap();
    base.set_len(3 * MIB + 1024).unwrap();
    base.write_all_at(&pattern(1, 700_000), 100_000).unwrap();
    base.write_all_at(&vec![0; 300_000], MIB + 1000).unwrap();
    base.write_all_at(&pattern(2, 1024), 3 * MIB).unwrap();
    let layers: [(&str, &str, BackingFormat, u32, u64); 3] = [
        ("low.qcow2", "base.raw", RAW, 4096, 4 * MIB + 512),
        ("middle.qcow2", "low.qcow2", QCOW2, 65536, 6 * MIB + 1536),
        ("top.qcow2", "middle.qcow2", QCOW2, 512, 8 * MIB + 512),
    ];
    for (number, (name, below, format, cluster_size, size)) in layers.into_iter().enumerate() {
        let backing = Some(Backing { name: below.into(), format });
        let image = fresh(&join(folder, name), &CreateOptions { cluster_size, backing, ..CreateOptions::new(size) });
        let seed = number as u64 * 10;
        image.write(300_000 * (number as u64 + 1) + 11, &pattern(seed, 70_001), LATER).unwrap();
        image.write(size - 5000, &pattern(seed + 1, 5000), LATER).unwrap();
        image.zero(150_000 * (number as u64 + 1), 40_000, ZeroMode::Unmap, LATER).unwrap();
        image.write(2 * MIB, &vec![0; 128 << 10], LATER).unwrap();
        image.discard(700_000, 50_000, LATER).unwrap();
        image.close().unwrap();
    }
    join(folder, "top.qcow2")
}

#[test]
fn a_chain_of_four_layers_becomes_one_clean_image_of_any_cluster_size() {
    let folder = folder();
    let top = chain(&folder);
    let clusters = [512, 4096, 65536, 2 << 20];
    for cluster_size in clusters {
        let path = join(&folder, "flat.qcow2");
        let done = flattened(&disk(&top, QCOW2), &path, &qcow2(cluster_size));
        assert_eq!(done.size, 8 * MIB + 512);
        assert_clean(&path);
        succeed("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", text(&top), text(&path)]);
        let facts = info(&path).unwrap();
        assert_eq!((facts.backing, facts.cluster_size, facts.dirty), (None, u64::from(cluster_size), false));
        // Nothing but what QEMU would have copied, cluster for cluster.
        let judge = join(&folder, "judge.qcow2");
        let options = format!("cluster_size={cluster_size}");
        let sparse = cluster_size.to_string();
        let convert =
            ["convert", "-S", &sparse, "-f", "qcow2", "-O", "qcow2", "-o", &options, text(&top), text(&judge)];
        if cluster_size <= 65536 {
            succeed("qemu-img", &convert);
            assert_eq!(check(&path).unwrap().allocated_clusters, check(&judge).unwrap().allocated_clusters);
            std::fs::remove_file(&judge).unwrap();
        }
        assert!(done.written <= check(&path).unwrap().allocated_clusters * u64::from(cluster_size));
        std::fs::remove_file(&path).unwrap();
    }
    println!("{} cluster sizes", clusters.len());
}

#[test]
fn a_chain_becomes_a_raw_file_with_holes() {
    let folder = folder();
    let top = chain(&folder);
    let path = join(&folder, "flat.raw");
    let done = flattened(&disk(&top, QCOW2), &path, &Target::Raw);
    assert_eq!((done.size, std::fs::metadata(&path).unwrap().len()), (8 * MIB + 512, 8 * MIB + 512));
    succeed("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", text(&top), text(&path)]);
    let judge = join(&folder, "judge.raw");
    succeed("qemu-img", &["convert", "-S", "4k", "-f", "qcow2", "-O", "raw", text(&top), text(&judge)]);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&judge).unwrap());
    let space = |path: &Path| std::fs::metadata(path).unwrap().blocks() * 512;
    assert!(space(&path) <= space(&judge), "{} against {}", space(&path), space(&judge));
    assert!(space(&path) <= done.written.next_multiple_of(4096) + 4096);
}

#[test]
fn raw_disks_of_odd_sizes_become_images_that_end_in_zeroes() {
    let folder = folder();
    for (number, size) in [0, 1, 511, 513, MIB - 1, MIB + 1, 2 * MIB + 65_537].into_iter().enumerate() {
        let source = join(&folder, "source.raw");
        let content = pattern(number as u64, size as usize);
        std::fs::write(&source, &content).unwrap();
        let path = join(&folder, "flat.qcow2");
        let done = flattened(&disk(&source, RAW), &path, &qcow2(65536));
        assert_eq!(done, Flattened { size: size.next_multiple_of(512), written: size });
        assert_clean(&path);
        let mut expected = content.clone();
        expected.resize(done.size as usize, 0);
        support::assert_reads_as(&path, &expected);
        let copy = join(&folder, "copy.raw");
        flattened(&disk(&source, RAW), &copy, &Target::Raw);
        assert!(std::fs::read(&copy).unwrap() == content);
        for file in [path, copy] {
            std::fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn holes_and_zeroes_take_neither_reads_nor_space() {
    let folder = folder();
    let (path, flat) = (join(&folder, "image.qcow2"), join(&folder, "flat.qcow2"));
    let size = 32 << 40;
    let image = fresh(&path, &CreateOptions::new(size));
    image.write(0, &vec![0; 4 << 20], LATER).unwrap();
    image.write(size / 2 + 5, &[1], LATER).unwrap();
    image.write(size - 1, &[2], LATER).unwrap();
    image.close().unwrap();
    drop(image);
    let done = flattened(&disk(&path, QCOW2), &flat, &qcow2(65536));
    assert_eq!(done, Flattened { size, written: 2 * 65536 });
    assert_eq!(check(&flat).unwrap().allocated_clusters, 2);
    assert_clean(&flat);
    let compared = compare(&disk(&path, QCOW2), &disk(&flat, QCOW2), &mut on).unwrap();
    assert_eq!(compared.difference, None);
}

#[test]
fn an_image_that_qemu_compressed_is_flattened_too() {
    let folder = folder();
    let top = chain(&folder);
    for kind in ["zlib", "zstd"] {
        let compressed = join(&folder, "compressed.qcow2");
        let option = format!("compression_type={kind}");
        let convert = ["convert", "-c", "-o", &option, "-f", "qcow2", "-O", "qcow2", text(&top), text(&compressed)];
        succeed("qemu-img", &convert);
        let path = join(&folder, "flat.qcow2");
        flattened(&disk(&compressed, QCOW2), &path, &qcow2(65536));
        assert_clean(&path);
        succeed("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", text(&top), text(&path)]);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_break_ends_the_copy_wherever_it_comes_and_leaves_nothing() {
    let folder = folder();
    let source = join(&folder, "source.raw");
    std::fs::write(&source, pattern(1, 5 << 20)).unwrap();
    let path = join(&folder, "flat");
    for target in [qcow2(4096), Target::Raw] {
        let mut told = Vec::new();
        let complete = flatten(&disk(&source, RAW), &path, &target, &mut |progress| {
            told.push(progress);
            ControlFlow::Continue(())
        });
        complete.unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
        assert_eq!(told.last(), Some(&Progress { done: 5 * MIB, total: 5 * MIB }));
        assert_eq!(told.len(), 6);
        for stop in 0..told.len() {
            let mut calls = 0;
            let ended = flatten(&disk(&source, RAW), &path, &target, &mut |_| {
                calls += 1;
                if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(ended, Err(Error::Cancelled)), "{stop}: {ended:?}");
            assert_eq!((calls, names(&folder)), (stop + 1, vec!["source.raw".to_owned()]));
        }
    }
}

#[test]
fn nothing_that_exists_is_overwritten() {
    let folder = folder();
    let top = chain(&folder);
    let source = disk(&top, QCOW2);
    let taken = join(&folder, "taken");
    std::os::unix::fs::symlink("nowhere", join(&folder, "link")).unwrap();
    for target in [qcow2(4096), Target::Raw] {
        for (name, blocker) in [("taken", "taken"), ("new", "new.partial")] {
            std::fs::write(join(&folder, blocker), b"mine").unwrap();
            let refused = flatten(&source, &join(&folder, name), &target, &mut on);
            let exists = |error: &Error| matches!(error, Error::Open { source, .. } if source.kind() == io::ErrorKind::AlreadyExists);
            assert!(refused.as_ref().is_err_and(exists), "{refused:?}");
            assert_eq!(std::fs::read(join(&folder, blocker)).unwrap(), b"mine");
            std::fs::remove_file(join(&folder, blocker)).unwrap();
        }
        assert!(flatten(&source, &join(&folder, "link"), &target, &mut on).is_err());
        // Taken while the copy was under way.
        let raced = flatten(&source, &taken, &target, &mut |progress| {
            if progress.done == progress.total {
                std::fs::write(&taken, b"mine").unwrap();
            }
            ControlFlow::Continue(())
        });
        assert!(raced.is_err(), "{raced:?}");
        assert_eq!(std::fs::read(&taken).unwrap(), b"mine");
        std::fs::remove_file(&taken).unwrap();
        assert!(!names(&folder).iter().any(|name| name.ends_with(".partial")), "{:?}", names(&folder));
    }
}

#[test]
fn shapes_that_cannot_be_are_refused_before_anything_is_made() {
    let folder = folder();
    let top = chain(&folder);
    let source = disk(&top, QCOW2);
    let before = names(&folder);
    let wrong = [
        CreateOptions { cluster_size: 1000, ..CreateOptions::new(0) },
        CreateOptions { refcount_bits: 3, ..CreateOptions::new(0) },
        over("middle.qcow2", 0),
    ];
    for options in wrong {
        let refused = flatten(&source, &join(&folder, "flat"), &Target::Qcow2(options), &mut on);
        assert!(matches!(refused, Err(Error::InvalidOption { .. })), "{refused:?}");
        assert_eq!(names(&folder), before);
    }
    let refused = flatten(&source, &join(&folder, "absent/flat"), &Target::Raw, &mut on);
    assert!(matches!(refused, Err(Error::Open { .. })), "{refused:?}");
}

#[test]
fn a_read_that_fails_in_any_layer_names_the_range_and_leaves_nothing() {
    let folder = folder();
    let (low, high) = (join(&folder, "low.qcow2"), join(&folder, "high.qcow2"));
    let size = 6 * MIB;
    let image = fresh(&low, &CreateOptions { cluster_size: 4096, ..CreateOptions::new(size) });
    image.write(0, &pattern(1, 900_000), LATER).unwrap();
    image.write(5 * MIB, &pattern(2, 900_000), LATER).unwrap();
    image.close().unwrap();
    drop(image);
    let image = fresh(&high, &CreateOptions { cluster_size: 4096, ..over("low.qcow2", size) });
    image.write(2 * MIB, &pattern(3, 1_500_000), LATER).unwrap();
    image.write(512 * KIB, &pattern(4, 5000), LATER).unwrap();
    image.close().unwrap();
    drop(image);
    let before = names(&folder);
    let path = join(&folder, "flat");
    let storage = |path: &Path, faults: &[Fault]| {
        Arc::new(Faulty::new(Arc::new(FileStorage::new(std::fs::File::open(path).unwrap())), faults))
    };
    let mut cases = 0;
    for target in [qcow2(65536), Target::Raw] {
        for layer in ["low", "high"] {
            for call in 1.. {
                let fault = Fault { kind: Kind::Read, call, errno: Errno::EIO, for_ever: false, short: false };
                let faulty = storage(if layer == "low" { &low } else { &high }, &[fault]);
                let sound = storage(if layer == "low" { &high } else { &low }, &[]);
                let (below, above) = if layer == "low" { (faulty.clone(), sound) } else { (sound, faulty.clone()) };
                let run = || -> Result<Flattened> {
                    let below = Image::open_on(below, Access::ReadOnly, None, 1 << 20)?;
                    let opened = !faulty.failures().is_empty();
                    let image = Image::open_on(above, Access::ReadOnly, Some(Layer::Image(Box::new(below))), 1 << 20)?;
                    assert!(!opened);
                    flatten(&image.into(), &path, &target, &mut on)
                };
                let result = run();
                if faulty.failures().is_empty() {
                    result.unwrap();
                    std::fs::remove_file(&path).unwrap();
                    break;
                }
                let context = format!("{layer}, read {call}: {result:?}");
                match result {
                    Err(Error::Unreadable { offset, length, .. }) => assert!(offset + length <= size, "{context}"),
                    // Header and L1 table, by the opening.
                    Err(Error::Io { operation: "read", .. }) if call <= 3 => {}
                    _ => panic!("{context}"),
                }
                assert_eq!(names(&folder), before, "{context}");
                cases += 1;
            }
        }
    }
    println!("{cases} reads failed");
    assert!(cases > 20);
}
