//! Many VMs at once on one hub, each with its own disks: as many jobs as may run, within the memory that was set; and two
//! nodes at once.

use std::path::Path;

use blockyard::node::fake::{Event, FakeConfig, FakeNode, Faults, PausePoint};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::process::{Child, Running, fake_disks};
use crate::rig::{self, Plan, Rig, id_of, tool};

const VMS: usize = 50;
const MIB: usize = 1 << 20;
/// Together more than the budget.
const SIZES: [(u32, usize); 2] = [(2000, 3 * MIB), (2016, 2 * MIB + 512)];
/// The least that may be set.
const BUDGET: u64 = 160 << 20;
/// What a hub with a hundred open images holds beside payload: threads, queues, tables, the database and the code itself.
const BESIDE: u64 = 64 << 20;

/// Disks that are like those of no other VM.
fn disks(vm: usize) -> Vec<(u32, Vec<u8>)> {
    let mut random = fastrand::Rng::with_seed(vm as u64);
    let mut disk = |(key, size)| {
        let mut bytes = vec![0; size];
        random.fill(&mut bytes[..size / 3]);
        random.fill(&mut bytes[size / 2..]);
        (key, bytes)
    };
    SIZES.map(&mut disk).to_vec()
}

fn name(vm: usize) -> String {
    format!("vm-{vm:02}")
}

async fn ask(running: &Running, vm: &str) -> reqwest::Response {
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let request = running.http.post(format!("{}/api/v1/backups/vm", running.process.url));
    request.bearer_auth(&running.token).json(&body).send().await.unwrap()
}

