//! Payload memory that is used again: the first touch of fresh pages costs more than copying into warm ones.
//!
//! It is mapped and unmapped by ourselves: the general allocator keeps what it is given back, for each thread apart, so that
//! buffers of changing sizes leave a process with several times the memory that was ever on loan. Buffers begin at a page
//! border, so that the same memory serves a file that is written without the page cache, and from 64 KiB on they lie in huge
//! pages where there are some left (`huge.rs`).

use std::collections::VecDeque;
use std::fmt;
// Not `crate::sync`: a leaf lock, in a pool that outlives any explored schedule.
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use crate::huge::{self, HUGE, HugePages, Part, UNIT};

/// Alignment of a buffer's first byte.
const PAGE: usize = 4096;
/// The smallest and the largest size that is kept, as powers of two; larger buffers are made and dropped.
const SMALLEST: u32 = 12;
const LARGEST: u32 = 25;
const SHELVES: usize = (LARGEST - SMALLEST + 1) as usize;

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
    /// For what is neither small nor larger than one of them.
    huge: HugePages,
    /// Other free memory by power of two, the one used last at the end.
    free: [VecDeque<Memory>; SHELVES],
    free_bytes: usize,
    /// Memory on loan, but for huge pages.
    lent_bytes: usize,
    /// When each shelf was used last, by the clock.
    used: [u64; SHELVES],
    clock: u64,
}

impl State {
    fn use_shelf(&mut self, shelf: usize) -> Option<&mut VecDeque<Memory>> {
        self.clock += 1;
        *self.used.get_mut(shelf)? = self.clock;
        self.free.get_mut(shelf)
    }

    fn take(&mut self, shelf: usize) -> Option<Memory> {
        let memory = self.use_shelf(shelf)?.pop_back()?;
        self.free_bytes -= memory.size();
        Some(memory)
    }

    fn put(&mut self, shelf: usize, memory: Memory) {
        let size = memory.size();
        if let Some(free) = self.use_shelf(shelf) {
            free.push_back(memory);
            self.free_bytes += size;
        }
    }

    /// Takes out what is free beyond so many bytes: what will be missed least, of the shelves that were not used for longest.
    /// To be dropped without the lock.
    fn take_beyond(&mut self, bytes: usize) -> Vec<Memory> {
        let mut taken = Vec::new();
        while self.free_bytes > bytes {
            let filled = self.free.iter_mut().zip(self.used).filter(|(free, _)| !free.is_empty());
            let coldest = filled.min_by_key(|(_, used)| *used).and_then(|(free, _)| free.pop_front());
            let Some(memory) = coldest else { break };
            self.free_bytes -= memory.size();
            taken.push(memory);
        }
        taken
    }
}

enum Memory {
    Mapped(MmapMut),
    /// `size` bytes from `start` on, at a huge page; more is mapped.
    Aligned {
        map: MmapMut,
        start: usize,
        size: usize,
    },
    Part(Part),
    /// Where the system maps no more: a page more than the size, because memory of the allocator begins anywhere.
    Allocated(Box<[u8]>),
}

impl Memory {
    fn new(size: usize) -> Self {
        if size.is_multiple_of(HUGE)
            && let Some((map, start)) = huge::map(size)
        {
            return Self::Aligned { map, start, size };
        }
        MmapMut::map_anon(size).map_or_else(|_| Self::Allocated(vec![0; size + PAGE].into()), Self::Mapped)
    }

    /// What it takes up.
    fn size(&self) -> usize {
        self.bytes().len()
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Aligned { map, start, size } => &map[*start..start + size],
            Self::Part(part) => part.bytes(),
            Self::Allocated(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Aligned { map, start, size } => &mut map[*start..*start + *size],
            Self::Part(part) => part.bytes_mut(),
            Self::Allocated(bytes) => bytes,
        }
    }
}

/// Huge pages of a pool: what two images have on loan at full speed. Each may be held by a small part of it, so this is what a
/// process may have beyond what is on loan.
const HUGE_PAGES: usize = 16;
/// Other unused payload memory kept for all images of the process; one pool, so that memory does not grow with the number of
/// disks. (Measured with copies in requests of 256 KiB, 2 MiB and 32 MiB: with 32 MiB a process touches no more fresh pages than
/// with 64 MiB, with 16 MiB up to 3 times, with 8 MiB up to 8 times as many.)
const SHARED_KEEP_BYTES: usize = 32 << 20;
static SHARED: LazyLock<BufferPool> = LazyLock::new(|| BufferPool::new(SHARED_KEEP_BYTES));

