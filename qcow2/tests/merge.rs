//! The upper layers of a chain become one image over what lies below them: the same bytes, clean, nothing stored that is
//! below; or nothing at all.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::panic,
    reason = "a test fails by panicking and tells its figures"
)]

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockyard_qcow2::storage::FileStorage;
use blockyard_qcow2::{
    Access, Backing, BackingFormat, CompressionLevel, CreateOptions, Disk, Durability, Error, Image, Layer, Merged,
    OpenOptions, Progress, Result, ZeroMode, check, compare, info, merge,
};
use faulty::{Fault, Faulty, Kind};
use nix::errno::Errno;
use support::{
    MIB, assert_clean, assert_reads_as, folder, fresh, join, open, over, pattern, scale, seed, succeed, text,
};

const LATER: Durability = Durability::OnFlush;

fn on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn reading() -> OpenOptions {
    OpenOptions::new(Access::ReadOnly)
}

fn merged(source: &Image, layers: u32, path: &Path, shape: &CreateOptions) -> Merged {
    merge(source, layers, path, shape, &reading(), &mut on).unwrap()
}

fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let mut names: Vec<String> =
        folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What the model knows of one layer: its bytes seen through the layers below it.
struct Model {
    bytes: Vec<u8>,
}

/// One random layer over `below`, its model changed alike.
fn layer(
    random: &mut fastrand::Rng,
    path: &Path,
    below: Option<(&str, BackingFormat)>,
    model: &mut Model,
    size: usize,
) {
    let cluster_size = 1_u32 << random.u32(9..=16);
    let backing = below.map(|(name, format)| Backing { name: name.into(), format });
    let shape = CreateOptions { cluster_size, backing, ..CreateOptions::new(size as u64) };
    blockyard_qcow2::create(path, &shape).unwrap();
    let mut options = OpenOptions::new(Access::ReadWrite);
    if random.bool() {
        options.compress = Some(CompressionLevel::Fast);
    }
    let image = Image::open(path, &options).unwrap();
    model.bytes.resize(size, 0);
    for _ in 0..random.usize(0..12) {
        let longest = if random.u8(0..4) == 0 { 300_000 } else { 20_000 };
        let length = random.usize(1..=longest).min(size);
        let mut at = random.usize(0..=size - length);
        if random.bool() {
            at -= at % 65536;
        }
        match random.u8(0..6) {
            0 => {
                image.zero(at as u64, length as u64, ZeroMode::Unmap, LATER).unwrap();
                model.bytes[at..at + length].fill(0);
            }
            1 => {
                image.write(at as u64, &vec![0; length], LATER).unwrap();
                model.bytes[at..at + length].fill(0);
            }
            // What is there already.
            2 => image.write(at as u64, &model.bytes[at..at + length], LATER).unwrap(),
            3 => {
                let bytes = support::wordy(random.u64(..), length);
                image.write(at as u64, &bytes, LATER).unwrap();
                model.bytes[at..at + length].copy_from_slice(&bytes);
            }
            _ => {
                let bytes = pattern(random.u64(..), length);
                image.write(at as u64, &bytes, LATER).unwrap();
                model.bytes[at..at + length].copy_from_slice(&bytes);
            }
        }
    }
    image.close().unwrap();
}

/// Three random images, perhaps over a raw file, of sizes that grow and shrink on the way up. Returns the content of the
/// top.
fn random_chain(folder: &tempfile::TempDir, random: &mut fastrand::Rng) -> (Vec<u8>, bool) {
    let mut size = || random.usize(1..=2400) * 512;
    let sizes = [size(), size(), size(), size()];
    let raw = random.bool();
    let mut model = Model { bytes: Vec::new() };
    if raw {
        model.bytes = pattern(random.u64(..), sizes[3]);
        let hole = random.usize(0..=sizes[3] / 2);
        model.bytes[hole..hole + sizes[3] / 2].fill(0);
        let file = std::fs::File::create(join(folder, "base.raw")).unwrap();
        file.set_len(sizes[3] as u64).unwrap();
        for (number, block) in model.bytes.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
            std::os::unix::fs::FileExt::write_all_at(&file, block, number as u64 * 4096).unwrap();
        }
    }
    let base = raw.then_some(("base.raw", BackingFormat::Raw));
    layer(random, &join(folder, "low.qcow2"), base, &mut model, sizes[0]);
    let low = Some(("low.qcow2", BackingFormat::Qcow2));
    layer(random, &join(folder, "middle.qcow2"), low, &mut model, sizes[1]);
    let middle = Some(("middle.qcow2", BackingFormat::Qcow2));
    layer(random, &join(folder, "top.qcow2"), middle, &mut model, sizes[2]);
    (model.bytes, raw)
}

