//! Every shape that an image can be created in, as QEMU sees it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/power_cut.rs"]
mod power_cut;
#[path = "support/privileged.rs"]
mod privileged;
#[path = "support/reader.rs"]
mod reader;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockyard_qcow2::{
    Access, Backing, BackingFormat, Compression, CreateOptions, Durability, Error, Image, OpenOptions, Preallocation,
    create, create_on, info, repair,
};
use power_cut::crash_states;
use privileged::Mounted;
use reader::read_disk;
use serde_json::Value;
use sim_disk::{Clock, Content, SimDisk, now};
use support::{KIB, MIB, assert_clean, assert_reads_as, folder, fresh, join, open, over, pattern, succeed, text};

const LATER: Durability = Durability::OnFlush;

fn qemu_json(command: &str, path: &Path) -> Value {
    serde_json::from_str(&succeed("qemu-img", &[command, "--output=json", "-f", "qcow2", text(path)])).unwrap()
}

#[test]
fn every_option_is_told_as_qemu_reads_it_and_survives_a_session() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    for (compression, lazy_refcounts, refcount_bits, cluster_size) in [
        (Compression::Deflate, false, 16, 65536),
        (Compression::Zstd, false, 1, 4096),
        (Compression::Deflate, true, 64, 2 << 20),
        (Compression::Zstd, true, 8, 512),
    ] {
        let options = CreateOptions {
            compression,
            lazy_refcounts,
            refcount_bits,
            cluster_size,
            ..CreateOptions::new(7 * MIB + 512)
        };
        let image = fresh(&path, &options);
        let check = || {
            let told = qemu_json("info", &path);
            let details = &told["format-specific"]["data"];
            assert_eq!(told["virtual-size"], 7 * MIB + 512);
            assert_eq!(told["cluster-size"], cluster_size);
            assert_eq!(details["compat"], "1.1");
            assert_eq!(details["refcount-bits"], refcount_bits);
            assert_eq!(details["lazy-refcounts"], lazy_refcounts);
            let zstd = compression == Compression::Zstd;
            assert_eq!(details["compression-type"], if zstd { "zstd" } else { "zlib" });
            let own = info(&path).unwrap();
            assert_eq!((own.zstd, own.lazy_refcounts, own.refcount_bits), (zstd, lazy_refcounts, refcount_bits));
        };
        let mut bytes = pattern(1, 70_000);
        image.write(0, &bytes, LATER).unwrap();
        image.close().unwrap();
        check();
        assert_clean(&path);
        bytes.resize((7 << 20) + 512, 0);
        assert_reads_as(&path, &bytes);
        // QEMU writes to it as well, compressed too, and we read that.
        succeed("qemu-io", &["-f", "qcow2", "-c", "write -q -c -P 9 4M 2M", text(&path)]);
        bytes[4 << 20..6 << 20].fill(9);
        let mut found = vec![0; bytes.len()];
        let image = open(&path, Access::ReadWrite);
        image.read(0, &mut found).unwrap();
        assert!(found == bytes);
        image.write(MIB, &[3; 512], LATER).unwrap();
        image.close().unwrap();
        check();
        assert_clean(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn preallocated_images_have_every_cluster_in_its_place() {
    let folder = folder();
    for (number, (size, cluster_size, refcount_bits)) in [
        (0, 65536, 16),
        (512, 512, 16),
        (5 * MIB + 512, 512, 64),
        (9 * MIB + 4096, 4096, 1),
        (40 * MIB + 512, 65536, 16),
        (20 * MIB, 2 << 20, 32),
    ]
    .into_iter()
    .enumerate()
    {
        for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let path = join(&folder, &format!("{number}-{preallocation:?}.qcow2"));
            let options = CreateOptions { cluster_size, refcount_bits, preallocation, ..CreateOptions::new(size) };
            create(&path, &options).unwrap();
            assert_clean(&path);
            let mut bytes = vec![0; size as usize];
            assert_reads_as(&path, &bytes);
            // Every byte lies in the file, at ascending places.
            let map = qemu_json("map", &path);
            let extents: Vec<(u64, u64, u64)> = map
                .as_array()
                .unwrap()
                .iter()
                .filter(|extent| extent["length"] != 0)
                .map(|extent| {
                    let number = |name: &str| extent[name].as_u64().unwrap();
                    (number("start"), number("length"), number("offset"))
                })
                .collect();
            assert_eq!(extents.iter().map(|extent| extent.1).sum::<u64>(), size, "{extents:?}");
            for (start, _, offset) in &extents {
                assert_eq!(offset - start, extents[0].2, "{extents:?}");
            }
            let facts = std::fs::metadata(&path).unwrap();
            if preallocation != Preallocation::Metadata {
                assert!(facts.blocks() * 512 >= size, "{preallocation:?}: {} sectors", facts.blocks());
            } else if size > 8 * MIB && cluster_size >= 4096 {
                assert!(facts.blocks() * 512 < size / 2, "{} sectors", facts.blocks());
            }
            let report = blockyard_qcow2::check(&path).unwrap();
            assert_eq!(report.allocated_clusters, size.div_ceil(u64::from(cluster_size)));

            // Writes go to the reserved places: the file does not grow for them.
            let image = open(&path, Access::ReadWrite);
            let length = bytes.len().min(100_000);
            let data = pattern(1, length);
            let at = bytes.len() - length;
            image.write(at as u64, &data, LATER).unwrap();
            bytes[at..].copy_from_slice(&data);
            image.close().unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), facts.len());
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
            drop(image);

            // QEMU's own preallocation makes the same clusters.
            if preallocation != Preallocation::Metadata {
                continue;
            }
            let peer = join(&folder, "peer.qcow2");
            let asked = format!("preallocation=metadata,cluster_size={cluster_size},refcount_bits={refcount_bits}");
            succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &asked, text(&peer), &size.to_string()]);
            let theirs = qemu_json("check", &peer);
            let ours = qemu_json("check", &path);
            assert_eq!(ours["allocated-clusters"], theirs["allocated-clusters"], "{asked} {size}");
            std::fs::remove_file(peer).unwrap();
        }
    }
}

