//! No file may crash, hang or eat memory: damaged images of every kind go through everything the engine does, in processes
//! that are limited to 1 GiB and 10 s of CPU, and QEMU judges the same images.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]

#[path = "support/bombs.rs"]
mod bombs;
#[path = "support/damaged.rs"]
mod damaged;
#[path = "support/damages.rs"]
mod damages;
#[path = "support/ordeal.rs"]
mod ordeal;
mod support;
#[path = "support/verdicts.rs"]
mod verdicts;

use support::{pattern, succeed, text};

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use verdicts::Judged;

/// Images per limited process.
const BATCH: usize = 24;

/// One image with its folder.
struct Sample {
    name: String,
    folder: PathBuf,
    /// For a chain: whether it can be opened.
    opens: Option<bool>,
    large: bool,
}

fn make_samples(root: &Path) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut add = |name: &str, opens: Option<bool>, image: &dyn Fn(&Path) -> damaged::Bytes| {
        let folder = root.join(format!("{:04}", samples.len()));
        std::fs::create_dir(&folder).unwrap();
        let image = image(&folder);
        let large = image.length > 4 << 20;
        for copy in ["image.qcow2", "written.qcow2", "repaired.qcow2"] {
            image.write_to(&folder.join(copy));
        }
        if large {
            std::fs::write(folder.join("large"), "").unwrap();
        }
        samples.push(Sample { name: name.to_owned(), folder, opens, large });
    };
    let mut cases = damages::all();
    bombs::bombs(&mut cases);
    for case in &cases.0 {
        add(&case.name, None, &|_| case.image.clone());
    }
    for (name, below, opens) in bombs::CHAINS {
        add(name, Some(opens), &|folder| bombs::chain(folder, name, below));
    }
    samples
}

/// What became of one image: the lines of its report, by key.
fn report_of(sample: &Sample) -> Option<HashMap<String, String>> {
    let text = std::fs::read_to_string(sample.folder.join("report")).ok()?;
    let pair = |line: &str| line.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    Some(text.lines().filter_map(pair).collect())
}

/// Runs the samples in a limited process; one that ends it is run again alone, then the rest.
fn run_batch(samples: &[Sample]) -> Vec<String> {
    let mut findings = Vec::new();
    let mut rest = samples;
    while !rest.is_empty() {
        let ended = run_child(rest);
        let done = rest.iter().take_while(|sample| sample.folder.join("report").exists()).count();
        rest = &rest[done..];
        let Some(suspect) = rest.first() else { break };
        // The time of a process is that of its whole batch: alone, the image has all of it.
        let ended_alone = run_child(std::slice::from_ref(suspect));
        if !suspect.folder.join("report").exists() {
            findings.push(format!("{}: the process died: {ended}, alone: {ended_alone}", suspect.name));
        }
        rest = &rest[1..];
    }
    findings
}

