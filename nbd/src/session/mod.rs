//! The transmission phase over any stream: a reader, the requests under way, and a writer of its own, so that replies
//! nobody collects do not keep WRITE payload from coming in.
//!
//! ```text
//!  socket ─► Intake ─► check ─► device call (to its end, whatever becomes of the client)
//!                                    │
//!  socket ◄─ send ◄── Flight: slots and queued frames
//! ```
//! Knows no TCP and no handshake. Memory: a permit of the budget before each payload, and a fixed number of slots.

mod execute;
mod flight;
mod intake;
mod outgoing;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::execute::{LongWrite, charged, launch};
use self::flight::{Flight, Unwanted};
use self::intake::{Dry, Intake};
use self::outgoing::Frame;
use crate::budget::{Budget, Line, Permit, Share};
use crate::limits::Limits;
use crate::stats::{Counters, Seat};
use crate::transmission::{
    Admission, Aftermath, MAX_STATUS_FILTER, Mode, Task, Terms, Verdict, check, failure, filtered_status, piece_end,
    success,
};
use crate::wire::reply::Last;
use crate::wire::request::{COMPACT_LENGTH, EXTENDED_LENGTH, Request};
use crate::wire::{Command, CommandFlags};
use crate::{Device, Durability, Error, ErrorKind};

/// How far a server has come in stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// It serves.
    Running,
    /// New requests are answered ESHUTDOWN, those under way are waited for.
    Draining,
    /// Those under way are answered ESHUTDOWN.
    Cut,
}

/// Waits until the server has come as far as `phase`. A server that is gone altogether has come to the end.
pub(crate) async fn reached(server: &mut watch::Receiver<Phase>, phase: Phase) {
    let _ = server.wait_for(|now| *now >= phase).await;
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The client said goodbye.
    Disconnected,
    /// The client went away without a word, or the socket failed.
    Gone,
    /// The client sent something that is not NBD.
    NotNbd,
    /// The client announced more payload than the protocol lets it.
    TooLong,
    /// The client stopped in the middle of a message, or did not collect its replies.
    Stalled,
    /// A device call panicked.
    Broken,
    /// The server is stopping.
    Stopped,
}

/// What the reader, the requests and the writer of one connection share.
pub(crate) struct Connection {
    device: Arc<dyn Device>,
    terms: Terms,
    limits: Arc<Limits>,
    input: Arc<Share>,
    output: Arc<Share>,
    flight: Flight,
    seat: Seat,
    /// [`Limits::piece_bytes`], as far as the budget allows.
    piece: u32,
}

impl Connection {
    pub(crate) fn new(
        device: Arc<dyn Device>,
        terms: Terms,
        limits: Arc<Limits>,
        budget: &Budget,
        seat: Seat,
    ) -> Arc<Self> {
        let input = Share::new(&budget.input, limits.input_bytes);
        let output = Share::new(&budget.output, limits.output_bytes);
        let flight = Flight::new(limits.requests_in_flight.max(1));
        // A power of two that the budget can give.
        let piece = 1 << limits.piece_bytes.min(input.largest()).max(1).ilog2();
        Arc::new(Self { device, terms, limits, input, output, flight, seat, piece })
    }

    fn stats(&self) -> &Counters {
        self.seat.counters()
    }

    /// Answers what is under way with ESHUTDOWN.
    fn cut(&self) {
        let answered = self.flight.cut(self.terms.mode);
        self.stats().failed(ErrorKind::Shutdown, answered);
    }

    /// What a buffer for a piece or less costs of the budget, in bytes.
    fn cost(&self, length: u32) -> u32 {
        let memory = u32::try_from(self.device.buffer_memory(length as usize)).unwrap_or(u32::MAX);
        // More than there can ever be would be waited for for ever.
        memory.min(self.input.largest()).max(length)
    }
}

/// The place of one request in its connection; see [`Flight`].
pub(crate) struct Slot {
    connection: Arc<Connection>,
    index: usize,
}

impl Slot {
    fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Queues a part of the reply; an error means that nobody wants the rest.
    fn send(&self, frame: Frame) -> Result<(), Unwanted> {
        self.connection.flight.push(self.index, frame, Last::No)
    }

    /// Queues the last part of the reply.
    fn finish(self, frame: Frame) {
        let (connection, index) = (self.connection.clone(), self.index);
        // The frame takes the slot with it: sent or unwanted, both go together.
        let _ = connection.flight.push(index, frame.with_slot(self), Last::Yes);
    }

