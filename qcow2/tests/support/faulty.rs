//! Storage whose n-th call of a kind fails, once or from then on.
#![allow(dead_code, unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "out_of_order.rs"]
#[allow(clippy::duplicate_mod, reason = "some tests include both kinds of storage")]
mod out_of_order;

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::{Reservation, Storage, WriteQueue};
use nix::errno::Errno;
use out_of_order::OutOfOrder;

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
    DropCache,
}

pub const KINDS: [Kind; 9] = [
    Kind::Read,
    Kind::Write,
    Kind::WriteDurable,
    Kind::Sync,
    Kind::Length,
    Kind::SetLength,
    Kind::Reserve,
    Kind::Punch,
    Kind::DropCache,
];

impl Kind {
    /// After a failure of these nobody knows what the disk holds.
    pub fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::WriteDurable | Self::Sync | Self::SetLength)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub kind: Kind,
    /// Counted from 1.
    pub call: u64,
    pub errno: Errno,
    /// Every later call of the kind fails too.
    pub for_ever: bool,
    /// The first half is transferred before the failure.
    pub short: bool,
}

/// A call that failed.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    pub kind: Kind,
    pub offset: u64,
    pub errno: Errno,
}

#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Storage>,
    faults: Mutex<Vec<Fault>>,
    calls: [AtomicU64; KINDS.len()],
    failures: Mutex<Vec<Failure>>,
    is_healed: AtomicBool,
    has_queue: bool,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Storage>, faults: &[Fault]) -> Self {
        Self {
            inner,
            faults: Mutex::new(faults.to_vec()),
            calls: Default::default(),
            failures: Mutex::default(),
            is_healed: AtomicBool::new(false),
            has_queue: false,
        }
    }

    /// With writes that one thread keeps under way.
    pub fn with_queue(self) -> Self {
        Self { has_queue: true, ..self }
    }

    /// From now on, the n-th call of a kind, counted from 1, fails.
    pub fn fail_later(&self, fault: Fault) {
        let call = self.calls(fault.kind) + fault.call;
        self.faults.lock().unwrap().push(Fault { call, ..fault });
    }

    /// How many calls of a kind there were.
    pub fn calls(&self, kind: Kind) -> u64 {
        self.calls[kind as usize].load(Ordering::SeqCst)
    }

    /// The calls that failed so far.
    pub fn failures(&self) -> Vec<Failure> {
        self.failures.lock().unwrap().clone()
    }

    /// Ends all faults.
    pub fn heal(&self) {
        self.is_healed.store(true, Ordering::SeqCst);
    }

    /// Counts a call; the fault that it meets, if any.
    fn call(&self, kind: Kind, offset: u64) -> Result<(), Fault> {
        let call = self.calls[kind as usize].fetch_add(1, Ordering::SeqCst) + 1;
        let meets = |fault: &&Fault| fault.kind == kind && (call == fault.call || fault.for_ever && call > fault.call);
        let fault = self.faults.lock().unwrap().iter().find(meets).copied();
        let Some(fault) = fault.filter(|_| !self.is_healed.load(Ordering::SeqCst)) else { return Ok(()) };
        self.failures.lock().unwrap().push(Failure { kind, offset, errno: fault.errno });
        Err(fault)
    }

    fn write_half(&self, fault: &Fault, offset: u64, slices: &[IoSlice<'_>]) {
        if fault.short {
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            // The half of a transfer that fails in the middle does reach the file, cut where its blocks are.
            let end = (offset + bytes.len() as u64 / 2) / 512 * 512;
            let half = &bytes[..end.saturating_sub(offset) as usize];
            self.inner.write(offset, &mut [IoSlice::new(half)]).unwrap();
        }
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        Self::from_raw_os_error(fault.errno as i32)
    }
}

impl Storage for Faulty {
    fn queue(self: Arc<Self>) -> Option<Box<dyn WriteQueue>> {
        self.has_queue.then(|| OutOfOrder::over(self.clone()))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if let Err(fault) = self.call(Kind::Read, offset) {
            if fault.short {
                let half = buffer.len() / 2;
                self.inner.read(offset, &mut buffer[..half])?;
            }
            return Err(fault.into());
        }
        self.inner.read(offset, buffer)
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.call(Kind::Write, offset).inspect_err(|fault| self.write_half(fault, offset, slices))?;
        self.inner.write(offset, slices)
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.call(Kind::WriteDurable, offset).inspect_err(|fault| self.write_half(fault, offset, slices))?;
        self.inner.write_durable(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.call(Kind::Sync, 0)?;
        self.inner.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.call(Kind::Length, 0)?;
        self.inner.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.call(Kind::SetLength, length)?;
        self.inner.set_length(length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        self.call(Kind::Reserve, offset)?;
        self.inner.reserve(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.call(Kind::Punch, offset)?;
        self.inner.punch(offset, length)
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.call(Kind::DropCache, 0)?;
        self.inner.drop_cache()
    }

    fn block_size(&self) -> u64 {
        self.inner.block_size()
    }
}
