//! Room for payload in memory, from before it is taken until it is in the file: bounded, first come first served, and
//! counted by the memory that is held, not by the bytes that are meant.
//!
//! Room is waited for before a request claims anything else, so whoever waits here stands in nobody's way.

use std::collections::VecDeque;
use std::task::{Poll, Waker};

use crate::sync::{Arc, Condvar, Mutex, lock, wait};

/// Memory of one image's payload; more waits, except for one request alone. A fraction of a second of disk time, so that a
/// flush or a durable write never waits long. (`docs/performance.md`: twice as much gains nothing, half loses a little.)
const BUDGET_BYTES: u64 = 16 << 20;
/// When so much is held or less, the next in line is woken: not for each payload that leaves.
const WAKE_BYTES: u64 = BUDGET_BYTES / 4 * 3;
/// What the smallest payload costs: a page for its bytes, and one for all that is kept beside them.
const PAGE: u64 = 4096;

#[derive(Debug, Default)]
struct State {
    /// `held <= BUDGET_BYTES`, but for one request alone and for the filling of those under way.
    held: u64,
    /// Who waits, in the order in which they came, by number: only the first is ever woken.
    line: VecDeque<(u64, Waiting)>,
    last_number: u64,
    /// See [`Room::open_to_all`].
    is_open: bool,
}

#[derive(Debug)]
enum Waiting {
    Thread(Arc<Condvar>),
    /// `None` until it is polled.
    Task(Option<Waker>),
}

impl State {
    fn fits(&self, bytes: u64) -> bool {
        self.held == 0 || self.held + bytes <= BUDGET_BYTES || self.is_open || mutant!("room_for_all")
    }

    /// Takes a place at the end of the line; its number.
    fn stand_in_line(&mut self, waiting: Waiting) -> u64 {
        self.last_number += 1;
        self.line.push_back((self.last_number, waiting));
        self.last_number
    }

    fn is_first(&self, number: u64) -> bool {
        self.line.front().is_some_and(|(first, _)| *first == number)
    }

    fn wake_first(&mut self) {
        match self.line.front_mut() {
            Some((_, Waiting::Thread(condvar))) => condvar.notify_one(),
            Some((_, Waiting::Task(waker))) => waker.take().into_iter().for_each(Waker::wake),
            None => {}
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
        if self.has_line(&state) || !state.fits(bytes) {
            let mine = Arc::new(Condvar::new());
            let number = state.stand_in_line(Waiting::Thread(mine.clone()));
            while !state.is_first(number) || !state.fits(bytes) {
                state = wait(&mine, state);
            }
            self.step_forward(&mut state);
        }
        self.share(&mut state, bytes)
    }

    /// As [`Room::take`], for a task.
    ///
    /// # Cancellation
    /// Its place in the line is given up.
    pub(crate) async fn take_as_task(self: &Arc<Self>, length: u64) -> Share {
        let bytes = cost(length);
        let mut place = {
            let mut state = lock(&self.state);
            if !self.has_line(&state) && state.fits(bytes) {
                return self.share(&mut state, bytes);
            }
            Place { room: self, number: Some(state.stand_in_line(Waiting::Task(None))) }
        };
        std::future::poll_fn(|context| place.poll(bytes, context.waker())).await
    }

    /// Lets everybody in from now on: what is held may never leave, and whoever comes in is refused by the poison.
    pub(crate) fn open_to_all(&self) {
        let mut state = lock(&self.state);
        state.is_open = true;
        // Whoever leaves the line wakes the next.
        state.wake_first();
    }

    fn has_line(&self, state: &State) -> bool {
        !state.line.is_empty() && !mutant!("room_passed_by")
    }

    /// The first in line leaves it with what it wanted.
    fn step_forward(&self, state: &mut State) {
        state.line.pop_front();
        if !mutant!("room_wakes_one") {
            state.wake_first();
        }
    }

    fn share(self: &Arc<Self>, state: &mut State, bytes: u64) -> Share {
        state.held += bytes;
        Share { room: self.clone(), bytes }
    }

    /// For what a request that has its room turns out to need beside its payload, at most a few clusters: at once.
    pub(crate) fn add(self: &Arc<Self>, length: u64) -> Share {
        self.share(&mut lock(&self.state), cost(length))
    }
}

/// A task's place in the line.
struct Place<'a> {
    room: &'a Arc<Room>,
    /// `None` once it has its room.
    number: Option<u64>,
}

impl Place<'_> {
    fn poll(&mut self, bytes: u64, waker: &Waker) -> Poll<Share> {
        let mut state = lock(&self.room.state);
        if self.number.is_some_and(|number| state.is_first(number)) && state.fits(bytes) {
            self.number = None;
            self.room.step_forward(&mut state);
            return Poll::Ready(self.room.share(&mut state, bytes));
        }
        let mine = state.line.iter_mut().find(|(number, _)| Some(*number) == self.number);
        if let Some((_, waiting)) = mine {
            *waiting = Waiting::Task(Some(waker.clone()));
        }
        Poll::Pending
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            let mut state = lock(&self.room.state);
            let was_first = state.is_first(number);
            state.line.retain(|(other, _)| *other != number);
            if was_first {
                state.wake_first();
            }
        }
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
    use std::pin::pin;
    use std::sync::mpsc::{Receiver, channel};
    use std::task::Context;
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
    fn tasks_and_threads_stand_in_one_line() {
        let room = Arc::new(Room::default());
        let first = room.take(BUDGET_BYTES / 2);
        let mut context = Context::from_waker(Waker::noop());
        let mut large = pin!(room.take_as_task(BUDGET_BYTES - PAGE));
        assert!(large.as_mut().poll(&mut context).is_pending());
        let mut small = pin!(room.take_as_task(1));
        assert!(small.as_mut().poll(&mut context).is_pending(), "passed the large one");
        let thread = queue(&room, 1);
        drop(first);
        let Poll::Ready(share) = large.as_mut().poll(&mut context) else { panic!("not let in") };
        assert!(small.as_mut().poll(&mut context).is_pending());
        drop(share);
        let Poll::Ready(share) = small.as_mut().poll(&mut context) else { panic!("not let in") };
        drop(thread.recv_timeout(DEADLINE).unwrap());
        drop(share);
        assert_eq!(lock(&room.state).held, 0);
    }

    #[test]
    fn a_task_that_gives_up_its_place_lets_the_next_one_in() {
        let room = Arc::new(Room::default());
        let _half = room.take(BUDGET_BYTES / 2);
        let mut context = Context::from_waker(Waker::noop());
        let mut large = Box::pin(room.take_as_task(BUDGET_BYTES - PAGE));
        assert!(large.as_mut().poll(&mut context).is_pending());
        let next = queue(&room, 1);
        drop(large);
        drop(next.recv_timeout(DEADLINE).unwrap());
        assert!(lock(&room.state).line.is_empty());
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
