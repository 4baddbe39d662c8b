//! The hint that a range will be read: what the storage hears of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;
#[path = "support/watched.rs"]
mod watched;

use std::ops::Range;
use std::sync::Arc;

use blockyard_qcow2::storage::{FileStorage, Storage};
use blockyard_qcow2::{
    Access, AsyncImage, Backing, BackingFormat, CreateOptions, Durability, Image, Layer, OpenOptions, create_on,
};
use support::{MIB, fresh, join, open, over, pattern};
use watched::Watched;

const LATER: Durability = Durability::OnFlush;
const CLUSTER: u64 = 65536;
const CACHE: usize = 1 << 20;

fn length(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// A storage with an image of 8 MiB on it, with data at these offsets, a cluster each.
fn image_with(data: &[u64], options: &CreateOptions, below: Option<Layer>) -> Arc<Watched> {
    let storage = Arc::new(Watched::default());
    create_on(&*storage, options).unwrap();
    let image = Image::open_on(storage.clone(), Access::ReadWrite, below, CACHE).unwrap();
    data.iter().for_each(|at| image.write(*at, &pattern(*at, CLUSTER as usize), LATER).unwrap());
    image.close().unwrap();
    storage.take();
    storage
}

fn layer(storage: &Arc<Watched>, below: Option<Layer>) -> Layer {
    Layer::Image(Box::new(Image::open_on(storage.clone(), Access::ReadOnly, below, CACHE).unwrap()))
}

#[test]
fn the_storage_of_each_layer_hears_of_its_own_data_and_nothing_is_read() {
    let raw = Arc::new(Watched::with_content(pattern(1, 100_000)));
    let raw_layer = || Some(Layer::Raw { storage: raw.clone(), size: 100_000 });
    let over_raw = Some(Backing { name: "raw".into(), format: BackingFormat::Raw });
    let options = CreateOptions { backing: over_raw, ..CreateOptions::new(4 * MIB) };
    let base = image_with(&[MIB], &options, raw_layer());
    let top = image_with(&[MIB + CLUSTER, 3 * MIB, 6 * MIB], &over("base", 8 * MIB), Some(layer(&base, raw_layer())));
    let chain = layer(&base, raw_layer());
    let image = Image::open_on(top.clone(), Access::ReadOnly, Some(chain), CACHE).unwrap();
    // The tables are known from here on.
    image.map(0, 8 * MIB, usize::MAX).unwrap();
    for storage in [&top, &base, &raw] {
        storage.take();
    }

    image.prefetch(10, 8 * MIB - 20);
    let (of_top, of_base, of_raw) = (top.take(), base.take(), raw.take());
    assert_eq!(length(&of_top.prefetches), 3 * CLUSTER, "{of_top:?}");
    assert_eq!(length(&of_base.prefetches), CLUSTER, "{of_base:?}");
    assert_eq!(of_raw.prefetches, vec![10..100_000]);
    for asked in [of_top, of_base, of_raw] {
        assert!(asked.reads.is_empty() && asked.payload.is_empty() && asked.metadata.is_empty(), "{asked:?}");
    }
    // The bytes that were announced are those that a read then asks for.
    image.prefetch(3 * MIB + 5, 100);
    let announced = top.take().prefetches;
    image.read(3 * MIB + 5, &mut [0; 100]).unwrap();
    assert_eq!(announced, top.take().reads);
}

#[test]
fn a_long_hint_costs_no_more_than_its_first_32_mib() {
    let size = 100 * MIB;
    let raw = Arc::new(Watched::with_content(vec![1; size as usize]));
    let below = Some(Layer::Raw { storage: raw.clone(), size });
    let backing = Some(Backing { name: "raw".into(), format: BackingFormat::Raw });
    let top = image_with(&[], &CreateOptions { backing, ..CreateOptions::new(size) }, below);
    let below = Some(Layer::Raw { storage: raw.clone(), size });
    let image = Image::open_on(top, Access::ReadOnly, below, CACHE).unwrap();
    image.prefetch(MIB, size - MIB);
    assert_eq!(length(&raw.take().prefetches), 32 * MIB);
}

#[test]
fn a_hint_that_cannot_be_followed_harms_nothing() {
    let storage = image_with(&[0], &CreateOptions::new(8 * MIB), None);
    let image = Image::open_on(storage.clone(), Access::ReadWrite, None, CACHE).unwrap();
    for (offset, length) in [(8 * MIB, 1), (u64::MAX, 1), (1, u64::MAX), (0, 0)] {
        image.prefetch(offset, length);
    }
    assert!(storage.take().prefetches.is_empty());
    image.write(0, &[1; 512], LATER).unwrap();
    image.close().unwrap();
    image.prefetch(0, 512);
    assert!(storage.take().prefetches.is_empty());
}

#[tokio::test]
async fn files_are_prefetched_at_any_offset_and_length_and_read_as_before() {
    let folder = support::folder();
    let path = join(&folder, "image.qcow2");
    let data = pattern(1, 3 << 20);
    let image = fresh(&path, &CreateOptions::new(4 * MIB));
    image.write(7, &data, LATER).unwrap();
    // Also while the payload may be on its way.
    image.prefetch(0, 4 * MIB);
    image.close().unwrap();
    drop(image);
    let image = AsyncImage::open(path.clone(), OpenOptions::new(Access::ReadOnly)).await.unwrap();
    for (offset, length) in [(0, 4 * MIB), (7, 1), (MIB - 1, MIB + 2), (5 * MIB, 1)] {
        image.prefetch(offset, length).await;
    }
    assert!(image.read(7, vec![0; data.len()]).await.unwrap() == data);
    drop(image);
    // What no file has is no hint either.
    let file = std::fs::File::open(&path).unwrap();
    FileStorage::new(file).prefetch(u64::MAX - 10, u64::MAX);
    open(&path, Access::ReadOnly).close().unwrap();
}
