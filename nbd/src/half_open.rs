//! Connections that are still in the handshake: so many of a listener and so many of the process, and one more closes the
//! oldest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// See the module.
#[derive(Debug)]
pub(crate) struct HalfOpen {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    waiting: BTreeMap<u64, Arc<Notify>>,
}

impl HalfOpen {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit: limit.max(1), state: Mutex::default() })
    }

    /// Counts a new connection, at the price of the oldest one if there are too many.
    fn enter(self: &Arc<Self>) -> HalfOpened {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.waiting.len() >= self.limit {
            if let Some((_, oldest)) = state.waiting.pop_first() {
                oldest.notify_one();
            }
        }
        let (id, evicted) = (state.next, Arc::<Notify>::default());
        state.next += 1;
        state.waiting.insert(id, evicted.clone());
        HalfOpened { among: self.clone(), id, evicted }
    }
}

/// A connection that counts for its listener and for its process, until dropped.
#[derive(Debug)]
pub(crate) struct Handshaking {
    of_listener: HalfOpened,
    of_process: HalfOpened,
}

impl Handshaking {
    /// Counts a new connection in both.
    pub(crate) fn new(listener: &Arc<HalfOpen>, process: &Arc<HalfOpen>) -> Self {
        Self { of_listener: listener.enter(), of_process: process.enter() }
    }

    /// Waits until this connection has to make room for another one.
    pub(crate) async fn evicted(&self) {
        tokio::select! {
            () = self.of_listener.evicted() => {}
            () = self.of_process.evicted() => {}
        }
    }
}

/// One of those counted.
#[derive(Debug)]
struct HalfOpened {
    among: Arc<HalfOpen>,
    id: u64,
    evicted: Arc<Notify>,
}

impl HalfOpened {
    async fn evicted(&self) {
        self.evicted.notified().await;
    }
}

impl Drop for HalfOpened {
    fn drop(&mut self) {
        self.among.state.lock().unwrap_or_else(PoisonError::into_inner).waiting.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_too_many_evicts_the_oldest_and_those_that_left_do_not_count() {
        let among = HalfOpen::new(2);
        let first = among.enter();
        let second = among.enter();
        drop(second);
        let third = among.enter();
        let fourth = among.enter();
        first.evicted().await;
        drop(first);
        let fifth = among.enter();
        third.evicted().await;
        let still_there = std::time::Duration::from_millis(1);
        assert!(tokio::time::timeout(still_there, fourth.evicted()).await.is_err());
        assert!(tokio::time::timeout(still_there, fifth.evicted()).await.is_err());
    }
}
