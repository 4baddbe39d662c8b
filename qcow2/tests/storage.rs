//! The contract of [`Storage`], the same for every implementation: what the engine may rely on, and nothing more.
//!
//! A new implementation, or a new way to open one, gets a line in [`every_kind`].
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "nothing fails or crashes here: only storage that does its work is needed")]

#[path = "support/faulty.rs"]
mod faulty;
#[path = "support/privileged.rs"]
mod privileged;
#[path = "support/quota.rs"]
mod quota;
#[path = "support/sim_disk.rs"]
mod sim_disk;
mod support;
#[path = "support/volatile_disk.rs"]
mod volatile_disk;

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use blockyard_qcow2::storage::{FileStorage, MemoryStorage, Reservation, Storage};
use blockyard_qcow2::{self as qcow2, Access, BufferPool, Caching, CreateOptions, Durability, Image, create};
use faulty::Faulty;
use privileged::{Mounted, privileged};
use quota::Quota;
use sim_disk::{Content, SimDisk};
use support::{assert_clean, folder, join, pattern};
use volatile_disk::VolatileDisk;

/// An empty file and two handles on it.
type Pair = (Arc<dyn Storage>, Arc<dyn Storage>);

fn twice(storage: impl Storage + 'static) -> Pair {
    let storage = Arc::new(storage);
    (storage.clone(), storage)
}

/// Two open file descriptions of one new file.
fn on_file(path: &Path, storage: impl Fn(File) -> FileStorage) -> Pair {
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    let _ = std::fs::remove_file(path);
    (Arc::new(storage(open())), Arc::new(storage(open())))
}

