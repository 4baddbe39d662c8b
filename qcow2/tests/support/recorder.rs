//! A guest whose requests are recorded on a simulated disk, and the judge of what a power cut may leave of them.
//!
//! For workloads of tests of their own; `crash.rs` has the alphabet of the whole engine.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "part of the tests that include it; a test fails by panicking"
)]

use std::collections::HashSet;
use std::io::IoSlice;
use std::sync::Arc;

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{CreateOptions, Durability, Image, Layer, OpenOptions, ZeroMode, create_on};

use super::power_cut::{CrashState, crash_states};
use super::reader::{read_disk, read_disk_and_packed};
use super::sim_disk::{Clock, Content, SimDisk, now};

const SECTOR: usize = 512;
/// What common disks write at once.
const BLOCK: u64 = 4096;

/// What the guest did: when it was asked, when it was answered, and what its sectors read as afterwards.
struct Event {
    issued: u64,
    replied: u64,
    first_sector: usize,
    sectors: Vec<[u8; SECTOR]>,
    durable: bool,
}

pub struct Recorder {
    clock: Clock,
    pub disk: Arc<SimDisk>,
    base: Content,
    backing: Vec<u8>,
    options: OpenOptions,
    image: Option<Image>,
    initial: Vec<u8>,
    pub model: Vec<u8>,
    events: Vec<Event>,
    /// When each was issued and replied.
    flushes: Vec<(u64, u64)>,
    pub seed: u64,
}

/// A new image on a simulated disk, of compression type deflate or zstd.
pub fn blank(clock: &Clock, create: &CreateOptions, zstd: bool) -> Content {
    let disk = SimDisk::new(clock.clone(), Content::default());
    create_on(&disk, create).unwrap();
    if zstd {
        let mut features = [0; 8];
        disk.read(72, &mut features).unwrap();
        features[7] |= 1 << 3;
        disk.write(72, &mut [IoSlice::new(&features)]).unwrap();
        disk.write(104, &mut [IoSlice::new(&[1])]).unwrap();
    }
    disk.content()
}

impl Recorder {
    /// `base`: the image before the first request, closed, which reads as `initial` over the `backing` bytes.
    pub fn new(clock: Clock, base: Content, backing: Vec<u8>, initial: Vec<u8>, options: OpenOptions) -> Self {
        let disk = Arc::new(SimDisk::new(clock.clone(), base.clone()));
        let (events, flushes) = (Vec::new(), Vec::new());
        let model = initial.clone();
        let mut recorder =
            Self { clock, disk, base, backing, options, image: None, initial, model, events, flushes, seed: 0 };
        recorder.image = Some(recorder.open(recorder.disk.clone()));
        recorder
    }

    fn open(&self, disk: Arc<SimDisk>) -> Image {
        let below = (!self.backing.is_empty()).then(|| {
            let raw = SimDisk::new(self.clock.clone(), Content::default());
            raw.write(0, &mut [IoSlice::new(&self.backing)]).unwrap();
            Layer::Raw { storage: Arc::new(raw), size: self.backing.len() as u64 }
        });
        Image::open_on_with(disk, below, &self.options).unwrap()
    }

    pub fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    pub fn write(&mut self, offset: usize, data: &[u8], durability: Durability) {
        let issued = now(&self.clock);
        self.image().write(offset as u64, data, durability).unwrap();
        self.model[offset..offset + data.len()].copy_from_slice(data);
        self.answered(issued, offset, data.len(), durability);
    }

    /// Writes what is there already.
    pub fn write_again(&mut self, offset: usize, length: usize, durability: Durability) {
        let data = self.model[offset..offset + length].to_vec();
        self.write(offset, &data, durability);
    }

    pub fn zero(&mut self, offset: usize, length: usize, mode: ZeroMode, durability: Durability) {
        let issued = now(&self.clock);
        self.image().zero(offset as u64, length as u64, mode, durability).unwrap();
        self.model[offset..offset + length].fill(0);
        self.answered(issued, offset, length, durability);
    }

    pub fn flush(&mut self) {
        let issued = now(&self.clock);
        self.image().flush().unwrap();
        self.flushes.push((issued, now(&self.clock)));
    }

    pub fn reopen(&mut self) {
        let issued = now(&self.clock);
        self.image().close().unwrap();
        self.flushes.push((issued, now(&self.clock)));
        self.image = Some(self.open(self.disk.clone()));
    }