impl BufferPool {
    /// The pool of all images of the process.
    pub(crate) fn shared() -> &'static Self {
        &SHARED
    }

    /// A pool that keeps at most `keep_bytes` of memory that nobody uses, and as much in huge pages, of which it has 32 MiB at
    /// most. Apart from these it never holds more than was once on loan at the same time, or `keep_bytes` if that is more:
    /// whoever bounds what is on loan has bounded it all, but for what a thread is just giving back to the system.
    pub fn new(keep_bytes: usize) -> Self {
        let huge = HugePages::new((keep_bytes / HUGE).min(HUGE_PAGES));
        let state = State { huge, ..State::default() };
        Self { shelves: Arc::new(Shelves { state: Mutex::new(state), keep_bytes }) }
    }

    /// Memory for `length` bytes; what it holds is arbitrary.
    pub fn lend(&self, length: usize) -> Buffer {
        let (shelf, size) = (shelf_of(length), Buffer::memory_for(length));
        let mut state = lock(&self.shelves.state);
        let is_part = (UNIT..HUGE).contains(&size);
        if let Some(part) = if is_part { state.huge.take(size) } else { None } {
            drop(state);
            return Buffer { memory: Some(Memory::Part(part)), start: 0, length, shelf, shelves: self.shelves.clone() };
        }
        state.lent_bytes += size;
        let reused = shelf.and_then(|shelf| state.take(shelf));
        let surplus = if reused.is_some() {
            Vec::new()
        } else {
            // What is made now must not come on top of memory that lies idle.
            let limit = self.shelves.keep_bytes.saturating_sub(state.lent_bytes);
            state.take_beyond(limit)
        };
        drop(state);
        drop(surplus);
        let memory = reused.unwrap_or_else(|| Memory::new(size));
        let start = memory.bytes().as_ptr().align_offset(PAGE).min(PAGE);
        Buffer { memory: Some(memory), start, length, shelf, shelves: self.shelves.clone() }
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
    /// `None` only while it is dropped.
    memory: Option<Memory>,
    start: usize,
    length: usize,
    shelf: Option<usize>,
    shelves: Arc<Shelves>,
}

impl Buffer {
    /// Bytes of memory that a buffer for `length` bytes takes up, to be counted before it is lent: the next power of two
    /// from 4 KiB on, above 32 MiB the length in whole pages.
    pub fn memory_for(length: usize) -> usize {
        match shelf_of(length) {
            Some(shelf) => 1 << (shelf as u32 + SMALLEST),
            None => length.div_ceil(PAGE).saturating_mul(PAGE),
        }
    }

