//! Replies of the transmission phase, as bytes: simple replies, structured and extended chunks, both directions.
//! Which of them a request gets is [`crate::transmission`]'s business.
#![deny(clippy::indexing_slicing)]

use super::{EXTENDED_REPLY, Fields, MAX_ERROR_TEXT, SIMPLE_REPLY, STRUCTURED_REPLY, truncated};
use crate::Extent;

/// Length of a simple reply header in bytes.
pub const SIMPLE_LENGTH: usize = 16;
/// Length of a structured chunk header in bytes.
pub const CHUNK_LENGTH: usize = 20;
/// Length of an extended chunk header in bytes.
pub const EXTENDED_CHUNK_LENGTH: usize = 32;

/// A chunk type ("Structured reply types"), 16 bits; errors have the top bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkType(pub u16);

impl ChunkType {
    /// No payload; always the last chunk.
    pub const NONE: Self = Self(0);
    /// `0:8 offset, 8: data`.
    pub const OFFSET_DATA: Self = Self(1);
    /// `0:8 offset, 8:4 hole size`.
    pub const OFFSET_HOLE: Self = Self(2);
    /// `0:4 context id, then k x (4 length, 4 status)`.
    pub const BLOCK_STATUS: Self = Self(5);
    /// `0:4 context id, 4:4 count k, then k x (8 length, 8 status)`; extended headers only.
    pub const BLOCK_STATUS_EXT: Self = Self(6);
    /// `0:4 error, 4:2 message length m, 6:m message`.
    pub const ERROR: Self = Self(0x8001);
    /// `0:4 error, 4:2 message length m, 6:m message, 6+m:8 offset`.
    pub const ERROR_OFFSET: Self = Self(0x8002);

    /// Whether the chunk tells of a failure, also one of a type not known here.
    pub fn is_error(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

/// Whether a chunk ends its reply (`NBD_REPLY_FLAG_DONE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// More chunks follow.
    No,
    /// The reply is complete.
    Yes,
}

/// A header small enough to live in place, with the fixed fields behind it: at most an extended hole chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; EXTENDED_CHUNK_LENGTH + 12],
    length: u8,
}

impl Default for Head {
    fn default() -> Self {
        Self { bytes: [0; EXTENDED_CHUNK_LENGTH + 12], length: 0 }
    }
}

impl Head {
    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }

    fn push(&mut self, field: &[u8]) {
        let start = usize::from(self.length);
        if let Some(place) = self.bytes.get_mut(start..start + field.len()) {
            place.copy_from_slice(field);
            self.length += u8::try_from(field.len()).unwrap_or(0);
        }
    }
}

/// A simple reply: `0:4 magic, 4:4 error, 8:8 cookie` ("Simple reply message"). `errno` 0 is success.
pub fn simple(cookie: u64, errno: u32) -> Head {
    let mut head = Head::default();
    head.push(&SIMPLE_REPLY.to_be_bytes());
    head.push(&errno.to_be_bytes());
    head.push(&cookie.to_be_bytes());
    head
}

/// What the headers of all chunks of one reply have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkHeader {
    /// `0:4 magic, 4:2 flags, 6:2 type, 8:8 cookie, 16:4 payload length`.
    Structured {
        /// That of the request.
        cookie: u64,
    },
    /// `0:4 magic, 4:2 flags, 6:2 type, 8:8 cookie, 16:8 offset, 24:8 payload length`.
    Extended {
        /// That of the request.
        cookie: u64,
        /// That of the request, in every chunk.
        offset: u64,
    },
}

impl ChunkHeader {
    /// A chunk header; `payload_length` bytes follow.
    pub fn chunk(self, kind: ChunkType, last: Last, payload_length: u32) -> Head {
        let mut head = Head::default();
        let (magic, cookie) = match self {
            Self::Structured { cookie } => (STRUCTURED_REPLY, cookie),
            Self::Extended { cookie, .. } => (EXTENDED_REPLY, cookie),
        };
        head.push(&magic.to_be_bytes());
        head.push(&u16::from(last == Last::Yes).to_be_bytes());
        head.push(&kind.0.to_be_bytes());
        head.push(&cookie.to_be_bytes());
        match self {
            Self::Structured { .. } => head.push(&payload_length.to_be_bytes()),
            Self::Extended { offset, .. } => {
                head.push(&offset.to_be_bytes());
                head.push(&u64::from(payload_length).to_be_bytes());
            }
        }
        head
    }

