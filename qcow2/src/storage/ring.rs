//! Many direct writes under way from one thread, by io_uring: what makes small and middling writes as fast as the disk takes
//! them, which one blocked thread for each cannot. `docs/performance.md`, "io_uring", has the figures.
//!
//! `unsafe` code, because the kernel reads payload while no borrow of ours exists. What makes that sound stands
//! at each block, and rests on two facts: a [`Slot`] owns its payload and the list of its slices, and no slot is emptied
//! before the kernel has said that it is done with it.
#![expect(unsafe_code, reason = "the kernel reads memory that is lent to it by address")]

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use rustix::io::Errno;

use super::direct::Direct;
use super::{FileStorage, NoRing, Payload, Storage, WriteQueue};

/// Most writes under way. (`docs/performance.md`, "io_uring".)
const DEPTH: u32 = 128;

/// Whether this system lets us have a ring: it may be too old, or forbid it.
pub(super) fn probe() -> Result<(), NoRing> {
    set_up(2)?;
    Ok(())
}

fn set_up(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        // Completions are dealt with when they are asked for, and interrupt nobody (Linux 6.1).
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_r_disabled()
        .build(entries)
}

/// A write that the kernel has, or that waits to be handed to it.
struct Slot {
    offset: u64,
    /// What is still to be written lies in `payload`, from `written` bytes on.
    slices: Vec<IoSlice<'static>>,
    written: usize,
    payload: Payload,
}

pub(super) struct Ring {
    ring: IoUring,
    storage: Arc<FileStorage>,
    direct: Arc<Direct>,
    /// By `user_data`; empty ones are free.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Writes handed over whose answer was not taken in.
    unanswered: usize,
    is_enabled: bool,
    /// What ended without the ring's help, or cannot go on.
    ended: Vec<(u64, io::Result<()>)>,
}

impl Ring {
    /// For direct writes to the file; whatever cannot go around the page cache is written to `storage` at once.
    ///
    /// It may be made in one thread and used in another, but then only there.
    pub(super) fn new(storage: Arc<FileStorage>, direct: Arc<Direct>) -> io::Result<Self> {
        let ring = set_up(DEPTH)?;
        let slots = (0..DEPTH).map(|_| None).collect();
        let free = (0..DEPTH as usize).rev().collect();
        Ok(Self { ring, storage, direct, slots, free, unanswered: 0, is_enabled: false, ended: Vec::new() })
    }

    /// Hands the rest of a slot's write to the ring.
    fn push(&mut self, index: usize) {
        let Some(Some(slot)) = self.slots.get_mut(index) else { return };
        // The kernel takes at most 1024 slices in one call; what is left over comes back as a short write.
        let count = slot.slices.len().min(1024) as u32;
        // Not a registered file: the kernel would hold it open for a while after the ring is gone, and its file system busy.
        let file = Fd(self.direct.file.as_raw_fd());
        let write = opcode::Writev::new(file, slot.slices.as_ptr().cast(), count)
            .offset(slot.offset + slot.written as u64)
            .build()
            .user_data(index as u64);
        // SAFETY: The slices are in memory of the slot's own, which neither moves nor changes while the slot is filled, and so
        // do the bytes that they name (see `begin`). The slot is emptied only by `complete`, which the kernel's last word on
        // this write leads to, or leaked by `give_up`. An `IoSlice` has the layout of an iovec.
        let pushed = unsafe { self.ring.submission().push(&write) };
        if pushed.is_ok() {
            self.unanswered += 1;
        } else {
            // There are as many places as slots, so this is for a ring smaller than it was asked to be.
            self.complete(index, Err(io::Error::other("the submission queue is full")));
        }
    }

    /// Ends a write that the kernel is done with, or never had.
    fn complete(&mut self, index: usize, result: io::Result<()>) {
        if let Some(slot) = self.slots.get_mut(index).and_then(Option::take) {
            self.free.push(index);
            self.ended.push((slot.offset, result));
        }
    }

