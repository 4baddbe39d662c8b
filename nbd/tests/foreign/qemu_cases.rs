//! What QEMU's own test suite asks of an NBD server, asked of ours: the cases of its suite by their numbers.

use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;

use crate::clients::{NAME, SIZE};
use crate::common::devices::Mem;
use crate::common::soon;
use crate::programs::{Dialogue, Folder, fails, succeeds};
use crate::{Served, Transport, start};

/// 143: a name of the longest length, one that is there and one that is not.
#[test]
fn names_of_4096_bytes_are_found_or_refused_politely() {
    let name = "n".repeat(4096);
    let served = Served::new(Transport::Unix, &name, SIZE);
    let socket = served.target.folder.file("socket");
    let open = |name: &str| {
        let options = format!("driver=nbd,server.type=unix,server.path={socket},export={name}");
        ["qemu-io", "--image-opts", "-c", "write -P 1 0 4k", &options].map(str::to_owned)
    };
    succeeds(&open(&name));
    assert_eq!(served.mem.content()[4095], 1);
    let complaint = fails(&open(&"m".repeat(4096)));
    assert!(complaint.contains("there is no export"), "the server's text reaches the user: {complaint}");
}

/// 205: an export goes away while a client uses it. What is under way is finished, later requests and clients are refused.
#[test]
fn an_export_in_use_can_be_removed() {
    let served = Served::new(Transport::Ipv4, NAME, SIZE);
    let mut client = Dialogue::start(&["qemu-io", "-f", "raw", &served.target.uri]);
    client.say("write -P 7 0 64k");
    client.hear("wrote 65536/65536");
    let (uri, mem) = (served.target.uri.clone(), served.mem.clone());
    let stopped = served.runtime.block_on(soon("the stop", served.handle.stop(Duration::ZERO)));
    assert_eq!(mem.content()[65535], 7, "{stopped:?}");
    client.say("read 0 64k");
    client.hear("read failed");
    client.say("quit");
    client.end();
    let complaint = fails(&["qemu-io", "-f", "raw", "-c", "read 0 64k", &uri]);
    assert!(complaint.contains("Connection refused"), "{complaint}");
}

/// 241: sizes that are no multiple of a sector. QEMU's map and its requests reach exactly to the end.
#[test]
fn odd_sizes_are_served_to_the_last_byte() {
    for size in [1u64, 511, 513, 1000, 65535, 65537] {
        let served = Served::new(Transport::Unix, NAME, size);
        let uri = &served.target.uri;
        let last = size - 1;
        let (write, read) = (format!("write -P 3 {last} 1"), format!("read -P 3 {last} 1"));
        succeeds(&["qemu-io", "-f", "raw", "-c", &write, "-c", &read, uri]);
        assert_eq!(served.mem.content()[last as usize], 3, "{size}");
        let map = succeeds(&["qemu-img", "map", "--output=json", "-f", "raw", uri]);
        let map: Value = serde_json::from_str(&map).unwrap();
        let told: u64 = map.as_array().unwrap().iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
        // QEMU counts whole sectors.
        assert_eq!(told, size.next_multiple_of(512), "{size}: {map}");
        assert_eq!(succeeds(&["nbdinfo", "--size", uri]).trim(), size.to_string());
        assert_eq!(std::fs::read(served.target.download()).unwrap(), served.mem.content(), "{size}");
    }
}

/// 277: the server goes away under a client that is told to wait, and another takes its place.
#[test]
fn a_client_that_reconnects_finds_the_next_server() {
    let served = Served::new(Transport::Unix, NAME, SIZE);
    let socket = served.target.folder.file("socket");
    let options = format!("driver=nbd,server.type=unix,server.path={socket},export={NAME},reconnect-delay=30");
    let mut client = Dialogue::start(&["qemu-io", "--image-opts", &options]);
    client.say("write -P 5 0 64k");
    client.hear("wrote 65536/65536");
    served.runtime.block_on(soon("the stop", served.handle.stop(Duration::ZERO)));
    // It finds no socket at first.
    let _ = std::fs::remove_file(&socket);
    client.say("read -P 5 0 64k");
    let _next = served.runtime.block_on(async {
        let listener = UnixListener::bind(&socket).unwrap();
        start(listener.into(), NAME, &served.mem)
    });
    client.hear("read 65536/65536");
    client.say("quit");
    assert!(client.end().success());
}

/// nbd-reconnect-on-open: a client that is told to wait for its first connection finds the server that comes later.
#[test]
fn a_client_that_is_too_early_waits_for_the_server() {
    let folder = Folder::new();
    let socket = folder.file("socket");
    let runtime = Runtime::new().unwrap();
    let early = runtime.block_on(async { UnixListener::bind(&socket).unwrap() });
    let options = format!("driver=nbd,server.type=unix,server.path={socket},export={NAME},open-timeout=30");
    let client = Dialogue::start(&["qemu-io", "--image-opts", "-c", "read -P 0 0 64k", &options]);
    // It has tried once and was turned away.
    drop(runtime.block_on(soon("the first try", early.accept())).unwrap());
    drop(early);
    std::fs::remove_file(&socket).unwrap();
    let _served = runtime.block_on(async {
        let listener = UnixListener::bind(&socket).unwrap();
        start(listener.into(), NAME, &Mem::new(SIZE))
    });
    let status = client.end();
    assert!(status.success(), "{status}");
}
