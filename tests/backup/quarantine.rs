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

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_job_left_goes_with_its_record() {
    let rig = rig(Faults { die_after_bytes: Some(4 << 20), ..Faults::default() }).await;
    let failed = id_of(&rig.back_up().await).to_owned();
    let path = format!("/api/v1/backups/{failed}");
    let vm = std::fs::read_dir(&rig.repository).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir());
    let kept = vm.unwrap().join(format!("{failed}.failed"));
    assert!(kept.join("disk-0.qcow2").exists());
    // While nobody can tell what is there, the record stays: nothing else names it.
    let away = rig.repository.with_extension("away");
    std::fs::rename(&rig.repository, &away).unwrap();
    rig.service.delete(&path).await.expect_problem(503, "repository_unavailable");
    std::fs::rename(&away, &rig.repository).unwrap();
    // So it does while somebody's own files are in it.
    std::fs::write(kept.join("notes.txt"), "of a person").unwrap();
    let refused = rig.service.delete(&path).await.expect_problem(503, "repository_unavailable");
    assert!(refused["detail"].as_str().unwrap().contains("notes.txt"), "{refused:#}");
    assert!(kept.join("disk-0.qcow2").exists());
    assert_eq!(rig.backup(&failed).await["state"], "failed");
    std::fs::remove_file(kept.join("notes.txt")).unwrap();
    rig.service.delete(&path).await.expect_status(204);
    rig.service.get(&path).await.expect_problem(404, "backup_not_found");
    rig.expect_nothing_left_and_a_backup_works(0).await;
}
