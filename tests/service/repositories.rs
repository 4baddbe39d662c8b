//! Repositories over REST.

use serde_json::json;

use crate::support::TestService;

#[tokio::test]
async fn a_repository_is_answered_with_its_free_space() {
    let service = TestService::start().await;
    let path = service.folder.path().join("backups");
    std::fs::create_dir(&path).unwrap();
    let body = json!({"id": "repo-001", "name": "Main", "path": path});
    let added = service.post("/api/v1/repositories", &body).await.expect_status(201);
    assert_eq!(added.header("location"), "/api/v1/repositories/repo-001");
    let repository = added.json();
    let (free, total) = (repository["free_bytes"].as_u64().unwrap(), repository["total_bytes"].as_u64().unwrap());
    assert!(0 < free && free <= total, "{repository}");
    let wanted = json!({"id": "repo-001", "name": "Main", "path": path, "enabled": true, "free_bytes": free,
        "total_bytes": total, "retention": {}});
    assert_eq!(repository, wanted);

    std::fs::remove_dir(&path).unwrap();
    let shown = service.get("/api/v1/repositories/repo-001").await.expect_status(200).json();
    assert_eq!(shown["free_bytes"], json!(null), "a folder that is gone has no free space");
}

#[tokio::test]
async fn id_of_a_repository_is_made_from_its_name_when_left_out() {
    let service = TestService::start().await;
    let path = service.folder.path().join("backups");
    std::fs::create_dir(&path).unwrap();
    let body = json!({"name": "Main / Keller 2", "path": format!("{}//", path.display())});
    let added = service.post("/api/v1/repositories", &body).await.expect_status(201).json();
    assert_eq!(added["id"], "main-keller-2");
    assert_eq!(added["path"], json!(path), "the path is kept in its shortest spelling");
}

#[tokio::test]
async fn paths_and_settings_that_make_no_sense_are_refused_with_a_pointer() {
    let service = TestService::start().await;
    let folder = service.folder.path().to_str().unwrap().to_owned();
    let file = format!("{folder}/file");
    std::fs::write(&file, "").unwrap();
    let rows = [
        ("path", json!("relative"), "/path"),
        ("path", json!(""), "/path"),
        ("path", json!(format!("{folder}/missing")), "/path"),
        ("path", json!(file), "/path"),
        ("path", json!(format!("{folder}/state/..")), "/path"),
        ("id", json!("../x"), "/id"),
        ("id", json!(""), "/id"),
        ("name", json!(""), "/name"),
        ("max_running", json!(0), "/max_running"),
        ("retention", json!({"keep_forever": 1}), "/retention/keep_forever"),
        ("retention", json!({"keep_daily": -1}), "/retention/keep_daily"),
        ("colour", json!(1), "/colour"),
    ];
    for (field, value, pointer) in rows {
        let mut body = json!({"id": "r", "name": "r", "path": folder});
        body[field] = value;
        service.post("/api/v1/repositories", &body).await.expect_fault(400, "invalid_field", pointer);
    }
    assert_eq!(service.get("/api/v1/repositories").await.json()["total"], 0);
}

#[tokio::test]
async fn second_repository_with_the_same_id_or_folder_is_refused() {
    let service = TestService::start().await;
    let first = service.add_repository("first").await;
    let link = service.folder.path().join("link");
    std::os::unix::fs::symlink(&first, &link).unwrap();
    let other = service.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let rows = [("first", &other), ("second", &first), ("second", &link)];
    for (id, path) in rows {
        let body = json!({"id": id, "name": "x", "path": path});
        let refused = service.post("/api/v1/repositories", &body).await.expect_problem(409, "repository_exists");
        assert_eq!(refused["links"]["existing"], "/api/v1/repositories/first");
    }
    service.add_repository("third").await;
    for path in [&first, &link] {
        let body = json!({"name": "x", "path": path});
        let refused = service.put("/api/v1/repositories/third", "*", &body).await;
        assert_eq!(refused.expect_problem(409, "repository_exists")["links"]["existing"], "/api/v1/repositories/first");
    }
    let moved = json!({"name": "x", "path": other});
    service.put("/api/v1/repositories/third", "*", &moved).await.expect_status(200);
}

#[tokio::test]
async fn settings_of_a_repository_are_replaced_under_its_version() {
    let service = TestService::start().await;
    let path = service.add_repository("repo").await;
    let shown = service.get("/api/v1/repositories/repo").await.expect_status(200);
    let body =
        json!({"name": "Renamed", "path": path, "enabled": false, "max_running": 2, "retention": {"keep_daily": 7}});
    let without = service.request(reqwest::Method::PUT, "/api/v1/repositories/repo").json(&body);
    crate::support::send(without).await.expect_problem(428, "etag_required");
    service.put("/api/v1/repositories/repo", "\"0\"", &body).await.expect_problem(412, "etag_mismatch");
    let replaced =
        service.put("/api/v1/repositories/repo", shown.header("etag"), &body).await.expect_status(200).json();
    assert_eq!(replaced["name"], "Renamed");
    assert_eq!(replaced["enabled"], false);
    assert_eq!(replaced["max_running"], 2);
    assert_eq!(replaced["retention"], json!({"keep_daily": 7}));

    let mut other_id = body.clone();
    other_id["id"] = "another".into();
    service.put("/api/v1/repositories/repo", "*", &other_id).await.expect_fault(400, "invalid_field", "/id");
}

#[tokio::test]
async fn removed_repository_is_gone_and_its_folder_stays() {
    let service = TestService::start().await;
    let path = service.add_repository("repo").await;
    service.delete("/api/v1/repositories/repo").await.expect_status(204);
    assert!(path.is_dir());
    for id in ["repo", "unknown", "NO", "a%2fb"] {
        let path = format!("/api/v1/repositories/{id}");
        service.get(&path).await.expect_problem(404, "repository_not_found");
        service.delete(&path).await.expect_problem(404, "repository_not_found");
    }
}
