//! `blockyard image` on whole disks: check, repair, map, compare, flatten, grow, with `qemu-img` as judge.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::process::{DEADLINE, blockyard};
use crate::tools::{assert_whole, folder, image, run, source, succeed, text};

const MIB: u64 = 1 << 20;

fn call(arguments: &[&str]) -> Output {
    blockyard().arg("image").args(arguments).output().unwrap()
}

/// Exit code and document of a command that answers.
#[track_caller]
fn json(arguments: &[&str]) -> (i32, Value) {
    let output = blockyard().args(["--output", "json", "image"]).args(arguments).output().unwrap();
    let document = serde_json::from_slice(&output.stdout);
    let document = document.unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"));
    (output.status.code().unwrap(), document)
}

/// Exit code and standard error of a command that fails without an answer.
#[track_caller]
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = call(arguments);
    assert!(output.stdout.is_empty(), "{arguments:?} printed {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// An overlay over an overlay over a raw file, all of different sizes; returns the top.
fn chain(folder: &tempfile::TempDir) -> PathBuf {
    source(folder, "base.raw", 3 * MIB);
    let path = |name: &str| folder.path().join(name);
    let (middle, top) = (path("middle.qcow2"), path("top.qcow2"));
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    succeed("qemu-img", &[&create[..], &["-b", "base.raw", "-F", "raw", text(&middle), "4M"]].concat());
    succeed("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 200k", "-c", "write -z -u 2M 100k", text(&middle)]);
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", text(&top), "6M"]);
    let writes = ["-c", "write -P 2 5M 64k", "-c", "write -P 3 64k 64k", "-c", "write -z 64k 64k", text(&top)];
    succeed("qemu-io", &[&["-f", "qcow2"], &writes[..]].concat());
    top
}

#[test]
fn a_check_exits_as_qemu_does_and_says_what_to_do() {
    let folder = folder();
    let path = image(&folder, "image.qcow2", 4 * MIB);
    succeed("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 200k", text(&path)]);
    let mut bytes = std::fs::read(&path).unwrap();
    // One cluster more, which belongs to nobody.
    let clusters = (bytes.len() as u64).div_ceil(65536);
    bytes.resize((clusters as usize + 1) * 65536, 0);
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let block = number(number(48) as usize);
    // Name, what is patched where, the exit code of both, what the text says.
    let cases: [(&str, u64, &[u8], i32, &str); 5] = [
        ("clean", 0, &bytes[..1], 0, "clean"),
        ("leaks", block + 2 * clusters, &[0, 1], 3, "gives it back"),
        ("errors", block + 2 * (clusters - 1), &[0, 0], 2, "damaged"),
        ("dirty with counts of its own", 79, &[1], 3, "not closed"),
        ("marked", 79, &[2], 2, "as corrupt"),
    ];
    for (name, at, patched, code, said) in cases {
        std::fs::write(&path, &bytes).unwrap();
        patch(&path, at, patched);
        let (exit, document) = json(&["check", text(&path)]);
        assert_eq!(exit, code, "{name}: {document}");
        let judge = run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(&path)]);
        let theirs: Value = serde_json::from_slice(&judge.stdout).unwrap();
        // Two marks that QEMU does not tell of.
        if !name.starts_with("dirty") && name != "marked" {
            assert_eq!(judge.status.code(), Some(code), "{name}");
        }
        let fields = [
            ("errors", "corruptions"),
            ("leaks", "leaks"),
            ("allocated_clusters", "allocated-clusters"),
            ("total_clusters", "total-clusters"),
            ("fragmented_clusters", "fragmented-clusters"),
            ("compressed_clusters", "compressed-clusters"),
            ("image_end_bytes", "image-end-offset"),
        ];
        for (ours, qemus) in fields {
            assert_eq!(document[ours].as_u64().unwrap(), theirs[qemus].as_u64().unwrap_or(0), "{name}: {ours}");
        }
        let output = call(&["check", text(&path)]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(document["dirty"], name.starts_with("dirty"), "{name}: {document}");
        assert_eq!(printed.contains("errors:  "), document["dirty"] == false, "{name}: {printed}");
        assert_eq!(document["corrupt"], name == "marked", "{name}: {document}");
        assert!(
            printed.contains(said) && (code == 0 || printed.contains("blockyard image repair")),
            "{name}: {printed}"
        );

        if name == "marked" {
            let copy = folder.path().join("copy.qcow2");
            std::fs::copy(&path, &copy).unwrap();
            let told = String::from_utf8(call(&["repair", text(&copy)]).stdout).unwrap();
            assert!(told.contains("the mark as corrupt was taken away"), "{told}");
        }
        let (exit, document) = json(&["repair", text(&path)]);
        assert_eq!((exit, &document["repaired"]), (0, &Value::Bool(code != 0)), "{name}: {document}");
        assert_eq!(document["after"]["clean"], true, "{name}");
        assert_eq!(document["before"]["clean"], code == 0, "{name}");
        succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
        succeed("qemu-io", &["-f", "qcow2", "-c", "read -P 1 1M 200k", text(&path)]);
        let again = call(&["repair", text(&path)]);
        assert!(String::from_utf8_lossy(&again.stdout).contains("nothing was changed"), "{again:?}");
    }
    // What can only be guessed at is left alone: a data cluster on top of the L1 table.
    std::fs::write(&path, &bytes).unwrap();
    let l2 = number(number(40) as usize) & !(1 << 63);
    patch(&path, l2 + 16 * 8, &(1_u64 << 63 | number(40)).to_be_bytes());
    let damaged = std::fs::read(&path).unwrap();
    assert_eq!(json(&["check", text(&path)]).0, 2);
    let (code, error) = refused(&["repair", text(&path)]);
    assert_eq!(code, 6, "{error}");
    assert!(std::fs::read(&path).unwrap() == damaged);
}

