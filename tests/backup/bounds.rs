//! What one bad repository, one impatient caller or one failed step may hold up: itself, and nothing else.

use std::path::Path;

use blockyard::id::{BackupId, ExportId};
use blockyard::points::verify::OPEN_MAX;
use serde_json::{Value, json};

use crate::merge::{chain, commit, rig, write_everywhere};
use crate::process::{sqlite, sqlite_number};
use crate::rig::{DEADLINE, Rig, id_of, manifest};

/// Backs the rig's VM up into a repository.
async fn commit_into(rig: &Rig, repository: &str) -> String {
    let mut body = rig.start_body();
    body["repository_id"] = repository.into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    id_of(&backup).to_owned()
}

async fn keep_one(rig: &Rig, repository: &str) {
    let path = rig.service.folder.path().join(repository);
    let body = json!({"name": repository, "path": path, "retention": {"keep_last": 1}});
    rig.service.put(&format!("/api/v1/repositories/{repository}"), "*", &body).await.expect_status(200);
}

/// Waits until so many points are left in a repository.
async fn when_left(database: &Path, repository: &str, count: i64) {
    let query =
        format!("SELECT count(*) FROM restore_points WHERE state <> 'deleted' AND repository_id = '{repository}'");
    let left = async { while sqlite_number(database, &query).await != count {} };
    tokio::time::timeout(DEADLINE, left).await.unwrap_or_else(|_| panic!("{repository} does not come to {count}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_whose_merge_cannot_be_recorded_holds_up_no_merge_or_prune_of_another() {
    let mut rig = rig().await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    rig.service.add_repository("second").await;
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON events WHEN NEW.kind = 'point.merged' AND \
        (SELECT repository_id FROM restore_points WHERE id = NEW.subject) = 'main' BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    commit(&rig).await;
    keep_one(&rig, "main").await;
    write_everywhere(&mut rig, 1);
    let stuck = commit(&rig).await;
    let exchanged = async { while manifest(&rig, stuck.as_str()).await["generation"] != 1 {} };
    tokio::time::timeout(DEADLINE, exchanged).await.expect("never exchanged");

    // By itself.
    keep_one(&rig, "second").await;
    commit_into(&rig, "second").await;
    write_everywhere(&mut rig, 2);
    commit_into(&rig, "second").await;
    when_left(&database, "second", 1).await;
    // And asked for.
    let body = json!({"name": "second", "path": rig.service.folder.path().join("second"), "retention": {}});
    rig.service.put("/api/v1/repositories/second", "*", &body).await.expect_status(200);
    write_everywhere(&mut rig, 3);
    commit_into(&rig, "second").await;
    keep_one(&rig, "second").await;
    let asked = json!({});
    let asked = rig.service.post("/api/v1/repositories/second/prune?dry_run=false", &asked);
    let answer = tokio::time::timeout(DEADLINE, asked).await.expect("the prune waits").expect_status(200).json();
    let decisions: Vec<&Value> = answer["points"].as_array().unwrap().iter().map(|point| &point["decision"]).collect();
    assert_eq!(decisions, ["keep", "merge"], "{answer:#}");

    when_left(&database, "main", 2).await;
    sqlite(&database, "DROP TRIGGER refuse").await;
    when_left(&database, "main", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_that_the_database_refused_is_done_later_without_another_commit() {
    let mut rig = rig().await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    chain(&mut rig, 1).await;
    keep_one(&rig, "main").await;
    // The point cannot go, and for a while not even that can be told.
    let now = sqlite_number(&database, "SELECT unixepoch()").await;
    let until = now + 4;
    let refuse = format!(
        "CREATE TRIGGER deleting BEFORE INSERT ON events WHEN NEW.kind = 'point.deleting' BEGIN SELECT RAISE(ABORT, 'no'); END;
         CREATE TRIGGER alert BEFORE INSERT ON events WHEN NEW.kind = 'alert' AND unixepoch() < {until} BEGIN SELECT RAISE(ABORT, 'no'); END;"
    );
    sqlite(&database, &refuse).await;
    write_everywhere(&mut rig, 1);
    commit(&rig).await;
    let told = async {
        while sqlite_number(&database, "SELECT count(*) FROM events WHERE kind = 'alert' AND subject = 'main'").await
            == 0
        {}
    };
    tokio::time::timeout(DEADLINE, told).await.expect("what the database refused was forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn verifications_that_are_asked_for_by_turns_are_joined_and_only_so_many_wait() {
    let mut rig = rig().await;
    let history = chain(&mut rig, (OPEN_MAX / 4 + 1) as u8).await;
    let _held = rig.service.service.app().points.hold_verifications();
    let verify = |id: &BackupId| format!("/api/v1/points/{id}/verify");
    let lowest = verify(&history[0].0);
    let mut ids = Vec::new();
    for content in [false, true, false, true] {
        let begun = rig.service.post(&lowest, &json!({"content": content})).await.expect_status(202).json();
        ids.push(begun["id"].as_str().unwrap().to_owned());
    }
    assert_eq!((&ids[0], &ids[1]), (&ids[2], &ids[3]));
    assert_ne!(ids[0], ids[1]);
    let database = rig.service.folder.path().join("state/blockyard.db");
    let pins = sqlite_number(&database, "SELECT count(*) FROM leases WHERE kind = 'pin'").await;
    assert_eq!(pins, 2, "each of them holds the point once");

    let kinds: Vec<Value> = [("chain", false), ("chain", true), ("point", false), ("point", true)]
        .map(|(scope, content)| json!({"scope": scope, "content": content}))
        .into();
    let asked = history.iter().flat_map(|(id, _)| kinds.iter().map(move |kind| (id, kind)));
    for (id, kind) in asked.take(OPEN_MAX) {
        rig.service.post(&verify(id), kind).await.expect_status(202);
    }
    let refused = rig.service.post(&verify(&history.last().unwrap().0), &json!({})).await;
    assert!(!refused.header("retry-after").is_empty());
    refused.expect_problem(503, "too_many_jobs");
    // Joined all the same.
    rig.service.post(&lowest, &json!({"content": true})).await.expect_status(202);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_the_end_of_an_export_is_told_although_its_task_was_cut() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 1).await;
    let exports = format!("/api/v1/points/{}/exports", history[0].0);
    let export = rig.service.post(&exports, &json!({"disk_id": 0})).await.expect_status(201).json();
    let id: ExportId = export["id"].as_str().unwrap().parse().unwrap();
    let app = rig.service.service.app().clone();
    // Its end cannot be recorded.
    let transaction = app.store.write().await.unwrap();
    let mut ending = std::pin::pin!(app.restores.end(&id));
    tokio::select! {
        biased;
        _ = &mut ending => panic!("it ended too early"),
        () = std::future::ready(()) => {}
    }
    drop(rig);
    assert!(tokio::time::timeout(DEADLINE, ending).await.expect("it waits for ever"));
    assert!(app.restores.find(&id).is_none());
    drop(transaction);
}
