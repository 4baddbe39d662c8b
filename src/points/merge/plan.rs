//! What a merge relies on: seen, decided and pinned in one transaction.

use std::collections::BTreeSet;

use super::MergeError;
use crate::id::{BackupId, TaskId};
use crate::points::pins::Pins;
use crate::points::{Points, paths};
use crate::repository::layout::BackupPaths;
use crate::store::points::{self, PointDiskRow, PointRow};
use crate::store::repositories::{self, Repository};
use crate::store::{Connection, StoreError, leases};
use crate::words::point::{PointState, Trust};

/// Owners of pins that are tasks begin so: what reads or changes the files of points, and is no job and no export.
const TASK: &str = "task-";

/// Everything that was decided in the transaction in which the point was pinned.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) point: PointRow,
    pub(super) repository: Repository,
    pub(super) paths: BackupPaths,
    pub(super) disks: Vec<PlannedDisk>,
    /// The direct parents, oldest first.
    pub(super) absorbed: Vec<PointRow>,
}

impl Plan {
    /// What all new images may take, in bytes.
    pub(super) fn needed_bytes(&self) -> u64 {
        self.disks.iter().map(PlannedDisk::needed_bytes).fold(0, u64::saturating_add)
    }
}

/// One disk of the point.
#[derive(Debug)]
pub(super) struct PlannedDisk {
    pub(super) row: PointDiskRow,
    /// The image of the parent; nothing for a disk that is carried over.
    pub(super) parent: Option<(BackupId, PointDiskRow)>,
    /// What will lie below, with the name of its image; nothing for what will be a full.
    pub(super) base: Option<(BackupId, PointDiskRow)>,
}

impl PlannedDisk {
    /// What its new image may take, in bytes: it holds what one of the two holds, cluster by cluster.
    pub(super) fn needed_bytes(&self) -> u64 {
        self.parent.as_ref().map_or(0, |(_, parent)| self.row.file_bytes.saturating_add(parent.file_bytes))
    }
}

impl Points {
    /// The transaction in which everything that a merge relies on is seen, and pinned.
    pub(super) async fn pin(&self, child: &BackupId, task: &TaskId) -> Result<(Plan, Pins), MergeError> {
        let mut transaction = self.shared.store.write().await?;
        let point = points::find(&mut transaction, child).await?;
        let point = point.filter(|point| point.state != PointState::Deleted);
        let point = point.ok_or_else(|| MergeError::NotFound(child.clone()))?;
        for (id, state) in points::ancestry(&mut transaction, child).await? {
            if state != PointState::Committed {
                return Err(MergeError::NotCommitted { point: id, state });
            }
        }
        let (disks, absorbed) = plan_disks(&mut transaction, child).await?;
        for concerned in absorbed.iter().chain([&point]) {
            refuse_unfit(&mut transaction, concerned).await?;
        }
        let repository = repositories::find(&mut transaction, &point.repository_id).await?;
        let repository = repository.ok_or_else(|| MergeError::RepositoryUnavailable {
            id: point.repository_id.clone(),
            reason: "it was removed".to_owned(),
        })?;
        let pins = Pins::of(&self.shared.store, task.as_str());
        leases::pin_chain(&mut transaction, child, task.as_str(), &self.shared.boot_id).await?;
        transaction.commit().await?;
        let paths = paths(&repository, &point);
        Ok((Plan { point, repository, paths, disks, absorbed }, pins))
    }
}

/// What becomes of each disk, and the points that are absorbed by that, oldest first.
async fn plan_disks(
    connection: &mut Connection,
    child: &BackupId,
) -> Result<(Vec<PlannedDisk>, Vec<PointRow>), MergeError> {
    let (mut disks, mut parents) = (Vec::new(), BTreeSet::new());
    for row in points::disks(connection, child).await? {
        let mismatch = || MergeError::Mismatch { point: child.clone(), disk_id: row.disk_id };
        let (mut parent, mut base) = (None, None);
        if let Some(id) = &row.parent_id {
            let below = disk_of(connection, id, row.disk_id).await?.ok_or_else(mismatch)?;
            if let Some(id) = &below.parent_id {
                let below = disk_of(connection, id, row.disk_id).await?.ok_or_else(mismatch)?;
                base = Some((id.clone(), below));
            }
            parents.insert(id.clone());
            parent = Some((id.clone(), below));
        }
        disks.push(PlannedDisk { row, parent, base });
    }
    let mut absorbed = Vec::new();
    for id in parents {
        absorbed.push(points::find(connection, &id).await?.ok_or(MergeError::NotFound(id))?);
    }
    if absorbed.is_empty() {
        return Err(MergeError::NoParent(child.clone()));
    }
    absorbed.sort_by_key(|point| point.sequence);
    Ok((disks, absorbed))
}

async fn disk_of(
    connection: &mut Connection,
    point: &BackupId,
    disk_id: u32,
) -> Result<Option<PointDiskRow>, StoreError> {
    Ok(points::disks(connection, point).await?.into_iter().find(|disk| disk.disk_id == disk_id))
}

async fn refuse_unfit(connection: &mut Connection, point: &PointRow) -> Result<(), MergeError> {
    refuse_untrusted(point)?;
    let holders = leases::holders(connection, &point.id).await?;
    match holders.into_iter().find(|holder| holder.starts_with(TASK)) {
        Some(holder) => Err(MergeError::Busy { point: point.id.clone(), holder }),
        None => Ok(()),
    }
}

pub(super) fn refuse_untrusted(point: &PointRow) -> Result<(), MergeError> {
    match point.trust {
        Trust::Suspect | Trust::Corrupt => Err(MergeError::Untrusted { point: point.id.clone(), trust: point.trust }),
        Trust::Unverified | Trust::Verified => Ok(()),
    }
}
