//! A table of malformed conversations: each gets the right answer or is closed, whole over TCP and cut at every byte over a
//! pipe; after each a good client is served, and in the end nothing is left of them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]
#![allow(unreachable_pub, reason = "the modules are those of one test")]

#[path = "../common/mod.rs"]
mod common;
mod handshakes;
mod requests;
mod script;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockyard_nbd::client::{Client, Negotiation};
use blockyard_nbd::{Budget, Durability, Options};
use common::devices::Mem;
use common::servers::{NAME, Served, options};
use common::{pattern, soon};
use script::{Conversation, Disk, End};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout};

/// Size of the exports: more than the largest payload, less than 32 bits.
const SIZE: u64 = 100 << 20;

fn corpus() -> Vec<Conversation> {
    let parts = [
        handshakes::greetings(),
        handshakes::options(),
        handshakes::informations(),
        handshakes::contexts(),
        requests::flags(),
        requests::ranges(),
        requests::payloads(),
        requests::forbidden(),
        requests::streams(),
    ];
    let mut seen = HashSet::new();
    let distinct = |one: &Conversation| seen.insert((one.disk == Disk::ReadOnly, one.sent.clone()));
    parts.concat().into_iter().filter(distinct).collect()
}

/// A writable and a read-only export, each of a server of its own, on one budget.
struct Servers {
    writable: Served,
    read_only: Served,
    budget: Arc<Budget>,
}

impl Servers {
    async fn start() -> Self {
        let options: Options = options();
        let disk = || common::devices::Disk::new(NAME, SIZE, Mem::new(SIZE));
        let budget = options.budget.clone();
        let writable = Served::with(disk(), options.clone()).await;
        Self { writable, read_only: Served::with(disk().read_only(), options).await, budget }
    }

    fn of(&self, conversation: &Conversation) -> &Served {
        match conversation.disk {
            Disk::Writable => &self.writable,
            Disk::ReadOnly => &self.read_only,
        }
    }

    /// Nobody is connected, and no payload is held.
    async fn are_quiet(&self) {
        self.writable.connections(0).await;
        self.read_only.connections(0).await;
        let usage = self.budget.usage();
        assert_eq!((usage.input, usage.output), (0, 0));
    }
}

/// A client without faults, for whom nothing has changed.
async fn is_served(client: &Client, round: u64) {
    let data = pattern(round, 600);
    soon("a write", client.write(1 << 20, data.clone(), Durability::OnFlush)).await.unwrap();
    assert_eq!(soon("a read", client.read(1 << 20, 600)).await.unwrap(), data);
    soon("the goodbye", client.disconnect()).await.unwrap();
}

/// Sends without minding that the server may have closed, and receives: all until the close, or what is due.
async fn converse<S: AsyncRead + AsyncWrite>(stream: S, sent: &[u8], conversation: &Conversation) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut heard = Vec::new();
    let receiving = async {
        let mut chunk = vec![0; 256 << 10];
        while conversation.end == End::Closed || conversation.judge(&heard).is_err() {
            match reader.read(&mut chunk).await {
                Ok(count) if count > 0 => heard.extend(&chunk[..count]),
                _ => break,
            }
        }
    };
    let sending = async {
        let _ = writer.write_all(sent).await;
    };
    let both = async { tokio::join!(sending, receiving) };
    let about = &conversation.about;
    timeout(Duration::from_secs(10), both).await.unwrap_or_else(|_| panic!("{about}: the server hangs"));
    heard
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One test at a time: they count what the process has open.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn every_malformed_conversation_is_answered_or_closed_and_leaves_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let corpus = corpus();
    assert!(corpus.len() >= 600, "only {} conversations", corpus.len());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let servers = Servers::start().await;
        // What a first round allocates for good is not counted.
        for conversation in corpus.iter().rev().take(20) {
            converse(servers.of(conversation).stream().await, &conversation.sent, conversation).await;
        }
        is_served(&servers.writable.client().await, 0).await;
        servers.are_quiet().await;
        let before = (descriptors(), resident_kib());
        for (round, conversation) in (1..).zip(&corpus) {
            let heard = converse(servers.of(conversation).stream().await, &conversation.sent, conversation).await;
            if let Err(reason) = conversation.judge(&heard) {
                panic!("{}: {reason}", conversation.about);
            }
            is_served(&servers.writable.client().await, round).await;
        }
        servers.are_quiet().await;
        let closed = async {
            while descriptors() > before.0 {
                tokio::task::yield_now().await;
            }
        };
        soon("the sockets to be closed", closed).await;
        let grown = resident_kib().saturating_sub(before.1);
        println!("{} malformed conversations over TCP, {grown} KiB grown", corpus.len());
        assert!(grown < 64 << 10, "{grown} KiB stayed");
    });
}