    fn answered(&mut self, issued: u64, offset: usize, length: usize, durability: Durability) {
        let (first_sector, end) = (offset / SECTOR, (offset + length).next_multiple_of(SECTOR));
        let sectors = self.model[first_sector * SECTOR..end].chunks(SECTOR);
        let sectors = sectors.map(|sector| sector.try_into().unwrap()).collect();
        let durable = durability == Durability::BeforeReply;
        self.events.push(Event { issued, replied: now(&self.clock), first_sector, sectors, durable });
    }

    /// Judges what a sector reads as after a crash at `time`.
    fn sector_is_legal(&self, sector: usize, value: &[u8], time: u64) -> bool {
        let covers = |event: &&Event| (event.first_sector..event.first_sector + event.sectors.len()).contains(&sector);
        let here = || self.events.iter().filter(covers);
        let is_durable = |event: &Event| {
            let flushed = |&(issued, replied): &(u64, u64)| issued > event.replied && replied < time;
            (event.durable && event.replied < time) || self.flushes.iter().any(flushed)
        };
        // The issue time of the newest durable change: whatever was replied before it is gone.
        let barrier = here().filter(|event| is_durable(event)).map(|event| event.issued).max();
        let initial = &self.initial[sector * SECTOR..(sector + 1) * SECTOR];
        let is_write = |event: &Event| event.sectors[sector - event.first_sector] == value;
        let in_time = |event: &Event| event.issued < time && barrier.is_none_or(|barrier| event.replied >= barrier);
        (barrier.is_none() && value == initial) || here().any(|event| in_time(event) && is_write(event))
    }

    /// The first thing that is wrong with a crash state.
    fn fault(&self, state: &CrashState) -> Option<String> {
        let found = match read_disk(&state.content, &self.backing) {
            Ok(found) => found,
            Err(rule) => return Some(rule),
        };
        for (sector, value) in found.chunks(SECTOR).enumerate() {
            for time in [state.earliest + 1, state.latest] {
                if !self.sector_is_legal(sector, value, time) {
                    return Some(format!("sector {sector} reads as something illegal at time {time}"));
                }
            }
        }
        // The engine repairs it by opening and closing, and nothing reads differently then.
        let disk = Arc::new(SimDisk::new(self.clock.clone(), state.content.clone()));
        let opened = self.open(disk.clone());
        opened.write(0, &found[..SECTOR], Durability::OnFlush).unwrap();
        opened.close().unwrap();
        let report = opened.check().unwrap();
        if report.errors > 0 || report.dirty {
            return Some(format!("is not clean after the repair: {report:?}"));
        }
        match read_disk(&disk.content(), &self.backing) {
            Ok(after) if after == found => None,
            Ok(_) => Some("the repair changed the content".into()),
            Err(rule) => Some(format!("after the repair: {rule}")),
        }
    }

    /// Judges every crash state; returns how many there were, and the first fault.
    pub fn judge(&self) -> (usize, Option<String>) {
        let (mut states, mut fault) = (0, None);
        let mut seen = HashSet::new();
        crash_states(&self.base, &self.disk.calls(), now(&self.clock), self.seed, |state| {
            states += 1;
            if fault.is_none() && seen.insert((state.content.digest(), state.earliest, state.latest)) {
                fault = self.fault(&state);
            }
        });
        (states, fault)
    }

    /// Looks for a write into a block (of 4 KiB) that holds compressed bytes which were durable then: what a torn write of
    /// a block would destroy. Returns how many ranges of compressed bytes it looked at.
    pub fn packed_bytes_at_risk(&self) -> Result<usize, String> {
        let calls = self.disk.calls();
        let mut looked_at = 0;
        for sync in calls.iter().filter(|call| call.change.is_none()) {
            let mut durable = self.base.clone();
            let covered = |ended: u64| ended < sync.started;
            calls.iter().filter(|call| covered(call.ended)).flat_map(|call| &call.change).for_each(|change| {
                durable.apply(change);
            });
            let (_, packed) = read_disk_and_packed(&durable, &self.backing)?;
            looked_at += packed.len();
            let blocks: HashSet<u64> =
                packed.iter().flat_map(|range| range.start / BLOCK..=(range.end - 1) / BLOCK).collect();
            for call in calls.iter().filter(|call| !covered(call.ended)) {
                if let Some(super::sim_disk::Change::Write { offset, bytes }) = &call.change {
                    let mut touched = offset / BLOCK..=(offset + bytes.len() as u64 - 1) / BLOCK;
                    if let Some(block) = touched.find(|block| blocks.contains(block)) {
                        return Err(format!(
                            "block {block} holds flushed bytes and is written at time {}",
                            call.started
                        ));
                    }
                }
            }
        }
        Ok(looked_at)
    }
}