/// No cluster of the image holds what would be read without it.
fn assert_nothing_is_stored_twice(path: &Path, bytes: &[u8], below: Option<&Path>) {
    let mut under = vec![0; bytes.len()];
    if let Some(below) = below {
        let format = if text(below).ends_with(".raw") { BackingFormat::Raw } else { BackingFormat::Qcow2 };
        let raw = path.with_extension("below");
        let target = blockyard_qcow2::Target::Raw;
        blockyard_qcow2::flatten(&Disk::open(below, format, &reading()).unwrap(), &raw, &target, &mut on).unwrap();
        let read = std::fs::read(&raw).unwrap();
        std::fs::remove_file(raw).unwrap();
        let common = read.len().min(under.len());
        under[..common].copy_from_slice(&read[..common]);
    }
    let image = open(path, Access::ReadOnly);
    let cluster = image.cluster_size() as usize;
    for extent in image.map_all().unwrap() {
        if extent.depth != 1 || extent.kind != blockyard_qcow2::ExtentKind::Data {
            continue;
        }
        let (start, end) = (extent.offset as usize, (extent.offset + extent.length) as usize);
        for at in (start..end).step_by(cluster) {
            let range = at..(at + cluster).min(end);
            assert!(bytes[range.clone()] != under[range.clone()], "{range:?} is stored and below");
        }
    }
}

#[test]
fn the_upper_layers_of_any_chain_read_the_same_over_what_is_below_and_store_nothing_twice() {
    let mut cases = 0;
    let seeds = seed().map_or(0..60 * scale(), |seed| seed..seed + 1);
    for seed in seeds {
        let mut random = fastrand::Rng::with_seed(seed);
        let folder = folder();
        let (bytes, raw) = random_chain(&folder, &mut random);
        let top = join(&folder, "top.qcow2");
        let below = ["middle.qcow2", "low.qcow2", "base.raw"];
        for layers in 1..=4_u32 {
            let name = below[..2 + usize::from(raw)].get(layers as usize - 1).copied();
            let format = if name == Some("base.raw") { BackingFormat::Raw } else { BackingFormat::Qcow2 };
            let backing = name.map(|name| Backing { name: name.into(), format });
            let cluster_size = 1_u32 << random.u32(9..=17);
            let shape = CreateOptions { cluster_size, backing: backing.clone(), ..CreateOptions::new(0) };
            let path = join(&folder, "merged.qcow2");
            let done = merged(&open(&top, Access::ReadOnly), layers, &path, &shape);
            let what = format!("SEED={seed}, {layers} layers, clusters of {cluster_size}");
            assert_eq!((info(&path).unwrap().backing, done.size), (backing, bytes.len() as u64), "{what}");
            assert_clean(&path);
            println!("{what}");
            assert_reads_as(&path, &bytes);
            succeed("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", text(&top), text(&path)]);
            let disk = |path: &Path| Disk::open(path, BackingFormat::Qcow2, &reading()).unwrap();
            assert_eq!(compare(&disk(&top), &disk(&path), &mut on).unwrap().difference, None, "{what}");
            assert_nothing_is_stored_twice(&path, &bytes, name.map(|name| join(&folder, name)).as_deref());
            std::fs::remove_file(&path).unwrap();
            cases += 1;
        }
    }
    println!("{cases} merges");
}

/// A full of 4 MiB, an overlay that is shorter and hides a part, and one that is as long again.
fn chain(folder: &tempfile::TempDir) -> PathBuf {
    let image = fresh(&join(folder, "low.qcow2"), &CreateOptions::new(4 * MIB));
    image.write(0, &pattern(1, 4 << 20), LATER).unwrap();
    image.close().unwrap();
    let image = fresh(&join(folder, "middle.qcow2"), &over("low.qcow2", 3 * MIB));
    image.write(MIB, &pattern(2, 65536), LATER).unwrap();
    image.zero(2 * MIB, 65536 + 100, ZeroMode::Unmap, LATER).unwrap();
    image.close().unwrap();
    let image = fresh(&join(folder, "top.qcow2"), &over("middle.qcow2", 5 * MIB));
    image.write(MIB + 65536, &pattern(3, 1000), LATER).unwrap();
    image.close().unwrap();
    join(folder, "top.qcow2")
}

#[test]
fn only_what_the_upper_layers_decide_is_copied_and_what_a_shorter_one_cuts_off_stays_cut_off() {
    let folder = folder();
    let top = chain(&folder);
    let path = join(&folder, "merged.qcow2");
    merged(&open(&top, Access::ReadOnly), 2, &path, &over("low.qcow2", 0));
    // Data of both, and the cluster of which the zeroes take a part.
    assert_eq!(check(&path).unwrap().allocated_clusters, 3);
    let image = open(&path, Access::ReadOnly);
    let mut end = vec![1; 2 << 20];
    image.read(3 * MIB, &mut end).unwrap();
    assert!(end.iter().all(|byte| *byte == 0), "the base shows through past the end of the layer above it");
}