#[test]
fn a_map_agrees_with_that_of_qemu_and_names_the_file_of_each_layer() {
    let folder = folder();
    let top = chain(&folder);
    let (code, ours) = json(&["map", text(&top)]);
    assert_eq!(code, 0);
    let theirs = succeed("qemu-img", &["map", "--output=json", "-f", "qcow2", text(&top)]);
    let theirs: Vec<Value> = serde_json::from_str(&theirs).unwrap();
    // Which layer, and what, at the start of each run of either.
    let at = |rows: &[Value], byte: u64| {
        let row = rows.iter().rev().find(|row| row["start"].as_u64().unwrap() <= byte).unwrap();
        let depth = (row["present"] == true).then(|| row["depth"].clone());
        (depth, row["zero"].clone(), row["data"].clone(), row["present"].clone())
    };
    let ours = ours.as_array().unwrap();
    let mut next = 0;
    for row in ours {
        assert_eq!(row["start"], next);
        next += row["length"].as_u64().unwrap();
    }
    assert_eq!(next, 6 * MIB);
    for row in ours.iter().chain(&theirs) {
        let byte = row["start"].as_u64().unwrap();
        let (mine, qemus) = (at(ours, byte), at(&theirs, byte));
        // QEMU calls what an image lays no hand on absent, we call it so when no layer does.
        if qemus.3 == true {
            assert_eq!(mine, qemus, "byte {byte}");
        } else {
            assert_eq!((&mine.1, &mine.2), (&qemus.1, &qemus.2), "byte {byte}");
        }
    }
    let files = ["top.qcow2", "middle.qcow2", "base.raw"];
    for row in ours.iter().filter(|row| row["present"] == true) {
        let file = folder.path().join(files[row["depth"].as_u64().unwrap() as usize]);
        assert_eq!(row["file"], text(&file), "{row}");
    }
    for kind in ["data", "zero", "zero-allocated"] {
        assert!(ours.iter().any(|row| row["kind"] == kind), "{kind}");
    }
    let printed = String::from_utf8(call(&["map", text(&top)]).stdout).unwrap();
    assert_eq!(printed.lines().count(), ours.len() + 1, "{printed}");
}

