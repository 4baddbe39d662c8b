//! Deleting a restore point, in two phases: its record says `deleting` before the first file is touched, and `deleted` after
//! the last one is gone. In between a crash can come at any step; the next start finishes what it finds
//! (`src/backup/sweep.rs`).
//!
//! What forbids a deletion is looked at in the transaction that records it: a point that others build upon, that somebody
//! has pinned, or that is protected does not go. Afterwards nobody can pin it, as a pin asks for a committed point.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use serde_json::{Value, json};

use super::folder::FolderError;
use super::{Points, Shared, paths};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId};
use crate::repository::directory::{self, Leftover};
use crate::repository::layout::BackupPaths;
use crate::repository::merging::{self, Orphan};
use crate::store::backups::{self, BackupRow};
use crate::store::events::{self, Actor};
use crate::store::points::{self, PointRow};
use crate::store::repositories;
use crate::store::{Connection, Store, StoreError, leases};
use crate::words::point::PointState;

/// A deletion was recorded; its files are still there.
const DELETING: &str = "point.deleting";
/// Nothing but the record is left.
const DELETED: &str = "point.deleted";

/// Why a restore point was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is no such point, or none any more.
    #[error("there is no restore point {0}")]
    NotFound(BackupId),
    /// There is no such job.
    #[error("there is no backup {0}")]
    BackupNotFound(BackupId),
    /// The job is not over.
    #[error("{0} is running: cancel it first")]
    Active(BackupId),
    /// Others build upon it.
    #[error("{} restore points build upon {id}", children.len())]
    HasDependents {
        /// The point.
        id: BackupId,
        /// Those directly upon it, oldest first.
        children: Vec<BackupId>,
    },
    /// Somebody reads its files.
    #[error("{id} is in use by {}", holders.join(", "))]
    InUse {
        /// The point.
        id: BackupId,
        /// Jobs, exports and tasks.
        holders: Vec<String>,
    },
    /// It may not be deleted yet.
    #[error("{id} is protected until {until}")]
    Protected {
        /// The point.
        id: BackupId,
        /// Until when.
        until: UtcTime,
    },
    /// Its repository is not there, or not ours.
    #[error("repository {id} cannot be used: {reason}")]
    RepositoryUnavailable {
        /// The repository.
        id: RepositoryId,
        /// Why, without paths.
        reason: String,
    },
    /// The deletion is recorded, but files are left. Asked for again, or at the next start, it goes on.
    #[error("the files of {id} could not all be removed yet: {source}")]
    Files {
        /// The point.
        id: BackupId,
        /// What the file system said.
        source: io::Error,
    },
    /// What a job has left cannot be removed; the record stays, being all that names it.
    #[error("what {id} has left could not be removed: {source}")]
    Left {
        /// The job.
        id: BackupId,
        /// What the file system said.
        source: io::Error,
    },
    /// What a job has left holds something else; the record stays, and so does all of that.
    #[error("what {id} has left is not all of it: {what}")]
    Foreign {
        /// The job.
        id: BackupId,
        /// What is somebody else's, without paths.
        what: String,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task ended by a panic.
    #[error("the deletion ended by a panic")]
    Panicked,
}

/// The right of one task to remove the files of a point, until dropped.
#[derive(Debug)]
struct Removal {
    id: BackupId,
    shared: Arc<Shared>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        removals(&self.shared).remove(&self.id);
    }
}

fn removals(shared: &Shared) -> std::sync::MutexGuard<'_, BTreeSet<BackupId>> {
    shared.removals.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A deletion that is recorded, or will be with the transaction that it was begun in.
#[derive(Debug)]
pub(super) struct Begun {
    id: BackupId,
    /// Where its files are; nothing when there are none to remove.
    paths: Option<BackupPaths>,
    removal: Removal,
}

impl Points {
    /// Deletes a restore point with its files. One whose directory is missing loses its record only. One whose deletion was
    /// begun and not finished is finished.
    ///
    /// # Cancellation
    /// The deletion runs to its end when the future is dropped.
    ///
    /// # Durability
    /// When it returns, neither files nor a record that lists them survive a crash. Cut before, the next start finishes it.
    ///
    /// # Errors
    /// See [`DeleteError`]; nothing was changed but by [`DeleteError::Files`].
    pub async fn delete(&self, id: &BackupId, by: Actor) -> Result<(), DeleteError> {
        let (points, id) = (self.clone(), id.clone());
        let deletion = tokio::spawn(async move {
            let repository = points.repository_of(&id).await?;
            let mut transaction = points.shared.store.write().await?;
            let begun = points.begin_deletion(&mut transaction, &id, &repository, by).await?;
            transaction.commit().await?;
            points.finish_deletion(begun).await
        });
        deletion.await.map_err(|_| DeleteError::Panicked)?
    }

