//! `qemu-nbd --list`: LIST, INFO and the metadata contexts, seen from QEMU.

use super::{Place, Target};
use crate::programs::succeeds;

pub fn lists_the_export(target: &Target) {
    let list = match target.place() {
        Place::Tcp { host, port } => succeeds(&["qemu-nbd", "--list", "-b", host, "-p", port]),
        Place::Unix(path) => succeeds(&["qemu-nbd", "--list", "-k", path]),
    };
    for fact in [
        "exports available: 1",
        "export: 'disk0'",
        "size:  67108864",
        "min block: 1",
        "opt block: 65536",
        "max block: 67108864",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(list.contains(fact), "{fact} is not in {list}");
    }
    let flags = list.lines().find(|line| line.trim().starts_with("flags:")).unwrap();
    for flag in ["flush", "fua", "trim", "zeroes", "df", "multi", "cache", "fast-zero"] {
        assert!(flags.split_whitespace().any(|word| word == flag), "{flag} is not in {flags}");
    }
    assert!(!flags.contains("readonly"), "{flags}");
}
