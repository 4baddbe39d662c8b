//! `nbdsh`: libnbd with all its doors open, also those that a careful client keeps shut.

use super::Target;
use crate::programs::succeeds;

/// Errors, chunks and extents, bit for bit.
const CHECKS: &str = include_str!("checks.py");
/// A handshake by hand.
const OPTIONS: &str = include_str!("options.py");
/// Many requests at once, each verified.
const FLIGHT: &str = include_str!("flight.py");

pub fn finds_the_errors_and_chunks_of_the_protocol(target: &Target) {
    let checks = script(target, CHECKS);
    succeeds(&["nbdsh", "--base-allocation", "-u", &target.uri, "-c", &checks]);
}

pub fn verifies_64_requests_in_flight_on_each_of_8_connections(target: &Target) {
    let uri = format!("uri = {:?}", target.uri);
    succeeds(&["nbdsh", "-c", &uri, "-c", &script(target, FLIGHT)]);
}

/// EXPORT_NAME with and without its 124 zeroes, simple replies, and options sent by hand.
pub fn takes_the_old_paths(target: &Target) {
    let connect = format!("h.connect_uri({:?})", target.uri);
    let size = "assert h.get_size() == 64 << 20 and h.pread(512, 512) is not None";
    for (before, after) in [
        ("h.set_handshake_flags(0)", "assert h.get_protocol() == 'newstyle'"),
        ("h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)", "assert h.get_protocol() == 'newstyle'"),
        ("h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)", "assert h.get_structured_replies_negotiated()"),
        ("h.set_request_structured_replies(False)", "assert not h.get_structured_replies_negotiated()"),
        ("h.set_request_block_size(False)", "pass"),
    ] {
        succeeds(&["nbdsh", "-c", before, "-c", &connect, "-c", after, "-c", size]);
    }
    succeeds(&["nbdsh", "--opt-mode", "-u", &target.export("nosuch"), "-c", &script(target, OPTIONS)]);
}

/// The statement that runs a script from a file: a failure then tells its line and not its text.
fn script(target: &Target, text: &str) -> String {
    let path = target.folder.file("script.py");
    std::fs::write(&path, text).unwrap();
    format!("exec(compile(open({path:?}).read(), {path:?}, 'exec'))")
}
