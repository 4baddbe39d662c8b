//! What only root can do to a machine: small and read-only file systems, and tracing a process. Run through sudo when the
//! tests are not run by root; without either the tests that need it fail.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A program run as root.
pub fn privileged(program: &str) -> Command {
    let own = |option: &str| String::from_utf8(Command::new("id").arg(option).output().unwrap().stdout).unwrap();
    if own("-u").trim() == "0" {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["-n", program]);
    command
}

/// A mounted file system, until dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// A file system in memory of this size at a folder that is made for it.
    pub fn small(folder: &Path, size: &str) -> Self {
        std::fs::create_dir(folder).unwrap();
        let mounted = Self::mount(folder, &["-t", "tmpfs", "-o", &format!("size={size},mode=0777"), "tmpfs"]);
        // Not every file system keeps the mode of its root.
        assert!(std::fs::write(folder.join("probe"), "").is_ok());
        std::fs::remove_file(folder.join("probe")).unwrap();
        mounted
    }

    /// A folder that can only be read.
    pub fn read_only(folder: &Path) -> Self {
        std::fs::create_dir(folder).unwrap();
        let mounted = Self::mount(folder, &["--bind", folder.to_str().unwrap()]);
        run(&["-o", "remount,ro,bind", folder.to_str().unwrap()]);
        mounted
    }

    fn mount(folder: &Path, arguments: &[&str]) -> Self {
        let arguments: Vec<&str> = arguments.iter().copied().chain([folder.to_str().unwrap()]).collect();
        run(&arguments);
        Self(folder.to_owned())
    }
}

fn run(arguments: &[&str]) {
    let output = privileged("mount").args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "mount {arguments:?} (needs root, or sudo without a password): {said}");
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the service may still hold its lock file there.
        let _ = privileged("umount").arg("-l").arg(&self.0).status();
    }
}
