//! Holding a repository against its records when a process begins to use it: what is there without a record is imported, and what is
//! recorded without being there is noted as missing. Nothing is deleted but what the records say is being deleted: that is
//! finished, and what a job staged that is over, by its record, goes as at its end. A stray staged directory is put aside under
//! another name for a person to see.

use std::fs;
use std::path::{Path, PathBuf};

use super::undo::Leftovers;
use crate::config::KeepFailed;
use crate::id::BackupId;
use crate::points::folder::{FolderError, on_disk};
use crate::points::import::ImportReport;
use crate::points::{delete, import, merge};
use crate::repository::layout::{self, BackupPaths};
use crate::repository::merging;
use crate::repository::survey::{self, Other, OtherKind, Presence};
use crate::store::points::PointRow;
use crate::store::repositories::Repository;
use crate::store::{Store, StoreError, backups, points};
use crate::words::JobState;
use crate::words::point::PointState;

/// What becomes of a staged directory.
enum Stray {
    /// Its job is over: as at its end.
    Over(Box<BackupPaths>, Leftovers),
    /// Its job is not.
    Awaited,
    /// No record tells whose it is.
    Unknown(PathBuf),
}

/// Sweeps one repository whose lock this process has, before anything else uses it. Repeatable.
pub(crate) async fn sweep(
    store: &Store,
    keep_failed: KeepFailed,
    repository: &Repository,
) -> Result<ImportReport, FolderError> {
    merge::recover(store, repository).await?;
    let mut connection = store.read().await?;
    let recorded = points::all_in(&mut connection, &repository.id).await?;
    let files = points::files_in(&mut connection, &repository.id).await?;
    drop(connection);
    let root = PathBuf::from(&repository.path);
    let dirs: Vec<(BackupId, String)> = recorded.iter().map(|point| (point.id.clone(), point.dir.clone())).collect();
    let surveyed = root.clone();
    let found = on_disk(repository, move || survey::survey(&surveyed)).await?;
    let mut strays = Vec::new();
    for other in found.others.iter().filter(|other| other.kind == OtherKind::Staged) {
        strays.push(judge(store, keep_failed, repository, other).await?);
    }
    let presence = on_disk(repository, move || {
        strays.into_iter().for_each(clear);
        survey::presences(&root, dirs, &files)
    });
    let presence = presence.await?;
    let mut transaction = store.write().await?;
    for point in &recorded {
        let state = match (point.state, presence.get(&point.id)) {
            (PointState::Committed, Some(Presence::Gone(_))) => PointState::Missing,
            (PointState::Missing, Some(Presence::There)) => PointState::Committed,
            _ => continue,
        };
        tracing::warn!(point = %point.id, repository = %repository.id, %state, "the files of a restore point");
        points::set_presence(&mut transaction, point, state).await?;
    }
    transaction.commit().await?;
    let report = import::import(store, repository, found.points).await?;
    let merged = found.others.iter().filter(|other| other.kind == OtherKind::Merging);
    for id in merged.filter_map(|other| other.id.as_ref()).filter(|id| report.imported.contains(id)) {
        merge::recover_imported(store, repository, id).await?;
    }
    finish_removals(store, repository, &recorded, &found.others).await?;
    if !report.imported.is_empty() {
        tracing::warn!(repository = %repository.id, points = report.imported.len(), "restore points without a record");
    }
    Ok(report)
}

