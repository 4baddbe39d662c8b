//! Clients that stall, hurry, crowd or vanish: each is dealt with in its time, and a good client is served meanwhile.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::client::{Client, ClientError, Negotiation};
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{OptionCode, ReplyType, encode_option};
use blockyard_nbd::wire::{Command, MAX_PAYLOAD};
use blockyard_nbd::{Budget, BudgetLimits, Durability};
use common::devices::{Call, Counting, Disk, Gate, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{pattern, request, soon, verdict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

const MIB: u64 = 1 << 20;

/// Like `soon`, for a paused clock: an hour costs nothing.
async fn in_the_end<T>(what: &str, future: impl Future<Output = T>) -> T {
    let hour = tokio::time::timeout(Duration::from_secs(3600), future).await;
    hour.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Waits for the close, and tells how long it took by the paused clock.
async fn closes<S: AsyncReadExt + Unpin>(stream: &mut S) -> Duration {
    let start = Instant::now();
    let mut bytes = Vec::new();
    in_the_end("the close", stream.read_to_end(&mut bytes)).await.unwrap_or_default();
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stalls_anywhere_in_the_handshake_is_closed_after_ten_seconds() {
    let counting = Hooked::new(Mem::new(MIB), Counting::default());
    let served = Served::disk(MIB, counting.clone()).await;
    let go = encode_option(OptionCode::GO, b"\x00\x00\x00\x05disk0\x00\x00");
    let handshake = [&[0, 0, 0, 3][..], &encode_option(OptionCode(99), b"data"), &go].concat();
    for cut in 0..handshake.len() {
        let mut pipe = served.pipe(4096);
        pipe.write_all(&handshake[..cut]).await.unwrap();
        let waited = closes(&mut pipe).await;
        assert!((9.9..10.5).contains(&waited.as_secs_f64()), "cut at {cut}: {waited:?}");
    }
    assert_eq!(served.stats.snapshot().accepted, 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_feeds_the_handshake_byte_by_byte_does_not_gain_time() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let mut pipe = served.pipe(4096);
    let start = Instant::now();
    let list = encode_option(OptionCode::LIST, b"");
    let bytes = [0, 0, 0, 3].into_iter().chain(list.into_iter().cycle());
    for byte in bytes {
        if pipe.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::advance(Duration::from_millis(500)).await;
    }
    assert!(start.elapsed() < Duration::from_secs(12));
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_lives_for_days() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let client = Negotiation::over(served.pipe(4096)).await.unwrap().go(NAME).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3 * 86400)).await;
    assert_eq!(client.read(0, 1).await.unwrap(), [0]);
}

#[tokio::test(start_paused = true)]
async fn a_payload_or_header_that_stops_in_the_middle_closes_after_a_minute() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let header = request(Command::WRITE, 1, 0, 4096).encode_compact().unwrap();
    let refused = request(Command::WRITE, 1, MIB, 4096).encode_compact().unwrap();
    for sent in [&header[..1], &header[..27], &header, &[&header[..], &[1; 4095]].concat(), &refused] {
        let mut raw = served.raw(Mode::Simple, 64 << 10).await;
        raw.send(sent).await.unwrap();
        let waited = closes(&mut raw.0).await;
        assert!((59.9..60.5).contains(&waited.as_secs_f64()), "{} bytes: {waited:?}", sent.len());
    }
    assert_eq!(served.stats.snapshot().stalled, 5);
    served.connections(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_payload_that_keeps_coming_is_waited_for() {
    let mem = Mem::new(MIB);
    let served = Served::disk(MIB, mem.clone()).await;
    let mut raw = served.raw(Mode::Simple, 64 << 10).await;
    raw.request(request(Command::WRITE, 1, 0, 100), b"").await.unwrap();
    for byte in 0..100 {
        tokio::time::sleep(Duration::from_secs(50)).await;
        raw.send(&[byte]).await.unwrap();
    }
    assert_eq!(verdict(&raw.reply().await.unwrap()), (0, 1));
    assert_eq!(mem.content()[..100], (0..100).collect::<Vec<u8>>());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_collect_its_replies_is_closed_after_a_minute() {
    let served = Served::disk(4 * MIB, Mem::new(4 * MIB)).await;
    let mut raw = served.raw(Mode::Simple, 64 << 10).await;
    raw.request(request(Command::READ, 1, 0, 4 * MIB), b"").await.unwrap();
    served.connections(1).await;
    let start = Instant::now();
    let mut connections = served.stats.connections();
    in_the_end("the end", connections.wait_for(|now| *now == 0)).await.unwrap();
    assert!((59.9..63.0).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
    assert_eq!(served.stats.snapshot().stalled, 1);
}

#[tokio::test]
async fn one_connection_too_many_is_told_so_and_the_place_is_free_again_later() {
    let mut options = options();
    options.connections_per_export = 2;
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    for _ in 0..200 {
        let (first, second) = (served.client().await, served.client().await);
        let third = soon("an answer", Client::connect(&served.uri())).await;
        let Err(ClientError::Refused { reply, text, .. }) = third else { panic!("{third:?}") };
        assert_eq!((reply, text.as_str()), (ReplyType::ERR_POLICY, "too many connections (2 of 2)"));
        soon("the goodbye", first.disconnect()).await.unwrap();
        drop(second);
        served.connections(0).await;
    }
    let stats = served.stats.snapshot();
    assert_eq!((stats.accepted, stats.refused, stats.connections), (400, 200, 0));
}

#[tokio::test]
async fn a_refused_client_may_go_on_haggling_until_a_place_is_free() {
    let mut options = options();
    options.connections_per_export = 1;
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let first = served.client().await;
    let negotiation = served.negotiation().await;
    let Err((mut negotiation, _)) = negotiation.go_or_stay(NAME).await.unwrap() else { panic!("it entered") };
    negotiation.info(NAME).await.unwrap();
    first.disconnect().await.unwrap();
    served.connections(0).await;
    negotiation.go(NAME).await.unwrap();
}

#[tokio::test]
async fn the_cap_of_the_process_spans_all_its_listeners() {
    let mut options = options();
    options.budget = Budget::new(&BudgetLimits { connections: 2, refusals: 1, ..BudgetLimits::default() });
    let one = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options.clone()).await;
    let two = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let (_a, b) = (one.client().await, two.client().await);
    let mut refused = two.negotiation().await;
    let error = refused.list().await.unwrap_err();
    assert!(error.to_string().contains("too many connections (2 of 2)"), "{error}");
    // One is being told; the next one is closed without a word.
    let mut stream = one.stream().await;
    assert_eq!(soon("the close", stream.read_to_end(&mut Vec::new())).await.unwrap(), 0);
    refused.abort().await.unwrap();
    b.disconnect().await.unwrap();
    drop(b);
    // The place is free when the connection has ended on the side of the server.
    let again = async {
        while Client::connect(&one.uri()).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon("a free place", again).await;
}

#[tokio::test]
async fn the_oldest_half_open_connection_makes_room_for_the_newest() {
    let mut options = options();
    options.limits.half_open = 8;
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let client = served.client().await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        let mut raw = Raw(served.stream().await);
        raw.greet(3).await.unwrap();
        silent.push(raw);
    }
    let good = served.client().await;
    good.write(0, pattern(1, 4096), Durability::OnFlush).await.unwrap();
    assert_eq!(client.read(0, 4096).await.unwrap(), pattern(1, 4096), "it is not half open any more");
    for raw in silent.iter_mut().take(91) {
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap_or_default(), b"");
    }
    let newest = silent.last_mut().unwrap();
    newest.option(OptionCode::LIST, b"").await.unwrap();
    assert_eq!(newest.option_reply().await.unwrap().0.reply, ReplyType::SERVER);
}

#[tokio::test]
async fn half_open_connections_count_over_all_listeners_also_while_they_are_heard_out() {
    let mut options = options();
    options.budget = Budget::new(&BudgetLimits { half_open: 2, ..BudgetLimits::default() });
    options.limits.linger = Duration::from_secs(3600);
    options.limits.linger_bytes = u64::MAX;
    options.limits.handshake_deadline = Duration::from_secs(3600);
    let one = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options.clone()).await;
    let two = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let mut silent = Raw(one.stream().await);
    silent.greet(3).await.unwrap();
    let mut refused = Raw(one.stream().await);
    refused.greet(0xffff).await.unwrap();
    // It gets no answer, and is listened to.
    let _ = soon("the end of what it is told", refused.0.read(&mut [0; 1])).await;
    let (_a, _b) = (two.client().await, two.negotiation().await);
    assert_eq!(soon("the close", silent.receive_all()).await.unwrap_or_default(), b"");
    let _c = two.negotiation().await;
    let gone = async {
        while refused.send(&[0; 64]).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    soon("the end of the one that was heard out", gone).await;
}

#[tokio::test]
async fn connecting_and_leaving_a_thousand_times_costs_nothing() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let sockets = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    served.client().await.disconnect().await.unwrap();
    let before = sockets();
    for round in 0..1000 {
        match round % 3 {
            0 => drop(served.stream().await),
            1 => drop(served.negotiation().await),
            _ => {
                let mut negotiation = served.negotiation().await;
                negotiation.info("nosuch").await.unwrap_err();
            }
        }
    }
    served.client().await.disconnect().await.unwrap();
    served.connections(0).await;
    let settled = async {
        while sockets() > before + 8 {
            tokio::task::yield_now().await;
        }
    };
    soon("the sockets to be closed", settled).await;
}

#[tokio::test]
async fn a_half_handshake_opens_nothing() {
    let disk = std::sync::Arc::new(Disk::new(NAME, MIB, Mem::new(MIB)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let exports = blockyard_nbd::Exports::single(disk.clone()).unwrap();
    let _handle = blockyard_nbd::Server::start(listener, exports, options()).unwrap();
    for _ in 0..100 {
        let mut raw = Raw(tokio::net::TcpStream::connect(address).await.unwrap());
        raw.greet(3).await.unwrap();
        raw.option(OptionCode::INFO, b"\x00\x00\x00\x00\x00\x00").await.unwrap();
        raw.option_reply().await.unwrap();
        raw.send(&encode_option(OptionCode::GO, b"\x00\x00\x00\x00\x00\x00")[..20]).await.unwrap();
    }
    assert_eq!(disk.opened.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_client_that_dies_in_the_middle_of_a_write_leaves_a_whole_device_call_and_a_free_place() {
    let hooked = Hooked::new(Mem::new(8 * MIB), Gate::new(Call::Write));
    let served = Served::disk(8 * MIB, hooked.clone()).await;
    // One write is in the device, the payload of another is half sent.
    let mut raw = served.raw_socket(Mode::Simple).await;
    raw.request(request(Command::WRITE, 1, 0, 4096), &[7; 4096]).await.unwrap();
    raw.request(request(Command::WRITE, 2, MIB, 4096), &[8; 2048]).await.unwrap();
    soon("the first write", hooked.hook.arrived(1)).await;
    drop(raw);
    let client = served.client().await;
    assert_eq!(*served.stats.connections().borrow(), 2, "the device call still runs");
    hooked.hook.open(1);
    served.connections(1).await;
    assert_eq!(client.read(0, 4096).await.unwrap(), [7; 4096], "what was begun was finished");
    assert_eq!(client.read(MIB, 4096).await.unwrap(), [0; 4096], "what had not arrived was not");
    assert_eq!(hooked.hook.count(), 1);
}

#[tokio::test]
async fn a_peer_that_closes_before_the_reply_is_an_ordinary_end() {
    let hooked = Hooked::new(Mem::new(MIB), Gate::new(Call::Read));
    let served = Served::disk(MIB, hooked.clone()).await;
    for round in 1..=50 {
        let mut raw = served.raw_socket(Mode::Structured).await;
        raw.request(request(Command::READ, 1, 0, MIB), b"").await.unwrap();
        soon("the read", hooked.hook.arrived(round)).await;
        drop(raw);
        hooked.hook.open(1);
        served.connections(0).await;
    }
}

#[tokio::test]
async fn lengths_that_only_name_an_effect_need_no_memory() {
    let options = options();
    let budget = options.budget.clone();
    let served = Served::with(Disk::new(NAME, 1 << 40, Mem::new(1 << 40)), options).await;
    let client = served.client().await;
    let most = u64::from(u32::MAX);
    client.plain(Command::CACHE, blockyard_nbd::wire::CommandFlags(0), 1, most).await.unwrap();
    client.trim(0, most & !0xffff, Durability::OnFlush).await.unwrap();
    let extents = client.allocation(65536, most).await.unwrap();
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), most);
    assert!(budget.usage().input_peak == 0 && budget.usage().output_peak <= 2 * MIB);
    assert_eq!(client.max_payload(), MAX_PAYLOAD);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stops_speaking_nbd_is_closed_at_once_even_if_it_collects_nothing() {
    let served = Served::disk(4 * MIB, Mem::new(4 * MIB)).await;
    let mut raw = served.raw(Mode::Simple, 64 << 10).await;
    raw.request(request(Command::READ, 1, 0, 4 * MIB), b"").await.unwrap();
    raw.send(&[0; 28]).await.unwrap();
    let start = Instant::now();
    let mut connections = served.stats.connections();
    while served.stats.snapshot().accepted == 0 || served.stats.snapshot().connections != 0 {
        in_the_end("the end", connections.changed()).await.unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
