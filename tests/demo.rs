//! `blockyard demo` as a user runs it: the real binary, and QEMU's tools to judge what it leaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::process::blockyard;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader, Lines};
use tokio::process::Child;

/// How long a demo may take as a whole. Never a measure of speed: the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(180);

/// A demo whose temporary folders go into a folder of the test.
struct Demo {
    temporary: TempDir,
    command: Command,
}

impl Demo {
    fn new() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let mut command = blockyard();
        command.arg("demo").env("TMPDIR", temporary.path()).stdin(Stdio::null());
        Self { temporary, command }
    }

    fn with(arguments: &[&str]) -> Self {
        let mut demo = Self::new();
        demo.command.args(arguments);
        demo
    }

    fn disk(mut self, path: &Path) -> Self {
        self.command.arg("--disk").arg(path);
        self
    }

    fn keep(mut self, path: &Path) -> Self {
        self.command.arg("--keep").arg(path);
        self
    }

    /// Runs it to its end, which leaves no temporary file.
    async fn run(self) -> Output {
        let mut command = tokio::process::Command::from(self.command);
        command.kill_on_drop(true);
        let ended = tokio::time::timeout(DEADLINE, command.output()).await.expect("the demo did not end");
        expect_empty(self.temporary.path());
        ended.unwrap()
    }

    /// Starts it, to be looked at while it runs.
    fn spawn(self) -> (TempDir, Child) {
        let mut command = tokio::process::Command::from(self.command);
        let child = command.kill_on_drop(true).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        (self.temporary, child)
    }
}

fn expect_empty(folder: &Path) {
    let left: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Holds that a kept folder has what it should, and no copy.
fn expect_kept(folder: &Path) {
    let mut left: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["blockyard.toml", "disks", "repository", "state", "vcenter-password"]);
}

#[track_caller]
fn expect_exit(output: &Output, code: i32) -> (String, String) {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert_eq!(output.status.code(), Some(code), "{stdout}\n{stderr}");
    (stdout, stderr)
}

/// Runs a foreign tool that must succeed.
fn tool(package: &str, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; install the package {package}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Holds that QEMU finds the image of a disk sound, and reads what its source was.
fn expect_same_by_qemu(image: &str, sha256_source: &str) {
    tool("qemu-utils", "qemu-img", &["check", "-f", "qcow2", image]);
    let raw = tempfile::NamedTempFile::new().unwrap();
    let raw = raw.path().to_str().unwrap();
    tool("qemu-utils", "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, raw]);
    assert_eq!(sha256_of(raw), sha256_source, "{image}");
}

fn sha256_of(file: &str) -> String {
    let printed = tool("coreutils", "sha256sum", &[file]);
    // A name with unusual characters is announced by a backslash.
    printed.trim_start_matches('\\').split(' ').next().unwrap().to_owned()
}

fn rows<'a>(document: &'a Value, field: &str) -> &'a [Value] {
    document[field].as_array().unwrap_or_else(|| panic!("no {field}: {document:#}"))
}

fn texts<'a>(rows: &'a [Value], field: &str) -> Vec<&'a str> {
    rows.iter().map(|row| row[field].as_str().unwrap_or_else(|| panic!("no {field}: {row:#}"))).collect()
}

