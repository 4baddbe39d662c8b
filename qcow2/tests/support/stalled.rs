//! Storage in memory whose writes of payload wait until they are let through.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::panic, reason = "part of the tests that include it")]

use std::io::{self, IoSlice};
use std::sync::{Condvar, Mutex};

use blockyard_qcow2::storage::{MemoryStorage, Reservation, Storage};

#[derive(Debug, Default)]
struct State {
    is_stalled: bool,
    is_broken: bool,
    waiting: usize,
}

#[derive(Debug, Default)]
pub struct Stalled {
    inner: MemoryStorage,
    state: Mutex<State>,
    changed: Condvar,
}

impl Stalled {
    /// Whether the threads that write behind wait from now on.
    pub fn stall(&self, is_stalled: bool) {
        self.state.lock().unwrap().is_stalled = is_stalled;
        self.changed.notify_all();
    }

    /// Has the threads that write behind panic from now on.
    pub fn break_down(&self) {
        self.state.lock().unwrap().is_broken = true;
    }

    /// Returns when so many writes wait.
    pub fn await_waiting(&self, writes: usize) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| state.waiting < writes).unwrap());
    }

    fn pass(&self) {
        if std::thread::current().name() == Some("write-behind") {
            let mut state = self.state.lock().unwrap();
            if state.is_broken {
                drop(state);
                panic!("as told");
            }
            state.waiting += 1;
            self.changed.notify_all();
            let mut state = self.changed.wait_while(state, |state| state.is_stalled).unwrap();
            state.waiting -= 1;
        }
    }
}

impl Storage for Stalled {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, buffer)
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.pass();
        self.inner.write(offset, slices)
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.inner.write_durable(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.inner.set_length(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        self.inner.reserve(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.punch(offset, length)
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.inner.drop_cache()
    }
}
