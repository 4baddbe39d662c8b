//! Hours in which nothing happens on an export, passed by a clock that the test moves.

use std::time::Duration;

use blockyard::node::fake::Faults;
use blockyard_nbd::Durability;
use blockyard_nbd::client::Client;
use serde_json::Value;

use crate::rig::{Plan, Rig, change_id, content, id_of};

const MIB: u64 = 1 << 20;
/// Below `jobs.idle_s`, by more than a busy machine may lose between two steps.
const NEARLY_IDLE: Duration = Duration::from_secs(200);
const HOURS: u32 = 5;

/// Lets time pass. Only while nothing is on its way: a clock that stands still does not wait for sockets.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

async fn connect(started: &Value, disk: usize) -> Client {
    let disk = &started["disk_results"][disk];
    let uri = format!("nbd://127.0.0.1:{}/{}", disk["nbd_port"], disk["nbd_export_name"].as_str().unwrap());
    Client::connect(&uri.parse().unwrap()).await.unwrap()
}

async fn write(link: &Client, bytes: &[u8], offset: u64, length: u64) {
    let data = bytes[offset as usize..(offset + length) as usize].to_vec();
    link.write(offset, data, Durability::OnFlush).await.unwrap();
}

#[tokio::test]
async fn export_idle_for_hours_before_and_during_the_copy_stays_served() {
    let disks = vec![(2000, content(1, 4 << 20)), (2016, content(2, 1 << 20))];
    let faults = Faults { never_connect: true, ..Faults::default() };
    let rig = Rig::with(Plan { disks: disks.clone(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.client_ended().await;

    // Half an hour for the snapshot, then a copy of hours that goes on in small steps, on one of two connections.
    pass(Duration::from_secs(1700)).await;
    let (busy, idle) = (connect(&started, 0).await, connect(&started, 0).await);
    let steps = HOURS * 3600 / u32::try_from(NEARLY_IDLE.as_secs()).unwrap();
    let step = 4 * MIB / 2 / u64::from(steps) / 512 * 512;
    for index in 0..u64::from(steps) {
        write(&busy, &disks[0].1, index * step, step).await;
        pass(NEARLY_IDLE).await;
    }
    let backup = rig.when_in(id_of(&started), "transferring").await;
    assert_eq!(backup["disks"][0]["connections"], 2, "{backup:#}");
    assert_eq!(backup["disks"][1]["state"], "listening");

    // The connection on which nothing was ever said is as good as the other, and so is the export nobody came to.
    let copied = u64::from(steps) * step;
    write(&idle, &disks[0].1, copied, 4 * MIB - copied).await;
    rig.complete(id_of(&started), 0, &change_id(2000)).await.expect_status(200);
    pass(NEARLY_IDLE).await;
    let last = connect(&started, 1).await;
    pass(NEARLY_IDLE).await;
    write(&last, &disks[1].1, 0, MIB).await;
    rig.complete(id_of(&started), 1, &change_id(2016)).await.expect_status(200);
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
    rig.expect_restorable(id_of(&started)).await;
    rig.expect_nothing_left(1).await;
}
