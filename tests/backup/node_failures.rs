//! The node and its client failing at every step of their conversation with the hub, in every way that makes sense there.
//!
//! Each case is one row: what goes wrong, upon a VM with or without an older point, and how the job must end. Whatever it
//! is, afterwards nothing is left, the restore point is there with all its disks or not at all, what the point before holds
//! is untouched, and a backup without faults succeeds.

use std::sync::Arc;
use std::time::Duration;

use blockyard::node::fake::{CompleteFault, Event, Faults, Part, StartFault, StatusFault, Step, StepFault as Fault};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::rig::{self, Plan, Rig, content, id_of, tool};

/// How many there are at least.
const CASES: usize = 120;
/// How many run side by side. Most of them wait for a deadline most of their time.
const AT_ONCE: usize = 24;
/// The disks by device key, with sizes that no request ends at.
const SIZES: [(u32, usize); 3] = [(2000, 200 << 10), (2016, (96 << 10) + 512), (16_000, 160 << 10)];
const REQUEST: usize = 8 << 10;
const A_MOMENT: Duration = Duration::from_millis(200);
/// Deadlines for jobs that end by one. The others have the usual ones, so that a busy machine fails none of them.
const SHORT: &str = "[jobs]\nfirst_contact_s = 3\nstart_grace_s = 3\nidle_s = 2\nstalled_s = 2\nreconnect_s = 3\n";
const SHORT_CALLS: &str = "[nodes.default]\nconnect_timeout_s = 1\nrequest_timeout_s = 1\n";

/// What the job must come to.
#[derive(Clone, Copy, Debug)]
enum End {
    Committed,
    Failed(&'static str),
    /// Whether the two clients get in each other's way is a race; what they wrote is the same.
    Either(&'static [&'static str]),
}
use End::{Committed, Either, Failed};

/// What the VM has before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Past {
    None,
    /// A point, and changes since then.
    Point,
}

struct Case {
    name: String,
    faults: Faults,
    past: Past,
    toml: String,
    end: End,
}

impl Case {
    fn new(name: impl Into<String>, past: Past, faults: Faults, end: End) -> Self {
        let by_deadline = ["no_client", "stalled", "client_disconnected", "node_outcome_unknown"];
        let short = match end {
            Failed(code) => by_deadline.contains(&code),
            Either(_) => true,
            Committed => false,
        };
        let toml = format!("{}{SHORT_CALLS}", if short { SHORT } else { "" });
        Self { name: format!("{}, {past:?}", name.into()), faults, past, toml, end }
    }

    fn step(step: Step, fault: Fault, past: Past, end: End) -> Self {
        let faults = Faults { step: Some((step, fault)), ..Faults::default() };
        Self::new(format!("{step:?} {fault:?}"), past, faults, end)
    }

    fn start(start: StartFault, end: End) -> Self {
        Self::new(format!("{start:?}"), Past::None, Faults { start, ..Faults::default() }, end)
    }

    fn fault(&self) -> Option<Fault> {
        self.faults.step.map(|(_, fault)| fault)
    }
}

