//! Running requests: permits, device calls, replies. Each request that touches the device is one future of its own, which
//! runs to its end whatever becomes of the client.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use super::outgoing::Frame;
use super::{Connection, Slot};
use crate::budget::{Permit, Share};
use crate::transmission::{BASE_ALLOCATION_ID, Mode, Shape, Task, piece_end, plan_status};
use crate::wire::reply::{self, ChunkType, Last};
use crate::wire::request::Request;
use crate::{Buffer, Durability, Error, ErrorKind};

/// Runs a future that must not be dropped half way: what it can do at once is done here, the rest in a task.
pub(crate) async fn launch(future: impl Future<Output = ()> + Send + 'static) {
    let mut future = Box::pin(future);
    let pending = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await;
    if pending {
        tokio::spawn(future);
    }
}

/// Runs anything but a WRITE, whose payload the reader must fetch first.
pub(crate) async fn run(slot: Slot, request: Request, task: Task) {
    let device = slot.connection().device.clone();
    match task {
        Task::Read { offset, length, shape: Shape::Pieces } => read_pieces(slot, request, offset, length).await,
        Task::Read { offset, length, shape: Shape::Whole } => read_whole(slot, request, offset, length).await,
        Task::Zero { offset, length, flags, durability } => {
            let result = device.zero(offset, length, flags, durability).await;
            if result.is_ok() {
                slot.connection().stats().bytes_zeroed.fetch_add(length, Relaxed);
            }
            slot.answer(&request, result);
        }
        Task::Trim { offset, length, durability } => {
            let result = device.trim(offset, length, durability).await;
            if result.is_ok() {
                slot.connection().stats().bytes_trimmed.fetch_add(length, Relaxed);
            }
            slot.answer(&request, result);
        }
        Task::Flush => {
            let result = device.flush().await;
            slot.answer(&request, result);
        }
        Task::Status { offset, length, max } => status(slot, request, offset, length, max).await,
        Task::Write { .. } | Task::Nothing => slot.answer(&request, Ok(())),
    }
}

/// A permit, or `None` if the connection died while waiting for it.
async fn permit(connection: &Connection, share: &Arc<Share>, bytes: u32) -> Option<Permit> {
    if let Some(permit) = share.try_acquire(bytes) {
        return Some(permit);
    }
    tokio::select! {
        biased;
        _ = connection.flight.dead() => None,
        permit = share.acquire(bytes) => Some(permit),
    }
}

async fn read(connection: &Connection, offset: u64, length: usize) -> Result<Buffer, Error> {
    let buffer = connection.device.buffer(offset, length);
    let buffer = connection.device.read(offset, buffer).await.map_err(|error| {
        let at = error.offset.unwrap_or(offset);
        error.at(at)
    })?;
    // A header has promised or will promise exactly this many bytes.
    if (*buffer).as_ref().len() == length {
        Ok(buffer)
    } else {
        Err(Error::new(ErrorKind::Io, "the device handed back a buffer of another length"))
    }
}

async fn read_pieces(slot: Slot, request: Request, offset: u64, length: u64) {
    let connection = slot.connection().clone();
    let end = offset + length;
    let mut at = offset;
    loop {
        let next = piece_end(at, end, connection.piece);
        // A piece fits 32 bits by the bound on its size.
        let bytes = u32::try_from(next - at).unwrap_or(u32::MAX);
        let Some(permit) = permit(&connection, &connection.output, bytes).await else { return };
        let buffer = match read(&connection, at, bytes as usize).await {
            Ok(buffer) => buffer,
            Err(error) => return slot.answer(&request, Err(error)),
        };
        connection.stats().bytes_read.fetch_add(u64::from(bytes), Relaxed);
        let last = if next == end { Last::Yes } else { Last::No };
        let head = reply::data_chunk(request.cookie, last, at, bytes);
        let frame = Frame::new(head).with_buffer(buffer).with_permit(permit);
        if last == Last::Yes {
            return slot.finish(frame);
        }
        if slot.send(frame).is_err() {
            return;
        }
        at = next;
    }
}

