//! A repository as work on all of it begins: it is this hub's, and what blocks for its file system runs where it may.

use std::io;

use super::Points;
use crate::id::RepositoryId;
use crate::repositories::Owned;
use crate::store::StoreError;
use crate::store::repositories::{self, Repository};

/// Why the folders of a repository were not looked at to the end.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// There is none of this id.
    #[error("there is no repository {0}")]
    NotFound(RepositoryId),
    /// It cannot be used or looked at.
    #[error("repository {id} cannot be used: {reason}")]
    Unavailable {
        /// Which one.
        id: RepositoryId,
        /// Why, without paths.
        reason: String,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Looking ended by a panic.
    #[error("looking at a repository ended by a panic")]
    Panicked,
}

impl Points {
    /// The repository, which this process owns from now on.
    pub(super) async fn own(&self, id: &RepositoryId) -> Result<Repository, FolderError> {
        self.own_and_tell(id).await.map(|(repository, _)| repository)
    }

    /// The same, and whether it was swept for that.
    pub(super) async fn own_and_tell(&self, id: &RepositoryId) -> Result<(Repository, Owned), FolderError> {
        let found = repositories::find(&mut *self.shared.store.read().await?, id).await?;
        let repository = found.ok_or_else(|| FolderError::NotFound(id.clone()))?;
        let owned = self.shared.repositories.own(&repository).await?;
        Ok((repository, owned))
    }
}

/// Runs what blocks for the file system of a repository.
pub(crate) async fn on_disk<T: Send + 'static>(
    repository: &Repository,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, FolderError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|_| FolderError::Panicked)?;
    done.map_err(|error| {
        tracing::warn!(repository = %repository.id, %error, "a repository cannot be looked at");
        FolderError::Unavailable { id: repository.id.clone(), reason: error.kind().to_string() }
    })
}
