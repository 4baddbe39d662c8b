//! Ends of the process: kill, SIGTERM, a second instance, a failing database, and what the next start makes of it.

use std::path::{Path, PathBuf};

use blockyard::node::fake::{Faults, PausePoint, StartFault};
use serde_json::{Value, json};

use crate::process::{Child, sqlite, sqlite_number};
use crate::rig::{self, Plan, Rig, id_of};
use crate::support::TestService;
use crate::support::process::{ServeProcess, blockyard};

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_at_any_moment_leaves_no_running_row_port_or_partial_after_restart() {
    let moments = [
        PausePoint::BeforeConnect(0),
        PausePoint::Connected(0),
        PausePoint::AfterBytes(3 << 20),
        PausePoint::BeforeComplete(0),
        PausePoint::BeforeConnect(1),
        PausePoint::BeforeComplete(1),
    ];
    for moment in moments {
        let child = Child::new(Faults { pause: Some(moment), ..Faults::default() }).await;
        let running = child.start();
        let vm = child.furnish(&running).await;
        let started = running.back_up(&vm).await;
        child.paused().await;
        assert_eq!(rig::backup_directories(&child.repository()), [format!("{}.partial", id_of(&started))]);
        running.process.signal("KILL");
        running.process.wait();

        let running = child.start();
        let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
        assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")), "{moment:?}");
        assert_eq!(backup["facets"]["snapshot_cleanup"], "alert", "{moment:?}");
        assert_eq!(running.get("/points").await["total"], 0, "{moment:?}");
        assert_eq!(running.get("/ports").await["leased"], 0, "{moment:?}");
        assert!(rig::backup_directories(&child.repository()).is_empty(), "{moment:?}");
        child.expect_ports_free();

        // The client of the old process finds nobody; a new backup works.
        child.node.resume();
        child.node.reconfigure(|config| config.faults = Faults::default());
        let started = running.back_up(&vm).await;
        let backup = running.end_of(id_of(&started)).await;
        assert_eq!(backup["state"], "committed", "{moment:?}: {backup:#}");
        for (disk, (_, bytes)) in backup["disk_results"].as_array().unwrap().iter().zip(&child.disks) {
            rig::expect_image_equals(Path::new(disk["qcow2_path"].as_str().unwrap()), bytes);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_killed_tells_what_had_come_some_seconds_before() {
    let child = Child::new(Faults { pause: Some(PausePoint::AfterBytes(3 << 20)), ..Faults::default() }).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let path = format!("/backups/{}", id_of(&running.back_up(&vm).await));
    child.paused().await;
    let counts = |backup: &Value| {
        ["covered_bytes", "written_bytes", "zeroed_bytes"].map(|name| backup["disks"][0][name].clone())
    };
    let seen = counts(&running.get(&path).await);
    assert!(seen[0].as_i64().unwrap() > 0, "{seen:?}");
    let database = child.folder.path().join("state/blockyard.db");
    let recorded = async {
        while sqlite_number(&database, "SELECT sum(covered_bytes) FROM backup_disks").await != seen[0] {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, recorded).await.expect("what came was not recorded");
    running.process.signal("KILL");
    running.process.wait();

    let running = child.start();
    let backup = running.get(&path).await;
    assert_eq!((&backup["code"], counts(&backup)), (&json!("service_restart"), seen), "{backup:#}");
    assert!(backup["error_message"].as_str().unwrap().contains("some seconds before"), "{backup:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_answers_requests_in_flight_and_exits_zero() {
    let child = Child::new(Faults { pause: Some(PausePoint::AfterBytes(1 << 20)), ..Faults::default() }).await;
    let config = child.folder.path().join("blockyard.toml");
    let mut text = std::fs::read_to_string(&config).unwrap();
    text.push_str("\n[server]\ndrain_s = 1\n");
    std::fs::write(&config, text).unwrap();
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    running.process.signal("TERM");
    assert_eq!(running.process.wait().code(), Some(0));
    // Undone by the process that stopped, not by the next one.
    assert!(rig::backup_directories(&child.repository()).is_empty());
    child.expect_ports_free();
    let running = child.start();
    let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_job_that_is_nearly_done_finish_and_refuses_new_ones() {
    let child = Child::new(Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() }).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    running.process.signal("TERM");
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let refused = async {
        loop {
            let request = running.http.post(format!("{}/api/v1/backups/vm", running.process.url));
            let answer = request.bearer_auth(&running.token).json(&body).send().await.unwrap();
            // Until the signal has arrived the VM is just busy.
            if answer.status() == 503 {
                return answer.json::<Value>().await.unwrap();
            }
            assert_eq!(answer.status(), 409);
        }
    };
    let refused = tokio::time::timeout(rig::DEADLINE, refused).await.expect("never refused");
    assert_eq!(refused["code"], "draining");
    child.node.resume();
    assert_eq!(running.process.wait().code(), Some(0));
    assert_eq!(rig::backup_directories(&child.repository()), [id_of(&started)]);
    let running = child.start();
    assert_eq!(running.get(&format!("/backups/{}", id_of(&started))).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_appears_in_logs_errors_events_or_the_database() {
    let child = Child::new(Faults::default()).await;
    let config = child.folder.path().join("blockyard.toml");
    let mut text = std::fs::read_to_string(&config).unwrap();
    let secret_file = child.folder.path().join("webhook-secret");
    std::fs::write(&secret_file, "secret-of-the-webhook\n").unwrap();
    // Nobody listens there: every delivery fails and is logged.
    text.push_str(&format!("\n[webhooks.siem]\nurl = \"http://127.0.0.1:1/\"\nsecret_file = {secret_file:?}\n"));
    text.push_str("\n[server]\nlog = \"trace\"\n");
    std::fs::write(&config, text).unwrap();
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    assert_eq!(running.end_of(id_of(&started)).await["state"], "committed");
    // A node that echoes the password in its refusal.
    child.node.reconfigure(|config| config.faults.start = StartFault::Status { status: 500, launch: false });
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let request = running.http.post(format!("{}/api/v1/backups/vm", running.process.url));
    let refused = request.bearer_auth(&running.token).json(&body).send().await.unwrap();
    assert_eq!(refused.status(), 502);
    let refused = refused.text().await.unwrap();
    let events = format!("{}/api/v1/backups/{}/events", running.process.url, id_of(&started));
    let events = running.http.get(events).bearer_auth(&running.token).send().await.unwrap().text().await.unwrap();
    assert!(events.contains("job.state"), "{events}");
    let token = running.token.clone();
    running.process.signal("TERM");
    running.process.wait();
    let log = ServeProcess::log(child.folder.path());
    assert!(log.contains("an event was not delivered"), "the webhook had its turn");
    let secrets = ["secret-of-the-vcenter", "secret-of-the-webhook", token.as_str()];
    assert!(secrets.iter().all(|secret| !refused.contains(secret) && !events.contains(secret)), "{refused} {events}");
    let mut looked_at = 0;
    for path in files_below(child.folder.path()) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if ["password", "token", "webhook-secret"].contains(&name.as_str()) || name.ends_with(".qcow2") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for secret in secrets {
            assert!(!text.contains(secret), "a secret is in {}", path.display());
        }
        looked_at += 1;
    }
    assert!(looked_at >= 4, "log, database, configuration and manifest are looked at");
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn second_instance_on_the_same_state_or_repository_refuses_to_start() {
    let child = Child::new(Faults::default()).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    running.end_of(id_of(&started)).await;
    // A copy of the state, as of a hub that was cloned: its own lock is free, that of the repository is not.
    let clone = tempfile::tempdir().unwrap();
    std::fs::create_dir(clone.path().join("state")).unwrap();
    for entry in std::fs::read_dir(child.folder.path().join("state")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "lock" {
            std::fs::copy(entry.path(), clone.path().join("state").join(entry.file_name())).unwrap();
        }
    }
    for (state, reason) in [(child.folder.path(), "another instance"), (clone.path(), "in use by another hub")] {
        let output = blockyard()
            .args(["serve", "--config"])
            .arg(child.folder.path().join("blockyard.toml"))
            .env("BLOCKYARD__SERVER__BIND", "127.0.0.1:0")
            .env("BLOCKYARD__SERVER__STATE_DIR", state.join("state"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(reason), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_directory_without_its_row_is_rolled_forward() {
    for older in [0, 1] {
        roll_forward(older).await;
    }
}

/// With one older point the one that is rolled forward is an incremental.
async fn roll_forward(older: usize) {
    // A committed job whose last transaction is taken back is what a crash between the rename and it leaves.
    let rig = Rig::new().await;
    for _ in 0..older {
        rig.back_up().await;
    }
    let started = rig.start().await;
    let before = rig.end_of(id_of(&started)).await;
    let point = rig.points().await.remove(0);
    let Rig { service, node, repository, vm, disks, ports } = rig;
    let folder = service.stop().await;
    let database = folder.path().join("state/blockyard.db");
    let id = id_of(&started);
    let undo = format!(
        "DELETE FROM point_disks WHERE point_id = '{id}'; DELETE FROM restore_points WHERE id = '{id}'; \
         UPDATE backups SET state = 'committing', result = 'none', completed_at = NULL WHERE id = '{id}'; \
         INSERT INTO leases (kind, key, owner, boot_id) VALUES ('vm', '{vm}', '{id}', 'a dead boot'), \
         ('pin', '{id}', '{id}', 'a dead boot');"
    );
    sqlite(&database, &undo).await;
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.reconfigure(|config| config.hub_url = hub_url);
    let rig = Rig { service, node, repository, vm, disks, ports };
    let mut after = rig.backup(id_of(&started)).await;
    assert_eq!((&after["state"], &after["result"]), (&json!("committed"), &json!("success")), "{after:#}");
    after["completed_at"] = before["completed_at"].clone();
    assert_eq!(after, before);
    assert_eq!(rig.points().await.remove(0), point);
    rig.expect_restorable(id_of(&started)).await;
    rig.expect_nothing_left_and_a_backup_works(older + 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_published_directory_is_no_restore_point() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let image = rig::published(&rig, id_of(&started)).await.join("disk-1.qcow2");
    let Rig { service, node, ports, .. } = rig;
    let folder = service.stop().await;
    let undo = format!(
        "DELETE FROM point_disks; DELETE FROM restore_points; \
         UPDATE backups SET state = 'committing', result = 'none', completed_at = NULL WHERE id = '{}';",
        id_of(&started)
    );
    sqlite(&folder.path().join("state/blockyard.db"), &undo).await;
    std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(512).unwrap();
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let backup = service.get(&format!("/api/v1/backups/{}", id_of(&started))).await.expect_status(200).json();
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")), "{backup:#}");
    assert_eq!(service.get("/api/v1/points").await.json()["total"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_whose_directory_is_gone_is_missing_until_it_is_back() {
    let rig = Rig::new().await;
    let kept = rig.back_up().await;
    let lost = rig.back_up().await;
    let folder_of_lost = rig::published(&rig, id_of(&lost)).await;
    let elsewhere = rig.service.folder.path().join("elsewhere");
    let states = async |service: &TestService| {
        let points = service.get("/api/v1/points").await.expect_status(200).json();
        let state =
            |point: &Value| (point["id"].as_str().unwrap().to_owned(), point["state"].as_str().unwrap().to_owned());
        points["points"].as_array().unwrap().iter().map(state).collect::<std::collections::BTreeMap<_, _>>()
    };
    let Rig { service, node, ports, .. } = rig;
    let toml = |folder: &Path| rig::configuration(&node.url(), folder, &ports, "");
    let folder = service.stop().await;
    std::fs::rename(&folder_of_lost, &elsewhere).unwrap();
    let toml_text = toml(folder.path());
    let service = TestService::start_in(folder, &toml_text).await;
    let found = states(&service).await;
    assert_eq!((found[id_of(&kept)].as_str(), found[id_of(&lost)].as_str()), ("committed", "missing"));
    let folder = service.stop().await;
    std::fs::rename(&elsewhere, &folder_of_lost).unwrap();
    let service = TestService::start_in(folder, &toml_text).await;
    assert!(states(&service).await.values().all(|state| state == "committed"));
    // A repository that is not mounted says nothing about its points.
    let folder = service.stop().await;
    let (mounted, unmounted) = (folder.path().join("main"), folder.path().join("unmounted"));
    std::fs::rename(&mounted, &unmounted).unwrap();
    let service = TestService::start_in(folder, &toml_text).await;
    assert!(states(&service).await.values().all(|state| state == "committed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stray_staged_directory_is_put_aside_and_never_listed() {
    let rig = Rig::new().await;
    let backup = rig.back_up().await;
    let vm_folder = rig::published(&rig, id_of(&backup)).await.parent().unwrap().to_owned();
    let Rig { service, node, ports, .. } = rig;
    let folder = service.stop().await;
    let stray = blockyard::id::BackupId::new();
    std::fs::create_dir(vm_folder.join(format!("{stray}.partial"))).unwrap();
    std::fs::write(vm_folder.join(format!("{stray}.partial/disk-0.qcow2")), "half an image").unwrap();
    std::fs::create_dir(vm_folder.join("somebody.partial")).unwrap();
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let mut names: Vec<String> =
        std::fs::read_dir(&vm_folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut expected = vec![id_of(&backup).to_owned(), format!("{stray}.failed"), "somebody.partial".to_owned()];
    expected.sort();
    assert_eq!(names, expected, "put aside, and what is not ours left alone");
    assert_eq!(service.get("/api/v1/points").await.json()["total"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_vanishes_is_cleared_up_after_in_the_same_folder() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::AfterBytes(2 << 20)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let Rig { service, node, repository, vm, disks, ports } = rig;
    let TestService { service, folder, .. } = service;
    drop(service);
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    // The sockets of the one that vanished close when the runtime gets to it.
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.resume();
    node.reconfigure(|config| config.hub_url = hub_url);
    let rig = Rig { service, node, repository, vm, disks, ports };
    let backup = rig.backup(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")));
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn database_error_while_preparing_fails_the_job_and_undoes_it() {
    // A trigger that refuses the step from preparing to starting stands for any refusal of the database.
    let rig = Rig::with(Plan::default()).await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    sqlite(
        &database,
        "CREATE TRIGGER refuse BEFORE UPDATE OF state ON backups WHEN NEW.state = 'starting' \
         BEGIN SELECT RAISE(ABORT, 'no'); END;",
    )
    .await;
    let problem = rig.try_start().await.expect_problem(500, "internal");
    assert!(rig.node.log().calls().is_empty(), "nothing was called");
    let backup = rig.backup(id_of(&problem)).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("database_error")), "{backup:#}");
    assert_eq!(backup["facets"]["snapshot_cleanup"], "unknown");
    rig.expect_nothing_left(0).await;
    sqlite(&database, "DROP TRIGGER refuse").await;
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn undo_with_one_failing_step_still_frees_the_others_and_finishes_later() {
    // The terminal state cannot be recorded for a while: everything else is given back all the same.
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::AfterBytes(1 << 20)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE UPDATE OF state ON backups WHEN NEW.state = 'cancelled' \
                  BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    rig.cancel(id_of(&started)).await.expect_status(202);
    let freed = async {
        while rig.service.get("/api/v1/ports").await.json()["leased"] != 0 {}
        while !rig::backup_directories(&rig.repository).is_empty() {}
    };
    tokio::time::timeout(rig::DEADLINE, freed).await.expect("ports and files are held");
    assert_eq!(rig.backup(id_of(&started)).await["state"], "cancelling");
    // The VM is not wedged by it.
    rig.node.reconfigure(|config| config.faults = Faults::default());
    let again = async {
        loop {
            let answer = rig.try_start().await;
            if answer.status == 200 {
                return answer.json();
            }
        }
    };
    let second = tokio::time::timeout(rig::DEADLINE, again).await.expect("the VM is wedged");
    assert_eq!(rig.end_of(id_of(&second)).await["state"], "committed");
    sqlite(&database, "DROP TRIGGER refuse").await;
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "cancelled");
    rig.node.resume();
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_cannot_be_recorded_is_repeated_and_never_undone() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(2)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON restore_points BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    rig.node.resume();
    let renamed = async { while rig::backup_directories(&rig.repository) != [id_of(&started)] {} };
    tokio::time::timeout(rig::DEADLINE, renamed).await.expect("never renamed");
    // Published, not recorded: not a point yet, and not to be cancelled any more.
    assert!(rig.points().await.is_empty());
    assert_eq!(rig.backup(id_of(&started)).await["state"], "committing");
    let cancelling = tokio::spawn({
        let path = format!("/api/v1/backups/{}/cancel", id_of(&started));
        crate::support::send(rig.service.request(reqwest::Method::POST, &path).json(&json!({})))
    });
    sqlite(&database, "DROP TRIGGER refuse").await;
    assert_eq!(cancelling.await.unwrap().expect_status(200).json()["state"], "committed");
    rig.expect_restorable(id_of(&started)).await;
    assert_eq!(rig.client_ended().await, None);
    rig.expect_nothing_left(1).await;
}
