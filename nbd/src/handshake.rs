//! The handshake without I/O: bytes of the client in, [`Action`]s out.
//!
//! The driver sends the greeting, feeds what arrives, and does what [`Handshake::next_action`] says until it says `Wait`.
//! What was fed beyond the handshake are the first requests: [`Handshake::into_rest`]. Clock, caps and the opening of
//! exports are the driver's. Framing is here, what each option is answered in `answers`; the sections behind both are
//! "Fixed newstyle negotiation" and "Option types".
#![deny(clippy::indexing_slicing)]

mod answers;

use std::sync::Arc;

use crate::transmission::{Mode, Terms};
use crate::wire::option::{OPTION_HEADER_LENGTH, OptionCode, OptionHeader, ReplyType, WantedInfo};
use crate::wire::{FIXED_NEWSTYLE, MAX_STRING, NO_ZEROES};
use crate::{ContextSet, Error, ErrorKind};

/// Option data up to this many bytes are looked at; a list of 4096 metadata queries fits.
const MAX_PARSED: u32 = 64 << 10;
/// Option data up to this many bytes are read and dropped; above, the client is not worth it.
const MAX_DISCARDED: u32 = 1 << 20;

/// What the handshake knows of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// The name.
    pub name: String,
    /// One line for humans.
    pub description: String,
    /// Size in bytes, below 2^63.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether FAST_ZERO is offered.
    pub fast_zero: bool,
    /// The metadata contexts that there are.
    pub contexts: ContextSet,
    /// A power of two, `512 <= preferred <= 64 MiB`.
    pub preferred_block_size: u32,
}

/// Whether clients are told of exports whose name they do not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ListPolicy {
    /// LIST tells them, and the empty name is the only export, if there is just one.
    #[default]
    Show,
    /// LIST is answered ERR_POLICY, and the empty name is a name like any other.
    Hide,
}

/// How the server feels about this client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stance {
    /// Served.
    Welcome,
    /// Every option is answered ERR_POLICY with this text.
    Refused(String),
    /// Every option is answered ERR_SHUTDOWN.
    ShuttingDown,
}

/// What the server wants of TLS ("TLS support").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsPolicy {
    /// NOTLS: STARTTLS is answered ERR_POLICY.
    #[default]
    Off,
    /// SELECTIVETLS with no export that is TLS-only: clients may.
    On,
    /// FORCEDTLS: until a client has started TLS, everything but that and ABORT is answered ERR_TLS_REQD.
    Required,
}

/// What one handshake is held to.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Answer to LIST.
    pub list: ListPolicy,
    /// Answer to STARTTLS.
    pub tls: TlsPolicy,
    /// Most options.
    pub options: u32,
    /// Most bytes of option data.
    pub option_bytes: u64,
}

/// What was agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Index into the exports that the handshake was made with.
    pub export: usize,
    /// Form of headers and replies.
    pub mode: Mode,
    /// Metadata contexts for this export.
    pub contexts: ContextSet,
}