#[test]
fn a_comparison_answers_by_its_exit_code_and_names_the_byte() {
    let folder = folder();
    let top = chain(&folder);
    let flat = folder.path().join("flat.raw");
    succeed("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&top), text(&flat)]);
    let compare = |other: &Path| json(&["compare", text(&top), text(other), "--other-format", "raw"]);
    let (code, document) = compare(&flat);
    assert_eq!((code, &document["equal"], &document["difference"]), (0, &Value::Bool(true), &Value::Null));
    patch(&flat, 5 * MIB + 17, &[9]);
    let (code, document) = compare(&flat);
    assert_eq!((code, &document["equal"]), (1, &Value::Bool(false)));
    assert_eq!(document["difference"], serde_json::json!({"offset": 5 * MIB + 17, "first": 2, "second": 9}));
    let said = call(&["compare", text(&top), text(&flat), "--other-format", "raw"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains(&(5 * MIB + 17).to_string()), "{said}");

    // Everything else has a code of its own, and no answer: absent, another format, in use, not readable.
    let absent = folder.path().join("absent");
    assert_eq!(refused(&["compare", text(&top), text(&absent)]).0, 4);
    assert_eq!(refused(&["compare", text(&top), text(&flat)]).0, 6);
    let broken = folder.path().join("broken.qcow2");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "/outside", "-F", "raw", text(&broken), "6M"]);
    let (code, error) = refused(&["compare", text(&top), text(&broken)]);
    assert!(code >= 2, "{code} {error}");
}

#[test]
fn a_chain_is_flattened_into_an_image_or_a_raw_file() {
    let folder = folder();
    let top = chain(&folder);
    let raw = folder.path().join("flat.raw");
    let (code, document) = json(&["flatten", text(&top), text(&raw), "--format", "raw"]);
    assert_eq!((code, &document["size_bytes"], &document["format"]), (0, &(6 * MIB).into(), &"raw".into()));
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", text(&raw), text(&top)]);
    let flat = folder.path().join("flat.qcow2");
    let (code, document) = json(&["flatten", text(&top), text(&flat), "--cluster-size", "4K"]);
    assert_eq!(code, 0);
    assert!(document["written_bytes"].as_u64().unwrap() < 4 * MIB, "{document}");
    assert_whole(&flat, &raw);
    let information = succeed("qemu-img", &["info", "--output=json", "-f", "qcow2", text(&flat)]);
    let information: Value = serde_json::from_str(&information).unwrap();
    assert_eq!((&information["cluster-size"], &information["backing-filename"]), (&4096.into(), &Value::Null));

    let before = names(folder.path());
    let (code, error) = refused(&["flatten", text(&top), text(&flat)]);
    assert_eq!(code, 5, "{error}");
    let new = folder.path().join("new");
    for (wrong, exit) in [
        (&["--cluster-size", "1000"][..], 2),
        (&["--cluster-size", "4K", "--format", "raw"], 2),
        (&["--format", "vmdk"], 2),
        (&["--backing-root", "/nowhere"], 4),
    ] {
        let (code, error) = refused(&[&["flatten", text(&top), text(&new)], wrong].concat());
        assert_eq!(code, exit, "{wrong:?}: {error}");
    }
    assert_eq!(refused(&["flatten", text(&raw), text(&new)]).0, 6);
    assert_eq!(refused(&["flatten", text(&new), text(&new)]).0, 4);
    assert_eq!(names(folder.path()), before);
}

#[test]
fn a_file_that_holds_a_disk_is_made_for_its_owner_only() {
    let folder = folder();
    let top = chain(&folder);
    let made = |name: &str, arguments: &[&str]| {
        let path = folder.path().join(name);
        let arguments = arguments.iter().map(|argument| if *argument == "FILE" { text(&path) } else { argument });
        assert_eq!(json(&arguments.collect::<Vec<_>>()).0, 0, "{name}");
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    };
    assert_eq!(made("flat.qcow2", &["flatten", text(&top), "FILE"]), 0o600);
    assert_eq!(made("flat.raw", &["flatten", text(&top), "FILE", "--format", "raw"]), 0o600);
    assert_eq!(made("new.qcow2", &["create", "FILE", "--size", "1M"]), 0o600);
}

#[test]
fn a_full_disk_ends_a_flatten_and_leaves_nothing() {
    let folder = folder();
    let raw = source(&folder, "source.raw", 16 * MIB);
    let image = folder.path().join("image.qcow2");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
    let before = names(folder.path());
    for format in ["raw", "qcow2"] {
        // A limit of 2 MiB on the length of files stands in for the full disk.
        let script = "trap '' XFSZ; ulimit -f 2048; exec \"$@\"";
        let target = folder.path().join("flat");
        let output = Command::new("bash")
            .args(["-c", script, "bash", env!("CARGO_BIN_EXE_blockyard"), "image", "flatten"])
            .args([text(&image), text(&target), "--format", format])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{format}: {output:?}");
        assert_eq!(names(folder.path()), before, "{format}");
    }
}

