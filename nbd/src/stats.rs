//! What an export has seen so far: plain counters that anyone may read at any time, and a channel for the number of
//! connections, for those who wait for the first one or for the end of the last one.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::watch;

/// The counters of one export. They only grow, except `connections`.
#[derive(Debug)]
pub struct ExportStats {
    connections: watch::Sender<usize>,
    /// Connections that reached the transmission phase.
    pub(crate) accepted: AtomicU64,
    /// Connections turned away because the export had enough of them.
    pub(crate) refused: AtomicU64,
    /// Requests received, whatever became of them.
    pub(crate) requests: AtomicU64,
    /// Bytes handed to clients by READ.
    pub(crate) bytes_read: AtomicU64,
    /// Bytes of WRITE that the device took.
    pub(crate) bytes_written: AtomicU64,
    /// Bytes of WRITE_ZEROES and TRIM that the device took.
    pub(crate) bytes_zeroed: AtomicU64,
    /// Requests answered with an error.
    pub(crate) errors: AtomicU64,
    /// Connections closed because the peer stalled.
    pub(crate) stalled: AtomicU64,
}

/// The counters at one moment. Each is exact; together they are a snapshot of a moving thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Connections in the transmission phase now, those included whose last device call still runs.
    pub connections: u64,
    /// Connections that ever reached the transmission phase.
    pub accepted: u64,
    /// Connections turned away because the export had enough of them.
    pub refused: u64,
    /// Requests received, whatever became of them.
    pub requests: u64,
    /// Bytes handed to clients by READ.
    pub bytes_read: u64,
    /// Bytes of WRITE that the device took.
    pub bytes_written: u64,
    /// Bytes of WRITE_ZEROES and TRIM that the device took.
    pub bytes_zeroed: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Connections closed because the peer stalled in the middle of something.
    pub stalled: u64,
}

impl Default for ExportStats {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            connections: watch::Sender::new(0),
            accepted: zero(),
            refused: zero(),
            requests: zero(),
            bytes_read: zero(),
            bytes_written: zero(),
            bytes_zeroed: zero(),
            errors: zero(),
            stalled: zero(),
        }
    }
}

impl ExportStats {
    /// All counters now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            connections: u64::try_from(*self.connections.borrow()).unwrap_or(u64::MAX),
            accepted: self.accepted.load(Relaxed),
            refused: self.refused.load(Relaxed),
            requests: self.requests.load(Relaxed),
            bytes_read: self.bytes_read.load(Relaxed),
            bytes_written: self.bytes_written.load(Relaxed),
            bytes_zeroed: self.bytes_zeroed.load(Relaxed),
            errors: self.errors.load(Relaxed),
            stalled: self.stalled.load(Relaxed),
        }
    }

    /// The number of connections in the transmission phase, as it changes. A connection counts until the last device call
    /// that it started has returned, so at 0 nothing touches the device any more on behalf of a client.
    pub fn connections(&self) -> watch::Receiver<usize> {
        self.connections.subscribe()
    }

    /// Takes a place for a connection if fewer than `cap` are taken; dropping the place gives it back.
    pub(crate) fn enter(self: &std::sync::Arc<Self>, cap: usize) -> Option<Place> {
        let entered = self.connections.send_if_modified(|now| {
            let free = *now < cap;
            *now += usize::from(free);
            free
        });
        if !entered {
            self.refused.fetch_add(1, Relaxed);
        }
        entered.then(|| Place(self.clone()))
    }
}

/// One connection of an export.
#[derive(Debug)]
pub(crate) struct Place(std::sync::Arc<ExportStats>);

impl Place {
    pub(crate) fn stats(&self) -> &ExportStats {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.send_modify(|now| *now -= 1);
    }
}