async fn read_whole(slot: Slot, request: Request, offset: u64, length: u64) {
    let connection = slot.connection().clone();
    let bytes = match u32::try_from(length) {
        Ok(bytes) if bytes <= connection.output.largest() => bytes,
        _ => {
            let kind = match connection.terms.mode {
                Mode::Simple => ErrorKind::Invalid,
                Mode::Structured => ErrorKind::Overflow,
            };
            return slot.answer(&request, Err(Error::new(kind, "more than the memory of this server")));
        }
    };
    let Some(permit) = permit(&connection, &connection.output, bytes).await else { return };
    let end = offset + length;
    let mut buffers = Vec::new();
    let mut at = offset;
    while at < end {
        let next = piece_end(at, end, connection.piece);
        let piece = usize::try_from(next - at).unwrap_or(usize::MAX);
        match read(&connection, at, piece).await {
            Ok(buffer) => buffers.push(buffer),
            Err(error) => return slot.answer(&request, Err(error)),
        }
        if connection.flight.is_dead() {
            return;
        }
        at = next;
    }
    connection.stats().bytes_read.fetch_add(length, Relaxed);
    let head = match connection.terms.mode {
        Mode::Simple => reply::simple(request.cookie, 0),
        Mode::Structured => reply::data_chunk(request.cookie, Last::Yes, offset, bytes),
    };
    slot.finish(Frame::new(head).with_buffers(buffers).with_permit(permit));
}

async fn status(slot: Slot, request: Request, offset: u64, length: u64, max: usize) {
    /// Bytes that one extent takes while the device lists it, the planner joins it and the reply holds it.
    const EXTENT_BYTES: usize = 2 * size_of::<crate::Extent>() + 8;
    let connection = slot.connection().clone();
    let bytes = u32::try_from(max * EXTENT_BYTES).unwrap_or(u32::MAX).min(connection.piece);
    let Some(mut permit) = permit(&connection, &connection.output, bytes).await else { return };
    let extents = connection.device.extents(offset, length, max).await;
    let planned = match extents.and_then(|extents| plan_status(length, max, &extents)) {
        Ok(planned) => planned,
        Err(error) => return slot.answer(&request, Err(error)),
    };
    connection.stats().extents.fetch_add(planned.len() as u64, Relaxed);
    let payload = reply::status_payload(BASE_ALLOCATION_ID, &planned);
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    permit.shrink(size);
    let head = reply::chunk(request.cookie, ChunkType::BLOCK_STATUS, Last::Yes, size);
    slot.finish(Frame::new(head).with_body(payload).with_permit(permit));
}

/// A WRITE whose payload came in one piece.
pub(crate) async fn write(slot: Slot, request: Request, buffer: Buffer, permit: Permit, durability: Durability) {
    let length = (*buffer).as_ref().len() as u64;
    let result = slot.connection().device.write(request.offset, buffer, durability).await;
    drop(permit);
    if result.is_ok() {
        slot.connection().stats().bytes_written.fetch_add(length, Relaxed);
    }
    slot.answer(&request, result);
}

/// A WRITE whose payload comes in several pieces, which reach the device as they come. The last piece to be done answers:
/// whoever holds the [`Arc`] keeps the request open.
pub(crate) struct LongWrite {
    slot: Slot,
    request: Request,
    durability: Durability,
    error: Mutex<Option<Error>>,
    /// The last byte of the payload has arrived.
    whole: AtomicBool,
}

impl LongWrite {
    pub(crate) fn new(slot: Slot, request: Request, durability: Durability) -> Arc<Self> {
        Arc::new(Self { slot, request, durability, error: Mutex::new(None), whole: AtomicBool::new(false) })
    }

    /// Whether a piece has failed, so that the rest need not be written.
    pub(crate) fn has_failed(&self) -> bool {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Writes a piece. FUA waits for [`LongWrite::conclude`]: one flush is cheaper than one per piece.
    pub(crate) async fn piece(self: Arc<Self>, offset: u64, buffer: Buffer, permit: Permit) {
        let length = (*buffer).as_ref().len() as u64;
        let result = self.slot.connection().device.write(offset, buffer, Durability::OnFlush).await;
        drop(permit);
        match result {
            Ok(()) => {
                self.slot.connection().stats().bytes_written.fetch_add(length, Relaxed);
            }
            Err(error) => {
                self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
        self.conclude().await;
    }

    /// The last piece is on its way: from now on the request may succeed.
    pub(crate) fn arrived(&self) {
        self.whole.store(true, Relaxed);
    }

    /// Lets go of the request; whoever does so last answers it. A payload that broke off is never answered with success.
    pub(crate) async fn conclude(self: Arc<Self>) {
        let Some(Self { slot, request, durability, error, whole }) = Arc::into_inner(self) else { return };
        let result = match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None if !whole.into_inner() => Err(Error::new(ErrorKind::Io, "the payload did not arrive whole")),
            None if durability == Durability::BeforeReply => slot.connection().device.flush().await,
            None => Ok(()),
        };
        slot.answer(&request, result);
    }
}