    /// The header of an `OFFSET_DATA` chunk with the offset that starts its payload; `length` bytes of data follow.
    /// `0 < length <= u32::MAX - 8`.
    pub fn data(self, last: Last, offset: u64, length: u32) -> Head {
        let mut head = self.chunk(ChunkType::OFFSET_DATA, last, length.saturating_add(8));
        head.push(&offset.to_be_bytes());
        head
    }

    /// A whole `OFFSET_HOLE` chunk: `length` bytes from `offset` on read as zeroes. `length > 0`; it stays 32 bits wide in
    /// an extended reply.
    pub fn hole(self, last: Last, offset: u64, length: u32) -> Head {
        let mut head = self.chunk(ChunkType::OFFSET_HOLE, last, 12);
        head.push(&offset.to_be_bytes());
        head.push(&length.to_be_bytes());
        head
    }

    /// A status chunk: header and payload. In a structured reply lengths and status words have to fit 32 bits, which the
    /// planner and the contexts see to.
    pub fn status(self, last: Last, context: u32, extents: &[Extent]) -> (Head, Vec<u8>) {
        let mut out = Vec::with_capacity(8 + extents.len() * 16);
        out.extend(context.to_be_bytes());
        let kind = match self {
            Self::Structured { .. } => {
                let word = |value| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
                out.extend(extents.iter().flat_map(|extent| [word(extent.length), word(extent.status)]).flatten());
                ChunkType::BLOCK_STATUS
            }
            Self::Extended { .. } => {
                out.extend(u32::try_from(extents.len()).unwrap_or(u32::MAX).to_be_bytes());
                for extent in extents {
                    out.extend(extent.length.to_be_bytes());
                    out.extend(extent.status.to_be_bytes());
                }
                ChunkType::BLOCK_STATUS_EXT
            }
        };
        (self.chunk(kind, last, u32::try_from(out.len()).unwrap_or(u32::MAX)), out)
    }
}

/// The payload of an error chunk; the text is cut to [`MAX_ERROR_TEXT`]. With a position it belongs in `ERROR_OFFSET`,
/// without in `ERROR`.
pub fn error_payload(errno: u32, text: &str, position: Option<u64>) -> Vec<u8> {
    let text = truncated(text, MAX_ERROR_TEXT);
    let mut out = Vec::with_capacity(14 + text.len());
    out.extend(errno.to_be_bytes());
    out.extend(u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend(text.as_bytes());
    out.extend(position.into_iter().flat_map(u64::to_be_bytes));
    out
}

/// The first bytes of any reply, for the client side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply.
    Simple {
        /// 0 or an error number.
        errno: u32,
        /// The request it answers.
        cookie: u64,
    },
    /// A structured or extended chunk.
    Chunk {
        /// Flags as sent; bit 0 is DONE.
        flags: u16,
        /// What it holds.
        kind: ChunkType,
        /// The request it answers.
        cookie: u64,
        /// The offset of that request, in an extended chunk only.
        offset: Option<u64>,
        /// Bytes that follow, any value.
        length: u64,
    },
}

impl ReplyHeader {
    /// How many bytes the header with this magic has; `None` for a magic that is no reply.
    pub fn length_for(magic: u32) -> Option<usize> {
        match magic {
            SIMPLE_REPLY => Some(SIMPLE_LENGTH),
            STRUCTURED_REPLY => Some(CHUNK_LENGTH),
            EXTENDED_REPLY => Some(EXTENDED_CHUNK_LENGTH),
            _ => None,
        }
    }

    /// Reads a header of exactly the length [`ReplyHeader::length_for`] tells.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let header = match fields.u32()? {
            SIMPLE_REPLY => Self::Simple { errno: fields.u32()?, cookie: fields.u64()? },
            STRUCTURED_REPLY => Self::Chunk {
                flags: fields.u16()?,
                kind: ChunkType(fields.u16()?),
                cookie: fields.u64()?,
                offset: None,
                length: u64::from(fields.u32()?),
            },
            EXTENDED_REPLY => Self::Chunk {
                flags: fields.u16()?,
                kind: ChunkType(fields.u16()?),
                cookie: fields.u64()?,
                offset: Some(fields.u64()?),
                length: fields.u64()?,
            },
            _ => return None,
        };
        fields.is_empty().then_some(header)
    }
}

