//! The handshake as bytes: each option in each state, data that lie, and the same answers however the bytes arrive.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockyard_nbd::handshake::{Action, ExportFacts, Handshake, ListPolicy, Negotiated, Policy, Stance, TlsPolicy};
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{
    InfoRequest, MetaRequest, OptionCode, OptionReplyHeader, ReplyType, WantedInfo, encode_option,
};
use blockyard_nbd::{ContextSet, Error, ErrorKind};

const FIXED: u32 = 1;
const NO_ZEROES: u32 = 3;

fn facts(name: &str) -> ExportFacts {
    ExportFacts {
        name: name.into(),
        description: "a disk".into(),
        size: 1000,
        read_only: false,
        fast_zero: true,
        contexts: ContextSet { base_allocation: true, ..ContextSet::NONE },
        preferred_block_size: 65536,
    }
}

fn policy() -> Policy {
    Policy { list: ListPolicy::Show, tls: TlsPolicy::Off, options: 256, option_bytes: 4 << 20 }
}

/// What a conversation came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    sent: Vec<u8>,
    opened: Vec<usize>,
    entered: Option<Negotiated>,
    closed: Option<&'static str>,
    rest: Vec<u8>,
}

impl Told {
    /// The option replies in what was sent.
    fn replies(&self) -> Vec<(OptionCode, ReplyType, Vec<u8>)> {
        let mut replies = Vec::new();
        let mut bytes = &self.sent[..];
        while let Some((header, rest)) = bytes.split_first_chunk() {
            let header = OptionReplyHeader::decode(*header).unwrap();
            let (data, rest) = rest.split_at(header.length as usize);
            replies.push((header.code, header.reply, data.to_vec()));
            bytes = rest;
        }
        assert!(bytes.is_empty(), "half a header");
        replies
    }

    fn types(&self) -> Vec<ReplyType> {
        self.replies().into_iter().map(|(_, reply, _)| reply).collect()
    }
}

/// A server under test.
struct Server {
    exports: Arc<[ExportFacts]>,
    policy: Policy,
    stance: Stance,
    open: Result<(), Error>,
}

impl Server {
    fn new() -> Self {
        Self { exports: [facts("disk0")].into(), policy: policy(), stance: Stance::Welcome, open: Ok(()) }
    }

    fn two() -> Self {
        Self { exports: [facts("disk0"), facts("disk1")].into(), ..Self::new() }
    }

    /// Feeds `bytes` in pieces that end at each of `cuts`.
    fn talk(&self, bytes: &[u8], cuts: impl IntoIterator<Item = usize>) -> Told {
        let mut handshake = Handshake::new(self.exports.clone(), self.policy.clone(), self.stance.clone());
        let mut told = Told::default();
        let mut at = 0;
        for cut in cuts.into_iter().chain([bytes.len()]) {
            handshake.feed(&bytes[at..cut]);
            at = cut;
            loop {
                match handshake.next_action() {
                    Action::Wait => break,
                    Action::Send(bytes) => told.sent.extend(bytes),
                    Action::Open(export) => {
                        told.opened.push(export);
                        handshake.opened(self.open.clone());
                    }
                    Action::StartTls => handshake = handshake.secured(),
                    Action::Enter(negotiated) => {
                        told.entered = Some(negotiated);
                        break;
                    }
                    Action::Aborted => {
                        told.closed = Some("aborted");
                        break;
                    }
                    Action::Close(reason) => {
                        told.closed = Some(reason);
                        break;
                    }
                }
            }
        }
        told.rest = handshake.into_rest();
        told
    }

    fn hears(&self, flags: u32, options: &[(OptionCode, &[u8])]) -> Told {
        self.talk(&conversation(flags, options), [])
    }
}

fn conversation(flags: u32, options: &[(OptionCode, &[u8])]) -> Vec<u8> {
    let options = options.iter().flat_map(|(code, data)| encode_option(*code, data));
    flags.to_be_bytes().into_iter().chain(options).collect()
}

fn go(name: &str) -> Vec<u8> {
    InfoRequest { name, wanted: WantedInfo { name: true, description: true } }.encode()
}

fn base(name: &str) -> Vec<u8> {
    MetaRequest::encode(name, &["base:allocation"])
}

