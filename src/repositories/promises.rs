//! Room in repositories that is free and spoken for: what running jobs and merges are still expected to store. Everybody who is about
//! to fill a repository makes a promise first and then asks whether it can be kept beside those that were made before.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::id::RepositoryId;

/// What a task is still expected to store, in bytes.
type Outstanding = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The promises of this process, of all repositories.
#[derive(Debug, Default)]
pub struct Promises {
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    next: u64,
    /// In the order in which they were made.
    open: BTreeMap<u64, (RepositoryId, Outstanding)>,
}

impl fmt::Debug for Made {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_map().entries(self.open.iter().map(|(number, (repository, _))| (number, repository))).finish()
    }
}

/// Room that is spoken for, until dropped.
#[derive(Debug)]
pub struct Promise {
    number: u64,
    repository: RepositoryId,
    promises: Arc<Promises>,
}

impl Promises {
    /// Promises `bytes` of a repository, whether there is room for them or not.
    pub fn make(self: &Arc<Self>, repository: &RepositoryId, bytes: u64) -> Promise {
        let mut made = self.made();
        let number = made.next;
        made.next += 1;
        made.open.insert(number, (repository.clone(), Arc::new(move || bytes)));
        Promise { number, repository: repository.clone(), promises: Arc::clone(self) }
    }

    /// What is spoken for in a repository, in bytes.
    pub fn spoken_for(&self, repository: &RepositoryId) -> u64 {
        self.sum(repository, u64::MAX)
    }

    /// That of the promises before this number.
    fn sum(&self, repository: &RepositoryId, before: u64) -> u64 {
        let here: Vec<Outstanding> = {
            let made = self.made();
            let earlier = made.open.range(..before);
            earlier.filter(|(_, (at, _))| at == repository).map(|(_, (_, bytes))| Arc::clone(bytes)).collect()
        };
        // Asked without the lock: whoever answers may hold others.
        here.iter().map(|outstanding| outstanding()).fold(0, u64::saturating_add)
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Promise {
    /// From now on it is what this tells: less as it is being kept.
    pub fn follow(&self, outstanding: impl Fn() -> u64 + Send + Sync + 'static) {
        if let Some((_, told)) = self.promises.made().open.get_mut(&self.number) {
            *told = Arc::new(outstanding);
        }
    }

    /// What was spoken for before this, in bytes. Of two that are made at once one sees the other, so that both are kept or one is
    /// refused.
    pub fn earlier_bytes(&self) -> u64 {
        self.promises.sum(&self.repository, self.number)
    }

    /// What is spoken for in its repository, with itself, in bytes.
    pub fn spoken_for(&self) -> u64 {
        self.promises.spoken_for(&self.repository)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let kept = self.promises.made().open.remove(&self.number);
        drop(kept);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn each_repository_has_one_sum_and_each_promise_sees_those_before_it() {
        let promises = Arc::new(Promises::default());
        let (main, other): (RepositoryId, RepositoryId) = ("main".parse().unwrap(), "other".parse().unwrap());
        let (first, second) = (promises.make(&main, 10), promises.make(&main, 5));
        let elsewhere = promises.make(&other, 1);
        assert_eq!((first.earlier_bytes(), second.earlier_bytes(), elsewhere.earlier_bytes()), (0, 10, 0));
        let left = Arc::new(AtomicU64::new(7));
        let told = Arc::clone(&left);
        first.follow(move || told.load(Ordering::Relaxed));
        assert_eq!((second.earlier_bytes(), promises.spoken_for(&main)), (7, 12));
        left.store(0, Ordering::Relaxed);
        assert_eq!(promises.spoken_for(&main), 5);
        drop((first, second));
        assert_eq!((promises.spoken_for(&main), elsewhere.spoken_for()), (0, 1));
    }
}
