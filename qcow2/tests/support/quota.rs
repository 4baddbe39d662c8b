//! Storage with a budget: what takes space fails when it is spent, and it can come back.
#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::{Reservation, Storage};

/// Space is taken and given back in blocks.
pub const BLOCK: u64 = 512;

#[derive(Debug)]
pub struct Quota {
    inner: Arc<dyn Storage>,
    state: Mutex<State>,
    can_reserve: bool,
}

#[derive(Debug)]
struct State {
    /// Blocks that have space.
    taken: HashSet<u64>,
    /// How many there may be.
    budget: u64,
}

impl Quota {
    /// Space for `budget` blocks beyond those that the file has, given as [`Quota::taken`] tells. Without `can_reserve`, a
    /// full disk is met by the write itself.
    pub fn new(inner: Arc<dyn Storage>, taken: HashSet<u64>, budget: u64, can_reserve: bool) -> Self {
        let state = State { budget: taken.len() as u64 + budget, taken };
        Self { inner, state: Mutex::new(state), can_reserve }
    }

    /// The blocks that have space now.
    pub fn taken(&self) -> HashSet<u64> {
        self.state.lock().unwrap().taken.clone()
    }

    /// Adds to the budget.
    pub fn grant(&self, blocks: u64) {
        self.state.lock().unwrap().budget += blocks;
    }
}

fn blocks(offset: u64, length: u64) -> Range<u64> {
    offset / BLOCK..(offset + length).div_ceil(BLOCK)
}

impl State {
    /// Takes space for a range, from its beginning on as far as it goes; the end of what has space.
    fn take(&mut self, offset: u64, length: u64) -> u64 {
        for block in blocks(offset, length) {
            if !self.taken.contains(&block) {
                if self.taken.len() as u64 >= self.budget {
                    return (block * BLOCK).max(offset);
                }
                self.taken.insert(block);
            }
        }
        offset + length
    }
}

impl Quota {
    /// As a file system does it: what fits is written.
    fn write_what_fits(
        &self,
        offset: u64,
        slices: &mut [IoSlice<'_>],
        write: impl FnOnce(&dyn Storage, u64, &mut [IoSlice<'_>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let length = slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        let end = self.state.lock().unwrap().take(offset, length);
        if end == offset + length {
            return write(&*self.inner, offset, slices);
        }
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        write(&*self.inner, offset, &mut [IoSlice::new(&bytes[..(end - offset) as usize])])?;
        Err(ErrorKind::StorageFull.into())
    }
}

impl Storage for Quota {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, buffer)
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.write_what_fits(offset, slices, |inner, offset, slices| inner.write(offset, slices))
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.write_what_fits(offset, slices, |inner, offset, slices| inner.write_durable(offset, slices))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.state.lock().unwrap().taken.retain(|block| block * BLOCK < length);
        self.inner.set_length(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        if !self.can_reserve {
            return Ok(Reservation::Unsupported);
        }
        let mut state = self.state.lock().unwrap();
        let before = state.taken.clone();
        if state.take(offset, length) < offset + length {
            // All or nothing.
            state.taken = before;
            return Err(ErrorKind::StorageFull.into());
        }
        self.inner.reserve(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let whole = offset.div_ceil(BLOCK)..(offset + length) / BLOCK;
        self.state.lock().unwrap().taken.retain(|block| !whole.contains(block));
        self.inner.punch(offset, length)
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.inner.drop_cache()
    }

    fn block_size(&self) -> u64 {
        self.inner.block_size()
    }
}
