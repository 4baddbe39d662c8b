//! Clients: a good one that must be served whatever happens beside it, and bare connections for all that is not good.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use blockyard_nbd::Durability;
use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::client::{Client, Negotiation, Transport, Uri};
use blockyard_nbd::wire::option::{OptionCode, ReplyType};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::server::NbdServer;
use crate::tools::image;

pub const MIB: u64 = 1 << 20;
/// Longest that a good client may wait for an answer: tells served from starved, which ends when the others are closed after
/// a minute.
pub const PATIENCE: Duration = Duration::from_secs(45);

/// Bytes of one number, none of them zero.
pub fn filled(number: u64, length: usize) -> Vec<u8> {
    let byte = (number % 251) as u8 + 1;
    vec![byte; length]
}

pub async fn connect(uri: &str) -> Client {
    let uri: Uri = uri.parse().unwrap();
    tokio::time::timeout(PATIENCE, Client::connect(&uri)).await.expect("connected in time").unwrap()
}

/// Connects as old clients do.
async fn connect_simply(uri: &str) -> Client {
    let uri: Uri = uri.parse().unwrap();
    let client = async { Negotiation::connect(&uri.transport).await?.go(&uri.export).await };
    tokio::time::timeout(PATIENCE, client).await.expect("connected in time").unwrap()
}

/// How a good client connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Once, with all that this client knows.
    Once,
    /// Anew for each round.
    Anew,
    /// Once, with simple replies only, and requests of the size that is usual then.
    Simply,
}

/// An image whose first `data` bytes are not zero.
pub async fn filled_image(folder: &tempfile::TempDir, size: u64, data: u64) -> PathBuf {
    let path = image(folder, "disk.qcow2", size);
    let server = NbdServer::start(&path, &[]);
    let client = connect(&server.uri).await;
    for offset in (0..data).step_by(MIB as usize) {
        client.write(offset, filled(offset, MIB as usize), Durability::OnFlush).await.unwrap();
    }
    client.flush().await.unwrap();
    client.disconnect().await.unwrap();
    server.stop();
    path
}

/// A client that writes, flushes and reads back, again and again, and fails the test if it has to wait too long.
pub struct Good {
    state: Arc<State>,
    task: JoinHandle<Duration>,
}

#[derive(Default)]
struct State {
    over: AtomicBool,
    rounds: AtomicUsize,
}

impl Good {
    /// Works in `offset..offset + 16 MiB`.
    pub async fn start(uri: &str, offset: u64, manner: Manner) -> Self {
        let state = Arc::<State>::default();
        let client = match manner {
            Manner::Once | Manner::Anew => connect(uri).await,
            Manner::Simply => connect_simply(uri).await,
        };
        let task = tokio::spawn(work(client, uri.to_owned(), offset, manner, state.clone()));
        Self { state, task }
    }

    /// How often it was served so far.
    pub fn rounds(&self) -> usize {
        self.state.rounds.load(Relaxed)
    }

    /// Whether it has not failed.
    pub fn lives(&self) -> bool {
        !self.task.is_finished()
    }

    /// Waits until it has been served so often, or has failed.
    pub async fn served(&self, rounds: usize) {
        while self.lives() && self.rounds() < rounds {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends it; it must have been served at least `rounds` times. Tells how often it was, and its longest wait.
    pub async fn end(self, rounds: usize) -> String {
        self.state.over.store(true, Relaxed);
        let longest = self.task.await.unwrap();
        let done = self.state.rounds.load(Relaxed);
        assert!(done >= rounds, "served only {done} times");
        format!("good client: {done} rounds, longest answer {longest:.1?}")
    }
}

async fn work(mut client: Client, uri: String, offset: u64, manner: Manner, state: Arc<State>) -> Duration {
    let mut longest = Duration::ZERO;
    for round in 0.. {
        if state.over.load(Relaxed) {
            break;
        }
        if manner == Manner::Anew && round > 0 {
            client = connect(&uri).await;
        }
        let length = match manner {
            Manner::Simply => [4096, 65536, 128 << 10][round % 3],
            Manner::Once | Manner::Anew => [4096, 65536, 300_000, 1 << 20, 3 << 20][round % 5],
        };
        let at = offset + (round as u64 * 777_777) % (12 * MIB);
        let data = filled(round as u64, length);
        for step in 0..3 {
            let start = Instant::now();
            let answer = async {
                match step {
                    0 => client.write(at, data.clone(), Durability::OnFlush).await.unwrap(),
                    1 => client.flush().await.unwrap(),
                    _ => assert!(client.read(at, length as u32).await.unwrap() == data, "read back differently"),
                }
            };
            let what = ["write", "flush", "read"][step];
            let served = tokio::time::timeout(PATIENCE, answer).await;
            assert!(served.is_ok(), "round {round}: a {what} of {length} bytes got no answer");
            longest = longest.max(start.elapsed());
        }
        if manner == Manner::Anew {
            client.disconnect().await.unwrap();
        }
        state.rounds.fetch_add(1, Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    longest
}

/// Which replies a bare connection asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    Simple,
    Structured,
}

pub async fn bare(uri: &str) -> Raw<TcpStream> {
    let Transport::Tcp { host, port } = uri.parse::<Uri>().unwrap().transport else { panic!("{uri} is no TCP") };
    Raw(TcpStream::connect((host, port)).await.unwrap())
}

/// A bare connection in the transmission phase.
pub async fn entered(uri: &str, replies: Replies) -> Raw<TcpStream> {
    let mut raw = bare(uri).await;
    raw.greet(3).await.unwrap();
    if replies == Replies::Structured {
        raw.option(OptionCode::STRUCTURED_REPLY, &[]).await.unwrap();
        assert_eq!(raw.option_reply().await.unwrap().0.reply, ReplyType::ACK);
    }
    raw.option(OptionCode::GO, &[0, 0, 0, 0, 0, 0]).await.unwrap();
    while raw.option_reply().await.unwrap().0.reply != ReplyType::ACK {}
    raw
}

pub fn request(command: Command, cookie: u64, offset: u64, length: u64) -> Request {
    Request { flags: CommandFlags(0), command, cookie, offset, length }
}
