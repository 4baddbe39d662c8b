//! Admission to an image: open until its owner closes it, with a count of the requests inside.
//!
//! Closing is what makes a seal possible: requests that are inside finish, later ones are refused, and when the last has
//! left nothing can change the image any more. Since every request passes here, this is also where the time with requests
//! in flight is taken ([`busy`](super::busy)): at the first one in and the last one out, under the lock that counts them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

use super::busy::{Bottleneck, Busy};

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
    busy: Busy,
}

/// Permission for one request, until dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Arc<Gate>,
    /// When the request ended, where that was looked up for something else.
    ended: Option<Instant>,
}

impl Pass {
    /// The request ended at this moment, which spares another look at the clock.
    pub fn ended_at(&mut self, moment: Instant) {
        self.ended = Some(moment);
    }
}

impl Gate {
    /// Lets a request in, unless the gate is closed.
    pub fn enter(self: &Arc<Self>) -> Option<Pass> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        if state.inside == 0 {
            state.busy.begin(Instant::now());
        }
        state.inside += 1;
        Some(Pass { gate: Arc::clone(self), ended: None })
    }

    /// Lets nobody in from now on. Repeatable.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// What requests waited for in the last ten seconds, or were waited for; nothing before there was a second of data.
    pub fn bottleneck(&self) -> Option<Bottleneck> {
        self.lock().busy.bottleneck(Instant::now())
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
            state.busy.end(self.ended.unwrap_or_else(Instant::now));
            self.gate.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn requests_that_overlap_count_as_time_and_not_as_a_sum() {
        let gate = Arc::new(Gate::default());
        // Eight at once for half of each second: four seconds of requests per second, and half of the time.
        for _ in 0..20 {
            let passes: Vec<_> = (0..8).map(|_| gate.enter().unwrap()).collect();
            tokio::time::advance(Duration::from_millis(500)).await;
            drop(passes);
            tokio::time::advance(Duration::from_millis(500)).await;
        }
        assert_eq!(gate.bottleneck(), Some(Bottleneck::Balanced));
        // Two that take turns, so that there always is one.
        let mut held = gate.enter().unwrap();
        for _ in 0..20 {
            let next = gate.enter().unwrap();
            tokio::time::advance(Duration::from_millis(500)).await;
            drop(std::mem::replace(&mut held, next));
        }
        assert_eq!(gate.bottleneck(), Some(Bottleneck::Target));
        drop(held);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(gate.bottleneck(), Some(Bottleneck::Source));
    }

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
