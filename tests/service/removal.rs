//! Removing what backups refer to: history stays whole, and what comes back is what it was.

use serde_json::json;

use crate::support::{TestService, vm_body};

const BACKUP: &str = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB";

/// Puts a job of the VM into the repository `repo`, in this state, past the job layer.
async fn add_job(service: &TestService, vm: &str, state: &str) {
    let sql = "INSERT INTO backups (id, vm_id, repository_id, vm_name, requested_type, backup_type, state, result, boot_id, \
               tags, warnings, created_at) VALUES (?1, ?2, 'repo', 'db', 'full', 'full', ?3, 'none', 'b', '{}', '[]', \
               '2026-11-23T22:00:00.000Z')";
    let mut transaction = service.service.app().store.write().await.unwrap();
    sqlx::query(sql).bind(BACKUP).bind(vm).bind(state).execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

async fn end_job(service: &TestService, state: &'static str) {
    let mut transaction = service.service.app().store.write().await.unwrap();
    sqlx::query("UPDATE backups SET state = ?1").bind(state).execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

#[tokio::test]
async fn vm_with_backups_is_hidden_and_comes_back_as_the_same_one() {
    let service = TestService::start().await;
    service.add_repository("repo").await;
    let mut body = vm_body("db");
    body["uuid"] = "4213".into();
    body["disks"] = json!([{"device_key": 2000, "size_bytes": 512}, {"device_key": 2001, "size_bytes": 512}]);
    let added = service.post("/api/v1/vms", &body).await.expect_status(201);
    let path = added.header("location");
    let id = added.json()["id"].clone();
    add_job(&service, id.as_str().unwrap(), "transferring").await;

    let refused = service.delete(path).await.expect_problem(409, "backup_in_progress");
    assert_eq!(refused["links"]["active"], format!("/api/v1/backups/{BACKUP}"));
    assert_eq!(refused["backup_id"], BACKUP);
    assert_eq!(refused["retryable"], true);

    end_job(&service, "failed").await;
    service.delete(path).await.expect_status(204);
    service.get(path).await.expect_problem(404, "vm_not_found");
    assert_eq!(service.get("/api/v1/vms").await.json()["total"], 0);

    // Another VM at the same place is another one.
    let mut other = body.clone();
    other["uuid"] = "other".into();
    let other = service.post("/api/v1/vms", &other).await.expect_status(201);
    assert_ne!(other.json()["id"], id);
    service.delete(other.header("location")).await.expect_status(204);

    body["disks"] = json!([{"device_key": 2001, "size_bytes": 512}, {"device_key": 1999, "size_bytes": 512}]);
    let back = service.post("/api/v1/vms", &body).await.expect_status(201).json();
    assert_eq!(back["id"], id);
    let numbers: Vec<_> =
        back["disks"].as_array().unwrap().iter().map(|disk| (&disk["device_key"], &disk["disk_id"])).collect();
    assert_eq!(numbers, [(&json!(2001), &json!(1)), (&json!(1999), &json!(2))]);
}

#[tokio::test]
async fn repository_is_kept_while_it_holds_points_or_is_written_to() {
    let service = TestService::start().await;
    let path = service.add_repository("repo").await;
    let vm = service.add_vm("db", &[(2000, 512)]).await;
    add_job(&service, &vm, "sealing").await;
    service.delete("/api/v1/repositories/repo").await.expect_problem(409, "backup_in_progress");

    end_job(&service, "committed").await;
    let mut transaction = service.service.app().store.write().await.unwrap();
    sqlx::query(
        "INSERT INTO restore_points (id, vm_id, repository_id, sequence, dir, state, trust, committed_at) \
         VALUES (?1, ?2, 'repo', 1, 'db', 'committed', 'unverified', '2026-11-23T22:00:00.000Z')",
    )
    .bind(BACKUP)
    .bind(&vm)
    .execute(&mut *transaction)
    .await
    .unwrap();
    transaction.commit().await.unwrap();
    let refused = service.delete("/api/v1/repositories/repo").await.expect_problem(409, "repository_not_empty");
    assert_eq!(refused["points"], 1);
    let elsewhere = service.folder.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let moved = json!({"name": "repo", "path": elsewhere});
    service.put("/api/v1/repositories/repo", "*", &moved).await.expect_problem(409, "repository_not_empty");
    let renamed = json!({"name": "new name", "path": path});
    service.put("/api/v1/repositories/repo", "*", &renamed).await.expect_status(200);

    let mut transaction = service.service.app().store.write().await.unwrap();
    sqlx::query("UPDATE restore_points SET state = 'deleted'").execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
    service.delete("/api/v1/repositories/repo").await.expect_status(204);
    service.get("/api/v1/repositories/repo").await.expect_problem(404, "repository_not_found");
    let back = json!({"id": "repo", "name": "again", "path": elsewhere});
    assert_eq!(service.post("/api/v1/repositories", &back).await.expect_status(201).json()["name"], "again");
}

#[tokio::test]
async fn foreign_keys_hold_even_past_the_service() {
    let service = TestService::start().await;
    service.add_repository("repo").await;
    let vm = service.add_vm("db", &[(2000, 512)]).await;
    add_job(&service, &vm, "failed").await;
    let mut transaction = service.service.app().store.write().await.unwrap();
    for sql in ["DELETE FROM vms", "DELETE FROM repositories", "UPDATE backups SET code = ''"] {
        sqlx::query(sql).execute(&mut *transaction).await.unwrap_err();
    }
}