fn run_child(samples: &[Sample]) -> String {
    let folders: Vec<&str> = samples.iter().map(|sample| text(&sample.folder)).collect();
    let output = Command::new("timeout")
        .args(["120", "prlimit", "--as=1073741824", "--cpu=10", "--core=0"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_limited_process_judges_the_images_it_is_given", "--nocapture"])
        .env("CORRUPT_FOLDERS", folders.join(":"))
        .output()
        .unwrap_or_else(|error| panic!("timeout and prlimit (Debian packages coreutils, util-linux): {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    let tail: Vec<&str> = errors.lines().rev().take(4).collect();
    format!("{} {tail:?}", output.status)
}

/// The other side of [`run_child`]; without images it has nothing to do.
#[test]
fn a_limited_process_judges_the_images_it_is_given() {
    let Ok(folders) = std::env::var("CORRUPT_FOLDERS") else { return };
    for folder in folders.split(':').map(Path::new) {
        let report = ordeal::undergo(folder);
        std::fs::write(folder.join("report"), report).unwrap();
    }
}

#[test]
fn no_file_crashes_hangs_or_eats_memory_and_qemu_agrees_about_each() {
    let root = support::folder();
    let samples = make_samples(root.path());
    let batches: Vec<&[Sample]> = samples.chunks(BATCH).collect();
    let (first, second) = batches.split_at(batches.len() / 2);
    let work = |batches: &[&[Sample]]| {
        let mut findings = Vec::new();
        let mut judged = Vec::new();
        for batch in batches {
            findings.extend(run_batch(batch));
            for sample in *batch {
                if let Some(report) = report_of(sample) {
                    judge(sample, &report, &mut findings, &mut judged);
                }
                std::fs::remove_dir_all(&sample.folder).unwrap();
            }
        }
        (findings, judged)
    };
    let (mut findings, mut judged) = std::thread::scope(|scope| {
        let one = scope.spawn(|| work(first));
        let (mut findings, mut judged) = work(second);
        let (more, others) = one.join().unwrap();
        findings.extend(more);
        judged.extend(others);
        (findings, judged)
    });
    judged.sort_by(|one, other| one.name.cmp(&other.name));
    let peak = judged.iter().max_by_key(|sample| sample.peak_kib).unwrap();
    let count = |test: &dyn Fn(&Judged) -> bool| judged.iter().filter(|sample| test(sample)).count();
    println!(
        "{} images: {} checked sound, {} read whole, {} written, {} repaired; {} judged by qemu-img check, {} read by \
         QEMU; {} differences explained; peak {} KiB ({})",
        samples.len(),
        count(&|sample| sample.ours_sound),
        count(&|sample| sample.read),
        count(&|sample| sample.written),
        count(&|sample| sample.repaired),
        count(&|sample| sample.qemu_sound.is_some()),
        count(&|sample| sample.reads_as_qemu.is_some()),
        count(&|sample| sample.differs()),
        peak.peak_kib,
        peak.name,
    );
    findings.extend(verdicts::unexplained(&judged));
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
    assert!(samples.len() >= 600 && judged.len() == samples.len(), "{} of {}", judged.len(), samples.len());
    assert!(
        count(&|sample| sample.qemu_sound.is_some()) >= 600 && count(&|sample| sample.reads_as_qemu.is_some()) >= 300
    );
}

fn judge(sample: &Sample, report: &HashMap<String, String>, findings: &mut Vec<String>, judged: &mut Vec<Judged>) {
    let said = |key: &str| report.get(key).map_or("", String::as_str);
    if report.contains_key("finding") {
        findings.push(format!("{}: {}", sample.name, said("finding")));
    }
    let peak_kib = said("peak_kib").parse().unwrap();
    if peak_kib > ordeal::PEAK_KIB_MAX {
        findings.push(format!("{}: {peak_kib} KiB of memory", sample.name));
    }
    if let Some(opens) = sample.opens
        && opens == said("read").starts_with("refused")
    {
        findings.push(format!("{}: {}", sample.name, said("read")));
    }
    // What lies below is not the check's business here, and QEMU would wait for a FIFO or a network.
    let foreign = !sample.large && sample.opens.is_none();
    let image = sample.folder.join("image.qcow2");
    let dump = sample.folder.join("read.raw");
    let clean = |name: &str| {
        let status = qemu_img(&["check", "-q", "-f", "qcow2", text(&sample.folder.join(name))]);
        (status != 0).then(|| format!("{}: QEMU finds {name} not clean ({status})", sample.name))
    };
    // Every third: QEMU takes longer than all the rest of this test.
    let chosen = foreign && judged.len().is_multiple_of(3);
    if chosen && said("closed") == "clean" {
        findings.extend(clean("written.qcow2"));
    }
    if chosen && said("repair") == "ok" {
        findings.extend(clean("repaired.qcow2"));
    }
    judged.push(Judged {
        name: sample.name.clone(),
        ours: said("check").to_owned(),
        ours_sound: said("check") == "sound",
        qemu_sound: foreign.then(|| matches!(qemu_img(&["check", "-q", "-f", "qcow2", text(&image)]), 0 | 3)),
        reads_as_qemu: (foreign && dump.exists())
            .then(|| qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", text(&dump), text(&image)]) == 0),
        read: said("read") == "complete",
        written: said("closed") == "clean",
        repaired: said("repair") == "ok",
        peak_kib,
    });
}

/// The exit status of qemu-img, which gets ten seconds.
fn qemu_img(arguments: &[&str]) -> i32 {
    support::run("timeout", &[&["10", "qemu-img"], arguments].concat()).status.code().unwrap_or(-1)
}
