//! What the server counts: equal to what clients did, by kind, while it happens and after they are gone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blockyard_nbd::client::{Client, Negotiation};
use blockyard_nbd::stats::{Counts, Latency, Operation};
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{OptionCode, encode_option};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use blockyard_nbd::{Budget, BudgetLimits, Durability, ErrorKind};
use common::devices::{Call, Disk, Faulty, Gate, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{request, soon, verdict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: u64 = 1 << 20;

/// Waits until a condition on what is counted holds; the end of a request is counted when its reply has left, which its
/// client may see first.
async fn counted<T>(what: &'static str, mut look: impl FnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(value) = look() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(what, wait).await
}

/// The counts when no request is under way.
async fn quiet(served: &Served) -> Counts {
    counted("the last request to end", || {
        let counts = served.stats.snapshot().counts;
        (counts.in_flight() == 0).then_some(counts)
    })
    .await
}

/// A client that keeps its own count.
struct Tally {
    client: Client,
    counts: Counts,
    requests: [u64; Operation::ALL.len()],
}

impl Tally {
    fn new(client: Client) -> Self {
        Self { client, counts: Counts::default(), requests: [0; Operation::ALL.len()] }
    }

    fn note(&mut self, operation: Operation) {
        self.counts.requests += 1;
        self.requests[operation as usize] += 1;
    }

    async fn write(&mut self, offset: u64, length: usize) {
        self.client.write(offset, vec![7; length], Durability::OnFlush).await.unwrap();
        self.counts.bytes_written += length as u64;
        self.note(Operation::Write);
    }

    async fn read(&mut self, offset: u64, length: u32) {
        self.client.read(offset, length).await.unwrap();
        self.counts.bytes_read += u64::from(length);
        self.note(Operation::Read);
    }

    async fn status(&mut self, offset: u64, length: u64) {
        let contexts = self.client.block_status(offset, length).await.unwrap();
        self.counts.extents += contexts.iter().map(|context| context.extents.len() as u64).sum::<u64>();
        self.note(Operation::BlockStatus);
    }

    /// A request without payload or content that succeeds.
    async fn plain(&mut self, command: Command, offset: u64, length: u64) {
        self.client.plain(command, CommandFlags(0), offset, length).await.unwrap();
        match command {
            Command::WRITE_ZEROES => self.counts.bytes_zeroed += length,
            Command::TRIM => self.counts.bytes_trimmed += length,
            _ => {}
        }
        self.note(command.into());
    }

    /// One that fails.
    async fn fails(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u64, kind: ErrorKind) {
        let error = self.client.plain(command, flags, offset, length).await.unwrap_err();
        assert!(error.to_string().contains(&kind.errno().to_string()), "{kind:?}: {error}");
        self.counts.errors[kind as usize] += 1;
        self.note(command.into());
    }
}

#[tokio::test]
async fn counts_are_those_of_the_clients_for_each_connection_and_all_together() {
    let hooked = Hooked::new(Mem::new(8 * MIB), Faulty { call: Call::Flush, byte: 0, error: ErrorKind::Io });
    let served = Served::disk(8 * MIB, hooked).await;
    let mut tallies = Vec::new();
    for number in 1..=3 {
        let mut tally = Tally::new(served.client().await);
        for round in 0..number {
            tally.write(round * MIB + 1, 100_000 * number as usize).await;
            tally.read(round * MIB, 3 << 20).await;
            tally.plain(Command::WRITE_ZEROES, round * MIB, 65536 * number).await;
            tally.plain(Command::TRIM, 7 * MIB, 4096).await;
            tally.plain(Command::CACHE, 0, 1 << 20).await;
            tally.status(0, 8 << 20).await;
            tally.fails(Command::FLUSH, CommandFlags(0), 0, 0, ErrorKind::Io).await;
            tally.fails(Command::WRITE_ZEROES, CommandFlags(0), 8 * MIB, 1, ErrorKind::NoSpace).await;
            tally.fails(Command::WRITE_ZEROES, CommandFlags::FAST_ZERO, 1, 1, ErrorKind::NotSupported).await;
            tally.fails(Command(77), CommandFlags(0), 0, 1, ErrorKind::Invalid).await;
        }
        tallies.push(tally);
    }
    quiet(&served).await;
    let live = served.stats.live();
    assert_eq!(live.len(), 3);
    let mut all = Counts::default();
    for (tally, connection) in tallies.iter().zip(&live) {
        let mut counts = connection.counts.clone();
        all.add(&counts);
        for operation in Operation::ALL {
            let latency = counts.latency_of(operation);
            assert_eq!(latency.count(), tally.requests[operation as usize], "{operation:?}");
            assert_eq!(latency.sum_ns > 0, latency.count() > 0, "{operation:?}");
        }
        counts.latency = Counts::default().latency;
        assert_eq!(counts, tally.counts, "connection {}", connection.id);
    }
    assert_eq!(served.stats.snapshot().counts, all);
    // Whoever is gone still counts.
    for tally in tallies {
        tally.client.disconnect().await.unwrap();
    }
    served.connections(0).await;
    assert_eq!(served.stats.snapshot().counts, all);
    assert_eq!(served.stats.live(), []);
}

#[tokio::test]
async fn writes_that_lack_the_flag_of_extended_headers_are_served_and_counted() {
    let mem = Mem::new(MIB);
    let served = Served::disk(MIB, mem.clone()).await;
    let mut raw = served.raw(Mode::Extended, 64 << 10).await;
    let lacking = request(Command::WRITE, 1, 0, 512);
    let flagged = Request { flags: CommandFlags::PAYLOAD_LEN, ..lacking };
    for (header, count) in [(lacking, 1), (flagged, 1), (lacking, 2)] {
        raw.extended_request(header, &[7; 512]).await.unwrap();
        assert_eq!(verdict(&soon("a reply", raw.reply()).await.unwrap()), (0, 1));
        assert_eq!(quiet(&served).await.writes_without_payload_flag, count);
    }
    raw.extended_request(request(Command::READ, 2, 0, 512), b"").await.unwrap();
    soon("a reply", raw.reply()).await.unwrap();
    assert_eq!(quiet(&served).await.writes_without_payload_flag, 2);
    assert_eq!(mem.content()[..512], [7; 512]);
}

#[tokio::test(start_paused = true)]
async fn errors_that_policy_and_the_end_of_the_server_cause_are_counted_by_kind() {
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)).read_only(), options()).await;
    let client = Negotiation::over(served.pipe(4096)).await.unwrap().go(NAME).await.unwrap();
    let mut tally = Tally::new(client);
    tally.fails(Command::WRITE_ZEROES, CommandFlags(0), 0, 1, ErrorKind::NotPermitted).await;
    tally.fails(Command::TRIM, CommandFlags(0), 0, 1, ErrorKind::NotPermitted).await;
    assert_eq!(quiet(&served).await.errors_of(ErrorKind::NotPermitted), 2);

    // One request that the server does not wait for, and one that comes too late. What becomes of the first in the end,
    // here a failure, is no answer to anybody.
    let faulty = Hooked::new(Mem::new(MIB), Faulty { call: Call::Read, byte: 0, error: ErrorKind::Io });
    let hooked = Hooked::new(faulty, Gate::new(Call::Read));
    let served = Served::disk(MIB, hooked.clone()).await;
    let mut raw = served.raw(Mode::Simple, 64 << 10).await;
    raw.request(request(Command::READ, 1, 0, 512), b"").await.unwrap();
    soon("the read", hooked.hook.arrived(1)).await;
    let Served { handle, stats } = served;
    let stopping = tokio::spawn(handle.stop(Duration::from_millis(200)));
    let shutdown = ErrorKind::Shutdown.errno();
    // The clock stands still while there is something to do, so this is over before the server's patience is.
    let late = async {
        // Whether the stop has been heard of shows in the answers only.
        for cookie in 2.. {
            raw.request(request(Command::CACHE, cookie, 0, 1), b"").await.unwrap();
            let (errno, answered) = verdict(&raw.reply().await.unwrap());
            assert_eq!(answered, cookie);
            if errno == shutdown {
                return;
            }
        }
    };
    soon("a refusal", late).await;
    assert_eq!(verdict(&soon("the cut", raw.reply()).await.unwrap()), (shutdown, 1));
    soon("the stop", stopping).await.unwrap();
    hooked.hook.open(1);
    soon("the end", stats.connections().wait_for(|now| *now == 0)).await.unwrap();
    let counts = stats.snapshot().counts;
    assert_eq!((counts.errors_of(ErrorKind::Shutdown), counts.all_errors()), (2, 2));
    assert_eq!(counts.in_flight(), 0);
}

