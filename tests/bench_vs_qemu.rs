//! `scripts/bench-vs-qemu` on a tiny disk: it measures, it leaves nothing behind, and a server that loses data gets no time.
//!
//! No speed is asserted. Stand-ins for our binary are shell scripts around it.
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../nbd/tests/common/programs.rs"]
mod programs;
#[path = "image/tools.rs"]
#[allow(dead_code, reason = "every test binary uses its own part")]
mod tools;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tools::{folder, succeed, text};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/bench-vs-qemu");
const BLOCKYARD: &str = env!("CARGO_BIN_EXE_blockyard");

/// How long a condition may take to come true. Never a measure of speed: the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(30);

/// The command line of one round on 8 MiB.
fn arguments<'a>(folder: &'a Path, blockyard: &'a str, only: &'a str) -> Vec<&'a str> {
    vec![SCRIPT, "--size", "8", "--rounds", "1", "--only", only, "--dir", text(folder), "--blockyard", blockyard]
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The cells of a workload's line, by the heads of their columns.
fn row(table: &str, workload: &str) -> Vec<(String, String)> {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let line = |first: &str| {
        let found = table.lines().find(|line| line.starts_with(&format!("| {first} |")));
        cells(found.unwrap_or_else(|| panic!("no line of {first} in {table}")))
    };
    line("workload").into_iter().zip(line(workload)).collect()
}

fn cell(table: &str, workload: &str, column: &str) -> String {
    let row = row(table, workload);
    row.iter().find(|(head, _)| head == column).unwrap_or_else(|| panic!("no column {column}")).1.clone()
}

/// Seconds, as the table writes them.
fn is_a_time(cell: &str) -> bool {
    cell.strip_suffix(" s").is_some_and(|number| number.parse::<f64>().is_ok())
}

