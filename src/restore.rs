//! Restoring from committed points in this process: exports over NBD, and whole disks as a stream of bytes.
//!
//! An export is one disk of one point on a port of its own, read-only or under an overlay that takes the writes. A task per
//! export ([`live`]) owns everything it holds and gives it back when it ends: asked to, unused for `restore.ttl_s`, or with
//! the service. What must be true of a point before it is opened is in `chain`; nothing here writes to one.

mod chain;
pub mod live;
mod overlay;
mod raw;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use utoipa::ToSchema;

use live::LiveExport;
pub use overlay::OverlayError;
pub use raw::RawDisk;

use crate::config::Config;
use crate::id::{BackupId, ExportId, RepositoryId};
use crate::listeners::ports::{PortError, PortPool};
use crate::listeners::{ListenError, ListenerOptions};
use crate::repositories::Repositories;
use crate::store::{Store, StoreError};

/// How long a stopping service waits for its exports to end. Each takes twice [`live::DRAIN`] at most; the rest is removing
/// overlays.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// The exports of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Restores {
    shared: Arc<Shared>,
}

/// What all exports share.
#[derive(Debug)]
struct Shared {
    config: Arc<Config>,
    store: Store,
    repositories: Repositories,
    /// Names this process start; pins of another one are void.
    boot_id: String,
    ports: PortPool,
    listeners: ListenerOptions,
    registry: Mutex<Registry>,
    /// Exports that are being opened, open, or ending.
    present: watch::Sender<usize>,
    raw_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct Registry {
    closed: bool,
    live: BTreeMap<ExportId, (Arc<LiveExport>, Option<AbortHandle>)>,
    /// Bytes that were read through exports that are over.
    ended_bytes: u64,
}

/// Whether an export takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Writes are refused.
    #[default]
    ReadOnly,
    /// Writes go to a file that is removed with the export.
    Overlay,
}

/// What becomes of a disk that is known to be damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It is not opened.
    Refuse,
    /// It is opened as far as that is possible.
    Accept,
}

/// The export that is asked for.
#[derive(Clone, Debug)]
pub struct NewExport {
    /// The restore point.
    pub point_id: BackupId,
    /// The number of the disk.
    pub disk_id: u32,
    /// Whether it takes writes.
    pub mode: Mode,
    /// Whether damage is in the way.
    pub damage: Damage,
}

/// Bytes read from restore points since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Through exports.
    pub export_bytes: u64,
    /// By raw downloads.
    pub raw_bytes: u64,
}

/// Why a disk of a point cannot be restored from.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is no such point, or it was deleted.
    #[error("there is no restore point with the id {0}")]
    PointNotFound(BackupId),
    /// The point has no disk of this number.
    #[error("the restore point {point_id} has no disk {disk_id}")]
    NoSuchDisk {
        /// The point.
        point_id: BackupId,
        /// The number.
        disk_id: u32,
    },
    /// The repository of the point cannot be used now.
    #[error("repository {id} cannot be used: {reason}")]
    RepositoryUnavailable {
        /// The repository.
        id: RepositoryId,
        /// Why, without paths.
        reason: String,
    },
    /// Files of the point, or of one below it, are not there.
    #[error("files of the restore point {0}, or of one below it, are not there")]
    FilesMissing(BackupId),
    /// Files of the point, or of one below it, are not what was committed.
    #[error("the restore point {point_id} is damaged: {reason}")]
    Damaged {
        /// The point.
        point_id: BackupId,
        /// What is wrong, in words for the caller.
        reason: String,
    },
    /// There is no port for it.
    #[error(transparent)]
    Ports(#[from] PortError),
    /// The overlay cannot be made.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The export cannot be served.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The service is stopping.
    #[error("the service is stopping")]
    Draining,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task of ours ended by a panic.
    #[error("opening the restore point ended by a panic")]
    Panicked,
}

