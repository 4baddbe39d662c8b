//! The NBD session over a disk in memory: what a request costs between the client's socket and the device and back, over
//! loopback TCP and over a Unix socket. `benches/README.md` says how to run it and how to read it.
//!
//! Before anything is timed, each kind of request writes the whole workload and reads it back.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench fails by panicking and says where it ran"
)]

mod client;
mod machine;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use blockyard_nbd::server::{Address, Listener};
use blockyard_nbd::{
    Budget, BudgetLimits, Buffer, Content, Context, Device, Durability, Error, ErrorKind, Export, Exports, Extent,
    Handle, Options, Server, Space,
};
use blockyard_qcow2::BufferPool;
use client::Client;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// The largest workload.
const DISK: usize = 64 * MIB;

/// A disk in memory, in parts with a lock each. No request of the workloads is in two of them.
struct Memory {
    parts: Vec<RwLock<Vec<u8>>>,
    /// Lends payload memory, as for images.
    pool: BufferPool,
}

impl Memory {
    const PART: usize = MIB;

    fn new() -> Self {
        let parts = (0..DISK / Self::PART).map(|_| RwLock::new(vec![0; Self::PART])).collect();
        Self { parts, pool: BufferPool::new(32 * MIB) }
    }

    /// The part that a request is in, and where in it.
    fn find(&self, offset: u64) -> (&RwLock<Vec<u8>>, usize) {
        let offset = offset as usize;
        (&self.parts[offset / Self::PART], offset % Self::PART)
    }
}

/// As little as a device can do: a copy under a lock that nobody waits for.
#[async_trait]
impl Device for Memory {
    fn buffer(&self, _offset: u64, length: usize) -> Buffer {
        Box::new(self.pool.lend(length))
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Content, Error> {
        let bytes = (*buffer).as_mut();
        let (part, start) = self.find(offset);
        bytes.copy_from_slice(&part.read().unwrap()[start..start + bytes.len()]);
        Ok(buffer.into())
    }

    async fn write(&self, offset: u64, buffer: Buffer, _durability: Durability) -> Result<(), Error> {
        let bytes = (*buffer).as_ref();
        let (part, start) = self.find(offset);
        part.write().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    async fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn zero(&self, _offset: u64, _length: u64, _space: Space, _durability: Durability) -> Result<(), Error> {
        Err(unmeasured())
    }

    async fn fast_zero(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    async fn trim(&self, _offset: u64, _length: u64, _durability: Durability) -> Result<(), Error> {
        Err(unmeasured())
    }

    async fn extents(&self, _context: Context, _offset: u64, _length: u64, _max: usize) -> Result<Vec<Extent>, Error> {
        Err(unmeasured())
    }
}

fn unmeasured() -> Error {
    Error::new(ErrorKind::NotSupported, "no workload asks for it")
}

/// The disk as an export without a name.
struct Disk(Arc<Memory>);

#[async_trait]
impl Export for Disk {
    fn name(&self) -> &str {
        ""
    }

    fn size(&self) -> u64 {
        DISK as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    async fn open(&self) -> Result<Arc<dyn Device>, Error> {
        Ok(self.0.clone())
    }
}

/// Serves the disk; must be called within a runtime.
fn serve(listener: impl Into<Listener>, memory: &Arc<Memory>) -> Handle {
    let exports = Exports::single(Arc::new(Disk(memory.clone()))).unwrap();
    Server::start(listener, exports, Options::new(Budget::new(&BudgetLimits::default()))).unwrap()
}

/// A stream of either kind.
trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

fn connect(server: &Handle) -> Client<Box<dyn Stream>> {
    let stream: Box<dyn Stream> = match server.address() {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_nodelay(true).unwrap();
            Box::new(stream)
        }
        Address::Unix(path) => Box::new(UnixStream::connect(path).unwrap()),
    };
    Client::enter(stream)
}

/// Requests of one size, one behind the other, no place twice.
struct Workload {
    name: &'static str,
    request: usize,
    offsets: Vec<u64>,
}

impl Workload {
    fn new(name: &'static str, request: usize, requests: usize) -> Self {
        assert!(request * requests <= DISK && Memory::PART.is_multiple_of(request), "{name} fits the disk");
        Self { name, request, offsets: (0..requests).map(|index| (index * request) as u64).collect() }
    }

    /// Noise that every request writes, in turn.
    fn payloads(&self, random: &mut fastrand::Rng) -> Vec<Vec<u8>> {
        let mut payload = || {
            let mut bytes = vec![0; self.request];
            random.fill(&mut bytes);
            bytes
        };
        (0..16).map(|_| payload()).collect()
    }

    /// Writes the workload, and fails unless all of it is read back.
    fn check(&self, client: &mut Client<impl Stream>, payloads: &[Vec<u8>], depth: usize) {
        client.write(&self.offsets, payloads, depth);
        client.flush();
        client.read(&self.offsets, self.request, depth, |offset, bytes| {
            let (index, within) = (offset as usize / self.request, offset as usize % self.request);
            let expected = &payloads[index % payloads.len()][within..within + bytes.len()];
            assert!(bytes == expected, "{}, depth {depth}: wrong bytes at {offset}", self.name);
        });
    }
}

fn measure(group: &mut BenchmarkGroup<'_, WallTime>, name: String, bytes: usize, mut run: impl FnMut()) {
    group.throughput(Throughput::Bytes(bytes as u64)).sampling_mode(SamplingMode::Flat);
    group.bench_function(name, |bencher| bencher.iter(&mut run));
}

fn session(criterion: &mut Criterion) {
    eprintln!("{}", machine::describe());
    let runtime = Runtime::new().unwrap();
    let folder = tempfile::tempdir_in(machine::FOLDER).unwrap();
    let memory = Arc::new(Memory::new());
    let servers = runtime.block_on(async {
        let tcp = serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), &memory);
        let unix = serve(UnixListener::bind(folder.path().join("socket")).unwrap(), &memory);
        [("TCP", tcp), ("Unix", unix)]
    });
    let workloads = [
        Workload::new("4 KiB", 4 * KIB, 2048),
        Workload::new("64 KiB", 64 * KIB, 512),
        Workload::new("1 MiB", MIB, 64),
    ];
    let mut random = fastrand::Rng::with_seed(1);
    for workload in &workloads {
        let bytes = workload.request * workload.offsets.len();
        for command in ["WRITE", "READ"] {
            let mut group = criterion.benchmark_group(format!("{command} {}", workload.name));
            for (transport, server) in &servers {
                for depth in [1, 16] {
                    let mut client = connect(server);
                    // Other noise each time: what the disk held before is wrong.
                    let payloads = workload.payloads(&mut random);
                    workload.check(&mut client, &payloads, depth);
                    measure(&mut group, format!("{transport}, depth {depth}"), bytes, || match command {
                        "WRITE" => client.write(&workload.offsets, &payloads, depth),
                        _ => client.read(&workload.offsets, workload.request, depth, |_, _| {}),
                    });
                }
            }
            group.finish();
        }
    }
    // Within the runtime, whose tasks the servers are.
    runtime.block_on(async { drop(servers) });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = session
}
criterion_main!(benches);
