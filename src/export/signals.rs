//! How an export tells its owner that something happened, without knowing who listens.
//!
//! Two kinds of news: *life* (any request), which must cost almost nothing because every request gives it, and *changes*
//! (a connection came or went, a first write, a failure), which wake the owner. All disks of a job share one value.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Signs of life and changes of all exports of one job.
#[derive(Debug)]
pub struct Signals {
    /// What the times below count from.
    born: Instant,
    /// Milliseconds from `born` to the last sign of life.
    last_life_ms: AtomicU64,
    /// Whether there was any sign of life at all.
    alive: AtomicBool,
    /// Whether the owner wants to be woken by the next sign of life.
    wake_on_life: AtomicBool,
    changed: Notify,
}

impl Default for Signals {
    fn default() -> Self {
        Self {
            born: Instant::now(),
            last_life_ms: AtomicU64::new(0),
            alive: AtomicBool::new(false),
            wake_on_life: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }
}

impl Signals {
    /// Notes a sign of life.
    pub fn life(&self) {
        self.life_at(Instant::now());
    }

    /// Notes a sign of life at a moment that was looked up for something else.
    pub fn life_at(&self, moment: Instant) {
        let now_ms = u64::try_from(moment.duration_since(self.born).as_millis()).unwrap_or(u64::MAX);
        self.last_life_ms.store(now_ms, Ordering::Relaxed);
        self.alive.store(true, Ordering::Release);
        if self.wake_on_life.load(Ordering::Relaxed) && self.wake_on_life.swap(false, Ordering::AcqRel) {
            self.changed.notify_one();
        }
    }

    /// Notes a change that the owner must look at; it is a sign of life too.
    pub fn change(&self) {
        self.life();
        self.changed.notify_one();
    }

    /// Wakes the owner without this being a sign of life.
    pub fn wake(&self) {
        self.changed.notify_one();
    }

    /// When the last sign of life was, or nothing when there was none.
    pub fn last_life(&self) -> Option<Instant> {
        self.alive
            .load(Ordering::Acquire)
            .then(|| self.born + Duration::from_millis(self.last_life_ms.load(Ordering::Relaxed)))
    }

    /// Makes the next sign of life wake the owner.
    pub fn wake_on_life(&self) {
        self.wake_on_life.store(true, Ordering::Release);
    }

    /// Waits for a change. One that came before the call is not lost; several are one.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn life_is_remembered_and_wakes_only_who_asked() {
        let signals = Signals::default();
        assert_eq!(signals.last_life(), None);
        tokio::time::advance(Duration::from_secs(5)).await;
        signals.life();
        assert_eq!(signals.last_life(), Some(Instant::now()));
        assert!(tokio::time::timeout(Duration::from_secs(1), signals.changed()).await.is_err());
        signals.wake_on_life();
        signals.life();
        signals.changed().await;
        signals.change();
        signals.changed().await;
    }
}
