//! `nbdinfo`: the handshake, seen from libnbd.

use serde_json::Value;

use super::{NAME, SIZE, Target};
use crate::programs::{fails, run, succeeds};

pub fn sees_what_is_offered(target: &Target) {
    let uri = &target.uri;
    let said: Value = serde_json::from_str(&succeeds(&["nbdinfo", "--json", uri])).unwrap();
    let export = &said["exports"][0];
    assert_eq!(said["protocol"], "newstyle-fixed", "{said}");
    assert_eq!(said["TLS"], false, "{said}");
    assert_eq!(said["structured"], true, "{said}");
    assert_eq!(export["export-name"], NAME, "{said}");
    assert_eq!(export["export-size"], SIZE, "{said}");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "qemu:allocation-depth"]), "{said}");
    for (fact, value) in [("block_size_minimum", 1), ("block_size_preferred", 65536), ("block_size_maximum", 64 << 20)]
    {
        assert_eq!(export[fact], value, "{fact} in {said}");
    }
    assert_eq!(export["is_read_only"], false, "{said}");
    assert_eq!(export["is_rotational"], false, "{said}");
    assert!(succeeds(&["nbdinfo", uri]).contains("export-size: 67108864 (64M)"));
    assert_eq!(succeeds(&["nbdinfo", "--size", uri]).trim(), SIZE.to_string());
    let abilities =
        ["connect", "read", "write", "zero", "fast-zero", "trim", "flush", "fua", "df", "multi-conn", "cache"];
    for ability in abilities.into_iter().chain(["structured-reply"]) {
        succeeds(&["nbdinfo", "--can", ability, uri]);
    }
    // No TLS here, not read-only and no spinning disk: status 2 is a no, 1 would be a failure.
    for (question, fact) in [("--is", "tls"), ("--is", "read-only"), ("--is", "rotational")] {
        assert_eq!(run(&["nbdinfo", question, fact, uri]).status.code(), Some(2), "{question} {fact}");
    }
    // The empty name means the only export; it is listed by its own; another is refused.
    assert_eq!(succeeds(&["nbdinfo", "--size", &target.export("")]).trim(), SIZE.to_string());
    let list: Value = serde_json::from_str(&succeeds(&["nbdinfo", "--list", "--json", &target.export("")])).unwrap();
    let exports = list["exports"].as_array().unwrap();
    assert!(exports.len() == 1 && exports[0]["export-name"] == NAME, "{list}");
    let complaint = fails(&["nbdinfo", &target.export("nosuch")]);
    assert!(complaint.contains("nosuch"), "{complaint}");
}

pub fn maps_what_was_written(target: &Target) {
    let uri = &target.uri;
    succeeds(&["qemu-io", "-f", "raw", "-c", "write -q -P 1 1M 64k", "-c", "write -q -z -u 2M 64k", uri]);
    let extents = |hole, data| {
        const START: u64 = 1 << 20;
        const END: u64 = START + 65536;
        [(0, START, hole), (START, END - START, data), (END, SIZE - END, hole)]
    };
    assert_eq!(map(uri, "base:allocation"), extents(3, 0));
    assert_eq!(map(uri, "qemu:allocation-depth"), extents(0, 1));
    let lines = succeeds(&["nbdinfo", "--map", uri]);
    assert_eq!(lines.lines().count(), 3, "{lines}");
    assert!(lines.lines().next().unwrap().ends_with("hole,zero"), "{lines}");
    let totals = succeeds(&["nbdinfo", "--map", "--totals", uri]);
    let totals: Vec<Vec<&str>> = totals.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(totals.iter().any(|total| total[0] == "65536" && total.contains(&"data")), "{totals:?}");
    assert!(totals.iter().any(|total| total[0] == "67043328" && total.contains(&"hole,zero")), "{totals:?}");
}

/// Offset, length and status of each extent, in one context.
pub fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let map: Value = serde_json::from_str(&succeeds(&["nbdinfo", "--json", &format!("--map={context}"), uri])).unwrap();
    let number = |extent: &Value, field: &str| extent[field].as_u64().unwrap();
    let extents = map.as_array().unwrap().iter();
    extents.map(|extent| (number(extent, "offset"), number(extent, "length"), number(extent, "type"))).collect()
}
