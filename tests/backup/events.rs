//! What is told of a backup while it runs and afterwards, and how readers come and go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use blockyard::app::Phase;
use blockyard::clock::UtcTime;
use blockyard::node::fake::{Faults, PausePoint};
use blockyard::store::events::{self, Actor};
use serde_json::{Value, json};

use crate::process::{Child, sqlite};
use crate::rig::{self, Plan, Rig, content, id_of};
use crate::sse::{Message, Stream, ids};
use crate::support::TestService;

/// The states of one disk, in the order in which they were told.
fn states_of(messages: &[Message], disk_id: u64) -> Vec<&str> {
    let of_disk = messages.iter().filter(|message| message.event == "disk.state" && message.data["disk_id"] == disk_id);
    of_disk.map(|message| message.data["state"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_show_every_disk_moving_and_resume_after_a_break() {
    let disks = vec![(2000, content(1, 5 << 20)), (2016, content(2, 3 << 20)), (16_000, content(3, 1 << 20))];
    let faults = Faults { pause: Some(PausePoint::BeforeComplete(2)), ..Faults::default() };
    let rig = Rig::with(Plan { disks, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    let path = format!("/backups/{}/events", id_of(&started));
    let mut stream = Stream::open(&rig, &path, None).await;
    let (mut seen, mut whole) = (Vec::new(), BTreeMap::new());
    while whole.len() < 3 {
        let message = stream.next().await.expect("the stream ended");
        if message.event == "disk.progress" && message.data["covered_bytes"] == message.data["size_bytes"] {
            whole.insert(message.data["disk_id"].as_u64().unwrap(), message.data.clone());
        }
        seen.push(message);
    }
    let last = &whole[&2];
    assert_eq!((&last["state"], &last["percent"], &last["eta_s"]), (&json!("writing"), &json!(100.0), &json!(0)));
    assert_eq!((&last["connections"], &last["identical_bytes"]), (&json!(2), &json!(0)));
    assert_eq!(last["job_id"], started["backup_id"]);
    let sum = last["written_bytes"].as_u64().unwrap() + last["zeroed_bytes"].as_u64().unwrap();
    assert_eq!(sum, 1 << 20);
    for member in ["rate_bps", "bottleneck", "seq", "at"] {
        assert!(last.get(member).is_some(), "{member} in {last}");
    }
    // The link breaks, the backup goes on and ends, and the reader comes again.
    drop(stream);
    let broken_at = *ids(&seen).last().unwrap();
    rig.node.resume();
    rig.end_of(id_of(&started)).await;
    seen.extend(Stream::open(&rig, &path, Some(broken_at)).await.rest().await);
    let all = Stream::open(&rig, &path, None).await.rest().await;
    assert_eq!(ids(&seen), ids(&all), "no gap and no duplicate");
    for disk in 0..3 {
        let expected = ["listening", "connected", "writing", "draining", "sealed"];
        assert_eq!(states_of(&seen, disk), expected, "disk {disk}");
    }
    let end = seen.last().unwrap();
    assert_eq!((end.event.as_str(), &end.data["state"]), ("job.state", &json!("committed")));
    assert_eq!(
        (&end.data["result"], &end.data["code"], &end.data["by"]),
        (&json!("success"), &json!(null), &json!("service"))
    );
    assert_eq!(end.data["vm_context_id"], rig.vm);
    assert!(seen.iter().any(|message| message.event == "point.committed" && message.data["sequence"] == 1));
    for message in &seen {
        let stored = message.id.map_or(message.event == "disk.progress", |id| message.data["seq"] == id);
        assert!(stored && message.data["at"].as_str().unwrap().ends_with('Z'), "{message:?}");
    }
    expect_progress_at_most_twice_a_second(&seen);
}

fn expect_progress_at_most_twice_a_second(messages: &[Message]) {
    let mut before: BTreeMap<u64, UtcTime> = BTreeMap::new();
    for message in messages.iter().filter(|message| message.event == "disk.progress") {
        let at: UtcTime = message.data["at"].as_str().unwrap().parse().unwrap();
        if let Some(before) = before.insert(message.data["disk_id"].as_u64().unwrap(), at) {
            // Times are whole milliseconds.
            assert!(at.seconds_since(before) >= 0.498, "{before} {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_may_come_again_at_every_event_and_is_told_exactly_the_rest() {
    let rig = Rig::new().await;
    let mut everything = Stream::open(&rig, "/events", None).await;
    let started = rig.start().await;
    let path = format!("/backups/{}/events", id_of(&started));
    // Two readers at once, and one of everything.
    let (first, second) = tokio::join!(async { Stream::open(&rig, &path, None).await.rest().await }, async {
        Stream::open(&rig, &path, None).await.rest().await
    });
    let all = ids(&first);
    assert_eq!(all, ids(&second));
    assert!(all.is_sorted_by(|a, b| a < b) && all.len() > 15, "{all:?}");
    let mut others = Vec::new();
    let is_last = |message: &Message| message.id == all.last().copied();
    let last = everything.until(is_last, &mut others).await;
    assert_eq!(last.data["state"], "committed");
    others.retain(|message| {
        message.data["job_id"] == started["backup_id"] || message.data["point_id"] == started["backup_id"]
    });
    others.push(last);
    assert_eq!(ids(&others), all);
    for (index, id) in all.iter().enumerate() {
        let rest = Stream::open(&rig, &path, Some(*id)).await.rest().await;
        assert_eq!(ids(&rest), all[index + 1..], "after {id}");
        let query = format!("{path}?last_event_id={id}");
        assert_eq!(ids(&Stream::open(&rig, &query, None).await.rest().await), all[index + 1..], "after {id}");
    }
    // What comes later about the restore point is not of the backup any more.
    let store = &rig.service.service.app().store;
    let mut transaction = store.write().await.unwrap();
    let data = json!({"point_id": started["backup_id"]});
    events::append(&mut transaction, "point.trust", id_of(&started), &data, Actor::Service, UtcTime::now())
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(ids(&Stream::open(&rig, &path, None).await.rest().await), all);
    assert!(Stream::open(&rig, &path, all.last().copied()).await.rest().await.is_empty());
    // The header wins over the query, which a browser repeats as it was.
    let query = format!("{path}?last_event_id=0");
    assert!(Stream::open(&rig, &query, all.last().copied()).await.rest().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_kinds_and_the_subject_asked_for_are_told() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    rig.end_of(id_of(&started)).await;
    let second = rig.back_up().await;
    let path = format!("/backups/{}/events?kind=job.state,point.committed", id_of(&started));
    let told = Stream::open(&rig, &path, None).await.rest().await;
    assert_eq!(told.len(), 8, "seven states and a point: {told:#?}");
    // A stream of which nothing is wanted ends all the same.
    let path = format!("/backups/{}/events?kind=alert", id_of(&started));
    assert_eq!(Stream::open(&rig, &path, None).await.rest().await, []);
    let path = format!("/events?subject={}&last_event_id=0", id_of(&second));
    let first = Stream::open(&rig, &path, None).await.next().await.unwrap();
    assert_eq!((&first.data["job_id"], &first.data["state"]), (&second["backup_id"], &json!("accepted")));

    for path in ["/events?last_event_id=x", "/events?last_event_id=-1", "/events?kind=job.stat", "/events?kinds=alert"]
    {
        rig.service.get(&format!("/api/v1{path}")).await.expect_problem(400, "invalid_field");
    }
    let missing = blockyard::id::BackupId::new();
    rig.service.get(&format!("/api/v1/backups/{missing}/events")).await.expect_problem(404, "backup_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_are_gone_are_told_as_a_gap() {
    let rig = Rig::new().await;
    let started = rig.back_up().await;
    let path = format!("/backups/{}/events", id_of(&started));
    let all = ids(&Stream::open(&rig, &path, None).await.rest().await);
    let store = &rig.service.service.app().store;
    let mut transaction = store.write().await.unwrap();
    let removed = events::remove_before(&mut transaction, UtcTime::now().plus_seconds(60), 5).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(removed, 5);
    let mut stream = Stream::open(&rig, &path, Some(1)).await;
    let gap = stream.next().await.unwrap();
    assert_eq!((gap.event.as_str(), gap.id), ("gap", None));
    assert_eq!(gap.data, json!({"after": 1, "next": 6}));
    assert_eq!(ids(&stream.rest().await), all.into_iter().filter(|id| *id > 5).collect::<Vec<_>>());
    // Nothing is missing for who has seen the last that is gone.
    let first = Stream::open(&rig, &path, Some(5)).await.next().await.unwrap();
    assert_eq!(first.id, Some(6));
    // A number that was never given is of another database: the backup is told from its beginning.
    let mut stream = Stream::open(&rig, &path, Some(1 << 40)).await;
    assert_eq!(stream.next().await.unwrap().event, "gap");
    assert_eq!(stream.next().await.unwrap().id, Some(6));
    // The newest stays: its number says where the next ones begin.
    let mut transaction = store.write().await.unwrap();
    events::remove_before(&mut transaction, UtcTime::now().plus_seconds(60), 1000).await.unwrap();
    let (oldest, newest) = events::bounds(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(oldest, newest);
    // A backup of which nothing is left to tell ends at once.
    let told = Stream::open(&rig, &path, None).await.rest().await;
    assert!(told.len() <= 1, "{told:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_events_are_removed_after_the_days_that_the_configuration_says() {
    let service = TestService::start_with("[observability]\nevents_keep_days = 0\n").await;
    let insert = |days: u64| {
        let store = service.service.app().store.clone();
        async move {
            let mut transaction = store.write().await.unwrap();
            let at = UtcTime::now().minus_seconds(days * 86_400 + 60);
            let number =
                events::append(&mut transaction, "alert", "x", &json!({"alert": "x"}), Actor::Service, at).await;
            transaction.commit().await.unwrap();
            number.unwrap()
        }
    };
    let numbers = [insert(400).await, insert(31).await, insert(29).await, insert(0).await];
    let mut folder = service.stop().await;
    for (keep_days, oldest) in [(0, numbers[0]), (399, numbers[1]), (30, numbers[2])] {
        let toml = format!("[observability]\nevents_keep_days = {keep_days}\n");
        let service = TestService::start_in(folder, &toml).await;
        let store = service.service.app().store.clone();
        let removed = async {
            let mut commits = store.watch_commits();
            while events::bounds(&mut store.read().await.unwrap()).await.unwrap().0 != oldest {
                let _ = tokio::time::timeout(Duration::from_millis(100), commits.changed()).await;
            }
        };
        tokio::time::timeout(rig::DEADLINE, removed).await.unwrap_or_else(|_| panic!("{keep_days} days"));
        folder = service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn open_streams_end_with_the_service_and_do_not_hold_it_up() {
    let faults = Faults { pause: Some(PausePoint::BeforeComplete(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml: "[server]\ndrain_s = 1\n".to_owned(), faults, ..Plan::default() }).await;
    let everything = Stream::open(&rig, "/events", None).await;
    let started = rig.start().await;
    let backup = Stream::open(&rig, &format!("/backups/{}/events", id_of(&started)), None).await;
    // Readers that never read: what the system keeps for them is all they get.
    let idle = Stream::open(&rig, "/events?last_event_id=0", None).await;
    rig.paused().await;
    let app = Arc::clone(rig.service.service.app());
    let stop = tokio::spawn(rig.service.stop());
    let told = backup.rest().await;
    let end = told.last().unwrap();
    assert_eq!((&end.data["state"], &end.data["code"]), (&json!("failed"), &json!("service_restart")));
    let everything = everything.rest().await;
    // Told to end, when no job could have anything to say any more: not cut, nor ended by a database that was gone.
    assert_eq!(app.phase(), Phase::Closing);
    assert_eq!(ids(&everything).last(), ids(&told).last(), "the ends of jobs are told before the service goes");
    tokio::time::timeout(rig::DEADLINE, stop).await.expect("the stop ends").unwrap();
    assert_eq!(Arc::strong_count(&app), 1, "a stream has outlived the service");
    drop(idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_coming_and_going_of_a_client_is_told_while_it_happens() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let started = rig.start().await;
    let path = format!("/backups/{}/events?kind=disk.state", id_of(&started));
    let mut stream = Stream::open(&rig, &path, None).await;
    let uri = format!("nbd://127.0.0.1:{}/db-server-disk1", started["disk_results"][1]["nbd_port"]);
    let mut steps = Vec::new();
    let mut next = async |expected: &str| {
        let message = stream.until(|message| message.data["disk_id"] == 1, &mut Vec::new()).await;
        assert_eq!(message.data["state"], expected, "{message:?}");
        steps.push(message.data);
    };
    next("listening").await;
    let mut link = rig::Nbd::connect(&uri);
    next("connected").await;
    link.write(0, &[1; 512]).unwrap();
    next("writing").await;
    drop(link);
    next("disconnected").await;
    let _link = rig::Nbd::connect(&uri);
    next("writing").await;
    rig.cancel(id_of(&started)).await;
    rig.end_of(id_of(&started)).await;
    for pair in steps.windows(2) {
        assert_eq!(pair[0]["state"], pair[1]["from"]);
    }
    assert!(steps[1..].iter().all(|step| step["by"] == "client"), "{steps:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_costs_nothing_and_is_told_everything_later() {
    const EVENTS: i64 = 20_000;
    let child = Child::new(Faults::default()).await;
    let running = child.start();
    // 20 MB of events.
    let statement = format!(
        "INSERT INTO events (at, kind, subject, data) WITH RECURSIVE n(i) AS \
         (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {EVENTS}) \
         SELECT strftime('%Y-%m-%dT%H:%M:%fZ'), 'alert', 'x', json_object('alert', hex(zeroblob(500))) FROM n"
    );
    sqlite(&child.folder.path().join("state/blockyard.db"), &statement).await;
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", running.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim().to_owned();
        line.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    };
    let before = memory();
    let mut slow = Vec::new();
    for _ in 0..40 {
        let url = format!("{}/api/v1/events?last_event_id=0", running.process.url);
        // A client of its own for each, so that none waits for another.
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        slow.push(Stream::of(http.get(url).bearer_auth(&running.token)).await);
    }
    // More of them than the database has connections, and the service works.
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    assert_eq!(running.end_of(id_of(&started)).await["state"], "committed");
    let grown = memory().saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes for 40 readers of 20 MB that do not read");
    let mut stream = slow.pop().unwrap();
    let mut expected = 1;
    while expected <= EVENTS {
        assert_eq!(stream.next().await.unwrap().id, Some(expected));
        expected += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_broken_by_a_comment_and_nothing_is_lost_after_it() {
    let rig = Rig::new().await;
    let mut stream = Stream::open(&rig, "/events", None).await;
    stream.comment().await;
    // A commit that nobody told of is found by the next look.
    let statement =
        "INSERT INTO events (at, kind, subject, data) VALUES ('2026-01-01T00:00:00.000Z', 'alert', 'x', '{}')";
    sqlite(&rig.service.folder.path().join("state/blockyard.db"), statement).await;
    assert_eq!(stream.next().await.unwrap().event, "alert");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warning_is_an_event_too() {
    let disks = vec![(2000, content(1, 2 << 20)), (2016, content(1, 2 << 20))];
    let rig = Rig::with(Plan { disks, ..Plan::default() }).await;
    let mut body = rig.start_body();
    body["colour"] = "blue".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    rig.end_of(id_of(&started)).await;
    let path = format!("/backups/{}/events?kind=job.warning", id_of(&started));
    let told = Stream::open(&rig, &path, None).await.rest().await;
    let words: Vec<&Value> = told.iter().map(|message| &message.data["warning"]).collect();
    assert_eq!(words, ["unknown_field", "same_first_mib"]);
    assert!(told[0].data["detail"].as_str().unwrap().contains("colour"), "{told:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_failed_raises_an_alert() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(0)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let image = started["disk_results"][0]["qcow2_path"].as_str().unwrap();
    std::fs::remove_file(image.replace("/disk-0", ".partial/disk-0")).unwrap();
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["code"], "image_failed", "{backup:#}");
    assert_eq!(backup["disks"][0]["error_message"], backup["error_message"], "{backup:#}");
    let path = format!("/backups/{}/events?kind=alert", id_of(&started));
    let told = Stream::open(&rig, &path, None).await.rest().await;
    let alerts: Vec<&Value> = told.iter().map(|message| &message.data["alert"]).collect();
    assert_eq!(alerts, ["image_failed", "snapshot_may_be_left"]);
    assert_eq!((&told[0].data["repository_id"], &told[0].data["vm_name"]), (&json!("main"), &json!("db-server")));
    // Why it failed is told with the end too.
    let path = format!("/backups/{}/events?kind=job.state", id_of(&started));
    let end = Stream::open(&rig, &path, None).await.rest().await.pop().unwrap();
    assert_eq!((&end.data["state"], &end.data["code"]), (&json!("failed"), &json!("image_failed")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_gets_full_raises_an_alert_once_a_day() {
    let folder = tempfile::tempdir().unwrap();
    let (free, _) = blockyard::repository::directory::space(folder.path()).unwrap();
    let toml = format!("[storage]\nmin_free_bytes = {}\n", free / 5 * 3);
    let rig = Rig::in_folder(folder, Plan { toml, ..Plan::default() }).await;
    let mut stream = Stream::open(&rig, "/events?kind=alert", None).await;
    rig.back_up().await;
    let told = stream.next().await.unwrap();
    assert_eq!((&told.data["alert"], &told.data["repository_id"]), (&json!("space_low"), &json!("main")));
    assert!(told.data["free_bytes"].as_u64().unwrap() < 2 * told.data["min_free_bytes"].as_u64().unwrap());
    rig.back_up().await;
    let store = rig.service.service.app().store.clone();
    let mut transaction = store.write().await.unwrap();
    let data = json!({"alert": "last"});
    events::append(&mut transaction, "alert", "x", &data, Actor::Service, UtcTime::now()).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(stream.next().await.unwrap().data["alert"], "last", "the second backup says it again");
}
