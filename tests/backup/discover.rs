//! Discovery: the inventory brought to what the node finds in vCenter, by request and before a job.

use blockyard::node::fake::{
    DiscoverCall, DiscoverFault, Event, FakeConfig, FakeDisk, FakeNode, Faults, PausePoint, Source,
};
use serde_json::{Value, json};

use crate::cli::cli;
use crate::process::sqlite;
use crate::rig::{self, Plan, Rig, content, id_of};
use crate::support::Answer;

/// A disk as discovery tells it: device key, size and path of the VMDK.
type Found<'a> = (u32, u64, &'a str);

/// The rig's disks, with paths.
const DISKS: [Found<'static>; 3] = [
    (2000, 5 << 20, "[ds1] db/db.vmdk"),
    (2016, (3 << 20) + 512, "[ds1] db/db_1.vmdk"),
    (16_000, 512, "[ds2] db/log.vmdk"),
];
const PATH: &str = "/DC1/vm/db-server";

fn disk((key, size, path): &Found) -> Value {
    json!({"id": format!("disk-{key}"), "capacity_bytes": size, "vmdk_path": path, "label": "Hard disk",
        "unit_number": key % 16})
}

fn vm_at(path: &str, disks: &[Found]) -> Value {
    let name = path.rsplit('/').next().unwrap();
    json!({"id": "vm-4711", "name": name, "path": path, "disks": disks.iter().map(disk).collect::<Vec<_>>()})
}

/// What the node finds from now on: the rig's VM with these disks, among others.
fn finds(rig: &Rig, disks: &[Found]) {
    let inventory =
        vec![vm_at("/DC1/vm/old/db-server", &[(2000, 512, "x")]), vm_at(PATH, disks), json!({"name": "web"})];
    rig.node.reconfigure(|config| config.inventory = inventory);
}

/// A rig whose VM is described as the node finds it.
async fn described(plan: Plan) -> Rig {
    let rig = Rig::with(plan).await;
    finds(&rig, &DISKS);
    refresh(&rig).await.expect_status(200);
    rig
}

async fn refresh(rig: &Rig) -> Answer {
    rig.service.post(&format!("/api/v1/vms/{}/refresh", rig.vm), &json!({})).await
}

async fn vm(rig: &Rig) -> Answer {
    rig.service.get(&format!("/api/v1/vms/{}", rig.vm)).await.expect_status(200)
}

/// Every disk that the VM ever had: number, key, size, and whether it has it now.
async fn disks(rig: &Rig) -> Vec<(u64, u64, u64, bool)> {
    let answer = rig.service.get(&format!("/api/v1/vms/{}/disks", rig.vm)).await.expect_status(200).json();
    let number = |value: &Value| value.as_u64().unwrap();
    let disks = answer["disks"].as_array().unwrap().iter();
    disks
        .map(|disk| {
            let numbers = [&disk["disk_id"], &disk["device_key"], &disk["size_bytes"]].map(number);
            (numbers[0], numbers[1], numbers[2], disk["present"].as_bool().unwrap())
        })
        .collect()
}

