//! A file beside the database that does nothing but take space: it goes when the file system is full, so that the endings of jobs
//! can still be recorded, and comes back when there is room.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};

/// Enough for the endings of many thousand jobs.
const BALLAST_BYTES: u64 = 16 << 20;
/// What must be free beside the ballast before it is made: else it would go and come with every other job.
const MARGIN_BYTES: u64 = 4 << 20;
/// With less than this free, whatever failed is taken to have failed for lack of space: SQLite has several words for it.
const FULL_BYTES: u64 = 1 << 20;
const NAME: &str = "ballast";

/// The file, or that it is gone.
#[derive(Debug)]
pub(super) struct Ballast {
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nobody has asked for it.
    Unwanted,
    /// It is there.
    Held,
    /// There is no room for it.
    Spent,
    /// This file system cannot set space aside.
    Unsupported,
}

impl Ballast {
    /// None yet, for a database in `folder`.
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), state: Mutex::new(State::Unwanted) }
    }

    /// Makes it if it is not there and there is room. Says whether the database has room. Blocks for the file system.
    pub(super) fn hold(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Unwanted | State::Spent) {
            *state = match self.make() {
                Ok(()) => State::Held,
                Err(error) if is_full(&error) => State::Spent,
                Err(error) => {
                    tracing::warn!(%error, "no space can be set aside for the database");
                    State::Unsupported
                }
            };
            match *state {
                State::Spent => tracing::error!("the file system of the database has no room; new backups are refused"),
                _ => tracing::debug!(?state, "ballast of the database"),
            }
        }
        *state != State::Spent
    }

    /// Whether it had to go and is not back.
    pub(super) fn is_spent(&self) -> bool {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) == State::Spent
    }

    /// Gives its space to the database, if that has none.
    pub(super) fn relieve(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != State::Held || self.free_bytes().is_none_or(|free| free >= FULL_BYTES) {
            return;
        }
        match fs::remove_file(self.folder.join(NAME)) {
            Ok(()) => {
                tracing::error!("the file system of the database is full; the ballast is gone, new backups are refused")
            }
            Err(error) => tracing::error!(%error, "the file system of the database is full"),
        }
        *state = State::Spent;
    }

    fn free_bytes(&self) -> Option<u64> {
        let facts = rustix::fs::statvfs(&self.folder).ok()?;
        Some(facts.f_bavail.saturating_mul(facts.f_frsize))
    }

    fn make(&self) -> io::Result<()> {
        let path = self.folder.join(NAME);
        // One of the last run may be there; it is only as long as it is when it is whole.
        if fs::metadata(&path).is_ok_and(|facts| facts.len() == BALLAST_BYTES) {
            return Ok(());
        }
        if self.free_bytes().is_some_and(|free| free < BALLAST_BYTES + MARGIN_BYTES) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path)?;
        let made = fallocate(&file, FallocateFlags::empty(), 0, BALLAST_BYTES);
        if made.is_err() {
            // Half of it would be taken for nothing.
            let _ = fs::remove_file(&path);
        }
        Ok(made?)
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_stays_while_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let ballast = Ballast::new(folder.path());
        ballast.relieve();
        assert!(!ballast.is_spent());
        assert!(ballast.hold() && ballast.hold());
        assert_eq!(fs::metadata(folder.path().join(NAME)).unwrap().len(), BALLAST_BYTES);
        ballast.relieve();
        assert!(folder.path().join(NAME).exists() && !ballast.is_spent());
        assert!(Ballast::new(folder.path()).hold());
    }
}
