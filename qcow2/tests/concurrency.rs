//! Many threads on one image: no acknowledged write is lost, whatever happens beside it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use blockyard_qcow2::{AsyncImage, CreateOptions, Durability, ZeroMode};
use support::{KIB, MIB, assert_clean, assert_reads_as, folder, fresh, join, over, pattern};

const LATER: Durability = Durability::OnFlush;

#[test]
fn a_partial_write_beside_a_partial_zero_of_the_same_cluster_is_never_lost() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let clusters = 2048;
    let cluster = 4 * KIB;
    let image = fresh(&path, &CreateOptions { cluster_size: cluster as u32, ..CreateOptions::new(clusters * cluster) });
    image.write(0, &vec![9; (clusters * cluster) as usize], LATER).unwrap();
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            start.wait();
            for index in 0..clusters {
                image.write(index * cluster, &[1; 1024], LATER).unwrap();
            }
        });
        scope.spawn(|| {
            start.wait();
            for index in 0..clusters {
                image.zero(index * cluster + 1024, cluster - 1024, ZeroMode::Unmap, LATER).unwrap();
            }
        });
    });
    image.close().unwrap();
    let one: Vec<u8> = [vec![1; 1024], vec![0; cluster as usize - 1024]].concat();
    assert_clean(&path);
    assert_reads_as(&path, &one.repeat(clusters as usize));
}

#[test]
fn two_first_writers_of_one_cluster_both_keep_their_bytes() {
    let folder = folder();
    let base = join(&folder, "base.qcow2");
    let size = 8 * MIB;
    let below = fresh(&base, &CreateOptions::new(size));
    below.write(0, &vec![5; size as usize], LATER).unwrap();
    below.close().unwrap();
    let path = join(&folder, "overlay.qcow2");
    let image = fresh(&path, &over("base.qcow2", size));
    let sector = 512;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for index in (thread..size / sector).step_by(4) {
                    // Every other sector of the disk, so that each cluster has four writers and keeps base data.
                    if index % 8 < 4 {
                        image.write(index * sector, &[thread as u8 + 1; 512], LATER).unwrap();
                    }
                    if index % 1024 == thread {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    image.close().unwrap();
    let mut bytes = vec![5; size as usize];
    for (index, sector) in bytes.chunks_mut(512).enumerate() {
        if index % 8 < 4 {
            sector.fill((index % 4) as u8 + 1);
        }
    }
    assert_clean(&path);
    assert_reads_as(&path, &bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_future_is_dropped_is_done_whole_or_not_at_all() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = AsyncImage::new(fresh(&path, &CreateOptions::new(64 * MIB)));
    for index in 0..64u64 {
        let write = image.write(index * MIB, vec![index as u8 + 1; MIB as usize], LATER);
        if index % 2 == 0 {
            write.await.unwrap();
        } else {
            // Polled once, then dropped.
            tokio::select! { biased; outcome = write => outcome.unwrap(), () = std::future::ready(()) => {} }
        }
    }
    image.close().await.unwrap();
    assert!(image.check().await.unwrap().is_clean());
    drop(image);
    let image = support::open(&path, blockyard_qcow2::Access::ReadOnly);
    let mut bytes = vec![0; MIB as usize];
    for index in 0..64u64 {
        image.read(index * MIB, &mut bytes).unwrap();
        let done = bytes.iter().all(|byte| *byte == index as u8 + 1);
        let untouched = index % 2 == 1 && bytes.iter().all(|byte| *byte == 0);
        assert!(done || untouched, "MiB {index}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_on_one_handle_covers_what_another_wrote() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    let image = AsyncImage::new(fresh(&path, &CreateOptions::new(16 * MIB)));
    let data = pattern(3, MIB as usize);
    let other = image.clone();
    other.write(5 * MIB, data.clone(), LATER).await.unwrap();
    image.flush().await.unwrap();
    // As a crash would leave it: nobody closes.
    drop((image, other));
    let mut bytes = vec![0; 16 << 20];
    bytes[5 << 20..6 << 20].copy_from_slice(&data);
    assert_reads_as(&path, &bytes);
}

/// Each block has one writer, who counts up. A reader finds nothing older than what was answered before it asked, and nothing
/// newer than what was begun before its answer: through memory that is still to be written and through the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_is_what_the_next_reader_finds() {
    const BLOCK: u64 = 4096;
    const BLOCKS: u64 = 256;
    const WRITERS: u64 = 3;
    let folder = folder();
    let counters = || (0..BLOCKS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    // Fresh each time: most first writes give a cluster its place.
    for round in 0..support::scale() * 24 {
        let path = join(&folder, "image.qcow2");
        let _ = std::fs::remove_file(&path);
        let image = AsyncImage::new(fresh(&path, &CreateOptions::new(BLOCKS * BLOCK)));
        let (begun, answered) = (Arc::new(counters()), Arc::new(counters()));
        let mut tasks = Vec::new();
        for task in 0..2 * WRITERS {
            let (image, begun, answered) = (image.clone(), begun.clone(), answered.clone());
            let mut random = fastrand::Rng::with_seed(round * 100 + task);
            tasks.push(tokio::spawn(async move {
                for _ in 0..400 {
                    if task < WRITERS {
                        let block = random.u64(..BLOCKS) / WRITERS * WRITERS + task;
                        let Some(begun) = begun.get(block as usize) else { continue };
                        let version = begun.fetch_add(1, Ordering::SeqCst) + 1;
                        let data = version.to_be_bytes().repeat(BLOCK as usize / 8);
                        image.write(block * BLOCK, data, LATER).await.unwrap();
                        answered[block as usize].store(version, Ordering::SeqCst);
                    } else {
                        let block = random.u64(..BLOCKS);
                        let least = answered[block as usize].load(Ordering::SeqCst);
                        let buffer = vec![0xee; BLOCK as usize];
                        let (mut bytes, holes) = image.read_sparse(block * BLOCK, buffer).await.unwrap();
                        holes.into_iter().for_each(|hole| bytes[hole].fill(0));
                        let most = begun[block as usize].load(Ordering::SeqCst);
                        for found in bytes.chunks(8).map(|word| u64::from_be_bytes(word.try_into().unwrap())) {
                            assert!((least..=most).contains(&found), "block {block}: {found}, not {least} to {most}");
                        }
                    }
                    if task < WRITERS && random.u8(..4) == 0 {
                        image.flush().await.unwrap();
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        image.close().await.unwrap();
        assert_clean(&path);
        let versions = answered.iter().flat_map(|version| version.load(Ordering::SeqCst).to_be_bytes().repeat(512));
        assert_reads_as(&path, &versions.collect::<Vec<_>>());
    }
}