#[test]
fn ctrl_c_ends_a_flatten_and_a_comparison_and_leaves_nothing() {
    let folder = folder();
    // Far more than is read before the signal comes: every cluster is data, whose bytes are a hole of the file.
    let path = folder.path().join("image.qcow2");
    let shape = ["-o", "cluster_size=2M,preallocation=metadata", text(&path), "200G"];
    succeed("qemu-img", &[&["create", "-q", "-f", "qcow2"], &shape[..]].concat());
    let before = names(folder.path());
    let target = folder.path().join("flat");
    let partial = folder.path().join("flat.partial");
    for (name, signal) in [("flatten", "INT"), ("flatten", "TERM"), ("compare", "INT")] {
        let other = if name == "flatten" { text(&target) } else { text(&path) };
        let mut child = blockyard()
            .args(["image", name, text(&path), other])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Under way: the signal handler stands before the file is made, and before the image is opened.
        let deadline = Instant::now() + DEADLINE;
        let opened = |id: u32| {
            let descriptors = Path::new("/proc").join(id.to_string()).join("fd");
            let links =
                descriptors.read_dir().unwrap().filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
            links.into_iter().any(|link| link == path)
        };
        while !(partial.exists() || (name == "compare" && opened(child.id()))) {
            assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{name} is not under way");
            std::thread::yield_now();
        }
        let id = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{name}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("cancelled"), "{output:?}");
        assert_eq!(names(folder.path()), before, "{name}");
    }
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    let folder = folder();
    let top = chain(&folder);
    let (code, document) = json(&["grow", text(&top), "--size", "9M"]);
    assert_eq!(
        (code, &document["size_bytes"], &document["size_bytes_before"]),
        (0, &(9 * MIB).into(), &(6 * MIB).into())
    );
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&top)]);
    succeed("qemu-io", &["-f", "qcow2", "-c", "read -P 0 6M 3M", "-c", "read -P 2 5M 64k", text(&top)]);
    for wrong in ["1M", "513", "12X", "+1G", "-1M"] {
        let (code, error) = refused(&["grow", text(&top), "--size", wrong]);
        assert_eq!(code, 2, "{wrong}: {error}");
        assert_eq!(error.contains("has a sign"), wrong.starts_with(['+', '-']), "{wrong}: {error}");
    }
    assert_eq!(json(&["info", text(&top)]).1["size_bytes"], 9 * MIB);
}

#[test]
fn backing_files_outside_the_folder_need_the_option_everywhere() {
    let folder = folder();
    let inside = folder.path().join("vm");
    std::fs::create_dir(&inside).unwrap();
    let base = image(&folder, "base.qcow2", 2 * MIB);
    succeed("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", text(&base)]);
    let (overlay, flat) = (inside.join("overlay.qcow2"), inside.join("flat.qcow2"));
    let (overlay, flat) = (text(&overlay), text(&flat));
    let root = ["--backing-root", text(folder.path())];
    let commands: [&[&str]; 5] = [
        &["create", overlay, "--backing", "../base.qcow2"],
        &["map", overlay],
        &["compare", overlay, text(&base)],
        &["flatten", overlay, flat],
        &["grow", overlay, "--size", "3M"],
    ];
    for command in commands {
        let (code, error) = refused(command);
        assert!(code != 0 && error.contains("backing"), "{command:?}: {code} {error}");
        let output = call(&[command, &root].concat());
        assert!(output.status.success(), "{command:?}: {output:?}");
    }
    // Names are taken from the working directory, and mean what they mean to the file system.
    std::os::unix::fs::symlink("vm", folder.path().join("link")).unwrap();
    for (from, arguments) in [
        (folder.path(), ["vm/overlay.qcow2", "."]),
        (&inside, ["overlay.qcow2", ".."]),
        (&inside, ["../link/overlay.qcow2", "../vm/.."]),
    ] {
        let output = blockyard()
            .current_dir(from)
            .args(["image", "map", arguments[0], "--backing-root", arguments[1]])
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    let (code, error) = refused(&["map", overlay, "--backing-root", "/nowhere"]);
    assert!(code == 4 && error.contains("--backing-root /nowhere"), "{code}: {error}");
}

