//! Repositories that are not there when the service starts: what waits for them, what is held for them meanwhile, and what is
//! done before anything uses them.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use blockyard::node::fake::{FakeNode, Faults, PausePoint};
use blockyard::store::points;
use serde_json::{Value, json};

use crate::process::sqlite;
use crate::rig::{self, Rig, id_of};
use crate::support::TestService;

/// What a rig has beside its service.
struct Rest {
    node: FakeNode,
    vm: String,
    repository: PathBuf,
    disks: Vec<(u32, Vec<u8>)>,
    ports: RangeInclusive<u16>,
}

async fn stop(rig: Rig) -> (tempfile::TempDir, Rest) {
    let Rig { service, node, vm, repository, disks, ports } = rig;
    (service.stop().await, Rest { node, vm, repository, disks, ports })
}

async fn start(folder: tempfile::TempDir, rest: Rest) -> Rig {
    start_with(folder, rest, "").await
}

async fn start_with(folder: tempfile::TempDir, rest: Rest, more: &str) -> Rig {
    let Rest { node, vm, repository, disks, ports } = rest;
    let toml = rig::configuration(&node.url(), folder.path(), &ports, more);
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.reconfigure(|config| config.hub_url = hub_url);
    Rig { service, node, vm, repository, disks, ports }
}

fn away(repository: &Path) -> PathBuf {
    repository.with_extension("away")
}

fn unmount(repository: &Path) {
    std::fs::rename(repository, away(repository)).unwrap();
}

fn mount(repository: &Path) {
    std::fs::rename(away(repository), repository).unwrap();
}

fn database(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("state/blockyard.db")
}

/// Takes the last transaction of a job back, as a crash between the rename and it does.
async fn unrecord(folder: &tempfile::TempDir, vm: &str, id: &str, parent: &str) {
    let undo = format!(
        "DELETE FROM point_disks WHERE point_id = '{id}'; DELETE FROM restore_points WHERE id = '{id}'; \
         UPDATE backups SET state = 'committing', result = 'none', completed_at = NULL WHERE id = '{id}'; \
         INSERT INTO leases (kind, key, owner, boot_id) VALUES ('vm', '{vm}', '{id}', 'a dead boot'), \
         ('pin', '{parent}', '{id}', 'a dead boot');"
    );
    sqlite(&database(folder), &undo).await;
}

