//! Listeners: TCP and Unix sockets that somebody else has bound, the exports they offer, and how they stop.
//!
//! [`Server::start`] serves at once; the [`Handle`] it returns is the server's life. One connection is
//! `connection`'s business, from accept to close.

mod connection;
mod exports;
mod socket;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout, timeout_at};

pub use self::exports::{Exports, ExportsError};
pub use self::socket::{Address, Listener};
use crate::budget::Budget;
use crate::half_open::{HalfOpen, Handshaking};
pub use crate::handshake::ListPolicy;
use crate::limits::Limits;
use crate::session::{Phase, reached};
use crate::stats::{ExportStats, ListenerStats};
use crate::tls::Tls;

/// Longer than any server runs.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long accepting rests after a failure, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a server is started with, next to a listener and exports.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bounds of each connection.
    pub limits: Limits,
    /// The bounds shared by all servers of the process.
    pub budget: Arc<Budget>,
    /// Whether clients may list the exports.
    pub list: ListPolicy,
    /// Whether connections are encrypted.
    pub tls: Tls,
    /// Connections in the transmission phase per export, at least 1; one more is told "too many connections".
    pub connections_per_export: usize,
}

impl Options {
    /// The defaults, on this budget: exports are listed, no TLS, 16 connections each.
    pub fn new(budget: Arc<Budget>) -> Self {
        let (list, tls) = (ListPolicy::default(), Tls::default());
        Self { limits: Limits::default(), budget, list, tls, connections_per_export: 16 }
    }
}

/// What the connections of one server share.
#[derive(Debug)]
struct Shared {
    exports: Exports,
    limits: Arc<Limits>,
    budget: Arc<Budget>,
    list: ListPolicy,
    tls: Tls,
    connections_per_export: usize,
    half_open: Arc<HalfOpen>,
    stats: Arc<ListenerStats>,
    phase: watch::Sender<Phase>,
}

impl Shared {
    /// Counts a connection that begins its handshake.
    fn handshaking(&self) -> Handshaking {
        Handshaking::new(&self.half_open, &self.budget.half_open)
    }
}

/// An NBD server on one listener.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Serves the listener from now on; clients that connect after this returns are answered. Must be called within a
    /// tokio runtime. Fails only if the listener does not know its own address.
    pub fn start(listener: impl Into<Listener>, exports: Exports, options: Options) -> io::Result<Handle> {
        let listener = listener.into();
        let address = listener.address()?;
        let Options { limits, budget, list, tls, connections_per_export } = options;
        let half_open = HalfOpen::new(limits.half_open);
        let (limits, phase) = (Arc::new(limits), watch::Sender::new(Phase::Running));
        let stats = Arc::default();
        let shared =
            Arc::new(Shared { exports, limits, budget, list, tls, connections_per_export, half_open, stats, phase });
        let (streams, passed) = mpsc::unbounded_channel();
        let accepting = tokio::spawn(accept(listener, passed, shared.clone()));
        Ok(Handle { address, shared, streams, accepting })
    }
}

/// A running server. Dropping it aborts everything: the port is free and the connections are closed as soon as the runtime
/// gets to it, and device calls that have begun run to their end. [`Handle::stop`] is the polite way.
pub struct Handle {
    address: Address,
    shared: Arc<Shared>,
    streams: mpsc::UnboundedSender<Conversation>,
    accepting: JoinHandle<()>,
}

/// The life of one connection.
type Conversation = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How a server stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// All requests were finished in time.
    Drained,
    /// Some were answered ESHUTDOWN without waiting for their device calls.
    Cut {
        /// Connections with a device call that still runs, and will run to its end.
        running: usize,
    },
}

impl Handle {
    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// One URI for each export, in the order given; `nbds` and `nbds+unix` if TLS is required.
    pub fn uris(&self) -> Vec<String> {
        let required = matches!(self.shared.tls, Tls::Required(_));
        self.shared.exports.iter().map(|(name, _)| self.address.uri(name, required)).collect()
    }

