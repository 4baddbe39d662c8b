//! What a merge that was cut has left, told from the names of folders and the generations in their manifests: the record follows
//! what is published, and what lies beside it goes when it is proven to be ours and needless.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::id::BackupId;
use crate::points::folder::{FolderError, on_disk};
use crate::points::paths;
use crate::points::state::PointState;
use crate::repository::directory;
use crate::repository::layout::{self, BackupPaths};
use crate::repository::manifest::Manifest;
use crate::repository::merging::{self, Remains};
use crate::store::points::{self, MergedDisk, PointRow};
use crate::store::repositories::Repository;
use crate::store::{Store, StoreError};

/// Clears up a repository that this process owns, before anything else looks at its points.
pub(crate) async fn recover(store: &Store, repository: &Repository) -> Result<(), FolderError> {
    let mut connection = store.read().await?;
    let recorded = points::all_in(&mut connection, &repository.id).await?;
    let images = points::images_in(&mut connection, &repository.id).await?;
    drop(connection);
    let recorded: BTreeMap<BackupId, PointRow> = recorded.into_iter().map(|point| (point.id.clone(), point)).collect();
    let folders: BTreeMap<BackupId, BackupPaths> =
        recorded.iter().map(|(id, point)| (id.clone(), paths(repository, point))).collect();
    let root = PathBuf::from(&repository.path);
    let looked = on_disk(repository, move || {
        let left = look(&root)?;
        Ok((left, changed(&folders, &images)))
    });
    let (left, changed) = looked.await?;
    for (id, path) in left {
        match recorded.get(&id) {
            // It goes with its point.
            Some(point) if point.state == PointState::Deleting => {}
            Some(point) if paths(repository, point).merging == path => {
                settle(store, &paths(repository, point), point).await?;
            }
            // Of a deleted point, or of one that is imported next, or of nobody: looked at when that is done.
            _ => {}
        }
    }
    for manifest in changed {
        if manifest.repository_id == repository.id && follow(store, &manifest).await? {
            tracing::warn!(point = %manifest.backup_id, "the record of a merged point was older than its files");
        }
    }
    Ok(())
}

/// Clears up beside a point that was just imported, whose files nobody relies on yet.
pub(crate) async fn recover_imported(store: &Store, repository: &Repository, id: &BackupId) -> Result<(), StoreError> {
    let point = points::find(&mut *store.read().await?, id).await?;
    if let Some(point) = point.filter(|point| point.repository_id == repository.id) {
        settle(store, &paths(repository, &point), &point).await?;
    }
    Ok(())
}

/// What became of the rest of a merge that was cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// Nothing is left of it, or there was none.
    Clear,
    /// It is not proven to be needless, or could not be removed, and why.
    LeftAlone(String),
}

/// Clears up after a merge of one point that was cut; nothing to do when there was none.
pub(super) async fn settle(store: &Store, paths: &BackupPaths, point: &PointRow) -> Result<Settled, StoreError> {
    let (beside, id) = (paths.clone(), point.id.clone());
    let judged = tokio::task::spawn_blocking(move || {
        let is_there = beside.merging.exists() || merging::probe(&beside).exists();
        is_there.then(|| {
            let remains = merging::judge(&beside, &id);
            // An exchange that can be seen may still be lost; nothing may rely on it, and nothing go, before it is durable.
            match (directory::sync_published(&beside), remains) {
                (Err(error), Remains::Needless(_)) => Remains::Unclear(error.to_string()),
                (_, remains) => remains,
            }
        })
    });
    let path = paths.merging.display();
    let manifest = match judged.await {
        Ok(Some(Remains::Needless(manifest))) => manifest,
        Ok(Some(Remains::Unclear(reason))) => {
            tracing::error!(point = %point.id, %path, reason, "what a merge left is left alone");
            return Ok(Settled::LeftAlone(reason));
        }
        Ok(None) => return Ok(Settled::Clear),
        Err(_) => return Ok(Settled::LeftAlone("looking at it ended by a panic".to_owned())),
    };
    let lives = matches!(point.state, PointState::Committed | PointState::Missing);
    if !lives || manifest.repository_id != point.repository_id {
        tracing::warn!(point = %point.id, state = %point.state, %path, "what a merge left is left alone");
        return Ok(Settled::LeftAlone(format!("the point is {} or of another repository", point.state)));
    }
    let followed = follow(store, &manifest).await?;
    let beside = paths.clone();
    match tokio::task::spawn_blocking(move || merging::remove_merging(&beside)).await {
        Ok(Ok(())) => {
            tracing::warn!(point = %point.id, followed, generation = manifest.generation, "a merge that was cut is cleared up");
            Ok(Settled::Clear)
        }
        Ok(Err(error)) => {
            tracing::error!(%path, %error, "what a merge left could not be removed");
            Ok(Settled::LeftAlone(error.to_string()))
        }
        Err(_) => Ok(Settled::LeftAlone("removing it ended by a panic".to_owned())),
    }
}

