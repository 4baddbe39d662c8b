//! Foreign programs, each bounded in time; a missing one fails the test with the package that has it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Longest that one foreign program may run: tells done from hung, on the slowest machine.
const LIMIT: &str = "120";

/// A folder on a real file system, removed at the end.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("blockyard-image-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program with Debian's folders first on the path, as its Python modules want it.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let path = format!("/usr/bin:/usr/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("timeout").arg(LIMIT).arg(program).args(arguments).env("PATH", path).output().unwrap();
    let package = match program {
        "qemu-img" | "qemu-io" => "qemu-utils",
        "nbdcopy" | "nbdinfo" => "libnbd-bin",
        "nbdsh" => "python3-libnbd",
        other => other,
    };
    assert_ne!(output.status.code(), Some(127), "{program} is missing: install the Debian package {package}");
    assert_ne!(output.status.code(), Some(124), "{program} {arguments:?} did not end within {LIMIT} s");
    output
}

/// Runs a program that must succeed; returns what it printed.
#[track_caller]
pub fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {out}{}", String::from_utf8_lossy(&output.stderr));
    out
}

/// A qcow2 image made by QEMU.
pub fn image(folder: &tempfile::TempDir, name: &str, bytes: u64) -> PathBuf {
    let path = folder.path().join(name);
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), &bytes.to_string()]);
    path
}

/// A raw file with data, zeroes and holes, of `bytes` bytes.
pub fn source(folder: &tempfile::TempDir, name: &str, bytes: u64) -> PathBuf {
    use std::os::unix::fs::FileExt;
    let path = folder.path().join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ bytes;
    let mut block = vec![0; 96 * 1024];
    for start in (0..bytes).step_by(256 * 1024) {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let length = block.len().min((bytes - start) as usize);
        file.write_all_at(&block[..length], start).unwrap();
    }
    path
}

/// The image is clean for QEMU and reads as the raw file.
#[track_caller]
pub fn assert_whole(image: &Path, raw: &Path) {
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(image)]);
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", text(raw), text(image)]);
}