/// Removes what is left of points that were being deleted when the last process ended, wherever that was cut, with what merges have
/// left of them. A folder that only looks like one of them is left alone.
async fn finish_removals(
    store: &Store,
    repository: &Repository,
    recorded: &[PointRow],
    others: &[Other],
) -> Result<(), StoreError> {
    for point in recorded.iter().filter(|point| point.state == PointState::Deleting) {
        tracing::warn!(point = %point.id, repository = %repository.id, "finishing the deletion of a restore point");
        let paths = crate::points::paths(repository, point);
        if let Err(error) = delete::finish(store, &paths, &point.id).await {
            // It is listed as being deleted, and whoever deletes it again tries again.
            tracing::error!(point = %point.id, %error, "the deletion of a restore point could not be finished");
        }
    }
    let left = others.iter().filter(|other| matches!(other.kind, OtherKind::Deleting | OtherKind::Merging));
    for other in left {
        let Some(id) = &other.id else { continue };
        let path = Path::new(&repository.path).join(&other.path);
        let point = points::find(&mut *store.read().await?, id).await?;
        let recorded = point.filter(|point| point.repository_id == repository.id);
        match recorded.map(|point| (point.state, crate::points::paths(repository, &point))) {
            // It was away when the deletion was finished.
            Some((PointState::Deleted, paths)) if is_beside(&path, &paths) => {
                let point = id.clone();
                let removed = tokio::task::spawn_blocking(move || delete::remove_remains(&paths, &point)).await;
                if !matches!(removed, Ok(Ok(()))) {
                    tracing::error!(point = %id, ?removed, "what is left of a deleted restore point is in the way");
                }
            }
            // Told of where it could not be finished.
            Some((PointState::Deleting, paths)) if is_beside(&path, &paths) => {}
            Some((PointState::Committed | PointState::Missing, paths))
                if other.kind == OtherKind::Merging && is_beside(&path, &paths) => {}
            _ if other.kind == OtherKind::Merging => {
                tracing::warn!(path = %path.display(), "what a merge of an unknown point left is left alone");
            }
            _ => tracing::warn!(path = %path.display(), "a folder of a deletion that nobody recorded is left alone"),
        }
    }
    Ok(())
}

/// Whether this is where a deletion or a merge of the point with these paths leaves something.
fn is_beside(path: &Path, paths: &BackupPaths) -> bool {
    path == paths.deleting || path == paths.merging || path == merging::probe(paths)
}

/// Whose a staged directory is.
async fn judge(
    store: &Store,
    keep_failed: KeepFailed,
    repository: &Repository,
    other: &Other,
) -> Result<Stray, StoreError> {
    let (root, mut connection) = (Path::new(&repository.path), store.read().await?);
    let path = root.join(&other.path);
    let Some(id) = &other.id else { return Ok(Stray::Unknown(path)) };
    let row = backups::find(&mut connection, id).await?.filter(|row| row.repository_id == repository.id);
    let Some(row) = row else { return Ok(Stray::Unknown(path)) };
    let Some(directory) = backups::directory_of(&mut connection, &row.vm_id).await? else {
        return Ok(Stray::Unknown(path));
    };
    let paths = BackupPaths::new(root, &directory, id.as_str());
    Ok(match row.state {
        _ if paths.staged != path => Stray::Unknown(path),
        JobState::Failed | JobState::Cancelled => Stray::Over(Box::new(paths), Leftovers::of_ended(&row, keep_failed)),
        JobState::Committed => Stray::Unknown(path),
        _ => Stray::Awaited,
    })
}

fn clear(stray: Stray) {
    match stray {
        Stray::Over(paths, leftovers) => match leftovers.clear(&paths) {
            Ok(()) => {
                tracing::warn!(path = %paths.staged.display(), "what a job had staged that is over is cleared up")
            }
            Err(error) => {
                tracing::error!(path = %paths.staged.display(), %error, "staged data could not be removed yet");
            }
        },
        Stray::Awaited => {}
        Stray::Unknown(path) => put_aside(&path),
    }
}

/// What belongs to nobody is for a person to look at.
fn put_aside(stray: &Path) {
    let aside = stray.with_extension(layout::QUARANTINE_EXTENSION);
    match fs::rename(stray, &aside) {
        Ok(()) => tracing::warn!(path = %aside.display(), "staged data of an unknown job was put aside"),
        Err(error) => tracing::error!(path = %stray.display(), %error, "staged data of an unknown job is in the way"),
    }
}
