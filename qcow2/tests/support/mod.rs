//! What the tests of the engine share: a folder, foreign tools, and images made in one line.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blockyard_qcow2::{Access, Backing, BackingFormat, CreateOptions, ExtentKind, Image, OpenOptions};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;

/// How many times the usual number of random cases is wanted.
pub fn scale() -> u64 {
    number("SCALE").unwrap_or(1)
}

/// The one random case that is wanted.
pub fn seed() -> Option<u64> {
    number("SEED")
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// A folder for images on a real file system, removed at the end.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("blockyard-qcow2-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn open(path: &Path, access: Access) -> Image {
    Image::open(path, &OpenOptions::new(access)).unwrap()
}

/// A new image, open for writing.
pub fn fresh(path: &Path, options: &CreateOptions) -> Image {
    blockyard_qcow2::create(path, options).unwrap();
    open(path, Access::ReadWrite)
}

/// Options for an overlay over an image in the same folder.
pub fn over(name: &str, size: u64) -> CreateOptions {
    let backing = Some(Backing { name: name.into(), format: BackingFormat::Qcow2 });
    CreateOptions { backing, ..CreateOptions::new(size) }
}

/// Runs a foreign tool; a missing one is a failure that names the package.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(error) => panic!("{program} (Debian package qemu-utils) cannot be run: {error}"),
    }
}

/// Runs a foreign tool that must succeed and returns what it printed.
pub fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

pub fn qemu_create(path: &Path, options: &str, size: u64) {
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(path), &size.to_string()]);
}

pub fn qemu_io(path: &Path, commands: &[&str]) -> String {
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(text(path));
    succeed("qemu-io", &arguments)
}

/// Errors and leaks as QEMU counts them.
pub fn qemu_check(path: &Path) -> (u64, u64) {
    let output = run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(path)]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["check-errors"], 0, "{report}");
    (report["corruptions"].as_u64().unwrap_or(0), report["leaks"].as_u64().unwrap_or(0))
}

/// `qemu-img check` finds neither an error nor a leak.
pub fn assert_clean(path: &Path) {
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
    let report = blockyard_qcow2::check(path).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// QEMU reads the image as these bytes.
pub fn assert_reads_as(path: &Path, content: &[u8]) {
    let raw = path.with_extension("expected");
    std::fs::write(&raw, content).unwrap();
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", text(&raw), text(path)]);
    std::fs::remove_file(raw).unwrap();
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn join(folder: &tempfile::TempDir, name: &str) -> PathBuf {
    folder.path().join(name)
}

/// Bytes that differ from sector to sector and from seed to seed, never zero.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..length).map(|_| random.u8(1..)).collect()
}

/// Bytes that compress well and differ from sector to sector, never zero.
pub fn wordy(seed: u64, length: usize) -> Vec<u8> {
    let words = pattern(seed, length.div_ceil(512) * 16);
    let mut bytes: Vec<u8> = words.chunks(16).flat_map(|word| word.repeat(32)).collect();
    bytes.truncate(length);
    bytes
}

/// Reads a range with its holes told: they are zeroes and untouched, everything else is filled. Returns the holes.
pub fn read_sparse(image: &Image, offset: u64, expected: &[u8]) -> Vec<Range<usize>> {
    const UNTOUCHED: u8 = 0xee;
    let mut found = vec![UNTOUCHED; expected.len()];
    let holes = image.read_sparse(offset, &mut found).unwrap();
    let mut end = None;
    for hole in &holes {
        assert!(hole.start < hole.end && hole.end <= found.len(), "{hole:?}");
        assert!(end.is_none_or(|end| hole.start > end), "{holes:?} are not ascending, or not merged");
        assert!(found[hole.clone()].iter().all(|byte| *byte == UNTOUCHED), "{hole:?} was touched");
        found[hole.clone()].fill(0);
        end = Some(hole.end);
    }
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(wrong, None, "first wrong byte, counted from {offset}; holes {holes:?}");
    holes
}

/// What the map of a range calls zeroes, as the holes of a buffer.
pub fn mapped_holes(image: &Image, offset: u64, length: u64) -> Vec<Range<usize>> {
    let mut holes: Vec<Range<usize>> = Vec::new();
    for extent in image.map(offset, length, usize::MAX).unwrap() {
        let start = (extent.offset - offset) as usize;
        let end = start + extent.length as usize;
        match holes.last_mut() {
            _ if extent.kind == ExtentKind::Data => {}
            Some(last) if last.end == start => last.end = end,
            _ => holes.push(start..end),
        }
    }
    holes
}
