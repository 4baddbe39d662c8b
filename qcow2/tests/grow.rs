//! Growing a disk: what the new range reads as, which limits hold, and what QEMU thinks of the result.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockyard_qcow2::storage::FileStorage;
use blockyard_qcow2::{
    Access, AsyncImage, Backing, BackingFormat, CreateOptions, Durability, Error, ExtentKind, Image, Layer, ZeroMode,
    create, info,
};
use faulty::{Fault, Faulty, Kind};
use support::{KIB, MIB, assert_clean, assert_reads_as, folder, fresh, join, open, over, pattern, succeed, text};

const LATER: Durability = Durability::OnFlush;

fn assert_content(image: &Image, bytes: &[u8]) {
    let mut found = vec![0xee; bytes.len()];
    image.read(0, &mut found).unwrap();
    let wrong = found.iter().zip(bytes).position(|(found, expected)| found != expected);
    assert_eq!((wrong, image.size()), (None, bytes.len() as u64), "first wrong byte, and the size");
}

/// A closed image filled with a pattern.
fn filled(path: &Path, options: &CreateOptions, seed: u64) -> Vec<u8> {
    let image = fresh(path, options);
    let bytes = pattern(seed, options.size as usize);
    image.write(0, &bytes, LATER).unwrap();
    image.close().unwrap();
    bytes
}

