//! Random handshakes against a reference model that knows the protocol text and nothing of the server: the same replies,
//! the same end, the same terms. `SCALE` multiplies the number of handshakes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]

use std::sync::Arc;

use blockyard_nbd::handshake::{Action, ExportFacts, Handshake, ListPolicy, Negotiated, Policy, Stance, TlsPolicy};
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{
    InfoRequest, MetaRequest, OptionCode, OptionReplyHeader, ReplyType, WantedInfo, encode_option,
};
use blockyard_nbd::{ContextSet, Error, ErrorKind};

/// The second one is read-only.
const NAMES: [&str; 2] = ["disk0", "the other disk"];

/// One option, as the generator means it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ask {
    /// An option without meaning here: number and length of data.
    Unknown(u32, usize),
    /// Options that take no data, and how many bytes come with them.
    List(usize),
    Structured(usize),
    Extended(usize),
    StartTls(usize),
    Abort(usize),
    /// INFO and GO: the name, which may be nobody's, and what is wrong with the data.
    Info {
        go: bool,
        name: &'static str,
        flaw: Flaw,
    },
    /// LIST_META_CONTEXT and SET_META_CONTEXT.
    Meta {
        set: bool,
        name: &'static str,
        queries: Vec<&'static str>,
        flaw: Flaw,
    },
    ExportName(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// A byte less than the lengths inside say.
    Short,
    /// A byte more.
    Long,
    /// More than is looked at.
    Huge,
}

/// What the server may open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    Works,
    Fails,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Course {
    /// Option and reply type of each reply, and which export, context or flags it names.
    replies: Vec<(u32, ReplyType, Option<String>)>,
    entered: Option<Negotiated>,
    closed: bool,
    opened: usize,
    secured: bool,
}

/// The model: what the text says of each option in each state.
fn expected(asks: &[Ask], opening: Opening, tls: TlsPolicy) -> Course {
    let mut course = Course::default();
    let mut mode = Mode::Simple;
    let mut set: Option<(usize, ContextSet)> = None;
    let find = |name: &str| NAMES.iter().position(|known| *known == name);
    for ask in asks {
        let (code, _) = encode(ask);
        let mut say = |reply| course.replies.push((code.0, reply, None));
        let agreed = |export| {
            let contexts = set.filter(|(selected, _)| *selected == export).map(|(_, contexts)| contexts);
            Negotiated { export, mode, contexts: contexts.unwrap_or_default() }
        };
        match ask {
            Ask::Abort(_) => {
                say(ReplyType::ACK);
                course.closed = true;
                return course;
            }
            Ask::StartTls(0) if course.secured => say(ReplyType::ERR_INVALID),
            Ask::StartTls(0) if tls == TlsPolicy::Off => say(ReplyType::ERR_POLICY),
            Ask::StartTls(0) => {
                say(ReplyType::ACK);
                (mode, set, course.secured) = (Mode::Simple, None, true);
            }
            Ask::StartTls(_) => say(ReplyType::ERR_INVALID),
            Ask::ExportName(_) if tls == TlsPolicy::Required && !course.secured => {
                course.closed = true;
                return course;
            }
            _ if tls == TlsPolicy::Required && !course.secured => say(ReplyType::ERR_TLS_REQD),
            Ask::Unknown(..) => say(ReplyType::ERR_UNSUP),
            Ask::List(0) => {
                for name in NAMES {
                    course.replies.push((code.0, ReplyType::SERVER, Some(name.into())));
                }
                course.replies.push((code.0, ReplyType::ACK, None));
            }
            Ask::Structured(0) if mode == Mode::Extended => say(ReplyType::ERR_EXT_HEADER_REQD),
            Ask::Structured(0) if mode == Mode::Simple => {
                mode = Mode::Structured;
                say(ReplyType::ACK);
            }
            Ask::Extended(0) if mode != Mode::Extended => {
                mode = Mode::Extended;
                say(ReplyType::ACK);
            }
            Ask::List(_) | Ask::Structured(_) | Ask::Extended(_) => say(ReplyType::ERR_INVALID),
            Ask::Info { flaw: Flaw::Huge, .. } => say(ReplyType::ERR_TOO_BIG),
            Ask::Info { flaw: Flaw::Short | Flaw::Long, .. } => say(ReplyType::ERR_INVALID),
            Ask::Info { go, name, .. } => match find(name) {
                None => say(ReplyType::ERR_UNKNOWN),
                Some(_) if *go && opening == Opening::Fails => {
                    course.opened += 1;
                    course.replies.push((code.0, ReplyType::ERR_PLATFORM, None));
                }
                Some(export) => {
                    let flags = format!("{:#06x}", flags_of(agreed(export)));
                    course.replies.push((code.0, ReplyType::INFO, Some(flags)));
                    for reply in [ReplyType::INFO, ReplyType::INFO, ReplyType::ACK] {
                        course.replies.push((code.0, reply, None));
                    }
                    if *go {
                        course.opened += 1;
                        course.entered = Some(agreed(export));
                        return course;
                    }
                }
            },
            Ask::Meta { set: replaces, name, queries, flaw } => {
                if *replaces {
                    set = None;
                }
                if *flaw == Flaw::Huge {
                    say(ReplyType::ERR_TOO_BIG);
                    continue;
                }
                let lie = matches!(flaw, Flaw::Short | Flaw::Long) || queries.iter().any(|query| !query.contains(':'));
                if lie || (*replaces && mode == Mode::Simple) {
                    say(ReplyType::ERR_INVALID);
                    continue;
                }
                let Some(export) = find(name) else {
                    say(ReplyType::ERR_UNKNOWN);
                    continue;
                };
                let told = |name, wildcard| {
                    let listed = !replaces && (queries.is_empty() || queries.contains(&wildcard));
                    listed || queries.contains(&name)
                };
                let contexts = ContextSet {
                    base_allocation: told("base:allocation", "base:"),
                    allocation_depth: told("qemu:allocation-depth", "qemu:"),
                };
                for (one, name) in [
                    (contexts.base_allocation, "base:allocation"),
                    (contexts.allocation_depth, "qemu:allocation-depth"),
                ] {
                    if one {
                        course.replies.push((code.0, ReplyType::META_CONTEXT, Some(name.into())));
                    }
                }
                if *replaces {
                    set = Some((export, contexts));
                }
                course.replies.push((code.0, ReplyType::ACK, None));
            }
            // It has no place for what extended headers are about.
            Ask::ExportName(_) if mode == Mode::Extended => {
                course.closed = true;
                return course;
            }
            Ask::ExportName(name) => {
                let export = find(name);
                course.opened += usize::from(export.is_some());
                match export.filter(|_| opening == Opening::Works) {
                    Some(export) => course.entered = Some(agreed(export)),
                    None => course.closed = true,
                }
                return course;
            }
        }
    }
    course
}

