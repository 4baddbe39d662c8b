//! Devices that tests look through, and servers to reach them.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod devices;
pub mod servers;

use std::time::Duration;

/// Tells served from hung; no test waits for it to pass.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The value, or a failure after [`PATIENCE`] with what was waited for.
#[track_caller]
pub fn soon<F: Future>(what: &'static str, future: F) -> impl Future<Output = F::Output> {
    let caller = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(PATIENCE, future).await {
            Ok(value) => value,
            Err(_) => panic!("waited in vain for {what} at {caller}"),
        }
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