impl Restores {
    /// The exports of a new process: none.
    pub fn new(
        config: Arc<Config>,
        store: Store,
        repositories: Repositories,
        listeners: ListenerOptions,
        boot_id: &str,
    ) -> Self {
        let shared = Shared {
            ports: PortPool::new(config.restore.bind),
            config,
            store,
            repositories,
            boot_id: boot_id.to_owned(),
            listeners,
            registry: Mutex::default(),
            present: watch::Sender::new(0),
            raw_bytes: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Removes the overlays of earlier processes. Their pins are voided with all leases of theirs.
    pub async fn recover(&self) {
        let folder = self.shared.overlays();
        // A leftover takes space and does no other harm: it never keeps the service from starting.
        match tokio::task::spawn_blocking(move || overlay::remove_leftovers(&folder)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => tracing::warn!(removed, "overlays of the last run were removed"),
            Ok(Err(error)) => tracing::error!(%error, "overlays of the last run could not be removed"),
            Err(_) => tracing::error!("removing the overlays of the last run ended by a panic"),
        }
    }

    /// Exports a disk of a point. When this returns its listener answers.
    ///
    /// # Cancellation
    /// The export is made all the same, and ends by its time to live.
    ///
    /// # Errors
    /// See [`RestoreError`]; nothing is kept then.
    pub async fn export(&self, new: NewExport) -> Result<Arc<LiveExport>, RestoreError> {
        let shared = Arc::clone(&self.shared);
        let opening = tokio::spawn(async move { live::open(&shared, new).await });
        opening.await.map_err(|_| RestoreError::Panicked)?
    }

    /// A disk of a point to be read from end to end; its chain is pinned as long as the value lives.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub async fn raw(&self, point_id: BackupId, disk_id: u32, damage: Damage) -> Result<RawDisk, RestoreError> {
        let shared = Arc::clone(&self.shared);
        // In a task of its own, so that a caller who hangs up leaves no pin behind.
        let opening = tokio::spawn(async move { raw::open(&shared, point_id, disk_id, damage).await });
        opening.await.map_err(|_| RestoreError::Panicked)?
    }

    /// All exports, oldest first.
    pub fn all(&self) -> Vec<Arc<LiveExport>> {
        self.shared.registry().live.values().map(|(export, _)| Arc::clone(export)).collect()
    }

    /// One export.
    pub fn find(&self, id: &ExportId) -> Option<Arc<LiveExport>> {
        self.shared.registry().live.get(id).map(|(export, _)| Arc::clone(export))
    }

    /// Gives an export its whole time to live again.
    ///
    /// # Errors
    /// The database's; the export lives on all the same.
    pub async fn renew(&self, id: &ExportId) -> Result<Option<Arc<LiveExport>>, StoreError> {
        let Some(export) = self.find(id) else { return Ok(None) };
        export.renew();
        self.shared.record_deadline(&export).await?;
        Ok(Some(export))
    }

    /// Ends an export and waits until nothing is left of it. Whether there was one.
    pub async fn end(&self, id: &ExportId) -> bool {
        let Some(export) = self.find(id) else { return false };
        export.end().await;
        true
    }

    /// Ports that exports have.
    pub fn leased_ports(&self) -> Vec<u16> {
        self.shared.ports.leased()
    }

    /// What was read since the start of the process; it never goes back.
    pub fn restored(&self) -> Restored {
        let registry = self.shared.registry();
        let live: u64 = registry.live.values().map(|(export, _)| export.read_bytes()).sum();
        Restored { export_bytes: registry.ended_bytes + live, raw_bytes: self.shared.raw_bytes.load(Ordering::Relaxed) }
    }

    /// Refuses new exports and ends all. Returns when none is left, or when that takes too long.
    pub async fn stop(&self) {
        self.shared.registry().closed = true;
        self.all().iter().for_each(|export| export.ask_to_end());
        let mut present = self.shared.present.subscribe();
        let gone = present.wait_for(|present| *present == 0);
        if tokio::time::timeout(STOP_LIMIT, gone).await.is_err() {
            tracing::error!("some exports did not end in time; the next start clears up after them");
        }
    }

    /// Ends the tasks of all exports where they are, as a kill would. Sockets close; rows stay for the next start.
    pub(crate) fn abandon(&self) {
        let mut registry = self.shared.registry();
        registry.closed = true;
        registry.live.values().filter_map(|(_, task)| task.as_ref()).for_each(AbortHandle::abort);
    }
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where overlays are.
    fn overlays(&self) -> PathBuf {
        self.config.server.state_dir.join("overlays")
    }

    async fn record_deadline(&self, export: &LiveExport) -> Result<(), StoreError> {
        let mut transaction = self.store.write().await?;
        crate::store::leases::set_export_deadline(&mut transaction, &export.facts().id, export.expires_at()).await?;
        transaction.commit().await
    }
}
