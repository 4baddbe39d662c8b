//! Events delivered to receivers that work, hang, refuse, redirect, are away, and come back.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use blockyard::clock::UtcTime;
use blockyard::serve::Service;
use blockyard::store::Store;
use blockyard::store::events::{self, Actor};
use blockyard::webhooks::{Patience, Webhook};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use crate::rig::{DEADLINE, Plan, Rig, id_of};
use crate::support::{self, TestService};

const SECRET: &str = "a-secret-of-the-receiver";

/// One POST as it came.
#[derive(Clone, Debug)]
struct Received {
    headers: HeaderMap,
    body: String,
}

impl Received {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn seq(&self) -> i64 {
        self.json()["seq"].as_i64().unwrap()
    }
}

/// How a receiver answers.
#[derive(Clone, Debug)]
enum Manner {
    Accept,
    Status(u16),
    RedirectTo(String),
    Hang,
}

#[derive(Clone)]
struct Desk {
    manner: Arc<Mutex<Manner>>,
    sender: mpsc::UnboundedSender<Received>,
}

/// A small receiver. Dropped, it is gone.
struct Receiver {
    address: SocketAddr,
    manner: Arc<Mutex<Manner>>,
    received: mpsc::UnboundedReceiver<Received>,
    server: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn receive(State(desk): State<Desk>, headers: HeaderMap, body: Bytes) -> axum::response::Response {
    let manner = desk.manner.lock().unwrap().clone();
    desk.sender.send(Received { headers, body: String::from_utf8(body.to_vec()).unwrap() }).unwrap();
    match manner {
        Manner::Accept => StatusCode::NO_CONTENT.into_response(),
        Manner::Status(status) => StatusCode::from_u16(status).unwrap().into_response(),
        Manner::RedirectTo(url) => (StatusCode::TEMPORARY_REDIRECT, [("location", url)]).into_response(),
        Manner::Hang => std::future::pending().await,
    }
}

impl Receiver {
    async fn start() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), Manner::Accept).await
    }

    async fn at(address: SocketAddr, manner: Manner) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let (sender, received) = mpsc::unbounded_channel();
        let (address, manner) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(manner)));
        let router = Router::new().fallback(receive).with_state(Desk { manner: Arc::clone(&manner), sender });
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, manner, received, server }
    }

    fn be(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    async fn next(&mut self) -> Received {
        tokio::time::timeout(DEADLINE, self.received.recv()).await.expect("nothing is delivered").unwrap()
    }

    /// Everything up to the first for which this holds.
    async fn until(&mut self, holds: impl Fn(&Value) -> bool) -> Vec<Received> {
        let mut all = Vec::new();
        loop {
            all.push(self.next().await);
            if holds(&all.last().unwrap().json()) {
                return all;
            }
        }
    }

    /// The configuration of a webhook that delivers here.
    fn toml(&self, folder: &Path, events: &str) -> String {
        std::fs::write(folder.join("webhook-secret"), format!("{SECRET}\n")).unwrap();
        let address = self.address;
        format!(
            "[webhooks.siem]\nurl = \"http://{address}/hook\"\nsecret_file = \"{{folder}}/webhook-secret\"\nevents = [{events}]\n"
        )
    }
}

fn is_end(event: &Value) -> bool {
    event["kind"] == "job.state" && ["committed", "failed", "cancelled"].contains(&event["state"].as_str().unwrap())
}