#[test]
fn an_image_is_created_in_every_shape() {
    let folder = folder();
    let path = folder.path().join("image.qcow2");
    let shape = ["--refcount-bits", "32", "--compression", "zstd", "--lazy-refcounts", "--preallocation", "metadata"];
    let (code, _) = json(&[&["create", text(&path), "--size", "3M"], &shape[..]].concat());
    assert_eq!(code, 0);
    let information = succeed("qemu-img", &["info", "--output=json", "-f", "qcow2", text(&path)]);
    let information: Value = serde_json::from_str(&information).unwrap();
    let data = &information["format-specific"]["data"];
    assert_eq!((&data["refcount-bits"], &data["compression-type"]), (&32.into(), &"zstd".into()));
    assert_eq!(data["lazy-refcounts"], true);
    let told = |path: &Path| String::from_utf8(call(&["info", text(path)]).stdout).unwrap();
    let said = told(&path);
    assert!(said.contains("32 bits, lazy\n") && said.contains("zstd") && !said.contains("extended"), "{said}");
    let large = folder.path().join("large.qcow2");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", text(&large), "2M"]);
    let said = told(&large);
    assert!(said.contains("extended") && !said.contains("lazy") && !said.contains("zstd"), "{said}");
    assert_eq!(json(&["info", text(&large)]).1["extended_l2"], true);
    assert_eq!(json(&["check", text(&path)]).1["allocated_clusters"], 48);
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
    let new = folder.path().join("new.qcow2");
    for wrong in [&["--refcount-bits", "3"][..], &["--compression", "lz4"], &["--preallocation", "some"]] {
        let (code, error) = refused(&[&["create", text(&new), "--size", "1M"], wrong].concat());
        assert_eq!(code, 2, "{wrong:?}: {error}");
    }
    let over = ["--backing", "image.qcow2", "--preallocation", "full"];
    assert_eq!(refused(&[&["create", text(&new)], &over[..]].concat()).0, 2);
    assert!(!new.exists());
}

#[test]
fn an_error_names_the_file_that_it_is_about() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let raw = source(&folder, "raw.qcow2", MIB);
    let good = image(&folder, "good.qcow2", MIB);
    let over = path("over.qcow2");
    let unsafely = ["create", "-q", "-f", "qcow2", "-u", "-b", "raw.qcow2", "-F", "qcow2", text(&over), "1M"];
    succeed("qemu-img", &unsafely);
    let large = path("large.qcow2");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", text(&large), "2M"]);
    let new = path("new.qcow2");
    let (raw, good, over, large, new) = (text(&raw), text(&good), text(&over), text(&large), text(&new));
    // What is called, its exit code, the file that is named, what is said of it.
    let cases: [(&[&str], i32, &str, &str); 11] = [
        (&["info", raw], 6, raw, ": not a qcow2 image"),
        (&["check", raw], 6, raw, ": not a qcow2 image"),
        (&["repair", raw], 6, raw, ": not a qcow2 image"),
        (&["map", raw], 6, raw, ": not a qcow2 image"),
        (&["compare", good, raw], 6, raw, ": not a qcow2 image"),
        (&["flatten", raw, new], 6, raw, ": not a qcow2 image"),
        (&["map", over], 6, over, ", a file below it: not a qcow2 image"),
        (&["create", new, "--backing", "raw.qcow2"], 6, raw, ": not a qcow2 image"),
        (&["grow", large, "--size", "4M"], 1, large, ": unsupported: "),
        (&["grow", good, "--size", "512K"], 2, good, ": the disk of 1048576 bytes cannot shrink"),
        (&["create", new, "--backing", "../base", "--size", "1M"], 1, new, "(see --backing-root)"),
    ];
    for (command, code, file, said) in cases {
        let (exit, error) = refused(command);
        assert_eq!(exit, code, "{command:?}: {error}");
        assert!(error.starts_with(&format!("blockyard: {file}")) && error.contains(said), "{command:?}: {error}");
    }
    // What a killed flatten leaves is in the way of the next one, and no other file is called so.
    let leftover = format!("{new}.partial");
    std::fs::write(&leftover, "half").unwrap();
    let (code, error) = refused(&["flatten", good, new]);
    assert!(code == 5 && error.contains(&leftover) && error.contains("interrupted flatten"), "{code}: {error}");
    let (code, error) = refused(&["flatten", good, &leftover]);
    assert!(code == 5 && error.contains(&leftover) && !error.contains("interrupted"), "{code}: {error}");
    assert_eq!(std::fs::read(&leftover).unwrap(), b"half");
}