    /// The counters of an export; they outlive the server.
    pub fn stats(&self, export: &str) -> Option<Arc<ExportStats>> {
        self.shared.exports.iter().find(|(name, _)| *name == export).map(|(_, entry)| entry.stats.clone())
    }

    /// What became of connections before they reached an export; outlives the server.
    pub fn listener_stats(&self) -> Arc<ListenerStats> {
        self.shared.stats.clone()
    }

    /// Serves a stream that came some other way, as if it had been accepted: a tunnel, a passed socket, a pipe in a test.
    pub fn serve<S: AsyncRead + AsyncWrite + Send + 'static>(&self, stream: S) {
        let (reader, writer) = tokio::io::split(stream);
        let shared = self.shared.clone();
        let handshaking = shared.handshaking();
        let conversation =
            async move { connection::handle(shared, handshaking, reader, writer, "stream".to_owned()).await };
        // The other end goes away with the handle.
        let _ = self.streams.send(Box::pin(conversation));
    }

    /// Stops: no new connections; new requests get ESHUTDOWN; those under way are waited for up to `drain`, then answered
    /// ESHUTDOWN; devices are flushed; all tasks have ended on return, but for device calls that did not.
    ///
    /// # Durability
    /// Each device open for writing was asked to flush, and the failure of that is logged, not returned: who needs to know
    /// asks the device.
    ///
    /// # Cancellation
    /// Dropping the future aborts what is left, as dropping the handle does.
    pub async fn stop(mut self, drain: Duration) -> Stopped {
        let now = Instant::now();
        // A time beyond the clock is as good as for ever.
        let deadline = now.checked_add(drain).unwrap_or(now + FOREVER);
        let shared = self.shared.clone();
        shared.phase.send_replace(Phase::Draining);
        // After the change of phase: whoever entered until then is among them.
        let devices = shared.exports.writable_devices();
        let drained = timeout_at(deadline, nobody_connected(&shared.exports)).await.is_ok();
        shared.phase.send_replace(Phase::Cut);
        // Each connection takes at most one linger to send and one to be heard out; more means a bug, and is cut short.
        let patience = shared.limits.linger * 2 + ACCEPT_PAUSE;
        if timeout(patience, &mut self.accepting).await.is_err() {
            tracing::warn!("connections did not end in time and are aborted");
            self.accepting.abort();
            let _ = (&mut self.accepting).await;
        }
        let running: usize = shared.exports.iter().map(|(_, entry)| *entry.stats.connections().borrow()).sum();
        for device in devices {
            // In a task of its own: a flush that takes too long is left alone, not broken off.
            let flush = tokio::spawn(async move { device.flush().await });
            match timeout_at(deadline.max(Instant::now() + shared.limits.linger), flush).await {
                Ok(Ok(Ok(()))) => {}
                other => tracing::warn!(?other, "flush at the end failed"),
            }
        }
        if drained { Stopped::Drained } else { Stopped::Cut { running } }
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn nobody_connected(exports: &Exports) {
    for (_, entry) in exports.iter() {
        // The sender lives in the entry, so waiting cannot fail.
        let _ = entry.stats.connections().wait_for(|connections| *connections == 0).await;
    }
}

/// Accepts until the server stops, then waits for the connections. Dropping it aborts them.
async fn accept(listener: Listener, mut passed: mpsc::UnboundedReceiver<Conversation>, shared: Arc<Shared>) {
    let mut phase = shared.phase.subscribe();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = reached(&mut phase, Phase::Draining) => break,
            Some(ended) = connections.join_next() => report(ended),
            Some(conversation) = passed.recv() => {
                connections.spawn(conversation);
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let (shared, handshaking) = (shared.clone(), shared.handshaking());
                    connections.spawn(async move { stream.handle(shared, handshaking, peer).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop((listener, passed));
    while let Some(ended) = connections.join_next().await {
        report(ended);
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection panicked");
    }
}