/// Holds that the document tells of three points, two of them incremental for all disks, that each of them came back, and
/// that a copy of them was merged, restored again, and then damaged to be found so.
fn expect_whole_story(document: &Value) {
    assert_eq!((&document["success"], &document["equal"]), (&json!(true), &json!(true)), "{document:#}");
    let disks = rows(document, "disks");
    let points = rows(document, "points");
    assert_eq!(texts(points, "backup_type"), ["full", "incremental", "incremental"]);
    assert_eq!(texts(points, "result"), ["success"; 3]);
    let restores = rows(document, "restores");
    for point in points {
        let of_point: Vec<&Value> = restores.iter().filter(|restore| restore["point"] == point["point"]).collect();
        assert_eq!(of_point.len(), disks.len(), "{document:#}");
        for ((restore, stored), disk) in of_point.iter().zip(rows(point, "disks")).zip(disks) {
            assert_eq!(stored["effective_type"], point["backup_type"], "{point:#}");
            assert_eq!(restore["sha256_source"], stored["sha256_source"], "{restore:#}");
            assert_eq!(restore["sha256_restored"], stored["sha256_source"], "{restore:#}");
            assert_eq!((&restore["read_bytes"], &restore["equal"]), (&disk["size_bytes"], &json!(true)));
        }
    }
    // The oldest was merged into the next, and what was left came back once more.
    let ids = texts(points, "backup_id");
    let merge = &document["merge"];
    assert_eq!((&merge["happened"], &merge["removed"], &merge["into"]), (&json!(true), &json!(ids[0]), &json!(ids[1])));
    for point in &points[1..] {
        let again = rows(merge, "restores").iter().filter(|restore| restore["point"] == point["point"]);
        let again: Vec<&Value> = again.collect();
        assert_eq!(again.len(), disks.len(), "{document:#}");
        for (restore, stored) in again.iter().zip(rows(point, "disks")) {
            assert_eq!(restore["backup_id"], point["backup_id"]);
            assert_eq!(restore["sha256_restored"], stored["sha256_source"], "{restore:#}");
        }
    }
    // Everything was sound until a bit was flipped; then the file was named, and what lies upon it is not trusted.
    let verified = rows(document, "verified");
    assert_eq!(texts(rows(&verified[0], "points"), "backup_id"), ids);
    assert_eq!(texts(rows(&verified[1], "points"), "backup_id"), ids[1..]);
    for verified in verified {
        assert!(texts(rows(verified, "points"), "trust").iter().all(|trust| *trust == "verified"), "{verified:#}");
    }
    let damage = &document["damage"];
    assert_eq!((&damage["found"], &damage["file"]), (&json!(true), &json!("disk-0.qcow2")), "{damage:#}");
    let found = rows(&damage["verification"], "points");
    assert_eq!(texts(found, "trust"), ["corrupt", "suspect"], "{damage:#}");
    assert_eq!((&found[0]["backup_id"], &found[0]["files"]), (&json!(ids[1]), &json!(["disk-0.qcow2"])), "{damage:#}");
    // Every disk changed from point to point.
    for (before, after) in points.iter().zip(&points[1..]) {
        for (before, after) in rows(before, "disks").iter().zip(rows(after, "disks")) {
            assert_ne!(before["sha256_source"], after["sha256_source"], "{document:#}");
        }
    }
}

fn document(output: &Output) -> Value {
    let (stdout, stderr) = expect_exit(output, 0);
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}\n{stderr}"))
}

/// Lines of a stream, up to the first that begins so.
async fn line_with(lines: &mut Lines<impl tokio::io::AsyncBufRead + Unpin>, begin: &str) -> String {
    let wait = async {
        let mut seen = Vec::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.starts_with(begin) {
                return line;
            }
            seen.push(line);
        }
        panic!("no line begins with {begin:?}: {seen:#?}");
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("no line {begin:?} in time"))
}

fn lines<R: AsyncRead + Unpin>(stream: Option<R>) -> Lines<BufReader<R>> {
    BufReader::new(stream.unwrap()).lines()
}

fn signal(child: &Child, name: &str) {
    let id = child.id().expect("it has ended").to_string();
    assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
}

async fn exit_code(child: &mut Child) -> Option<i32> {
    tokio::time::timeout(DEADLINE, child.wait()).await.expect("it did not end").unwrap().code()
}

