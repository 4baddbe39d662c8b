//! Opening a disk of a committed point: pinned in the transaction that sees it committed, then read-only, with all below it.
//!
//! What can be known without reading the disk is looked at here: trust, the presence and length of each file, that the top
//! opens, is closed and of the right size. Damage beyond that is for a verification to find, or for the read that meets it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockyard_qcow2 as qcow2;

use super::{Damage, RestoreError, Shared};
use crate::id::{BackupId, ExportId};
use crate::points::state::{PointState, Trust};
use crate::repository::layout::BackupPaths;
use crate::repository::{directory, layout};
use crate::store::points::{self, ChainImage, PointDiskRow};
use crate::store::repositories;
use crate::store::{Connection, WriteTransaction, backups, leases};

/// Memory for the tables of the top image; each below has half of that above it. A guess: 16 MiB map 128 GiB of disk.
const CACHE_BYTES: usize = 16 << 20;
/// How often, and how long apart, a chain is looked at that is being made anew at this moment.
const LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// A disk that was found, and is pinned once its transaction is committed.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) point_id: BackupId,
    pub(super) disk: PointDiskRow,
    pub(super) export_name: String,
    /// What the caller should know.
    pub(super) warnings: Vec<String>,
    repository: PathBuf,
    /// Where a merge of the point would be at work.
    merging: PathBuf,
    chain: Vec<ChainImage>,
}

/// Looks a disk up and pins its chain for `owner`.
///
/// # Errors
/// It is not there, or not fit; nothing was pinned that the end of the transaction does not undo.
pub(super) async fn pin(
    transaction: &mut WriteTransaction,
    shared: &Shared,
    owner: &ExportId,
    point_id: &BackupId,
    disk_id: u32,
    damage: Damage,
) -> Result<Found, RestoreError> {
    let found = find(transaction, point_id, disk_id, damage).await?;
    leases::pin_chain(transaction, point_id, owner.as_str(), &shared.boot_id).await?;
    Ok(found)
}

async fn find(
    connection: &mut Connection,
    point_id: &BackupId,
    disk_id: u32,
    damage: Damage,
) -> Result<Found, RestoreError> {
    let not_found = || RestoreError::PointNotFound(point_id.clone());
    let point = points::find(connection, point_id).await?.ok_or_else(not_found)?;
    match point.state {
        PointState::Committed => {}
        PointState::Missing => return Err(RestoreError::FilesMissing(point_id.clone())),
        PointState::Deleting | PointState::Deleted => return Err(not_found()),
    }
    let repository = repositories::find(connection, &point.repository_id).await?.ok_or_else(not_found)?;
    let disk = points::disks(connection, point_id).await?.into_iter().find(|disk| disk.disk_id == disk_id);
    let disk = disk.ok_or_else(|| RestoreError::NoSuchDisk { point_id: point_id.clone(), disk_id })?;
    let chain = points::chain(connection, point_id, disk_id).await?;
    if chain.iter().any(|image| image.state != PointState::Committed) {
        return Err(RestoreError::FilesMissing(point_id.clone()));
    }
    if point.trust == Trust::Corrupt && damage == Damage::Refuse {
        let reason = point.trust_reason.unwrap_or_else(|| "its files are not what was committed".to_owned());
        return Err(RestoreError::Damaged { point_id: point_id.clone(), reason });
    }
    let vm_name = backups::find(connection, point_id).await?.map(|backup| backup.vm_name).unwrap_or_default();
    let vm_directory = Path::new(&point.dir).parent().unwrap_or(Path::new("")).to_string_lossy().into_owned();
    let repository = PathBuf::from(repository.path);
    Ok(Found {
        export_name: layout::point_export_name(&vm_name, point_id.as_str(), disk_id),
        warnings: warnings(point.trust, point.trust_reason.as_deref(), &chain),
        merging: BackupPaths::new(&repository, &vm_directory, point_id.as_str()).merging,
        point_id: point.id,
        disk,
        repository,
        chain,
    })
}

