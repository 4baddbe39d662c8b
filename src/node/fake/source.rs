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
        }
    }
}