#[test]
fn a_grown_disk_keeps_its_bytes_and_reads_zero_behind_them() {
    let folder = folder();
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        // With 512-byte clusters one L1 entry maps 32 KiB, and one cluster of L1 2 MiB: the second step needs a larger one.
        for sizes in [[3 * MIB + 512, 3 * MIB + 1024, 9 * MIB], [512, 33 * KIB, 5 * MIB + 512], [0, 512, 2 * MIB]] {
            let path = join(&folder, "image.qcow2");
            let image = fresh(&path, &CreateOptions { cluster_size, ..CreateOptions::new(sizes[0]) });
            let mut bytes = Vec::new();
            for (step, size) in sizes.into_iter().enumerate() {
                image.grow(size).unwrap();
                bytes.resize(size as usize, 0);
                assert_content(&image, &bytes);
                // The last bytes, in a cluster that the next step makes whole, and past the first table.
                let data = pattern(step as u64, 400.min(bytes.len()));
                let at = bytes.len() - data.len();
                image.write(at as u64, &data, LATER).unwrap();
                bytes[at..].copy_from_slice(&data);
                assert!(image.write(size, &[1], LATER).is_err(), "a byte past the disk");
            }
            image.flush().unwrap();
            assert_content(&image, &bytes);
            image.close().unwrap();
            assert_eq!(info(&path).unwrap().size, sizes[2]);
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
            assert_content(&open(&path, Access::ReadOnly), &bytes);
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn growing_never_reveals_what_lies_below_or_past_the_old_end() {
    let folder = folder();
    for (number, (raw, cluster_size, old, new)) in [
        (false, 512, 10 * KIB, 40 * KIB),
        (false, 512, 10 * KIB + 512, 300 * KIB),
        (false, 512, 0, 300 * KIB),
        (true, 4096, 9 * KIB, 290 * KIB + 512),
        (false, 4096, 4096 + 512, 7 * KIB),
        (true, 65536, 100 * KIB, 110 * KIB),
        // Past an L1 of one cluster: 2 MiB, with a base that is longer still.
        (false, 512, 2 * MIB - 512, 3 * MIB),
    ]
    .into_iter()
    .enumerate()
    {
        let base = format!("base{number}");
        let base_size = new + 100 * KIB;
        let below = if raw {
            let bytes = pattern(1, base_size as usize);
            std::fs::write(join(&folder, &base), &bytes).unwrap();
            bytes
        } else {
            filled(&join(&folder, &base), &CreateOptions { cluster_size: 4096, ..CreateOptions::new(base_size) }, 1)
        };
        for touched in [false, true] {
            let path = join(&folder, "overlay.qcow2");
            let format = if raw { BackingFormat::Raw } else { BackingFormat::Qcow2 };
            let backing = Some(Backing { name: base.clone(), format });
            let image = fresh(&path, &CreateOptions { cluster_size, backing, ..CreateOptions::new(old) });
            let mut bytes = below[..old as usize].to_vec();
            if touched && old > 0 {
                let data = pattern(2, 300);
                let at = bytes.len() - 300;
                image.write(at as u64, &data, LATER).unwrap();
                bytes[at..].copy_from_slice(&data);
            }
            image.grow(new).unwrap();
            bytes.resize(new as usize, 0);
            assert_content(&image, &bytes);
            image.close().unwrap();
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
            // Still there after a second session, and a second step.
            let image = open(&path, Access::ReadWrite);
            image.grow(new + 50 * KIB).unwrap();
            bytes.resize((new + 50 * KIB) as usize, 0);
            assert_content(&image, &bytes);
            image.close().unwrap();
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn data_that_a_foreign_image_holds_past_its_end_is_not_revealed() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    // A disk that ends in the middle of a cluster and of a table, both full; as if another tool had made it smaller.
    filled(&path, &CreateOptions { cluster_size: 4096, ..CreateOptions::new(MIB) }, 3);
    let (cut, mut file) = (300 * KIB + 512, std::fs::read(&path).unwrap());
    file[24..32].copy_from_slice(&cut.to_be_bytes());
    std::fs::write(&path, &file).unwrap();
    let mut bytes = pattern(3, MIB as usize);
    bytes.truncate(cut as usize);
    let image = open(&path, Access::ReadWrite);
    image.grow(2 * MIB).unwrap();
    bytes.resize(2 << 20, 0);
    assert_content(&image, &bytes);
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
}

#[test]
fn images_of_every_kind_that_qemu_makes_can_grow() {
    let folder = folder();
    for options in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "compression_type=zstd",
    ] {
        let path = join(&folder, "image.qcow2");
        succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), "3145728"]);
        succeed("qemu-io", &["-f", "qcow2", "-c", "write -q -P 5 3000k 72k", text(&path)]);
        let mut bytes = vec![0; 3 << 20];
        bytes[3000 << 10..].fill(5);
        let image = open(&path, Access::ReadWrite);
        image.grow(7 * MIB + 512).unwrap();
        bytes.resize((7 << 20) + 512, 0);
        assert_content(&image, &bytes);
        let data = pattern(4, 5 << 20);
        image.write(2 * MIB, &data, LATER).unwrap();
        bytes[2 << 20..7 << 20].copy_from_slice(&data);
        image.close().unwrap();
        assert_clean(&path);
        assert_reads_as(&path, &bytes);
        // And the other way round: QEMU grows what we made.
        succeed("qemu-img", &["resize", "-q", "-f", "qcow2", text(&path), "9M"]);
        bytes.resize(9 << 20, 0);
        assert_content(&open(&path, Access::ReadOnly), &bytes);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn only_growing_is_possible_and_a_refusal_changes_nothing() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    create(&path, &CreateOptions { cluster_size: 512, ..CreateOptions::new(MIB) }).unwrap();
    let before = std::fs::read(&path).unwrap();
    let image = open(&path, Access::ReadWrite);
    assert!(matches!(image.grow(MIB - 512), Err(Error::WouldShrink { size: MIB, wanted }) if wanted == MIB - 512));
    for size in [MIB + 1, MIB + 511, (128 << 30) + 512, u64::MAX, u64::MAX - 511, 1 << 63] {
        assert!(matches!(image.grow(size), Err(Error::InvalidOption { option: "size", .. })), "{size}");
    }
    image.grow(MIB).unwrap();
    image.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "nothing was asked that changes the image");
    assert!(matches!(image.grow(2 * MIB), Err(Error::Closed)));
    drop(image);
    let image = open(&path, Access::ReadOnly);
    assert!(matches!(image.grow(2 * MIB), Err(Error::ReadOnly)));
    drop(image);
    // To the last byte that 512-byte clusters can map.
    let image = open(&path, Access::ReadWrite);
    image.grow(128 << 30).unwrap();
    image.write((128 << 30) - 512, &[7; 512], LATER).unwrap();
    image.close().unwrap();
    assert_clean(&path);
    let found = succeed("qemu-io", &["-f", "qcow2", "-c", "read -P 7 137438952960 512", text(&path)]);
    assert!(!found.contains("failed"), "{found}");
}

