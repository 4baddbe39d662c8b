//! Where `blockyard nbd` listens: both families of addresses, Unix sockets, and sockets that somebody passes to it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::process::blockyard;
use crate::server::NbdServer;
use crate::tools::{assert_whole, folder, image, run, source, succeed, text};

const MIB: u64 = 1 << 20;

/// The binary, as an argument of libnbd's tools.
fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_blockyard")
}

#[test]
fn both_families_of_loopback_are_served_and_nothing_else() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    for (bind, begin) in [("127.0.0.1", "nbd://127.0.0.1:"), ("127.0.0.2", "nbd://127.0.0.2:"), ("::1", "nbd://[::1]:")]
    {
        let server = NbdServer::start(&image, &["--bind", bind]);
        assert!(server.uri.starts_with(begin), "{}", server.uri);
        assert_eq!(succeed("nbdinfo", &["--size", &server.uri]).trim(), MIB.to_string());
        server.stop();
    }
    for bind in ["0.0.0.0", "::", "192.0.2.1"] {
        let output = blockyard().args(["nbd", text(&image), "--bind", bind, "--port", "0"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bind}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("loopback"), "{output:?}");
    }
}

#[test]
fn a_budget_is_a_size_with_a_least_value() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let server = NbdServer::start(&image, &["--memory-budget", "32M"]);
    succeed("nbdinfo", &["--size", &server.uri]);
    server.stop();
    for wrong in ["31M", "0", "much"] {
        let output = blockyard().args(["nbd", text(&image), "--memory-budget", wrong]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}

/// Starts a server that must not come up; what it said, and its exit code.
fn refused(image: &Path, arguments: &[&str]) -> (String, Option<i32>) {
    let output = blockyard().args(["nbd", text(image)]).args(arguments).output().unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
}

#[test]
fn a_unix_socket_in_use_is_left_alone_and_that_of_a_successor_too() {
    let folder = folder();
    let (first, second) = (image(&folder, "first.qcow2", MIB), image(&folder, "second.qcow2", 2 * MIB));
    let socket = folder.path().join("nbd.sock");
    let server = NbdServer::start(&first, &["--socket", text(&socket)]);
    let (error, code) = refused(&second, &["--socket", text(&socket)]);
    assert_eq!(code, Some(5), "{error}");
    assert!(error.contains("nbd.sock"), "{error}");
    assert_eq!(succeed("nbdinfo", &["--size", &server.uri]).trim(), MIB.to_string());
    // A file that is no socket is nobody's to remove.
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(refused(&second, &["--socket", text(&file)]).1, Some(5));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    // Somebody removed the name, and another server took it.
    std::fs::remove_file(&socket).unwrap();
    let successor = NbdServer::start(&second, &["--socket", text(&socket)]);
    server.stop();
    assert_eq!(succeed("nbdinfo", &["--size", &successor.uri]).trim(), (2 * MIB).to_string());
    successor.stop();
    assert!(!socket.exists());
}

#[test]
fn a_unix_socket_is_not_made_where_everybody_may_make_one() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let open = folder.path().join("open");
    std::fs::create_dir(&open).unwrap();
    // The sticky bit keeps others from removing the socket, not from making it before us.
    for mode in [0o777, 0o1777] {
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(mode)).unwrap();
        let (error, code) = refused(&image, &["--socket", text(&open.join("nbd.sock"))]);
        assert_eq!(code, Some(2), "{error}");
        assert!(error.contains("everybody"), "{error}");
    }
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
    NbdServer::start(&image, &["--socket", text(&open.join("nbd.sock"))]).stop();
}

#[test]
fn libnbd_starts_it_with_a_socket_and_the_image_is_closed_when_it_is_done() {
    let folder = folder();
    let size = 20 * MIB + 512;
    let raw = source(&folder, "source.raw", size);
    let image = image(&folder, "image.qcow2", size);
    let started = ["[", binary(), "nbd", text(&image), "]"];
    succeed("nbdcopy", &[&["--", text(&raw)], &started[..]].concat());
    assert_whole(&image, &raw);
    // Exit code 0: clean, and closed.
    succeed(binary(), &["image", "check", text(&image)]);
    let back = folder.path().join("back.raw");
    succeed("nbdcopy", &[&["--"], &started[..], &[text(&back)]].concat());
    assert!(std::fs::read(&back).unwrap() == std::fs::read(&raw).unwrap());
    let information = succeed("nbdinfo", &[&["--json", "--"], &started[..]].concat());
    assert!(information.contains(&format!("\"export-size\": {size}")), "{information}");
    let script = format!(
        "h.connect_systemd_socket_activation([{:?}, 'nbd', {:?}])
h.pwrite(b'x' * 1000, 12345)
assert h.pread(1000, 12345) == b'x' * 1000
h.shutdown()
del h",
        binary(),
        text(&image)
    );
    succeed("nbdsh", &["-c", &script]);
    succeed(binary(), &["image", "check", text(&image)]);
    succeed("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 0x78 12345 1000", text(&image)]);
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&image)]);
}

