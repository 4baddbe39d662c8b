//! The end of restore points: what is deleted and what is not, what a crash leaves of a deletion, and the rules of a repository.

use std::path::Path;

use blockyard::id::BackupId;
use blockyard::node::fake::{Faults, PausePoint};
use blockyard::points::prune::Mode;
use blockyard::points::retention::Decision;
use blockyard::store::events::Actor;
use blockyard::store::{POOL_SIZE, events, leases, points};
use blockyard::words::point::PointState;
use serde_json::{Value, json};

use crate::cli::cli;
use crate::crash::kill_at;
use crate::incremental::{Disks, commit, expect_restores, rig, write_everywhere};
use crate::process::Child;
use crate::rig::{self, Rig, id_of, published};
use crate::support::TestService;

/// A full and incrementals upon each other, with what each of them holds.
async fn chain(rig: &mut Rig, length: u8) -> Vec<(String, Disks)> {
    let mut history = Vec::new();
    for round in 0..length {
        write_everywhere(rig, round);
        let backup = commit(rig).await;
        history.push((id_of(&backup).to_owned(), rig.disks.clone()));
    }
    history
}

fn point(id: &str) -> String {
    format!("/api/v1/points/{id}")
}

async fn prune(rig: &Rig, dry_run: &str) -> Value {
    let path = format!("/api/v1/repositories/main/prune{dry_run}");
    rig.service.post(&path, &json!({})).await.expect_status(200).json()
}

async fn set_rules(rig: &Rig, rules: &Value) {
    let body = json!({"name": "main", "path": rig.repository, "retention": rules});
    rig.service.put("/api/v1/repositories/main", "*", &body).await.expect_status(200);
}

fn row<'a>(answer: &'a Value, id: &str) -> &'a Value {
    answer["points"].as_array().unwrap().iter().find(|row| row["point_id"] == id).unwrap()
}

/// The events about a thing, as kind and who caused it.
async fn told(service: &TestService, subject: &str, kinds: &[&str]) -> Vec<(String, Value)> {
    let mut connection = service.service.app().store.read().await.unwrap();
    let mut told = events::about(&mut connection, subject).await.unwrap();
    told.retain(|(kind, _)| kinds.contains(&kind.as_str()));
    told
}

