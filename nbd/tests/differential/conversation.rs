//! A conversation: what a client says, step by step, and what it hears, a line for each step. Lines say what the protocol
//! means and not how it is cut: texts, the order of information, the number of chunks and the like are left out where a
//! server is free.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Tells an answer from none.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tells the end of a connection from none.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(10);

const COMPACT: u32 = 0x2560_9513;
const EXTENDED: u32 = 0x21e4_1c71;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;
const EXTENDED_CHUNK: u32 = 0x6e8a_278c;

/// Option numbers.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const PEEK_EXPORT: u32 = 4;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Command numbers.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod flag {
    pub const FUA: u16 = 0x01;
    pub const NO_HOLE: u16 = 0x02;
    pub const DF: u16 = 0x04;
    pub const REQ_ONE: u16 = 0x08;
    pub const FAST_ZERO: u16 = 0x10;
    pub const PAYLOAD_LEN: u16 = 0x20;
}

/// A request; a WRITE, or one with PAYLOAD_LEN in extended mode, brings `length` bytes of payload, all of one value.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub length: u64,
    pub cookie: u64,
}

/// What a client does next.
#[derive(Clone, Debug)]
pub enum Step {
    /// Reads the greeting and sends these client flags.
    Hello(u32),
    /// Sends an option and reads replies up to an ACK or an error. GO enters the transmission phase.
    Option(u32, Vec<u8>),
    /// Sends EXPORT_NAME, to which these many bytes are the answer.
    ExportName(&'static str, usize),
    /// Sends requests in one piece and reads the replies to all of them.
    Requests(Vec<Request>),
    /// Sends a BLOCK_STATUS over so many bytes that asks for the contexts of these names only; extended headers.
    Filter(&'static [&'static str], u64),
    /// Sends a request and tells also whether an error came in a reply without room for its text.
    ErrorForm(Request),
    /// Sends bytes that leave nothing to be answered, and reads what comes before the server closes.
    Last(Vec<u8>),
    /// Sends requests with a DISC behind them, and reads what comes before the server closes.
    Disconnect(Vec<Request>, Request),
}

/// One end of a connection.
pub struct Player {
    stream: UnixStream,
    structured: bool,
    extended: bool,
    /// Names of the contexts that were selected at any time, by their ids.
    contexts: Vec<(u32, String)>,
}

/// The words for a server that is gone.
const CLOSED: &str = "closes";
/// The words for one that does not answer.
const SILENT: &str = "says nothing";
/// The beginning of the words for one that cannot be understood.
const BROKEN: &str = "breaks the protocol";

/// Whether nothing more can be said after a line.
pub fn is_over(line: &str) -> bool {
    line.ends_with(CLOSED) || line == SILENT || line.starts_with(BROKEN)
}

