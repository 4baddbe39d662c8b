//! The numbers and byte layouts of the protocol: constants here, messages in [`option`], [`request`] and [`reply`].
//!
//! Everything on the wire is big-endian and unsigned ("Conventions"). Nothing in here does I/O, keeps time, panics, or
//! allocates by a length that came from the peer.
#![deny(clippy::indexing_slicing)]

pub mod option;
pub mod reply;
pub mod request;

/// First 8 bytes of a server ("Newstyle negotiation").
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second 8 bytes of a newstyle server, and the first of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// What an oldstyle server sends in its place; only a client ever meets it.
pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// First 8 bytes of an option reply ("Fixed newstyle negotiation").
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of a compact request ("Request message").
pub const REQUEST: u32 = 0x2560_9513;
/// First 4 bytes of a simple reply ("Simple reply message").
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// First 4 bytes of a structured reply chunk ("Structured reply chunk message").
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// First 4 bytes of an extended request ("Request message", extension `extended headers`).
pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// First 4 bytes of an extended reply chunk ("Extended reply chunk message").
pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// Server and client handshake flag: fixed newstyle ("Handshake flags").
pub const FIXED_NEWSTYLE: u16 = 0x1;
/// Server and client handshake flag: no 124 zeroes behind the answer to `EXPORT_NAME`.
pub const NO_ZEROES: u16 = 0x2;

/// Longest string a peer may send, in bytes ("Conventions").
pub const MAX_STRING: usize = 4096;
/// Longest error text this crate sends, in bytes: qemu drops a server whose error chunk has more than 1000.
pub const MAX_ERROR_TEXT: usize = 512;
/// Largest payload of one request or chunk that this server advertises and takes, in bytes.
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// Sizes are below this ("Size constraints" leaves it open; a signed 64-bit offset is what clients have).
pub const SIZE_LIMIT: u64 = 1 << 63;

macro_rules! flags {
    ($(#[$meta:meta])* $name:ident: $word:ty { $($(#[$flag_meta:meta])* $flag:ident = $value:expr;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $word);

        impl $name {
            $($(#[$flag_meta])* pub const $flag: Self = Self($value);)*

            /// Whether every bit of `other` is set.
            pub fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Both sets together.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The bits that `allowed` does not have.
            #[must_use]
            pub fn beyond(self, allowed: Self) -> Self {
                Self(self.0 & !allowed.0)
            }
        }
    };
}

flags! {
    /// What an export can do ("Transmission flags"), 16 bits, set by the server.
    TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0x0001;
        /// Writes are refused.
        READ_ONLY = 0x0002;
        /// `FLUSH` may be sent.
        SEND_FLUSH = 0x0004;
        /// The FUA flag may be sent.
        SEND_FUA = 0x0008;
        /// Seeks are dear.
        ROTATIONAL = 0x0010;
        /// `TRIM` may be sent.
        SEND_TRIM = 0x0020;
        /// `WRITE_ZEROES` may be sent, with `NO_HOLE`.
        SEND_WRITE_ZEROES = 0x0040;
        /// The DF flag may be sent.
        SEND_DF = 0x0080;
        /// All connections see one cache.
        CAN_MULTI_CONN = 0x0100;
        /// `CACHE` may be sent.
        SEND_CACHE = 0x0400;
        /// The `FAST_ZERO` flag may be sent.
        SEND_FAST_ZERO = 0x0800;
        /// `BLOCK_STATUS` may carry a payload that names contexts.
        BLOCK_STATUS_PAYLOAD = 0x1000;
    }
}

flags! {
    /// Flags of a request ("Command flags"), 16 bits, set by the client.
    CommandFlags: u16 {
        /// Durable before the reply.
        FUA = 0x01;
        /// Zeroes that keep their space.
        NO_HOLE = 0x02;
        /// One content chunk at most.
        DF = 0x04;
        /// One extent only.
        REQ_ONE = 0x08;
        /// Zeroes quickly or not at all.
        FAST_ZERO = 0x10;
        /// A payload follows (extended headers only).
        PAYLOAD_LEN = 0x20;
    }
}

/// A command number ("Request types"), 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

impl Command {
    /// `NBD_CMD_READ`.
    pub const READ: Self = Self(0);
    /// `NBD_CMD_WRITE`.
    pub const WRITE: Self = Self(1);
    /// `NBD_CMD_DISC`.
    pub const DISC: Self = Self(2);
    /// `NBD_CMD_FLUSH`.
    pub const FLUSH: Self = Self(3);
    /// `NBD_CMD_TRIM`.
    pub const TRIM: Self = Self(4);
    /// `NBD_CMD_CACHE`.
    pub const CACHE: Self = Self(5);
    /// `NBD_CMD_WRITE_ZEROES`.
    pub const WRITE_ZEROES: Self = Self(6);
    /// `NBD_CMD_BLOCK_STATUS`.
    pub const BLOCK_STATUS: Self = Self(7);
}

/// The front of `text`, at most `limit` bytes, cut between two characters.
pub fn truncated(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or_default()
}

/// Reads fields off the front of bytes that have already arrived; `None` means too few of them.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next 2 bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 4 bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 8 bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `length` bytes.
    pub fn bytes(&mut self, length: u32) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(head)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A string of the protocol: UTF-8, no NUL, at most [`MAX_STRING`] bytes ("Conventions").
pub fn string(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (text.len() <= MAX_STRING && !text.contains('\0')).then_some(text)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(truncated("häh", 2), "h");
        assert_eq!(truncated("häh", 3), "hä");
        assert_eq!(truncated("häh", 99), "häh");
        assert_eq!(truncated("ä", 0), "");
    }

    #[test]
    fn strings_obey_the_conventions() {
        assert_eq!(string(b"disk"), Some("disk"));
        assert_eq!(string(b"a\0b"), None);
        assert_eq!(string(&[0xff, 0xfe]), None);
        assert!(string(&[b'n'; 4096]).is_some());
        assert!(string(&[b'n'; 4097]).is_none());
    }

    #[test]
    fn fields_never_read_past_the_end() {
        let mut fields = Fields(&[0, 1, 2]);
        assert_eq!(fields.u16(), Some(1));
        assert_eq!(fields.u16(), None);
        assert_eq!(fields.bytes(u32::MAX), None);
        assert_eq!(fields.bytes(1), Some(&[2][..]));
        assert!(fields.is_empty());
    }
}
