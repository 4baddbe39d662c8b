//! Foreign programs, and images made and judged by them.

use std::path::{Path, PathBuf};
use std::process::Output;

use crate::programs;

/// A folder on a real file system, removed at the end.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("blockyard-image-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program to its end.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> Output {
    programs::run(&[&[program], arguments].concat())
}

/// Runs a program that must succeed; returns what it printed.
#[track_caller]
pub fn succeed(program: &str, arguments: &[&str]) -> String {
    programs::succeeds(&[&[program], arguments].concat())
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