/// The highest resident memory of a process, in bytes.
fn peak(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// Lets every client that waits go on until all are gone.
async fn let_go(child: &Child, clients: usize) {
    let ended = |event: &Event| matches!(event, Event::Ended { .. });
    let wait = async {
        while child.node.log().events().iter().filter(|event| ended(event)).count() < clients {
            child.node.resume();
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, wait).await.expect("the clients never ended");
}

fn expect_content(backup: &Value, disks: &[(u32, Vec<u8>)]) {
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
    let results = backup["disk_results"].as_array().unwrap();
    assert_eq!(results.len(), disks.len());
    for (disk, (key, bytes)) in results.iter().zip(disks) {
        assert_eq!(disk["device_key"], *key);
        let raw = tempfile::NamedTempFile::new().unwrap();
        let (from, to) = (disk["qcow2_path"].as_str().unwrap(), raw.path().to_str().unwrap());
        tool("qemu-utils", "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
        let found = Sha256::digest(std::fs::read(raw.path()).unwrap());
        assert!(found == Sha256::digest(bytes), "{from} holds something else");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_vms_of_two_disks_are_backed_up_at_once() {
    let ports = rig::many_free_ports(2 * (VMS as u16 + 1));
    let toml = format!("[jobs]\nmax_running = {VMS}\n[nbd]\nmemory_budget_bytes = {BUDGET}\n");
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let child = Child::configured(Vec::new(), faults, ports, &toml).await;
    child.node.reconfigure(|config| {
        // As much as the real client sends at once.
        config.request_bytes = 32 * MIB;
        config.vms = (0..=VMS).map(|vm| (name(vm), fake_disks(&disks(vm)))).collect();
    });
    let running = child.start();
    running.post("/repositories", &json!({"id": "main", "name": "main", "path": child.repository()})).await;
    let mut vms = Vec::new();
    for vm in 0..=VMS {
        vms.push(running.add_vm(&name(vm), &disks(vm)).await);
    }

    let mut starts = JoinSet::new();
    for vm in &vms[..VMS] {
        let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
        let request = running.http.post(format!("{}/api/v1/backups/vm", running.process.url));
        starts.spawn(request.bearer_auth(&running.token).json(&body).send());
    }
    let mut started = Vec::new();
    while let Some(answer) = starts.join_next().await {
        let answer = answer.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        started.push(answer.json::<Value>().await.unwrap());
    }
    assert_eq!(started.len(), VMS);
    assert_eq!(running.get("/ports").await["leased"], 2 * VMS);

    // One more is refused, and nothing of it is begun.
    let refused = ask(&running, &vms[VMS]).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().is_ok());
    assert_eq!(refused.json::<Value>().await.unwrap()["code"], "too_many_jobs");
    assert_eq!(child.node.log().calls().len(), VMS);
    assert_eq!(running.get("/backups").await["total"], VMS);
    assert_eq!(running.get("/ports").await["leased"], 2 * VMS);

    let_go(&child, VMS).await;
    for start in &started {
        let backup = running.end_of(id_of(start)).await;
        let vm: usize = backup["vm_name"].as_str().unwrap().strip_prefix("vm-").unwrap().parse().unwrap();
        expect_content(&backup, &disks(vm));
        // Bit for bit and in structure, not all of them.
        if vm < 4 {
            for (disk, (_, bytes)) in backup["disk_results"].as_array().unwrap().iter().zip(&disks(vm)) {
                rig::expect_image_equals(Path::new(disk["qcow2_path"].as_str().unwrap()), bytes);
            }
        }
    }
    let peak = peak(running.process.id());
    println!("{} MiB at the highest, with a budget of {} MiB", peak >> 20, BUDGET >> 20);
    assert!(peak <= BUDGET + BESIDE, "{peak} bytes of memory");
    assert_eq!(running.get("/points").await["total"], VMS);
    assert_eq!(running.get("/ports").await["leased"], 0);
    child.expect_ports_free();

    // Now there is room for it.
    child.node.reconfigure(|config| config.faults = Faults::default());
    let started = running.back_up(&vms[VMS]).await;
    expect_content(&running.end_of(id_of(&started)).await, &disks(VMS));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_with_their_own_ranges_run_at_once() {
    let pause = || Faults { pause: Some(PausePoint::Connected(0)), ..Faults::default() };
    let mut config = FakeConfig::new("http://127.0.0.1:1", fake_disks(&disks(1)));
    config.faults = pause();
    let other = FakeNode::start(config).await.unwrap();
    let own = rig::many_free_ports(2);
    let (first, last) = (own.start(), own.end());
    let toml = format!("[nodes.other]\nurl = \"{}\"\nport_range = \"{first}-{last}\"\n", other.url());
    let rig = Rig::with(Plan { disks: disks(0), toml, faults: pause(), ..Plan::default() }).await;
    let hub_url = rig.service.service.url();
    other.reconfigure(|config| config.hub_url = hub_url);
    let mut vm = crate::support::vm_body("elsewhere");
    vm["credential"] = "main".into();
    vm["node"] = "other".into();
    vm["disks"] = SIZES.map(|(key, size)| json!({"device_key": key, "size_bytes": size})).to_vec().into();
    let vm = rig.service.post("/api/v1/vms", &vm).await.expect_status(201).json();

    let here = rig.start().await;
    let body = json!({"vm_context_id": vm["id"], "repository_id": "main", "backup_type": "auto"});
    let there = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    // Both clients are connected: neither waits for the other.
    for node in [&rig.node, &other] {
        let paused = node.log().first(|event| (*event == Event::Paused).then_some(()));
        tokio::time::timeout(rig::DEADLINE, paused).await.expect("no client came");
        assert_eq!(node.log().calls().len(), 1);
    }
    let ports = |started: &Value| -> Vec<u64> {
        let disks = started["disk_results"].as_array().unwrap();
        disks.iter().map(|disk| disk["nbd_port"].as_u64().unwrap()).collect()
    };
    assert_eq!(ports(&there), own.clone().map(u64::from).collect::<Vec<_>>());
    assert!(ports(&here).iter().all(|port| rig.ports.contains(&u16::try_from(*port).unwrap())));
    // The range of a node is all that it has.
    let third = rig::add_vm(&rig.service, "third", &[(2000, 512)]).await;
    let path = format!("/api/v1/vms/{third}");
    let etag = rig.service.get(&path).await.header("etag").to_owned();
    let mut third_body = crate::support::vm_body("third");
    third_body["credential"] = "main".into();
    third_body["node"] = "other".into();
    third_body["disks"] = json!([{"device_key": 2000, "size_bytes": 512}]);
    rig.service.put(&path, &etag, &third_body).await.expect_status(200);
    let body = json!({"vm_context_id": third, "repository_id": "main", "backup_type": "auto"});
    rig.service.post("/api/v1/backups/vm", &body).await.expect_problem(503, "no_ports");

    rig.node.resume();
    other.resume();
    for (started, vm) in [(&here, 0), (&there, 1)] {
        expect_content(&rig.end_of(id_of(started)).await, &disks(vm));
    }
    rig.expect_nothing_left(2).await;
}