#[tokio::test]
async fn demo_compares_every_restored_disk_and_exits_zero() {
    tool("e2fsprogs", "sh", &["-c", "PATH=$PATH:/usr/sbin:/sbin command -v mke2fs"]);
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("kept");
    let output = Demo::with(&["--output", "json"]).keep(&kept).run().await;
    let document = document(&output);
    expect_kept(&kept);
    expect_whole_story(&document);
    let disks = rows(&document, "disks");
    let keys: Vec<_> = disks.iter().map(|disk| disk["device_key"].as_u64().unwrap()).collect();
    assert_eq!(keys, [2000, 2001, 2016]);
    for (number, point) in rows(&document, "points").iter().enumerate() {
        for (disk, stored) in disks.iter().zip(rows(point, "disks")) {
            let [size, covered] = [&disk["size_bytes"], &stored["covered_bytes"]].map(|bytes| bytes.as_u64().unwrap());
            if number == 0 {
                assert_eq!(covered, size, "{point:#}");
                assert_eq!(sha256_of(disk["source"].as_str().unwrap()), stored["sha256_source"].as_str().unwrap());
            } else {
                assert!(0 < covered && covered < size / 20, "{covered} of {size}: {point:#}");
            }
            // What is kept is three points that need nothing but QEMU.
            expect_same_by_qemu(stored["image"].as_str().unwrap(), stored["sha256_source"].as_str().unwrap());
        }
    }
    let sizes = disks.iter().map(|disk| disk["size_bytes"].as_u64().unwrap());
    assert!(sizes.clone().any(|size| size % 65_536 != 0 && size % 512 == 0), "{document:#}");
    // A boot sector, a partition from 1 MiB on, and an ext4 file system in it.
    let system = File::open(disks[0]["source"].as_str().unwrap()).unwrap();
    let bytes = |offset| {
        let mut bytes = [0; 2];
        system.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    assert_eq!(bytes(510), [0x55, 0xaa]);
    assert_eq!(bytes((1 << 20) + 1024 + 56), [0x53, 0xef]);
}

#[tokio::test]
async fn given_images_are_backed_up_and_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    let system = folder.path().join("file system, with spaces");
    File::create(&system).unwrap().set_len(24 << 20).unwrap();
    let mke2fs = format!("PATH=$PATH:/usr/sbin:/sbin; mke2fs -q -F -t ext4 '{}'", system.display());
    tool("e2fsprogs", "sh", &["-c", &mke2fs]);
    let image = folder.path().join("other.qcow2");
    tool("qemu-utils", "qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1G"]);
    // Large enough to change in parts only.
    File::options().write(true).open(&image).unwrap().set_len((4 << 20) + 512).unwrap();
    let facts = |path: &Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o444)).unwrap();
        (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified().unwrap())
    };
    let before = [facts(&system), facts(&image)];

    let output =
        Demo::with(&["--output", "json"]).disk(&system).disk(&image).keep(&folder.path().join("kept")).run().await;
    let document = document(&output);
    expect_whole_story(&document);
    assert_eq!(rows(&document, "disks").len(), 2);
    for (given, disk) in [&system, &image].into_iter().zip(rows(&document["points"][0], "disks")) {
        assert_eq!(sha256_of(given.to_str().unwrap()), disk["sha256_source"].as_str().unwrap());
    }
    assert!(before == [facts(&system), facts(&image)], "a given disk was changed");

    let output = Demo::new().disk(&image).run().await;
    let (stdout, stderr) = expect_exit(&output, 0);
    assert!(stderr.contains("is a qcow2 image: its bytes are backed up as they are"), "{stderr}");
    assert!(stdout.contains("5 of 5 restored disks equal") && stdout.contains("--keep DIR"), "{stdout}");
}

#[tokio::test]
async fn disk_that_comes_back_otherwise_than_it_was_makes_the_exit_code_one() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    // Copying the first disk takes long enough to change the second, whose hash has been taken.
    File::create(&first).unwrap().set_len(512 << 20).unwrap();
    fs::write(&second, vec![7; 4 << 20]).unwrap();
    let (_temporary, mut child) = Demo::new().disk(&first).disk(&second).spawn();
    line_with(&mut lines(child.stderr.take()), "point 1: full backup").await;
    // Where no later state writes.
    File::options().write(true).open(&second).unwrap().write_all_at(&[8], (2 << 20) - 1).unwrap();
    let mut stdout = lines(child.stdout.take());
    let row = line_with(&mut stdout, "        1     1  4.0 MiB").await;
    assert!(row.ends_with("NO"), "{row}");
    // The later points hold the change, and are as their sources were.
    for begin in ["        2     1  ", "        3     1  ", "2 merged      1  ", "3 upon it     1  "] {
        let row = line_with(&mut stdout, begin).await;
        assert!(row.ends_with("yes"), "{row}");
    }
    line_with(&mut stdout, "9 of 10 restored disks equal").await;
    assert_eq!(exit_code(&mut child).await, Some(1));
}

