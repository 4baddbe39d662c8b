//! What merges have left beside points that are deleted meanwhile, or that the database does not know: it goes with the point, when it
//! is proven to be of it.

use std::path::{Path, PathBuf};

use blockyard::id::BackupId;
use serde_json::json;

use crate::merge::{Disks, chain, expect_whole, rig};
use crate::merge_crash::{start, stop};
use crate::process::sqlite;
use crate::rig::{Rig, backup_directories, published, tool};

/// `<id>.merging` of a point, as a merge leaves it whose last step fails: what the point was before.
async fn leave(rig: &Rig, id: &BackupId) -> PathBuf {
    let folder = published(rig, id.as_str()).await;
    let merging = folder.with_extension("merging");
    tool("coreutils", "cp", &["-a", folder.to_str().unwrap(), merging.to_str().unwrap()]);
    std::fs::create_dir(merging.with_extension("merging.probe")).unwrap();
    merging
}

async fn delete(rig: &Rig, id: &BackupId) {
    rig.service.delete(&format!("/api/v1/points/{id}")).await.expect_status(204);
}

fn database(folder: &Path) -> PathBuf {
    folder.join("state/blockyard.db")
}

/// Three points, with the newest as it was before and what a merge of it left.
async fn merged() -> (Rig, Vec<(BackupId, Disks)>, PathBuf) {
    let mut rig = rig().await;
    let history = chain(&mut rig, 2).await;
    let left = leave(&rig, &history[1].0).await;
    (rig, history, left)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_merge_left_goes_with_its_point() {
    let (rig, mut history, left) = merged().await;
    let (deleted, _) = history.pop().unwrap();
    delete(&rig, &deleted).await;
    assert!(!left.exists());
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_merge_left_of_a_deleted_point_is_removed_at_the_next_start() {
    for cut in ["deleting", "deleted"] {
        let (rig, mut history, left) = merged().await;
        let (deleted, _) = history.pop().unwrap();
        let folder = published(&rig, deleted.as_str()).await;
        let (hub, rest) = stop(rig).await;
        if cut == "deleted" {
            std::fs::remove_dir_all(folder).unwrap();
            // All that is left of a merge that was cut while it was cleared up.
            std::fs::remove_file(left.join("manifest.json")).unwrap();
        } else {
            // A merge that was killed while it made an image.
            std::fs::rename(left.join("disk-0.qcow2"), left.join("disk-0.qcow2.partial")).unwrap();
        }
        let record = format!("UPDATE restore_points SET state = '{cut}' WHERE id = '{deleted}';");
        sqlite(&database(hub.path()), &record).await;
        let rig = start(hub, rest).await;
        assert!(!left.exists(), "{cut}");
        expect_whole(&rig, &history, cut).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_proven_to_be_of_a_deleted_point_is_left_alone_and_told() {
    let (rig, mut history, left) = merged().await;
    let (deleted, _) = history.pop().unwrap();
    std::fs::write(left.join("precious"), b"mine").unwrap();
    delete(&rig, &deleted).await;
    assert_eq!(std::fs::read(left.join("precious")).unwrap(), b"mine");
    let (hub, rest) = stop(rig).await;
    let rig = start(hub, rest).await;
    assert_eq!(std::fs::read(left.join("precious")).unwrap(), b"mine");
    let checked = rig.service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200).json();
    let told = checked["findings"].as_array().unwrap().iter().any(|finding| finding["kind"] == "merging");
    assert!(told, "{checked:#}");
    // Of another point, whatever its name says.
    std::fs::remove_file(left.join("precious")).unwrap();
    let (hub, rest) = stop(rig).await;
    let manifest = std::fs::read_to_string(left.join("manifest.json")).unwrap();
    std::fs::remove_file(left.join("manifest.json")).unwrap();
    let other = BackupId::new();
    std::fs::write(left.join("manifest.json"), manifest.replace(deleted.as_str(), other.as_str())).unwrap();
    let rig = start(hub, rest).await;
    assert!(left.join("disk-0.qcow2").exists());
    drop(rig);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_merge_left_of_a_missing_point_stays_until_its_record_is_deleted() {
    let (rig, history, left) = merged().await;
    let missing = history[1].0.clone();
    let folder = published(&rig, missing.as_str()).await;
    let (hub, rest) = stop(rig).await;
    std::fs::remove_dir_all(folder).unwrap();
    let rig = start(hub, rest).await;
    // It may be all that there is of the point.
    assert!(left.join("disk-0.qcow2").exists());
    delete(&rig, &missing).await;
    assert!(!left.exists());
    assert_eq!(backup_directories(&rig.repository), [history[0].0.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_merge_left_of_a_point_without_a_record_is_cleared_up_when_that_is_imported() {
    let (rig, history, left) = merged().await;
    let (hub, rest) = stop(rig).await;
    // A merge that was cut before it was done with its files.
    std::fs::remove_file(left.join("manifest.json")).unwrap();
    let id = &history[1].0;
    let forget = format!(
        "DELETE FROM point_disks WHERE point_id = '{id}'; DELETE FROM restore_points WHERE id = '{id}'; \
         DELETE FROM backup_disks WHERE backup_id = '{id}'; DELETE FROM backups WHERE id = '{id}';"
    );
    sqlite(&database(hub.path()), &forget).await;
    let rig = start(hub, rest).await;
    assert!(!left.exists());
    expect_whole(&rig, &history, "").await;
}
