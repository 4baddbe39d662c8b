//! The transmission phase without I/O: what a request may ask in the state that was negotiated, and which reply it gets.
//!
//! [`check`] turns any header with the right magic into a [`Verdict`]; it is total. Running what it allows is the
//! session's work.
#![deny(clippy::indexing_slicing)]

use crate::wire::reply::{self, ChunkHeader, ChunkType, Head, Last};
use crate::wire::request::{Request, StatusFilter};
use crate::wire::{Command, CommandFlags, MAX_PAYLOAD, TransmissionFlags};
use crate::{Context, ContextSet, Durability, Error, ErrorKind, Extent, ZeroFlags};

/// The form of headers and replies that the handshake settled; it never changes within a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Simple replies only.
    #[default]
    Simple,
    /// Structured replies for READ, for BLOCK_STATUS and for errors.
    Structured,
    /// Extended request headers, and extended chunks for every reply.
    Extended,
}

/// The most extents asked of a device at once: 256 KiB of extended reply. Fewer than the client asked for is always legal.
pub const MAX_EXTENTS: usize = 16384;

/// What a request is checked against; fixed for the life of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export in bytes, below 2^63.
    pub size: u64,
    /// Whether the export refuses writes.
    pub read_only: bool,
    /// Whether FAST_ZERO is offered.
    pub fast_zero: bool,
    /// The form of headers and replies.
    pub mode: Mode,
    /// What BLOCK_STATUS tells.
    pub contexts: ContextSet,
}

impl Terms {
    /// The transmission flags of INFO, GO and EXPORT_NAME. One function for the three, since their answers must agree.
    pub fn flags(&self) -> TransmissionFlags {
        use TransmissionFlags as F;
        let all = F::HAS_FLAGS.with(F::SEND_FLUSH).with(F::SEND_FUA).with(F::CAN_MULTI_CONN).with(F::SEND_CACHE);
        let all = if self.mode == Mode::Simple { all } else { all.with(F::SEND_DF) };
        let all = if self.filters_status() { all.with(F::BLOCK_STATUS_PAYLOAD) } else { all };
        if self.read_only {
            return all.with(F::READ_ONLY);
        }
        let all = all.with(F::SEND_TRIM).with(F::SEND_WRITE_ZEROES);
        if self.fast_zero { all.with(F::SEND_FAST_ZERO) } else { all }
    }

    /// Whether a BLOCK_STATUS may name contexts in a payload.
    fn filters_status(&self) -> bool {
        self.mode == Mode::Extended && self.contexts != ContextSet::NONE
    }

    /// Which flags a command may carry ("Command flags"); `None` for a command that does not exist.
    fn legal_flags(&self, command: Command) -> Option<CommandFlags> {
        let extra = match command {
            Command::READ if self.mode != Mode::Simple => CommandFlags::DF,
            Command::WRITE if self.mode == Mode::Extended => CommandFlags::PAYLOAD_LEN,
            Command::READ | Command::WRITE | Command::FLUSH | Command::TRIM | Command::CACHE => CommandFlags(0),
            // FAST_ZERO is bound to a transmission flag that a read-only export does not send.
            Command::WRITE_ZEROES if self.read_only || !self.fast_zero => CommandFlags::NO_HOLE,
            Command::WRITE_ZEROES => CommandFlags::NO_HOLE.with(CommandFlags::FAST_ZERO),
            Command::BLOCK_STATUS if self.filters_status() => CommandFlags::REQ_ONE.with(CommandFlags::PAYLOAD_LEN),
            Command::BLOCK_STATUS => CommandFlags::REQ_ONE,
            _ => return None,
        };
        Some(CommandFlags::FUA.with(extra))
    }
}

/// Whether new requests are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// They are.
    Open,
    /// The server is stopping: they are answered ESHUTDOWN.
    ShuttingDown,
}

/// How the content of a READ travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Behind one header: a simple reply, or one chunk because of DF.
    Whole,
    /// In as many chunks as there are pieces.
    Pieces,
}

/// A request that may run. Ranges are inside the export and not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Read.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// One header or many.
        shape: Shape,
    },
    /// Write the payload that follows.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes, at most [`MAX_PAYLOAD`].
        length: u32,
        /// FUA or not.
        durability: Durability,
    },
    /// Write zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// How.
        flags: ZeroFlags,
        /// FUA or not.
        durability: Durability,
    },
    /// Discard.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// FUA or not.
        durability: Durability,
    },
    /// Make durable what was answered.
    Flush,
    /// Tell the device that this will be read.
    Cache {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Tell extents.
    Status {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The most extents to tell of each context.
        max: usize,
        /// Of which contexts; not empty.
        contexts: ContextSet,
    },
    /// Receive this many bytes of payload, then ask [`filtered_status`].
    StatusFilter {
        /// At most [`MAX_STATUS_FILTER`].
        payload: usize,
    },
    /// Nothing to do but to answer: an empty range.
    Nothing,
}

/// What becomes of a request that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aftermath {
    /// Drop this many bytes of payload, answer, go on.
    Drain(u32),
    /// Answer and close: there is more payload than anyone wants to read.
    Close,
}

