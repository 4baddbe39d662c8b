//! Images and files of many TiB on storage that holds only what was written, and refcount tables that outgrow a cluster.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

#[path = "support/sparse.rs"]
mod sparse;
mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{Access, CreateOptions, Durability, Error, Image, ZeroMode, create_on};
use sparse::Sparse;
use support::{KIB, MIB, assert_clean, assert_reads_as, folder, fresh, join, open, pattern, succeed, text};

const LATER: Durability = Durability::OnFlush;
const TIB: u64 = 1 << 40;
const CACHE: usize = 16 << 20;

fn number<const BYTES: usize>(storage: &dyn Storage, at: u64) -> u64 {
    let mut bytes = [0; BYTES];
    storage.read(at, &mut bytes).unwrap();
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Offset and clusters of the refcount table.
fn refcount_table(storage: &dyn Storage) -> (u64, u64) {
    (number::<8>(storage, 48), number::<4>(storage, 56))
}

/// The refcount of the cluster at a host offset, for counts of 16 bits in clusters of 64 KiB.
fn refcount(storage: &dyn Storage, host: u64) -> u64 {
    let (cluster, per_block) = (host >> 16, 32768);
    let block = number::<8>(storage, refcount_table(storage).0 + cluster / per_block * 8);
    if block == 0 { 0 } else { number::<2>(storage, block + cluster % per_block * 2) }
}

#[test]
fn a_file_past_16_tib_gets_a_refcount_table_of_more_than_a_cluster() {
    let disk = Arc::new(Sparse::default());
    create_on(&*disk, &CreateOptions::new(64 * TIB)).unwrap();
    let open = || Image::open_on(disk.clone(), Access::ReadWrite, None, CACHE).unwrap();
    let offsets = [0, 3 * MIB + 7, 17 * TIB, 40 * TIB - 1, 64 * TIB - 70_000];
    let data = pattern(1, 70_000);
    let check = |image: &Image, written: &[u64]| {
        for offset in written {
            let mut found = vec![0; data.len()];
            image.read(*offset, &mut found).unwrap();
            assert!(found == data, "at {offset}");
        }
        let mut hole = [0xee; 512];
        image.read(20 * TIB, &mut hole).unwrap();
        assert_eq!(hole, [0; 512]);
    };
    let image = open();
    image.write(offsets[0], &data, LATER).unwrap();
    image.close().unwrap();
    assert_eq!(refcount_table(&*disk).1, 1);
    // As if 17 TiB had been written and given back: what is new goes behind the end of the file.
    for (round, length) in [17 * TIB, 33 * TIB].into_iter().enumerate() {
        disk.set_length(length + 5).unwrap();
        let image = open();
        for offset in &offsets[1..] {
            image.write(*offset, &data, LATER).unwrap();
        }
        image.zero(offsets[1], 70_000, ZeroMode::Unmap, LATER).unwrap();
        image.write(offsets[1], &data, LATER).unwrap();
        image.flush().unwrap();
        check(&image, &offsets);
        image.close().unwrap();
        let report = image.check().unwrap();
        assert!(report.is_clean(), "{report:?}");
        check(&Image::open_on(disk.clone(), Access::ReadOnly, None, CACHE).unwrap(), &offsets);

        let (table, clusters) = refcount_table(&*disk);
        // 8,192 blocks of 2 GiB each per cluster of the table.
        assert!(clusters > (length / (16 * TIB)), "{clusters} clusters");
        assert!(table >= length || round > 0);
        for host in [0, table, table + (clusters - 1) * 65536] {
            assert_eq!(refcount(&*disk, host), 1, "cluster at {host:#x}");
        }
        println!("{length} bytes of file, {} held in memory, {clusters} clusters of refcount table", disk.held());
        assert!(disk.held() < 16 * MIB);
    }
    // A crash: everything about refcounts is made anew.
    let image = open();
    image.write(50 * TIB, &data, LATER).unwrap();
    image.flush().unwrap();
    drop(image);
    let image = open();
    assert!(image.is_dirty());
    image.close().unwrap();
    assert!(image.check().unwrap().is_clean());
    check(&Image::open_on(disk.clone(), Access::ReadOnly, None, CACHE).unwrap(), &offsets);
}

#[test]
fn a_disk_of_64_tib_is_grown_to_and_written_everywhere() {
    for cluster_size in [16384, 65536, 2 << 20] {
        let disk = Arc::new(Sparse::default());
        create_on(&*disk, &CreateOptions { cluster_size, ..CreateOptions::new(TIB) }).unwrap();
        let image = Image::open_on(disk.clone(), Access::ReadWrite, None, CACHE).unwrap();
        image.write(TIB - 512, &[1; 512], LATER).unwrap();
        image.grow(64 * TIB).unwrap();
        for step in 1..=64 {
            image.write(step * TIB - 512, &[step as u8; 512], LATER).unwrap();
        }
        image.close().unwrap();
        assert!(image.check().unwrap().is_clean());
        let image = Image::open_on(disk.clone(), Access::ReadOnly, None, CACHE).unwrap();
        assert_eq!(image.size(), 64 * TIB);
        for step in 1..=64 {
            let mut found = [0; 512];
            image.read(step * TIB - 512, &mut found).unwrap();
            assert_eq!(found, [step as u8; 512]);
        }
        let extents = image.map_all().unwrap();
        assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), 64 * TIB);
    }
}

