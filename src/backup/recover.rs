//! What a new process makes of the jobs of the one before it.
//!
//! Nothing of a dead process can go on: its clients do not reconnect. A job whose directory was renamed is a restore
//! point and is rolled forward; every other one is undone and has failed. A
//! job that may have been published waits for its repository. A job whose task panicked is ended in the same way.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::commit;
use super::ending::{End, Failed};
use super::undo::Leftovers;
use super::{Shared, undo};
use crate::clock::UtcTime;
use crate::config::{Config, KeepFailed};
use crate::id::{BackupId, RepositoryId};
use crate::points::folder::FolderError;
use crate::repository::directory;
use crate::repository::layout::BackupPaths;
use crate::repository::manifest::{Manifest, ManifestError};
use crate::store::backups::{self, BackupRow, ChangeError};
use crate::store::repositories::{self, Repository};
use crate::store::{Connection, Store, StoreError, idempotency, leases};
use crate::words::{FailureCode, JobState};

/// Why the state of the last process could not be cleared up.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The database failed.
    #[error("the jobs of the last run could not be cleared up")]
    Store(#[from] StoreError),
    /// A job is in a state that cannot be.
    #[error("the jobs of the last run could not be cleared up")]
    Change(#[from] ChangeError),
    /// Another hub works on one of the repositories.
    #[error(transparent)]
    Lock(#[from] crate::repository::lock::LockError),
    /// A task ended by a panic.
    #[error("clearing up after the last run ended by a panic")]
    Panicked,
}

/// Takes the locks of all repositories, voids the leases of earlier processes, ends their jobs, and has the repositories swept.
pub(super) async fn recover(shared: &Arc<Shared>) -> Result<(), RecoverError> {
    let locked = lock_repositories(shared).await?;
    let mut transaction = shared.store.write().await?;
    let voided = leases::void_other_boots(&mut transaction, &shared.boot_id).await?;
    let unfinished = backups::unfinished(&mut transaction).await?;
    for row in unfinished.iter().filter(|row| row.state == JobState::Committing) {
        pin_parents(&mut transaction, row, &shared.boot_id).await?;
    }
    idempotency::remove_expired(&mut transaction, UtcTime::now()).await?;
    transaction.commit().await?;
    if voided > 0 || !unfinished.is_empty() {
        tracing::warn!(leases = voided, jobs = unfinished.len(), "clearing up after the last run");
    }
    for row in unfinished {
        if row.state != JobState::Committing {
            settle(&shared.store, shared.config.jobs.keep_failed, &row, restarted()).await?;
        } else if !locked.iter().any(|repository| repository.id == row.repository_id) {
            // It may have been published. Only its repository can tell, and a terminal state would be for ever.
            tracing::error!(
                job_id = %row.id, repository = %row.repository_id,
                "a backup that was being committed waits until its repository is used again"
            );
        }
    }
    for repository in &locked {
        match shared.repositories.own(repository).await {
            Ok(_) => {}
            Err(FolderError::Store(error)) => return Err(error.into()),
            Err(error) => tracing::warn!(repository = %repository.id, %error, "a repository cannot be used now"),
        }
    }
    Ok(())
}

/// Ends the jobs of earlier processes that may have been published into a repository, now that it is there.
pub(crate) async fn settle_waiting(
    store: &Store,
    config: &Config,
    boot_id: &str,
    repository: &RepositoryId,
) -> Result<(), RecoverError> {
    let unfinished = backups::unfinished(&mut *store.read().await?).await?;
    let waits = |row: &&BackupRow| row.repository_id == *repository && row.boot_id != boot_id;
    for row in unfinished.iter().filter(waits).filter(|row| row.state == JobState::Committing) {
        settle(store, config.jobs.keep_failed, row, restarted()).await?;
    }
    Ok(())
}

fn restarted() -> Failed {
    // What it counts was recorded while it ran.
    let message = "the service was restarted while the backup ran; what had come is told as it was some seconds before";
    Failed::new(FailureCode::ServiceRestart, message)
}

/// The repositories whose locks this process has from now on. One that is not there now (an unmounted disk) does not stop the
/// service; one that another hub has does.
async fn lock_repositories(shared: &Arc<Shared>) -> Result<Vec<Repository>, RecoverError> {
    let all = repositories::all(&mut *shared.store.read().await?).await?;
    let mut locked = Vec::new();
    for repository in all {
        match shared.repositories.lock(&repository).await {
            Ok(_) => locked.push(repository),
            Err(RecoverError::Lock(error)) if !error.is_conflict() => {
                tracing::warn!(repository = %repository.id, %error, "a repository cannot be used now");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(locked)
}

/// Holds what a job that may have been published builds upon: it may have to wait for its repository, and what it is a
/// difference to must not go meanwhile. The end of the job gives it back.
async fn pin_parents(connection: &mut Connection, row: &BackupRow, boot_id: &str) -> Result<(), StoreError> {
    let disks = backups::disks(connection, &row.id).await?;
    let parents: BTreeSet<BackupId> = disks.into_iter().filter_map(|disk| disk.parent_id).collect();
    for parent in parents {
        leases::pin_chain(connection, &parent, row.id.as_str(), boot_id).await?;
    }
    Ok(())
}

/// Ends one job that no task runs any more: forward when its directory was published, else as failed with `failed`.
pub(super) async fn settle(
    store: &Store,
    keep_failed: KeepFailed,
    row: &BackupRow,
    failed: Failed,
) -> Result<(), RecoverError> {
    let Some(paths) = paths_of(store, row).await? else {
        // Without a folder there was no file. Cannot happen to a job that got as far as preparing.
        undo::finish(store, &row.id, &End::Failed(failed), &[]).await?;
        return Ok(());
    };
    match published(&paths, row).await? {
        Some(manifest) => {
            tracing::warn!(job_id = %row.id, "the restore point was published before the end; recording it");
            commit::record(store, &manifest, &paths).await?;
        }
        None => {
            let end = if row.state == JobState::Cancelling { End::Cancelled } else { End::Failed(failed) };
            let leftovers = Leftovers::of(&end, keep_failed);
            let staged = paths.clone();
            let cleared = tokio::task::spawn_blocking(move || leftovers.clear(&staged)).await;
            if let Err(error) = cleared.map_err(|_| RecoverError::Panicked)? {
                // The record must not wait for a file system that may be gone for good; the folder is never listed.
                tracing::error!(job_id = %row.id, %error, "staged data of the last run could not be removed");
            }
            undo::finish(store, &row.id, &end, &[]).await?;
            tracing::warn!(job_id = %row.id, state = %row.state, "a job of the last run has ended");
        }
    }
    Ok(())
}

/// The manifest of a published job, made durable again before anyone relies on it.
async fn published(paths: &BackupPaths, row: &BackupRow) -> Result<Option<Manifest>, RecoverError> {
    let (paths, id) = (paths.clone(), row.id.clone());
    let found = tokio::task::spawn_blocking(move || -> Result<Option<Manifest>, ManifestError> {
        let manifest = directory::load_published(&paths, &id)?;
        if manifest.is_some() {
            directory::sync_published(&paths)?;
        }
        Ok(manifest)
    });
    match found.await.map_err(|_| RecoverError::Panicked)? {
        Ok(manifest) => Ok(manifest),
        Err(error) => {
            tracing::error!(job_id = %row.id, %error, "a published directory cannot be used; the job has failed");
            Ok(None)
        }
    }
}

async fn paths_of(store: &Store, row: &BackupRow) -> Result<Option<BackupPaths>, StoreError> {
    let mut connection = store.read().await?;
    let repository = repositories::find(&mut connection, &row.repository_id).await?;
    let directory = backups::directory_of(&mut connection, &row.vm_id).await?;
    Ok(repository
        .zip(directory)
        .map(|(repository, directory)| BackupPaths::new(Path::new(&repository.path), &directory, row.id.as_str())))
}
