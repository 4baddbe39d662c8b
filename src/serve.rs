//! One running service: from a configuration to open sockets, and back.
//!
//! The binary, the demo and the tests all start it here, so what is tested is what runs. Order of the start: state folder,
//! lock, tokens, database, sockets; only then anything answers. Order of the stop: no new jobs, running ones end, sockets
//! close, database closes, the lock goes last.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use blockyard_nbd::tls::TlsError;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::app::{App, AppState, Phase};
use crate::backup::RecoverError;
use crate::config::{AuthMode, Config};
use crate::events::expire;
use crate::node::NodeClientError;
use crate::store::{SchemaError, Store, StoreError};
use crate::webhooks::{Patience, Webhook, WebhookError};
use crate::{http, listeners};

/// How long open requests may take to end once jobs have ended. A guess: handlers answer in milliseconds, and the longest
/// poll is cut without harm.
const HTTP_DRAIN: Duration = Duration::from_secs(5);

/// The service could not start. Nothing is left behind but the folder and files of its state.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state folder cannot be made or used.
    #[error("the state folder {} cannot be used", path.display())]
    State {
        /// The folder or a file in it.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process runs on this state.
    #[error("another instance is running on {}: stop it, or give this one its own server.state_dir", path.display())]
    StateInUse {
        /// The state folder.
        path: PathBuf,
    },
    /// The tokens cannot be had.
    #[error(transparent)]
    Token(#[from] http::TokenError),
    /// The certificates of `[nbd]` cannot be used.
    #[error("the certificates of [nbd]: {0}")]
    Tls(#[from] TlsError),
    /// The database does not fit this binary.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// A webhook has no secret, or cannot be called at all.
    #[error(transparent)]
    Webhook(#[from] WebhookError),
    /// The database failed.
    #[error("the database cannot be used")]
    Store(#[from] StoreError),
    /// A node cannot be called at all.
    #[error(transparent)]
    Node(#[from] NodeClientError),
    /// What the last run left cannot be cleared up, or a repository belongs to another hub.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}, which is {key}: is another program using the port?")]
    Bind {
        /// The key that names it.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A running service. Dropped without [`Service::stop`] it stops at once, as by a kill.
#[derive(Debug)]
pub struct Service {
    app: AppState,
    address: SocketAddr,
    callbacks_address: Option<SocketAddr>,
    close_sockets: watch::Sender<bool>,
    servers: JoinSet<()>,
    /// Work that goes on beside requests and jobs, and may end anywhere.
    background: JoinSet<()>,
    drain: Duration,
    // Dropped last: the lock is free only when everything else is gone.
    _lock: StateLock,
}

impl Service {
    /// Starts a service and returns once it answers requests.
    ///
    /// # Cancellation
    ///
    /// Dropped half-way it leaves no socket and no lock.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let lock = StateLock::take(&config.server.state_dir)?;
        let tokens = http::Tokens::load(&config)?;
        let tls = listeners::tls(&config.nbd)?;
        if config.auth.mode == AuthMode::Off {
            tracing::warn!(
                "auth.mode is off: whoever reaches this port, also through a node's tunnel, may delete and restore; set \
                 server.callbacks_bind and forward only that"
            );
        }
        let webhooks = Webhook::all(&config, Patience::default())?;
        let store = Store::open(&config.database_file()).await?;
        store.has_room().await;
        let (listener, address) = bind("server.bind", config.server.bind).await?;
        let callbacks = match config.server.callbacks_bind {
            Some(address) => Some(bind("server.callbacks_bind", address).await?),
            None => None,
        };
        let callbacks_address = callbacks.as_ref().map(|(_, address)| *address);

        let drain = Duration::from_secs(config.server.drain_s);
        let app: AppState = Arc::new(App::new(config, store, tokens, tls)?);
        let close_sockets = watch::Sender::new(false);
        let mut servers = JoinSet::new();
        servers.spawn(serve(listener, http::router(&app), close_sockets.subscribe()));
        if let Some((listener, _)) = callbacks {
            servers.spawn(serve(listener, http::callbacks_router(&app), close_sockets.subscribe()));
        }
        let mut background = JoinSet::new();
        // Before anything happens: what a new webhook hears begins here.
        Webhook::start(webhooks, &app.store, &mut background).await?;
        background.spawn(expire::run(app.store.clone(), app.config.observability.events_keep_days));
        app.backups.recover().await?;
        app.restores.recover().await;
        servers.spawn(app.points.clone().prune_after_commits());
        app.advance(Phase::Ready);
        let backups = app.backups.clone();
        app.points.verify_in_background(move || !backups.running().is_empty());
        tracing::info!(%address, ?callbacks_address, boot_id = app.boot_id, "ready");
        Ok(Self { app, address, callbacks_address, close_sockets, servers, background, drain, _lock: lock })
    }

    /// The address of the API, with the real port where port 0 was configured.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address that serves the callbacks alone, where one is configured.
    pub fn callbacks_address(&self) -> Option<SocketAddr> {
        self.callbacks_address
    }

    /// Base URL of the API, without `/api/v1`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What its handlers see.
    pub fn app(&self) -> &AppState {
        &self.app
    }

    /// Stops in order: new jobs are refused, running ones get `server.drain_s`, open requests are answered.
    pub async fn stop(mut self) {
        tracing::info!("stopping");
        self.app.advance(Phase::Draining);
        self.app.points.stop_verifications().await;
        self.app.points.stop();
        tokio::join!(self.app.backups.drain(self.drain), self.app.points.drain_merges());
        self.app.restores.stop().await;
        self.app.advance(Phase::Closing);
        self.close_sockets.send_replace(true);
        let answered =
            tokio::time::timeout(HTTP_DRAIN, async { while self.servers.join_next().await.is_some() {} }).await;
        if answered.is_err() {
            tracing::warn!("requests were cut that did not end in time");
            self.servers.shutdown().await;
        }
        self.background.shutdown().await;
        self.app.store.close().await;
        tracing::info!("stopped");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // After a stop there is none left.
        self.app.points.abandon_verifications();
        self.app.backups.abandon();
        self.app.points.stop();
        self.app.points.abandon_merges();
        self.app.restores.abandon();
    }
}

/// A listener and the address that it really has.
async fn bind(key: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Bind { key, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let real = listener.local_addr().map_err(failed)?;
    Ok((listener, real))
}

async fn serve(listener: TcpListener, router: Router, mut close: watch::Receiver<bool>) {
    let closed = async move {
        // A sender that is gone means the same.
        let _ = close.wait_for(|close| *close).await;
    };
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    if let Err(error) = axum::serve(listener, service).with_graceful_shutdown(closed).await {
        tracing::error!(%error, "the HTTP server ended");
    }
}

/// The lock on a state folder; dropping it gives the folder free. The system does the same when the process dies.
#[derive(Debug)]
struct StateLock {
    _file: File,
}

impl StateLock {
    fn take(state_dir: &Path) -> Result<Self, StartError> {
        let failed = |source| StartError::State { path: state_dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(failed)?;
        let path = state_dir.join("lock");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| StartError::State { path, source })?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StartError::StateInUse { path: state_dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // For a person who looks who holds it; nothing reads it.
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
        Ok(Self { _file: file })
    }
}
