//! A qcow2 image as an NBD export: the one adapter that knows both engines.
//!
//! All connections of an export share one image. Each request passes the [`gate`], reaches the image, and is counted by
//! the [`meter`]; nothing here decides what a job does about it. The image is closed by its owner, never by a connection.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use blockyard_nbd as nbd;
use blockyard_qcow2::{self as qcow2, AsyncImage, ExtentKind, ZeroMode};
pub use blockyard_qcow2::{Access, Caching, OpenOptions};

pub mod busy;
pub mod coverage;
pub mod erased;
pub mod gate;
pub mod meter;
mod rate;
pub mod received;
pub mod signals;

use gate::{Gate, Pass};
use meter::{ConnectionCount, Failure, Meter};
use received::Pieces;
use signals::Signals;

/// `base:allocation`: the range takes no space.
const STATE_HOLE: u64 = 1;
/// `base:allocation`: the range reads as zeroes.
const STATE_ZERO: u64 = 2;

/// A backup client judges chunks of this length and more by samples, and sends zeroes where all samples are zero.
const SAMPLED_BYTES: u64 = 4 << 20;
/// Extents of one look at an older state of a disk. A guess: 32 MiB have 512 clusters of the default size.
const EXTENTS_AT_ONCE: usize = 512;

/// Requests up to this length are hashed by the task that serves them, which takes a third of a millisecond; longer ones would hold
/// others up, and wait for their own write besides.
const HASHED_IN_PLACE_MAX: usize = 1 << 20;

/// An image under a name. Cheap to clone; all clones are one export.
#[derive(Clone, Debug)]
pub struct ImageExport {
    name: Arc<str>,
    image: AsyncImage,
    read_only: bool,
    gate: Arc<Gate>,
    meter: Arc<Meter>,
    known: Option<AsyncImage>,
}

impl ImageExport {
    /// Offers `image` as `name`. `signals` hears of connections, first writes and failures.
    pub fn new(name: &str, image: AsyncImage, access: Access, signals: Arc<Signals>) -> Self {
        Self {
            name: name.into(),
            read_only: access == Access::ReadOnly,
            gate: Arc::default(),
            meter: Arc::new(Meter::new(image.size(), signals)),
            image,
            known: None,
        }
    }

    /// Counts large zero requests over what `known`, an older state of the same disk, has data for.
    #[must_use]
    pub fn comparing_zeroes(self, known: Option<AsyncImage>) -> Self {
        Self { known, ..self }
    }

    /// The same with nobody asking what was covered.
    pub fn without_coverage(name: &str, image: AsyncImage, access: Access, signals: Arc<Signals>) -> Self {
        let meter = Arc::new(Meter::without_coverage(Arc::clone(&signals)));
        Self { meter, ..Self::new(name, image, access, signals) }
    }

    /// Opens the image at `path` and offers it as `name`, with nobody listening to its signals or asking what was covered.
    pub async fn open(name: &str, path: PathBuf, options: OpenOptions) -> Result<Self, qcow2::Error> {
        let access = options.access;
        let image = AsyncImage::open(path, options).await?;
        Ok(Self::without_coverage(name, image, access, Arc::default()))
    }

    /// What was seen so far.
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// Its door, which knows how long requests were inside.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The image behind the name.
    pub fn image(&self) -> &AsyncImage {
        &self.image
    }

    /// The older state of the disk that large zeroes are held against.
    pub fn known(&self) -> Option<&AsyncImage> {
        self.known.as_ref()
    }

    /// Refuses new connections and new requests from now on, with `ESHUTDOWN`. Repeatable.
    pub fn refuse(&self) {
        self.gate.close();
    }

    /// Waits until the requests that were let in are done; meaningful after [`Self::refuse`].
    pub async fn drained(&self) {
        self.gate.emptied().await;
    }
}

#[async_trait]
impl nbd::Export for ImageExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn contexts(&self) -> nbd::ContextSet {
        nbd::ContextSet::ALL
    }

    fn preferred_block_size(&self) -> u32 {
        // A cluster is at most 2 MiB, so the conversion never fails.
        u32::try_from(self.image.cluster_size()).unwrap_or(65536)
    }

    async fn open(&self) -> Result<Arc<dyn nbd::Device>, nbd::Error> {
        if self.gate.is_closed() {
            return Err(shutting_down());
        }
        Ok(Arc::new(ImageDevice {
            image: self.image.clone(),
            gate: Arc::clone(&self.gate),
            meter: Arc::clone(&self.meter),
            known: self.known.clone(),
            _connection: self.meter.connected(),
        }))
    }
}

/// The image as one connection sees it; the connection counts as open as long as this lives.
#[derive(Debug)]
struct ImageDevice {
    image: AsyncImage,
    gate: Arc<Gate>,
    meter: Arc<Meter>,
    known: Option<AsyncImage>,
    _connection: ConnectionCount,
}

