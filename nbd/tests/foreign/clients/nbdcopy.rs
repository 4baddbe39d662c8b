//! `nbdcopy`: whole disks, up and down.

use super::{Target, assert_same};
use crate::programs::succeeds;

/// Its options, a copy each. The second has 1024 requests in flight over all.
const MANNERS: [&[&str]; 7] = [
    &[],
    &["-C", "8", "-T", "8", "-R", "128", "--request-size=262144"],
    &["--synchronous"],
    &["--request-size=33554432", "-R", "2"],
    &["--no-extents"],
    &["--allocated"],
    &["-S", "0", "--flush"],
];

pub fn copies_up_and_down_in_every_manner(target: &Target) {
    let uri = target.uri.as_str();
    // What the last manner left must be overwritten, so two sources take turns.
    let sources = [target.source(1), target.source(2)];
    let back = target.folder.file("back.raw");
    for (manner, source) in MANNERS.iter().zip(sources.iter().cycle()) {
        succeeds(&[&["nbdcopy"], *manner, &[source, uri]].concat());
        let _ = std::fs::remove_file(&back);
        succeeds(&[&["nbdcopy"], *manner, &[uri, &back]].concat());
        assert_same(source, &back);
    }
    succeeds(&["nbdcopy", uri, "null:"]);
}
