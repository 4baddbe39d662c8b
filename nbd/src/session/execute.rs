//! Running requests: permits, device calls, replies. Each request that touches the device is one future of its own, which
//! runs to its end whatever becomes of the client.

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use super::outgoing::Frame;
use super::{Connection, Slot, next_piece};
use crate::budget::{Line, Permit};
use crate::stats::Counters;
use crate::transmission::{Mode, Shape, Task, chunk_header, piece_end, plan_status};
use crate::wire::reply::{self, ChunkHeader, Head, Last};
use crate::wire::request::Request;
use crate::{Buffer, Content, ContextSet, Durability, Error, ErrorKind, Space, ZeroFlags};

/// A change without payload is handed to the device in steps that end at multiples of this many bytes, so that one request for
/// a whole disk can end when its client is gone.
const STEP: u32 = 1 << 30;
/// Smaller holes are sent as zeroes: the header of a chunk costs the peer more than they do.
const SMALLEST_HOLE: usize = 4096;
/// What a queued frame without a body counts for, at least the memory that it takes.
const FRAME_BYTES: u32 = size_of::<Frame>().next_power_of_two() as u32;
/// Chunks of content "SHOULD" be cut at multiples of this many bytes.
const CHUNK_ALIGNMENT: u64 = 512;

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
            let ZeroFlags { no_hole, fast } = flags;
            if fast && !device.fast_zero(offset, length).await {
                let error =
                    Error::new(ErrorKind::NotSupported, "zeroing this range would be no faster than writing it");
                return slot.answer(&request, Err(error));
            }
            let space = if no_hole { Space::Keep } else { Space::Release };
            let count = |counters: &Counters, bytes| counters.bytes_zeroed.fetch_add(bytes, Relaxed);
            change(slot, request, offset..offset + length, durability, count, |at, length, durability| {
                let device = device.clone();
                async move { device.zero(at, length, space, durability).await }
            })
            .await;
        }
        Task::Trim { offset, length, durability } => {
            let count = |counters: &Counters, bytes| counters.bytes_trimmed.fetch_add(bytes, Relaxed);
            change(slot, request, offset..offset + length, durability, count, |at, length, durability| {
                let device = device.clone();
                async move { device.trim(at, length, durability).await }
            })
            .await;
        }
        Task::Flush => {
            let result = device.flush().await;
            slot.answer(&request, result);
        }
        Task::Cache { offset, length } => {
            device.cache(offset, length).await;
            slot.answer(&request, Ok(()));
        }
        Task::Status { offset, length, max, contexts } => status(slot, request, offset, length, max, contexts).await,
        Task::Nothing => slot.answer(&request, Ok(())),
        // Their payload is the reader's to fetch; success must not be the answer to a mistake of ours.
        Task::Write { .. } | Task::StatusFilter { .. } => {
            slot.answer(&request, Err(Error::new(ErrorKind::Io, "the payload was not received")));
        }
    }
}

/// Changes a range step by step; if it must be durable and has more than one step, a flush follows the last.
async fn change<F>(
    slot: Slot,
    request: Request,
    range: Range<u64>,
    durability: Durability,
    count: impl Fn(&Counters, u64) -> u64,
    step: impl Fn(u64, u64, Durability) -> F,
) where
    F: Future<Output = Result<(), Error>>,
{
    let whole = piece_end(range.start, range.end, STEP) == range.end;
    let mut at = range.start;
    while at < range.end {
        let next = piece_end(at, range.end, STEP);
        let when = if whole { durability } else { Durability::OnFlush };
        if let Err(error) = step(at, next - at, when).await {
            return slot.answer(&request, Err(error));
        }
        count(slot.connection().stats(), next - at);
        if !slot.is_wanted() {
            return;
        }
        at = next;
    }
    let result = match durability {
        Durability::BeforeReply if !whole => slot.connection().device.flush().await,
        _ => Ok(()),
    };
    slot.answer(&request, result);
}

