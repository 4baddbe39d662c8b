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
use super::requests::Requests;
use super::sim_disk::{Clock, Content, SimDisk, now};

const SECTOR: usize = 512;
/// What common disks write at once.
const BLOCK: u64 = 4096;

pub struct Recorder {
    clock: Clock,
    pub disk: Arc<SimDisk>,
    base: Content,
    backing: Vec<u8>,
    options: OpenOptions,
    image: Option<Image>,
    pub model: Vec<u8>,
    requests: Requests,
    pub seed: u64,
}

/// A new image on a simulated disk.
pub fn blank(clock: &Clock, create: &CreateOptions) -> Content {
    let disk = SimDisk::new(clock.clone(), Content::default());
    create_on(&disk, create).unwrap();
    disk.content()
}

impl Recorder {
    /// `base`: the image before the first request, closed, which reads as `initial` over the `backing` bytes.
    pub fn new(clock: Clock, base: Content, backing: Vec<u8>, initial: Vec<u8>, options: OpenOptions) -> Self {
        let disk = Arc::new(SimDisk::new(clock.clone(), base.clone()));
        let (model, requests) = (initial.clone(), Requests::new(initial));
        let mut recorder = Self { clock, disk, base, backing, options, image: None, model, requests, seed: 0 };
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
        self.requests.flushed(issued, now(&self.clock));
    }

    pub fn reopen(&mut self) {
        let issued = now(&self.clock);
        self.image().close().unwrap();
        self.requests.flushed(issued, now(&self.clock));
        self.image = Some(self.open(self.disk.clone()));
    }

    fn answered(&mut self, issued: u64, offset: usize, length: usize, durability: Durability) {
        let durable = durability == Durability::BeforeReply;
        self.requests.changed((issued, now(&self.clock)), &self.model, offset, length, durable);
    }

    /// The first thing that is wrong with a crash state.
    fn fault(&self, state: &CrashState) -> Option<String> {
        let found = match read_disk(&state.content, &self.backing) {
            Ok(found) => found,
            Err(rule) => return Some(rule),
        };
        if let Some(fault) = self.requests.illegal_sector(&found, state) {
            return Some(fault);
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
