//! Messages of the handshake: greeting, options, option replies, and what their data hold.
//!
//! Decoders take data that are complete; lengths inside them are checked against what is there, never trusted.
//! Who may send what and when is [`crate::handshake`]'s business.
#![deny(clippy::indexing_slicing)]

use super::{FIXED_NEWSTYLE, Fields, IHAVEOPT, NBDMAGIC, NO_ZEROES, OPTION_REPLY, TransmissionFlags, string};

/// An option number ("Option types"), 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OptionCode(pub u32);

impl OptionCode {
    /// `NBD_OPT_EXPORT_NAME`.
    pub const EXPORT_NAME: Self = Self(1);
    /// `NBD_OPT_ABORT`.
    pub const ABORT: Self = Self(2);
    /// `NBD_OPT_LIST`.
    pub const LIST: Self = Self(3);
    /// `NBD_OPT_PEEK_EXPORT`, withdrawn.
    pub const PEEK_EXPORT: Self = Self(4);
    /// `NBD_OPT_STARTTLS`.
    pub const STARTTLS: Self = Self(5);
    /// `NBD_OPT_INFO`.
    pub const INFO: Self = Self(6);
    /// `NBD_OPT_GO`.
    pub const GO: Self = Self(7);
    /// `NBD_OPT_STRUCTURED_REPLY`.
    pub const STRUCTURED_REPLY: Self = Self(8);
    /// `NBD_OPT_LIST_META_CONTEXT`.
    pub const LIST_META_CONTEXT: Self = Self(9);
    /// `NBD_OPT_SET_META_CONTEXT`.
    pub const SET_META_CONTEXT: Self = Self(10);
    /// `NBD_OPT_EXTENDED_HEADERS`.
    pub const EXTENDED_HEADERS: Self = Self(11);
}

/// A reply type ("Option reply types"), 32 bits; errors have the top bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplyType(pub u32);

impl ReplyType {
    /// `NBD_REP_ACK`, no data.
    pub const ACK: Self = Self(1);
    /// `NBD_REP_SERVER`: one export.
    pub const SERVER: Self = Self(2);
    /// `NBD_REP_INFO`: one fact.
    pub const INFO: Self = Self(3);
    /// `NBD_REP_META_CONTEXT`: one context.
    pub const META_CONTEXT: Self = Self(4);
    /// `NBD_REP_ERR_UNSUP`.
    pub const ERR_UNSUP: Self = Self(0x8000_0001);
    /// `NBD_REP_ERR_POLICY`.
    pub const ERR_POLICY: Self = Self(0x8000_0002);
    /// `NBD_REP_ERR_INVALID`.
    pub const ERR_INVALID: Self = Self(0x8000_0003);
    /// `NBD_REP_ERR_PLATFORM`.
    pub const ERR_PLATFORM: Self = Self(0x8000_0004);
    /// `NBD_REP_ERR_TLS_REQD`.
    pub const ERR_TLS_REQD: Self = Self(0x8000_0005);
    /// `NBD_REP_ERR_UNKNOWN`.
    pub const ERR_UNKNOWN: Self = Self(0x8000_0006);
    /// `NBD_REP_ERR_SHUTDOWN`.
    pub const ERR_SHUTDOWN: Self = Self(0x8000_0007);
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`.
    pub const ERR_BLOCK_SIZE_REQD: Self = Self(0x8000_0008);
    /// `NBD_REP_ERR_TOO_BIG`.
    pub const ERR_TOO_BIG: Self = Self(0x8000_0009);
    /// `NBD_REP_ERR_EXT_HEADER_REQD`.
    pub const ERR_EXT_HEADER_REQD: Self = Self(0x8000_000a);

    /// Whether the option failed.
    pub fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

/// `NBD_INFO_EXPORT`: u16 0, u64 size, u16 flags.
pub const INFO_EXPORT: u16 = 0;
/// `NBD_INFO_NAME`: u16 1, the name.
pub const INFO_NAME: u16 = 1;
/// `NBD_INFO_DESCRIPTION`: u16 2, the text.
pub const INFO_DESCRIPTION: u16 = 2;
/// `NBD_INFO_BLOCK_SIZE`: u16 3, u32 minimum, u32 preferred, u32 maximum payload.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Length of the greeting in bytes.
pub const GREETING_LENGTH: usize = 18;
/// Length of an option header in bytes.
pub const OPTION_HEADER_LENGTH: usize = 16;
/// Length of an option reply header in bytes.
pub const OPTION_REPLY_LENGTH: usize = 20;

/// The first bytes of the server: `0:8 NBDMAGIC, 8:8 IHAVEOPT, 16:2 handshake flags`.
pub fn greeting() -> Vec<u8> {
    let mut out = Vec::with_capacity(GREETING_LENGTH);
    out.extend(NBDMAGIC.to_be_bytes());
    out.extend(IHAVEOPT.to_be_bytes());
    out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    out
}

/// What stands before the data of an option: `0:8 IHAVEOPT, 8:4 option, 12:4 length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub code: OptionCode,
    /// Bytes of data that follow, any 32-bit value; the client says so.
    pub length: u32,
}