#[tokio::test]
async fn failed_backup_is_told_with_its_code() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    // Copying the first disk takes long enough to cut the second.
    File::create(&first).unwrap().set_len(256 << 20).unwrap();
    fs::write(&second, [7; 1024]).unwrap();
    let (temporary, mut child) = Demo::new().disk(&first).disk(&second).spawn();
    let mut stderr = lines(child.stderr.take());
    line_with(&mut stderr, "point 1: full backup").await;
    File::options().write(true).open(&second).unwrap().set_len(512).unwrap();
    let told = line_with(&mut stderr, "blockyard: the backup ended as failed: ").await;
    assert!(told.contains("the client said: ") && told.ends_with("(client_disconnected)"), "{told}");
    assert_eq!(exit_code(&mut child).await, Some(1));
    expect_empty(temporary.path());
}

#[tokio::test]
async fn interrupted_demo_leaves_nothing() {
    let moments = [
        "making three disks",
        "copy disk 0",
        "point 2: incremental backup",
        "point 1: restore over NBD",
        "copying the repository",
        "copy of the repository: retention",
        "point 3 upon it: restore over NBD",
    ];
    for begin in moments {
        let (temporary, mut child) = Demo::new().spawn();
        let mut stderr = lines(child.stderr.take());
        line_with(&mut stderr, begin).await;
        signal(&child, "INT");
        assert_eq!(exit_code(&mut child).await, Some(130), "{begin}");
        expect_empty(temporary.path());
    }
}

#[tokio::test]
async fn interrupted_demo_that_is_kept_leaves_no_copy() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    // Large enough for a signal to come before the end.
    File::create(&disk).unwrap().set_len(256 << 20).unwrap();
    for begin in ["copying the repository", "copy of the repository: retention"] {
        let kept = folder.path().join(begin.replace(' ', "-"));
        let (_temporary, mut child) = Demo::new().disk(&disk).keep(&kept).spawn();
        let mut stderr = lines(child.stderr.take());
        line_with(&mut stderr, begin).await;
        signal(&child, "INT");
        assert_eq!(exit_code(&mut child).await, Some(130), "{begin}");
        expect_kept(&kept);
    }
}

#[tokio::test]
async fn serving_demo_answers_the_requests_of_the_tour() {
    let folder = tempfile::tempdir().unwrap();
    let disks = [("a.raw", 8 << 20), ("b.raw", (1 << 20) + 512)].map(|(name, size)| {
        let path = folder.path().join(name);
        fs::write(&path, (0..size).map(|index: u32| (index / 700) as u8).collect::<Vec<u8>>()).unwrap();
        path
    });
    let kept = folder.path().join("kept");
    let (_temporary, mut child) = Demo::with(&["--serve"]).disk(&disks[0]).disk(&disks[1]).keep(&kept).spawn();
    let mut stdout = lines(child.stdout.take());
    let ready = line_with(&mut stdout, "ready ").await;
    let [_, url, _, token_file] = ready.split(' ').collect::<Vec<_>>()[..] else { panic!("{ready}") };
    let curl = line_with(&mut stdout, "curl ").await;
    assert!(curl.contains("/api/v1/backups/vm -d '{"), "{curl}");

    let token = fs::read_to_string(token_file).unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = |path: &str| {
        let request = client.get(format!("{url}{path}")).bearer_auth(token.trim());
        async move { support::send(request).await.expect_status(200).json() }
    };
    assert_eq!(get("/api/v1/vms").await["vms"][0]["name"], "demo-vm");
    assert_eq!(get("/api/v1/repositories").await["repositories"][0]["id"], "demo");
    // The body as the printed line has it.
    let body: Value = serde_json::from_str(curl.split('\'').nth(3).unwrap()).unwrap();
    assert_eq!(body, json!({"vm_name": "demo-vm", "repository_id": "demo", "backup_type": "auto"}));
    let back_up = async || {
        let start = client.post(format!("{url}/api/v1/backups/vm")).bearer_auth(token.trim()).json(&body);
        let started = support::send(start).await.expect_status(200).json();
        let path = format!("/api/v1/backups/{}?wait=1", started["backup_id"].as_str().unwrap());
        let ended = async {
            loop {
                let backup = get(&path).await;
                if ["committed", "failed"].contains(&backup["state"].as_str().unwrap()) {
                    return backup;
                }
            }
        };
        tokio::time::timeout(DEADLINE, ended).await.expect("the backup did not end")
    };
    let backup = back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    assert_eq!(get("/api/v1/backups?limit=1").await["backups"][0]["backup_id"], backup["backup_id"]);
    assert_eq!(get("/api/v1/points").await["points"][0]["id"], backup["backup_id"]);
    for (result, source) in backup["disk_results"].as_array().unwrap().iter().zip(&disks) {
        expect_same_by_qemu(result["qcow2_path"].as_str().unwrap(), &sha256_of(source.to_str().unwrap()));
    }
    // The same request again meets disks that have changed in between.
    for _ in 0..2 {
        let next = back_up().await;
        assert_eq!((&next["backup_type"], &next["result"]), (&json!("incremental"), &json!("success")), "{next:#}");
        assert_eq!(next["warnings"], json!([]));
        let disk = &next["disks"][0];
        let [covered, size] = [&disk["covered_bytes"], &disk["size_bytes"]].map(|bytes| bytes.as_u64().unwrap());
        assert!(disk["effective_type"] == "incremental" && 0 < covered && covered < size, "{disk:#}");
    }
    signal(&child, "TERM");
    assert_eq!(exit_code(&mut child).await, Some(0));
    assert!(kept.join("repository").is_dir());
}

