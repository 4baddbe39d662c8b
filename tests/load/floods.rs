//! Connections that come in thousands and do nothing, or vanish: they cost a while what the caps allow, and then nothing.

use std::time::{Duration, Instant};

use blockyard_nbd::wire::option::{OptionCode, ReplyType};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::clients::{Good, MIB, Manner, bare, filled_image};
use crate::held::{Before, descriptors, until};
use crate::process::DEADLINE;
use crate::server::NbdServer;
use crate::tools::{folder, succeed};

const FLOOD: usize = 10_000;
/// Connections of one listener that may be in the handshake.
const HALF_OPEN: usize = 128;
/// What each may take for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// What a flood may leave in memory: tasks and buffers that the allocator keeps for the next ones.
const LEFT: u64 = 16 * MIB;

/// Whether the server has closed this connection. What it said is dropped.
fn closed(stream: &TcpStream) -> bool {
    let mut bytes = [0; 256];
    loop {
        match stream.try_read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

/// Lets the server make the threads and caches that its first work makes, and that stay.
async fn warm(server: &NbdServer) {
    let good = Good::start(&server.uri, 40 * MIB, Manner::Anew).await;
    good.served(10).await;
    good.end(10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_half_open_connections() {
    let folder = folder();
    let image = filled_image(&folder, 64 * MIB, 32 * MIB).await;
    let server = NbdServer::start(&image, &[]);
    warm(&server).await;
    let before = Before::of(server.id());
    let good = Good::start(&server.uri, 40 * MIB, Manner::Once).await;
    let start = Instant::now();
    let mut strays = Vec::new();
    let mut most = 0;
    for number in 0..FLOOD {
        strays.push(bare(&server.uri).await.0);
        if number % 100 == 0 {
            most = most.max(descriptors(server.id()));
        }
    }
    println!("{FLOOD} half-open connections in {:.1?}: at most {most} descriptors in the server", start.elapsed());
    let all_here = Instant::now();
    // The oldest are closed, and not at their deadline.
    let oldest = FLOOD - HALF_OPEN;
    until("all but the last are closed", || strays[..oldest].iter().all(closed)).await;
    assert!(all_here.elapsed() < HANDSHAKE, "it was the deadline that closed them");
    let open = strays[oldest..].iter().filter(|stray| !closed(stray)).count();
    assert!(open > HALF_OPEN / 2, "the youngest made room: {open} are left");
    println!("{open} of the last {HALF_OPEN} are open after {:.1?}", start.elapsed());
    // Whoever comes now is served: the oldest make room.
    let copy = folder.path().join("copy.raw");
    let (from, to) = (server.uri.clone(), copy.to_str().unwrap().to_owned());
    tokio::task::spawn_blocking(move || succeed("nbdcopy", &[&from, &to])).await.unwrap();
    assert_eq!(std::fs::metadata(&copy).unwrap().len(), 64 * MIB);
    until("all are closed at their deadline", || strays.iter().all(closed)).await;
    println!("all are closed after {:.1?}", start.elapsed());
    println!("{}", good.end(20).await);
    before.comes_back(LEFT, "ten thousand half-open").await;
    drop(strays);
    server.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connections_that_vanish() {
    let folder = folder();
    let image = filled_image(&folder, 64 * MIB, MIB).await;
    let server = NbdServer::start(&image, &[]);
    warm(&server).await;
    let before = Before::of(server.id());
    let good = Good::start(&server.uri, 40 * MIB, Manner::Once).await;
    for _ in 0..1000 {
        drop(bare(&server.uri).await);
    }
    for _ in 0..1000 {
        let mut raw = bare(&server.uri).await;
        raw.greet(3).await.unwrap();
    }
    for number in 0..100 {
        let mut raw = bare(&server.uri).await;
        raw.greet(3).await.unwrap();
        let name = format!("no such disk {number}");
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        raw.option(OptionCode::GO, &data).await.unwrap();
        assert_eq!(raw.option_reply().await.unwrap().0.reply, ReplyType::ERR_UNKNOWN);
        // The old way ends in a close without a word.
        raw.option(OptionCode::EXPORT_NAME, name.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(DEADLINE, raw.0.read_to_end(&mut rest)).await.expect("closed in time");
        assert!(rest.is_empty());
    }
    println!("{}", good.end(10).await);
    before.comes_back(LEFT, "1000 closed, 1000 greeted and closed, 100 unknown names").await;
    server.stop();
}
