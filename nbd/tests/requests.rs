//! Requests byte by byte: what each is answered on the wire, and that the stream stays in step whatever was wrong.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::reply::{ChunkType, ReplyHeader};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use common::devices::{Call, Counting, Disk, Gate, Hooked, Mem};
use common::servers::{MODES, NAME, Served, options};
use common::{ask, pattern, request, soon, verdict};

const MIB: u64 = 1 << 20;

#[tokio::test(start_paused = true)]
async fn every_refused_request_leaves_the_stream_in_step() {
    let served = Served::disk(MIB, Mem::filled(MIB, 5)).await;
    let flagged = |command, flags| Request { flags: CommandFlags(flags), ..request(command, 9, 0, 512) };
    for mode in MODES {
        for (wrong, errno) in [
            (request(Command::READ, 9, MIB, 1), 22),
            (request(Command::READ, 9, u64::MAX, 512), 22),
            (request(Command::WRITE, 9, MIB - 1, 512), 28),
            (request(Command::WRITE, 9, 0, 64 * MIB), 28),
            (request(Command::WRITE_ZEROES, 9, MIB - 1, 512), 28),
            (request(Command::TRIM, 9, MIB, 512), 22),
            (request(Command::CACHE, 9, MIB, 512), 22),
            (request(Command::BLOCK_STATUS, 9, 0, 0), 22),
            (request(Command(8), 9, 0, 512), 22),
            (request(Command(0xffff), 9, 0, 512), 22),
            (flagged(Command::READ, 2), 22),
            (flagged(Command::WRITE, 0x40), 22),
            (flagged(Command::FLUSH, 4), 22),
            (flagged(Command::CACHE, 8), 22),
            (flagged(Command::WRITE_ZEROES, 0x8000), 22),
        ] {
            let mut raw = served.raw(mode, 64 << 10).await;
            let payload = if wrong.command == Command::WRITE { wrong.length as usize } else { 0 };
            ask(&mut raw, mode, wrong, &vec![0x25; payload]).await;
            let reply = soon("the refusal", raw.reply()).await.unwrap();
            assert_eq!(verdict(&reply), (errno, 9), "{wrong:?} {mode:?}");
            let chunk = matches!(reply.0, ReplyHeader::Chunk { .. });
            assert_eq!(chunk, mode != Mode::Simple, "errors have a text where they can");
            ask(&mut raw, mode, request(Command::FLUSH, 10, 0, 0), b"").await;
            assert_eq!(verdict(&soon("the next reply", raw.reply()).await.unwrap()), (0, 10), "{wrong:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_only_export_takes_no_change_and_says_eperm() {
    let mem = Mem::filled(MIB, 5);
    let served = Served::with(Disk::new(NAME, MIB, mem.clone()).read_only(), options()).await;
    for mode in MODES {
        let mut raw = served.raw(mode, 64 << 10).await;
        for command in [Command::WRITE, Command::WRITE_ZEROES, Command::TRIM] {
            let payload = if command == Command::WRITE { vec![1; 4096] } else { Vec::new() };
            ask(&mut raw, mode, request(command, 3, 0, 4096), &payload).await;
            assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (1, 3));
        }
    }
    assert_eq!(mem.content(), pattern(5, MIB as usize));
}

#[tokio::test(start_paused = true)]
async fn empty_requests_succeed_without_touching_the_device() {
    let hooked = Hooked::new(Mem::new(MIB), Counting::default());
    let served = Served::disk(MIB, hooked.clone()).await;
    for mode in MODES {
        let mut raw = served.raw(mode, 4096).await;
        for command in [Command::READ, Command::WRITE, Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
            ask(&mut raw, mode, request(command, 3, MIB, 0), b"").await;
            let (header, payload) = soon("a reply", raw.reply()).await.unwrap();
            assert_eq!(verdict(&(header, payload.clone())), (0, 3));
            if mode == Mode::Extended || (mode == Mode::Structured && command == Command::READ) {
                let offset = (mode == Mode::Extended).then_some(MIB);
                let none = ReplyHeader::Chunk { flags: 1, kind: ChunkType::NONE, cookie: 3, offset, length: 0 };
                assert_eq!(header, none);
            }
        }
    }
    assert!(hooked.hook.calls.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_wrong_request_magic_closes() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let [compact, extended] = [Mode::Structured, Mode::Extended];
    for (mode, magic) in [
        (compact, 0x2560_9514u32),
        (compact, 0x21e4_1c71),
        (compact, 0x6744_6698),
        (compact, 0),
        (extended, 0x2560_9513),
        (extended, 0x6e8a_278c),
        (extended, 0),
    ] {
        let mut raw = served.raw(mode, 4096).await;
        let mut bytes = request(Command::READ, 1, 0, 512).encode_extended();
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        raw.send(&bytes).await.unwrap();
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
    }
    served.connections(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_write_of_more_than_64_mib_is_answered_and_the_connection_closes() {
    let served = Served::disk(1 << 40, Mem::new(1 << 40)).await;
    for mode in MODES {
        let mut raw = served.raw(mode, 4096).await;
        ask(&mut raw, mode, request(Command::WRITE, 1, 0, 64 * MIB + 1), b"").await;
        assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 1));
        assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
    }
}

#[tokio::test(start_paused = true)]
async fn a_structured_read_comes_in_ascending_pieces_that_end_with_done() {
    let mem = Mem::filled(4 * MIB, 5);
    let served = Served::disk(4 * MIB, mem).await;
    let mut raw = served.raw(Mode::Structured, 64 << 10).await;
    raw.request(request(Command::READ, 5, 1000, 3 * MIB), b"").await.unwrap();
    let mut at = 1000;
    let data = pattern(5, 4 * MIB as usize);
    for piece in 0..4 {
        let (header, payload) = soon("a chunk", raw.reply()).await.unwrap();
        let ReplyHeader::Chunk { flags, kind, .. } = header else { panic!("{header:?}") };
        assert_eq!((flags, kind), (u16::from(piece == 3), ChunkType::OFFSET_DATA));
        assert_eq!(payload[..8], u64::to_be_bytes(at as u64));
        let length = payload.len() - 8;
        assert_eq!(payload[8..], data[at..at + length]);
        assert_eq!((at + length).is_multiple_of(512), piece < 3);
        at += length;
    }
    assert_eq!(at as u64, 1000 + 3 * MIB);
    let df = Request { flags: CommandFlags::DF, ..request(Command::READ, 6, 1000, 3 * MIB) };
    raw.request(df, b"").await.unwrap();
    let (header, payload) = soon("the chunk", raw.reply()).await.unwrap();
    let kind = ChunkType::OFFSET_DATA;
    assert_eq!(header, ReplyHeader::Chunk { flags: 1, kind, cookie: 6, offset: None, length: 3 * MIB + 8 });
    assert_eq!(payload[8..], data[1000..][..3 * MIB as usize]);
}

#[tokio::test(start_paused = true)]
async fn df_beyond_64_mib_overflows_and_simple_reads_beyond_it_are_invalid() {
    let served = Served::disk(1 << 40, Mem::new(1 << 40)).await;
    let mut raw = served.raw(Mode::Structured, 4096).await;
    let long = request(Command::READ, 6, 0, 64 * MIB + 1);
    raw.request(Request { flags: CommandFlags::DF, ..long }, b"").await.unwrap();
    assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (75, 6));
    let mut raw = served.raw(Mode::Simple, 4096).await;
    raw.request(long, b"").await.unwrap();
    assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 6));
}

