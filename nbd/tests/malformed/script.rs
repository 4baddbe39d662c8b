//! One malformed conversation: the bytes of the client, what the server has to say to them, and whether it then closes.

use std::collections::HashMap;

use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{
    GREETING_LENGTH, InfoRequest, MetaRequest, OPTION_HEADER_LENGTH, OptionCode, OptionReplyHeader, ReplyType,
    WantedInfo, encode_option, greeting,
};
use blockyard_nbd::wire::reply::{ChunkType, ErrorChunk, ReplyHeader};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags, IHAVEOPT, MAX_ERROR_TEXT};

use crate::common::request;
use crate::common::servers::NAME;

/// The export in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    Writable,
    ReadOnly,
}

/// How the server ends an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The last of its replies.
    Final(ReplyType),
    /// The answer to EXPORT_NAME, so many bytes.
    Name(usize),
}

/// What the server does when everything was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It closes at once.
    Closed,
    /// It waits for more.
    Open,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Conversation {
    pub about: String,
    pub disk: Disk,
    pub sent: Vec<u8>,
    /// The answer to each option, in order.
    pub answers: Vec<Answer>,
    /// Where in `sent` the requests begin.
    pub enters: Option<usize>,
    pub mode: Mode,
    /// Cookie and error of each reply, in order of the requests.
    pub replies: Vec<(u64, u32)>,
    /// The requests by their cookies, equal ones being equal.
    asked: HashMap<u64, Request>,
    pub end: End,
    /// The client stops speaking NBD in the end: replies that had not left may be lost.
    pub lossy: bool,
    /// Too much data to be cut at every byte.
    pub heavy: bool,
}

/// What a request is behind, where it has payload.
pub const JUNK: u8 = 0x25;

/// A request header in the form of the mode.
pub fn encode(request: Request, mode: Mode) -> Vec<u8> {
    if mode == Mode::Extended { request.encode_extended() } else { request.encode_compact().unwrap() }
}

pub fn go_data(name: &str) -> Vec<u8> {
    InfoRequest { name, wanted: WantedInfo { name: true, description: true } }.encode()
}

pub fn base(name: &str) -> Vec<u8> {
    MetaRequest::encode(name, &["base:allocation"])
}

impl Conversation {
    /// Nothing said yet.
    pub fn silent(about: impl Into<String>) -> Self {
        Self {
            about: about.into(),
            disk: Disk::Writable,
            sent: Vec::new(),
            answers: Vec::new(),
            enters: None,
            mode: Mode::Simple,
            replies: Vec::new(),
            asked: HashMap::new(),
            end: End::Open,
            lossy: false,
            heavy: false,
        }
    }

    /// Client flags as most clients send them.
    pub fn new(about: impl Into<String>) -> Self {
        Self::silent(about).flags(3)
    }

    pub fn flags(self, flags: u32) -> Self {
        self.raw(&flags.to_be_bytes())
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.sent.extend_from_slice(bytes);
        self
    }

    pub fn closes(mut self) -> Self {
        self.end = End::Closed;
        self
    }

    /// Bytes that are no request, after which the server closes.
    pub fn babble(mut self, bytes: &[u8]) -> Self {
        self.lossy = true;
        self.raw(bytes).closes()
    }

    pub fn heavy(mut self) -> Self {
        self.heavy = true;
        self
    }

    pub fn on(mut self, disk: Disk) -> Self {
        self.disk = disk;
        self
    }

    /// An option and its last answer.
    pub fn option(mut self, code: OptionCode, data: &[u8], answer: ReplyType) -> Self {
        self.answers.push(Answer::Final(answer));
        self.raw(&encode_option(code, data))
    }

    /// An option that is not answered: it is cut short, or closes.
    pub fn unanswered(self, code: OptionCode, length: u32, data: &[u8]) -> Self {
        let mut header = [0; OPTION_HEADER_LENGTH];
        header[..8].copy_from_slice(&IHAVEOPT.to_be_bytes());
        header[8..12].copy_from_slice(&code.0.to_be_bytes());
        header[12..].copy_from_slice(&length.to_be_bytes());
        self.raw(&header).raw(data)
    }

    /// Shows that the server is in step, and ends.
    pub fn goodbye(self) -> Self {
        let list = ReplyType::ACK;
        self.option(OptionCode::LIST, b"", list).option(OptionCode::ABORT, b"", ReplyType::ACK).closes()
    }