/// The transmission flags, the same from INFO as from GO.
fn flags_of(Negotiated { export, mode, contexts }: Negotiated) -> u16 {
    let all = if export == 0 { 0x0d6d } else { 0x050f };
    let fragments = if mode == Mode::Simple { 0 } else { 0x0080 };
    let filters = if mode == Mode::Extended && contexts != ContextSet::NONE { 0x1000 } else { 0 };
    all | fragments | filters
}

fn encode(ask: &Ask) -> (OptionCode, Vec<u8>) {
    let spoil = |mut data: Vec<u8>, flaw| {
        match flaw {
            Flaw::None => {}
            Flaw::Short => _ = data.pop(),
            Flaw::Long => data.push(0),
            Flaw::Huge => data.resize(65537, 0),
        }
        data
    };
    match ask {
        Ask::Unknown(code, length) => (OptionCode(*code), vec![7; *length]),
        Ask::List(length) => (OptionCode::LIST, vec![0; *length]),
        Ask::Structured(length) => (OptionCode::STRUCTURED_REPLY, vec![0; *length]),
        Ask::Extended(length) => (OptionCode::EXTENDED_HEADERS, vec![0; *length]),
        Ask::StartTls(length) => (OptionCode::STARTTLS, vec![0; *length]),
        Ask::Abort(length) => (OptionCode::ABORT, vec![0; *length]),
        Ask::Info { go, name, flaw } => {
            let code = if *go { OptionCode::GO } else { OptionCode::INFO };
            let wanted = WantedInfo { name: true, description: false };
            (code, spoil(InfoRequest { name, wanted }.encode(), *flaw))
        }
        Ask::Meta { set, name, queries, flaw } => {
            let code = if *set { OptionCode::SET_META_CONTEXT } else { OptionCode::LIST_META_CONTEXT };
            (code, spoil(MetaRequest::encode(name, queries), *flaw))
        }
        Ask::ExportName(name) => (OptionCode::EXPORT_NAME, name.as_bytes().to_vec()),
    }
}

