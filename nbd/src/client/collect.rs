//! Judging the replies to one request, without I/O: what may come, what must have come at the end, and the result.
//!
//! The server is taken for hostile: no byte lands outside the request, none twice, and a success without every byte is
//! none ("Structured reply types", "Request types: READ").
#![deny(clippy::indexing_slicing)]

use std::collections::BTreeMap;

use super::ClientError;
use crate::Extent;
use crate::transmission::Mode;
use crate::wire::Fields;
use crate::wire::reply::{ChunkType, ErrorChunk};

type Result<T, E = ClientError> = std::result::Result<T, E>;

/// Longest error chunk taken, in bytes: the longest text with a position.
const MAX_ERROR_PAYLOAD: u32 = 4096 + 14;
/// Longest status chunk taken, in bytes: 2^20 extents ("Structured reply types").
const MAX_STATUS_PAYLOAD: u32 = (8 << 20) + 4;
/// The same with extended headers.
const MAX_STATUS_EXT_PAYLOAD: u32 = (16 << 20) + 8;

/// Chunks "SHOULD" be cut at multiples of this many bytes; a server that sends many smaller ones in disorder only means to
/// cost memory.
const MIN_CHUNK: u64 = 512;
/// Disjoint ranges that any reply may have.
const SPARE_CHUNKS: u64 = 64;

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Nothing but an answer.
    Done,
    /// This much content.
    Content,
    /// Extents.
    Status {
        /// How many contexts there are.
        contexts: usize,
    },
}

/// The extents of one metadata context, from the start of the request on; none empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextExtents {
    /// The id that the server gave the context.
    pub context: u32,
    /// The extents; together they may be shorter or longer than the request.
    pub extents: Vec<Extent>,
}

/// What a request brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) content: Vec<u8>,
    pub(super) status: Vec<ContextExtents>,
}

/// How the payload of a chunk is to be received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// As a whole, this many bytes, then [`Collector::payload`].
    Small(u32),
    /// 8 bytes of offset, then this many straight into [`Collector::place`].
    Data(u32),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Collector {
    wanted: Wanted,
    mode: Mode,
    offset: u64,
    length: u64,
    /// Ranges of the content that have come, start to end, joined where one followed another; offsets within the request.
    covered: BTreeMap<u64, u64>,
    outcome: Outcome,
    error: Option<ClientError>,
}

impl Collector {
    pub(super) fn new(wanted: Wanted, mode: Mode, offset: u64, length: u64) -> Self {
        let (covered, outcome) = (BTreeMap::new(), Outcome::default());
        Self { wanted, mode, offset, length, covered, outcome, error: None }
    }

    /// A simple reply: the content to fill, if any. It is the whole reply.
    pub(super) fn simple(&mut self, errno: u32) -> Result<&mut [u8]> {
        if self.mode == Mode::Extended {
            return Err(ClientError::Protocol("a simple reply after extended headers were agreed"));
        }
        if self.mode == Mode::Structured && self.wanted == Wanted::Content {
            return Err(ClientError::Protocol("a simple reply to a READ after structured ones were agreed"));
        }
        if errno != 0 {
            self.error = Some(ClientError::Request { errno, text: String::new(), offset: None });
            return Ok(&mut []);
        }
        match self.wanted {
            Wanted::Done => Ok(&mut []),
            Wanted::Status { .. } => Err(ClientError::Protocol("a simple success for BLOCK_STATUS")),
            Wanted::Content => self.cover(0, self.length),
        }
    }

    /// The header of a chunk; `offset` is what an extended one echoes.
    pub(super) fn chunk(&self, kind: ChunkType, offset: Option<u64>, length: u64) -> Result<Payload> {
        let wrong = |text| Err(ClientError::Protocol(text));
        match (self.mode, offset) {
            (Mode::Structured, None) => {}
            (Mode::Extended, Some(offset)) if offset == self.offset => {}
            (Mode::Extended, Some(_)) => return wrong("a chunk that echoes another offset"),
            _ => return wrong("a reply of a form that was not agreed"),
        }
        let Ok(length) = u32::try_from(length) else { return wrong("a chunk of impossible length") };
        if kind.is_error() {
            return if length <= MAX_ERROR_PAYLOAD { Ok(Payload::Small(length)) } else { wrong("an error too long") };
        }
        match (kind, self.wanted) {
            (ChunkType::NONE, _) if length == 0 => Ok(Payload::Small(0)),
            (ChunkType::OFFSET_DATA, Wanted::Content) => match length.checked_sub(8) {
                Some(data) if data > 0 && u64::from(data) <= self.length => Ok(Payload::Data(data)),
                _ => wrong("a data chunk of impossible length"),
            },
            (ChunkType::OFFSET_HOLE, Wanted::Content) if length == 12 => Ok(Payload::Small(12)),
            (ChunkType::BLOCK_STATUS, Wanted::Status { .. })
                if self.mode == Mode::Structured && (12..=MAX_STATUS_PAYLOAD).contains(&length) =>
            {
                Ok(Payload::Small(length))
            }
            (ChunkType::BLOCK_STATUS_EXT, Wanted::Status { .. })
                if self.mode == Mode::Extended && (24..=MAX_STATUS_EXT_PAYLOAD).contains(&length) =>
            {
                Ok(Payload::Small(length))
            }
            _ => wrong("a chunk that is unknown, misplaced or of impossible length"),
        }
    }

