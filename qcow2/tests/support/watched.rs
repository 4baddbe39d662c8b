//! Storage in memory that remembers what it was asked.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "part of the tests that include it")]

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Mutex;

use blockyard_qcow2::storage::{MemoryStorage, Reservation, Storage};

#[derive(Debug, Default)]
pub struct Watched {
    inner: MemoryStorage,
    asked: Mutex<Asked>,
}

/// Ranges of the file, in the order of the calls.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    pub reads: Vec<Range<u64>>,
    /// Of payload: by the threads that write behind.
    pub payload: Vec<Range<u64>>,
    /// All others, of tables and headers.
    pub metadata: Vec<Range<u64>>,
    pub prefetches: Vec<Range<u64>>,
}

impl Watched {
    pub fn with_content(bytes: Vec<u8>) -> Self {
        Self { inner: MemoryStorage::with_content(bytes, u64::MAX), asked: Mutex::default() }
    }

    /// The bytes of the file.
    pub fn content(&self) -> Vec<u8> {
        self.inner.content()
    }

    /// What was asked since the last time.
    pub fn take(&self) -> Asked {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn wrote(&self, offset: u64, slices: &[IoSlice<'_>]) {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        let is_payload = std::thread::current().name() == Some("write-behind");
        let mut asked = self.asked.lock().unwrap();
        let writes = if is_payload { &mut asked.payload } else { &mut asked.metadata };
        writes.push(offset..offset + length as u64);
    }
}

impl Storage for Watched {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.asked.lock().unwrap().reads.push(offset..offset + buffer.len() as u64);
        self.inner.read(offset, buffer)
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.wrote(offset, slices);
        self.inner.write(offset, slices)
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.wrote(offset, slices);
        self.inner.write_durable(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.inner.set_length(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        self.inner.reserve(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.punch(offset, length)
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.inner.drop_cache()
    }

    fn prefetch(&self, offset: u64, length: u64) {
        self.asked.lock().unwrap().prefetches.push(offset..offset + length);
    }
}
