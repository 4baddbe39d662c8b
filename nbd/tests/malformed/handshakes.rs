//! Malformed handshakes: greetings, every option with every length, and data that lie.

use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::Command;
use blockyard_nbd::wire::option::{MetaRequest, OptionCode, ReplyType, encode_option};

use super::script::{Answer, Conversation, base, go_data};
use crate::common::request;
use crate::common::servers::{MODES, NAME};

const ACK: ReplyType = ReplyType::ACK;
const INVALID: ReplyType = ReplyType::ERR_INVALID;
const UNKNOWN: ReplyType = ReplyType::ERR_UNKNOWN;

/// What is no NBD client, or none that this server knows.
pub fn greetings() -> Vec<Conversation> {
    let mut all = Vec::new();
    for flags in 0..4 {
        let fixed = flags & 1 != 0;
        let zeroes = if flags & 2 == 0 { 134 } else { 10 };
        let mut old = Conversation::silent(format!("flags {flags}, EXPORT_NAME")).flags(flags);
        old.answers.push(Answer::Name(zeroes));
        all.push(old.raw(&encode_option(OptionCode::EXPORT_NAME, NAME.as_bytes())).entered().disconnect());
        for code in [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 99].map(OptionCode).into_iter().filter(|_| !fixed) {
            let unfixed = Conversation::silent(format!("flags {flags}, option {}", code.0)).flags(flags);
            all.push(unfixed.unanswered(code, 0, b"").closes());
        }
    }
    for flags in (2..32).map(|bit| 1 << bit).chain([0x13, 0xffff_fffc, u32::MAX]) {
        all.push(Conversation::silent(format!("flags {flags:#x}")).flags(flags).closes());
    }
    for bytes in [&b""[..], b"\0", b"\0\0", b"\0\0\0"] {
        all.push(Conversation::silent(format!("{} bytes of flags", bytes.len())).raw(bytes));
    }
    for (name, bytes) in [
        ("HTTP", &b"GET / HTTP/1.1\r\nHost: disk0\r\n\r\n"[..]),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n"),
        ("SMB", b"\x00\x00\x00\x85\xffSMB"),
        ("a server", b"NBDMAGICIHAVEOPT\x00\x03"),
        ("an oldstyle server", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"),
    ] {
        all.push(Conversation::silent(format!("{name} instead of flags")).raw(bytes).closes());
    }
    all
}

/// Data that are right for an option, where it has some.
fn exact(code: OptionCode) -> Vec<u8> {
    match code {
        OptionCode::EXPORT_NAME => NAME.as_bytes().to_vec(),
        OptionCode::INFO | OptionCode::GO => go_data(NAME),
        OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => base(NAME),
        _ => Vec::new(),
    }
}

/// What an option with data other than the right ones is answered; `None` closes.
fn answer_to(code: OptionCode, length: usize, mode: Mode) -> Option<ReplyType> {
    let right = length == exact(code).len();
    Some(match code {
        OptionCode::ABORT => ACK,
        _ if length > 1 << 20 => return None,
        OptionCode::EXPORT_NAME => return None,
        OptionCode::LIST if right => ACK,
        OptionCode::STARTTLS if right => ReplyType::ERR_POLICY,
        OptionCode::STARTTLS => INVALID,
        OptionCode::STRUCTURED_REPLY if right && mode == Mode::Simple => ACK,
        OptionCode::STRUCTURED_REPLY if right && mode == Mode::Extended => ReplyType::ERR_EXT_HEADER_REQD,
        OptionCode::EXTENDED_HEADERS if right && mode != Mode::Extended => ACK,
        OptionCode::LIST | OptionCode::STRUCTURED_REPLY | OptionCode::EXTENDED_HEADERS => INVALID,
        OptionCode::INFO | OptionCode::GO | OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
            if length > 65536 {
                ReplyType::ERR_TOO_BIG
            } else if right && (code != OptionCode::SET_META_CONTEXT || mode != Mode::Simple) {
                ACK
            } else {
                INVALID
            }
        }
        _ => ReplyType::ERR_UNSUP,
    })
}

