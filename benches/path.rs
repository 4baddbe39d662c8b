//! The whole path of a backup: a client, NBD over loopback TCP, the export, a qcow2 image in a real file; how long a workload
//! takes until the client's FLUSH is answered. `benches/README.md` says how to run it and how to read it.
//!
//! Client and server are one process. Before anything is timed, each workload is done once, read back over NBD and out of the
//! closed image, and the image is checked.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench fails by panicking and says where it ran"
)]

mod client;
mod machine;

use std::collections::HashMap;
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockyard::export::{Access, ImageExport, OpenOptions};
use blockyard_nbd::server::Address;
use blockyard_nbd::{Budget, BudgetLimits, Exports, Options, Server};
use blockyard_qcow2::{AsyncImage, CreateOptions, Durability, Image};
use client::Client;
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// Requests in flight.
const DEPTH: usize = 16;
/// Nothing is under way when a server is stopped here.
const DRAIN: Duration = Duration::from_secs(10);

/// What is in the image before the first request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    /// Nothing: it was just made.
    Empty,
    /// Every cluster has its place.
    Full,
}

/// WRITEs of one size.
struct Workload {
    name: &'static str,
    before: Before,
    /// Virtual size in bytes.
    size: u64,
    request: u64,
    offsets: Vec<u64>,
}

impl Workload {
    fn sequential(name: &'static str, request: u64, size: u64) -> Self {
        let offsets = (0..size / request).map(|index| index * request).collect();
        Self { name, before: Before::Empty, size, request, offsets }
    }

    /// No place twice.
    fn random(name: &'static str, before: Before, request: u64, requests: usize, size: u64) -> Self {
        let mut workload = Self { before, ..Self::sequential(name, request, size) };
        fastrand::Rng::with_seed(1).shuffle(&mut workload.offsets);
        workload.offsets.truncate(requests);
        workload
    }

    /// Noise that every request writes, in turn.
    fn payloads(&self) -> Vec<Vec<u8>> {
        let mut random = fastrand::Rng::with_seed(2);
        let mut payload = || {
            let mut bytes = vec![0; self.request as usize];
            random.fill(&mut bytes);
            bytes
        };
        (0..16).map(|_| payload()).collect()
    }
}

/// The image of a workload in a folder of its own.
struct Bench<'a> {
    runtime: &'a Runtime,
    workload: &'a Workload,
    payloads: Vec<Vec<u8>>,
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl<'a> Bench<'a> {
    fn new(runtime: &'a Runtime, workload: &'a Workload) -> Self {
        let folder = tempfile::tempdir_in(machine::FOLDER).unwrap();
        let path = folder.path().join("image.qcow2");
        let bench = Self { runtime, workload, payloads: workload.payloads(), _folder: folder, path };
        bench.create();
        if workload.before == Before::Full {
            let image = Image::open(&bench.path, &OpenOptions::new(Access::ReadWrite)).unwrap();
            let mut noise = vec![0; MIB as usize];
            for offset in (0..workload.size).step_by(noise.len()) {
                fastrand::Rng::with_seed(offset).fill(&mut noise);
                image.write(offset, &noise, Durability::OnFlush).unwrap();
            }
            image.close().unwrap();
        }
        bench
    }

    fn create(&self) {
        blockyard_qcow2::create(&self.path, &CreateOptions::new(self.workload.size)).unwrap();
    }

    /// One run; the time from the first request until FLUSH is answered. The client is there before, and is handed to
    /// `afterwards` before the image is closed.
    fn run(&self, afterwards: impl FnOnce(&mut Client<TcpStream>)) -> Duration {
        let export = self.runtime.block_on(async {
            let image = AsyncImage::open(self.path.clone(), OpenOptions::new(Access::ReadWrite)).await.unwrap();
            // As a backup job offers it, which wants to know what was covered.
            ImageExport::new("", image, Access::ReadWrite, Arc::default())
        });
        let server = self.runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let exports = Exports::single(Arc::new(export.clone())).unwrap();
            Server::start(listener, exports, Options::new(Budget::new(&BudgetLimits::default()))).unwrap()
        });
        let Address::Tcp(address) = server.address() else { panic!("not TCP") };
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut client = Client::enter(stream);

        let start = Instant::now();
        client.write(&self.workload.offsets, &self.payloads, DEPTH);
        client.flush();
        let taken = start.elapsed();

        afterwards(&mut client);
        drop(client);
        self.runtime.block_on(async {
            server.stop(DRAIN).await;
            export.image().close().await.unwrap();
        });
        taken
    }

    /// One run on an image as the workload wants it.
    fn measure(&self) -> Duration {
        // One that was full stays as it was in all that matters.
        if self.workload.before == Before::Empty {
            std::fs::remove_file(&self.path).unwrap();
            self.create();
        }
        self.run(|_| {})
    }

    /// Fails unless what was written is read over NBD, and out of the image when it is closed.
    fn check(&self) {
        let Workload { name, request, offsets, .. } = self.workload;
        let expected: HashMap<u64, &Vec<u8>> = offsets.iter().copied().zip(self.payloads.iter().cycle()).collect();
        self.run(|client| {
            client.read(offsets, *request as usize, DEPTH, |offset, bytes| {
                let within = (offset % request) as usize;
                let expected = &expected[&(offset - within as u64)][within..within + bytes.len()];
                assert!(bytes == expected, "{name}: wrong bytes at {offset} over NBD");
            });
        });
        assert!(blockyard_qcow2::check(&self.path).unwrap().is_clean(), "{name}: the image is not clean");
        let image = Image::open(&self.path, &OpenOptions::new(Access::ReadOnly)).unwrap();
        let mut bytes = vec![0; *request as usize];
        for (offset, payload) in &expected {
            image.read(*offset, &mut bytes).unwrap();
            assert!(bytes == **payload, "{name}: wrong bytes at {offset} in the image");
        }
    }
}

fn path(criterion: &mut Criterion) {
    eprintln!("{}", machine::describe());
    let runtime = Runtime::new().unwrap();
    let workloads = [
        Workload::sequential("sequential 256 KiB", 256 * KIB, 256 * MIB),
        Workload::random("random 4 KiB, fresh", Before::Empty, 4 * KIB, 2048, 512 * MIB),
        Workload::random("random 4 KiB, overwrite", Before::Full, 4 * KIB, 2048, 256 * MIB),
    ];
    let mut group = criterion.benchmark_group("path");
    for workload in &workloads {
        let bench = Bench::new(&runtime, workload);
        bench.check();
        let bytes = workload.request * workload.offsets.len() as u64;
        group.throughput(Throughput::Bytes(bytes)).sampling_mode(SamplingMode::Flat);
        group.bench_function(workload.name, |bencher| {
            bencher.iter_custom(|rounds| (0..rounds).map(|_| bench.measure()).sum());
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(5));
    targets = path
}
criterion_main!(benches);