#[test]
fn the_end_of_what_refcounts_can_describe_is_a_full_disk() {
    // 512-byte clusters with counts of 64 bits: 8 MiB of table name 1 Mi blocks of 64 clusters, 32 GiB; a 256th is kept
    // for the table itself.
    let disk = Arc::new(Sparse::default());
    let options = CreateOptions { cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(128 << 30) };
    create_on(&*disk, &options).unwrap();
    disk.set_length((32 << 30) / 256 * 255 - (20 << 20)).unwrap();
    let image = Image::open_on(disk.clone(), Access::ReadWrite, None, CACHE).unwrap();
    let data = pattern(1, 64 << 10);
    let mut written = 0;
    let refused = loop {
        match image.write(written, &data, LATER) {
            Ok(()) => written += data.len() as u64,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::NoSpace { .. }), "{refused:?}");
    assert!(image.poison().is_none());
    assert!(written > 0, "there is room for something");
    image.close().unwrap();
    assert!(image.check().unwrap().is_clean());
    println!("{written} bytes fit before the end");
    let image = Image::open_on(disk, Access::ReadOnly, None, CACHE).unwrap();
    let mut found = vec![0; data.len()];
    for offset in (0..written).step_by(data.len()) {
        image.read(offset, &mut found).unwrap();
        assert!(found == data, "at {offset}");
    }
}

#[test]
fn small_refcount_tables_outgrow_their_cluster_session_by_session() {
    let folder = folder();
    for (cluster_size, refcount_bits) in [(512, 64), (512, 16), (512, 1), (1024, 64), (4096, 64)] {
        let path = join(&folder, "image.qcow2");
        let size = 24 * MIB;
        let options = CreateOptions { cluster_size, refcount_bits, ..CreateOptions::new(size) };
        let mut image = fresh(&path, &options);
        let mut bytes = vec![0; size as usize];
        let mut clusters = Vec::new();
        for (step, length) in [20 * KIB, 700 * KIB, 5 * MIB, 16 * MIB].into_iter().enumerate() {
            let data = pattern(step as u64, length as usize);
            let at = step * 1_000_001;
            image.write(at as u64, &data, LATER).unwrap();
            bytes[at..at + data.len()].copy_from_slice(&data);
            image.close().unwrap();
            drop(image);
            assert_clean(&path);
            assert_reads_as(&path, &bytes);
            let header = std::fs::read(&path).unwrap();
            clusters.push(u32::from_be_bytes(header[56..60].try_into().unwrap()));
            image = open(&path, Access::ReadWrite);
        }
        if (cluster_size, refcount_bits) == (512, 64) {
            assert!(clusters[0] == 1 && clusters[3] > 8, "{clusters:?}");
        }
        std::fs::remove_file(path).unwrap();
    }
}

/// ext4 ends files at 16 TiB; memory file systems do not, so QEMU can be asked all the same.
#[test]
fn qemu_reads_and_accepts_a_file_past_16_tib() {
    let disk = Arc::new(Sparse::default());
    // The largest clusters, so that QEMU's own walk over every cluster of the file stays short.
    create_on(&*disk, &CreateOptions { cluster_size: 2 << 20, refcount_bits: 64, ..CreateOptions::new(64 * TIB) })
        .unwrap();
    disk.set_length(17 * TIB).unwrap();
    let image = Image::open_on(disk.clone(), Access::ReadWrite, None, CACHE).unwrap();
    image.write(63 * TIB, &[0x5a; 4096], LATER).unwrap();
    image.close().unwrap();
    let folder = tempfile::Builder::new().prefix("blockyard-qcow2-").tempdir_in("/dev/shm").unwrap();
    let path = join(&folder, "image.qcow2");
    let file = File::create_new(&path).unwrap();
    file.set_len(disk.length().unwrap()).unwrap();
    disk.each_page(|offset, bytes| {
        if bytes.iter().any(|byte| *byte != 0) {
            file.write_all_at(bytes, offset).unwrap();
        }
    });
    drop(file);
    assert_clean(&path);
    let found =
        succeed("qemu-io", &["-f", "qcow2", "-r", "-c", "read -P 0x5a 63T 4k", "-c", "read -P 0 1T 4k", text(&path)]);
    assert!(!found.contains("failed"), "{found}");
}
