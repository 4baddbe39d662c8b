//! Limits of the configuration that only a slow disk or a stubborn client reaches: calls of the process are held up until a
//! limit of a second is over.

use std::path::PathBuf;
use std::time::Duration;

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::{Value, json};

use crate::crash::inject;
use crate::process::{Child, Running};
use crate::rig::{self, Plan, Rig, content, id_of, tool};

/// How long a call is held up, in microseconds: much longer than any of the limits.
const HELD_UP: &str = "delay_enter=6000000";

/// A child with one small disk, and this configuration.
async fn child(toml: &str, pause: Option<PausePoint>) -> Child {
    let faults = Faults { pause, ..Faults::default() };
    Child::configured(vec![(2000, content(1, 256 << 10))], faults, rig::free_ports(), toml).await
}

/// Holds that the only backup failed like this, and nothing is left of it.
async fn expect_failed(child: &Child, running: &Running, code: &str) {
    let list = running.get("/backups").await;
    let backup = running.end_of(id_of(&list["backups"][0])).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!(code)), "{backup:#}");
    assert_eq!(list["total"], 1);
    assert_eq!(running.get("/points").await["total"], 0);
    assert_eq!(running.get("/ports").await["leased"], 0);
    assert!(rig::backup_directories(&child.repository()).is_empty());
    child.expect_ports_free();
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_not_ready_in_time_end_the_job_and_go_when_they_are() {
    let child = child("[jobs]\nprepare_s = 1\n", None).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let mut tracer = inject(running.process.id(), "mkdir,mkdirat", None, HELD_UP);
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let request = running.http.post(format!("{}/api/v1/backups/vm", running.process.url));
    let refused = request.bearer_auth(&running.token).json(&body).send().await.unwrap();
    assert_eq!(refused.status(), 500);
    expect_failed(&child, &running, "prepare_timeout").await;
    assert!(child.node.log().calls().is_empty(), "nobody is called for what is not ready");
    drop(running);
    tracer.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_made_durable_in_time_fails_the_job() {
    let child = child("[jobs]\nseal_s = 1\n", Some(PausePoint::BeforeComplete(0))).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    let image = PathBuf::from(started["disk_results"][0]["qcow2_path"].as_str().unwrap());
    let staged = format!("{}.partial", image.parent().unwrap().display());
    let image = PathBuf::from(staged).join(image.file_name().unwrap());
    let mut tracer = inject(running.process.id(), "fsync,fdatasync", Some(&image), HELD_UP);
    child.node.resume();
    expect_failed(&child, &running, "seal_timeout").await;
    drop(running);
    tracer.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_never_ends_holds_up_a_cancel_no_longer_than_was_set() {
    // The client stops in the middle of a payload: with the usual minute this would take longer than the test waits.
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml: "[jobs]\ncancel_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk0", started["disk_results"][0]["nbd_port"]);
    let mut link = rig::Nbd::connect(&uri);
    link.stop_in_a_write(0, 1 << 20, 1 << 10);
    rig.cancel(id_of(&started)).await.expect_status(202);
    let ended = tokio::time::timeout(Duration::from_secs(30), rig.end_of(id_of(&started))).await;
    assert_eq!(ended.expect("the cancel waits for the request")["state"], "cancelled");
    rig.node.resume();
    rig.client_ended().await;
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_name_their_export_to_who_asks_only_if_they_are_told_to() {
    for list in [true, false] {
        let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
        let toml = format!("[nbd]\nlist_exports = {list}\n");
        let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
        let started = rig.start().await;
        let uri = format!("nbd://127.0.0.1:{}", started["disk_results"][1]["nbd_port"]);
        if list {
            let names = tool("libnbd-bin", "nbdinfo", &["--list", "--json", &uri]);
            let names: Value = serde_json::from_str(&names).unwrap();
            assert_eq!(names["exports"].as_array().unwrap().len(), 1, "{names:#}");
            assert_eq!(names["exports"][0]["export-name"], "db-server-disk1");
        } else {
            let refused = std::process::Command::new("nbdinfo").args(["--list", &uri]).output().unwrap();
            assert!(!refused.status.success());
        }
        rig.cancel(id_of(&started)).await;
        rig.end_of(id_of(&started)).await;
    }
}