const ACK: ReplyType = ReplyType::ACK;
const INFO: ReplyType = ReplyType::INFO;
const STRUCTURED: (OptionCode, &[u8]) = (OptionCode::STRUCTURED_REPLY, &[]);

#[test]
fn a_full_handshake_is_answered_alike_wherever_the_stream_is_cut() {
    let server = Server::new();
    let mut bytes = conversation(
        NO_ZEROES,
        &[
            (OptionCode(77), b"what?"),
            STRUCTURED,
            (OptionCode::LIST, b""),
            (OptionCode::INFO, &go("nosuch")),
            (OptionCode::INFO, &go("disk0")),
            (OptionCode::LIST_META_CONTEXT, &MetaRequest::encode("", &[])),
            (OptionCode::SET_META_CONTEXT, &base("disk0")),
            (OptionCode::GO, &go("")),
        ],
    );
    bytes.extend(b"the first requests");
    let whole = server.talk(&bytes, []);
    let meta = ReplyType::META_CONTEXT;
    let expected = [
        vec![ReplyType::ERR_UNSUP, ACK, ReplyType::SERVER, ACK, ReplyType::ERR_UNKNOWN],
        vec![INFO, INFO, INFO, INFO, ACK, meta, ACK, meta, ACK, INFO, INFO, INFO, INFO, ACK],
    ];
    assert_eq!(whole.types(), expected.concat());
    let contexts = ContextSet { base_allocation: true, ..ContextSet::NONE };
    assert_eq!(whole.entered, Some(Negotiated { export: 0, mode: Mode::Structured, contexts }));
    assert_eq!(whole.rest, b"the first requests");
    for cut in 0..bytes.len() {
        assert_eq!(server.talk(&bytes, [cut]), whole, "cut at {cut}");
    }
    assert_eq!(server.talk(&bytes, 0..bytes.len()), whole, "byte by byte");
}

#[test]
fn the_same_handshake_ending_early_at_any_byte_opens_nothing() {
    let server = Server::new();
    let bytes = conversation(NO_ZEROES, &[STRUCTURED, (OptionCode::GO, &go("disk0"))]);
    for end in 0..bytes.len() {
        let told = server.talk(&bytes[..end], []);
        assert_eq!((told.opened.len(), told.entered, told.closed), (0, None, None), "end at {end}");
    }
    assert_eq!(server.talk(&bytes, []).opened, [0]);
}