#[test]
fn the_map_covers_the_new_range_and_zeroes_there_take_no_space() {
    let folder = folder();
    filled(&join(&folder, "base.qcow2"), &CreateOptions::new(4 * MIB), 1);
    let image = fresh(&join(&folder, "overlay.qcow2"), &over("base.qcow2", MIB));
    image.grow(3 * MIB).unwrap();
    let extents = image.map(0, 3 * MIB, usize::MAX).unwrap();
    let found: Vec<_> =
        extents.iter().map(|extent| (extent.offset, extent.length, extent.kind, extent.depth)).collect();
    assert_eq!(found, [(0, MIB, ExtentKind::Data, 2), (MIB, 2 * MIB, ExtentKind::Zero, 1)]);
    // The end of the new disk counts as the end of a cluster.
    image.grow(3 * MIB + 512).unwrap();
    image.write(3 * MIB, &[1; 512], LATER).unwrap();
    image.discard(3 * MIB, 512, LATER).unwrap();
    image.zero(MIB, 2 * MIB + 512, ZeroMode::Unmap, LATER).unwrap();
    let last = image.map(3 * MIB, 512, usize::MAX).unwrap();
    assert_eq!(last.len(), 1);
    assert_eq!(last[0].kind, ExtentKind::Zero);
    image.close().unwrap();
}

#[test]
fn growing_over_a_large_base_holds_no_more_tables_than_the_cache() {
    // 512-byte clusters: 4 tables are kept, some 190 are changed.
    let folder = folder();
    let size = 6 * MIB;
    filled(&join(&folder, "base.qcow2"), &CreateOptions { cluster_size: 512, ..CreateOptions::new(size) }, 1);
    let path = join(&folder, "overlay.qcow2");
    create(&path, &CreateOptions { cluster_size: 512, ..over("base.qcow2", 512) }).unwrap();
    let options =
        blockyard_qcow2::OpenOptions { cache_bytes: 0, ..blockyard_qcow2::OpenOptions::new(Access::ReadWrite) };
    let image = Image::open(&path, &options).unwrap();
    image.grow(size).unwrap();
    let mut bytes = pattern(1, 512);
    bytes.resize(size as usize, 0);
    assert_content(&image, &bytes);
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
}

#[test]
fn other_operations_go_on_beside_growing() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = fresh(&path, &CreateOptions { cluster_size: 512, ..CreateOptions::new(64 * KIB) });
    let done = AtomicBool::new(false);
    let steps = 200;
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (image, done) = (&image, &done);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread);
                while !done.load(Ordering::SeqCst) {
                    // Each thread has sectors of its own, up to the end of what it has seen.
                    let sector = random.u64(..image.size() / 512) / 3 * 3 + thread;
                    if (sector + 1) * 512 <= image.size() {
                        image.write(sector * 512, &[thread as u8 + 1; 512], LATER).unwrap();
                        let mut found = [0; 512];
                        image.read(sector * 512, &mut found).unwrap();
                        assert_eq!(found, [thread as u8 + 1; 512]);
                    }
                    if random.u8(..10) == 0 {
                        image.flush().unwrap();
                    }
                }
            });
        }
        for step in 1..=steps {
            image.grow(64 * KIB + step * 20 * 512).unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
    let mut bytes = vec![0; image.size() as usize];
    image.read(0, &mut bytes).unwrap();
    for (sector, content) in bytes.chunks(512).enumerate() {
        let own = (sector % 3) as u8 + 1;
        assert!(content.iter().all(|byte| *byte == own) || content.iter().all(|byte| *byte == 0), "sector {sector}");
    }
    image.close().unwrap();
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
}

#[tokio::test]
async fn an_asynchronous_image_grows_too() {
    let folder = folder();
    let image = AsyncImage::new(fresh(&join(&folder, "image.qcow2"), &CreateOptions::new(MIB)));
    image.grow(2 * MIB).await.unwrap();
    image.write(2 * MIB - 3, vec![1, 2, 3], LATER).await.unwrap();
    assert_eq!(image.size(), 2 * MIB);
    image.close().await.unwrap();
    assert!(image.check().await.unwrap().is_clean());
}

