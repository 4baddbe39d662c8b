//! What one damaged image goes through, in a process of its own with little memory and time: checked, read, written and
//! repaired. A finding is a broken promise; a typed error never is one.

#![allow(unreachable_pub, clippy::unwrap_used, clippy::panic, reason = "part of the tests that include it")]

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use blockyard_qcow2::{Access, Durability, Error, Image, OpenOptions, Result, ZeroMode, check, info, repair};

/// Peak of resident memory that an image may cost.
pub const PEAK_KIB_MAX: u64 = 256 << 10;
/// Disks up to this size are read, and kept, as a whole.
pub const DUMP_BYTES_MAX: u64 = 16 << 20;

/// What is mapped of a larger disk: the work is that of its clusters, not of its file.
const MAP_BYTES_MAX: u64 = 64 << 30;

/// Puts the image of `folder` (three copies of it: `image`, `written`, `repaired`) through everything and returns a report
/// of `key=value` lines.
pub fn undergo(folder: &Path) -> String {
    // Resets the peak: what follows is this image's own.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let mut report = String::new();
    let large = folder.join("large").exists();
    let outcome = catch_unwind(AssertUnwindSafe(|| steps(folder, large, &mut report)));
    match outcome {
        Ok(findings) => findings.iter().for_each(|finding| line(&mut report, "finding", finding)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            line(&mut report, "finding", &format!("panic: {text}"));
        }
    }
    line(&mut report, "peak_kib", &peak_kib().to_string());
    report
}

