//! Host space of a session: it only grows. No free list, no reuse, no way back after a failure, so that no crash and no
//! late reader can ever see somebody else's bytes.

use crate::error::{Error, Result};
use crate::format::header::REFCOUNT_TABLE_BYTES_MAX;
use crate::format::refcount::Width;
use crate::geometry::{ENTRY, Geometry};
use crate::storage::{Reservation, Storage};
use crate::sync::{Mutex, lock};

/// The first reservation ahead of need; it doubles up to [`STEP_MAX`]. Small enough for a small image, large enough that
/// reservations are rare. (`docs/performance.md`: beginning with 64 MiB gains nothing.)
const STEP_MIN: u64 = 1 << 20;
const STEP_MAX: u64 = 64 << 20;

/// Host offsets in L1 and L2 entries have 56 bits.
pub(crate) const HOST_OFFSET_END: u64 = 1 << 56;

/// Hands out host clusters, space reserved.
#[derive(Debug)]
pub(crate) struct Allocator {
    geometry: Geometry,
    refcount_width: Width,
    /// End of the space at the opening, and how many refcount blocks its used part needs at most.
    opened: (u64, u64),
    /// Where refcounts, or the bits of an L2 entry, end. Nothing may be used past it, or the image could not be closed.
    limit: u64,
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
    /// Somebody reserves ahead, without the lock.
    is_reserving: bool,
}

impl Allocator {
    /// `end`: the end of the file rounded up to clusters; never below it, so that fresh clusters read as zeroes.
    /// `blocks`: how many refcount blocks the used part of the file needs, which in a sparse file may be few.
    pub(crate) fn new(geometry: Geometry, refcount_width: Width, end: u64, blocks: u64) -> Self {
        let end = if mutant!("next_below_end") { end - geometry.cluster_size() } else { end };
        let block_bytes = refcount_width.entries(geometry.cluster_size()) * geometry.cluster_size();
        // A little less than the table can name: it must find room itself when it moves.
        let blocks_max = REFCOUNT_TABLE_BYTES_MAX / ENTRY / 256 * 255;
        let limit = blocks_max.saturating_mul(block_bytes).min(HOST_OFFSET_END);
        let state = State { next: end, reserved: end, step: STEP_MIN, can_reserve: true, is_reserving: false };
        Self { geometry, refcount_width, opened: (end, blocks), limit, state: Mutex::new(state) }
    }

    /// Host offset of `clusters` contiguous clusters that read as zeroes.
    ///
    /// A full disk is found here, before the request changed anything, where the file system can reserve.
    pub(crate) fn allocate(&self, storage: &dyn Storage, clusters: u64) -> Result<u64> {
        let length = clusters * self.geometry.cluster_size();
        let mut state = lock(&self.state);
        let end = state.next.saturating_add(length);
        if end > self.limit || end + self.refcount_bytes(end) > self.limit {
            return Err(Error::NoSpace { offset: state.next, length });
        }
        // The refcounts that closing will have to write must find room too.
        let needed = end + self.refcount_bytes(end);
        if needed > state.reserved && state.can_reserve {
            reserve(storage, &mut state, needed)?;
        }
        let offset = state.next;
        state.next = if mutant!("next_one_back") { end - self.geometry.cluster_size() } else { end };
        Ok(offset)
    }

    /// Whether `clusters` clusters are reserved already, with an L2 table for each.
    pub(crate) fn has_ahead(&self, clusters: u64) -> bool {
        let state = lock(&self.state);
        let end = state.next.saturating_add(2 * clusters * self.geometry.cluster_size());
        !state.can_reserve || end + self.refcount_bytes(end) <= state.reserved
    }

    /// Whether the caller is the one who should call [`Allocator::reserve_ahead`] now: less than half a step is ahead.
    pub(crate) fn wants_ahead(&self) -> bool {
        let mut state = lock(&self.state);
        let needed = state.next + self.refcount_bytes(state.next) + state.step / 2;
        let wants =
            state.can_reserve && !state.is_reserving && state.reserved > self.opened.0 && needed > state.reserved;
        state.is_reserving |= wants;
        wants
    }

    /// Reserves a step more, so that no request waits for it. What becomes of it does not matter: a request that finds nothing
    /// ahead reserves for itself, and meets the error.
    pub(crate) fn reserve_ahead(&self, storage: &dyn Storage) {
        let (from, step) = {
            let state = lock(&self.state);
            (state.reserved, state.step)
        };
        let reservation = storage.reserve(from, step);
        let mut state = lock(&self.state);
        state.is_reserving = false;
        if let Ok(Reservation::Done) = reservation {
            // Requests may have reserved meanwhile, from the same place on.
            state.reserved = state.reserved.max(from + step);
            state.step = (state.step * 2).min(STEP_MAX);
        }
    }

    /// A mistake that tests make: the cluster at `host` is handed out next.
    pub(crate) fn reuse(&self, host: u64) {
        lock(&self.state).next = host;
    }

    /// Whether the refcounts of what is used can be written down at all.
    pub(crate) fn can_finish(&self) -> bool {
        let end = self.end();
        end <= self.limit && end + self.refcount_bytes(end) <= self.limit
    }

    /// End of used host space.
    pub(crate) fn end(&self) -> u64 {
        lock(&self.state).next
    }

    /// An upper bound of what the refcount structures of a file of this length occupy, if all of them must be made anew.
    fn refcount_bytes(&self, file_length: u64) -> u64 {
        let cluster = self.geometry.cluster_size();
        let block_bytes = self.refcount_width.entries(cluster) * cluster;
        let (opened_end, opened_blocks) = self.opened;
        let blocks = opened_blocks + (file_length - opened_end).div_ceil(block_bytes) + 2;
        let table = ((file_length.div_ceil(block_bytes) + 2) * ENTRY).div_ceil(cluster);
        // The table has some to spare (`refcounts::set`).
        (blocks + table + table / 2048 + 1) * cluster
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
        Err(_) if mutant!("full_disk_ignored") => Ok(()),
        Err(source) => {
            let (offset, length) = (state.reserved, needed - state.reserved);
            let error = Error::Io { operation: "fallocate", offset, source };
            Err(if error.is_no_space() { Error::NoSpace { offset, length } } else { error })
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn space_ahead_is_wanted_of_one_caller_at_a_time_and_never_handed_out_twice() {
        let storage = MemoryStorage::new();
        let geometry = Geometry { cluster_bits: 16, size: 1 << 40, extended: false };
        let allocator = Allocator::new(geometry, Width::from_order(4).unwrap(), 1 << 20, 1);
        assert!(!allocator.wants_ahead(), "before the first allocation nobody writes");
        let (mut at, mut steps) = (allocator.allocate(&storage, 1).unwrap(), 0);
        for _ in 0..10_000 {
            if allocator.wants_ahead() {
                assert!(!allocator.wants_ahead(), "two at once");
                let before = lock(&allocator.state).reserved;
                allocator.reserve_ahead(&storage);
                assert!(lock(&allocator.state).reserved > before);
                steps += 1;
            }
            assert!(allocator.has_ahead(1), "a request would have waited");
            let next = allocator.allocate(&storage, 1).unwrap();
            assert_eq!(next, at + 65536);
            at = next;
        }
        // Some 625 MiB, in steps of up to 64.
        assert!((10..40).contains(&steps), "{steps}");
    }
}
