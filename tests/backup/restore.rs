//! Exports of restore points and raw downloads: what is served, to whom, for how long, and what is left of it.

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blockyard::node::fake::{Faults, PausePoint};
use blockyard::points::content::root_of;
use blockyard::store::leases;
use blockyard_nbd::Durability;
use blockyard_nbd::client::Client;
use reqwest::Method;
use serde_json::{Value, json};

use crate::rig::{self, DEADLINE, Plan, Rig, content, free_ports, id_of, many_free_ports, published, tool};
use crate::support::{Answer, send};

const KEY: u32 = 2000;
const MIB: usize = 1 << 20;
/// ESHUTDOWN on the wire.
const SHUTDOWN: u32 = 108;
/// ENOSPC on the wire.
const NO_SPACE: u32 = 28;

/// A rig of one disk of 4 MiB and a little, with ports of its own for exports.
pub async fn rig(toml: &str) -> Rig {
    rig_on(&free_ports(), toml).await
}

async fn rig_on(ports: &RangeInclusive<u16>, toml: &str) -> Rig {
    let toml = format!("[restore]\nport_range = \"{}-{}\"\n{toml}", ports.start(), ports.end());
    Rig::with(Plan { disks: vec![(KEY, content(1, 4 * MIB + 512))], toml, ..Plan::default() }).await
}

/// Makes a backup that must succeed, and tells its id.
pub async fn commit(rig: &Rig) -> String {
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    id_of(&backup).to_owned()
}

/// A full and so many incrementals, each with changes all over the disk.
pub async fn deep_chain(rig: &mut Rig, incrementals: u8) -> String {
    let mut id = commit(rig).await;
    for round in 1..=incrementals {
        rig.write(&[
            (KEY, usize::from(round) * 70_000, content(round, 40_000)),
            (KEY, 2 * MIB + usize::from(round) * 512, vec![0; 512]),
        ]);
        id = commit(rig).await;
    }
    id
}

async fn try_export(rig: &Rig, point: &str, body: &Value) -> Answer {
    rig.service.post(&format!("/api/v1/points/{point}/exports"), body).await
}

pub async fn export(rig: &Rig, point: &str, mode: &str) -> Value {
    try_export(rig, point, &json!({"disk_id": 0, "mode": mode})).await.expect_status(201).json()
}

fn text<'a>(answer: &'a Value, field: &str) -> &'a str {
    answer[field].as_str().unwrap_or_else(|| panic!("{field} of {answer:#}"))
}

fn path_of(export: &Value) -> String {
    format!("/api/v1/exports/{}", text(export, "id"))
}

pub async fn client(export: &Value) -> Client {
    Client::connect(&text(export, "uri").parse().unwrap()).await.unwrap()
}

pub async fn read_all(client: &Client) -> Vec<u8> {
    client.read(0, u32::try_from(client.size()).unwrap()).await.unwrap()
}

async fn lease_count(rig: &Rig) -> u64 {
    let store = &rig.service.service.app().store;
    leases::count(&mut store.read().await.unwrap()).await.unwrap()
}

/// Waits until nothing of an export or download is left.
async fn expect_no_leases(rig: &Rig) {
    let none = async {
        while lease_count(rig).await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, none).await.expect("leases are left");
}

fn overlays(rig: &Rig) -> Vec<PathBuf> {
    let folder = rig.service.folder.path().join("state/overlays");
    fs::read_dir(folder).map(|entries| entries.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
}

/// Bytes and time of change of everything beneath a folder.
fn state_of(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, i64, i64)> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|path| {
            let facts = fs::metadata(&path).unwrap();
            (path.clone(), (fs::read(&path).unwrap(), facts.mtime(), facts.mtime_nsec()))
        })
        .collect()
}

