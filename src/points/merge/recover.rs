//! What a merge that was cut has left, told from the names of folders and the generations in their manifests: the record follows
//! what is published, and what lies beside it goes when it is proven to be ours and needless.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::id::{BackupId, RepositoryId};
use crate::points::folder::{FolderError, on_disk};
use crate::points::settle::is_there;
use crate::points::{import, paths};
use crate::repository::directory;
use crate::repository::layout::{self, BackupPaths};
use crate::repository::manifest::{Manifest, ManifestDisk};
use crate::repository::merging::{self, Remains};
use crate::repository::survey::{self, Fault, PointFolder};
use crate::store::points::{self, MergedDisk, PointDiskRow, PointRow};
use crate::store::repositories::Repository;
use crate::store::{Connection, Store, StoreError};
use crate::words::point::PointState;

/// Clears up a repository that this process owns, before anything else looks at its points.
pub(crate) async fn recover(store: &Store, repository: &Repository) -> Result<(), FolderError> {
    let mut connection = store.read().await?;
    let recorded = points::all_in(&mut connection, &repository.id).await?;
    drop(connection);
    let recorded: BTreeMap<BackupId, PointRow> = recorded.into_iter().map(|point| (point.id.clone(), point)).collect();
    let there = recorded.values().filter(|point| is_there(point.state));
    let known: Vec<(String, u32)> = there.map(|point| (point.dir.clone(), point.generation)).collect();
    let (root, id) = (PathBuf::from(&repository.path), repository.id.clone());
    let looked = on_disk(repository, move || {
        let left = look(&root)?;
        Ok((left, changed(&root, known, &id)))
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
    // In the order of their commits: what is below is right before what stands upon it.
    let mut changed: Vec<(&PointRow, Result<Manifest, Fault>)> =
        changed.into_iter().filter_map(|(folder, read)| Some((recorded.get(&folder.id)?, read))).collect();
    changed.sort_by_key(|(point, _)| point.sequence);
    for (point, read) in changed {
        let adopted = match read {
            Ok(manifest) => adopt(store, &manifest).await?,
            Err(fault) => Err(fault.to_string()),
        };
        match adopted {
            Ok(Some(generation)) => {
                let was = point.generation;
                tracing::warn!(point = %point.id, was, generation, "a record follows files of another time");
            }
            Ok(None) => {}
            Err(reason) => {
                tracing::error!(point = %point.id, reason, "files of another time than their record cannot be followed");
            }
        }
    }
    Ok(())
}

/// Brings a record to files that were made anew before or after it was written, as with a database or a folder that was put back:
/// they are the point, if it can be restored from them. The generation that it has now, nothing when it had that already, or why
/// it stays as it is.
async fn adopt(store: &Store, manifest: &Manifest) -> Result<Result<Option<u32>, String>, StoreError> {
    let mut transaction = store.write().await?;
    let point = points::find(&mut transaction, &manifest.backup_id).await?;
    // Its rest was settled a moment ago, and its record with that.
    let Some(point) = point.filter(|point| point.generation != manifest.generation) else { return Ok(Ok(None)) };
    let disks = points::disks(&mut transaction, &point.id).await?;
    let same = |(row, told): (&PointDiskRow, &ManifestDisk)| {
        (row.disk_id, row.device_key, row.size_bytes, &row.change_id)
            == (told.disk_id, told.device_key, told.size_bytes, &told.change_id)
    };
    if manifest.vm.id != point.vm_id
        || disks.len() != manifest.disks.len()
        || !disks.iter().zip(&manifest.disks).all(same)
    {
        return Ok(Err("the manifest has another VM or other disks than the record".to_owned()));
    }
    let Some(folder) = PointFolder::of_dir(&point.dir) else {
        return Ok(Err("its folder has no name of ours".to_owned()));
    };
    for disk in &manifest.disks {
        if let Some(parent) = &disk.parent_id
            && let Err(reason) = import::below(&mut transaction, &folder, disk, parent).await?
        {
            return Ok(Err(reason));
        }
    }
    record(&mut transaction, manifest).await?;
    transaction.commit().await?;
    Ok(Ok(Some(manifest.generation)))
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
    let mut transaction = store.write().await?;
    let point = points::find(&mut transaction, &manifest.backup_id).await?;
    if point.is_none_or(|point| point.generation == manifest.generation) {
        return Ok(false);
    }
    record(&mut transaction, manifest).await?;
    transaction.commit().await?;
    Ok(true)
}

async fn record(transaction: &mut Connection, manifest: &Manifest) -> Result<(), StoreError> {
    let disks = manifest.disks.iter().map(|disk| MergedDisk {
        disk_id: disk.disk_id,
        backup_type: disk.backup_type,
        file_bytes: disk.file_bytes,
        parent_id: disk.parent_id.clone(),
        from_change_id: disk.from_change_id.clone(),
    });
    let disks: Vec<MergedDisk> = disks.collect();
    points::record_merge(transaction, &manifest.backup_id, manifest.generation, &manifest.merged, &disks).await
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

/// The recorded points whose manifests have another generation than their records (folder and generation), each with its whole
/// manifest where that and the heads of the images agree. Lengths tell nothing: images that are made anew may have those of the
/// old ones.
fn changed(
    root: &Path,
    known: Vec<(String, u32)>,
    repository: &RepositoryId,
) -> Vec<(PointFolder, Result<Manifest, Fault>)> {
    let folders = known.into_iter().filter(|(dir, recorded)| {
        // What cannot be read is not there, or damaged, which is found in other ways.
        Manifest::read_generation(&root.join(dir)).is_ok_and(|generation| generation != *recorded)
    });
    let folders = folders.filter_map(|(dir, _)| PointFolder::of_dir(&dir));
    folders
        .map(|folder| {
            let manifest = survey::read(root, &folder, repository);
            (folder, manifest)
        })
        .collect()
}
