//! What a new process makes of the jobs of the one before it.
//!
//! Nothing of a dead process can go on: its clients do not reconnect. A job whose directory was renamed is a restore
//! point and is rolled forward; every other one is undone and has failed. A job that may have been published waits until its
//! repository can tell; that of any other need not be there. A job whose task panicked is ended in the same way.
//!
//! Files are touched only in repositories whose locks this process has, after a question that was answered in time. What a job staged
//! that ended otherwise is removed when its repository is swept.

use std::collections::BTreeSet;
use std::io;
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
use crate::repositories::Repositories;
use crate::repository::directory;
use crate::repository::layout::BackupPaths;
use crate::repository::lock::is_marked;
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
    /// A repository that was locked does not answer any more.
    #[error(transparent)]
    Folder(#[from] FolderError),
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
    for repository in &locked {
        match shared.repositories.own(repository).await {
            Ok(_) => {}
            Err(FolderError::Store(error)) => return Err(error.into()),
            Err(error) => tracing::warn!(repository = %repository.id, %error, "a repository cannot be used now"),
        }
    }
    // Those whose repositories could not be asked.
    for row in backups::unfinished(&mut *shared.store.read().await?).await? {
        if row.state == JobState::Committing {
            // It may have been published. Only its repository can tell, and a terminal state would be for ever.
            tracing::error!(
                job_id = %row.id, repository = %row.repository_id,
                "a backup that was being committed waits until its repository is used again"
            );
        } else {
            undo::finish(&shared.store, &row.id, &end_of(&row, restarted()), &[]).await?;
            tracing::warn!(job_id = %row.id, state = %row.state, "a job of the last run has ended");
        }
    }
    Ok(())
}

/// Whether jobs that may have been published still have no end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// None.
    #[default]
    Nobody,
    /// Some: their files say neither that they are points nor that they are none.
    Jobs,
}

/// Ends the jobs of earlier processes in a repository that is there now and locked, as its files say.
pub(crate) async fn settle_waiting(
    repositories: &Repositories,
    store: &Store,
    config: &Config,
    boot_id: &str,
    repository: &RepositoryId,
) -> Result<Waiting, RecoverError> {
    let unfinished = backups::unfinished(&mut *store.read().await?).await?;
    let of_earlier = |row: &&BackupRow| row.repository_id == *repository && row.boot_id != boot_id;
    let mut waiting = Waiting::Nobody;
    for row in unfinished.iter().filter(of_earlier) {
        if settle(repositories, store, config.jobs.keep_failed, row, restarted()).await? == Waiting::Jobs {
            waiting = Waiting::Jobs;
        }
    }
    Ok(waiting)
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
    // All at once: those on one server may all be given the same time in vain.
    let asked = all.iter().map(|repository| shared.repositories.lock(repository));
    let answers = futures_util::future::join_all(asked).await;
    let mut locked = Vec::new();
    for (repository, answer) in all.into_iter().zip(answers) {
        match answer {
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

/// Ends one job that no task runs any more: forward when its directory was published, else as failed with `failed`. One that may have
/// been published waits when nobody can say whether it was.
pub(super) async fn settle(
    repositories: &Repositories,
    store: &Store,
    keep_failed: KeepFailed,
    row: &BackupRow,
    failed: Failed,
) -> Result<Waiting, RecoverError> {
    let end = end_of(row, failed);
    let Some((repository, paths)) = place_of(store, row).await? else {
        // Without a folder there was no file. Cannot happen to a job that got as far as preparing.
        undo::finish(store, &row.id, &end, &[]).await?;
        return Ok(Waiting::Nobody);
    };
    match look(repositories, &repository, &paths, row).await? {
        Found::Published(manifest) => {
            tracing::warn!(job_id = %row.id, "the restore point was published before the end; recording it");
            commit::record(store, &manifest, &paths).await?;
        }
        Found::Unclear(error) if row.state == JobState::Committing => {
            tracing::error!(
                job_id = %row.id, repository = %row.repository_id, %error,
                "a backup that was being committed waits: its files do not tell whether it is a restore point"
            );
            return Ok(Waiting::Jobs);
        }
        Found::Nothing | Found::Unclear(_) => {
            let leftovers = Leftovers::of(&end, keep_failed);
            let cleared = tokio::task::spawn_blocking(move || leftovers.clear(&paths)).await;
            if let Err(error) = cleared.map_err(|_| RecoverError::Panicked)? {
                // The record must not wait for a file system that may be gone for good; the next sweep tries again.
                tracing::error!(job_id = %row.id, %error, "staged data of the last run could not be removed");
            }
            undo::finish(store, &row.id, &end, &[]).await?;
            tracing::warn!(job_id = %row.id, state = %row.state, "a job of the last run has ended");
        }
    }
    Ok(Waiting::Nobody)
}

/// How a job ends that was not published.
fn end_of(row: &BackupRow, failed: Failed) -> End {
    if row.state == JobState::Cancelling { End::Cancelled } else { End::Failed(failed) }
}

/// What the files of a job say of its end.
enum Found {
    /// It is a restore point, durable again before anyone relies on it.
    Published(Box<Manifest>),
    /// There is none.
    Nothing,
    /// They cannot be read now, or not by this version.
    Unclear(ManifestError),
}

async fn look(
    repositories: &Repositories,
    repository: &Repository,
    paths: &BackupPaths,
    row: &BackupRow,
) -> Result<Found, RecoverError> {
    let (asked, id) = (paths.clone(), row.id.clone());
    let loaded = repositories.ask(repository, move |root| {
        let loaded = directory::load_published(&asked, &id);
        // A disk that was unmounted meanwhile has no folders either.
        (loaded, is_marked(root))
    });
    let (loaded, is_there) = loaded.await?;
    let manifest = match loaded {
        Ok(Some(manifest)) => manifest,
        _ if !is_there => return Ok(Found::Unclear(io::Error::from(io::ErrorKind::NotFound).into())),
        Ok(None) => return Ok(Found::Nothing),
        Err(error) if is_proof(&error) => {
            tracing::error!(job_id = %row.id, %error, "a published directory cannot be used; the job has failed");
            return Ok(Found::Nothing);
        }
        Err(error) => return Ok(Found::Unclear(error)),
    };
    let synced = paths.clone();
    let synced = tokio::task::spawn_blocking(move || directory::sync_published(&synced)).await;
    Ok(match synced.map_err(|_| RecoverError::Panicked)? {
        Ok(()) => Found::Published(Box::new(manifest)),
        Err(error) => Found::Unclear(error.into()),
    })
}

/// Whether this says for certain that a folder is no restore point: what it should have is not there, or was read and is something
/// else. An error of the file system may pass, and a newer version may read what this one does not.
fn is_proof(error: &ManifestError) -> bool {
    match error {
        ManifestError::Read(error) => error.kind() == io::ErrorKind::NotFound,
        ManifestError::Invalid(_) | ManifestError::OtherBackup { .. } | ManifestError::OtherLength { .. } => true,
        ManifestError::NotPlain | ManifestError::TooLong(_) | ManifestError::Newer { .. } => false,
    }
}

async fn place_of(store: &Store, row: &BackupRow) -> Result<Option<(Repository, BackupPaths)>, StoreError> {
    let mut connection = store.read().await?;
    let repository = repositories::find(&mut connection, &row.repository_id).await?;
    let directory = backups::directory_of(&mut connection, &row.vm_id).await?;
    Ok(repository.zip(directory).map(|(repository, directory)| {
        let paths = BackupPaths::new(Path::new(&repository.path), &directory, row.id.as_str());
        (repository, paths)
    }))
}
