//! A disk in memory that keeps what was synced apart from what was only written.
#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{self, IoSlice};
use std::sync::Mutex;

use blockyard_qcow2::storage::{Reservation, Storage};

/// The bytes of a file; behind what was written, up to the length, there are zeroes that take no memory.
#[derive(Clone, Debug, Default)]
pub struct Bytes {
    bytes: Vec<u8>,
    length: u64,
}

impl Bytes {
    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        let start = (offset as usize).min(self.bytes.len());
        let there = &self.bytes[start..(start + buffer.len()).min(self.bytes.len())];
        let (head, tail) = buffer.split_at_mut(there.len());
        head.copy_from_slice(there);
        tail.fill(0);
    }

    pub fn write(&mut self, offset: u64, slices: &[IoSlice<'_>]) {
        let mut at = offset as usize;
        for slice in slices.iter().filter(|slice| !slice.is_empty()) {
            let end = at + slice.len();
            if self.bytes.len() < end {
                self.bytes.resize(end, 0);
            }
            self.bytes[at..end].copy_from_slice(slice);
            self.length = self.length.max(end as u64);
            at = end;
        }
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// Everything up to the last byte that was written.
    pub fn start(&self) -> &[u8] {
        &self.bytes
    }

    pub fn set_length(&mut self, length: u64) {
        self.bytes.truncate(length as usize);
        self.length = length;
    }

    pub fn punch(&mut self, offset: u64, length: u64) {
        let end = ((offset + length) as usize).min(self.bytes.len());
        if let Some(range) = self.bytes.get_mut(offset as usize..end) {
            range.fill(0);
        }
    }
}

/// A disk that knows what a power cut would leave if everything that no successful sync covered were lost.
#[derive(Debug, Default)]
pub struct VolatileDisk {
    state: Mutex<Views>,
}

#[derive(Clone, Debug, Default)]
struct Views {
    /// What reads see.
    written: Bytes,
    /// What the last successful sync covered, and durable writes since.
    durable: Bytes,
}

impl VolatileDisk {
    pub fn new(content: Bytes) -> Self {
        Self { state: Mutex::new(Views { durable: content.clone(), written: content }) }
    }

    /// Everything that was written.
    pub fn written(&self) -> Bytes {
        self.state.lock().unwrap().written.clone()
    }

    /// What is durable for certain.
    pub fn durable(&self) -> Bytes {
        self.state.lock().unwrap().durable.clone()
    }
}

impl Storage for VolatileDisk {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.state.lock().unwrap().written.read(offset, buffer);
        Ok(())
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.state.lock().unwrap().written.write(offset, slices);
        Ok(())
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.written.write(offset, slices);
        // The disk takes whole sectors, with what the rest of them holds by now.
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        let end = (offset + length as u64).next_multiple_of(512).min(state.written.length());
        let start = offset / 512 * 512;
        let mut sectors = vec![0; (end - start) as usize];
        state.written.read(start, &mut sectors);
        state.durable.write(start, &[IoSlice::new(&sectors)]);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.durable = state.written.clone();
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().written.length())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.state.lock().unwrap().written.set_length(length);
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        let written = &mut self.state.lock().unwrap().written;
        let length = written.length().max(offset + length);
        written.set_length(length);
        Ok(Reservation::Done)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.state.lock().unwrap().written.punch(offset, length);
        Ok(())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}
