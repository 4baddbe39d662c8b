//! `/complete`: what seals a disk, what commits a VM, and everything that must not.

use std::os::unix::fs::PermissionsExt;

use blockyard::node::fake::{CompleteFault, Event, Faults, PausePoint};
use serde_json::json;

use crate::rig::{self, Plan, Rig, change_id, content, id_of};

#[tokio::test(flavor = "multi_thread")]
async fn restore_point_holds_all_disks_of_one_snapshot_or_does_not_exist() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(2)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    // Two of three disks are sealed, the third is copied: there is nothing yet.
    let backup = rig.backup(id_of(&started)).await;
    let states: Vec<&str> =
        backup["disks"].as_array().unwrap().iter().map(|disk| disk["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["sealed", "sealed", "writing"], "{backup:#}");
    assert!(rig.points().await.is_empty());
    rig.service.get(&format!("/api/v1/points/{}", id_of(&started))).await.expect_problem(404, "point_not_found");
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
    assert_eq!((&backup["status"], &backup["progress_percent"]), (&json!("completed"), &json!(100.0)));
    let points = rig.points().await;
    assert_eq!(points.len(), 1);
    assert_eq!((&points[0]["id"], &points[0]["state"]), (&started["backup_id"], &json!("committed")));
    assert_eq!(points[0]["disks"].as_array().unwrap().len(), 3);
    rig.expect_restorable(id_of(&started)).await;
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_with_one_unsealed_disk_has_no_new_point_and_no_new_change_id() {
    // The client dies when two disks are sealed and the third is half there.
    let first_two = content(1, 5 << 20).len() as u64 + (3 << 20) + 512;
    let disks = vec![(2000, content(1, 5 << 20)), (2016, content(2, (3 << 20) + 512)), (16_000, content(3, 4 << 20))];
    let faults = Faults { die_after_bytes: Some(first_two + (1 << 20)), ..Faults::default() };
    let toml = "[jobs]\nreconnect_s = 1\n".to_owned();
    let rig = Rig::with(Plan { disks, faults, toml, ..Plan::default() }).await;
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("client_disconnected")), "{backup:#}");
    let sealed = rig.node.log().events();
    let sealed = sealed.iter().filter(|event| matches!(event, Event::Completed { status: 200, .. })).count();
    assert_eq!(sealed, 2);
    assert!(rig.points().await.is_empty());
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_disk_in_the_inventory_answer_fails_the_job() {
    // The snapshot has a disk that nobody told the hub of, or lacks one: whatever was copied of the others is no backup of
    // the VM, be the inventory an operator's or the node's own answer just before. (Where the unknown disk comes last, the
    // others are complete when the client finds it: the inventory is all that the hub has to tell by, and what it did copy is
    // true.)
    for refresh in [false, true] {
        for (unknown, code) in [(Some(100), "no_client"), (Some(2001), "stalled"), (None, "stalled")] {
            let toml = format!(
                "[nodes.default]\nrefresh_before_start = {refresh}\n\
                 [jobs]\nfirst_contact_s = 1\nidle_s = 1\nstalled_s = 1\n"
            );
            let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
            let disks: Vec<_> = rig::sizes(&rig.disks)
                .iter()
                .map(|(key, size)| json!({"id": format!("disk-{key}"), "capacity_bytes": size}))
                .collect();
            rig.node.reconfigure(|config| {
                config.inventory = vec![json!({"name": "db-server", "path": "/DC1/vm/db-server", "disks": disks})];
                match unknown {
                    Some(key) => config.disks.insert(key, config.disks[&2016].clone()),
                    None => config.disks.remove(&2016),
                };
            });
            let backup = rig.back_up().await;
            let what = format!("{refresh} {unknown:?}: {backup:#}");
            assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!(code)), "{what}");
            assert_eq!(backup["facets"]["snapshot_cleanup"], "alert");
            assert_eq!(rig.client_ended().await.is_some(), unknown.is_some());
            let asked = rig.node.log().events().iter().any(|event| matches!(event, Event::Discovered(_)));
            assert_eq!(asked, refresh);
            assert!(rig.points().await.is_empty());
            rig.expect_nothing_left(0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn telemetry_completed_changes_nothing_but_the_hint() {
    let faults = Faults { lie_in_telemetry: true, pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let rig = Rig::faulty(faults).await;
    let started = rig.start().await;
    rig.paused().await;
    let told = rig
        .seen(|event| match event {
            Event::Telemetry { sent, status } => Some((sent.clone(), *status)),
            _ => None,
        })
        .await;
    assert_eq!(told, ("completed".to_owned(), 200));
    let backup = rig.backup(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("starting"), &json!("none")));
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn telemetry_is_noted_ignored_or_unknown() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let post = async |job_type: &str, id: &str| {
        let request = rig
            .service
            .request_without_token(reqwest::Method::POST, &format!("/api/v1/telemetry/{job_type}/{id}"))
            .json(&json!({"job_id": id, "job_type": "backup", "status": "running", "disks": []}));
        crate::support::send(request).await
    };
    let ended = post("backup", id_of(&started)).await.expect_status(200).json();
    assert_eq!(ended["status"], "ignored");
    post("backup", "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB").await.expect_problem(404, "backup_not_found");
    post("backup", "nonsense").await.expect_problem(404, "backup_not_found");
    post("replication", id_of(&started)).await.expect_problem(404, "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn full_after_an_older_backup_is_told_no_change_id_and_must_cover_every_byte() {
    let rig = Rig::new().await;
    rig.back_up().await;
    rig.node.reconfigure(|config| config.faults.delta_instead_of_full = true);
    let mut body = rig.start_body();
    body["backup_type"] = "full".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("coverage_incomplete")), "{backup:#}");
    let events = rig.node.log().events();
    let told: Vec<&String> = events
        .iter()
        .filter_map(|event| match event {
            Event::ChangeId { change_id, .. } => Some(change_id),
            _ => None,
        })
        .collect();
    assert!(told.len() >= 4 && told.iter().all(|change_id| change_id.is_empty()), "{told:?}");
    let refused = rig
        .seen(|event| match event {
            Event::Completed { status: 409, body, .. } => Some(body.clone()),
            _ => None,
        })
        .await;
    let refused: serde_json::Value = serde_json::from_str(&refused).unwrap();
    assert_eq!(refused["code"], "coverage_incomplete");
    // The disk that failed says so, and it alone.
    let failed: Vec<&serde_json::Value> =
        backup["disks"].as_array().unwrap().iter().filter(|disk| !disk["error_message"].is_null()).collect();
    assert_eq!(failed.len(), 1, "{backup:#}");
    assert_eq!(failed[0]["error_message"], backup["error_message"]);
    assert!(backup["error_message"].as_str().unwrap().starts_with(&format!("disk {}", failed[0]["disk_id"])));
    assert_eq!(rig.points().await.len(), 1, "the older point stays");
    rig.expect_nothing_left_and_a_backup_works(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_coverage_may_be_allowed_and_is_then_a_warning() {
    let toml = "[storage]\ncoverage_full = \"warn\"\n".to_owned();
    let faults = Faults { delta_instead_of_full: true, ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("warning")), "{backup:#}");
    assert!(backup["warnings"][0].as_str().unwrap().starts_with("coverage_incomplete"), "{backup:#}");
    assert_eq!(backup["facets"]["coverage"], "partial");
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_for_a_disk_that_never_connected_is_refused() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(1)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let refused = rig.complete(id_of(&started), 2, &change_id(16_000)).await.expect_problem(409, "disk_not_connected");
    assert_eq!(refused["backup_id"], started["backup_id"]);
    rig.complete(id_of(&started), 7, &change_id(2000)).await.expect_problem(404, "disk_not_in_backup");
    let unknown = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB";
    rig.complete(unknown, 0, &change_id(2000)).await.expect_problem(404, "backup_not_found");
    // The job does not suffer from any of it.
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_restorable(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_complete_from_a_foreign_peer_or_for_an_idle_disk_is_refused() {
    let toml = "[auth]\ncallback_peers = [\"192.0.2.0/24\"]\n".to_owned();
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.complete(id_of(&started), 0, "forged/1").await.expect_problem(403, "callback_peer_refused");
    let question =
        rig.service.request_without_token(reqwest::Method::GET, "/api/v1/backups/changeid?vm_name=db-server");
    crate::support::send(question).await.expect_problem(403, "callback_peer_refused");
    assert_eq!(rig.backup(id_of(&started)).await["state"], "starting");
    assert!(rig.points().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn early_complete_fails_the_job_instead_of_sealing_a_disk_with_holes() {
    let rig = Rig::faulty(Faults { complete: CompleteFault::Early, ..Faults::default() }).await;
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("coverage_incomplete")), "{backup:#}");
    let early = rig
        .seen(|event| match event {
            Event::Completed { status, body, .. } => Some((*status, body.clone())),
            _ => None,
        })
        .await;
    assert_eq!(early.0, 409, "{}", early.1);
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_before_any_connection_is_refused_and_ends_the_client() {
    let toml = "[jobs]\nidle_s = 1\nstalled_s = 1\n".to_owned();
    let faults = Faults { complete: CompleteFault::BeforeConnect, ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("stalled")), "{backup:#}");
    assert!(rig.client_ended().await.unwrap().contains("409"));
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_twice_is_200_with_the_same_change_id_and_409_with_another() {
    let rig = Rig::faulty(Faults { complete: CompleteFault::Twice, ..Faults::default() }).await;
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(rig.client_ended().await, None);
    // Long after the end still.
    let again = rig.complete(id_of(&started), 1, &change_id(2016)).await.expect_status(200).json();
    assert_eq!((&again["status"], &again["change_id"]), (&json!("completed"), &json!(change_id(2016))));
    rig.complete(id_of(&started), 1, "00/1").await.expect_problem(409, "change_id_conflict");
    rig.complete(id_of(&started), 9, "00/1").await.expect_problem(404, "disk_not_in_backup");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_change_id_for_a_sealed_disk_is_refused_while_the_job_runs() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(1)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    rig.complete(id_of(&started), 0, "00/1").await.expect_problem(409, "change_id_conflict");
    let same = rig.complete(id_of(&started), 0, &change_id(2000)).await.expect_status(200).json();
    assert_eq!(same["message"], "disk 0 sealed, 1 of 3");
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn complete_with_the_number_of_another_disk_never_seals_the_wrong_one() {
    // Disk 0 is copied and disk 1 declared complete: nobody connected to it.
    let toml = "[jobs]\nreconnect_s = 1\n".to_owned();
    let faults = Faults { complete: CompleteFault::Disk(1), ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("client_disconnected")), "{backup:#}");
    assert!(rig.client_ended().await.unwrap().contains("409"));
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_complete_after_failure_is_409_and_changes_nothing() {
    let faults = Faults { pause: Some(PausePoint::AfterBytes(1 << 20)), ..Faults::default() };
    let rig = Rig::faulty(faults).await;
    let started = rig.start().await;
    rig.paused().await;
    rig.cancel(id_of(&started)).await.expect_status(202);
    let cancelled = rig.end_of(id_of(&started)).await;
    rig.node.resume();
    // The data path is closed, and the client cannot talk the job back to life.
    assert!(rig.client_ended().await.is_some());
    let refused = rig.complete(id_of(&started), 0, &change_id(2000)).await.expect_problem(409, "backup_ended");
    assert_eq!(refused["backup_id"], started["backup_id"]);
    assert_eq!(rig.backup(id_of(&started)).await, cancelled);
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_change_id_is_the_one_sent_with_complete_of_that_disk() {
    let rig = Rig::new().await;
    rig.node.reconfigure(|config| config.disks.get_mut(&2016).unwrap().change_id = String::new());
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    let point = rig.points().await.remove(0);
    for document in [&backup, &point, &rig::manifest(&rig, id_of(&started)).await] {
        assert_eq!(document["disks"][0]["change_id"], change_id(2000));
        assert_eq!(document["disks"][1]["change_id"], json!(null), "an empty one is none");
        assert_eq!(document["disks"][2]["change_id"], change_id(16_000));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifest_says_everything_about_the_point() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    let manifest = rig::manifest(&rig, id_of(&started)).await;
    assert_eq!(manifest["backup_id"], started["backup_id"]);
    assert_eq!(manifest["repository_id"], "main");
    assert_eq!(manifest["vm"]["id"], rig.vm);
    assert_eq!(manifest["vm"]["path"], "/DC1/vm/db-server");
    assert_eq!((&manifest["requested_type"], &manifest["backup_type"]), (&json!("auto"), &json!("full")));
    assert!(manifest["readme"].as_str().unwrap().contains("qemu-img convert"));
    assert_eq!(manifest["service_version"], env!("CARGO_PKG_VERSION"));
    for (index, (key, bytes)) in rig.disks.iter().enumerate() {
        let disk = &manifest["disks"][index];
        assert_eq!((&disk["disk_id"], &disk["device_key"]), (&json!(index), &json!(key)));
        assert_eq!((&disk["size_bytes"], &disk["coverage"]), (&json!(bytes.len()), &json!([[0, bytes.len()]])));
        assert_eq!(disk["written_bytes"], backup["disks"][index]["written_bytes"]);
        let image = rig::published(&rig, id_of(&started)).await.join(disk["file"].as_str().unwrap());
        assert_eq!(disk["file_bytes"], std::fs::metadata(image).unwrap().len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quiesce_is_left_on_and_its_level_is_recorded_on_the_point() {
    let rig = Rig::new().await;
    let backup = rig.back_up().await;
    // Nothing that the node is told turns it off: the call has the fields of its contract and no other, which the fake
    // refuses; and nobody claims more than is known.
    assert_eq!(rig.node.log().calls().len(), 1);
    assert_eq!(backup["facets"]["quiesce"], "client_default");
    assert_eq!(rig.points().await[0]["quiesce"], "client_default");
}

#[tokio::test(flavor = "multi_thread")]
async fn published_files_are_not_readable_by_others() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let folder = rig::published(&rig, id_of(&started)).await;
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&folder), 0o750);
    assert_eq!(mode(folder.parent().unwrap()), 0o750);
    for entry in std::fs::read_dir(&folder).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o440);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_of_odd_size_gets_an_image_of_exactly_that_size() {
    let disks = [512, 65_024, 65_536 + 512, (1 << 20) - 512, (2 << 20) + 1536]
        .into_iter()
        .enumerate()
        .map(|(index, size)| (2000 + index as u32, content(index as u8 + 1, size)))
        .collect();
    let rig = Rig::with(Plan { disks, request_bytes: 96 * 1024 + 512, ..Plan::default() }).await;
    let started = rig.start().await;
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
    rig.expect_restorable(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn image_can_be_opened_for_writing_by_others_the_moment_the_job_ends() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let image = rig::published(&rig, id_of(&started)).await.join("disk-0.qcow2");
    // Reading proves nothing about locks; writing needs them all. A failing one would exit 1.
    rig::tool("qemu-utils", "qemu-io", &["-f", "qcow2", "-c", "read 0 512", image.to_str().unwrap()]);
    let copy = rig.service.folder.path().join("copy.qcow2");
    std::fs::hard_link(&image, &copy).unwrap();
    rig::tool("qemu-utils", "qemu-img", &["resize", "-f", "qcow2", copy.to_str().unwrap(), "+1M"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_with_the_same_first_mib_raise_a_warning() {
    let mut second = content(1, 3 << 20);
    second[2 << 20] ^= 1;
    let disks = vec![(2000, content(1, 3 << 20)), (2016, second), (2032, vec![0; 2 << 20]), (2048, vec![0; 1 << 20])];
    let rig = Rig::with(Plan { disks, ..Plan::default() }).await;
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("warning")), "{backup:#}");
    let warnings = backup["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "empty disks are alike and no reason to worry: {warnings:?}");
    assert!(warnings[0].as_str().unwrap().contains("disks 0 and 1"), "{warnings:?}");
    rig.expect_restorable(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_vms_completing_in_the_same_second_never_touch_each_other() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(2)), ..Faults::default() }).await;
    let other = rig::add_vm(&rig.service, "other", &rig::sizes(&rig.disks)).await;
    let first = rig.start().await;
    rig.paused().await;
    let body = json!({"vm_context_id": other, "repository_id": "main", "backup_type": "auto"});
    let second = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let both_paused = |event: &Event| matches!(event, Event::Paused);
    let log = rig.node.log();
    let wait = async {
        loop {
            if log.events().iter().filter(|event| both_paused(event)).count() == 2 {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, wait).await.unwrap();
    rig.node.resume();
    rig.node.resume();
    // One permit is kept at most, so the second one is given until both are through.
    for id in [id_of(&first), id_of(&second)] {
        let ended = async {
            loop {
                rig.node.resume();
                let backup = rig.backup(id).await;
                if backup["state"] == "committed" {
                    return backup;
                }
                assert_ne!(backup["state"], "failed", "{backup:#}");
            }
        };
        let backup = tokio::time::timeout(rig::DEADLINE, ended).await.unwrap();
        assert_eq!(backup["result"], "success");
        rig.expect_restorable(id).await;
    }
    assert_eq!(rig.points().await.len(), 2);
    rig.expect_nothing_left(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_complete_that_hangs_up_does_not_stop_the_seal() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(2)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let path = format!("/api/v1/backups/{}/complete", id_of(&started));
    let body = json!({"change_id": change_id(16_000), "disk_id": 2});
    let request = rig.service.request_without_token(reqwest::Method::POST, &path).json(&body);
    let caller = tokio::spawn(request.send());
    rig.when(id_of(&started), |backup| backup["disks"][2]["state"] != "writing").await;
    caller.abort();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changeid_is_always_200_and_flat_strings() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let ask = async |query: &str| {
        let path = format!("/api/v1/backups/changeid?{query}");
        crate::support::send(rig.service.request_without_token(reqwest::Method::GET, &path)).await
    };
    for query in [
        "vm_name=nobody&disk_id=0",
        "vm_name=db-server&disk_id=0",
        "vm_name=db-server&disk_id=999",
        "vm_name=x",
        "vm_name=",
    ] {
        let answer = ask(query).await.expect_status(200).json();
        let object = answer.as_object().unwrap();
        assert!(object.values().all(serde_json::Value::is_string), "{answer}");
        assert_eq!(answer["change_id"], "", "{query}");
    }
    let started = rig.start().await;
    let answer = ask("vm_name=db-server&disk_id=1").await.expect_status(200).json();
    let expected = json!({
        "vm_name": "db-server", "disk_id": "1", "change_id": "", "message": "No previous backup found",
        "backup_job_id": started["backup_id"],
    });
    assert_eq!(answer, expected);
    ask("disk_id=0").await.expect_problem(400, "invalid_field");
}
