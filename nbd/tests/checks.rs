//! The table of requests: which error each wrong one gets, in the one order of checks, and which replies there are.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use blockyard_nbd::transmission::{
    Admission, Aftermath, MAX_EXTENTS, MAX_STATUS_FILTER, Mode, Shape, Task, Terms, Verdict, check, failure,
    filtered_status, payload_length, piece_end, plan_status, success,
};
use blockyard_nbd::wire::request::{Request, StatusFilter};
use blockyard_nbd::wire::{Command, CommandFlags, MAX_PAYLOAD, TransmissionFlags};
use blockyard_nbd::{ContextSet, Durability, Error, ErrorKind, Extent, ZeroFlags};

const SIZE: u64 = 1 << 40;

const BASE: ContextSet = ContextSet { base_allocation: true, allocation_depth: false };

const TERMS: Terms = Terms { size: SIZE, read_only: false, fast_zero: true, mode: Mode::Structured, contexts: BASE };

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

const EFFECTS: [Command; 4] = [Command::TRIM, Command::CACHE, Command::WRITE_ZEROES, Command::BLOCK_STATUS];

fn request(command: Command, offset: u64, length: u64) -> Request {
    Request { flags: CommandFlags(0), command, cookie: 7, offset, length }
}

fn judge(terms: &Terms, request: &Request) -> Verdict {
    check(terms, request, Admission::Open)
}

/// The class of error that the request gets, and what becomes of its payload.
fn fails(terms: &Terms, request: &Request) -> Option<(ErrorKind, Aftermath)> {
    match judge(terms, request) {
        Verdict::Fail(error, aftermath) => Some((error.kind, aftermath)),
        _ => None,
    }
}

const DRAIN_NONE: Aftermath = Aftermath::Drain(0);

#[test]
fn ranges_past_the_end_fail_with_the_error_of_the_command() {
    for mode in MODES {
        let terms = Terms { mode, ..TERMS };
        for (command, kind) in [
            (Command::READ, ErrorKind::Invalid),
            (Command::WRITE, ErrorKind::NoSpace),
            (Command::TRIM, ErrorKind::Invalid),
            (Command::CACHE, ErrorKind::Invalid),
            (Command::WRITE_ZEROES, ErrorKind::NoSpace),
            (Command::BLOCK_STATUS, ErrorKind::Invalid),
        ] {
            for (offset, length) in [(SIZE, 1), (SIZE - 511, 512), (SIZE + 1, 0), (u64::MAX, 1), (1 << 63, 512)] {
                let aftermath = if command == Command::WRITE { Aftermath::Drain(length as u32) } else { DRAIN_NONE };
                let refused = fails(&terms, &request(command, offset, length));
                assert_eq!(refused, Some((kind, aftermath)), "{command:?} {offset} {length}");
            }
            let last = judge(&terms, &request(command, SIZE - 512, 512));
            assert!(matches!(last, Verdict::Run(_)), "{command:?}: {last:?}");
        }
    }
}

#[test]
fn an_error_text_names_offset_length_and_size() {
    let Verdict::Fail(error, _) = judge(&TERMS, &request(Command::WRITE, SIZE, 4096)) else { panic!("it runs") };
    assert_eq!(error.text, format!("offset {SIZE} + length 4096 is past the size {SIZE}"));
}

#[test]
fn flush_ignores_its_reserved_offset_and_length() {
    assert_eq!(judge(&TERMS, &request(Command::FLUSH, u64::MAX, 4096)), Verdict::Run(Task::Flush));
}

