//! The moment between a merge's exchange of folders and its record, when files and rows do not agree: whoever opens a chain then
//! waits, and is not told of damage that is none.

use serde_json::json;

use crate::merge::{chain, expect_whole, rig, write_everywhere};
use crate::process::sqlite;
use crate::rig::{self, id_of, manifest};

#[tokio::test(flavor = "multi_thread")]
async fn between_the_exchange_and_the_record_of_a_merge_nothing_above_it_is_called_damaged() {
    let mut rig = rig().await;
    let mut history = chain(&mut rig, 3).await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON events WHEN NEW.kind = 'point.merged' BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    write_everywhere(&mut rig, 3);
    let points = rig.service.service.app().points.clone();
    let (child, top) = (history[1].0.clone(), history[2].0.clone());
    let merging = tokio::spawn(async move { points.merge(&child).await });
    let exchanged = async {
        while manifest(&rig, history[1].0.as_str()).await["generation"] != 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, exchanged).await.expect("never exchanged");
    let (export, start, nothing) = (json!({"disk_id": 0}), rig.start_body(), json!({}));
    let (exports, raw) = (format!("/api/v1/points/{top}/exports"), format!("/api/v1/points/{top}/disks/0/raw"));
    let asked = async {
        tokio::join!(
            rig.service.post(&exports, &export),
            rig.service.get(&raw),
            rig.service.post("/api/v1/backups/vm", &start),
            rig.service.post("/api/v1/repositories/main/check", &nothing),
        )
    };
    let mut asked = std::pin::pin!(asked);
    let store = &rig.service.service.app().store;
    let mut settling = store.settling().subscribe();
    // The record follows when each of them has looked and waits; one that does not wait is told of damage and ends the others' wait.
    let early = tokio::select! {
        answers = &mut asked => Some(answers),
        _ = settling.wait_for(|waiting| *waiting == 4) => None,
    };
    let mut transaction = store.write().await.unwrap();
    sqlx::query("DROP TRIGGER refuse").execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let (export, raw, started, checked) = match early {
        Some(answers) => answers,
        None => asked.await,
    };
    merging.await.unwrap().unwrap();
    let (export, started) = (export.expect_status(201).json(), started.expect_status(200).json());
    raw.expect_status(200);
    let checked = checked.expect_status(200).json();
    assert_eq!((&checked["result"], &checked["points"]), (&json!("clean"), &checked["intact"]), "{checked:#}");
    rig.service.delete(&format!("/api/v1/exports/{}", export["id"].as_str().unwrap())).await.expect_status(204);
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["backup_type"]), (&json!("committed"), &json!("incremental")), "{backup:#}");
    history.push((id_of(&backup).parse().unwrap(), rig.disks.clone()));
    expect_whole(&rig, &history, "").await;
}
