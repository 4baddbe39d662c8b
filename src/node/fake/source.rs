//! What is on the disks of the pretended VM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The content of a disk. Never changed by a backup.
#[derive(Clone, Debug)]
pub enum Source {
    /// A raw file.
    File {
        /// Where it is.
        path: PathBuf,
        /// Its length when it was opened.
        size_bytes: u64,
    },
    /// Bytes in memory.
    Bytes(Arc<[u8]>),
    /// Another disk with later writes over it, so that a disk changes although nothing is written to its file.
    Changed {
        /// As it was before.
        before: Arc<Source>,
        /// Offset in bytes and data of each write, in the order in which they were made.
        writes: Arc<[(u64, Vec<u8>)]>,
    },
}

impl Source {
    /// A raw file as a disk.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn file(path: &Path) -> io::Result<Self> {
        let size_bytes = std::fs::metadata(path)?.len();
        Ok(Self::File { path: path.to_owned(), size_bytes })
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        match self {
            Self::File { size_bytes, .. } => *size_bytes,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Changed { before, .. } => before.size_bytes(),
        }
    }

    /// Reads `length` bytes from `offset` on.
    ///
    /// # Errors
    /// The range is not on the disk, or the file cannot be read.
    pub async fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        match self {
            Self::File { path, .. } => {
                let path = path.clone();
                let read = move || {
                    let mut buffer = vec![0; length];
                    File::open(path)?.read_exact_at(&mut buffer, offset)?;
                    Ok(buffer)
                };
                tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
            }
            Self::Bytes(bytes) => {
                let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(length)?));
                let found = range.and_then(|range| bytes.get(range));
                found.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
            Self::Changed { before, writes } => {
                let mut bytes = Box::pin(before.read(offset, length)).await?;
                writes.iter().for_each(|(at, data)| lay_over(&mut bytes, offset, *at, data));
                Ok(bytes)
            }
        }
    }
}

/// Puts the part of `data`, which lies at `at` on the disk, into `bytes`, which lie at `offset`.
fn lay_over(bytes: &mut [u8], offset: u64, at: u64, data: &[u8]) {
    // What does not fit an address is far beyond both.
    let skip = |from: u64, to: u64| usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX);
    let into = bytes.get_mut(skip(offset, at)..).unwrap_or_default();
    let from = data.get(skip(at, offset)..).unwrap_or_default();
    let length = into.len().min(from.len());
    into[..length].copy_from_slice(&from[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn later_writes_are_read_wherever_a_read_meets_them() {
        let before = Arc::new(Source::Bytes(Arc::from([0; 16])));
        let writes: Vec<(u64, Vec<u8>)> = vec![(4, vec![1; 4]), (6, vec![2; 4]), (15, vec![3])];
        let changed = Source::Changed { before, writes: writes.into() };
        let whole = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0, 3];
        assert_eq!(changed.size_bytes(), 16);
        for offset in 0..16 {
            for length in 1..=16 - offset {
                let read = changed.read(offset as u64, length).await.unwrap();
                assert_eq!(read, whole[offset..offset + length], "{offset}+{length}");
            }
        }
        assert!(changed.read(10, 7).await.is_err());
    }
}
