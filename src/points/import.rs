//! Restore points that the database does not know, taken from their manifests: after a database was lost, after a repository was
//! moved to another hub, after a copy was put back.
//!
//! Parents come before their children, and each point is stored in one transaction or not at all. A point is taken only when it
//! can be restored as far as manifests and heads of images tell; what its images hold is for a verification to find.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;
use utoipa::ToSchema;

use super::digests::{DOCUMENT_BYTES_MAX, Digests};
use super::folder::{FolderError, on_disk};
use super::inspect::MANIFEST_BYTES_MAX;
use super::{Points, files};
use crate::digest::Digest;
use crate::export::coverage::Coverage;
use crate::id::{BackupId, RepositoryId};
use crate::repositories::Owned;
use crate::repository::layout::{DIGESTS, MANIFEST};
use crate::repository::manifest::{Manifest, ManifestDisk};
use crate::repository::survey::{self, Fault, PointFolder};
use crate::store::backups::{self, BackupDiskRow, BackupRow};
use crate::store::points::{self, NewPoint, PointDiskRow};
use crate::store::repositories::Repository;
use crate::store::vms::{self, RememberedVm, VmDisk};
use crate::store::{Connection, Store, StoreError};
use crate::words::point::{PointState, Trust};
use crate::words::{BackupType, DiskState, FailureCode, JobResult, JobState};

/// In place of the process start that ran the job: no process of this database did.
const BOOT_ID: &str = "imported";

/// The `effective_type` of an image that had no parent when its bytes came.
const RECEIVED_AS_FULL: &str = "full";

/// What an import did.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ImportReport {
    /// Where.
    #[schema(value_type = String)]
    pub repository_id: RepositoryId,
    /// The points that are known since then, in the order in which they were taken.
    #[schema(value_type = Vec<String>)]
    pub imported: Vec<BackupId>,
    /// How many folders are points that were known before.
    pub known: usize,
    /// The folders that were left alone, and why.
    pub skipped: Vec<Skipped>,
}

/// A folder that was left alone.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Skipped {
    /// Relative to the repository.
    pub path: String,
    /// Why, for people.
    pub reason: String,
}

/// What became of one folder.
enum Taken {
    Imported(Trust),
    Skipped(String),
}

impl Points {
    /// Imports what lies in a repository and is not known.
    ///
    /// # Errors
    /// There is no such repository, it cannot be used or looked at, or the database fails; points before that stay imported.
    pub async fn import(&self, id: &RepositoryId) -> Result<ImportReport, FolderError> {
        let (repository, owned) = self.own_and_tell(id).await?;
        // A sweep has just done the same.
        if let Owned::JustNow(report) = owned {
            return Ok(report);
        }
        let root = PathBuf::from(&repository.path);
        let survey = on_disk(&repository, move || survey::survey(&root)).await?;
        import(&self.shared.store, &repository, survey.points).await
    }
}

/// Imports those of these folders that are not known.
pub(crate) async fn import(
    store: &Store,
    repository: &Repository,
    folders: Vec<PointFolder>,
) -> Result<ImportReport, FolderError> {
    let mut report =
        ImportReport { repository_id: repository.id.clone(), imported: Vec::new(), known: 0, skipped: Vec::new() };
    let mut unknown = Vec::new();
    let mut connection = store.read().await?;
    for folder in folders {
        match recorded(&mut connection, &folder).await? {
            Recorded::No => unknown.push(folder),
            Recorded::Here => report.known += 1,
            Recorded::Otherwise(reason) => report.skipped.push(Skipped { path: folder.dir(), reason }),
        }
    }
    drop(connection);
    let (root, id) = (PathBuf::from(&repository.path), repository.id.clone());
    let read = on_disk(repository, move || {
        let read = unknown.into_iter().map(|folder| {
            let sound = survey::read(&root, &folder, &id).map(|manifest| {
                let digests = digests(&root.join(folder.dir()), &manifest);
                Sound { manifest, digests }
            });
            (folder, sound)
        });
        Ok(read.collect::<Vec<(PointFolder, Result<Sound, Fault>)>>())
    });
    let mut sound = Vec::new();
    for (folder, found) in read.await? {
        match found {
            Ok(found) => sound.push((folder, found)),
            Err(fault) => report.skipped.push(Skipped { path: folder.dir(), reason: fault.to_string() }),
        }
    }
    for (folder, sound) in parents_first(sound) {
        match take(store, repository, &folder, &sound).await? {
            Taken::Imported(trust) => {
                tracing::info!(point = %folder.id, repository = %repository.id, %trust, "restore point imported");
                report.imported.push(folder.id);
            }
            Taken::Skipped(reason) => report.skipped.push(Skipped { path: folder.dir(), reason }),
        }
    }
    for Skipped { path, reason } in &report.skipped {
        tracing::warn!(repository = %repository.id, path, reason, "a folder was not imported");
    }
    Ok(report)
}

