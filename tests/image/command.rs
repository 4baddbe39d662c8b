//! What the commands refuse, and how they say so.

use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::process::blockyard;
use crate::server::NbdServer;
use crate::tools::{folder, image, run, succeed, text};

const MIB: u64 = 1 << 20;

/// Exit code and standard error of a command.
fn refused(arguments: &[&str]) -> (i32, String) {
    let output = blockyard().args(arguments).output().unwrap();
    assert!(output.stdout.is_empty(), "{arguments:?} printed {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn what_is_no_image_is_never_served() {
    let folder = folder();
    let raw = folder.path().join("disk.qcow2");
    std::fs::write(&raw, vec![7; 65536]).unwrap();
    let (code, error) = refused(&["nbd", text(&raw), "--port", "0"]);
    assert_eq!(code, 6, "{error}");
    assert!(error.contains("not a qcow2 image"), "{error}");
    let (code, error) = refused(&["nbd", text(&folder.path().join("absent.qcow2"))]);
    assert_eq!(code, 4, "{error}");
}

#[test]
fn an_image_that_nobody_may_write_to_is_written_to_by_no_command() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    std::fs::set_permissions(&image, Permissions::from_mode(0o440)).unwrap();
    let before = std::fs::read(&image).unwrap();
    let name = text(&image);
    for arguments in [
        &["image", "repair", name][..],
        &["image", "grow", name, "--size", "2M"],
        &["nbd", name, "--port", "0"],
        &["nbd", name, "--port", "0", "--backing-root", text(folder.path())],
    ] {
        let (code, error) = refused(arguments);
        assert!(code == 5 && error.contains("write-protected") && error.contains("--read-only"), "{code} {error}");
    }
    assert!(std::fs::read(&image).unwrap() == before);
    let overlay = folder.path().join("overlay.qcow2");
    let create = ["image", "create", text(&overlay), "--backing", "image.qcow2"];
    let (code, error) = (blockyard().args(create).status().unwrap(), text(&overlay));
    assert!(code.success(), "what lies below is only read: {error}");
    NbdServer::start(&image, &["--read-only"]).stop();
    NbdServer::start(&overlay, &[]).stop();
}

#[test]
fn the_help_and_the_readme_tell_every_exit_code() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for arguments in [&["--help"][..], &["image", "--help"], &["doctor", "--help"]] {
        let output = blockyard().args(arguments).output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        let table = help.split_once("Exit codes:\n").unwrap().1;
        let codes: Vec<u8> = table.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 130], "{table}");
        for code in codes {
            assert!(readme.contains(&format!("\n| {code} | ")), "{code} is missing in the README");
        }
    }
}

#[test]
fn an_address_that_others_can_reach_is_refused() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let (code, error) = refused(&["nbd", text(&image), "--bind", "0.0.0.0", "--port", "0"]);
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("loopback"), "{error}");
}

#[test]
fn a_port_that_is_taken_is_named_and_the_image_stays_untouched() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let before = std::fs::read(&image).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, error) = refused(&["nbd", text(&image), "--port", &port]);
    assert_eq!(code, 5, "{error}");
    assert!(error.contains(&port), "{error}");
    assert!(std::fs::read(&image).unwrap() == before);
}

#[test]
fn an_image_in_use_is_not_served_for_writing() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let server = NbdServer::start(&image, &[]);
    let (code, error) = refused(&["nbd", text(&image), "--port", "0"]);
    assert_eq!(code, 5, "{error}");
    assert!(error.contains("in use"), "{error}");
    let check = run("qemu-img", &["check", "-f", "qcow2", text(&image)]);
    assert!(!check.status.success(), "QEMU respects the lock");
    server.stop();
}

#[test]
fn one_client_more_than_allowed_is_told_so() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let server = NbdServer::start(&image, &["--connections", "2"]);
    let script = format!(
        "import nbd\nfirst = nbd.NBD(); first.connect_uri('{uri}')\nsecond = nbd.NBD(); second.connect_uri('{uri}')\n\
         third = nbd.NBD()\ntry:\n    third.connect_uri('{uri}')\n    raise SystemExit('a third client was served')\n\
         except nbd.Error as error:\n    assert 'too many connections' in str(error) or 'policy' in str(error), error\n\
         first.shutdown()\nsecond.pread(512, 0)\n",
        uri = server.uri
    );
    succeed("nbdsh", &["-c", &script]);
    server.stop();
}

#[test]
fn backing_files_outside_the_folder_need_the_option() {
    let folder = folder();
    let inside = folder.path().join("vm");
    std::fs::create_dir(&inside).unwrap();
    image(&folder, "base.qcow2", MIB);
    let overlay = inside.join("overlay.qcow2");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", text(&overlay)]);
    let (code, error) = refused(&["nbd", text(&overlay), "--port", "0"]);
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("backing"), "{error}");
    let (code, error) = refused(&["nbd", text(&overlay), "--port", "0", "--backing-root", "/nowhere"]);
    assert!(code == 4 && error.contains("--backing-root /nowhere"), "{code}: {error}");
    for root in [folder.path(), &inside.join("..")] {
        let server = NbdServer::start(&overlay, &["--backing-root", text(root)]);
        succeed("nbdinfo", &["--size", &server.uri]);
        server.stop();
    }
}

#[test]
fn image_create_makes_what_qemu_finds_clean_and_info_tells_it() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let create = |arguments: &[&str]| blockyard().args(["image", "create"]).args(arguments).output().unwrap();
    let base = path("base.qcow2");
    assert!(create(&[text(&base), "--size", "10M", "--cluster-size", "4K"]).status.success());
    let overlay = path("overlay.qcow2");
    assert!(create(&[text(&overlay), "--backing", "base.qcow2"]).status.success());
    for image in [&base, &overlay] {
        succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(image)]);
    }
    let info = |image: &Path| {
        let output = blockyard().args(["--output", "json", "image", "info", text(image)]).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    assert_eq!(info(&base)["cluster_bytes"], 4096);
    assert_eq!(info(&overlay)["size_bytes"], 10 * MIB);
    assert_eq!(info(&overlay)["backing"], "base.qcow2");

    let (code, error) = refused(&["image", "create", text(&base), "--size", "1M"]);
    assert_eq!(code, 5, "{error}");
    for wrong in [&["--size", "513"][..], &["--size", "1M", "--cluster-size", "1000"], &["--size", "1X"], &[]] {
        let new = path("new.qcow2");
        let (code, error) = refused(&[&["image", "create", text(&new)], wrong].concat());
        assert_eq!(code, 2, "{wrong:?}: {error}");
        assert!(!new.exists());
    }
}
