//! Clients that others wrote against our server, and our client against servers that others wrote.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod our_client;
#[path = "../common/programs.rs"]
mod programs;
mod qemu_cases;
mod recorder;
mod tls;

use std::sync::Arc;

use blockyard_nbd::server::Listener;
use blockyard_nbd::{Exports, Handle, Server};
use clients::{Client, NAME, SIZE, Target};
use common::devices::{Disk, Mem};
use common::servers::options;
use programs::Folder;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;

/// Our server with an empty disk in memory.
struct Served {
    mem: Arc<Mem>,
    target: Target,
    handle: Handle,
    // Fields are dropped in this order: the runtime outlives what runs on it.
    runtime: Runtime,
}

#[derive(Clone, Copy)]
enum Transport {
    Ipv4,
    Ipv6,
    Unix,
}

impl Served {
    fn new(transport: Transport, name: &str, size: u64) -> Self {
        let runtime = Runtime::new().unwrap();
        let (mem, folder) = (Mem::new(size), Folder::new());
        let handle = runtime.block_on(async {
            let listener: Listener = match transport {
                Transport::Ipv4 => TcpListener::bind("127.0.0.1:0").await.unwrap().into(),
                Transport::Ipv6 => TcpListener::bind("[::1]:0").await.unwrap().into(),
                Transport::Unix => UnixListener::bind(folder.file("socket")).unwrap().into(),
            };
            start(listener, name, &mem)
        });
        let target = Target::new(handle.uris().remove(0), folder);
        Self { mem, target, handle, runtime }
    }
}

fn start(listener: Listener, name: &str, mem: &Arc<Mem>) -> Handle {
    let exports = Exports::single(Arc::new(Disk::new(name, mem.size, mem.clone()))).unwrap();
    Server::start(listener, exports, options()).unwrap()
}

/// Lets a client at an empty disk over each transport. What it left there must be what is read back.
fn over_every_transport(client: Client) {
    for transport in [Transport::Ipv4, Transport::Ipv6, Transport::Unix] {
        let served = Served::new(transport, NAME, SIZE);
        client(&served.target);
        let content = std::fs::read(served.target.download()).unwrap();
        assert!(content == served.mem.content(), "{}: the disk holds something else", served.target.uri);
    }
}

clients::a_test_for_each_client!(over_every_transport);
