//! Workloads of one thread on one image: the alphabet of steps, their recording, and the verdict on a crash state.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::fmt;
use std::io::IoSlice;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock, Mutex};

use blockyard_qcow2::storage::Storage;
use blockyard_qcow2::{
    Access, CompressionLevel, CreateOptions, Durability, Image, Layer, OpenOptions, ZeroMode, create_on,
};

use super::power_cut::{CrashState, crash_states};
use super::reader::{is_closed, read_disk};
use super::requests::Requests;
use super::sim_disk::{Clock, Content, SimDisk, now};
use super::support::{over, pattern, wordy};

pub const CACHE: usize = 1 << 20;
/// Bytes of every disk here: tables of 512-byte clusters map 32 KiB each, and the last cluster is partial.
pub const SIZE: usize = 72 * 1024 + 512;

const LATER: Durability = Durability::OnFlush;
const NOW: Durability = Durability::BeforeReply;

/// One step of a workload, with its name.
#[derive(Clone, Copy)]
pub struct Step(&'static str, fn(&mut Run));

impl fmt::Debug for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

impl Step {
    pub fn name(self) -> &'static str {
        self.0
    }
}

/// In units that make steps meet, and meet the borders of clusters and tables.
pub const ALPHABET: [Step; 13] = [
    Step("write a cluster", |run| run.write(512, 512, LATER)),
    Step("write a part", |run| run.write(700, 200, LATER)),
    Step("write across tables", |run| run.write(32 * 1024 - 700, 1500, LATER)),
    Step("write durably", |run| run.write(600, 600, NOW)),
    Step("write near the end", |run| run.write(run.model.len() - 6656, 2048, LATER)),
    Step("zero, keep", |run| run.zero(0, 1536, ZeroMode::Keep, LATER)),
    Step("zero, unmap", |run| run.zero(512, 1636, ZeroMode::Unmap, LATER)),
    Step("zero durably", |run| run.zero(300, 5000, ZeroMode::Unmap, NOW)),
    Step("discard", |run| run.discard(33 * 1024)),
    Step("write compressible clusters", Run::write_compressible),
    Step("grow", Run::grow),
    Step("flush", Run::flush),
    Step("close, open again", Run::reopen),
];

/// What the image starts from.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    pub cluster_size: u32,
    /// Bytes of the backing file; 0: none.
    pub below: usize,
    /// Whether it was written to and closed before.
    pub is_written: bool,
    /// Whether the file system reserves space; otherwise writes extend the file.
    pub can_reserve: bool,
}

/// For every short workload.
pub const STARTS: [Start; 5] = [
    Start { cluster_size: 512, below: 0, is_written: false, can_reserve: true },
    Start { cluster_size: 4096, below: 0, is_written: false, can_reserve: false },
    Start { cluster_size: 512, below: SIZE, is_written: false, can_reserve: true },
    Start { cluster_size: 512, below: 20_000, is_written: false, can_reserve: false },
    Start { cluster_size: 512, below: 0, is_written: true, can_reserve: true },
];

/// For random workloads, beside those.
pub const MORE_STARTS: [Start; 5] = [
    Start { cluster_size: 4096, below: SIZE, is_written: false, can_reserve: true },
    Start { cluster_size: 4096, below: 20_000, is_written: true, can_reserve: false },
    Start { cluster_size: 65_536, below: 0, is_written: false, can_reserve: true },
    Start { cluster_size: 65_536, below: SIZE, is_written: false, can_reserve: false },
    Start { cluster_size: 65_536, below: 20_000, is_written: true, can_reserve: true },
];

impl Start {
    /// The content of the backing file.
    pub fn below_bytes(self) -> Vec<u8> {
        pattern(77, self.below)
    }
}

/// What the disk does wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trouble {
    /// Syncs, counted from 0, that do nothing.
    pub ignored_sync: Option<u64>,
    /// The sync, counted from 0, that fails.
    pub failing_sync: Option<u64>,
}

/// The disk was asked to have this many bytes; it never becomes smaller.
struct Size {
    issued: u64,
    replied: u64,
    bytes: usize,
}

/// A workload being run and recorded.
pub struct Run {
    pub clock: Clock,
    pub disk: Arc<SimDisk>,
    base: Content,
    backing: Vec<u8>,
    layer: Option<Arc<SimDisk>>,
    image: Option<Image>,
    model: Vec<u8>,
    requests: Requests,
    /// Issue and reply of each close.
    closes: Vec<(u64, u64)>,
    sizes: Vec<Size>,
    seed: u64,
}

/// Crash states that were opened, repaired and read already, whatever workload left them: content, and backing file.
static REPAIRED: LazyLock<[Mutex<HashSet<u64>>; 16]> = LazyLock::new(Default::default);