/// Brings the record of a point that was merged to its published manifest; whether there was anything to do.
pub(super) async fn follow(store: &Store, manifest: &Manifest) -> Result<bool, StoreError> {
    if manifest.generation == 0 {
        return Ok(false);
    }
    let wanted: Vec<MergedDisk> = manifest
        .disks
        .iter()
        .map(|disk| MergedDisk {
            disk_id: disk.disk_id,
            backup_type: disk.backup_type,
            file_bytes: disk.file_bytes,
            parent_id: disk.parent_id.clone(),
            from_change_id: disk.from_change_id.clone(),
        })
        .collect();
    let mut transaction = store.write().await?;
    let recorded: Vec<MergedDisk> = points::disks(&mut transaction, &manifest.backup_id)
        .await?
        .into_iter()
        .map(|row| MergedDisk {
            disk_id: row.disk_id,
            backup_type: row.backup_type,
            file_bytes: row.file_bytes,
            parent_id: row.parent_id,
            from_change_id: row.from_change_id,
        })
        .collect();
    if recorded == wanted {
        return Ok(false);
    }
    let (id, generation, merged) = (&manifest.backup_id, manifest.generation, &manifest.merged);
    points::record_merge(&mut transaction, id, generation, merged, &wanted).await?;
    transaction.commit().await?;
    Ok(true)
}

/// The folders of merges, by point. A folder that cannot be read ends the look.
fn look(root: &Path) -> io::Result<Vec<(BackupId, PathBuf)>> {
    let mut left = Vec::new();
    for vm in fs::read_dir(root)? {
        let vm = vm?;
        if !vm.file_type()?.is_dir() {
            continue;
        }
        for entry in fs::read_dir(vm.path())? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            // A try of the exchange that was cut has left at most two empty folders.
            let name = name.strip_suffix(merging::PROBE_SUFFIX).unwrap_or(name);
            if let Some(Ok(id)) = layout::merging_backup_id(name).map(str::parse) {
                left.push((id, vm.path().join(name)));
            }
        }
    }
    left.sort();
    left.dedup();
    Ok(left)
}

/// The manifests of merged points whose files have not the lengths that are recorded: a database that is older than a merge.
/// Manifests are read for those alone; there may be many points.
fn changed(folders: &BTreeMap<BackupId, BackupPaths>, images: &[(BackupId, String, u64)]) -> Vec<Manifest> {
    let differs = |(id, file, recorded): &&(BackupId, String, u64)| {
        let length = folders.get(id).map(|paths| directory::file_bytes(&paths.published.join(file)));
        matches!(length, Some(Ok(length)) if length != *recorded)
    };
    let points: BTreeSet<&BackupId> = images.iter().filter(differs).map(|(id, ..)| id).collect();
    let manifests = points.into_iter().filter_map(|id| directory::load(&folders.get(id)?.published, id).ok());
    manifests.filter(|manifest| manifest.generation > 0).collect()
}