/// What the server does. A client waits for the answer to STARTTLS, so with TLS each option is fed alone.
fn actual(asks: &[Ask], opening: Opening, tls: TlsPolicy, step: usize) -> Course {
    let facts = NAMES.map(|name| ExportFacts {
        name: name.into(),
        description: "a disk".into(),
        size: 1 << 20,
        read_only: name != NAMES[0],
        fast_zero: true,
        contexts: ContextSet::ALL,
        preferred_block_size: 4096,
    });
    let policy = Policy { list: ListPolicy::Show, tls, options: 256, option_bytes: 4 << 20 };
    let mut handshake = Handshake::new(Arc::new(facts), policy, Stance::Welcome);
    let options = asks.iter().map(|ask| {
        let (code, data) = encode(ask);
        encode_option(code, &data)
    });
    let messages: Vec<Vec<u8>> = [3u32.to_be_bytes().to_vec()].into_iter().chain(options).collect();
    let whole = messages.concat();
    let pieces: Vec<&[u8]> = match tls {
        TlsPolicy::Off => whole.chunks(step).collect(),
        TlsPolicy::On | TlsPolicy::Required => messages.iter().map(Vec::as_slice).collect(),
    };
    let mut course = Course::default();
    let mut sent = Vec::new();
    'feeding: for piece in pieces {
        handshake.feed(piece);
        loop {
            match handshake.next_action() {
                Action::Wait => break,
                Action::Send(bytes) => sent.extend(bytes),
                Action::Open(_) => {
                    course.opened += 1;
                    handshake.opened(match opening {
                        Opening::Works => Ok(()),
                        Opening::Fails => Err(Error::new(ErrorKind::Io, "it is broken")),
                    });
                }
                Action::StartTls => {
                    course.secured = true;
                    handshake = handshake.secured();
                }
                Action::Enter(negotiated) => {
                    course.entered = Some(negotiated);
                    break 'feeding;
                }
                Action::Aborted | Action::Close(_) => {
                    course.closed = true;
                    break 'feeding;
                }
            }
        }
    }
    let mut rest = &sent[..];
    while let Some((header, behind)) = rest.split_first_chunk() {
        let header = OptionReplyHeader::decode(*header).unwrap();
        let (data, behind) = behind.split_at(header.length as usize);
        let text = |data: &[u8]| Some(String::from_utf8(data.to_vec()).unwrap());
        let named = match header.reply {
            ReplyType::SERVER => {
                let length = u32::from_be_bytes(*data.first_chunk().unwrap()) as usize;
                text(&data[4..4 + length])
            }
            ReplyType::META_CONTEXT => text(&data[4..]),
            ReplyType::INFO if data.starts_with(&[0, 0]) => Some(format!("0x{:02x}{:02x}", data[10], data[11])),
            _ => None,
        };
        course.replies.push((header.code.0, header.reply, named));
        rest = behind;
    }
    let by_name = matches!(asks.last(), Some(Ask::ExportName(_))) && course.entered.is_some() && rest.len() == 10;
    assert!(rest.is_empty() || by_name, "half a reply");
    course
}

/// A generator whose sequences are told by their seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn ask(&mut self) -> Ask {
        let name = self.of(&[NAMES[0], NAMES[0], NAMES[0], NAMES[1], "nosuch", ""]);
        let flaw = match self.below(24) {
            0 => Flaw::Short,
            1 => Flaw::Long,
            2 => Flaw::Huge,
            _ => Flaw::None,
        };
        match self.below(16) {
            0 => Ask::Unknown(self.of(&[0, 4, 12, 0xffff, u32::MAX]), self.of(&[0, 1, 16, 70_000])),
            1 => Ask::List(self.of(&[0, 0, 1])),
            2..4 => Ask::Structured(self.of(&[0, 0, 0, 0, 0, 1])),
            4 => Ask::Extended(self.of(&[0, 0, 0, 1])),
            5..7 => Ask::Info { go: false, name, flaw },
            7 if self.below(2) == 0 => Ask::Info { go: true, name, flaw },
            8 if self.below(4) == 0 => Ask::ExportName(name),
            10 => Ask::StartTls(self.of(&[0, 0, 0, 1])),
            9 if self.below(4) == 0 => Ask::Abort(self.of(&[0, 5])),
            more => {
                let known = ["base:allocation", "qemu:allocation-depth", "base:", "qemu:", "base:nosuch", "x:y", ":"];
                let mut queries: Vec<_> = (0..self.below(4)).map(|_| self.of(&known)).collect();
                if self.below(16) == 0 {
                    queries.push("colonless");
                }
                Ask::Meta { set: more % 4 != 0, name, queries, flaw }
            }
        }
    }
}

fn scale() -> u64 {
    std::env::var("SCALE").map_or(1, |scale| scale.parse().unwrap())
}

#[test]
fn random_handshakes_go_as_the_model_says() {
    let (mut entered, mut closed, mut with_contexts, mut secured) = (0, 0, 0, 0);
    let handshakes = 20_000 * scale();
    for seed in 0..handshakes {
        let mut random = Random(seed);
        let mut asks: Vec<Ask> = (0..random.below(16)).map(|_| random.ask()).collect();
        asks.push(Ask::Info { go: true, name: NAMES[0], flaw: Flaw::None });
        if let Some(last) = asks.iter().position(|ask| matches!(ask, Ask::ExportName(_))) {
            asks.truncate(last + 1);
        }
        let opening = if seed % 8 == 0 { Opening::Fails } else { Opening::Works };
        let tls = random.of(&[TlsPolicy::Off, TlsPolicy::Off, TlsPolicy::On, TlsPolicy::Required]);
        let model = expected(&asks, opening, tls);
        let step = random.of(&[1 << 20, 4096, 501]);
        assert_eq!(actual(&asks, opening, tls, step), model, "seed {seed}, {tls:?}: {asks:?}");
        entered += usize::from(model.entered.is_some());
        closed += usize::from(model.closed);
        secured += usize::from(model.secured);
        with_contexts += usize::from(model.entered.is_some_and(|agreed| agreed.contexts != ContextSet::default()));
    }
    println!(
        "{handshakes} handshakes: {entered} entered, {with_contexts} with contexts, {secured} in TLS, {closed} closed"
    );
    assert!(entered > 8000 && with_contexts > 500 && closed > 1000 && secured > 1000);
}
