//! What each option is answered, once its data are there.
#![deny(clippy::indexing_slicing)]

use super::{Handshake, ListPolicy, Negotiated, Stance, State, TlsPolicy};
use crate::transmission::Mode;
use crate::wire::option::{
    BlockSizes, ExportInfo, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, InfoRequest, MetaRequest,
    OptionCode, OptionHeader, ReplyType, WantedInfo, encode_reply, prefixed,
};
use crate::wire::{MAX_ERROR_TEXT, MAX_PAYLOAD, string, truncated};
use crate::{Context, ContextSet};

impl Handshake {
    /// Options whose data were dropped: those that take none, unknown ones, and any from a client that is not welcome.
    pub(super) fn answer_without_data(&mut self, OptionHeader { code, length }: OptionHeader) {
        match &self.stance {
            Stance::Welcome => {}
            Stance::Refused(text) => {
                let text = text.clone();
                return self.refuse(code, ReplyType::ERR_POLICY, &text);
            }
            Stance::ShuttingDown => return self.refuse(code, ReplyType::ERR_SHUTDOWN, "the server is shutting down"),
        }
        match code {
            OptionCode::STARTTLS => self.start_tls(length),
            _ if self.lacks_tls() => self.refuse(code, ReplyType::ERR_TLS_REQD, "start TLS first"),
            OptionCode::LIST | OptionCode::STRUCTURED_REPLY | OptionCode::EXTENDED_HEADERS if length > 0 => {
                self.refuse(code, ReplyType::ERR_INVALID, "the option takes no data");
            }
            OptionCode::LIST => self.list(),
            OptionCode::STRUCTURED_REPLY if self.mode == Mode::Simple => {
                self.mode = Mode::Structured;
                self.reply(code, ReplyType::ACK, &[]);
            }
            OptionCode::STRUCTURED_REPLY if self.mode == Mode::Extended => {
                self.refuse(code, ReplyType::ERR_EXT_HEADER_REQD, "extended headers were negotiated, which go further");
            }
            OptionCode::STRUCTURED_REPLY => {
                self.refuse(code, ReplyType::ERR_INVALID, "structured replies were negotiated before");
            }
            OptionCode::EXTENDED_HEADERS if self.mode == Mode::Extended => {
                self.refuse(code, ReplyType::ERR_INVALID, "extended headers were negotiated before");
            }
            OptionCode::EXTENDED_HEADERS => {
                self.mode = Mode::Extended;
                self.reply(code, ReplyType::ACK, &[]);
            }
            OptionCode::INFO | OptionCode::GO | OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                if code == OptionCode::SET_META_CONTEXT {
                    self.contexts = None;
                }
                self.refuse(code, ReplyType::ERR_TOO_BIG, "the option is longer than 65536 bytes");
            }
            _ => self.refuse(code, ReplyType::ERR_UNSUP, "the option is not supported"),
        }
    }

    /// A client has to wait for the ACK. What came before it was not said by whoever shakes hands in TLS afterwards.
    fn start_tls(&mut self, length: u32) {
        let code = OptionCode::STARTTLS;
        if length > 0 {
            self.refuse(code, ReplyType::ERR_INVALID, "the option takes no data");
        } else if self.secure {
            self.refuse(code, ReplyType::ERR_INVALID, "TLS was started before");
        } else if self.policy.tls == TlsPolicy::Off {
            self.refuse(code, ReplyType::ERR_POLICY, "TLS is not configured here");
        } else if !self.unread().is_empty() {
            self.state = State::Closed("bytes behind STARTTLS");
        } else {
            self.reply(code, ReplyType::ACK, &[]);
            self.state = State::StartingTls;
        }
    }

    pub(super) fn export_name(&mut self, data: &[u8]) {
        let export = string(data).and_then(|name| self.find(name));
        self.state = match export {
            Some(export) => State::Opening(OptionCode::EXPORT_NAME, self.agreed(export), WantedInfo::default()),
            None => State::Closed("EXPORT_NAME for an export that is not here"),
        };
    }

    pub(super) fn info(&mut self, code: OptionCode, data: &[u8]) {
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(text) => return self.refuse(code, ReplyType::ERR_INVALID, text),
        };
        let Some(export) = self.find(request.name) else { return self.unknown(code, request.name) };
        let negotiated = self.agreed(export);
        if code == OptionCode::GO {
            self.state = State::Opening(code, negotiated, request.wanted);
        } else {
            self.information(code, negotiated, request.wanted);
            self.reply(code, ReplyType::ACK, &[]);
        }
    }

    pub(super) fn meta_context(&mut self, code: OptionCode, data: &[u8]) {
        let set = code == OptionCode::SET_META_CONTEXT;
        if set {
            // Also a SET that fails replaces what an earlier one selected.
            self.contexts = None;
            if self.mode == Mode::Simple {
                return self.refuse(code, ReplyType::ERR_INVALID, "negotiate structured replies first");
            }
        }
        let request = match MetaRequest::decode(data) {
            Ok(request) => request,
            Err(text) => return self.refuse(code, ReplyType::ERR_INVALID, text),
        };
        let Some(export) = self.find(request.name) else { return self.unknown(code, request.name) };
        let there = self.exports.get(export).map_or(ContextSet::NONE, |facts| facts.contexts);
        let told: ContextSet = there.iter().filter(|context| asks_for(&request, *context, set)).collect();
        for context in told.iter() {
            let id = if set { context.id() } else { 0 };
            self.reply(code, ReplyType::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()]);
        }
        if set {
            self.contexts = Some((export, told));
        }
        self.reply(code, ReplyType::ACK, &[]);
    }

    fn list(&mut self) {
        let code = OptionCode::LIST;
        if self.policy.list == ListPolicy::Hide {
            return self.refuse(code, ReplyType::ERR_POLICY, "listing is not allowed here");
        }
        for export in self.exports.clone().iter() {
            self.reply(code, ReplyType::SERVER, &[&prefixed(&export.name), export.description.as_bytes()]);
        }
        self.reply(code, ReplyType::ACK, &[]);
    }

    /// The answers of INFO and GO before their ACK.
    pub(super) fn information(&mut self, code: OptionCode, negotiated: Negotiated, wanted: WantedInfo) {
        let exports = self.exports.clone();
        let Some(facts) = exports.get(negotiated.export) else { return };
        let Some(info) = self.export_info(negotiated) else { return };
        self.reply(code, ReplyType::INFO, &[&INFO_EXPORT.to_be_bytes(), &info.encode()]);
        if wanted.name {
            self.reply(code, ReplyType::INFO, &[&INFO_NAME.to_be_bytes(), facts.name.as_bytes()]);
        }
        if wanted.description {
            self.reply(code, ReplyType::INFO, &[&INFO_DESCRIPTION.to_be_bytes(), facts.description.as_bytes()]);
        }
        let sizes = BlockSizes { minimum: 1, preferred: facts.preferred_block_size, maximum: MAX_PAYLOAD };
        self.reply(code, ReplyType::INFO, &[&INFO_BLOCK_SIZE.to_be_bytes(), &sizes.encode()]);
    }

    pub(super) fn export_info(&self, negotiated: Negotiated) -> Option<ExportInfo> {
        let facts = self.exports.get(negotiated.export)?;
        Some(ExportInfo { size: facts.size, flags: negotiated.terms(facts).flags() })
    }

    /// The export of that name; the empty one is the only export, if there is just one and its name is no secret.
    fn find(&self, name: &str) -> Option<usize> {
        let found = self.exports.iter().position(|export| export.name == name);
        let is_default = name.is_empty() && self.exports.len() == 1 && self.policy.list == ListPolicy::Show;
        found.or(is_default.then_some(0))
    }

    /// What entering `export` now would mean. Contexts that were selected for another export do not count.
    fn agreed(&self, export: usize) -> Negotiated {
        let contexts = self.contexts.filter(|(selected, _)| *selected == export);
        Negotiated { export, mode: self.mode, contexts: contexts.map(|(_, set)| set).unwrap_or_default() }
    }

    fn unknown(&mut self, code: OptionCode, name: &str) {
        let name = truncated(name, 256);
        self.refuse(code, ReplyType::ERR_UNKNOWN, &format!("there is no export \"{name}\" here"));
    }

    pub(super) fn refuse(&mut self, code: OptionCode, reply: ReplyType, text: &str) {
        self.reply(code, reply, &[truncated(text, MAX_ERROR_TEXT).as_bytes()]);
    }

    pub(super) fn reply(&mut self, code: OptionCode, reply: ReplyType, data: &[&[u8]]) {
        encode_reply(&mut self.outbox, code, reply, data);
    }
}

/// Whether the queries name a context. LIST without queries asks for all of them and knows `base:` and `qemu:` as wildcards; SET
/// knows neither.
fn asks_for(request: &MetaRequest<'_>, context: Context, set: bool) -> bool {
    let name = context.name();
    let is_wildcard = |query: &str| query.ends_with(':') && query.len() > 1 && name.starts_with(query);
    let mut queries = request.queries().peekable();
    (!set && queries.peek().is_none()) || queries.any(|query| query == name || (!set && is_wildcard(query)))
}
