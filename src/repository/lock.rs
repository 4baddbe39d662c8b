//! One hub per repository: an advisory lock on `<repository>/.lock`, held as long as the process lives, and the marker
//! file that says whose repository this is.
//!
//! The lock is the kernel's (`flock`): it ends with the process however that dies, so nothing stale can be left behind.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

const LOCK_FILE: &str = ".lock";
/// Marks a folder as a repository.
pub const MARKER_FILE: &str = ".blockyard-repository.json";
/// The layout of a repository that this version writes.
const FORMAT: u32 = 1;

/// Why a repository cannot be used by this process.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("repository {id} is in use by another hub ({})", path.display())]
    Held {
        /// The repository.
        id: String,
        /// Its folder.
        path: PathBuf,
    },
    /// The folder is marked as another repository, or by a newer version.
    #[error("{} is marked as repository {found} with format {format}, not as {id} with format up to {FORMAT}", path.display())]
    Foreign {
        /// The repository that was asked for.
        id: String,
        /// Its folder.
        path: PathBuf,
        /// What the marker says.
        found: String,
        /// Its format.
        format: u32,
    },
    /// The folder is not marked, although the hub has used it: it is the mount point of a disk that is not there.
    #[error("{} is not marked as repository {id}, although it holds restore points: is its disk mounted?", path.display())]
    Unmarked {
        /// The repository.
        id: String,
        /// Its folder.
        path: PathBuf,
    },
    /// Its file system hangs.
    #[error("{} does not answer, the folder of repository {id}", path.display())]
    Unanswered {
        /// The repository.
        id: String,
        /// Its folder.
        path: PathBuf,
    },
    /// The folder is missing, read-only, or otherwise not usable.
    #[error("repository {id} cannot be used: {source}")]
    Unusable {
        /// The repository.
        id: String,
        /// What the file system said.
        source: io::Error,
    },
}

