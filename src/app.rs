//! What every request handler can reach: configuration, database, tokens, and where the service is in its life.

use std::sync::Arc;

use blockyard_nbd::Tls;
use tokio::sync::watch;

use crate::backup::Backups;
use crate::config::Config;
use crate::http::Tokens;
use crate::listeners::ListenerOptions;
use crate::node::NodeClientError;
use crate::points::Points;
use crate::repositories::Repositories;
use crate::restore::Restores;
use crate::store::Store;

/// The shared state of one running service.
pub type AppState = Arc<App>;

/// One running service, without its sockets.
#[derive(Debug)]
pub struct App {
    /// The configuration it was started with.
    pub config: Arc<Config>,
    /// Its database.
    pub store: Store,
    /// Its bearer tokens.
    pub tokens: Tokens,
    /// Its jobs.
    pub backups: Backups,
    /// What they left.
    pub points: Points,
    /// The exports of them.
    pub restores: Restores,
    /// What its NBD listeners share.
    pub listeners: ListenerOptions,
    /// The repositories that this process owns.
    pub repositories: Repositories,
    /// Names this process start; leases of another one are void.
    pub boot_id: String,
    phase: watch::Sender<Phase>,
}

/// Where the service is in its life: each phase follows the one before it, never the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Records are brought in order; only the open routes answer.
    Starting,
    /// Everything is served.
    Ready,
    /// Running jobs end, new ones are refused.
    Draining,
    /// No job runs any more; open streams end.
    Closing,
}

impl App {
    /// The state of a service that is starting; `tls` is for its NBD listeners.
    ///
    /// # Errors
    /// A node that cannot be called at all.
    pub fn new(config: Config, store: Store, tokens: Tokens, tls: Tls) -> Result<Self, NodeClientError> {
        let boot_id = crate::id::new_ulid().to_string();
        let config = Arc::new(config);
        let repositories = Repositories::new(Arc::clone(&config), store.clone(), &boot_id);
        let listeners = ListenerOptions::new(&config.nbd, tls);
        let backups =
            Backups::new(Arc::clone(&config), store.clone(), repositories.clone(), listeners.clone(), &boot_id)?;
        let points = Points::new(Arc::clone(&config), store.clone(), repositories.clone(), &boot_id);
        let restores =
            Restores::new(Arc::clone(&config), store.clone(), repositories.clone(), listeners.clone(), &boot_id);
        let phase = watch::Sender::new(Phase::Starting);
        Ok(Self { config, store, tokens, backups, points, restores, listeners, repositories, boot_id, phase })
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Tells when the phase changes.
    pub fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Moves on to `phase`; never back.
    pub(crate) fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            if later {
                *now = phase;
            }
            later
        });
    }
}
