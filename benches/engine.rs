//! The write path of the qcow2 engine beside the two other engines in Rust: how long a workload takes until it is on stable
//! storage. `benches/README.md` says how to run it and how to read it.
//!
//! Each engine writes a fresh image per measurement; creating, opening and closing it are not timed. Before anything is
//! timed, each does the workload once and QEMU reads the result: an engine that left wrong bytes is printed as WRONG, and
//! not timed.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench fails by panicking and tells what it left out"
)]

mod machine;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use blockyard_qcow2::{
    Access, Backing, BackingFormat, CompressionLevel, CreateOptions, Durability, Image, OpenOptions, ZeroMode,
};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::utils::qcow2_setup_dev_sync;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Zero,
    Compressed,
}

/// Requests of one size on a fresh image.
struct Workload {
    name: &'static str,
    kind: Kind,
    /// Virtual size in bytes; a backing file has the same and is full.
    size: u64,
    over_backing: bool,
    request: usize,
    offsets: Vec<u64>,
    /// Requests from one flush to the next; the last thing is always a flush.
    flush_every: usize,
}

impl Workload {
    fn sequential(name: &'static str, kind: Kind, request: u64, bytes: u64) -> Self {
        let offsets: Vec<u64> = (0..bytes / request).map(|index| index * request).collect();
        let flush_every = offsets.len();
        Self { name, kind, size: bytes, over_backing: false, request: request as usize, offsets, flush_every }
    }

    /// No place twice.
    fn random(name: &'static str, request: u64, requests: usize, size: u64) -> Self {
        let mut offsets: Vec<u64> = (0..size / request).map(|index| index * request).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut offsets);
        offsets.truncate(requests);
        Self { offsets, flush_every: requests, ..Self::sequential(name, Kind::Write, request, size) }
    }

    /// Writes of 64 KiB, one behind the other, with a flush after so many.
    fn flushed(name: &'static str, flush_every: usize) -> Self {
        Self { flush_every, ..Self::sequential(name, Kind::Write, 64 * KIB, 32 * MIB) }
    }

    fn over_backing(self) -> Self {
        Self { over_backing: true, ..self }
    }

    fn bytes(&self) -> u64 {
        self.request as u64 * self.offsets.len() as u64
    }

    /// What every request writes, in turn: noise, or something that compresses to about a half.
    fn payloads(&self) -> Vec<Vec<u8>> {
        let mut random = fastrand::Rng::with_seed(2);
        let mut payload = || {
            let mut bytes = vec![0; self.request];
            random.fill(&mut bytes);
            if self.kind == Kind::Compressed {
                bytes.chunks_mut(64).for_each(|chunk| chunk[..34].fill(b' '));
            }
            bytes
        };
        (0..16).map(|_| payload()).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Engine {
    Blockyard,
    Qcow2Rs,
    Imago,
}

impl Engine {
    /// Those that have the operation at all.
    fn able(kind: Kind) -> &'static [Self] {
        match kind {
            Kind::Write => &[Self::Blockyard, Self::Qcow2Rs, Self::Imago],
            Kind::Zero => &[Self::Blockyard, Self::Imago],
            Kind::Compressed => &[Self::Blockyard],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Blockyard => "blockyard",
            Self::Qcow2Rs => "qcow2-rs",
            Self::Imago => "imago",
        }
    }

    /// Does the workload on the image; the time from the first request until all of it is on stable storage.
    fn run(self, path: &Path, workload: &Workload, payloads: &[Vec<u8>]) -> Duration {
        let requests: Vec<(u64, &Vec<u8>)> = workload.offsets.iter().copied().zip(payloads.iter().cycle()).collect();
        let batches = || requests.chunks(workload.flush_every);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        match self {
            Self::Blockyard => {
                let compress = (workload.kind == Kind::Compressed).then_some(CompressionLevel::Fast);
                let image =
                    Image::open(path, &OpenOptions { compress, ..OpenOptions::new(Access::ReadWrite) }).unwrap();
                let start = Instant::now();
                for batch in batches() {
                    for (offset, payload) in batch {
                        if workload.kind == Kind::Zero {
                            let length = payload.len() as u64;
                            image.zero(*offset, length, ZeroMode::Unmap, Durability::OnFlush).unwrap();
                        } else {
                            image.write(*offset, payload, Durability::OnFlush).unwrap();
                        }
                    }
                    image.flush().unwrap();
                }
                let taken = start.elapsed();
                image.close().unwrap();
                taken
            }
            Self::Qcow2Rs => runtime.block_on(async {
                let parameters = Qcow2DevParams::new(9, None, None, false, false);
                let device = qcow2_setup_dev_sync(path, &parameters).unwrap();
                device.qcow2_prep_io().await.unwrap();
                let start = Instant::now();
                for batch in batches() {
                    for (offset, payload) in batch {
                        device.write_at(payload, *offset).await.unwrap();
                    }
                    device.flush_meta().await.unwrap();
                    device.fsync_range(0, usize::MAX).await.unwrap();
                }
                start.elapsed()
            }),
            Self::Imago => runtime.block_on(async {
                let image = Qcow2::<imago::file::File>::builder_path(path).write(true);
                let image = FormatAccess::new(image.open(PermissiveImplicitOpenGate::default()).await.unwrap());
                let start = Instant::now();
                for batch in batches() {
                    for (offset, payload) in batch {
                        if workload.kind == Kind::Zero {
                            image.write_zeroes(*offset, payload.len() as u64).await.unwrap();
                        } else {
                            image.write(&payload[..], *offset).await.unwrap();
                        }
                    }
                    image.flush().await.unwrap();
                    image.sync().await.unwrap();
                }
                start.elapsed()
            }),
        }
    }
}

