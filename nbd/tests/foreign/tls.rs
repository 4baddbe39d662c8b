//! TLS with what others wrote, on both sides.

use std::path::Path;
use std::sync::Arc;

use blockyard_nbd::client::{Client, ClientError, Uri};
use blockyard_nbd::server::Listener;
use blockyard_nbd::{Durability, Exports, Handle, Options, Server, Tls};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;

use crate::clients::{NAME, SIZE, Target};
use crate::common::certificates::{Authority, CLIENT_TEXT, Pki, folder};
use crate::common::devices::{Disk, Mem};
use crate::common::servers::options;
use crate::common::{pattern, soon};
use crate::programs::{Background, Folder, fails, succeeds};

/// Our server with a disk in memory, for clients with the certificate of this test.
struct Served {
    pki: Pki,
    mem: Arc<Mem>,
    /// As the server tells it.
    uri: String,
    _folder: Folder,
    _handle: Handle,
    _runtime: Runtime,
}

impl Served {
    fn new(unix: bool) -> Self {
        let runtime = Runtime::new().unwrap();
        let (pki, mem, folder) = (Pki::new(), Mem::new(SIZE), Folder::new());
        let tls = Tls::Required(pki.server(&[CLIENT_TEXT]));
        let handle = runtime.block_on(async {
            let listener: Listener = match unix {
                true => UnixListener::bind(folder.file("socket")).unwrap().into(),
                false => TcpListener::bind("127.0.0.1:0").await.unwrap().into(),
            };
            let exports = Exports::single(Arc::new(Disk::new(NAME, SIZE, mem.clone()))).unwrap();
            Server::start(listener, exports, Options { tls, ..options() }).unwrap()
        });
        let uri = handle.uris().remove(0);
        Self { pki, mem, uri, _folder: folder, _handle: handle, _runtime: runtime }
    }

    /// The URI with a folder of certificates.
    fn with(&self, certificates: &Path) -> String {
        let separator = if self.uri.contains('?') { '&' } else { '?' };
        let uri = self.uri.replace("127.0.0.1", "localhost");
        format!("{uri}{separator}tls-certificates={}", certificates.display())
    }

    fn port(&self) -> &str {
        self.uri.strip_prefix("nbds://127.0.0.1:").unwrap().split('/').next().unwrap()
    }
}

#[test]
fn libnbd_copies_up_and_down_in_tls() {
    for unix in [false, true] {
        let served = Served::new(unix);
        let uri = served.with(served.pki.folder.path());
        let information = succeeds(&["nbdinfo", "--json", &uri]);
        let information: serde_json::Value = serde_json::from_str(&information).unwrap();
        assert_eq!(information["TLS"], true, "{information}");
        assert_eq!(information["exports"][0]["export-size"], SIZE, "{information}");
        let target = Target::new(uri, Folder::new());
        for (seed, manner) in [
            &[][..],
            &["-C", "8", "-T", "8", "-R", "128", "--request-size=262144"],
            &["--synchronous"],
            &["--request-size=33554432", "-R", "2"],
        ]
        .into_iter()
        .enumerate()
        {
            let source = target.source(seed as u64);
            succeeds(&[&["nbdcopy"], manner, &[&source, &target.uri]].concat());
            let bytes = std::fs::read(&source).unwrap();
            assert!(served.mem.content() == bytes, "up {manner:?}");
            assert!(std::fs::read(target.download()).unwrap() == bytes, "down {manner:?}");
        }
    }
}

#[test]
fn nbdsh_reads_and_writes_in_tls() {
    let served = Served::new(false);
    let script = format!(
        "h.set_uri_allow_local_file(True); h.connect_uri('{}'); assert h.get_tls_negotiated(); \
         h.pwrite(b'abc', 1000000); h.flush(); assert h.pread(5, 999999) == b'\\0abc\\0'; h.shutdown()",
        served.with(served.pki.folder.path())
    );
    succeeds(&["nbdsh", "-c", &script]);
}

