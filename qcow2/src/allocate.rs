//! Host space of a session: it only grows. No free list, no reuse, no way back after a failure, so that no crash and no
//! late reader can ever see somebody else's bytes.

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::refcounts;
use crate::storage::{Reservation, Storage};
use crate::sync::{Mutex, lock};

/// The first reservation ahead of need; it doubles up to [`STEP_MAX`]. Small enough for a small image, large enough that
/// reservations are rare. (A guess; to be measured with the write path.)
const STEP_MIN: u64 = 1 << 20;
const STEP_MAX: u64 = 64 << 20;

/// Hands out host clusters, space reserved.
#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    refcount_entries: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// End of used host space: everything at or past it was never written. A multiple of the cluster size.
    next: u64,
    /// `next <= reserved`, as far as the file system can reserve.
    reserved: u64,
    step: u64,
    can_reserve: bool,
}

impl Allocator {
    /// `end`: the end of the file rounded up to clusters; never below it, so that fresh clusters read as zeroes.
    pub(crate) fn new(geometry: Geometry, refcount_entries: u64, end: u64) -> Self {
        let state = State { next: end, reserved: end, step: STEP_MIN, can_reserve: true };
        Self { geometry, refcount_entries, state: Mutex::new(state) }
    }

    /// Host offset of `clusters` contiguous clusters that read as zeroes.
    ///
    /// A full disk is found here, before the request changed anything, where the file system can reserve.
    pub(crate) fn allocate(&self, storage: &dyn Storage, clusters: u64) -> Result<u64> {
        let length = clusters * self.geometry.cluster_size();
        let mut state = lock(&self.state);
        let end = state.next + length;
        // The refcounts that closing will have to write must find room too, and a table that can hold them.
        let needed = refcounts::length_with_refcounts(self.geometry, self.refcount_entries, end);
        if needed > refcounts::file_length_max(self.geometry, self.refcount_entries) {
            return Err(Error::NoSpace { offset: state.next, length });
        }
        if needed > state.reserved && state.can_reserve {
            reserve(storage, &mut state, needed)?;
        }
        let offset = state.next;
        state.next = end;
        Ok(offset)
    }

    /// End of used host space.
    pub(crate) fn end(&self) -> u64 {
        lock(&self.state).next
    }
}

fn reserve(storage: &dyn Storage, state: &mut State, needed: u64) -> Result<()> {
    let ahead = needed + state.step;
    let mut reservation = storage.reserve(state.reserved, ahead - state.reserved);
    let mut end = ahead;
    if reservation.is_err() {
        // No room for the look-ahead; there may still be room for the request.
        end = needed;
        reservation = storage.reserve(state.reserved, needed - state.reserved);
    }
    match reservation {
        Ok(Reservation::Done) => {
            state.reserved = end;
            state.step = (state.step * 2).min(STEP_MAX);
            Ok(())
        }
        Ok(Reservation::Unsupported) => {
            state.can_reserve = false;
            Ok(())
        }
        Err(source) => {
            let (offset, length) = (state.reserved, needed - state.reserved);
            let error = Error::Io { operation: "fallocate", offset, source };
            Err(if error.is_no_space() { Error::NoSpace { offset, length } } else { error })
        }
    }
}
