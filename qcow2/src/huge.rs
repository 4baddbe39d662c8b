//! Payload memory in huge pages, lent in parts: what is one piece for the processor is one for the disk too. A direct write
//! of 1 MiB in pages of 4 KiB is a list of 256 of them, which costs the kernel and the disk more than the bytes do.
//! (`docs/performance.md`, "Huge pages".)
//!
//! A huge page stays with the process, be it for a small part of it that is on loan, so their number is bounded, and small;
//! whoever finds none free takes memory of its own (`buffer.rs`).
//!
//! `unsafe` code, because parts of one mapping belong to different owners. That is sound as long as no two parts that exist
//! overlap, which this module holds by itself: a [`Part`] is made only by setting its units in `taken`, and they are cleared
//! only by consuming it.
#![expect(unsafe_code, reason = "parts of one mapping have different owners")]

use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{Advice, MmapMut};

/// A huge page, where pages have 4 KiB. Elsewhere this is only a piece of memory.
pub(crate) const HUGE: usize = 2 << 20;
/// The smallest part: below this the gain is not worth a place.
pub(crate) const UNIT: usize = 64 << 10;
const UNITS: u32 = (HUGE / UNIT) as u32;

/// Memory that begins at a huge page, asked to be in huge pages. `size` is a multiple of [`HUGE`].
pub(crate) fn map(size: usize) -> Option<(MmapMut, usize)> {
    // What lies before and behind is never touched, and costs nothing.
    let map = MmapMut::map_anon(size.checked_add(HUGE)?).ok()?;
    // Without them it works as well: they may be switched off.
    let _ = map.advise(Advice::HugePage);
    let start = map.as_ptr().align_offset(HUGE);
    (start <= HUGE).then_some((map, start))
}

/// Huge pages, at most so many, mapped when they are needed and kept.
#[derive(Debug, Default)]
pub(crate) struct HugePages {
    pages: Vec<Page>,
    most: usize,
}

#[derive(Debug)]
struct Page {
    memory: Arc<Memory>,
    /// A bit for each unit on loan.
    taken: u32,
}

/// [`HUGE`] bytes from `start` on, used by nobody but the owners of parts.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    _map: MmapMut,
}

// SAFETY: it is memory of the process, not of a thread, and nothing here reads or writes it but through a part.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared `Memory` gives access to nothing.
unsafe impl Sync for Memory {}

/// A part of a huge page, in nobody else's hands: a power of two of bytes, beginning at a multiple of itself.
#[derive(Debug)]
#[must_use = "its place is taken until it is put back"]
pub(crate) struct Part {
    page: usize,
    units: u32,
    offset: usize,
    length: usize,
    memory: Arc<Memory>,
}

impl HugePages {
    pub(crate) fn new(most: usize) -> Self {
        Self { pages: Vec::new(), most }
    }

    /// A part of this size, if there is one; of others than the powers of two from [`UNIT`] to [`HUGE`] there is none.
    pub(crate) fn take(&mut self, size: usize) -> Option<Part> {
        if !size.is_power_of_two() || !(UNIT..=HUGE).contains(&size) {
            return None;
        }
        let count = (size / UNIT) as u32;
        let full = u32::MAX >> (UNITS - count);
        // The first page that has room: the others may become whole again.
        let free = |taken: u32| (0..UNITS).step_by(count as usize).find(|at| taken & full << at == 0);
        let found = self.pages.iter().enumerate().find_map(|(page, state)| Some((page, free(state.taken)?)));
        let (page, at) = match found {
            Some(found) => found,
            None if self.pages.len() < self.most => {
                let (mut map, start) = map(HUGE)?;
                let start = NonNull::new(map.as_mut_ptr().wrapping_add(start))?;
                self.pages.push(Page { memory: Arc::new(Memory { start, _map: map }), taken: 0 });
                (self.pages.len() - 1, 0)
            }
            None => return None,
        };
        let state = self.pages.get_mut(page)?;
        let units = full << at;
        state.taken |= units;
        Some(Part { page, units, offset: at as usize * UNIT, length: size, memory: state.memory.clone() })
    }

    /// Takes a part back.
    pub(crate) fn put(&mut self, part: Part) {
        let Part { page, units, memory, .. } = part;
        // Of another set of pages: it has no place here, and keeps its own.
        let page = self.pages.get_mut(page).filter(|page| Arc::ptr_eq(&page.memory, &memory));
        if let Some(page) = page {
            page.taken &= !units;
        }
    }
}

impl Part {
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: inside the mapping, which `memory` keeps, and which is initialised as a whole (anonymous memory reads as
        // zeroes). Nobody else has these units until this part is consumed, so only borrows of it can change them.
        unsafe { std::slice::from_raw_parts(self.memory.start.as_ptr().add(self.offset), self.length) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and the borrow of this part is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start.as_ptr().add(self.offset), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_never_overlap_and_find_each_hole_of_their_size() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut pages = HugePages::new(3);
        let mut lent: Vec<(Part, u8)> = Vec::new();
        for round in 0..20_000 {
            if random.bool() {
                let size = UNIT << random.usize(0..6);
                match pages.take(size) {
                    Some(mut part) => {
                        assert_eq!(part.bytes().len(), size);
                        assert!(part.bytes().as_ptr().addr().is_multiple_of(size));
                        let mark = round as u8;
                        part.bytes_mut().fill(mark);
                        lent.push((part, mark));
                    }
                    None => {
                        let held: usize = lent.iter().map(|(part, _)| part.length).sum();
                        assert!(size > UNIT || held == 3 * HUGE, "{held} of {}", 3 * HUGE);
                    }
                }
            } else if !lent.is_empty() {
                let (part, mark) = lent.swap_remove(random.usize(..lent.len()));
                assert!(part.bytes().iter().all(|byte| *byte == mark));
                pages.put(part);
            }
            // Some of the time nearly all is free, so that large parts find room again.
            if random.u16(..500) == 0 {
                lent.drain(..).for_each(|(part, _)| pages.put(part));
                assert!(pages.pages.iter().all(|page| page.taken == 0));
            }
        }
        assert_eq!(pages.pages.len(), 3);
    }

    #[test]
    fn a_part_outlives_its_pages_and_is_of_no_use_to_others() {
        let (mut first, mut second) = (HugePages::new(1), HugePages::new(1));
        let mut stray = first.take(UNIT).unwrap();
        drop(first);
        stray.bytes_mut().fill(1);
        let held = second.take(UNIT).unwrap();
        second.put(stray);
        assert_ne!(second.take(UNIT).unwrap().offset, held.offset);
        assert!(HugePages::new(0).take(UNIT).is_none());
        assert!([0, 1, UNIT / 2, 3 * UNIT, 2 * HUGE].iter().all(|size| HugePages::new(1).take(*size).is_none()));
    }
}
