//! What only root can do to a machine: small, read-only and hung file systems, and tracing a process. Run through sudo when the
//! tests are not run by root; without either the tests that need it fail.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

/// A file system that never answers, over whatever a folder has, until dropped.
pub struct Hung {
    daemon: Option<File>,
    _mounted: Mounted,
}

impl Hung {
    /// The kernel waits for a file system in user space that nobody serves, as it does for a server that is gone.
    pub fn over(folder: &Path) -> Self {
        let daemon = File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse, as root has it");
        let options = "fd=0,rootmode=40000,user_id=0,group_id=0,allow_other";
        let arguments = ["-i", "-t", "fuse", "-o", options, "hung", folder.to_str().unwrap()];
        run_with(&arguments, daemon.try_clone().unwrap().into());
        Self { daemon: Some(daemon), _mounted: Mounted(folder.to_owned()) }
    }
}

impl Drop for Hung {
    /// Everybody who waits is answered with an error; then it is unmounted.
    fn drop(&mut self) {
        drop(self.daemon.take());
    }
}

fn run(arguments: &[&str]) {
    run_with(arguments, Stdio::null());
}

fn run_with(arguments: &[&str], input: Stdio) {
    let output = privileged("mount").args(arguments).stdin(input).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "mount {arguments:?} (needs root, or sudo without a password): {said}");
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the service may still hold its lock file there.
        let _ = privileged("umount").arg("-l").arg(&self.0).status();
    }
}
