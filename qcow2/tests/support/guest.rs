//! What a guest asked of an image and was told, sector by sector: from that follows what the image may hold after a
//! failure or a power cut.
#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::Range;
use std::sync::Arc;

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{Access, CompressionLevel, Durability, Error, Image, Layer, OpenOptions, Result, ZeroMode};

use super::faulty::{Faulty, Kind};
use super::support::pattern;

const SECTOR: usize = 512;
/// Two tables of 512-byte clusters: tables come, go and come again.
const CACHE_BYTES: usize = 1024;

/// What each sector may read as: its value at the last flush, or anything asked for since.
#[derive(Clone)]
pub struct Allowed {
    /// Of each sector, oldest first; never empty.
    values: Vec<Vec<Vec<u8>>>,
}

impl Allowed {
    pub fn new(content: &[u8]) -> Self {
        Self { values: content.chunks(SECTOR).map(|sector| vec![sector.to_vec()]).collect() }
    }

    /// What the disk reads as if nothing fails.
    pub fn newest(&self) -> Vec<u8> {
        self.values.iter().flat_map(|values| values.last().unwrap().iter().copied()).collect()
    }

    pub fn attempt(&mut self, offset: usize, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done;
            let piece = (SECTOR - at % SECTOR).min(bytes.len() - done);
            let values = &mut self.values[at / SECTOR];
            let mut next = values.last().unwrap().clone();
            next[at % SECTOR..at % SECTOR + piece].copy_from_slice(&bytes[done..done + piece]);
            values.push(next);
            done += piece;
        }
    }

    /// The newest value of these sectors is on stable storage.
    fn durable(&mut self, sectors: Range<usize>) {
        for values in &mut self.values[sectors] {
            values.drain(..values.len() - 1);
        }
    }

    fn all_durable(&mut self) {
        self.durable(0..self.values.len());
    }

    pub fn allows(&self, sector: usize, found: &[u8]) -> bool {
        self.values[sector].iter().any(|value| value == found)
    }

    /// Whether nothing was asked of a sector since it was flushed.
    fn is_settled(&self, sector: usize) -> bool {
        self.values[sector].len() == 1
    }

    pub fn assert_allows(&self, disk: &[u8], context: &str) {
        assert_eq!(disk.len(), self.newest().len(), "{context}");
        for (sector, found) in disk.chunks(SECTOR).enumerate() {
            assert!(self.allows(sector, found), "{context}: sector {sector} was lost or changed");
        }
    }
}

/// A guest on an image whose storage fails at some point.
pub struct Guest {
    pub storage: Arc<Faulty>,
    /// The raw bytes below.
    pub backing: Option<Arc<dyn Storage>>,
    pub backing_bytes: u64,
    pub compress: Option<CompressionLevel>,
    pub image: Option<Image>,
    pub allowed: Allowed,
    is_closed: bool,
    writes: u64,
}

impl Guest {
    pub fn new(storage: Arc<Faulty>, backing: Option<(Arc<dyn Storage>, u64)>, content: &[u8]) -> Self {
        let (backing, backing_bytes) = backing.unzip();
        let backing_bytes = backing_bytes.unwrap_or(0);
        Self {
            storage,
            backing,
            backing_bytes,
            compress: None,
            image: None,
            allowed: Allowed::new(content),
            is_closed: false,
            writes: 0,
        }
    }

    pub fn open_on(&self, storage: Arc<dyn Storage>) -> Result<Image> {
        let raw = |storage: &Arc<dyn Storage>| Layer::Raw { storage: storage.clone(), size: self.backing_bytes };
        let access = Access::ReadWrite;
        let options = OpenOptions { cache_bytes: CACHE_BYTES, compress: self.compress, ..OpenOptions::new(access) };
        Image::open_on_with(storage, self.backing.as_ref().map(raw), &options)
    }

    pub fn open(&mut self) -> Result<()> {
        self.image = None;
        self.image = Some(self.open_on(self.storage.clone())?);
        self.is_closed = false;
        Ok(())
    }

    /// The image; [`Error::Closed`] when there is none any more.
    pub fn image(&self) -> Result<&Image> {
        self.image.as_ref().ok_or(Error::Closed)
    }

    fn has_lost_something(&self) -> bool {
        self.storage.failures().iter().any(|failure| failure.kind.is_change())
    }

    fn settle(&mut self, offset: usize, length: usize, durability: Durability) {
        if durability == Durability::BeforeReply {
            self.allowed.durable(offset / SECTOR..(offset + length).div_ceil(SECTOR));
        }
    }

    pub fn write(&mut self, offset: usize, length: usize, durability: Durability) -> Result<()> {
        self.writes += 1;
        let data = pattern(self.writes, length);
        self.write_bytes(offset, &data, durability)
    }

    /// Bytes that compress well, other ones each time.
    pub fn write_even(&mut self, offset: usize, length: usize, durability: Durability) -> Result<()> {
        self.writes += 1;
        let data = vec![self.writes as u8; length];
        self.write_bytes(offset, &data, durability)
    }

    fn write_bytes(&mut self, offset: usize, data: &[u8], durability: Durability) -> Result<()> {
        self.allowed.attempt(offset, data);
        self.image()?.write(offset as u64, data, durability)?;
        self.settle(offset, data.len(), durability);
        Ok(())
    }

