//! The repositories that this process owns. Whoever uses one asks here first, each time.
//!
//! Owning is more than the lock: before anything else uses a repository that was just locked, the jobs that waited for it are
//! ended and it is swept, so that nobody reads new files by old records. That is so at the start, for one that is mounted later,
//! and for a disk that is mounted over a folder. One that cannot be swept cannot be used, and is tried again by the next who asks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use crate::backup::{self, RecoverError};
use crate::config::Config;
use crate::id::RepositoryId;
use crate::points::folder::FolderError;
use crate::points::import::ImportReport;
use crate::repository::lock::{Device, Marking, RepositoryLocks};
use crate::store::Store;
use crate::store::repositories::{self, Repository};

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
    locks: RepositoryLocks,
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

/// Where a repository was when it was swept. Held while it is done, so that everybody else waits.
type Swept = Arc<tokio::sync::Mutex<Option<(String, Device)>>>;

impl Repositories {
    /// Owns nothing yet.
    pub fn new(config: Arc<Config>, store: Store, boot_id: &str) -> Self {
        let (locks, swept) = (RepositoryLocks::new(), std::sync::Mutex::default());
        Self { shared: Arc::new(Shared { config, store, boot_id: boot_id.to_owned(), locks, swept }) }
    }

    /// Makes a repository this process's own, or finds that it is, and that its folder is there now. Not to be called inside a
    /// transaction.
    ///
    /// # Cancellation
    /// What was begun goes on.
    ///
    /// # Errors
    /// It cannot be used now, or the database fails.
    pub async fn own(&self, repository: &Repository) -> Result<Owned, FolderError> {
        let (this, repository) = (self.clone(), repository.clone());
        let owned = tokio::spawn(async move { Box::pin(this.own_in_turn(&repository)).await });
        owned.await.map_err(|_| FolderError::Panicked)?
    }

    async fn own_in_turn(&self, repository: &Repository) -> Result<Owned, FolderError> {
        let swept = self.swept(&repository.id);
        let mut swept = swept.lock().await;
        let refused = |error| refused(repository, error);
        let device = self.lock(repository).await.map_err(refused)?;
        let place = Some((repository.path.clone(), device));
        if *swept == place {
            return Ok(Owned::Before);
        }
        let Shared { config, store, boot_id, .. } = &*self.shared;
        // First, so that what they staged is not taken for that of nobody.
        backup::settle_waiting(store, config, boot_id, &repository.id).await.map_err(refused)?;
        let report = backup::sweep(store, repository).await.inspect_err(|error| {
            tracing::error!(repository = %repository.id, %error, "a repository cannot be swept and is not used");
        })?;
        *swept = place;
        Ok(Owned::JustNow(report))
    }

    /// Takes the lock alone: for the start, which must know all of them before it changes anything.
    pub(crate) async fn lock(&self, repository: &Repository) -> Result<Device, RecoverError> {
        let mut connection = self.shared.store.read().await?;
        let is_used = repositories::point_count(&mut connection, &repository.id).await? > 0
            || repositories::active_backup(&mut connection, &repository.id).await?.is_some();
        drop(connection);
        let marking = if is_used { Marking::MustBeThere } else { Marking::MayBegin };
        let (shared, repository) = (Arc::clone(&self.shared), repository.clone());
        let locked = tokio::task::spawn_blocking(move || {
            shared.locks.acquire(repository.id.as_str(), Path::new(&repository.path), marking)
        });
        Ok(locked.await.map_err(|_| RecoverError::Panicked)??)
    }

    /// Gives up a repository that is removed from this hub.
    pub async fn release(&self, id: &RepositoryId) {
        let swept = self.swept(id);
        *swept.lock().await = None;
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
        RecoverError::Panicked => FolderError::Panicked,
        RecoverError::Change(_) => unavailable("a job that waited for it could not be ended".to_owned()),
    }
}