/// The answer to the one call.
fn starts() -> Vec<Case> {
    let mut cases = Vec::new();
    for launch in [false, true] {
        // A refusal is final, even when a client was started all the same: it finds nobody.
        let refusals: &[u16] = if launch { &[401, 404, 500] } else { &[400, 401, 403, 404, 409, 429, 500, 501, 505] };
        for &status in refusals {
            cases.push(Case::start(StartFault::Status { status, launch }, Failed("node_rejected")));
        }
        let unclear = if launch { Committed } else { Failed("node_outcome_unknown") };
        for status in [502, 503, 504] {
            cases.push(Case::start(StartFault::Status { status, launch }, unclear));
        }
        cases.push(Case::start(StartFault::Hang { launch }, unclear));
        cases.push(Case::start(StartFault::Reset { launch }, unclear));
        // Accepted, whatever else it said.
        let accepted = if launch { Committed } else { Failed("no_client") };
        cases.push(Case::start(StartFault::Truncated { launch }, accepted));
        for body in ["", "started, somehow", "[]", "null", "{\"status\": 7}", "{\"status\":"] {
            cases.push(Case::start(StartFault::Body { body: body.to_owned(), launch }, accepted));
        }
        let endless = StartFault::Body { body: "x".repeat(1 << 20), launch };
        cases.push(Case { name: format!("endless body, {launch}"), ..Case::start(endless, accepted) });
    }
    cases.push(Case::start(StartFault::StatusFailed, Failed("node_rejected")));
    cases.push(Case::start(StartFault::Redirect("http://127.0.0.1:1/".to_owned()), Failed("node_rejected")));
    cases.push(Case::start(StartFault::Late(A_MOMENT), Committed));
    cases.push(Case::start(StartFault::Late(Duration::from_secs(3)), Committed));
    cases.push(Case::start(
        StartFault::LaunchTwice,
        Either(&["write_after_complete", "client_disconnected", "stalled"]),
    ));
    cases
}

/// The question whether the node knows the job, which is asked where the start call told nothing.
fn statuses() -> Vec<Case> {
    let mut cases = Vec::new();
    for launch in [false, true] {
        let faults = |status| Faults { start: StartFault::Reset { launch }, status, ..Faults::default() };
        for (status, without_client) in [
            (StatusFault::None, "node_outcome_unknown"),
            (StatusFault::Status(404), "node_outcome_unknown"),
            (StatusFault::Status(401), "node_outcome_unknown"),
            (StatusFault::Status(500), "node_outcome_unknown"),
            (StatusFault::Hang, "node_outcome_unknown"),
            (StatusFault::Reset, "node_outcome_unknown"),
            (StatusFault::Late(A_MOMENT), "node_outcome_unknown"),
            // It knows the job, whatever it says of it.
            (StatusFault::Body("{\"status\": \"failed\"}".to_owned()), "no_client"),
            (StatusFault::Body("running, somehow".to_owned()), "no_client"),
            (StatusFault::Truncated, "no_client"),
        ] {
            let end = if launch { Committed } else { Failed(without_client) };
            cases.push(Case::new(format!("status {status:?}, client: {launch}"), Past::None, faults(status), end));
        }
    }
    cases
}

/// The questions for change ids. An answer that cannot be had makes the copy a whole one, never a wrong one.
fn change_ids() -> Vec<Case> {
    let mut cases = Vec::new();
    for (disk, question) in [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)] {
        let step = Step::ChangeId(disk, question);
        for fault in [
            Fault::Refused,
            Fault::Status(500),
            Fault::Malformed,
            Fault::Truncated,
            Fault::Lost,
            Fault::Slow(A_MOMENT),
            Fault::TwiceAtOnce,
            Fault::Garbled,
        ] {
            if disk == 0 || matches!(fault, Fault::Status(500) | Fault::Truncated | Fault::Lost) {
                cases.push(Case::step(step, fault, Past::Point, Committed));
            }
        }
        // Before the first question nobody knows that there is a client.
        let silent = if step == Step::ChangeId(0, 1) { "no_client" } else { "stalled" };
        for fault in [Fault::Hang, Fault::Late] {
            cases.push(Case::step(step, fault, Past::Point, Failed(silent)));
        }
    }
    cases
}

fn connections() -> Vec<Case> {
    let mut cases = Vec::new();
    for (disk, past) in [(0, Past::None), (1, Past::Point), (2, Past::None)] {
        for fault in [Fault::Slow(A_MOMENT), Fault::Twice, Fault::TwiceAtOnce, Fault::Reconnect, Fault::Garbled] {
            cases.push(Case::step(Step::Connect(disk), fault, past, Committed));
        }
        // Nothing was written yet, so nobody is missed before the whole job counts as silent.
        for fault in [Fault::Refused, Fault::Hang, Fault::Late, Fault::Die] {
            cases.push(Case::step(Step::Connect(disk), fault, past, Failed("stalled")));
        }
    }
    cases
}

