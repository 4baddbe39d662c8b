//! Where two restore points differ, by their digests alone: no image is read.

use std::path::PathBuf;

use serde::Serialize;
use utoipa::ToSchema;

use super::content::BLOCK_BYTES;
use super::digests::blocks_file_name;
use super::folder::FolderError;
use super::leaves::Leaves;
use super::{Points, paths};
use crate::digest::Digest;
use crate::id::BackupId;
use crate::store::points::{self, PointDiskRow};
use crate::store::{StoreError, repositories};
use crate::words::point::PointState;

/// How two disks stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Likeness {
    /// They hold the same bytes.
    Equal,
    /// They do not.
    Different,
    /// Digests of one of them were never taken.
    Unknown,
}

/// One disk of two points.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ComparedDisk {
    /// Its number.
    pub disk_id: u32,
    /// Its size in the first point; `null` when that has no such disk.
    pub size_bytes: Option<u64>,
    /// Its size in the other point.
    pub other_size_bytes: Option<u64>,
    /// What the digests say.
    pub status: Likeness,
    /// For disks that differ: the blocks of 1 MiB that do, in bytes. `null` when the leaves of one of them are not there or not
    /// what was written.
    pub differing_bytes: Option<u64>,
}

/// One disk of one of the points.
#[derive(Clone, Debug)]
struct Side {
    size_bytes: u64,
    content: Option<Digest>,
    /// Nothing while the repository cannot be used.
    leaves: Option<PathBuf>,
}

impl Points {
    /// Compares the disks of two points; nothing when one of them does not exist, with its id.
    ///
    /// # Errors
    /// The database's.
    pub async fn compare(
        &self,
        first: &BackupId,
        other: &BackupId,
    ) -> Result<Result<Vec<ComparedDisk>, BackupId>, StoreError> {
        let (Some(mut left), Some(mut right)) = (self.sides(first).await?, self.sides(other).await?) else {
            let missing = if self.sides(first).await?.is_none() { first } else { other };
            return Ok(Err(missing.clone()));
        };
        let mut ids: Vec<u32> = left.iter().chain(&right).map(|(disk_id, _)| *disk_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let compared = tokio::task::spawn_blocking(move || {
            let mut side = |disk_id| {
                let of = |sides: &mut Vec<(u32, Side)>| {
                    let at = sides.iter().position(|(known, _)| *known == disk_id)?;
                    Some(sides.swap_remove(at).1)
                };
                (of(&mut left), of(&mut right))
            };
            ids.into_iter().map(|disk_id| compare(disk_id, side(disk_id))).collect()
        });
        Ok(Ok(compared.await.unwrap_or_default()))
    }

    async fn sides(&self, id: &BackupId) -> Result<Option<Vec<(u32, Side)>>, StoreError> {
        let mut connection = self.shared.store.read().await?;
        let row = points::find(&mut connection, id).await?.filter(|row| row.state != PointState::Deleted);
        let Some(row) = row else { return Ok(None) };
        let Some(repository) = repositories::find(&mut connection, &row.repository_id).await? else { return Ok(None) };
        drop(connection);
        let folder = match self.shared.repositories.own(&repository).await {
            Ok(_) => Some(paths(&repository, &row).published),
            Err(FolderError::Store(error)) => return Err(error),
            Err(_) => None,
        };
        let mut connection = self.shared.store.read().await?;
        let side = |disk: PointDiskRow| {
            let leaves = folder.as_ref().map(|folder| folder.join(blocks_file_name(disk.disk_id)));
            let content = disk.content_digest.as_deref().and_then(|digest| digest.parse().ok());
            (disk.disk_id, Side { size_bytes: disk.size_bytes, content, leaves })
        };
        Ok(Some(points::disks(&mut connection, id).await?.into_iter().map(side).collect()))
    }
}

fn compare(disk_id: u32, (left, right): (Option<Side>, Option<Side>)) -> ComparedDisk {
    let (status, differing_bytes) = match (&left, &right) {
        (Some(left), Some(right)) => match (left.content, right.content) {
            (None, _) | (_, None) => (Likeness::Unknown, None),
            (Some(a), Some(b)) if a == b && left.size_bytes == right.size_bytes => (Likeness::Equal, Some(0)),
            (Some(a), Some(b)) => (Likeness::Different, differing((left, &a), (right, &b))),
        },
        _ => (Likeness::Different, None),
    };
    let size = |side: &Option<Side>| side.as_ref().map(|side| side.size_bytes);
    ComparedDisk { disk_id, size_bytes: size(&left), other_size_bytes: size(&right), status, differing_bytes }
}

/// The blocks that differ, in bytes; what one disk has more counts.
fn differing(left: (&Side, &Digest), right: (&Side, &Digest)) -> Option<u64> {
    let open =
        |(side, root): (&Side, &Digest)| Leaves::open(side.leaves.as_ref()?, side.size_bytes, root).ok().flatten();
    let (mut left, mut right) = (open(left)?, open(right)?);
    let mut blocks = 0u64;
    loop {
        match (left.next_leaf().ok()?, right.next_leaf().ok()?) {
            (None, None) => return Some(blocks.saturating_mul(BLOCK_BYTES)),
            (a, b) => blocks += u64::from(a != b),
        }
    }
}
