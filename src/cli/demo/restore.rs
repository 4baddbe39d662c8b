//! The way back: each image served over NBD, read by the NBD client, and compared with its source.
//!
//! Nothing of the copy is believed: the source is read again from its file, the restored disk through a socket.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockyard_nbd::client::{Client, Uri};
use blockyard_nbd::{Budget, BudgetLimits, Exports, Handle, Options, Server};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;

use super::copy::Copied;
use super::disks::DemoDisk;
use super::progress::Progress;
use super::{DemoError, stored};
use crate::cli::CliError;
use crate::export::ImageExport;

/// Bytes that are read and hashed at a time.
const PIECE: u32 = 1 << 20;
/// Requests in flight while a disk is read back: enough that hashing never waits for a round trip.
const IN_FLIGHT: usize = 8;
/// How long a server may take to end that has nobody left.
const DRAIN: Duration = Duration::from_secs(1);

/// SHA-256 of a whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest([u8; 32]);

impl Digest {
    /// The first digits, as people compare them.
    pub(super) fn prefix(self) -> String {
        self.to_string().chars().take(12).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A disk as it was found on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) size_bytes: u64,
    pub(super) digest: Digest,
}

/// What was found on both sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison {
    pub(super) source: Content,
    pub(super) restored: Content,
    /// Reading and hashing both.
    pub(super) time: Duration,
}

impl Comparison {
    /// Whether the restored disk is the source, to the last byte.
    pub(super) fn is_equal(&self) -> bool {
        self.source == self.restored
    }
}

/// Compares every disk of the restore point.
///
/// # Errors
/// A disk cannot be read on one side. A difference is no error.
pub(super) async fn run(disks: &[DemoDisk], copied: &Copied, progress: &Progress) -> Result<Vec<Comparison>, CliError> {
    let mut comparisons = Vec::with_capacity(disks.len());
    for (disk_id, (disk, copy)) in disks.iter().zip(&copied.disks).enumerate() {
        comparisons.push(compare(disk_id, disk, &copy.image, |bytes| progress.set(disk_id, bytes)).await?);
    }
    Ok(comparisons)
}

async fn compare(disk_id: usize, disk: &DemoDisk, image: &Path, read: impl Fn(u64)) -> Result<Comparison, DemoError> {
    let begun = Instant::now();
    let export = stored::open(image, &format!("disk{disk_id}"))
        .await
        .map_err(|error| DemoError::Serve { disk_id, source: Box::new(error) })?;
    let server = serve(&export).await.map_err(|source| DemoError::Serve { disk_id, source })?;
    let restored = async { read_back(&server, read).await.map_err(|source| DemoError::ReadBack { disk_id, source }) };
    let both = tokio::try_join!(Box::pin(restored), Box::pin(read_source(disk)));
    server.stop(DRAIN).await;
    // Read only: there is nothing that closing could fail to write.
    let _ = export.image().close().await;
    let (restored, source) = both?;
    Ok(Comparison { source, restored, time: begun.elapsed() })
}

/// The export on a free port of loopback.
async fn serve(export: &ImageExport) -> Result<Handle, Box<dyn Error + Send + Sync>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let exports = Exports::single(Arc::new(export.clone()))?;
    Ok(Server::start(listener, exports, Options::new(Budget::new(&BudgetLimits::default())))?)
}

/// Reads the served disk from its first byte to its last.
async fn read_back(server: &Handle, read: impl Fn(u64)) -> Result<Content, Box<dyn Error + Send + Sync>> {
    let uri: Uri = server.uris().first().ok_or("the server has no export")?.parse()?;
    let client = Client::connect(&uri).await?;
    let size_bytes = client.size();
    let mut hash = Hash::default();
    let mut offsets = pieces(size_bytes);
    let mut in_flight = VecDeque::new();
    let request = |(offset, length)| {
        let client = client.clone();
        tokio::spawn(async move { client.read(offset, length).await })
    };
    in_flight.extend(offsets.by_ref().take(IN_FLIGHT).map(request));
    while let Some(piece) = in_flight.pop_front() {
        let piece = piece.await??;
        in_flight.extend(offsets.next().map(request));
        hash.take(move || Ok(piece)).await?;
        read(hash.bytes);
    }
    client.disconnect().await?;
    Ok(Content { size_bytes, digest: hash.finish() })
}

