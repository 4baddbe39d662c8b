//! What all reading of a verification passes, piece by piece: how far it is, and the wish of the service to end it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Ends or holds all verifications of a hub between two pieces.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    stopped: bool,
    held: usize,
    /// How many stand before it.
    waiting: usize,
}

/// The service stops; what was read so far means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the service is stopping")]
pub struct Stopped;

/// As long as it lives, verifications stand still between two pieces. They can be stopped meanwhile.
#[derive(Debug)]
pub struct Held {
    gate: Arc<Gate>,
}

impl Gate {
    /// Waits while somebody holds it.
    ///
    /// # Errors
    /// The service stops.
    pub fn pass(&self) -> Result<(), Stopped> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        let passing = self.changed.wait_while(state, |state| state.held > 0 && !state.stopped);
        let mut state = passing.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        if state.stopped { Err(Stopped) } else { Ok(()) }
    }

    /// Lets nothing pass until the value is dropped.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).held += 1;
        Held { gate: Arc::clone(self) }
    }

    /// Ends everything at its next piece, for good.
    pub fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        self.changed.notify_all();
    }

    /// Whether it was stopped.
    pub fn is_stopped(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped
    }
}

impl Held {
    /// How many verifications stand still now.
    pub fn waiting(&self) -> usize {
        self.gate.state.lock().unwrap_or_else(PoisonError::into_inner).waiting
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.held = state.held.saturating_sub(1);
        self.gate.changed.notify_all();
    }
}

/// How far one verification is, for whoever asks meanwhile.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that there are to go through, holes of disks included.
    pub total: AtomicU64,
    /// Those of them that are done.
    pub done: AtomicU64,
    /// Files that were hashed.
    pub files: AtomicU64,
    /// Bytes that were hashed: of files, and of disks without their holes.
    pub read: AtomicU64,
    /// Bytes of disks that were held against what was received for them.
    pub compared: AtomicU64,
}

/// The reading of one verification.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// What it passes.
    pub gate: Arc<Gate>,
    /// What it tells.
    pub progress: Arc<Progress>,
}

impl Reading {
    /// A file was hashed.
    pub fn file(&self) {
        self.progress.files.fetch_add(1, Ordering::Relaxed);
    }

    /// More work was found.
    pub fn expect(&self, bytes: u64) {
        self.progress.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A piece was read.
    ///
    /// # Errors
    /// The service stops.
    pub fn read(&self, bytes: u64) -> Result<(), Stopped> {
        self.progress.read.fetch_add(bytes, Ordering::Relaxed);
        self.skip(bytes)
    }

    /// So many bytes of a disk were held against what was received for them.
    pub fn compared(&self, bytes: u64) {
        self.progress.compared.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A piece is done without reading it.
    ///
    /// # Errors
    /// The service stops.
    pub fn skip(&self, bytes: u64) -> Result<(), Stopped> {
        self.progress.done.fetch_add(bytes, Ordering::Relaxed);
        self.gate.pass()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_is_held_lets_nothing_pass_until_it_is_let_go_or_stopped() {
        let gate = Arc::new(Gate::default());
        assert_eq!(gate.pass(), Ok(()));
        let held = gate.hold();
        let waiting = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.pass()
        });
        while held.waiting() < 1 {
            std::thread::yield_now();
        }
        drop(held);
        assert_eq!(waiting.join().unwrap(), Ok(()));
        let _held = gate.hold();
        gate.stop();
        assert_eq!(gate.pass(), Err(Stopped));
    }
}
