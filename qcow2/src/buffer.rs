//! Payload memory that is used again: the first touch of fresh pages costs more than copying into warm ones.
//!
//! Buffers begin at a page border, so that the same memory serves a file that is written without the page cache.

use std::fmt;
// Not `crate::sync`: a leaf lock, held for a few instructions, in a pool that outlives any explored schedule.
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// Alignment of a buffer's first byte.
const PAGE: usize = 4096;
/// The smallest and the largest size that is kept, as powers of two; larger buffers are made and dropped.
const SMALLEST: u32 = 12;
const LARGEST: u32 = 25;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lends buffers and takes them back. Clones are the same pool.
#[derive(Clone)]
pub struct BufferPool {
    shelves: Arc<Shelves>,
}

struct Shelves {
    state: Mutex<State>,
    keep_bytes: usize,
}

#[derive(Default)]
struct State {
    /// Free memory by power of two, the one used last on top.
    free: [Vec<Box<[u8]>>; (LARGEST - SMALLEST + 1) as usize],
    /// `0 <= free_bytes <= keep_bytes`.
    free_bytes: usize,
}

/// Unused payload memory kept for all images of the process: a few of the largest requests that clients send. One pool, so
/// that memory does not grow with the number of disks. (A guess; to be measured with the write path.)
const SHARED_KEEP_BYTES: usize = 64 << 20;
static SHARED: LazyLock<BufferPool> = LazyLock::new(|| BufferPool::new(SHARED_KEEP_BYTES));

impl BufferPool {
    /// The pool of all images of the process.
    pub(crate) fn shared() -> &'static Self {
        &SHARED
    }

    /// A pool that keeps at most `keep_bytes` of memory that nobody uses.
    pub fn new(keep_bytes: usize) -> Self {
        Self { shelves: Arc::new(Shelves { state: Mutex::default(), keep_bytes }) }
    }

    /// Memory for `length` bytes; what it holds is arbitrary.
    pub fn lend(&self, length: usize) -> Buffer {
        let shelf = shelf_of(length);
        let reused = shelf.and_then(|shelf| {
            let mut state = lock(&self.shelves.state);
            let memory = state.free.get_mut(shelf)?.pop()?;
            state.free_bytes -= memory.len();
            Some(memory)
        });
        // A page more than the size, because memory of the allocator begins anywhere.
        let size = shelf.map_or(length, |shelf| 1 << (shelf as u32 + SMALLEST));
        let memory = reused.unwrap_or_else(|| vec![0; size + PAGE].into());
        let start = memory.as_ptr().align_offset(PAGE).min(PAGE);
        Buffer { memory, start, length, shelf, shelves: self.shelves.clone() }
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free_bytes = lock(&self.shelves.state).free_bytes;
        formatter.debug_struct("BufferPool").field("free_bytes", &free_bytes).finish_non_exhaustive()
    }
}

/// The shelf for a length, if memory of that size is kept at all.
fn shelf_of(length: usize) -> Option<usize> {
    let power = length.max(1).next_power_of_two().trailing_zeros().max(SMALLEST);
    (power <= LARGEST).then_some((power - SMALLEST) as usize)
}

/// Memory on loan from a [`BufferPool`]; dropping it gives it back.
pub struct Buffer {
    memory: Box<[u8]>,
    start: usize,
    length: usize,
    shelf: Option<usize>,
    shelves: Arc<Shelves>,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Buffer").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(shelf) = self.shelf else { return };
        let memory = std::mem::take(&mut self.memory);
        let mut state = lock(&self.shelves.state);
        if state.free_bytes + memory.len() <= self.shelves.keep_bytes {
            state.free_bytes += memory.len();
            if let Some(free) = state.free.get_mut(shelf) {
                free.push(memory);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_used_again() {
        let pool = BufferPool::new(1 << 20);
        let mut first = pool.lend(5000);
        assert_eq!(first.as_ref().len(), 5000);
        assert_eq!(first.as_ref().as_ptr().align_offset(PAGE), 0);
        first.as_mut().fill(7);
        let address = first.as_ref().as_ptr();
        drop(first);
        let again = pool.lend(8000);
        assert_eq!(again.as_ref().as_ptr(), address, "both need 8 KiB");
        assert_eq!(pool.lend(0).as_ref().len(), 0);
    }

    #[test]
    fn no_more_is_kept_than_was_allowed() {
        let pool = BufferPool::new(100_000);
        let lent: Vec<_> = (0..10).map(|_| pool.lend(30_000)).collect();
        drop(lent);
        drop(pool.lend(64 << 20));
        assert!(lock(&pool.shelves.state).free_bytes <= 100_000);
    }
}