/// What an error chunk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// Not 0.
    pub errno: u32,
    /// For humans.
    pub text: String,
    /// Where, if the chunk is an `ERROR_OFFSET`.
    pub position: Option<u64>,
}

impl ErrorChunk {
    /// Reads the payload of an error chunk; `None` if its lengths do not add up or the error number is 0. Error types
    /// not known here are read as far as all error chunks agree ("Structured reply types").
    pub fn decode(kind: ChunkType, payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let errno = fields.u32().filter(|errno| *errno != 0)?;
        let length = fields.u16()?;
        let text = String::from_utf8_lossy(fields.bytes(u32::from(length))?).into_owned();
        let position = match kind {
            ChunkType::ERROR_OFFSET => Some(fields.u64()?),
            _ => None,
        };
        let known = matches!(kind, ChunkType::ERROR | ChunkType::ERROR_OFFSET);
        (fields.is_empty() || !known).then_some(Self { errno, text, position })
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_simple_reply_has_the_bytes_of_the_specification() {
        let head = simple(0x1122_3344_5566_7788, 22);
        assert_eq!(head.as_bytes(), b"\x67\x44\x66\x98\x00\x00\x00\x16\x11\x22\x33\x44\x55\x66\x77\x88");
        let expected = ReplyHeader::Simple { errno: 22, cookie: 0x1122_3344_5566_7788 };
        assert_eq!(ReplyHeader::decode(head.as_bytes()), Some(expected));
    }

    #[test]
    fn chunks_have_the_bytes_of_the_specification() {
        let structured = ChunkHeader::Structured { cookie: 7 };
        let head = structured.data(Last::Yes, 0x1000, 512);
        assert_eq!(
            head.as_bytes(),
            b"\x66\x8e\x33\xef\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x02\x08\x00\x00\x00\x00\x00\x00\x10\x00"
        );
        let header = ReplyHeader::decode(&head.as_bytes()[..CHUNK_LENGTH]).unwrap();
        let kind = ChunkType::OFFSET_DATA;
        assert_eq!(header, ReplyHeader::Chunk { flags: 1, kind, cookie: 7, offset: None, length: 520 });

        let extended = ChunkHeader::Extended { cookie: 7, offset: 0x800 };
        let head = extended.hole(Last::No, 0x1000, 0x200);
        assert_eq!(
            head.as_bytes(),
            b"\x6e\x8a\x27\x8c\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00"
        );
        let header = ReplyHeader::decode(&head.as_bytes()[..EXTENDED_CHUNK_LENGTH]).unwrap();
        let kind = ChunkType::OFFSET_HOLE;
        assert_eq!(header, ReplyHeader::Chunk { flags: 0, kind, cookie: 7, offset: Some(0x800), length: 12 });
    }

    #[test]
    fn error_chunks_are_read_back_and_their_text_is_bounded() {
        let long = "ä".repeat(4096);
        let payload = error_payload(28, &long, Some(4096));
        assert_eq!(payload.len(), 6 + MAX_ERROR_TEXT + 8);
        let error = ErrorChunk::decode(ChunkType::ERROR_OFFSET, &payload).unwrap();
        assert_eq!((error.errno, error.position, error.text.len()), (28, Some(4096), 512));
        assert_eq!(ErrorChunk::decode(ChunkType::ERROR, &payload), None, "8 bytes too many");
        assert_eq!(ErrorChunk::decode(ChunkType::ERROR, &error_payload(0, "", None)), None, "error 0");
        assert_eq!(ErrorChunk::decode(ChunkType::ERROR, &[0, 0, 0, 5, 0, 9]), None, "message longer than payload");
    }

    #[test]
    fn status_chunks_hold_the_context_and_pairs() {
        let extents = [Extent { length: 65536, status: 0 }, Extent { length: 512, status: 3 }];
        let (head, payload) = ChunkHeader::Structured { cookie: 1 }.status(Last::Yes, 1, &extents);
        assert_eq!(head, ChunkHeader::Structured { cookie: 1 }.chunk(ChunkType::BLOCK_STATUS, Last::Yes, 20));
        assert_eq!(payload, [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3]);
        let header = ChunkHeader::Extended { cookie: 1, offset: 0 };
        let (head, payload) = header.status(Last::No, 2, &[Extent { length: 1 << 40, status: 3 }]);
        assert_eq!(head, header.chunk(ChunkType::BLOCK_STATUS_EXT, Last::No, 24));
        assert_eq!(payload, [0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    }
}
