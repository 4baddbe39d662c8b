//! A disk whose writeback fails, made of mounts that only root can make. Through sudo when the tests are not run by root;
//! without either the tests that need it fail.
#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::text;

/// Runs a program as root; it must succeed.
pub fn privileged(program: &str, arguments: &[&str]) {
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let mut command = if is_root { Command::new(program) } else { Command::new("sudo") };
    if !is_root {
        command.args(["-n", program]);
    }
    let output = command.args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} (needs root, or sudo without a password): {said}");
}

/// A mounted file system, until dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts with these arguments of `mount`, at a folder that is made for it.
    pub fn at(folder: &Path, arguments: &[&str]) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let arguments: Vec<&str> = arguments.iter().copied().chain([text(folder)]).collect();
        privileged("mount", &arguments);
        Self(folder.to_owned())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What failed may still hold files there; lazily, so that nothing is left behind all the same.
            let _ = std::panic::catch_unwind(|| privileged("umount", &["-l", text(&self.0)]));
        } else {
            privileged("umount", &[text(&self.0)]);
        }
    }
}

/// A file system of 200 MiB, on a loop device, on memory that ends long before. Writes into its page cache succeed; that
/// they cannot be stored shows when they are written back.
pub struct Overcommitted {
    /// First the inner, then the outer one is unmounted.
    inner: Option<Mounted>,
    outer: Mounted,
    disk: PathBuf,
    mount_point: PathBuf,
}

impl Overcommitted {
    /// With so much memory, such as `24m`.
    pub fn new(folder: &Path, memory: &str) -> Self {
        let small = folder.join("small");
        let outer = Mounted::at(&small, &["-t", "tmpfs", "-o", &format!("size={memory},mode=0777"), "tmpfs"]);
        let disk = small.join("disk");
        std::fs::File::create(&disk).unwrap().set_len(200 << 20).unwrap();
        // Without a journal: what is tested is a failure of data, not that of the file system's own log. Blocks of a page:
        // a transfer that begins in a page that has memory and ends in one that has none would be called a success by the
        // loop device.
        privileged("mkfs.ext4", &["-q", "-F", "-b", "4096", "-O", "^has_journal", text(&disk)]);
        let mut made = Self { inner: None, outer, disk, mount_point: folder.join("mnt") };
        made.mount();
        made
    }

    fn mount(&mut self) {
        self.inner = Some(Mounted::at(&self.mount_point, &["-o", "loop,errors=continue", text(&self.disk)]));
        privileged("chmod", &["0777", text(&self.mount_point)]);
    }

    pub fn folder(&self) -> &Path {
        &self.mount_point
    }

    /// From now on everything has room.
    pub fn grow(&self, memory: &str) {
        privileged("mount", &["-o", &format!("remount,size={memory}"), text(&self.outer.0)]);
    }

    /// Unmounts and mounts again: what is seen afterwards comes from the disk.
    pub fn remount(&mut self) {
        drop(self.inner.take());
        self.mount();
    }
}
