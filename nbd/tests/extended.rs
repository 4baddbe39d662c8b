//! Extended headers, several contexts at once, holes in reads: what goes beyond structured replies.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use blockyard_nbd::client::Negotiation;
use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{InfoRequest, MetaRequest, OptionCode, ReplyType, WantedInfo};
use blockyard_nbd::wire::reply::{ChunkType, ErrorChunk, ReplyHeader};
use blockyard_nbd::wire::request::{Request, StatusFilter};
use blockyard_nbd::wire::{Command, CommandFlags, TransmissionFlags};
use blockyard_nbd::{Durability, ErrorKind, Extent, ZeroFlags};
use common::devices::{Call, Counting, Disk, Faulty, Gate, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{ask, pattern, request, soon, verdict};
use tokio::io::DuplexStream;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The replies of a handshake to some options, then to GO.
async fn replies(served: &Served, asked: &[(OptionCode, &[u8])]) -> Vec<ReplyType> {
    let mut raw = Raw(served.pipe(64 << 10));
    raw.greet(3).await.unwrap();
    let mut told = Vec::new();
    for (code, data) in asked {
        raw.option(*code, data).await.unwrap();
        loop {
            let (header, _) = soon("a reply", raw.option_reply()).await.unwrap();
            told.push(header.reply);
            if header.reply == ReplyType::ACK || header.reply.is_error() {
                break;
            }
        }
    }
    told
}

const STRUCTURED: (OptionCode, &[u8]) = (OptionCode::STRUCTURED_REPLY, b"");
const EXTENDED: (OptionCode, &[u8]) = (OptionCode::EXTENDED_HEADERS, b"");
const ACK: ReplyType = ReplyType::ACK;

#[tokio::test(start_paused = true)]
async fn extended_headers_are_agreed_once_with_or_without_structured_replies_before() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    assert_eq!(replies(&served, &[EXTENDED, EXTENDED]).await, [ACK, ReplyType::ERR_INVALID]);
    assert_eq!(replies(&served, &[STRUCTURED, EXTENDED]).await, [ACK, ACK]);
    let data = (OptionCode::EXTENDED_HEADERS, &b"x"[..]);
    assert_eq!(replies(&served, &[data, EXTENDED]).await, [ReplyType::ERR_INVALID, ACK]);
}

#[tokio::test(start_paused = true)]
async fn structured_replies_are_refused_after_extended_headers_which_go_further() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let told = replies(&served, &[EXTENDED, STRUCTURED]).await;
    assert_eq!(told, [ACK, ReplyType::ERR_EXT_HEADER_REQD]);
}

#[tokio::test(start_paused = true)]
async fn export_name_closes_after_extended_headers() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let mut raw = Raw(served.pipe(4096));
    raw.greet(3).await.unwrap();
    raw.option(OptionCode::EXTENDED_HEADERS, b"").await.unwrap();
    soon("the ACK", raw.option_reply()).await.unwrap();
    raw.option(OptionCode::EXPORT_NAME, NAME.as_bytes()).await.unwrap();
    assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
}

#[tokio::test(start_paused = true)]
async fn contexts_can_be_set_after_extended_headers_alone_and_bring_the_payload_flag() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    for (queries, filter) in [(&[][..], false), (&["base:allocation"], true), (&["qemu:allocation-depth"], true)] {
        let mut negotiation = served.negotiation().await;
        negotiation.extended_headers().await.unwrap();
        negotiation.set_meta_contexts(NAME, queries).await.unwrap();
        let info = negotiation.info(NAME).await.unwrap();
        assert_eq!(info.info.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD), filter, "{queries:?}");
        assert_eq!(negotiation.go(NAME).await.unwrap().details().info, info.info);
    }
}