    /// The form of replies, without entering.
    pub fn agree(mut self, mode: Mode) -> Self {
        self.mode = mode;
        match mode {
            Mode::Simple => self,
            Mode::Structured => self.option(OptionCode::STRUCTURED_REPLY, b"", ReplyType::ACK),
            Mode::Extended => self.option(OptionCode::EXTENDED_HEADERS, b"", ReplyType::ACK),
        }
    }

    /// From here on there are requests.
    pub fn entered(mut self) -> Self {
        self.enters = Some(self.sent.len());
        self
    }

    /// Enters with the contexts that the mode can have.
    pub fn enter(self, mode: Mode) -> Self {
        let agreed = self.agree(mode);
        let set = match mode {
            Mode::Simple => agreed,
            _ => agreed.option(OptionCode::SET_META_CONTEXT, &base(NAME), ReplyType::ACK),
        };
        set.go()
    }

    /// Enters as things are.
    pub fn go(self) -> Self {
        self.option(OptionCode::GO, &go_data(NAME), ReplyType::ACK).entered()
    }

    /// A request with its payload, answered with this error, 0 for success.
    pub fn request(mut self, request: Request, payload: &[u8], errno: u32) -> Self {
        self.replies.push((request.cookie, errno));
        self.asked.insert(request.cookie, request);
        self.header(request).raw(payload)
    }

    /// A request header that gets no reply.
    pub fn header(self, request: Request) -> Self {
        let bytes = encode(request, self.mode);
        self.raw(&bytes)
    }

    /// Shows that the server is in step, and ends.
    pub fn disconnect(self) -> Self {
        let cookie = 0xd15c;
        self.request(request(Command::FLUSH, cookie, 0, 0), b"", 0)
            .header(request(Command::DISC, cookie + 1, 0, 0))
            .closes()
    }

    /// Whether the server, having got this much, waits for a new request rather than for the rest of one. It would then
    /// wait for days.
    pub fn is_idle_at(&self, cut: usize) -> bool {
        let Some(mut at) = self.enters else { return false };
        while at < cut {
            let behind = &self.sent[at..];
            let (length, header) = match self.mode {
                Mode::Extended => (32, behind.first_chunk().and_then(Request::decode_extended)),
                _ => (28, behind.first_chunk().and_then(Request::decode_compact)),
            };
            let Some(header) = header else { return false };
            at += length;
            let announced = self.mode == Mode::Extended && header.flags.contains(CommandFlags::PAYLOAD_LEN);
            if header.command == Command::WRITE || announced {
                at = at.saturating_add(header.length as usize);
            }
        }
        at == cut
    }

    /// Whether `bytes` are what the server has to say to the whole conversation.
    pub fn judge(&self, bytes: &[u8]) -> Result<(), String> {
        let (handshake, replies) = self.understand(bytes)?;
        if self.enters.is_none() && handshake != bytes.len() {
            return Err("it says more than it has to".into());
        }
        let (mut told, mut expected) = (replies, self.replies.clone());
        told.sort_unstable();
        expected.sort_unstable();
        if self.lossy {
            return self.judge_part(bytes, bytes);
        }
        if told == expected { Ok(()) } else { Err(format!("replies {told:?} instead of {expected:?}")) }
    }

    /// Whether `bytes` are a legal answer to a part of the conversation to whose whole it said `whole`.
    pub fn judge_part(&self, bytes: &[u8], whole: &[u8]) -> Result<(), String> {
        let (handshake, _) = self.understand(whole)?;
        let front = bytes.len().min(handshake);
        if bytes[..front] != whole[..front] {
            return Err("the handshake is another than that of the whole".into());
        }
        if bytes.len() < handshake {
            return Ok(());
        }
        let mut open = self.replies.clone();
        for told in parse_replies(&bytes[handshake..], self.mode, &self.asked)?.0 {
            let place = open.iter().position(|expected| *expected == told);
            open.swap_remove(place.ok_or_else(|| format!("the reply {told:?} is not due"))?);
        }
        Ok(())
    }

