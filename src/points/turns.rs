//! Work that goes on once at a time in each repository. One whose disk hangs, or whose record cannot follow, keeps the turn of its
//! own repository and of no other.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::id::RepositoryId;

type Turn = Arc<tokio::sync::Mutex<()>>;

/// The turns of one kind of work, by repository. Those of removed repositories stay: they are few, and small.
#[derive(Debug, Default)]
pub(super) struct Turns {
    of: Mutex<BTreeMap<RepositoryId, Turn>>,
}

impl Turns {
    /// Waits for the turn of a repository, and has it until the value is dropped.
    pub(super) async fn take(&self, repository: &RepositoryId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.of.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(repository.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// Waits until everybody who has a turn or waits for one now has had it.
    pub(super) async fn had(&self) {
        let turns: Vec<Turn> = self.of.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for turn in turns {
            drop(turn.lock().await);
        }
    }
}