#[tokio::test]
async fn kept_points_are_served_by_the_command_that_the_demo_prints() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![7; 4 << 20]).unwrap();
    let kept = folder.path().join("kept, with spaces");
    let (stdout, _) = expect_exit(&Demo::new().disk(&disk).keep(&kept).run().await, 0);
    let printed = |text: &str| stdout.lines().find(|line| line.contains(text)).unwrap_or_else(|| panic!("{stdout}"));
    let [serve, token_file, list] = [" serve --config ", "BLOCKYARD_TOKEN_FILE=", " point list"].map(printed);

    // A demo is not begun upon another one, which is told how to be looked at.
    let (_, stderr) = expect_exit(&Demo::new().disk(&disk).keep(&kept).run().await, 5);
    assert!(stderr.contains("an earlier demo") && stderr.contains(serve.trim()), "{stderr}");

    let shell = |script: &str| {
        let mut shell = tokio::process::Command::new("sh");
        shell.args(["-c", script]).kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    };
    // A free port instead of the default one, which is somebody else's here.
    let mut service = shell(&format!("BLOCKYARD__SERVER__BIND=127.0.0.1:0 exec {serve}"));
    let ready = line_with(&mut lines(service.stdout.take()), "ready ").await;
    let url = ready.split(' ').nth(1).unwrap();
    let listed = shell(&format!("{token_file}\nexport BLOCKYARD_URL={url}\n{list}")).wait_with_output();
    let listed = tokio::time::timeout(DEADLINE, listed).await.expect("the points were not listed").unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert_eq!(listed.lines().filter(|line| line.contains("demo-vm")).count(), 3, "{listed}");
    signal(&service, "TERM");
    assert_eq!(exit_code(&mut service).await, Some(0));
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join("odd");
    fs::write(&odd, [1; 1000]).unwrap();
    let full = folder.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("file"), "").unwrap();
    let file_as_folder = odd.join("kept");
    let cases = [
        (Demo::new().disk(&odd), 2, "has 1000 bytes; a disk has a positive multiple of 512"),
        (Demo::new().disk(Path::new("/dev/null")), 2, "neither a file nor a block device"),
        (Demo::new().disk(folder.path()), 2, "neither a file nor a block device"),
        (Demo::new().disk(&folder.path().join("absent")), 4, "absent cannot be read"),
        (Demo::new().keep(&full), 5, "is not empty"),
        (Demo::new().keep(&file_as_folder), 1, "cannot be made"),
        (Demo::with(&["--disk"]), 2, "--disk"),
        (Demo::with(&["--keep", ""]), 2, "--keep"),
    ];
    for (demo, code, text) in cases {
        let (stdout, stderr) = expect_exit(&demo.run().await, code);
        assert!(stdout.is_empty() && stderr.contains(text), "{text:?}: {stdout}{stderr}");
    }
    assert_eq!(fs::read_dir(&full).unwrap().count(), 1);
}

#[tokio::test]
async fn quiet_demo_prints_the_table_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, [5; 512]).unwrap();
    let (stdout, stderr) = expect_exit(&Demo::with(&["--quiet"]).disk(&disk).run().await, 0);
    assert!(stdout.starts_with("point      disk  read ") && !stdout.contains("restored disk"), "{stdout}");
    assert_eq!(stdout.lines().count(), 1 + 5, "{stdout}");
    assert_eq!(stderr, "");
}