/// Each option with each length, before and after structured replies were agreed.
pub fn options() -> Vec<Conversation> {
    let mut all = Vec::new();
    let codes = (1..=12).chain([0, 0xffff, u32::MAX]).map(OptionCode);
    for (code, mode) in codes.flat_map(|code| MODES.map(|mode| (code, mode))) {
        let exact = exact(code);
        let mut lengths: Vec<usize> = vec![0, 1, exact.len(), exact.len() + 1, 4096, 4097, 65536, 65537];
        lengths.extend([exact.len().saturating_sub(1), 1 << 20, (1 << 20) + 1, 1 << 31, u32::MAX as usize]);
        lengths.sort_unstable();
        lengths.dedup();
        for length in lengths {
            let opening = Conversation::new(format!("{code:?} of {length} bytes, {mode:?}")).agree(mode);
            let mut data = exact.clone();
            data.resize(length.min((1 << 20) + 64), 0);
            let opening = if length > 8192 { opening.heavy() } else { opening };
            let length = u32::try_from(length).unwrap();
            all.push(match answer_to(code, length as usize, mode) {
                // What stands behind is dropped, also what was announced.
                Some(ACK) if code == OptionCode::ABORT => {
                    let mut told = opening.unanswered(code, length, &data);
                    told.answers.push(Answer::Final(ACK));
                    told.closes()
                }
                Some(ACK) if code == OptionCode::GO => opening.option(code, &data, ACK).entered().disconnect(),
                Some(answer) => opening.option(code, &data, answer).goodbye(),
                // The only right length of a name, and the empty one, which is the only export.
                None if code == OptionCode::EXPORT_NAME
                    && mode != Mode::Extended
                    && (data == exact || data.is_empty()) =>
                {
                    let mut named = opening.unanswered(code, length, &data).entered();
                    named.answers.push(Answer::Name(10));
                    named.disconnect()
                }
                None => opening
                    .unanswered(code, length, &data[..data.len().min(64)])
                    .raw(&data[data.len().min(64)..])
                    .closes(),
            });
        }
    }
    all.extend(frames());
    all
}

/// Options whose frame is wrong.
fn frames() -> Vec<Conversation> {
    let mut all = Vec::new();
    let list = encode_option(OptionCode::LIST, b"");
    for byte in 0..8 {
        let mut wrong = list.clone();
        wrong[byte] ^= 0x20;
        all.push(Conversation::new(format!("byte {byte} of the option magic")).raw(&wrong).closes());
        let behind = Conversation::new(format!("byte {byte} of the second option magic"));
        all.push(behind.option(OptionCode::LIST, b"", ACK).raw(&wrong).closes());
    }
    for (name, magic) in [
        ("an option reply", 0x0003_e889_0455_65a9u64),
        ("a request", 0x2560_9513_0000_0000),
        ("the greeting", 0x4e42_444d_4147_4943),
        ("nothing", 0),
    ] {
        all.push(Conversation::new(format!("the magic of {name}")).raw(&magic.to_be_bytes()).raw(&[0; 8]).closes());
    }
    let mut many = Conversation::new("257 options");
    for _ in 0..256 {
        many = many.option(OptionCode(77), b"", ReplyType::ERR_UNSUP);
    }
    all.push(many.unanswered(OptionCode(77), 0, b"").closes());
    let mut large = Conversation::new("more than 4 MiB of options").heavy();
    for _ in 0..4 {
        large = large.option(OptionCode(77), &vec![0; 1 << 20], ReplyType::ERR_UNSUP);
    }
    all.push(large.unanswered(OptionCode(77), 1, b"x").closes());
    for mode in MODES {
        let late = Conversation::new(format!("an option behind GO, {mode:?}")).enter(mode);
        all.push(late.babble(&encode_option(OptionCode::LIST, b"")).raw(&[0; 16]));
        let both = Conversation::new(format!("extended headers behind structured replies, {mode:?}"));
        let both = both.option(OptionCode::STRUCTURED_REPLY, b"", ACK);
        if mode == Mode::Extended {
            all.push(both.enter(mode).disconnect());
        }
        let failed = Conversation::new(format!("GO behind a failed GO, {mode:?}")).agree(mode);
        all.push(failed.option(OptionCode::GO, &go_data("nosuch"), UNKNOWN).go().disconnect());
        for (code, answer) in [
            (OptionCode::STARTTLS, ReplyType::ERR_POLICY),
            (OptionCode::PEEK_EXPORT, ReplyType::ERR_UNSUP),
            (OptionCode(99), ReplyType::ERR_UNSUP),
        ] {
            let glued = Conversation::new(format!("{code:?} with bytes behind it, {mode:?}")).agree(mode);
            let glued = glued.option(code, b"", answer).raw(b"\x16\x03\x01\x02\x00\x01\x00\x01").raw(&[0; 8]);
            all.push(glued.closes());
        }
    }
    all
}

