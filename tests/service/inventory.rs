//! VMs over REST: exact bodies, bad input, disk numbers.

use serde_json::{Value, json};

use crate::support::{TestService, vm_body};

fn disk(key: u32, size_bytes: u64) -> Value {
    json!({"device_key": key, "size_bytes": size_bytes})
}

/// Pairs of device key and number of the disks that the answer shows.
fn numbers(vm: &Value) -> Vec<(u64, u64)> {
    let disks = vm["disks"].as_array().unwrap().iter();
    disks.map(|disk| (disk["device_key"].as_u64().unwrap(), disk["disk_id"].as_u64().unwrap())).collect()
}

#[tokio::test]
async fn a_vm_is_answered_with_its_id_and_numbered_disks() {
    let service = TestService::start().await;
    let body = json!({"name": "db-server", "vcenter_host": "vc.example", "path": "/DC1/vm/prod/db-server", "uuid": "4213",
        "disks": [{"device_key": 2000, "size_bytes": 42_949_672_960_u64, "vmdk_path": "[ds1] db/db.vmdk", "vmdk_uuid": "6000C29"},
                  {"unit_number": 1, "size_bytes": 214_748_364_800_u64, "vmdk_path": "[ds1] db/db_1.vmdk"}]});
    let added = service.post("/api/v1/vms", &body).await.expect_status(201);
    let vm = added.json();
    let id = vm["id"].as_str().unwrap();
    assert_eq!(added.header("location"), format!("/api/v1/vms/{id}"));
    assert!(id.starts_with("vm-") && id.len() == 29, "{id}");
    let created_at = vm["created_at"].clone();
    let wanted = json!({"id": id, "name": "db-server", "vcenter_host": "vc.example", "path": "/DC1/vm/prod/db-server",
        "uuid": "4213", "node": "default", "credential": null, "created_at": created_at, "disks": [
            {"disk_id": 0, "device_key": 2000, "unit_number": null, "size_bytes": 42_949_672_960_u64,
             "vmdk_path": "[ds1] db/db.vmdk", "vmdk_uuid": "6000C29", "present": true},
            {"disk_id": 1, "device_key": 2001, "unit_number": 1, "size_bytes": 214_748_364_800_u64,
             "vmdk_path": "[ds1] db/db_1.vmdk", "vmdk_uuid": null, "present": true}]});
    assert_eq!(vm, wanted);

    let shown = service.get(&format!("/api/v1/vms/{id}")).await.expect_status(200);
    assert_eq!(shown.json(), wanted);
    assert_eq!(shown.header("etag"), added.header("etag"));
}

#[tokio::test]
async fn disk_numbers_survive_gaps_second_controllers_and_more_than_ten_disks() {
    let service = TestService::start().await;
    let mut body = vm_body("many");
    // Two controllers, a SATA and an NVMe disk, not in order.
    let keys = [2016_u64, 2003, 16_000, 2000, 31_000, 2001, 2017, 2002, 2018, 2004, 2005, 2019];
    body["disks"] =
        keys.iter().map(|key| json!({"device_key": key, "size_bytes": 512, "vmdk_uuid": format!("u{key}")})).collect();
    let added = service.post("/api/v1/vms", &body).await.expect_status(201);
    let path = added.header("location").to_owned();
    let mut sorted = keys;
    sorted.sort_unstable();
    let first: Vec<(u64, u64)> = sorted.into_iter().zip(0..).collect();
    assert_eq!(numbers(&added.json()), first, "numbers follow the device keys, as numbers and not as text");

    // Disk 2001 (number 1) goes, 2006 comes: it gets the next number, nobody moves up.
    let without_2001 = |disks: &Value| {
        let disks = disks.as_array().unwrap().iter().filter(|disk| disk["device_key"] != 2001).cloned();
        disks.collect::<Vec<_>>()
    };
    let mut fewer = without_2001(&body["disks"]);
    fewer.push(json!({"device_key": 2006, "size_bytes": 512, "vmdk_uuid": "u2006"}));
    let mut changed = body.clone();
    changed["disks"] = fewer.clone().into();
    let replaced = service.put(&path, added.header("etag"), &changed).await.expect_status(200);
    let mut wanted: Vec<_> = first.iter().copied().filter(|(key, _)| *key != 2001).collect();
    wanted.push((2006, 12));
    assert_eq!(numbers(&replaced.json()), wanted);

    // Another disk under the key 2001 is another disk; the old one, back again, is the old one.
    fewer.push(json!({"device_key": 2001, "size_bytes": 512, "vmdk_uuid": "another"}));
    changed["disks"] = fewer.into();
    let replaced = service.put(&path, replaced.header("etag"), &changed).await.expect_status(200);
    assert!(numbers(&replaced.json()).contains(&(2001, 13)));
    let back = service.put(&path, replaced.header("etag"), &body).await.expect_status(200);
    assert_eq!(numbers(&back.json()), first);

    let all = service.get(&format!("{path}/disks")).await.expect_status(200).json();
    let absent: Vec<_> = all["disks"].as_array().unwrap().iter().filter(|disk| disk["present"] == false).collect();
    assert_eq!(all["total"], 14);
    assert_eq!(absent.iter().map(|disk| disk["disk_id"].as_u64().unwrap()).collect::<Vec<_>>(), [12, 13]);

    // Numbers are kept over a restart.
    let service = TestService::start_in(service.stop().await, "").await;
    assert_eq!(numbers(&service.get(&path).await.json()), first);
}