/// A permit, or `None` if the connection died while waiting for it.
async fn unless_dead(connection: &Connection, permit: impl Future<Output = Permit>) -> Option<Permit> {
    tokio::select! {
        biased;
        permit = permit => Some(permit),
        _ = connection.flight.dead() => None,
    }
}

async fn read(connection: &Connection, offset: u64, length: usize) -> Result<Content, Error> {
    let buffer = connection.device.buffer(offset, length);
    let content = connection.device.read(offset, buffer).await.map_err(|error| {
        let at = error.offset.unwrap_or(offset);
        error.at(at)
    })?;
    // A header has promised or will promise exactly this many bytes.
    if (*content.buffer).as_ref().len() != length {
        return Err(Error::new(ErrorKind::Io, "the device handed back a buffer of another length"));
    }
    if !are_sound(&content.holes, length) {
        return Err(Error::new(ErrorKind::Io, "the device told of holes in disorder"));
    }
    Ok(content)
}

/// Whether the holes are ascending, disjoint, not empty and within the buffer.
fn are_sound(holes: &[Range<usize>], length: usize) -> bool {
    let mut end = 0;
    holes.iter().all(|hole| {
        let fits = end <= hole.start && hole.start < hole.end && hole.end <= length;
        end = hole.end;
        fits
    })
}

async fn read_pieces(slot: Slot, request: Request, offset: u64, length: u64) {
    let connection = slot.connection().clone();
    let Some(header) = chunk_header(connection.terms.mode, &request) else { return };
    let end = offset + length;
    let mut at = offset;
    let largest = u32::try_from(length).unwrap_or(u32::MAX).min(connection.piece);
    let mut line = Line::new(&connection.output, connection.cost(largest));
    loop {
        let wanted = next_piece(&connection, at, end);
        let Some(permit) = unless_dead(&connection, line.next(connection.cost(wanted))).await else { return };
        let next = piece_end(at, at + u64::from(wanted), permit.bytes());
        let bytes = u32::try_from(next - at).unwrap_or(u32::MAX);
        if next == end {
            line.leave();
        }
        let content = match read(&connection, at, bytes as usize).await {
            Ok(content) => content,
            Err(error) => return slot.answer(&request, Err(error)),
        };
        connection.stats().bytes_read.fetch_add(u64::from(bytes), Relaxed);
        let last = if next == end { Last::Yes } else { Last::No };
        let frame = piece_frame(header, last, at, bytes, content, permit);
        if last == Last::Yes {
            return slot.finish(frame);
        }
        if slot.send(frame).is_err() {
            return;
        }
        at = next;
    }
}

/// The chunks of one piece: one of data, one hole, or both kinds in turn.
fn piece_frame(header: ChunkHeader, last: Last, at: u64, bytes: u32, content: Content, mut permit: Permit) -> Frame {
    let Content { mut buffer, holes } = content;
    let holes = worth_telling(at, holes, (*buffer).as_mut());
    let length = bytes as usize;
    match holes.as_slice() {
        [] => Frame::new(header.data(last, at, bytes)).with_buffer(buffer).with_permit(permit),
        [hole] if *hole == (0..length) => {
            // The memory is not needed any longer. What waits to be sent costs some all the same.
            drop(buffer);
            permit.shrink(FRAME_BYTES);
            Frame::new(header.hole(last, at, bytes)).with_permit(permit)
        }
        holes => Frame::of_chunks(buffer, chunks(header, last, at, length, holes)).with_permit(permit),
    }
}

