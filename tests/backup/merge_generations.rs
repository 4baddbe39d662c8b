//! Databases and folders of different times: a point's record and its files tell by their generation whether they are of one.

use std::path::{Path, PathBuf};

use blockyard::id::BackupId;
use blockyard::store::{events, points};
use serde_json::{Value, json};

use crate::merge::{Disks, chain, commit, expect_whole, rig, write_everywhere};
use crate::merge_crash::{start, stop};
use crate::process::sqlite;
use crate::rig::{Rig, manifest, published, tool};

fn copy(from: &Path, to: &Path) {
    tool("coreutils", "cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
}

fn replace(with: &Path, folder: &Path) {
    std::fs::remove_dir_all(folder).unwrap();
    copy(with, folder);
}

/// Three points, the hub's folders as they were then, and the second made anew without the first.
async fn merged() -> (Rig, Vec<(BackupId, Disks)>, tempfile::TempDir) {
    let mut rig = rig().await;
    let history = chain(&mut rig, 3).await;
    let before = tempfile::tempdir().unwrap();
    let (hub, rest) = stop(rig).await;
    for part in ["main", "state"] {
        copy(&hub.path().join(part), before.path());
    }
    let rig = start(hub, rest).await;
    rig.service.service.app().points.merge(&history[1].0).await.unwrap();
    (rig, history, before)
}

async fn check(rig: &Rig) -> Value {
    rig.service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200).json()
}

/// The generations that were told of a point, in order.
async fn told(rig: &Rig, id: &BackupId) -> Vec<u64> {
    let app = rig.service.service.app();
    let about = events::about(&mut app.store.read().await.unwrap(), id.as_str()).await.unwrap();
    let merged = about.into_iter().filter(|(kind, _)| kind == "point.merged");
    merged.map(|(_, data)| data["generation"].as_u64().unwrap()).collect()
}

async fn recorded(rig: &Rig, id: &BackupId) -> u32 {
    let app = rig.service.service.app();
    points::find(&mut app.store.read().await.unwrap(), id).await.unwrap().unwrap().generation
}

/// Gives the images of a point in a database the lengths that they have on the disk.
async fn equal_lengths(database: &Path, rig: &Rig, id: &BackupId) {
    for disk in manifest(rig, id.as_str()).await["disks"].as_array().unwrap() {
        let (bytes, number) = (&disk["file_bytes"], &disk["disk_id"]);
        let update =
            format!("UPDATE point_disks SET file_bytes = {bytes} WHERE point_id = '{id}' AND disk_id = {number};");
        sqlite(database, &update).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_older_than_a_merge_follows_files_of_equal_length() {
    let (rig, mut history, before) = merged().await;
    let merged = history[1].0.clone();
    let older = before.path().join("state");
    equal_lengths(&older.join("blockyard.db"), &rig, &merged).await;
    let (hub, rest) = stop(rig).await;
    replace(&older, &hub.path().join("state"));
    let mut rig = start(hub, rest).await;
    assert_eq!((recorded(&rig, &merged).await, told(&rig, &merged).await), (1, vec![1]));
    expect_whole(&rig, &history, "").await;
    assert_eq!(check(&rig).await["result"], "clean");
    write_everywhere(&mut rig, 4);
    history.push((commit(&rig).await, rig.disks.clone()));
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_newer_than_a_folder_that_was_put_back_follows_the_folder() {
    let (rig, history, before) = merged().await;
    let merged = history[1].0.clone();
    assert_eq!(recorded(&rig, &merged).await, 1);
    let (hub, rest) = stop(rig).await;
    replace(&before.path().join("main"), &hub.path().join("main"));
    let rig = start(hub, rest).await;
    assert_eq!((recorded(&rig, &merged).await, told(&rig, &merged).await), (0, vec![1, 0]));
    expect_whole(&rig, &history, "").await;
    assert_eq!(check(&rig).await["result"], "clean");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_another_time_whose_parent_is_gone_are_not_followed_and_a_check_tells() {
    let (rig, history, before) = merged().await;
    let merged = history[1].0.clone();
    rig.service.delete(&format!("/api/v1/points/{}", history[0].0)).await.expect_status(204);
    let folder = published(&rig, merged.as_str()).await;
    let (hub, rest) = stop(rig).await;
    let old: PathBuf = before.path().join("main").join(folder.strip_prefix(hub.path().join("main")).unwrap());
    replace(&old, &folder);
    let rig = start(hub, rest).await;
    assert_eq!((recorded(&rig, &merged).await, told(&rig, &merged).await), (1, vec![1]));
    let checked = check(&rig).await;
    let found = checked["findings"].as_array().unwrap().iter().find(|finding| finding["point_id"] == merged.as_str());
    let found = found.unwrap();
    assert_eq!(found["kind"], "damaged", "{checked:#}");
    assert!(found["detail"].as_str().unwrap().contains("generation 0"), "{checked:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_knows_how_often_a_point_was_made_anew() {
    let (rig, mut history, _before) = merged().await;
    let (hub, rest) = stop(rig).await;
    let id = &history[2].0.clone();
    // Of the points, in the reverse order of what builds upon what.
    for id in [id, &history[1].0] {
        let forget = format!(
            "DELETE FROM point_disks WHERE point_id = '{id}'; DELETE FROM restore_points WHERE id = '{id}'; \
             DELETE FROM backup_disks WHERE backup_id = '{id}'; DELETE FROM backups WHERE id = '{id}';"
        );
        sqlite(&hub.path().join("state/blockyard.db"), &forget).await;
    }
    let mut rig = start(hub, rest).await;
    assert_eq!((recorded(&rig, &history[1].0).await, recorded(&rig, id).await), (1, 0));
    expect_whole(&rig, &history, "").await;
    assert_eq!(check(&rig).await["result"], "clean");
    // A full that a merge made of an incremental lacks nothing, although its coverage is that of the incremental.
    for point in rig.points().await {
        assert_eq!(point["trust"], "unverified", "{point:#}");
    }
    write_everywhere(&mut rig, 4);
    history.push((commit(&rig).await, rig.disks.clone()));
    let next = manifest(&rig, history[3].0.as_str()).await;
    for disk in next["disks"].as_array().unwrap() {
        assert_eq!((&disk["effective_type"], &disk["parent_id"]), (&json!("incremental"), &json!(id)), "{next:#}");
    }
    expect_whole(&rig, &history, "").await;
}
