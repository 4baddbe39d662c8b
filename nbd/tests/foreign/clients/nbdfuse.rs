//! `nbdfuse`: the disk as a file, for programs that know nothing of NBD.

use std::os::unix::fs::FileExt;

use super::{SIZE, Target, noise};
use crate::programs::{Background, run, succeeds};

pub fn mounts_the_disk_as_a_file(target: &Target) {
    let (mount, ready) = (target.folder.file("mnt.img"), target.folder.file("ready"));
    std::fs::File::create(&mount).unwrap();
    // It writes its id there once it serves, and a pipe lets us wait for that.
    succeeds(&["mkfifo", &ready]);
    let mounted = Mounted {
        path: &mount,
        nbdfuse: Some(Background::start(&["nbdfuse", "-P", &ready, &mount, &target.uri], |_| {})),
    };
    let id = succeeds(&["cat", &ready]);
    assert!(!id.trim().is_empty(), "nbdfuse did not mount; it needs /dev/fuse");

    assert_eq!(std::fs::metadata(&mount).unwrap().len(), SIZE);
    let bytes = noise(5, 300_000);
    let file = std::fs::File::options().read(true).write(true).open(&mount).unwrap();
    file.write_all_at(&bytes, 1_234_567).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let copy = target.folder.file("copy");
    let (input, output) = (format!("if={mount}"), format!("of={copy}"));
    succeeds(&["dd", "bs=777", "skip=1600", "count=300", &input, &output]);
    assert!(std::fs::read(&copy).unwrap() == bytes[777 * 1600 - 1_234_567..][..777 * 300]);
    mounted.end();
}

struct Mounted<'a> {
    path: &'a str,
    nbdfuse: Option<Background>,
}

impl Mounted<'_> {
    fn end(mut self) {
        succeeds(&["fusermount3", "-u", self.path]);
        let status = self.nbdfuse.take().unwrap().wait();
        assert!(status.success(), "nbdfuse: {status}");
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if self.nbdfuse.is_some() {
            // It may be asked before it mounted, or be gone.
            run(&["fusermount3", "-q", "-u", "-z", self.path]);
        }
    }
}
