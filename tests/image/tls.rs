//! `blockyard nbd --tls`: the clients that people have, and what is said about certificates.

use std::net::TcpListener;

use crate::certificates::{self, CLIENT};
use crate::process::blockyard;
use crate::server::NbdServer;
use crate::tools::{assert_whole, folder, image, run, source, succeed, text};

const MIB: u64 = 1 << 20;

/// The options of a server with the certificates of this folder.
fn options(folder: &tempfile::TempDir, mode: &str) -> Vec<String> {
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut options = vec!["--tls".to_owned(), mode.to_owned()];
    options.extend(["--tls-cert".to_owned(), file("server-cert.pem"), "--tls-key".to_owned(), file("server-key.pem")]);
    if mode == "required" {
        options.extend(["--tls-client-ca".to_owned(), file("ca-cert.pem")]);
    }
    options
}

fn start(image: &std::path::Path, options: &[String], more: &[&str]) -> NbdServer {
    let options: Vec<&str> = options.iter().map(String::as_str).chain(more.iter().copied()).collect();
    NbdServer::start(image, &options)
}

#[test]
fn foreign_clients_work_in_tls() {
    let folder = folder();
    certificates::make(folder.path());
    let size = 24 * MIB + 512;
    let raw = source(&folder, "source.raw", size);
    let copied = image(&folder, "copied.qcow2", size);
    let options = options(&folder, "required");
    let directory = text(folder.path());
    let server = start(&copied, &options, &["--export", "disk 0", "--tls-allow", "CN=nobody", "--tls-allow", CLIENT]);
    let place = server.uri.strip_prefix("nbds://127.0.0.1:").unwrap();
    let (port, export) = place.split_once('/').unwrap();
    assert_eq!(export, "disk%200");
    let uri = format!("nbds://localhost:{place}?tls-certificates={directory}");
    assert_eq!(succeed("nbdinfo", &["--size", &uri]).trim(), size.to_string());
    let information: serde_json::Value = serde_json::from_str(&succeed("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!((&information["TLS"], &information["structured"]), (&true.into(), &true.into()), "{information}");
    succeed("nbdcopy", &["--flush", text(&raw), &uri]);
    succeed("nbdcopy", &["-C", "4", "--request-size=33554432", "-R", "2", text(&raw), &uri]);
    let back = folder.path().join("back.raw");
    succeed("nbdcopy", &[&uri, text(&back)]);
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&raw).unwrap(), "read back differently");

    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={directory}");
    let export = format!("driver=nbd,host=localhost,port={port},export=disk 0,tls-creds=tls");
    let info = succeed("qemu-img", &["info", "--output=json", "--object", &credentials, "--image-opts", &export]);
    assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
    let other = folder.path().join("other.raw");
    succeed("qemu-img", &["convert", "--object", &credentials, "--image-opts", &export, "-O", "raw", text(&other)]);
    assert!(std::fs::read(&other).unwrap() == std::fs::read(&raw).unwrap(), "converted differently");

    // Who does not encrypt, or has no certificate, or does not trust ours, gets nothing.
    assert!(!run("nbdinfo", &[uri.replace("nbds://", "nbd://").split('?').next().unwrap()]).status.success());
    let bare = folder.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(folder.path().join("ca-cert.pem"), bare.join("ca-cert.pem")).unwrap();
    assert!(!run("nbdinfo", &[&format!("nbds://localhost:{place}?tls-certificates={}", text(&bare))]).status.success());
    let strange = folder.path().join("strange");
    std::fs::create_dir(&strange).unwrap();
    certificates::make(&strange);
    assert!(
        !run("nbdinfo", &[&format!("nbds://localhost:{place}?tls-certificates={}", text(&strange))]).status.success()
    );
    succeed("nbdinfo", &["--size", &uri]);
    server.stop();
    assert_whole(&copied, &raw);
}