#[test]
fn qemu_converts_compares_and_lists_in_tls() {
    let served = Served::new(false);
    let directory = served.pki.folder.path().display();
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={directory}");
    let port = served.port();
    let export = format!("driver=nbd,host=localhost,port={port},export={NAME},tls-creds=tls");
    let object = ["--object", &credentials, "--image-opts"];
    let info = succeeds(&[&["qemu-img", "info"], &object[..], &[&export]].concat());
    assert!(info.contains("64 MiB"), "{info}");
    let target = Target::new(String::new(), Folder::new());
    let source = target.source(1);
    let raw = format!("driver=file,filename={source}");
    let convert = ["convert", "-n", "-W", "-m", "16", "--target-image-opts"];
    succeeds(&[&["qemu-img"], &convert[..], &object, &[&raw, &export]].concat());
    assert!(served.mem.content() == std::fs::read(&source).unwrap());
    succeeds(&[&["qemu-img", "compare"], &object[..], &[&raw, &export]].concat());
    let back = target.folder.file("back.raw");
    succeeds(&[&["qemu-img", "convert"], &object[..], &["-O", "raw", &export, &back]].concat());
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&back).unwrap());
    let commands = ["-c", "write -q -P 7 12345 777", "-c", "write -q -z 1M 1M", "-c", "read -q -P 7 12345 777"];
    succeeds(&[&["qemu-io"], &object[..], &commands, &[&export]].concat());
    let list = succeeds(
        &[&["qemu-nbd", "--list"], &object[..2], &["--tls-creds", "tls", "-b", "localhost", "-p", port]].concat(),
    );
    assert!(list.contains("export: 'disk0'") && list.contains("size:  67108864"), "{list}");
}

#[test]
fn foreign_clients_that_do_not_belong_here_are_turned_away() {
    let served = Served::new(false);
    let plain = served.uri.replace("nbds://", "nbd://");
    fails(&["nbdinfo", &plain]);
    let refused = fails(&["qemu-img", "info", &plain]);
    assert!(refused.contains("TLS"), "QEMU says what it was told: {refused}");
    // Without a certificate, with one of another authority, and where the server is not believed.
    let bare = folder(&served.pki.authority, None, None);
    let stranger = Pki::new();
    let client = stranger.authority.client(crate::common::certificates::CLIENT, crate::common::certificates::VALID);
    let forged = folder(&served.pki.authority, None, Some(&client));
    let unbelieving = folder(&Authority::called("Another root"), None, None);
    for folder in [&bare, &forged, &unbelieving] {
        fails(&["nbdinfo", &served.with(folder.path())]);
    }
    succeeds(&["nbdinfo", &served.with(served.pki.folder.path())]);
}

/// A foreign server that demands TLS and certificates, and where it is.
fn foreign(arguments: &[&str], folder: &Folder) -> (Background, String) {
    let socket = folder.file("socket");
    let server = Background::server(arguments, &socket);
    (server, format!("nbds+unix:///?socket={socket}"))
}

async fn exercise(uri: &str, pki: &Pki) {
    let at = |folder: &Path| -> Uri { format!("{uri}&tls-certificates={}", folder.display()).parse().unwrap() };
    let client = soon("a foreign server", Client::connect(&at(pki.folder.path()))).await.unwrap();
    for (offset, length) in [(0, 512), (1 << 20, 8 << 20), (12_345, 100_001)] {
        let data = pattern(offset + 1, length);
        client.write(offset, data.clone(), Durability::OnFlush).await.unwrap();
        assert!(soon("a read", client.read(offset, length as u32)).await.unwrap() == data);
    }
    client.flush().await.unwrap();
    soon("the goodbye", client.disconnect()).await.unwrap();
    // It is believed only by the right root and under the right name.
    let unbelieving = folder(&Authority::called("Another root"), None, None);
    let error = soon("a refusal", Client::connect(&at(unbelieving.path()))).await.unwrap_err();
    assert!(matches!(error, ClientError::TlsHandshake(_)), "{error}");
    let elsewhere = format!("{uri}&tls-hostname=elsewhere&tls-certificates={}", pki.folder.path().display());
    let error = soon("a refusal", Client::connect(&elsewhere.parse().unwrap())).await.unwrap_err();
    assert!(matches!(error, ClientError::TlsHandshake(_)), "{error}");
    // And it wants a certificate of us.
    let bare = folder(&pki.authority, None, None);
    soon("a refusal", Client::connect(&at(bare.path()))).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_with_qemu_nbd_in_tls() {
    let (pki, folder) = (Pki::new(), Folder::new());
    let raw = folder.file("disk.raw");
    succeeds(&["qemu-img", "create", "-q", "-f", "raw", &raw, "64M"]);
    let credentials =
        format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={}", pki.folder.path().display());
    let line = ["qemu-nbd", "-t", "-e", "0", "--object", &credentials, "--tls-creds", "tls", "-f", "raw", &raw];
    let (_server, uri) = foreign(&line, &folder);
    exercise(&uri, &pki).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_with_nbdkit_in_tls() {
    let (pki, folder) = (Pki::new(), Folder::new());
    let certificates = format!("--tls-certificates={}", pki.folder.path().display());
    let line = ["nbdkit", "-f", "--tls=require", &certificates, "--tls-verify-peer", "memory", "64M"];
    let (_server, uri) = foreign(&line, &folder);
    exercise(&uri, &pki).await;
}
