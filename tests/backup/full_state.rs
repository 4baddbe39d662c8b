//! A file system that is full under the database: endings are recorded all the same, and nothing new begins.

use std::fs;
use std::io::Write;
use std::path::Path;

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::json;

use crate::privileged::Mounted;
use crate::rig::{Plan, Rig, id_of};

/// Takes what is left of a file system, to the last byte.
fn fill(file: &Path) {
    let mut file = fs::File::create(file).unwrap();
    for piece in [1 << 20, 4096, 512, 1] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_state_disk_still_records_the_failure() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let _mounted = Mounted::small(&state, "40m");
    let faults = Faults { pause: Some(PausePoint::AfterBytes(2 << 20)), ..Faults::default() };
    let rig = Rig::in_folder(folder, Plan { faults, ..Plan::default() }).await;
    let ballast = state.join("ballast");
    assert_eq!(fs::metadata(&ballast).unwrap().len(), 16 << 20);

    let started = rig.start().await;
    rig.paused().await;
    let filler = state.join("filler");
    fill(&filler);
    rig.node.reconfigure(|config| config.faults = Faults::default());
    rig.node.resume();
    let failed = rig.end_of(id_of(&started)).await;
    assert_eq!((&failed["state"], &failed["code"]), (&json!("failed"), &json!("database_error")), "{failed:#}");
    assert!(!ballast.exists(), "its space was given to the database");
    rig.expect_nothing_left(0).await;

    // Nothing new begins, and the probe says why.
    rig.try_start().await.expect_problem(507, "insufficient_storage");
    let ready = rig.service.get("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.json()["reasons"][0].as_str().unwrap().contains("full"), "{ready:?}");

    // With room again the ballast is back, and a backup works.
    fs::remove_file(&filler).unwrap();
    rig.service.get("/readyz").await.expect_status(200);
    assert!(ballast.exists());
    rig.expect_nothing_left_and_a_backup_works(0).await;
}
