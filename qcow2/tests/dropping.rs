//! An image that is dropped without a close: whom it keeps waiting, and what it leaves behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/deadline.rs"]
mod deadline;
#[path = "support/stalled.rs"]
mod stalled;
mod support;

use std::sync::Arc;

use blockyard_qcow2::{Access, AsyncImage, CreateOptions, Durability, Image, OpenOptions, create_on};
use deadline::within_deadline;
use stalled::Stalled;
use support::{MIB, fresh, join, pattern};

const LATER: Durability = Durability::OnFlush;

/// Payload that is seen to be given up.
struct Payload(#[expect(dead_code, reason = "held, never looked at")] Arc<()>);

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        &[7; 4096]
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool + Send + 'static) {
    within_deadline(what, move || {
        while !condition() {
            std::thread::yield_now();
        }
    });
}

#[test]
fn a_dropped_image_keeps_nobody_waiting_for_a_disk_that_hangs() {
    let storage = Arc::new(Stalled::default());
    create_on(&*storage, &CreateOptions::new(64 * MIB)).unwrap();
    let image = Image::open_on(storage.clone(), Access::ReadWrite, None, 1 << 20).unwrap();
    let payload = Arc::new(());
    let image = runtime().block_on(async {
        let image = AsyncImage::new(image);
        image.write(0, Payload(payload.clone()), LATER).await.unwrap();
        image.flush().await.unwrap();
        storage.stall(true);
        // In clusters that are apart, so that they are not written as one.
        for cluster in (0..10).rev() {
            image.write(cluster * 3 * 65536 + 9, Payload(payload.clone()), LATER).await.unwrap();
        }
        image
    });
    {
        let storage = storage.clone();
        within_deadline("two threads write", move || storage.await_waiting(2));
    }
    let held = Arc::strong_count(&payload);
    assert!(held > 2, "{held}");
    within_deadline("the drop", move || runtime().block_on(async move { drop(image) }));
    // What was not being written is given up at once; what is goes on, with the file.
    assert!(Arc::strong_count(&payload) <= 1 + 2, "{} of {held}", Arc::strong_count(&payload));
    assert!(Arc::strong_count(&storage) > 1);
    storage.stall(false);
    let (storage_left, payload_left) = (storage.clone(), payload.clone());
    until("the end of the threads", move || {
        (Arc::strong_count(&storage_left), Arc::strong_count(&payload_left)) == (2, 2)
    });
    // A crash is what it was: the first write had been flushed.
    let image = Image::open_on(storage, Access::ReadWrite, None, 1 << 20).unwrap();
    assert!(image.is_dirty());
    let mut found = [0; 4096];
    image.read(0, &mut found).unwrap();
    assert_eq!(found[..9], [7; 9]);
    image.close().unwrap();
    assert!(image.check().unwrap().is_clean());
}

#[test]
fn threads_that_are_gone_leave_nobody_waiting_for_room() {
    let storage = Arc::new(Stalled::default());
    create_on(&*storage, &CreateOptions::new(64 * MIB)).unwrap();
    let image = Image::open_on(storage.clone(), Access::ReadWrite, None, 1 << 20).unwrap();
    storage.break_down();
    within_deadline("writes of more than there is room for", move || {
        let shared = AsyncImage::new(image);
        let data = vec![7; MIB as usize];
        let refused = runtime().block_on(async {
            let mut refused = 0;
            for number in 0..40 {
                refused += usize::from(shared.write(number * MIB, data.clone(), LATER).await.is_err());
            }
            assert!(shared.flush().await.is_err());
            assert!(shared.close().await.is_err());
            refused
        });
        assert!(refused > 0);
        assert!(shared.poison().is_some());
    });
}

#[test]
fn a_dropped_image_can_be_opened_again_at_once_when_nothing_was_being_written() {
    let folder = support::folder();
    let path = join(&folder, "image.qcow2");
    let data = pattern(1, 100_000);
    let image = AsyncImage::new(fresh(&path, &CreateOptions::new(MIB)));
    runtime().block_on(async {
        image.write(5, data.clone(), LATER).await.unwrap();
        image.flush().await.unwrap();
        drop(image);
        // The lock went with it.
        let image = AsyncImage::open(path, OpenOptions::new(Access::ReadWrite)).await.unwrap();
        assert!(image.read(5, vec![0; data.len()]).await.unwrap() == data);
        image.close().await.unwrap();
    });
}