/// What to do about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Run it.
    Run(Task),
    /// Answer with an error.
    Fail(Error, Aftermath),
    /// The client says goodbye: no answer, whatever else the header held.
    Disconnect,
}

/// Judges a request. The order is part of the contract, so that every wrong request has one answer: disconnect, shutting
/// down, command, flags, read-only, contexts, payload length, range.
pub fn check(terms: &Terms, request: &Request, admission: Admission) -> Verdict {
    if request.command == Command::DISC {
        return Verdict::Disconnect;
    }
    match judge(terms, request, admission) {
        Ok(task) => Verdict::Run(task),
        Err(error) => match u32::try_from(payload_length(terms.mode, request)) {
            Ok(length) if length <= MAX_PAYLOAD => Verdict::Fail(error, Aftermath::Drain(length)),
            _ => Verdict::Fail(error, Aftermath::Close),
        },
    }
}

/// How many bytes follow the header. Extended headers say it with `PAYLOAD_LEN`, except that QEMU (seen up to 10.0) leaves the
/// flag out of its WRITEs and sends the payload all the same.
pub fn payload_length(mode: Mode, request: &Request) -> u64 {
    let announced = mode == Mode::Extended && request.flags.contains(CommandFlags::PAYLOAD_LEN);
    if announced || request.command == Command::WRITE { request.length } else { 0 }
}

/// The longest payload of a BLOCK_STATUS that can be right, in bytes: with more ids than there are contexts, one is unknown or
/// comes twice.
pub const MAX_STATUS_FILTER: usize = 8 + 4 * Context::ALL.len();

/// What a BLOCK_STATUS whose payload has arrived asks for. Ids that come twice, that were not negotiated, or that are missing
/// altogether are [`ErrorKind::Invalid`].
pub fn filtered_status(terms: &Terms, request: &Request, payload: &[u8]) -> Result<Task, Error> {
    let invalid = |text| Error::new(ErrorKind::Invalid, text);
    let filter = StatusFilter::decode(payload).ok_or_else(|| invalid("the payload is not 8 + 4n bytes long"))?;
    let mut contexts = ContextSet::NONE;
    for id in filter.ids() {
        let context = terms.contexts.iter().find(|context| context.id() == id && !contexts.contains(*context));
        let context = context.ok_or_else(|| invalid("a context id is unknown or comes twice"))?;
        contexts = contexts.iter().chain([context]).collect();
    }
    if contexts == ContextSet::NONE {
        return Err(invalid("the payload names no context"));
    }
    check_range(terms, &Request { length: filter.length, ..*request })?;
    status_task(request, filter.length, contexts)
}

fn check_range(terms: &Terms, request: &Request) -> Result<(), Error> {
    let Request { command, offset, length, .. } = *request;
    if offset.checked_add(length).is_some_and(|end| end <= terms.size) {
        return Ok(());
    }
    let writes = matches!(command, Command::WRITE | Command::WRITE_ZEROES);
    let kind = if writes { ErrorKind::NoSpace } else { ErrorKind::Invalid };
    let size = terms.size;
    Err(Error::new(kind, format!("offset {offset} + length {length} is past the size {size}")))
}

fn status_task(request: &Request, length: u64, contexts: ContextSet) -> Result<Task, Error> {
    if length == 0 {
        return Err(Error::new(ErrorKind::Invalid, "no extent can describe an empty range"));
    }
    let max = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { MAX_EXTENTS };
    Ok(Task::Status { offset: request.offset, length, max, contexts })
}

