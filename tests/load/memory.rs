//! What 64 clients can make the server hold: its budget and a little beside it, whatever they ask for and do not collect,
//! announce and do not send, or send faster than the disk takes it. A good client is served meanwhile.

use std::time::Duration;

use blockyard_nbd::Durability;
use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::wire::Command;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::clients::{Good, MIB, Manner, Replies, connect, entered, filled, filled_image, request};
use crate::held::{BESIDE, Before, memory, mib};
use crate::server::NbdServer;
use crate::tools::folder;

const CLIENTS: u64 = 64;
const REQUESTS: u64 = 16;
const LARGE: u64 = 32 * MIB;
/// What a server keeps of the memory that it once needed: 32 MiB of payload buffers, as much in huge pages, and what the allocator
/// does not give back.
const KEPT: u64 = (32 + 32 + 16) * MIB;
/// Rounds that the good client must be served during a load.
const ROUNDS: usize = 20;
/// How long a load lasts at least: it is all there long before.
const LOAD: Duration = Duration::from_secs(4);

/// A server with a budget, and what it held at the start.
struct Loaded {
    server: NbdServer,
    before: Before,
    good: Good,
    budget: u64,
    _folder: tempfile::TempDir,
}

impl Loaded {
    async fn start(budget: u64) -> Self {
        Self::beside(budget, Manner::Once, CLIENTS + 16).await
    }

    async fn beside(budget: u64, manner: Manner, connections: u64) -> Self {
        let folder = folder();
        let image = filled_image(&folder, 2048 * MIB, LARGE).await;
        let (budget_text, connections) = (budget.to_string(), connections.to_string());
        let server = NbdServer::start(&image, &["--connections", &connections, "--memory-budget", &budget_text]);
        let before = Before::of(server.id());
        // Beyond all that the others touch.
        let good = Good::start(&server.uri, 2000 * MIB, manner).await;
        Self { server, before, good, budget, _folder: folder }
    }

    /// Lets the load last, ends it, and judges.
    async fn end(self, name: &str, load: impl FnOnce()) {
        let name = format!("{name}, budget {}", mib(self.budget));
        tokio::time::sleep(LOAD).await;
        self.good.served(ROUNDS).await;
        println!("{name}: resident {} in the end", mib(memory(self.server.id()).now));
        println!("{name}: {}", self.good.end(ROUNDS).await);
        load();
        self.before.comes_back(KEPT, &name).await;
        let peak = memory(self.server.id()).peak;
        assert!(peak <= self.budget + BESIDE, "{name}: {} of memory", mib(peak));
        self.server.stop();
    }
}

/// Many large READs whose replies nobody collects.
async fn unread(budget: u64, replies: Replies, length: u64) {
    let loaded = Loaded::start(budget).await;
    let clients = ask(&loaded, CLIENTS, replies, length).await;
    loaded.end(&format!("{CLIENTS} x {REQUESTS} {replies:?} READs of {} unread", mib(length)), || drop(clients)).await;
}

async fn ask(loaded: &Loaded, clients: u64, replies: Replies, length: u64) -> Vec<Raw<TcpStream>> {
    let mut asking = Vec::new();
    for _ in 0..clients {
        let mut raw = entered(&loaded.server.uri, replies).await;
        for cookie in 0..REQUESTS {
            raw.request(request(Command::READ, cookie, 0, length), &[]).await.unwrap();
        }
        asking.push(raw);
    }
    asking
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn structured_reads_that_nobody_collects() {
    unread(256 * MIB, Replies::Structured, LARGE).await;
    unread(64 * MIB, Replies::Structured, LARGE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simple_reads_that_nobody_collects() {
    unread(256 * MIB, Replies::Simple, LARGE).await;
    unread(64 * MIB, Replies::Simple, 8 * MIB).await;
}

/// As many as the default cap lets in. Replies to old clients need their memory all at once, as long as there is any to be had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_simple_replies_is_served_beside_fifteen_that_collect_nothing() {
    let loaded = Loaded::beside(256 * MIB, Manner::Simply, 16).await;
    let clients = ask(&loaded, 15, Replies::Structured, LARGE).await;
    loaded.end("15 clients beside one with simple replies", || drop(clients)).await;
}

/// Large WRITEs that are announced, begun and never finished.
async fn stalled(budget: u64) {
    let loaded = Loaded::start(budget).await;
    let payload = filled(1, 8 * MIB as usize);
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let mut raw = entered(&loaded.server.uri, Replies::Structured).await;
        let begun = (number % 8) as usize * MIB as usize + 100_000;
        raw.request(request(Command::WRITE, 0, number % 40 * LARGE, LARGE), &payload[..begun]).await.unwrap();
        clients.push(raw);
    }
    loaded.end(&format!("{CLIENTS} WRITEs of {} that stall", mib(LARGE)), || drop(clients)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_stall_in_the_payload() {
    stalled(256 * MIB).await;
    stalled(64 * MIB).await;
}

/// Large WRITEs, one after the other, without a look at the replies, which are small.
async fn hurry(mut raw: Raw<TcpStream>, number: u64, payload: bytes::Bytes) {
    for cookie in 0.. {
        let header = request(Command::WRITE, cookie, (number + cookie) % 40 * LARGE, LARGE).encode_compact().unwrap();
        raw.0.write_all(&header).await.unwrap();
        raw.0.write_all(&payload).await.unwrap();
    }
}

async fn write_on(loaded: &Loaded, clients: u64) -> tokio::task::JoinSet<()> {
    let payload = bytes::Bytes::from(filled(2, LARGE as usize));
    let mut writing = tokio::task::JoinSet::new();
    for number in 0..clients {
        let raw = entered(&loaded.server.uri, Replies::Structured).await;
        writing.spawn(hurry(raw, number, payload.clone()));
    }
    writing
}

async fn fast(budget: u64) {
    let loaded = Loaded::start(budget).await;
    let mut clients = write_on(&loaded, CLIENTS).await;
    loaded.end(&format!("{CLIENTS} x WRITEs of {} at full speed", mib(LARGE)), move || clients.abort_all()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_as_fast_as_they_go() {
    fast(256 * MIB).await;
    fast(64 * MIB).await;
}

/// Both halves of the budget, and memory of another size that was used before and may be kept for the next request.
async fn everything(budget: u64) {
    let loaded = Loaded::start(budget).await;
    let client = connect(&loaded.server.uri).await;
    let mut small = tokio::task::JoinSet::new();
    for number in 0..400 {
        let client = client.clone();
        small.spawn(async move {
            client.write(number * 200_000, filled(3, 200_000), Durability::OnFlush).await.unwrap();
        });
    }
    small.join_all().await;
    let reading = ask(&loaded, CLIENTS / 2, Replies::Structured, LARGE).await;
    let mut writing = write_on(&loaded, CLIENTS / 2).await;
    let both = move || {
        drop((client, reading));
        writing.abort_all();
    };
    loaded.end("half of the clients read and half of them write", both).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_at_once() {
    everything(256 * MIB).await;
    everything(64 * MIB).await;
}