impl Run {
    pub fn new(start: Start, trouble: Trouble) -> Self {
        let clock: Clock = Arc::new(AtomicU64::new(0));
        let backing = start.below_bytes();
        let plain = if start.below > 0 { over("below.qcow2", SIZE as u64) } else { CreateOptions::new(SIZE as u64) };
        let setup = Arc::new(SimDisk::new(clock.clone(), Content::default()));
        create_on(&*setup, &CreateOptions { cluster_size: start.cluster_size, ..plain }).unwrap();
        let layer = (!backing.is_empty()).then(|| {
            let raw = SimDisk::new(clock.clone(), Content::default());
            raw.write(0, &mut [IoSlice::new(&backing)]).unwrap();
            Arc::new(raw)
        });
        let mut model = backing.clone();
        model.resize(SIZE, 0);
        let mut run = Self {
            disk: setup.clone(),
            clock: clock.clone(),
            base: Content::default(),
            backing,
            layer,
            image: None,
            model,
            requests: Requests::new(Vec::new()),
            closes: Vec::new(),
            sizes: vec![Size { issued: 0, replied: 0, bytes: SIZE }],
            seed: 0,
        };
        if start.is_written {
            let image = run.open();
            let data = pattern(78, 40_000);
            image.write(300, &data, LATER).unwrap();
            run.model[300..40_300].copy_from_slice(&data);
            image.close().unwrap();
        }
        run.base = setup.content();
        let mut disk = SimDisk::new(clock, run.base.clone());
        disk.ignored_syncs.extend(trouble.ignored_sync);
        disk.failing_sync = trouble.failing_sync;
        disk.can_reserve = start.can_reserve;
        run.disk = Arc::new(disk);
        run.requests = Requests::new(run.model.clone());
        run.image = Some(run.open());
        run
    }

    fn below(&self) -> Option<Layer> {
        let layer = self.layer.clone()?;
        Some(Layer::Raw { storage: layer, size: self.backing.len() as u64 })
    }

    pub fn open(&self) -> Image {
        self.open_on(self.disk.clone()).unwrap()
    }

    fn open_on(&self, disk: Arc<SimDisk>) -> blockyard_qcow2::Result<Image> {
        // Without effect on bytes that do not become smaller, as most here.
        let compress = Some(CompressionLevel::Fast);
        let options = OpenOptions { cache_bytes: CACHE, compress, ..OpenOptions::new(Access::ReadWrite) };
        Image::open_on_with(disk, self.below(), &options)
    }

    /// Drops the image without closing it.
    pub fn forget_image(&mut self) {
        self.image = None;
    }

    /// Takes a step, unless the image is gone: its close failed.
    pub fn step(&mut self, step: Step) {
        self.seed += 1;
        if self.image.is_some() {
            (step.1)(self);
        }
    }

    pub fn steps(&mut self, steps: &[Step]) {
        steps.iter().for_each(|step| self.step(*step));
    }

    fn flush(&mut self) {
        let issued = now(&self.clock);
        if self.ask(Image::flush) {
            self.requests.flushed(issued, now(&self.clock));
        }
    }

    fn reopen(&mut self) {
        let issued = now(&self.clock);
        if self.ask(Image::close) {
            let replied = now(&self.clock);
            self.requests.flushed(issued, replied);
            self.closes.push((issued, replied));
            self.image = Some(self.open());
        } else {
            self.image = None;
        }
    }

    fn grow(&mut self) {
        let bytes = self.model.len() + 25 * 1024;
        let issued = now(&self.clock);
        let done = self.ask(|image| image.grow(bytes as u64));
        let replied = if done { now(&self.clock) } else { u64::MAX };
        if done {
            // What was written before is durable then.
            self.requests.flushed(issued, replied);
        }
        self.model.resize(bytes, 0);
        self.sizes.push(Size { issued, replied, bytes });
    }

    fn write_compressible(&mut self) {
        let cluster = self.image.as_ref().unwrap().cluster_size() as usize;
        let (offset, length) = (8192 / cluster * cluster, cluster.max(8192));
        self.write_bytes(offset, &wordy(self.seed, length), LATER);
    }

    fn write(&mut self, offset: usize, length: usize, durability: Durability) {
        self.write_bytes(offset, &pattern(self.seed, length), durability);
    }

    fn write_bytes(&mut self, offset: usize, data: &[u8], durability: Durability) {
        self.model[offset..offset + data.len()].copy_from_slice(data);
        self.record(offset, data.len(), durability, |image| image.write(offset as u64, data, durability));
    }

    fn zero(&mut self, offset: usize, length: usize, mode: ZeroMode, durability: Durability) {
        self.model[offset..offset + length].fill(0);
        self.record(offset, length, durability, |image| image.zero(offset as u64, length as u64, mode, durability));
    }