/// What becomes of a client that sends only a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It closes its sending side.
    Leaves,
    /// It says nothing more.
    Stalls,
}

/// Sends a part, and hears the server out. The clock is paused: what takes time shows in it.
async fn cut(served: &Served, conversation: &Conversation, at: usize, then: Then) -> (Vec<u8>, Option<Duration>) {
    let (mut reader, mut writer) = tokio::io::split(served.pipe(64 << 10));
    let start = Instant::now();
    let mut heard = Vec::new();
    let sending = async {
        let _ = writer.write_all(&conversation.sent[..at]).await;
        if then == Then::Leaves {
            let _ = writer.shutdown().await;
        }
    };
    let receiving = async {
        let _ = reader.read_to_end(&mut heard).await;
    };
    let both = async { tokio::join!(sending, receiving) };
    let ended = timeout(Duration::from_secs(3600), both).await.is_ok();
    (heard, ended.then(|| start.elapsed()))
}

/// Every place between two bytes, but for the insides of long runs of one byte, in which there is nothing new, and for
/// fronts that an earlier conversation had as well.
fn places<'a>(sent: &'a [u8], seen: &'a mut HashSet<u64>) -> impl Iterator<Item = usize> + use<'a> {
    const RUN: usize = 16;
    let mut front = DefaultHasher::new();
    let mut fresh = move |at: usize| {
        at.checked_sub(1).and_then(|last| sent.get(last)).iter().for_each(|byte| front.write_u8(**byte));
        seen.insert(front.finish())
    };
    let inside = |at: usize| {
        let around = at.checked_sub(RUN).and_then(|start| sent.get(start..at + RUN));
        around.is_some_and(|around| around.iter().all(|byte| *byte == around[0]))
    };
    (0..=sent.len()).filter(move |at| fresh(*at) && !inside(*at))
}

#[test]
fn every_malformed_conversation_may_be_cut_at_every_byte() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let (mut conversations, mut cuts) = (0, 0);
    runtime.block_on(async {
        let servers = Servers::start().await;
        let corpus = corpus();
        let mut fronts = [HashSet::new(), HashSet::new()];
        for (round, conversation) in (0..).zip(corpus.iter().filter(|one| !one.heavy)) {
            let served = servers.of(conversation);
            let about = &conversation.about;
            let (whole, ended) = cut(served, conversation, conversation.sent.len(), Then::Stalls).await;
            conversation.judge(&whole).unwrap_or_else(|reason| panic!("{about}: {reason}"));
            let at_once = ended.is_some_and(|after| after.as_secs() < 1);
            assert_eq!(at_once, conversation.end == End::Closed, "{about}: {ended:?}");
            let fronts = &mut fronts[usize::from(conversation.disk == Disk::ReadOnly)];
            for at in places(&conversation.sent, fronts) {
                for then in [Then::Leaves, Then::Stalls] {
                    let (heard, ended) = cut(served, conversation, at, then).await;
                    if let Err(reason) = conversation.judge_part(&heard, &whole) {
                        panic!("{about}, cut at {at}, {then:?}: {reason}");
                    }
                    let limit = match (then, conversation.enters) {
                        (Then::Leaves, _) => 1,
                        (Then::Stalls, Some(start)) if at >= start => 63,
                        (Then::Stalls, _) => 11,
                    };
                    match ended {
                        Some(after) => assert!(after.as_secs() < limit, "{about}, cut at {at}: {after:?}"),
                        None => assert!(then == Then::Stalls && conversation.is_idle_at(at), "{about}, cut at {at}"),
                    }
                    cuts += 1;
                }
            }
            let good = Negotiation::over(servers.writable.pipe(4096)).await.unwrap().go(NAME).await.unwrap();
            is_served(&good, round).await;
            servers.are_quiet().await;
            conversations += 1;
        }
    });
    println!("{conversations} malformed conversations cut at every byte, {cuts} cuts");
    assert!(conversations >= 600 && cuts > 100_000, "{conversations} {cuts}");
}
