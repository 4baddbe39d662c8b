//! Admission to an image: open until its owner closes it, with a count of the requests inside.
//!
//! Closing is what makes a seal possible: requests that are inside finish, later ones are refused, and when the last has
//! left nothing can change the image any more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The door of one image. Once closed it stays closed.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    empty: Notify,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    inside: usize,
}

/// Permission for one request, until dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
}

impl Gate {
    /// Lets a request in, unless the gate is closed.
    pub fn enter(self: &Arc<Self>) -> Option<Pass> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.inside += 1;
        Some(Pass { gate: Arc::clone(self) })
    }

    /// Lets nobody in from now on. Repeatable.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits until nobody is inside; meaningful once closed.
    pub async fn emptied(&self) {
        loop {
            let mut notified = std::pin::pin!(self.empty.notified());
            // Registered before the look, so that the last one leaving in between is not missed.
            notified.as_mut().enable();
            if self.lock().inside == 0 {
                return;
            }
            notified.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.inside -= 1;
        if state.inside == 0 {
            self.gate.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn closing_lets_those_inside_finish_and_nobody_else_in() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter().unwrap();
        let second = gate.enter().unwrap();
        gate.close();
        gate.close();
        assert!(gate.enter().is_none());
        let waiting = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.emptied().await }
        });
        drop(first);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.unwrap();
        gate.emptied().await;
    }
}