async fn delete(rig: &Rig, id: &str) -> crate::support::Answer {
    crate::support::send(rig.service.request(reqwest::Method::DELETE, &format!("/api/v1/points/{id}"))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_waiting_commit_builds_upon_stays_until_its_repository_is_back() {
    let rig = Rig::new().await;
    let full = id_of(&rig.back_up().await).to_owned();
    let incremental = id_of(&rig.back_up().await).to_owned();
    let (folder, rest) = stop(rig).await;
    unrecord(&folder, &rest.vm, &incremental, &full).await;
    unmount(&rest.repository);
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    let refused = delete(&rig, &full).await.expect_problem(409, "point_in_use");
    assert!(refused.to_string().contains(&incremental), "{refused:#}");
    let (folder, rest) = stop(rig).await;
    mount(&rest.repository);
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committed");
    rig.expect_restorable(&incremental).await;
    rig.expect_nothing_left_and_a_backup_works(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_is_recorded_when_its_repository_is_used_again() {
    let rig = Rig::new().await;
    let full = id_of(&rig.back_up().await).to_owned();
    let incremental = id_of(&rig.back_up().await).to_owned();
    let (folder, rest) = stop(rig).await;
    unrecord(&folder, &rest.vm, &incremental, &full).await;
    unmount(&rest.repository);
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    mount(&rig.repository);
    let kept = delete(&rig, &full).await.expect_problem(409, "point_has_dependents");
    assert!(kept.to_string().contains(&incremental), "{kept:#}");
    assert_eq!(rig.backup(&incremental).await["state"], "committed");
    rig.expect_restorable(&incremental).await;
    rig.expect_nothing_left_and_a_backup_works(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_while_its_files_cannot_be_read_and_is_recorded_at_the_next_use() {
    let rig = Rig::new().await;
    let full = id_of(&rig.back_up().await).to_owned();
    let incremental = id_of(&rig.back_up().await).to_owned();
    let folder_of_it = rig::published(&rig, &incremental).await;
    let (manifest, staged) = (folder_of_it.join("manifest.json"), folder_of_it.with_extension("partial"));
    let (folder, rest) = stop(rig).await;
    unrecord(&folder, &rest.vm, &incremental, &full).await;
    // An error of the file system that is no absence: a link that leads to itself.
    let elsewhere = folder.path().join("elsewhere");
    std::fs::rename(&folder_of_it, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&folder_of_it, &folder_of_it).unwrap();
    std::fs::create_dir(&staged).unwrap();
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    assert!(staged.exists(), "what a job staged that is not over is left alone");
    let refused = delete(&rig, &full).await.expect_problem(409, "point_in_use");
    assert!(refused.to_string().contains(&incremental), "{refused:#}");
    // Something in the way of the manifest, which a person can take away again.
    let (folder, rest) = stop(rig).await;
    std::fs::remove_dir(&staged).unwrap();
    std::fs::remove_file(&folder_of_it).unwrap();
    std::fs::rename(&elsewhere, &folder_of_it).unwrap();
    std::fs::rename(&manifest, &elsewhere).unwrap();
    std::fs::create_dir(&manifest).unwrap();
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    // It is in nobody's way meanwhile.
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    std::fs::remove_dir(&manifest).unwrap();
    std::fs::rename(&elsewhere, &manifest).unwrap();
    let kept = delete(&rig, &full).await.expect_problem(409, "point_has_dependents");
    assert!(kept.to_string().contains(&incremental), "{kept:#}");
    assert_eq!(rig.backup(&incremental).await["state"], "committed");
    rig.expect_restorable(&incremental).await;
    rig.expect_nothing_left_and_a_backup_works(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_has_failed_when_its_files_are_known_to_be_gone() {
    let rig = Rig::new().await;
    let full = id_of(&rig.back_up().await).to_owned();
    let incremental = id_of(&rig.back_up().await).to_owned();
    let folder_of_it = rig::published(&rig, &incremental).await;
    let staged = folder_of_it.with_extension("partial");
    let (folder, rest) = stop(rig).await;
    unrecord(&folder, &rest.vm, &incremental, &full).await;
    std::fs::rename(&folder_of_it, &staged).unwrap();
    std::os::unix::fs::symlink(&folder_of_it, &folder_of_it).unwrap();
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    std::fs::remove_file(&folder_of_it).unwrap();
    rig.service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200);
    let backup = rig.backup(&incremental).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")), "{backup:#}");
    assert!(!staged.exists());
    rig.expect_nothing_left_and_a_backup_works(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_repository_that_is_away_fails_at_once_and_what_it_staged_goes_when_that_is_back() {
    for (more, left) in [("", None), ("[jobs]\nkeep_failed = \"quarantine\"\n", Some("failed"))] {
        let rig = Rig::faulty(Faults { pause: Some(PausePoint::AfterBytes(2 << 20)), ..Faults::default() }).await;
        let started = rig.start().await;
        rig.paused().await;
        let Rig { service, node, repository, vm, disks, ports } = rig;
        let TestService { service, folder, .. } = service;
        drop(service);
        unmount(&repository);
        let rig = start_with(folder, Rest { node, vm, repository, disks, ports }, more).await;
        rig.node.resume();
        let backup = rig.backup(id_of(&started)).await;
        assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")), "{backup:#}");
        mount(&rig.repository);
        assert_eq!(rig::backup_directories(&rig.repository), [format!("{}.partial", id_of(&started))]);
        rig.service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200);
        let kept: Vec<String> = left.iter().map(|extension| format!("{}.{extension}", id_of(&started))).collect();
        assert_eq!(rig::backup_directories(&rig.repository), kept);
        rig.node.reconfigure(|config| config.faults = Faults::default());
        assert_eq!(rig.back_up().await["state"], "committed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_mounted_late_is_swept_before_a_job_uses_it() {
    let rig = Rig::new().await;
    rig.back_up().await;
    let unknown = id_of(&rig.back_up().await).to_owned();
    let (folder, rest) = stop(rig).await;
    let forget = format!(
        "DELETE FROM point_disks WHERE point_id = '{unknown}'; DELETE FROM restore_points WHERE id = '{unknown}'; \
         DELETE FROM backup_disks WHERE backup_id = '{unknown}'; DELETE FROM backups WHERE id = '{unknown}';"
    );
    sqlite(&database(&folder), &forget).await;
    unmount(&rest.repository);
    let rig = start(folder, rest).await;
    rig.try_start().await.expect_problem(503, "repository_unavailable");
    assert_eq!(rig.points().await.len(), 1);
    mount(&rig.repository);
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    // It was imported first: the job builds upon it.
    let manifest = rig::manifest(&rig, id_of(&backup)).await;
    assert_eq!(manifest["disks"][0]["parent_id"], unknown.as_str(), "{manifest:#}");
    assert_eq!(rig.points().await.len(), 3);
    rig.expect_restorable(id_of(&backup)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_was_cut_is_settled_before_a_late_repository_is_verified_or_exported() {
    for export in [false, true] {
        let rig = Rig::new().await;
        rig.back_up().await;
        let id = id_of(&rig.back_up().await).to_owned();
        let (folder, rest) = stop(rig).await;
        let before = folder.path().join("before.db");
        let copy = format!("VACUUM INTO '{}';", before.display());
        sqlite(&database(&folder), &copy).await;
        let rig = start(folder, rest).await;
        rig.service.service.app().points.merge(&id.parse().unwrap()).await.unwrap();
        let (folder, rest) = stop(rig).await;
        // What the crash between the exchange and the record leaves: new files, old record.
        for beside in ["blockyard.db-wal", "blockyard.db-shm"] {
            let _ = std::fs::remove_file(folder.path().join("state").join(beside));
        }
        std::fs::rename(&before, database(&folder)).unwrap();
        unmount(&rest.repository);
        let rig = start(folder, rest).await;
        mount(&rig.repository);
        if export {
            let path = format!("/api/v1/points/{id}/exports");
            rig.service.post(&path, &json!({"disk_id": 0, "mode": "read-only"})).await.expect_status(201);
        } else {
            assert_eq!(verified(&rig, &id).await["outcome"], "verified");
        }
        let rows =
            points::disks(&mut rig.service.service.app().store.read().await.unwrap(), &id.parse().unwrap()).await;
        assert!(rows.unwrap().iter().all(|disk| disk.parent_id.is_none()), "the record follows the files");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_cannot_be_swept_is_not_used_until_it_can() {
    let rig = Rig::new().await;
    let point = id_of(&rig.back_up().await).to_owned();
    let (folder, rest) = stop(rig).await;
    // A database that refuses stands for everything that may go wrong in a sweep.
    let lost = rest.repository.join("lost");
    unmount(&rest.repository);
    let rig = start(folder, rest).await;
    mount(&rig.repository);
    let vm_folder = rig::published(&rig, &point).await.parent().unwrap().to_owned();
    std::fs::rename(&vm_folder, &lost).unwrap();
    let refuse = "CREATE TRIGGER refuse BEFORE UPDATE OF state ON restore_points BEGIN SELECT RAISE(ABORT, 'no'); END;";
    let database = rig.service.folder.path().join("state/blockyard.db");
    sqlite(&database, refuse).await;
    assert_eq!(rig.try_start().await.status, 500);
    assert_eq!(rig.service.post("/api/v1/repositories/main/import", &json!({})).await.status, 500);
    std::fs::rename(&lost, &vm_folder).unwrap();
    sqlite(&database, "DROP TRIGGER refuse").await;
    assert_eq!(rig.back_up().await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_mount_point_is_not_taken_for_the_repository() {
    let rig = Rig::new().await;
    let point = id_of(&rig.back_up().await).to_owned();
    let (folder, rest) = stop(rig).await;
    unmount(&rest.repository);
    std::fs::create_dir(&rest.repository).unwrap();
    let rig = start(folder, rest).await;
    rig.try_start().await.expect_problem(503, "repository_unavailable");
    assert_eq!(rig.points().await.remove(0)["state"], "committed", "nothing is concluded from an empty folder");
    assert!(std::fs::read_dir(&rig.repository).unwrap().next().is_none(), "and nothing is made in it");
    std::fs::remove_dir(&rig.repository).unwrap();
    mount(&rig.repository);
    assert_eq!(rig.back_up().await["state"], "committed");
    rig.expect_restorable(&point).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_without_one_image_stays_missing_at_a_start_and_a_check_until_that_is_back() {
    let rig = Rig::new().await;
    let id = id_of(&rig.back_up().await).to_owned();
    assert_eq!(verified(&rig, &id).await["outcome"], "verified");
    let image = rig::published(&rig, &id).await.join("disk-1.qcow2");
    let elsewhere = rig.service.folder.path().join("elsewhere");
    std::fs::rename(&image, &elsewhere).unwrap();
    assert_eq!(verified(&rig, &id).await["outcome"], "missing");
    let check = async |rig: &Rig| {
        let path = "/api/v1/repositories/main/check";
        rig.service.post(path, &json!({})).await.expect_status(200).json()
    };
    let report = check(&rig).await;
    assert_eq!(report["findings"][0]["kind"], "missing", "{report:#}");
    assert_eq!(rig.points().await.remove(0)["state"], "missing");
    // By a start, once with a link in place of the image.
    let (folder, rest) = stop(rig).await;
    std::os::unix::fs::symlink(&elsewhere, &image).unwrap();
    let rig = start(folder, rest).await;
    assert_eq!(rig.points().await.remove(0)["state"], "missing");
    std::fs::remove_file(&image).unwrap();
    std::fs::rename(&elsewhere, &image).unwrap();
    let (folder, rest) = stop(rig).await;
    let rig = start(folder, rest).await;
    expect_back(&rig).await;
    // The other way round, and by the check alone.
    assert_eq!(verified(&rig, &id).await["outcome"], "verified");
    std::fs::rename(&image, &elsewhere).unwrap();
    let report = check(&rig).await;
    assert_eq!(report["findings"][0]["kind"], "missing", "{report:#}");
    assert_eq!(rig.points().await.remove(0)["state"], "missing");
    std::fs::rename(&elsewhere, &image).unwrap();
    let report = check(&rig).await;
    assert_eq!(report["findings"][0]["kind"], "back", "{report:#}");
    expect_back(&rig).await;
    // A start sees it too.
    let (folder, rest) = stop(rig).await;
    std::fs::rename(&image, &elsewhere).unwrap();
    let rig = start(folder, rest).await;
    assert_eq!(rig.points().await.remove(0)["state"], "missing");
}

/// The only point is there, and to be read again.
async fn expect_back(rig: &Rig) {
    let point = rig.points().await.remove(0);
    assert_eq!((&point["state"], &point["trust"]), (&json!("committed"), &json!("unverified")), "{point:#}");
    assert!(point["verified_at"].is_null(), "{point:#}");
}

/// Verifies a point and waits for the end.
async fn verified(rig: &Rig, id: &str) -> Value {
    let begun = rig.service.post(&format!("/api/v1/points/{id}/verify"), &json!({})).await.expect_status(202).json();
    let ended = async {
        loop {
            let point = rig.service.get(&format!("/api/v1/points/{id}?wait=1")).await.expect_status(200).json();
            let verification = &point["verification"];
            if verification["id"] == begun["id"] && verification["state"] == "ended" {
                return verification.clone();
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, ended).await.expect("not in time")
}