fn writes() -> Vec<Case> {
    let mut cases = Vec::new();
    for (disk, part, past) in [
        (0, Part::First, Past::Point),
        (1, Part::Middle, Past::None),
        (1, Part::Middle, Past::Point),
        (2, Part::Last, Past::None),
    ] {
        let step = Step::Write(disk, part);
        for fault in [Fault::Slow(A_MOMENT), Fault::Twice, Fault::TwiceAtOnce, Fault::Reconnect, Fault::Garbled] {
            cases.push(Case::step(step, fault, past, Committed));
        }
        for fault in [Fault::Hang, Fault::Late] {
            cases.push(Case::step(step, fault, past, Failed("stalled")));
        }
        let gone = if part == Part::First { "stalled" } else { "client_disconnected" };
        cases.push(Case::step(step, Fault::Die, past, Failed(gone)));
        cases.push(Case::step(step, Fault::BrokenOff, past, Failed(gone)));
        cases.push(Case::step(step, Fault::Lost, past, Failed("client_disconnected")));
    }
    cases
}

fn telemetry() -> Vec<Case> {
    let mut cases = Vec::new();
    for (disk, past) in [(0, Past::None), (2, Past::Point)] {
        let step = Step::Telemetry(disk);
        for fault in [
            Fault::Status(500),
            Fault::Status(401),
            Fault::Malformed,
            Fault::Truncated,
            Fault::Slow(A_MOMENT),
            Fault::Twice,
            Fault::TwiceAtOnce,
            Fault::Garbled,
        ] {
            cases.push(Case::step(step, fault, past, Committed));
        }
        for fault in [Fault::Refused, Fault::Lost] {
            cases.push(Case::step(step, fault, past, Failed("client_disconnected")));
        }
        for fault in [Fault::Hang, Fault::Late] {
            cases.push(Case::step(step, fault, past, Failed("stalled")));
        }
    }
    cases
}

fn completions() -> Vec<Case> {
    let mut cases = Vec::new();
    for (disk, past) in [(0, Past::None), (1, Past::Point), (2, Past::Point)] {
        let step = Step::Complete(disk);
        for fault in [
            Fault::Malformed,
            Fault::Truncated,
            Fault::Slow(A_MOMENT),
            Fault::Twice,
            Fault::TwiceAtOnce,
            Fault::Garbled,
        ] {
            cases.push(Case::step(step, fault, past, Committed));
        }
        for fault in [Fault::Refused, Fault::Status(500), Fault::Status(401)] {
            cases.push(Case::step(step, fault, past, Failed("client_disconnected")));
        }
        for fault in [Fault::Hang, Fault::Late] {
            cases.push(Case::step(step, fault, past, Failed("stalled")));
        }
        // Sealed, and the client does not know: with the last disk the VM is there.
        let end = if disk == 2 { Committed } else { Failed("stalled") };
        cases.push(Case::step(step, Fault::Lost, past, end));
    }
    cases
}

