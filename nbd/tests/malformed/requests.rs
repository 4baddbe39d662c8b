//! Malformed requests in every form of replies: flags, ranges, lengths, magics, and streams that break off.

use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::request::{Request, StatusFilter};
use blockyard_nbd::wire::{Command, CommandFlags};

use super::SIZE;
use super::script::{Conversation, Disk, JUNK, encode};
use crate::common::request;
use crate::common::servers::MODES;

const MIB: u64 = 1 << 20;
const COMMANDS: [Command; 7] = [
    Command::READ,
    Command::WRITE,
    Command::FLUSH,
    Command::TRIM,
    Command::CACHE,
    Command::WRITE_ZEROES,
    Command::BLOCK_STATUS,
];

/// The payload that belongs to a request.
fn payload(request: &Request) -> Vec<u8> {
    if request.command == Command::WRITE { vec![JUNK; request.length as usize] } else { Vec::new() }
}

/// Whether a flag may come with a command.
fn is_legal(command: Command, flag: CommandFlags, mode: Mode) -> bool {
    use CommandFlags as F;
    match (flag, command) {
        (F::FUA, _) => true,
        (F::DF, Command::READ) => mode != Mode::Simple,
        (F::PAYLOAD_LEN, Command::WRITE) => mode == Mode::Extended,
        (F::NO_HOLE | F::FAST_ZERO, Command::WRITE_ZEROES) | (F::REQ_ONE, Command::BLOCK_STATUS) => true,
        _ => false,
    }
}

/// What a good request is answered in this mode.
fn errno(command: Command, mode: Mode) -> u32 {
    if command == Command::BLOCK_STATUS && mode == Mode::Simple { 22 } else { 0 }
}

/// Commands and flags.
pub fn flags() -> Vec<Conversation> {
    let mut all = Vec::new();
    for mode in MODES {
        for (command, bit) in COMMANDS.into_iter().flat_map(|command| (0..16).map(move |bit| (command, bit))) {
            let flags = CommandFlags(1 << bit);
            let asked = Request { flags, ..request(command, 7, 65536, 65536) };
            // A payload short enough to be cut everywhere.
            let announces = mode == Mode::Extended && flags == CommandFlags::PAYLOAD_LEN;
            let has_payload = command == Command::WRITE || announces;
            let asked = if has_payload { Request { length: 64, ..asked } } else { asked };
            let payload = if has_payload { vec![JUNK; 64] } else { Vec::new() };
            let errno = if is_legal(command, flags, mode) { errno(command, mode) } else { 22 };
            let conversation = Conversation::new(format!("{command:?} with flag {bit}, {mode:?}")).enter(mode);
            all.push(conversation.request(asked, &payload, errno).disconnect());
        }
        for command in [8, 9, 200, 0x7fff, 0xffff].map(Command) {
            for (offset, length) in [(0, 0), (0, 512), (u64::MAX, u64::from(u32::MAX))] {
                let about = format!("{command:?} at {offset} of {length}, {mode:?}");
                let unknown = request(command, 7, offset, length);
                all.push(Conversation::new(about).enter(mode).request(unknown, b"", 22).disconnect());
            }
        }
        for (flags, offset, length) in [(0, 0, 0), (0xffff, u64::MAX, 0), (0, 1, 123), (0x40, 0, u64::from(u32::MAX))] {
            let goodbye = Request { flags: CommandFlags(flags), ..request(Command::DISC, 9, offset, length) };
            let about = format!("DISC with flags {flags:#x} and length {length}, {mode:?}");
            let conversation = Conversation::new(about).enter(mode);
            let pending = (0..8).fold(conversation, |all, cookie| {
                let read = request(Command::READ, cookie, cookie * 512, 512);
                all.request(read, b"", 0)
            });
            all.push(pending.header(goodbye).raw(b"junk behind the goodbye").closes());
        }
    }
    all
}