#[test]
fn only_the_flags_of_the_command_are_legal() {
    use CommandFlags as F;
    let terms = |mode, read_only| Terms { mode, read_only, ..TERMS };
    for (terms, command, legal) in [
        (terms(Mode::Structured, false), Command::READ, F::FUA.with(F::DF)),
        (terms(Mode::Simple, false), Command::READ, F::FUA),
        (terms(Mode::Structured, false), Command::WRITE, F::FUA),
        (terms(Mode::Structured, false), Command::FLUSH, F::FUA),
        (terms(Mode::Structured, false), Command::TRIM, F::FUA),
        (terms(Mode::Structured, false), Command::CACHE, F::FUA),
        (terms(Mode::Structured, false), Command::WRITE_ZEROES, F::FUA.with(F::NO_HOLE).with(F::FAST_ZERO)),
        (terms(Mode::Structured, false), Command::BLOCK_STATUS, F::FUA.with(F::REQ_ONE)),
        (terms(Mode::Structured, true), Command::READ, F::FUA.with(F::DF)),
        (terms(Mode::Extended, false), Command::READ, F::FUA.with(F::DF)),
        (terms(Mode::Extended, false), Command::WRITE, F::FUA.with(F::PAYLOAD_LEN)),
        (terms(Mode::Extended, false), Command::FLUSH, F::FUA),
        (terms(Mode::Extended, false), Command::TRIM, F::FUA),
        (terms(Mode::Extended, false), Command::CACHE, F::FUA),
        (terms(Mode::Extended, false), Command::WRITE_ZEROES, F::FUA.with(F::NO_HOLE).with(F::FAST_ZERO)),
        (Terms { fast_zero: false, ..TERMS }, Command::WRITE_ZEROES, F::FUA.with(F::NO_HOLE)),
        (Terms { mode: Mode::Extended, contexts: ContextSet::NONE, ..TERMS }, Command::READ, F::FUA.with(F::DF)),
    ] {
        for bit in 0..16 {
            let flags = F(1 << bit);
            let asked = Request { flags, ..request(command, 0, 512) };
            let refused = fails(&terms, &asked).map(|(kind, _)| kind);
            let expected = (!legal.contains(flags)).then_some(ErrorKind::Invalid);
            assert_eq!(refused, expected, "{command:?} {flags:?} {:?}", terms.mode);
        }
        assert!(matches!(judge(&terms, &Request { flags: legal, ..request(command, 0, 512) }), Verdict::Run(_)));
    }
}

#[test]
fn fast_zero_on_a_read_only_export_is_invalid_because_it_is_not_offered() {
    let terms = Terms { read_only: true, ..TERMS };
    let mut zero = request(Command::WRITE_ZEROES, 0, 512);
    assert_eq!(fails(&terms, &zero), Some((ErrorKind::NotPermitted, DRAIN_NONE)));
    zero.flags = CommandFlags::FAST_ZERO;
    assert_eq!(fails(&terms, &zero), Some((ErrorKind::Invalid, DRAIN_NONE)));
}

#[test]
fn commands_that_do_not_exist_are_invalid() {
    for command in [8, 9, 200, 0xffff].map(Command) {
        assert_eq!(fails(&TERMS, &request(command, 0, 512)), Some((ErrorKind::Invalid, DRAIN_NONE)));
    }
}

#[test]
fn disconnect_wins_over_everything_else_that_is_wrong() {
    let wild = Request { flags: CommandFlags(0xffff), ..request(Command::DISC, u64::MAX, 123) };
    for admission in [Admission::Open, Admission::ShuttingDown] {
        assert_eq!(check(&TERMS, &wild, admission), Verdict::Disconnect);
    }
}

#[test]
fn checks_come_in_one_order() {
    // Each step mends the first of the remaining faults, and the next one shows.
    let mut terms = Terms { read_only: true, size: 1000, ..TERMS };
    let mut asked = Request { flags: CommandFlags(0x8000), ..request(Command(99), 2000, u64::from(MAX_PAYLOAD) + 1) };
    let kind = |verdict| match verdict {
        Verdict::Fail(error, _) => error.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(check(&terms, &asked, Admission::ShuttingDown)), ErrorKind::Shutdown);
    let text = |terms: &Terms, asked: &Request| match judge(terms, asked) {
        Verdict::Fail(error, _) => error.text,
        other => format!("{other:?}"),
    };
    assert!(text(&terms, &asked).contains("no command"));
    asked.command = Command::WRITE;
    assert!(text(&terms, &asked).contains("flags"));
    asked.flags = CommandFlags::FUA;
    assert!(text(&terms, &asked).contains("read-only"));
    terms.read_only = false;
    assert!(text(&terms, &asked).contains("more than"));
    asked.length = 512;
    assert!(text(&terms, &asked).contains("past the size"));
    asked.offset = 488;
    assert!(matches!(judge(&terms, &asked), Verdict::Run(Task::Write { offset: 488, length: 512, .. })));
    let without = Terms { contexts: ContextSet::default(), ..TERMS };
    assert!(text(&without, &request(Command::BLOCK_STATUS, u64::MAX, 1)).contains("context"));
}