    /// The small payload of a chunk.
    pub(super) fn payload(&mut self, kind: ChunkType, payload: &[u8]) -> Result<()> {
        if kind.is_error() {
            let ErrorChunk { errno, text, position } =
                ErrorChunk::decode(kind, payload).ok_or(ClientError::Protocol("an error chunk is not well formed"))?;
            let outside = |at: u64| at < self.offset || at - self.offset >= self.length;
            if position.is_some_and(outside) {
                return Err(ClientError::Protocol("an error outside the request"));
            }
            self.error.get_or_insert(ClientError::Request { errno, text, offset: position });
            return Ok(());
        }
        match kind {
            ChunkType::OFFSET_HOLE => {
                let mut fields = Fields(payload);
                let hole = fields.u64().zip(fields.u32()).filter(|(_, length)| *length > 0);
                let (offset, length) = hole.ok_or(ClientError::Protocol("an empty hole"))?;
                self.place(offset, length)?.fill(0);
                Ok(())
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => self.status(kind, payload),
            _ => Ok(()),
        }
    }

    /// Where `length` bytes at this offset of the export belong.
    pub(super) fn place(&mut self, offset: u64, length: u32) -> Result<&mut [u8]> {
        let start = offset.checked_sub(self.offset).ok_or(ClientError::Protocol("content before the request"))?;
        self.cover(start, u64::from(length))
    }

    fn cover(&mut self, start: u64, length: u64) -> Result<&mut [u8]> {
        let end = start.checked_add(length).filter(|end| *end <= self.length);
        let end = end.ok_or(ClientError::Protocol("content behind the request"))?;
        let most = self.length / MIN_CHUNK + SPARE_CHUNKS;
        let overlaps = |(_, to): (&u64, &u64)| start < *to;
        if self.covered.range(..end).next_back().is_some_and(overlaps) {
            return Err(ClientError::Protocol("content that came before"));
        }
        if self.covered.len() as u64 >= most {
            return Err(ClientError::Protocol("content in crumbs"));
        }
        match self.covered.range_mut(..end).next_back() {
            Some((_, to)) if *to == start => *to = end,
            _ => _ = self.covered.insert(start, end),
        }
        // Only now, so that a request which fails costs no memory.
        let size = usize::try_from(self.length).map_err(|_| ClientError::Unsendable("more than this machine holds"))?;
        if self.outcome.content.len() != size {
            self.outcome.content = vec![0; size];
        }
        let range = usize::try_from(start).unwrap_or(usize::MAX)..usize::try_from(end).unwrap_or(usize::MAX);
        self.outcome.content.get_mut(range).ok_or(ClientError::Protocol("content behind the request"))
    }

    fn status(&mut self, kind: ChunkType, payload: &[u8]) -> Result<()> {
        let wrong = ClientError::Protocol("a status chunk is not well formed");
        let wide = kind == ChunkType::BLOCK_STATUS_EXT;
        let mut fields = Fields(payload);
        let Some(context) = fields.u32() else { return Err(wrong) };
        if self.outcome.status.iter().any(|status| status.context == context) {
            return Err(ClientError::Protocol("two status chunks for one context"));
        }
        let Wanted::Status { contexts } = self.wanted else { return Err(wrong) };
        if self.outcome.status.len() >= contexts {
            return Err(ClientError::Protocol("a status for a context that was not negotiated"));
        }
        let count = if wide { fields.u32() } else { None };
        let mut extents = Vec::with_capacity(fields.0.len() / if wide { 16 } else { 8 });
        let mut before_last = 0;
        let mut sum = 0u64;
        loop {
            let pair = if wide {
                fields.u64().zip(fields.u64())
            } else {
                fields.u32().zip(fields.u32()).map(|(length, status)| (u64::from(length), u64::from(status)))
            };
            let Some((length, status)) = pair else { break };
            if length == 0 {
                return Err(ClientError::Protocol("an empty extent"));
            }
            before_last = sum;
            sum = sum.checked_add(length).ok_or(ClientError::Protocol("extents longer than any disk"))?;
            extents.push(Extent { length, status });
        }
        let counted = count.is_none_or(|count| usize::try_from(count) == Ok(extents.len()));
        if !fields.is_empty() || extents.is_empty() || !counted {
            return Err(wrong);
        }
        if before_last >= self.length {
            return Err(ClientError::Protocol("an extent that starts behind the request"));
        }
        self.outcome.status.push(ContextExtents { context, extents });
        Ok(())
    }

    /// The reply is complete: the result of the request, or the rule that was broken.
    pub(super) fn finish(mut self) -> Result<Result<Outcome>> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        let came: u64 = self.covered.iter().map(|(from, to)| to - from).sum();
        match self.wanted {
            Wanted::Content if came != self.length => Err(ClientError::Protocol("a success without all the content")),
            Wanted::Status { .. } if self.outcome.status.is_empty() => {
                Err(ClientError::Protocol("a success without a status"))
            }
            _ => Ok(Ok(std::mem::take(&mut self.outcome))),
        }
    }
}
