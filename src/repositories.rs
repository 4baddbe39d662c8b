//! The repositories that this process owns. Whoever uses one asks here first, each time.
//!
//! Owning is more than the lock: before anything else uses a repository that was just locked, the jobs that waited for it are
//! ended and it is swept, so that nobody reads new files by old records. That is so at the start, for one that is mounted later,
//! and for a disk that is mounted over a folder. One that cannot be swept cannot be used, and is tried again by the next who asks.
//!
//! A file system that hangs is refused too, within a bound and for one thread in all ([`probes`]): what asks here before it goes
//! to the files leaves no more behind.

pub mod probes;
pub mod promises;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use crate::backup::{self, RecoverError, Waiting};
use crate::config::Config;
use crate::id::RepositoryId;
use crate::points::folder::FolderError;
use crate::points::import::ImportReport;
use crate::repository::directory;
use crate::repository::lock::{Device, LockError, Marking, RepositoryLocks};
use crate::store::Store;
use crate::store::repositories::{self, Repository};
use probes::{ProbeError, Probes};
use promises::{Promise, Promises};

/// How long a repository is given to show that it is there. A guess: a healthy one answers in microseconds, and twice this, the most
/// that anyone waits, is what callers' proxies wait at least.
const LIMIT: Duration = Duration::from_secs(5);
/// The same where nothing but space is asked, or where a path leads: the answer can do without it.
const GLANCE: Duration = Duration::from_secs(2);

/// The repositories of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Repositories {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Arc<Config>,
    store: Store,
    /// Names this process start: jobs of it have tasks of their own.
    boot_id: String,
    locks: Arc<RepositoryLocks>,
    probes: Probes,
    promises: Arc<Promises>,
    swept: std::sync::Mutex<HashMap<RepositoryId, Swept>>,
}

/// How a repository came to be this process's own.
#[derive(Clone, Debug)]
pub enum Owned {
    /// It was so already.
    Before,
    /// It was swept for that, which imported what was not known.
    JustNow(ImportReport),
}

/// What is known of a repository since it was swept. Held while it is done, so that everybody else waits.
type Swept = Arc<tokio::sync::Mutex<Known>>;

#[derive(Debug, Default)]
struct Known {
    /// Where it was then.
    place: Option<(String, Device)>,
    /// Who waits for files that could not be read then: each use tries again.
    waiting: Waiting,
}

