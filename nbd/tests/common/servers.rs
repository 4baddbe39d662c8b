//! Servers on loopback and on Unix sockets, and clients for them.

use std::sync::Arc;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::client::{Client, Negotiation, Uri};
use blockyard_nbd::server::Address;
use blockyard_nbd::stats::ExportStats;
use blockyard_nbd::{Budget, BudgetLimits, Device, Export, Exports, Handle, Options, Server};
use tokio::net::{TcpListener, TcpStream};

use super::devices::Disk;

/// The name of the only export of most tests.
pub const NAME: &str = "disk0";

pub fn options() -> Options {
    Options::new(Budget::new(&BudgetLimits::default()))
}

/// A server of one disk on loopback.
pub struct Served {
    pub handle: Handle,
    pub stats: Arc<ExportStats>,
}

impl Served {
    pub async fn disk(size: u64, device: Arc<dyn Device>) -> Self {
        Self::with(Disk::new(NAME, size, device), options()).await
    }

    pub async fn with(disk: Disk, options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let name = disk.name.clone();
        let export: Arc<dyn Export> = Arc::new(disk);
        let handle = Server::start(listener, Exports::single(export).unwrap(), options).unwrap();
        let stats = handle.stats(&name).unwrap();
        Self { handle, stats }
    }

    pub fn uri(&self) -> Uri {
        self.handle.uris()[0].parse().unwrap()
    }

    pub async fn client(&self) -> Client {
        super::soon("a connection", Client::connect(&self.uri())).await.unwrap()
    }

    pub async fn negotiation(&self) -> Negotiation {
        super::soon("a greeting", Negotiation::connect(&self.uri().transport)).await.unwrap()
    }

    pub async fn stream(&self) -> TcpStream {
        let Address::Tcp(address) = self.handle.address() else { panic!("not TCP") };
        TcpStream::connect(address).await.unwrap()
    }

    pub async fn raw(&self) -> Raw<TcpStream> {
        Raw(self.stream().await)
    }
}