/// INFO and GO whose inner lengths lie, and names that nobody has.
pub fn informations() -> Vec<Conversation> {
    let good = go_data(NAME);
    let (count_at, size) = (4 + NAME.len(), good.len());
    let mut lies: Vec<(String, Vec<u8>, ReplyType)> = Vec::new();
    for cut in 0..size {
        lies.push((format!("the first {cut} bytes"), good[..cut].to_vec(), INVALID));
    }
    for name_length in [0u32, 1, 4, 6, 7, 14, 255, 256, 0xffff, 1 << 31].into_iter().chain(u32::MAX - 8..=u32::MAX) {
        let mut lie = good.clone();
        lie[..4].copy_from_slice(&name_length.to_be_bytes());
        lies.push((format!("name length {name_length}"), lie, INVALID));
    }
    for count in [0u16, 1, 2, 4, 6, 255, 256, 0x7fff, 0x8000, 0xffff] {
        let mut lie = good.clone();
        lie[count_at..count_at + 2].copy_from_slice(&count.to_be_bytes());
        lies.push((format!("count {count}"), lie, INVALID));
    }
    for behind in [1, 2, 3, 4, 100] {
        lies.push((format!("{behind} bytes behind"), [&good[..], &vec![0; behind]].concat(), INVALID));
    }
    let with_infos = |infos: &[u16]| {
        let mut data = good[..count_at].to_vec();
        data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
        data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
        data
    };
    lies.push(("unknown informations".into(), with_infos(&[4, 99, 0xffff, 0x8000]), ACK));
    lies.push(("each information twice".into(), with_infos(&[0, 1, 2, 3, 3, 2, 1, 0]), ACK));
    lies.push(("1000 informations".into(), with_infos(&[1; 1000]), ACK));
    lies.push(("65535 informations".into(), with_infos(&[1; 65535]), ReplyType::ERR_TOO_BIG));
    let raw_name = |name: &[u8]| {
        let length = u32::try_from(name.len()).unwrap();
        [&length.to_be_bytes()[..], name, &[0, 0]].concat()
    };
    for (name, answer) in [
        (&b"\0"[..], INVALID),
        (b"disk0\0", INVALID),
        (b"\xff\xfe", INVALID),
        (b"\xc0\xaf", INVALID),
        (b"\xed\xa0\x80", INVALID),
        (b"/", UNKNOWN),
        (b"..", UNKNOWN),
        (b"../disk0", UNKNOWN),
        (b"DISK0", UNKNOWN),
        (b"disk0 ", UNKNOWN),
        (b"%s%n", UNKNOWN),
        (&[b'n'; 255], UNKNOWN),
        (&[b'n'; 256], UNKNOWN),
        (&[b'n'; 257], UNKNOWN),
        (&[b'n'; 4096], UNKNOWN),
        (&[b'n'; 4097], INVALID),
        (&"ä".repeat(2048).into_bytes(), UNKNOWN),
    ] {
        let front = String::from_utf8_lossy(&name[..name.len().min(8)]).into_owned();
        lies.push((format!("the name {front:?} of {} bytes", name.len()), raw_name(name), answer));
    }
    let mut all = Vec::new();
    for (about, data, answer) in &lies {
        for (code, mode) in
            [OptionCode::INFO, OptionCode::GO].into_iter().flat_map(|code| MODES.map(|mode| (code, mode)))
        {
            let start = Conversation::new(format!("{code:?} with {about}, {mode:?}")).agree(mode);
            let start = if data.len() > 8192 { start.heavy() } else { start };
            let asked = start.option(code, data, *answer);
            let entered = code == OptionCode::GO && *answer == ACK;
            all.push(if entered { asked.entered().disconnect() } else { asked.goodbye() });
        }
    }
    all
}

