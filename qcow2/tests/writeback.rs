//! A sync that fails on a real file system: the kernel forgets what it could not write and says so once. The engine never
//! forgets it, and a repair looks at the disk, not at what memory still shows.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

#[path = "support/privileged.rs"]
mod privileged;
mod support;

use blockyard_qcow2::{Access, CreateOptions, Durability, Error, Image};
use privileged::Overcommitted;
use support::{KIB, MIB, assert_clean, folder, fresh, open, pattern};

const SIZE: u64 = 64 * MIB;
const CLUSTER: u64 = 64 * KIB;
const LATER: Durability = Durability::OnFlush;

/// Of each cluster, the part that is flushed before the disk is full. What is written into the rest then needs no new
/// entry: only the page cache decides whether a reader sees it.
const KEPT: u64 = 4 * KIB;

fn cluster(number: u64) -> Vec<u8> {
    pattern(number, CLUSTER as usize)
}

/// The disk holds all that was flushed; of the rest each sector is as it was written or as it was before. Returns how many
/// sectors of the rest are there.
fn assert_legal(disk: &[u8]) -> usize {
    let mut there = 0;
    for (number, found) in disk.chunks(CLUSTER as usize).enumerate() {
        let written = cluster(number as u64);
        let (kept, rest) = found.split_at(KEPT as usize);
        assert!(kept == &written[..KEPT as usize], "cluster {number} was flushed, and is lost");
        for (sector, (found, written)) in rest.chunks(512).zip(written[KEPT as usize..].chunks(512)).enumerate() {
            let is_there = found == written;
            assert!(is_there || found.iter().all(|byte| *byte == 0), "cluster {number}, sector {sector}: garbage");
            there += usize::from(is_there);
        }
    }
    there
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn after_a_failed_writeback_nothing_is_acknowledged_and_a_repair_trusts_no_cache() {
    let folder = folder();
    let mut disk = Overcommitted::new(folder.path(), "24m");
    let path = disk.folder().join("image.qcow2");
    let image = fresh(&path, &CreateOptions::new(SIZE));
    for number in 0..SIZE / CLUSTER {
        image.write(number * CLUSTER, &cluster(number)[..KEPT as usize], LATER).unwrap();
    }
    image.flush().unwrap();

    // Where the failure shows, at a write or not before the flush, is the kernel's choice.
    let write = |number| image.write(number * CLUSTER + KEPT, &cluster(number)[KEPT as usize..], LATER);
    let failed = (0..SIZE / CLUSTER).find_map(|number| write(number).err());
    let failed = failed.or_else(|| image.flush().err());
    println!("reported as: {}", failed.as_ref().map_or("nothing".into(), Error::to_string));
    assert!(failed.is_some(), "64 MiB went into 24 MiB");
    assert!(image.poison().is_some());
    for attempt in 0..4 {
        // The kernel itself would say yes by now.
        let again = image.flush();
        assert!(matches!(again, Err(Error::Poisoned { .. })), "flush {attempt}: {again:?}");
        let again = image.write(0, &[1; 512], Durability::BeforeReply);
        assert!(matches!(again, Err(Error::Poisoned { .. })), "write {attempt}: {again:?}");
    }
    let closed = image.close();
    assert!(matches!(closed, Err(Error::Poisoned { .. })), "{closed:?}");
    drop(image);

    // Room again. What the page cache holds and the disk does not must not find its way into the repaired image.
    disk.grow("400m");
    let image = open(&path, Access::ReadWrite);
    assert!(image.is_dirty());
    assert_legal(&read_all(&image));
    image.close().unwrap();
    drop(image);
    let image = open(&path, Access::ReadOnly);
    let repaired = read_all(&image);
    drop(image);
    disk.remount();
    let image = open(&path, Access::ReadOnly);
    let disk_holds = read_all(&image);
    println!("{} sectors that were not flushed are there all the same", assert_legal(&disk_holds));
    assert!(disk_holds == repaired, "the repaired image showed what the disk does not hold");
    assert!(image.check().unwrap().is_clean());
    drop(image);
    assert_clean(&path);
}