#[tokio::test]
async fn disk_is_the_same_one_when_only_its_uuid_became_known() {
    let service = TestService::start().await;
    let mut body = vm_body("learning");
    body["disks"] = json!([{"device_key": 2000, "size_bytes": 512, "vmdk_path": "[ds1] a.vmdk"}, disk(2001, 512)]);
    let added = service.post("/api/v1/vms", &body).await.expect_status(201);
    body["disks"] = json!([{"device_key": 2000, "size_bytes": 1024, "vmdk_path": "[ds1] a.vmdk", "vmdk_uuid": "U"}, disk(2001, 1024)]);
    let learned = service.put(added.header("location"), added.header("etag"), &body).await.expect_status(200);
    assert_eq!(numbers(&learned.json()), [(2000, 0), (2001, 1)]);
    assert_eq!(learned.json()["disks"][0]["vmdk_uuid"], "U");
    assert_eq!(learned.json()["disks"][1]["size_bytes"], 1024);
    // From now on the UUID decides: the file was moved.
    body["disks"][0]["vmdk_path"] = "[ds2] a.vmdk".into();
    let moved = service.put(added.header("location"), learned.header("etag"), &body).await.expect_status(200);
    assert_eq!(numbers(&moved.json()), [(2000, 0), (2001, 1)]);
}

#[tokio::test]
async fn disks_without_a_usable_key_or_size_are_refused_with_a_pointer() {
    let service = TestService::start().await;
    let rows = [
        (json!([{"size_bytes": 512}]), 422, "disk_key_missing", "/disks/0"),
        (json!([{"device_key": 0, "size_bytes": 512}]), 422, "disk_key_missing", "/disks/0"),
        (json!([disk(2000, 512), disk(2001, 512), disk(2000, 512)]), 422, "disk_key_duplicate", "/disks/2"),
        (json!([disk(2001, 512), {"unit_number": 1, "size_bytes": 512}]), 422, "disk_key_duplicate", "/disks/1"),
        (json!([disk(2000, 0)]), 422, "disk_size_invalid", "/disks/0/size_bytes"),
        (json!([disk(2000, 513)]), 422, "disk_size_invalid", "/disks/0/size_bytes"),
        (json!([disk(2000, 1 << 63)]), 422, "disk_size_invalid", "/disks/0/size_bytes"),
        (json!([{"device_key": 2000}]), 400, "invalid_field", "/disks/0/size_bytes"),
        (json!([{"device_key": -1, "size_bytes": 512}]), 400, "invalid_field", "/disks/0/device_key"),
        (json!([{"device_key": 4_000_000_000_u32, "size_bytes": 512}]), 400, "invalid_field", "/disks/0/device_key"),
        (json!([{"unit_number": 64, "size_bytes": 512}]), 400, "invalid_field", "/disks/0/unit_number"),
        (json!([{"device_key": 2000, "size_bytes": 512, "colour": 1}]), 400, "invalid_field", "/disks/0/colour"),
        (json!({"0": disk(2000, 512)}), 400, "invalid_field", "/disks"),
    ];
    for (disks, status, code, pointer) in rows {
        let mut body = vm_body("bad");
        body["disks"] = disks;
        service.post("/api/v1/vms", &body).await.expect_fault(status, code, pointer);
    }
    assert_eq!(service.get("/api/v1/vms").await.json()["total"], 0, "a refused VM leaves nothing behind");
}

#[tokio::test]
async fn fields_of_a_vm_are_checked_one_by_one() {
    let service = TestService::start_with(
        "[credentials.main]\nvcenter_host = \"VC.example\"\nusername = \"u\"\npassword_file = \"{folder}/password\"",
    )
    .await;
    let rows = [
        ("name", json!(""), 400, "invalid_field"),
        ("name", json!("a\nb"), 400, "invalid_field"),
        ("name", json!("x".repeat(1001)), 400, "invalid_field"),
        ("name", json!(7), 400, "invalid_field"),
        ("name", Value::Null, 400, "invalid_field"),
        ("vcenter_host", json!(" "), 400, "invalid_field"),
        ("path", json!("DC1/vm/x"), 400, "invalid_field"),
        ("path", json!("/DC1/vm/"), 400, "invalid_field"),
        ("node", json!("elsewhere"), 400, "invalid_field"),
        ("credential", json!("nobody"), 422, "credential_missing"),
        ("colour", json!("red"), 400, "invalid_field"),
    ];
    for (field, value, status, code) in rows {
        let mut body = vm_body("bad");
        body[field] = value;
        service.post("/api/v1/vms", &body).await.expect_fault(status, code, &format!("/{field}"));
    }
    for field in ["name", "vcenter_host", "path"] {
        let mut body = vm_body("bad");
        body.as_object_mut().unwrap().remove(field);
        service.post("/api/v1/vms", &body).await.expect_fault(400, "invalid_field", &format!("/{field}"));
    }

    let mut body = vm_body("of-another-vcenter");
    body["credential"] = "main".into();
    body["vcenter_host"] = "other.example".into();
    service.post("/api/v1/vms", &body).await.expect_fault(422, "credential_missing", "/credential");
    body["vcenter_host"] = "vc.EXAMPLE".into();
    let added = service.post("/api/v1/vms", &body).await.expect_status(201);
    assert_eq!(added.json()["vcenter_host"], "vc.example", "host names are the same in either case");
}

