//! `qemu-img`: convert, compare, map, bench, info.

use serde_json::Value;

use super::{SIZE, Target, assert_same};
use crate::programs::succeeds;

pub fn converts_compares_and_maps(target: &Target) {
    let uri = target.uri.as_str();
    let source = target.source(3);
    succeeds(&["qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", &source, uri]);
    succeeds(&["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", &source, uri]);
    assert_same(&source, &target.download());
    let map: Value = serde_json::from_str(&succeeds(&["qemu-img", "map", "--output=json", "-f", "raw", uri])).unwrap();
    // Data where the source has them; the rest is a hole.
    let data: Vec<(u64, u64)> =
        map.as_array().unwrap().iter().filter(|extent| extent["data"] == true).map(place).collect();
    assert_eq!(data, [(0, 7 << 20), (20 << 20, 8 << 20), (59 << 20, 5 << 20)], "{map}");
    let info: Value =
        serde_json::from_str(&succeeds(&["qemu-img", "info", "--output=json", "-f", "raw", uri])).unwrap();
    assert_eq!(info["virtual-size"], SIZE, "{info}");
    for direction in [&["-w"][..], &[]] {
        let depth = ["-f", "raw", "-c", "2000", "-d", "64", "-s", "65536", "-t", "none", uri];
        succeeds(&[&["qemu-img", "bench", "-q"], direction, &depth].concat());
    }
}

fn place(extent: &Value) -> (u64, u64) {
    (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap())
}