    /// Whether the request still waits for an answer that somebody can get.
    fn is_wanted(&self) -> bool {
        self.connection.flight.is_wanted(self.index)
    }

    /// Answers a request without content.
    fn answer(self, request: &Request, result: Result<(), Error>) {
        let mode = self.connection.terms.mode;
        let frame = match result {
            Ok(()) => Frame::new(success(mode, request)),
            Err(error) => {
                // Before the client can know. Nobody hears what comes after a cut.
                self.connection.stats().failed(error.kind, self.is_wanted().into());
                tracing::debug!(command = request.command.0, kind = ?error.kind, %error, "request failed");
                let (head, body) = failure(mode, request, &error);
                Frame::new(head).with_body(body)
            }
        };
        self.finish(frame);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let (operation, began) = self.connection.flight.end(self.index);
        self.connection.stats().ended(operation, began);
    }
}

/// Serves a connection until it ends. `rest` are the bytes that came behind the handshake.
///
/// # Cancellation
/// Dropping the future closes the connection; device calls that have begun run to their end.
pub(crate) async fn serve<R, W>(
    connection: Arc<Connection>,
    reader: R,
    writer: W,
    rest: &[u8],
    mut phase: watch::Receiver<Phase>,
) -> Ending
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let limits = connection.limits.clone();
    let mut intake = Intake::new(reader, rest, limits.stall_deadline);
    let sender = connection.clone();
    let mut writer = Leash(tokio::spawn(async move { outgoing::send(&sender, writer).await }));
    let _guard = KillOnDrop(connection.clone());

    let mut ending = tokio::select! {
        biased;
        cause = connection.flight.dead() => cause,
        ending = stopping(&connection, phase.clone()) => ending,
        ending = receive(&connection, &mut intake, &phase) => ending,
    };
    // Others have nobody to talk to, or nobody worth talking to.
    let mut last_words = matches!(ending, Ending::Disconnected | Ending::TooLong | Ending::Stopped);
    if last_words {
        connection.flight.finish();
        let sent = tokio::select! {
            _ = &mut writer.0 => true,
            () = reached(&mut phase, Phase::Cut) => {
                connection.cut();
                timeout(limits.linger, &mut writer.0).await.is_ok()
            }
        };
        last_words = sent && !connection.flight.is_dead();
        if !last_words {
            ending = if sent { connection.flight.dead().await } else { Ending::Stalled };
        }
    }
    connection.flight.kill(ending);
    if ending == Ending::Stalled {
        connection.seat.stalled();
    }
    // The place in the export is free from here on, unless a device call still runs.
    drop((_guard, writer, connection));
    if last_words {
        let _ = timeout(limits.linger, intake.drain(limits.linger_bytes)).await;
    }
    ending
}

/// Ends the connection's writer and requests if the future that serves it is dropped or panics.
struct KillOnDrop(Arc<Connection>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.flight.kill(Ending::Broken);
    }
}

/// A task that ends with its owner.
struct Leash<T>(JoinHandle<T>);

impl<T> Drop for Leash<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits until the server stops and nothing is under way, or until it does not wait any longer.
async fn stopping(connection: &Connection, mut phase: watch::Receiver<Phase>) -> Ending {
    reached(&mut phase, Phase::Draining).await;
    tokio::select! {
        () = connection.flight.quiet() => {}
        // Here, and not later: a request whose payload is being received goes away with the reader.
        () = reached(&mut phase, Phase::Cut) => connection.cut(),
    }
    Ending::Stopped
}

/// Reads requests and starts them.
async fn receive<R: AsyncRead + Unpin>(
    connection: &Arc<Connection>,
    intake: &mut Intake<R>,
    phase: &watch::Receiver<Phase>,
) -> Ending {
    loop {
        match receive_one(connection, intake, phase).await {
            Ok(None) => {}
            Ok(Some(ending)) => return ending,
            Err(Dry::Gone) => return Ending::Gone,
            Err(Dry::Stalled) => return Ending::Stalled,
        }
    }
}

