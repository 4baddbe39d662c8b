//! The moment between a merge's exchange of folders and its record, when files and rows do not agree: whoever opens a chain then
//! waits, and is not told of damage that is none.

use std::time::Duration;

use serde_json::json;

use crate::merge::{chain, expect_whole, rig, write_everywhere};
use crate::process::sqlite;
use crate::rig::{self, id_of, manifest};

/// Whoever does not wait for the record has answered long before.
const HELD: Duration = Duration::from_millis(500);

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
    let early = tokio::time::timeout(HELD, &mut asked).await;
    sqlite(&database, "DROP TRIGGER refuse").await;
    let (export, raw, started, checked) = match early {
        Ok(answers) => answers,
        Err(_) => asked.await,
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
