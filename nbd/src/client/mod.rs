//! An NBD client: [`Negotiation`] for the handshake, [`Client`] for requests, [`raw`] for tests that send any bytes.
//!
//! It keeps many requests in flight over one connection and believes nothing: what a server sends is checked against what
//! was asked, and the first broken rule ends the connection.

mod collect;
mod error;
mod negotiation;
pub mod raw;
mod transport;
mod uri;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

pub use self::collect::ContextExtents;
use self::collect::{Collector, Outcome, Wanted};
pub use self::error::ClientError;
pub use self::negotiation::{ExportDetails, ListedExport, MetaContext, Negotiation};
use self::transport::{Outgoing, Pending, Waiting};
pub use self::uri::{Transport, Uri, UriError, UriTls};
use crate::tls::ClientTls;
use crate::transmission::Mode;
use crate::wire::request::{Request, StatusFilter};
use crate::wire::{Command, CommandFlags, MAX_PAYLOAD, TransmissionFlags};
use crate::{Durability, Extent, ZeroFlags};

/// Requests in flight over one connection; more wait their turn. Servers are free to take fewer.
const IN_FLIGHT: usize = 128;
/// The payload that any server takes when it named no limit, in bytes ("Size constraints").
const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;
/// How long a server may take to close after the goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

type Result<T, E = ClientError> = std::result::Result<T, E>;

/// A connection to an export. Clones share it; requests of all of them are in flight together.
///
/// Dropping the last clone closes the connection without a word; [`Client::disconnect`] says goodbye.
#[derive(Clone, Debug)]
pub struct Client(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    details: ExportDetails,
    mode: Mode,
    contexts: Vec<MetaContext>,
    cookie: AtomicU64,
    in_flight: Arc<Semaphore>,
    requests: mpsc::UnboundedSender<Outgoing>,
    pending: Arc<Pending>,
    /// Changes when the receiving task has ended.
    ended: watch::Receiver<()>,
    tasks: [AbortHandle; 2],
}

impl Drop for Shared {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pending")
    }
}

impl Client {
    /// Connects to the export of a URI with all that this client knows: extended headers or else structured replies, and
    /// `base:allocation`, as far as the server has them. A URI that asks for TLS gets it, from a server whose certificate is
    /// right, or an error.
    pub async fn connect(uri: &Uri) -> Result<Self> {
        let tls = match &uri.tls {
            Some(tls) => Some(ClientTls::load(tls.certificates.as_deref().ok_or(ClientError::NoCertificates)?)?),
            None => None,
        };
        let mut negotiation = Negotiation::connect(&uri.transport).await?;
        if let Some(tls) = &tls {
            negotiation = negotiation.start_tls(tls, uri.tls_hostname()).await?;
        }
        let agreed = had(negotiation.extended_headers().await)? || had(negotiation.structured_replies().await)?;
        if agreed {
            // A server without contexts is as good as one without this context.
            had(negotiation.set_meta_contexts(&uri.export, &["base:allocation"]).await)?;
        }
        negotiation.go(&uri.export).await
    }

    fn enter(
        reader: impl AsyncRead + Unpin + Send + 'static,
        writer: impl AsyncWrite + Unpin + Send + 'static,
        details: ExportDetails,
        mode: Mode,
        contexts: Vec<MetaContext>,
    ) -> Self {
        let (requests, outgoing) = mpsc::unbounded_channel();
        let pending = Arc::<Pending>::default();
        let (end, ended) = watch::channel(());
        let sending = tokio::spawn(transport::send(writer, outgoing, pending.clone()));
        let receiving = pending.clone();
        let receiving = tokio::spawn(async move {
            transport::receive(reader, receiving).await;
            drop(end);
        });
        let tasks = [sending.abort_handle(), receiving.abort_handle()];
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        let cookie = AtomicU64::new(1);
        Self(Arc::new(Shared { details, mode, contexts, cookie, in_flight, requests, pending, ended, tasks }))
    }

    /// What the server said of the export.
    pub fn details(&self) -> &ExportDetails {
        &self.0.details
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.0.details.info.size
    }