async fn receive_one<R: AsyncRead + Unpin>(
    connection: &Arc<Connection>,
    intake: &mut Intake<R>,
    phase: &watch::Receiver<Phase>,
) -> Result<Option<Ending>, Dry> {
    connection.flight.room().await;
    let request = match connection.terms.mode {
        Mode::Simple | Mode::Structured => Request::decode_compact(&intake.header::<COMPACT_LENGTH>().await?),
        Mode::Extended => Request::decode_extended(&intake.header::<EXTENDED_LENGTH>().await?),
    };
    let Some(request) = request else { return Ok(Some(Ending::NotNbd)) };
    let admission = match *phase.borrow() {
        Phase::Running => Admission::Open,
        Phase::Draining | Phase::Cut => Admission::ShuttingDown,
    };
    let verdict = check(&connection.terms, &request, admission);
    if verdict == Verdict::Disconnect {
        return Ok(Some(Ending::Disconnected));
    }
    let Some(index) = connection.flight.begin(request) else { return Ok(Some(Ending::Broken)) };
    connection.stats().requests.fetch_add(1, Relaxed);
    if connection.terms.mode == Mode::Extended
        && request.command == Command::WRITE
        && !request.flags.contains(CommandFlags::PAYLOAD_LEN)
    {
        connection.stats().writes_without_payload_flag.fetch_add(1, Relaxed);
    }
    let slot = Slot { connection: connection.clone(), index };
    match verdict {
        Verdict::Disconnect | Verdict::Run(Task::Nothing) => slot.answer(&request, Ok(())),
        Verdict::Run(Task::Write { offset, length, durability }) => {
            let mut line = Line::new(&connection.input, connection.cost(length.min(connection.piece)));
            let first = next_piece(connection, offset, offset + u64::from(length));
            let permit = line.next(connection.cost(first)).await;
            // In pieces, too, if memory is short and less than a piece was to be had.
            if first < length || permit.bytes() < first {
                long_write(intake, slot, request, length, durability, (permit, line)).await?;
            } else {
                // Nothing more is wanted, and a place in the queue that is not given up would get it.
                drop(line);
                let mut buffer = charged(connection.device.buffer(offset, length as usize), permit);
                intake.payload((*buffer).as_mut()).await?;
                launch(execute::write(slot, request, buffer, durability)).await;
            }
        }
        Verdict::Run(Task::StatusFilter { payload }) => {
            let mut bytes = [0; MAX_STATUS_FILTER];
            let bytes = &mut bytes[..payload];
            intake.payload(bytes).await?;
            match filtered_status(&connection.terms, &request, bytes) {
                Ok(task) => launch(execute::run(slot, request, task)).await,
                Err(error) => slot.answer(&request, Err(error)),
            }
        }
        Verdict::Run(task) => launch(execute::run(slot, request, task)).await,
        Verdict::Fail(error, Aftermath::Drain(payload)) => {
            intake.discard(payload).await?;
            slot.answer(&request, Err(error));
        }
        Verdict::Fail(error, Aftermath::Close) => {
            slot.answer(&request, Err(error));
            return Ok(Some(Ending::TooLong));
        }
    }
    Ok(None)
}

/// Length of the first piece of what is left of a range.
fn next_piece(connection: &Connection, at: u64, end: u64) -> u32 {
    // It fits 32 bits by the bound on its size.
    u32::try_from(piece_end(at, end, connection.piece) - at).unwrap_or(u32::MAX)
}

/// Receives a payload piece by piece; each piece is on its way to the device while the next one arrives.
async fn long_write<R: AsyncRead + Unpin>(
    intake: &mut Intake<R>,
    slot: Slot,
    request: Request,
    length: u32,
    durability: Durability,
    (first, mut line): (Permit, Line),
) -> Result<(), Dry> {
    let connection = slot.connection().clone();
    let write = LongWrite::new(slot, request, durability);
    let mut at = request.offset;
    let end = at + u64::from(length);
    let mut next_permit = Some(first);
    while at < end {
        if write.has_failed() {
            intake.discard(u32::try_from(end - at).unwrap_or(u32::MAX)).await?;
            break;
        }
        let permit = match next_permit.take() {
            Some(permit) => permit,
            None => line.next(connection.cost(next_piece(&connection, at, end))).await,
        };
        let next = piece_end(at, piece_end(at, end, connection.piece), permit.bytes());
        let bytes = usize::try_from(next - at).unwrap_or(usize::MAX);
        if next == end {
            line.leave();
        }
        let mut buffer = charged(connection.device.buffer(at, bytes), permit);
        intake.payload((*buffer).as_mut()).await?;
        launch(write.clone().piece(at, buffer)).await;
        at = next;
    }
    launch(write.conclude()).await;
    Ok(())
}
