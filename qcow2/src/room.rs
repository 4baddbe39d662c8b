//! Room for payload in memory, from before it is taken until it is in the file: bounded, first come first served, and
//! counted by the memory that is held, not by the bytes that are meant.
//!
//! Room is waited for before a request claims anything else, so whoever waits here stands in nobody's way.

use std::collections::VecDeque;

use crate::sync::{Arc, Condvar, Mutex, lock, wait};

/// Memory of one image's payload; more waits, except for one request alone. A fraction of a second of disk time, so that a
/// flush or a durable write never waits long. (A guess; to be measured with the write path.)
const BUDGET_BYTES: u64 = 16 << 20;
/// When so much is held or less, the next in line is woken: not for each payload that leaves.
const WAKE_BYTES: u64 = BUDGET_BYTES / 4 * 3;
/// What the smallest payload costs: a page for its bytes, and one for all that is kept beside them.
const PAGE: u64 = 4096;

#[derive(Debug, Default)]
struct State {
    /// `held <= BUDGET_BYTES`, but for one request alone and for the filling of those under way.
    held: u64,
    /// Who waits, in the order in which they came: only the first is ever woken.
    line: VecDeque<Arc<Condvar>>,
}

impl State {
    fn fits(&self, bytes: u64) -> bool {
        self.held == 0 || self.held + bytes <= BUDGET_BYTES
    }

    fn wake_first(&self) {
        if let Some(first) = self.line.front() {
            first.notify_one();
        }
    }
}

/// The room of one image.
#[derive(Debug, Default)]
pub(crate) struct Room {
    state: Mutex<State>,
}

impl Room {
    /// Waits for its turn and for room for `length` bytes of payload.
    pub(crate) fn take(self: &Arc<Self>, length: u64) -> Share {
        let bytes = cost(length);
        let mut state = lock(&self.state);
        if !state.line.is_empty() || !state.fits(bytes) {
            let mine = Arc::new(Condvar::new());
            state.line.push_back(mine.clone());
            while !state.line.front().is_some_and(|first| Arc::ptr_eq(first, &mine)) || !state.fits(bytes) {
                state = wait(&mine, state);
            }
            state.line.pop_front();
            state.wake_first();
        }
        state.held += bytes;
        drop(state);
        Share { room: self.clone(), bytes }
    }

    /// For what a request that has its room turns out to need beside its payload, at most a few clusters: at once.
    pub(crate) fn add(self: &Arc<Self>, length: u64) -> Share {
        let bytes = cost(length);
        lock(&self.state).held += bytes;
        Share { room: self.clone(), bytes }
    }
}

/// Buffers come in powers of two and begin at a page.
fn cost(length: u64) -> u64 {
    length.next_power_of_two().max(PAGE) + PAGE
}

/// Some of the room, until dropped.
#[derive(Debug)]
pub(crate) struct Share {
    room: Arc<Room>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = lock(&self.room.state);
        state.held -= self.bytes;
        if state.held <= WAKE_BYTES {
            state.wake_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_payload_costs_what_it_holds() {
        let room = Arc::new(Room::default());
        let shares: Vec<Share> = (0..BUDGET_BYTES / (2 * PAGE)).map(|_| room.take(1)).collect();
        assert_eq!(lock(&room.state).held, BUDGET_BYTES);
        drop(shares);
        assert_eq!(lock(&room.state).held, 0);
        drop(room.take(10 * BUDGET_BYTES));
    }

    #[test]
    fn a_large_request_is_not_passed_by_small_ones() {
        let room = Arc::new(Room::default());
        let first = room.take(BUDGET_BYTES / 2);
        std::thread::scope(|scope| {
            let large = scope.spawn(|| room.take(BUDGET_BYTES - PAGE));
            while lock(&room.state).line.is_empty() {
                std::thread::yield_now();
            }
            // There would be room for this one, but it is not its turn.
            let small = scope.spawn(|| room.take(1));
            while lock(&room.state).line.len() < 2 {
                std::thread::yield_now();
            }
            drop(first);
            drop(large.join().unwrap());
            drop(small.join().unwrap());
        });
        assert_eq!(lock(&room.state).held, 0);
    }
}
