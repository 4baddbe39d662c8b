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
        self.held == 0 || self.held + bytes <= BUDGET_BYTES || mutant!("room_for_all")
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
        let has_line = !state.line.is_empty() && !mutant!("room_passed_by");
        if has_line || !state.fits(bytes) {
            let mine = Arc::new(Condvar::new());
            state.line.push_back(mine.clone());
            while !state.line.front().is_some_and(|first| Arc::ptr_eq(first, &mine)) || !state.fits(bytes) {
                state = wait(&mine, state);
            }
            state.line.pop_front();
            if !mutant!("room_wakes_one") {
                state.wake_first();
            }
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
    if mutant!("room_by_length") {
        return length;
    }
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
        state.held -= if mutant!("room_kept") { 0 } else { self.bytes };
        if state.held <= WAKE_BYTES {
            state.wake_first();
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::{Duration, Instant};

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

    /// Whoever does not get there by then never will.
    const DEADLINE: Duration = Duration::from_secs(10);

    /// Takes room in a thread of its own, which stands in line when this returns.
    fn queue(room: &Arc<Room>, length: u64) -> Receiver<Share> {
        let in_line = lock(&room.state).line.len();
        let (taken, share) = channel();
        let mine = room.clone();
        std::thread::spawn(move || taken.send(mine.take(length)));
        let begin = Instant::now();
        while lock(&room.state).line.len() == in_line {
            assert!(begin.elapsed() < DEADLINE, "{length} bytes were not kept waiting");
            std::thread::yield_now();
        }
        share
    }

    #[test]
    fn a_large_request_is_not_passed_by_small_ones() {
        let room = Arc::new(Room::default());
        let first = room.take(BUDGET_BYTES / 2);
        let large = queue(&room, BUDGET_BYTES - PAGE);
        // There would be room for this one, but it is not its turn.
        let small = queue(&room, 1);
        drop(first);
        drop(large.recv_timeout(DEADLINE).unwrap());
        drop(small.recv_timeout(DEADLINE).unwrap());
        assert_eq!(lock(&room.state).held, 0);
    }

    #[test]
    fn one_that_leaves_lets_in_as_many_as_fit() {
        let room = Arc::new(Room::default());
        let (large, rest) = (room.take(BUDGET_BYTES / 2), room.take(BUDGET_BYTES / 4));
        let waiting = [(); 3].map(|()| queue(&room, BUDGET_BYTES / 4));
        drop(large);
        let [first, second, third] = waiting;
        let shares = [first, second].map(|share| share.recv_timeout(DEADLINE).unwrap());
        // All is taken: the last one goes on waiting.
        assert_eq!(lock(&room.state).line.len(), 1);
        drop(rest);
        drop(shares);
        drop(third.recv_timeout(DEADLINE).unwrap());
        assert_eq!(lock(&room.state).held, 0);
    }

    #[test]
    fn what_a_request_adds_is_held_at_once_and_keeps_the_next_one_out() {
        let room = Arc::new(Room::default());
        let (share, filling) = (room.take(BUDGET_BYTES / 2), room.add(BUDGET_BYTES));
        let next = queue(&room, 1);
        drop(share);
        assert_eq!(lock(&room.state).line.len(), 1);
        drop(filling);
        drop(next.recv_timeout(DEADLINE).unwrap());
    }
}