#[tokio::test]
async fn a_request_is_in_flight_until_it_is_answered_and_its_duration_is_told_afterwards() {
    let hooked = Hooked::new(Mem::new(MIB), Gate::new(Call::Read));
    let served = Served::disk(MIB, hooked.clone()).await;
    let client = served.client().await;
    let reads: Vec<_> = (0..3u64)
        .map(|at| {
            let client = client.clone();
            tokio::spawn(async move { client.read(at * 512, 512).await })
        })
        .collect();
    soon("three reads", hooked.hook.arrived(3)).await;
    let counts = served.stats.snapshot().counts;
    assert_eq!((counts.requests, counts.in_flight(), counts.latency_of(Operation::Read).count()), (3, 3, 0));
    assert_eq!(served.stats.live()[0].counts.in_flight(), 3);
    // Longer than the first bucket, whatever else holds the machine up.
    tokio::time::sleep(Duration::from_millis(5)).await;
    hooked.hook.open(1);
    counted("one read to end", || (served.stats.snapshot().counts.in_flight() == 2).then_some(())).await;
    hooked.hook.open(2);
    for read in reads {
        soon("a read", read).await.unwrap().unwrap();
    }
    let counts = quiet(&served).await;
    let latency = counts.latency_of(Operation::Read);
    assert_eq!((latency.count(), counts.bytes_read), (3, 3 * 512));
    let below_5_ms = Latency::bounds().iter().filter(|bound| **bound < Duration::from_millis(5)).count();
    assert_eq!(latency.buckets[..below_5_ms], vec![0; below_5_ms]);
    assert!(latency.sum_ns >= 3 * 5_000_000, "{latency:?}");
}