impl Repositories {
    /// Owns nothing yet.
    pub fn new(config: Arc<Config>, store: Store, boot_id: &str) -> Self {
        let shared = Shared {
            config,
            store,
            boot_id: boot_id.to_owned(),
            locks: Arc::new(RepositoryLocks::new()),
            probes: Probes::default(),
            promises: Arc::default(),
            swept: std::sync::Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Makes a repository this process's own, or finds that it is, and that its folder is there now. Not to be called inside a
    /// transaction.
    ///
    /// # Cancellation
    /// What was begun goes on.
    ///
    /// # Errors
    /// It cannot be used now, or the database fails. A folder that does not answer is known within ten seconds, and so is a sweep of
    /// somebody else that takes longer; whoever sweeps it waits for the end of that.
    pub async fn own(&self, repository: &Repository) -> Result<Owned, FolderError> {
        let (this, repository) = (self.clone(), repository.clone());
        let owned = tokio::spawn(async move { Box::pin(this.own_in_turn(&repository)).await });
        owned.await.map_err(|_| FolderError::Panicked)?
    }

    async fn own_in_turn(&self, repository: &Repository) -> Result<Owned, FolderError> {
        let swept = self.swept(&repository.id);
        let Ok(mut known) = timeout(LIMIT, swept.lock()).await else {
            // Nothing is wrong with a sweep that takes its time; nobody may use the repository before its end.
            let reason = "it is being looked through, or its file system does not answer".to_owned();
            return Err(FolderError::Unavailable { id: repository.id.clone(), reason });
        };
        let refused = |error| refused(repository, error);
        let device = self.lock(repository).await.map_err(refused)?;
        let place = Some((repository.path.clone(), device));
        let is_swept = known.place == place;
        if is_swept && known.waiting == Waiting::Nobody {
            return Ok(Owned::Before);
        }
        let Shared { config, store, boot_id, .. } = &*self.shared;
        // First: a sweep takes what is there without a record, and these have theirs.
        let waiting = backup::settle_waiting(self, store, config, boot_id, &repository.id).await;
        known.waiting = waiting.map_err(refused)?;
        if is_swept {
            return Ok(Owned::Before);
        }
        let report = backup::sweep(store, config.jobs.keep_failed, repository).await.inspect_err(|error| {
            tracing::error!(repository = %repository.id, %error, "a repository cannot be swept and is not used");
        })?;
        known.place = place;
        Ok(Owned::JustNow(report))
    }

    /// Takes the lock alone: for the start, which must know all of them before it changes anything.
    pub(crate) async fn lock(&self, repository: &Repository) -> Result<Device, RecoverError> {
        let mut connection = self.shared.store.read().await?;
        let is_used = repositories::point_count(&mut connection, &repository.id).await? > 0
            || repositories::active_backup(&mut connection, &repository.id).await?.is_some();
        drop(connection);
        let marking = if is_used { Marking::MustBeThere } else { Marking::MayBegin };
        let (locks, id, path) =
            (Arc::clone(&self.shared.locks), repository.id.clone(), PathBuf::from(&repository.path));
        let folder = path.clone();
        let locked = self.shared.probes.ask(&folder, LIMIT, move || locks.acquire(id.as_str(), &path, marking)).await;
        match locked {
            Ok(locked) => Ok(locked?),
            Err(ProbeError::Unanswered) => {
                Err(LockError::Unanswered { id: repository.id.to_string(), path: folder }.into())
            }
            Err(ProbeError::Panicked) => Err(RecoverError::Panicked),
        }
    }

    /// Speaks for room in a repository; whether it is there, the caller finds out next.
    pub fn promise(&self, repository: &RepositoryId, bytes: u64) -> Promise {
        self.shared.promises.make(repository, bytes)
    }

    /// What running jobs and merges are still expected to store in a repository, in bytes: it is free and spoken for.
    pub fn spoken_for(&self, repository: &RepositoryId) -> u64 {
        self.shared.promises.spoken_for(repository)
    }

    /// Asks the file system of a repository something that it answers at once.
    ///
    /// # Errors
    /// It does not, within [`LIMIT`]; the database is not asked.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        repository: &Repository,
        question: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<T, FolderError> {
        let path = PathBuf::from(&repository.path);
        let folder = path.clone();
        self.shared.probes.ask(&folder, LIMIT, move || question(&path)).await.map_err(|error| match error {
            ProbeError::Unanswered => FolderError::Unavailable { id: repository.id.clone(), reason: error.to_string() },
            ProbeError::Panicked => FolderError::Panicked,
        })
    }

    /// The space of the file system that holds a folder: free for this service, and in all, in bytes. `None` when there is no
    /// folder, or no answer.
    pub async fn space(&self, path: &str) -> Option<(u64, u64)> {
        let measured = self.glance(path, |path| path.is_dir().then(|| directory::space(path).ok()).flatten());
        measured.await.flatten()
    }

    /// Where a path leads; nothing when it leads nowhere, or there is no answer.
    pub(crate) async fn resolve(&self, path: &str) -> Option<PathBuf> {
        self.glance(path, |path| path.canonicalize().ok()).await.flatten()
    }

    /// Asks something of which no answer is an answer too. The path need not be one of a repository.
    async fn glance<T: Send + 'static>(
        &self,
        path: &str,
        question: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Option<T> {
        let path = PathBuf::from(path);
        let folder = path.clone();
        self.shared.probes.ask(&folder, GLANCE, move || question(&path)).await.ok()
    }

    /// Gives up a repository that is removed from this hub.
    pub async fn release(&self, id: &RepositoryId) {
        let swept = self.swept(id);
        if let Ok(mut swept) = timeout(LIMIT, swept.lock()).await {
            *swept = Known::default();
        }
        self.shared.locks.release(id.as_str());
    }

    fn swept(&self, id: &RepositoryId) -> Swept {
        let mut swept = self.shared.swept.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(swept.entry(id.clone()).or_default())
    }
}

fn refused(repository: &Repository, error: RecoverError) -> FolderError {
    let unavailable = |reason| FolderError::Unavailable { id: repository.id.clone(), reason };
    match error {
        RecoverError::Lock(error) => unavailable(error.public()),
        RecoverError::Store(error) => FolderError::Store(error),
        RecoverError::Folder(error) => error,
        RecoverError::Panicked => FolderError::Panicked,
        RecoverError::Change(_) => unavailable("a job that waited for it could not be ended".to_owned()),
    }
}
