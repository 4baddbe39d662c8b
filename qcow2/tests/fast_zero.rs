//! Whether a zero request is fast is known before anything is done: it changes tables only, or it would write payload.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

mod support;
#[path = "support/watched.rs"]
mod watched;

use std::sync::Arc;

use blockyard_qcow2::{
    Access, AsyncImage, CompressionLevel, CreateOptions, Durability, Image, Layer, OpenOptions, ZeroMode, create_on,
};
use support::{over, pattern};
use watched::Watched;

const LATER: Durability = Durability::OnFlush;
const CLUSTER: u64 = 4096;
const SIZE: u64 = 40 * CLUSTER - 1024;

fn options(compress: bool) -> OpenOptions {
    OpenOptions { compress: compress.then_some(CompressionLevel::Fast), ..OpenOptions::new(Access::ReadWrite) }
}

/// Some clusters are written, whole and in part, some compressed, some zeroed, some left alone.
fn fill(random: &mut fastrand::Rng, image: &Image) {
    for _ in 0..12 {
        let from = random.u64(..SIZE);
        let from = if random.bool() { from / CLUSTER * CLUSTER } else { from };
        let length = random.u64(..=(SIZE - from).min(3 * CLUSTER));
        match random.u8(..4) {
            0 => image.zero(from, length, ZeroMode::Keep, LATER).unwrap(),
            1 => image.zero(from, length, ZeroMode::Unmap, LATER).unwrap(),
            2 => image.write(from, &vec![7; length as usize], LATER).unwrap(),
            _ => image.write(from, &pattern(from, length as usize), LATER).unwrap(),
        }
    }
    image.flush().unwrap();
}

fn new(random: &mut fastrand::Rng, options: &CreateOptions, below: Option<Layer>) -> (Arc<Watched>, Image) {
    let storage = Arc::new(Watched::default());
    create_on(&*storage, &CreateOptions { cluster_size: CLUSTER as u32, ..options.clone() }).unwrap();
    let image = Image::open_on_with(storage.clone(), below, &self::options(random.bool())).unwrap();
    fill(random, &image);
    (storage, image)
}

#[test]
fn a_zero_writes_payload_exactly_when_it_was_called_slow() {
    let (mut fast, mut slow) = (0, 0);
    for seed in 0..400 * support::scale() {
        let mut random = fastrand::Rng::with_seed(seed);
        let (storage, image) = new(&mut random, &CreateOptions::new(SIZE), None);
        let (storage, image) = if random.bool() {
            image.close().unwrap();
            drop(image);
            let base = Image::open_on(storage, Access::ReadOnly, None, 1 << 20).unwrap();
            new(&mut random, &over("base", SIZE), Some(Layer::Image(Box::new(base))))
        } else {
            (storage, image)
        };
        for _ in 0..20 {
            let at = |random: &mut fastrand::Rng| match random.u8(..3) {
                0 => random.u64(..=SIZE),
                1 => random.u64(..=SIZE / CLUSTER) * CLUSTER,
                _ => SIZE - random.u64(..=2 * CLUSTER),
            };
            let (a, b) = (at(&mut random), at(&mut random));
            let (offset, length) = (a.min(b), a.abs_diff(b));
            let content = storage.content();
            storage.take();
            let is_fast = image.zero_is_fast(offset, length);
            let asked = storage.take();
            assert!(asked.payload.is_empty() && asked.metadata.is_empty() && asked.reads.is_empty(), "{asked:?}");
            assert!(content == storage.content());
            let mode = if random.bool() { ZeroMode::Keep } else { ZeroMode::Unmap };
            image.zero(offset, length, mode, LATER).unwrap();
            // Payload is in the file after a flush.
            image.flush().unwrap();
            let written = storage.take().payload;
            assert_eq!(written.is_empty(), is_fast, "seed {seed}, {length} at {offset}: {written:?}");
            *(if is_fast { &mut fast } else { &mut slow }) += 1;
        }
        image.close().unwrap();
    }
    println!("{fast} were fast, {slow} were slow");
    assert!(fast > 1000 && slow > 1000, "{fast} {slow}");
}

#[tokio::test]
async fn whole_clusters_are_fast_and_ranges_past_the_end_are_not() {
    let storage = Arc::new(Watched::default());
    create_on(&*storage, &CreateOptions::new(1 << 20)).unwrap();
    let image = AsyncImage::new(Image::open_on(storage.clone(), Access::ReadWrite, None, 1 << 20).unwrap());
    image.write(0, vec![1; 1 << 20], LATER).await.unwrap();
    for (offset, length, expected) in [
        (0, 1 << 20, true),
        (65536, 65536, true),
        (65536, 65535, false),
        (65535, 65537, false),
        ((1 << 20) - 65536, 65536, true),
        ((1 << 20) - 1, 1, false),
        (77, 0, true),
        (0, (1 << 20) + 1, false),
        (u64::MAX, 1, false),
        (1, u64::MAX, false),
    ] {
        assert_eq!(image.zero_is_fast(offset, length).await, expected, "{length} at {offset}");
    }
    image.close().await.unwrap();
}
