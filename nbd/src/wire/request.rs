//! The request header of the transmission phase, as bytes. What a request may ask is [`crate::transmission`]'s business.
#![deny(clippy::indexing_slicing)]

use super::{Command, CommandFlags, Fields, REQUEST};

/// Length of a compact request header in bytes.
pub const COMPACT_LENGTH: usize = 28;

/// A request as it came: `0:4 magic, 4:2 flags, 6:2 type, 8:8 cookie, 16:8 offset, 24:4 length` ("Request message").
/// Nothing in it has been checked.
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
    /// Bytes: of payload for WRITE, of effect otherwise. 32 bits on the compact wire.
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

    /// Writes a compact header; `None` if the length needs more than 32 bits.
    pub fn encode_compact(&self) -> Option<[u8; COMPACT_LENGTH]> {
        let length = u32::try_from(self.length).ok()?;
        let mut bytes = [0; COMPACT_LENGTH];
        let mut rest = bytes.as_mut_slice();
        for field in [
            &REQUEST.to_be_bytes()[..],
            &self.flags.0.to_be_bytes(),
            &self.command.0.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &length.to_be_bytes(),
        ] {
            let (place, behind) = rest.split_at_mut_checked(field.len())?;
            place.copy_from_slice(field);
            rest = behind;
        }
        Some(bytes)
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
            *b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00"
        );
        assert_eq!(Request::decode_compact(&bytes), Some(request));
    }

    #[test]
    fn any_other_magic_is_refused() {
        for magic in [0x2560_9514u32, 0x1256_0953, 0x21e4_1c71, 0] {
            let mut bytes = [0; COMPACT_LENGTH];
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            assert_eq!(Request::decode_compact(&bytes), None);
        }
    }

    #[test]
    fn a_length_beyond_32_bits_has_no_compact_form() {
        let request = Request { flags: CommandFlags(0), command: Command::TRIM, cookie: 0, offset: 0, length: 1 << 32 };
        assert_eq!(request.encode_compact(), None);
    }
}