/// Sets columns of a point as another part of the service would.
pub async fn set_point(rig: &Rig, statement: &'static str, value: &str, point: &str) {
    let store = &rig.service.service.app().store;
    let mut transaction = store.write().await.unwrap();
    sqlx::query(statement).bind(value).bind(point).execute(&mut *transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

const SET_CONTENT_DIGEST: &str = "UPDATE point_disks SET content_digest = ? WHERE point_id = ?";
const SET_TRUST: &str = "UPDATE restore_points SET trust = ? WHERE id = ?";

/// Makes an image unreadable in a way that opening it does not show.
pub fn break_table(image: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(image, fs::Permissions::from_mode(0o640)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(image).unwrap();
    // The first entry of the L1 table leads to an L2 table, all of whose entries become nonsense: odd host offsets.
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 40).unwrap();
    let l1 = u64::from_be_bytes(word);
    file.read_exact_at(&mut word, l1).unwrap();
    let l2 = u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00;
    // The eighth cluster, so that the beginning of the disk can be read.
    file.write_all_at(&0x8000_0000_0000_0200_u64.to_be_bytes(), l2 + 8 * 8).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_answers_reads_and_is_gone_when_it_is_deleted() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 2).await;
    let answer = try_export(&rig, &point, &json!({"disk_id": 0})).await.expect_status(201);
    let export = answer.json();
    assert_eq!(answer.header("location"), path_of(&export));
    assert_eq!((&export["mode"], &export["point_id"]), (&json!("read-only"), &json!(point)));
    assert!(text(&export, "uri").ends_with(&format!("/db-server-{point}-disk0")), "{export:#}");
    assert!(text(&export, "command").contains(text(&export, "uri")), "{export:#}");
    // The point, both below it, the port and the export itself.
    assert_eq!(lease_count(&rig).await, 5);
    assert_eq!(rig::expect_go(text(&export, "uri")), rig.disks[0].1.len() as u64);
    let client = client(&export).await;
    assert_eq!(read_all(&client).await, rig.disks[0].1);
    assert!(client.write(0, vec![1; 512], Durability::OnFlush).await.is_err(), "it is read-only");

    let listed = rig.service.get("/api/v1/exports").await.expect_status(200).json();
    assert_eq!((&listed["total"], &listed["exports"][0]["id"]), (&json!(1), &export["id"]));
    let served = rig.service.get("/api/v1/nbd/exports").await.json();
    assert_eq!((&served["exports"][0]["export_id"], &served["exports"][0]["job_id"]), (&export["id"], &Value::Null));
    assert_eq!((&served["exports"][0]["point_id"], &served["exports"][0]["read_only"]), (&json!(point), &json!(true)));
    let ports = rig.service.get("/api/v1/ports").await.json();
    assert_eq!((&ports["leased"], &ports["leases"][0]["export_id"]), (&json!(1), &export["id"]), "{ports}");
    let metrics = rig.service.get("/metrics").await.text;
    assert!(metrics.contains("blockyard_restore_exports 1\n"), "{metrics}");
    let read = format!("blockyard_restored_bytes_total{{kind=\"export\"}} {}\n", rig.disks[0].1.len());
    assert!(metrics.contains(&read), "{metrics}");

    rig.service.delete(&path_of(&export)).await.expect_status(204);
    rig.service.delete(&path_of(&export)).await.expect_problem(404, "export_not_found");
    rig.service.get(&path_of(&export)).await.expect_problem(404, "export_not_found");
    rig.service.post(&format!("{}/renew", path_of(&export)), &json!({})).await.expect_problem(404, "export_not_found");
    rig.expect_nothing_left(3).await;
    let metrics = rig.service.get("/metrics").await.text;
    assert!(metrics.contains("blockyard_restore_exports 0\n") && metrics.contains(&read), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_what_is_not_there_is_refused_and_leaves_nothing() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    let unknown = blockyard::id::BackupId::new();
    try_export(&rig, unknown.as_str(), &json!({"disk_id": 0})).await.expect_problem(404, "point_not_found");
    try_export(&rig, "nonsense", &json!({"disk_id": 0})).await.expect_problem(404, "point_not_found");
    try_export(&rig, &point, &json!({"disk_id": 7})).await.expect_problem(404, "disk_not_in_backup");
    try_export(&rig, &point, &json!({"disk_id": 0, "mode": "x"})).await.expect_fault(400, "invalid_field", "/mode");
    try_export(&rig, &point, &json!({})).await.expect_fault(400, "invalid_field", "/disk_id");
    let folder = published(&rig, &point).await;
    fs::rename(&folder, folder.with_extension("away")).unwrap();
    try_export(&rig, &point, &json!({"disk_id": 0})).await.expect_problem(503, "repository_unavailable");
    fs::rename(folder.with_extension("away"), &folder).unwrap();
    rig.expect_nothing_left(1).await;
    export(&rig, &point, "read-only").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_point_is_exported_only_to_who_accepts_damage_and_a_suspect_one_with_a_warning() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    set_point(&rig, SET_TRUST, "suspect", &point).await;
    let suspect = export(&rig, &point, "read-only").await;
    assert!(suspect["warnings"][0].as_str().unwrap().contains("suspect"), "{suspect:#}");
    set_point(&rig, SET_TRUST, "corrupt", &point).await;
    let refused = try_export(&rig, &point, &json!({"disk_id": 0})).await.expect_problem(409, "point_damaged");
    assert_eq!(refused["retryable"], false);
    let raw = format!("/api/v1/points/{point}/disks/0/raw");
    rig.service.get(&raw).await.expect_problem(409, "point_damaged");
    let body = json!({"disk_id": 0, "accept_damage": true});
    let corrupt = try_export(&rig, &point, &body).await.expect_status(201).json();
    assert!(corrupt["warnings"][0].as_str().unwrap().contains("corrupt"), "{corrupt:#}");
    assert_eq!(read_all(&client(&corrupt).await).await, rig.disks[0].1);
    let answer = rig.service.request(Method::GET, &format!("{raw}?accept_damage=true")).send().await.unwrap();
    assert!(answer.headers()["x-blockyard-warning"].to_str().unwrap().contains("corrupt"));
    assert_eq!(answer.bytes().await.unwrap(), rig.disks[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_another_length_is_damage_before_anything_is_read() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 1).await;
    let full = rig.points().await.remove(1);
    let image = published(&rig, full["id"].as_str().unwrap()).await.join("disk-0.qcow2");
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(fs::metadata(&image).unwrap().len() + 65_536).unwrap();
    try_export(&rig, &point, &json!({"disk_id": 0})).await.expect_problem(409, "point_damaged");
    rig.expect_nothing_left(2).await;
    let body = json!({"disk_id": 0, "accept_damage": true});
    let export = try_export(&rig, &point, &body).await.expect_status(201).json();
    assert_eq!(read_all(&client(&export).await).await, rig.disks[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_points_are_exported_at_once_without_a_kernel_device() {
    let mut rig = rig_on(&many_free_ports(32), "").await;
    // Others mount and attach what they like meanwhile: what counts is what would be ours.
    let folder = rig.service.folder.path().to_str().unwrap().to_owned();
    let kernel = || {
        let devices = fs::read_dir("/sys/block")
            .map(|entries| {
                entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("nbd")).count()
            })
            .unwrap_or(0);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        (devices, mounts.lines().filter(|line| line.contains(&folder) || line.contains("/dev/nbd")).count())
    };
    let before = kernel();
    let mut states = Vec::new();
    for round in 0..20_u8 {
        if round > 0 {
            rig.write(&[(KEY, usize::from(round) * 4096, content(round, 4096))]);
        }
        states.push((commit(&rig).await, rig.disks[0].1.clone()));
    }
    let mut exports = Vec::new();
    for (point, bytes) in &states {
        exports.push((export(&rig, point, "read-only").await, bytes));
    }
    let clients: Vec<Client> = futures_util::future::join_all(exports.iter().map(|(export, _)| client(export))).await;
    for (client, (_, bytes)) in clients.iter().zip(&exports) {
        assert!(read_all(client).await == **bytes, "a point reads as it was");
    }
    assert_eq!(kernel(), before);
    drop(clients);
    for (export, _) in &exports {
        rig.service.delete(&path_of(export)).await.expect_status(204);
    }
    rig.expect_nothing_left(20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_to_an_overlay_is_read_back_and_never_reaches_the_point() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 1).await;
    let folders: Vec<PathBuf> = {
        let mut folders = Vec::new();
        for point in rig.points().await {
            folders.push(published(&rig, point["id"].as_str().unwrap()).await);
        }
        folders
    };
    let before: Vec<_> = folders.iter().map(|folder| state_of(folder)).collect();
    let overlay = export(&rig, &point, "overlay").await;
    assert_eq!(overlay["mode"], "overlay");
    assert_eq!(overlays(&rig).len(), 1);
    let client = client(&overlay).await;
    let mut expected = rig.disks[0].1.clone();
    assert!(read_all(&client).await == expected);
    for (at, length) in [(100, 1), (70_000, 200_000), (expected.len() - 512, 512)] {
        let data = content(9, length);
        expected[at..at + length].copy_from_slice(&data);
        client.write(at as u64, data, Durability::OnFlush).await.unwrap();
    }
    client.flush().await.unwrap();
    assert!(read_all(&client).await == expected);
    // A second one of the same point sees nothing of it.
    let other = export(&rig, &point, "overlay").await;
    assert!(read_all(&self::client(&other).await).await == rig.disks[0].1);
    for export in [&overlay, &other] {
        rig.service.delete(&path_of(export)).await.expect_status(204);
    }
    assert!(overlays(&rig).is_empty());
    let after: Vec<_> = folders.iter().map(|folder| state_of(folder)).collect();
    assert!(before == after, "published files are as they were");
    rig.expect_nothing_left(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overlay_at_its_limit_is_a_full_disk_and_goes_on_serving() {
    let disks = vec![(KEY, content(1, 16 * MIB))];
    let ports = free_ports();
    let toml =
        format!("[restore]\nport_range = \"{}-{}\"\noverlay_limit_bytes = 4194304\n", ports.start(), ports.end());
    let rig = Rig::with(Plan { disks, toml, ..Plan::default() }).await;
    let point = commit(&rig).await;
    let overlay = export(&rig, &point, "overlay").await;
    let client = client(&overlay).await;
    let mut expected = rig.disks[0].1.clone();
    let mut refused = 0;
    for index in 0..16 {
        let data = content(50 + index, MIB);
        let at = usize::from(index) * MIB;
        match client.write(at as u64, data.clone(), Durability::BeforeReply).await {
            Ok(()) => expected[at..at + MIB].copy_from_slice(&data),
            Err(error) => {
                assert_eq!(error.errno(), Some(NO_SPACE), "{error}");
                refused += 1;
            }
        }
    }
    assert!((12..16).contains(&refused), "{refused} of 16 did not fit into 4 MiB");
    assert!(fs::metadata(&overlays(&rig)[0]).unwrap().len() <= 4 << 20);
    // What was written before can be written again, and all can be read.
    client.write(0, expected[..512].to_vec(), Durability::BeforeReply).await.unwrap();
    assert!(read_all(&client).await == expected, "a refused write changed nothing");
    rig.expect_restorable(&point).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_not_used_ends_by_itself_with_all_it_had() {
    let rig = rig("ttl_s = 1\n").await;
    let point = commit(&rig).await;
    let overlay = export(&rig, &point, "overlay").await;
    let idle = client(&overlay).await;
    let gone = async {
        while rig.service.get(&path_of(&overlay)).await.status.as_u16() == 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("it does not end");
    assert!(idle.read(0, 512).await.is_err());
    assert!(overlays(&rig).is_empty());
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_and_renewal_keep_an_export_alive() {
    const TTL: Duration = Duration::from_secs(3);
    let rig = rig("ttl_s = 3\n").await;
    let point = commit(&rig).await;
    // A machine that lets more time go by between two signs of life than an export lives proves nothing, and it is tried again.
    for _ in 0..20 {
        let mut before = Instant::now();
        let (used, renewed) = (export(&rig, &point, "read-only").await, export(&rig, &point, "read-only").await);
        let client = client(&used).await;
        let mut last = text(&renewed, "expires_at").to_owned();
        let until = before + 3 * TTL;
        let kept = loop {
            let now = Instant::now();
            if now > until {
                break true;
            }
            let read = client.read(0, 512).await;
            let answer = rig.service.post(&format!("{}/renew", path_of(&renewed)), &json!({})).await;
            let shown = rig.service.get(&path_of(&used)).await;
            if before.elapsed() >= TTL {
                break false;
            }
            before = now;
            read.unwrap();
            shown.expect_status(200);
            let expires_at = text(&answer.expect_status(200).json(), "expires_at").to_owned();
            assert!(expires_at >= last);
            last = expires_at;
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        if kept {
            assert!(last.as_str() > text(&renewed, "expires_at"));
            return;
        }
    }
    panic!("the machine was never fast enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_listen_where_they_are_told_and_are_refused_when_there_is_no_port() {
    let mut ports = free_ports();
    ports = *ports.start()..=*ports.start() + 1;
    let rig = rig_on(&ports, "bind = \"127.0.0.2\"\n").await;
    let point = commit(&rig).await;
    for _ in 0..2 {
        let export = export(&rig, &point, "read-only").await;
        assert!(text(&export, "uri").starts_with("nbd://127.0.0.2:"), "{export:#}");
        assert_eq!(read_all(&client(&export).await).await, rig.disks[0].1);
    }
    let before = lease_count(&rig).await;
    let refused = try_export(&rig, &point, &json!({"disk_id": 0})).await;
    refused.expect_problem(503, "no_ports");
    assert_eq!(lease_count(&rig).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_an_export_that_ends_is_told_that_it_goes_away() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    let export = export(&rig, &point, "read-only").await;
    let client = client(&export).await;
    let reading = tokio::spawn(async move {
        loop {
            match client.read(0, 4096).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => return error,
            }
        }
    });
    rig.service.delete(&path_of(&export)).await.expect_status(204);
    let error = tokio::time::timeout(DEADLINE, reading).await.unwrap().unwrap();
    assert_eq!(error.errno(), Some(SHUTDOWN), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_ends_its_exports_and_one_that_starts_removes_what_a_crash_left() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    let overlay = export(&rig, &point, "overlay").await;
    let client = client(&overlay).await;
    client.write(0, vec![7; 4096], Durability::OnFlush).await.unwrap();
    let Rig { service, node, .. } = rig;
    drop(node);
    let config = (*service.service.app().config).clone();
    let folder = service.stop().await;
    let left = folder.path().join("state/overlays");
    assert_eq!(fs::read_dir(&left).unwrap().count(), 0, "the overlay went with the service");
    assert!(client.read(0, 512).await.is_err());

    let crashed = left.join(format!("{}.qcow2", blockyard::id::ExportId::new()));
    fs::write(&crashed, b"left by a crash").unwrap();
    fs::write(left.join("notes.txt"), b"of a person").unwrap();
    let service = blockyard::serve::Service::start(config).await.unwrap();
    assert!(!crashed.exists() && left.join("notes.txt").exists());
    assert_eq!(leases::count(&mut service.app().store.read().await.unwrap()).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_stays_right_while_newer_backups_run_and_its_folder_is_exchanged() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 2).await;
    let expected = rig.disks[0].1.clone();
    let export = export(&rig, &point, "read-only").await;
    let client = client(&export).await;
    assert!(client.read(0, 512).await.unwrap() == expected[..512]);
    // What a merge does: the folder is exchanged for one whose images hold the same and look different.
    let folder = published(&rig, &point).await;
    let other = folder.with_extension("merging");
    fs::create_dir(&other).unwrap();
    let (image, flat) = (folder.join("disk-0.qcow2"), other.join("disk-0.qcow2"));
    let convert = ["convert", "-f", "qcow2", "-O", "qcow2", image.to_str().unwrap(), flat.to_str().unwrap()];
    tool("qemu-utils", "qemu-img", &convert);
    fs::copy(folder.join("manifest.json"), other.join("manifest.json")).unwrap();
    rustix::fs::renameat_with(rustix::fs::CWD, &folder, rustix::fs::CWD, &other, rustix::fs::RenameFlags::EXCHANGE)
        .unwrap();
    fs::remove_dir_all(&other).unwrap();
    assert!(read_all(&client).await == expected, "the files that were opened are read");

    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    });
    rig.write(&[(KEY, 0, vec![9; 8192])]);
    let started = rig.start().await;
    rig.paused().await;
    assert!(read_all(&client).await == expected);
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
    assert!(read_all(&client).await == expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_copied_and_compared_by_the_tools_of_others() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 3).await;
    let export = export(&rig, &point, "read-only").await;
    let folder = tempfile::tempdir().unwrap();
    let (source, uri) = (folder.path().join("source"), text(&export, "uri"));
    fs::write(&source, &rig.disks[0].1).unwrap();
    let source = source.to_str().unwrap();
    tool("qemu-utils", "qemu-img", &["compare", "-f", "raw", "-F", "raw", uri, source]);
    let copy = folder.path().join("nbdcopy");
    tool("libnbd-bin", "nbdcopy", &["--", uri, copy.to_str().unwrap()]);
    assert!(fs::read(copy).unwrap() == rig.disks[0].1);
    // The line that the service gives.
    let words: Vec<&str> = text(&export, "command").split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(folder.path().join(words.last().unwrap())).unwrap() == rig.disks[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_download_is_the_disk_and_any_range_of_it() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 2).await;
    let (disk, path) = (rig.disks[0].1.clone(), format!("/api/v1/points/{point}/disks/0/raw"));
    let request = |range: &str| {
        let request = rig.service.request(Method::GET, &path);
        if range.is_empty() { request } else { request.header("range", range) }
    };
    let whole = request("").send().await.unwrap();
    assert_eq!((whole.status().as_u16(), whole.content_length()), (200, Some(disk.len() as u64)));
    assert_eq!(whole.headers()["accept-ranges"], "bytes");
    assert!(whole.headers().get("etag").is_none(), "no digest was taken");
    assert!(whole.bytes().await.unwrap() == disk);
    let digest = root_of(&disk).to_string();
    set_point(&rig, SET_CONTENT_DIGEST, &digest, &point).await;
    let end = disk.len();
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=1048570-1048590", 1_048_570..1_048_591),
        ("bytes=4194000-", 4_194_000..end),
        ("bytes=-700", end - 700..end),
    ] {
        let part = request(range).send().await.unwrap();
        assert_eq!(part.status().as_u16(), 206, "{range}");
        let told = format!("bytes {}-{}/{end}", expected.start, expected.end - 1);
        assert_eq!(part.headers()["content-range"], told);
        assert_eq!(part.headers()["etag"], format!("\"{digest}\""));
        assert!(part.bytes().await.unwrap() == disk[expected], "{range}");
    }
    let answer = send(request("bytes=99999999-")).await;
    answer.expect_problem(416, "range_not_satisfiable");
    assert_eq!(answer.header("content-range"), format!("bytes */{end}"));
    let other = request("bytes=0-0").header("if-range", "\"another\"").send().await.unwrap();
    assert_eq!(other.status().as_u16(), 200, "the caller has the beginning of something else");
    drop(other);
    rig.service.get(&format!("/api/v1/points/{point}/disks/7/raw")).await.expect_problem(404, "disk_not_in_backup");
    rig.service.get(&format!("/api/v1/points/{point}/disks/x/raw")).await.expect_problem(404, "disk_not_in_backup");
    expect_no_leases(&rig).await;
    let metrics = rig.service.get("/metrics").await.text;
    assert!(metrics.contains("blockyard_restored_bytes_total{kind=\"raw\"}"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_meets_a_read_error_breaks_off_and_is_never_a_short_success() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    break_table(&published(&rig, &point).await.join("disk-0.qcow2"));
    let path = format!("/api/v1/points/{point}/disks/0/raw");
    // The connection breaks in the head of the answer or in its body, as far as the failure lets either get out.
    if let Ok(answer) = rig.service.request(Method::GET, &path).send().await {
        assert_eq!((answer.status().as_u16(), answer.content_length()), (200, Some(rig.disks[0].1.len() as u64)));
        assert!(answer.bytes().await.is_err(), "the connection breaks");
    }
    expect_no_leases(&rig).await;
}