/// Headers and contents of the chunks of a piece that is neither all data nor all hole.
fn chunks(
    header: ChunkHeader,
    last: Last,
    at: u64,
    length: usize,
    holes: &[Range<usize>],
) -> Vec<(Head, Range<usize>)> {
    let mut chunks = Vec::with_capacity(2 * holes.len() + 1);
    let mut done = 0;
    // Lengths within a piece fit 32 bits, as the piece does.
    let size = |part: &Range<usize>| u32::try_from(part.len()).unwrap_or(u32::MAX);
    let flag = |end: usize| if end == length { last } else { Last::No };
    for hole in holes.iter().cloned().chain(std::iter::once(length..length)) {
        let data = done..hole.start;
        done = hole.end;
        if !data.is_empty() {
            chunks.push((header.data(flag(data.end), at + data.start as u64, size(&data)), data));
        }
        if !hole.is_empty() {
            chunks.push((header.hole(flag(hole.end), at + hole.start as u64, size(&hole)), 0..0));
        }
    }
    chunks
}

/// The holes that get a chunk of their own, cut at multiples of 512; what is left of them is filled with zeroes.
fn worth_telling(at: u64, holes: Vec<Range<usize>>, buffer: &mut [u8]) -> Vec<Range<usize>> {
    let length = buffer.len();
    let aligned = |index: usize, up: bool| {
        let place = at + index as u64;
        let place =
            if up { place.next_multiple_of(CHUNK_ALIGNMENT) } else { place / CHUNK_ALIGNMENT * CHUNK_ALIGNMENT };
        usize::try_from(place.saturating_sub(at)).unwrap_or(length)
    };
    let told = holes.into_iter().filter_map(|hole| {
        // The ends of the piece need no alignment: a chunk begins or ends there anyway.
        let start = if hole.start == 0 { 0 } else { aligned(hole.start, true) };
        let end = if hole.end == length { length } else { aligned(hole.end, false) };
        let whole = (start, end) == (0, length);
        if !whole && (end < start || end - start < SMALLEST_HOLE) {
            buffer[hole].fill(0);
            return None;
        }
        buffer[hole.start..start].fill(0);
        buffer[end..hole.end].fill(0);
        Some(start..end)
    });
    told.collect()
}

/// The pieces of a range: where each begins, and its length, which fits 32 bits by the bound on it.
fn pieces(offset: u64, end: u64, piece: u32) -> impl Iterator<Item = (u64, u32)> {
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at;
        at = if start < end { piece_end(start, end, piece) } else { return None };
        Some((start, u32::try_from(at - start).unwrap_or(u32::MAX)))
    })
}

async fn read_whole(slot: Slot, request: Request, offset: u64, length: u64) {
    let connection = slot.connection().clone();
    let bytes = match u32::try_from(length) {
        Ok(bytes) if bytes <= connection.output.largest() => bytes,
        _ => {
            let kind = match connection.terms.mode {
                Mode::Simple => ErrorKind::Invalid,
                Mode::Structured | Mode::Extended => ErrorKind::Overflow,
            };
            return slot.answer(&request, Err(Error::new(kind, "more than the memory of this server")));
        }
    };
    let pieces = || pieces(offset, offset + length, connection.piece);
    let cost = pieces().map(|(_, piece)| connection.cost(piece)).fold(0, u32::saturating_add);
    let cost = cost.min(connection.output.largest());
    let Some(permit) = unless_dead(&connection, connection.output.acquire(cost)).await else { return };
    let mut buffers = Vec::new();
    for (at, piece) in pieces() {
        match read(&connection, at, piece as usize).await {
            Ok(Content { mut buffer, holes }) => {
                for hole in holes {
                    (*buffer).as_mut()[hole].fill(0);
                }
                buffers.push(buffer);
            }
            Err(error) => return slot.answer(&request, Err(error)),
        }
        if connection.flight.is_dead() {
            return;
        }
    }
    connection.stats().bytes_read.fetch_add(length, Relaxed);
    let head = match chunk_header(connection.terms.mode, &request) {
        None => reply::simple(request.cookie, 0),
        Some(header) => header.data(Last::Yes, offset, bytes),
    };
    slot.finish(Frame::new(head).with_buffers(buffers).with_permit(permit));
}

