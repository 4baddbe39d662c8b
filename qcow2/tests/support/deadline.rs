//! A bound that tells a hang from slow work.
#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Far above what any case takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `case` in a thread of its own and fails when it does not end; its panic is handed on.
pub fn within_deadline<T: Send + 'static>(context: &str, case: impl FnOnce() -> T + Send + 'static) -> T {
    let (ended, end) = channel();
    let thread = std::thread::spawn(move || {
        let value = case();
        // Nobody waits any more after the deadline.
        let _ = ended.send(());
        value
    });
    match end.recv_timeout(DEADLINE) {
        Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
        Err(RecvTimeoutError::Timeout) => panic!("{context}: no end after {DEADLINE:?}"),
    }
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