#[test]
fn unknown_client_flags_close_at_once() {
    for flags in [4, 0x13, u32::MAX] {
        let told = Server::new().hears(flags, &[(OptionCode::GO, &go("disk0"))]);
        assert!(told.closed.is_some() && told.sent.is_empty(), "flags {flags:#x}");
    }
    let http = Server::new().talk(b"GET / HTTP/1.1\r\nHost: disk0\r\n\r\n", []);
    assert!(http.closed.is_some() && http.sent.is_empty());
    let tls = Server::new().talk(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", []);
    assert!(tls.closed.is_some() && tls.sent.is_empty());
}

#[test]
fn export_name_gets_zeroes_unless_the_client_does_without() {
    for (flags, length) in [(0, 134), (1, 134), (2, 10), (3, 10)] {
        let told = Server::new().hears(flags, &[(OptionCode::EXPORT_NAME, b"disk0")]);
        assert_eq!(told.sent.len(), length, "flags {flags}");
        assert_eq!(told.sent[..10], [0, 0, 0, 0, 0, 0, 3, 0xe8, 0x0d, 0x6d]);
        assert!(told.sent[10..].iter().all(|byte| *byte == 0));
        assert!(told.entered.is_some());
    }
}

#[test]
fn export_name_that_cannot_be_served_closes_without_a_byte() {
    let long = [b'n'; 4097];
    for name in [&b"nosuch"[..], b"disk0\0", b"\xff\xfe", &long] {
        let told = Server::new().hears(FIXED, &[(OptionCode::EXPORT_NAME, name)]);
        assert!(told.closed.is_some() && told.sent.is_empty() && told.opened.is_empty());
    }
    let broken = Server { open: Err(Error::new(ErrorKind::Io, "no")), ..Server::new() };
    let told = broken.hears(FIXED, &[(OptionCode::EXPORT_NAME, b"disk0")]);
    assert!(told.closed.is_some() && told.sent.is_empty());
}

#[test]
fn a_client_that_is_not_fixed_newstyle_gets_export_name_only() {
    for flags in [0, 2] {
        for code in [2, 3, 5, 6, 7, 8, 9, 10, 11, 99].map(OptionCode) {
            let told = Server::new().hears(flags, &[(code, b"")]);
            assert!(told.closed.is_some() && told.sent.is_empty(), "option {code:?}");
        }
    }
}

#[test]
fn a_wrong_option_magic_closes() {
    let mut bytes = conversation(FIXED, &[(OptionCode::LIST, b"")]);
    bytes[4] ^= 1;
    let told = Server::new().talk(&bytes, []);
    assert!(told.closed.is_some() && told.sent.is_empty());
}

#[test]
fn abort_is_acknowledged_and_its_data_are_ignored() {
    for data in [&b""[..], b"why not"] {
        let told = Server::new().hears(FIXED, &[(OptionCode::ABORT, data)]);
        assert_eq!((told.types(), told.closed.is_some()), (vec![ACK], true));
    }
    let mut lying = conversation(FIXED, &[(OptionCode::ABORT, b"")]);
    let end = lying.len();
    lying[end - 4..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(Server::new().talk(&lying, []).types(), [ACK]);
}

#[test]
fn options_not_served_are_unsupported_and_the_next_one_is_understood() {
    for code in [4, 12, 0xffff, u32::MAX, 0].map(OptionCode) {
        for data in [&b""[..], b"x", &[7; 70_000], &[7; 1 << 20]] {
            let told = Server::new().hears(FIXED, &[(code, data), (OptionCode::GO, &go("disk0"))]);
            assert_eq!(told.replies()[0].0, code, "the option is echoed");
            assert_eq!(told.types()[0], ReplyType::ERR_UNSUP, "{code:?} with {} bytes", data.len());
            assert!(told.entered.is_some());
        }
    }
}

#[test]
fn starttls_is_a_matter_of_policy_and_takes_no_data() {
    for (data, answer) in
        [(&b""[..], ReplyType::ERR_POLICY), (b"x", ReplyType::ERR_INVALID), (&[7; 70_000], ReplyType::ERR_INVALID)]
    {
        let told = Server::new().hears(FIXED, &[(OptionCode::STARTTLS, data), (OptionCode::GO, &go("disk0"))]);
        assert_eq!(told.types()[0], answer, "{} bytes", data.len());
        assert!(told.entered.is_some());
    }
    let server = Server { policy: Policy { tls: TlsPolicy::On, ..policy() }, ..Server::new() };
    let mut handshake = Handshake::new(server.exports, server.policy, server.stance);
    handshake.feed(&conversation(FIXED, &[STRUCTURED, (OptionCode::STARTTLS, b"")]));
    let mut acks = Vec::new();
    while let Action::Send(bytes) = handshake.next_action() {
        acks.extend(bytes);
    }
    assert_eq!(Told { sent: acks, ..Told::default() }.types(), [ACK, ACK]);
    // Only after the ACK was sent, and until the driver has done it.
    assert_eq!(handshake.next_action(), Action::StartTls);
    assert_eq!(handshake.next_action(), Action::StartTls);
    // What was fed meanwhile belongs to no handshake of TLS.
    handshake.feed(&encode_option(OptionCode::GO, &go("disk0")));
    let mut handshake = handshake.secured();
    assert_eq!(handshake.next_action(), Action::Wait);
    handshake.feed(&encode_option(OptionCode::STARTTLS, b""));
    let Action::Send(bytes) = handshake.next_action() else { panic!("no answer") };
    assert_eq!(Told { sent: bytes, ..Told::default() }.types(), [ReplyType::ERR_INVALID]);
}

#[test]
fn more_than_a_mebibyte_of_option_closes_and_so_do_many_large_ones() {
    for length in [(1 << 20) + 1, 1 << 31, u32::MAX] {
        for code in [1, 3, 6, 7, 8, 9, 10, 77].map(OptionCode) {
            let mut bytes = conversation(FIXED, &[(code, b"")]);
            let end = bytes.len();
            bytes[end - 4..].copy_from_slice(&u32::to_be_bytes(length));
            let told = Server::new().talk(&bytes, []);
            assert!(told.closed.is_some() && told.sent.is_empty(), "{code:?} of {length}");
        }
    }
    let large: (OptionCode, &[u8]) = (OptionCode(77), &[0; 1 << 20]);
    let told = Server::new().hears(FIXED, &[large, large, large, large, (OptionCode(77), b"x")]);
    assert_eq!((told.types().len(), told.closed.is_some()), (4, true));
}

#[test]
fn the_257th_option_closes() {
    let list: (OptionCode, &[u8]) = (OptionCode::LIST, b"");
    let told = Server::new().hears(FIXED, &vec![list; 256]);
    assert_eq!((told.types().len(), told.closed), (512, None));
    assert!(Server::new().hears(FIXED, &vec![list; 257]).closed.is_some());
}

#[test]
fn options_without_data_refuse_data() {
    for code in [OptionCode::LIST, OptionCode::STRUCTURED_REPLY] {
        for data in [&b"x"[..], &[0; 65537]] {
            let told = Server::new().hears(FIXED, &[(code, data), (OptionCode::LIST, b"")]);
            assert_eq!(told.types(), [ReplyType::ERR_INVALID, ReplyType::SERVER, ACK]);
        }
    }
}

#[test]
fn options_with_data_beyond_64_kib_are_too_big() {
    for code in [6, 7, 9, 10].map(OptionCode) {
        let told = Server::new().hears(FIXED, &[STRUCTURED, (code, &[0; 65537]), (OptionCode::GO, &go("disk0"))]);
        assert_eq!(told.types()[1], ReplyType::ERR_TOO_BIG);
        assert!(told.entered.is_some());
    }
}

#[test]
fn list_tells_name_and_description_and_ends_with_an_ack() {
    let told = Server::two().hears(FIXED, &[(OptionCode::LIST, b"")]);
    let replies = told.replies();
    assert_eq!(replies[0].2, b"\x00\x00\x00\x05disk0a disk");
    assert_eq!(replies[1].2, b"\x00\x00\x00\x05disk1a disk");
    assert_eq!(told.types(), [ReplyType::SERVER, ReplyType::SERVER, ACK]);
    let empty = Server { exports: Arc::new([]), ..Server::new() };
    assert_eq!(empty.hears(FIXED, &[(OptionCode::LIST, b"")]).types(), [ACK]);
    let mut hidden = Server::new();
    hidden.policy.list = ListPolicy::Hide;
    let told = hidden.hears(FIXED, &[(OptionCode::LIST, b""), (OptionCode::GO, &go("disk0"))]);
    assert_eq!(told.types()[0], ReplyType::ERR_POLICY);
    assert!(told.entered.is_some());
}

#[test]
fn structured_replies_are_agreed_once() {
    let told = Server::new().hears(FIXED, &[STRUCTURED, STRUCTURED, (OptionCode::GO, &go("disk0"))]);
    assert_eq!(told.types()[..2], [ACK, ReplyType::ERR_INVALID]);
    assert_eq!(told.entered.unwrap().mode, Mode::Structured);
}

#[test]
fn info_and_go_tell_the_same_in_every_negotiated_state() {
    let states: [&[(OptionCode, &[u8])]; 3] =
        [&[], &[STRUCTURED], &[STRUCTURED, (OptionCode::SET_META_CONTEXT, &base("disk0"))]];
    for state in states {
        let said = |code| {
            let before = Server::new().hears(FIXED, state).replies().len();
            let mut options = state.to_vec();
            let data = go("");
            options.push((code, &data));
            let told = Server::new().hears(FIXED, &options);
            let replies = told.replies().split_off(before);
            replies.into_iter().map(|(_, reply, data)| (reply, data)).collect::<Vec<_>>()
        };
        let info = said(OptionCode::INFO);
        assert_eq!(info, said(OptionCode::GO));
        let flags: u8 = if state.is_empty() { 0x6d } else { 0xed };
        assert_eq!(info[0].1, [0, 0, 0, 0, 0, 0, 0, 0, 3, 0xe8, 0x0d, flags]);
        assert_eq!(info[1].1, b"\x00\x01disk0");
        assert_eq!(info[2].1, b"\x00\x02a disk");
        assert_eq!(info[3].1, [0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 4, 0, 0, 0]);
        assert_eq!(info[4], (ACK, vec![]));
    }
}

#[test]
fn a_read_only_export_says_so() {
    let mut read_only = facts("disk0");
    read_only.read_only = true;
    let server = Server { exports: [read_only].into(), ..Server::new() };
    for (options, flags) in [(&[][..], 0x050f_u16), (&[STRUCTURED], 0x058f)] {
        let mut options = options.to_vec();
        let data = go("disk0");
        options.push((OptionCode::GO, &data));
        let told = server.hears(FIXED, &options);
        let export = told.replies().into_iter().find(|(_, reply, _)| *reply == INFO).unwrap().2;
        assert_eq!(export[10..], flags.to_be_bytes());
    }
}

#[test]
fn unknown_information_is_ignored_and_duplicates_are_answered_once() {
    let mut data = b"\x00\x00\x00\x05disk0\x00\x06".to_vec();
    data.extend([1u16, 1, 99, 0xffff, 0, 3].into_iter().flat_map(u16::to_be_bytes));
    let told = Server::new().hears(FIXED, &[(OptionCode::INFO, &data)]);
    assert_eq!(told.types(), [INFO, INFO, INFO, ACK]);
    let mut many = b"\x00\x00\x00\x00\x75\x30".to_vec();
    many.extend(vec![0x77; 60_000]);
    assert_eq!(Server::new().hears(FIXED, &[(OptionCode::INFO, &many)]).types(), [INFO, INFO, ACK]);
}

#[test]
fn lies_inside_info_and_go_are_invalid_and_the_session_stays_in_step() {
    let mut lies: Vec<Vec<u8>> = Vec::new();
    let good = go("disk0");
    for length in 0..good.len() {
        lies.push(good[..length].to_vec());
    }
    lies.push([&good[..], b"\0"].concat());
    for name_length in [4u32, 6, 14, 0xffff, u32::MAX - 7, u32::MAX] {
        let mut lie = good.clone();
        lie[..4].copy_from_slice(&name_length.to_be_bytes());
        lies.push(lie);
    }
    for count in [0u16, 2, 4, 0xffff] {
        let mut lie = good.clone();
        lie[9..11].copy_from_slice(&count.to_be_bytes());
        lies.push(lie);
    }
    lies.push(go("a\0b"));
    lies.push(go(&"n".repeat(4097)));
    lies.push(b"\x00\x00\x00\x02\xff\xfe\x00\x00".to_vec());
    for lie in &lies {
        for code in [OptionCode::INFO, OptionCode::GO] {
            let told = Server::new().hears(FIXED, &[(code, lie), (OptionCode::GO, &go("disk0"))]);
            assert_eq!(told.types()[0], ReplyType::ERR_INVALID, "{lie:?}");
            assert!(told.entered.is_some(), "{lie:?}");
        }
    }
}

#[test]
fn names_up_to_4096_bytes_are_unknown_with_a_bounded_text() {
    for length in [1, 255, 256, 257, 4095, 4096] {
        let name = "ä".repeat(length / 2) + &"n".repeat(length % 2);
        for (code, data) in [
            (OptionCode::INFO, go(&name)),
            (OptionCode::GO, go(&name)),
            (OptionCode::SET_META_CONTEXT, base(&name)),
            (OptionCode::LIST_META_CONTEXT, base(&name)),
        ] {
            let told = Server::new().hears(FIXED, &[STRUCTURED, (code, &data)]);
            let (_, reply, text) = told.replies().pop().unwrap();
            assert_eq!(reply, ReplyType::ERR_UNKNOWN);
            assert!(text.len() <= 512 && std::str::from_utf8(&text).is_ok());
        }
    }
}

#[test]
fn a_name_of_4096_bytes_can_be_served() {
    let name = "n".repeat(4096);
    let server = Server { exports: [facts(&name)].into(), ..Server::new() };
    assert!(server.hears(FIXED, &[(OptionCode::GO, &go(&name))]).entered.is_some());
    assert!(server.hears(FIXED, &[(OptionCode::EXPORT_NAME, name.as_bytes())]).entered.is_some());
}

#[test]
fn the_empty_name_is_the_only_export_and_nothing_among_two() {
    assert_eq!(Server::new().hears(FIXED, &[(OptionCode::GO, &go(""))]).entered.unwrap().export, 0);
    let told = Server::two().hears(FIXED, &[(OptionCode::GO, &go("")), (OptionCode::GO, &go("disk1"))]);
    assert_eq!(told.types()[0], ReplyType::ERR_UNKNOWN);
    assert_eq!(told.entered.unwrap().export, 1);
}

#[test]
fn the_empty_name_is_no_export_where_names_are_hidden() {
    let mut hidden = Server::new();
    hidden.policy.list = ListPolicy::Hide;
    for code in [OptionCode::INFO, OptionCode::GO] {
        let told = hidden.hears(FIXED, &[(code, &go("")), (OptionCode::GO, &go("disk0"))]);
        assert_eq!(told.types()[0], ReplyType::ERR_UNKNOWN);
        assert_eq!(told.entered.unwrap().export, 0);
    }
    let told = hidden.hears(FIXED, &[(OptionCode::EXPORT_NAME, b"")]);
    assert_eq!(told.entered, None);
    // A server may call its export so.
    let exports = Arc::new([ExportFacts { name: String::new(), ..hidden.exports[0].clone() }]);
    let unnamed = Server { exports, ..hidden };
    assert_eq!(unnamed.hears(FIXED, &[(OptionCode::GO, &go(""))]).entered.unwrap().export, 0);
}

#[test]
fn an_export_that_does_not_open_is_refused_with_its_reason_and_haggling_goes_on() {
    for (kind, reply) in [
        (ErrorKind::Io, ReplyType::ERR_PLATFORM),
        (ErrorKind::NotPermitted, ReplyType::ERR_POLICY),
        (ErrorKind::Shutdown, ReplyType::ERR_SHUTDOWN),
    ] {
        let server = Server { open: Err(Error::new(kind, "the image is locked")), ..Server::new() };
        let told = server.hears(FIXED, &[(OptionCode::GO, &go("disk0")), (OptionCode::LIST, b"")]);
        let replies = told.replies();
        assert_eq!((replies[0].1, &replies[0].2[..]), (reply, &b"the image is locked"[..]));
        assert_eq!(told.types()[1..], [ReplyType::SERVER, ACK]);
        assert_eq!((told.entered, told.closed), (None, None));
    }
}

#[test]
fn contexts_need_structured_replies_to_be_set_but_not_to_be_listed() {
    let told = Server::new().hears(
        FIXED,
        &[
            (OptionCode::SET_META_CONTEXT, &base("disk0")),
            (OptionCode::LIST_META_CONTEXT, &base("disk0")),
            (OptionCode::GO, &go("disk0")),
        ],
    );
    assert_eq!(told.types()[..3], [ReplyType::ERR_INVALID, ReplyType::META_CONTEXT, ACK]);
    assert_eq!(told.replies()[1].2, b"\x00\x00\x00\x00base:allocation");
    assert_eq!(told.entered.unwrap().contexts, ContextSet::default());
}

#[test]
fn queries_select_what_they_name() {
    for (queries, listed, set) in [
        (&[][..], true, false),
        (&["base:allocation"], true, true),
        (&["base:allocation", "base:allocation"], true, true),
        (&["base:"], true, false),
        (&["base:nosuch", "qemu:dirty-bitmap:x", ":"], false, false),
        (&["x:y", "base:allocation"], true, true),
        (&["base:allocation2", "Base:allocation"], false, false),
    ] {
        let data = MetaRequest::encode("disk0", queries);
        let list = Server::new().hears(FIXED, &[(OptionCode::LIST_META_CONTEXT, &data)]);
        assert_eq!(list.types().len(), 1 + usize::from(listed), "LIST {queries:?}");
        let told = Server::new()
            .hears(FIXED, &[STRUCTURED, (OptionCode::SET_META_CONTEXT, &data), (OptionCode::GO, &go("disk0"))]);
        assert_eq!(told.entered.unwrap().contexts.base_allocation, set, "SET {queries:?}");
        let context = told.replies().into_iter().find(|(_, reply, _)| *reply == ReplyType::META_CONTEXT);
        assert_eq!(context.map(|(_, _, data)| data), set.then(|| b"\x00\x00\x00\x01base:allocation".to_vec()));
    }
}

#[test]
fn every_set_replaces_the_set_also_when_it_fails() {
    let (good, none) = (base("disk0"), MetaRequest::encode("disk0", &[]));
    let (bad, unknown) = (MetaRequest::encode("disk0", &["colonless"]), base("nosuch"));
    let too_big = vec![0; 65537];
    for (second, selected) in [(&good, true), (&none, false), (&bad, false), (&unknown, false), (&too_big, false)] {
        let set = OptionCode::SET_META_CONTEXT;
        let told =
            Server::new().hears(FIXED, &[STRUCTURED, (set, &good), (set, second), (OptionCode::GO, &go("disk0"))]);
        assert_eq!(told.entered.unwrap().contexts.base_allocation, selected);
    }
}

#[test]
fn contexts_belong_to_the_export_they_were_set_for() {
    for (set, enter, selected) in [("disk0", "disk0", true), ("disk1", "disk0", false), ("disk0", "disk1", false)] {
        let told = Server::two()
            .hears(FIXED, &[STRUCTURED, (OptionCode::SET_META_CONTEXT, &base(set)), (OptionCode::GO, &go(enter))]);
        assert_eq!(told.entered.unwrap().contexts.base_allocation, selected, "{set} {enter}");
    }
    for (set, enter) in [("", "disk0"), ("disk0", "")] {
        let told = Server::new()
            .hears(FIXED, &[STRUCTURED, (OptionCode::SET_META_CONTEXT, &base(set)), (OptionCode::GO, &go(enter))]);
        assert!(told.entered.unwrap().contexts.base_allocation, "one export, two names");
    }
}

#[test]
fn lies_inside_meta_options_are_invalid_and_the_session_stays_in_step() {
    let good = base("disk0");
    let mut lies: Vec<Vec<u8>> = (0..good.len()).map(|length| good[..length].to_vec()).collect();
    for (place, value) in [(0, 6u32), (0, u32::MAX), (9, 0), (9, 2), (9, 1_000_000), (13, 16), (13, u32::MAX - 3)] {
        let mut lie = good.clone();
        lie[place..place + 4].copy_from_slice(&value.to_be_bytes());
        lies.push(lie);
    }
    lies.push(MetaRequest::encode("disk0", &["base:\0"]));
    lies.push(MetaRequest::encode("disk0", &[&format!("base:{}", "n".repeat(4092))]));
    for lie in &lies {
        for code in [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT] {
            let told = Server::new().hears(FIXED, &[STRUCTURED, (code, lie), (OptionCode::GO, &go("disk0"))]);
            assert_eq!(told.types()[1], ReplyType::ERR_INVALID, "{lie:?}");
            assert!(told.entered.is_some());
        }
    }
}

#[test]
fn a_refused_client_hears_why_whatever_it_asks() {
    let text = "too many connections (2 of 2)";
    let server = Server { stance: Stance::Refused(text.into()), ..Server::new() };
    for code in [3, 4, 5, 6, 7, 8, 9, 10, 11, 99].map(OptionCode) {
        let told = server.hears(FIXED, &[(code, &go("disk0")), (OptionCode::ABORT, b"")]);
        let replies = told.replies();
        assert_eq!((replies[0].1, &replies[0].2[..]), (ReplyType::ERR_POLICY, text.as_bytes()));
        assert_eq!((replies[1].1, told.opened.len()), (ACK, 0));
    }
    let told = server.hears(FIXED, &[(OptionCode::EXPORT_NAME, b"disk0")]);
    assert!(told.closed.is_some() && told.sent.is_empty());
}

#[test]
fn a_stopping_server_says_so_to_every_option_but_abort() {
    let server = Server { stance: Stance::ShuttingDown, ..Server::new() };
    for code in [3, 4, 5, 6, 7, 8, 9, 10, 11, 99].map(OptionCode) {
        let told = server.hears(FIXED, &[(code, b"data"), (OptionCode::ABORT, b"")]);
        assert_eq!(told.types(), [ReplyType::ERR_SHUTDOWN, ACK]);
    }
    assert!(server.hears(FIXED, &[(OptionCode::EXPORT_NAME, b"disk0")]).closed.is_some());
}

#[test]
fn a_server_that_stops_while_it_opens_does_not_let_the_client_in() {
    let mut handshake = Handshake::new([facts("disk0")].into(), policy(), Stance::Welcome);
    handshake.feed(&conversation(FIXED, &[(OptionCode::GO, &go("disk0"))]));
    assert_eq!(handshake.next_action(), Action::Open(0));
    handshake.shut_down();
    handshake.opened(Ok(()));
    let Action::Send(bytes) = handshake.next_action() else { panic!("nothing sent") };
    assert_eq!(bytes[12..16], ReplyType::ERR_SHUTDOWN.0.to_be_bytes());
    assert_eq!(handshake.next_action(), Action::Wait);
}
