//! A new qcow2 image that holds a whole disk.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use blockyard_qcow2::{Access, AsyncImage, CreateOptions, Durability, Error, ExtentKind, OpenOptions, check, create};
use bytes::Bytes;

use super::disk::{Disk, DiskError, Run, RunKind, Target};

/// Extents asked for at a time.
const EXTENTS: usize = 4096;

/// An image that is being written. Nothing lies below it, so what is not written reads as zeroes.
#[derive(Debug)]
pub(super) struct NewImage {
    path: PathBuf,
    image: AsyncImage,
}

impl NewImage {
    pub(super) async fn create(path: &Path, size_bytes: u64) -> Result<Self, DiskError> {
        let (owned, options) = (path.to_owned(), CreateOptions::new(size_bytes));
        let created = tokio::task::spawn_blocking(move || create(&owned, &options)).await;
        created.unwrap_or(Err(Error::Panicked)).map_err(DiskError::new)?;
        let opened = AsyncImage::open(path.to_owned(), OpenOptions::new(Access::ReadWrite)).await;
        Ok(Self { path: path.to_owned(), image: opened.map_err(DiskError::new)? })
    }
}

#[async_trait]
impl Target for NewImage {
    fn grain(&self) -> usize {
        usize::try_from(self.image.cluster_size()).unwrap_or(65_536)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        self.image.write(offset, data, Durability::OnFlush).await.map_err(DiskError::new)
    }

    async fn zero(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Ok(())
    }

    async fn finish(&self) -> Result<Box<dyn Disk>, DiskError> {
        self.image.close().await.map_err(DiskError::new)?;
        let path = self.path.clone();
        let report = tokio::task::spawn_blocking(move || check(&path)).await.unwrap_or(Err(Error::Panicked));
        let report = report.map_err(DiskError::new)?;
        if !report.is_clean() {
            let (errors, leaks) = (report.errors, report.leaks);
            return Err(DiskError::new(Error::Unclean { errors, leaks, detail: "after it was closed".to_owned() }));
        }
        let image = AsyncImage::open(self.path.clone(), OpenOptions::new(Access::ReadOnly)).await;
        Ok(Box::new(OpenImage(image.map_err(DiskError::new)?)))
    }
}

/// An image that is complete.
#[derive(Debug)]
struct OpenImage(AsyncImage);

#[async_trait]
impl Disk for OpenImage {
    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, DiskError> {
        let extents = self.0.map(offset, length, EXTENTS).await.map_err(DiskError::new)?;
        let kind = |kind| if kind == ExtentKind::Data { RunKind::Data } else { RunKind::Zero };
        Ok(extents.iter().map(|extent| Run { length: extent.length, kind: kind(extent.kind) }).collect())
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, DiskError> {
        self.0.read(offset, vec![0; length as usize]).await.map_err(DiskError::new)
    }
}