#[test]
fn preallocation_that_cannot_be_is_refused_and_leaves_no_file() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    create(&join(&folder, "base.qcow2"), &CreateOptions::new(MIB)).unwrap();
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for options in [
            CreateOptions { preallocation, ..over("base.qcow2", MIB) },
            // More refcount blocks than a table of 8 MiB names.
            CreateOptions { preallocation, cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(40 << 30) },
            // Host offsets of more than 56 bits.
            CreateOptions { preallocation, cluster_size: 2 << 20, refcount_bits: 1, ..CreateOptions::new(1 << 56) },
        ] {
            let refused = create(&path, &options);
            assert!(matches!(refused, Err(Error::InvalidOption { option: "preallocation", .. })), "{refused:?}");
            assert!(!path.exists());
        }
    }
    // On a disk of its own: until it is refused, such a reservation takes all the room that there is.
    let small = Mounted::at(&join(&folder, "small"), &["-t", "tmpfs", "-o", "size=8m,mode=0777", "tmpfs"]);
    let path = small.path().join("image.qcow2");
    for preallocation in [Preallocation::Falloc, Preallocation::Full] {
        let refused = create(&path, &CreateOptions { preallocation, ..CreateOptions::new(4 << 40) });
        assert!(matches!(&refused, Err(error) if error.is_no_space()), "{refused:?}");
        assert!(!path.exists());
    }
}

