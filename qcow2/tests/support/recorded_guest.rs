//! The guest of one image: what it asks is recorded with the times of question and answer, and judged at the end.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{Access, CreateOptions, Durability, Error, Image, Layer, Result, ZeroMode, create_on};

use super::history::{Event, Flush, History, Read, SECTOR, Value, mark, sector_of, value_of};
use super::reader::read_disk;
use super::registers::Registers;
use super::sim_disk::{Clock, Content, SimDisk, now};
use super::support::over;

/// So few tables stay in memory that those of 512-byte clusters come and go.
const CACHE: usize = 0;
/// The marks of the backing file and of what a reopened image held.
const BELOW: u64 = 1 << 20;
const BEFORE: u64 = 2 << 20;

/// What a run works on.
#[derive(Debug)]
pub struct Shape {
    /// Bytes.
    pub cluster: usize,
    /// Sectors of the disk, and of the backing file; 0: none.
    pub sectors: usize,
    pub below: usize,
    /// Whether the image was written to and closed before.
    pub is_reopened: bool,
    /// Where writers meet: first sectors of small regions.
    pub spots: &'static [usize],
}

impl Shape {
    fn below_values(&self) -> Vec<Value> {
        (0..self.below).map(|sector| mark(BELOW, sector)).collect()
    }

    fn layer(&self, clock: &Clock) -> Option<Layer> {
        let bytes: Vec<u8> = self.below_values().into_iter().flat_map(sector_of).collect();
        if bytes.is_empty() {
            return None;
        }
        let raw = SimDisk::new(clock.clone(), Content::default()).quiet();
        raw.write(0, &mut [IoSlice::new(&bytes)]).unwrap();
        Some(Layer::Raw { storage: Arc::new(raw), size: bytes.len() as u64 })
    }

    /// A new image, or one that was written to and closed.
    pub fn first_content(&self, clock: &Clock) -> Content {
        let disk = Arc::new(SimDisk::new(clock.clone(), Content::default()).quiet());
        let (size, cluster_size) = ((self.sectors * SECTOR) as u64, self.cluster as u32);
        let plain = if self.below > 0 { over("below.qcow2", size) } else { CreateOptions::new(size) };
        create_on(&*disk, &CreateOptions { cluster_size, ..plain }).unwrap();
        if self.is_reopened {
            let image = Image::open_on(disk.clone(), Access::ReadWrite, self.layer(clock), CACHE).unwrap();
            for sector in self.spots.iter().flat_map(|spot| *spot..(spot + 4).min(self.sectors)) {
                let bytes = sector_of(mark(BEFORE, sector));
                image.write((sector * SECTOR) as u64, &bytes, Durability::OnFlush).unwrap();
            }
            image.close().unwrap();
        }
        disk.content()
    }

    pub fn values_of(&self, content: &Content) -> std::result::Result<Vec<Value>, String> {
        let below: Vec<u8> = self.below_values().into_iter().flat_map(sector_of).collect();
        Ok(read_disk(content, &below)?.chunks(SECTOR).map(value_of).collect())
    }
}

/// One session on one disk, shared by its threads.
pub struct Guest {
    pub shape: &'static Shape,
    pub clock: Clock,
    pub image: Image,
    disk: Arc<SimDisk>,
    base: Content,
    history: Mutex<History>,
    next_id: AtomicU64,
}

impl Guest {
    /// Opens the image on a disk that holds `base`; writes are numbered from `first_id` on.
    pub fn new(
        shape: &'static Shape,
        clock: &Clock,
        base: &Content,
        first_id: u64,
        slowness: usize,
    ) -> std::result::Result<Arc<Self>, String> {
        let initial = shape.values_of(base)?;
        let mut disk = SimDisk::new(clock.clone(), base.clone());
        (disk.slowness, disk.has_queue) = (slowness, slowness.is_multiple_of(2));
        let disk = Arc::new(disk);
        let image = Image::open_on(disk.clone(), Access::ReadWrite, shape.layer(clock), CACHE)
            .map_err(|error| format!("cannot be opened: {error}"))?;
        Ok(Arc::new(Self {
            shape,
            clock: clock.clone(),
            image,
            disk,
            base: base.clone(),
            history: Mutex::new(History { initial, ..History::default() }),
            next_id: AtomicU64::new(first_id),
        }))
    }