#[tokio::test(start_paused = true)]
async fn wildcards_list_whole_namespaces_and_select_nothing() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let both = ["base:allocation", "qemu:allocation-depth"];
    let names = |contexts: Vec<blockyard_nbd::client::MetaContext>| {
        contexts.into_iter().map(|context| (context.id, context.name)).collect::<Vec<_>>()
    };
    let listed = |list: &[&str]| list.iter().map(|name| (0, (*name).to_owned())).collect::<Vec<_>>();
    let mut negotiation: Negotiation = served.negotiation().await;
    negotiation.structured_replies().await.unwrap();
    for (queries, expected) in [
        (&[][..], &both[..]),
        (&["base:"], &both[..1]),
        (&["qemu:"], &both[1..]),
        (&["qemu:", "base:"], &both[..]),
        (&[":", "q:", "qemu:allocation", "qemu:dirty-bitmap:"], &[]),
    ] {
        let told = negotiation.list_meta_contexts(NAME, queries).await.unwrap();
        assert_eq!(names(told), listed(expected), "LIST {queries:?}");
        let set = negotiation.set_meta_contexts(NAME, queries).await.unwrap();
        assert!(set.is_empty(), "SET {queries:?}");
    }
    let set = negotiation.set_meta_contexts(NAME, &[both[1], both[0], both[1]]).await.unwrap();
    assert_eq!(names(set), [(1, both[0].to_owned()), (2, both[1].to_owned())], "each once, with an id of its own");
}

#[tokio::test(start_paused = true)]
async fn every_context_gets_one_chunk_and_the_last_one_is_done() {
    let served = Served::disk(MIB, Mem::filled(MIB, 1)).await;
    for mode in [Mode::Structured, Mode::Extended] {
        let client = served.client_in(mode).await;
        client.trim(65536, 65536, Durability::OnFlush).await.unwrap();
        let told = client.block_status(0, MIB).await.unwrap();
        let extents = |list: &[(u64, u64)]| -> Vec<Extent> {
            list.iter().map(|&(length, status)| Extent { length, status }).collect()
        };
        assert_eq!(told.iter().map(|one| one.context).collect::<Vec<_>>(), [1, 2], "{mode:?}");
        assert_eq!(told[0].extents, extents(&[(65536, 0), (65536, 3), (MIB - 131_072, 0)]));
        assert_eq!(told[1].extents, extents(&[(65536, 1), (65536, 0), (MIB - 131_072, 1)]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_status_that_fails_in_its_second_context_ends_with_an_error() {
    // The hook fails the second of the two calls.
    struct Second(std::sync::atomic::AtomicUsize);
    #[async_trait::async_trait]
    impl common::devices::Hook for Second {
        async fn before(&self, call: Call, _: u64, _: u64) -> Result<(), blockyard_nbd::Error> {
            let earlier = self.0.fetch_add(usize::from(call == Call::Extents), std::sync::atomic::Ordering::Relaxed);
            if call == Call::Extents && earlier == 1 {
                return Err(blockyard_nbd::Error::new(ErrorKind::Io, "the tables are bad here"));
            }
            Ok(())
        }
    }
    let served = Served::disk(MIB, Hooked::new(Mem::new(MIB), Second(0.into()))).await;
    let client = served.client_in(Mode::Extended).await;
    let failed = soon("the status", client.block_status(0, MIB)).await;
    assert_eq!(failed.unwrap_err().errno(), Some(5));
    assert_eq!(client.block_status(0, MIB).await.unwrap().len(), 2, "the connection lives");
}

/// A connection with extended headers and both contexts.
async fn raw_with_both(served: &Served) -> Raw<DuplexStream> {
    let mut raw = Raw(served.pipe(1 << 20));
    raw.greet(3).await.unwrap();
    let set = MetaRequest::encode(NAME, &["base:allocation", "qemu:allocation-depth"]);
    let go = InfoRequest { name: NAME, wanted: WantedInfo::default() }.encode();
    for (code, data) in
        [(OptionCode::EXTENDED_HEADERS, &b""[..]), (OptionCode::SET_META_CONTEXT, &set), (OptionCode::GO, &go)]
    {
        raw.option(code, data).await.unwrap();
        while soon("the handshake", raw.option_reply()).await.unwrap().0.reply != ReplyType::ACK {}
    }
    raw
}

#[tokio::test(start_paused = true)]
async fn a_status_filter_is_obeyed_and_a_wrong_one_is_consumed() {
    let served = Served::disk(1 << 40, Mem::new(1 << 40)).await;
    let mut raw = raw_with_both(&served).await;
    let asked =
        |length| Request { flags: CommandFlags::PAYLOAD_LEN, ..request(Command::BLOCK_STATUS, 4, 65536, length) };
    for (ids, told) in [(&[1][..], &[1][..]), (&[2], &[2]), (&[2, 1], &[1, 2])] {
        let payload = StatusFilter::encode(1 << 39, ids);
        raw.extended_request(asked(payload.len() as u64), &payload).await.unwrap();
        for id in told {
            let (header, payload) = soon("a status", raw.reply()).await.unwrap();
            let ReplyHeader::Chunk { kind, offset, flags, .. } = header else { panic!("{header:?}") };
            assert_eq!((kind, offset), (ChunkType::BLOCK_STATUS_EXT, Some(65536)));
            assert_eq!(flags == 1, *id == *told.last().unwrap());
            assert_eq!(payload[..4], u32::to_be_bytes(*id));
            let status: u64 = if *id == 1 { 3 } else { 0 };
            assert_eq!(payload[8..], [u64::to_be_bytes(1 << 39), status.to_be_bytes()].concat());
        }
    }
    let filter = |ids: &[u32]| StatusFilter::encode(512, ids);
    for payload in [
        vec![0; 7],
        vec![0; 8],
        vec![0; 9],
        filter(&[]),
        filter(&[1, 1]),
        filter(&[9]),
        filter(&[1, 2, 3]),
        vec![9; 4096],
    ] {
        raw.extended_request(asked(payload.len() as u64), &payload).await.unwrap();
        assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 4), "{} bytes", payload.len());
        raw.extended_request(request(Command::FLUSH, 5, 0, 0), b"").await.unwrap();
        assert_eq!(verdict(&soon("the next reply", raw.reply()).await.unwrap()), (0, 5));
    }
    raw.extended_request(asked(1 << 31), b"").await.unwrap();
    assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 4));
    assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"");
}