impl OptionHeader {
    /// Reads a header; `None` if the magic is wrong, after which nothing in the stream means anything.
    pub fn decode(bytes: [u8; OPTION_HEADER_LENGTH]) -> Option<Self> {
        let mut fields = Fields(&bytes);
        (fields.u64()? == IHAVEOPT).then_some(())?;
        Some(Self { code: OptionCode(fields.u32()?), length: fields.u32()? })
    }
}

/// A whole option, for the client side. `data` is at most `u32::MAX` bytes; more is cut off.
pub fn encode_option(code: OptionCode, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_HEADER_LENGTH + data.len());
    out.extend(IHAVEOPT.to_be_bytes());
    out.extend(code.0.to_be_bytes());
    out.extend(length_of(data).to_be_bytes());
    out.extend(data);
    out
}

/// Appends an option reply: `0:8 magic, 8:4 option echoed, 12:4 reply type, 16:4 length, 20: data`.
pub fn encode_reply(out: &mut Vec<u8>, code: OptionCode, reply: ReplyType, data: &[&[u8]]) {
    let length: u32 = data.iter().map(|part| length_of(part)).fold(0, u32::saturating_add);
    out.extend(OPTION_REPLY.to_be_bytes());
    out.extend(code.0.to_be_bytes());
    out.extend(reply.0.to_be_bytes());
    out.extend(length.to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

/// What stands before the data of an option reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub code: OptionCode,
    /// What kind of answer.
    pub reply: ReplyType,
    /// Bytes of data that follow, any 32-bit value; the server says so.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Reads a header; `None` if the magic is wrong.
    pub fn decode(bytes: [u8; OPTION_REPLY_LENGTH]) -> Option<Self> {
        let mut fields = Fields(&bytes);
        (fields.u64()? == OPTION_REPLY).then_some(())?;
        Some(Self { code: OptionCode(fields.u32()?), reply: ReplyType(fields.u32()?), length: fields.u32()? })
    }
}

/// Which optional facts an INFO or GO asks for; `EXPORT` and `BLOCK_SIZE` are always told, unknown ones never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WantedInfo {
    /// The canonical name.
    pub name: bool,
    /// The description.
    pub description: bool,
}

/// The data of INFO and GO: `0:4 name length n, 4:n name, 2 count k, k x 2 info type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export, as the client calls it.
    pub name: &'a str,
    /// What it asks for.
    pub wanted: WantedInfo,
}

impl<'a> InfoRequest<'a> {
    /// Reads the whole data; the error is a text for the client.
    pub fn decode(data: &'a [u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(data);
        let name = name(&mut fields)?;
        let count = fields.u16().ok_or("the information count is missing")?;
        if fields.0.len() != usize::from(count) * 2 {
            return Err("the information count does not match the option length");
        }
        let mut wanted = WantedInfo::default();
        while let Some(info) = fields.u16() {
            wanted.name |= info == INFO_NAME;
            wanted.description |= info == INFO_DESCRIPTION;
        }
        Ok(Self { name, wanted })
    }

