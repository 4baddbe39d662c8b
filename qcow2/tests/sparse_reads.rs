//! Reads that tell their holes: what the tables know to be zeroes, in this image or far below, is not filled.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockyard_qcow2::{
    Access, AsyncImage, Backing, BackingFormat, CompressionLevel, CreateOptions, Durability, Image, OpenOptions,
    ZeroMode, create,
};
use support::{KIB, MIB, folder, fresh, join, mapped_holes, open, over, pattern, read_sparse, succeed, text};

const LATER: Durability = Durability::OnFlush;

/// Whole and odd ranges are read right, their holes told exactly.
fn check(image: &Image, bytes: &[u8]) {
    let size = bytes.len() as u64;
    let odd = [(0, size), (1, size - 2), (4095, 8194), (60 * KIB + 7, 200 * KIB), (size - 1, 1), (size, 0), (300, 0)];
    for (offset, length) in odd {
        let expected = &bytes[offset as usize..(offset + length) as usize];
        assert_eq!(read_sparse(image, offset, expected), mapped_holes(image, offset, length), "{length} at {offset}");
    }
}

#[test]
fn a_read_without_holes_tells_none_and_an_empty_image_is_one() {
    let folder = folder();
    let image = fresh(&join(&folder, "image.qcow2"), &CreateOptions::new(3 * MIB));
    assert_eq!(read_sparse(&image, 5, &vec![0; MIB as usize]), vec![0..MIB as usize]);
    assert!(read_sparse(&image, 5, &[]).is_empty());
    let data = pattern(1, 3 << 20);
    image.write(0, &data, LATER).unwrap();
    // The payload may be in memory still.
    let holes = read_sparse(&image, 0, &data);
    assert_eq!((holes.len(), holes.capacity()), (0, 0));
    image.zero(MIB + 1, 512 * KIB, ZeroMode::Keep, LATER).unwrap();
    let mut bytes = data;
    bytes[(1 << 20) + 1..(1 << 20) + 1 + (512 << 10)].fill(0);
    // Only whole clusters are known to be zeroes.
    let whole = MIB as usize + (64 << 10)..(MIB + 512 * KIB) as usize;
    assert_eq!(read_sparse(&image, 0, &bytes), vec![whole]);
    check(&image, &bytes);
}

#[test]
fn holes_go_through_a_chain_and_past_the_end_of_a_shorter_layer() {
    let folder = folder();
    let size = 2 * MIB;
    // A base that ends in the middle of a cluster, two layers over it, each longer than the one below.
    let base_size = 700 * KIB + 512;
    let mut bytes = vec![0; size as usize];
    let base = fresh(&join(&folder, "base.qcow2"), &CreateOptions::new(base_size));
    let data = pattern(1, (base_size - 600 * KIB) as usize);
    base.write(600 * KIB, &data, LATER).unwrap();
    base.write(0, &[7; 100], LATER).unwrap();
    base.close().unwrap();
    bytes[600 << 10..base_size as usize].copy_from_slice(&data);
    bytes[..100].fill(7);
    let options = CreateOptions { cluster_size: 4096, ..over("base.qcow2", MIB) };
    let middle = fresh(&join(&folder, "middle.qcow2"), &options);
    middle.write(200 * KIB + 1, &[8; 5000], LATER).unwrap();
    middle.zero(640 * KIB, 8 * KIB, ZeroMode::Unmap, LATER).unwrap();
    middle.close().unwrap();
    bytes[(200 << 10) + 1..][..5000].fill(8);
    bytes[640 << 10..648 << 10].fill(0);
    let top = fresh(&join(&folder, "top.qcow2"), &over("middle.qcow2", size));
    check(&top, &bytes);
    top.write(1900 * KIB, &[9; 1000], LATER).unwrap();
    bytes[1900 << 10..][..1000].fill(9);
    top.discard(0, 64 * KIB, LATER).unwrap();
    bytes[..64 << 10].fill(0);
    check(&top, &bytes);
    let holes = read_sparse(&top, 0, &bytes);
    assert!(holes.contains(&(640 << 10..648 << 10)), "a hole of the layer between: {holes:?}");
    // The base's last cluster is data up to the base's own end, and zeroes from there on.
    assert!(holes.iter().any(|hole| hole.start == base_size as usize), "{holes:?}");
    top.close().unwrap();
}