/// Offsets and lengths.
pub fn ranges() -> Vec<Conversation> {
    let mut all = Vec::new();
    for (mode, command) in MODES.into_iter().flat_map(|mode| COMMANDS.map(|command| (mode, command))) {
        let past = match command {
            Command::FLUSH => 0,
            Command::WRITE | Command::WRITE_ZEROES => 28,
            _ => 22,
        };
        let base = errno(command, mode);
        let empty = if command == Command::BLOCK_STATUS { 22 } else { 0 };
        for (offset, length, errno) in [
            (SIZE - 1, 1, base),
            (SIZE - 512, 512, base),
            (SIZE - 511, 512, past),
            (SIZE, 1, past),
            (SIZE + 1, 1, past),
            (1 << 63, 64, past),
            ((1 << 63) - 1, 64, past),
            (u64::MAX, 1, past),
            (u64::MAX - 63, 64, past),
            (u64::MAX - 62, 64, past),
            (0, 1, base),
            (12345, 77, base),
            (0, 0, empty),
            (SIZE, 0, empty),
            (SIZE + 1, 0, past.max(empty)),
            (u64::MAX, 0, past.max(empty)),
        ] {
            let asked = request(command, 7, offset, length);
            let about = format!("{command:?} at {offset} of {length}, {mode:?}");
            all.push(Conversation::new(about).enter(mode).request(asked, &payload(&asked), errno).disconnect());
        }
        // Lengths that only name an effect need neither payload nor memory; 32 bits of them are more than the disk has.
        if command != Command::WRITE {
            let wide: &[u64] = if mode == Mode::Extended { &[1 << 32, 1 << 63, u64::MAX] } else { &[] };
            for length in [64 * MIB, 64 * MIB + 1, 1 << 31, u64::from(u32::MAX)].into_iter().chain(wide.iter().copied())
            {
                let errno = match (command, length <= SIZE) {
                    (Command::FLUSH, _) => 0,
                    (Command::READ, _) if length > u64::from(u32::MAX) => 75,
                    (Command::READ, _) if mode == Mode::Simple && length > 64 * MIB => 22,
                    (_, true) => base,
                    (_, false) => past,
                };
                let about = format!("{command:?} of {length}, {mode:?}");
                let conversation = Conversation::new(about).enter(mode).heavy();
                all.push(conversation.request(request(command, 7, 0, length), b"", errno).disconnect());
            }
        }
    }
    for mode in MODES {
        let wide: &[u64] = if mode == Mode::Extended { &[1 << 32, 1 << 63, u64::MAX] } else { &[] };
        for length in
            [64 * MIB + 1, 64 * MIB + 512, 1 << 31, u64::from(u32::MAX)].into_iter().chain(wide.iter().copied())
        {
            for offset in [0, SIZE, u64::MAX] {
                let about = format!("a WRITE of {length} at {offset}, {mode:?}");
                let conversation = Conversation::new(about).enter(mode);
                let long = request(Command::WRITE, 7, offset, length);
                all.push(conversation.request(long, &[JUNK; 100], 22).closes());
            }
        }
        let long = Request { flags: CommandFlags::DF, ..request(Command::READ, 7, 0, 64 * MIB + 1) };
        let errno = if mode == Mode::Simple { 22 } else { 75 };
        let conversation = Conversation::new(format!("DF beyond 64 MiB, {mode:?}")).enter(mode);
        all.push(conversation.request(long, b"", errno).disconnect());
    }
    all
}

