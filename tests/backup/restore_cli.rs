//! `blockyard restore`, as the real binary: what arrives, what is refused, and what is left when it goes wrong.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockyard::clock::UtcTime;
use blockyard::node::fake::Faults;
use blockyard::points::content::root_of;
use serde_json::Value;
use tempfile::TempDir;

use crate::process::Child as Hub;
use crate::restore::{client, commit, deep_chain, export, read_all, rig, set_point};
use crate::rig::{DEADLINE, Plan, Rig, content, expect_image_equals, free_ports, id_of, published};
use crate::support::process::blockyard;

const KEY: u32 = 2000;
const MIB: usize = 1 << 20;
const CLUSTER: usize = 65_536;
/// EIO on the wire.
const EIO: u32 = 5;
const SET_TRUST: &str = "UPDATE restore_points SET trust = ? WHERE id = ?";
const SET_CONTENT_DIGEST: &str = "UPDATE point_disks SET content_digest = ? WHERE point_id = ?";

/// What a command printed, and how it ended.
#[derive(Debug)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

fn command(rig: &Rig, arguments: &[&str]) -> Command {
    let mut command = blockyard();
    command.args(arguments).env("BLOCKYARD_URL", rig.service.service.url());
    command.env("BLOCKYARD_TOKEN_FILE", rig.service.folder.path().join("state/token"));
    command
}

