//! `blockyard backup watch`, as the real binary.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::rig::{Plan, Rig, content, id_of};
use crate::sse::{Stream, ids};
use crate::support::process::blockyard;

/// Runs a command against the service at `url`: its exit code, what it printed, and what it noted.
async fn watch(rig: &Rig, url: &str, arguments: &[&str]) -> (i32, String, String) {
    let mut command = blockyard();
    command.args(["backup", "watch"]).args(arguments).env("BLOCKYARD_URL", url);
    command.env("BLOCKYARD_TOKEN_FILE", rig.service.folder.path().join("state/token"));
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// The numbers of stored events in JSON lines.
fn stored(lines: &str) -> Vec<i64> {
    let documents = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    documents.filter(|event| event["kind"] != "disk.progress").map(|event| event["seq"].as_i64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_follows_a_backup_to_its_end_and_its_exit_code_tells_how_it_went() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() }).await;
    let url = rig.service.service.url();
    let started = rig.start().await;
    let id = id_of(&started);
    rig.paused().await;
    let arguments = [id];
    let (watched, ()) = tokio::join!(watch(&rig, &url, &arguments), async {
        // Goes on once the watcher is there, or was.
        let mut stream = Stream::open(&rig, &format!("/backups/{id}/events"), None).await;
        stream.until(|message| message.event == "disk.progress", &mut Vec::new()).await;
        rig.node.resume();
    });
    let (code, text, notes) = watched;
    assert_eq!(code, 0, "{text}{notes}");
    for words in ["disk 0 sealed", "disk 2 connected", "transferring", "restore point backup-"] {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert!(text.trim_end().ends_with("committed"), "{text}");

    // A backup that is over is told all the same.
    let (code, lines, _) = watch(&rig, &url, &["--output", "json", id]).await;
    let all = ids(&Stream::open(&rig, &format!("/backups/{id}/events"), None).await.rest().await);
    assert_eq!((code, stored(&lines)), (0, all));

    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    });
    let started = rig.start().await;
    rig.cancel(id_of(&started)).await;
    let (code, text, _) = watch(&rig, &url, &[id_of(&started)]).await;
    assert!(code == 1 && text.contains("alert: snapshot_may_be_left") && text.contains("cancelled"), "{code} {text}");
    let (code, text, _) = watch(&rig, &url, &["--quiet", id_of(&started)]).await;
    assert_eq!((code, text.as_str()), (1, ""));

    for missing in ["x", blockyard::id::BackupId::new().as_str()] {
        assert_eq!(watch(&rig, &url, &[missing]).await.0, 4);
    }
    assert_eq!(watch(&rig, "http://127.0.0.1:1", &[id]).await.0, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_tells_a_warning_by_its_exit_code() {
    let disks = vec![(2000, content(1, 2 << 20)), (2016, content(1, 2 << 20))];
    let rig = Rig::with(Plan { disks, ..Plan::default() }).await;
    let started = rig.start().await;
    let (code, text, _) = watch(&rig, &rig.service.service.url(), &[id_of(&started)]).await;
    assert!(code == 3 && text.contains("warning: same_first_mib: "), "{code} {text}");
}

/// A link to the service that breaks in the middle of the first answers. Returns its address and how often it was made.
async fn bad_link(service: std::net::SocketAddr) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let made = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&made);
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let before = count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut server = TcpStream::connect(service).await.unwrap();
                let (mut from_client, mut to_client) = client.split();
                let (mut from_server, mut to_server) = server.split();
                let up = tokio::io::copy(&mut from_client, &mut to_server);
                let down = async {
                    // Head and some events, cut wherever that is.
                    let mut left = if before < 3 { 1500 + 217 * before } else { usize::MAX };
                    let mut bytes = [0; 512];
                    while left > 0 {
                        let room = left.min(bytes.len());
                        let length = from_server.read(&mut bytes[..room]).await.unwrap_or(0);
                        if length == 0 || to_client.write_all(&bytes[..length]).await.is_err() {
                            return;
                        }
                        left -= length;
                    }
                };
                tokio::select! { _ = up => {}, () = down => {} }
            });
        }
    });
    (url, made)
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_resumes_after_a_break_without_gap_or_duplicate() {
    let rig = Rig::new().await;
    let (url, made) = bad_link(rig.service.service.address()).await;
    let started = rig.start().await;
    let (code, lines, notes) = watch(&rig, &url, &["--output", "json", id_of(&started)]).await;
    let path = format!("/backups/{}/events", id_of(&started));
    let all = ids(&Stream::open(&rig, &path, None).await.rest().await);
    assert_eq!((code, stored(&lines)), (0, all), "{notes}");
    assert!(made.load(Ordering::Relaxed) >= 4, "the link broke");
}
