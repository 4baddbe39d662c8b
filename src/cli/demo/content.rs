//! What is on a disk, as its size and the SHA-256 of every byte from the first to the last.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt;
use std::io;

use blockyard_nbd::client::{Client, Uri};
use sha2::{Digest as _, Sha256};

use crate::node::fake::Source;

/// Bytes that are read and hashed at a time.
const PIECE: u32 = 1 << 20;
/// Requests in flight while a disk is read over NBD: enough that hashing never waits for a round trip.
const IN_FLIGHT: usize = 8;

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

/// A whole disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) size_bytes: u64,
    pub(super) digest: Digest,
}

impl Content {
    /// Of a disk of the pretended VM.
    pub(super) async fn of_source(source: &Source) -> io::Result<Self> {
        let mut hash = Hash::default();
        for (offset, length) in pieces(source.size_bytes()) {
            hash.take(source.read(offset, length as usize).await?).await?;
        }
        Ok(hash.finish())
    }

    /// Of a disk that is served over NBD. `read` hears how many bytes have come.
    pub(super) async fn of_export(uri: &Uri, read: impl Fn(u64)) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let client = Client::connect(uri).await?;
        let mut hash = Hash::default();
        let mut offsets = pieces(client.size());
        let mut in_flight = VecDeque::new();
        let request = |(offset, length)| {
            let client = client.clone();
            tokio::spawn(async move { client.read(offset, length).await })
        };
        in_flight.extend(offsets.by_ref().take(IN_FLIGHT).map(request));
        while let Some(piece) = in_flight.pop_front() {
            let piece = piece.await??;
            in_flight.extend(offsets.next().map(request));
            hash.take(piece).await?;
            read(hash.bytes);
        }
        client.disconnect().await?;
        Ok(hash.finish())
    }
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
    async fn take(&mut self, piece: impl AsRef<[u8]> + Send + 'static) -> io::Result<()> {
        let mut state = self.state.clone();
        let hashed = tokio::task::spawn_blocking(move || {
            state.update(&piece);
            (state, piece.as_ref().len() as u64)
        });
        let (state, length) = hashed.await.map_err(io::Error::other)?;
        self.state = state;
        self.bytes += length;
        Ok(())
    }

    fn finish(self) -> Content {
        Content { size_bytes: self.bytes, digest: Digest(self.state.finalize().into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn of(bytes: &[u8]) -> Content {
        Content::of_source(&Source::Bytes(bytes.into())).await.unwrap()
    }

    #[tokio::test]
    async fn one_byte_or_one_sector_makes_two_disks_differ() {
        let disk: Vec<u8> = (0..3 * PIECE + 512).map(|index| (index / 512 % 251) as u8).collect();
        let content = of(&disk).await;
        assert_eq!(content.size_bytes, disk.len() as u64);
        for place in [0, PIECE as usize, disk.len() - 1] {
            let mut other = disk.clone();
            other[place] ^= 1;
            assert_ne!(of(&other).await, content, "byte {place}");
        }
        assert_ne!(of(&disk[..disk.len() - 512]).await, content);
        // Only the size tells two empty disks apart at a glance.
        assert_ne!(of(&[0; 512]).await, of(&[0; 1024]).await);
    }

    #[tokio::test]
    async fn digest_is_the_one_that_sha256sum_prints() {
        let digest = of(&[0; 512]).await.digest;
        assert_eq!(digest.to_string(), "076a27c79e5ace2a3d47f9dd2e83e4ff6ea8872b3c2218f66c92b89b55f36560");
        assert_eq!(digest.prefix(), "076a27c79e5a");
    }

    #[test]
    fn pieces_cover_a_disk_once() {
        let all: Vec<_> = pieces(2 * u64::from(PIECE) + 512).collect();
        assert_eq!(all, [(0, PIECE), (u64::from(PIECE), PIECE), (2 * u64::from(PIECE), 512)]);
    }
}
