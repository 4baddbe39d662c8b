//! A write session: from the durable dirty bit to the close. It begins with the first change, so that an image that was
//! only read is never touched.

use crate::sync::atomic::{AtomicBool, Ordering};
use std::io::IoSlice;

use super::Image;
use crate::error::{Error, Result};
use crate::finish::{HeaderSector, put64};
use crate::format::header::{DIRTY, EXTENSION_RETIRED_BITMAPS, field};
use crate::lock::Access;
use crate::sync::{Mutex, RwLockReadGuard, RwLockWriteGuard, lock, read, write};

#[derive(Debug)]
pub(super) struct Session {
    begun: AtomicBool,
    /// The header's first sector as it is on disk.
    pub(super) sector: Mutex<HeaderSector>,
}

impl Session {
    pub(super) fn new(sector: HeaderSector) -> Self {
        Self { begun: AtomicBool::new(false), sector: Mutex::new(sector) }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }
}

/// A running operation: holds off the close, and poisons the image if it ends by a panic.
pub(super) struct Operation<'a> {
    image: &'a Image,
    changes: bool,
    _life: Life<'a>,
}

/// Together with other operations, or alone.
#[expect(dead_code, reason = "held, never looked at")]
enum Life<'a> {
    Shared(RwLockReadGuard<'a, ()>),
    Alone(RwLockWriteGuard<'a, ()>),
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if self.changes && std::thread::panicking() {
            self.image.poison_by_panic();
        }
    }
}

impl Operation<'_> {
    /// A panic from here on leaves things half done, and poisons the image.
    pub(super) fn changes_image(&mut self) {
        self.changes = true;
    }
}

impl Image {
    /// Begins an operation that changes nothing.
    pub(super) fn reading(&self) -> Result<Operation<'_>> {
        let life = read(&self.life);
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        Ok(Operation { image: self, changes: false, _life: Life::Shared(life) })
    }

    /// Begins an operation that may change the image; the session has begun when this returns.
    pub(super) fn writing(&self) -> Result<Operation<'_>> {
        let mut operation = self.reading()?;
        operation.changes_image();
        if self.access == Access::ReadOnly {
            return Err(Error::ReadOnly);
        }
        self.refuse_poisoned()?;
        self.begin_session()?;
        Ok(operation)
    }

    /// Begins the end: waits for all operations, and keeps new ones out. `None`: somebody was here before.
    pub(super) fn closing(&self) -> Option<Operation<'_>> {
        let life = write(&self.life);
        let was_closed = self.closed.swap(true, Ordering::AcqRel);
        (!was_closed).then(|| Operation { image: self, changes: true, _life: Life::Alone(life) })
    }

    /// Begins an operation that waits for all others, keeps new ones out, and may change the image; the caller begins the
    /// session.
    pub(super) fn alone(&self) -> Result<Operation<'_>> {
        let life = write(&self.life);
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        if self.access == Access::ReadOnly {
            return Err(Error::ReadOnly);
        }
        self.refuse_poisoned()?;
        Ok(Operation { image: self, changes: true, _life: Life::Alone(life) })
    }

    /// The session that closing and growing need; the caller holds `life` exclusively.
    pub(super) fn session_alone(&self) -> Result<()> {
        self.refuse_poisoned()?;
        self.begin_session()
    }

    /// Sets the dirty bit and gives up what this engine does not maintain (autoclear features, bitmaps), durably, before
    /// the first change.
    fn begin_session(&self) -> Result<()> {
        if self.session.has_begun() {
            return Ok(());
        }
        let mut sector = lock(&self.session.sector);
        if self.session.has_begun() {
            return Ok(());
        }
        self.refuse_poisoned()?;
        self.write_behind.start()?;
        let dirty = if mutant!("no_dirty_bit") { 0 } else { DIRTY };
        put64(&mut sector, field::INCOMPATIBLE, self.header.incompatible | dirty);
        put64(&mut sector, field::AUTOCLEAR, if mutant!("autoclear_kept") { self.header.autoclear } else { 0 });
        self.store(0, &mut [IoSlice::new(&sector[..])])?;
        if !mutant!("no_b0") {
            self.sync()?;
        }
        if let Some(at) = self.header.bitmaps_extension.filter(|_| !mutant!("bitmaps_kept")) {
            // Renamed in place: removing it would move the backing file's name across sectors, which a crash could tear.
            let kind = EXTENSION_RETIRED_BITMAPS.to_be_bytes();
            if let Some(bytes) = sector.get_mut(at..at + 4) {
                bytes.copy_from_slice(&kind);
            }
            self.store(at as u64, &mut [IoSlice::new(&kind)])?;
            self.sync()?;
        }
        self.session.begun.store(true, Ordering::Release);
        Ok(())
    }
}