    /// Writes the data, for the client side.
    pub fn encode(&self) -> Vec<u8> {
        let infos =
            [(self.wanted.name, INFO_NAME), (self.wanted.description, INFO_DESCRIPTION), (true, INFO_BLOCK_SIZE)];
        let infos = infos.into_iter().filter(|(wanted, _)| *wanted).map(|(_, info)| info);
        let mut out = prefixed(self.name);
        out.extend(u16::try_from(infos.clone().count()).unwrap_or(0).to_be_bytes());
        out.extend(infos.flat_map(u16::to_be_bytes));
        out
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT: `0:4 name length n, 4:n name, 4 query count, per query 4 length +
/// string`. Decoding checks every query, so that iterating cannot fail.
#[derive(Clone, Copy, Debug)]
pub struct MetaRequest<'a> {
    /// The export, as the client calls it.
    pub name: &'a str,
    queries: Fields<'a>,
}

impl<'a> MetaRequest<'a> {
    /// Reads the whole data; the error is a text for the client.
    pub fn decode(data: &'a [u8]) -> Result<Self, &'static str> {
        let mut fields = Fields(data);
        let name = name(&mut fields)?;
        let count = fields.u32().ok_or("the query count is missing")?;
        let queries = fields;
        // The count is only compared: each query takes at least its own 4 bytes, so a lie runs out of bytes soon.
        for _ in 0..count {
            let length = fields.u32().ok_or("fewer queries than announced")?;
            let query = fields.bytes(length).ok_or("a query is longer than the option")?;
            let query = string(query).ok_or("a query is not a string of at most 4096 bytes")?;
            query.contains(':').then_some(()).ok_or("a query has no namespace")?;
        }
        if fields.is_empty() { Ok(Self { name, queries }) } else { Err("bytes are left behind the last query") }
    }

    /// The queries in the order sent, each `namespace:leaf`.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut fields = self.queries;
        std::iter::from_fn(move || {
            let length = fields.u32()?;
            string(fields.bytes(length)?)
        })
    }

    /// Writes the data, for the client side.
    pub fn encode(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut out = prefixed(name);
        out.extend(u32::try_from(queries.len()).unwrap_or(u32::MAX).to_be_bytes());
        for query in queries {
            out.extend(prefixed(query));
        }
        out
    }
}

/// What EXPORT_NAME and `NBD_INFO_EXPORT` tell: `size` below 2^63, and the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
}

impl ExportInfo {
    /// 10 bytes: `0:8 size, 8:2 flags`.
    pub fn encode(self) -> [u8; 10] {
        let mut out = [0; 10];
        if let Some((size, flags)) = out.split_first_chunk_mut::<8>() {
            *size = self.size.to_be_bytes();
            flags.copy_from_slice(&self.flags.0.to_be_bytes());
        }
        out
    }

    /// The reverse.
    pub fn decode(bytes: [u8; 10]) -> Option<Self> {
        let mut fields = Fields(&bytes);
        Some(Self { size: fields.u64()?, flags: TransmissionFlags(fields.u16()?) })
    }
}

/// `NBD_INFO_BLOCK_SIZE` ("Size constraints"), all in bytes: `minimum` and `preferred` are powers of two,
/// `minimum <= preferred <= maximum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this.
    pub minimum: u32,
    /// The cheapest request size.
    pub preferred: u32,
    /// The largest payload of one message.
    pub maximum: u32,
}

impl BlockSizes {
    /// 12 bytes behind the info type.
    pub fn encode(self) -> Vec<u8> {
        [self.minimum, self.preferred, self.maximum].into_iter().flat_map(u32::to_be_bytes).collect()
    }

    /// The reverse.
    pub fn decode(mut fields: Fields<'_>) -> Option<Self> {
        let sizes = Self { minimum: fields.u32()?, preferred: fields.u32()?, maximum: fields.u32()? };
        fields.is_empty().then_some(sizes)
    }
}

/// A string behind its 32-bit length.
pub fn prefixed(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + text.len());
    out.extend(length_of(text.as_bytes()).to_be_bytes());
    out.extend(text.as_bytes());
    out
}