#[tokio::test]
async fn a_read_of_200_mib_streams() {
    let mem = Mem::new(256 * MIB);
    mem.put(100 * MIB - 1, &pattern(3, 5_000_000));
    let served = Served::disk(256 * MIB, mem).await;
    for mode in [Mode::Structured, Mode::Extended] {
        let client = served.client_in(mode).await;
        let bytes = soon("the read", client.read(MIB / 2, 200 << 20)).await.unwrap();
        let (before, rest) = bytes.split_at((100 * MIB - MIB / 2) as usize - 1);
        let (data, behind) = rest.split_at(5_000_000);
        assert_eq!(bytes.len() as u64, 200 * MIB);
        assert!(before.iter().chain(behind).all(|byte| *byte == 0) && data == pattern(3, 5_000_000), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn block_status_has_one_chunk_with_what_the_device_tells() {
    let served = Served::disk(MIB, Mem::filled(MIB, 1)).await;
    let mut raw = served.raw(Mode::Structured, 4096).await;
    raw.request(request(Command::TRIM, 1, 65536, 65536), b"").await.unwrap();
    assert_eq!(verdict(&raw.reply().await.unwrap()), (0, 1));
    raw.request(request(Command::BLOCK_STATUS, 2, 32768, 65536), b"").await.unwrap();
    let (header, payload) = soon("the status", raw.reply()).await.unwrap();
    let kind = ChunkType::BLOCK_STATUS;
    assert_eq!(header, ReplyHeader::Chunk { flags: 1, kind, cookie: 2, offset: None, length: 20 });
    assert_eq!(payload, [0, 0, 0, 1, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 3]);
}

#[tokio::test(start_paused = true)]
async fn block_status_without_a_context_is_invalid() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let mut raw = served.raw(Mode::Simple, 4096).await;
    raw.request(request(Command::BLOCK_STATUS, 2, 0, 512), b"").await.unwrap();
    assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 2));
}