    /// Bytes of memory that this buffer takes up: at least its length.
    pub fn memory_bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.bytes().len())
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        let memory = self.memory.as_ref().map(Memory::bytes).unwrap_or_default();
        &memory[self.start..self.start + self.length]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        let memory = self.memory.as_mut().map(Memory::bytes_mut).unwrap_or_default();
        &mut memory[self.start..self.start + self.length]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Buffer").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let keep_bytes = self.shelves.keep_bytes;
        let mut state = lock(&self.shelves.state);
        let memory = match memory {
            Memory::Part(part) => return state.huge.put(part),
            memory => memory,
        };
        state.lent_bytes -= Self::memory_for(self.length);
        let surplus = match self.shelf {
            Some(shelf) if memory.size() <= keep_bytes => {
                state.put(shelf, memory);
                state.take_beyond(keep_bytes)
            }
            _ => vec![memory],
        };
        drop(state);
        drop(surplus);
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
    fn middling_memory_is_a_part_of_a_huge_page_as_long_as_there_is_one() {
        let pool = BufferPool::new(2 * HUGE);
        let lend = |length| pool.lend(length);
        let is_part = |buffer: &Buffer| matches!(buffer.memory, Some(Memory::Part(_)));
        let is_aligned = |buffer: &Buffer, to: usize| buffer.as_ref().as_ptr().addr().is_multiple_of(to);
        let small = lend(UNIT / 2);
        assert!(!is_part(&small) && is_aligned(&small, PAGE));
        let parts: Vec<Buffer> = (0..2 * HUGE / UNIT).map(|_| lend(UNIT)).collect();
        assert!(parts.iter().all(is_part));
        let beyond = lend(UNIT);
        assert!(!is_part(&beyond) && is_aligned(&beyond, PAGE));
        drop(parts);
        let mut half = lend(HUGE / 2 - 1);
        assert!(is_part(&half) && is_aligned(&half, HUGE / 2));
        half.as_mut().fill(1);
        for length in [HUGE - 1, HUGE, 16 * HUGE] {
            let mut large = lend(length);
            assert!(!is_part(&large) && is_aligned(&large, HUGE), "{length}");
            assert_eq!(large.memory_bytes(), Buffer::memory_for(length));
            large.as_mut().fill(1);
            assert_eq!(large.as_ref().len(), length);
        }
    }

    #[test]
    fn memory_of_the_allocator_is_aligned_too() {
        let memory = Memory::Allocated(vec![0; 2 * PAGE].into());
        let start = memory.bytes().as_ptr().align_offset(PAGE);
        assert!(start + PAGE <= memory.bytes().len());
    }

    #[test]
    fn no_more_is_kept_than_was_allowed() {
        let pool = BufferPool::new(100_000);
        let lent: Vec<_> = (0..10).map(|_| pool.lend(30_000)).collect();
        drop(lent);
        assert_eq!(lock(&pool.shelves.state).free_bytes, 3 * 32_768);
        for larger_than_all in [20 << 20, 64 << 20] {
            drop(pool.lend(larger_than_all));
            assert_eq!(lock(&pool.shelves.state).free_bytes, 0, "it would have come on top, and does not stay");
        }
    }

    #[test]
    fn sizes_that_nobody_asks_for_any_more_make_room_for_those_that_are() {
        let pool = BufferPool::new(1 << 20);
        drop((0..256).map(|_| pool.lend(4096)).collect::<Vec<_>>());
        assert_eq!(lock(&pool.shelves.state).free_bytes, 1 << 20);
        let large = pool.lend(1 << 20);
        let address = large.as_ref().as_ptr();
        drop(large);
        assert_eq!(lock(&pool.shelves.state).free_bytes, 1 << 20);
        assert_eq!(pool.lend(1 << 20).as_ref().as_ptr(), address);
    }

    #[test]
    fn no_more_is_held_than_was_once_on_loan() {
        let mut random = fastrand::Rng::with_seed(1);
        let pool = BufferPool::new(1 << 20);
        let mut lent: Vec<Buffer> = Vec::new();
        let mut most = 0;
        for _ in 0..20_000 {
            // Phases of few large and of many small ones.
            let largest = if random.u8(..100) == 0 { 22 } else { 14 };
            if random.bool() && lent.iter().map(Buffer::memory_bytes).sum::<usize>() < 8 << 20 {
                lent.push(pool.lend(random.usize(..1 << largest)));
            } else if !lent.is_empty() {
                lent.swap_remove(random.usize(..lent.len()));
            }
            let on_loan = lent.iter().map(Buffer::memory_bytes).sum::<usize>();
            most = most.max(on_loan);
            let state = lock(&pool.shelves.state);
            assert_eq!(state.lent_bytes, on_loan);
            assert_eq!(state.free_bytes, state.free.iter().flatten().map(|memory| memory.bytes().len()).sum::<usize>());
            assert!(state.free_bytes <= 1 << 20);
            assert!(on_loan + state.free_bytes <= most.max(1 << 20));
        }
        drop(lent);
        assert_eq!(lock(&pool.shelves.state).lent_bytes, 0);
    }

    #[test]
    fn the_memory_that_is_taken_up_is_told_before_and_after() {
        let pool = BufferPool::new(0);
        for (length, bytes) in [
            (0, 4096),
            (1, 4096),
            (4096, 4096),
            (4097, 8192),
            (8193, 16384),
            (32 << 20, 32 << 20),
            ((32 << 20) + 1, (32 << 20) + 4096),
        ] {
            assert_eq!(Buffer::memory_for(length), bytes);
            assert_eq!(pool.lend(length).memory_bytes(), bytes);
        }
    }
}
