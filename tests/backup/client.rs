//! The backup client: slow, dead, greedy, lying, or simply gone.

use std::time::Duration;

use blockyard::node::fake::{Event, Faults, PausePoint};
use blockyard::store::events;
use serde_json::{Value, json};

use crate::privileged::Mounted;
use crate::rig::{self, Plan, Rig, content, expect_go, id_of};

#[tokio::test(flavor = "multi_thread")]
async fn client_that_dies_or_never_comes_ends_as_failed_with_its_code() {
    let cases = [
        (Faults { never_connect: true, ..Faults::default() }, "first_contact_s = 1", "no_client"),
        (Faults { die_after_bytes: Some(1 << 20), ..Faults::default() }, "reconnect_s = 1", "client_disconnected"),
        (Faults { pause: Some(PausePoint::Connected(0)), ..Faults::default() }, "idle_s = 1\nstalled_s = 1", "stalled"),
        (
            Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() },
            "idle_s = 1\nstalled_s = 1",
            "stalled",
        ),
    ];
    for (faults, limits, code) in cases {
        let rig = Rig::with(Plan { toml: format!("[jobs]\n{limits}\n"), faults, ..Plan::default() }).await;
        let backup = rig.back_up().await;
        assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!(code)), "{backup:#}");
        assert!(!backup["error_message"].as_str().unwrap().is_empty());
        assert_eq!(backup["facets"]["snapshot_cleanup"], "alert", "{code}");
        rig.expect_nothing_left(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_job_raises_an_alert_that_a_snapshot_may_be_left() {
    let faults = Faults { die_after_bytes: Some(1 << 20), ..Faults::default() };
    let rig = Rig::with(Plan { toml: "[jobs]\nreconnect_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let alerts = alerts(&rig, id_of(&started)).await;
    assert_eq!(alerts.len(), 1, "{alerts:?}");
    assert_eq!(alerts[0]["alert"], "snapshot_may_be_left");
    assert_eq!((&alerts[0]["job_id"], &alerts[0]["vm_name"]), (&started["backup_id"], &json!("db-server")));
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_show_itself_raises_an_alert_long_before_the_job_fails() {
    let faults = Faults { never_connect: true, ..Faults::default() };
    let rig =
        Rig::with(Plan { toml: "[jobs]\nfirst_contact_warn_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    let warned = async {
        loop {
            if let Some(alert) = alerts(&rig, id_of(&started)).await.pop() {
                return alert;
            }
        }
    };
    let alert = tokio::time::timeout(rig::DEADLINE, warned).await.expect("no alert");
    assert_eq!((&alert["alert"], &alert["job_id"]), (&json!("no_client"), &started["backup_id"]));
    assert_eq!(rig.backup(id_of(&started)).await["state"], "starting");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_committed_job_raises_no_alert_and_tells_every_state_once() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    assert!(alerts(&rig, id_of(&started)).await.is_empty());
    let store = &rig.service.service.app().store;
    let told = events::about(&mut store.read().await.unwrap(), id_of(&started)).await.unwrap();
    let states: Vec<&str> =
        told.iter().filter(|(kind, _)| kind == "job.state").map(|(_, data)| data["state"].as_str().unwrap()).collect();
    let expected = ["accepted", "preparing", "starting", "transferring", "sealing", "committing", "committed"];
    assert_eq!(states, expected);
    assert!(told.iter().any(|(kind, data)| kind == "point.committed" && data["sequence"] == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_job_goes_on_when_its_client_does() {
    let faults = Faults { pause: Some(PausePoint::AfterBytes(2 << 20)), ..Faults::default() };
    let rig =
        Rig::with(Plan { toml: "[jobs]\nidle_s = 1\nstalled_s = 600\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    let stalled = rig.when_in(id_of(&started), "stalled").await;
    assert_eq!((&stalled["status"], &stalled["disks"][0]["state"]), (&json!("running"), &json!("writing")));
    // The listeners stay open, with both connections.
    assert_eq!(stalled["disks"][0]["connections"], 2);
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_restorable(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_sign_of_life_keeps_a_job_from_stalling() {
    let faults = Faults { pause: Some(PausePoint::Connected(0)), ..Faults::default() };
    let rig =
        Rig::with(Plan { toml: "[jobs]\nidle_s = 2\nstalled_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    // For longer than both limits together the only signs are callbacks, one kind at a time.
    let id = id_of(&started);
    for round in 0..12 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let request = if round % 2 == 0 {
            let path = format!("/api/v1/telemetry/backup/{id}");
            rig.service.request_without_token(reqwest::Method::POST, &path).json(&json!({"status": "running"}))
        } else {
            rig.service
                .request_without_token(reqwest::Method::GET, "/api/v1/backups/changeid?vm_name=db-server&disk_id=0")
        };
        crate::support::send(request).await.expect_status(200);
    }
    assert_eq!(rig.backup(id).await["state"], "transferring");
    rig.node.resume();
    assert_eq!(rig.end_of(id).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_right_with_a_client_that_sends_no_numbers() {
    let disks = vec![(2000, content(1, 6 << 20)), (2016, vec![0; 4 << 20])];
    let faults = Faults { pause: Some(PausePoint::BeforeComplete(0)), ..Faults::default() };
    let rig = Rig::with(Plan { disks, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let backup = rig.when(id_of(&started), |backup| backup["started_at"].is_string()).await;
    let disk = &backup["disks"][0];
    assert_eq!((&disk["covered_bytes"], &disk["state"]), (&json!(6 << 20), &json!("writing")), "{backup:#}");
    let sum = disk["written_bytes"].as_u64().unwrap() + disk["zeroed_bytes"].as_u64().unwrap();
    assert_eq!(sum, 6 << 20);
    assert!(disk["zeroed_bytes"].as_u64().unwrap() > 0);
    assert_eq!((&disk["identical_bytes"], &disk["connections"]), (&json!(0), &json!(2)));
    assert_eq!((&backup["progress_percent"], &backup["total_bytes"]), (&json!(60.0), &json!(10 << 20)));
    assert_eq!(backup["bytes_transferred"], disk["written_bytes"]);
    assert_eq!(backup["disks"][1]["state"], "listening");
    assert_eq!((&disk["percent"], &disk["eta_s"]), (&json!(100.0), &json!(0)));
    let waiting = &backup["disks"][1];
    assert_eq!(
        (&waiting["percent"], &waiting["eta_s"], &waiting["bottleneck"]),
        (&json!(0.0), &json!(null), &json!(null))
    );
    // The client sends nothing more: after a second of that the source is what is waited for.
    rig.when(id_of(&started), |backup| backup["disks"][0]["bottleneck"] == "source").await;
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(
        (&backup["disks"][1]["zeroed_bytes"], &backup["disks"][1]["written_bytes"]),
        (&json!(4 << 20), &json!(0))
    );
    assert_eq!(
        (&backup["disks"][1]["state"], &backup["disks"][1]["effective_type"]),
        (&json!("sealed"), &json!("full"))
    );
    assert_eq!((&backup["disks"][0]["connections"], &backup["transfer_speed_bps"]), (&json!(0), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_two_mib_requests_with_512_byte_tails_are_accepted() {
    let disks = vec![(2000, content(7, (100 << 20) + 512))];
    let rig = Rig::with(Plan { disks, request_bytes: 32 << 20, ..Plan::default() }).await;
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_restorable(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_after_the_disk_was_completed_fails_the_job() {
    // Disk 0 is sealed and the client, still connected, writes to it again.
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let started = rig.start().await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk2", started["disk_results"][2]["nbd_port"]);
    let mut link = rig::Nbd::connect(&uri);
    link.write(0, &content(3, 512)).unwrap();
    rig.complete(id_of(&started), 2, "1/1").await.expect_status(200);
    assert_eq!(link.write(0, &[1; 512]).unwrap_err().raw_os_error(), Some(108), "ESHUTDOWN");
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("write_after_complete")), "{backup:#}");
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_disk_takes_no_new_connections_and_its_leaked_ones_harm_nobody() {
    let faults = Faults { leak_connection: true, pause: Some(PausePoint::BeforeConnect(1)), ..Faults::default() };
    let rig = Rig::faulty(faults).await;
    let started = rig.start().await;
    rig.paused().await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk0", started["disk_results"][0]["nbd_port"]);
    assert!(rig::Nbd::try_connect(&uri).is_err(), "a sealed disk is closed to newcomers");
    assert_eq!(rig.backup(id_of(&started)).await["disks"][0]["connections"], 1);
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_comes_back_is_served() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let started = rig.start().await;
    let bytes = rig.disks[2].1.clone();
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk2", started["disk_results"][2]["nbd_port"]);
    let mut link = rig::Nbd::connect(&uri);
    link.write(0, &bytes).unwrap();
    drop(link);
    let disk = |backup: &Value| backup["disks"][2]["state"].as_str().unwrap().to_owned();
    rig.when(id_of(&started), |backup| disk(backup) == "disconnected").await;
    let _again = rig::Nbd::connect(&uri);
    rig.when(id_of(&started), |backup| disk(backup) == "writing").await;
    rig.complete(id_of(&started), 2, "1/1").await.expect_status(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_over_the_limit_gets_an_error_and_never_silence() {
    let toml = "[nbd]\nmax_connections_per_export = 2\n".to_owned();
    let faults = Faults { pause: Some(PausePoint::Connected(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk0", started["disk_results"][0]["nbd_port"]);
    assert!(rig::Nbd::try_connect(&uri).is_err());
    let ports = rig.service.get("/api/v1/ports").await.expect_status(200).json();
    assert_eq!((&ports["leases"][0]["connections"], &ports["leases"][0]["refused"]), (&json!(2), &json!(1)), "{ports}");
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_export_names_are_refused_and_names_are_not_listed() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let started = rig.start().await;
    let port = &started["disk_results"][0]["nbd_port"];
    for name in ["db-server-disk1", "db-server-disk00", "db-server", "x", ""] {
        assert!(rig::Nbd::try_connect(&format!("nbd://127.0.0.1:{port}/{name}")).is_err(), "{name}");
    }
    let list = std::process::Command::new("nbdinfo").args(["--list", &format!("nbd://127.0.0.1:{port}")]).output();
    let list = list.expect("nbdinfo: install the package libnbd-bin");
    assert!(!list.status.success());
    assert_eq!(expect_go(&format!("nbd://127.0.0.1:{port}/db-server-disk0")), rig.disks[0].1.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stalls_in_the_handshake_disturbs_nobody() {
    let rig = Rig::with(Plan { toml: "[nbd]\nhandshake_timeout_s = 1\n".to_owned(), ..Plan::default() }).await;
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::BeforeConnect(0)));
    let started = rig.start().await;
    let port = u16::try_from(started["disk_results"][0]["nbd_port"].as_u64().unwrap()).unwrap();
    let silent: Vec<std::net::TcpStream> =
        (0..20).map(|_| std::net::TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    rig.paused().await;
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    drop(silent);
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_dies_in_the_middle_of_a_write_leaves_nothing() {
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml: "[jobs]\nreconnect_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk0", started["disk_results"][0]["nbd_port"]);
    let mut link = rig::Nbd::connect(&uri);
    link.write(0, &[7; 4096]).unwrap();
    link.break_off_in_a_write(1 << 20, 4 << 20, 1 << 20);
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("client_disconnected")), "{backup:#}");
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn enospc_fails_the_job_once_and_keeps_every_older_point() {
    // A repository of 20 MiB: the first backup fits (10.5 MiB of it are data), a second one does not.
    let rig = Rig::with(Plan {
        disks: vec![(2000, content(5, 14 << 20))],
        toml: "[storage]\nmin_free_bytes = 0\nfull_estimate_ratio = 0.01\n".to_owned(),
        ..Plan::default()
    })
    .await;
    let small = rig.service.folder.path().join("small");
    let _mounted = Mounted::small(&small, "20m");
    let body = json!({"id": "small", "name": "small", "path": small});
    rig.service.post("/api/v1/repositories", &body).await.expect_status(201);
    let start = json!({"vm_context_id": rig.vm, "repository_id": "small", "backup_type": "full"});
    let first = rig.service.post("/api/v1/backups/vm", &start).await.expect_status(200).json();
    let first = rig.end_of(id_of(&first)).await;
    assert_eq!(first["state"], "committed", "{first:#}");

    // The estimate of a second one is the size of the first, which is refused up front ...
    rig.service.post("/api/v1/backups/vm", &start).await.expect_problem(507, "insufficient_storage");
    // ... and for a VM of which nothing is known the file system finds out in the middle.
    let other = rig::add_vm(&rig.service, "other", &rig::sizes(&rig.disks)).await;
    let start = json!({"vm_context_id": other, "repository_id": "small", "backup_type": "full"});
    let second = rig.service.post("/api/v1/backups/vm", &start).await.expect_status(200).json();
    let second = rig.end_of(id_of(&second)).await;
    assert_eq!((&second["state"], &second["code"]), (&json!("failed"), &json!("insufficient_storage")), "{second:#}");
    // The client was told.
    rig.seen(|event| matches!(event, Event::WriteFailed { .. }).then_some(())).await;
    assert_eq!(rig::backup_directories(&small), [id_of(&first)], "only the older point is left");
    assert_eq!(alerts(&rig, id_of(&second)).await.len(), 1);
    rig.expect_restorable(id_of(&first)).await;
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fatal_error_is_answered_once_then_the_job_hangs_up_and_alerts() {
    let rig = Rig::with(Plan {
        toml: "[storage]\nmin_free_bytes = 0\nfull_estimate_ratio = 0.01\n".to_owned(),
        faults: Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() },
        disks: vec![(2000, content(1, 64 << 20)), (2016, content(2, 512))],
        ..Plan::default()
    })
    .await;
    let small = rig.service.folder.path().join("small");
    let _mounted = Mounted::small(&small, "8m");
    rig.service
        .post("/api/v1/repositories", &json!({"id": "small", "name": "small", "path": small}))
        .await
        .expect_status(201);
    let start = json!({"vm_context_id": rig.vm, "repository_id": "small", "backup_type": "full"});
    let started = rig.service.post("/api/v1/backups/vm", &start).await.expect_status(200).json();
    let uri = |index: usize| {
        let disk = &started["disk_results"][index];
        format!("nbd://127.0.0.1:{}/{}", disk["nbd_port"], disk["nbd_export_name"].as_str().unwrap())
    };
    let (mut writer, mut bystander) = (rig::Nbd::connect(&uri(0)), rig::Nbd::connect(&uri(1)));
    let piece = content(3, 1 << 20);
    let error = (0..).find_map(|index| writer.write(index << 20, &piece).err()).unwrap();
    assert_eq!(error.raw_os_error(), Some(28), "ENOSPC, once");
    // From then on every socket of the job is closed: nothing can hang on it for ever.
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("insufficient_storage")), "{backup:#}");
    let hung_up = |link: &mut rig::Nbd| {
        let mut refusals = 0;
        loop {
            match link.write(0, &[1; 512]).unwrap_err().raw_os_error() {
                // Requests that were on their way when it happened.
                Some(28 | 108) => refusals += 1,
                _ => return refusals,
            }
            assert!(refusals < 100, "the sockets stay open");
        }
    };
    hung_up(&mut writer);
    hung_up(&mut bystander);
    assert_eq!(alerts(&rig, id_of(&started)).await[0]["alert"], "snapshot_may_be_left");
    assert!(rig::backup_directories(&small).is_empty());
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_link_fails_cleanly_and_the_next_auto_succeeds() {
    let faults = Faults { die_after_bytes: Some(4 << 20), ..Faults::default() };
    let rig = Rig::with(Plan { toml: "[jobs]\nreconnect_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let first = rig.back_up().await;
    assert_eq!((&first["state"], &first["code"]), (&json!("failed"), &json!("client_disconnected")), "{first:#}");
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

async fn alerts(rig: &Rig, id: &str) -> Vec<Value> {
    let store = &rig.service.service.app().store;
    let told = events::about(&mut store.read().await.unwrap(), id).await.unwrap();
    told.into_iter().filter(|(kind, _)| kind == "alert").map(|(_, data)| data).collect()
}