/// What the driver does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Feed more bytes.
    Wait,
    /// Send these.
    Send(Vec<u8>),
    /// Open the export with this index, then call [`Handshake::opened`].
    Open(usize),
    /// Shake hands in TLS, and go on inside it with [`Handshake::secured`].
    StartTls,
    /// The handshake is over; nothing more is to be sent before the first reply.
    Enter(Negotiated),
    /// Close, as the client wishes. What was sent must still reach it.
    Aborted,
    /// Close, for a reason worth a log line. What was sent must still reach the client.
    Close(&'static str),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Header,
    Data(OptionHeader),
    /// Drop so many more bytes of the option, then answer.
    Discard(OptionHeader, u32),
    Opening(OptionCode, Negotiated, WantedInfo),
    StartingTls,
    Entering(Negotiated),
    Aborted,
    Closed(&'static str),
}

/// One handshake, seen from the server.
#[derive(Debug)]
pub struct Handshake {
    exports: Arc<[ExportFacts]>,
    policy: Policy,
    stance: Stance,
    state: State,
    inbox: Vec<u8>,
    /// Bytes of the inbox that are done with; they are dropped at the next feed.
    consumed: usize,
    outbox: Vec<u8>,
    /// Inside TLS.
    secure: bool,
    zeroes: bool,
    fixed: bool,
    mode: Mode,
    contexts: Option<(usize, ContextSet)>,
    options: u32,
    option_bytes: u64,
}

impl Handshake {
    /// A handshake whose greeting has been sent.
    pub fn new(exports: Arc<[ExportFacts]>, policy: Policy, stance: Stance) -> Self {
        Self {
            exports,
            policy,
            stance,
            state: State::ClientFlags,
            inbox: Vec::new(),
            consumed: 0,
            outbox: Vec::new(),
            secure: false,
            zeroes: true,
            fixed: false,
            mode: Mode::default(),
            contexts: None,
            options: 0,
            option_bytes: 0,
        }
    }

    /// The handshake that follows [`Action::StartTls`]: a new one, inside TLS. Of the old one it knows the client flags, which
    /// are sent only once, and nothing else that came in plain text.
    #[must_use]
    pub fn secured(self) -> Self {
        let Self { exports, policy, stance, zeroes, fixed, .. } = self;
        Self { secure: true, zeroes, fixed, state: State::Header, ..Self::new(exports, policy, stance) }
    }

    /// Takes bytes of the client, any number of them.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.inbox.drain(..self.consumed);
        self.consumed = 0;
        self.inbox.extend_from_slice(bytes);
    }

    /// From now on options are answered ERR_SHUTDOWN.
    pub fn shut_down(&mut self) {
        self.stance = Stance::ShuttingDown;
    }

    /// The next thing to do; call it until it says [`Action::Wait`].
    pub fn next_action(&mut self) -> Action {
        loop {
            if !self.outbox.is_empty() {
                return Action::Send(std::mem::take(&mut self.outbox));
            }
            let went_on = match &self.state {
                State::ClientFlags => self.client_flags(),
                State::Header => self.header(),
                State::Data(header) => self.data(*header),
                State::Discard(header, left) => self.discard(*header, *left),
                State::Opening(_, negotiated, _) => return Action::Open(negotiated.export),
                State::StartingTls => return Action::StartTls,
                State::Entering(negotiated) => return Action::Enter(*negotiated),
                State::Aborted => return Action::Aborted,
                State::Closed(reason) => return Action::Close(reason),
            };
            if went_on.is_none() && self.outbox.is_empty() {
                return Action::Wait;
            }
        }
    }

    /// The answer to [`Action::Open`]: the export is open, or it is not and the client may try something else.
    pub fn opened(&mut self, result: Result<(), Error>) {
        let State::Opening(code, negotiated, wanted) = self.state else { return };
        self.state = State::Header;
        let result = match self.stance {
            Stance::ShuttingDown => Err(Error::new(ErrorKind::Shutdown, "the server is shutting down")),
            _ => result,
        };
        match (result, code) {
            (Ok(()), OptionCode::GO) => {
                self.information(code, negotiated, wanted);
                self.reply(code, ReplyType::ACK, &[]);
                self.state = State::Entering(negotiated);
            }
            (Ok(()), _) => {
                if let Some(info) = self.export_info(negotiated) {
                    self.outbox.extend(info.encode());
                }
                if self.zeroes {
                    self.outbox.extend([0; 124]);
                }
                self.state = State::Entering(negotiated);
            }
            (Err(error), OptionCode::GO) => {
                let reply = match error.kind {
                    ErrorKind::NotPermitted => ReplyType::ERR_POLICY,
                    ErrorKind::Shutdown => ReplyType::ERR_SHUTDOWN,
                    _ => ReplyType::ERR_PLATFORM,
                };
                self.refuse(code, reply, &error.text);
            }
            (Err(_), _) => self.state = State::Closed("EXPORT_NAME cannot be refused politely"),
        }
    }

    /// What was fed and not used: requests that were sent right behind GO.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.inbox.drain(..self.consumed);
        self.inbox
    }

    /// The unused part of what was fed.
    fn unread(&self) -> &[u8] {
        self.inbox.get(self.consumed..).unwrap_or_default()
    }

    fn client_flags(&mut self) -> Option<()> {
        let flags = u32::from_be_bytes(*self.unread().first_chunk()?);
        self.consumed += 4;
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        self.fixed = flags & u32::from(FIXED_NEWSTYLE) != 0;
        self.zeroes = flags & u32::from(NO_ZEROES) == 0;
        self.state = if flags & !known != 0 {
            State::Closed("unknown client flags")
        } else if self.lacks_tls() && !self.fixed {
            State::Closed("a client that is not fixed newstyle cannot start TLS")
        } else {
            State::Header
        };
        Some(())
    }

    fn header(&mut self) -> Option<()> {
        let bytes: [u8; OPTION_HEADER_LENGTH] = *self.unread().first_chunk()?;
        self.consumed += OPTION_HEADER_LENGTH;
        let Some(header) = OptionHeader::decode(bytes) else {
            self.state = State::Closed("wrong option magic");
            return Some(());
        };
        self.options += 1;
        self.option_bytes += u64::from(header.length);
        self.state = if self.options > self.policy.options {
            State::Closed("too many options")
        } else if !self.fixed && header.code != OptionCode::EXPORT_NAME {
            State::Closed("an option from a client that is not fixed newstyle")
        } else if header.code == OptionCode::ABORT {
            // Its data are ignored, and the connection ends: no need to wait for them.
            self.reply(header.code, ReplyType::ACK, &[]);
            State::Aborted
        } else if header.length > MAX_DISCARDED || self.option_bytes > self.policy.option_bytes {
            State::Closed("too many bytes of options")
        } else if header.code == OptionCode::EXPORT_NAME {
            // Its answer has no place for what extended headers are about, so the text forbids it after them.
            let possible = self.is_served() && self.mode != Mode::Extended;
            match usize::try_from(header.length) {
                Ok(length) if possible && length <= MAX_STRING => State::Data(header),
                _ => State::Closed("EXPORT_NAME cannot be refused politely"),
            }
        } else if header.length > MAX_PARSED || !has_data(header.code) || !self.is_served() {
            State::Discard(header, header.length)
        } else {
            State::Data(header)
        };
        Some(())
    }

    /// Whether TLS has to be started before anything else.
    fn lacks_tls(&self) -> bool {
        self.policy.tls == TlsPolicy::Required && !self.secure
    }

    /// Whether what an option says makes a difference to its answer.
    fn is_served(&self) -> bool {
        self.stance == Stance::Welcome && !self.lacks_tls()
    }

    fn discard(&mut self, header: OptionHeader, left: u32) -> Option<()> {
        let there = self.unread().len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.consumed += there;
        let left = left.saturating_sub(u32::try_from(there).unwrap_or(u32::MAX));
        self.state = State::Discard(header, left);
        if left > 0 {
            return None;
        }
        self.state = State::Header;
        self.answer_without_data(header);
        Some(())
    }

    fn data(&mut self, header: OptionHeader) -> Option<()> {
        let length = usize::try_from(header.length).ok()?;
        let data = self.unread().get(..length)?.to_vec();
        self.consumed += length;
        self.state = State::Header;
        match header.code {
            OptionCode::EXPORT_NAME => self.export_name(&data),
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => self.meta_context(header.code, &data),
            OptionCode::INFO | OptionCode::GO => self.info(header.code, &data),
            _ => self.answer_without_data(header),
        }
        Some(())
    }
}

impl Negotiated {
    /// What requests are checked against.
    pub fn terms(&self, facts: &ExportFacts) -> Terms {
        let ExportFacts { size, read_only, fast_zero, .. } = *facts;
        Terms { size, read_only, fast_zero, mode: self.mode, contexts: self.contexts }
    }
}

/// Whether the data of the option mean something here.
fn has_data(code: OptionCode) -> bool {
    matches!(code, OptionCode::INFO | OptionCode::GO | OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT)
}
