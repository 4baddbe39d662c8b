//! Room for payload in memory, from before it is taken until it is in the file: bounded, first come first served, and
//! counted by the memory that is held, not by the bytes that are meant.
//!
//! Room is waited for before a request claims anything else, so whoever waits here stands in nobody's way.

use crate::sync::{Arc, Condvar, Mutex, lock, wait};

/// Memory of one image's payload; more waits, except for one request alone. A fraction of a second of disk time, so that a
/// flush or a durable write never waits long. (A guess; to be measured with the write path.)
const BUDGET_BYTES: u64 = 16 << 20;
/// What the smallest payload costs: a page for its bytes, and one for all that is kept beside them.
const PAGE: u64 = 4096;

#[derive(Debug, Default)]
struct State {
    /// `held <= BUDGET_BYTES`, but for one request alone and for the filling of those under way.
    held: u64,
    next_ticket: u64,
    /// The ticket whose turn it is.
    turn: u64,
}

/// The room of one image.
#[derive(Debug, Default)]
pub(crate) struct Room {
    state: Mutex<State>,
    changed: Condvar,
}

impl Room {
    /// Waits for its turn and for room for `length` bytes of payload.
    pub(crate) fn take(self: &Arc<Self>, length: u64) -> Share {
        let bytes = cost(length);
        let mut state = lock(&self.state);
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        while state.turn != ticket || (state.held > 0 && state.held + bytes > BUDGET_BYTES) {
            state = wait(&self.changed, state);
        }
        state.turn += 1;
        state.held += bytes;
        drop(state);
        self.changed.notify_all();
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
        lock(&self.room.state).held -= self.bytes;
        self.room.changed.notify_all();
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
            while lock(&room.state).next_ticket < 2 {
                std::thread::yield_now();
            }
            // There would be room for this one, but it is not its turn.
            let small = scope.spawn(|| room.take(1));
            while lock(&room.state).next_ticket < 3 {
                std::thread::yield_now();
            }
            assert_eq!(lock(&room.state).turn, 1);
            drop(first);
            let large = large.join().unwrap();
            assert!(lock(&room.state).turn >= 2);
            drop(large);
            drop(small.join().unwrap());
        });
        assert_eq!(lock(&room.state).held, 0);
    }
}