fn warnings(trust: Trust, reason: Option<&str>, chain: &[ChainImage]) -> Vec<String> {
    let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
    match trust {
        Trust::Corrupt => vec![format!("the restore point is corrupt{reason}; what is read may be wrong")],
        Trust::Suspect => vec![format!("the restore point is suspect{reason}; what is read may be wrong")],
        _ if chain.iter().any(|image| image.trust == Trust::Corrupt) => {
            vec!["a restore point below this one is corrupt; what is read may be wrong".to_owned()]
        }
        Trust::Unverified | Trust::Verified => Vec::new(),
    }
}

/// Opens what was pinned. Tables are read when they are needed, so a deep chain opens as fast as a file.
///
/// A point may be made anew without its parent between the two: its record is then looked at again.
///
/// # Errors
/// Files are not there, or not what was committed.
pub(super) async fn open(
    shared: &Shared,
    mut found: Found,
    damage: Damage,
) -> Result<(Found, qcow2::Image), RestoreError> {
    for _ in 0..LOOKS {
        let looked = found.clone();
        let opened = tokio::task::spawn_blocking(move || open_image(&looked, damage));
        let error = match opened.await.map_err(|_| RestoreError::Panicked)? {
            Ok(image) => return Ok((found, image)),
            Err(error) => error,
        };
        let chain = points::chain(&mut *shared.store.read().await?, &found.point_id, found.disk.disk_id).await?;
        if chain != found.chain {
            let (point_id, disk_id) = (found.point_id.clone(), found.disk.disk_id);
            found = find(&mut *shared.store.read().await?, &point_id, disk_id, damage).await?;
        } else if found.merging.exists() {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        } else {
            return Err(error);
        }
    }
    Err(RestoreError::FilesMissing(found.point_id))
}

fn open_image(found: &Found, damage: Damage) -> Result<qcow2::Image, RestoreError> {
    let damaged = |reason: String| RestoreError::Damaged { point_id: found.point_id.clone(), reason };
    if damage == Damage::Refuse {
        for image in &found.chain {
            let path = found.repository.join(&image.dir).join(&image.file);
            match directory::file_bytes(&path) {
                Ok(length) if length == image.file_bytes => {}
                Ok(length) => {
                    let what =
                        format!("{}/{} has {length} bytes instead of {}", image.dir, image.file, image.file_bytes);
                    return Err(damaged(what));
                }
                Err(error) => return Err(failed(found, &qcow2::Error::Open { path, source: error })),
            }
        }
    }
    let path = found.image_path().ok_or_else(|| RestoreError::FilesMissing(found.point_id.clone()))?;
    let options = qcow2::OpenOptions {
        // The folder of the VM: a chain never leaves it.
        backing_root: path.parent().and_then(Path::parent).map(Path::to_owned),
        cache_bytes: CACHE_BYTES,
        ..qcow2::OpenOptions::new(qcow2::Access::ReadOnly)
    };
    let image = qcow2::Image::open(&path, &options).map_err(|error| failed(found, &error))?;
    if damage == Damage::Refuse && image.size() != found.disk.size_bytes {
        return Err(damaged(format!("the disk has {} bytes instead of {}", image.size(), found.disk.size_bytes)));
    }
    if damage == Damage::Refuse && image.is_dirty() {
        return Err(damaged("the image is not closed".to_owned()));
    }
    Ok(image)
}

/// What the engine says goes to the log: it may name paths.
fn failed(found: &Found, error: &qcow2::Error) -> RestoreError {
    tracing::error!(point_id = %found.point_id, disk_id = found.disk.disk_id, %error, "a restore point cannot be opened");
    match error {
        qcow2::Error::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            RestoreError::FilesMissing(found.point_id.clone())
        }
        qcow2::Error::Open { source, .. } => RestoreError::Damaged {
            point_id: found.point_id.clone(),
            reason: format!("an image cannot be opened ({})", source.kind()),
        },
        _ => RestoreError::Damaged {
            point_id: found.point_id.clone(),
            reason: "an image of it cannot be opened; the log has the reason".to_owned(),
        },
    }
}

impl Found {
    /// The image on top of the chain.
    pub(super) fn image_path(&self) -> Option<PathBuf> {
        self.chain.first().map(|top| self.repository.join(&top.dir).join(&top.file))
    }
}
