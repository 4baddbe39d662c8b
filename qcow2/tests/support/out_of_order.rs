//! A queue of writes over any storage, which ends them in any order: what io_uring is over a file.
#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]

use std::io;
use std::sync::Arc;

use blockyard_qcow2::storage::{Payload, Storage, WriteQueue};

/// Writes under way at once, at most.
const DEPTH: usize = 4;

pub struct OutOfOrder {
    storage: Arc<dyn Storage>,
    under_way: Vec<(u64, Payload)>,
    random: fastrand::Rng,
}

impl OutOfOrder {
    pub fn over(storage: Arc<dyn Storage>) -> Box<dyn WriteQueue> {
        Box::new(Self { storage, under_way: Vec::new(), random: fastrand::Rng::with_seed(5) })
    }
}

impl WriteQueue for OutOfOrder {
    fn begin(&mut self, offset: u64, payload: Payload) -> bool {
        self.under_way.push((offset, payload));
        self.under_way.len() == DEPTH
    }

    /// Ends at least one; the others stay under way.
    fn wait(&mut self, ended: &mut Vec<(u64, io::Result<()>)>) {
        while !self.under_way.is_empty() {
            let index = self.random.usize(..self.under_way.len());
            let (offset, payload) = self.under_way.swap_remove(index);
            ended.push((offset, self.storage.write(offset, &mut payload.slices())));
            if self.random.bool() {
                return;
            }
        }
    }
}

impl Drop for OutOfOrder {
    fn drop(&mut self) {
        while !self.under_way.is_empty() {
            self.wait(&mut Vec::new());
        }
    }
}