impl Player {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, structured: false, extended: false, contexts: Vec::new() }
    }

    /// Whether extended headers were agreed on.
    pub fn extended(&self) -> bool {
        self.extended
    }

    /// Takes a step. With `facts` the line also tells numbers that servers choose.
    pub fn step(&mut self, step: &Step, facts: bool) -> String {
        let line = match step {
            Step::Hello(flags) => self.hello(*flags),
            Step::Option(code, data) => self.option(*code, data, facts),
            Step::ExportName(name, length) => self.export_name(name, *length),
            Step::Requests(requests) => self.requests(requests, None, false),
            Step::Filter(names, length) => self.filter(names, *length),
            Step::ErrorForm(request) => self.requests(&[*request], None, true),
            Step::Last(bytes) => self.stream.write_all(bytes).and_then(|()| self.until_closed()),
            Step::Disconnect(requests, goodbye) => self.requests(requests, Some(*goodbye), false),
        };
        line.unwrap_or_else(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => SILENT.to_owned(),
            io::ErrorKind::InvalidData => format!("{BROKEN}: {error}"),
            _ => CLOSED.to_owned(),
        })
    }

    fn hello(&mut self, flags: u32) -> io::Result<String> {
        let greeting: [u8; 18] = self.array()?;
        let told = u16::from_be_bytes([greeting[16], greeting[17]]);
        self.stream.write_all(&flags.to_be_bytes())?;
        Ok(format!("{} flags {told:#x}", String::from_utf8_lossy(&greeting[..16])))
    }

    fn option(&mut self, code: u32, data: &[u8], facts: bool) -> io::Result<String> {
        self.stream.write_all(&encode_option(code, data))?;
        let asked = asked(data).unwrap_or_default();
        let mut told = Vec::new();
        loop {
            let header: [u8; 20] = self.array()?;
            let word = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().unwrap());
            let (reply, length) = (word(12), word(16));
            if header[..8] != 0x0003_e889_0455_65a9_u64.to_be_bytes() || word(8) != code || length > 65536 {
                return Err(broken("not the reply to this option"));
            }
            let mut data = vec![0; length as usize];
            self.stream.read_exact(&mut data)?;
            match reply {
                2 => {
                    let mut rest = &data[..];
                    let name = take::<4>(&mut rest)? as usize;
                    let (name, description) = rest.split_at_checked(name).ok_or_else(|| broken("SERVER"))?;
                    let text = String::from_utf8_lossy;
                    told.push(format!("SERVER {:?} {:?}", text(name), text(description)));
                }
                3 => told.extend(information(&data, &asked, facts)?),
                4 => {
                    let mut name = &data[..];
                    let id = take::<4>(&mut name)? as u32;
                    let name = String::from_utf8_lossy(name).into_owned();
                    let zero = if code == option::LIST_META_CONTEXT && id != 0 { " with an id" } else { "" };
                    told.push(format!("META_CONTEXT {name}{zero}"));
                    if code == option::SET_META_CONTEXT && self.contexts.iter().all(|(known, _)| *known != id) {
                        self.contexts.push((id, name));
                    }
                }
                1 => {
                    self.structured |= code == option::STRUCTURED_REPLY;
                    self.extended |= code == option::EXTENDED_HEADERS;
                    told.sort();
                    told.push("ACK".to_owned());
                    return Ok(told.join(", "));
                }
                error => {
                    told.push(error_name(error));
                    return Ok(told.join(", "));
                }
            }
        }
    }

    fn export_name(&mut self, name: &str, length: usize) -> io::Result<String> {
        self.stream.write_all(&encode_option(option::EXPORT_NAME, name.as_bytes()))?;
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer)?;
        let size = u64::from_be_bytes(*answer.first_chunk().unwrap());
        let padding = answer[10..].iter().filter(|byte| **byte == 0).count();
        Ok(format!("size {size}, {padding} zeroes"))
    }

    fn requests(&mut self, requests: &[Request], goodbye: Option<Request>, form: bool) -> io::Result<String> {
        self.send(&[requests, goodbye.as_slice()].concat())?;
        self.hear(requests, goodbye.is_some(), form)
    }

    fn filter(&mut self, names: &[&str], length: u64) -> io::Result<String> {
        let id = |name: &&str| self.contexts.iter().find(|(_, known)| known == name).map_or(4711, |(id, _)| *id);
        let ids: Vec<u32> = names.iter().map(id).collect();
        let header = Request {
            command: command::BLOCK_STATUS,
            flags: flag::PAYLOAD_LEN,
            offset: 0,
            length: 8 + 4 * ids.len() as u64,
            cookie: 1,
        };
        let mut bytes = self.encode_header(&header);
        bytes.extend(length.to_be_bytes());
        bytes.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
        self.stream.write_all(&bytes)?;
        self.hear(&[Request { length, ..header }], false, false)
    }

    /// Sends requests in one piece.
    pub fn send(&mut self, requests: &[Request]) -> io::Result<()> {
        let bytes: Vec<u8> = requests.iter().flat_map(|request| self.encode(request)).collect();
        self.stream.write_all(&bytes)
    }

    /// Hears the answers to requests that were sent, and then, if it is to end, the end.
    pub fn hear(&mut self, requests: &[Request], to_the_end: bool, form: bool) -> io::Result<String> {
        let mut open: Vec<(usize, Request, Answer)> = Vec::new();
        open.extend(requests.iter().enumerate().map(|(number, request)| (number, *request, Answer::default())));
        let mut told = Vec::new();
        while !open.is_empty() || to_the_end {
            let patience = if open.is_empty() { PATIENCE_AT_THE_END } else { PATIENCE };
            self.stream.set_read_timeout(Some(patience))?;
            match self.reply(&mut open) {
                // Of requests with one cookie any may be answered first.
                Ok(Some(index)) => {
                    let (number, request, mut answer) = open.remove(index);
                    answer.simple_error &= form;
                    told.push((number, answer.line(&request, &self.contexts)?));
                }
                Ok(None) => {}
                Err(error) if to_the_end && error.kind() != io::ErrorKind::InvalidData => {
                    let how = if is_patience(&error) { SILENT } else { CLOSED };
                    return Ok(format!("answers {} of {}, then {how}", told.len(), requests.len()));
                }
                Err(error) => return Err(error),
            }
        }
        told.sort();
        Ok(told.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("; "))
    }

    /// Receives one message; tells which request it completes.
    fn reply(&mut self, open: &mut [(usize, Request, Answer)]) -> io::Result<Option<usize>> {
        let magic = u32::from_be_bytes(self.array()?);
        let find = |open: &[(usize, Request, Answer)], cookie: u64, offset: Option<u64>| {
            let fits = |request: &Request| request.cookie == cookie && offset.is_none_or(|at| request.offset == at);
            open.iter().position(|(_, request, _)| fits(request)).ok_or_else(|| broken("a reply to nothing"))
        };
        if magic == SIMPLE_REPLY {
            let error = u32::from_be_bytes(self.array()?);
            let index = find(open, u64::from_be_bytes(self.array()?), None)?;
            let (_, request, answer) = &mut open[index];
            if self.extended || (self.structured && request.command == command::READ) {
                return Err(broken("a simple reply where chunks were agreed on"));
            }
            answer.error = Some(error).filter(|error| *error != 0);
            answer.simple_error = self.structured && error != 0;
            if request.command == command::READ && error == 0 {
                let mut data = vec![0; request.length as usize];
                self.stream.read_exact(&mut data)?;
                answer.content.push((request.offset, data));
            }
            return Ok(Some(index));
        }
        let agreed = if self.extended { EXTENDED_CHUNK } else { CHUNK };
        if magic != agreed || !(self.structured || self.extended) {
            return Err(broken("a reply of a form that was not agreed on"));
        }
        let flags = u16::from_be_bytes(self.array()?);
        let kind = u16::from_be_bytes(self.array()?);
        let cookie = u64::from_be_bytes(self.array()?);
        let (index, length) = if self.extended {
            // An extended chunk repeats the offset of its request.
            let offset = u64::from_be_bytes(self.array()?);
            (find(open, cookie, Some(offset))?, u64::from_be_bytes(self.array()?))
        } else {
            (find(open, cookie, None)?, u64::from(u32::from_be_bytes(self.array()?)))
        };
        let (_, _, answer) = &mut open[index];
        if length > (64 << 20) + 8 {
            return Err(broken("a chunk of more than 64 MiB"));
        }
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload)?;
        answer.chunk(kind, &payload)?;
        Ok((flags & 1 != 0).then_some(index))
    }

    fn encode(&self, request: &Request) -> Vec<u8> {
        let mut bytes = self.encode_header(request);
        if request.command == command::WRITE || (self.extended && request.flags & flag::PAYLOAD_LEN != 0) {
            bytes.resize(bytes.len() + request.length as usize, 0x57);
        }
        bytes
    }

    fn encode_header(&self, request: &Request) -> Vec<u8> {
        let Request { command, flags, offset, length, cookie } = *request;
        let mut bytes = Vec::new();
        bytes.extend(if self.extended { EXTENDED } else { COMPACT }.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if self.extended {
            bytes.extend(length.to_be_bytes());
        } else {
            bytes.extend((length as u32).to_be_bytes());
        }
        bytes
    }

    fn until_closed(&mut self) -> io::Result<String> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            Err(error) if is_patience(&error) => return Err(error),
            _ => {}
        }
        Ok(if bytes.is_empty() { CLOSED.to_owned() } else { format!("answers, then {CLOSED}") })
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// What came for one request.
#[derive(Debug, Default)]
struct Answer {
    error: Option<u32>,
    /// A simple reply with an error where a chunk should tell it.
    simple_error: bool,
    content: Vec<(u64, Vec<u8>)>,
    chunks: usize,
    status: Vec<(u32, Vec<(u64, u64)>)>,
}