/// Runs the verification that the documentation gives to people who write receivers.
fn is_genuine(secret: &str, received: &Received, body: &str) -> bool {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/events.md");
    let text = std::fs::read_to_string(path).unwrap();
    let code =
        text.split("```python\n").nth(1).and_then(|rest| rest.split("```").next()).expect("no Python in the page");
    let main = "\nimport json, sys\ngiven = json.load(sys.stdin)\n\
                print(is_genuine(given['secret'].encode(), given['headers'], given['body'].encode()))\n";
    let headers: serde_json::Map<String, Value> =
        received.headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().into())).collect();
    let mut child = Command::new("python3")
        .args(["-c", &format!("{code}{main}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3: install the package python3");
    let given = json!({"secret": secret, "headers": headers, "body": body}).to_string();
    child.stdin.take().unwrap().write_all(given.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    match String::from_utf8(output.stdout).unwrap().trim() {
        "True" => true,
        "False" => false,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_delivered_signed_and_in_order() {
    let mut receiver = Receiver::start().await;
    let folder = tempfile::tempdir().unwrap();
    let toml = receiver.toml(folder.path(), "");
    let rig = Rig::in_folder(folder, Plan { toml, ..Plan::default() }).await;
    let started = rig.start().await;
    let all = receiver.until(is_end).await;
    let seqs: Vec<i64> = all.iter().map(Received::seq).collect();
    assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>(), "each once, in order, from the first on");
    let store = &rig.service.service.app().store;
    let stored = events::after(&mut store.read().await.unwrap(), 0, None, 1000).await.unwrap();
    for (received, stored) in all.iter().zip(&stored) {
        let mut expected = stored.told();
        expected["kind"] = stored.kind.as_str().into();
        assert_eq!(received.json(), expected);
        let header = |name: &str| received.headers[name].to_str().unwrap().to_owned();
        assert_eq!(header("blockyard-event"), stored.kind);
        assert_eq!(header("blockyard-delivery"), stored.sequence.to_string());
        assert_eq!(header("content-type"), "application/json");
    }
    assert!(all.iter().any(|received| received.json()["job_id"] == started["backup_id"]));
    let one = &all[3];
    assert!(is_genuine(SECRET, one, &one.body));
    assert!(!is_genuine("another", one, &one.body));
    assert!(!is_genuine(SECRET, one, &one.body.replace("\"seq\":4", "\"seq\":5")));
    let mut old = one.clone();
    old.headers.insert("blockyard-timestamp", "1700000000".parse().unwrap());
    assert!(!is_genuine(SECRET, &old, &one.body), "recorded and sent again");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_kinds_of_the_configuration_are_delivered_and_a_new_webhook_begins_with_what_is_new() {
    let mut receiver = Receiver::start().await;
    // What happened before nobody wants to hear.
    let rig = Rig::new().await;
    rig.back_up().await;
    let (node, vm, ports, disks) = (rig.node, rig.vm, rig.ports, rig.disks);
    let folder = rig.service.stop().await;
    let toml = receiver.toml(folder.path(), "\"point.committed\"");
    let toml = crate::rig::configuration(&node.url(), folder.path(), &ports, &toml);
    let service = TestService::start_in(folder, &toml).await;
    node.reconfigure(|config| config.hub_url = service.service.url());
    let repository = service.folder.path().join("main");
    let rig = Rig { service, node, vm, repository, disks, ports };
    for expected in [2, 3] {
        let backup = rig.back_up().await;
        let received = receiver.next().await.json();
        assert_eq!((&received["kind"], &received["sequence"]), (&json!("point.committed"), &json!(expected)));
        assert_eq!(received["point_id"], backup["backup_id"]);
    }
    // Without the webhook in the configuration its place is forgotten, and with it again it is new.
    let (node, ports) = (rig.node, rig.ports);
    let folder = rig.service.stop().await;
    let toml = crate::rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    append(&service.service.app().store, "point.committed", 7).await;
    let folder = service.stop().await;
    let toml = receiver.toml(folder.path(), "\"point.committed\"");
    let toml = crate::rig::configuration(&node.url(), folder.path(), &ports, &toml);
    let service = TestService::start_in(folder, &toml).await;
    append(&service.service.app().store, "point.committed", 8).await;
    assert_eq!(receiver.next().await.json()["n"], 8);
}

async fn append(store: &Store, kind: &str, n: u32) -> i64 {
    let mut transaction = store.write().await.unwrap();
    let at = UtcTime::now();
    let number = events::append(&mut transaction, kind, "x", &json!({"n": n}), Actor::Service, at).await.unwrap();
    transaction.commit().await.unwrap();
    number
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_hangs_delays_no_job_and_no_stop_and_is_told_again_after_a_restart() {
    let mut receiver = Receiver::start().await;
    receiver.be(Manner::Hang);
    let folder = tempfile::tempdir().unwrap();
    let more = receiver.toml(folder.path(), "");
    let rig = Rig::in_folder(folder, Plan { toml: more.clone(), ..Plan::default() }).await;
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(receiver.next().await.seq(), 1);
    let (node, ports) = (rig.node, rig.ports);
    let folder = tokio::time::timeout(DEADLINE, rig.service.stop()).await.expect("the stop waits for the receiver");
    receiver.be(Manner::Accept);
    let toml = crate::rig::configuration(&node.url(), folder.path(), &ports, &more);
    let service = TestService::start_in(folder, &toml).await;
    let all = receiver.until(is_end).await;
    let seqs: Vec<i64> = all.iter().map(Received::seq).collect();
    assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>(), "the first once more, then the others");
    assert!(all.iter().any(|received| received.json()["job_id"] == *id_of(&backup)));
    // What was accepted is not sent again, but perhaps the last one: the stop may come before its acceptance is recorded.
    let folder = service.stop().await;
    let service = TestService::start_in(folder, &toml).await;
    let number = append(&service.service.app().store, "alert", 1).await;
    let rest = receiver.until(|event| event["seq"] == number).await;
    let first = rest[0].seq();
    assert!(first >= seqs.len() as i64, "{first} was accepted long ago");
    assert_eq!(rest.iter().map(Received::seq).collect::<Vec<_>>(), (first..=number).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_was_away_or_in_trouble_gets_everything_in_order() {
    let receiver = Receiver::start().await;
    let address = receiver.address;
    let folder = tempfile::tempdir().unwrap();
    let toml = receiver.toml(folder.path(), "\"alert\"");
    // Nobody listens there any more.
    receiver.server.abort();
    drop(receiver);
    let service = TestService::start_in(folder, &toml).await;
    let store = &service.service.app().store;
    let first = append(store, "alert", 1).await;
    append(store, "job.state", 2).await;
    let third = append(store, "alert", 3).await;
    let mut receiver = Receiver::at(address, Manner::Status(503)).await;
    assert_eq!(receiver.next().await.seq(), first);
    receiver.be(Manner::Status(429));
    assert_eq!(receiver.next().await.seq(), first);
    receiver.be(Manner::Accept);
    let mut seqs = Vec::new();
    while seqs.last() != Some(&third) {
        seqs.push(receiver.next().await.seq());
    }
    seqs.dedup();
    assert_eq!(seqs, [first, third]);
}

/// Starts a webhook with little patience on a database of its own.
async fn impatient(receiver: &Receiver, folder: &Path) -> (Store, JoinSet<()>) {
    let toml = receiver.toml(folder, "").replace("{folder}", folder.to_str().unwrap());
    let config = support::config(folder, &toml);
    let patience = Patience { first: Duration::from_millis(1), longest: Duration::from_millis(5), refusals: 3 };
    let store = Store::open(&folder.join("blockyard.db")).await.unwrap();
    let mut tasks = JoinSet::new();
    Webhook::start(Webhook::all(&config, patience).unwrap(), &store, &mut tasks).await.unwrap();
    (store, tasks)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed_and_an_event_that_is_refused_is_passed_over() {
    let (mut receiver, mut elsewhere) = (Receiver::start().await, Receiver::start().await);
    let folder = tempfile::tempdir().unwrap();
    let (store, _tasks) = impatient(&receiver, folder.path()).await;
    for manner in [Manner::RedirectTo(format!("http://{}/", elsewhere.address)), Manner::Status(400)] {
        receiver.be(manner);
        let number = append(&store, "alert", 1).await;
        for _ in 0..3 {
            assert_eq!(receiver.next().await.seq(), number);
        }
    }
    receiver.be(Manner::Accept);
    let next = append(&store, "alert", 2).await;
    // The change may come in between two attempts at the one before; it was tried three times and no more.
    assert_eq!(receiver.next().await.seq(), next);
    assert!(elsewhere.received.try_recv().is_err(), "an event went where nobody sent it");
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_that_lasts_is_never_given_up() {
    let mut receiver = Receiver::start().await;
    receiver.be(Manner::Status(500));
    let folder = tempfile::tempdir().unwrap();
    let (store, _tasks) = impatient(&receiver, folder.path()).await;
    let first = append(&store, "alert", 1).await;
    let second = append(&store, "alert", 2).await;
    for _ in 0..30 {
        assert_eq!(receiver.next().await.seq(), first, "ten times what a refusal gets");
    }
    receiver.be(Manner::Accept);
    while receiver.next().await.seq() != second {}
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_secret_file_of_a_webhook_refuses_the_start() {
    for content in [None, Some("\n")] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hook");
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        let toml = format!("[webhooks.siem]\nurl = \"http://127.0.0.1:9/\"\nsecret_file = {file:?}\n");
        let error = Service::start(support::config(folder.path(), &toml)).await.unwrap_err();
        let text = blockyard::telemetry::Chain(&error).to_string();
        assert!(text.contains("webhook siem") && text.contains(file.to_str().unwrap()), "{text}");
    }
}