/// A point that can be restored, as far as heads and lengths tell.
struct Sound {
    manifest: Manifest,
    /// What its files and disks hashed to, where that is told of just these.
    digests: Option<Digests>,
}

/// The document of digests beside a manifest, where it is that of this state of the point: a restore is held against it at once, and
/// not only when somebody has verified the point anew.
fn digests(folder: &Path, manifest: &Manifest) -> Option<Digests> {
    let read = |name: &str, bytes_max| files::read(&folder.join(name), bytes_max).ok().flatten();
    let digests = Digests::decode(&read(DIGESTS, DOCUMENT_BYTES_MAX)?).ok()?;
    let is_of = |name: &str, bytes: u64| digests.file(name).is_some_and(|file| file.bytes == bytes);
    let is_here = digests.point_id == manifest.backup_id
        && digests.file(MANIFEST)?.blake3 == Digest::of(&read(MANIFEST, MANIFEST_BYTES_MAX)?)
        && manifest.disks.iter().all(|disk| {
            is_of(&disk.file, disk.file_bytes)
                && digests.disk(disk.disk_id).is_some_and(|known| known.size_bytes == disk.size_bytes)
        });
    is_here.then_some(digests)
}

/// What the database says of a folder.
enum Recorded {
    No,
    Here,
    Otherwise(String),
}

async fn recorded(connection: &mut Connection, folder: &PointFolder) -> Result<Recorded, StoreError> {
    if let Some(point) = points::find(connection, &folder.id).await? {
        return Ok(match point.state {
            _ if point.dir != folder.dir() => Recorded::Otherwise(format!("the point is recorded at {}", point.dir)),
            PointState::Deleted => Recorded::Otherwise("the point was deleted".to_owned()),
            PointState::Committed | PointState::Missing | PointState::Deleting => Recorded::Here,
        });
    }
    Ok(match backups::find(connection, &folder.id).await? {
        Some(backup) => Recorded::Otherwise(format!("the backup is recorded as {}", backup.state)),
        None => Recorded::No,
    })
}

/// Each point after those that it builds upon, else in the order of their commits. Points in a circle come in some order.
fn parents_first(mut points: Vec<(PointFolder, Sound)>) -> Vec<(PointFolder, Sound)> {
    points.sort_by(|(_, Sound { manifest: one, .. }), (_, Sound { manifest: other, .. })| {
        (one.committed_at, &one.backup_id).cmp(&(other.committed_at, &other.backup_id))
    });
    let places: BTreeMap<BackupId, usize> =
        points.iter().enumerate().map(|(place, (folder, _))| (folder.id.clone(), place)).collect();
    let (mut order, mut seen) = (Vec::with_capacity(points.len()), BTreeSet::new());
    for place in 0..points.len() {
        let mut path = vec![(place, false)];
        while let Some((place, done)) = path.pop() {
            if done {
                order.push(place);
            } else if seen.insert(place) {
                path.push((place, true));
                let disks = points.get(place).map(|(_, sound)| sound.manifest.disks.as_slice()).unwrap_or_default();
                let parents = disks.iter().filter_map(|disk| places.get(disk.parent_id.as_ref()?));
                path.extend(parents.map(|&parent| (parent, false)));
            }
        }
    }
    let mut points: Vec<_> = points.into_iter().map(Some).collect();
    order.into_iter().filter_map(|place| points.get_mut(place)?.take()).collect()
}

