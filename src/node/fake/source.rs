//! What is on the disks of the pretended VM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockyard_qcow2::{Access, AsyncImage, OpenOptions};

/// The content of a disk. Never changed by a backup.
#[derive(Clone, Debug)]
pub enum Source {
    /// A raw file.
    File {
        /// Where it is.
        path: PathBuf,
        /// Its length when it was opened, in whole sectors.
        size_bytes: u64,
    },
    /// A qcow2 image.
    Image(AsyncImage),
    /// Bytes in memory.
    Bytes(Arc<[u8]>),
}

/// The bytes that a qcow2 image begins with.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Disks are made of sectors; a file that ends in the middle of one is filled up with zeroes.
const SECTOR_BYTES: u64 = 512;

impl Source {
    /// A file as a disk: a qcow2 image when it begins like one, else raw.
    ///
    /// # Errors
    /// The file cannot be read, or is a qcow2 image that cannot be opened.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let mut magic = [0; QCOW2_MAGIC.len()];
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        if length >= magic.len() as u64 {
            file.read_exact_at(&mut magic, 0)?;
        }
        if magic == QCOW2_MAGIC {
            let opened = AsyncImage::open(path.to_owned(), OpenOptions::new(Access::ReadOnly)).await;
            return Ok(Self::Image(opened.map_err(io::Error::other)?));
        }
        Ok(Self::File { path: path.to_owned(), size_bytes: length.next_multiple_of(SECTOR_BYTES) })
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        match self {
            Self::File { size_bytes, .. } => *size_bytes,
            Self::Image(image) => image.size(),
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
                    let file = File::open(path)?;
                    let mut buffer = vec![0; length];
                    let there = file.metadata()?.len().saturating_sub(offset);
                    // What is beyond the end of the file and on the disk is the rest of the last sector.
                    let there = usize::try_from(there).map_or(length, |there| there.min(length));
                    if let Some(part) = buffer.get_mut(..there) {
                        file.read_exact_at(part, offset)?;
                    }
                    Ok(buffer)
                };
                tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
            }
            Self::Image(image) => image.read(offset, vec![0; length]).await.map_err(io::Error::other),
            Self::Bytes(bytes) => {
                let range = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(length)?));
                let found = range.and_then(|range| bytes.get(range));
                found.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
        }
    }
}