/// Payloads that extended headers announce, and the one that BLOCK_STATUS may have.
pub fn payloads() -> Vec<Conversation> {
    let mut all = Vec::new();
    let mode = Mode::Extended;
    let announced = |command, length| {
        let flags = CommandFlags::PAYLOAD_LEN;
        Request { flags, ..request(command, 7, 0, length) }
    };
    for command in COMMANDS.into_iter().chain([Command(8), Command(0xffff)]) {
        for length in [0u64, 1, 31, 32, 33, 1000] {
            let about = format!("{command:?} with a payload of {length}");
            let conversation = Conversation::new(about).enter(mode);
            let asked = announced(command, length);
            let errno = if command == Command::WRITE { 0 } else { 22 };
            all.push(conversation.request(asked, &vec![JUNK; length as usize], errno).disconnect());
        }
        for length in [64 * MIB + 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX] {
            let conversation = Conversation::new(format!("{command:?} with a payload of {length}")).enter(mode);
            all.push(conversation.request(announced(command, length), &[JUNK; 40], 22).closes());
        }
        let short = Conversation::new(format!("{command:?} with half a payload")).enter(mode);
        all.push(short.header(announced(command, 64)).raw(&[JUNK; 32]));
    }
    let status = |payload: &[u8]| announced(Command::BLOCK_STATUS, payload.len() as u64);
    let filter = |length, ids: &[u32]| StatusFilter::encode(length, ids);
    for (about, payload, errno) in [
        ("one context", filter(65536, &[1]), 0),
        ("the whole disk", filter(SIZE, &[1]), 0),
        ("nothing", filter(65536, &[]), 22),
        ("a context that was not negotiated", filter(65536, &[2]), 22),
        ("context 0", filter(65536, &[0]), 22),
        ("context 2^32-1", filter(65536, &[u32::MAX]), 22),
        ("a context twice", filter(65536, &[1, 1]), 22),
        ("a good context and an unknown one", filter(65536, &[1, 9]), 22),
        ("a thousand contexts", filter(65536, &[1; 1000]), 22),
        ("an empty range", filter(0, &[1]), 22),
        ("a byte past the end", filter(SIZE + 1, &[1]), 22),
        ("2^63 bytes", filter(1 << 63, &[1]), 22),
        ("2^64-1 bytes", filter(u64::MAX, &[1]), 22),
        ("7 bytes", vec![0; 7], 22),
        ("9 bytes", vec![0; 9], 22),
        ("11 bytes", vec![0; 11], 22),
        ("13 bytes", vec![0; 13], 22),
    ] {
        let conversation = Conversation::new(format!("a status filter of {about}")).enter(mode);
        all.push(conversation.request(status(&payload), &payload, errno).disconnect());
        let bare = Conversation::new(format!("a status filter of {about} without contexts")).agree(mode).go();
        all.push(bare.request(status(&payload), &payload, 22).disconnect());
        let structured = Conversation::new(format!("a status filter of {about} without extended headers"));
        let structured = structured.enter(Mode::Structured).request(status(&payload), b"", 22);
        // The payload that was not agreed upon is taken for a request.
        all.push(structured.babble(&[&payload[..], &[0; 32]].concat()));
    }
    all
}

/// Exports that take no change, and connections without contexts.
pub fn forbidden() -> Vec<Conversation> {
    let mut all = Vec::new();
    for (mode, command) in MODES.into_iter().flat_map(|mode| COMMANDS.map(|command| (mode, command))) {
        let change = matches!(command, Command::WRITE | Command::WRITE_ZEROES | Command::TRIM);
        let asked = request(command, 7, 512, 64);
        let errno = if change { 1 } else { errno(command, mode) };
        let conversation = Conversation::new(format!("{command:?} to a read-only export, {mode:?}"));
        let conversation = conversation.on(Disk::ReadOnly).enter(mode);
        all.push(conversation.request(asked, &payload(&asked), errno).disconnect());
        let wrong = Request { offset: SIZE, ..asked };
        let errno = match command {
            Command::FLUSH => 0,
            _ if change => 1,
            _ => 22,
        };
        let conversation = Conversation::new(format!("{command:?} past the end of a read-only export, {mode:?}"));
        let conversation = conversation.on(Disk::ReadOnly).enter(mode);
        all.push(conversation.request(wrong, &payload(&wrong), errno).disconnect());
    }
    let fast = Request { flags: CommandFlags::FAST_ZERO, ..request(Command::WRITE_ZEROES, 7, 0, 65536) };
    for mode in MODES {
        let conversation = Conversation::new(format!("FAST_ZERO to a read-only export, {mode:?}"));
        all.push(conversation.on(Disk::ReadOnly).enter(mode).request(fast, b"", 22).disconnect());
        let bare = Conversation::new(format!("BLOCK_STATUS without contexts, {mode:?}")).agree(mode).go();
        all.push(bare.request(request(Command::BLOCK_STATUS, 7, 0, 512), b"", 22).disconnect());
    }
    all
}

