//! The seam between the protocol and whatever holds the bytes: an [`Export`] is offered by name, the [`Device`] behind it
//! is opened once a client has passed the handshake. The protocol knows no image format, the device knows no socket.

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

/// A run of bytes with one answer in a metadata context; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Length in bytes, above 0.
    pub length: u64,
    /// The status word of the context: for `base:allocation` bit 0 = hole, bit 1 = reads as zero.
    pub status: u32,
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
/// longer than a piece ([`crate::Limits::piece_bytes`]) comes as several calls, each at most a piece long and ending at a
/// multiple of it; if it was to be durable, [`Device::flush`] follows the last of them.
///
/// # Cancellation
/// The session runs each call to its end, also when the client is gone. A call is polled first by the task that reads the
/// socket, and moves to a task of its own if it has to wait: it may copy memory right away, but must not block.
///
/// # Panics
/// A panic closes the connection whose call it was, and no other.
#[async_trait]
pub trait Device: Send + Sync + 'static {
    /// Memory for `length` bytes at `offset` (the offset lets an engine choose alignment). Contents are arbitrary.
    fn buffer(&self, offset: u64, length: usize) -> Buffer;

    /// Fills the whole buffer from `offset` on and hands it back.
    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer, Error>;

    /// Writes the whole buffer at `offset`.
    async fn write(&self, offset: u64, buffer: Buffer, durability: Durability) -> Result<(), Error>;

    /// Makes the range read as zeroes.
    async fn zero(&self, offset: u64, length: u64, flags: ZeroFlags, durability: Durability) -> Result<(), Error>;

    /// Gives back the space of the range where that can be done; what was given back reads as zeroes.
    async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), Error>;

    /// Makes durable what every call that returned before this one began has changed, on any connection.
    async fn flush(&self) -> Result<(), Error>;

    /// The `base:allocation` answer from `offset` on: at least one extent, at most `max`, none empty, together at most
    /// `length` bytes (fewer is legal, none is not).
    async fn extents(&self, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>, Error>;
}
