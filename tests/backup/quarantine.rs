//! `jobs.keep_failed`: what a failed job wrote, kept for people to look at.

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::json;

use crate::rig::{self, Plan, Rig, id_of};

async fn rig(faults: Faults) -> Rig {
    let toml = "[jobs]\nkeep_failed = \"quarantine\"\nreconnect_s = 1\n".to_owned();
    Rig::with(Plan { toml, faults, ..Plan::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_is_kept_when_that_is_configured_and_never_listed() {
    let rig = rig(Faults { die_after_bytes: Some(4 << 20), ..Faults::default() }).await;
    let failed = rig.back_up().await;
    assert_eq!((&failed["state"], &failed["code"]), (&json!("failed"), &json!("client_disconnected")), "{failed:#}");
    let kept = format!("{}.failed", id_of(&failed));
    assert_eq!(rig::backup_directories(&rig.repository), std::slice::from_ref(&kept));
    assert!(rig.points().await.is_empty());
    // It is in nobody's way: the next backup is a full one beside it, and an import does not look at it.
    rig.node.reconfigure(|config| config.faults = Faults::default());
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["disks"][0]["reason"]), (&json!("committed"), &json!("first_backup")));
    let imported = rig.service.post("/api/v1/repositories/main/import", &json!({})).await.expect_status(200).json();
    assert_eq!((&imported["imported"], &imported["skipped"]), (&json!([]), &json!([])));
    assert_eq!(rig.points().await.len(), 1);
    assert!(rig::backup_directories(&rig.repository).contains(&kept));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_is_never_kept() {
    let rig = rig(Faults { pause: Some(PausePoint::AfterBytes(2 << 20)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    rig.cancel(id_of(&started)).await;
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "cancelled");
    rig.expect_nothing_left(0).await;
}
