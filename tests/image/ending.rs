//! How serving ends: politely, by a kill, and with clients that are still there.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::process::blockyard;
use crate::server::NbdServer;
use crate::tools::{assert_whole, folder, image, run, source, succeed, text};

const MIB: u64 = 1 << 20;

#[test]
fn what_was_flushed_is_there_after_a_kill_and_qemu_repairs_the_rest() {
    let folder = folder();
    let size = 16 * MIB;
    let raw = source(&folder, "source.raw", size);
    let image = image(&folder, "image.qcow2", size);
    let server = NbdServer::start(&image, &[]);
    succeed("nbdcopy", &["--flush", text(&raw), &server.uri]);
    server.signal("KILL");
    server.wait();

    let plain = run("qemu-img", &["check", "-q", "-f", "qcow2", text(&image)]);
    assert_eq!(plain.status.code(), Some(2), "refcounts are written at the close: {plain:?}");
    let ours = blockyard().args(["image", "check", text(&image)]).output().unwrap();
    let told = String::from_utf8_lossy(&ours.stdout);
    assert_eq!(ours.status.code(), Some(2), "{ours:?}");
    assert!(told.contains("not closed") && !told.contains("errors:") && !told.contains("damaged"), "{told}");
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", text(&raw), text(&image)]);
    succeed("qemu-img", &["check", "-q", "-r", "all", "-f", "qcow2", text(&image)]);
    assert_whole(&image, &raw);
}

#[test]
fn an_image_that_was_left_dirty_is_served_again_and_closed_whole() {
    let folder = folder();
    let size = 16 * MIB;
    let raw = source(&folder, "source.raw", size);
    let image = image(&folder, "image.qcow2", size);
    let server = NbdServer::start(&image, &[]);
    succeed("nbdcopy", &["--flush", text(&raw), &server.uri]);
    server.signal("KILL");
    server.wait();
    let server = NbdServer::start(&image, &[]);
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", text(&raw), &server.uri]);
    server.stop();
    assert_whole(&image, &raw);
}

#[test]
fn a_stop_with_a_client_still_connected_closes_the_image_whole() {
    let folder = folder();
    let size = 8 * MIB;
    let raw = source(&folder, "source.raw", size);
    for signal in ["TERM", "INT"] {
        let image = image(&folder, &format!("{signal}.qcow2"), size);
        let server = NbdServer::start(&image, &[]);
        succeed("nbdcopy", &[text(&raw), &server.uri]);
        // It says when it is connected, and stays so until its standard input ends.
        let mut idle = Command::new("nbdsh")
            .args(["-u", &server.uri, "-c", "print('connected', flush=True); import sys; sys.stdin.read()"])
            .env("PATH", "/usr/bin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("nbdsh is missing: install the Debian package python3-libnbd");
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(idle.stdout.as_mut().unwrap()), &mut line).unwrap();
        assert_eq!(line, "connected\n");
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0), "{signal}");
        assert_whole(&image, &raw);
        drop(idle.stdin.take());
        idle.wait().unwrap();
    }
}

#[test]
fn a_unix_socket_is_private_and_goes_with_its_server() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let socket = folder.path().join("nbd sock");
    let server = NbdServer::start(&image, &["--socket", text(&socket)]);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(succeed("nbdinfo", &["--size", &server.uri]).trim(), MIB.to_string());
    server.signal("KILL");
    server.wait();
    assert!(socket.exists(), "a killed server leaves its socket");
    let server = NbdServer::start(&image, &["--socket", text(&socket)]);
    succeed("nbdinfo", &["--size", &server.uri]);
    server.stop();
    assert!(!socket.exists());
}