#[tokio::test(start_paused = true)]
async fn requests_glued_behind_go_are_served() {
    let served = Served::disk(MIB, Mem::filled(MIB, 5)).await;
    let mut raw = blockyard_nbd::client::raw::Raw(served.pipe(1 << 20));
    raw.greet(3).await.unwrap();
    let go = blockyard_nbd::wire::option::encode_option(
        blockyard_nbd::wire::option::OptionCode::GO,
        b"\x00\x00\x00\x00\x00\x00",
    );
    let write = request(Command::WRITE, 1, 512, 100_000).encode_compact().unwrap();
    let read = request(Command::READ, 2, 512, 100_000).encode_compact().unwrap();
    let data = pattern(77, 100_000);
    raw.send(&[&go[..], &write, &data, &read].concat()).await.unwrap();
    while raw.option_reply().await.unwrap().0.reply.0 != 1 {}
    assert_eq!(verdict(&soon("the write", raw.reply()).await.unwrap()), (0, 1));
    let (header, _) = soon("the read", raw.reply()).await.unwrap();
    assert_eq!(header, ReplyHeader::Simple { errno: 0, cookie: 2 });
    assert_eq!(raw.receive(100_000).await.unwrap(), data);
}

#[tokio::test(start_paused = true)]
async fn the_stream_may_be_cut_anywhere() {
    let mem = Mem::new(MIB);
    let served = Served::disk(MIB, mem.clone()).await;
    for capacity in [1, 2, 3, 7, 27, 28, 29, 31, 100] {
        let mut raw = served.raw(Mode::Structured, capacity).await;
        let data = pattern(capacity as u64, 500);
        let (mut reader, mut writer) = tokio::io::split(raw.0);
        let sent = data.clone();
        let sending = tokio::spawn(async move {
            for cookie in 0..10 {
                let header = request(Command::WRITE, cookie, cookie * 500, 500).encode_compact().unwrap();
                tokio::io::AsyncWriteExt::write_all(&mut writer, &header).await.unwrap();
                tokio::io::AsyncWriteExt::write_all(&mut writer, &sent).await.unwrap();
            }
            writer
        });
        let mut replies = [0; 160];
        soon("ten replies", tokio::io::AsyncReadExt::read_exact(&mut reader, &mut replies)).await.unwrap();
        raw = blockyard_nbd::client::raw::Raw(reader.unsplit(sending.await.unwrap()));
        assert_eq!(mem.content()[..5000], data.repeat(10));
        drop(raw);
    }
}

#[tokio::test(start_paused = true)]
async fn equal_cookies_are_both_answered_and_replies_come_in_any_order() {
    let hooked = Hooked::new(Mem::filled(MIB, 5), Gate::new(Call::Read));
    let served = Served::disk(MIB, hooked.clone()).await;
    let mut raw = served.raw(Mode::Simple, 64 << 10).await;
    raw.request(request(Command::READ, 7, 0, 512), b"").await.unwrap();
    raw.request(request(Command::READ, 7, 512, 512), b"").await.unwrap();
    soon("both reads", hooked.hook.arrived(2)).await;
    raw.request(request(Command::FLUSH, 7, 0, 0), b"").await.unwrap();
    assert_eq!(verdict(&soon("the flush", raw.reply()).await.unwrap()), (0, 7), "it overtakes both");
    hooked.hook.open(2);
    for _ in 0..2 {
        assert_eq!(verdict(&soon("a read", raw.reply()).await.unwrap()), (0, 7));
        raw.receive(512).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn disconnect_answers_what_is_outstanding_and_nothing_else_then_closes() {
    for (flags, length) in [(0, 0), (0xffff, 123)] {
        let hooked = Hooked::new(Mem::filled(MIB, 5), Gate::new(Call::Read));
        let served = Served::disk(MIB, hooked.clone()).await;
        let mut raw = served.raw(Mode::Simple, 64 << 10).await;
        for cookie in 0..8 {
            raw.request(request(Command::READ, cookie, 0, 512), b"").await.unwrap();
        }
        let goodbye = Request { flags: CommandFlags(flags), ..request(Command::DISC, 99, u64::MAX, length) };
        raw.request(goodbye, b"junk behind the goodbye").await.unwrap();
        soon("eight reads", hooked.hook.arrived(8)).await;
        hooked.hook.open(8);
        let all = soon("the close", raw.receive_all()).await.unwrap();
        assert_eq!(all.len(), 8 * (16 + 512));
        served.connections(0).await;
    }
}
