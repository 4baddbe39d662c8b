//! The request header of the transmission phase, as bytes. What a request may ask is [`crate::transmission`]'s business.
#![deny(clippy::indexing_slicing)]

use super::{Command, CommandFlags, EXTENDED_REQUEST, Fields, REQUEST};

/// Length of a compact request header in bytes.
pub const COMPACT_LENGTH: usize = 28;
/// Length of an extended request header in bytes.
pub const EXTENDED_LENGTH: usize = 32;

/// A request as it came: `0:4 magic, 4:2 flags, 6:2 type, 8:8 cookie, 16:8 offset, 24 length` ("Request message"). The
/// length has 4 bytes in a compact header and 8 in an extended one. Nothing in it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags, any bits.
    pub flags: CommandFlags,
    /// Command, any number.
    pub command: Command,
    /// Opaque; echoed in the reply. Equal cookies in flight are legal.
    pub cookie: u64,
    /// First byte of the export.
    pub offset: u64,
    /// Bytes: of payload for WRITE and for whatever has `PAYLOAD_LEN` in an extended header, of effect otherwise.
    pub length: u64,
}

impl Request {
    /// Reads a compact header; `None` if the magic is wrong, after which the stream is lost.
    pub fn decode_compact(bytes: &[u8; COMPACT_LENGTH]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == REQUEST).then_some(())?;
        Some(Self {
            flags: CommandFlags(fields.u16()?),
            command: Command(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: u64::from(fields.u32()?),
        })
    }

    /// Reads an extended header; `None` if the magic is wrong, after which the stream is lost.
    pub fn decode_extended(bytes: &[u8; EXTENDED_LENGTH]) -> Option<Self> {
        let mut fields = Fields(bytes);
        (fields.u32()? == EXTENDED_REQUEST).then_some(())?;
        Some(Self {
            flags: CommandFlags(fields.u16()?),
            command: Command(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u64()?,
        })
    }

    /// Writes a compact header; `None` if the length needs more than 32 bits.
    pub fn encode_compact(&self) -> Option<Vec<u8>> {
        let length = u32::try_from(self.length).ok()?;
        Some([&self.front(REQUEST)[..], &length.to_be_bytes()].concat())
    }

    /// Writes an extended header.
    pub fn encode_extended(&self) -> Vec<u8> {
        [&self.front(EXTENDED_REQUEST)[..], &self.length.to_be_bytes()].concat()
    }

    /// What both headers begin with.
    fn front(&self, magic: u32) -> Vec<u8> {
        let mut out = Vec::with_capacity(EXTENDED_LENGTH);
        out.extend(magic.to_be_bytes());
        out.extend(self.flags.0.to_be_bytes());
        out.extend(self.command.0.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        out
    }
}

/// The payload of a BLOCK_STATUS with `PAYLOAD_LEN`: `0:8 effect length, then n x 4 context id`.
#[derive(Clone, Copy, Debug)]
pub struct StatusFilter<'a> {
    /// Bytes of the export that the request is about.
    pub length: u64,
    ids: Fields<'a>,
}

impl<'a> StatusFilter<'a> {
    /// Reads a payload; `None` if it is not 8 + 4n bytes long.
    pub fn decode(payload: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let length = fields.u64()?;
        payload.len().is_multiple_of(4).then_some(Self { length, ids: fields })
    }

    /// The contexts asked for, in the order sent.
    pub fn ids(&self) -> impl Iterator<Item = u32> + use<'a> {
        let mut fields = self.ids;
        std::iter::from_fn(move || fields.u32())
    }

    /// Writes a payload, for the client side.
    pub fn encode(length: u64, ids: &[u32]) -> Vec<u8> {
        length.to_be_bytes().into_iter().chain(ids.iter().flat_map(|id| id.to_be_bytes())).collect()
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_bytes_of_the_specification() {
        let request = Request {
            flags: CommandFlags::FUA,
            command: Command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            length: 0x200,
        };
        let bytes = request.encode_compact().unwrap();
        assert_eq!(
            bytes,
            b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00"
        );
        assert_eq!(Request::decode_compact(bytes.as_slice().try_into().unwrap()), Some(request));
        let bytes = request.encode_extended();
        assert_eq!(
            bytes,
            b"\x21\xe4\x1c\x71\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00\x02\x00"
        );
        assert_eq!(Request::decode_extended(bytes.as_slice().try_into().unwrap()), Some(request));
    }

    #[test]
    fn a_status_filter_is_a_length_and_context_ids() {
        let payload = StatusFilter::encode(1 << 33, &[1, 7]);
        assert_eq!(payload, [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7]);
        let filter = StatusFilter::decode(&payload).unwrap();
        assert_eq!((filter.length, filter.ids().collect::<Vec<_>>()), (1 << 33, vec![1, 7]));
        for length in [0, 4, 7, 9, 11, 13] {
            assert!(StatusFilter::decode(&[0; 16][..length]).is_none(), "{length} bytes");
        }
    }

    #[test]
    fn any_other_magic_is_refused() {
        for magic in [0x2560_9514u32, 0x1256_0953, 0x21e4_1c71, 0] {
            let mut bytes = [0; COMPACT_LENGTH];
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            assert_eq!(Request::decode_compact(&bytes), None);
        }
        for magic in [REQUEST, 0x6e8a_278c, 0] {
            let mut bytes = [0; EXTENDED_LENGTH];
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            assert_eq!(Request::decode_extended(&bytes), None);
        }
    }

    #[test]
    fn a_length_beyond_32_bits_has_no_compact_form() {
        let request = Request { flags: CommandFlags(0), command: Command::TRIM, cookie: 0, offset: 0, length: 1 << 32 };
        assert_eq!(request.encode_compact(), None);
    }
}