/// The name of an implementation, and how an empty one is made at a path that is its own.
type Implementation = (&'static str, fn(&Path) -> Pair);

fn every_kind() -> Vec<Implementation> {
    vec![
        ("file", |path| on_file(path, FileStorage::new)),
        ("file with direct access", |path| on_file(path, FileStorage::with_direct_access)),
        ("file with direct reads", |path| on_file(path, FileStorage::with_direct_reads)),
        ("memory", |_| twice(MemoryStorage::new())),
        ("simulated disk", |_| twice(SimDisk::new(Arc::default(), Content::default()))),
        ("volatile disk", |_| twice(VolatileDisk::default())),
        ("faulty", |_| twice(Faulty::new(Arc::new(MemoryStorage::new()), &[]))),
        ("quota", |_| twice(Quota::new(Arc::new(MemoryStorage::new()), HashSet::new(), 1 << 20, true))),
        ("quota without reservation", |_| {
            twice(Quota::new(Arc::new(MemoryStorage::new()), HashSet::new(), 1 << 20, false))
        }),
    ]
}

/// Runs one rule against every implementation.
fn for_every_kind(rule: impl Fn(&str, &dyn Storage, &dyn Storage)) {
    let folder = folder();
    for (name, make) in every_kind() {
        let (storage, other) = make(&join(&folder, "storage"));
        rule(name, &*storage, &*other);
    }
}

fn put(storage: &dyn Storage, offset: u64, bytes: &[u8]) {
    storage.write(offset, &mut [IoSlice::new(bytes)]).unwrap();
}

/// Reads into memory that begins at an odd address, and into memory that begins at a page; both hold something else before.
fn get(storage: &dyn Storage, offset: u64, length: usize) -> Vec<u8> {
    let mut memory = vec![0xee; length + 1];
    storage.read(offset, &mut memory[1..]).unwrap();
    let mut aligned = BufferPool::new(0).lend(length);
    aligned.as_mut().fill(0xee);
    storage.read(offset, aligned.as_mut()).unwrap();
    let found = memory.split_off(1);
    assert!(aligned.as_ref() == found, "{length} at {offset}");
    found
}

#[test]
fn what_was_written_is_read_at_any_offset_length_and_address() {
    for_every_kind(|name, storage, _| {
        let mut model = vec![0; 40_000];
        let sizes = [1, 2, 511, 512, 513, 4095, 4096, 4097, 9000];
        for (number, (offset, length)) in [0, 1, 511, 512, 513, 4095, 4096, 4097, 8191, 12_288, 20_001]
            .into_iter()
            .zip(sizes.into_iter().cycle())
            .enumerate()
        {
            let memory = pattern(number as u64, length + 3);
            // Memory at every small misalignment too.
            let data = &memory[number % 4..number % 4 + length];
            if number % 3 == 2 {
                storage.write_durable(offset as u64, &mut [IoSlice::new(data)]).unwrap();
            } else {
                put(storage, offset as u64, data);
            }
            model[offset..offset + length].copy_from_slice(data);
            for (offset, length) in [(offset, length), (offset + 1, length), (offset.saturating_sub(3), 7)] {
                let found = get(storage, offset as u64, length);
                assert!(found == model[offset..offset + length], "{name}: {length} at {offset}");
            }
        }
        assert!(get(storage, 0, model.len()) == model, "{name}");
    });
}

#[test]
fn a_write_past_the_end_extends_and_leaves_a_hole_of_zeroes() {
    for_every_kind(|name, storage, _| {
        assert_eq!(storage.length().unwrap(), 0, "{name}");
        put(storage, 10_001, b"abc");
        assert_eq!(storage.length().unwrap(), 10_004, "{name}");
        assert!(get(storage, 0, 10_001).iter().all(|byte| *byte == 0), "{name}");
        assert_eq!(get(storage, 10_001, 3), b"abc", "{name}");
        put(storage, 5000, b"x");
        assert_eq!(storage.length().unwrap(), 10_004, "{name}: a write before the end leaves the length");
        storage.write(30_000, &mut []).unwrap();
        storage.write(30_000, &mut [IoSlice::new(b"")]).unwrap();
        assert_eq!(storage.length().unwrap(), 10_004, "{name}: nothing was written");
        storage.write_durable(20_000, &mut [IoSlice::new(b"yz")]).unwrap();
        assert_eq!(storage.length().unwrap(), 20_002, "{name}");
    });
}

#[test]
fn reads_past_the_end_are_zeroes() {
    for_every_kind(|name, storage, _| {
        assert_eq!(get(storage, 0, 5000), vec![0; 5000], "{name}: empty");
        put(storage, 0, &[7; 700]);
        let mut expected = vec![7; 100];
        expected.resize(9000, 0);
        assert!(get(storage, 600, 9000) == expected, "{name}: across the end");
        assert_eq!(get(storage, 700, 10), [0; 10], "{name}: at the end");
        assert_eq!(get(storage, 1 << 40, 10), [0; 10], "{name}: far behind it");
        assert_eq!(get(storage, 3, 0), [0; 0], "{name}: nothing");
        assert_eq!(storage.length().unwrap(), 700, "{name}");
    });
}

#[test]
fn what_a_length_cuts_off_does_not_come_back() {
    for_every_kind(|name, storage, _| {
        put(storage, 0, &[9; 20_000]);
        storage.set_length(5001).unwrap();
        assert_eq!(storage.length().unwrap(), 5001, "{name}");
        assert_eq!(get(storage, 5000, 2), [9, 0], "{name}");
        storage.set_length(20_000).unwrap();
        assert_eq!(storage.length().unwrap(), 20_000, "{name}");
        let mut expected = vec![9; 5001];
        expected.resize(20_000, 0);
        assert!(get(storage, 0, 20_000) == expected, "{name}");
        storage.set_length(0).unwrap();
        assert_eq!(get(storage, 0, 100), [0; 100], "{name}");
    });
}

#[test]
fn two_handles_see_each_other() {
    for_every_kind(|name, storage, other| {
        put(storage, 100, b"one");
        assert_eq!(get(other, 100, 3), b"one", "{name}");
        put(other, 101, b"two");
        assert_eq!(get(storage, 100, 4), b"otwo", "{name}");
        other.set_length(50).unwrap();
        assert_eq!((storage.length().unwrap(), get(storage, 100, 3)), (50, vec![0; 3]), "{name}");
        storage.sync_data().unwrap();
        other.sync_data().unwrap();
    });
}

#[test]
fn many_slices_are_one_write() {
    for_every_kind(|name, storage, _| {
        let mut random = fastrand::Rng::with_seed(3);
        // More than the kernel takes in one call, of odd lengths, some empty.
        let pieces: Vec<Vec<u8>> = (0..2500).map(|number| pattern(number, random.usize(..40))).collect();
        let whole: Vec<u8> = pieces.concat();
        for offset in [0u64, 4096, 777] {
            let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
            storage.write(offset, &mut slices).unwrap();
            assert!(get(storage, offset, whole.len()) == whole, "{name} at {offset}");
            let mut slices: Vec<IoSlice<'_>> = pieces.iter().rev().map(|piece| IoSlice::new(piece)).collect();
            storage.write_durable(offset, &mut slices).unwrap();
            let reversed: Vec<u8> = pieces.iter().rev().flatten().copied().collect();
            assert!(get(storage, offset, whole.len()) == reversed, "{name} at {offset}, durable");
            storage.set_length(0).unwrap();
        }
    });
}

#[test]
fn a_reservation_moves_the_length_or_says_that_it_cannot() {
    for_every_kind(|name, storage, _| {
        put(storage, 0, &[5; 1000]);
        match storage.reserve(1000, 9000).unwrap() {
            Reservation::Done => assert_eq!(storage.length().unwrap(), 10_000, "{name}"),
            Reservation::Unsupported => assert_eq!(storage.length().unwrap(), 1000, "{name}"),
        }
        let length = storage.length().unwrap();
        assert_eq!(get(storage, 0, 1000), [5; 1000], "{name}");
        assert!(get(storage, 1000, 9000).iter().all(|byte| *byte == 0), "{name}");
        storage.reserve(200, 300).unwrap();
        assert_eq!(storage.length().unwrap(), length, "{name}: a reservation never cuts");
        assert_eq!(get(storage, 0, 1000), [5; 1000], "{name}: nor does it change what is there");
        put(storage, 5000, b"in reserved space");
        assert_eq!(get(storage, 5000, 17), b"in reserved space", "{name}");
    });
}

#[test]
fn punched_space_reads_as_zeroes_and_the_length_stays() {
    for_every_kind(|name, storage, _| {
        let mut model = pattern(8, 30_000);
        put(storage, 0, &model);
        for (offset, length) in [(4096, 8192), (20_001, 777), (29_000, 5000), (100_000, 4096)] {
            storage.punch(offset, length).unwrap();
            let (start, end) = ((offset as usize).min(model.len()), ((offset + length) as usize).min(model.len()));
            model[start..end].fill(0);
            assert!(get(storage, 0, model.len()) == model, "{name}: {length} at {offset}");
            assert_eq!(storage.length().unwrap(), 30_000, "{name}");
        }
    });
}

#[test]
fn dropping_the_cache_changes_nothing_that_was_synced() {
    for_every_kind(|name, storage, _| {
        let data = pattern(4, 70_000);
        put(storage, 123, &data);
        storage.sync_data().unwrap();
        storage.drop_cache().unwrap();
        assert!(get(storage, 123, data.len()) == data, "{name}");
    });
}

#[test]
fn threads_may_write_and_read_side_by_side() {
    for_every_kind(|name, storage, other| {
        let share = 64 * 1024;
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let storage = if thread % 2 == 0 { storage } else { other };
                scope.spawn(move || {
                    for round in 0..20u8 {
                        let data = vec![round + 1; share];
                        put(storage, thread * share as u64, &data);
                        assert!(get(storage, thread * share as u64, share) == data);
                    }
                });
            }
        });
        assert!(get(storage, 0, 4 * share).iter().all(|byte| *byte == 20), "{name}");
        assert!(storage.block_size().is_power_of_two(), "{name}");
    });
}

