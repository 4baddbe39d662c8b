//! Every way in which the one call to the node can go, and what it proves.

use std::time::Duration;

use blockyard::node::fake::{Event, FakeConfig, FakeNode, Faults, PausePoint, StartFault};
use serde_json::json;

use crate::cli::cli;
use crate::rig::{self, Plan, Rig, id_of};

#[tokio::test(flavor = "multi_thread")]
async fn any_failed_step_leaves_no_port_file_row_or_slot_behind() {
    let status = |status| StartFault::Status { status, launch: false };
    let definite = [
        (StartFault::StatusFailed, "VDDK is not installed"),
        (status(400), "400"),
        (status(404), "404"),
        (status(500), "500"),
        (status(501), "501"),
        (status(505), "505"),
        (StartFault::Redirect("http://127.0.0.1:1/".to_owned()), "307"),
    ];
    for (start, text) in definite {
        let what = format!("{start:?}");
        let rig = Rig::faulty(Faults { start, ..Faults::default() }).await;
        let problem = rig.try_start().await.expect_problem(502, "node_rejected");
        assert!(problem["detail"].as_str().unwrap().contains(text), "{what}: {problem}");
        assert!(!problem.to_string().contains("secret-of-the-vcenter"), "{what}: {problem}");
        // Undone before the error was answered.
        rig.expect_nothing_left(0).await;
        let backup = rig.backup(id_of(&problem)).await;
        assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("node_rejected")), "{what}");
        assert_eq!((&backup["status"], &backup["result"]), (&json!("failed"), &json!("failed")), "{what}");
        assert_eq!(backup["facets"]["snapshot_cleanup"], "unknown", "{what}: nothing was launched");
        assert_eq!(rig.node.log().calls().len(), 1, "{what}");
        rig.expect_nothing_left_and_a_backup_works(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_not_there_is_502_and_undone() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let toml = format!("[nodes.default]\nurl = \"http://{closed}\"\n");
    let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
    let problem = rig.try_start().await.expect_problem(502, "node_unreachable");
    assert_eq!(problem["retryable"], true);
    rig.expect_nothing_left(0).await;
    let backup = rig.backup(id_of(&problem)).await;
    assert_eq!(backup["code"], "node_unreachable");
    assert!(
        backup["error_message"].as_str().unwrap().starts_with("the node default cannot be reached: "),
        "{backup:#}"
    );
    let (code, text) = cli(&rig, &["backup", "show", id_of(&problem)]).await;
    let shown = |line: &str| line.split_whitespace().eq(["code", "node_unreachable"]);
    assert!(code == 0 && text.lines().any(shown), "{text}");
    rig.try_start().await.expect_problem(502, "node_unreachable");
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_accept_connections_is_502_after_the_connect_timeout() {
    // A listener whose queue is full answers no connection attempt: connecting takes for ever.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let fillers: Vec<_> = (0..8).map(|_| tokio::spawn(tokio::net::TcpStream::connect(address))).collect();
    let toml = format!("[nodes.default]\nurl = \"http://{address}\"\nconnect_timeout_s = 1\n");
    let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
    rig.try_start().await.expect_problem(502, "node_unreachable");
    rig.expect_nothing_left(0).await;
    fillers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread")]
async fn redirect_from_the_node_is_a_failure_and_not_followed() {
    let other = FakeNode::start(FakeConfig::new("http://127.0.0.1:1", Default::default())).await.unwrap();
    let start = StartFault::Redirect(format!("{}/api/v1/backup/start", other.url()));
    let rig = Rig::faulty(Faults { start, ..Faults::default() }).await;
    rig.try_start().await.expect_problem(502, "node_rejected");
    assert!(other.log().events().is_empty(), "{:?}", other.log().events());
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_timeout_that_started_anyway_is_adopted_without_a_second_call() {
    let ambiguous = [
        StartFault::Hang { launch: true },
        StartFault::Reset { launch: true },
        StartFault::Status { status: 502, launch: true },
        StartFault::Status { status: 503, launch: true },
        StartFault::Status { status: 504, launch: true },
    ];
    for start in ambiguous {
        let what = format!("{start:?}");
        // The client comes only when the caller has been answered, so that nothing is known by then.
        let faults = Faults { start, pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
        let toml = "[nodes.default]\nrequest_timeout_s = 1\nconnect_timeout_s = 1\n".to_owned();
        let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
        let started = rig.start().await;
        assert_eq!(started["status"], "starting", "{what}");
        assert_eq!(started["disk_results"][0]["status"], "starting", "{what}");
        rig.paused().await;
        rig.node.resume();
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!(backup["state"], "committed", "{what}: {backup:#}");
        assert_eq!(rig.node.log().calls().len(), 1, "{what}");
        rig.expect_restorable(id_of(&started)).await;
        rig.expect_nothing_left(1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ambiguous_start_without_a_client_is_undone_after_the_grace() {
    for start in [StartFault::Reset { launch: false }, StartFault::Status { status: 503, launch: false }] {
        let what = format!("{start:?}");
        let toml = "[jobs]\nstart_grace_s = 1\n".to_owned();
        let faults = Faults { start, ..Faults::default() };
        let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
        let started = rig.start().await;
        assert_eq!(started["status"], "starting", "{what}");
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("node_outcome_unknown")), "{what}");
        assert_eq!(backup["facets"]["snapshot_cleanup"], "alert", "{what}");
        assert_eq!(rig.node.log().calls().len(), 1, "{what}");
        rig.expect_nothing_left_and_a_backup_works(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_of_the_node_proves_the_launch_and_gives_the_client_its_time() {
    // The grace is long over when the client comes; only the node's status has told that it will.
    let faults = Faults {
        start: StartFault::Reset { launch: true },
        pause: Some(PausePoint::BeforeConnect(0)),
        ..Faults::default()
    };
    let rig = Rig::with(Plan { toml: "[jobs]\nstart_grace_s = 20\n".to_owned(), faults, ..Plan::default() }).await;
    let started = rig.start().await;
    let id: blockyard::id::BackupId = id_of(&started).parse().unwrap();
    let store = rig.service.service.app().store.clone();
    let accepted = async {
        loop {
            let row = blockyard::store::backups::load(&mut store.read().await.unwrap(), &id).await.unwrap();
            if row.node_outcome == Some(blockyard::store::backups::NodeOutcome::Accepted) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, accepted).await.expect("the node's status was never asked");
    rig.paused().await;
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_acceptance_is_an_acceptance_with_a_warning() {
    let unreadable = StartFault::Body { body: "started, somehow".to_owned(), launch: true };
    let rig = Rig::faulty(Faults { start: unreadable, ..Faults::default() }).await;
    let started = rig.start().await;
    assert_eq!(started["status"], "started");
    let warning = started["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("node_answer_malformed"), "{warning}");
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
    assert_eq!(backup["warnings"][0], warning);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_answer_is_not_waited_for_longer_than_callers_wait() {
    let faults = Faults {
        start: StartFault::Late(Duration::from_secs(3600)),
        pause: Some(PausePoint::BeforeConnect(0)),
        ..Faults::default()
    };
    let toml = "[jobs]\nanswer_within_s = 1\n".to_owned();
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    assert_eq!(started["status"], "starting");
    rig.paused().await;
    rig.node.resume();
    // The client is done before the node has answered at all.
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_done_before_the_node_has_answered_was_started() {
    let rig = Rig::faulty(Faults { start: StartFault::Late(Duration::from_secs(3600)), ..Faults::default() }).await;
    let started = rig.start().await;
    assert_eq!(started["status"], "started");
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_changes_nothing() {
    let rig = Rig::faulty(Faults { start: StartFault::Hang { launch: true }, ..Faults::default() }).await;
    let request = rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm").json(&rig.start_body());
    let caller = tokio::spawn(request.send());
    let id = rig
        .seen(|event| match event {
            Event::Launched { job_id } => Some(job_id.clone()),
            _ => None,
        })
        .await;
    caller.abort();
    let backup = rig.end_of(&id).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_nothing_left(1).await;
}
