//! The start request: what is asked of a caller, what the node is told, and what is answered.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use blockyard::node::fake::{CompleteFault, Event, Faults, PausePoint, StartFault};
use serde_json::{Value, json};

use crate::rig::{self, Rig, content, expect_go, id_of, sizes};

/// A client that waits before it does anything.
fn waiting() -> Faults {
    Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn start_takes_a_vm_and_refuses_a_disk_id_with_the_reason() {
    let rig = Rig::faulty(waiting()).await;
    for path in ["/api/v1/backups/vm", "/api/v1/backups"] {
        for disk_id in [json!(0), json!("1"), json!(null)] {
            let mut body = rig.start_body();
            body["disk_id"] = disk_id;
            let problem = rig.service.post(path, &body).await.expect_fault(400, "disk_id_not_allowed", "/disk_id");
            let reason = "a backup covers all disks of the VM from one snapshot; a backup of one disk cannot be restored \
                          consistently";
            assert_eq!(problem["detail"], reason);
        }
    }
    assert!(rig.node.log().calls().is_empty());
    let body = json!({"vm_name": "db-server", "repository_id": "main", "backup_type": "full"});
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    assert_eq!(started["vm_context_id"], rig.vm);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_disk_of_the_vm_is_in_the_job() {
    let rig = Rig::faulty(waiting()).await;
    let started = rig.start().await;
    let disks: Vec<(u64, u64, u64)> = started["disk_results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| {
            let number = |field: &str| disk[field].as_u64().unwrap();
            (number("disk_id"), number("device_key"), number("size_bytes"))
        })
        .collect();
    let expected: Vec<(u64, u64, u64)> =
        (0..).zip(sizes(&rig.disks)).map(|(disk_id, (key, size))| (disk_id, u64::from(key), size)).collect();
    assert_eq!(disks, expected);
    assert_eq!(started["disks_count"], 3);
    assert_eq!(started["total_bytes"], expected.iter().map(|disk| disk.2).sum::<u64>());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_disk_has_its_own_bound_port_from_the_range() {
    let rig = Rig::faulty(waiting()).await;
    let started = rig.start().await;
    let ports: BTreeSet<u16> = ports_of(&started).into_iter().collect();
    assert_eq!(ports.len(), 3, "{started:#}");
    // The lowest free ones, and bound: nobody else can have them.
    let lowest: BTreeSet<u16> = rig.ports.clone().take(3).collect();
    assert_eq!(ports, lowest);
    for port in ports {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        assert_eq!(taken.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    }
    let listed = rig.service.get("/api/v1/ports").await.expect_status(200).json();
    assert_eq!((&listed["total"], &listed["leased"], &listed["available"]), (&json!(116), &json!(3), &json!(113)));
    assert_eq!(listed["leases"][0]["job_id"], started["backup_id"]);
    assert_eq!(listed["leases"][0]["export_name"], "db-server-disk0");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_export_answers_go_before_the_start_request_is_answered() {
    // The node never answers, so neither is the caller answered; the exports must be there all the same.
    let start = StartFault::Hang { launch: false };
    let rig = Rig::faulty(Faults { start, ..Faults::default() }).await;
    let starting = tokio::spawn({
        let (request, body) = (rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm"), rig.start_body());
        async move { request.json(&body).send().await }
    });
    let call = rig
        .seen(|event| match event {
            Event::Called(call) => Some(call.clone()),
            _ => None,
        })
        .await;
    for (target, (_, size)) in call.nbd_targets.split(',').zip(sizes(&rig.disks)) {
        let (_, uri) = target.split_once(':').unwrap();
        assert_eq!(expect_go(uri), size, "{uri}");
    }
    assert!(!starting.is_finished());
    starting.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_string_names_every_disk_by_its_device_key() {
    let rig = Rig::faulty(waiting()).await;
    let started = rig.start().await;
    let ports = ports_of(&started);
    let expected: Vec<String> = [2000, 2016, 16_000]
        .iter()
        .zip(&ports)
        .enumerate()
        .map(|(disk_id, (key, port))| format!("{key}:nbd://127.0.0.1:{port}/db-server-disk{disk_id}"))
        .collect();
    assert_eq!(started["nbd_targets_string"], expected.join(","));
    assert_eq!(rig.backup(id_of(&started)).await["nbd_targets_string"], expected.join(","));
}

#[tokio::test(flavor = "multi_thread")]
async fn node_is_called_exactly_once_with_all_disks() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let calls = rig.node.log().calls();
    assert_eq!(calls.len(), 1);
    let call = &calls[0];
    assert_eq!(call.job_id, id_of(&started));
    assert_eq!(call.nbd_targets, started["nbd_targets_string"].as_str().unwrap());
    assert_eq!((call.vm_name.as_str(), call.vm_path.as_str()), ("db-server", "/DC1/vm/db-server"));
    assert_eq!((call.vcenter_host.as_str(), call.vcenter_user.as_str()), ("vc.example", "backup"));
    assert_eq!(call.vcenter_password, "secret-of-the-vcenter");
    assert_eq!((call.nbd_host.as_str(), call.backup_type.as_str()), ("127.0.0.1", "full"));
    assert_eq!(call.previous_change_id, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn start_answer_has_exactly_the_contract_fields_for_all_disks() {
    let rig = Rig::faulty(waiting()).await;
    let mut body = rig.start_body();
    body["tags"] = json!({"reason": "nightly"});
    let answer = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200);
    let started = answer.json();
    let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<String>>();
    let of = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<String>>();
    assert_eq!(
        fields(&started),
        of(&[
            "backup_id",
            "backup_job_id",
            "vm_context_id",
            "vm_name",
            "repository_id",
            "backup_type",
            "type",
            "requested_type",
            "status",
            "disk_results",
            "nbd_targets_string",
            "disks_count",
            "total_bytes",
            "created_at",
            "tags",
            "warnings",
        ])
    );
    for disk in started["disk_results"].as_array().unwrap() {
        assert_eq!(
            fields(disk),
            of(&[
                "disk_id",
                "device_key",
                "nbd_port",
                "nbd_export_name",
                "status",
                "backup_type",
                "reason",
                "size_bytes",
                "qcow2_path",
            ])
        );
        assert_eq!(
            (&disk["status"], &disk["backup_type"], &disk["reason"]),
            (&json!("started"), &json!("full"), &json!("first_backup"))
        );
        let path = disk["qcow2_path"].as_str().unwrap();
        let id = id_of(&started);
        let vm_directory = format!("db-server-{}", &rig.vm[rig.vm.len() - 4..]);
        let expected = rig.repository.join(vm_directory).join(id).join(format!("disk-{}.qcow2", disk["disk_id"]));
        assert_eq!(path, expected.to_str().unwrap());
    }
    assert_eq!((&started["status"], &started["tags"]), (&json!("started"), &json!({"reason": "nightly"})));
    assert_eq!((&started["requested_type"], &started["type"]), (&json!("auto"), &json!("full")));
    assert_eq!(started["warnings"], json!([]));
    assert_eq!(started["backup_id"], started["backup_job_id"]);
    assert!(started["created_at"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test(flavor = "multi_thread")]
async fn start_answer_never_says_success() {
    let rig = Rig::faulty(waiting()).await;
    let started = rig.start().await;
    assert_eq!(started["status"], "started");
    let backup = rig.backup(id_of(&started)).await;
    assert_eq!((&backup["result"], &backup["status"]), (&json!("none"), &json!("running")));
    assert!(rig.points().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn alias_route_answers_200_with_both_ids_and_location() {
    let rig = Rig::faulty(waiting()).await;
    let answer = rig.service.post("/api/v1/backups", &rig.start_body()).await.expect_status(200);
    let started = answer.json();
    assert_eq!(started["backup_id"], started["backup_job_id"]);
    assert_eq!(answer.header("location"), format!("/api/v1/backups/{}", id_of(&started)));
    rig.service.get(answer.header("location")).await.expect_status(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_found_by_vm_id_even_when_two_vms_share_a_name() {
    let rig = Rig::faulty(waiting()).await;
    let mut other = crate::support::vm_body("db-server");
    other["path"] = "/DC2/vm/db-server-copy".into();
    other["credential"] = "main".into();
    other["disks"] = json!([{"device_key": 2000, "size_bytes": 1_048_576}]);
    let other = rig.service.post("/api/v1/vms", &other).await.expect_status(201).json();
    let by_name = json!({"vm_name": "db-server", "repository_id": "main", "backup_type": "auto"});
    let problem = rig.service.post("/api/v1/backups/vm", &by_name).await.expect_problem(409, "vm_ambiguous");
    assert_eq!(problem["candidates"].as_array().unwrap().len(), 2);
    // The id wins over the name.
    let body =
        json!({"vm_context_id": other["id"], "vm_name": "nobody", "repository_id": "main", "backup_type": "auto"});
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    assert_eq!((&started["disks_count"], &started["total_bytes"]), (&json!(1), &json!(1_048_576)));
    let started = rig.start().await;
    assert_eq!(started["disks_count"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_are_accepted_and_named_in_warnings() {
    let rig = Rig::faulty(waiting()).await;
    let mut body = rig.start_body();
    body["total_bytes"] = 1.into();
    body["Tags"] = json!({});
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let warnings: Vec<&str> =
        started["warnings"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings.iter().any(|text| text.contains("total_bytes")), "{warnings:?}");
    assert_eq!(rig.backup(id_of(&started)).await["warnings"], started["warnings"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_policy_and_parent_are_stored_as_null() {
    let rig = Rig::faulty(waiting()).await;
    let mut body = rig.start_body();
    body["policy_id"] = "".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    assert!(started.get("policy_id").is_none());
    let store = &rig.service.service.app().store;
    let id = id_of(&started).parse().unwrap();
    let mut connection = store.read().await.unwrap();
    let row = blockyard::store::backups::load(&mut connection, &id).await.unwrap();
    assert_eq!(row.policy_id, None);
    let disks = blockyard::store::backups::disks(&mut connection, &id).await.unwrap();
    assert!(
        disks.iter().all(|disk| disk.parent_id.is_none() && disk.from_change_id.is_none() && disk.change_id.is_none())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_and_tags_are_stored_and_echoed() {
    let rig = Rig::new().await;
    let mut body = rig.start_body();
    body["policy_id"] = "gold".into();
    body["tags"] = json!({"reason": "nightly"});
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["policy_id"], &backup["tags"]), (&json!("gold"), &json!({"reason": "nightly"})));
    let manifest = rig::manifest(&rig, id_of(&started)).await;
    assert_eq!(manifest["tags"], json!({"reason": "nightly"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_starts_in_one_second_never_share_an_id_or_a_path() {
    // Nobody reads the disks: the starts alone must not meet.
    let faults = Faults { never_connect: true, complete: CompleteFault::Never, ..Faults::default() };
    let rig = Rig::with(rig::Plan {
        disks: vec![(2000, content(1, 512))],
        faults,
        toml: "[jobs]\nmax_running = 200\n".to_owned(),
        ports: rig::many_free_ports(100),
        ..rig::Plan::default()
    })
    .await;
    let mut vms = Vec::new();
    for index in 0..100 {
        vms.push(rig::add_vm(&rig.service, &format!("vm-{index}"), &[(2000, 512)]).await);
    }
    let starts = vms.iter().map(|vm| {
        let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "full"});
        let request = rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm").json(&body);
        tokio::spawn(crate::support::send(request))
    });
    let starts: Vec<_> = starts.collect();
    let (mut ids, mut paths, mut ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for start in starts {
        let started = start.await.unwrap().expect_status(200).json();
        ids.insert(id_of(&started).to_owned());
        paths.insert(started["disk_results"][0]["qcow2_path"].as_str().unwrap().to_owned());
        ports.insert(ports_of(&started)[0]);
    }
    assert_eq!((ids.len(), paths.len(), ports.len()), (100, 100, 100));
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_disks_are_served_by_one_start() {
    let disks: Vec<(u32, Vec<u8>)> = (0..64).map(|index| (2000 + index, content(index as u8, 4096))).collect();
    let rig = Rig::with(rig::Plan { disks, ports: rig::many_free_ports(64), ..rig::Plan::default() }).await;
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(backup["disks"].as_array().unwrap().len(), 64);
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unguessable_export_names_still_end_in_the_disk_number() {
    let rig =
        Rig::with(rig::Plan { toml: "[nbd]\nexport_names = \"unguessable\"\n".to_owned(), ..rig::Plan::default() })
            .await;
    let started = rig.start().await;
    let names: BTreeSet<&str> = started["disk_results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| disk["nbd_export_name"].as_str().unwrap())
        .collect();
    for (index, name) in names.iter().enumerate() {
        let middle = name.strip_prefix("db-server-").unwrap().strip_suffix(&format!("-disk{index}")).unwrap();
        assert_eq!(middle.len(), 26, "{name}");
    }
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_advertised_address_may_differ_from_the_bound_one() {
    let rig = Rig::with(rig::Plan {
        toml: "[nbd]\nadvertise_host = \"localhost\"\nadvertise_port_offset = 1000\n".to_owned(),
        faults: waiting(),
        ..rig::Plan::default()
    })
    .await;
    let started = rig.start().await;
    let first = *rig.ports.start();
    assert_eq!(started["disk_results"][0]["nbd_port"], first + 1000);
    let call = rig.node.log().calls().remove(0);
    assert!(call.nbd_targets.starts_with(&format!("2000:nbd://localhost:{}/", first + 1000)), "{}", call.nbd_targets);
    assert_eq!(expect_go(&format!("nbd://127.0.0.1:{first}/db-server-disk0")), rig.disks[0].1.len() as u64);
}

pub fn ports_of(started: &Value) -> Vec<u16> {
    let disks = started["disk_results"].as_array().unwrap();
    disks.iter().map(|disk| u16::try_from(disk["nbd_port"].as_u64().unwrap()).unwrap()).collect()
}