    /// Discards from the start of the disk on; what is promised concerns whole clusters.
    fn discard(&mut self, length: usize) {
        let cluster = self.image.as_ref().unwrap().cluster_size() as usize;
        let end = length / cluster * cluster;
        self.model[..end].fill(0);
        self.record(0, end, LATER, |image| image.discard(0, length as u64, LATER));
    }

    /// Runs an operation; whether it succeeded. It must fail if and only if a sync has failed: then and ever after.
    fn ask(&self, operation: impl FnOnce(&Image) -> blockyard_qcow2::Result<()>) -> bool {
        let result = operation(self.image.as_ref().unwrap());
        assert_eq!(result.is_err(), self.disk.has_failed(), "after a failed sync nothing is answered: {result:?}");
        result.is_ok()
    }

    fn record(
        &mut self,
        offset: usize,
        length: usize,
        durability: Durability,
        operation: impl FnOnce(&Image) -> blockyard_qcow2::Result<()>,
    ) {
        let issued = now(&self.clock);
        let replied = if self.ask(operation) { now(&self.clock) } else { u64::MAX };
        let durable = durability == Durability::BeforeReply;
        self.requests.changed((issued, replied), &self.model, offset, length, durable);
    }

    /// Whether the image must be whole at that time: it was closed, and nothing was asked of it since.
    fn must_be_closed(&self, time: u64) -> bool {
        let close = self.closes.iter().rfind(|(_, replied)| *replied < time);
        let asked: Vec<u64> = self.requests.changes_issued().chain(self.sizes.iter().map(|size| size.issued)).collect();
        close.is_some_and(|(closing, _)| !asked.iter().any(|issued| (*closing..time).contains(issued)))
    }

    /// The disk's bytes in a crash state, by the reader that is not the engine.
    pub fn read(&self, content: &Content) -> Result<Vec<u8>, String> {
        read_disk(content, &self.backing)
    }

    /// The first thing that is wrong with a crash state.
    fn fault(&self, state: &CrashState) -> Option<String> {
        let found = match self.read(&state.content) {
            Ok(found) => found,
            Err(rule) => return Some(rule),
        };
        let had = self.sizes.iter().rfind(|size| size.replied <= state.earliest).map_or(SIZE, |size| size.bytes);
        if !self.sizes.iter().any(|size| size.bytes == found.len() && size.issued <= state.latest) || found.len() < had
        {
            return Some(format!("the disk has {} bytes", found.len()));
        }
        if let Some(fault) = self.requests.illegal_sector(&found, state) {
            return Some(fault);
        }
        if !is_closed(&state.content) && self.must_be_closed(state.latest) {
            return Some("was closed, and is dirty again".into());
        }
        let digest = state.content.digest() ^ self.backing.len() as u64;
        let is_new = REPAIRED[digest as usize % 16].lock().unwrap().insert(digest);
        if is_new { self.fault_of_repair(&state.content, &found) } else { None }
    }

    /// The engine itself: check agrees, and opening, closing and reading again changes nothing.
    fn fault_of_repair(&self, content: &Content, found: &[u8]) -> Option<String> {
        let disk = Arc::new(SimDisk::new(self.clock.clone(), content.clone()));
        let closed = is_closed(content);
        let opened = match self.open_on(disk.clone()) {
            Ok(image) => image,
            Err(error) => return Some(format!("cannot be opened: {error}")),
        };
        if closed && opened.check().unwrap().errors > 0 {
            return Some("is marked as closed, but its refcounts are too low".into());
        }
        if let Err(error) = opened.close() {
            return Some(format!("cannot be closed: {error}"));
        }
        let report = opened.check().unwrap();
        if report.errors > 0 || report.dirty || (report.leaks > 0 && !closed) {
            return Some(format!("is not clean after the repair: {report:?}"));
        }
        match self.read(&disk.content()) {
            Ok(after) if after == found => None,
            Ok(_) => Some("the repair changed the content".into()),
            Err(rule) => Some(format!("after the repair: {rule}")),
        }
    }

    /// Visits every crash state of the recording.
    pub fn states(&self, visit: impl FnMut(CrashState)) {
        crash_states(&self.base, &self.disk.calls(), now(&self.clock), self.seed, visit);
    }

    /// Judges every crash state; returns how many there were, and the first fault.
    pub fn judge(&self) -> (usize, Option<String>) {
        let (mut states, mut fault) = (0, None);
        if let Some((start, end)) = self.disk.collisions().first() {
            fault = Some(format!("two writes of {start}..{end} were under way together"));
        }
        let mut seen = HashSet::new();
        self.states(|state| {
            states += 1;
            if fault.is_none() && seen.insert((state.content.digest(), state.earliest, state.latest)) {
                fault = self.fault(&state);
            }
        });
        (states, fault)
    }
}
