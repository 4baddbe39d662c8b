//! Stopping: what is under way is finished or answered, what comes late is refused, and nothing is left behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::client::{Client, ClientError};
use blockyard_nbd::server::Address;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::Command;
use blockyard_nbd::wire::option::ReplyType;
use blockyard_nbd::{Durability, ListPolicy, Stopped};
use common::devices::{Call, Counting, Disk, Gate, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{PATIENCE, pattern, request, soon, verdict};

const MIB: u64 = 1 << 20;

fn address(served: &Served) -> std::net::SocketAddr {
    match served.handle.address() {
        Address::Tcp(address) => *address,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_idle_server_stops_at_once_and_frees_its_port() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let (client, address) = (served.client().await, address(&served));
    let stats = served.stats.clone();
    assert_eq!(soon("the stop", served.handle.stop(PATIENCE)).await, Stopped::Drained);
    let error = soon("the close", client.read(0, 512)).await.unwrap_err();
    assert!(matches!(error, ClientError::Connection(_)), "{error}");
    assert_eq!(stats.snapshot().connections, 0);
    tokio::net::TcpListener::bind(address).await.unwrap();
}

#[tokio::test]
async fn requests_under_way_are_finished_and_new_ones_are_refused() {
    for mode in [Mode::Simple, Mode::Structured] {
        let hooked = Hooked::new(Mem::filled(MIB, 5), Gate::new(Call::Read));
        let served = Served::disk(MIB, hooked.clone()).await;
        let mut raw = served.raw(mode, 64 << 10).await;
        raw.request(request(Command::READ, 1, 0, 512), b"").await.unwrap();
        soon("the read", hooked.hook.arrived(1)).await;
        let stopping = tokio::spawn(served.handle.stop(Duration::from_secs(3600)));
        // Until it has begun to stop, a flush succeeds.
        let mut cookie = 100;
        loop {
            raw.request(request(Command::FLUSH, cookie, 0, 0), b"").await.unwrap();
            match verdict(&soon("a reply", raw.reply()).await.unwrap()) {
                (0, _) => cookie += 1,
                other => break assert_eq!(other, (108, cookie)),
            }
        }
        raw.request(request(Command::WRITE, 7, 0, 4096), &[1; 4096]).await.unwrap();
        assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (108, 7));
        hooked.hook.open(1);
        let reply = soon("the read", raw.reply()).await.unwrap();
        assert_eq!(verdict(&reply), (0, 1));
        let data = if mode == Mode::Simple { raw.receive(512).await.unwrap() } else { reply.1[8..].to_vec() };
        assert_eq!(data, pattern(5, 512));
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
        drop(raw);
        assert_eq!(soon("the stop", stopping).await.unwrap(), Stopped::Drained);
    }
}

#[tokio::test]
async fn a_write_whose_payload_is_coming_in_is_finished() {
    let mem = Mem::new(8 * MIB);
    let served = Served::disk(8 * MIB, mem.clone()).await;
    let stats = served.stats.clone();
    let mut raw = served.raw(Mode::Simple, 64 << 10).await;
    let data = pattern(3, 4 << 20);
    raw.request(request(Command::WRITE, 1, 0, 4 * MIB), &data[..MIB as usize * 3]).await.unwrap();
    let stopping = tokio::spawn(served.handle.stop(Duration::from_secs(3600)));
    tokio::task::yield_now().await;
    raw.send(&data[MIB as usize * 3..]).await.unwrap();
    assert_eq!(verdict(&soon("the reply", raw.reply()).await.unwrap()), (0, 1));
    drop(raw);
    assert_eq!(soon("the stop", stopping).await.unwrap(), Stopped::Drained);
    assert_eq!(mem.content()[..4 << 20], data);
    assert_eq!(stats.snapshot().bytes_written, 4 * MIB);
}

#[tokio::test(start_paused = true)]
async fn requests_that_take_longer_than_the_drain_time_are_answered_eshutdown() {
    for mode in [Mode::Simple, Mode::Structured] {
        let hooked = Hooked::new(Mem::filled(MIB, 5), Gate::new(Call::Write));
        let served = Served::disk(MIB, hooked.clone()).await;
        let stats = served.stats.clone();
        let mut raw = served.raw(mode, 64 << 10).await;
        for cookie in 0..3 {
            raw.request(request(Command::WRITE, cookie, cookie * 512, 512), &[9; 512]).await.unwrap();
        }
        // The payload of a fourth has not come; it is answered as well.
        raw.request(request(Command::WRITE, 3, 4096, 512), b"").await.unwrap();
        hooked.hook.arrived(3).await;
        let stopping = tokio::spawn(served.handle.stop(Duration::from_secs(30)));
        let mut answered = Vec::new();
        for _ in 0..4 {
            let (errno, cookie) = verdict(&raw.reply().await.unwrap());
            assert_eq!(errno, 108);
            answered.push(cookie);
        }
        answered.sort_unstable();
        assert_eq!(answered, [0, 1, 2, 3]);
        assert_eq!(raw.receive_all().await.unwrap(), b"");
        assert_eq!(stopping.await.unwrap(), Stopped::Cut { running: 1 });
        // The device calls were not broken off, and now they end.
        hooked.hook.open(3);
        stats.connections().wait_for(|now| *now == 0).await.unwrap();
        let mut bytes = [0; 3 * 512];
        hooked
            .disk
            .read(0, Box::new(vec![0; 1536]))
            .await
            .map(|read| bytes.copy_from_slice((*read.buffer).as_ref()))
            .unwrap();
        assert_eq!(bytes, [9; 3 * 512]);
    }
}

#[tokio::test(start_paused = true)]
async fn strays_in_the_handshake_hear_of_it_and_do_not_hold_it_up() {
    let hooked = Hooked::new(Mem::new(MIB), Gate::new(Call::Read));
    let served = Served::disk(MIB, hooked.clone()).await;
    let mut raw = served.raw(Mode::Simple, 4096).await;
    raw.request(request(Command::READ, 1, 0, 512), b"").await.unwrap();
    hooked.hook.arrived(1).await;
    let mut stray = blockyard_nbd::client::Negotiation::over(served.pipe(4096)).await.unwrap();
    let silent = served.pipe(4096);
    let stopping = tokio::spawn(served.handle.stop(Duration::from_secs(5)));
    loop {
        match stray.list().await {
            Ok(_) => {}
            Err(ClientError::Refused { reply, .. }) => break assert_eq!(reply, ReplyType::ERR_SHUTDOWN),
            Err(error) => panic!("{error}"),
        }
    }
    hooked.hook.open(1);
    assert_eq!(verdict(&raw.reply().await.unwrap()), (0, 1));
    drop(raw);
    let start = tokio::time::Instant::now();
    assert_eq!(stopping.await.unwrap(), Stopped::Drained);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    drop((stray, silent));
}

#[tokio::test]
async fn stopping_flushes_what_clients_had_open_for_writing() {
    for read_only in [false, true] {
        let hooked = Hooked::new(Mem::new(MIB), Counting::default());
        let mut disk = Disk::new(NAME, MIB, hooked.clone());
        disk.read_only = read_only;
        let served = Served::with(disk, options()).await;
        let (first, second) = (served.client().await, served.client().await);
        if !read_only {
            first.write(0, vec![1; 512], Durability::OnFlush).await.unwrap();
        }
        drop((first, second));
        soon("the stop", served.handle.stop(PATIENCE)).await;
        assert_eq!(hooked.hook.of(Call::Flush), usize::from(!read_only), "once for one device");
    }
}

#[tokio::test]
async fn dropping_the_handle_closes_everything() {
    let hooked = Hooked::new(Mem::new(MIB), Gate::new(Call::Write));
    let served = Served::disk(MIB, hooked.clone()).await;
    let (client, address) = (served.client().await, address(&served));
    let writing = tokio::spawn({
        let client = client.clone();
        async move { client.write(0, vec![1; 512], Durability::OnFlush).await }
    });
    soon("the write", hooked.hook.arrived(1)).await;
    drop(served.handle);
    assert!(soon("the close", writing).await.unwrap().is_err());
    let rebound = async {
        while tokio::net::TcpListener::bind(address).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon("the port", rebound).await;
    hooked.hook.open(1);
    let finished = async {
        while hooked.disk.read(0, Box::new(vec![0; 1])).await.is_ok_and(|read| (*read.buffer).as_ref() != [1]) {
            tokio::task::yield_now().await;
        }
    };
    soon("the write to be done", finished).await;
}

#[tokio::test]
async fn stopping_at_any_moment_of_a_flood_leaves_nothing_behind() {
    for round in 0..60u64 {
        let served = Served::disk(4 * MIB, Mem::new(4 * MIB)).await;
        let (uri, stats, address) = (served.uri(), served.stats.clone(), address(&served));
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let uri = uri.clone();
                tokio::spawn(async move {
                    let Ok(client) = Client::connect(&uri).await else { return };
                    for at in 0.. {
                        let (offset, data) = (at % 64 * 65536, vec![at as u8; 65536]);
                        if client.write(offset, data, Durability::OnFlush).await.is_err() {
                            return;
                        }
                        if client.read(offset, 65536).await.is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        let mut connections = stats.connections();
        let some = connections.wait_for(|now| *now as u64 >= round % 9);
        soon("some connections", some).await.unwrap();
        let stopped = soon("the stop", served.handle.stop(PATIENCE)).await;
        assert_eq!(stopped, Stopped::Drained);
        for client in clients {
            soon("a client", client).await.unwrap();
        }
        assert_eq!(stats.snapshot().connections, 0);
        tokio::net::TcpListener::bind(address).await.unwrap();
    }
}

#[tokio::test]
async fn counters_and_the_number_of_connections_tell_what_happened() {
    let served = Served::disk(4 * MIB, Mem::new(4 * MIB)).await;
    let mut connections = served.stats.connections();
    assert_eq!(*connections.borrow_and_update(), 0);
    let client = served.client().await;
    soon("the first connection", connections.wait_for(|now| *now == 1)).await.unwrap();
    client.write(0, vec![1; 100_000], Durability::OnFlush).await.unwrap();
    client.read(0, 3 << 20).await.unwrap();
    client.zero(0, 65536, Default::default(), Durability::OnFlush).await.unwrap();
    client.trim(65536, 65536, Durability::OnFlush).await.unwrap();
    client.read(4 * MIB, 1).await.unwrap_err();
    client.disconnect().await.unwrap();
    soon("the last disconnect", connections.wait_for(|now| *now == 0)).await.unwrap();
    let stats = served.stats.snapshot();
    assert_eq!((stats.accepted, stats.requests, stats.errors), (1, 5, 1));
    assert_eq!((stats.bytes_written, stats.bytes_read, stats.bytes_zeroed), (100_000, 3 * MIB, 131_072));
}

#[tokio::test]
async fn a_server_that_hides_its_exports_serves_those_who_know_the_name() {
    let mut options = options();
    options.list = ListPolicy::Hide;
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let mut negotiation = served.negotiation().await;
    let error = negotiation.list().await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { reply: ReplyType::ERR_POLICY, .. }));
    negotiation.go(NAME).await.unwrap();
}

#[tokio::test]
async fn unix_sockets_are_served_like_tcp() {
    let folder = std::env::temp_dir().join(format!("blockyard-nbd-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("a socket & more");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let export = Arc::new(Disk::new("disk 0", MIB, Mem::new(MIB)));
    let exports = blockyard_nbd::Exports::single(export).unwrap();
    let handle = blockyard_nbd::Server::start(listener, exports, options()).unwrap();
    let uri = &handle.uris()[0];
    assert!(uri.starts_with("nbd+unix:///disk%200?socket=/") && uri.ends_with("/a%20socket%20%26%20more"), "{uri}");
    let client = soon("a connection", Client::connect(&uri.parse().unwrap())).await.unwrap();
    client.write(1, pattern(1, 100_000), Durability::BeforeReply).await.unwrap();
    assert_eq!(client.read(1, 100_000).await.unwrap(), pattern(1, 100_000));
    soon("the stop", handle.stop(PATIENCE)).await;
    std::fs::remove_dir_all(&folder).unwrap();
}
