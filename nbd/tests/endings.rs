//! How connections end: last words that arrive, payload that nobody wants, and a server that stops in the middle of all.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::Command;
use blockyard_nbd::wire::option::{InfoRequest, OptionCode, ReplyType, WantedInfo, encode_option};
use blockyard_nbd::{Limits, Stopped};
use common::devices::{Call, Counting, Disk, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{PATIENCE, request, soon, verdict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn a_final_error_reaches_a_client_that_is_still_sending() {
    // Closing a socket with unread input resets the connection: what the client still sends would fail, and it would
    // never come to read why.
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    for mode in [Mode::Simple, Mode::Structured] {
        let mut raw = served.raw_socket(mode).await;
        raw.request(request(Command::WRITE, 1, 0, 64 * MIB + 1), b"the first bytes").await.unwrap();
        // The server has said all it has to say.
        served.connections(0).await;
        for piece in 0..50 {
            raw.send(&[1; 16384]).await.unwrap_or_else(|error| panic!("piece {piece}: {error}"));
            tokio::task::yield_now().await;
        }
        assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 1));
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
    }
}

#[tokio::test]
async fn a_client_that_aborts_may_go_on_talking_for_a_while() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let mut raw = Raw(served.stream().await);
    raw.greet(3).await.unwrap();
    raw.option(OptionCode::ABORT, b"").await.unwrap();
    assert_eq!(soon("the answer", raw.option_reply()).await.unwrap().0.reply, ReplyType::ACK);
    assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
    for piece in 0..50 {
        raw.send(&[1; 16384]).await.unwrap_or_else(|error| panic!("piece {piece}: {error}"));
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_with_endless_last_words_is_heard_for_two_seconds() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let mut raw = served.raw(Mode::Simple, 4096).await;
    raw.request(request(Command::DISC, 1, 0, 0), b"").await.unwrap();
    let start = tokio::time::Instant::now();
    while raw.send(b"and another thing").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_refused_payload_is_dropped_without_memory_for_it() {
    let options = options();
    let budget = options.budget.clone();
    let hooked = Hooked::new(Mem::new(MIB), Counting::default());
    let served = Served::with(Disk::new(NAME, MIB, hooked.clone()).read_only(), options).await;
    let mut raw = served.raw_socket(Mode::Structured).await;
    let payload = vec![1; 64 << 20];
    soon("the payload", raw.request(request(Command::WRITE, 1, 0, 64 * MIB), &payload)).await.unwrap();
    assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (1, 1));
    assert_eq!((budget.usage().input_peak, hooked.hook.of(Call::Write)), (0, 0));
}

#[tokio::test]
async fn a_thousand_half_handshakes_open_nothing() {
    let disk = std::sync::Arc::new(Disk::new(NAME, MIB, Mem::new(MIB)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let exports = blockyard_nbd::Exports::single(disk.clone()).unwrap();
    let handle = blockyard_nbd::Server::start(listener, exports, options()).unwrap();
    let info = encode_option(OptionCode::INFO, &InfoRequest { name: "", wanted: WantedInfo::default() }.encode());
    let go = encode_option(OptionCode::GO, &InfoRequest { name: "", wanted: WantedInfo::default() }.encode());
    let bytes = [&[0, 0, 0, 3][..], &info, &go[..go.len() - 1]].concat();
    for round in 0..1000 {
        let (mut ours, theirs) = tokio::io::duplex(4096);
        handle.serve(theirs);
        ours.write_all(&bytes[..bytes.len() - round % bytes.len()]).await.unwrap();
        ours.shutdown().await.unwrap();
        soon("the close", ours.read_to_end(&mut Vec::new())).await.unwrap();
    }
    assert_eq!(disk.opened.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_stops_in_the_middle_of_floods_leave_no_stray() {
    let go = encode_option(OptionCode::GO, &InfoRequest { name: "", wanted: WantedInfo::default() }.encode());
    let list = encode_option(OptionCode::LIST, b"");
    let write = request(Command::WRITE, 1, 0, 512).encode_compact().unwrap();
    let talk = [&[0, 0, 0, 3][..], &list, &go, &write, &[7; 512], &write, &[8; 512]].concat();
    let mut seed = 1u64;
    for round in 0..1000 {
        let mut options = options();
        options.limits = Limits { half_open: 3, ..Limits::default() };
        let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
        let stats = served.stats.clone();
        let mut peers = Vec::new();
        for _ in 0..6 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut peer = served.pipe(1 << 14);
            peer.write_all(&talk[..(seed >> 33) as usize % (talk.len() + 1)]).await.unwrap();
            peers.push(peer);
            for _ in 0..seed >> 61 {
                tokio::task::yield_now().await;
            }
        }
        let stopped = soon("the stop", served.handle.stop(Duration::from_millis(seed >> 60))).await;
        // A WRITE whose payload stays away is under way until the drain time is over.
        assert!(matches!(stopped, Stopped::Drained | Stopped::Cut { running: 0 }), "round {round}: {stopped:?}");
        assert_eq!(stats.snapshot().connections, 0);
        for mut peer in peers {
            let _ = tokio::time::timeout(PATIENCE, peer.read_to_end(&mut Vec::new())).await.expect("a stray");
        }
    }
}