    /// Runs an operation and records it, unless the image was closed: then nothing happened.
    fn record(
        &self,
        first_sector: usize,
        sectors: usize,
        id: Option<u64>,
        durability: Durability,
        operation: impl FnOnce() -> Result<()>,
    ) -> bool {
        let issued = now(&self.clock);
        match operation() {
            Ok(()) => {}
            Err(Error::Closed) => return false,
            other => other.unwrap(),
        }
        let durable = durability == Durability::BeforeReply;
        let event = Event { issued, replied: now(&self.clock), first_sector, sectors, id, durable };
        self.history.lock().unwrap().events.push(event);
        true
    }

    /// Writes whole sectors; `false`: the image was closed.
    pub fn write(&self, first: usize, sectors: usize, durability: Durability) -> bool {
        let id = self.next_id.fetch_add(1, Ordering::SeqCst);
        let data: Vec<u8> = (first..first + sectors).flat_map(|sector| sector_of(mark(id, sector))).collect();
        let write = || self.image.write((first * SECTOR) as u64, &data, durability);
        self.record(first, sectors, Some(id), durability, write)
    }

    pub fn zero(&self, first: usize, sectors: usize, mode: ZeroMode, durability: Durability) -> bool {
        let (offset, length) = ((first * SECTOR) as u64, (sectors * SECTOR) as u64);
        self.record(first, sectors, None, durability, || self.image.zero(offset, length, mode, durability))
    }

    /// Discards; what is promised concerns the whole clusters inside.
    pub fn discard(&self, first: usize, sectors: usize, durability: Durability) -> bool {
        let (offset, length) = ((first * SECTOR) as u64, (sectors * SECTOR) as u64);
        let (per_cluster, end) = (self.shape.cluster / SECTOR, first + sectors);
        let end = if end == self.shape.sectors { end } else { end / per_cluster * per_cluster };
        let start = first.next_multiple_of(per_cluster).min(end);
        self.record(start, end - start, None, durability, || self.image.discard(offset, length, durability))
    }

    pub fn flush(&self) -> bool {
        let issued = now(&self.clock);
        match self.image.flush() {
            Err(Error::Closed) => return false,
            other => other.unwrap(),
        }
        self.history.lock().unwrap().flushes.push(Flush { issued, replied: now(&self.clock) });
        true
    }

    pub fn read(&self, first_sector: usize, sectors: usize) -> bool {
        let mut bytes = vec![0; sectors * SECTOR];
        let issued = now(&self.clock);
        let offset = (first_sector * SECTOR) as u64;
        // Every second one as an asynchronous caller does it.
        let cached = if issued.is_multiple_of(2) { self.image.read_cached(offset, &mut bytes) } else { None };
        match cached {
            Some(holes) => holes.into_iter().for_each(|hole| bytes[hole].fill(0)),
            None => match self.image.read(offset, &mut bytes) {
                Err(Error::Closed) => return false,
                other => other.unwrap(),
            },
        }
        let values = bytes.chunks(SECTOR).map(value_of).collect();
        let read = Read { issued, replied: now(&self.clock), first_sector, values };
        self.history.lock().unwrap().reads.push(read);
        true
    }

    /// Closes; the image must then be clean, and read as its history allows.
    pub fn close(&self) -> std::result::Result<(), String> {
        let issued = now(&self.clock);
        self.image.close().map_err(|error| format!("cannot be closed: {error}"))?;
        let mut history = self.history.lock().unwrap();
        history.flushes.push(Flush { issued, replied: now(&self.clock) });
        let report = self.image.check().map_err(|error| error.to_string())?;
        if !report.is_clean() {
            return Err(format!("closed, and not clean: {report:?}"));
        }
        let values = self.shape.values_of(&self.disk.content())?;
        history.reads.push(Read { issued: now(&self.clock), replied: now(&self.clock), first_sector: 0, values });
        Ok(())
    }

    pub fn content(&self) -> Content {
        self.disk.content()
    }

    /// Drops the image, as a crash would, and judges every crash on the way and every read. Returns the number of crash
    /// points, and what the disk may have held at each of them.
    pub fn judge(self: Arc<Self>) -> std::result::Result<(usize, Registers), String> {
        let Some(guest) = Arc::into_inner(self) else { return Err("a thread still holds the image".into()) };
        drop(guest.image);
        let calls = guest.disk.calls();
        if let Some((start, end)) = guest.disk.collisions().first() {
            return Err(format!("two writes of {start}..{end} were under way together"));
        }
        let registers = Registers::new(&guest.base, &calls);
        let history = guest.history.into_inner().unwrap();
        let (moments, fault) = registers.judge(&calls, &history, &guest.shape.below_values());
        match fault {
            Some(fault) => Err(fault),
            None => Ok((moments, registers)),
        }
    }
}