impl Answer {
    fn chunk(&mut self, kind: u16, payload: &[u8]) -> io::Result<()> {
        let mut rest = payload;
        match kind {
            0 if payload.is_empty() => {}
            1 if payload.len() > 8 => self.content.push((take::<8>(&mut rest)?, rest.to_vec())),
            2 if payload.len() == 12 => {
                let (offset, length) = (take::<8>(&mut rest)?, take::<4>(&mut rest)?);
                self.content.push((offset, vec![0; length as usize]));
            }
            5 => {
                let context = take::<4>(&mut rest)?;
                let mut extents = Vec::new();
                while !rest.is_empty() {
                    extents.push((take::<4>(&mut rest)?, take::<4>(&mut rest)?));
                }
                self.status.push((context as u32, extents));
            }
            6 => {
                let (context, count) = (take::<4>(&mut rest)?, take::<4>(&mut rest)?);
                let mut extents = Vec::new();
                while !rest.is_empty() {
                    extents.push((take::<8>(&mut rest)?, take::<8>(&mut rest)?));
                }
                if extents.len() as u64 != count {
                    return Err(broken("another number of extents than was told"));
                }
                self.status.push((context as u32, extents));
            }
            0x8000.. => self.error = Some(take::<4>(&mut rest)? as u32),
            _ => return Err(broken("a chunk of an unknown type or length")),
        }
        self.chunks += 1;
        Ok(())
    }

