//! `blockyard demo` and the commands about backups and points, as the real binary.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::Value;

use crate::rig::{self, Rig, content};
use crate::support::process::blockyard;

fn demo(arguments: &[&str]) -> Output {
    blockyard().arg("demo").args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn document(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(output)))
}

#[test]
fn demo_compares_every_restored_disk_and_exits_zero() {
    let folder = tempfile::tempdir().unwrap();
    let keep = folder.path().join("demo");
    let report = document(&demo(&["--keep", keep.to_str().unwrap(), "--output", "json"]));
    let disks = report["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 3);
    let point = Path::new(report["path"].as_str().unwrap());
    assert!(point.starts_with(keep.canonicalize().unwrap()), "{report}");
    for disk in disks {
        assert_eq!(disk["equal"], true, "{disk}");
        assert_eq!(disk["source_sha256"], disk["restored_sha256"]);
        assert_eq!(disk["source_sha256"].as_str().unwrap().len(), 64);
        // Judged by others too: the image against the file it is a copy of.
        let image = point.join(format!("disk-{}.qcow2", disk["disk_id"]));
        let (image, source) = (image.to_str().unwrap(), disk["source"].as_str().unwrap());
        rig::tool("qemu-utils", "qemu-img", &["check", "-f", "qcow2", image]);
        rig::tool("qemu-utils", "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, source]);
        assert_eq!(disk["read_bytes"], std::fs::metadata(source).unwrap().len());
    }
    // The mostly empty disk is stored as such.
    assert!(disks[1]["stored_bytes"].as_u64().unwrap() < disks[1]["read_bytes"].as_u64().unwrap() / 2);
    let again = demo(&["--keep", keep.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(2), "{}", said(&again));
    assert!(said(&again).contains("is not empty"), "{}", said(&again));
}

#[test]
fn demo_takes_real_disks_raw_and_qcow2_and_only_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, odd, qcow2) = (path("raw"), path("odd"), path("image.qcow2"));
    std::fs::write(&raw, content(1, (3 << 20) + 512)).unwrap();
    std::fs::write(&odd, content(2, 70_001)).unwrap();
    rig::tool("qemu-utils", "qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]);
    let before: Vec<Vec<u8>> = [&raw, &odd, &qcow2].iter().map(|path| std::fs::read(path).unwrap()).collect();
    let report = document(&demo(&["--disk", &raw, "--disk", &odd, "--disk", &qcow2, "--output", "json"]));
    let disks = report["disks"].as_array().unwrap();
    assert!(disks.len() == 3 && disks.iter().all(|disk| disk["equal"] == true), "{report:#}");
    assert_eq!(disks[0]["source_sha256"], disks[2]["source_sha256"], "one disk in two formats");
    assert_eq!(disks[1]["read_bytes"], 70_144, "in whole sectors");
    let after: Vec<Vec<u8>> = [&raw, &odd, &qcow2].iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(before == after, "a disk was changed");
    // Without --keep nothing is left.
    assert!(!Path::new(report["path"].as_str().unwrap()).exists());

    for wrong in [path("missing"), folder.path().to_str().unwrap().to_owned()] {
        let output = demo(&["--disk", &wrong]);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    }
    std::fs::write(path("empty"), "").unwrap();
    assert_eq!(demo(&["--disk", &path("empty")]).status.code(), Some(2));
}

#[test]
fn demo_prints_a_table_for_people() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, content(1, 1 << 20)).unwrap();
    let output = demo(&["--disk", disk.to_str().unwrap()]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for word in ["disk", "read", "stored", "seconds", "SHA-256 of source", "equal", "exactly as it was", "--keep DIR"] {
        assert!(text.contains(word), "{word:?} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn demo_that_serves_can_be_tried_with_curl_until_it_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, content(1, 1 << 20)).unwrap();
    let mut child = blockyard()
        .args(["demo", "--serve", "--disk", disk.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut url, mut token_file) = (String::new(), String::new());
    for line in BufReader::new(child.stdout.as_mut().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(found) = line.strip_prefix("url ") {
            url = found.trim().to_owned();
        }
        if let Some(found) = line.strip_prefix("token ") {
            token_file = found.trim().to_owned();
            break;
        }
    }
    let cli = |arguments: &[&str]| {
        let output = blockyard()
            .args(arguments)
            .env("BLOCKYARD_URL", &url)
            .env("BLOCKYARD_TOKEN_FILE", &token_file)
            .output()
            .unwrap();
        (output.status.code(), said(&output))
    };
    let (code, text) = cli(&["backup", "start", "demo-vm", "--repository", "demo", "--type", "full", "--wait"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("committed"), "{text}");
    let (code, text) = cli(&["point", "list"]);
    assert_eq!((code, text.matches("demo-vm").count()), (Some(0), 2), "{text}");
    Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap();
    let status = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(!Path::new(&token_file).exists(), "nothing is left of it");
}

/// Runs a command against the rig's service, away from the threads that serve it.
async fn cli(rig: &Rig, arguments: &[&str]) -> (i32, String) {
    let mut command = blockyard();
    command.args(arguments).env("BLOCKYARD_URL", rig.service.service.url());
    command.env("BLOCKYARD_TOKEN_FILE", rig.service.folder.path().join("state/token"));
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (output.status.code().unwrap(), said(&output))
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_started_listed_shown_and_cancelled_by_command() {
    let rig = Rig::new().await;
    let start = ["backup", "start", "db-server", "--repository", "main", "--tag", "reason=nightly", "--wait"];
    let (code, text) = cli(&rig, &start).await;
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("committed") && text.contains("success") && text.contains("first_backup"), "{text}");
    let point = rig.points().await.remove(0);
    let id = point["id"].as_str().unwrap();
    assert_eq!(rig.backup(id).await["tags"]["reason"], "nightly");
    for command in [["backup", "show", id], ["point", "show", id]] {
        let (code, text) = cli(&rig, &command).await;
        assert!(code == 0 && text.contains(id), "{text}");
    }
    for command in [["backup", "list"], ["point", "list"]] {
        let (code, text) = cli(&rig, &command).await;
        assert!(code == 0 && text.contains(id), "{text}");
    }
    let (code, text) = cli(&rig, &["backup", "list", "--status", "failed"]).await;
    assert!(code == 0 && !text.contains(id), "{text}");

    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    });
    let (code, text) = cli(&rig, &["backup", "start", &rig.vm, "--repository", "main", "--quiet"]).await;
    assert_eq!((code, text.as_str()), (0, ""));
    let (code, text) = cli(&rig, &["backup", "start", "db-server", "--repository", "main"]).await;
    assert!(code == 5 && text.contains("backup_in_progress"), "{code} {text}");
    let running = rig.service.get("/api/v1/backups?status=running").await.json();
    let running = running["backups"][0]["backup_id"].as_str().unwrap().to_owned();
    let (code, text) = cli(&rig, &["backup", "cancel", &running]).await;
    assert!(code == 0 && text.contains(&running), "{text}");
    assert_eq!(rig.end_of(&running).await["state"], "cancelled");
    rig.expect_nothing_left(1).await;

    for command in [["backup", "show", "x"], ["backup", "cancel", "x"], ["point", "show", "../backups"]] {
        let (code, text) = cli(&rig, &command).await;
        assert!(code == 4 && text.contains("there is no"), "{code} {text}");
    }
    let (code, _) = cli(&rig, &["backup", "start", "nobody", "--repository", "main"]).await;
    assert_eq!(code, 4);
    let (code, _) = cli(&rig, &["backup", "start", "db-server", "--repository", "main", "--type", "incremental"]).await;
    assert_eq!(code, 2);
}
