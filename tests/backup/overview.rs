//! What existing callers ask of all backups: sums, and the chain of a VM.

use serde_json::{Value, json};

use crate::rig::{self, Rig, id_of};
use crate::support::{send, vm_body};

#[tokio::test(flavor = "multi_thread")]
async fn stats_and_the_chain_of_a_vm_tell_what_there_is() {
    let mut rig = Rig::new().await;
    let stats =
        async |query: &str| rig.service.get(&format!("/api/v1/backups/stats{query}")).await.expect_status(200).json();
    assert_eq!(stats("").await, json!({"backup_count": 0, "total_size_bytes": 0, "last_backup_at": null}));
    let chain = rig.service.get("/api/v1/backups/db-server/chain").await.expect_status(200).json();
    assert_eq!((&chain["total"], &chain["vm_context_id"]), (&json!(0), &json!(rig.vm)));

    let full = rig.back_up().await;
    rig.write(&[(2000, 0, vec![9; 512])]);
    let incremental = rig.back_up().await;
    let stats =
        async |query: &str| rig.service.get(&format!("/api/v1/backups/stats{query}")).await.expect_status(200).json();
    let all = stats("").await;
    let points = rig.points().await;
    let bytes: u64 = points
        .iter()
        .flat_map(|point| point["disks"].as_array().unwrap())
        .map(|disk| disk["file_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(all, json!({"backup_count": 2, "total_size_bytes": bytes, "last_backup_at": points[0]["committed_at"]}));
    assert_eq!(stats("?vm_name=db-server&repository_id=main").await, all);
    assert_eq!(stats("?vm_name=other").await["backup_count"], 0);
    assert_eq!(stats("?repository_id=other").await["backup_count"], 0);
    rig.service.get("/api/v1/backups/stats?colour=red").await.expect_problem(400, "invalid_field");

    // Oldest first: every parent is named before its children.
    let chain = rig.service.get("/api/v1/backups/db-server/chain").await.expect_status(200).json();
    let ids: Vec<&Value> = chain["points"].as_array().unwrap().iter().map(|point| &point["id"]).collect();
    assert_eq!(ids, [&full["backup_id"], &incremental["backup_id"]]);
    assert_eq!(chain["points"][0]["disks"][0]["parent_id"], Value::Null);
    assert_eq!(chain["points"][1]["disks"][0]["parent_id"], full["backup_id"]);
    rig.service.get("/api/v1/backups/nobody/chain").await.expect_problem(404, "vm_not_found");
    // A backup is still found by its id, and its id is nobody's name.
    rig.service.get(&format!("/api/v1/backups/{}", id_of(&full))).await.expect_status(200);
    rig.service.get(&format!("/api/v1/backups/{}/chain", id_of(&full))).await.expect_problem(404, "vm_not_found");
    send(rig.service.request_without_token(reqwest::Method::GET, "/api/v1/backups/stats"))
        .await
        .expect_problem(401, "token_missing");

    // Also of a VM that left the inventory; two of one name are told apart.
    rig.service.delete(&format!("/api/v1/vms/{}", rig.vm)).await.expect_status(204);
    let chain = rig.service.get("/api/v1/backups/db-server/chain").await.expect_status(200).json();
    assert_eq!(chain["total"], 2);
    let mut namesake = vm_body("db-server");
    namesake["path"] = "/DC2/vm/db-server".into();
    rig.service.post("/api/v1/vms", &namesake).await.expect_status(201);
    let problem = rig.service.get("/api/v1/backups/db-server/chain").await.expect_problem(409, "vm_ambiguous");
    assert_eq!(problem["candidates"].as_array().unwrap().len(), 2);
    rig::expect_image_equals(&rig::published(&rig, id_of(&incremental)).await.join("disk-0.qcow2"), &rig.disks[0].1);
}
