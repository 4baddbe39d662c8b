//! Servers on loopback and on Unix sockets, and clients for them.

use std::sync::Arc;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::client::{Client, Negotiation, Uri};
use blockyard_nbd::server::Address;
use blockyard_nbd::stats::ExportStats;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{InfoRequest, MetaRequest, OptionCode, ReplyType, WantedInfo};
use blockyard_nbd::{Budget, BudgetLimits, Device, Export, Exports, Handle, Options, Server};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::{TcpListener, TcpStream};

use super::devices::Disk;

/// The name of the only export of most tests.
pub const NAME: &str = "disk0";

pub fn options() -> Options {
    Options::new(Budget::new(&BudgetLimits::default()))
}

/// All forms of headers and replies.
pub const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// Greets and enters the export; unless replies are simple also `base:allocation`.
pub async fn enter<S: AsyncRead + AsyncWrite + Unpin>(raw: &mut Raw<S>, mode: Mode) {
    raw.greet(3).await.unwrap();
    let option = match mode {
        Mode::Simple => None,
        Mode::Structured => Some(OptionCode::STRUCTURED_REPLY),
        Mode::Extended => Some(OptionCode::EXTENDED_HEADERS),
    };
    if let Some(option) = option {
        settle(raw, option, b"").await;
        settle(raw, OptionCode::SET_META_CONTEXT, &MetaRequest::encode(NAME, &["base:allocation"])).await;
    }
    settle(raw, OptionCode::GO, &InfoRequest { name: NAME, wanted: WantedInfo::default() }.encode()).await;
}

/// Sends an option and reads its replies up to the ACK.
async fn settle<S: AsyncRead + AsyncWrite + Unpin>(raw: &mut Raw<S>, code: OptionCode, data: &[u8]) {
    raw.option(code, data).await.unwrap();
    loop {
        let (header, _) = super::soon("the handshake", raw.option_reply()).await.unwrap();
        assert!(header.code == code && !header.reply.is_error(), "{header:?}");
        if header.reply == ReplyType::ACK {
            return;
        }
    }
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

    /// A client with this form of headers and replies, and every context that goes with it.
    pub async fn client_in(&self, mode: Mode) -> Client {
        let mut negotiation = self.negotiation().await;
        match mode {
            Mode::Simple => {}
            Mode::Structured => negotiation.structured_replies().await.unwrap(),
            Mode::Extended => negotiation.extended_headers().await.unwrap(),
        }
        if mode != Mode::Simple {
            let contexts = ["base:allocation", "qemu:allocation-depth"];
            negotiation.set_meta_contexts(NAME, &contexts).await.unwrap();
        }
        negotiation.go(NAME).await.unwrap()
    }

    pub async fn negotiation(&self) -> Negotiation {
        super::soon("a greeting", Negotiation::connect(&self.uri().transport)).await.unwrap()
    }

    pub async fn stream(&self) -> TcpStream {
        let Address::Tcp(address) = self.handle.address() else { panic!("not TCP") };
        TcpStream::connect(address).await.unwrap()
    }

    /// A pipe into the server that holds so many bytes in each direction.
    pub fn pipe(&self, capacity: usize) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(capacity);
        self.handle.serve(theirs);
        ours
    }

    /// A connection in the transmission phase whose bytes the test writes itself.
    pub async fn raw(&self, mode: Mode, capacity: usize) -> Raw<DuplexStream> {
        let mut raw = Raw(self.pipe(capacity));
        enter(&mut raw, mode).await;
        raw
    }

    /// The same over a socket.
    pub async fn raw_socket(&self, mode: Mode) -> Raw<TcpStream> {
        let mut raw = Raw(self.stream().await);
        enter(&mut raw, mode).await;
        raw
    }

    /// Waits until so many connections are in the transmission phase.
    pub async fn connections(&self, count: usize) {
        let mut connections = self.stats.connections();
        super::soon("the number of connections", connections.wait_for(|now| *now == count)).await.unwrap();
    }
}
