//! What a copy reads from and writes to, whatever it is: an NBD export, a raw file, an image.

use std::error::Error;

use async_trait::async_trait;
use bytes::Bytes;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub struct DiskError {
    /// The byte at which it happened, if that is known better than by the request.
    pub(super) offset: Option<u64>,
    // Not its source: it is all that is said here.
    cause: Box<dyn Error + Send + Sync>,
}

impl DiskError {
    /// A failure whose place is that of the request.
    pub(super) fn new(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::at(None, cause)
    }

    /// A failure at this byte of the disk, if that is known.
    pub(super) fn at(offset: Option<u64>, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { offset, cause: cause.into() }
    }
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Bytes, above 0.
    pub(super) length: u64,
    pub(super) kind: RunKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunKind {
    /// Anything.
    Data,
    /// Known to be zeroes.
    Zero,
}

/// A disk to be read.
#[async_trait]
pub(super) trait Disk: Send + Sync {
    /// The runs from `offset` on, at least one, together at most `length` long and perhaps shorter.
    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, DiskError>;

    /// The bytes of a range.
    async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, DiskError>;
}

/// A disk to be written.
#[async_trait]
pub(super) trait Target: Send + Sync {
    /// Zeroes are told apart from data in blocks of so many bytes, a power of two.
    fn grain(&self) -> usize;

    /// Writes bytes that are not all zeroes.
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError>;

    /// Makes a range read as zeroes, without taking space for it where that can be done.
    async fn zero(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Makes everything durable, and hands out what was written to be read from where it is kept.
    async fn finish(&self) -> Result<Box<dyn Disk>, DiskError>;
}