#[test]
fn the_large_holes_of_a_raw_layer_are_told() {
    let folder = folder();
    // 1 MiB of data at 2 MiB, a hole, and data up to an end in the middle of a cluster.
    let raw_size = 5 * MIB + 700;
    let raw = File::create_new(join(&folder, "base.raw")).unwrap();
    raw.set_len(raw_size).unwrap();
    let (middle, end) = (pattern(1, 1 << 20), pattern(2, 5000));
    raw.write_all_at(&middle, 2 * MIB).unwrap();
    raw.write_all_at(&end, raw_size - 5000).unwrap();
    raw.sync_all().unwrap();
    let size = 8 * MIB;
    let mut bytes = vec![0; size as usize];
    bytes[2 << 20..3 << 20].copy_from_slice(&middle);
    bytes[raw_size as usize - 5000..raw_size as usize].copy_from_slice(&end);
    let path = join(&folder, "overlay.qcow2");
    let backing = Some(Backing { name: "base.raw".into(), format: BackingFormat::Raw });
    let image = fresh(&path, &CreateOptions { backing, ..CreateOptions::new(size) });
    let mib = |from: u64, to: u64| (from * MIB) as usize..(to * MIB) as usize;
    // A step with a byte of data is data as a whole; past the end of the file there is none.
    let expected = vec![mib(0, 2), mib(3, 4), raw_size as usize..size as usize];
    assert_eq!(read_sparse(&image, 0, &bytes), expected);
    // Wherever a read begins or ends.
    for (offset, length) in [(1, 2 * MIB), (3 * MIB - 1, MIB), (3 * MIB + 77, 5000), (raw_size - 1, 2), (7, size - 9)] {
        let holes = read_sparse(&image, offset, &bytes[offset as usize..(offset + length) as usize]);
        let mapped = mapped_holes(&image, offset, length);
        let inside = |start: usize, end: usize| mapped.iter().any(|hole| hole.start <= start && end <= hole.end);
        assert!(holes.iter().all(|hole| inside(hole.start, hole.end)), "{holes:?} not in {mapped:?}");
        assert!(!holes.is_empty(), "{length} at {offset}");
    }
    image.close().unwrap();
}

#[test]
fn compressed_clusters_are_data_and_what_lies_between_them_is_not() {
    let folder = folder();
    let path = join(&folder, "image.qcow2");
    create(&path, &CreateOptions::new(MIB)).unwrap();
    let compress = Some(CompressionLevel::Fast);
    let image = Image::open(&path, &OpenOptions { compress, ..OpenOptions::new(Access::ReadWrite) }).unwrap();
    let mut bytes = vec![0; MIB as usize];
    for (cluster, value) in [(1, 5), (2, 0), (7, 6)] {
        let at = cluster << 16;
        image.write(at as u64, &[value; 65536], LATER).unwrap();
        bytes[at..at + 65536].fill(value);
    }
    image.close().unwrap();
    drop(image);
    let image = open(&path, Access::ReadOnly);
    check(&image, &bytes);
    let cluster = |from: usize, to: usize| from << 16..to << 16;
    // The cluster that was written as zeroes is data: nobody looks into it.
    assert_eq!(read_sparse(&image, 0, &bytes), vec![cluster(0, 1), cluster(3, 7), cluster(8, 16)]);
}

fn qemu_io(path: &Path, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", *command]));
    arguments.push(text(path));
    succeed("qemu-io", &arguments);
}

#[test]
fn subclusters_are_holes_one_by_one() {
    let folder = folder();
    let base = fresh(&join(&folder, "base.qcow2"), &CreateOptions::new(MIB));
    base.write(0, &[9; 300 << 10], LATER).unwrap();
    base.close().unwrap();
    let path = join(&folder, "overlay.qcow2");
    let options = "extended_l2=on,backing_file=base.qcow2,backing_fmt=qcow2";
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&path), "1M"]);
    qemu_io(&path, &["write -q -P 1 2k 2k", "write -q -z 10k 4k", "write -q -P 2 500k 2k", "write -q -z 510k 2k"]);
    let mut bytes = vec![0; MIB as usize];
    for (from, to, value) in [(0, 300, 9), (2, 4, 1), (10, 14, 0), (500, 502, 2)] {
        bytes[from << 10..to << 10].fill(value);
    }
    let image = open(&path, Access::ReadOnly);
    check(&image, &bytes);
    let kib = |from: usize, to: usize| from << 10..to << 10;
    let holes = read_sparse(&image, 0, &bytes);
    assert_eq!(holes.first(), Some(&kib(10, 14)));
    assert_eq!(holes[1].end, 500 << 10);
    assert_eq!(holes.last(), Some(&kib(502, 1024)));
}

#[test]
fn ranges_past_the_end_and_closed_images_are_refused() {
    let folder = folder();
    let image = fresh(&join(&folder, "image.qcow2"), &CreateOptions::new(MIB));
    assert!(image.read_sparse(MIB - 1, &mut [0; 2]).is_err());
    assert!(image.read_sparse(u64::MAX, &mut [0; 2]).is_err());
    image.close().unwrap();
    assert!(image.read_sparse(0, &mut [0; 2]).is_err());
}

#[tokio::test]
async fn asynchronous_callers_get_their_buffer_back_with_its_holes() {
    let folder = folder();
    let image = AsyncImage::new(fresh(&join(&folder, "image.qcow2"), &CreateOptions::new(MIB)));
    image.write(64 * KIB, vec![3; 65536], LATER).await.unwrap();
    let (buffer, holes) = image.read_sparse(32 * KIB, vec![0xee; 128 << 10]).await.unwrap();
    assert_eq!(holes, vec![0..32 << 10, 96 << 10..128 << 10]);
    assert!(buffer[32 << 10..96 << 10].iter().all(|byte| *byte == 3));
    image.close().await.unwrap();
}