fn line(report: &mut String, key: &str, value: &str) {
    writeln!(report, "{key}={}", value.replace('\n', " ")).unwrap();
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

fn steps(folder: &Path, large: bool, report: &mut String) -> Vec<String> {
    let [image, written, repaired] = ["image.qcow2", "written.qcow2", "repaired.qcow2"].map(|name| folder.join(name));
    let mut findings = Vec::new();
    let checked = check(&image);
    line(
        report,
        "check",
        &match &checked {
            Ok(found) if found.errors == 0 => "sound".to_owned(),
            Ok(found) => format!("{} errors: {:?}", found.errors, found.details.first()),
            Err(error) => format!("refused: {error}"),
        },
    );
    let _ = info(&image);
    let before = open(&image, Access::ReadOnly).map(|image| look(&image));
    match &before {
        Ok(seen) => {
            line(report, "read", if seen.complete { "complete" } else { "partly" });
            if let Some(dump) = seen.dump.as_ref().filter(|_| seen.complete) {
                std::fs::write(folder.join("read.raw"), dump).unwrap();
            }
        }
        Err(error) => line(report, "read", &format!("refused: {error}")),
    }
    if !same(&image, &written, large) {
        findings.push("checking or reading changed the file".to_owned());
    }
    match open(&written, Access::ReadWrite) {
        Err(error) => {
            line(report, "write", &format!("refused: {error}"));
            if !same(&image, &written, large) {
                findings.push("refused for writing, and changed all the same".to_owned());
            }
        }
        Ok(opened) => {
            let outcome = change(&opened, before.as_ref().ok(), &mut findings);
            line(report, "write", &outcome.as_ref().map_or_else(|error| format!("refused: {error}"), |()| "ok".into()));
            drop(opened);
            protected(&image, &written, &mut findings);
            if outcome.is_ok() {
                match check(&written) {
                    Ok(found) if found.is_clean() => line(report, "closed", "clean"),
                    other => findings.push(format!("written and closed, and not clean: {other:?}")),
                }
            }
        }
    }
    match repair(&repaired) {
        Err(error) => {
            line(report, "repair", &format!("refused: {error}"));
            if !matches!(error, Error::Io { .. }) && !same(&image, &repaired, large) {
                findings.push("not repaired, and changed all the same".to_owned());
            }
        }
        Ok(_) => {
            line(report, "repair", "ok");
            protected(&image, &repaired, &mut findings);
            match check(&repaired) {
                Ok(found) if found.is_clean() => {}
                other => findings.push(format!("repaired, and not clean: {other:?}")),
            }
            let after = open(&repaired, Access::ReadOnly).map(|image| look(&image));
            match (&before, &after) {
                (Ok(before), Ok(after)) if before.dump != after.dump => {
                    findings.push("the repair changed the content".to_owned());
                }
                (Ok(_), Err(error)) => findings.push(format!("cannot be opened after the repair: {error}")),
                _ => {}
            }
        }
    }
    findings
}

fn open(path: &Path, access: Access) -> Result<Image> {
    Image::open(path, &OpenOptions::new(access))
}

/// What could be read of a disk.
struct Seen {
    /// Its bytes, if it is small; what cannot be read is zero.
    dump: Option<Vec<u8>>,
    complete: bool,
}

fn look(image: &Image) -> Seen {
    let size = image.size();
    let mut complete = true;
    let extents = image.map(0, size.min(MAP_BYTES_MAX), 5000);
    let mut end = 0;
    for extent in extents.as_deref().unwrap_or_default() {
        assert!(extent.offset == end && extent.length > 0, "extents are in order and without gaps");
        end += extent.length;
    }
    let mut read = |offset: u64, buffer: &mut [u8]| {
        if image.read(offset, buffer).is_err() {
            buffer.fill(0);
            complete = false;
        }
    };
    if size <= DUMP_BYTES_MAX {
        let mut dump = vec![0; size as usize];
        for (start, piece) in (0..).step_by(65_536).zip(dump.chunks_mut(65_536)) {
            read(start, piece);
        }
        return Seen { dump: Some(dump), complete };
    }
    let mut buffer = vec![0; 1 << 20];
    read(0, &mut buffer);
    read(size - buffer.len() as u64, &mut buffer);
    for extent in extents.unwrap_or_default().iter().take(200) {
        let length = extent.length.min(4096) as usize;
        read(extent.offset, &mut buffer[..length]);
    }
    Seen { dump: None, complete }
}

/// A write, a flush, a zero request and the close. What was acknowledged must be there, and nothing else changed.
fn change(image: &Image, before: Option<&Seen>, findings: &mut Vec<String>) -> Result<()> {
    let size = image.size();
    let at = size / 2;
    let length = 5000.min(size - at) as usize;
    let zeroed = 1000.min(at);
    image.write(at, &vec![0xab; length], Durability::OnFlush)?;
    image.flush()?;
    image.zero(0, zeroed, ZeroMode::Unmap, Durability::BeforeReply)?;
    let now = look(image);
    if let (Some(mut expected), Some(dump)) =
        (before.filter(|seen| seen.complete).and_then(|s| s.dump.clone()), &now.dump)
    {
        expected[at as usize..at as usize + length].fill(0xab);
        expected[..zeroed as usize].fill(0);
        if expected != *dump {
            findings.push("a write changed more, or less, than it was to change".to_owned());
        }
    }
    image.close()
}

/// Byte by byte; of a large file the first MiB and the length.
fn same(one: &Path, other: &Path, large: bool) -> bool {
    use std::io::Read;
    let read = |path: &Path| {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).unwrap();
        let length = file.metadata().unwrap().len();
        file.take(if large { 1 << 20 } else { u64::MAX }).read_to_end(&mut bytes).unwrap();
        (length, bytes)
    };
    read(one) == read(other)
}

/// Magic, version, cluster_bits, size and the L1 fields never change unasked.
fn protected(before: &Path, after: &Path, findings: &mut Vec<String>) {
    use std::io::Read;
    let header = |path: &Path| {
        let mut bytes = vec![0; 48];
        std::fs::File::open(path).unwrap().read_exact(&mut bytes).unwrap();
        bytes
    };
    let (before, after) = (header(before), header(after));
    for range in [0..8, 20..32, 36..48] {
        if before[range.clone()] != after[range.clone()] {
            findings.push(format!("header bytes {range:?} changed"));
        }
    }
}