#[tokio::test(start_paused = true)]
async fn the_client_asks_for_some_contexts_only() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let client = served.client_in(Mode::Extended).await;
    let told = client.block_status_of(0, MIB, &[2]).await.unwrap();
    assert_eq!((told.len(), told[0].context), (1, 2));
    let structured = served.client_in(Mode::Structured).await;
    assert!(structured.block_status_of(0, MIB, &[2]).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn payloads_that_nobody_expects_are_consumed() {
    let served = Served::disk(MIB, Mem::new(MIB)).await;
    let mut raw = served.raw(Mode::Extended, 64 << 10).await;
    for command in [Command::READ, Command::FLUSH, Command::TRIM, Command::CACHE, Command::WRITE_ZEROES, Command(8)] {
        let odd = Request { flags: CommandFlags::PAYLOAD_LEN, ..request(command, 1, 0, 100) };
        raw.extended_request(odd, &[0x21; 100]).await.unwrap();
        assert_eq!(verdict(&soon("the refusal", raw.reply()).await.unwrap()), (22, 1), "{command:?}");
    }
    raw.extended_request(request(Command::FLUSH, 2, 0, 0), b"").await.unwrap();
    assert_eq!(verdict(&soon("the flush", raw.reply()).await.unwrap()), (0, 2), "the stream is in step");
}

#[tokio::test(start_paused = true)]
async fn a_write_has_its_payload_whether_the_flag_says_so_or_not() {
    let mem = Mem::new(MIB);
    let served = Served::disk(MIB, mem.clone()).await;
    let mut raw = served.raw(Mode::Extended, 64 << 10).await;
    for (cookie, flags) in [(1, CommandFlags(0)), (2, CommandFlags::PAYLOAD_LEN), (3, CommandFlags::FUA)] {
        let write = Request { flags, ..request(Command::WRITE, cookie, cookie * 4096, 4096) };
        raw.extended_request(write, &pattern(cookie, 4096)).await.unwrap();
        assert_eq!(verdict(&soon("the write", raw.reply()).await.unwrap()), (0, cookie));
        assert_eq!(mem.content()[cookie as usize * 4096..][..4096], pattern(cookie, 4096));
    }
}

#[tokio::test(start_paused = true)]
async fn every_chunk_of_an_extended_reply_echoes_the_offset_of_the_request() {
    let faulty = Faulty { call: Call::Read, byte: 3 * MIB, error: ErrorKind::Io };
    let served = Served::disk(4 * MIB, Hooked::new(Mem::filled(4 * MIB, 5), faulty)).await;
    let mut raw = served.raw(Mode::Extended, 8 << 20).await;
    raw.extended_request(request(Command::READ, 4, 4096, 4 * MIB - 4096), b"").await.unwrap();
    let mut chunks = 0;
    loop {
        let (header, payload) = soon("a chunk", raw.reply()).await.unwrap();
        let ReplyHeader::Chunk { flags, kind, cookie: 4, offset: Some(4096), .. } = header else {
            panic!("{header:?}")
        };
        chunks += 1;
        if flags == 1 {
            assert_eq!(ErrorChunk::decode(kind, &payload).unwrap().position, Some(3 * MIB));
            break;
        }
    }
    assert_eq!(chunks, 4, "three pieces before the bad one");
}

/// The content chunks of a reply: type, offset, length.
async fn chunks(raw: &mut Raw<DuplexStream>) -> Vec<(ChunkType, u64, u64)> {
    let mut chunks = Vec::new();
    loop {
        let (header, payload) = soon("a chunk", raw.reply()).await.unwrap();
        let ReplyHeader::Chunk { flags, kind, .. } = header else { panic!("{header:?}") };
        let offset = u64::from_be_bytes(*payload.first_chunk().unwrap());
        let length = match kind {
            ChunkType::OFFSET_HOLE => u64::from(u32::from_be_bytes(*payload[8..].first_chunk().unwrap())),
            _ => payload.len() as u64 - 8,
        };
        chunks.push((kind, offset, length));
        if flags == 1 {
            return chunks;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn holes_travel_as_holes_unless_they_are_too_small_or_df_forbids_it() {
    use ChunkType as C;
    const KIB: u64 = 1 << 10;
    let mem = Mem::new(4 * MIB);
    mem.put(128 * KIB, &pattern(1, 64 << 10));
    mem.put(3 * MIB, &pattern(2, 64 << 10));
    let served = Served::disk(4 * MIB, mem.clone()).await;
    for mode in [Mode::Structured, Mode::Extended] {
        let mut raw = served.raw(mode, 8 << 20).await;
        let mut read = async |offset, length, flags| {
            let asked = Request { flags, ..request(Command::READ, 4, offset, length) };
            ask(&mut raw, mode, asked, b"").await;
            chunks(&mut raw).await
        };
        let plain = CommandFlags(0);
        let whole = read(0, MIB, plain).await;
        let data = (C::OFFSET_DATA, 128 * KIB, 64 * KIB);
        assert_eq!(whole, [(C::OFFSET_HOLE, 0, 128 * KIB), data, (C::OFFSET_HOLE, 192 * KIB, 832 * KIB)]);
        assert_eq!(read(MIB, 2 * MIB, plain).await, [(C::OFFSET_HOLE, MIB, MIB), (C::OFFSET_HOLE, 2 * MIB, MIB)]);
        assert_eq!(read(7, 100, plain).await, [(C::OFFSET_HOLE, 7, 100)], "a whole hole, however small");
        let small = read(126 * KIB, 4 * KIB, plain).await;
        assert_eq!(small, [(C::OFFSET_DATA, 126 * KIB, 4 * KIB)], "2 KiB of hole are not worth a chunk");
        let odd = read(1001, 128 * KIB, plain).await;
        assert_eq!(odd, [(C::OFFSET_HOLE, 1001, 128 * KIB - 1001), (C::OFFSET_DATA, 128 * KIB, 1001)]);
        let df = read(0, MIB, CommandFlags::DF).await;
        assert_eq!(df, [(C::OFFSET_DATA, 0, MIB)]);
        let client = served.client_in(mode).await;
        for (offset, length) in [(0, MIB), (126 * KIB, 4 * KIB), (1001, 2 * MIB), (0, 4 * MIB)] {
            let expected = &mem.content()[offset as usize..][..length as usize];
            assert_eq!(client.read(offset, length as u32).await.unwrap(), expected);
            let df = client.read_with(offset, length as u32, CommandFlags::DF).await.unwrap();
            assert_eq!(df, expected);
        }
    }
    let simple = served.client_in(Mode::Simple).await;
    assert_eq!(simple.read(0, 4 << 20).await.unwrap(), mem.content());
}

#[tokio::test(start_paused = true)]
async fn a_whole_disk_is_zeroed_in_one_request_and_in_steps_the_last_of_which_makes_it_durable() {
    let size = 5 * GIB + 12345;
    for command in [Command::WRITE_ZEROES, Command::TRIM] {
        let hooked = Hooked::new(Mem::new(size), Counting::default());
        let served = Served::disk(size, hooked.clone()).await;
        let client = served.client_in(Mode::Extended).await;
        client.plain(command, CommandFlags::FUA, 0, size).await.unwrap();
        let call = if command == Command::TRIM { Call::Trim } else { Call::Zero };
        assert_eq!((hooked.hook.of(call), hooked.hook.of(Call::Flush)), (6, 1));
        client.plain(command, CommandFlags(0), 0, size).await.unwrap();
        assert_eq!((hooked.hook.of(call), hooked.hook.of(Call::Flush)), (12, 1));
        client.plain(command, CommandFlags::FUA, 4096, 65536).await.unwrap();
        assert_eq!((hooked.hook.of(call), hooked.hook.of(Call::Flush)), (13, 1), "one step is durable by itself");
    }
}

#[tokio::test(start_paused = true)]
async fn a_long_zero_ends_at_the_next_step_when_its_client_is_gone() {
    let hooked = Hooked::new(Mem::new(64 * GIB), Gate::new(Call::Zero));
    let served = Served::disk(64 * GIB, hooked.clone()).await;
    let mut raw = served.raw(Mode::Extended, 4096).await;
    raw.extended_request(request(Command::WRITE_ZEROES, 1, 0, 64 * GIB), b"").await.unwrap();
    soon("the first step", hooked.hook.arrived(1)).await;
    drop(raw);
    // The paused clock moves on when nobody has anything left to do: the server has seen the end of its client.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    hooked.hook.open(64);
    served.connections(0).await;
    assert_eq!(hooked.hook.count(), 1, "steps");
}

#[tokio::test(start_paused = true)]
async fn fast_zero_is_decided_before_anything_changes() {
    let size = 4 * GIB + 100;
    let mem = Mem::new(size);
    mem.put(0, &pattern(1, 65536));
    let hooked = Hooked::new(mem, Counting::default());
    let served = Served::disk(size, hooked.clone()).await;
    let client = served.client_in(Mode::Extended).await;
    let fast = ZeroFlags { fast: true, no_hole: false };
    let slow = client.zero(0, size, fast, Durability::OnFlush).await.unwrap_err();
    assert_eq!((slow.errno(), hooked.hook.of(Call::Zero)), (Some(95), 0), "its last bytes are no whole block");
    client.zero(0, 4 * GIB, fast, Durability::OnFlush).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_export_that_cannot_tell_fast_zeroes_does_not_offer_them() {
    let served = Served::with(Disk::new(NAME, MIB, Mem::new(MIB)).without_fast_zero(), options()).await;
    let client = served.client().await;
    assert!(!client.details().info.flags.contains(TransmissionFlags::SEND_FAST_ZERO));
    let fast = ZeroFlags { fast: true, no_hole: false };
    let refused = client.zero(0, 65536, fast, Durability::OnFlush).await.unwrap_err();
    assert_eq!(refused.errno(), Some(22));
    client.zero(0, 65536, ZeroFlags::default(), Durability::OnFlush).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn cache_reaches_the_device_as_a_hint_whose_failure_nobody_hears() {
    let faulty = Faulty { call: Call::Cache, byte: 0, error: ErrorKind::Io };
    let counted = Hooked::new(Mem::filled(MIB, 1), Counting::default());
    let served = Served::disk(MIB, Hooked::new(counted.clone(), faulty)).await;
    let client = served.client().await;
    client.cache(0, MIB).await.unwrap();
    client.cache(512, 1024).await.unwrap();
    assert_eq!(counted.hook.of(Call::Cache), 2);
    assert_eq!(client.read(0, 512).await.unwrap(), pattern(1, 512));
    assert_eq!(client.cache(MIB, 1).await.unwrap_err().errno(), Some(22));
}