#[test]
fn a_file_system_without_direct_access_is_used_through_the_page_cache() {
    let folder = folder();
    // A ramfs knows nothing but its cache.
    let mounted = Mounted::at(&folder.path().join("ramfs"), &["-t", "ramfs", "-o", "mode=0777", "ramfs"]);
    let path = mounted.path().join("image.qcow2");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let storage = FileStorage::with_direct_access(file);
    assert!(!storage.has_direct_access());
    put(&storage, 0, &pattern(1, 1 << 20));
    assert!(get(&storage, 0, 1 << 20) == pattern(1, 1 << 20));
    drop(storage);
    std::fs::remove_file(&path).unwrap();

    // The same for an image, and for one whose clusters are smaller than a page.
    for (path, cluster_size) in [(path, 65536), (join(&folder, "image.qcow2"), 512)] {
        create(&path, &CreateOptions { cluster_size, ..CreateOptions::new(1 << 20) }).unwrap();
        let options = qcow2::OpenOptions { caching: Caching::Auto, ..qcow2::OpenOptions::new(Access::ReadWrite) };
        let image = Image::open(&path, &options).unwrap();
        let data = pattern(1, 100_001);
        image.write(1001, &data, Durability::BeforeReply).unwrap();
        image.close().unwrap();
        drop(image);
        assert_clean(&path);
        let mut found = vec![0; data.len()];
        support::open(&path, Access::ReadOnly).read(1001, &mut found).unwrap();
        assert!(found == data);
    }
}

