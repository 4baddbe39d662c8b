//! Foreign clients at a real image: what they read is what it holds once it is closed, and QEMU finds it clean.

use crate::clients::{self, Client, NAME, SIZE, Target};
use crate::programs::Folder;
use crate::server::NbdServer;
use crate::tools::{assert_whole, folder, image, source, succeed, text};

const MIB: u64 = 1 << 20;

/// Lets a client at an empty image. What is read back is what the image holds once it is closed.
fn from_an_image(client: Client) {
    let folder = folder();
    let image = image(&folder, "image.qcow2", SIZE);
    let server = NbdServer::start(&image, &["--export", NAME]);
    let target = Target::new(server.uri.clone(), Folder::new());
    client(&target);
    let content = target.download();
    server.stop();
    assert_whole(&image, content.as_ref());
}

clients::a_test_for_each_client!(from_an_image);

#[test]
fn an_image_is_served_over_ipv6_and_a_unix_socket_too() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", SIZE);
    let socket = folder.path().join("socket");
    for place in [["--bind", "::1"], ["--socket", text(&socket)]] {
        let server = NbdServer::start(&image, &[&["--export", NAME], &place[..]].concat());
        let target = Target::new(server.uri.clone(), Folder::new());
        for client in [clients::nbdinfo::sees_what_is_offered, clients::qemu_nbd::lists_the_export] {
            client(&target);
        }
        let raw = target.source(1);
        succeed("nbdcopy", &[&raw, &server.uri]);
        server.stop();
        assert_whole(&image, raw.as_ref());
    }
}

#[test]
fn the_last_cluster_may_be_partial() {
    let folder = folder();
    let size = 40 * MIB + 512;
    let raw = source(&folder, "source.raw", size);
    let image = image(&folder, "image.qcow2", size);
    let server = NbdServer::start(&image, &[]);
    succeed("nbdcopy", &["--flush", text(&raw), &server.uri]);
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", text(&raw), &server.uri]);
    server.stop();
    assert_whole(&image, &raw);
}

#[test]
fn a_read_only_image_takes_nothing_and_is_shared() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let server = NbdServer::start(&image, &["--read-only"]);
    let script = r#"
h.set_strict_mode(0)
for call in (lambda: h.pwrite(b'a', 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        call()
        raise SystemExit('a write went through')
    except nbd.Error as error:
        assert error.errno == 'EPERM', error
assert h.is_read_only()
h.flush()
"#;
    succeed("nbdsh", &["-u", &server.uri, "-c", script]);
    // A second server of the same image may read beside it.
    let second = NbdServer::start(&image, &["--read-only"]);
    succeed("nbdinfo", &["--size", &second.uri]);
    second.stop();
    server.stop();
}

#[test]
fn an_overlay_is_served_through_its_base() {
    let folder = folder();
    let size = 6 * MIB;
    let raw = source(&folder, "source.raw", size);
    let base = folder.path().join("base.qcow2");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&base)]);
    let overlay = folder.path().join("overlay.qcow2");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", text(&overlay)]);
    let server = NbdServer::start(&overlay, &[]);
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", text(&raw), &server.uri]);
    succeed("qemu-io", &["-f", "raw", "-c", "write -q -P 5 100001 70000", &server.uri]);
    server.stop();
    succeed("qemu-io", &["-f", "raw", "-c", "write -q -P 5 100001 70000", text(&raw)]);
    assert_whole(&overlay, &raw);
}

#[test]
fn a_name_may_hold_what_a_uri_must_escape() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let server = NbdServer::start(&image, &["--export", "disk 0/ä"]);
    assert_eq!(succeed("nbdinfo", &["--size", &server.uri]).trim(), MIB.to_string());
    assert!(succeed("nbdinfo", &["--list", &server.uri]).contains("disk 0/ä"));
    server.stop();
}