#[test]
fn read_only_exports_refuse_changes_with_eperm_and_take_the_payload() {
    let terms = Terms { read_only: true, ..TERMS };
    let changes = [(Command::WRITE, Aftermath::Drain(512)), (Command::TRIM, DRAIN_NONE)];
    for (command, aftermath) in changes {
        assert_eq!(fails(&terms, &request(command, 0, 512)), Some((ErrorKind::NotPermitted, aftermath)));
    }
    for command in [Command::READ, Command::FLUSH, Command::CACHE, Command::BLOCK_STATUS] {
        assert!(matches!(judge(&terms, &request(command, 0, 512)), Verdict::Run(_)));
    }
}

#[test]
fn payloads_beyond_64_mib_are_too_long_in_the_way_of_the_command() {
    let max = u64::from(MAX_PAYLOAD);
    let simple = Terms { mode: Mode::Simple, ..TERMS };
    let extended = Terms { mode: Mode::Extended, ..TERMS };
    for terms in [&simple, &TERMS, &extended] {
        assert!(matches!(judge(terms, &request(Command::WRITE, 0, max)), Verdict::Run(_)));
        for length in [max + 1, u64::from(u32::MAX)] {
            let refused = fails(terms, &request(Command::WRITE, 0, length));
            assert_eq!(refused, Some((ErrorKind::Invalid, Aftermath::Close)));
        }
        for command in EFFECTS {
            let huge = judge(terms, &request(command, 0, u64::from(u32::MAX)));
            assert!(matches!(huge, Verdict::Run(_)), "{command:?}");
        }
    }
    let read = |flags| Request { flags, ..request(Command::READ, 0, max + 1) };
    assert_eq!(fails(&simple, &read(CommandFlags(0))), Some((ErrorKind::Invalid, DRAIN_NONE)));
    assert_eq!(fails(&TERMS, &read(CommandFlags::DF)), Some((ErrorKind::Overflow, DRAIN_NONE)));
    let pieces = Task::Read { offset: 0, length: max + 1, shape: Shape::Pieces };
    assert_eq!(judge(&TERMS, &read(CommandFlags(0))), Verdict::Run(pieces));
    assert_eq!(fails(&extended, &read(CommandFlags::DF)), Some((ErrorKind::Overflow, DRAIN_NONE)));
    assert_eq!(judge(&extended, &read(CommandFlags(0))), Verdict::Run(pieces));
    let longest = request(Command::READ, 0, u64::from(u32::MAX));
    assert!(matches!(judge(&extended, &longest), Verdict::Run(_)));
    let longer = Request { length: 1 << 32, ..longest };
    assert_eq!(fails(&extended, &longer), Some((ErrorKind::Overflow, DRAIN_NONE)));
}

#[test]
fn effects_of_any_length_are_fine_with_extended_headers() {
    let terms = Terms { mode: Mode::Extended, ..TERMS };
    for command in EFFECTS {
        let whole = judge(&terms, &request(command, 0, SIZE));
        assert!(matches!(whole, Verdict::Run(_)), "{command:?}: {whole:?}");
        assert!(fails(&terms, &request(command, 1, SIZE)).is_some(), "{command:?}");
        assert!(fails(&terms, &request(command, 1, u64::MAX)).is_some(), "{command:?}");
    }
}

