//! Clients that others wrote against our server, and our client against servers that others wrote. A tool that is missing
//! fails its test with the Debian package to install.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockyard_nbd::client::{Client, ClientError};
use blockyard_nbd::{Durability, Exports, Server};
use common::devices::{Disk, Mem};
use common::servers::{NAME, Served, options};
use common::{pattern, soon};
use tokio::net::UnixListener;
use tokio::process::Command;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// Which package brings a program.
fn package(program: &str) -> &'static str {
    match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdsh" => "python3-libnbd",
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        "fio" => "fio",
        "nbdkit" => "nbdkit",
        _ => "(unknown)",
    }
}

/// A program of the system: a Python of one's own in front of it knows no `nbd` module.
fn program(name: &str) -> Command {
    let found = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].iter().map(|folder| Path::new(folder).join(name));
    let path = found.into_iter().find(|path| path.exists());
    let path = path.unwrap_or_else(|| panic!("{name} is missing: apt-get install {}", package(name)));
    let mut command = Command::new(path);
    let search = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/usr/sbin:{search}")).kill_on_drop(true).stdin(Stdio::null());
    command
}

/// Runs a program and tells what it said; `{U}` in an argument is the URI.
async fn run(uri: &str, line: &str) -> Output {
    let mut words = line.split(' ');
    let name = words.next().unwrap();
    let mut command = program(name);
    command.args(words.map(|word| word.replace("{U}", uri).replace('~', " ")));
    let output = tokio::time::timeout(std::time::Duration::from_secs(120), command.output()).await;
    output.unwrap_or_else(|_| panic!("{line} hangs")).unwrap()
}

/// Runs a program that must succeed, and tells what it wrote.
async fn succeeds(uri: &str, line: &str) -> String {
    let output = run(uri, line).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{line}: {}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    said
}