    /// Deletes what a job left: its restore point, or, when it has none, its record with what it has put aside.
    ///
    /// # Cancellation
    /// The deletion runs to its end when the future is dropped.
    ///
    /// # Errors
    /// As [`Self::delete`]; also a job that does not exist or is not over, or whose files cannot be removed.
    pub async fn delete_backup(&self, id: &BackupId, by: Actor) -> Result<(), DeleteError> {
        let (points, id) = (self.clone(), id.clone());
        let deletion = tokio::spawn(async move {
            let mut connection = points.shared.store.read().await?;
            let row = over(&mut connection, &id).await?;
            if points::find(&mut connection, &id).await?.is_some() {
                drop(connection);
                return points.delete(&id, by).await;
            }
            drop(connection);
            // Before the record, which alone tells where they are. Cut in between, it is asked for again.
            points.remove_left_by(&row).await?;
            let mut transaction = points.shared.store.write().await?;
            // Somebody may have been faster. What is over stays over, and gets no point any more.
            let row = over(&mut transaction, &id).await?;
            backups::remove(&mut transaction, &id).await?;
            let data = json!({"job_id": id, "vm_context_id": row.vm_id, "state": row.state, "by": by.as_str()});
            events::append(&mut transaction, "job.deleted", id.as_str(), &data, by, UtcTime::now()).await?;
            transaction.commit().await?;
            Ok(())
        });
        deletion.await.map_err(|_| DeleteError::Panicked)?
    }

    /// Removes what a job without a point has put aside or could not remove. Nobody can tell while its repository is away.
    async fn remove_left_by(&self, row: &BackupRow) -> Result<(), DeleteError> {
        let mut connection = self.shared.store.read().await?;
        let directory = backups::directory_of(&mut connection, &row.vm_id).await?;
        let repository = repositories::find(&mut connection, &row.repository_id).await?;
        drop(connection);
        // It never had a folder, or its repository is not this hub's any more.
        let (Some(directory), Some(_)) = (directory, repository) else { return Ok(()) };
        let repository = match self.reach(&row.repository_id).await? {
            Reach::Ours(repository) => repository,
            Reach::Unavailable { id, reason } => return Err(DeleteError::RepositoryUnavailable { id, reason }),
        };
        let id = row.id.clone();
        let paths = BackupPaths::new(Path::new(&repository.path), &directory, id.as_str());
        let removed = tokio::task::spawn_blocking(move || directory::remove_left(&paths)).await;
        match removed.map_err(|_| DeleteError::Panicked)? {
            Ok(Leftover::Gone) => Ok(()),
            Ok(Leftover::Foreign(what)) => Err(DeleteError::Foreign { id, what }),
            Err(source) => Err(DeleteError::Left { id, source }),
        }
    }

    /// Whether the files of a point can be reached: its repository is ours, or why not.
    async fn repository_of(&self, id: &BackupId) -> Result<Reach, DeleteError> {
        let mut connection = self.shared.store.read().await?;
        let point = points::find(&mut connection, id).await?.ok_or_else(|| DeleteError::NotFound(id.clone()))?;
        drop(connection);
        self.reach(&point.repository_id).await
    }

    /// The same for a whole repository.
    pub(super) async fn reach(&self, id: &RepositoryId) -> Result<Reach, DeleteError> {
        let mut connection = self.shared.store.read().await?;
        let repository = repositories::find(&mut connection, id).await?;
        drop(connection);
        let Some(repository) = repository else {
            return Ok(Reach::Unavailable { id: id.clone(), reason: "it was removed".to_owned() });
        };
        match self.shared.repositories.own(&repository).await {
            Ok(_) => Ok(Reach::Ours(repository)),
            Err(FolderError::Unavailable { id, reason }) => Ok(Reach::Unavailable { id, reason }),
            Err(FolderError::Store(error)) => Err(error.into()),
            Err(FolderError::NotFound(_) | FolderError::Panicked) => Err(DeleteError::Panicked),
        }
    }

    /// The first phase, inside a transaction that the caller commits: all that forbids it, then the record.
    pub(super) async fn begin_deletion(
        &self,
        transaction: &mut Connection,
        id: &BackupId,
        reach: &Reach,
        by: Actor,
    ) -> Result<Begun, DeleteError> {
        let now = UtcTime::now();
        let point = points::find(transaction, id).await?.ok_or_else(|| DeleteError::NotFound(id.clone()))?;
        let is_missing = match point.state {
            PointState::Deleted => return Err(DeleteError::NotFound(id.clone())),
            PointState::Deleting => false,
            PointState::Committed | PointState::Missing => {
                refuse(transaction, &point, now).await?;
                point.state == PointState::Missing
            }
        };
        let paths = match reach {
            Reach::Ours(repository) => Some(paths(repository, &point)),
            // Its folder was not there when it was looked for, and is not there now: only the record can go.
            Reach::Unavailable { .. } if is_missing => None,
            Reach::Unavailable { id, reason } => {
                return Err(DeleteError::RepositoryUnavailable { id: id.clone(), reason: reason.clone() });
            }
        };
        if !removals(&self.shared).insert(id.clone()) {
            // It is going already, by another request.
            return Err(DeleteError::NotFound(id.clone()));
        }
        let removal = Removal { id: id.clone(), shared: Arc::clone(&self.shared) };
        if point.state != PointState::Deleting {
            points::set_state(transaction, id, PointState::Deleting).await?;
            let data = event(&point, PointState::Deleting, by);
            events::append(transaction, DELETING, id.as_str(), &data, by, now).await?;
        }
        if paths.is_none() {
            // Without files there is no second phase that a crash could cut off.
            record_deleted_in(transaction, &point, by).await?;
        }
        Ok(Begun { id: id.clone(), paths, removal })
    }