/// One chunk for each context; one that fails ends the reply.
async fn status(slot: Slot, request: Request, offset: u64, length: u64, max: usize, contexts: ContextSet) {
    /// Bytes that one extent takes while the device lists it, the planner joins it and the reply holds it.
    const EXTENT_BYTES: usize = 2 * size_of::<crate::Extent>() + 16;
    let connection = slot.connection().clone();
    let Some(header) = chunk_header(connection.terms.mode, &request) else { return };
    let bytes = u32::try_from(max * EXTENT_BYTES).unwrap_or(u32::MAX).min(connection.piece);
    let mut line = Line::new(&connection.output, bytes);
    let mut left = contexts.iter().peekable();
    while let Some(context) = left.next() {
        let Some(mut permit) = unless_dead(&connection, line.next(bytes)).await else { return };
        // Fewer than asked for is always legal.
        let max = max.min((permit.bytes() as usize / EXTENT_BYTES).max(1));
        let extents = connection.device.extents(context, offset, length, max).await;
        let planned = match extents.and_then(|extents| plan_status(length, max, &extents)) {
            Ok(planned) => planned,
            Err(error) => return slot.answer(&request, Err(error)),
        };
        connection.stats().extents.fetch_add(planned.len() as u64, Relaxed);
        let last = if left.peek().is_none() { Last::Yes } else { Last::No };
        let (head, payload) = header.status(last, context.id(), &planned);
        permit.shrink(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        let frame = Frame::new(head).with_body(payload).with_permit(permit);
        if last == Last::Yes {
            return slot.finish(frame);
        }
        if slot.send(frame).is_err() {
            return;
        }
    }
}

/// A buffer that gives its permit back when the device drops it: an engine that answers before the bytes are written holds
/// both until they are.
struct Charged {
    buffer: Buffer,
    _permit: Permit,
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        (*self.buffer).as_ref()
    }
}

impl AsMut<[u8]> for Charged {
    fn as_mut(&mut self) -> &mut [u8] {
        (*self.buffer).as_mut()
    }
}

/// Puts the permit for a buffer into it.
pub(crate) fn charged(buffer: Buffer, permit: Permit) -> Buffer {
    Box::new(Charged { buffer, _permit: permit })
}

/// A WRITE whose payload came in one piece.
pub(crate) async fn write(slot: Slot, request: Request, buffer: Buffer, durability: Durability) {
    let length = (*buffer).as_ref().len() as u64;
    let result = slot.connection().device.write(request.offset, buffer, durability).await;
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
    /// Bytes that the device took. A piece whose call panicked, or that never arrived, is missing here.
    written: AtomicU64,
}

impl LongWrite {
    pub(crate) fn new(slot: Slot, request: Request, durability: Durability) -> Arc<Self> {
        Arc::new(Self { slot, request, durability, error: Mutex::new(None), written: AtomicU64::new(0) })
    }

    /// Whether a piece has failed, so that the rest need not be written.
    pub(crate) fn has_failed(&self) -> bool {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Writes a piece. FUA waits for [`LongWrite::conclude`]: one flush is cheaper than one per piece.
    pub(crate) async fn piece(self: Arc<Self>, offset: u64, buffer: Buffer) {
        let length = (*buffer).as_ref().len() as u64;
        let result = self.slot.connection().device.write(offset, buffer, Durability::OnFlush).await;
        match result {
            Ok(()) => {
                self.written.fetch_add(length, Relaxed);
                self.slot.connection().stats().bytes_written.fetch_add(length, Relaxed);
            }
            Err(error) => {
                self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
        self.conclude().await;
    }

    /// Lets go of the request; whoever does so last answers it, with success only if the device took every byte.
    pub(crate) async fn conclude(self: Arc<Self>) {
        let Some(Self { slot, request, durability, error, written }) = Arc::into_inner(self) else { return };
        let result = match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None if written.into_inner() != request.length => {
                Err(Error::new(ErrorKind::Io, "a part of the payload was not written"))
            }
            None if durability == Durability::BeforeReply => slot.connection().device.flush().await,
            None => Ok(()),
        };
        slot.answer(&request, result);
    }
}