/// Clients that do not do what they should from beginning to end.
fn manners() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, past, faults, end| cases.push(Case::new(name, past, faults, end));
    let complete = |complete| Faults { complete, ..Faults::default() };
    for past in [Past::None, Past::Point] {
        let full = past == Past::None;
        add("never comes", past, Faults { never_connect: true, ..Faults::default() }, Failed("no_client"));
        add("lies in telemetry", past, Faults { lie_in_telemetry: true, ..Faults::default() }, Committed);
        add("leaks connections", past, Faults { leak_connection: true, ..Faults::default() }, Committed);
        add("writes when all is over", past, Faults { write_after_complete: true, ..Faults::default() }, Committed);
        add(
            "copies all instead of a delta",
            past,
            Faults { full_instead_of_delta: true, ..Faults::default() },
            Committed,
        );
        add("completes twice", past, complete(CompleteFault::Twice), Committed);
        add("never completes", past, complete(CompleteFault::Never), Failed("client_disconnected"));
        add("completes another disk", past, complete(CompleteFault::Disk(1)), Failed("client_disconnected"));
        add("completes no disk", past, complete(CompleteFault::Disk(9)), Failed("client_disconnected"));
        add("completes with another id", past, complete(CompleteFault::OtherChangeId), Failed("stalled"));
        add("completes before it connects", past, complete(CompleteFault::BeforeConnect), Failed("stalled"));
        let early = if full { "coverage_incomplete" } else { "write_after_complete" };
        add("completes before it writes", past, complete(CompleteFault::Early), Failed(early));
        let dies = Faults { die_after_bytes: Some(40 << 10), ..Faults::default() };
        add("dies", past, dies, Failed("client_disconnected"));
    }
    let half = Faults { delta_instead_of_full: true, ..Faults::default() };
    add("copies a half instead of all", Past::None, half, Failed("coverage_incomplete"));
    cases
}

/// Device key and content of each disk of a VM.
type Disks = Vec<(u32, Vec<u8>)>;

/// The disks at the beginning.
fn disks() -> Disks {
    SIZES.iter().map(|&(key, size)| (key, content(key as u8, size))).collect()
}

/// More than half of every disk changes, so that every copy has several requests.
fn change(rig: &mut Rig, seed: u8) {
    let writes: Vec<_> =
        SIZES.iter().map(|&(key, size)| (key, 512, content(seed.wrapping_add(key as u8), size / 1024 * 512))).collect();
    rig.write(&writes);
}

