//! One NBD listener per disk: a leased port, an export, and the server that joins them.
//!
//! A listener is made for one disk of one job and dies with it; it cannot be pointed at anything else. Which ports there
//! are is [`ports`]' business, what is served now and what was counted is told by [`live`].

pub mod live;
pub mod ports;

use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::budget::Usage;
use blockyard_nbd::stats::{ConnectionSnapshot, ExportStats, ListenerSnapshot, ListenerStats, Snapshot};
use blockyard_nbd::tls::{ServerTls, TlsError, TlsFiles};
use blockyard_nbd::{Budget, BudgetLimits, Exports, Handle, Limits, ListPolicy, Options, Server, Tls};

use crate::config::{self, TlsMode};
use crate::export::ImageExport;
use live::{LiveExport, LiveExports, ServedDisk};
use ports::{BoundPort, PortLease};

/// How long a client is heard out when its listener stops. Clients keep their sockets open until they have been answered
/// over HTTP, and that answer waits for the listener: a guess, long enough for a last refusal to leave.
const LINGER: Duration = Duration::from_millis(100);

/// What all listeners of a process share.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    options: Options,
    live: Arc<LiveExports>,
}

impl ListenerOptions {
    /// Those of `[nbd]`, with one memory budget for all, and what [`tls`] read.
    pub fn new(nbd: &config::Nbd, tls: Tls) -> Self {
        let budget = Budget::new(&BudgetLimits { bytes: nbd.memory_budget_bytes, ..BudgetLimits::default() });
        let handshake_deadline = Duration::from_secs(nbd.handshake_timeout_s);
        let limits = Limits { handshake_deadline, linger: LINGER, ..Limits::default() };
        let list = if nbd.list_exports { ListPolicy::Show } else { ListPolicy::Hide };
        let connections_per_export = usize::try_from(nbd.max_connections_per_export).unwrap_or(usize::MAX);
        Self {
            options: Options { limits, list, tls, connections_per_export, ..Options::new(budget) },
            live: Arc::default(),
        }
    }

    /// What is served, and what was counted.
    pub fn live(&self) -> &LiveExports {
        &self.live
    }

    /// Payload in memory and connections, over all listeners.
    pub fn usage(&self) -> Usage {
        self.options.budget.usage()
    }
}

/// Reads the certificates that `[nbd]` names.
///
/// # Errors
/// The first file that cannot be used, and why.
pub fn tls(nbd: &config::Nbd) -> Result<Tls, TlsError> {
    if nbd.tls == TlsMode::Off {
        return Ok(Tls::Off);
    }
    let server = ServerTls::load(&TlsFiles {
        certificate: nbd.cert_file.clone().unwrap_or_default(),
        key: nbd.key_file.clone().unwrap_or_default(),
        client_ca: nbd.client_ca_file.clone(),
        allow: nbd.allow_subjects.iter().map(|subject| subject.parse()).collect::<Result<_, _>>()?,
    })?;
    if !nbd.bind.is_loopback() && nbd.client_ca_file.is_none() {
        tracing::warn!(bind = %nbd.bind, "nbd.client_ca_file is not set: whoever reaches a listener may write to its disk");
    }
    Ok(if nbd.tls == TlsMode::Required { Tls::Required(server) } else { Tls::On(server) })
}

/// A disk that clients can reach. Dropped without [`Self::stop`], it closes at once.
#[derive(Debug)]
pub struct DiskListener {
    server: Handle,
    figures: ListenerFigures,
    _entry: live::Entry,
    // After the server: the number is free only when nothing listens on it.
    lease: PortLease,
}

/// What a listener counts; readable at any time, also after it was stopped.
#[derive(Clone, Debug)]
pub struct ListenerFigures {
    export: Arc<ExportStats>,
    listener: Arc<ListenerStats>,
}

impl ListenerFigures {
    /// The figures of its export now.
    pub fn snapshot(&self) -> Snapshot {
        self.export.snapshot()
    }

    /// What became of connections before they reached the export.
    pub fn listener(&self) -> ListenerSnapshot {
        self.listener.snapshot()
    }

    /// The connections that are open now.
    pub fn connections(&self) -> Vec<ConnectionSnapshot> {
        self.export.live()
    }
}

/// A listener that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The export cannot be served.
    #[error("the export cannot be served: {0}")]
    Export(#[from] blockyard_nbd::server::ExportsError),
    /// The socket is not usable.
    #[error("the listener is not usable: {0}")]
    Socket(#[from] std::io::Error),
}

impl DiskListener {
    /// Answers clients on a bound port from now on. `disk` is what the export is listed as.
    ///
    /// # Errors
    /// An export or socket that cannot be served; the port is given back.
    pub fn serve(
        bound: BoundPort,
        export: &ImageExport,
        disk: ServedDisk,
        options: &ListenerOptions,
    ) -> Result<Self, ListenError> {
        use blockyard_nbd::Export;
        let exports = Exports::single(Arc::new(export.clone()))?;
        let server = Server::start(bound.listener, exports, options.options.clone())?;
        // The export was given two lines above, so there are counters for its name.
        let stats = server.stats(export.name()).unwrap_or_default();
        let figures = ListenerFigures { export: stats, listener: server.listener_stats() };
        let entry = options.live.enter(LiveExport {
            name: export.name().to_owned(),
            address: server.address().clone(),
            disk,
            size_bytes: export.size(),
            read_only: export.read_only(),
            figures: figures.clone(),
        });
        Ok(Self { server, figures, _entry: entry, lease: bound.lease })
    }

    /// Where clients find the export.
    pub fn uri(&self) -> String {
        // A listener has one export.
        self.server.uris().into_iter().next().unwrap_or_default()
    }

    /// What it counts.
    pub fn figures(&self) -> ListenerFigures {
        self.figures.clone()
    }

    /// Takes no new connections, answers requests in flight for at most `drain`, closes all sockets, gives the port back.
    pub async fn stop(self, drain: Duration) {
        let port = self.lease.port();
        let stopped = self.server.stop(drain).await;
        tracing::debug!(port, ?stopped, "listener stopped");
        drop(self.lease);
    }
}
