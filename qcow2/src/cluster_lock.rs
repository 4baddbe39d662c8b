//! Locks on ranges of guest clusters: payload written in place shares a cluster, a change of its mapping excludes all
//! other writers of it.
//!
//! Requests are served in the order in which they came as far as they overlap, so none starves and, since a thread holds
//! one range at a time, none can wait in a circle. Readers take no lock: a host cluster is never reused within a session,
//! so a mapping that was looked up stays readable.

use crate::sync::{Condvar, Mutex, lock, wait};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Shared,
    Exclusive,
}

#[derive(Debug)]
struct Claim {
    id: u64,
    first: u64,
    last: u64,
    mode: Mode,
}

#[derive(Debug, Default)]
struct Queue {
    next_id: u64,
    /// In order of arrival, granted ones and waiting ones alike.
    claims: Vec<Claim>,
}

impl Queue {
    /// Whether no earlier claim stands against the one with this id.
    fn is_granted(&self, id: u64) -> bool {
        let Some(position) = self.claims.iter().position(|claim| claim.id == id) else { return true };
        let (earlier, rest) = self.claims.split_at(position);
        let Some(mine) = rest.first() else { return true };
        !earlier.iter().any(|claim| {
            claim.first <= mine.last
                && mine.first <= claim.last
                && (claim.mode == Mode::Exclusive || mine.mode == Mode::Exclusive)
        })
    }
}

/// All claims on the clusters of one image.
#[derive(Debug, Default)]
pub(crate) struct ClusterLocks {
    queue: Mutex<Queue>,
    released: Condvar,
}

impl ClusterLocks {
    /// Waits until nobody changes the mapping of clusters `first..=last`, and keeps it so.
    pub(crate) fn shared(&self, first: u64, last: u64) -> ClusterGuard<'_> {
        self.claim(first, last, Mode::Shared)
    }

    /// Waits until nobody writes into clusters `first..=last`, and keeps it so.
    pub(crate) fn exclusive(&self, first: u64, last: u64) -> ClusterGuard<'_> {
        self.claim(first, last, Mode::Exclusive)
    }

    /// Whether nobody has or waits for any of the clusters `first..=last`.
    pub(crate) fn are_free(&self, first: u64, last: u64) -> bool {
        !lock(&self.queue).claims.iter().any(|claim| claim.first <= last && first <= claim.last)
    }

    fn claim(&self, first: u64, last: u64, mode: Mode) -> ClusterGuard<'_> {
        let mut queue = lock(&self.queue);
        let id = queue.next_id;
        queue.next_id += 1;
        queue.claims.push(Claim { id, first, last, mode });
        while !queue.is_granted(id) {
            queue = wait(&self.released, queue);
        }
        ClusterGuard { locks: self, id }
    }
}

/// A granted claim; dropping it lets the next one in.
#[derive(Debug)]
pub(crate) struct ClusterGuard<'a> {
    locks: &'a ClusterLocks,
    id: u64,
}

impl Drop for ClusterGuard<'_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.locks.queue);
        queue.claims.retain(|claim| claim.id != self.id);
        let waiting = !queue.claims.is_empty();
        drop(queue);
        if waiting {
            self.locks.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn an_exclusive_claim_excludes_every_other_holder_of_its_clusters() {
        let locks = ClusterLocks::default();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (locks, inside) = (&locks, &inside);
                scope.spawn(move || {
                    for round in 0..500u64 {
                        if (thread + round) % 3 == 0 {
                            let _guard = locks.exclusive(round % 2, 2);
                            assert_eq!(inside.fetch_add(100, Ordering::SeqCst), 0);
                            inside.fetch_sub(100, Ordering::SeqCst);
                        } else {
                            let _guard = locks.shared(1, 5);
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 100);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(lock(&locks.queue).claims.is_empty());
    }

    #[test]
    fn claims_that_do_not_overlap_are_granted_at_once() {
        let locks = ClusterLocks::default();
        let _low = locks.exclusive(0, 9);
        let _high = locks.exclusive(10, 19);
        let _also = locks.shared(20, 20);
        let _twice = locks.shared(20, 21);
    }
}