    /// The metadata contexts that [`Client::block_status`] tells of.
    pub fn contexts(&self) -> &[MetaContext] {
        &self.0.contexts
    }

    /// The largest payload of one request, in bytes, at most 64 MiB.
    pub fn max_payload(&self) -> u32 {
        self.0.details.block_sizes.map_or(DEFAULT_MAX_PAYLOAD, |sizes| sizes.maximum).min(MAX_PAYLOAD)
    }

    /// The form of headers and replies that was agreed.
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// The bytes of a range. `length` is at most [`Client::max_payload`] with simple replies, any with the others.
    pub async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>> {
        self.read_with(offset, length, CommandFlags(0)).await
    }

    /// The bytes of a range, asked for with these flags.
    pub async fn read_with(&self, offset: u64, length: u32, flags: CommandFlags) -> Result<Vec<u8>> {
        if self.0.mode == Mode::Simple && length > self.max_payload() {
            return Err(ClientError::Unsendable("the range is longer than the server's largest payload"));
        }
        let outcome = self.call(Command::READ, flags, offset, u64::from(length), Bytes::new(), Wanted::Content).await?;
        Ok(outcome.content)
    }

    /// Writes at most [`Client::max_payload`] bytes.
    ///
    /// # Durability
    /// With [`Durability::OnFlush`] the bytes are safe after the next [`Client::flush`] that succeeds.
    ///
    /// # Cancellation
    /// A request that was sent is done by the server whether anybody waits or not. So it is with all requests.
    pub async fn write(&self, offset: u64, data: impl Into<Bytes>, durability: Durability) -> Result<()> {
        let data = data.into();
        if data.len() > self.max_payload() as usize {
            return Err(ClientError::Unsendable("the data are longer than the server's largest payload"));
        }
        let length = data.len() as u64;
        self.call(Command::WRITE, fua(durability), offset, length, data, Wanted::Done).await.map(drop)
    }

