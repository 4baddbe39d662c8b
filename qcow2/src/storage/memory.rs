//! A file that is a vector of bytes: for tests, fuzzing, and images that nobody keeps. It knows no locks, no holes, and no
//! crash: what was written is "durable" at once, until the storage is dropped.

use std::io::{self, ErrorKind, IoSlice};

use super::{Reservation, Storage};
use crate::sync::{RwLock, read, write};

/// Positional access to bytes in memory. It occupies its length: a hole costs what data would.
#[derive(Debug)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
    limit_bytes: u64,
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStorage {
    /// An empty file that may grow as long as there is memory.
    pub fn new() -> Self {
        Self::with_limit(u64::MAX)
    }

    /// An empty file on a "disk" of this many bytes; what would pass them fails with [`ErrorKind::StorageFull`].
    pub fn with_limit(limit_bytes: u64) -> Self {
        Self { bytes: RwLock::new(Vec::new()), limit_bytes }
    }

    /// The same with this content; content beyond the limit stays.
    pub fn with_content(bytes: Vec<u8>, limit_bytes: u64) -> Self {
        Self { bytes: RwLock::new(bytes), limit_bytes }
    }

    /// A copy of the whole file.
    pub fn content(&self) -> Vec<u8> {
        read(&self.bytes).clone()
    }

    /// Makes the file at least `end` bytes long.
    fn grow(&self, bytes: &mut Vec<u8>, end: u64) -> io::Result<()> {
        let length = bytes.len() as u64;
        if end <= length {
            return Ok(());
        }
        if end > self.limit_bytes {
            return Err(ErrorKind::StorageFull.into());
        }
        let more = usize::try_from(end - length).map_err(|_| ErrorKind::FileTooLarge)?;
        bytes.try_reserve(more).map_err(|_| ErrorKind::StorageFull)?;
        bytes.resize(bytes.len() + more, 0);
        Ok(())
    }
}

/// The part of `[offset, offset + length)` that lies inside of `available` bytes.
fn inside(offset: u64, length: u64, available: usize) -> std::ops::Range<usize> {
    let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(available);
    clamp(offset)..clamp(offset.saturating_add(length))
}

fn end_of(offset: u64, length: u64) -> io::Result<u64> {
    let end = offset.checked_add(length).filter(|end| *end <= i64::MAX as u64);
    end.ok_or_else(|| ErrorKind::FileTooLarge.into())
}

impl Storage for MemoryStorage {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = read(&self.bytes);
        let there = bytes.get(inside(offset, buffer.len() as u64, bytes.len())).unwrap_or_default();
        let (head, tail) = buffer.split_at_mut(there.len());
        head.copy_from_slice(there);
        tail.fill(0);
        Ok(())
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        let length = slices.iter().map(|slice| slice.len() as u64).sum();
        if length == 0 {
            return Ok(());
        }
        let end = end_of(offset, length)?;
        let mut bytes = write(&self.bytes);
        self.grow(&mut bytes, end)?;
        let mut at = offset;
        for slice in slices {
            let range = inside(at, slice.len() as u64, bytes.len());
            if let Some(target) = bytes.get_mut(range) {
                target.copy_from_slice(slice);
            }
            at += slice.len() as u64;
        }
        Ok(())
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.write(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(read(&self.bytes).len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let length = end_of(0, length)?;
        let mut bytes = write(&self.bytes);
        self.grow(&mut bytes, length)?;
        bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        let end = end_of(offset, length)?;
        self.grow(&mut write(&self.bytes), end)?;
        Ok(Reservation::Done)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut bytes = write(&self.bytes);
        let range = inside(offset, length, bytes.len());
        if let Some(hole) = bytes.get_mut(range) {
            hole.fill(0);
        }
        Ok(())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_refuses_what_passes_its_limit_and_changes_nothing() {
        let storage = MemoryStorage::with_limit(8);
        storage.write(2, &mut [IoSlice::new(b"ab"), IoSlice::new(b"cd")]).unwrap();
        assert_eq!(storage.write(6, &mut [IoSlice::new(b"xyz")]).unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(storage.reserve(0, 9).unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(storage.set_length(9).unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(storage.content(), b"\0\0abcd");
    }

    #[test]
    fn offsets_that_no_file_has_are_refused_or_read_as_zeroes() {
        let storage = MemoryStorage::new();
        assert_eq!(storage.write(u64::MAX, &mut [IoSlice::new(b"x")]).unwrap_err().kind(), ErrorKind::FileTooLarge);
        let mut buffer = [1; 4];
        storage.read(u64::MAX - 1, &mut buffer).unwrap();
        assert_eq!(buffer, [0; 4]);
    }
}
