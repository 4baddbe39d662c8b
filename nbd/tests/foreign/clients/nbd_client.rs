//! `nbd-client -l`: the third implementation of LIST. Its other half is in the kernel.

use super::{NAME, Place, Target};
use crate::programs::succeeds;

pub fn tells_the_export(target: &Target) {
    let said = match target.place() {
        Place::Tcp { host, port } => succeeds(&["nbd-client", "-l", host, "-p", port]),
        Place::Unix(path) => succeeds(&["nbd-client", "-l", "-u", path]),
    };
    assert!(said.lines().any(|line| line.split(':').next() == Some(NAME)), "{said}");
}