#[tokio::test]
async fn names_of_every_kind_are_kept_as_they_are() {
    let service = TestService::start().await;
    let long = "n".repeat(300);
    let names = [
        "two words",
        "a,b",
        "100%25",
        "a/b",
        "..",
        "../../etc",
        "Prüfung 北京 🙂",
        "web-disk2-a",
        "x-disk-2000",
        "'; --",
        &long,
    ];
    for (index, name) in names.into_iter().enumerate() {
        let mut body = vm_body(name);
        body["path"] = format!("/DC1/vm/{index}").into();
        let added = service.post("/api/v1/vms", &body).await.expect_status(201);
        let found = service.request(reqwest::Method::GET, "/api/v1/vms").query(&[("name", name)]);
        let found = crate::support::send(found).await.json();
        assert_eq!(found["vms"], json!([added.json()]), "{name}");
    }
}

#[tokio::test]
async fn second_vm_at_the_same_place_is_refused_with_a_link_to_the_first() {
    let service = TestService::start().await;
    let id = service.add_vm("db", &[(2000, 512)]).await;
    let refused = service.post("/api/v1/vms", &vm_body("db")).await.expect_problem(409, "vm_exists");
    assert_eq!(refused["links"]["existing"], format!("/api/v1/vms/{id}"));
    assert_eq!(refused["vm_context_id"], id);
    let mut elsewhere = vm_body("db");
    elsewhere["vcenter_host"] = "vc2.example".into();
    let other = service.post("/api/v1/vms", &elsewhere).await.expect_status(201);
    let conflict = service.put(other.header("location"), other.header("etag"), &vm_body("db")).await;
    conflict.expect_problem(409, "vm_exists");
    let found = service.get("/api/v1/vms?name=db").await.json();
    assert_eq!(found["total"], 2, "names need not be unique");
}

#[tokio::test]
async fn put_demands_the_version_it_replaces() {
    let service = TestService::start().await;
    let added = service.post("/api/v1/vms", &vm_body("db")).await.expect_status(201);
    let path = added.header("location");
    let etag = added.header("etag");
    let mut body = vm_body("db");
    body["name"] = "renamed".into();

    let without = service.request(reqwest::Method::PUT, path).json(&body);
    crate::support::send(without).await.expect_problem(428, "etag_required");
    service.put(path, "\"7\"", &body).await.expect_problem(412, "etag_mismatch");
    let replaced = service.put(path, etag, &body).await.expect_status(200);
    assert_eq!(replaced.json()["name"], "renamed");
    assert_ne!(replaced.header("etag"), etag);
    service.put(path, etag, &body).await.expect_problem(412, "etag_mismatch");
    service.put(path, &format!("\"0\", {}", replaced.header("etag")), &body).await.expect_status(200);
    service.put(path, "*", &body).await.expect_status(200);

    body.as_object_mut().unwrap().remove("disks");
    service.put(path, "*", &body).await.expect_fault(400, "invalid_field", "/disks");
}

#[tokio::test]
async fn removed_vm_is_gone_and_unknown_ids_never_were() {
    let service = TestService::start().await;
    let id = service.add_vm("db", &[(2000, 512)]).await;
    service.delete(&format!("/api/v1/vms/{id}")).await.expect_status(204);
    for id in [id.as_str(), "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z", "nonsense", "a%2fb"] {
        service.get(&format!("/api/v1/vms/{id}")).await.expect_problem(404, "vm_not_found");
        service.get(&format!("/api/v1/vms/{id}/disks")).await.expect_problem(404, "vm_not_found");
        service.delete(&format!("/api/v1/vms/{id}")).await.expect_problem(404, "vm_not_found");
        service.put(&format!("/api/v1/vms/{id}"), "*", &vm_body("x")).await.expect_problem(404, "vm_not_found");
    }
    assert_eq!(service.get("/api/v1/vms").await.json()["total"], 0);
    service.add_vm("db", &[(2000, 512)]).await;
}

#[tokio::test]
async fn of_two_that_add_the_same_vm_at_once_one_wins() {
    let service = TestService::start().await;
    let body = vm_body("raced");
    let requests =
        (0..8).map(|_| crate::support::send(service.request(reqwest::Method::POST, "/api/v1/vms").json(&body)));
    let mut tasks = tokio::task::JoinSet::new();
    requests.for_each(|request| drop(tasks.spawn(request)));
    let mut statuses: Vec<u16> = tasks.join_all().await.iter().map(|answer| answer.status.as_u16()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409, 409, 409, 409, 409]);
}
