//! A stand-in for the node and the backup client it launches: an HTTP server in this process that behaves, call for call
//! and byte for byte, as the real ones were read to behave.
//!
//! The demo runs against it because VMware is not to be had, and the tests because the real one cannot be told to
//! misbehave: every way in which node or client can go wrong is a value in [`Faults`]. What it did is kept in a [`Log`]
//! that tests wait on, so that none of them has to guess how long something takes.
//!
//! One `POST /api/v1/backup/start` starts one client task (`client`) over the disks the fake was given ([`Source`]).

mod callback;
mod client;
mod discover;
mod faults;
mod link;
mod log;
mod server;
mod socket;
mod source;
mod step;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

pub use faults::{CompleteFault, DiscoverFault, Faults, PausePoint, StartFault, StatusFault};
pub use log::{DiscoverCall, Event, Log, StartCall};
pub use source::Source;
pub use step::{Part, Step, StepFault};

/// One disk of the pretended VM.
#[derive(Clone, Debug)]
pub struct FakeDisk {
    /// What is on it.
    pub source: Source,
    /// Its state in change tracking, sent with `/complete`.
    pub change_id: String,
    /// What changed since earlier states, by change id: offset and length in bytes, in ascending order.
    pub changes: BTreeMap<String, Vec<(u64, u64)>>,
}

impl FakeDisk {
    /// A disk without a past.
    pub fn new(source: Source, change_id: impl Into<String>) -> Self {
        Self { source, change_id: change_id.into(), changes: BTreeMap::new() }
    }
}

/// How a fake node behaves.
#[derive(Clone, Debug)]
pub struct FakeConfig {
    /// Where the client finds the hub: `http://host:port`.
    pub hub_url: String,
    /// The disks in the snapshot, by device key. Every VM has the same ones, unless it has its own.
    pub disks: BTreeMap<u32, FakeDisk>,
    /// The disks of single VMs, by the name of the VM.
    pub vms: BTreeMap<String, BTreeMap<u32, FakeDisk>>,
    /// What a discovery finds: VMs as the node writes them. A filter leaves those whose name it is part of.
    pub inventory: Vec<serde_json::Value>,
    /// The largest request the client sends. The real one reads up to 32 MiB at a time.
    pub request_bytes: usize,
    /// Folder of the certificates by which the client reaches targets in TLS, under the names that libnbd uses.
    pub certificates: Option<PathBuf>,
    /// What goes wrong.
    pub faults: Faults,
}

impl FakeConfig {
    /// A node that does everything right.
    pub fn new(hub_url: impl Into<String>, disks: BTreeMap<u32, FakeDisk>) -> Self {
        let hub_url = hub_url.into();
        let vms = BTreeMap::new();
        let inventory = Vec::new();
        Self { hub_url, disks, vms, inventory, request_bytes: 32 << 20, certificates: None, faults: Faults::default() }
    }
}

/// A running fake node. Dropped, it ends with all its clients.
#[derive(Debug)]
pub struct FakeNode {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: JoinHandle<()>,
}

/// What the server and the clients share.
#[derive(Debug)]
struct Shared {
    config: Mutex<FakeConfig>,
    log: Log,
    http: reqwest::Client,
    clients: Mutex<JoinSet<()>>,
    /// Lets who waits go on.
    resume: Notify,
    /// Connections that clients forgot to close.
    leaked: Mutex<Vec<blockyard_nbd::client::Client>>,
}

impl FakeNode {
    /// Starts a node on a free port of loopback.
    ///
    /// # Errors
    /// No port can be bound, or no HTTP client be made.
    pub async fn start(config: FakeConfig) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let http = reqwest::Client::builder().no_proxy().build().map_err(io::Error::other)?;
        let shared = Arc::new(Shared {
            config: Mutex::new(config),
            log: Log::default(),
            http,
            clients: Mutex::default(),
            resume: Notify::new(),
            leaked: Mutex::default(),
        });
        let server = tokio::spawn(server::serve(listener, Arc::clone(&shared)));
        Ok(Self { shared, address, server })
    }

    /// Its base URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it did so far.
    pub fn log(&self) -> &Log {
        &self.shared.log
    }

    /// Changes how it behaves from the next start call on. The hub's address is usually known only after the node's.
    pub fn reconfigure(&self, change: impl FnOnce(&mut FakeConfig)) {
        change(&mut self.shared.config.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Lets a client that waits at its pause point, or a discovery that was told to wait, go on.
    pub fn resume(&self) {
        self.shared.resume.notify_one();
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.server.abort();
        lock(&self.shared.clients).abort_all();
        lock(&self.shared.leaked).clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