#[test]
fn a_client_that_is_not_on_the_list_is_logged_with_its_subject() {
    let folder = folder();
    certificates::make(folder.path());
    let image = image(&folder, "image.qcow2", MIB);
    let server = start(&image, &options(&folder, "required"), &["--tls-allow", "CN=backup-client"]);
    let uri = server.uri.replace("127.0.0.1", "localhost");
    let output = run("nbdinfo", &[&format!("{uri}?tls-certificates={}", text(folder.path()))]);
    assert!(!output.status.success());
    server.signal("TERM");
    let said = server.said();
    assert!(said.contains("not allowed") && said.contains(CLIENT) && said.contains("peer=\"127.0.0.1:"), "{said}");
}

#[test]
fn unix_sockets_and_clients_that_may_choose_are_served_too() {
    let folder = folder();
    certificates::make(folder.path());
    let image = image(&folder, "image.qcow2", MIB);
    let socket = folder.path().join("nbd sock");
    let server = start(&image, &options(&folder, "required"), &["--export", "a", "--socket", text(&socket)]);
    assert!(server.uri.starts_with("nbds+unix:///a?socket=/"), "{}", server.uri);
    let uri = format!("{}&tls-certificates={}", server.uri, text(folder.path()));
    assert_eq!(succeed("nbdinfo", &["--size", &uri]).trim(), MIB.to_string());
    server.stop();

    let server = start(&image, &options(&folder, "on"), &[]);
    assert!(server.uri.starts_with("nbd://127.0.0.1:"), "{}", server.uri);
    succeed("nbdinfo", &["--size", &server.uri]);
    let uri = server.uri.replace("nbd://127.0.0.1", "nbds://localhost");
    succeed("nbdinfo", &["--size", &format!("{uri}?tls-certificates={}", text(folder.path()))]);
    server.stop();
}

#[test]
fn certificates_that_cannot_be_used_are_named_before_anything_listens() {
    let folder = folder();
    certificates::make(folder.path());
    let image = image(&folder, "image.qcow2", MIB);
    let before = std::fs::read(&image).unwrap();
    let refused = |arguments: &[&str]| {
        let output = blockyard().args(["nbd", text(&image)]).args(arguments).output().unwrap();
        assert!(output.stdout.is_empty(), "{arguments:?} printed {}", String::from_utf8_lossy(&output.stdout));
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key, roots) = (file("server-cert.pem"), file("server-key.pem"), file("ca-cert.pem"));
    let (absent, other) = (file("absent.pem"), file("client-key.pem"));
    let good = ["--tls", "required", "--tls-cert", &certificate, "--tls-key", &key];
    for (arguments, code, what) in [
        (&["--tls", "required"][..], 2, "--tls-cert"),
        (&["--tls", "on", "--tls-cert", &certificate], 2, "--tls-key"),
        (&["--tls", "maybe"], 2, "maybe"),
        (
            &["--tls", "on", "--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &roots],
            2,
            "keeps nobody out",
        ),
        (&["--tls-cert", &certificate, "--tls-key", &key], 2, "no use"),
        (&["--tls", "on", "--tls-cert", &absent, "--tls-key", &key], 4, "absent.pem cannot be read"),
        (&["--tls", "on", "--tls-cert", &key, "--tls-key", &key], 2, "server-key.pem holds no certificate"),
        (&["--tls", "on", "--tls-cert", &certificate, "--tls-key", &other], 2, "client-key.pem does not belong"),
        (&[&good[..], &["--tls-client-ca", &key]].concat(), 2, "server-key.pem holds no certificate"),
        (&[&good[..], &["--tls-allow", "CN=a"]].concat(), 2, "--tls-client-ca"),
        (&[&good[..], &["--tls-client-ca", &roots, "--tls-allow", "backup-1"]].concat(), 2, "no subject"),
        // Beyond loopback only where everybody encrypts; with it the address is tried, and is none of this machine.
        (&["--bind", "192.0.2.1"], 2, "loopback"),
        (&["--bind", "192.0.2.1", "--tls", "on", "--tls-cert", &certificate, "--tls-key", &key], 2, "loopback"),
        (&[&["--bind", "192.0.2.1"], &good[..]].concat(), 5, "cannot listen on 192.0.2.1"),
    ] {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let (found, error) = refused(&[arguments, &["--port", &free]].concat());
        assert_eq!(found, code, "{arguments:?}: {error}");
        assert!(error.contains(what), "{arguments:?}: {error}");
    }
    assert!(std::fs::read(&image).unwrap() == before);
}
