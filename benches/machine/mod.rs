//! What a figure belongs to: machine, kernel, and the file system below the folder of the benches with the way that payload
//! takes to it.

use std::fs;
use std::path::Path;

use blockyard_qcow2::storage::FileStorage;

/// Where the benches keep their files, below `target/`.
pub(crate) const FOLDER: &str = env!("CARGO_TARGET_TMPDIR");

/// One line that belongs to all figures of this run.
pub(crate) fn describe() -> String {
    let cores = std::thread::available_parallelism().unwrap();
    let memory = fs::read_to_string("/proc/meminfo").unwrap();
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")).unwrap();
    let memory_gib = memory.parse::<f64>().unwrap() / f64::from(1 << 20);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let storage = FileStorage::with_direct_access(tempfile::tempfile_in(FOLDER).unwrap());
    let mode = if storage.has_direct_access() { "payload around the page cache" } else { "page cache" };
    let build = if cfg!(debug_assertions) { "debug build, " } else { "" };
    let (kernel, file_system) = (kernel.trim(), file_system(Path::new(FOLDER)));
    format!("{build}{cores} cores, {memory_gib:.1} GiB of memory, Linux {kernel}, {file_system}, {mode}")
}

/// The type of the file system that a folder is on, as the kernel calls it.
fn file_system(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    // `36 35 98:0 /root /mount/point options [optional fields] - type source options`
    let mounts = mounts.lines().filter_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?.replace("\\040", " ");
        folder.starts_with(&point).then_some((point.len(), source.split(' ').next()?))
    });
    // Of several at one place the last covers the others, and is the one that `max_by_key` takes.
    mounts.max_by_key(|(length, _)| *length).unwrap().1.to_owned()
}
