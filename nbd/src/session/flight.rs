//! The requests of one connection that are under way, and the replies that wait for the socket.
//!
//! A request holds a [`Slot`](super::Slot) from before its payload is read until its last reply byte is taken by the socket; there are
//! only so many. Each slot is answered at most once: by its request, or by [`Flight::cut`] when the server stops without
//! waiting. Whoever drops a slot unanswered (a panic in a device) ends the connection, so that no client waits for ever.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::Ending;
use super::outgoing::Frame;
use crate::transmission::{Mode, failure};
use crate::wire::reply::Last;
use crate::wire::request::Request;
use crate::{Error, ErrorKind};

/// See the module.
#[derive(Debug)]
pub(crate) struct Flight {
    state: Mutex<State>,
    /// A slot came free: for the reader.
    room: Notify,
    /// A frame or the end came: for the writer.
    ready: Notify,
    /// The last slot came free, or the connection died: for those who wait for the end.
    quiet: Notify,
}

#[derive(Debug)]
struct State {
    /// One entry per slot: the request, until it is answered.
    unanswered: Vec<Option<Request>>,
    free: Vec<usize>,
    queue: VecDeque<Frame>,
    stage: Stage,
    /// Why it is dead.
    cause: Option<Ending>,
}

impl State {
    fn busy(&self) -> usize {
        self.unanswered.len() - self.free.len()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Open,
    /// No request will come; the writer ends when all are answered.
    Finishing,
    /// All requests have been answered, some by us; the writer ends when the queue is empty.
    Cut,
    /// Nothing can be sent any more.
    Dead,
}

/// Nobody waits for this reply any more; what was to be sent is gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unwanted;

impl Flight {
    /// Room for `slots` requests.
    pub(crate) fn new(slots: usize) -> Self {
        let state = State {
            unanswered: vec![None; slots],
            free: (0..slots).rev().collect(),
            queue: VecDeque::with_capacity(slots),
            stage: Stage::Open,
            cause: None,
        };
        Self { state: Mutex::new(state), room: Notify::new(), ready: Notify::new(), quiet: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a slot is free. Only one task may take slots.
    pub(crate) async fn room(&self) {
        while self.lock().free.is_empty() {
            self.room.notified().await;
        }
    }

    /// Takes a slot; `None` if none is free.
    pub(crate) fn begin(&self, request: Request) -> Option<usize> {
        let mut state = self.lock();
        let index = state.free.pop()?;
        state.unanswered[index] = Some(request);
        Some(index)
    }

    /// Queues a frame of the request in this slot.
    pub(crate) fn push(&self, index: usize, frame: Frame, last: Last) -> Result<(), Unwanted> {
        let mut state = self.lock();
        if state.unanswered[index].is_none() || state.stage == Stage::Dead {
            // In this order: the frame may hold the slot, whose drop needs the lock.
            drop(state);
            drop(frame);
            return Err(Unwanted);
        }
        if last == Last::Yes {
            state.unanswered[index] = None;
        }
        state.queue.push_back(frame);
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// Whether the request in this slot is still to be answered.
    pub(crate) fn is_wanted(&self, index: usize) -> bool {
        let state = self.lock();
        state.unanswered[index].is_some() && state.stage != Stage::Dead
    }

    /// Gives a slot back.
    pub(crate) fn end(&self, index: usize) {
        let mut state = self.lock();
        let unanswered = state.unanswered[index].take().is_some();
        state.free.push(index);
        let was_full = state.free.len() == 1;
        let (quiet, stage) = (state.busy() == 0, state.stage);
        drop(state);
        if was_full {
            self.room.notify_one();
        }
        if quiet {
            self.quiet.notify_waiters();
            if stage == Stage::Finishing {
                self.ready.notify_one();
            }
        }
        if unanswered {
            self.kill(Ending::Broken);
        }
    }

    /// Waits for frames and moves all of them into `batch`; `false` when there will be none.
    pub(crate) async fn collect(&self, batch: &mut VecDeque<Frame>) -> bool {
        loop {
            {
                let mut state = self.lock();
                if !state.queue.is_empty() {
                    std::mem::swap(&mut state.queue, batch);
                    return true;
                }
                let over = match state.stage {
                    Stage::Open => false,
                    Stage::Finishing => state.busy() == 0,
                    Stage::Cut | Stage::Dead => true,
                };
                if over {
                    return false;
                }
            }
            self.ready.notified().await;
        }
    }

    /// No further request will come.
    pub(crate) fn finish(&self) {
        let mut state = self.lock();
        state.stage = state.stage.max(Stage::Finishing);
        drop(state);
        self.ready.notify_one();
    }

    /// Answers every request that is still under way with ESHUTDOWN. What their devices return later is dropped.
    pub(crate) fn cut(&self, mode: Mode) {
        let error = Error::new(ErrorKind::Shutdown, "the server is shutting down");
        let mut state = self.lock();
        if state.stage >= Stage::Cut {
            return;
        }
        state.stage = Stage::Cut;
        let State { unanswered, queue, .. } = &mut *state;
        for request in unanswered.iter_mut().filter_map(Option::take) {
            let (head, body) = failure(mode, &request, &error);
            queue.push_back(Frame::new(head).with_body(body));
        }
        drop(state);
        self.ready.notify_one();
    }

    /// Ends the connection: what is queued is dropped, what is under way runs on for nobody.
    pub(crate) fn kill(&self, cause: Ending) {
        let mut state = self.lock();
        state.stage = Stage::Dead;
        state.cause.get_or_insert(cause);
        // The frames hold slots, whose drop needs the lock.
        let dropped = std::mem::take(&mut state.queue);
        drop(state);
        drop(dropped);
        self.ready.notify_one();
        self.quiet.notify_waiters();
    }

    /// Whether [`Flight::kill`] was called.
    pub(crate) fn is_dead(&self) -> bool {
        self.lock().stage == Stage::Dead
    }

    /// Waits for [`Flight::kill`] and tells its first cause.
    pub(crate) async fn dead(&self) -> Ending {
        self.until(|state| state.cause).await
    }

    /// Waits for a moment in which no request is under way.
    pub(crate) async fn quiet(&self) {
        self.until(|state| (state.busy() == 0).then_some(())).await;
    }

    async fn until<T>(&self, condition: impl Fn(&State) -> Option<T>) -> T {
        loop {
            let mut quiet = std::pin::pin!(self.quiet.notified());
            quiet.as_mut().enable();
            if let Some(value) = condition(&self.lock()) {
                return value;
            }
            quiet.await;
        }
    }
}