/// Makes sockets as the script says, passes those in `passed` from descriptor 3 on, and becomes what its arguments say.
const PASS: &str = r"
import os, socket, sys
passed = []
def tcp(address, family=socket.AF_INET, listen=True):
    s = socket.socket(family)
    s.bind(address)
    if listen: s.listen(10)
    passed.append(s.detach())
def unix(path):
    s = socket.socket(socket.AF_UNIX)
    s.bind(path)
    s.listen(10)
    passed.append(s.detach())
def udp():
    s = socket.socket(type=socket.SOCK_DGRAM)
    s.bind(('127.0.0.1', 0))
    passed.append(s.detach())
exec(sys.argv[1])
high = [os.dup2(fd, 100 + n) for n, fd in enumerate(passed)]
os.closerange(3, 100)
for n, fd in enumerate(high): os.dup2(fd, 3 + n, inheritable=True); os.close(fd)
os.environ['LISTEN_FDS'] = str(len(high))
os.environ['LISTEN_PID'] = os.environ.get('PID', str(os.getpid()))
os.environ['LISTEN_FDNAMES'] = ':'.join(['nbd'] * len(high))
os.execv(sys.argv[2], sys.argv[2:])
";

fn passing(sockets: &str, image: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", PASS, sockets, binary(), "nbd", text(image)]).args(arguments).stdin(Stdio::null());
    command
}

#[test]
fn a_passed_socket_of_any_family_is_served() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let path: PathBuf = folder.path().join("passed.sock");
    let unix = format!("unix({:?})", text(&path));
    for (sockets, begin) in [
        ("tcp(('127.0.0.1', 0))", "nbd://127.0.0.1:"),
        ("tcp(('::1', 0), socket.AF_INET6)", "nbd://[::1]:"),
        (&unix, "nbd+unix:///disk?socket="),
    ] {
        let server = NbdServer::of(passing(sockets, &image, &["--export", "disk"]));
        assert!(server.uri.starts_with(begin), "{}", server.uri);
        assert_eq!(succeed("nbdinfo", &["--size", &server.uri]).trim(), MIB.to_string());
        let uri = server.uri.clone();
        server.stop();
        assert!(!run("nbdinfo", &["--size", &uri]).status.success(), "nobody listens any more");
    }
    assert!(path.exists(), "who made it removes it");
}

#[test]
fn passed_sockets_that_cannot_be_served_are_refused_by_what_is_wrong_with_them() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let one = "tcp(('127.0.0.1', 0))";
    for (sockets, arguments, words) in [
        (one, &["--port", "10809"][..], "cannot be used with it"),
        (one, &["--bind", "127.0.0.1"], "cannot be used with it"),
        (one, &["--socket", "/tmp/none"], "cannot be used with it"),
        ("tcp(('127.0.0.1', 0)); tcp(('127.0.0.1', 0))", &[], "2 sockets were passed"),
        ("tcp(('127.0.0.1', 0), listen=False)", &[], "no TCP or Unix socket that listens"),
        ("udp()", &[], "no TCP or Unix socket that listens"),
        ("passed.append(os.open('/dev/null', os.O_RDONLY))", &[], "no TCP or Unix socket that listens"),
        ("tcp(('0.0.0.0', 0))", &[], "not loopback"),
    ] {
        let output = passing(sockets, &image, arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{sockets} {arguments:?}: {error}");
        assert!(error.contains(words), "{sockets} {arguments:?}: {error}");
    }
    // Sockets for another process are none of ours.
    let server = NbdServer::of({
        let mut command = passing(one, &image, &["--port", "0"]);
        command.env("PID", "1");
        command
    });
    succeed("nbdinfo", &["--size", &server.uri]);
    server.stop();
}
