//! `Idempotency-Key`: a start request that is repeated, at once, later, after a restart and with another body.

use std::time::Duration;

use blockyard::node::fake::{Event, Faults, PausePoint, StartFault};
use reqwest::Method;
use serde_json::{Value, json};

use crate::process::{Child, Running, sqlite};
use crate::rig::{self, Rig, id_of};
use crate::support::{self, Answer};

async fn start(rig: &Rig, path: &str, key: &str, body: &Value) -> Answer {
    support::send(rig.service.request(Method::POST, path).header("idempotency-key", key).json(body)).await
}

fn calls(rig: &Rig) -> usize {
    rig.node.log().calls().len()
}

async fn jobs(rig: &Rig) -> Value {
    rig.service.get("/api/v1/backups").await.expect_status(200).json()["total"].clone()
}

fn expect_replay_of(first: &Answer, again: &Answer) {
    assert_eq!((again.status, &again.text), (first.status, &first.text));
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.headers.get("location"), first.headers.get("location"));
    assert_eq!(again.headers.get("content-type"), first.headers.get("content-type"));
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_start_with_the_same_key_makes_one_job_and_one_node_call() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let body = rig.start_body();
    let first = start(&rig, "/api/v1/backups/vm", "nightly-1", &body).await.expect_status(200);
    assert!(first.headers.get("idempotency-replayed").is_none());
    let id = id_of(&first.json()).to_owned();
    assert_eq!(first.header("location"), format!("/api/v1/backups/{id}"));
    // While the job runs, by the other route, and when it is over.
    expect_replay_of(&first, &start(&rig, "/api/v1/backups/vm", "nightly-1", &body).await);
    expect_replay_of(&first, &start(&rig, "/api/v1/backups", "nightly-1", &body).await);
    rig.node.reconfigure(|config| config.faults = Faults::default());
    rig.node.resume();
    assert_eq!(rig.end_of(&id).await["state"], "committed");
    expect_replay_of(&first, &start(&rig, "/api/v1/backups/vm", "nightly-1", &body).await);
    assert_eq!((calls(&rig), jobs(&rig).await), (1, json!(1)));
    // The same document in another spelling is the same request.
    let text =
        format!(r#"{{ "backup_type": "auto",  "repository_id": "main", "vm_context_id": {} }}"#, body["vm_context_id"]);
    let request = rig.service.request(Method::POST, "/api/v1/backups/vm").header("idempotency-key", "nightly-1");
    let again = support::send(request.header("content-type", "application/json").body(text)).await;
    expect_replay_of(&first, &again);
    // Another key is another request.
    let second = start(&rig, "/api/v1/backups/vm", "nightly-2", &body).await.expect_status(200).json();
    assert_ne!(id_of(&second), id);
    assert_eq!(rig.end_of(id_of(&second)).await["state"], "committed");
    assert_eq!(calls(&rig), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_belongs_to_one_body() {
    let rig = Rig::new().await;
    let first = start(&rig, "/api/v1/backups/vm", "k", &rig.start_body()).await.expect_status(200).json();
    let mut other = rig.start_body();
    other["backup_type"] = "full".into();
    start(&rig, "/api/v1/backups/vm", "k", &other).await.expect_problem(422, "idempotency_key_reused");
    for key in ["", &"k".repeat(256)] {
        start(&rig, "/api/v1/backups/vm", key, &other).await.expect_problem(400, "invalid_field");
    }
    assert_eq!(rig.end_of(id_of(&first)).await["state"], "committed");
    assert_eq!(jobs(&rig).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn repeats_at_once_start_one_job_and_are_told_that_it_runs() {
    let rig = Rig::faulty(Faults { start: StartFault::Hang { launch: false }, ..Faults::default() }).await;
    let body = rig.start_body();
    // The caller hangs up while the node does not answer, and comes again.
    let request = rig.service.request(Method::POST, "/api/v1/backups/vm").header("idempotency-key", "k").json(&body);
    let gone = tokio::spawn(request.timeout(Duration::from_secs(60)).send());
    rig.seen(|event| matches!(event, Event::Called(_)).then_some(())).await;
    gone.abort();
    for _ in 0..5 {
        start(&rig, "/api/v1/backups/vm", "k", &body).await.expect_problem(409, "idempotency_in_progress");
    }
    let mut other = body.clone();
    other["backup_type"] = "full".into();
    start(&rig, "/api/v1/backups/vm", "k", &other).await.expect_problem(422, "idempotency_key_reused");
    // `jobs.answer_within_s` later there is an answer, although nobody waited for it.
    let answered = async {
        loop {
            let again = start(&rig, "/api/v1/backups/vm", "k", &body).await;
            if again.status != 409 {
                return again;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let again = tokio::time::timeout(rig::DEADLINE, answered).await.expect("never answered").expect_status(200);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.json()["status"], "starting");
    assert_eq!((calls(&rig), jobs(&rig).await), (1, json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_first_requests_at_once_make_one_job() {
    let rig = Rig::new().await;
    let body = rig.start_body();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let request = rig.service.request(Method::POST, "/api/v1/backups/vm").header("idempotency-key", "k");
        all.spawn(support::send(request.json(&body)));
    }
    let answers = all.join_all().await;
    let mut first = None;
    for answer in answers {
        if answer.status == 200 {
            let id = id_of(&answer.json()).to_owned();
            assert_eq!(*first.get_or_insert(id.clone()), id);
        } else {
            answer.expect_problem(409, "idempotency_in_progress");
        }
    }
    assert_eq!(rig.end_of(&first.expect("nobody was answered")).await["state"], "committed");
    assert_eq!((calls(&rig), jobs(&rig).await), (1, json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_a_job_is_repeated_and_a_refusal_is_not() {
    let fault = StartFault::Status { status: 500, launch: false };
    let rig = Rig::faulty(Faults { start: fault, ..Faults::default() }).await;
    let body = rig.start_body();
    let first = start(&rig, "/api/v1/backups/vm", "k", &body).await;
    let failed = first.expect_problem(502, "node_rejected");
    rig.node.reconfigure(|config| config.faults = Faults::default());
    let again = start(&rig, "/api/v1/backups/vm", "k", &body).await;
    again.expect_problem(502, "node_rejected");
    expect_replay_of(&first, &again);
    assert_eq!(again.json()["backup_id"], failed["backup_id"]);
    assert_eq!((calls(&rig), jobs(&rig).await), (1, json!(1)));

    // A request that made no job is looked at anew.
    let mut unknown = body.clone();
    unknown["repository_id"] = "later".into();
    start(&rig, "/api/v1/backups/vm", "k2", &unknown).await.expect_problem(404, "repository_not_found");
    rig.service.add_repository("later").await;
    let started = start(&rig, "/api/v1/backups/vm", "k2", &unknown).await.expect_status(200);
    assert!(started.headers.get("idempotency-replayed").is_none());
    assert_eq!(rig.end_of(id_of(&started.json())).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_has_expired_starts_anew() {
    let toml = "[jobs]\nidempotency_ttl_s = 3600\n".to_owned();
    let rig = Rig::with(rig::Plan { toml, ..rig::Plan::default() }).await;
    let body = rig.start_body();
    let first = start(&rig, "/api/v1/backups/vm", "k", &body).await.expect_status(200).json();
    assert_eq!(rig.end_of(id_of(&first)).await["state"], "committed");
    let database = rig.service.folder.path().join("state/blockyard.db");
    // As if an hour had passed: the time to live is what was configured.
    let an_hour =
        "UPDATE idempotency_keys SET expires_at = strftime('%Y-%m-%dT%H:%M:%fZ', expires_at, '-3600 seconds')";
    sqlite(&database, an_hour).await;
    let second = start(&rig, "/api/v1/backups/vm", "k", &body).await.expect_status(200).json();
    assert_ne!(id_of(&first), id_of(&second));
    assert_eq!(rig.end_of(id_of(&second)).await["state"], "committed");
}

async fn start_with_key(running: &Running, vm: &str) -> Answer {
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let url = format!("{}/api/v1/backups/vm", running.process.url);
    let request = running.http.post(url).bearer_auth(&running.token).header("idempotency-key", "k");
    support::send(request.json(&body)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_a_key_answers_with_what_became_of_its_job() {
    // Killed before the answer: the node has not answered yet.
    let child = Child::new(Faults { start: StartFault::Hang { launch: false }, ..Faults::default() }).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let url = format!("{}/api/v1/backups/vm", running.process.url);
    let request = running.http.post(url).bearer_auth(&running.token).header("idempotency-key", "k").json(&body);
    let cut = tokio::spawn(request.send());
    let called = child.node.log().first(|event| matches!(event, Event::Called(_)).then_some(()));
    tokio::time::timeout(rig::DEADLINE, called).await.expect("the node was never called");
    running.process.signal("KILL");
    running.process.wait();
    assert!(cut.await.unwrap().is_err());

    child.node.reconfigure(|config| config.faults = Faults::default());
    let running = child.start();
    let again = start_with_key(&running, &vm).await;
    let problem = again.expect_problem(409, "backup_ended");
    assert_eq!(again.header("idempotency-replayed"), "true");
    let id = problem["backup_id"].as_str().unwrap();
    assert_eq!(problem["links"]["backup"], format!("/api/v1/backups/{id}"));
    assert_eq!(running.get(&format!("/backups/{id}")).await["code"], "service_restart");
    assert_eq!(running.get("/backups").await["total"], 1);

    // Had the job been published before the process died, the answer would be its record.
    let database = child.folder.path().join("state/blockyard.db");
    let started = running.back_up(&vm).await;
    assert_eq!(running.end_of(id_of(&started)).await["state"], "committed");
    sqlite(&database, &format!("UPDATE idempotency_keys SET backup_id = '{}'", id_of(&started))).await;
    let again = start_with_key(&running, &vm).await.expect_status(200);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.header("location"), format!("/api/v1/backups/{}", id_of(&started)));
    assert_eq!((&again.json()["backup_id"], &again.json()["status"]), (&started["backup_id"], &json!("completed")));
}
