//! Holding a repository against its records when a process starts: what is there without a record, and what is recorded
//! without being there. Nothing is deleted: a stray staged directory is put aside under another name for a person to see.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Shared;
use super::recover::RecoverError;
use crate::id::BackupId;
use crate::points::merge;
use crate::points::state::PointState;
use crate::repository::layout;
use crate::store::points;
use crate::store::repositories::Repository;

/// What a look into a repository found.
#[derive(Debug, Default)]
struct Found {
    /// Published directories, by id.
    published: BTreeSet<BackupId>,
    /// Staged directories of jobs that no process runs.
    strays: Vec<PathBuf>,
}

/// Sweeps one repository that this process owns.
pub(super) async fn sweep(shared: &Arc<Shared>, repository: &Repository) -> Result<(), RecoverError> {
    merge::recover(&shared.store, repository).await?;
    let root = PathBuf::from(&repository.path);
    let looked = tokio::task::spawn_blocking(move || {
        let found = look(&root)?;
        found.strays.iter().for_each(|stray| put_aside(stray));
        Ok::<Found, io::Error>(found)
    });
    let found = match looked.await.map_err(|_| RecoverError::Panicked)? {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(repository = %repository.id, %error, "a repository cannot be looked at now");
            return Ok(());
        }
    };
    let mut transaction = shared.store.write().await?;
    let recorded = points::all_in(&mut transaction, &repository.id).await?;
    for point in &recorded {
        let state = match (point.state, found.published.contains(&point.id)) {
            (PointState::Committed, false) => PointState::Missing,
            (PointState::Missing, true) => PointState::Committed,
            _ => continue,
        };
        tracing::warn!(point = %point.id, repository = %repository.id, %state, "the directory of a restore point");
        points::set_state(&mut transaction, &point.id, state).await?;
    }
    transaction.commit().await?;
    let recorded: BTreeSet<&BackupId> = recorded.iter().map(|point| &point.id).collect();
    for id in found.published.iter().filter(|id| !recorded.contains(id)) {
        tracing::warn!(point = %id, repository = %repository.id, "a published directory has no record and is left alone");
    }
    Ok(())
}

/// Lists what jobs have made. A folder that cannot be read ends the look: half a look would call points missing.
fn look(root: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    for vm in fs::read_dir(root)? {
        let vm = vm?;
        if !vm.file_type()?.is_dir() {
            continue;
        }
        for entry in fs::read_dir(vm.path())? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Ok(id) = name.parse() {
                found.published.insert(id);
            } else if layout::staged_backup_id(name).is_some_and(|id| id.parse::<BackupId>().is_ok()) {
                found.strays.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// Jobs that were running have been ended before, with their staged data; whatever is left belongs to nobody.
fn put_aside(stray: &Path) {
    let aside = stray.with_extension(layout::QUARANTINE_EXTENSION);
    match fs::rename(stray, &aside) {
        Ok(()) => tracing::warn!(path = %aside.display(), "staged data of an unknown job was put aside"),
        Err(error) => tracing::error!(path = %stray.display(), %error, "staged data of an unknown job is in the way"),
    }
}