#[test]
fn large_reads_of_a_cold_file_find_its_data_its_holes_and_its_end() {
    let folder = folder();
    for (name, open) in [
        ("writable", FileStorage::with_direct_access as fn(File) -> FileStorage),
        ("reads", FileStorage::with_direct_reads),
    ] {
        let path = join(&folder, name);
        // Data, a hole, data, and an end in the middle of a block.
        let mut model = pattern(1, 1 << 20);
        model.resize(3 << 20, 0);
        model.extend(pattern(2, (1 << 20) + 700));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        put(&FileStorage::new(file.try_clone().unwrap()), 0, &model[..1 << 20]);
        put(&FileStorage::new(file.try_clone().unwrap()), 3 << 20, &model[3 << 20..]);
        file.sync_all().unwrap();
        model.resize(6 << 20, 0);
        let storage = open(file);
        // More often than reads go without a look into the cache.
        for round in 0..300 {
            if round % 7 == 0 {
                storage.drop_cache().unwrap();
            }
            let (from, length) = (((round * 37) % 5) << 20, 256 << 10);
            let mut memory = BufferPool::new(0).lend(length);
            storage.read(from as u64, memory.as_mut()).unwrap();
            assert!(memory.as_ref() == &model[from..from + length], "{name}: {from}");
        }
        for (from, length) in [(0, 6 << 20), (512, 2 << 20), (3 << 20, 2 << 20), (4 << 20, 1 << 20), (5 << 20, 1 << 20)]
        {
            assert!(get(&storage, from as u64, length) == model[from..from + length], "{name}: {length} at {from}");
        }
    }
}

#[test]
fn direct_and_cached_transfers_of_the_same_pages_keep_their_order() {
    let folder = folder();
    let disk = join(&folder, "disk");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    support::succeed("mkfs.ext4", &["-q", "-F", "-b", "4096", support::text(&disk)]);
    let mounted = Mounted::at(&folder.path().join("ext4"), &["-o", "loop", support::text(&disk)]);
    privileged("chmod", &["0777", support::text(mounted.path())]);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(mounted.path().join("file")).unwrap();
    let storage = FileStorage::with_direct_access(file);
    assert!(storage.has_direct_access());
    assert!(storage.block_size() >= 4096);

    // Each thread has an area; what is large and aligned goes around the cache, the rest through it.
    let area = 8 << 20;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let storage = &storage;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread);
                let (base, mut model) = (thread * area, vec![0; area as usize]);
                let mut memory = BufferPool::new(1 << 20).lend(1 << 20);
                for round in 0..200 {
                    let is_large = random.bool();
                    let unit = if is_large { 4096 } else { 1 };
                    let length = if is_large { random.u64(32..=256) * unit } else { random.u64(1..=9000) };
                    let offset = random.u64(..=(area - length) / unit) * unit;
                    let bytes = &mut memory.as_mut()[..length as usize];
                    bytes.copy_from_slice(&pattern(thread << 32 | round, length as usize));
                    put(storage, base + offset, bytes);
                    model[offset as usize..(offset + length) as usize].copy_from_slice(bytes);
                    let (from, length) = match random.u8(..3) {
                        0 => (random.u64(..area - 70_000), 70_000),
                        // What is large and aligned is read around the cache, too, where the cache does not have it all.
                        _ => (random.u64(..(area - (1 << 20)) / 4096) * 4096, 1 << 20),
                    };
                    let found = get(storage, base + from, length);
                    assert!(found == model[from as usize..from as usize + length], "thread {thread}, round {round}");
                }
                assert!(get(storage, base, area as usize) == model, "thread {thread}");
            });
        }
    });
    storage.sync_data().unwrap();
    storage.drop_cache().unwrap();
}