fn name<'a>(fields: &mut Fields<'a>) -> Result<&'a str, &'static str> {
    let length = fields.u32().ok_or("the name length is missing")?;
    let bytes = fields.bytes(length).ok_or("the name is longer than the option")?;
    string(bytes).ok_or("the name is not a string of at most 4096 bytes")
}

fn length_of(data: &[u8]) -> u32 {
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_has_the_bytes_of_the_specification() {
        assert_eq!(greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn an_option_is_read_back_as_it_was_written() {
        let bytes = encode_option(OptionCode::GO, b"abc");
        assert_eq!(bytes, b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x03abc");
        let header = OptionHeader::decode(*bytes.first_chunk().unwrap()).unwrap();
        assert_eq!(header, OptionHeader { code: OptionCode::GO, length: 3 });
        let mut wrong: [u8; 16] = *bytes.first_chunk().unwrap();
        wrong[7] ^= 1;
        assert_eq!(OptionHeader::decode(wrong), None);
    }

    #[test]
    fn an_option_reply_is_read_back_as_it_was_written() {
        let mut bytes = Vec::new();
        encode_reply(&mut bytes, OptionCode(0xffff_ffff), ReplyType::ERR_UNSUP, &[b"no", b"pe"]);
        assert_eq!(
            bytes, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\xff\xff\xff\xff\x80\x00\x00\x01\x00\x00\x00\x04nope",
            "golden bytes"
        );
        let header = OptionReplyHeader::decode(*bytes.first_chunk().unwrap()).unwrap();
        assert_eq!((header.code.0, header.reply, header.length), (u32::MAX, ReplyType::ERR_UNSUP, 4));
    }

    #[test]
    fn info_data_are_read_back_and_lies_about_lengths_are_refused() {
        let request = InfoRequest { name: "disk", wanted: WantedInfo { name: true, description: false } };
        let bytes = request.encode();
        assert_eq!(bytes, b"\x00\x00\x00\x04disk\x00\x02\x00\x01\x00\x03");
        assert_eq!(InfoRequest::decode(&bytes), Ok(request));
        for cut in 0..bytes.len() {
            assert!(InfoRequest::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(InfoRequest::decode(&longer).is_err());
        for lie in [5u32, 0xffff, u32::MAX - 7, u32::MAX] {
            let mut lying = bytes.clone();
            lying[..4].copy_from_slice(&lie.to_be_bytes());
            assert!(InfoRequest::decode(&lying).is_err(), "name length {lie}");
        }
    }

    #[test]
    fn a_name_length_is_32_bits_wide() {
        let name = "n".repeat(300);
        let request = InfoRequest { name: &name, wanted: WantedInfo::default() };
        assert_eq!(InfoRequest::decode(&request.encode()), Ok(request));
    }

    #[test]
    fn meta_data_are_read_back_and_lies_about_counts_are_refused() {
        let bytes = MetaRequest::encode("d", &["base:allocation", "base:", ":"]);
        let request = MetaRequest::decode(&bytes).unwrap();
        assert_eq!(request.name, "d");
        assert_eq!(request.queries().collect::<Vec<_>>(), ["base:allocation", "base:", ":"]);
        for cut in 0..bytes.len() {
            assert!(MetaRequest::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut lying = MetaRequest::encode("d", &["base:allocation"]);
        lying[5..9].copy_from_slice(&1_000_000u32.to_be_bytes());
        assert!(MetaRequest::decode(&lying).is_err());
        assert!(MetaRequest::decode(&MetaRequest::encode("d", &["nocolon"])).is_err());
    }

    #[test]
    fn block_sizes_are_minimum_preferred_maximum() {
        let sizes = BlockSizes { minimum: 1, preferred: 65536, maximum: 64 << 20 };
        assert_eq!(sizes.encode(), [0, 0, 0, 1, 0, 1, 0, 0, 4, 0, 0, 0]);
        assert_eq!(BlockSizes::decode(Fields(&sizes.encode())), Some(sizes));
    }
}