/// A folder with what the images of a workload need: the backing file, and the bytes that they must read as afterwards.
struct Bench<'a> {
    folder: tempfile::TempDir,
    workload: &'a Workload,
    payloads: Vec<Vec<u8>>,
}

impl<'a> Bench<'a> {
    fn new(workload: &'a Workload) -> Self {
        let folder = tempfile::tempdir_in(machine::FOLDER).unwrap();
        let bench = Self { folder, workload, payloads: workload.payloads() };
        let expected = File::create(bench.folder.path().join("expected.raw")).unwrap();
        expected.set_len(workload.size).unwrap();
        if workload.over_backing {
            let below = bench.folder.path().join("below.qcow2");
            blockyard_qcow2::create(&below, &CreateOptions::new(workload.size)).unwrap();
            let image = Image::open(&below, &OpenOptions::new(Access::ReadWrite)).unwrap();
            let mut noise = vec![0; MIB as usize];
            for offset in (0..workload.size).step_by(noise.len()) {
                fastrand::Rng::with_seed(offset).fill(&mut noise);
                image.write(offset, &noise, Durability::OnFlush).unwrap();
                expected.write_all_at(&noise, offset).unwrap();
            }
            image.close().unwrap();
        }
        let zeroes = vec![0; workload.request];
        for (offset, payload) in workload.offsets.iter().zip(bench.payloads.iter().cycle()) {
            let bytes = if workload.kind == Kind::Zero { &zeroes } else { payload };
            expected.write_all_at(bytes, *offset).unwrap();
        }
        bench
    }

    /// One run on a fresh image, which is still there afterwards.
    fn measure(&self, engine: Engine) -> Duration {
        let path = self.folder.path().join("image.qcow2");
        if path.exists() {
            std::fs::remove_file(&path).unwrap();
        }
        let below = || Backing { name: "below.qcow2".into(), format: BackingFormat::Qcow2 };
        let backing = self.workload.over_backing.then(below);
        blockyard_qcow2::create(&path, &CreateOptions { backing, ..CreateOptions::new(self.workload.size) }).unwrap();
        // One of the engines looks the names of backing files up in the working directory.
        std::env::set_current_dir(self.folder.path()).unwrap();
        engine.run(&path, self.workload, &self.payloads)
    }

    /// Whether the engine leaves the right bytes, by QEMU's judgement.
    fn is_right(&self, engine: Engine) -> bool {
        let ended = catch_unwind(AssertUnwindSafe(|| self.measure(engine)));
        let compare = ["compare", "-q", "-f", "raw", "-F", "qcow2", "expected.raw", "image.qcow2"];
        let judged = Command::new("qemu-img").args(compare).current_dir(self.folder.path()).status();
        ended.is_ok() && judged.unwrap().success()
    }
}

fn engines(criterion: &mut Criterion) {
    eprintln!("{}", machine::describe());
    let workloads = [
        Workload::sequential("sequential 64 KiB", Kind::Write, 64 * KIB, 64 * MIB),
        Workload::sequential("sequential 1 MiB", Kind::Write, MIB, 128 * MIB),
        Workload::random("random 4 KiB, fresh", 4 * KIB, 2048, 512 * MIB),
        Workload::random("random 64 KiB, fresh", 64 * KIB, 512, 512 * MIB),
        Workload::random("random 4 KiB, over a full backing file", 4 * KIB, 512, 128 * MIB).over_backing(),
        Workload::random("random 64 KiB, over a full backing file", 64 * KIB, 512, 128 * MIB).over_backing(),
        Workload::sequential("zeroes 1 MiB, over a full backing file", Kind::Zero, MIB, 128 * MIB).over_backing(),
        Workload::sequential("compressed 1 MiB", Kind::Compressed, MIB, 64 * MIB),
        Workload::flushed("64 KiB, flush after every write", 1),
        Workload::flushed("64 KiB, flush after every 16 writes", 16),
        Workload::flushed("64 KiB, flush after every 256 writes", 256),
    ];
    for workload in &workloads {
        let bench = Bench::new(workload);
        let mut group = criterion.benchmark_group(workload.name);
        group.throughput(Throughput::Bytes(workload.bytes())).sampling_mode(SamplingMode::Flat);
        for engine in Engine::able(workload.kind) {
            if !bench.is_right(*engine) {
                eprintln!("{}/{}: WRONG, not timed", workload.name, engine.name());
                continue;
            }
            group.bench_function(engine.name(), |bencher| {
                bencher.iter_custom(|rounds| (0..rounds).map(|_| bench.measure(*engine)).sum());
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(5));
    targets = engines
}
criterion_main!(benches);