/// Changes the record of a point behind the service's back.
async fn set_state(service: &TestService, id: &str, state: PointState) {
    let mut transaction = service.service.app().store.write().await.unwrap();
    points::set_state(&mut transaction, &id.parse().unwrap(), state).await.unwrap();
    transaction.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_a_parent_is_refused_and_names_its_children() {
    let mut rig = rig("").await;
    let history = chain(&mut rig, 3).await;
    for (below, above) in [(0, 1), (1, 2)] {
        let refused = rig.service.delete(&point(&history[below].0)).await;
        let refused = refused.expect_problem(409, "point_has_dependents");
        assert_eq!(refused["dependents"], json!([history[above].0]), "{refused}");
        expect_restores(&published(&rig, &history[below].0).await, &history[below].1);
    }
    // By the job it is the same.
    let path = format!("/api/v1/backups/{}", history[0].0);
    rig.service.delete(&path).await.expect_problem(409, "point_has_dependents");

    for (id, _) in history.iter().rev() {
        rig.service.delete(&point(id)).await.expect_status(204);
        rig.service.delete(&point(id)).await.expect_problem(404, "point_not_found");
        rig.service.get(&point(id)).await.expect_problem(404, "point_not_found");
        rig.service.delete(&format!("/api/v1/backups/{id}")).await.expect_problem(404, "point_not_found");
        assert_eq!(rig.backup(id).await["state"], "committed", "the history stays");
        let told = told(&rig.service, id, &["point.deleting", "point.deleted"]).await;
        let told: Vec<(&str, &Value)> = told.iter().map(|(kind, data)| (kind.as_str(), &data["by"])).collect();
        assert_eq!(told, [("point.deleting", &json!("user")), ("point.deleted", &json!("user"))]);
    }
    assert!(rig.points().await.is_empty());
    assert_eq!(
        std::fs::read_dir(&rig.repository)
            .unwrap()
            .filter(|entry| { entry.as_ref().unwrap().file_type().unwrap().is_dir() })
            .count(),
        0,
        "the folder of the VM goes with its last point"
    );
    rig.service.delete(&point("backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB")).await.expect_problem(404, "point_not_found");
    rig.service.delete(&point("x")).await.expect_problem(404, "point_not_found");
    let next = commit(&rig).await;
    assert_eq!(next["disks"][0]["reason"], "first_backup");
    rig.expect_restorable(id_of(&next)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deletions_of_one_point_delete_it_once() {
    let rig = Rig::new().await;
    let id = id_of(&commit(&rig).await).to_owned();
    let path = point(&id);
    let (one, other) = tokio::join!(rig.service.delete(&path), rig.service.delete(&path));
    let mut answers = [one.status.as_u16(), other.status.as_u16()];
    answers.sort_unstable();
    assert_eq!(answers, [204, 404]);
    assert_eq!(told(&rig.service, &id, &["point.deleted"]).await.len(), 1);
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_in_use_is_not_deleted_and_says_by_whom() {
    let mut rig = rig("").await;
    let history = chain(&mut rig, 2).await;
    let top = &history[1].0;
    let app = rig.service.service.app();
    let export = blockyard::id::ExportId::new();
    let mut transaction = app.store.write().await.unwrap();
    leases::pin_chain(&mut transaction, &top.parse().unwrap(), export.as_str(), &app.boot_id).await.unwrap();
    transaction.commit().await.unwrap();
    let refused = rig.service.delete(&point(top)).await.expect_problem(409, "point_in_use");
    assert_eq!((&refused["holders"], &refused["retryable"]), (&json!([export.as_str()]), &json!(true)));
    set_rules(&rig, &json!({"keep_last": 1})).await;
    let answer = prune(&rig, "?dry_run=false").await;
    for (id, _) in &history {
        let reasons = row(&answer, id)["reasons"].as_array().unwrap();
        assert!(reasons.contains(&json!(format!("in use by {export}"))), "{answer:#}");
    }
    let mut transaction = app.store.write().await.unwrap();
    leases::release_all(&mut transaction, export.as_str()).await.unwrap();
    transaction.commit().await.unwrap();
    rig.service.delete(&point(top)).await.expect_status(204);

    // A job holds what it builds upon.
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::BeforeConnect(0)));
    let started = rig.start().await;
    rig.paused().await;
    let refused = rig.service.delete(&point(&history[0].0)).await.expect_problem(409, "point_in_use");
    assert_eq!(refused["holders"], json!([id_of(&started)]));
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_not_deleted_and_a_failed_one_loses_its_record() {
    let rig = Rig::new().await;
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::BeforeConnect(0)));
    let started = rig.start().await;
    rig.paused().await;
    let path = format!("/api/v1/backups/{}", id_of(&started));
    let refused = rig.service.delete(&path).await.expect_problem(409, "backup_in_progress");
    assert_eq!(refused["links"]["active"], path);
    rig.service.delete(&point(id_of(&started))).await.expect_problem(404, "point_not_found");
    rig.cancel(id_of(&started)).await.expect_status(202);
    rig.end_of(id_of(&started)).await;
    rig.service.delete(&path).await.expect_status(204);
    rig.service.get(&path).await.expect_problem(404, "backup_not_found");
    rig.service.delete(&path).await.expect_problem(404, "backup_not_found");
    assert_eq!(told(&rig.service, id_of(&started), &["job.deleted"]).await.len(), 1);
    rig.node.resume();
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_goes_while_a_job_is_accepted_is_not_built_upon() {
    let mut rig = rig("").await;
    let history = chain(&mut rig, 2).await;
    write_everywhere(&mut rig, 3);
    let app = rig.service.service.app();
    // The job is planned while a deletion of its parent owns the database, and is recorded after that.
    let mut deletion = app.store.write().await.unwrap();
    let request = rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm").json(&rig.start_body());
    let start = tokio::spawn(crate::support::send(request));
    let planned = async {
        while app.backups.leased_ports().is_empty() {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(rig::DEADLINE, planned).await.expect("never planned");
    let top: BackupId = history[1].0.parse().unwrap();
    points::set_state(&mut deletion, &top, PointState::Deleting).await.unwrap();
    deletion.commit().await.unwrap();
    let started = start.await.unwrap().expect_status(200).json();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    for disk in backup["disks"].as_array().unwrap() {
        assert_eq!((&disk["parent_id"], &disk["reason"]), (&json!(history[0].0), &json!("parent_ok")), "{disk:#}");
    }
    // A deletion that somebody began is gone on with.
    rig.service.delete(&point(&history[1].0)).await.expect_status(204);
    expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
    rig.expect_nothing_left(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protected_point_cannot_be_deleted_or_shortened() {
    let rig = Rig::new().await;
    let id = id_of(&commit(&rig).await).to_owned();
    let path = format!("{}/protect", point(&id));
    let protect = |until: Value| {
        let body = json!({"until": until});
        let (service, path) = (&rig.service, &path);
        async move { service.post(path, &body).await }
    };
    for wrong in ["2020-01-01T00:00:00Z", "tomorrow", "2027-01-01"] {
        protect(wrong.into()).await.expect_fault(400, "invalid_field", "/until");
    }
    rig.service.post(&path, &json!({})).await.expect_fault(400, "invalid_field", "/until");
    let answer = protect("2098-01-01T00:00:00Z".into()).await.expect_status(200).json();
    assert_eq!(answer["protected_until"], "2098-01-01T00:00:00.000Z");

    let refused = rig.service.delete(&point(&id)).await.expect_problem(423, "point_protected");
    assert_eq!(refused["protected_until"], "2098-01-01T00:00:00.000Z");
    for shorter in ["2097-12-31T23:59:59Z".into(), Value::Null] {
        protect(shorter).await.expect_problem(423, "point_protected");
    }
    protect("2099-01-01T00:00:00Z".into()).await.expect_status(200);
    rig.service.delete(&point(&id)).await.expect_problem(423, "point_protected");
    // Retention does not reach it either.
    commit(&rig).await;
    set_rules(&rig, &json!({"keep_last": 1})).await;
    let answer = prune(&rig, "?dry_run=false").await;
    let reasons = row(&answer, &id)["reasons"].as_array().unwrap();
    assert!(reasons.contains(&json!("protected until 2099-01-01T00:00:00.000Z")), "{answer:#}");
    set_rules(&rig, &json!({})).await;
    let newest = rig.points().await.remove(0);
    rig.service.delete(&point(newest["id"].as_str().unwrap())).await.expect_status(204);

    let body = json!({"until": null, "force": true});
    let answer = rig.service.post(&path, &body).await.expect_status(200).json();
    assert_eq!(answer["protected_until"], Value::Null);
    let told = told(&rig.service, &id, &["point.protected"]).await;
    let told: Vec<&Value> = told.iter().map(|(_, data)| &data["forced"]).collect();
    assert_eq!(told, [&json!(false), &json!(false), &json!(true)]);
    rig.service.delete(&point(&id)).await.expect_status(204);
    rig.service.post(&path, &body).await.expect_problem(404, "point_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_point_loses_its_record_and_an_unreachable_one_nothing() {
    let mut rig = rig("").await;
    let history = chain(&mut rig, 2).await;
    let (full, top) = (&history[0].0, &history[1].0);
    std::fs::remove_dir_all(published(&rig, top).await).unwrap();
    set_state(&rig.service, top, PointState::Missing).await;
    let (code, text) = cli(&rig, &["point", "list"]).await;
    let states = [(full, "committed"), (top, "missing")];
    let listed = |(id, state): &(&String, &str)| text.lines().any(|line| line.starts_with(*id) && line.contains(state));
    assert!(code == 0 && states.iter().all(listed), "{code} {text}");
    let marker = rig.repository.join(".blockyard-repository.json");
    let kept = std::fs::read(&marker).unwrap();
    std::fs::remove_file(&marker).unwrap();
    rig.service.delete(&point(full)).await.expect_problem(409, "point_has_dependents");
    // The folder is not the repository any more, such as the mount point of a disk that is gone.
    rig.service.delete(&point(top)).await.expect_status(204);
    rig.service.delete(&point(full)).await.expect_problem(503, "repository_unavailable");
    let refused = rig.service.post("/api/v1/repositories/main/prune?dry_run=false", &json!({})).await;
    refused.expect_problem(503, "repository_unavailable");
    std::fs::write(&marker, kept).unwrap();
    expect_restores(&published(&rig, full).await, &history[0].1);
    rig.service.delete(&point(full)).await.expect_status(204);
    assert_eq!(told(&rig.service, top, &["point.deleted"]).await.len(), 1);
    rig.expect_nothing_left(0).await;
}

/// Everything by which a deletion makes names, files and rows go, durably; and the write of its record, of which the first part
/// is enough: a transaction that is not written whole did not happen.
const STEPS: [&str; 5] = ["pwrite64", "renameat2", "fsync", "unlinkat", "rmdir"];

#[tokio::test(flavor = "multi_thread")]
async fn crash_at_every_step_of_a_deletion_leaves_the_whole_point_or_nothing_of_it() {
    let child = Child::new(Faults::default()).await;
    let mut running = child.start();
    let vm = child.furnish(&running).await;
    let (mut whole, mut gone) = (0, 0);
    for step in STEPS {
        let mut killed = 0;
        loop {
            let backup = running.end_of(id_of(&running.back_up(&vm).await)).await;
            assert_eq!(backup["state"], "committed", "{backup:#}");
            let id = id_of(&backup).to_owned();
            let mut tracer = kill_at(running.process.id(), step, None, killed + 1);
            let url = format!("{}/api/v1/points/{id}", running.process.url);
            let answered = running.http.delete(url).bearer_auth(&running.token).send().await;
            let is_over = answered.is_ok_and(|answer| answer.status() == 204);
            running.process.signal_if_alive("KILL");
            running.process.wait();
            tracer.wait().unwrap();

            running = child.start();
            let what = format!("{step} {}", killed + 1);
            let points = running.get("/points").await;
            let folders = rig::backup_directories(&child.repository());
            if points["total"] == 1 {
                assert!(!is_over, "{what}: what was answered as deleted is there");
                assert_eq!((&points["points"][0]["state"], folders), (&json!("committed"), vec![id.clone()]), "{what}");
                for (disk, (_, bytes)) in backup["disk_results"].as_array().unwrap().iter().zip(&child.disks) {
                    rig::expect_image_equals(Path::new(disk["qcow2_path"].as_str().unwrap()), bytes);
                }
                let url = format!("{}/api/v1/points/{id}", running.process.url);
                let deleted = running.http.delete(url).bearer_auth(&running.token).send().await.unwrap();
                assert_eq!(deleted.status(), 204, "{what}");
                whole += 1;
            } else {
                assert_eq!((&points["total"], folders), (&json!(0), vec![]), "{what}");
                gone += 1;
            }
            if is_over {
                break;
            }
            killed += 1;
            if step == "pwrite64" {
                break;
            }
        }
        assert!(killed >= 1, "{step} is never called");
    }
    // At the least: before the record; after it the rename, its sync, each of three files, the folders and their syncs. Of the
    // other kinds of calls there was a last deletion that none of them cut.
    let uncut = STEPS.len() - 1;
    assert!(whole >= 1 && gone >= 9 + uncut, "{whole} crashes before the deletion, {gone} after it began");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_waits_for_its_repository_and_a_strangers_folder_is_left_alone() {
    let mut rig = rig("[storage]\nmax_chain_depth = 1\n").await;
    let history = chain(&mut rig, 3).await;
    let mut folders = Vec::new();
    for (id, _) in &history {
        folders.push(published(&rig, id).await);
    }
    set_state(&rig.service, &history[0].0, PointState::Deleting).await;
    set_state(&rig.service, &history[1].0, PointState::Deleting).await;
    let retired = folders[1].with_extension("deleting");
    std::fs::rename(&folders[1], &retired).unwrap();
    let stranger = folders[2].with_file_name("backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB.deleting");
    std::fs::create_dir(&stranger).unwrap();
    let copied = rig.repository.join("elsewhere").join(retired.file_name().unwrap());
    std::fs::create_dir_all(&copied).unwrap();

    let Rig { service, repository, disks, .. } = rig;
    let kept = service.stop().await;
    let unmounted = kept.path().join("unmounted");
    std::fs::rename(&repository, &unmounted).unwrap();
    let service = TestService::start_in(kept, "").await;
    for (id, _) in &history[..2] {
        assert_eq!(service.get(&point(id)).await.expect_status(200).json()["state"], "deleting");
        service.delete(&point(id)).await.expect_problem(503, "repository_unavailable");
    }
    let kept = service.stop().await;
    std::fs::rename(&unmounted, &repository).unwrap();
    let service = TestService::start_in(kept, "").await;
    for (id, _) in &history[..2] {
        service.get(&point(id)).await.expect_problem(404, "point_not_found");
    }
    assert!(!folders[0].exists() && !retired.exists());
    assert!(stranger.exists() && copied.exists(), "nobody recorded these");
    expect_restores(&folders[2], &disks);

    // What was away while its deletion was recorded goes when it is back.
    let kept = service.stop().await;
    std::fs::create_dir(&retired).unwrap();
    let service = TestService::start_in(kept, "").await;
    assert!(!retired.exists() && stranger.exists());
    drop(service);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_cannot_be_removed_are_told_and_tried_again() {
    let rig = Rig::new().await;
    let id = id_of(&commit(&rig).await).to_owned();
    let folder = published(&rig, &id).await;
    let stranger = folder.with_extension("deleting");
    std::fs::create_dir(&stranger).unwrap();
    let refused = rig.service.delete(&point(&id)).await.expect_problem(503, "repository_unavailable");
    assert!(refused["detail"].as_str().unwrap().contains("is being deleted"), "{refused}");
    assert!(folder.join("disk-0.qcow2").exists());
    assert_eq!(rig.points().await[0]["state"], "deleting");
    // Nothing is built upon it any more.
    let next = commit(&rig).await;
    assert_eq!(next["disks"][0]["reason"], "first_backup");
    std::fs::remove_dir(&stranger).unwrap();
    rig.service.delete(&point(&id)).await.expect_status(204);
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_prune_keeps_restores_byte_for_byte_and_the_rest_is_gone() {
    let mut rig = rig("[storage]\nmax_chain_depth = 3\n").await;
    let history = chain(&mut rig, 8).await;
    set_rules(&rig, &json!({"keep_last": 3})).await;
    for dry_run in ["", "?dry_run=true"] {
        let answer = prune(&rig, dry_run).await;
        assert_eq!((&answer["dry_run"], &answer["failed"]), (&json!(true), &json!(0)), "{answer:#}");
        let decisions: Vec<&str> =
            history.iter().map(|(id, _)| row(&answer, id)["decision"].as_str().unwrap()).collect();
        assert_eq!(decisions, ["delete", "delete", "delete", "merge", "merge", "keep", "keep", "keep"]);
        assert_eq!(row(&answer, &history[3].0)["merged_into"], history[5].0);
        assert_eq!(row(&answer, &history[7].0)["reasons"], json!(["last 3", "newest usable point"]));
        let freed = row(&answer, &history[0].0)["frees_bytes"].as_u64().unwrap();
        let images = (0..3).map(|disk| history_image(&rig, &history[0].0, disk)).sum::<u64>();
        assert_eq!(freed, images);
        assert_eq!(rig.points().await.len(), 8, "nothing was done");
    }
    let answer = prune(&rig, "?dry_run=false").await;
    assert_eq!(answer["dry_run"], false);
    assert_eq!(answer["deleted"], 3, "{answer:#}");
    for (id, disks) in &history {
        match row(&answer, id)["decision"].as_str().unwrap() {
            "keep" => {
                assert_ne!(row(&answer, id)["reasons"], json!([]), "{answer:#}");
                expect_restores(&published(&rig, id).await, disks);
            }
            _ => drop(rig.service.get(&point(id)).await.expect_problem(404, "point_not_found")),
        }
    }
    let again = prune(&rig, "?dry_run=false").await;
    assert_eq!((&again["deleted"], &again["merged"]), (&json!(0), &json!(0)), "{again:#}");
    // The chain goes on.
    write_everywhere(&mut rig, 20);
    set_rules(&rig, &json!({})).await;
    let next = commit(&rig).await;
    expect_restores(&published(&rig, id_of(&next)).await, &rig.disks);
    rig.service.post("/api/v1/repositories/none/prune", &json!({})).await.expect_problem(404, "repository_not_found");
    let refused = rig.service.post("/api/v1/repositories/main/prune?dry_run=maybe", &json!({})).await;
    refused.expect_problem(400, "invalid_field");
}

/// The length of an image of a point.
fn history_image(rig: &Rig, id: &str, disk: u32) -> u64 {
    let vm = std::fs::read_dir(&rig.repository).unwrap().map(|entry| entry.unwrap().path());
    let image = vm.filter(|path| path.is_dir()).map(|vm| vm.join(id).join(format!("disk-{disk}.qcow2")));
    image.filter_map(|path| std::fs::metadata(path).ok()).map(|metadata| metadata.len()).sum()
}

/// Waits until as many points are there as the rules keep.
async fn when_left(rig: &Rig, count: usize) {
    let left = async { while rig.points().await.len() != count {} };
    tokio::time::timeout(rig::DEADLINE, left).await.expect("retention was not applied");
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_applied_after_every_commit_and_failures_are_an_alert() {
    let mut rig = rig("[storage]\nmax_chain_depth = 1\n").await;
    let history = chain(&mut rig, 3).await;
    assert_eq!(rig.points().await.len(), 3, "without rules nothing goes");
    set_rules(&rig, &json!({"keep_last": 2})).await;
    let last = commit(&rig).await;
    when_left(&rig, 2).await;
    for (id, _) in &history[..2] {
        let told = told(&rig.service, id, &["point.deleting", "point.deleted"]).await;
        assert!(!told.is_empty() && told.iter().all(|(_, data)| data["by"] == "policy"), "{told:?}");
    }
    rig.expect_restorable(id_of(&last)).await;

    let oldest = published(&rig, &history[2].0).await;
    std::fs::create_dir(oldest.with_extension("deleting")).unwrap();
    let backup = commit(&rig).await;
    let alert = async {
        loop {
            if let Some((_, data)) = told(&rig.service, "main", &["alert"]).await.pop() {
                return data;
            }
        }
    };
    let alert = tokio::time::timeout(rig::DEADLINE, alert).await.expect("no alert");
    assert_eq!(alert["alert"], "retention_failed");
    assert!(alert["failures"][0].as_str().unwrap().starts_with(&history[2].0), "{alert}");
    assert_eq!(rig.backup(id_of(&backup)).await["result"], "success", "the job has nothing to do with it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_in_use_when_the_rules_were_applied_goes_when_it_is_not() {
    let mut rig = rig("[storage]\nmax_chain_depth = 1\n").await;
    let history = chain(&mut rig, 2).await;
    let app = rig.service.service.app();
    let task = blockyard::id::TaskId::new();
    let mut transaction = app.store.write().await.unwrap();
    leases::pin_chain(&mut transaction, &history[0].0.parse().unwrap(), task.as_str(), &app.boot_id).await.unwrap();
    transaction.commit().await.unwrap();
    set_rules(&rig, &json!({"keep_last": 2})).await;
    commit(&rig).await;
    set_rules(&rig, &json!({"keep_last": 1})).await;
    commit(&rig).await;
    // All but the newest went, and the one that is in use.
    when_left(&rig, 2).await;
    assert_eq!(rig.points().await[1]["id"], history[0].0);
    let mut transaction = app.store.write().await.unwrap();
    leases::release_all(&mut transaction, task.as_str()).await.unwrap();
    transaction.commit().await.unwrap();
    when_left(&rig, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_free_while_the_rules_are_applied_goes_and_nothing_is_left_behind_without_a_reason() {
    let mut rig = rig("").await;
    let history = chain(&mut rig, 6).await;
    set_rules(&rig, &json!({"keep_last": 1})).await;
    // Somebody who has all of them, then none, in every other transaction.
    let app = rig.service.service.app().clone();
    let (pinned, top) = (history.len() - 2, history[history.len() - 2].0.parse().unwrap());
    let task = blockyard::id::TaskId::new();
    let come_and_go = tokio::spawn(async move {
        for _ in 0.. {
            let mut transaction = app.store.write().await.unwrap();
            // Those that are left; the topmost goes first.
            let _ = leases::pin_chain(&mut transaction, &top, task.as_str(), &app.boot_id).await;
            transaction.commit().await.unwrap();
            let mut transaction = app.store.write().await.unwrap();
            leases::release_all(&mut transaction, task.as_str()).await.unwrap();
            transaction.commit().await.unwrap();
        }
    });
    for _ in 0..100 {
        let answer = prune(&rig, "?dry_run=false").await;
        for (id, _) in &history[..=pinned] {
            let found = answer["points"].as_array().unwrap().iter().find(|row| row["point_id"] == *id);
            let Some(row) = found.filter(|row| row["decision"] == "keep") else { continue };
            assert_eq!(row["error"], Value::Null, "{answer:#}");
            assert_ne!(row["reasons"], json!([]), "{answer:#}");
        }
        if rig.points().await.len() == 1 {
            break;
        }
    }
    come_and_go.abort();
    prune(&rig, "?dry_run=false").await;
    assert_eq!(rig.points().await.len(), 1);
    expect_restores(&published(&rig, &history[5].0).await, &history[5].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_free_right_after_the_last_look_of_a_prune_is_looked_at_again() {
    let mut rig = rig("[storage]\nmax_chain_depth = 1\n").await;
    let history = chain(&mut rig, 8).await;
    set_rules(&rig, &json!({"keep_last": 1})).await;
    // With one connection left a prune and somebody else take turns: what the one has just seen the other changes.
    let app = rig.service.service.app().clone();
    let mut taken = Vec::new();
    for _ in 1..POOL_SIZE {
        taken.push(app.store.read().await.unwrap());
    }
    let task = blockyard::id::TaskId::new();
    let pinned: Vec<BackupId> = history[..7].iter().map(|(id, _)| id.parse().unwrap()).collect();
    let come_and_go = async {
        for _ in 0..50 {
            let mut transaction = app.store.write().await.unwrap();
            for id in &pinned {
                let _ = leases::pin_chain(&mut transaction, id, task.as_str(), &app.boot_id).await;
            }
            transaction.commit().await.unwrap();
            let mut transaction = app.store.write().await.unwrap();
            leases::release_all(&mut transaction, task.as_str()).await.unwrap();
            transaction.commit().await.unwrap();
        }
    };
    let repository = "main".parse().unwrap();
    let (pruned, ()) = tokio::join!(app.points.prune(&repository, None, Mode::Apply(Actor::User)), come_and_go);
    drop(taken);
    for outcome in pruned.unwrap() {
        assert_eq!(outcome.error, None, "{outcome:#?}");
        assert!(outcome.verdict.decision != Decision::Keep || !outcome.verdict.reasons.is_empty(), "{outcome:#?}");
    }
    assert_eq!(rig.points().await.len(), 1);
    expect_restores(&published(&rig, &history[7].0).await, &history[7].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_vm_keeps_its_points_and_they_can_be_deleted() {
    let rig = Rig::new().await;
    let id = id_of(&commit(&rig).await).to_owned();
    rig.service.delete(&format!("/api/v1/vms/{}", rig.vm)).await.expect_status(204);
    rig.expect_restorable(&id).await;
    let answer = prune(&rig, "").await;
    assert_eq!((&row(&answer, &id)["vm"], &row(&answer, &id)["reasons"]), (&json!("db-server"), &json!(["no rules"])));
    rig.service.delete(&point(&id)).await.expect_status(204);
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_protected_deleted_and_pruned_by_command() {
    let mut rig = rig("").await;
    let history = chain(&mut rig, 2).await;
    let (full, top) = (history[0].0.as_str(), history[1].0.as_str());
    let (code, text) = cli(&rig, &["point", "delete", full]).await;
    assert!(code == 5 && text.contains("point_has_dependents") && text.contains(top), "{code} {text}");
    assert!(text.lines().all(|line| !line.is_empty()), "nothing was deleted, and nothing is said of it: {text:?}");
    let (code, text) = cli(&rig, &["point", "protect", top, "--until", "2098-01-01"]).await;
    assert!(code == 0 && text.contains("protected until 2098-01-01T00:00:00"), "{code} {text}");
    for arguments in [["--until", "2097-01-01"].as_slice(), &["--off"]] {
        let arguments = [&["point", "protect", top], arguments].concat();
        let (code, text) = cli(&rig, &arguments).await;
        assert!(code == 5 && text.contains("point_protected"), "{code} {text}");
    }
    let (code, text) = cli(&rig, &["point", "delete", top, "--output", "json"]).await;
    assert!(code == 5 && text.contains("\"protected_until\""), "{code} {text}");
    assert_eq!(cli(&rig, &["point", "protect", top, "--off", "--force"]).await.0, 0);
    for wrong in
        [["point", "protect", top].as_slice(), &["point", "protect", top, "--until", "soon"], &["point", "delete"]]
    {
        assert_eq!(cli(&rig, wrong).await.0, 2, "{wrong:?}");
    }
    assert_eq!(cli(&rig, &["point", "protect", top, "--until", "2020-01-01"]).await.0, 2);

    let (code, text) = cli(&rig, &["repo", "retention", "main"]).await;
    assert!(code == 0 && text.contains("everything is kept"), "{code} {text}");
    let (code, text) = cli(&rig, &["repo", "retention", "main", "--keep-last", "2", "--keep-daily", "7"]).await;
    assert!(code == 0 && text.contains("--keep-daily 7 --keep-last 2"), "{code} {text}");
    let repository = rig.service.get("/api/v1/repositories/main").await.json();
    assert_eq!(repository["retention"], json!({"keep_last": 2, "keep_daily": 7}));
    let (code, text) = cli(&rig, &["repo", "prune", "main"]).await;
    assert!(code == 0 && text.contains("parent of") && text.contains("2 to keep, 0 to delete"), "{code} {text}");
    assert_eq!(cli(&rig, &["repo", "prune", "none"]).await.0, 4);
    assert_eq!(cli(&rig, &["repo", "retention", "main", "--keep-all"]).await.0, 0);

    // In any order, whatever else was named.
    let unknown = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB";
    let (code, text) = cli(&rig, &["point", "delete", full, unknown, top]).await;
    assert!(
        code == 4 && text.contains(&format!("deleted {full}")) && text.contains("point_not_found"),
        "{code} {text}"
    );
    assert!(rig.points().await.is_empty());
    assert_eq!(cli(&rig, &["point", "delete", "../vms"]).await.0, 4);
    // Rules can be given at once.
    let folder = rig.service.folder.path().join("another");
    std::fs::create_dir(&folder).unwrap();
    let add = ["repo", "add", folder.to_str().unwrap(), "--id", "another", "--keep-weekly", "4"];
    assert_eq!(cli(&rig, &add).await.0, 0);
    let repository = rig.service.get("/api/v1/repositories/another").await.json();
    assert_eq!(repository["retention"], json!({"keep_weekly": 4}));
}