/// Streams that are no requests, break off, or crowd.
pub fn streams() -> Vec<Conversation> {
    let mut all = Vec::new();
    for mode in MODES {
        let good = encode(request(Command::READ, 7, 0, 512), mode);
        let (other, name) = match mode {
            Mode::Extended => (0x2560_9513, "compact requests"),
            _ => (0x21e4_1c71u32, "extended requests"),
        };
        for (name, magic) in [
            (name, other),
            ("extended replies", 0x6e8a_278c),
            ("simple replies", 0x6744_6698),
            ("structured replies", 0x668e_33ef),
            ("logs", 0x2560_9514),
            ("history", 0x1256_0953),
            ("nothing", 0),
            ("nonsense", u32::MAX),
        ] {
            let mut wrong = good.clone();
            wrong[..4].copy_from_slice(&magic.to_be_bytes());
            let conversation = Conversation::new(format!("the magic of {name}, {mode:?}")).enter(mode);
            all.push(conversation.babble(&wrong).raw(&[0; 4]));
            let behind = Conversation::new(format!("the magic of {name} behind a good request, {mode:?}")).enter(mode);
            let read = request(Command::READ, 7, 0, 512);
            all.push(behind.request(read, b"", 0).babble(&wrong).raw(&[0; 4]));
        }
        for byte in 0..4 {
            let mut wrong = good.clone();
            wrong[byte] ^= 1;
            let conversation = Conversation::new(format!("byte {byte} of the request magic, {mode:?}")).enter(mode);
            all.push(conversation.babble(&wrong));
        }
        for (announced, sent) in [(1, 0), (64, 0), (64, 1), (64, 63), (4096, 100), (64 * MIB, 100)] {
            let flags: &[_] = if mode == Mode::Extended { &[0, CommandFlags::PAYLOAD_LEN.0] } else { &[0] };
            for (offset, flags) in
                [0, SIZE].into_iter().flat_map(|offset| flags.iter().map(move |bits| (offset, *bits)))
            {
                let about = format!("a WRITE of {announced} at {offset} with {sent} bytes, flags {flags}, {mode:?}");
                let header = Request { flags: CommandFlags(flags), ..request(Command::WRITE, 7, offset, announced) };
                all.push(Conversation::new(about).enter(mode).header(header).raw(&vec![JUNK; sent]));
            }
        }
        for (name, length, copies) in [("equal cookies", 512u64, 20), ("a crowd", 1, 200)] {
            let conversation = Conversation::new(format!("{name}, {mode:?}")).enter(mode).heavy();
            let crowd = (0..copies).fold(conversation, |all, _| {
                let read = request(Command::READ, 7, 0, length);
                all.request(read, b"", 0)
            });
            all.push(crowd.disconnect());
        }
        let payload_that_looks_like_requests = good.repeat(8);
        let write = request(Command::WRITE, 7, SIZE, payload_that_looks_like_requests.len() as u64);
        let conversation =
            Conversation::new(format!("requests as the payload of a refused WRITE, {mode:?}")).enter(mode);
        all.push(conversation.request(write, &payload_that_looks_like_requests, 28).disconnect());
        let long = request(Command::FLUSH, 7, u64::MAX, u64::from(u32::MAX));
        let conversation = Conversation::new(format!("FLUSH with offset and length, {mode:?}")).enter(mode);
        all.push(conversation.request(long, b"", 0).disconnect());
        if mode != Mode::Extended {
            let read = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(Command::READ, 7, 0, 28) };
            let conversation = Conversation::new(format!("a payload for a READ, {mode:?}")).enter(mode);
            all.push(conversation.request(read, b"", 22).babble(&[0; 28]));
        }
    }
    all
}