    /// Hands what is pushed to the kernel and waits until `want` writes have an answer.
    fn enter(&mut self, want: usize) {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return,
                // Interrupted, or answers are to be collected first.
                Err(error) if is(&error, Errno::INTR) || is(&error, Errno::BUSY) => {
                    if !self.ring.completion().is_empty() {
                        return;
                    }
                }
                // Short of memory for the moment.
                Err(error) if is(&error, Errno::AGAIN) => std::thread::yield_now(),
                Err(error) => return self.give_up(&error),
            }
        }
    }

    /// The ring is broken: what is under way has failed, and its memory can never be used again.
    fn give_up(&mut self, error: &io::Error) {
        for index in 0..self.slots.len() {
            if let Some(slot) = self.slots.get_mut(index).and_then(Option::take) {
                // Not given back to `free`: an answer may still come.
                self.ended.push((slot.offset, Err(io::Error::new(error.kind(), error.to_string()))));
                std::mem::forget(slot);
            }
        }
        self.free.clear();
        self.unanswered = 0;
    }

    /// Takes the kernel's answers in.
    fn collect(&mut self) {
        let answers: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        self.unanswered = self.unanswered.saturating_sub(answers.len());
        for (user_data, result) in answers {
            self.answered(user_data as usize, result);
        }
    }

    fn answered(&mut self, index: usize, result: i32) {
        let Some(Some(slot)) = self.slots.get_mut(index) else { return };
        match usize::try_from(result) {
            Ok(0) => self.complete(index, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                slot.written += count;
                advance(&mut slot.slices, count);
                match slot.slices.is_empty() {
                    true => self.complete(index, Ok(())),
                    false => self.push(index),
                }
            }
            Err(_) => match io::Error::from_raw_os_error(result.saturating_neg()) {
                error if is(&error, Errno::INTR) || is(&error, Errno::AGAIN) => self.push(index),
                error if is(&error, Errno::INVAL) => {
                    // Not around the page cache after all.
                    self.direct.refuse();
                    let written = self.storage.write(slot.offset, &mut slot.payload.slices());
                    self.complete(index, written);
                }
                error => self.complete(index, Err(error)),
            },
        }
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}
/// Removes bytes from the beginning.
fn advance(slices: &mut Vec<IoSlice<'static>>, count: usize) {
    let mut rest = slices.as_mut_slice();
    IoSlice::advance_slices(&mut rest, count);
    let left = rest.len();
    slices.drain(..slices.len() - left);
}

impl WriteQueue for Ring {
    fn begin(&mut self, offset: u64, payload: Payload) -> bool {
        if !self.is_enabled {
            self.is_enabled = true;
            if let Err(error) = self.ring.submitter().register_enable_rings() {
                self.give_up(&error);
            }
        }
        let slices = payload.slices();
        let index = if self.direct.takes(offset, &slices) { self.free.pop() } else { None };
        let Some(index) = index else {
            let written = self.storage.write(offset, &mut payload.slices());
            self.ended.push((offset, written));
            return true;
        };
        let slices = slices
            .iter()
            // SAFETY: `Payload::slices` promises that the bytes stay where they are, unchanged, as long as a clone of the
            // payload lives, and the slot holds one beside its slices.
            .map(|slice| IoSlice::new(unsafe { std::slice::from_raw_parts(slice.as_ptr(), slice.len()) }))
            .collect();
        self.slots[index] = Some(Slot { offset, slices, written: 0, payload });
        self.push(index);
        self.free.is_empty() || !self.ended.is_empty()
    }

    fn wait(&mut self, ended: &mut Vec<(u64, io::Result<()>)>) {
        while self.ended.is_empty() && self.unanswered > 0 {
            // Not for each: a wake-up costs as much as a small write.
            self.enter((self.unanswered / 2).max(1));
            self.collect();
        }
        ended.append(&mut self.ended);
    }
}