/// Stores one point, with its job and its VM.
async fn take(
    store: &Store,
    repository: &Repository,
    folder: &PointFolder,
    Sound { manifest, digests }: &Sound,
) -> Result<Taken, FolderError> {
    // The pieces of a disk may be many: they are put together before all other writers have to wait.
    let coverages: Vec<Coverage> = manifest.disks.iter().map(coverage).collect();
    let whole = manifest.disks.iter().zip(&coverages).all(|(disk, coverage)| is_whole(manifest, disk, coverage));
    let (backup, backup_disks) = job(manifest, &coverages, whole);
    let remembered: Vec<VmDisk> = manifest.disks.iter().map(vm_disk).collect();
    let mut transaction = store.write().await?;
    // Somebody may have been faster.
    if !matches!(recorded(&mut transaction, folder).await?, Recorded::No) {
        return Ok(Taken::Skipped("it is recorded meanwhile".to_owned()));
    }
    let mut trust = if whole { Trust::Unverified } else { Trust::Suspect };
    let mut disks = Vec::with_capacity(manifest.disks.len());
    for disk in &manifest.disks {
        let mut chain_depth = 1;
        if let Some(parent) = &disk.parent_id {
            match below(&mut transaction, folder, disk, parent).await? {
                Ok((depth, parent_trust)) => {
                    chain_depth = depth.saturating_add(1);
                    if matches!(parent_trust, Trust::Suspect | Trust::Corrupt) {
                        trust = Trust::Suspect;
                    }
                }
                Err(reason) => return Ok(Taken::Skipped(reason)),
            }
        }
        let (file, content) = match digests {
            Some(digests) => (digests.file(&disk.file), digests.disk(disk.disk_id)),
            None => (None, None),
        };
        disks.push(PointDiskRow {
            chain_depth,
            digest: file.map(|file| file.blake3.to_string()),
            content_digest: content.map(|disk| disk.content.to_string()),
            ..crate::backup::point_disk(disk)
        });
    }
    let vm = &manifest.vm;
    let vm = RememberedVm {
        id: &vm.id,
        name: &vm.name,
        vcenter: &vm.vcenter,
        path: &vm.path,
        uuid: vm.uuid.as_deref(),
        dir: &folder.vm_directory,
        disks: &remembered,
    };
    match vms::remember(&mut transaction, &vm).await {
        Ok(dir) if dir == folder.vm_directory => {}
        Ok(dir) => return Ok(Taken::Skipped(format!("the folder of VM {} is {dir}", vm.id))),
        Err(StoreError::Exists(_)) => {
            return Ok(Taken::Skipped(format!("{} is the folder of another VM", folder.vm_directory)));
        }
        Err(error) => return Err(error.into()),
    }
    backups::insert_committed(&mut transaction, &backup, &backup_disks).await?;
    let point = NewPoint {
        id: &folder.id,
        vm_id: &manifest.vm.id,
        repository_id: &repository.id,
        dir: &folder.dir(),
        trust,
        committed_at: manifest.committed_at,
        generation: manifest.generation,
        disks: &disks,
    };
    points::insert(&mut transaction, &point).await?;
    transaction.commit().await?;
    Ok(Taken::Imported(trust))
}