/// Metadata queries: lies, and what selects nothing. BLOCK_STATUS behind shows what was selected.
pub fn contexts() -> Vec<Conversation> {
    let good = base(NAME);
    let (count_at, query_at) = (4 + NAME.len(), 8 + NAME.len());
    let mut lies: Vec<(String, Vec<u8>)> = Vec::new();
    for cut in 0..good.len() {
        lies.push((format!("the first {cut} bytes"), good[..cut].to_vec()));
    }
    let fields = [("name length", 0), ("count", count_at), ("query length", query_at)];
    for (field, at) in fields {
        for value in
            [0u32, 1, 2, 16, 255, 256, 4097, 0xffff, 1_000_000, 1 << 31].into_iter().chain(u32::MAX - 3..=u32::MAX)
        {
            let mut lie = good.clone();
            lie[at..at + 4].copy_from_slice(&value.to_be_bytes());
            let honest = (field == "count" && value == 1) || (field == "query length" && value == 15);
            if !honest {
                lies.push((format!("{field} {value}"), lie));
            }
        }
    }
    lies.push(("a byte behind".into(), [&good[..], b"\0"].concat()));
    for query in ["nocolon", "", "base", "base:\0", &format!("base:{}", "n".repeat(4092))] {
        lies.push((format!("query {:?}", &query[..query.len().min(10)]), MetaRequest::encode(NAME, &[query])));
    }
    let mut all = Vec::new();
    let both = [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT];
    for (about, data) in &lies {
        for (code, mode) in both.into_iter().flat_map(|code| MODES.map(|mode| (code, mode))) {
            let start = Conversation::new(format!("{code:?} with {about}, {mode:?}")).agree(mode);
            all.push(start.option(code, data, INVALID).goodbye());
        }
    }
    let status = |cookie| request(Command::BLOCK_STATUS, cookie, 0, 65536);
    for mode in MODES.into_iter().filter(|mode| *mode != Mode::Simple) {
        let set = OptionCode::SET_META_CONTEXT;
        for (queries, selects) in [
            (&[][..], false),
            (&["base:"], false),
            (&["base:allocation", "base:allocation"], true),
            (&["base:nosuch"], false),
            (&["base:allocation2"], false),
            (&["Base:allocation"], false),
            (&[":"], false),
            (&["::"], false),
            (&["x-nosuch:allocation", "base:allocation"], true),
            (&["qemu:dirty-bitmap:none"], false),
            (&["qemu:"], false),
        ] {
            let asked = Conversation::new(format!("SET of {queries:?}, {mode:?}")).agree(mode);
            let asked = asked.option(set, &MetaRequest::encode(NAME, queries), ACK).go();
            all.push(asked.request(status(1), b"", if selects { 0 } else { 22 }).disconnect());
        }
        for (about, second, answer) in [
            ("a lie", MetaRequest::encode(NAME, &["nocolon"]), INVALID),
            ("an unknown export", base("nosuch"), UNKNOWN),
            ("no queries", MetaRequest::encode(NAME, &[]), ACK),
            ("too many bytes", vec![0; 65537], ReplyType::ERR_TOO_BIG),
        ] {
            let twice = Conversation::new(format!("a good SET, then {about}, {mode:?}")).agree(mode);
            let twice = if second.len() > 8192 { twice.heavy() } else { twice };
            let twice = twice.option(set, &good, ACK).option(set, &second, answer).go();
            all.push(twice.request(status(1), b"", 22).disconnect());
        }
        let mut many = Conversation::new(format!("4000 queries, {mode:?}")).agree(mode).heavy();
        many = many.option(set, &MetaRequest::encode(NAME, &vec!["x:yz"; 4000]), ACK).goodbye();
        all.push(many);
    }
    for code in both {
        let early = Conversation::new(format!("{code:?} before structured replies"));
        let answer = if code == OptionCode::SET_META_CONTEXT { INVALID } else { ACK };
        all.push(early.option(code, &good, answer).go().request(status(1), b"", 22).disconnect());
        let unknown = Conversation::new(format!("{code:?} of an unknown export")).agree(Mode::Structured);
        all.push(unknown.option(code, &base("nosuch"), UNKNOWN).goodbye());
        let late =
            Conversation::new(format!("extended headers, {code:?}, and structured replies, which come too late"));
        let late = late.agree(Mode::Extended).option(code, &good, ACK);
        all.push(late.option(OptionCode::STRUCTURED_REPLY, b"", ReplyType::ERR_EXT_HEADER_REQD).go().disconnect());
    }
    all
}