impl LockError {
    /// Whether using the repository all the same could harm another hub's data.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Held { .. } | Self::Foreign { .. })
    }

    /// The reason without paths, for a caller.
    pub fn public(&self) -> String {
        match self {
            Self::Held { .. } => "another hub is using its folder".to_owned(),
            Self::Foreign { found, .. } => format!("its folder is marked as repository {found}"),
            Self::Unmarked { .. } => "its folder is not there".to_owned(),
            Self::Unanswered { .. } => "its file system does not answer".to_owned(),
            Self::Unusable { source, .. } => source.kind().to_string(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Marker {
    id: String,
    format: u32,
}

/// What a folder that is not marked means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marking {
    /// Nothing was ever stored in it: it becomes the repository.
    MayBegin,
    /// It cannot be the folder that was used.
    MustBeThere,
}

/// The file system that a folder was on when it was locked: a disk that is mounted over it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(u64);

/// One lock. The folder is remembered, as a repository may be given another one, and its file system, as a disk may be mounted
/// over it.
#[derive(Debug)]
struct Held {
    path: PathBuf,
    device: Device,
    lock: File,
}

impl Drop for Held {
    /// Closing the file would do it, unless another thread is starting a process just now: the child holds a copy of the
    /// descriptor, and with it the lock, until it runs its program.
    fn drop(&mut self) {
        let _ = self.lock.unlock();
    }
}

/// The locks this process holds; they go with it.
#[derive(Debug, Default)]
pub struct RepositoryLocks {
    held: Mutex<HashMap<String, Held>>,
}

impl RepositoryLocks {
    /// Holds nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the lock of a repository, or finds that this process has it already, and says where the folder is. Marks it at the
    /// first time, where `marking` allows that. Blocks for the file system. Not to be called twice at once for one repository: the
    /// second would meet the lock of the first.
    ///
    /// # Errors
    /// Another hub holds it, the folder is not the one that was marked, or it cannot be written.
    pub fn acquire(&self, id: &str, path: &Path, marking: Marking) -> Result<Device, LockError> {
        let unusable = |source| LockError::Unusable { id: id.to_owned(), source };
        let device = Device(fs::metadata(path).map_err(unusable)?.dev());
        // A lock that is held says nothing of a folder that went away since.
        if marking == Marking::MustBeThere && !is_marked(path) {
            return Err(LockError::Unmarked { id: id.to_owned(), path: path.to_owned() });
        }
        if self.held().get(id).is_some_and(|held| held.path == path && held.device == device) {
            return Ok(device);
        }
        let file = open_lock(&path.join(LOCK_FILE)).map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held { id: id.to_owned(), path: path.to_owned() });
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        check_marker(id, path)?;
        let before = self.held().insert(id.to_owned(), Held { path: path.to_owned(), device, lock: file });
        drop(before);
        Ok(device)
    }

    /// Gives the lock back, for a repository that is removed from this hub.
    pub fn release(&self, id: &str) {
        let held = self.held().remove(id);
        drop(held);
    }

    /// Never held while a file system is asked: one that hangs must not hold up the others.
    fn held(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file system that became read-only still has points to restore from.
fn open_lock(path: &Path) -> io::Result<File> {
    match OpenOptions::new().create(true).truncate(false).write(true).mode(0o640).open(path) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(path),
        opened => opened,
    }
}

/// Whether a folder is marked as a repository. One that was and is no more is another folder, such as the mount point of a
/// disk that is gone.
pub fn is_marked(path: &Path) -> bool {
    path.join(MARKER_FILE).is_file()
}

fn check_marker(id: &str, path: &Path) -> Result<(), LockError> {
    let unusable = |source| LockError::Unusable { id: id.to_owned(), source };
    let marker_path = path.join(MARKER_FILE);
    match fs::read(&marker_path) {
        Ok(bytes) => {
            let marker: Marker = serde_json::from_slice(&bytes).map_err(|error| unusable(error.into()))?;
            if marker.id == id && marker.format <= FORMAT {
                return Ok(());
            }
            Err(LockError::Foreign {
                id: id.to_owned(),
                path: path.to_owned(),
                found: marker.id,
                format: marker.format,
            })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            write_marker(&marker_path, &Marker { id: id.to_owned(), format: FORMAT }).map_err(unusable)?;
            File::open(path).and_then(|directory| directory.sync_all()).map_err(unusable)
        }
        Err(error) => Err(unusable(error)),
    }
}

/// Written beside and renamed, so that a crash leaves a whole marker or none.
fn write_marker(path: &Path, marker: &Marker) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    let mut file = File::create(&beside)?;
    file.write_all(&serde_json::to_vec(marker)?)?;
    file.sync_all()?;
    fs::rename(beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_hub_is_refused_until_the_first_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let first = RepositoryLocks::new();
        first.acquire("main", root.path(), Marking::MayBegin).unwrap();
        first.acquire("main", root.path(), Marking::MayBegin).unwrap();
        let second = RepositoryLocks::new();
        assert!(matches!(second.acquire("main", root.path(), Marking::MayBegin), Err(LockError::Held { .. })));
        drop(first);
        second.acquire("main", root.path(), Marking::MayBegin).unwrap();
    }

    #[test]
    fn a_folder_marked_as_another_repository_is_refused() {
        let root = tempfile::tempdir().unwrap();
        RepositoryLocks::new().acquire("main", root.path(), Marking::MayBegin).unwrap();
        let error = RepositoryLocks::new().acquire("other", root.path(), Marking::MayBegin).unwrap_err();
        assert!(matches!(error, LockError::Foreign { found, .. } if found == "main"));
    }

    #[test]
    fn a_missing_folder_is_unusable() {
        let error =
            RepositoryLocks::new().acquire("main", Path::new("/nonexistent/folder"), Marking::MayBegin).unwrap_err();
        assert!(matches!(error, LockError::Unusable { .. }));
    }

    #[test]
    fn a_folder_that_lost_its_mark_is_another_folder() {
        let root = tempfile::tempdir().unwrap();
        let locks = RepositoryLocks::new();
        locks.acquire("main", root.path(), Marking::MayBegin).unwrap();
        locks.acquire("main", root.path(), Marking::MustBeThere).unwrap();
        fs::remove_file(root.path().join(MARKER_FILE)).unwrap();
        let error = locks.acquire("main", root.path(), Marking::MustBeThere).unwrap_err();
        assert!(matches!(error, LockError::Unmarked { .. }));
        assert!(!is_marked(root.path()), "and is not marked again");
    }
}