#[tokio::test]
async fn connections_are_listed_while_they_live_and_both_ends_are_told() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let (mut accepted, mut connections) = (served.stats.accepted(), served.stats.connections());
    assert_eq!((*accepted.borrow_and_update(), *connections.borrow_and_update()), (0, 0));
    assert_eq!(served.stats.live(), []);
    let before = SystemTime::now();
    let simple = served.raw_socket(Mode::Simple).await;
    soon("the first connection", accepted.wait_for(|count| *count == 1)).await.unwrap();
    let extended = served.raw_socket(Mode::Extended).await;
    soon("the second connection", accepted.wait_for(|count| *count == 2)).await.unwrap();
    let live = served.stats.live();
    let modes: Vec<_> = live.iter().map(|connection| (connection.id, connection.client.mode)).collect();
    assert_eq!(modes, [(1, Mode::Simple), (2, Mode::Extended)]);
    for (connection, raw) in live.iter().zip([&simple, &extended]) {
        assert_eq!(connection.client.peer, raw.0.local_addr().unwrap().to_string());
        assert!((before..=SystemTime::now()).contains(&connection.since));
    }
    drop(simple);
    served.connections(1).await;
    assert_eq!(served.stats.live().iter().map(|connection| connection.id).collect::<Vec<_>>(), [2]);
    drop(extended);
    soon("the last disconnect", connections.wait_for(|now| *now == 0)).await.unwrap();
    assert_eq!(served.stats.live(), []);
    // A connection that came and went unseen is still told.
    drop(served.raw_socket(Mode::Simple).await);
    served.connections(0).await;
    assert!(accepted.has_changed().unwrap() && *accepted.borrow_and_update() == 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_counted_ever_goes_back_while_connections_come_and_go() {
    let served = Arc::new(Served::disk(MIB, Mem::new(MIB)).await);
    let clients = tokio::spawn({
        let served = served.clone();
        async move {
            for _ in 0..100 {
                let client = served.client().await;
                client.write(0, vec![1; 512], Durability::OnFlush).await.unwrap();
                client.disconnect().await.unwrap();
            }
        }
    });
    let (mut last, mut looks) = (served.stats.snapshot(), 0);
    while !clients.is_finished() {
        let now = served.stats.snapshot();
        for (old, new) in [
            (last.accepted, now.accepted),
            (last.counts.requests, now.counts.requests),
            (last.counts.bytes_written, now.counts.bytes_written),
            (last.counts.latency_of(Operation::Write).count(), now.counts.latency_of(Operation::Write).count()),
        ] {
            assert!(old <= new, "{last:?} and then {now:?}");
        }
        (last, looks) = (now, looks + 1);
        tokio::task::yield_now().await;
    }
    soon("the clients", clients).await.unwrap();
    served.connections(0).await;
    let counts = served.stats.snapshot().counts;
    assert!(looks > 100, "{looks}");
    assert_eq!((counts.requests, counts.bytes_written), (100, 100 * 512));
}

#[tokio::test(start_paused = true)]
async fn a_listener_counts_what_became_of_handshakes() {
    let mut options = options();
    options.limits.half_open = 2;
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let listener = served.handle.listener_stats();
    // Two are silent; a third one pushes out the first of them.
    let (mut first, mut second) = (served.pipe(64), served.pipe(64));
    first.read_exact(&mut [0; 18]).await.unwrap();
    second.read_exact(&mut [0; 18]).await.unwrap();
    let mut third = served.pipe(64);
    assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
    third.read_exact(&mut [0; 18]).await.unwrap();
    counted("the eviction", || (listener.snapshot().evicted == 1).then_some(())).await;
    // The others run into their deadline.
    assert_eq!(second.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(third.read(&mut [0]).await.unwrap(), 0);
    counted("the deadlines", || (listener.snapshot().timed_out == 2).then_some(())).await;
    // One breaks the rules, one changes its mind.
    let mut wrong = served.pipe(64);
    wrong.write_all(&[0xff; 4]).await.unwrap();
    wrong.read_to_end(&mut Vec::new()).await.unwrap();
    let mut aborting = served.pipe(64);
    aborting.write_all(&[&[0, 0, 0, 3][..], &encode_option(OptionCode::ABORT, b"")].concat()).await.unwrap();
    aborting.read_to_end(&mut Vec::new()).await.unwrap();
    let figures = listener.snapshot();
    assert_eq!((figures.accepted, figures.refused, figures.dropped), (5, 0, 0));
    assert_eq!((figures.evicted, figures.timed_out, figures.rejected), (1, 2, 1));
}

#[tokio::test(start_paused = true)]
async fn a_listener_counts_whom_the_process_has_no_room_for() {
    let mut options = options();
    options.budget = Budget::new(&BudgetLimits { connections: 3, refusals: 1, ..BudgetLimits::default() });
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)), options).await;
    let listener = served.handle.listener_stats();
    let mut full = Vec::new();
    for _ in 0..3 {
        full.push(served.raw(Mode::Simple, 64 << 10).await);
    }
    // One is told, while the next is not even heard.
    let mut told = served.pipe(64);
    told.read_exact(&mut [0; 18]).await.unwrap();
    let mut unheard = served.pipe(64);
    assert_eq!(unheard.read(&mut [0]).await.unwrap(), 0);
    let figures = listener.snapshot();
    assert_eq!((figures.accepted, figures.refused, figures.dropped), (5, 1, 1));
    // Its time runs out as that of a silent one does, but it was no handshake that anybody waited for.
    assert_eq!(told.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(listener.snapshot(), figures);
}