impl ImageDevice {
    fn enter(&self) -> Result<Pass, nbd::Error> {
        self.gate.enter().ok_or_else(shutting_down)
    }

    /// Like [`Self::enter`], for requests that count towards coverage: one that comes too late is remembered, because it
    /// means that a disk was declared complete before it was.
    fn enter_change(&self) -> Result<Pass, nbd::Error> {
        self.gate.enter().ok_or_else(|| {
            self.meter.late();
            shutting_down()
        })
    }

    /// Writes to the image, and takes the digests of what is written where somebody asks for them: of a long request beside the write.
    async fn write_pieces(
        &self,
        offset: u64,
        buffer: nbd::Buffer,
        durability: qcow2::Durability,
    ) -> Result<Option<Pieces>, qcow2::Error> {
        let (buffer, size) = (Lent(buffer), self.image.size());
        if !self.meter.takes_pieces() {
            self.image.write(offset, buffer, durability).await?;
            return Ok(None);
        }
        if buffer.as_ref().len() <= HASHED_IN_PLACE_MAX {
            let pieces = Pieces::of(offset, buffer.as_ref(), size);
            self.image.write(offset, buffer, durability).await?;
            return Ok(pieces);
        }
        let shared = Arc::new(buffer);
        let taken = tokio::task::spawn_blocking({
            let shared = Arc::clone(&shared);
            move || Pieces::of(offset, (*shared).as_ref(), size)
        });
        let (written, taken) = tokio::join!(self.image.write(offset, SharedBytes(shared), durability), taken);
        written?;
        // Without them what was received here is unknown, which harms nobody.
        Ok(taken.ok().flatten())
    }

    /// How many bytes of a range that is zeroed are data in the older state of the disk. Only its tables are looked at, beside the
    /// zeroing; what cannot be looked at counts nothing.
    async fn known_data(&self, offset: u64, length: u64) -> u64 {
        let Some(known) = self.known.as_ref().filter(|_| length >= SAMPLED_BYTES) else { return 0 };
        let end = offset.saturating_add(length).min(known.size());
        let (mut position, mut data) = (offset, 0);
        while position < end {
            let extents = match known.map(position, end - position, EXTENTS_AT_ONCE).await {
                Ok(extents) => extents,
                Err(error) => {
                    tracing::warn!(%error, "zeroes cannot be compared with the last restore point");
                    return data;
                }
            };
            let covered: u64 = extents.iter().map(|extent| extent.length).sum();
            if covered == 0 {
                break;
            }
            data += extents
                .iter()
                .filter(|extent| extent.kind == ExtentKind::Data)
                .map(|extent| extent.length)
                .sum::<u64>();
            position += covered;
        }
        data
    }

    /// Remembers the failure of a change and says it in the protocol's terms.
    fn change_failed(&self, error: &qcow2::Error) -> nbd::Error {
        let told = request_error(error);
        // A wrong request harms nobody but its sender; everything else means that this image will never be complete.
        if told.kind != nbd::ErrorKind::Invalid {
            self.meter.failed(Failure { no_space: error.is_no_space(), text: error.to_string() });
        }
        told
    }
}

/// A lent buffer as the plain bytes that the image engine takes.
struct Lent(nbd::Buffer);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

impl AsMut<[u8]> for Lent {
    fn as_mut(&mut self) -> &mut [u8] {
        (*self.0).as_mut()
    }
}

/// A lent buffer that two look at.
struct SharedBytes(Arc<Lent>);

impl AsRef<[u8]> for SharedBytes {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

#[async_trait]
impl nbd::Device for ImageDevice {
    fn buffer(&self, _offset: u64, length: usize) -> nbd::Buffer {
        Box::new(self.image.buffer(length))
    }

    fn buffer_memory(&self, length: usize) -> usize {
        qcow2::Buffer::memory_for(length)
    }

    async fn read(&self, offset: u64, buffer: nbd::Buffer) -> Result<nbd::Content, nbd::Error> {
        let mut pass = self.enter()?;
        let read = self.image.read_sparse(offset, Lent(buffer)).await;
        let (Lent(buffer), holes) = read.map_err(|error| request_error(&error))?;
        pass.ended_at(self.meter.read((*buffer).as_ref().len() as u64));
        Ok(nbd::Content { buffer, holes })
    }

    async fn write(&self, offset: u64, buffer: nbd::Buffer, durability: nbd::Durability) -> Result<(), nbd::Error> {
        let mut pass = self.enter_change()?;
        let length = (*buffer).as_ref().len() as u64;
        let written = self.write_pieces(offset, buffer, durability_of(durability)).await;
        let pieces = written.map_err(|error| self.change_failed(&error))?;
        self.meter.identical(self.image.identical_bytes());
        pass.ended_at(self.meter.written(offset, length, pieces.as_ref()));
        Ok(())
    }