    pub fn zero(&mut self, offset: usize, length: usize, mode: ZeroMode, durability: Durability) -> Result<()> {
        self.allowed.attempt(offset, &vec![0; length]);
        self.image()?.zero(offset as u64, length as u64, mode, durability)?;
        self.settle(offset, length, durability);
        Ok(())
    }

    /// Whole clusters only.
    pub fn discard(&mut self, offset: usize, length: usize) -> Result<()> {
        self.allowed.attempt(offset, &vec![0; length]);
        self.image()?.discard(offset as u64, length as u64, Durability::OnFlush)
    }

    /// A success after a failed change would be a lie.
    pub fn flush(&mut self) -> Result<()> {
        let had_failed = self.has_lost_something();
        self.image()?.flush()?;
        assert!(!had_failed, "a flush succeeded although a write or sync had failed");
        self.allowed.all_durable();
        Ok(())
    }

    pub fn read_all(&self) -> Result<()> {
        let newest = self.allowed.newest();
        let mut found = vec![0xee; newest.len()];
        self.image()?.read(0, &mut found)?;
        assert!(found == newest, "a read returned something else than what was written");
        Ok(())
    }

    pub fn close(&mut self) -> Result<()> {
        self.is_closed = true;
        self.image()?.close()?;
        assert!(!self.has_lost_something(), "a close succeeded although a write or sync had failed");
        self.allowed.all_durable();
        Ok(())
    }

    pub fn reopen(&mut self) -> Result<()> {
        self.close()?;
        self.open()
    }

    /// As after a crash of the process: nobody closed the image.
    pub fn reopen_unclosed(&mut self) -> Result<()> {
        self.flush()?;
        self.image = None;
        self.open()
    }

    /// After a failure that poisoned: for good, everything that could lose something is refused, and what was flushed can
    /// be read.
    pub fn assert_poisoned(&self, context: &str) {
        // Once closed, well or not, it refuses everything.
        let Some(image) = self.image.as_ref().filter(|_| !self.is_closed) else { return };
        let newest = self.allowed.newest();
        for round in 0..2 {
            for refused in [
                image.write(0, &[1], Durability::OnFlush),
                image.write(512, &[1; 512], Durability::BeforeReply),
                image.zero(0, 512, ZeroMode::Keep, Durability::OnFlush),
                image.zero(0, 512, ZeroMode::Unmap, Durability::BeforeReply),
                image.discard(0, 512, Durability::OnFlush),
                image.flush(),
            ] {
                assert!(matches!(refused, Err(Error::Poisoned { .. })), "{context}, round {round}: {refused:?}");
            }
        }
        for sector in 0..newest.len() / SECTOR {
            let mut found = [0xee; SECTOR];
            match image.read((sector * SECTOR) as u64, &mut found) {
                Ok(()) => assert!(self.allowed.allows(sector, &found), "{context}: sector {sector} reads as garbage"),
                Err(error) => {
                    // With payload that could not be stored, this session loses what it kept of the cluster around it.
                    let cluster = image.cluster_size() as usize / SECTOR;
                    let first = sector / cluster * cluster;
                    let mut around = first..(first + cluster).min(newest.len() / SECTOR);
                    let is_settled = around.all(|sector| self.allowed.is_settled(sector));
                    assert!(!is_settled, "{context}: flushed sector {sector}: {error}");
                }
            }
        }
        assert!(matches!(image.close(), Err(Error::Poisoned { .. })), "{context}: closed");
    }

    /// After a failure that changed nothing: reads show one of the allowed values.
    pub fn read_after_failure(&self, context: &str) {
        let mut found = self.allowed.newest();
        self.image.as_ref().unwrap().read(0, &mut found).unwrap();
        self.allowed.assert_allows(&found, context);
    }

    /// The error of a failed workload is about the call that failed, or says that an earlier one did.
    pub fn assert_right_error(&self, error: &Error, context: &str) {
        let failures = self.storage.failures();
        let is_one_of = |right: &dyn Fn(Kind) -> bool| failures.iter().any(|failure| right(failure.kind));
        match error {
            Error::Io { operation, offset, source } => {
                let is_it = |kind| match kind {
                    Kind::Read => *operation == "read",
                    Kind::Write | Kind::WriteDurable => *operation == "write",
                    Kind::Sync => *operation == "fdatasync",
                    Kind::Length => *operation == "fstat",
                    Kind::SetLength => *operation == "ftruncate",
                    Kind::Reserve => *operation == "fallocate",
                    Kind::DropCache => *operation == "fadvise",
                    Kind::Punch => false,
                };
                // Payload that was acknowledged and could not be stored cannot be read any more.
                let is_lost = *operation == "read" && source.raw_os_error().is_none() && is_one_of(&Kind::is_change);
                let found = is_lost
                    || failures.iter().any(|failure| {
                        let same_errno = source.raw_os_error() == Some(failure.errno as i32);
                        // A read names where it failed.
                        let same_place = failure.kind != Kind::Read || failure.offset == *offset;
                        is_it(failure.kind) && same_errno && same_place
                    });
                assert!(found, "{context}: {error} does not say what failed: {failures:?}");
            }
            Error::NoSpace { .. } => assert!(is_one_of(&|kind| kind == Kind::Reserve), "{context}: {error}"),
            Error::Poisoned { .. } => assert!(is_one_of(&Kind::is_change), "{context}: {error}"),
            other => unreachable!("{context}: not the error of a failed call: {other}"),
        }
    }
}
