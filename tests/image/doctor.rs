//! `blockyard doctor`: what it says of real folders, and that it leaves nothing in them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::privileged::Mounted;
use crate::process::blockyard;
use crate::tools::{folder, succeed, text};

fn doctor(arguments: &[&str]) -> Output {
    blockyard().args(["doctor", "--disk"]).args(arguments).output().unwrap()
}

/// Its exit code and standard error, with nothing on standard output.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = doctor(arguments);
    assert!(output.stdout.is_empty(), "{output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[track_caller]
fn assert_empty(folder: &Path) {
    let left: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

fn document(path: &Path) -> Value {
    let output = doctor(&[text(path), "--size", "4M", "--output", "json"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_usable_folder_is_described_line_by_line_and_nothing_is_left_in_it() {
    let folder = folder();
    let output = doctor(&[text(folder.path()), "--size", "4M"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = String::from_utf8(output.stdout).unwrap();
    for line in [
        "folder:",
        "file system:",
        "space:",
        "direct I/O:",
        "io_uring:",
        "fallocate:",
        "hole punching:",
        "locks:",
        "exclusive rename:",
        "fdatasync:",
        "sequential writes:",
        "random writes:",
    ] {
        assert!(told.lines().any(|found| found.starts_with(line)), "{line} is missing:\n{told}");
    }
    let verdict = told.lines().last().unwrap();
    assert!(verdict.starts_with("Images here are written ") && verdict.contains(" because "), "{verdict}");
    assert_empty(folder.path());
}

#[test]
fn the_document_has_the_fields_that_the_docs_name_and_its_parts_agree() {
    let folder = folder();
    let found = document(folder.path());
    let docs = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/disks.md")).unwrap();
    let mut names: Vec<&String> = found.as_object().unwrap().keys().collect();
    for inner in ["direct_io", "io_uring", "sequential", "random"] {
        names.extend(found[inner].as_object().unwrap().keys());
    }
    assert_eq!(names.len(), 31);
    for name in names {
        assert!(docs.contains(&format!("`{name}`")), "{name} is missing in docs/disks.md");
    }
    let (has_direct, has_ring) = (&found["direct_io"]["available"], &found["io_uring"]["available"]);
    let mode = match (has_direct.as_bool().unwrap(), has_ring.as_bool().unwrap()) {
        (true, true) => "ring",
        (true, false) => "direct",
        (false, _) => "page-cache",
    };
    assert_eq!(found["mode"], mode);
    assert_eq!(found["direct_io"]["reason"].is_null(), has_direct == true);
    assert_eq!(found["io_uring"]["reason"].is_null(), has_ring == true);
    assert_eq!(found["sequential"]["bytes"], 4 << 20);
    assert_eq!(found["locks"], true);
    assert_empty(folder.path());
}

#[test]
fn of_memory_it_warns_and_says_why_the_page_cache_is_used() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let found = document(folder.path());
    assert_eq!((&found["file_system"], &found["mode"]), (&"tmpfs".into(), &"page-cache".into()), "{found:#}");
    let warnings = found["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|warning| warning.as_str().unwrap().contains("in memory")), "{warnings:?}");
    assert!(found["verdict"].as_str().unwrap().contains("through the page cache because"), "{found:#}");
    assert_empty(folder.path());
}

#[test]
fn where_no_image_can_be_written_it_says_so_and_names_the_path() {
    let folder = folder();
    let absent = folder.path().join("absent");
    let (code, error) = refused(&[text(&absent)]);
    assert!(code == 4 && error.contains(text(&absent)), "{code}: {error}");

    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, error) = refused(&[text(&file)]);
    assert!(code == 2 && error.contains("is not a folder"), "{code}: {error}");

    let read_only = folder.path().join("read-only");
    let mounted = Mounted::read_only(&read_only);
    let (code, error) = refused(&[text(&read_only)]);
    drop(mounted);
    assert!(code == 1 && error.contains("images cannot be written in"), "{code}: {error}");
    assert!(error.contains(text(&read_only)) && error.contains("Read-only"), "{error}");

    for wrong in ["0", "1", "1500K", "none"] {
        let (code, error) = refused(&[text(folder.path()), "--size", wrong]);
        assert_eq!(code, 2, "{wrong}: {error}");
    }
}

#[test]
fn a_full_disk_is_told_and_nothing_is_left_on_it() {
    let folder = folder();
    let small = folder.path().join("small");
    let _mounted = Mounted::small(&small, "64K");
    let (code, error) = refused(&[text(&small)]);
    assert!(code == 1 && error.contains(text(&small)) && error.contains("o space"), "{code}: {error}");
    assert_empty(&small);
}

#[test]
fn after_an_interrupt_nothing_is_left_either() {
    let folder = folder();
    let mut doctor = blockyard()
        .args(["doctor", "--disk", text(folder.path()), "--size", "4G"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(doctor.stderr.take().unwrap()).lines();
    // From here on it listens for signals.
    assert!(said.next().unwrap().unwrap().starts_with("examining "));
    assert!(Command::new("kill").args(["-s", "INT", &doctor.id().to_string()]).status().unwrap().success());
    assert_eq!(doctor.wait().unwrap().code(), Some(130));
    assert!(said.any(|line| line.unwrap().contains("interrupted")));
    assert_empty(folder.path());
}

#[test]
fn what_the_system_refuses_is_named_and_decides_how_images_are_written() {
    let folder = folder();
    for (call, errno, field, mode, told) in [
        ("io_uring_setup", "EPERM", "io_uring", "direct", "kernel.io_uring_disabled"),
        ("io_uring_setup", "EINVAL", "io_uring", "direct", "too old"),
        ("fallocate", "EOPNOTSUPP", "fallocate", "", "no fallocate"),
        ("renameat2", "EINVAL", "rename_noreplace", "", ""),
    ] {
        let inject = format!("inject={call}:error={errno}");
        let trace = format!("trace={call}");
        let binary = env!("CARGO_BIN_EXE_blockyard");
        let options = ["-qq", "-f", "-o", "/dev/null", "-e", &trace, "-e", &inject, binary];
        let arguments = ["doctor", "--disk", text(folder.path()), "--size", "1M", "--output", "json"];
        let found: Value = serde_json::from_str(&succeed("strace", &[&options[..], &arguments].concat())).unwrap();
        let answer = if found[field].is_object() { &found[field]["available"] } else { &found[field] };
        assert_eq!(answer, false, "{call} with {errno}: {found:#}");
        // Without direct writes io_uring decides nothing.
        if !mode.is_empty() && found["direct_io"]["available"] == true {
            assert_eq!(found["mode"], mode, "{call} with {errno}: {found:#}");
            assert!(found["verdict"].as_str().unwrap().contains(told), "{found:#}");
        }
        assert!(found.to_string().contains(told), "{call} with {errno}: {found:#}");
        assert_empty(folder.path());
    }
}