/// A folder of this test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("blockyard-nbd-foreign-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// A file of the size of the disk with 20 MiB of data in three places.
    fn source(&self) -> (String, Vec<u8>) {
        let mut bytes = vec![0; SIZE as usize];
        for (at, length) in [(0, 7), (20, 8), (59, 5)] {
            let (at, length) = (at << 20, length << 20);
            bytes[at..at + length].copy_from_slice(&pattern(at as u64 + 1, length));
        }
        let path = self.file("src.raw");
        std::fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Our server with an empty disk, over TCP or a Unix socket.
struct Target {
    mem: Arc<Mem>,
    uri: String,
    folder: Folder,
    _handle: Box<dyn std::any::Any>,
}

async fn tcp() -> Target {
    let mem = Mem::new(SIZE);
    let served = Served::disk(SIZE, mem.clone()).await;
    let uri = served.handle.uris().remove(0);
    Target { mem, uri, folder: Folder::new(), _handle: Box::new(served) }
}

async fn unix() -> Target {
    let (mem, folder) = (Mem::new(SIZE), Folder::new());
    let listener = UnixListener::bind(folder.file("socket")).unwrap();
    let exports = Exports::single(Arc::new(Disk::new(NAME, SIZE, mem.clone()))).unwrap();
    let handle = Server::start(listener, exports, options()).unwrap();
    Target { mem, uri: handle.uris().remove(0), folder, _handle: Box::new(handle) }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_sees_what_is_offered() {
    for target in [tcp().await, unix().await] {
        let json = succeeds(&target.uri, "nbdinfo --json {U}").await;
        for fact in [
            "\"export-name\": \"disk0\"",
            "\"description\": \"a disk for tests\"",
            "\"export-size\": 67108864",
            "\"protocol\": \"newstyle-fixed\"",
            "\"structured\": true",
            "\"base:allocation\"",
            "\"is_read_only\": false",
            "\"can_df\": true",
            "\"can_multi_conn\": true",
            "\"block_size_minimum\": 1",
            "\"block_size_preferred\": 65536",
            "\"block_size_maximum\": 67108864",
        ] {
            assert!(json.contains(fact), "{fact} is not in {json}");
        }
        succeeds(&target.uri, "nbdinfo {U}").await;
        assert_eq!(succeeds(&target.uri, "nbdinfo --size {U}").await.trim(), "67108864");
        let abilities = ["write", "zero", "fast-zero", "trim", "flush", "fua", "df", "multi-conn", "cache"];
        for ability in abilities.into_iter().chain(["structured-reply"]) {
            succeeds(&target.uri, &format!("nbdinfo --can {ability} {{U}}")).await;
        }
        target.mem.put(MIB, &pattern(1, 65536));
        let map = succeeds(&target.uri, "nbdinfo --map {U}").await;
        let map: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
        assert_eq!(map, [["0", "1048576", "3"], ["1048576", "65536", "0"], ["1114112", "65994752", "3"]]);
    }
    let target = tcp().await;
    let server = target.uri.trim_end_matches("/disk0");
    assert!(succeeds(server, "nbdinfo --list {U}").await.contains("export=\"disk0\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_copies_up_and_down_in_every_manner() {
    for target in [tcp().await, unix().await] {
        let (source, bytes) = target.folder.source();
        let out = target.folder.file("out.raw");
        for manner in [
            "",
            "-C~8~-T~8~-R~128~--request-size=262144",
            "--synchronous",
            "--no-extents~--allocated",
            "-S~0~--flush",
            "--request-size=33554432~-R~2",
        ] {
            let manner = if manner.is_empty() { String::new() } else { format!(" {}", manner.replace('~', " ")) };
            target.mem.put(0, &pattern(99, SIZE as usize));
            succeeds(&target.uri, &format!("nbdcopy{manner} {source} {{U}}")).await;
            assert!(target.mem.content() == bytes, "up{manner}");
            succeeds(&target.uri, &format!("nbdcopy{manner} {{U}} {out}")).await;
            assert!(std::fs::read(&out).unwrap() == bytes, "down{manner}");
        }
        succeeds(&target.uri, "nbdcopy {U} null:").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_converts_compares_maps_and_lists() {
    let target = tcp().await;
    let (source, bytes) = target.folder.source();
    succeeds(&target.uri, &format!("qemu-img convert -n -W -m 16 -f raw -O raw {source} {{U}}")).await;
    assert!(target.mem.content() == bytes);
    succeeds(&target.uri, &format!("qemu-img compare -f raw -F raw {source} {{U}}")).await;
    let map = succeeds(&target.uri, "qemu-img map --output=json -f raw {U}").await;
    assert!(map.contains("\"start\": 0, \"length\": 7340032"), "{map}");
    succeeds(&target.uri, "qemu-img bench -f raw -w -c 2000 -d 64 -s 65536 -t none {U}").await;
    let port = target.uri.trim_start_matches("nbd://127.0.0.1:").trim_end_matches("/disk0");
    let list = succeeds("", &format!("qemu-nbd --list -b 127.0.0.1 -p {port}")).await;
    for fact in ["export: 'disk0'", "size:  67108864", "opt block: 65536", "base:allocation", "fast-zero"] {
        assert!(list.contains(fact), "{fact} is not in {list}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_zeroes_discards_and_reads_back() {
    for target in [tcp().await, unix().await] {
        let commands = [
            "write -P 0x5a 0 1M",
            "write -z 256k 64k",
            "read -P 0 256k 64k",
            "discard 512k 64k",
            "write -f -P 7 12345 777",
            "read -P 7 12345 777",
            "read -P 0x5a 0 12345",
            "flush",
            "aio_write -P 9 2M 64k",
            "aio_flush",
            "read -P 9 2M 64k",
            "write -z -n 3M 1M",
            "write -z -u 4M 1M",
            "write -P 3 33M 31M",
            "read -P 3 33M 31M",
        ];
        let commands: Vec<String> =
            commands.iter().map(|command| format!("-c {}", command.replace(' ', "~"))).collect();
        let said = succeeds(&target.uri, &format!("qemu-io -f raw {} {{U}}", commands.join(" "))).await;
        assert!(!said.contains("error") && !said.contains("failed"), "{said}");
        assert_eq!(target.mem.content()[12345], 7);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_random_writes_and_trims() {
    let target = tcp().await;
    let folder = target.folder.0.to_str().unwrap();
    let fio = format!("fio --aux-path={folder} --ioengine=nbd --uri={{U}} --size=32M --iodepth=16");
    let verify = "--verify=crc32c --do_verify=1 --verify_fatal=1 --verify_state_save=0";
    succeeds(&target.uri, &format!("{fio} --name=v --rw=randwrite --bsrange=4k-128k {verify}")).await;
    succeeds(&target.uri, &format!("{fio} --name=t --rw=randtrimwrite --bs=64k")).await;
}

/// What nbdsh is asked to find true; it is refused nothing on its own side.
const CHECKS: &str = r"
h.set_strict_mode(0); n = h.get_size(); ch = []
add = lambda b, o, s, e: ch.append((o, len(b), s))
def err(f):
    try:
        f(); return 'OK'
    except nbd.Error as e:
        return e.errno
assert err(lambda: h.pwrite(b'a'*1024, n-512)) == 'ENOSPC'
assert err(lambda: h.pread(1024, n-512)) == 'EINVAL'
assert err(lambda: h.zero(1024, n-512)) == 'ENOSPC'
assert err(lambda: h.trim(1024, n-512)) == 'EINVAL'
assert err(lambda: h.cache(1024, n-512)) == 'EINVAL'
assert err(lambda: h.pread_structured(512, 0, add, nbd.CMD_FLAG_NO_HOLE)) == 'EINVAL'; ch.clear()
assert err(lambda: h.zero(512, 100, nbd.CMD_FLAG_FAST_ZERO)) == 'ENOTSUP'
h.zero(1<<20, 0); h.pwrite(b'q'*65536, 1<<18)
h.pread_structured(1<<20, 0, add, nbd.CMD_FLAG_DF); assert ch == [(0, 1<<20, 1)], ch
assert h.pread(1, n-1) == b'\0'
ex = []
h.block_status(1<<20, 0, lambda c, o, e, err: ex.extend(e))
assert ex == [262144, 3, 65536, 0, 720896, 3], ex
h.flush(nbd.CMD_FLAG_FUA); h.trim(65536, 1<<18, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 1<<18) == bytearray(65536)
h.shutdown()
";

#[tokio::test(flavor = "multi_thread")]
async fn nbdsh_finds_the_errors_and_chunks_that_the_protocol_asks_for() {
    let target = tcp().await;
    let script = target.folder.file("checks.py");
    std::fs::write(&script, CHECKS).unwrap();
    let mut nbdsh = program("nbdsh");
    nbdsh.args(["--base-allocation", "-u", &target.uri, "-c", "-"]);
    nbdsh.stdin(std::fs::File::open(&script).unwrap());
    let output = soon("nbdsh", nbdsh.output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdsh_takes_the_old_paths() {
    let target = tcp().await;
    for (before, after) in [
        ("h.set_handshake_flags(0)", "assert h.get_size() == 67108864"),
        ("h.set_handshake_flags(2)", "assert h.get_size() == 67108864"),
        ("h.set_handshake_flags(1)", "assert h.get_protocol() == 'newstyle-fixed'"),
        ("h.set_request_structured_replies(False)", "assert len(h.pread(65536, 512)) == 65536"),
        ("h.set_opt_mode(True)", "h.opt_list(lambda n, d: None); h.opt_info(); h.opt_abort()"),
    ] {
        let mut nbdsh = program("nbdsh");
        let connect = format!("h.connect_uri('{}')", target.uri);
        nbdsh.args(["-c", before, "-c", &connect, "-c", after]);
        let output = soon("nbdsh", nbdsh.output()).await.unwrap();
        assert!(output.status.success(), "{before}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A foreign server on a Unix socket, once it answers.
async fn foreign(command: &mut Command, socket: &str) -> (tokio::process::Child, Client) {
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let uri = format!("nbd+unix:///?socket={socket}").parse().unwrap();
    let client = async {
        loop {
            match Client::connect(&uri).await {
                Ok(client) => break client,
                Err(ClientError::Connection(_)) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let client = soon("the foreign server", client).await;
    (child, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_with_qemu_nbd() {
    let folder = Folder::new();
    let (image, socket) = (folder.file("disk.qcow2"), folder.file("socket"));
    succeeds("", &format!("qemu-img create -q -f qcow2 {image} 64M")).await;
    let mut qemu = program("qemu-nbd");
    qemu.args(["-t", "-e", "0", "--discard=unmap", "-f", "qcow2", "-k", &socket, &image]);
    let (mut child, client) = foreign(&mut qemu, &socket).await;
    exercise(&client).await;
    soon("the goodbye", client.disconnect()).await.unwrap();
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_with_nbdkit() {
    let folder = Folder::new();
    let socket = folder.file("socket");
    let mut nbdkit = program("nbdkit");
    nbdkit.args(["-f", "-U", &socket, "memory", "64M"]);
    let (mut child, client) = foreign(&mut nbdkit, &socket).await;
    exercise(&client).await;
    soon("the goodbye", client.disconnect()).await.unwrap();
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_reports_an_unreadable_foreign_disk() {
    let folder = Folder::new();
    let socket = folder.file("socket");
    let mut nbdkit = program("nbdkit");
    nbdkit.args(["-f", "-U", &socket, "--filter=error", "pattern", "64M", "error-pread-rate=100%", "error=EIO"]);
    let (mut child, client) = foreign(&mut nbdkit, &socket).await;
    assert_eq!(soon("the read", client.read(0, 65536)).await.unwrap_err().errno(), Some(5));
    child.kill().await.unwrap();
}

async fn exercise(client: &Client) {
    assert_eq!(client.size(), SIZE);
    let writes = (0..64u64).map(|part| {
        let client = client.clone();
        tokio::spawn(async move {
            let data = pattern(part + 1, 300_000);
            client.write(part * MIB + 12_345, data, Durability::OnFlush).await.unwrap();
        })
    });
    for write in writes.collect::<Vec<_>>() {
        soon("a write", write).await.unwrap();
    }
    client.zero(MIB, 1 << 20, Default::default(), Durability::OnFlush).await.unwrap();
    client.trim(2 * MIB, 1 << 20, Durability::OnFlush).await.unwrap();
    client.flush().await.unwrap();
    for part in [0u64, 3, 63] {
        let read = client.read(part * MIB + 12_345, 300_000).await.unwrap();
        assert_eq!(read, pattern(part + 1, 300_000), "part {part}");
    }
    assert_eq!(client.read(MIB, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
    let extents = client.allocation(0, 64 << 20).await.unwrap();
    assert!(extents.len() >= 3 && extents[0].status == 0, "{extents:?}");
    assert!(client.read(SIZE, 1).await.unwrap_err().errno().is_some());
}
