//! The way back: every disk of a restore point served over NBD, read by the NBD client, and compared with what its source
//! was when the point was made.

use std::time::{Duration, Instant};

use serde_json::json;

use super::DemoError;
use super::content::Content;
use super::copy::Point;
use super::hub::{Hub, text};
use super::progress::Progress;
use crate::cli::Output;

/// A restore point that was read back.
#[derive(Debug)]
pub(super) struct Restore {
    /// The number of the point.
    pub(super) number: usize,
    /// Which point, and in which condition, for people.
    pub(super) name: String,
    /// Its id.
    pub(super) backup_id: String,
    /// In the order of the VM.
    pub(super) disks: Vec<RestoredDisk>,
}

/// One disk that was read back.
#[derive(Debug)]
pub(super) struct RestoredDisk {
    /// As it was when the point was made.
    pub(super) source: Content,
    /// As it came back.
    pub(super) restored: Content,
    /// What the image of the point takes, those below it not counted.
    pub(super) stored_bytes: u64,
    /// Reading and hashing.
    pub(super) time: Duration,
}

impl Restore {
    /// Whether all disks came back, each as its source was.
    pub(super) fn is_equal(&self) -> bool {
        !self.disks.is_empty() && self.disks.iter().all(RestoredDisk::is_equal)
    }
}

impl RestoredDisk {
    /// Whether the restored disk is the source, to the last byte.
    pub(super) fn is_equal(&self) -> bool {
        self.source == self.restored
    }
}

/// Restores every disk of a point.
///
/// # Errors
/// A disk cannot be read. A difference is no error.
pub(super) async fn run(hub: &Hub, point: &Point, name: String, output: &Output) -> Result<Restore, DemoError> {
    output.note(&format!("point {name}: restore over NBD"));
    let sizes: Vec<u64> = point.contents.iter().map(|content| content.size_bytes).collect();
    let progress = Progress::new("restore", &sizes, output);
    let images = hub.images(&point.backup_id).await?;
    let mut disks = Vec::with_capacity(sizes.len());
    for (disk_id, (image, source)) in images.iter().zip(&point.contents).enumerate() {
        let begun = Instant::now();
        let restored = read_back(hub, &point.backup_id, disk_id, |bytes| progress.set(disk_id, bytes)).await?;
        let (source, stored_bytes) = (*source, image.stored_bytes);
        disks.push(RestoredDisk { source, restored, stored_bytes, time: begun.elapsed() });
    }
    Ok(Restore { number: point.number, name, backup_id: point.backup_id.clone(), disks })
}

/// Serves a disk as anybody would who restores it, and reads it from its first byte to its last.
async fn read_back(hub: &Hub, point_id: &str, disk_id: usize, read: impl Fn(u64)) -> Result<Content, DemoError> {
    let path = format!("/points/{point_id}/exports");
    let export = hub.client().post(&path, &json!({"disk_id": disk_id})).await?;
    let uri = text(&export, "uri")?.parse();
    let restored = match uri {
        Ok(uri) => Content::of_export(&uri, read).await,
        Err(error) => Err(Box::from(error)),
    };
    hub.client().delete(&format!("/exports/{}", text(&export, "id")?)).await?;
    restored.map_err(|source| DemoError::ReadBack { disk_id, source })
}