#[test]
fn the_largest_disk_of_each_cluster_size_is_created_and_one_sector_more_is_refused() {
    let folder = folder();
    for cluster_bits in 9..=21 {
        let cluster = 1u64 << cluster_bits;
        // An L1 of 32 MiB has 4 Mi entries, each of which maps a table of clusters.
        let largest = (4 << 20) * cluster * (cluster / 8);
        assert_eq!(largest >= 64 << 40, cluster_bits >= 14);
        assert_eq!(largest == 128 << 30, cluster_bits == 9);
        let path = join(&folder, "image.qcow2");
        let options = |size| CreateOptions { cluster_size: cluster as u32, ..CreateOptions::new(size) };
        let refused = create(&path, &options(largest + 512));
        assert!(matches!(refused, Err(Error::InvalidOption { option: "size", .. })), "{refused:?}");
        // 64 TiB also where it is not the end: with the smallest clusters that can, and with QEMU's default.
        let sizes = if [14, 16].contains(&cluster_bits) { vec![largest, 64 << 40] } else { vec![largest] };
        for size in sizes {
            let image = fresh(&path, &options(size));
            // First, middle and last byte.
            for offset in [0, size / 2 + 1, size - 1] {
                image.write(offset, &[7], LATER).unwrap();
            }
            image.close().unwrap();
            let mut byte = [0];
            let image = open(&path, Access::ReadOnly);
            for offset in [0, size / 2 + 1, size - 1] {
                image.read(offset, &mut byte).unwrap();
                assert_eq!(byte, [7]);
            }
            drop(image);
            assert_clean(&path);
            assert_eq!(qemu_json("info", &path)["virtual-size"], size);
            let last = format!("read -P 7 {} 1", size - 1);
            let found = succeed("qemu-io", &["-f", "qcow2", "-c", &last, text(&path)]);
            assert!(!found.contains("failed"), "{found}");
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn an_overlay_tells_its_base_and_the_format_of_it() {
    let folder = folder();
    std::fs::write(join(&folder, "base.raw"), pattern(1, 100_000)).unwrap();
    let base = fresh(&join(&folder, "base.qcow2"), &CreateOptions::new(MIB));
    base.write(0, &pattern(1, 100_000), LATER).unwrap();
    base.close().unwrap();
    for (name, format, told) in [("base.raw", BackingFormat::Raw, "raw"), ("base.qcow2", BackingFormat::Qcow2, "qcow2")]
    {
        let path = join(&folder, &format!("over-{told}.qcow2"));
        let backing = Some(Backing { name: name.into(), format });
        create(&path, &CreateOptions { backing, ..CreateOptions::new(2 * MIB) }).unwrap();
        let information = qemu_json("info", &path);
        assert_eq!(
            (&information["backing-filename"], &information["backing-filename-format"]),
            (&name.into(), &told.into())
        );
        let mut bytes = pattern(1, 100_000);
        bytes.resize(2 << 20, 0);
        assert_reads_as(&path, &bytes);
        assert_clean(&path);
    }
}

#[test]
fn an_overlay_over_a_base_that_was_not_closed_is_refused() {
    let folder = folder();
    let base = join(&folder, "base.qcow2");
    let image = fresh(&base, &CreateOptions::new(MIB));
    image.write(0, &[1; 512], LATER).unwrap();
    image.flush().unwrap();
    let path = join(&folder, "overlay.qcow2");
    let refused = |when: &str| {
        let refused = create(&path, &over("base.qcow2", MIB));
        assert!(matches!(refused, Err(Error::Backing { .. })), "{when}: {refused:?}");
        assert!(!path.exists(), "{when}");
    };
    refused("while it is written to");
    assert!(blockyard_qcow2::check(&base).is_err(), "looking at the base did not cost it its locks");
    drop(image);
    refused("after a crash");
    repair(&base).unwrap();
    create(&path, &over("base.qcow2", MIB)).unwrap();
    Image::open(&path, &OpenOptions::new(Access::ReadOnly)).unwrap();
}

#[test]
fn a_disk_whose_last_cluster_is_partial_shows_no_byte_more() {
    let folder = folder();
    for (number, size) in [512, 65536 - 512, 65536 + 512, 10 * 65536 + 60 * KIB].into_iter().enumerate() {
        let path = join(&folder, &format!("{number}.qcow2"));
        let image = fresh(&path, &CreateOptions::new(size));
        let bytes = pattern(number as u64, size as usize);
        image.write(0, &bytes, LATER).unwrap();
        image.close().unwrap();
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
        let map = image.check().unwrap();
        assert_eq!(map.allocated_clusters, size.div_ceil(65536));
    }
}

#[test]
fn a_crash_while_a_preallocated_image_is_made_leaves_no_image_or_a_whole_one() {
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let disk = SimDisk::new(clock.clone(), Content::default());
        let size = 40 * KIB + 512;
        create_on(&disk, &CreateOptions { cluster_size: 512, preallocation, ..CreateOptions::new(size) }).unwrap();
        let (mut states, mut whole) = (0, 0);
        crash_states(&Content::default(), &disk.calls(), now(&clock), 0, |state| {
            states += 1;
            let disk = Arc::new(SimDisk::new(clock.clone(), state.content.clone()));
            match read_disk(&state.content, &[]) {
                Err(_) => assert!(Image::open_on(disk, Access::ReadOnly, None, 1 << 20).is_err()),
                Ok(found) => {
                    whole += 1;
                    assert!(found.len() as u64 == size && found.iter().all(|byte| *byte == 0));
                    let image = Image::open_on(disk, Access::ReadWrite, None, 1 << 20).unwrap();
                    let report = image.check().unwrap();
                    assert!(report.is_clean() && report.allocated_clusters == 81, "{report:?}");
                }
            }
        });
        assert!(whole > 0 && whole < states, "{whole} of {states}");
    }
}