    /// Makes a range read as zeroes. Here and below: `length` is below 2^32 unless extended headers were agreed.
    pub async fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, durability: Durability) -> Result<()> {
        let mut command_flags = fua(durability);
        if flags.no_hole {
            command_flags = command_flags.with(CommandFlags::NO_HOLE);
        }
        if flags.fast {
            command_flags = command_flags.with(CommandFlags::FAST_ZERO);
        }
        self.plain(Command::WRITE_ZEROES, command_flags, offset, length).await
    }

    /// Tells the server that a range is not needed any more.
    pub async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        self.plain(Command::TRIM, fua(durability), offset, length).await
    }

    /// Tells the server that a range will soon be read.
    pub async fn cache(&self, offset: u64, length: u64) -> Result<()> {
        self.plain(Command::CACHE, CommandFlags(0), offset, length).await
    }

    /// Makes durable what was answered before, on any connection to the export.
    pub async fn flush(&self) -> Result<()> {
        self.plain(Command::FLUSH, CommandFlags(0), 0, 0).await
    }

    /// The extents of each selected context, from `offset` on.
    pub async fn block_status(&self, offset: u64, length: u64) -> Result<Vec<ContextExtents>> {
        self.block_status_with(offset, length, CommandFlags(0)).await
    }

    /// The extents of each selected context, asked for with these flags.
    pub async fn block_status_with(
        &self,
        offset: u64,
        length: u64,
        flags: CommandFlags,
    ) -> Result<Vec<ContextExtents>> {
        let wanted = Wanted::Status { contexts: self.0.contexts.len() };
        let outcome = self.call(Command::BLOCK_STATUS, flags, offset, length, Bytes::new(), wanted).await?;
        Ok(outcome.status)
    }

    /// The extents of the contexts with these ids only; needs a server that advertises `BLOCK_STATUS_PAYLOAD`.
    pub async fn block_status_of(&self, offset: u64, length: u64, ids: &[u32]) -> Result<Vec<ContextExtents>> {
        if !self.details().info.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD) {
            return Err(ClientError::Unsendable("the server takes no list of contexts"));
        }
        let payload = StatusFilter::encode(length, ids).into();
        let wanted = Wanted::Status { contexts: ids.len() };
        let command = Command::BLOCK_STATUS;
        let outcome = self.call(command, CommandFlags::PAYLOAD_LEN, offset, length, payload, wanted).await?;
        Ok(outcome.status)
    }

    /// The extents of `base:allocation` from `offset` on, cut at the end of the request.
    pub async fn allocation(&self, offset: u64, length: u64) -> Result<Vec<Extent>> {
        let base = self.0.contexts.iter().find(|context| context.name == "base:allocation");
        let base = base.ok_or(ClientError::Unsendable("base:allocation was not negotiated"))?;
        let status = self.block_status(offset, length).await?;
        let status = status.into_iter().find(|status| status.context == base.id);
        let mut extents = status.ok_or(ClientError::Protocol("no status for base:allocation"))?.extents;
        let mut left = length;
        for extent in &mut extents {
            extent.length = extent.length.min(left);
            left -= extent.length;
        }
        Ok(extents)
    }

    /// Any request without payload.
    pub async fn plain(&self, command: Command, flags: CommandFlags, offset: u64, length: u64) -> Result<()> {
        self.call(command, flags, offset, length, Bytes::new(), Wanted::Done).await.map(drop)
    }

    /// Says goodbye once all requests under way are answered, and waits until the server has closed, at most 5 s.
    pub async fn disconnect(&self) -> Result<()> {
        let count = u32::try_from(IN_FLIGHT).unwrap_or(u32::MAX);
        let all = self.0.in_flight.acquire_many(count).await;
        let (command, flags, cookie) = (Command::DISC, CommandFlags(0), self.cookie());
        let goodbye = self.request(Request { flags, command, cookie, offset: 0, length: 0 }, Bytes::new())?;
        let _ = self.0.requests.send(goodbye);
        // Requests from now on fail: the connection is over for them as well.
        self.0.in_flight.close();
        drop(all);
        let mut ended = self.0.ended.clone();
        let _ = timeout(GOODBYE, ended.changed()).await;
        Ok(())
    }

    /// `length` is that of the payload if there is one, and of the effect otherwise.
    fn request(&self, request: Request, payload: Bytes) -> Result<Outgoing> {
        let has_payload = !payload.is_empty();
        let header = match self.0.mode {
            Mode::Extended => {
                let flags = if has_payload { request.flags.with(CommandFlags::PAYLOAD_LEN) } else { request.flags };
                let length = if has_payload { payload.len() as u64 } else { request.length };
                Request { flags, length, ..request }.encode_extended()
            }
            Mode::Simple | Mode::Structured => request.encode_compact().ok_or(ClientError::Unsendable(
                "the length needs more than 32 bits, and extended headers were not agreed",
            ))?,
        };
        Ok(Outgoing { header, payload })
    }

    fn cookie(&self) -> u64 {
        self.0.cookie.fetch_add(1, Relaxed)
    }

    async fn call(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: Bytes,
        wanted: Wanted,
    ) -> Result<Outcome> {
        let shared = &*self.0;
        let closed = || ClientError::Connection(Arc::new(std::io::ErrorKind::NotConnected.into()));
        let permit = shared.in_flight.clone().acquire_owned().await.map_err(|_| closed())?;
        let cookie = self.cookie();
        let outgoing = self.request(Request { flags, command, cookie, offset, length }, payload)?;
        let (done, result) = oneshot::channel();
        let collector = Collector::new(wanted, shared.mode, offset, length);
        shared.pending.insert(cookie, Waiting { collector, done, _permit: permit })?;
        shared.requests.send(outgoing).map_err(|_| closed())?;
        result.await.map_err(|_| closed())?
    }
}

/// Whether the server has what it was asked for; an error only if the connection is of no use any more.
fn had<T>(answer: Result<T>) -> Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(ClientError::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn fua(durability: Durability) -> CommandFlags {
    match durability {
        Durability::OnFlush => CommandFlags(0),
        Durability::BeforeReply => CommandFlags::FUA,
    }
}