    /// The second phase: the files, then the record.
    pub(super) async fn finish_deletion(&self, begun: Begun) -> Result<(), DeleteError> {
        let Begun { id, paths, removal } = begun;
        let finished = match paths {
            Some(paths) => finish(&self.shared.store, &paths, &id).await,
            None => Ok(()),
        };
        drop(removal);
        self.shared.verifications.forget(&id);
        match &finished {
            Ok(()) => tracing::info!(point = %id, "restore point deleted"),
            Err(error) => tracing::error!(point = %id, %error, "a deletion is not finished"),
        }
        finished
    }
}

/// Whether the files of a repository can be reached.
#[derive(Debug)]
pub(super) enum Reach {
    /// This hub owns it.
    Ours(repositories::Repository),
    /// Not now.
    Unavailable {
        /// The repository.
        id: RepositoryId,
        /// Why, without paths.
        reason: String,
    },
}

/// A job that is over.
async fn over(connection: &mut Connection, id: &BackupId) -> Result<BackupRow, DeleteError> {
    let row = backups::find(connection, id).await?.ok_or_else(|| DeleteError::BackupNotFound(id.clone()))?;
    if row.state.is_terminal() { Ok(row) } else { Err(DeleteError::Active(id.clone())) }
}

/// What keeps a point from being deleted.
async fn refuse(transaction: &mut Connection, point: &PointRow, now: UtcTime) -> Result<(), DeleteError> {
    let id = &point.id;
    let children = points::children(transaction, id).await?;
    if !children.is_empty() {
        return Err(DeleteError::HasDependents { id: id.clone(), children });
    }
    let holders = leases::holders(transaction, id).await?;
    if !holders.is_empty() {
        return Err(DeleteError::InUse { id: id.clone(), holders });
    }
    match point.protected_until.filter(|until| *until > now) {
        Some(until) => Err(DeleteError::Protected { id: id.clone(), until }),
        None => Ok(()),
    }
}

/// Removes the files of a point whose record says `deleting`, and records that they are gone. Repeatable, and repeated by the
/// next start when it was cut.
///
/// # Errors
/// [`DeleteError::Files`] and the database's.
pub(crate) async fn finish(store: &Store, paths: &BackupPaths, id: &BackupId) -> Result<(), DeleteError> {
    let files = paths.clone();
    let point = id.clone();
    let removed = tokio::task::spawn_blocking(move || {
        directory::retire(&files)?;
        remove_remains(&files, &point)
    });
    let removed = removed.await.map_err(|_| DeleteError::Panicked)?;
    removed.map_err(|source| DeleteError::Files { id: id.clone(), source })?;
    let mut transaction = store.write().await?;
    let point = points::find(&mut transaction, id).await?.ok_or_else(|| DeleteError::NotFound(id.clone()))?;
    if point.state == PointState::Deleting {
        let by = asked_by(&mut transaction, id).await?;
        record_deleted_in(&mut transaction, &point, by).await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// Removes everything that is left of a point whose record says that it goes, or is gone: what was put aside, and what a merge
/// that was cut has left beside it. Blocks.
pub(crate) fn remove_remains(paths: &BackupPaths, id: &BackupId) -> io::Result<()> {
    if let Orphan::Foreign(reason) = merging::remove_orphaned(paths, id)? {
        let path = paths.merging.display();
        tracing::warn!(point = %id, %path, reason, "what looks like the rest of a merge is left alone");
    }
    directory::remove_retired(paths)
}

async fn record_deleted_in(transaction: &mut Connection, point: &PointRow, by: Actor) -> Result<(), StoreError> {
    points::set_state(transaction, &point.id, PointState::Deleted).await?;
    let data = event(point, PointState::Deleted, by);
    events::append(transaction, DELETED, point.id.as_str(), &data, by, UtcTime::now()).await?;
    Ok(())
}

fn event(point: &PointRow, state: PointState, by: Actor) -> Value {
    json!({
        "point_id": point.id, "vm_context_id": point.vm_id, "repository_id": point.repository_id, "state": state,
        "by": by.as_str(),
    })
}

/// Who wanted a point deleted, which may have been in an earlier process.
async fn asked_by(transaction: &mut Connection, id: &BackupId) -> Result<Actor, StoreError> {
    let told = events::about(transaction, id.as_str()).await?;
    let last = told.iter().rev().find(|(kind, _)| kind == DELETING);
    let by = last.and_then(|(_, data)| data["by"].as_str()?.parse().ok());
    Ok(by.unwrap_or(Actor::Service))
}