/// Holds that a point has these disks, each with this content.
async fn expect_content(rig: &Rig, id: &str, disks: &[(u32, Vec<u8>)]) {
    let folder = rig::published(rig, id).await;
    let raw = tempfile::NamedTempFile::new().unwrap();
    for (index, (_, bytes)) in disks.iter().enumerate() {
        std::fs::write(raw.path(), bytes).unwrap();
        let (image, raw) = (folder.join(format!("disk-{index}.qcow2")), raw.path().to_str().unwrap());
        let image = image.to_str().unwrap();
        tool("qemu-utils", "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
    }
}

/// Waits until every client that was launched is gone.
async fn clients_ended(rig: &Rig) {
    let log = rig.node.log();
    let count = |events: &[Event], is: fn(&Event) -> bool| events.iter().filter(|event| is(event)).count();
    let wait = async {
        loop {
            let events = log.events();
            let launched = count(&events, |event| matches!(event, Event::Launched { .. }));
            if launched == count(&events, |event| matches!(event, Event::Ended { .. })) {
                return;
            }
            log.first_after(events.len(), |_| Some(())).await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, wait).await.expect("a client never ended");
}

async fn run(case: &Case) {
    let plan = Plan { disks: disks(), toml: case.toml.clone(), request_bytes: REQUEST, ..Plan::default() };
    let mut rig = Rig::with(plan).await;
    let mut older = Vec::new();
    if case.past == Past::Point {
        let backup = rig.back_up().await;
        assert_eq!(backup["state"], "committed", "{backup:#}");
        older.push((id_of(&backup).to_owned(), rig.disks.clone()));
        change(&mut rig, 1);
    }
    rig.node.reconfigure(|config| config.faults = case.faults.clone());
    let calls = rig.node.log().calls().len();
    let answer = rig.try_start().await;
    let id = if answer.status == 200 { id_of(&answer.json()).to_owned() } else { refused(&answer.json(), case) };
    let backup = rig.end_of(&id).await;
    expect_end(case, &backup);
    if case.fault() == Some(Fault::Late) {
        // Too late: what the client does now changes nothing.
        rig.node.resume();
        clients_ended(&rig).await;
        assert_eq!(rig.backup(&id).await, backup);
    }
    let hangs = case.fault() == Some(Fault::Hang);
    if !hangs {
        clients_ended(&rig).await;
    }
    assert_eq!(rig.node.log().calls().len(), calls + 1, "the node is called once");
    if let Some((step, _)) = case.faults.step {
        let went_wrong = rig.node.log().events().contains(&Event::WentWrong { step });
        assert!(went_wrong, "the client never came to its fault");
    }
    if backup["state"] == "committed" {
        older.push((id.clone(), rig.disks.clone()));
    }
    expect_points(&rig, &older).await;
    rig.expect_nothing_left(older.len()).await;

    rig.node.reconfigure(|config| config.faults = Faults::default());
    change(&mut rig, 2);
    let next = rig.back_up().await;
    assert_eq!(next["state"], "committed", "{next:#}");
    older.push((id_of(&next).to_owned(), rig.disks.clone()));
    expect_points(&rig, &older).await;
    rig.expect_nothing_left(older.len()).await;
    for (id, disks) in &older {
        expect_content(&rig, id, disks).await;
    }
}

/// A start that was refused has its job all the same, under the code of the answer.
fn refused(problem: &Value, case: &Case) -> String {
    assert!(matches!(case.end, Failed(code) if problem["code"] == code), "{problem}");
    id_of(problem).to_owned()
}

fn expect_end(case: &Case, backup: &Value) {
    let code = backup["code"].as_str();
    let as_told = match case.end {
        Committed => backup["state"] == "committed",
        Failed(expected) => backup["state"] == "failed" && code == Some(expected),
        Either(codes) => backup["state"] == "committed" || code.is_some_and(|code| codes.contains(&code)),
    };
    assert!(as_told, "{:?} is due: {backup:#}", case.end);
    if backup["state"] == "committed" {
        assert_eq!(backup["result"], "success", "{backup:#}");
    } else if code != Some("node_rejected") {
        // Whether there was a client or not: nobody can say that it left no snapshot.
        assert_eq!(backup["facets"]["snapshot_cleanup"], "alert", "{backup:#}");
    }
}

/// Exactly these are listed, each with all disks.
async fn expect_points(rig: &Rig, expected: &[(String, Disks)]) {
    let points = rig.points().await;
    let mut found: Vec<&str> = points.iter().map(|point| point["id"].as_str().unwrap()).collect();
    found.reverse();
    let ids: Vec<&str> = expected.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(found, ids);
    for point in &points {
        assert_eq!(point["state"], json!("committed"));
        assert_eq!(point["disks"].as_array().unwrap().len(), SIZES.len(), "{point:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn node_that_fails_at_any_step_leaves_a_whole_point_or_none_and_nothing_else() {
    let only = std::env::var("CASE").unwrap_or_default();
    let cases: Vec<Case> =
        [starts(), statuses(), change_ids(), connections(), writes(), telemetry(), completions(), manners()]
            .into_iter()
            .flatten()
            .collect();
    assert!(cases.len() >= CASES, "{} cases", cases.len());
    let (room, mut running) = (Arc::new(Semaphore::new(AT_ONCE)), JoinSet::new());
    let mut names = std::collections::HashMap::new();
    for case in cases.into_iter().filter(|case| case.name.contains(&only)) {
        let (name, room) = (case.name.clone(), Arc::clone(&room));
        let task = running.spawn(async move {
            let _held = room.acquire_owned().await.unwrap();
            run(&case).await;
        });
        names.insert(task.id(), name);
    }
    let count = names.len();
    let mut failed = Vec::new();
    while let Some(ended) = running.join_next_with_id().await {
        if let Err(error) = ended {
            failed.push(format!("{}: {error}", names[&error.id()]));
        }
    }
    assert!(failed.is_empty(), "{} of {count} cases: {failed:#?}", failed.len());
    println!("{count} cases");
}