async fn read_source(disk: &DemoDisk) -> Result<Content, DemoError> {
    let read = async {
        let file = Arc::new(File::open(&disk.path)?);
        let mut hash = Hash::default();
        for (offset, length) in pieces(disk.size_bytes) {
            let file = Arc::clone(&file);
            hash.take(move || {
                let mut piece = vec![0; length as usize];
                file.read_exact_at(&mut piece, offset)?;
                Ok(piece)
            })
            .await?;
        }
        Ok(Content { size_bytes: hash.bytes, digest: hash.finish() })
    };
    read.await.map_err(|source| DemoError::DiskUnreadable { path: disk.path.clone(), source })
}

/// Offset and length of each piece of a disk, in order.
fn pieces(size_bytes: u64) -> impl Iterator<Item = (u64, u32)> {
    let length = move |offset: u64| u32::try_from(size_bytes - offset).unwrap_or(u32::MAX).min(PIECE);
    (0..size_bytes).step_by(PIECE as usize).map(move |offset| (offset, length(offset)))
}

/// A hash that grows on the threads for blocking work.
#[derive(Default)]
struct Hash {
    state: Sha256,
    bytes: u64,
}

impl Hash {
    /// Adds what `read` brings.
    async fn take(&mut self, read: impl FnOnce() -> io::Result<Vec<u8>> + Send + 'static) -> io::Result<()> {
        let mut state = self.state.clone();
        let hashed = tokio::task::spawn_blocking(move || {
            let piece = read()?;
            state.update(&piece);
            Ok::<_, io::Error>((state, piece.len() as u64))
        });
        let (state, length) = hashed.await.map_err(io::Error::other)??;
        self.state = state;
        self.bytes += length;
        Ok(())
    }

    fn finish(self) -> Digest {
        Digest(self.state.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A disk of `bytes`, and an image that `qemu-img` made of `stored`.
    async fn compared(bytes: &[u8], stored: &[u8]) -> Comparison {
        let folder = tempfile::tempdir().unwrap();
        let (source, raw) = (folder.path().join("source"), folder.path().join("raw"));
        let image = folder.path().join("image.qcow2");
        std::fs::write(&source, bytes).unwrap();
        std::fs::write(&raw, stored).unwrap();
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&image);
        let status = convert.status().unwrap_or_else(|error| panic!("{error}; install the package qemu-utils"));
        assert!(status.success());
        let disk = DemoDisk::open(&source, 2000).unwrap();
        compare(0, &disk, &image, |_| {}).await.unwrap()
    }

    #[tokio::test]
    async fn one_byte_or_one_sector_makes_two_disks_differ() {
        let disk: Vec<u8> = (0..3 * PIECE + 512).map(|index| (index / 512 % 251) as u8).collect();
        assert!(compared(&disk, &disk).await.is_equal());
        for place in [0, PIECE as usize, disk.len() - 1] {
            let mut other = disk.clone();
            other[place] ^= 1;
            assert!(!compared(&disk, &other).await.is_equal(), "byte {place}");
        }
        assert!(!compared(&disk, &disk[..disk.len() - 512]).await.is_equal());
        let mut longer = disk.clone();
        longer.extend_from_slice(&[0; 512]);
        assert!(!compared(&disk, &longer).await.is_equal());
    }

    #[test]
    fn pieces_cover_a_disk_once() {
        let all: Vec<_> = pieces(2 * u64::from(PIECE) + 512).collect();
        assert_eq!(all, [(0, PIECE), (u64::from(PIECE), PIECE), (2 * u64::from(PIECE), 512)]);
    }
}