fn judge(terms: &Terms, request: &Request, admission: Admission) -> Result<Task, Error> {
    use ErrorKind::{Invalid, NotPermitted, Overflow, Shutdown};
    let Request { flags, command, offset, length, .. } = *request;
    if admission == Admission::ShuttingDown {
        return Err(Error::new(Shutdown, "the server is shutting down"));
    }
    let legal = terms.legal_flags(command).ok_or_else(|| {
        let Command(number) = command;
        Error::new(Invalid, format!("there is no command {number}"))
    })?;
    let CommandFlags(wrong) = flags.beyond(legal);
    if wrong != 0 {
        return Err(Error::new(Invalid, format!("flags {wrong:#06x} are not legal for this command")));
    }
    if terms.read_only && matches!(command, Command::WRITE | Command::WRITE_ZEROES | Command::TRIM) {
        return Err(Error::new(NotPermitted, "the export is read-only"));
    }
    if command == Command::BLOCK_STATUS && terms.contexts == ContextSet::NONE {
        return Err(Error::new(Invalid, "no metadata context was negotiated for this export"));
    }
    if command == Command::BLOCK_STATUS && flags.contains(CommandFlags::PAYLOAD_LEN) {
        return match usize::try_from(length) {
            Ok(payload) if payload <= MAX_STATUS_FILTER => Ok(Task::StatusFilter { payload }),
            _ => Err(Error::new(Invalid, "the payload names more contexts than there are")),
        };
    }
    let unfragmented = flags.contains(CommandFlags::DF);
    let too_long = |kind, most| Err(Error::new(kind, format!("{length} bytes are more than {most}")));
    match command {
        Command::WRITE if length > u64::from(MAX_PAYLOAD) => return too_long(Invalid, MAX_PAYLOAD),
        Command::READ if length > u64::from(MAX_PAYLOAD) && terms.mode == Mode::Simple => {
            return too_long(Invalid, MAX_PAYLOAD);
        }
        Command::READ if length > u64::from(MAX_PAYLOAD) && unfragmented => return too_long(Overflow, MAX_PAYLOAD),
        Command::READ if length > u64::from(u32::MAX) => return too_long(Overflow, u32::MAX),
        _ => {}
    }
    if command != Command::FLUSH {
        check_range(terms, request)?;
    }
    let durability = if flags.contains(CommandFlags::FUA) { Durability::BeforeReply } else { Durability::OnFlush };
    Ok(match command {
        Command::FLUSH => Task::Flush,
        Command::BLOCK_STATUS => status_task(request, length, terms.contexts)?,
        _ if length == 0 => Task::Nothing,
        Command::READ if terms.mode == Mode::Simple || unfragmented => {
            Task::Read { offset, length, shape: Shape::Whole }
        }
        Command::READ => Task::Read { offset, length, shape: Shape::Pieces },
        Command::WRITE => {
            let length = u32::try_from(length).unwrap_or(MAX_PAYLOAD);
            Task::Write { offset, length, durability }
        }
        Command::TRIM => Task::Trim { offset, length, durability },
        Command::WRITE_ZEROES => {
            let flags = ZeroFlags {
                no_hole: flags.contains(CommandFlags::NO_HOLE),
                fast: flags.contains(CommandFlags::FAST_ZERO),
            };
            Task::Zero { offset, length, flags, durability }
        }
        Command::CACHE => Task::Cache { offset, length },
        _ => return Err(Error::new(Invalid, "the command is not known")),
    })
}

/// The end of the first piece of `offset..end`: pieces end at multiples of `piece` (a power of two), except that a range
/// of at most one piece is never cut.
pub fn piece_end(offset: u64, end: u64, piece: u32) -> u64 {
    let piece = u64::from(piece);
    if end - offset <= piece { end } else { (offset | (piece - 1)) + 1 }
}

/// The header of the chunks that answer a request; `None` in simple mode, which has none.
pub fn chunk_header(mode: Mode, request: &Request) -> Option<ChunkHeader> {
    let Request { cookie, offset, .. } = *request;
    match mode {
        Mode::Simple => None,
        Mode::Structured => Some(ChunkHeader::Structured { cookie }),
        Mode::Extended => Some(ChunkHeader::Extended { cookie, offset }),
    }
}

/// The reply to a request that succeeded and has no content.
pub fn success(mode: Mode, request: &Request) -> Head {
    match chunk_header(mode, request) {
        // A READ always gets chunks once they were negotiated; other replies without payload may stay simple. With extended
        // headers no reply is simple.
        Some(header) if mode == Mode::Extended || request.command == Command::READ => {
            header.chunk(ChunkType::NONE, Last::Yes, 0)
        }
        _ => reply::simple(request.cookie, 0),
    }
}

/// The reply to a request that failed: the header and, unless it is a simple one, its payload. A position is told only where
/// the protocol has a use for it, in a READ, and only inside the request.
pub fn failure(mode: Mode, request: &Request, error: &Error) -> (Head, Vec<u8>) {
    let errno = error.kind.errno();
    let Some(header) = chunk_header(mode, request) else { return (reply::simple(request.cookie, errno), Vec::new()) };
    let inside = |at: &u64| *at >= request.offset && *at - request.offset < request.length;
    let position = error.offset.filter(|at| request.command == Command::READ && inside(at));
    let kind = if position.is_some() { ChunkType::ERROR_OFFSET } else { ChunkType::ERROR };
    let payload = reply::error_payload(errno, &error.text, position);
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    (header.chunk(kind, Last::Yes, length), payload)
}

/// Makes the extents of a device fit for a reply: equal neighbours joined, the last one cut at the end of the request, at
/// most `max`. An answer that breaks the contract of [`crate::Device::extents`] is an error of the device.
pub fn plan_status(length: u64, max: usize, extents: &[Extent]) -> Result<Vec<Extent>, Error> {
    let mut planned: Vec<Extent> = Vec::with_capacity(extents.len().min(max));
    let mut left = length;
    for extent in extents {
        if extent.length == 0 {
            return Err(Error::new(ErrorKind::Io, "the device told of an empty extent"));
        }
        let taken = extent.length.min(left);
        if taken == 0 {
            break;
        }
        left -= taken;
        let full = planned.len() == max;
        match planned.last_mut() {
            Some(last) if last.status == extent.status => last.length += taken,
            _ if full => break,
            _ => planned.push(Extent { length: taken, status: extent.status }),
        }
    }
    if planned.is_empty() { Err(Error::new(ErrorKind::Io, "the device told of no extent")) } else { Ok(planned) }
}