/// An image of 512-byte clusters over a longer raw base, with flushed data, on storage with a fault; `None` when the fault
/// came before all that was there.
fn with_fault(folder: &tempfile::TempDir, fault: Fault) -> Option<(Arc<Faulty>, Image, Vec<u8>)> {
    let path = join(folder, "image.qcow2");
    let _ = std::fs::remove_file(&path);
    let below = pattern(1, 90 << 10);
    std::fs::write(join(folder, "below"), &below).unwrap();
    let backing = Some(Backing { name: "below".into(), format: BackingFormat::Raw });
    create(&path, &CreateOptions { cluster_size: 512, backing, ..CreateOptions::new(OLD) }).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let storage = Arc::new(Faulty::new(Arc::new(FileStorage::new(file)), &[fault]));
    let raw = FileStorage::new(std::fs::File::open(join(folder, "below")).unwrap());
    let layer = Layer::Raw { storage: Arc::new(raw), size: below.len() as u64 };
    let image = Image::open_on(storage.clone(), Access::ReadWrite, Some(layer), 1 << 20).ok()?;
    let mut bytes = below[..OLD as usize].to_vec();
    let data = pattern(2, 1000);
    image.write(3000, &data, LATER).ok()?;
    bytes[3000..4000].copy_from_slice(&data);
    image.flush().ok()?;
    storage.failures().is_empty().then_some((storage, image, bytes))
}

const OLD: u64 = 20 * KIB + 512;
const NEW: u64 = 130 * KIB;

#[test]
fn every_failing_write_or_sync_of_a_grow_poisons_and_leaves_a_legal_image() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let mut cases = 0;
    for (kind, half) in [(Kind::Write, false), (Kind::Write, true), (Kind::Sync, false)] {
        for call in 1.. {
            let fault = Fault { kind, call, errno: nix::errno::Errno::EIO, for_ever: false, short: half };
            let Some((storage, image, mut bytes)) = with_fault(&folder, fault) else { continue };
            let grown = image.grow(NEW);
            if storage.failures().is_empty() {
                grown.unwrap();
                break;
            }
            cases += 1;
            assert!(matches!(grown, Err(Error::Io { .. } | Error::Poisoned { .. })), "{fault:?}: {grown:?}");
            assert_eq!(image.size(), OLD);
            assert!(matches!(image.grow(NEW), Err(Error::Poisoned { .. })), "{fault:?}");
            assert!(image.close().is_err());
            drop(image);
            let size = info(&path).unwrap().size;
            assert!(size == NEW || size == OLD, "{fault:?}: {size}");
            bytes.resize(size as usize, 0);
            let image = open(&path, Access::ReadWrite);
            assert_content(&image, &bytes);
            image.grow(NEW).unwrap();
            bytes.resize(NEW as usize, 0);
            assert_content(&image, &bytes);
            image.close().unwrap();
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
        }
    }
    println!("{cases} failing calls");
    assert!(cases >= 10, "only {cases} cases");
}

#[test]
fn a_full_disk_refuses_a_grow_and_harms_nothing() {
    let folder = folder();
    // The first reservation is there; a table for 64 GiB in clusters of 512 bytes needs 16 MiB more.
    let full = Fault { kind: Kind::Reserve, call: 2, errno: nix::errno::Errno::ENOSPC, for_ever: true, short: false };
    let (storage, image, mut bytes) = with_fault(&folder, full).unwrap();
    let large = 64 << 30;
    let refused = image.grow(large);
    assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    assert_content(&image, &bytes);
    image.write(0, &[7; 512], LATER).unwrap();
    bytes[..512].fill(7);
    image.flush().unwrap();
    storage.heal();
    image.grow(large).unwrap();
    image.write(large - 512, &[9; 512], LATER).unwrap();
    image.close().unwrap();
    let path = join(&folder, "image.qcow2");
    assert_clean(&path);
    let image = open(&path, Access::ReadOnly);
    let mut found = vec![0; bytes.len() + 512];
    image.read(0, &mut found).unwrap();
    bytes.resize(found.len(), 0);
    assert!(found == bytes, "what lies below shows nowhere past the old end");
}
