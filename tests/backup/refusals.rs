//! Requests that are refused before anything is touched: each with its code, and nothing left behind.

use std::net::{Ipv4Addr, TcpListener};

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::json;

use crate::privileged::Mounted;
use crate::rig::{self, Plan, Rig, id_of};
use crate::start::ports_of;

fn waiting() -> Faults {
    Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bodies_are_400_with_a_pointer_and_touch_nothing() {
    let rig = Rig::new().await;
    let with = |field: &str, value: serde_json::Value| {
        let mut body = rig.start_body();
        body[field] = value;
        body
    };
    for (body, pointer) in [
        (with("tags", json!(["nightly"])), "/tags"),
        (with("tags", json!({"reason": 1})), "/tags/reason"),
        (with("backup_type", json!("differential")), "/backup_type"),
        (with("repository_id", json!(7)), "/repository_id"),
        (with("vm_context_id", json!("")), "/vm_name"),
        (with("policy_id", json!("x".repeat(1001))), "/policy_id"),
        (json!({"vm_name": "db-server", "repository_id": "main"}), "/backup_type"),
        (json!({"vm_name": "db-server", "backup_type": "full"}), "/repository_id"),
    ] {
        rig.service.post("/api/v1/backups/vm", &body).await.expect_fault(400, "invalid_field", pointer);
    }
    let request = rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm");
    let broken = request.header("content-type", "application/json").body("{\"vm_name\": ");
    crate::support::send(broken).await.expect_problem(400, "invalid_json");
    let array = rig.service.post("/api/v1/backups/vm", &json!([])).await;
    array.expect_problem(400, "invalid_field");
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_as_an_array_are_a_400_with_a_pointer() {
    let rig = Rig::new().await;
    let mut body = rig.start_body();
    body["tags"] = json!(["a", "b"]);
    rig.service.post("/api/v1/backups", &body).await.expect_fault(400, "invalid_field", "/tags");
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_vms_and_repositories_and_vms_without_disks_are_404() {
    let rig = Rig::new().await;
    let empty = rig::add_vm(&rig.service, "empty", &[]).await;
    let start =
        |vm: &str, repository: &str| json!({"vm_context_id": vm, "repository_id": repository, "backup_type": "full"});
    for (body, code) in [
        (json!({"vm_name": "nobody", "repository_id": "main", "backup_type": "full"}), "vm_not_found"),
        (start("vm-01JC0A7K2E5H8M3P6R9T1V4X7Z", "main"), "vm_not_found"),
        (start("not an id", "main"), "vm_not_found"),
        (start(&rig.vm, "elsewhere"), "repository_not_found"),
        (start(&rig.vm, "../main"), "repository_not_found"),
        (start(&empty, "main"), "vm_has_no_disks"),
    ] {
        rig.service.post("/api/v1/backups/vm", &body).await.expect_problem(404, code);
    }
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicate_or_missing_device_keys_refuse_the_job_before_any_side_effect() {
    let rig = Rig::new().await;
    let mut body = crate::support::vm_body("twins");
    body["credential"] = "main".into();
    for (disks, code) in [
        (
            json!([{"device_key": 2000, "size_bytes": 512}, {"device_key": 2000, "size_bytes": 512}]),
            "disk_key_duplicate",
        ),
        (json!([{"device_key": 2001, "size_bytes": 512}, {"unit_number": 1, "size_bytes": 512}]), "disk_key_duplicate"),
        (json!([{"size_bytes": 512}]), "disk_key_missing"),
        (json!([{"device_key": 2000, "size_bytes": 0}]), "disk_size_invalid"),
        (json!([{"device_key": 2000, "size_bytes": 513}]), "disk_size_invalid"),
    ] {
        body["disks"] = disks;
        // Such a VM does not even get into the inventory; the job's own check of the same rules is a unit test of the plan.
        rig.service.post("/api/v1/vms", &body).await.expect_problem(422, code);
    }
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn incremental_without_a_parent_is_422_and_auto_makes_a_full_that_says_why() {
    let rig = Rig::new().await;
    let mut body = rig.start_body();
    body["backup_type"] = "incremental".into();
    let problem = rig.service.post("/api/v1/backups/vm", &body).await.expect_problem(422, "no_parent_point");
    assert!(problem["detail"].as_str().unwrap().contains("first_backup"), "{problem}");
    expect_untouched(&rig).await;

    let first = rig.back_up().await;
    assert_eq!(first["disks"][0]["reason"], "first_backup");
    body["backup_type"] = "full".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    assert_eq!(started["disk_results"][0]["reason"], "requested_full");
    rig.end_of(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_credential_is_422_before_any_port_is_taken() {
    let rig = Rig::new().await;
    let mut body = crate::support::vm_body("no-login");
    body["disks"] = json!([{"device_key": 2000, "size_bytes": 512}]);
    let vm = rig.service.post("/api/v1/vms", &body).await.expect_status(201).json();
    let start = json!({"vm_context_id": vm["id"], "repository_id": "main", "backup_type": "full"});
    rig.service.post("/api/v1/backups/vm", &start).await.expect_problem(422, "credential_missing");

    let password = rig.service.folder.path().join("password");
    for content in [None, Some(""), Some("\n")] {
        std::fs::remove_file(&password).ok();
        if let Some(content) = content {
            std::fs::write(&password, content).unwrap();
        }
        let problem = rig.try_start().await.expect_problem(422, "credential_missing");
        let text = problem.to_string();
        assert!(!text.contains(password.to_str().unwrap()), "{text}");
    }
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_secret_file_refuses_to_start_the_job() {
    let rig = Rig::new().await;
    let password = rig.service.folder.path().join("password");
    let make: [(&str, &dyn Fn()); 6] = [
        ("a folder", &|| std::fs::create_dir(&password).unwrap()),
        ("a link to nothing", &|| std::os::unix::fs::symlink("nowhere", &password).unwrap()),
        ("a link to itself", &|| std::os::unix::fs::symlink("password", &password).unwrap()),
        ("no text", &|| std::fs::write(&password, [0xff, 0xfe, b'x']).unwrap()),
        // What never ends, and what never begins: neither may hold the caller or the service.
        ("an endless device", &|| std::os::unix::fs::symlink("/dev/zero", &password).unwrap()),
        ("a pipe", &|| {
            rig::tool("coreutils", "mkfifo", &[password.to_str().unwrap()]);
        }),
    ];
    std::fs::remove_file(&password).unwrap();
    for (what, make) in make {
        make();
        let answer = tokio::time::timeout(rig::DEADLINE, rig.try_start()).await;
        let problem = answer.unwrap_or_else(|_| panic!("{what}: no answer")).expect_problem(422, "credential_missing");
        assert!(!problem.to_string().contains(password.to_str().unwrap()), "{what}: {problem}");
        expect_untouched(&rig).await;
        if what == "a folder" { std::fs::remove_dir(&password) } else { std::fs::remove_file(&password) }.unwrap();
    }
    // One that is far too long is none either.
    std::fs::write(&password, "x".repeat(1 << 20)).unwrap();
    rig.try_start().await.expect_problem(422, "credential_missing");
    expect_untouched(&rig).await;
    std::fs::write(&password, "secret-of-the-vcenter").unwrap();
    assert_eq!(rig.back_up().await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_cannot_be_used_is_503() {
    let rig = Rig::new().await;
    let moved = rig.repository.with_extension("moved");
    std::fs::rename(&rig.repository, &moved).unwrap();
    let answer = rig.try_start().await;
    answer.expect_problem(503, "repository_unavailable");
    assert!(answer.header("retry-after").parse::<u64>().is_ok());
    std::fs::write(&rig.repository, "a file in its place").unwrap();
    rig.try_start().await.expect_problem(503, "repository_unavailable");
    std::fs::remove_file(&rig.repository).unwrap();
    std::fs::rename(&moved, &rig.repository).unwrap();

    let show = rig.service.get("/api/v1/repositories/main").await;
    let mut body = show.json();
    let body = json!({"name": body["name"].take(), "path": body["path"].take(), "enabled": false});
    rig.service.put("/api/v1/repositories/main", show.header("etag"), &body).await.expect_status(200);
    rig.try_start().await.expect_problem(503, "repository_unavailable");
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_on_a_read_only_file_system_is_503() {
    let rig = Rig::new().await;
    let folder = rig.service.folder.path().join("read-only");
    let _mounted = Mounted::read_only(&folder);
    let body = json!({"id": "read-only", "name": "read-only", "path": folder});
    rig.service.post("/api/v1/repositories", &body).await.expect_status(201);
    let mut start = rig.start_body();
    start["repository_id"] = "read-only".into();
    let answer = rig.service.post("/api/v1/backups/vm", &start).await;
    answer.expect_problem(503, "repository_unavailable");
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_little_space_is_507_before_the_node_is_called() {
    let toml = "[storage]\nmin_free_bytes = 1000000000000000\n".to_owned();
    let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
    let problem = rig.try_start().await.expect_problem(507, "insufficient_storage");
    assert_eq!(problem["repository_id"], "main");
    assert!(problem["needed_bytes"].as_u64().unwrap() > problem["free_bytes"].as_u64().unwrap());
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_job_makes_one_snapshot_and_a_second_start_is_refused() {
    let rig = Rig::faulty(waiting()).await;
    let started = rig.start().await;
    let problem = rig.try_start().await.expect_problem(409, "backup_in_progress");
    assert_eq!(problem["backup_id"], started["backup_id"]);
    assert_eq!(problem["links"]["active"], format!("/api/v1/backups/{}", id_of(&started)));
    assert!(problem["detail"].as_str().unwrap().contains("(starting)"), "{problem}");
    rig.paused().await;
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
    assert_eq!(rig.node.log().calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn second_start_for_a_busy_vm_is_refused_even_into_another_repository() {
    let rig = Rig::faulty(waiting()).await;
    let started = rig.start().await;
    rig.service.add_repository("second").await;
    let mut body = rig.start_body();
    body["repository_id"] = "second".into();
    let problem = rig.service.post("/api/v1/backups/vm", &body).await.expect_problem(409, "backup_in_progress");
    assert_eq!(problem["backup_id"], started["backup_id"]);
    assert_eq!(rig.node.log().calls().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_starts_at_once_for_one_vm_make_one_job() {
    let rig = Rig::faulty(waiting()).await;
    let starts: Vec<_> = (0..20)
        .map(|_| {
            let request = rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm").json(&rig.start_body());
            tokio::spawn(crate::support::send(request))
        })
        .collect();
    let mut accepted = 0;
    for start in starts {
        let answer = start.await.unwrap();
        match answer.status.as_u16() {
            200 => accepted += 1,
            _ => {
                answer.expect_problem(409, "backup_in_progress");
            }
        }
    }
    assert_eq!((accepted, rig.node.log().calls().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn same_vm_name_in_two_vcenters_is_ambiguous_and_never_shares_a_chain() {
    let rig = Rig::faulty(waiting()).await;
    let mut twin = crate::support::vm_body("db-server");
    twin["vcenter_host"] = "vc.example".into();
    twin["path"] = "/DC2/vm/db-server".into();
    twin["credential"] = "main".into();
    twin["disks"] = json!([{"device_key": 2000, "size_bytes": 512}]);
    let twin = rig.service.post("/api/v1/vms", &twin).await.expect_status(201).json();
    let by_name = json!({"vm_name": "db-server", "repository_id": "main", "backup_type": "auto"});
    rig.service.post("/api/v1/backups/vm", &by_name).await.expect_problem(409, "vm_ambiguous");
    // The client asks for change ids by inventory name, so the two never run at once.
    let started = rig.start().await;
    let body = json!({"vm_context_id": twin["id"], "repository_id": "main", "backup_type": "auto"});
    let problem = rig.service.post("/api/v1/backups/vm", &body).await.expect_problem(409, "vm_name_busy");
    assert_eq!(problem["backup_id"], started["backup_id"]);
    rig.paused().await;
    rig.node.resume();
    let first = rig.end_of(id_of(&started)).await;
    assert_eq!(first["state"], "committed", "{first:#}");
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    assert_eq!(started["disk_results"][0]["reason"], "first_backup");
    let folder = |path: &serde_json::Value| path.as_str().unwrap().rsplit('/').nth(2).unwrap().to_owned();
    assert_ne!(
        folder(&started["disk_results"][0]["qcow2_path"]),
        folder(&first["disk_results"][0]["qcow2_path"]),
        "two VMs never share a folder"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn exhausted_ports_refuse_the_whole_vm_with_503() {
    let ports = rig::free_ports();
    let ports = *ports.start()..=*ports.start() + 1;
    let rig = Rig::with(Plan { ports, ..Plan::default() }).await;
    let answer = rig.try_start().await;
    answer.expect_problem(503, "no_ports");
    assert!(answer.header("retry-after").parse::<u64>().is_ok());
    expect_untouched(&rig).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn port_held_by_a_foreign_process_is_skipped_and_never_announced() {
    let rig = Rig::faulty(waiting()).await;
    let first = *rig.ports.start();
    let foreign = TcpListener::bind((Ipv4Addr::LOCALHOST, first + 1)).unwrap();
    let started = rig.start().await;
    assert_eq!(ports_of(&started), [first, first + 2, first + 3]);
    let call = rig.node.log().calls().remove(0);
    assert!(!call.nbd_targets.contains(&format!(":{}/", first + 1)), "{}", call.nbd_targets);
    drop(foreign);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_jobs_run_than_may() {
    let rig =
        Rig::with(Plan { toml: "[jobs]\nmax_running = 1\n".to_owned(), faults: waiting(), ..Plan::default() }).await;
    let other = rig::add_vm(&rig.service, "other", &[(2000, 512)]).await;
    let started = rig.start().await;
    let body = json!({"vm_context_id": other, "repository_id": "main", "backup_type": "full"});
    let answer = rig.service.post("/api/v1/backups/vm", &body).await;
    answer.expect_problem(503, "too_many_jobs");
    assert!(answer.header("retry-after").parse::<u64>().is_ok());
    rig.cancel(id_of(&started)).await;
    rig.end_of(id_of(&started)).await;
    rig.expect_nothing_left(0).await;
}

/// Nothing happened: no job, no port, no file, no call.
async fn expect_untouched(rig: &Rig) {
    let listed = rig.service.get("/api/v1/backups").await.expect_status(200).json();
    assert_eq!(listed["total"], 0, "{listed}");
    assert!(rig.node.log().calls().is_empty());
    rig.expect_nothing_left(0).await;
}
