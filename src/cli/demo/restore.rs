//! The way back: every disk of a restore point served over NBD, read by the NBD client, and compared with what its source
//! was when the point was made.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockyard_nbd::{Budget, BudgetLimits, Exports, Handle, Options, Server};
use tokio::net::TcpListener;

use super::content::Content;
use super::copy::Point;
use super::hub::Hub;
use super::progress::Progress;
use super::{DemoError, stored};
use crate::cli::Output;
use crate::export::ImageExport;

/// How long a server may take to end that has nobody left.
const DRAIN: Duration = Duration::from_secs(1);

/// A restore point that was read back.
#[derive(Debug)]
pub(super) struct Restore {
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
    output.note(&format!("point {name}: restore"));
    let sizes: Vec<u64> = point.contents.iter().map(|content| content.size_bytes).collect();
    let progress = Progress::new("restore", &sizes, output);
    let images = hub.images(&point.backup_id).await?;
    let mut disks = Vec::with_capacity(sizes.len());
    for (disk_id, (image, source)) in images.iter().zip(&point.contents).enumerate() {
        let begun = Instant::now();
        let restored = read_back(disk_id, &image.path, |bytes| progress.set(disk_id, bytes)).await?;
        let (source, stored_bytes) = (*source, image.stored_bytes);
        disks.push(RestoredDisk { source, restored, stored_bytes, time: begun.elapsed() });
    }
    Ok(Restore { name, backup_id: point.backup_id.clone(), disks })
}

async fn read_back(disk_id: usize, image: &Path, read: impl Fn(u64)) -> Result<Content, DemoError> {
    let export = stored::open(image, &format!("disk{disk_id}"))
        .await
        .map_err(|error| DemoError::Serve { disk_id, source: Box::new(error) })?;
    let server = serve(&export).await.map_err(|source| DemoError::Serve { disk_id, source })?;
    let restored = match server.uris().first().map(|uri| uri.parse()) {
        Some(Ok(uri)) => Content::of_export(&uri, read).await,
        _ => Err("the server has no export".into()),
    };
    server.stop(DRAIN).await;
    // Read only: there is nothing that closing could fail to write.
    let _ = export.image().close().await;
    restored.map_err(|source| DemoError::ReadBack { disk_id, source })
}

/// The export on a free port of loopback.
async fn serve(export: &ImageExport) -> Result<Handle, Box<dyn std::error::Error + Send + Sync>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let exports = Exports::single(Arc::new(export.clone()))?;
    Ok(Server::start(listener, exports, Options::new(Budget::new(&BudgetLimits::default())))?)
}
