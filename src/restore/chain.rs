//! A disk of a committed point as a restore needs it: pinned in the transaction that sees it committed, with what its trust
//! means for the caller, then opened by [`RecordedChain`].

use std::path::PathBuf;

use blockyard_qcow2 as qcow2;

use super::{Damage, RestoreError, Shared};
use crate::id::{BackupId, ExportId};
use crate::points::chain::{RecordedChain, Settling, Unfit};
use crate::points::folder::FolderError;
use crate::repository::layout;
use crate::store::points::{self, ChainImage, PointDiskRow};
use crate::store::repositories;
use crate::store::{Connection, WriteTransaction, backups, leases};
use crate::words::point::{PointState, Trust};

/// Memory for the tables of the top image; each below has half of that above it. A guess: 16 MiB map 128 GiB of disk.
const CACHE_BYTES: usize = 16 << 20;

/// A disk that was found, and is pinned once its transaction is committed.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) point_id: BackupId,
    pub(super) disk: PointDiskRow,
    pub(super) export_name: String,
    /// What the caller should know.
    pub(super) warnings: Vec<String>,
    repository: PathBuf,
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

/// The repository of a point is this hub's, swept: before its record is read, and outside of any transaction.
///
/// # Errors
/// There is no such point, or its repository cannot be used.
pub(super) async fn own_repository(shared: &Shared, point_id: &BackupId) -> Result<(), RestoreError> {
    let not_found = || RestoreError::PointNotFound(point_id.clone());
    let mut connection = shared.store.read().await?;
    let point = points::find(&mut connection, point_id).await?.ok_or_else(not_found)?;
    let repository = repositories::find(&mut connection, &point.repository_id).await?.ok_or_else(not_found)?;
    drop(connection);
    shared.repositories.own(&repository).await.map(|_| ()).map_err(|error| match error {
        FolderError::NotFound(_) => not_found(),
        FolderError::Unavailable { id, reason } => RestoreError::RepositoryUnavailable { id, reason },
        FolderError::Store(error) => error.into(),
        FolderError::Panicked => RestoreError::Panicked,
    })
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
    Ok(Found {
        export_name: layout::point_export_name(&vm_name, point_id.as_str(), disk_id),
        warnings: warnings(point.trust, point.trust_reason.as_deref(), &chain),
        point_id: point.id,
        disk,
        repository: PathBuf::from(repository.path),
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

/// Opens what was pinned, once files and record agree: a point may be made anew between the two.
///
/// # Errors
/// Files are not there, or not what was committed.
pub(super) async fn open(
    shared: &Shared,
    mut found: Found,
    damage: Damage,
) -> Result<(Found, qcow2::Image), RestoreError> {
    let mut settling = Settling::new(&shared.store);
    loop {
        let looked = found.clone();
        let opened = tokio::task::spawn_blocking(move || match damage {
            Damage::Refuse => looked.recorded().open(CACHE_BYTES),
            Damage::Accept => looked.recorded().open_as_it_is(CACHE_BYTES),
        });
        let unfit = match opened.await.map_err(|_| RestoreError::Panicked)? {
            Ok(image) => return Ok((found, image)),
            Err(unfit) => unfit,
        };
        let (point_id, disk_id) = (found.point_id.clone(), found.disk.disk_id);
        if !settling.look_again(&point_id, &[(disk_id, &found.chain)]).await? {
            return Err(failed(&found, &unfit));
        }
        found = find(&mut *shared.store.read().await?, &point_id, disk_id, damage).await?;
    }
}

/// What the engine says goes to the log: it may name paths.
fn failed(found: &Found, unfit: &Unfit) -> RestoreError {
    let point_id = found.point_id.clone();
    tracing::error!(%point_id, disk_id = found.disk.disk_id, error = %unfit, "a restore point cannot be opened");
    if unfit.is_missing() {
        return RestoreError::FilesMissing(point_id);
    }
    let reason = match unfit {
        Unfit::Image(qcow2::Error::Open { source, .. }) => format!("an image cannot be opened ({})", source.kind()),
        Unfit::Image(_) => "an image of it cannot be opened; the log has the reason".to_owned(),
        Unfit::Empty | Unfit::Length { .. } | Unfit::Size { .. } | Unfit::NotClosed => unfit.to_string(),
    };
    RestoreError::Damaged { point_id, reason }
}

impl Found {
    fn recorded(&self) -> RecordedChain<'_> {
        RecordedChain { repository: &self.repository, images: &self.chain, size_bytes: self.disk.size_bytes }
    }
}
