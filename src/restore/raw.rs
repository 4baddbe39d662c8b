//! A whole virtual disk, or a range of it, as a stream of bytes.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockyard_qcow2::AsyncImage;
use bytes::Bytes;
use futures_util::stream::{self, Stream};

use super::chain;
use super::{Damage, RestoreError, Shared};
use crate::id::{BackupId, ExportId};
use crate::points::pins::Pins;

/// Bytes that are read at a time, and about what a download has in memory besides what the socket holds.
const PIECE: u64 = 1 << 20;

/// A disk that is open for reading and pinned until dropped.
#[derive(Debug)]
pub struct RawDisk {
    shared: Arc<Shared>,
    image: AsyncImage,
    name: String,
    content_digest: Option<String>,
    warnings: Vec<String>,
    _pins: Pins,
}

pub(super) async fn open(
    shared: &Arc<Shared>,
    point_id: BackupId,
    disk_id: u32,
    damage: Damage,
) -> Result<RawDisk, RestoreError> {
    if shared.registry().closed {
        return Err(RestoreError::Draining);
    }
    chain::own_repository(shared, &point_id).await?;
    let owner = ExportId::new();
    let mut transaction = shared.store.write().await?;
    let found = chain::pin(&mut transaction, shared, &owner, &point_id, disk_id, damage).await?;
    let pins = Pins::of(&shared.store, owner.as_str());
    transaction.commit().await?;
    let (found, image) = match chain::open(shared, found, damage).await {
        Ok(opened) => opened,
        Err(error) => {
            pins.release().await;
            return Err(error);
        }
    };
    Ok(RawDisk {
        shared: Arc::clone(shared),
        image: AsyncImage::new(image),
        name: found.export_name,
        content_digest: found.disk.content_digest,
        warnings: found.warnings,
        _pins: pins,
    })
}

impl RawDisk {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// What an export of the disk would be called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The root over its content, when it was taken.
    pub fn content_digest(&self) -> Option<&str> {
        self.content_digest.as_deref()
    }

    /// What the reader should know of the point.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The bytes of a range, which must lie inside the disk. An error ends the stream, which is then short.
    pub fn stream(self, range: Range<u64>) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        stream::try_unfold((self, range.start), move |(disk, at)| async move {
            if at >= range.end {
                return Ok(None);
            }
            // Pieces end at multiples of their size, which suits the clusters of the image.
            let end = (at - at % PIECE + PIECE).min(range.end);
            let buffer = vec![0; usize::try_from(end - at).unwrap_or(0)];
            match disk.image.read(at, buffer).await {
                Ok(piece) => {
                    disk.shared.raw_bytes.fetch_add(end - at, Ordering::Relaxed);
                    Ok(Some((Bytes::from(piece), (disk, end))))
                }
                Err(error) => {
                    tracing::error!(disk = disk.name, offset = at, %error, "a download ends: the disk cannot be read");
                    Err(io::Error::other(format!("the disk cannot be read at offset {at}")))
                }
            }
        })
    }
}