    fn line(mut self, request: &Request, contexts: &[(u32, String)]) -> io::Result<String> {
        if let Some(error) = self.error {
            let form = if self.simple_error { " in a simple reply" } else { "" };
            return Ok(format!("{}{form}", errno_name(error)));
        }
        let mut line = "OK".to_owned();
        if request.command == command::READ {
            self.content.sort();
            let mut runs: Vec<(u8, usize)> = Vec::new();
            let mut at = request.offset;
            for (offset, data) in &self.content {
                if *offset != at {
                    return Err(broken("content with a gap or an overlap"));
                }
                at += data.len() as u64;
                for byte in data {
                    match runs.last_mut() {
                        Some((value, count)) if value == byte => *count += 1,
                        _ => runs.push((*byte, 1)),
                    }
                }
            }
            if at != request.offset + request.length {
                return Err(broken("content that is too short"));
            }
            runs.iter().for_each(|(value, count)| write!(line, " {count}*{value:02x}").unwrap());
            if request.flags & flag::DF != 0 && self.chunks > 1 {
                line.push_str(" in pieces");
            }
        }
        self.status.sort();
        for (id, extents) in &self.status {
            let context = contexts.iter().find(|(known, _)| known == id).ok_or_else(|| broken("an unknown context"))?;
            write!(line, " {}", context.1).unwrap();
            // More than was asked for may be told of; what lies in the request is compared.
            let mut left = request.length;
            let mut merged: Vec<(u64, u64)> = Vec::new();
            for (length, status) in extents {
                let length = (*length).min(left);
                left -= length;
                match merged.last_mut() {
                    Some(last) if last.1 == *status => last.0 += length,
                    _ if length > 0 => merged.push((length, *status)),
                    _ => {}
                }
            }
            merged.iter().for_each(|(length, status)| write!(line, " {length}:{status}").unwrap());
        }
        Ok(line)
    }
}

/// The next number of so many bytes.
fn take<const N: usize>(bytes: &mut &[u8]) -> io::Result<u64> {
    let (number, rest) = bytes.split_first_chunk::<N>().ok_or_else(|| broken("a payload that is too short"))?;
    *bytes = rest;
    Ok(number.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Which information the data of INFO or GO ask for, if they are what they seem.
fn asked(data: &[u8]) -> Option<Vec<u16>> {
    let (length, rest) = data.split_first_chunk()?;
    let kinds = rest.get(u32::from_be_bytes(*length) as usize + 2..)?;
    Some(kinds.chunks_exact(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect())
}

/// `EXPORT` is always told, and what else is told unasked is of no account.
fn information(mut data: &[u8], asked: &[u16], facts: bool) -> io::Result<Option<String>> {
    let kind = take::<2>(&mut data)? as u16;
    if kind != 0 && !asked.contains(&kind) {
        return Ok(None);
    }
    Ok(Some(match kind {
        0 if facts => format!("EXPORT {} {:#06x}", take::<8>(&mut data)?, take::<2>(&mut data)?),
        0 => "EXPORT".to_owned(),
        1 => format!("NAME {:?}", String::from_utf8_lossy(data)),
        2 => format!("DESCRIPTION {:?}", String::from_utf8_lossy(data)),
        3 if facts => {
            let sizes = [take::<4>(&mut data)?, take::<4>(&mut data)?, take::<4>(&mut data)?];
            format!("BLOCK_SIZE {} {} {}", sizes[0], sizes[1], sizes[2])
        }
        // A server need not tell it.
        3 => return Ok(None),
        other => format!("information {other}"),
    }))
}

/// An option whose length is the truth.
pub fn encode_option(code: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &code.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn error_name(reply: u32) -> String {
    let names = [
        "ERR_UNSUP",
        "ERR_POLICY",
        "ERR_INVALID",
        "ERR_PLATFORM",
        "ERR_TLS_REQD",
        "ERR_UNKNOWN",
        "ERR_SHUTDOWN",
        "ERR_BLOCK_SIZE_REQD",
        "ERR_TOO_BIG",
        "ERR_EXT_HEADER_REQD",
    ];
    let index = reply.wrapping_sub(0x8000_0001) as usize;
    names.get(index).map_or_else(|| format!("reply {reply:#x}"), |name| (*name).to_owned())
}

fn errno_name(error: u32) -> String {
    let name = match error {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        other => return format!("error {other}"),
    };
    name.to_owned()
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn is_patience(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