/// The depth and the trust of what a disk builds upon, or why it cannot be restored.
pub(super) async fn below(
    connection: &mut Connection,
    folder: &PointFolder,
    disk: &ManifestDisk,
    parent: &BackupId,
) -> Result<Result<(u32, Trust), String>, StoreError> {
    let beside = PointFolder { id: parent.clone(), vm_directory: folder.vm_directory.clone() }.dir();
    let Some(point) = points::find(connection, parent).await?.filter(|point| point.dir == beside) else {
        return Ok(Err(format!("disk {} builds upon {parent}, which is not here", disk.disk_id)));
    };
    if point.state != PointState::Committed {
        return Ok(Err(format!("disk {} builds upon {parent}, which is {}", disk.disk_id, point.state)));
    }
    let disks = points::disks(connection, parent).await?;
    let same = disks.iter().find(|below| below.disk_id == disk.disk_id && below.size_bytes == disk.size_bytes);
    Ok(match same {
        Some(below) => Ok((below.chain_depth, point.trust)),
        None => Err(format!("disk {} builds upon {parent}, which has no such disk", disk.disk_id)),
    })
}

/// Whether an image has every byte that it should: a full one received the whole disk, unless a merge made it of an incremental and
/// all below it. Its coverage is still that of the incremental then; a merge takes no chain that lacks something.
fn is_whole(manifest: &Manifest, disk: &ManifestDisk, coverage: &Coverage) -> bool {
    let made_of_incremental = manifest.generation > 0 && disk.effective_type != RECEIVED_AS_FULL;
    disk.backup_type == BackupType::Incremental || made_of_incremental || coverage.is_whole(disk.size_bytes)
}

fn coverage(disk: &ManifestDisk) -> Coverage {
    let mut coverage = Coverage::new();
    for &(offset, length) in &disk.coverage {
        coverage.add(offset, length);
    }
    coverage
}

fn vm_disk(disk: &ManifestDisk) -> VmDisk {
    VmDisk {
        disk_id: disk.disk_id,
        device_key: disk.device_key,
        unit_number: None,
        vmdk_uuid: disk.vmdk_uuid.clone(),
        vmdk_path: disk.vmdk_path.clone(),
        size_bytes: disk.size_bytes,
        present: false,
    }
}

/// The job that made the point, as far as its manifest tells.
fn job(manifest: &Manifest, coverages: &[Coverage], whole: bool) -> (BackupRow, Vec<BackupDiskRow>) {
    let mut warnings = vec!["imported: recorded from the manifest of the restore point".to_owned()];
    if !whole {
        warnings
            .push(format!("{}: a full image did not receive every byte of its disk", FailureCode::CoverageIncomplete));
    }
    let backup = BackupRow {
        id: manifest.backup_id.clone(),
        vm_id: manifest.vm.id.clone(),
        repository_id: manifest.repository_id.clone(),
        vm_name: manifest.vm.name.clone(),
        requested_type: manifest.requested_type,
        backup_type: manifest.backup_type,
        state: JobState::Committed,
        result: if whole { JobResult::Success } else { JobResult::Warning },
        code: None,
        message: None,
        node_outcome: None,
        boot_id: BOOT_ID.to_owned(),
        policy_id: None,
        tags: manifest.tags.clone(),
        warnings,
        created_at: manifest.created_at,
        started_at: None,
        completed_at: Some(manifest.committed_at),
    };
    let disks = manifest.disks.iter().zip(coverages).map(|(disk, coverage)| BackupDiskRow {
        disk_id: disk.disk_id,
        device_key: disk.device_key,
        vmdk_uuid: disk.vmdk_uuid.clone(),
        vmdk_path: disk.vmdk_path.clone(),
        size_bytes: disk.size_bytes,
        backup_type: disk.backup_type,
        effective_type: Some(disk.effective_type.clone()),
        reason: disk.reason,
        parent_id: disk.parent_id.clone(),
        from_change_id: disk.from_change_id.clone(),
        change_id: disk.change_id.clone(),
        port: None,
        export_name: None,
        state: DiskState::Sealed,
        error_message: None,
        covered_bytes: coverage.covered_bytes(),
        written_bytes: disk.written_bytes,
        zeroed_bytes: disk.zeroed_bytes,
        zeroed_over_data_bytes: disk.zeroed_over_data_bytes,
        identical_bytes: disk.identical_bytes,
        sealed_at: Some(manifest.committed_at),
    });
    (backup, disks.collect())
}
