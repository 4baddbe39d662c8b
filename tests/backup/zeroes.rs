//! Zeroes over what was data: what a client that judges chunks by samples may do to a backup, and what it must not be taken for.

use blockyard::node::fake::Faults;
use blockyard::store::events;
use serde_json::{Value, json};

use crate::rig::{self, Plan, Rig, content, id_of};

const DISK: usize = 64 << 20;
/// Data that no sample of a chunk of 8 MiB touches.
const ISLAND: (usize, usize) = ((16 << 20) + (1 << 20), 256 << 10);

fn sampled() -> Faults {
    Faults { sampled_zeroes: true, ..Faults::default() }
}

/// A disk of zeroes with data at its beginning and an island of data in the sparse rest.
fn sparse() -> Vec<u8> {
    let mut bytes = vec![0; DISK];
    bytes[..1 << 20].copy_from_slice(&content(1, 1 << 20));
    let (offset, length) = ISLAND;
    bytes[offset..offset + length].fill(7);
    bytes
}

async fn rig(request_bytes: usize) -> Rig {
    Rig::with(Plan { disks: vec![(2000, sparse())], request_bytes, ..Plan::default() }).await
}

async fn back_up(rig: &Rig, backup_type: &str) -> Value {
    let mut body = rig.start_body();
    body["backup_type"] = backup_type.into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    rig.end_of(id_of(&started)).await
}

async fn alerts(rig: &Rig, id: &str) -> Vec<Value> {
    let store = &rig.service.service.app().store;
    let told = events::about(&mut store.read().await.unwrap(), id).await.unwrap();
    told.into_iter()
        .filter(|(kind, data)| kind == "alert" && data["alert"] == "suspect_zeroes")
        .map(|(_, data)| data)
        .collect()
}

fn over_data(backup: &Value) -> u64 {
    backup["disks"][0]["zeroed_over_data_bytes"].as_u64().unwrap()
}

/// The island, and no more than what came with it in one request: that is data as well, as nobody looks at its bytes.
#[track_caller]
fn expect_the_island(backup: &Value) {
    let bytes = over_data(backup);
    assert!((ISLAND.1 as u64..=8 << 20).contains(&bytes), "{bytes}");
}

#[track_caller]
fn expect_result(backup: &Value, result: &str) {
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!(result)), "{backup:#}");
    let told = backup["warnings"]
        .as_array()
        .unwrap()
        .iter()
        .any(|warning| warning.as_str().unwrap().starts_with("suspect_zeroes"));
    assert_eq!(told, result == "warning", "{backup:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_zeroes_over_known_data_make_the_result_a_warning() {
    let rig = rig(8 << 20).await;
    expect_result(&back_up(&rig, "full").await, "success");
    // The same disk by a client that looks at samples only: the island is gone, and the hub knows.
    rig.node.reconfigure(|config| config.faults = sampled());
    let full = back_up(&rig, "full").await;
    expect_result(&full, "warning");
    expect_the_island(&full);
    assert_eq!(rig::manifest(&rig, id_of(&full)).await["disks"][0]["zeroed_over_data_bytes"], over_data(&full));
    assert_eq!(alerts(&rig, id_of(&full)).await.len(), 1);
    // The same zeroes once more erase nothing that the last point has.
    let again = back_up(&rig, "full").await;
    expect_result(&again, "success");
    assert_eq!(over_data(&again), 0);
    rig.expect_nothing_left(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_copy_into_an_overlay_is_held_against_its_parent() {
    let rig = rig(8 << 20).await;
    expect_result(&back_up(&rig, "full").await, "success");
    rig.node.reconfigure(|config| config.faults = Faults { full_instead_of_delta: true, ..sampled() });
    let copy = back_up(&rig, "incremental").await;
    assert_eq!(copy["disks"][0]["effective_type"], "full_copy_into_overlay");
    expect_result(&copy, "warning");
    expect_the_island(&copy);
}

#[tokio::test(flavor = "multi_thread")]
async fn zeroes_of_a_delta_small_zeroes_and_zeroes_over_nothing_are_no_warning() {
    // Zeroes over nothing, and the very first backup, of which nothing is known.
    let mut first = rig(8 << 20).await;
    first.node.reconfigure(|config| config.faults = sampled());
    let unseen = back_up(&first, "full").await;
    expect_result(&unseen, "success");
    first.node.reconfigure(|config| config.faults = Faults::default());
    let same = back_up(&first, "full").await;
    expect_result(&same, "success");
    assert_eq!(over_data(&same), 0, "zeroes over zeroes");

    // A guest that erases 8 MiB: its delta says so on purpose. It is counted, as a fact, and is no warning.
    first.write(&[(2000, 16 << 20, vec![0; 8 << 20])]);
    let delta = back_up(&first, "incremental").await;
    assert_eq!(delta["disks"][0]["effective_type"], "incremental");
    expect_result(&delta, "success");
    expect_the_island(&delta);

    // Requests that no client judges by samples.
    let mut small = rig(2 << 20).await;
    expect_result(&back_up(&small, "full").await, "success");
    small.write(&[(2000, 16 << 20, vec![0; 8 << 20])]);
    let full = back_up(&small, "full").await;
    expect_result(&full, "success");
    assert_eq!(over_data(&full), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn zeroes_over_zeroes_that_were_stored_as_data_are_counted_and_no_warning() {
    // With requests of 8 MiB what there is comes with the zeroes around it, which are stored as they come.
    let mut rig = rig(8 << 20).await;
    expect_result(&back_up(&rig, "full").await, "success");
    // The same disk in requests of 4 MiB: the second one is zeroes as a whole.
    rig.node.reconfigure(|config| config.request_bytes = 4 << 20);
    let same = back_up(&rig, "full").await;
    assert!(over_data(&same) >= 4 << 20, "{same:#}");
    expect_result(&same, "success");

    // One byte among them is data that went.
    let last = (8 << 20) - 1;
    rig.node.reconfigure(|config| config.request_bytes = 8 << 20);
    rig.write(&[(2000, last, vec![1])]);
    expect_result(&back_up(&rig, "full").await, "success");
    rig.node.reconfigure(|config| config.request_bytes = 4 << 20);
    rig.write(&[(2000, last, vec![0])]);
    let erased = back_up(&rig, "full").await;
    expect_result(&erased, "warning");
    assert_eq!(alerts(&rig, id_of(&erased)).await.len(), 1);
}
