//! Clients that send one byte now and then: the handshake ends at its deadline, and in a request they cost their own
//! connection and one piece of memory.

use std::time::{Duration, Instant};

use blockyard_nbd::wire::Command;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::clients::{Good, MIB, Manner, Replies, bare, entered, filled_image, request};
use crate::held::Before;
use crate::process::DEADLINE;
use crate::server::NbdServer;
use crate::tools::folder;

/// Between two bytes.
const PAUSE: Duration = Duration::from_secs(2);
/// The handshake's deadline.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Sends an endless handshake byte by byte; tells when it was closed.
async fn handshake(uri: String, begin: &'static [u8]) -> Duration {
    let mut raw = bare(&uri).await;
    let start = Instant::now();
    let (mut reader, mut writer) = raw.0.split();
    let mut heard = Vec::new();
    let send = async {
        for byte in begin.iter().chain(std::iter::repeat(&0)) {
            if writer.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = send => {}
        closed = tokio::time::timeout(DEADLINE, reader.read_to_end(&mut heard)) => {
            // A reset is an end as well.
            let _ = closed.expect("closed in time");
        }
    }
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_byte_now_and_then() {
    let folder = folder();
    let image = filled_image(&folder, 256 * MIB, MIB).await;
    let server = NbdServer::start(&image, &["--connections", "80", "--memory-budget", "64M"]);
    let before = Before::of(server.id());
    let good = Good::start(&server.uri, 40 * MIB, Manner::Once).await;

    let mut handshakes = tokio::task::JoinSet::new();
    for _ in 0..32 {
        handshakes.spawn(handshake(server.uri.clone(), &[0, 0, 0, 3]));
        handshakes.spawn(handshake(server.uri.clone(), &[0, 0, 0, 3, b'I', b'H', b'A', b'V', b'E', b'O', b'P', b'T']));
    }
    // Half of them in a header, half in a payload.
    let mut requests = Vec::new();
    for number in 0..64 {
        let mut raw = entered(&server.uri, Replies::Structured).await;
        if number % 2 == 0 {
            raw.send(&request(Command::WRITE, 1, 0, 65536).encode_compact().unwrap()[..5]).await.unwrap();
        } else {
            raw.request(request(Command::WRITE, 1, 0, 32 * MIB), &[1]).await.unwrap();
        }
        requests.push(raw);
    }
    let start = Instant::now();
    while start.elapsed() < HANDSHAKE + PAUSE {
        tokio::time::sleep(PAUSE).await;
        for raw in &mut requests {
            raw.send(&[0]).await.unwrap();
        }
    }
    let mut closed = Vec::new();
    while let Some(after) = handshakes.join_next().await {
        closed.push(after.unwrap());
    }
    let (first, last) = (closed.iter().min().unwrap(), closed.iter().max().unwrap());
    println!("{} slow handshakes were closed after {first:.1?} to {last:.1?}", closed.len());
    assert!(*first > HANDSHAKE - PAUSE, "closed before the deadline");
    println!("{}", good.end(20).await);
    drop(requests);
    before.comes_back(64 * MIB, "128 slow clients").await;
    server.stop();
}
