//! Storage whose n-th call of a kind fails, once or from then on.
#![allow(dead_code, unreachable_pub, reason = "part of the tests that include it")]

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockyard_qcow2::storage::{Reservation, Storage};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    WriteDurable,
    Sync,
    Length,
    SetLength,
    Reserve,
    Punch,
}

pub const KINDS: [Kind; 8] = [
    Kind::Read,
    Kind::Write,
    Kind::WriteDurable,
    Kind::Sync,
    Kind::Length,
    Kind::SetLength,
    Kind::Reserve,
    Kind::Punch,
];

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub kind: Kind,
    /// Counted from 1.
    pub call: u64,
    pub error: io::ErrorKind,
    pub for_ever: bool,
    /// A failing write transfers its first half.
    pub half: bool,
}

#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Storage>,
    fault: Option<Fault>,
    calls: AtomicU64,
    fired: AtomicBool,
    healed: AtomicBool,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Storage>, fault: Option<Fault>) -> Self {
        Self { inner, fault, calls: AtomicU64::new(0), fired: AtomicBool::new(false), healed: AtomicBool::new(false) }
    }

    /// Whether the fault has happened.
    pub fn fired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }

    /// Ends the fault.
    pub fn heal(&self) {
        self.healed.store(true, Ordering::SeqCst);
    }

    fn call(&self, kind: Kind) -> io::Result<()> {
        let Some(fault) = self.fault.filter(|fault| fault.kind == kind) else { return Ok(()) };
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let hit = call == fault.call || (fault.for_ever && call > fault.call);
        if !hit || self.healed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.fired.store(true, Ordering::SeqCst);
        Err(fault.error.into())
    }

    fn half(&self, offset: u64, slices: &[IoSlice<'_>]) {
        if self.fault.is_some_and(|fault| fault.half) {
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let half = &bytes[..bytes.len() / 2 / 512 * 512];
            // The half of a transfer that fails in the middle does reach the file.
            let _ = self.inner.write(offset, &mut [IoSlice::new(half)]);
        }
    }
}

impl Storage for Faulty {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.call(Kind::Read)?;
        self.inner.read(offset, buffer)
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.call(Kind::Write).inspect_err(|_| self.half(offset, slices))?;
        self.inner.write(offset, slices)
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.call(Kind::WriteDurable).inspect_err(|_| self.half(offset, slices))?;
        self.inner.write_durable(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.call(Kind::Sync)?;
        self.inner.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.call(Kind::Length)?;
        self.inner.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.call(Kind::SetLength)?;
        self.inner.set_length(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        self.call(Kind::Reserve)?;
        self.inner.reserve(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.call(Kind::Punch)?;
        self.inner.punch(offset, length)
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.inner.drop_cache()
    }
}