/// Runs a command against the rig's service, away from the threads that serve it.
async fn cli(rig: &Rig, arguments: &[&str]) -> Ended {
    let mut command = command(rig, arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code().unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

async fn raw(rig: &Rig, point: &str, target: &str, more: &[&str]) -> Ended {
    let mut arguments = vec!["restore", "raw", point, "--disk", "0", "--output", target];
    arguments.extend(more);
    cli(rig, &arguments).await
}

fn path_in(folder: &TempDir, name: &str) -> (PathBuf, String) {
    let path = folder.path().join(name);
    let text = path.to_str().unwrap().to_owned();
    (path, text)
}

/// Holds that a restore left neither a file nor the export that it read from.
async fn expect_nothing_made(rig: &Rig, folder: &TempDir) {
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(rig.service.get("/api/v1/exports").await.json()["total"], 0);
}

/// `qemu-nbd` on a raw file, until dropped.
struct Server {
    child: Child,
    uri: String,
}

impl Server {
    fn start(folder: &Path, file: &Path) -> Self {
        let socket = folder.join("socket");
        let arguments = ["-f", "raw", "-t", "-x", "target", "-k", socket.to_str().unwrap(), file.to_str().unwrap()];
        Self::run("qemu-nbd", "qemu-utils", &arguments, &socket)
    }

    /// `nbdkit` with a disk that forgets what it is given.
    fn forgetful(folder: &Path, size: usize) -> Self {
        let socket = folder.join("socket");
        Self::run("nbdkit", "nbdkit", &["-f", "-U", socket.to_str().unwrap(), "null", &size.to_string()], &socket)
    }

    fn run(program: &str, package: &str, arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{program}: {error}; install the package {package}"));
        let until = std::time::Instant::now() + DEADLINE;
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(std::time::Instant::now() < until, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, uri: format!("nbd+unix:///target?socket={}", socket.display()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_restore_of_a_deep_incremental_equals_the_source() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 6).await;
    let (disk, folder) = (rig.disks[0].1.clone(), tempfile::tempdir().unwrap());
    let digest = root_of(&disk).to_string();
    let (file, target) = path_in(&folder, "disk.raw");

    let made = raw(&rig, &point, &target, &["--output", "json"]).await;
    assert_eq!(made.code, 0, "{made:?}");
    assert!(fs::read(&file).unwrap() == disk);
    let document: Value = serde_json::from_str(&made.stdout).unwrap();
    assert_eq!((&document["bytes"], &document["digest"]), (&disk.len().into(), &digest.as_str().into()));
    assert!(document["seconds"].is_f64() && document["compared_with_point"] == false, "{document:#}");

    set_point(&rig, SET_CONTENT_DIGEST, &digest, &point).await;
    fs::write(&file, b"something of mine").unwrap();
    let refused = raw(&rig, &point, &target, &[]).await;
    assert!(refused.code == 5 && refused.stderr.contains("--force"), "{refused:?}");
    assert_eq!(fs::read(&file).unwrap(), b"something of mine");
    let forced = raw(&rig, &point, &target, &["--force"]).await;
    assert!(forced.code == 0 && forced.stdout.contains("as it was backed up"), "{forced:?}");
    assert!(fs::read(&file).unwrap() == disk);
    fs::remove_file(&file).unwrap();

    let (image, target) = path_in(&folder, "disk.qcow2");
    let made = raw(&rig, &point, &target, &["--format", "qcow2"]).await;
    assert_eq!(made.code, 0, "{made:?}");
    expect_image_equals(&image, &disk);
    fs::remove_file(&image).unwrap();
    expect_nothing_made(&rig, &folder).await;

    // The other ways out go through the whole chain as well.
    assert!(download(&rig, &point, None).await.unwrap() == disk);
    for mode in ["read-only", "overlay"] {
        assert!(read_all(&client(&export(&rig, &point, mode).await).await).await == disk, "{mode}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_disk_can_be_read_by_its_owner_only_unless_a_file_with_another_mode_was_there() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    let folder = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for format in ["raw", "qcow2"] {
        let (file, target) = path_in(&folder, format);
        let made = raw(&rig, &point, &target, &["--format", format]).await;
        assert_eq!((made.code, mode(&file)), (0, 0o600), "{format}: {made:?}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let made = raw(&rig, &point, &target, &["--format", format, "--force"]).await;
        assert_eq!((made.code, mode(&file)), (0, 0o640), "{format}: {made:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_restore_onto_an_nbd_server_leaves_nothing_of_what_was_there() {
    let mut rig = rig("").await;
    let point = deep_chain(&mut rig, 1).await;
    let (disk, folder) = (rig.disks[0].1.clone(), tempfile::tempdir().unwrap());
    let file = folder.path().join("volume");
    // Larger than the disk, and full of something else.
    fs::write(&file, vec![0xee; disk.len() + 4096]).unwrap();
    let server = Server::start(folder.path(), &file);
    let made = raw(&rig, &point, &server.uri, &[]).await;
    assert_eq!(made.code, 0, "{made:?}");
    let written = fs::read(&file).unwrap();
    assert!(written[..disk.len()] == disk);
    assert!(
        written[disk.len()..].iter().all(|byte| *byte == 0xee),
        "what lies behind the disk is none of its business"
    );
    let wrong = raw(&rig, &point, &server.uri, &["--format", "qcow2"]).await;
    assert_eq!(wrong.code, 2, "{wrong:?}");
    drop(server);
    fs::write(&file, vec![0xee; disk.len() - 512]).unwrap();
    fs::remove_file(folder.path().join("socket")).unwrap();
    let small = Server::start(folder.path(), &file);
    let refused = raw(&rig, &point, &small.uri, &[]).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(fs::read(&file).unwrap().iter().all(|byte| *byte == 0xee));
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_restore_of_a_sparse_disk_is_sparse() {
    // 64 MiB, of which 2 are data, in two places and of odd offsets.
    let mut disk = vec![0; 64 * MIB];
    for (seed, at) in [(1, 3 * MIB + 4096), (2, 40 * MIB - 8192)] {
        disk[at..at + MIB].copy_from_slice(&content(seed, MIB));
    }
    let ports = free_ports();
    let toml = format!("[restore]\nport_range = \"{}-{}\"\n", ports.start(), ports.end());
    let rig = Rig::with(Plan { disks: vec![(KEY, disk.clone())], toml, ..Plan::default() }).await;
    let point = commit(&rig).await;
    let folder = tempfile::tempdir().unwrap();
    let (file, target) = path_in(&folder, "disk.raw");
    let made = raw(&rig, &point, &target, &[]).await;
    assert_eq!(made.code, 0, "{made:?}");
    assert!(fs::read(&file).unwrap() == disk);
    let taken = fs::metadata(&file).unwrap().blocks() * 512;
    assert!(taken <= 3 * MIB as u64, "{taken} bytes are taken for 2 MiB of data");
    let (image, target) = path_in(&folder, "disk.qcow2");
    let made = raw(&rig, &point, &target, &["--format", "qcow2"]).await;
    assert_eq!(made.code, 0, "{made:?}");
    let length = fs::metadata(&image).unwrap().len();
    assert!(length <= 4 * MIB as u64, "{length} bytes are taken for 2 MiB of data");
    // To an NBD server zeroes go as such.
    let overlay = export(&rig, &point, "overlay").await;
    let made = raw(&rig, &point, overlay["uri"].as_str().unwrap(), &[]).await;
    assert_eq!(made.code, 0, "{made:?}");
    let served = rig.service.get("/api/v1/nbd/exports").await.json();
    let counts = &served["exports"][0]["counts"];
    assert!(counts["bytes_written"].as_u64().unwrap() <= 3 * MIB as u64, "{counts}");
    assert!(counts["bytes_zeroed"].as_u64().unwrap() >= 61 * MIB as u64, "{counts}");
}

/// A disk, or a part of it, as the service sends it.
async fn download(rig: &Rig, point: &str, range: Option<&str>) -> reqwest::Result<Vec<u8>> {
    let request = rig.service.request(reqwest::Method::GET, &format!("/api/v1/points/{point}/disks/0/raw"));
    let request = range.into_iter().fold(request, |request, range| request.header("range", range));
    // A connection may break before the answer has begun.
    let answer = request.send().await?;
    assert!(answer.status().is_success() && answer.content_length().is_some(), "{answer:?}");
    Ok(answer.bytes().await?.to_vec())
}

/// Holds that no way out of the point gets past a cluster that cannot be read. A copy may fail from the byte `first` on.
async fn expect_no_way_past(rig: &Rig, point: &str, cluster: usize, first: usize, folder: &TempDir) {
    let (place, size) = (cluster * CLUSTER, rig.disks[0].1.len());
    let end = (place + CLUSTER).min(size);
    for (name, more) in [("disk.raw", &[][..]), ("disk.qcow2", &["--format", "qcow2"][..])] {
        let (_, target) = path_in(folder, name);
        let failed = raw(rig, point, &target, more).await;
        assert_eq!(failed.code, 1, "cluster {cluster}: {failed:?}");
        let offset = failed.stderr.split("at offset ").nth(1).and_then(|rest| rest.split(':').next());
        let offset: usize = offset.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{failed:?}"));
        assert!((first..=place).contains(&offset), "cluster {cluster}: {failed:?}");
    }
    expect_nothing_made(rig, folder).await;
    let parts = [None, Some(format!("bytes={}-{}", place + 1, end - 1)), Some(format!("bytes=0-{place}"))];
    for part in &parts {
        let arrived = download(rig, point, part.as_deref()).await;
        assert!(arrived.is_err(), "cluster {cluster}, {part:?}: {:?} bytes", arrived.map(|bytes| bytes.len()));
    }
    for mode in ["read-only", "overlay"] {
        let export = export(rig, point, mode).await;
        let client = client(&export).await;
        let length = u32::try_from(end - place).unwrap();
        for (offset, length) in [(place as u64, length), (end as u64 - 1, 1), (0, u32::try_from(size).unwrap())] {
            let read = client.read(offset, length).await;
            assert_eq!(read.unwrap_err().errno(), Some(EIO), "cluster {cluster}, {mode}");
        }
        drop(client);
        rig.service.delete(&format!("/api/v1/exports/{}", export["id"].as_str().unwrap())).await.expect_status(204);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn read_error_in_any_block_fails_the_restore() {
    let mut rig = rig("").await;
    let full = commit(&rig).await;
    // Blocks of the full are read through an image that has others.
    rig.write(&[(KEY, 3 * CLUSTER, content(7, 512)), (KEY, 50 * CLUSTER - 100_352, content(8, 512))]);
    let point = commit(&rig).await;
    let image = published(&rig, &full).await.join("disk-0.qcow2");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let word = |at: u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    };
    let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    let data = word(l2) & 0x00ff_ffff_ffff_fe00;
    let folder = tempfile::tempdir().unwrap();
    let clusters = rig.disks[0].1.len().div_ceil(CLUSTER);
    let mut tried = 0;
    for cluster in (0..clusters).step_by(13).chain([clusters - 1]) {
        let entry = l2 + cluster as u64 * 8;
        let sound = word(entry);
        // A compressed cluster in a place where nothing is that was ever compressed: it is found in its block of the copy. Then an
        // offset at which no cluster can be: nothing that its table maps can be read.
        for (unreadable, first) in [(1 << 62 | data, cluster * CLUSTER / MIB * MIB), (0x8000_0000_0000_0200, 0)] {
            file.write_all_at(&u64::to_be_bytes(unreadable), entry).unwrap();
            expect_no_way_past(&rig, &point, cluster, first, &folder).await;
        }
        file.write_all_at(&sound.to_be_bytes(), entry).unwrap();
        tried += 1;
    }
    assert!(tried > 4);
    let (path, target) = path_in(&folder, "disk.raw");
    assert_eq!(raw(&rig, &point, &target, &[]).await.code, 0);
    assert!(fs::read(path).unwrap() == rig.disks[0].1);
    assert!(download(&rig, &point, None).await.unwrap() == rig.disks[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_not_what_was_backed_up_is_told_and_kept_only_for_who_accepts_damage() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    set_point(&rig, SET_CONTENT_DIGEST, &root_of(b"another disk").to_string(), &point).await;
    let folder = tempfile::tempdir().unwrap();
    let (file, target) = path_in(&folder, "disk.raw");
    let differs = raw(&rig, &point, &target, &[]).await;
    assert!(differs.code == 6 && differs.stderr.contains("not what was backed up"), "{differs:?}");
    expect_nothing_made(&rig, &folder).await;
    let accepted = raw(&rig, &point, &target, &["--accept-damage"]).await;
    assert!(accepted.code == 6 && accepted.stderr.contains(&format!("{target} was made and kept")), "{accepted:?}");
    set_point(&rig, SET_TRUST, "corrupt", &point).await;
    let refused = raw(&rig, &point, &path_in(&folder, "another.raw").1, &[]).await;
    assert!(refused.code == 6 && refused.stderr.contains("point_damaged"), "{refused:?}");
    assert!(fs::read(file).unwrap() == rig.disks[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_does_not_hold_what_was_written_to_it_is_told() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    let folder = tempfile::tempdir().unwrap();
    let server = Server::forgetful(folder.path(), rig.disks[0].1.len());
    let differs = raw(&rig, &point, &server.uri, &[]).await;
    assert!(differs.code == 6 && differs.stderr.contains("does not hold what was written"), "{differs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_is_refused_with_the_exit_code_of_its_kind() {
    let rig = rig("").await;
    let point = commit(&rig).await;
    let folder = tempfile::tempdir().unwrap();
    let (_, target) = path_in(&folder, "disk.raw");
    let unknown = blockyard::id::BackupId::new().to_string();
    for point in [unknown.as_str(), "nonsense", "../backups"] {
        let ended = raw(&rig, point, &target, &[]).await;
        assert_eq!(ended.code, 4, "{ended:?}");
    }
    let ended = cli(&rig, &["restore", "raw", &point, "--disk", "9", "--output", &target]).await;
    assert_eq!(ended.code, 4, "{ended:?}");
    for arguments in [
        &["restore", "raw", &point, "--disk", "0"][..],
        &["restore", "raw", &point, "--disk", "0", "--output", &target, "--output", "b"],
        &["restore", "raw", &point, "--disk", "0", "--output", "json"],
        &["point", "list", "--output", &target],
        &["restore", "export", &point, "--output", "xml"],
    ] {
        let ended = cli(&rig, arguments).await;
        assert_eq!(ended.code, 2, "{arguments:?} {ended:?}");
    }
    for arguments in [&["restore", "raw", &point, "--output", &target][..], &["restore", "raw", "--help"]] {
        let ended = cli(&rig, arguments).await;
        let text = format!("{}{}", ended.stdout, ended.stderr);
        assert!(text.contains("Usage: blockyard restore raw [OPTIONS] --disk <N> --output <TARGET> <POINT>"), "{text}");
        assert!(!text.contains("--output <FORMAT>") && !text.contains("[default: text]"), "{text}");
    }
    let (taken, text) = path_in(&folder, "folder");
    fs::create_dir(&taken).unwrap();
    assert_eq!(raw(&rig, &point, &text, &["--force"]).await.code, 2);
    fs::remove_dir(&taken).unwrap();
    let (left, _) = path_in(&folder, "disk.raw.partial");
    fs::write(&left, b"of another restore").unwrap();
    let ended = raw(&rig, &point, &target, &[]).await;
    assert!(ended.code == 5 && ended.stderr.contains("partial"), "{ended:?}");
    assert_eq!(fs::read(&left).unwrap(), b"of another restore");
    fs::remove_file(&left).unwrap();
    expect_nothing_made(&rig, &folder).await;
}

/// The exports of the service when there are so many.
async fn exports(rig: &Rig, count: usize) -> Vec<Value> {
    let found = async {
        loop {
            let listed = rig.service.get("/api/v1/exports").await.json();
            if listed["total"] == count {
                return listed["exports"].as_array().unwrap().clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, found).await.expect("the exports never were so many")
}

#[tokio::test(flavor = "multi_thread")]
async fn exported_disks_are_served_beyond_their_time_to_live_until_the_command_is_interrupted() {
    let ports = free_ports();
    let toml = format!("[restore]\nttl_s = 2\nport_range = \"{}-{}\"\n", ports.start(), ports.end());
    let disks = vec![(KEY, content(1, MIB)), (2016, content(2, 512))];
    let rig = Rig::with(Plan { disks, toml, ..Plan::default() }).await;
    let point = commit(&rig).await;
    let mut command = command(&rig, &["restore", "export", &point, "--output", "json", "--overlay"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let made = exports(&rig, 2).await;
    // Until each was renewed later than an export lives that nobody renews.
    let end = |export: &Value| export["expires_at"].as_str().unwrap().parse::<UtcTime>().unwrap();
    let renewed = async {
        loop {
            let again = exports(&rig, 2).await;
            assert_eq!((&made[0]["id"], &made[1]["id"]), (&again[0]["id"], &again[1]["id"]));
            if made.iter().zip(&again).all(|(made, again)| end(again).seconds_since(end(made)) > 2.0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, renewed).await.expect("the exports were not renewed");
    assert_eq!(crate::rig::expect_go(made[1]["uri"].as_str().unwrap()), 512);
    let interrupted = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["exports"].as_array().unwrap().len(), 2);
    assert!(document["exports"][0]["command"].as_str().unwrap().starts_with("qemu-img convert"));
    exports(&rig, 0).await;
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_command_whose_export_is_ended_by_another_ends_with_a_failure() {
    let ports = free_ports();
    let toml = format!("[restore]\nttl_s = 1\nport_range = \"{}-{}\"\n", ports.start(), ports.end());
    let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
    let point = commit(&rig).await;
    let mut command = command(&rig, &["restore", "export", &point, "--disk", "1", "--quiet"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let made = exports(&rig, 1).await;
    assert_eq!(made[0]["disk_id"], 1);
    rig.service.delete(&format!("/api/v1/exports/{}", made[0]["id"].as_str().unwrap())).await.expect_status(204);
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_command_whose_service_dies_tells_so_long_before_its_exports_would_be_renewed() {
    let hub = Hub::new(Faults::default()).await;
    let running = hub.start();
    let vm = hub.furnish(&running).await;
    let started = running.back_up(&vm).await;
    assert_eq!(running.end_of(id_of(&started)).await["state"], "committed");
    let mut command = blockyard();
    command.args(["restore", "export", id_of(&started)]).env("BLOCKYARD_URL", &running.process.url);
    command.env("BLOCKYARD_TOKEN_FILE", hub.folder.path().join("state/token"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let export = tokio::process::Command::from(command).kill_on_drop(true).spawn().unwrap();
    let served = async { while running.get("/exports").await["total"] != hub.disks.len() {} };
    tokio::time::timeout(DEADLINE, served).await.expect("nothing was exported");
    let expires = running.get("/exports").await["exports"][0]["expires_at"].clone();
    running.process.signal("KILL");
    running.process.wait();
    // A renewal would come after a third of restore.ttl_s only.
    let expires: UtcTime = expires.as_str().unwrap().parse().unwrap();
    assert!(expires.seconds_since(UtcTime::now()) / 3.0 > DEADLINE.as_secs_f64());
    let ended = tokio::time::timeout(DEADLINE, export.wait_with_output());
    let output = ended.await.expect("the death was not noticed").unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(7) && told.contains("the service has ended"), "{output:?}");
}

/// What stands between a client and a service.
struct Relay {
    url: String,
    is_broken: Arc<AtomicBool>,
}

impl Relay {
    /// Passes connections on, or hangs up on them while it is broken.
    async fn to(url: &str) -> Self {
        let service = url.strip_prefix("http://").unwrap().to_owned();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let is_broken = Arc::new(AtomicBool::new(false));
        let broken = Arc::clone(&is_broken);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (service, broken) = (service.clone(), Arc::clone(&broken));
                tokio::spawn(async move {
                    let mut service = tokio::net::TcpStream::connect(service).await.unwrap();
                    let breaks = async {
                        while !broken.load(Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut service) => {}
                        () = breaks => {}
                    }
                });
            }
        });
        Self { url, is_broken }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_command_asks_again_while_its_exports_may_still_live() {
    let ports = free_ports();
    let toml = format!("[restore]\nttl_s = 12\nport_range = \"{}-{}\"\n", ports.start(), ports.end());
    let rig = Rig::with(Plan { toml, ..Plan::default() }).await;
    let point = commit(&rig).await;
    let relay = Relay::to(&rig.service.service.url()).await;
    let mut command = command(&rig, &["restore", "export", &point, "--disk", "0"]);
    command.env("BLOCKYARD_URL", &relay.url);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (told, mut lines) = tokio::sync::mpsc::unbounded_channel();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|line| drop(told.send(line))));
    let mut line = async || tokio::time::timeout(DEADLINE, lines.recv()).await.expect("nothing is told").unwrap();
    let made = exports(&rig, 1).await;
    assert!(line().await.contains("serving until Ctrl-C"));
    relay.is_broken.store(true, Ordering::Relaxed);
    assert!(line().await.contains("once more"));
    relay.is_broken.store(false, Ordering::Relaxed);
    let end = |export: &Value| export["expires_at"].as_str().unwrap().parse::<UtcTime>().unwrap();
    let renewed = async {
        while end(&exports(&rig, 1).await[0]).seconds_since(end(&made[0])) < 1.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, renewed).await.expect("the export was not renewed");
    relay.is_broken.store(true, Ordering::Relaxed);
    // The failure comes last, when the exports are over.
    while !line().await.starts_with("blockyard: the service at") {}
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(ended.code(), Some(7));
}