fn discoveries(rig: &Rig) -> Vec<DiscoverCall> {
    let events = rig.node.log().events().into_iter();
    events
        .filter_map(|event| match event {
            Event::Discovered(call) => Some(call),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn refresh_brings_the_inventory_to_what_the_node_finds_and_a_second_one_changes_nothing() {
    let rig = described(Plan::default()).await;
    let before = vm(&rig).await;
    let again = refresh(&rig).await.expect_status(200);
    assert_eq!((again.header("etag"), &again.json()["changes"]), (before.header("etag"), &json!([])));

    // One is larger, one is gone, one is new, one moved to another unit.
    let now: [Found; 3] =
        [(2000, 6 << 20, DISKS[0].2), (16_000, 512, DISKS[2].2), (2001, 1 << 20, "[ds1] db/db_2.vmdk")];
    finds(&rig, &now);
    rig.node.reconfigure(|config| config.inventory[1]["disks"][1]["unit_number"] = json!(7));
    let refreshed = refresh(&rig).await.expect_status(200);
    assert_ne!(refreshed.header("etag"), before.header("etag"));
    let ids: Vec<u64> =
        before.json()["disks"].as_array().unwrap().iter().map(|d| d["disk_id"].as_u64().unwrap()).collect();
    let fresh = ids.iter().max().unwrap() + 1;
    let change = |disk_id: u64, key: u32, change: &str, size: u64, before: Value| json!({"disk_id": disk_id, "device_key": key, "change": change, "size_bytes": size, "size_bytes_before": before});
    assert_eq!(
        refreshed.json()["changes"],
        json!([
            change(ids[0], 2000, "resized", 6 << 20, json!(5 << 20)),
            change(ids[1], 2016, "gone", (3 << 20) + 512, Value::Null),
            change(ids[2], 16_000, "described", 512, Value::Null),
            change(fresh, 2001, "appeared", 1 << 20, Value::Null),
        ])
    );
    // The answer is the VM, as it is from now on.
    let mut shown = refreshed.json();
    shown.as_object_mut().unwrap().remove("changes");
    assert_eq!(vm(&rig).await.json(), shown);
    let again = refresh(&rig).await.expect_status(200);
    assert_eq!((again.header("etag"), &again.json()["changes"]), (refreshed.header("etag"), &json!([])));

    // A disk that comes back has its number again, and nobody else had it meanwhile.
    finds(&rig, &DISKS);
    let back = refresh(&rig).await.expect_status(200).json();
    let numbers: Vec<u64> = back["disks"].as_array().unwrap().iter().map(|d| d["disk_id"].as_u64().unwrap()).collect();
    assert_eq!(numbers, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn node_is_asked_for_the_vm_by_vcenter_login_datacenter_and_name() {
    let rig = Rig::new().await;
    finds(&rig, &DISKS);
    refresh(&rig).await.expect_status(200);
    let asked = DiscoverCall {
        vcenter: "vc.example".to_owned(),
        username: "backup".to_owned(),
        password: "secret-of-the-vcenter".to_owned(),
        datacenter: "DC1".to_owned(),
        filter: Some("db-server".to_owned()),
    };
    assert_eq!(discoveries(&rig), [asked]);

    // A name that a node might take for a pattern filters nothing.
    let id = rig::add_vm(&rig.service, "db*", &[(2000, 512)]).await;
    rig.node.reconfigure(|config| config.inventory.push(vm_at("/DC1/vm/db*", &[(2000, 1024, "[ds1] a.vmdk")])));
    rig.service.post(&format!("/api/v1/vms/{id}/refresh"), &json!({})).await.expect_status(200);
    assert_eq!(discoveries(&rig)[1].filter, None);

    let toml = "[credentials.main]\ndatacenter = \"Elsewhere\"\n".to_owned();
    let rig = described(Plan { toml, ..Plan::default() }).await;
    assert_eq!(discoveries(&rig)[0].datacenter, "Elsewhere");
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_keeps_its_number_while_it_writes_to_the_file_of_a_snapshot() {
    let rig = described(Plan::default()).await;
    let before = vm(&rig).await;
    let snapshot = DISKS.map(|(key, size, path)| (key, size, path.replace(".vmdk", "-000002.vmdk")));
    let snapshot: Vec<Found> = snapshot.iter().map(|(key, size, path)| (*key, *size, path.as_str())).collect();
    finds(&rig, &snapshot);
    let refreshed = refresh(&rig).await.expect_status(200);
    assert_eq!(refreshed.json()["changes"], json!([]));
    assert_eq!(refreshed.header("etag"), before.header("etag"));
    assert_eq!(vm(&rig).await.json(), before.json());
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_were_known_by_their_keys_alone_get_new_numbers_once() {
    // As a PUT that tells the paths would: nothing says that they are the same disks.
    let rig = described(Plan::default()).await;
    let keys = disks(&rig).await.into_iter().map(|(id, key, _, present)| (id, key, present)).collect::<Vec<_>>();
    assert_eq!(keys[..3], [(0, 2000, false), (1, 2016, false), (2, 16_000, false)]);
    assert_eq!(keys[3..], [(3, 2000, true), (4, 2016, true), (5, 16_000, true)]);
    assert_eq!(refresh(&rig).await.expect_status(200).json()["changes"], json!([]));
    // A node that tells no paths leaves such disks as they are.
    let rig = Rig::new().await;
    let nameless = DISKS.map(|(key, size, _)| (key, size, ""));
    finds(&rig, &nameless);
    rig.node.reconfigure(|config| {
        config.inventory[1]["disks"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .for_each(|disk| disk["unit_number"] = Value::Null);
    });
    assert_eq!(refresh(&rig).await.expect_status(200).json()["changes"], json!([]));
}

/// An answer in which one thing is changed.
fn answer(change: impl FnOnce(&mut Value)) -> DiscoverFault {
    let mut answer = json!({"vms": [vm_at(PATH, &DISKS)]});
    change(&mut answer);
    DiscoverFault::Body(answer.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn answer_that_cannot_be_relied_upon_is_told_and_changes_nothing() {
    let rig = described(Plan::default()).await;
    let before = (vm(&rig).await, disks(&rig).await);
    let malformed = "node_answer_malformed";
    let of_disk = |field: &str, value: Value| answer(|answer| answer["vms"][0]["disks"][1][field] = value);
    let huge = format!("{{\"vms\": [], \"padding\": \"{}\"}}", "x".repeat(17 << 20));
    let rows = [
        (DiscoverFault::Status(400), 502, "node_rejected", "400"),
        (DiscoverFault::Status(401), 502, "node_rejected", "cannot log in as backup: [secret]"),
        (DiscoverFault::Status(500), 502, "node_rejected", "500"),
        (DiscoverFault::Status(503), 502, "node_rejected", "503"),
        (DiscoverFault::Reset, 502, "node_unreachable", "cannot be reached"),
        (DiscoverFault::Truncated, 502, "node_unreachable", "cannot be reached"),
        (DiscoverFault::Body(huge), 502, malformed, "more than 16777216 bytes"),
        (DiscoverFault::Body(String::new()), 502, malformed, "cannot be read"),
        (DiscoverFault::Body("<html>".to_owned()), 502, malformed, "cannot be read"),
        (DiscoverFault::Body("secret-of-the-vcenter".to_owned()), 502, malformed, "cannot be read"),
        (answer(|answer| answer["vms"] = json!("all")), 502, malformed, "a list of VMs"),
        (answer(|answer| answer["vms"][0]["disks"] = json!({})), 502, malformed, "a list of at most 1024 disks"),
        (answer(|answer| answer["vms"][0]["disks"] = json!([])), 502, malformed, "names no disk"),
        (answer(|answer| answer["vms"][0]["disks"] = Value::Null), 502, malformed, "names no disk"),
        (
            answer(|answer| answer["vms"] = json!([answer["vms"][0], answer["vms"][0]])),
            502,
            malformed,
            "more than one VM",
        ),
        (answer(|answer| answer["vms"][0]["path"] = json!(7)), 502, malformed, "cannot be read"),
        (of_disk("id", json!("disk-abc")), 502, malformed, "disk-abc"),
        (of_disk("id", json!("disk-2000")), 502, malformed, "two disks with the device key 2000"),
        (of_disk("id", json!("secret-of-the-vcenter")), 502, malformed, "the id \"[secret]\""),
        (of_disk("id", Value::Null), 502, malformed, "cannot be read"),
        (of_disk("capacity_bytes", json!(0)), 502, malformed, "disk 2016 has 0 bytes"),
        (of_disk("capacity_bytes", json!(513)), 502, malformed, "513"),
        (of_disk("capacity_bytes", json!("secret-of-the-vcenter")), 502, malformed, "[secret]"),
        (of_disk("vmdk_path", json!("a\nb")), 502, malformed, "VMDK path of disk 2016"),
        (answer(|answer| answer["vms"] = json!([])), 404, "vm_not_discovered", PATH),
        (answer(|answer| answer["vms"] = Value::Null), 404, "vm_not_discovered", PATH),
        (
            answer(|answer| answer["vms"][0]["path"] = json!("/DC1/vm/x/db-server")),
            404,
            "vm_not_discovered",
            "/DC1/vm/x/db-server",
        ),
    ];
    for (discover, status, code, text) in rows {
        let what = format!("{discover:?}").chars().take(300).collect::<String>();
        rig.node.reconfigure(|config| config.faults = Faults { discover, ..Faults::default() });
        let problem = refresh(&rig).await.expect_problem(status, code);
        assert!(problem["detail"].as_str().unwrap().contains(text), "{what}: {problem}");
        assert!(!problem.to_string().contains("secret-of-the-vcenter"), "{what}: {problem}");
        let after = (vm(&rig).await, disks(&rig).await);
        assert_eq!(
            (after.0.header("etag"), after.0.json(), &after.1),
            (before.0.header("etag"), before.0.json(), &before.1)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn node_that_cannot_be_asked_changes_nothing() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let toml = format!("[nodes.default]\nurl = \"http://{closed}\"\n");
    let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
    assert_eq!(refresh(&rig).await.expect_problem(502, "node_unreachable")["retryable"], true);

    let other = FakeNode::start(FakeConfig::new("http://127.0.0.1:1", Default::default())).await.unwrap();
    let discover = DiscoverFault::Redirect(format!("{}/api/v1/discover", other.url()));
    let rig = Rig::faulty(Faults { discover, ..Faults::default() }).await;
    refresh(&rig).await.expect_problem(502, "node_rejected");
    assert!(other.log().events().is_empty(), "a redirect is not followed");
    assert_eq!(discoveries(&rig).len(), 1, "and nothing is asked twice");

    // No login, no question; and no VM.
    std::fs::write(rig.service.folder.path().join("password"), "").unwrap();
    refresh(&rig).await.expect_problem(422, "credential_missing");
    let id = rig.service.add_vm("without", &[(2000, 512)]).await;
    let path = format!("/api/v1/vms/{id}/refresh");
    rig.service.post(&path, &json!({})).await.expect_problem(422, "credential_missing");
    assert_eq!(discoveries(&rig).len(), 1);
    for id in ["vm-01JC0A7K2E5H8M3P6R9T1V4X7Z", "db-server"] {
        let path = format!("/api/v1/vms/{id}/refresh");
        rig.service.post(&path, &json!({})).await.expect_problem(404, "vm_not_found");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_may_take_ten_times_as_long_as_a_start() {
    let toml = "[nodes.default]\nconnect_timeout_s = 1\nrequest_timeout_s = 1\n".to_owned();
    let faults = Faults { discover: DiscoverFault::Hang, ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    let problem = refresh(&rig).await.expect_problem(504, "node_timeout");
    assert!(problem["detail"].as_str().unwrap().contains("within 11 s"), "{problem}");
    assert_eq!(problem["retryable"], true);
}

/// Waits until the node was asked this many times.
async fn asked(rig: &Rig, times: usize) {
    let mut count = 0;
    rig.seen(|event| {
        count += usize::from(matches!(event, Event::Discovered(_)));
        (count == times).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answer_is_not_laid_over_what_an_operator_described_meanwhile() {
    let rig = described(Plan::default()).await;
    let waits = Faults { discover: DiscoverFault::Wait, ..Faults::default() };
    rig.node.reconfigure(|config| config.faults = waits);
    let path = format!("/api/v1/vms/{}", rig.vm);
    let shown = vm(&rig).await;
    let mut body = shown.json();
    for member in ["id", "created_at"] {
        body.as_object_mut().unwrap().remove(member);
    }
    let kept = body["disks"].as_array_mut().unwrap();
    for disk in kept.iter_mut().map(|disk| disk.as_object_mut().unwrap()) {
        disk.remove("disk_id");
        disk.remove("present");
    }
    let all = kept.clone();
    kept.pop();

    let (answer, put) = tokio::join!(refresh(&rig), async {
        asked(&rig, 2).await;
        let put = rig.service.put(&path, "*", &body).await.expect_status(200);
        rig.node.resume();
        put
    });
    answer.expect_problem(412, "etag_mismatch");
    assert_eq!((vm(&rig).await.json(), vm(&rig).await.header("etag")), (put.json(), put.header("etag")));

    // Where both say the same there is nothing to lay over.
    body["disks"] = all.into();
    let (answer, put) = tokio::join!(refresh(&rig), async {
        asked(&rig, 3).await;
        let put = rig.service.put(&path, "*", &body).await.expect_status(200);
        rig.node.resume();
        put
    });
    assert_eq!(answer.expect_status(200).header("etag"), put.header("etag"));
    // Nor is a VM found that was removed.
    let (answer, ()) = tokio::join!(refresh(&rig), async {
        asked(&rig, 4).await;
        rig.service.delete(&path).await.expect_status(204);
        rig.node.resume();
    });
    answer.expect_problem(404, "vm_not_found");
}

/// Puts a disk into the VM, which the node will find.
fn attach(rig: &mut Rig, key: u32, bytes: Vec<u8>) {
    let source = Source::Bytes(bytes.as_slice().into());
    rig.node.reconfigure(|config| {
        config.disks.insert(key, FakeDisk::new(source, rig::change_id(key)));
        let found = disk(&(key, bytes.len() as u64, "[ds1] db/new.vmdk"));
        config.inventory[1]["disks"].as_array_mut().unwrap().push(found);
    });
    rig.disks.push((key, bytes));
}

#[tokio::test(flavor = "multi_thread")]
async fn running_job_keeps_the_disks_it_began_with() {
    let mut rig = described(Plan::default()).await;
    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeComplete(0)), ..Faults::default() };
    });
    let started = rig.start().await;
    rig.paused().await;
    finds(&rig, &DISKS);
    let found = disk(&(2032, 1 << 20, "[ds1] db/new.vmdk"));
    rig.node.reconfigure(|config| config.inventory[1]["disks"].as_array_mut().unwrap().push(found));
    let refreshed = refresh(&rig).await.expect_status(200).json();
    assert_eq!(refreshed["changes"][0]["change"], "appeared");
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(backup["disks"].as_array().unwrap().len(), 3);
    rig.expect_restorable(id_of(&started)).await;

    finds(&rig, &DISKS);
    rig.node.reconfigure(|config| config.faults = Faults::default());
    attach(&mut rig, 2032, content(9, 1 << 20));
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    let reasons: Vec<_> = backup["disks"].as_array().unwrap().iter().map(|disk| disk["reason"].clone()).collect();
    assert_eq!(reasons, ["parent_ok", "parent_ok", "parent_ok", "disk_new"]);
}

fn before_start() -> Plan {
    Plan { toml: "[nodes.default]\nrefresh_before_start = true\n".to_owned(), ..Plan::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_given_the_vm_back_keeps_nobody_from_a_discovery_and_a_backup() {
    let faults = Faults { pause: Some(PausePoint::AfterBytes(1 << 20)), ..Faults::default() };
    let rig = described(Plan { faults, ..before_start() }).await;
    let started = rig.start().await;
    rig.paused().await;
    rig.try_start().await.expect_problem(409, "backup_in_progress");
    assert_eq!(discoveries(&rig).len(), 2, "whoever cannot have the VM is told at once");
    // Its end cannot be recorded, which stands for staged data that cannot be removed.
    let database = rig.service.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE UPDATE OF state ON backups WHEN NEW.state = 'cancelled' \
                  BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    rig.cancel(id_of(&started)).await.expect_status(202);
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
    assert_eq!(rig.backup(id_of(&started)).await["state"], "cancelling");
    sqlite(&database, "DROP TRIGGER refuse").await;
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "cancelled");
    rig.node.resume();
    // So it is with one that waits for its repository, of an earlier run.
    let waits = format!("UPDATE backups SET state = 'committing' WHERE id = '{}';", id_of(&started));
    sqlite(&database, &waits).await;
    assert_eq!(rig.back_up().await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn job_is_planned_on_the_disks_that_the_node_finds_just_before() {
    let mut rig = described(before_start()).await;
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(discoveries(&rig).len(), 2);

    // A disk more, of which nobody told the hub.
    attach(&mut rig, 2032, content(9, 1 << 20));
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    let keys = |backup: &Value| -> Vec<u64> {
        backup["disks"].as_array().unwrap().iter().map(|disk| disk["device_key"].as_u64().unwrap()).collect()
    };
    assert_eq!(keys(&backup), [2000, 2016, 16_000, 2032]);
    assert_eq!(backup["disks"][3]["reason"], "disk_new");
    rig.expect_restorable(id_of(&backup)).await;

    // One less: it keeps its number and what was backed up of it, and the job goes on without it.
    rig.disks.remove(1);
    rig.node.reconfigure(|config| {
        config.disks.remove(&2016);
        config.inventory[1]["disks"].as_array_mut().unwrap().remove(1);
    });
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(keys(&backup), [2000, 16_000, 2032]);
    let gone = "disk_gone: disk 4 (device key 2016) is in the newest restore point and not in this backup";
    assert_eq!((&backup["warnings"], &backup["result"]), (&json!([gone]), &json!("success")));
    assert_eq!(backup["disks"][0]["reason"], "parent_ok");
    rig.expect_restorable(id_of(&backup)).await;
    assert!(disks(&rig).await.contains(&(4, 2016, (3 << 20) + 512, false)));
    rig.expect_nothing_left(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_that_discovery_conceals_fails_the_job_instead_of_leaving_it_out() {
    let short = "[jobs]\nfirst_contact_s = 2\nidle_s = 2\nstalled_s = 2\n";
    let plan = before_start();
    let rig = described(Plan { toml: format!("{}{short}", plan.toml), ..plan }).await;
    // The answer is whole and in order, and the snapshot has one disk more than it names.
    finds(&rig, &DISKS[1..]);
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("no_client")), "{backup:#}");
    assert_eq!(backup["disks"].as_array().unwrap().len(), 2);
    assert!(rig.points().await.is_empty());
    rig.expect_nothing_left(0).await;
    // The next answer is true, and the disk is the one it was.
    finds(&rig, &DISKS);
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(disks(&rig).await.len(), 6, "three by key alone, and the three of the answers");
    rig.expect_restorable(id_of(&backup)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_discovery_refuses_the_start_before_anything_is_begun() {
    let rig = described(before_start()).await;
    let before = vm(&rig).await;
    let rows = [
        (DiscoverFault::Status(500), 502, "node_rejected"),
        (DiscoverFault::Reset, 502, "node_unreachable"),
        (answer(|answer| answer["vms"][0]["disks"][0]["capacity_bytes"] = json!(1)), 502, "node_answer_malformed"),
        (answer(|answer| answer["vms"] = json!([])), 404, "vm_not_discovered"),
    ];
    let start = async || {
        let request =
            rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm").header("idempotency-key", "nightly");
        crate::support::send(request.json(&rig.start_body())).await
    };
    for (discover, status, code) in rows {
        rig.node.reconfigure(|config| config.faults = Faults { discover, ..Faults::default() });
        let problem = start().await.expect_problem(status, code);
        assert!(problem.get("backup_id").is_none(), "{problem}");
        rig.expect_nothing_left(0).await;
    }
    std::fs::remove_file(rig.service.folder.path().join("password")).unwrap();
    rig.try_start().await.expect_problem(422, "credential_missing");
    std::fs::write(rig.service.folder.path().join("password"), "secret-of-the-vcenter").unwrap();
    assert_eq!(rig.service.get("/api/v1/backups").await.json()["total"], 0, "no attempt is on record");
    assert!(rig.node.log().calls().is_empty());
    assert_eq!(vm(&rig).await.header("etag"), before.header("etag"));
    // Nor is the key spent: the same request may be repeated until its disks are known.
    rig.node.reconfigure(|config| config.faults = Faults::default());
    let started = start().await.expect_status(200).json();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn start_waits_for_discovery_no_longer_than_its_caller_does() {
    let plan = before_start();
    let toml = format!("{}[jobs]\nanswer_within_s = 1\n", plan.toml);
    let faults = Faults { discover: DiscoverFault::Hang, ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..plan }).await;
    let problem = rig.try_start().await.expect_problem(504, "node_timeout");
    assert!(problem["detail"].as_str().unwrap().contains("within 1 s"), "{problem}");
    rig.expect_nothing_left(0).await;
    assert!(rig.node.log().calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn node_is_not_asked_for_a_vm_that_is_being_backed_up_or_unless_it_is_set_so() {
    let rig = described(before_start()).await;
    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeComplete(0)), ..Faults::default() };
    });
    let started = rig.start().await;
    rig.paused().await;
    let refused = rig.try_start().await.expect_problem(409, "backup_in_progress");
    assert_eq!(id_of(&refused), id_of(&started));
    assert_eq!(discoveries(&rig).len(), 2);
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");

    let rig = Rig::new().await;
    assert_eq!(rig.back_up().await["state"], "committed");
    assert!(discoveries(&rig).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_is_refreshed_by_command() {
    let rig = described(Plan::default()).await;
    let (code, text) = cli(&rig, &["vm", "refresh", "db-server"]).await;
    assert!(code == 0 && text.contains(&rig.vm) && text.contains("nothing has changed"), "{code} {text}");
    finds(&rig, &[(2000, 6 << 20, DISKS[0].2), DISKS[1], (2001, 1 << 20, "[ds1] db/db_2.vmdk")]);
    let (code, text) = cli(&rig, &["vm", "refresh", &rig.vm]).await;
    assert_eq!(code, 0, "{text}");
    for line in [
        "disk 3 (key 2000, 6.0 MiB) had 5.0 MiB before",
        "disk 5 (key 16000, 512 B) is gone",
        "disk 6 (key 2001, 1.0 MiB) appeared",
    ] {
        assert!(text.lines().any(|printed| printed == line), "{line}: {text}");
    }
    finds(&rig, &DISKS);
    let (code, text) = cli(&rig, &["--output", "json", "vm", "refresh", &rig.vm]).await;
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, document["changes"].as_array().unwrap().len()), (0, 3), "{text}");
    let (code, text) = cli(&rig, &["--quiet", "vm", "refresh", &rig.vm]).await;
    assert_eq!((code, text.as_str()), (0, ""));

    let rows = [
        (DiscoverFault::Status(500), 1, "node_rejected"),
        (DiscoverFault::Body("{}".to_owned()), 1, "node_answer_malformed"),
        (answer(|answer| answer["vms"] = json!([])), 4, "vm_not_discovered"),
    ];
    for (discover, exit, text) in rows {
        rig.node.reconfigure(|config| config.faults = Faults { discover, ..Faults::default() });
        let (code, printed) = cli(&rig, &["vm", "refresh", "db-server"]).await;
        assert!(code == exit && printed.contains(text), "{code} {printed}");
    }
    let (code, _) = cli(&rig, &["vm", "refresh", "nobody"]).await;
    assert_eq!(code, 4);
}