    async fn zero(
        &self,
        offset: u64,
        length: u64,
        space: nbd::Space,
        durability: nbd::Durability,
    ) -> Result<(), nbd::Error> {
        let mut pass = self.enter_change()?;
        let mode = match space {
            nbd::Space::Keep => ZeroMode::Keep,
            nbd::Space::Release => ZeroMode::Unmap,
        };
        let zeroed = self.image.zero(offset, length, mode, durability_of(durability));
        let (zeroed, over_data) = tokio::join!(zeroed, self.known_data(offset, length));
        zeroed.map_err(|error| self.change_failed(&error))?;
        self.meter.zeroed_over_data(over_data);
        self.meter.identical(self.image.identical_bytes());
        pass.ended_at(self.meter.zeroed(offset, length));
        Ok(())
    }

    async fn fast_zero(&self, offset: u64, length: u64) -> bool {
        self.image.zero_is_fast(offset, length).await
    }

    async fn trim(&self, offset: u64, length: u64, durability: nbd::Durability) -> Result<(), nbd::Error> {
        let _pass = self.enter()?;
        let discarded = self.image.discard(offset, length, durability_of(durability)).await;
        discarded.map_err(|error| self.change_failed(&error))?;
        self.meter.discarded(offset, length);
        Ok(())
    }

    /// Not kept out by the gate: a flush changes no content, and what was answered before must become durable.
    async fn flush(&self) -> Result<(), nbd::Error> {
        match self.image.flush().await {
            // The owner's close made everything durable, or poisoned the image.
            Err(qcow2::Error::Closed) if self.image.poison().is_none() => {}
            flushed => flushed.map_err(|error| self.change_failed(&error))?,
        }
        self.meter.alive();
        Ok(())
    }

    async fn cache(&self, offset: u64, length: u64) {
        // Whoever may not come in any more needs no hint.
        if let Ok(_pass) = self.enter() {
            self.image.prefetch(offset, length).await;
            self.meter.alive();
        }
    }

    async fn extents(
        &self,
        context: nbd::Context,
        offset: u64,
        length: u64,
        max: usize,
    ) -> Result<Vec<nbd::Extent>, nbd::Error> {
        let _pass = self.enter()?;
        let found = self.image.map(offset, length, max).await.map_err(|error| request_error(&error))?;
        self.meter.alive();
        let status = |extent: &qcow2::Extent| match context {
            nbd::Context::BaseAllocation => status_of(extent.kind),
            nbd::Context::AllocationDepth => extent.depth.into(),
        };
        Ok(found.iter().map(|extent| nbd::Extent { length: extent.length, status: status(extent) }).collect())
    }
}

fn status_of(kind: ExtentKind) -> u64 {
    match kind {
        ExtentKind::Data => 0,
        ExtentKind::ZeroAllocated => STATE_ZERO,
        ExtentKind::Zero => STATE_ZERO | STATE_HOLE,
    }
}

fn durability_of(durability: nbd::Durability) -> qcow2::Durability {
    match durability {
        nbd::Durability::OnFlush => qcow2::Durability::OnFlush,
        nbd::Durability::BeforeReply => qcow2::Durability::BeforeReply,
    }
}

fn shutting_down() -> nbd::Error {
    nbd::Error::new(nbd::ErrorKind::Shutdown, "the export is going away")
}

/// The table from the image engine's errors to the protocol's. Texts are our own: the engine's may name paths.
fn request_error(error: &qcow2::Error) -> nbd::Error {
    use nbd::ErrorKind;
    let (kind, text) = match error {
        qcow2::Error::OutOfRange { .. } => (ErrorKind::Invalid, "the range is outside the disk"),
        qcow2::Error::InvalidOption { .. } => (ErrorKind::Invalid, "the request is not valid for this image"),
        qcow2::Error::ReadOnly => (ErrorKind::NotPermitted, "the image is read-only"),
        qcow2::Error::Closed => (ErrorKind::Shutdown, "the image is closed"),
        qcow2::Error::NoSpace { .. } | qcow2::Error::Poisoned { no_space: true, .. } => {
            (ErrorKind::NoSpace, "no space left for the image")
        }
        qcow2::Error::Poisoned { .. } | qcow2::Error::Panicked => {
            (ErrorKind::Io, "the image failed earlier and takes nothing more")
        }
        qcow2::Error::Io { source, .. } | qcow2::Error::Open { source, .. } => {
            (ErrorKind::from(source as &io::Error), "the storage failed")
        }
        _ => (ErrorKind::Io, "the image cannot be used"),
    };
    nbd::Error::new(kind, text)
}
