//! Single requests over all of an enormous disk, and steps of 1 GiB through it: what they cost is bounded by what the image
//! holds, not by the size of the disk. Times are told; only a hang fails.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

#[path = "support/deadline.rs"]
mod deadline;
#[path = "support/sparse.rs"]
mod sparse;
mod support;

use std::sync::Arc;
use std::time::Instant;

use blockyard_qcow2::{
    Access, CreateOptions, Durability, Extent, ExtentKind, Image, Layer, Preallocation, ZeroMode, create_on,
};
use deadline::within_deadline;
use sparse::Sparse;
use support::{MIB, over};

const LATER: Durability = Durability::OnFlush;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const CACHE: usize = 64 << 20;
const MAX: usize = 4096;

fn timed<T: Send + 'static>(what: &str, case: impl FnOnce() -> T + Send + 'static) -> T {
    let from = Instant::now();
    let value = within_deadline(what, case);
    println!("{what}: {:?}", from.elapsed());
    value
}

fn new(options: &CreateOptions, below: Option<Layer>) -> Arc<Image> {
    let disk = Arc::new(Sparse::default());
    create_on(&*disk, options).unwrap();
    Arc::new(Image::open_on(disk, Access::ReadWrite, below, CACHE).unwrap())
}

fn full(size: u64) -> CreateOptions {
    CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::new(size) }
}

fn read_only(options: &CreateOptions) -> Layer {
    let disk = Arc::new(Sparse::default());
    create_on(&*disk, options).unwrap();
    Layer::Image(Box::new(Image::open_on(disk, Access::ReadOnly, None, CACHE).unwrap()))
}

fn steps(what: &str, image: &Arc<Image>, size: u64, step: impl Fn(&Image, u64) + Send + 'static) {
    let image = image.clone();
    let what = format!("{what}, {} steps of 1 GiB", size / GIB);
    timed(&what, move || (0..size).step_by(GIB as usize).for_each(|offset| step(&image, offset)));
}

fn is_zero(image: &Arc<Image>) {
    let extents = image.map_all().unwrap();
    assert!(extents.iter().all(|extent| extent.kind != ExtentKind::Data), "{extents:?}");
}

#[test]
fn zeroing_and_trimming_gib_by_gib_costs_tables_only() {
    let unmap = |image: &Image, offset| image.zero(offset, GIB, ZeroMode::Unmap, LATER).unwrap();
    let keep = |image: &Image, offset| image.zero(offset, GIB, ZeroMode::Keep, LATER).unwrap();
    let trim = |image: &Image, offset| image.discard(offset, GIB, LATER).unwrap();
    let empty = new(&CreateOptions::new(64 * TIB), None);
    steps("zero an empty disk of 64 TiB", &empty, 64 * TIB, unmap);
    steps("trim an empty disk of 64 TiB", &empty, 64 * TIB, trim);
    let size = 256 * GIB;
    for (what, step) in [("zero", unmap as fn(&Image, u64)), ("zero, keeping space,", keep), ("trim", trim)] {
        let image = new(&full(size), None);
        steps(&format!("{what} a full disk"), &image, size, step);
        is_zero(&image);
        let image = new(&over("base", size), Some(read_only(&full(size))));
        steps(&format!("{what} an empty disk over a full one"), &image, size, step);
        is_zero(&image);
        steps(&format!("{what} it again"), &image, size, step);
        timed("close", move || image.close().unwrap());
    }
}

#[test]
fn a_map_of_64_tib_is_told_in_one_piece_where_there_are_no_tables() {
    let size = 64 * TIB;
    for cluster_size in [64 << 10, 2 << 20] {
        for offset in [None, Some(4 * MIB)] {
            let image = new(&CreateOptions { cluster_size, ..CreateOptions::new(size) }, None);
            let tables = if offset.is_some() { 2 } else { 0 };
            (0..tables).for_each(|step| image.write(step * 32 * TIB + 4 * MIB, &[1; 512], LATER).unwrap());
            let what = format!("map 64 TiB, {tables} tables, clusters of {cluster_size}");
            let extents = timed(&what, move || image.map(0, size, MAX).unwrap());
            assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), size);
            assert_eq!(extents.len(), 2 * tables as usize + 1);
        }
    }
}

/// What `map` tells of a disk, asked again and again from where it ended; and how often.
fn map_piece_by_piece(image: &Image, max: usize) -> (Vec<Extent>, u64) {
    let (mut all, mut at, mut calls) = (Vec::<Extent>::new(), 0, 0);
    while at < image.size() {
        let part = image.map(at, image.size() - at, max).unwrap();
        calls += 1;
        for extent in part {
            assert_eq!(extent.offset, at, "a gap");
            at += extent.length;
            match all.last_mut() {
                Some(last) if (last.kind, last.depth) == (extent.kind, extent.depth) => last.length += extent.length,
                _ => all.push(extent),
            }
        }
    }
    (all, calls)
}

#[test]
fn a_map_ends_after_a_million_clusters_and_goes_on_from_there() {
    let size = 160 * GIB;
    let clusters = size >> 16;
    let image = new(&full(size), None);
    let (extents, calls) = timed("map 160 GiB, full", move || map_piece_by_piece(&image, MAX));
    assert_eq!((extents.len(), calls), (1, clusters.div_ceil(1 << 20)));

    // All but a cluster of each table is in the layer below, whose clusters are looked at as well.
    let image = new(&over("base", size), Some(read_only(&full(size))));
    for offset in (0..size).step_by(GIB as usize / 2) {
        image.zero(offset, 65536, ZeroMode::Unmap, LATER).unwrap();
    }
    let (whole, calls) = timed("map 160 GiB, two layers", move || {
        let (whole, calls) = map_piece_by_piece(&image, MAX);
        assert_eq!(whole, image.map_all().unwrap());
        assert_eq!(whole, map_piece_by_piece(&image, 1).0);
        (whole, calls)
    });
    assert_eq!(whole.len(), 640);
    assert!(calls > clusters.div_ceil(1 << 20), "{calls}");
}