#[test]
fn a_payload_follows_writes_and_whatever_announces_one() {
    let announced = |command| Request { flags: CommandFlags::PAYLOAD_LEN, ..request(command, 0, 24) };
    for mode in MODES {
        assert_eq!(payload_length(mode, &request(Command::WRITE, 0, 24)), 24, "QEMU leaves the flag out");
        assert_eq!(payload_length(mode, &announced(Command::WRITE)), 24);
        assert_eq!(payload_length(mode, &request(Command::TRIM, 0, 24)), 0);
        let expected = if mode == Mode::Extended { 24 } else { 0 };
        assert_eq!(payload_length(mode, &announced(Command::TRIM)), expected, "{mode:?}");
    }
    let terms = Terms { mode: Mode::Extended, ..TERMS };
    for command in [Command::READ, Command::TRIM, Command::CACHE, Command::WRITE_ZEROES, Command::FLUSH, Command(99)] {
        assert_eq!(fails(&terms, &announced(command)), Some((ErrorKind::Invalid, Aftermath::Drain(24))), "{command:?}");
        let long = Request { length: u64::from(MAX_PAYLOAD) + 1, ..announced(command) };
        assert_eq!(fails(&terms, &long), Some((ErrorKind::Invalid, Aftermath::Close)), "{command:?}");
        let longest = Request { length: u64::MAX, ..announced(command) };
        assert_eq!(fails(&terms, &longest), Some((ErrorKind::Invalid, Aftermath::Close)), "{command:?}");
    }
}

