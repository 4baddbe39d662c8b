//! Where the engine and QEMU judge a damaged image differently, and why.

#![allow(unreachable_pub, reason = "part of the tests that include it")]

/// What both said about one image.
#[derive(Debug)]
pub struct Judged {
    pub name: String,
    pub ours: String,
    /// Our check finds no error (leaks are none).
    pub ours_sound: bool,
    /// QEMU's check finds no error; `None`: it was not asked.
    pub qemu_sound: Option<bool>,
    /// The whole disk, read by us without an error, is what QEMU reads; `None`: not asked.
    pub reads_as_qemu: Option<bool>,
    pub read: bool,
    pub written: bool,
    pub repaired: bool,
    pub peak_kib: u64,
}

impl Judged {
    pub fn differs(&self) -> bool {
        self.qemu_sound.is_some_and(|sound| sound != self.ours_sound) || self.reads_as_qemu == Some(false)
    }
}

/// The kinds of difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Difference {
    /// We find an error, or refuse, where QEMU does not.
    Stricter,
    /// QEMU finds an error, or refuses, where we do not.
    Looser,
    /// We read it whole; QEMU reads something else, or refuses.
    Reads,
}

use Difference::{Looser, Reads, Stricter};

/// Beginning of the names, the difference, the reason.
const EXPLAINED: [(&str, Difference, &str); 15] = [
    ("L2 entry: a zero cluster in version 2", Stricter, "bit 0 is reserved in version 2"),
    ("header: version = 2", Stricter, "the same, after the sample was called version 2"),
    ("L2 entry: offset 0, COPIED", Stricter, "offset 0 is the header; QEMU takes the entry for an unallocated one"),
    ("L2 entry: the L1 table, refcount 2", Stricter, "guest data in the file's structures; QEMU only compares counts"),
    ("L2 entry: the refcount table, refcount 2", Stricter, "the same"),
    ("subclusters: the zero bit of standard entries", Stricter, "bit 0 is reserved with extended entries"),
    ("cut: to", Stricter, "the L1 table is past the end of the file; QEMU reads an empty disk"),
    ("extension: 65 of them", Stricter, "at most 64 extensions are accepted"),
    ("extension: 1000 of them", Stricter, "the same"),
    ("extension: 10000 of them", Stricter, "the same"),
    ("extension: bitmaps twice", Stricter, "a known extension twice is ambiguous"),
    ("extension: feature names twice", Stricter, "the same"),
    ("extension: data file", Stricter, "external data files are refused, whatever the feature bit says"),
    ("header: backing_file_offset", Stricter, "a backing file without a name; QEMU takes it for none"),
    ("header: size", Reads, "QEMU cuts a partial last sector off; we read every byte"),
];

/// Differences without a row, and rows without a difference.
pub fn unexplained(judged: &[Judged]) -> Vec<String> {
    let mut used = [false; EXPLAINED.len()];
    let mut list = Vec::new();
    for sample in judged {
        let check = match (sample.ours_sound, sample.qemu_sound) {
            (false, Some(true)) => Some(Stricter),
            (true, Some(false)) => Some(Looser),
            _ => None,
        };
        let reading = (sample.reads_as_qemu == Some(false)).then_some(Reads);
        for difference in [check, reading].into_iter().flatten() {
            let row = |(name, kind, _): &(&str, Difference, &str)| sample.name.starts_with(name) && *kind == difference;
            match EXPLAINED.iter().position(row) {
                Some(row) => used[row] = true,
                None => list.push(format!("{}: {difference:?}, without a reason: {}", sample.name, sample.ours)),
            }
        }
    }
    let stale = EXPLAINED.iter().zip(used).filter(|(_, used)| !used);
    list.extend(stale.map(|((name, kind, _), _)| format!("{name}: {kind:?} is explained, and does not happen")));
    list
}