impl Drop for Ring {
    /// The kernel must be done with the memory before it is given back.
    fn drop(&mut self) {
        while self.unanswered > 0 {
            self.enter(1);
            self.collect();
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::buffer::BufferPool;
    use crate::payload::Piece;

    /// An empty file, and a queue for it where the system has one.
    fn queue() -> (tempfile::NamedTempFile, Arc<FileStorage>, Box<dyn WriteQueue>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let storage = Arc::new(FileStorage::with_direct_access(file.reopen().unwrap()));
        let queue = storage.clone().queue().expect("io_uring and direct writes in the folder for temporary files");
        (file, storage, queue)
    }

    fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        fastrand::Rng::with_seed(seed).fill(&mut bytes);
        bytes
    }

    /// Pieces of these lengths.
    fn payload(seed: u64, lengths: impl IntoIterator<Item = usize>) -> (Payload, Vec<u8>) {
        let mut whole = Vec::new();
        let piece = |length| {
            let mut buffer = BufferPool::new(0).lend(length);
            let content = bytes(seed + whole.len() as u64, length);
            buffer.as_mut().copy_from_slice(&content);
            whole.extend(content);
            Piece::new(Arc::new(buffer))
        };
        (Payload::new(lengths.into_iter().map(piece).collect()), whole)
    }

    fn finish(queue: &mut dyn WriteQueue, count: usize) -> HashMap<u64, io::Result<()>> {
        let mut ended = Vec::new();
        while ended.len() < count {
            queue.wait(&mut ended);
        }
        assert_eq!(ended.len(), count, "an end for each");
        ended.into_iter().collect()
    }

    #[test]
    fn writes_of_all_kinds_end_once_and_are_in_the_file() {
        let (_file, storage, mut queue) = queue();
        let kinds: [Vec<usize>; 7] = [
            vec![4096],
            vec![1 << 20],
            vec![65536; 16],
            // More slices than one call takes.
            vec![512; 2500],
            // Through the page cache: no whole blocks.
            vec![4096, 100],
            vec![1],
            vec![12288, 4096, 49152],
        ];
        let mut expected = Vec::new();
        let mut under_way = 0;
        for number in 0..300u64 {
            let offset = number << 21;
            let (payload, whole) = payload(number, kinds[number as usize % kinds.len()].iter().copied());
            let is_full = queue.begin(offset, payload);
            expected.push((offset, whole));
            under_way += 1;
            if is_full {
                let mut ended = Vec::new();
                queue.wait(&mut ended);
                assert!(!ended.is_empty());
                assert!(ended.iter().all(|(_, result)| result.is_ok()), "{ended:?}");
                under_way -= ended.len();
            }
        }
        assert!(finish(&mut *queue, under_way).values().all(Result::is_ok));
        for (offset, whole) in expected {
            let mut found = vec![0; whole.len()];
            storage.read(offset, &mut found).unwrap();
            assert!(found == whole, "at {offset}");
        }
    }

    #[test]
    fn a_write_that_fails_says_so_and_the_others_go_on() {
        let (_file, storage, mut queue) = queue();
        // Past what any file can hold.
        let beyond = (i64::MAX as u64) / 4096 * 4096 - 4096;
        queue.begin(0, payload(1, [4096]).0);
        queue.begin(beyond, payload(2, [8192]).0);
        queue.begin(4096, payload(3, [4096]).0);
        let ended = finish(&mut *queue, 3);
        assert!(ended[&0].is_ok() && ended[&4096].is_ok() && ended[&beyond].is_err(), "{ended:?}");
        let mut found = vec![0; 8192];
        storage.read(0, &mut found).unwrap();
        assert_eq!(found, [payload(1, [4096]).1, payload(3, [4096]).1].concat());
    }

    #[test]
    fn dropping_it_waits_for_what_is_under_way() {
        let (_file, storage, mut queue) = queue();
        let (payload, whole) = payload(1, [1 << 20; 8]);
        queue.begin(0, payload.clone());
        drop(queue);
        let mut found = vec![0; whole.len()];
        storage.read(0, &mut found).unwrap();
        assert!(found == whole);
        assert_eq!(payload.len(), whole.len() as u64);
    }
}
