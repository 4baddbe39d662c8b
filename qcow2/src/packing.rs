//! Where compressed clusters go: end to end in host clusters of their own, append-only.
//!
//! Bytes that a flush made durable must not be at risk when more are packed behind them: a disk may lose a whole block whose
//! writing a power cut interrupts. So runs go on in a new block from each flush on, and a flush waits for the runs that
//! still share a block with what it is about to make durable. Compressing and writing are the caller's (`image::compress`).
//!
//! "Written" means here: handed to the write-behind, which a flush drains.

use crate::allocate::Allocator;
use crate::error::Result;
use crate::storage::Storage;
use crate::sync::{Condvar, Mutex, lock, wait};

/// The largest unit that common disks write as one. In images with smaller clusters neighbours share blocks whatever packing
/// does.
const BLOCK: u64 = 4096;

#[derive(Debug, Default)]
struct State {
    /// Where the next run may begin. `next <= end`.
    next: u64,
    /// End of the host clusters taken so far.
    end: u64,
    /// Counts flushes.
    epoch: u64,
    /// Runs placed since the last flush began, not written yet.
    young: u64,
    /// Runs placed before that, not written yet.
    old: u64,
}

/// The packed space of one image.
#[derive(Debug, Default)]
pub(crate) struct Packing {
    state: Mutex<State>,
    written: Condvar,
}

/// Host space for one run of compressed bytes, from its placing until its writing; dropped when its bytes are written, or
/// never will be.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    packing: &'a Packing,
    /// First host byte: a multiple of the storage's block size.
    pub(crate) host: u64,
    epoch: u64,
}

impl Packing {
    /// Finds contiguous space for a number of bytes, a multiple of the storage's block size.
    pub(crate) fn place(
        &self,
        storage: &dyn Storage,
        allocator: &Allocator,
        cluster_size: u64,
        bytes: u64,
    ) -> Result<Run<'_>> {
        let mut state = lock(&self.state);
        let room = state.end - state.next;
        let mut host = state.next;
        if bytes <= room {
            state.next += bytes;
        } else {
            let fresh = allocator.allocate(storage, bytes.div_ceil(cluster_size))?;
            let end = fresh + bytes.next_multiple_of(cluster_size);
            if fresh == state.end {
                // Nobody took space since: the run straddles the border.
                (state.next, state.end) = (host + bytes, end);
            } else {
                host = fresh;
                // The larger rest is the one to go on in; the other stays unused until the close gives it back.
                if end - (fresh + bytes) >= room {
                    (state.next, state.end) = (fresh + bytes, end);
                }
            }
        }
        state.young += 1;
        Ok(Run { packing: self, host, epoch: state.epoch })
    }

    /// For a flush, between its clone of the tables and its first barrier: no later run touches a block that may hold what
    /// the clone refers to, and every run that does is written when this returns. `true`: there were any.
    pub(crate) fn begin_flush(&self) -> bool {
        let mut state = lock(&self.state);
        if !mutant!("packing_shares_block_after_flush") {
            state.next = state.next.next_multiple_of(BLOCK).min(state.end);
        }
        state.epoch += 1;
        state.old += std::mem::take(&mut state.young);
        let any = state.old > 0 && !mutant!("packing_not_waited_for");
        while any && state.old > 0 {
            state = wait(&self.written, state);
        }
        any
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.packing.state);
        if self.epoch == state.epoch {
            state.young -= 1;
        } else {
            state.old -= 1;
            self.packing.written.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::refcount::Width;
    use crate::geometry::Geometry;
    use crate::storage::FileStorage;

    const CLUSTER: u64 = 65_536;

    fn space() -> (FileStorage, Allocator, Packing) {
        let geometry = Geometry { cluster_bits: 16, size: 1 << 30, extended: false };
        let storage = FileStorage::new(tempfile::tempfile().unwrap());
        (storage, Allocator::new(geometry, Width::from_order(4).unwrap(), 4 * CLUSTER, 0), Packing::default())
    }

    #[test]
    fn runs_follow_each_other_and_begin_a_block_after_each_flush() {
        let (storage, allocator, packing) = space();
        let place = |bytes| packing.place(&storage, &allocator, CLUSTER, bytes).unwrap().host - 4 * CLUSTER;
        assert_eq!([place(512), place(1024), place(2048)], [0, 512, 1536]);
        packing.begin_flush();
        assert_eq!([place(512), place(3584)], [4096, 4608]);
        packing.begin_flush();
        packing.begin_flush();
        assert_eq!(place(CLUSTER), 8192, "straddles two clusters");
        assert_eq!(place(CLUSTER - 8192), CLUSTER + 8192);
        assert_eq!(place(512), 2 * CLUSTER);
        assert_eq!(allocator.end(), 7 * CLUSTER);
    }

    #[test]
    fn packing_goes_on_where_more_room_is_left_when_others_took_the_space_behind() {
        let (storage, allocator, packing) = space();
        let place = |bytes| packing.place(&storage, &allocator, CLUSTER, bytes).unwrap().host - 4 * CLUSTER;
        assert_eq!(place(1024), 0);
        allocator.allocate(&storage, 1).unwrap();
        assert_eq!(place(CLUSTER - 512), 2 * CLUSTER);
        assert_eq!(place(512), 1024, "the first cluster has more room");
        allocator.allocate(&storage, 1).unwrap();
        assert_eq!(place(2 * CLUSTER - 512), 4 * CLUSTER);
        assert_eq!(place(512), 1536);
    }

    #[test]
    fn a_flush_waits_for_runs_that_were_placed_before_it_and_for_no_others() {
        let (storage, allocator, packing) = space();
        let place = || packing.place(&storage, &allocator, CLUSTER, 512).unwrap();
        assert!(!packing.begin_flush());
        let early = place();
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| packing.begin_flush());
            while lock(&packing.state).epoch < 2 {
                std::thread::yield_now();
            }
            let late = place();
            assert_eq!(late.host, early.host + BLOCK);
            for _ in 0..1000 {
                assert!(!flush.is_finished(), "the early run is not written yet");
                std::thread::yield_now();
            }
            drop(early);
            assert!(flush.join().unwrap());
            drop(late);
        });
        assert!(!packing.begin_flush());
    }
}
