//! The seam between the protocol and whatever holds the bytes: an [`Export`] is offered by name, the [`Device`] behind it
//! is opened once a client has passed the handshake. The protocol knows no image format, the device knows no socket.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;

use crate::Error;

/// Memory for one payload, owned by whoever works on it.
///
/// The device lends it ([`Device::buffer`]), the session fills it from the socket (or the device fills it for a read), so
/// a device that wants aligned or pooled memory gets its own back without a copy. Dropping it gives it back.
pub type Buffer = Box<dyn Payload>;

/// Bytes that can be filled and sent; see [`Buffer`].
pub trait Payload: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static {}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static> Payload for T {}

/// When a change must be on stable storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// At the next flush.
    OnFlush,
    /// Before the reply: `NBD_CMD_FLAG_FUA`.
    BeforeReply,
}

/// The flags of a `WRITE_ZEROES` request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ZeroFlags {
    /// `NBD_CMD_FLAG_NO_HOLE`: the client asks for allocated space rather than a hole.
    pub no_hole: bool,
    /// `NBD_CMD_FLAG_FAST_ZERO`: fail with [`crate::ErrorKind::NotSupported`], data untouched, unless it is faster than writing.
    pub fast: bool,
}

/// What becomes of the space under a range that is made to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// It is given back where that can be done.
    Release,
    /// It is kept or taken, so that later writes do not run out of it: `NBD_CMD_FLAG_NO_HOLE`.
    Keep,
}

/// Content of a range.
pub struct Content {
    /// The bytes, except where there are holes.
    pub buffer: Buffer,
    /// Ranges within the buffer that read as zeroes, ascending and disjoint; what the buffer holds there is arbitrary. It is
    /// never wrong to tell none and to fill the buffer.
    pub holes: Vec<Range<usize>>,
}

impl From<Buffer> for Content {
    fn from(buffer: Buffer) -> Self {
        Self { buffer, holes: Vec::new() }
    }
}

/// A metadata context: a question that BLOCK_STATUS answers ("Metadata querying").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Context {
    /// `base:allocation`: bit 0 = hole, bit 1 = reads as zero.
    BaseAllocation,
    /// `qemu:allocation-depth`: 0 = unallocated, 1 = in the image itself, 2 = in its backing file, and so on.
    AllocationDepth,
}

impl Context {
    /// All contexts that this server knows, in the order in which they are told.
    pub const ALL: [Self; 2] = [Self::BaseAllocation, Self::AllocationDepth];

    /// `namespace:leaf`.
    pub fn name(self) -> &'static str {
        match self {
            Self::BaseAllocation => "base:allocation",
            Self::AllocationDepth => "qemu:allocation-depth",
        }
    }

    /// Its id in every connection; not 0, which is what lists say.
    pub fn id(self) -> u32 {
        match self {
            Self::BaseAllocation => 1,
            Self::AllocationDepth => 2,
        }
    }
}

/// Some of the metadata contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ContextSet {
    /// [`Context::BaseAllocation`].
    pub base_allocation: bool,
    /// [`Context::AllocationDepth`].
    pub allocation_depth: bool,
}

impl ContextSet {
    /// None of them.
    pub const NONE: Self = Self { base_allocation: false, allocation_depth: false };
    /// All of them.
    pub const ALL: Self = Self { base_allocation: true, allocation_depth: true };

    /// Whether the context is among them.
    pub fn contains(self, context: Context) -> bool {
        match context {
            Context::BaseAllocation => self.base_allocation,
            Context::AllocationDepth => self.allocation_depth,
        }
    }

    /// Those, in the order of [`Context::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |context| self.contains(*context))
    }
}

impl FromIterator<Context> for ContextSet {
    fn from_iter<T: IntoIterator<Item = Context>>(contexts: T) -> Self {
        contexts.into_iter().fold(Self::NONE, |set, context| match context {
            Context::BaseAllocation => Self { base_allocation: true, ..set },
            Context::AllocationDepth => Self { allocation_depth: true, ..set },
        })
    }
}

/// A run of bytes with one answer in a metadata context; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Length in bytes, above 0.
    pub length: u64,
    /// The status word, see [`Context`]. More than 32 bits of it travel with extended headers only; neither context here
    /// needs them.
    pub status: u64,
}