/// A script in place of our binary. `$image` and `$socket` are what `nbd` was given; anything else goes to the binary.
fn stand_in(folder: &TempDir, serve: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.path().join("stand-in");
    let script = format!(
        "#!/bin/sh\nset -e\n[ \"$1\" = nbd ] || exec {BLOCKYARD} \"$@\"\n\
         [ \"$1 $2 $3\" = 'nbd --quiet --socket' ] && [ $# = 5 ]\nsocket=$4 image=$5\n{serve}\n"
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What lies in a folder.
fn names(folder: &Path) -> Vec<String> {
    let names = folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn every_copy_is_measured_and_judged_right_and_nothing_stays() {
    assert_measured("seq,sparse,one,convert,read,disks4", 6 * 5);
}

#[test]
fn every_random_write_is_measured_and_judged_right_and_nothing_stays() {
    assert_measured("rand4k,rand64k,overlay4k,overwrite4k", 4 * 5 - 1);
}

/// Measures these workloads, with all servers, which are so many times; draws them, and draws them again.
fn assert_measured(workloads: &str, times: usize) {
    let (work, results) = (folder(), folder());
    let (json, svg) = (results.path().join("figures.json"), results.path().join("chart.svg"));
    let options = ["--sink", "--json", text(&json), "--svg", text(&svg)];
    let table = programs::succeeds(&[&arguments(work.path(), BLOCKYARD, workloads), &options[..]].concat());
    for workload in workloads.split(',') {
        for (column, cell) in row(&table, workload) {
            let expected = match &*column {
                "workload" => cell == workload,
                "" => cell.is_empty(),
                // Plain bytes have no backing file.
                "nbdkit raw" if workload == "overlay4k" => cell == "–",
                "best qemu-nbd / blockyard" => cell.parse::<f64>().is_ok(),
                "sink / blockyard" => cell.ends_with(" %"),
                _ => is_a_time(&cell),
            };
            assert!(expected, "{workload}, {column}: {cell}\n{table}");
        }
    }
    for fact in ["CPUs: ", "memory: ", "kernel: ", "file system: ", "qemu-nbd: ", "nbdkit: ", "fio: ", "size: 8 MiB"] {
        assert!(table.lines().any(|line| line.starts_with(fact)), "no {fact} in {table}");
    }
    assert_eq!(names(work.path()), [""; 0]);

    // What was stored gives the same again, also with what XML would take for its own.
    assert_well_formed(&svg, times);
    let redrawn = results.path().join("redrawn.svg");
    assert_eq!(programs::succeeds(&[SCRIPT, "--from", text(&json), "--svg", text(&redrawn)]), table);
    assert_eq!(std::fs::read(&svg).unwrap(), std::fs::read(&redrawn).unwrap());
    let figures = std::fs::read_to_string(&json).unwrap();
    let hostile = figures.replace("\"what\": \"", "\"what\": \"<&>").replace("\"kernel\": \"", "\"kernel\": \"<&>");
    assert_ne!(figures, hostile);
    std::fs::write(&json, hostile).unwrap();
    programs::succeeds(&[SCRIPT, "--from", text(&json), "--svg", text(&redrawn)]);
    assert_well_formed(&redrawn, times);
}

/// XML, with so many bars in it, and nothing from elsewhere.
fn assert_well_formed(svg: &Path, times: usize) {
    let count = "import sys, xml.etree.ElementTree as t; print(len(t.parse(sys.argv[1]).findall('.//{*}rect')))";
    let rectangles: usize = succeed("python3", &["-c", count, text(svg)]).trim().parse().unwrap();
    assert_eq!(rectangles, times + 1, "the bars and the background");
    let drawn = std::fs::read_to_string(svg).unwrap();
    assert!(!drawn.contains("href") && !drawn.contains("url(") && !drawn.contains("<script"));
}

/// Runs the stand-in where each of these workloads must find it wrong, and says why.
#[track_caller]
fn assert_wrong(serve: &str, workloads: &[&str], why: &str) {
    let (work, other) = (folder(), folder());
    let (stand_in, only) = (stand_in(&other, serve), workloads.join(","));
    let json = other.path().join("figures.json");
    let output =
        programs::run(&[&arguments(work.path(), text(&stand_in), &only), &["--json", text(&json)][..]].concat());
    let (table, said) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(1), "{table}\n{said}");
    for workload in workloads {
        assert_eq!(cell(&table, workload, "blockyard"), "WRONG", "{table}");
        assert_eq!(cell(&table, workload, "best qemu-nbd / blockyard"), "–", "{table}");
        assert!(is_a_time(&cell(&table, workload, "qemu-nbd")), "{table}");
        assert!(said.contains(&format!("WRONG: blockyard at {workload}: {why}")), "{said}");
    }
    assert_eq!(names(work.path()), [""; 0]);
    // Nor does it become a time later.
    let svg = other.path().join("chart.svg");
    let again = programs::run(&[SCRIPT, "--from", text(&json), "--svg", text(&svg)]);
    assert_eq!((again.status.code(), stdout(&again)), (Some(1), table));
    assert_eq!(std::fs::read_to_string(svg).unwrap().matches(">WRONG<").count(), workloads.len());
}

/// Serves an empty image of the same size in place of the one that was asked for.
const ANOTHER_IMAGE: &str = r#"
rm -f "$image.other"
size=$(od -An -t u1 -j 24 -N 8 "$image" | { read -r _ _ _ _ a b c d; echo $(((a << 24) + (b << 16) + (c << 8) + d)); })
qemu-img create -q -f qcow2 "$image.other" "$size"
"#;

#[test]
fn a_server_that_loses_what_it_was_given_is_wrong() {
    let serve = format!("{ANOTHER_IMAGE}exec {BLOCKYARD} nbd --quiet --socket \"$socket\" \"$image.other\"");
    assert_wrong(&serve, &["seq", "rand4k", "overlay4k", "overwrite4k", "disks4"], "qemu-img compare:");
}

#[test]
fn a_server_that_reads_as_something_else_is_wrong() {
    let serve = format!("{ANOTHER_IMAGE}exec {BLOCKYARD} nbd --quiet --socket \"$socket\" \"$image.other\"");
    assert_wrong(&serve, &["read"], "qemu-img compare over NBD:");
}

#[test]
fn a_server_that_leaves_wrong_refcounts_is_wrong() {
    // A second reference to cluster 5, in the refcount block at cluster 2, once everything is closed.
    let serve = format!(
        "{BLOCKYARD} nbd --quiet --socket \"$socket\" \"$image\" & server=$!\n\
         trap 'kill $server; wait $server; printf \"\\002\" | dd of=\"$image\" bs=1 seek=131083 conv=notrunc status=none; exit 0' TERM\n\
         wait $server"
    );
    assert_wrong(&serve, &["seq"], "qemu-img check:");
}

#[test]
fn a_failure_ends_the_run_and_nothing_stays() {
    let client_fails = format!("exec {BLOCKYARD} nbd --quiet --read-only --socket \"$socket\" \"$image\"");
    for (serve, why) in [
        ("echo it cannot >&2; exit 3", "blockyard ended at once\nit cannot"),
        (&*client_fails, "nbdcopy at blockyard ended with status 1"),
    ] {
        let (work, other) = (folder(), folder());
        let stand_in = stand_in(&other, serve);
        let output = programs::run(&arguments(work.path(), text(&stand_in), "seq"));
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
        assert!(!stdout(&output).contains("| seq |"), "{}", stdout(&output));
        assert_eq!(names(work.path()), [""; 0]);
    }
}

#[test]
fn a_signal_ends_the_run_and_its_servers_and_nothing_stays() {
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let (work, other) = (folder(), folder());
        let (file, sleeper) = (other.path().join("pid"), other.path().join("new"));
        let serve = format!("echo $$ > {}; mv {0} {}; exec sleep 60", text(&sleeper), text(&file));
        let stand_in = stand_in(&other, &serve);
        let arguments = arguments(work.path(), text(&stand_in), "seq");
        let mut command = Command::new(arguments[0]);
        let mut run = command.args(&arguments[1..]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until("the stand-in is asked to serve", || file.exists());
        let server: u32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        succeed("kill", &["-s", signal, &run.id().to_string()]);
        until("the run ends", || run.try_wait().unwrap().is_some());
        assert_eq!(run.wait().unwrap().code(), Some(status));
        assert!(!Path::new(&format!("/proc/{server}")).exists(), "the server runs on");
        assert_eq!(names(work.path()), [""; 0]);
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_is_missing_is_named_with_its_package() {
    let (work, nothing) = (folder(), folder());
    let arguments = arguments(work.path(), BLOCKYARD, "seq");
    let output = Command::new(arguments[0]).args(&arguments[1..]).env("PATH", nothing.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    for line in
        ["qemu-nbd (Debian package qemu-utils)", "nbdcopy (Debian package libnbd-bin)", "fio (Debian package fio)"]
    {
        assert!(stderr(&output).contains(line), "{}", stderr(&output));
    }
    assert_eq!(names(work.path()), [""; 0]);
}

#[test]
fn a_folder_in_memory_and_a_workload_that_does_not_exist_are_refused() {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let said = programs::fails(&arguments(memory.path(), BLOCKYARD, "seq"));
    assert!(said.contains("is in memory (tmpfs)"), "{said}");
    let said = programs::fails(&arguments(memory.path(), BLOCKYARD, "seq,nonsense"));
    assert!(said.contains("no workload nonsense; there are seq, sparse,"), "{said}");
}
