//! A raw file, with holes where the disk has zeroes, and the name that it gets in the end.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{Advice, CWD, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::disk::{Disk, DiskError, Run, RunKind, Target};
use super::error::RestoreCommandError;

/// What file systems keep holes in.
const GRAIN: usize = 4096;

/// A new file. Nothing was ever written where nothing is written: holes need no work.
#[derive(Clone, Debug)]
pub(super) struct RawFile {
    file: Arc<File>,
}

impl RawFile {
    pub(super) fn create(path: &Path, size_bytes: u64) -> io::Result<Self> {
        // Whoever restores a disk decides who else may read it.
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(size_bytes)?;
        Ok(Self { file: Arc::new(file) })
    }

    async fn run<T: Send + 'static>(
        &self,
        step: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DiskError> {
        let file = Arc::clone(&self.file);
        let done = tokio::task::spawn_blocking(move || step(&file)).await;
        done.unwrap_or_else(|panic| Err(io::Error::other(panic))).map_err(DiskError::new)
    }
}

#[async_trait]
impl Disk for RawFile {
    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, DiskError> {
        self.run(move |file| {
            let end = offset + length;
            let data = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
                Ok(data) => data.min(end),
                // There is none up to the end.
                Err(Errno::NXIO) => end,
                Err(errno) => return Err(errno.into()),
            };
            if data > offset {
                return Ok(vec![Run { length: data - offset, kind: RunKind::Zero }]);
            }
            let hole = rustix::fs::seek(file, SeekFrom::Hole(offset))?.clamp(offset + 1, end);
            Ok(vec![Run { length: hole - offset, kind: RunKind::Data }])
        })
        .await
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, DiskError> {
        self.run(move |file| {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
        .await
    }
}

#[async_trait]
impl Target for RawFile {
    fn grain(&self) -> usize {
        GRAIN
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        self.run(move |file| file.write_all_at(&data, offset)).await
    }

    async fn zero(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Ok(())
    }

    async fn finish(&self) -> Result<Box<dyn Disk>, DiskError> {
        self.run(|file| {
            file.sync_all()?;
            // What is read back should come from the disk. A hint: where it is not taken, memory is compared.
            let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
            Ok(())
        })
        .await?;
        Ok(Box::new(self.clone()))
    }
}

/// Whether a file that is there is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Existing {
    Refuse,
    Replace,
}

/// A file in the making, called `<path>.partial`; removed when dropped before it got its name.
#[derive(Debug)]
pub(super) struct Unfinished {
    path: PathBuf,
    partial: PathBuf,
    existing: Existing,
}

impl Unfinished {
    /// Looks whether the file may be made; nothing is made yet.
    pub(super) fn begin(path: &Path, existing: Existing) -> Result<Self, RestoreCommandError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        match fs::symlink_metadata(path) {
            Ok(facts) if !facts.is_file() => return Err(RestoreCommandError::NotAFile { path: path.to_owned() }),
            Ok(_) if existing == Existing::Refuse => {
                return Err(RestoreCommandError::Exists { path: path.to_owned() });
            }
            Ok(_) | Err(_) => {}
        }
        // Looked for here, so that this value is never made for, and never removes, a file of somebody else.
        if fs::symlink_metadata(&partial).is_ok() {
            return Err(RestoreCommandError::Unfinished { path: partial });
        }
        Ok(Self { path: path.to_owned(), partial, existing })
    }

    /// Where it is made.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Gives it its name, durably.
    pub(super) fn finish(self) -> Result<(), RestoreCommandError> {
        let named = match self.existing {
            Existing::Replace => self.take_over_mode().and_then(|()| fs::rename(&self.partial, &self.path)),
            Existing::Refuse => rename_new(&self.partial, &self.path),
        };
        let named = named.and_then(|()| {
            let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder)?.sync_all()
        });
        named.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => RestoreCommandError::Exists { path: self.path.clone() },
            _ => RestoreCommandError::Rename { path: self.path.clone(), source },
        })
    }

    /// Who may read the file that is replaced may read the new one; of a new name only its owner.
    fn take_over_mode(&self) -> io::Result<()> {
        let mode = match fs::symlink_metadata(&self.path) {
            Ok(facts) if facts.is_file() => facts.permissions().mode() & 0o777,
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        fs::set_permissions(&self.partial, fs::Permissions::from_mode(mode))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After the rename there is none of this name.
        let _ = fs::remove_file(&self.partial);
    }
}

/// A rename that replaces nothing.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system does not know how.
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to),
        renamed => Ok(renamed?),
    }
}