/// A name that clients can ask for, with the facts that are known without opening anything.
///
/// The facts do not change while the export is served: INFO and GO must give equal answers.
#[async_trait]
pub trait Export: Send + Sync + 'static {
    /// The name, at most 4096 bytes of UTF-8 without NUL.
    fn name(&self) -> &str;

    /// One line for humans; may be empty.
    fn description(&self) -> &str {
        ""
    }

    /// The exact size in bytes, below 2^63.
    fn size(&self) -> u64;

    /// Whether writes are refused with `NBD_EPERM`.
    fn read_only(&self) -> bool;

    /// The request size that costs least: a power of two, at least 512.
    fn preferred_block_size(&self) -> u32 {
        65536
    }

    /// The metadata contexts that the device can tell.
    fn contexts(&self) -> ContextSet {
        ContextSet { base_allocation: true, ..ContextSet::NONE }
    }

    /// Whether the device can tell zeroing that is faster than writing ([`Device::fast_zero`]).
    fn fast_zero(&self) -> bool {
        true
    }

    /// Opens the bytes behind the name, once per connection, after the handshake asked for it and before it is acknowledged.
    /// All connections of one export share one image, so this usually hands out the same device again. An error is told to
    /// the client: [`crate::ErrorKind::NotPermitted`] as a matter of policy, [`crate::ErrorKind::Shutdown`] as a server that
    /// stops, anything else as a failure of the server.
    ///
    /// # Cancellation
    /// The future is dropped if the client goes away or the handshake takes too long.
    async fn open(&self) -> Result<Arc<dyn Device>, Error>;
}

/// The bytes behind an export. The session has already checked range, flags and read-only: `offset + length <= size`, and
/// `length > 0`.
///
/// Calls overlap: up to a whole connection's requests are under way at once, of every connection, in no order. A WRITE
/// longer than a piece ([`crate::Limits::piece_bytes`]), or any WRITE when memory is short, comes as several calls, each at
/// most a piece long and ending at a multiple of a power of two, and a WRITE_ZEROES or TRIM of more than a GiB comes GiB by GiB; if it was to be durable, [`Device::flush`]
/// follows the last of them.
///
/// # Memory
/// The buffer of a write counts against the [`crate::Budget`] until the device drops it, so a device that answers before the
/// bytes have left its memory keeps it until then; it must not wait for another request before it lets go.
///
/// # Cancellation
/// The session runs each call to its end, also when the client is gone. A call is polled first by the task that reads the
/// socket, and moves to a task of its own if it has to wait: it may copy memory right away, but must not block.
///
/// # Panics
/// A panic closes the connection whose call it was, or fails the request with EIO if it was one of several pieces; no other
/// connection notices.
#[async_trait]
pub trait Device: Send + Sync + 'static {
    /// Memory for `length` bytes at `offset` (the offset lets an engine choose alignment). Contents are arbitrary.
    fn buffer(&self, offset: u64, length: usize) -> Buffer;

    /// Bytes of memory that such a buffer takes up, at least `length`: what is counted against the [`crate::Budget`].
    fn buffer_memory(&self, length: usize) -> usize {
        length
    }

    /// Fills the buffer from `offset` on, as far as there are no holes, and hands it back.
    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Content, Error>;

    /// Writes the whole buffer at `offset`.
    async fn write(&self, offset: u64, buffer: Buffer, durability: Durability) -> Result<(), Error>;

    /// Makes the range read as zeroes.
    async fn zero(&self, offset: u64, length: u64, space: Space, durability: Durability) -> Result<(), Error>;

    /// Whether [`Device::zero`] over this range would be faster than writing zeroes. Asked before anything is changed.
    async fn fast_zero(&self, offset: u64, length: u64) -> bool;

    /// Gives back the space of the range where that can be done; what was given back reads as zeroes.
    async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), Error>;

    /// Makes durable what every call that returned before this one began has changed, on any connection.
    async fn flush(&self) -> Result<(), Error>;

    /// Hears that the range will be read soon. What it does about it is its own affair; it may not fail and should be quick.
    async fn cache(&self, _offset: u64, _length: u64) {}

    /// The answer of a context from `offset` on: at least one extent, at most `max`, none empty, together at most `length`
    /// bytes (fewer is legal, none is not). `length` may be the whole disk.
    async fn extents(&self, context: Context, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>, Error>;
}