#[test]
fn shapes_that_do_not_fit_the_chain_are_refused_before_anything_is_made() {
    let folder = folder();
    let top = chain(&folder);
    let before = names(&folder);
    let cases = [
        (0, over("low.qcow2", 0)),
        (2, CreateOptions::new(0)),
        (3, over("low.qcow2", 0)),
        (9, over("low.qcow2", 0)),
        (2, CreateOptions { cluster_size: 1000, ..over("low.qcow2", 0) }),
    ];
    for (layers, shape) in cases {
        let path = join(&folder, "merged.qcow2");
        let refused = merge(&open(&top, Access::ReadOnly), layers, &path, &shape, &reading(), &mut on);
        assert!(matches!(refused, Err(Error::InvalidOption { .. })), "{layers}: {refused:?}");
        assert_eq!(names(&folder), before);
    }
    for taken in ["merged.qcow2", "merged.qcow2.partial"] {
        std::fs::write(join(&folder, taken), b"mine").unwrap();
        let path = join(&folder, "merged.qcow2");
        let refused = merge(&open(&top, Access::ReadOnly), 2, &path, &over("low.qcow2", 0), &reading(), &mut on);
        assert!(matches!(refused, Err(Error::Open { .. })), "{refused:?}");
        assert_eq!(std::fs::read(join(&folder, taken)).unwrap(), b"mine");
        std::fs::remove_file(join(&folder, taken)).unwrap();
    }
}

#[test]
fn a_break_ends_the_merge_wherever_it_comes_and_leaves_nothing() {
    let folder = folder();
    let top = chain(&folder);
    let before = names(&folder);
    let path = join(&folder, "merged.qcow2");
    let mut told = Vec::new();
    let whole = merge(&open(&top, Access::ReadOnly), 3, &path, &CreateOptions::new(0), &reading(), &mut |progress| {
        told.push(progress);
        ControlFlow::Continue(())
    });
    whole.unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(told.is_sorted_by_key(|progress| progress.done), "{told:?}");
    assert_eq!(told.last(), Some(&Progress { done: 5 * MIB, total: 5 * MIB }));
    for stop in 0..told.len() {
        let mut calls = 0;
        let source = open(&top, Access::ReadOnly);
        let ended = merge(&source, 3, &path, &CreateOptions::new(0), &reading(), &mut |_| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(ended, Err(Error::Cancelled)), "{stop}: {ended:?}");
        assert_eq!((calls, names(&folder)), (stop + 1, before.clone()));
    }
}

#[test]
fn a_read_of_a_merge_that_fails_in_any_layer_names_the_range_and_leaves_nothing() {
    let folder = folder();
    chain(&folder);
    let (low, middle) = (join(&folder, "low.qcow2"), join(&folder, "middle.qcow2"));
    let before = names(&folder);
    let path = join(&folder, "merged.qcow2");
    let storage = |path: &Path, faults: &[Fault]| {
        Arc::new(Faulty::new(Arc::new(FileStorage::new(std::fs::File::open(path).unwrap())), faults))
    };
    let mut cases = 0;
    for (layers, shape) in [(1, over("low.qcow2", 0)), (2, CreateOptions::new(0))] {
        for layer in ["low", "high"] {
            for call in 1.. {
                let fault = Fault { kind: Kind::Read, call, errno: Errno::EIO, for_ever: false, short: false };
                let faulty = storage(if layer == "low" { &low } else { &middle }, &[fault]);
                let sound = storage(if layer == "low" { &middle } else { &low }, &[]);
                let (below, above) = if layer == "low" { (faulty.clone(), sound) } else { (sound, faulty.clone()) };
                let run = || -> Result<Merged> {
                    let below = Image::open_on(below, Access::ReadOnly, None, 1 << 20)?;
                    let image = Image::open_on(above, Access::ReadOnly, Some(Layer::Image(Box::new(below))), 1 << 20)?;
                    merge(&image, layers, &path, &shape, &reading(), &mut on)
                };
                let result = run();
                if faulty.failures().is_empty() {
                    result.unwrap();
                    std::fs::remove_file(&path).unwrap();
                    break;
                }
                let context = format!("{layers} layers, {layer}, read {call}: {result:?}");
                match result {
                    Err(Error::Unreadable { offset, length, .. }) => assert!(offset + length <= 3 * MIB, "{context}"),
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
    assert!(cases > 12);
}