    /// The length of the handshake in the bytes of the server, and the replies behind it.
    fn understand(&self, bytes: &[u8]) -> Result<(usize, Vec<(u64, u32)>), String> {
        if !bytes.starts_with(&greeting()) {
            return Err("no greeting".into());
        }
        let mut at = GREETING_LENGTH;
        for answer in &self.answers {
            match answer {
                Answer::Name(length) => at += length,
                Answer::Final(expected) => at = parse_answer(bytes, at, *expected)?,
            }
        }
        let behind = bytes.get(at..).ok_or("the answer to EXPORT_NAME is short")?;
        let (replies, left) = parse_replies(behind, self.mode, &self.asked)?;
        if left > 0 {
            return Err(format!("half a reply, {left} bytes"));
        }
        Ok((at, replies))
    }
}

/// Reads the replies to one option, the last of which has to be `expected`; tells where they end.
fn parse_answer(bytes: &[u8], mut at: usize, expected: ReplyType) -> Result<usize, String> {
    loop {
        let header = bytes.get(at..).and_then(|rest| rest.first_chunk());
        let header = header.ok_or_else(|| format!("it ends before {expected:?}"))?;
        let header = OptionReplyHeader::decode(*header).ok_or("that is no option reply")?;
        at += header_length(header.length)?;
        let data = bytes.get(at - header.length as usize..at).ok_or("half an option reply")?;
        if header.reply.is_error() && (data.len() > MAX_ERROR_TEXT || std::str::from_utf8(data).is_err()) {
            return Err(format!("an error text of {} bytes", data.len()));
        }
        if header.reply == ReplyType::ACK && !data.is_empty() {
            return Err("an ACK with data".into());
        }
        if header.reply == ReplyType::ACK || header.reply.is_error() {
            let right = header.reply == expected;
            return if right { Ok(at) } else { Err(format!("{:?} instead of {expected:?}", header.reply)) };
        }
    }
}

fn header_length(data: u32) -> Result<usize, String> {
    let sane = data <= 16384;
    if sane { Ok(20 + data as usize) } else { Err(format!("an option reply of {data} bytes")) }
}

/// Cookie and error of each complete reply, and how many bytes are left behind the last whole message.
pub fn parse_replies(
    bytes: &[u8],
    mode: Mode,
    asked: &HashMap<u64, Request>,
) -> Result<(Vec<(u64, u32)>, usize), String> {
    let mut replies = Vec::new();
    let mut failed: HashMap<u64, u32> = HashMap::new();
    let mut at = 0;
    while let Some(magic) = bytes[at..].first_chunk() {
        let magic = u32::from_be_bytes(*magic);
        let length = ReplyHeader::length_for(magic).ok_or_else(|| format!("{magic:#010x} is no reply"))?;
        let Some(header) = bytes.get(at..at + length) else { break };
        let payload = &bytes[at + length..];
        match ReplyHeader::decode(header).ok_or("a header that is no reply")? {
            ReplyHeader::Simple { errno, cookie } => {
                let asked = asked.get(&cookie).ok_or("a reply to nobody")?;
                let is_read = asked.command == Command::READ;
                if mode == Mode::Extended || (mode == Mode::Structured && is_read) {
                    return Err("a simple reply that was given up".into());
                }
                let data = if is_read && errno == 0 { asked.length as usize } else { 0 };
                if payload.len() < data {
                    break;
                }
                at += length + data;
                replies.push((cookie, errno));
            }
            ReplyHeader::Chunk { flags, kind, cookie, offset, length: data } => {
                let asked = asked.get(&cookie).ok_or("a chunk for nobody")?;
                let echoed = (mode == Mode::Extended).then_some(asked.offset);
                if mode == Mode::Simple || offset != echoed {
                    return Err("a chunk of a form that was not agreed".into());
                }
                let status = if mode == Mode::Extended { ChunkType::BLOCK_STATUS } else { ChunkType::BLOCK_STATUS_EXT };
                if kind == status {
                    return Err("a status of a form that was not agreed".into());
                }
                let Some(payload) = payload.get(..data as usize) else { break };
                at += length + payload.len();
                if kind.is_error() {
                    let error = ErrorChunk::decode(kind, payload).ok_or("an error chunk that is none")?;
                    failed.insert(cookie, error.errno);
                }
                if kind == ChunkType::NONE && flags & 1 == 0 {
                    return Err("an empty chunk that is not the last".into());
                }
                if flags & 1 != 0 {
                    replies.push((cookie, failed.remove(&cookie).unwrap_or(0)));
                }
            }
        }
    }
    Ok((replies, bytes.len() - at))
}