#[test]
fn a_status_filter_selects_among_the_contexts_that_were_negotiated() {
    let terms = Terms { mode: Mode::Extended, contexts: ContextSet::ALL, ..TERMS };
    assert!(terms.flags().contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    let flags = CommandFlags::PAYLOAD_LEN;
    let asked = |length| Request { flags, ..request(Command::BLOCK_STATUS, 4096, length) };
    assert_eq!(judge(&terms, &asked(12)), Verdict::Run(Task::StatusFilter { payload: 12 }));
    let most = MAX_STATUS_FILTER as u64;
    assert!(matches!(judge(&terms, &asked(most)), Verdict::Run(_)));
    assert_eq!(fails(&terms, &asked(most + 1)), Some((ErrorKind::Invalid, Aftermath::Drain(most as u32 + 1))));
    let filtered = |length, ids: &[u32]| {
        let payload = StatusFilter::encode(length, ids);
        filtered_status(&terms, &asked(payload.len() as u64), &payload).map_err(|error| error.kind)
    };
    let task = |contexts| Ok(Task::Status { offset: 4096, length: 1 << 33, max: MAX_EXTENTS, contexts });
    assert_eq!(filtered(1 << 33, &[1]), task(BASE));
    assert_eq!(filtered(1 << 33, &[2, 1]), task(ContextSet::ALL));
    for ids in [&[][..], &[0], &[3], &[1, 1], &[u32::MAX, 1]] {
        assert_eq!(filtered(512, ids), Err(ErrorKind::Invalid), "{ids:?}");
    }
    for length in [0, SIZE - 4095, u64::MAX] {
        assert_eq!(filtered(length, &[1]), Err(ErrorKind::Invalid), "{length}");
    }
    for length in [0, 4, 7, 8, 9, 15] {
        let refused = filtered_status(&terms, &asked(length), &[0; 16][..length as usize]);
        assert_eq!(refused.map_err(|error| error.kind), Err(ErrorKind::Invalid), "{length} bytes");
    }
    let one = Terms { contexts: BASE, ..terms };
    let other = filtered_status(&one, &asked(12), &StatusFilter::encode(512, &[2]));
    assert!(other.is_err(), "it was not negotiated");
    for terms in [TERMS, Terms { contexts: ContextSet::NONE, ..terms }] {
        assert!(!terms.flags().contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
        let payload = if terms.mode == Mode::Extended { 12 } else { 0 };
        assert_eq!(fails(&terms, &asked(12)), Some((ErrorKind::Invalid, Aftermath::Drain(payload))));
    }
}

#[test]
fn transmission_flags_are_those_of_the_terms() {
    let flags = |mode, read_only, fast_zero, contexts| {
        let TransmissionFlags(flags) = Terms { size: 1, read_only, fast_zero, mode, contexts }.flags();
        flags
    };
    for (mode, extra) in [(Mode::Simple, 0), (Mode::Structured, 0x80), (Mode::Extended, 0x80)] {
        assert_eq!(flags(mode, false, true, ContextSet::NONE), 0x0d6d | extra);
        assert_eq!(flags(mode, false, false, ContextSet::NONE), 0x056d | extra);
        assert_eq!(flags(mode, true, true, ContextSet::NONE), 0x050f | extra);
        let filter = if mode == Mode::Extended { 0x1000 } else { 0 };
        assert_eq!(flags(mode, true, true, BASE), 0x050f | extra | filter);
    }
}

#[test]
fn a_write_that_is_refused_for_anything_and_too_long_to_read_closes() {
    let long = Request { flags: CommandFlags::DF, ..request(Command::WRITE, 0, u64::from(MAX_PAYLOAD) + 1) };
    assert_eq!(fails(&TERMS, &long), Some((ErrorKind::Invalid, Aftermath::Close)));
}

#[test]
fn empty_ranges_succeed_up_to_the_end_but_have_no_status() {
    for offset in [0, SIZE] {
        for command in [Command::READ, Command::WRITE, Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
            assert_eq!(judge(&TERMS, &request(command, offset, 0)), Verdict::Run(Task::Nothing), "{command:?}");
        }
        let status = fails(&TERMS, &request(Command::BLOCK_STATUS, offset, 0));
        assert_eq!(status, Some((ErrorKind::Invalid, DRAIN_NONE)));
    }
}

#[test]
fn flags_become_what_the_device_is_asked() {
    let with = |command, flags| Request { flags, ..request(command, 4096, 512) };
    let (offset, length, durability) = (4096, 512, Durability::BeforeReply);
    let zero = with(Command::WRITE_ZEROES, CommandFlags(0x13));
    let flags = ZeroFlags { no_hole: true, fast: true };
    assert_eq!(judge(&TERMS, &zero), Verdict::Run(Task::Zero { offset, length, flags, durability }));
    let trim = with(Command::TRIM, CommandFlags::FUA);
    assert_eq!(judge(&TERMS, &trim), Verdict::Run(Task::Trim { offset, length, durability }));
    let one = with(Command::BLOCK_STATUS, CommandFlags::REQ_ONE);
    assert_eq!(judge(&TERMS, &one), Verdict::Run(Task::Status { offset, length, max: 1, contexts: BASE }));
    let many = with(Command::BLOCK_STATUS, CommandFlags(0));
    let status = Task::Status { offset, length, max: MAX_EXTENTS, contexts: BASE };
    assert_eq!(judge(&TERMS, &many), Verdict::Run(status));
    assert_eq!(judge(&TERMS, &with(Command::CACHE, CommandFlags(0))), Verdict::Run(Task::Cache { offset, length }));
    let df = with(Command::READ, CommandFlags::DF);
    assert_eq!(judge(&TERMS, &df), Verdict::Run(Task::Read { offset, length, shape: Shape::Whole }));
}

#[test]
fn pieces_end_at_their_multiples_unless_the_range_is_short() {
    const MIB: u64 = 1 << 20;
    assert_eq!(piece_end(5, 5 + MIB, 1 << 20), 5 + MIB, "one piece is never cut");
    assert_eq!(piece_end(5, 5 + 2 * MIB, 1 << 20), MIB);
    assert_eq!(piece_end(MIB, 4 * MIB, 1 << 20), 2 * MIB);
    let (mut at, end) = (123, 123 + 64 * MIB);
    let mut pieces = 0;
    while at < end {
        let next = piece_end(at, end, 1 << 20);
        assert!(next > at && next - at <= MIB);
        (at, pieces) = (next, pieces + 1);
    }
    assert_eq!((at, pieces), (end, 65));
}

#[test]
fn replies_have_the_form_that_was_agreed() {
    let magic = |bytes: &[u8]| u32::from_be_bytes(*bytes.first_chunk().unwrap());
    for (mode, command, expected) in [
        (Mode::Simple, Command::READ, 0x6744_6698),
        (Mode::Structured, Command::READ, 0x668e_33ef),
        (Mode::Structured, Command::WRITE, 0x6744_6698),
        (Mode::Extended, Command::READ, 0x6e8a_278c),
        (Mode::Extended, Command::WRITE, 0x6e8a_278c),
    ] {
        assert_eq!(magic(success(mode, &request(command, 0, 512)).as_bytes()), expected, "{mode:?} {command:?}");
    }
    let error = Error::new(ErrorKind::Io, "bad").at(4097);
    let (head, body) = failure(Mode::Simple, &request(Command::READ, 4096, 512), &error);
    assert_eq!((head.as_bytes().len(), body.len()), (16, 0));
    let kind = |command, offset| {
        let (head, body) = failure(Mode::Structured, &request(command, offset, 512), &error);
        assert_eq!(head.as_bytes()[4..6], [0, 1], "DONE");
        (u16::from_be_bytes([head.as_bytes()[6], head.as_bytes()[7]]), body.len())
    };
    assert_eq!(kind(Command::READ, 4096), (0x8002, 17));
    assert_eq!(kind(Command::READ, 8192), (0x8001, 9), "a position outside the request is not told");
    assert_eq!(kind(Command::WRITE, 4096), (0x8001, 9));
    let (head, body) = failure(Mode::Extended, &request(Command::READ, 4096, 512), &error);
    assert_eq!((head.as_bytes().len(), body.len()), (32, 17));
    assert_eq!(head.as_bytes()[16..24], 4096u64.to_be_bytes(), "the offset of the request, not of the error");
}

#[test]
fn a_status_joins_neighbours_and_ends_with_the_request() {
    let extents = |list: &[(u64, u64)]| -> Vec<Extent> {
        list.iter().map(|&(length, status)| Extent { length, status }).collect()
    };
    let plan = |length, max, list: &[(u64, u64)]| plan_status(length, max, &extents(list));
    assert_eq!(plan(100, 9, &[(10, 0), (20, 0), (30, 3), (99, 0)]).unwrap(), extents(&[(30, 0), (30, 3), (40, 0)]));
    assert_eq!(plan(100, 1, &[(10, 0), (20, 0), (30, 3)]).unwrap(), extents(&[(30, 0)]));
    assert_eq!(plan(100, 9, &[(50, 1)]).unwrap(), extents(&[(50, 1)]), "fewer than asked is legal");
    let most = u64::from(u32::MAX);
    assert_eq!(plan(most, 9, &[(1 << 33, 3)]).unwrap(), extents(&[(most, 3)]));
    assert_eq!(plan(100, 9, &[]).unwrap_err().kind, ErrorKind::Io);
    assert_eq!(plan(100, 9, &[(10, 0), (0, 3)]).unwrap_err().kind, ErrorKind::Io);
}

#[test]
fn any_header_whatsoever_has_one_verdict() {
    let mut state = 3u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut runs, mut fails) = (0, 0);
    for _ in 0..200_000 {
        let edge = [0, 1, 512, SIZE - 1, SIZE, SIZE + 1, 1 << 63, u64::MAX];
        let asked = Request {
            flags: CommandFlags(if next() % 2 == 0 { 0 } else { next() as u16 & 0x3f }),
            command: Command((next() % 10) as u16),
            cookie: next(),
            offset: edge[(next() % 8) as usize],
            length: [0, 1, 512, 1 << 20, 64 << 20, (64 << 20) + 1, 0xffff_ffff, u64::MAX][(next() % 8) as usize],
        };
        let terms = Terms {
            read_only: next() % 4 == 0,
            fast_zero: next() % 2 == 0,
            mode: MODES[(next() % 3) as usize],
            contexts: ContextSet { base_allocation: next() % 2 == 0, allocation_depth: next() % 2 == 0 },
            ..TERMS
        };
        match judge(&terms, &asked) {
            Verdict::Run(Task::Read { offset, length, .. } | Task::Trim { offset, length, .. }) => {
                assert!(length > 0 && offset + length <= SIZE);
                runs += 1;
            }
            Verdict::Run(Task::Write { offset, length, .. }) => {
                assert!(length > 0 && length <= MAX_PAYLOAD && offset + u64::from(length) <= SIZE);
                runs += 1;
            }
            Verdict::Fail(error, Aftermath::Drain(payload)) => {
                assert!(!error.text.is_empty() && payload <= MAX_PAYLOAD);
                fails += 1;
            }
            _ => {}
        }
    }
    assert!(runs > 5000 && fails > 50_000, "{runs} ran, {fails} failed");
}
