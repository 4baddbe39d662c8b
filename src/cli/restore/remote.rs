//! A disk on an NBD server.

use async_trait::async_trait;
use blockyard_nbd::client::{Client, ClientError, Uri};
use blockyard_nbd::wire::TransmissionFlags;
use blockyard_nbd::{Durability, ZeroFlags};
use bytes::Bytes;

use super::disk::{Disk, DiskError, Run, RunKind, Target};
use super::error::RestoreCommandError;

/// `base:allocation`: the range reads as zeroes.
const STATE_ZERO: u64 = 2;
/// Zeroes are sent as such in blocks of so many bytes: a cluster of most images.
const GRAIN: usize = 64 << 10;
/// Zeroes that are written as bytes, for a server that knows no other way, go in pieces of so many.
const ZERO_PIECE: u64 = 1 << 20;
/// The longest range that any server takes: a length has 32 bits unless extended headers were agreed.
const RANGE_MAX: u64 = 1 << 31;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    client: Client,
    has_allocation: bool,
}

impl Remote {
    pub(super) async fn connect(uri: &Uri, text: &str) -> Result<Self, RestoreCommandError> {
        let failed = |source| RestoreCommandError::Connect { uri: text.to_owned(), source };
        let client = Client::connect(uri).await.map_err(failed)?;
        let has_allocation = client.contexts().iter().any(|context| context.name == "base:allocation");
        Ok(Self { client, has_allocation })
    }

    pub(super) fn size(&self) -> u64 {
        self.client.size()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.has(TransmissionFlags::READ_ONLY)
    }

    /// Says goodbye.
    pub(super) async fn disconnect(&self) {
        // A server that is gone needs none.
        let _ = self.client.disconnect().await;
    }

    fn has(&self, flag: TransmissionFlags) -> bool {
        self.client.details().info.flags.contains(flag)
    }
}

fn failed(error: ClientError) -> DiskError {
    let offset = match &error {
        ClientError::Request { offset, .. } => *offset,
        _ => None,
    };
    DiskError::at(offset, error)
}

#[async_trait]
impl Disk for Remote {
    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, DiskError> {
        let length = length.min(RANGE_MAX);
        if !self.has_allocation {
            return Ok(vec![Run { length, kind: RunKind::Data }]);
        }
        let extents = self.client.allocation(offset, length).await.map_err(failed)?;
        let kind = |status: u64| if status & STATE_ZERO == 0 { RunKind::Data } else { RunKind::Zero };
        let runs = extents.iter().map(|extent| Run { length: extent.length, kind: kind(extent.status) });
        Ok(runs.filter(|run| run.length > 0).collect())
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, DiskError> {
        self.client.read(offset, length).await.map_err(failed)
    }
}

#[async_trait]
impl Target for Remote {
    fn grain(&self) -> usize {
        GRAIN
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        self.client.write(offset, data, Durability::OnFlush).await.map_err(failed)
    }

    async fn zero(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.has(TransmissionFlags::SEND_WRITE_ZEROES) {
            let flags = ZeroFlags { no_hole: false, fast: false };
            return self.client.zero(offset, length, flags, Durability::OnFlush).await.map_err(failed);
        }
        let zeroes = Bytes::from(vec![0; usize::try_from(ZERO_PIECE.min(length)).unwrap_or(0)]);
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let piece = zeroes.slice(..usize::try_from((end - at).min(ZERO_PIECE)).unwrap_or(0));
            let length = piece.len() as u64;
            self.write(at, piece).await?;
            at += length;
        }
        Ok(())
    }

    async fn finish(&self) -> Result<Box<dyn Disk>, DiskError> {
        if self.has(TransmissionFlags::SEND_FLUSH) {
            self.client.flush().await.map_err(failed)?;
        }
        Ok(Box::new(self.clone()))
    }
}
