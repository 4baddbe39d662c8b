//! Devices that fail: the client learns what, where it can where, and the connection lives on.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use blockyard_nbd::client::ClientError;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::ReplyType;
use blockyard_nbd::wire::reply::{ChunkType, ErrorChunk, ReplyHeader};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use blockyard_nbd::{Durability, Error, ErrorKind, ZeroFlags};
use common::devices::{Call, Counting, Disk, Faulty, Hooked, Mem, Moment, Panics};
use common::servers::{NAME, Served, options};
use common::{ask, pattern, request, soon, verdict};

const MIB: u64 = 1 << 20;

#[tokio::test(start_paused = true)]
async fn one_unreadable_sector_costs_one_request_and_is_named() {
    for byte in [0, 32768, 4 * MIB - 512] {
        let faulty = Faulty { call: Call::Read, byte, error: ErrorKind::Io };
        let served = Served::disk(4 * MIB, Hooked::new(Mem::filled(4 * MIB, 5), faulty)).await;
        let df = CommandFlags::DF.0;
        for (mode, flags) in [
            (Mode::Simple, 0),
            (Mode::Structured, 0),
            (Mode::Structured, df),
            (Mode::Extended, 0),
            (Mode::Extended, df),
        ] {
            let mut raw = served.raw(mode, 8 << 20).await;
            let read = Request { flags: CommandFlags(flags), ..request(Command::READ, 4, 0, 4 * MIB) };
            ask(&mut raw, mode, read, b"").await;
            let mut came = 0;
            let last = loop {
                let reply = soon("a reply", raw.reply()).await.unwrap();
                match reply.0 {
                    ReplyHeader::Chunk { kind: ChunkType::OFFSET_DATA, flags: 0, .. } => came += reply.1.len() - 8,
                    _ => break reply,
                }
            };
            assert_eq!(verdict(&last), (5, 4), "byte {byte} {mode:?} {flags}");
            if let ReplyHeader::Chunk { kind, flags: done, .. } = last.0 {
                assert_eq!((kind, done), (ChunkType::ERROR_OFFSET, 1));
                assert_eq!(ErrorChunk::decode(kind, &last.1).unwrap().position, Some(byte));
                assert!(came as u64 <= byte && (flags == 0 || came == 0));
            }
            // Its neighbours are as readable as ever.
            let neighbour = if byte == 0 { 512 } else { byte - 512 };
            ask(&mut raw, mode, request(Command::READ, 5, neighbour, 512), b"").await;
            let reply = soon("the neighbour", raw.reply()).await.unwrap();
            let data = if mode == Mode::Simple { raw.receive(512).await.unwrap() } else { reply.1[8..].to_vec() };
            assert_eq!(data, pattern(5, 4 * MIB as usize)[neighbour as usize..][..512]);
        }
    }
}

#[tokio::test]
async fn every_kind_of_failure_has_its_number_for_every_command() {
    for (kind, errno) in [
        (ErrorKind::NotPermitted, 1),
        (ErrorKind::Io, 5),
        (ErrorKind::Invalid, 22),
        (ErrorKind::NoSpace, 28),
        (ErrorKind::NotSupported, 95),
        (ErrorKind::Shutdown, 108),
    ] {
        for call in [Call::Read, Call::Write, Call::Zero, Call::Trim, Call::Flush, Call::Extents] {
            let served = Served::disk(MIB, Hooked::new(Mem::new(MIB), Faulty { call, byte: 0, error: kind })).await;
            let client = served.client().await;
            let result = match call {
                Call::Read => client.read(0, 512).await.map(drop),
                Call::Write => client.write(0, vec![1; 512], Durability::OnFlush).await,
                Call::Zero => client.zero(0, 512, ZeroFlags::default(), Durability::OnFlush).await,
                Call::Trim => client.trim(0, 512, Durability::OnFlush).await,
                Call::Flush => client.flush().await,
                Call::Extents => client.block_status(0, 512).await.map(drop),
                Call::Cache => client.cache(0, 512).await,
            };
            let Err(ClientError::Request { errno: told, text, .. }) = result else { panic!("{result:?}") };
            assert_eq!((told, text.as_str()), (errno, "the medium is bad here"), "{call:?}");
            assert_eq!(served.stats.snapshot().counts.all_errors(), 1);
            client.cache(0, 512).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_long_write_that_fails_in_one_piece_fails_and_stays_in_step() {
    for byte in [0, 5 * MIB, 16 * MIB - 1] {
        let faulty = Faulty { call: Call::Write, byte, error: ErrorKind::NoSpace };
        let served = Served::disk(16 * MIB, Hooked::new(Mem::new(16 * MIB), faulty)).await;
        let client = served.client().await;
        let data = pattern(1, 16 << 20);
        let failed = soon("the write", client.write(0, data, Durability::BeforeReply)).await;
        assert_eq!(failed.unwrap_err().errno(), Some(28), "byte {byte}");
        client.flush().await.unwrap();
    }
}

#[tokio::test]
async fn a_long_durable_write_is_flushed_once_after_its_last_piece() {
    let hooked = Hooked::new(Mem::new(16 * MIB), Counting::default());
    let served = Served::disk(16 * MIB, hooked.clone()).await;
    let client = served.client().await;
    client.write(512, pattern(1, 8 << 20), Durability::BeforeReply).await.unwrap();
    assert_eq!((hooked.hook.of(Call::Write), hooked.hook.of(Call::Flush)), (9, 1));
    let failing = Hooked::new(Mem::new(16 * MIB), Faulty { call: Call::Flush, byte: 0, error: ErrorKind::Io });
    let served = Served::disk(16 * MIB, failing).await;
    let failed = served.client().await.write(0, pattern(1, 8 << 20), Durability::BeforeReply).await;
    assert_eq!(failed.unwrap_err().errno(), Some(5));
}

#[tokio::test]
async fn a_panic_in_a_device_call_ends_one_connection_and_no_other() {
    let calls = [Call::Read, Call::Write, Call::Zero, Call::Trim, Call::Flush, Call::Extents, Call::Cache];
    let both = calls.into_iter().flat_map(|call| [(call, Moment::AtOnce), (call, Moment::Later)]);
    for (call, moment) in both {
        let panics = Panics { call, moment };
        let served = Served::disk(8 * MIB, Hooked::new(Mem::new(8 * MIB), panics)).await;
        let (victim, other) = (served.client().await, served.client().await);
        let result = match call {
            Call::Read => soon("the end", victim.read(0, 2 << 20)).await.map(drop),
            Call::Write => soon("the end", victim.write(0, vec![1; 3 << 20], Durability::OnFlush)).await,
            Call::Zero => soon("the end", victim.zero(0, 512, ZeroFlags::default(), Durability::OnFlush)).await,
            Call::Trim => soon("the end", victim.trim(0, 512, Durability::OnFlush)).await,
            Call::Flush => soon("the end", victim.flush()).await,
            Call::Extents => soon("the end", victim.block_status(0, 512)).await.map(drop),
            Call::Cache => soon("the end", victim.cache(0, 512)).await,
        };
        assert!(matches!(result, Err(ClientError::Connection(_))), "{call:?} {moment:?}: {result:?}");
        served.connections(1).await;
        for healthy in [other, served.client().await] {
            if call == Call::Cache { healthy.flush().await.unwrap() } else { healthy.cache(0, 512).await.unwrap() }
        }
    }
}

#[tokio::test]
async fn a_long_write_of_which_one_piece_panics_is_no_success() {
    struct First;
    #[async_trait::async_trait]
    impl common::devices::Hook for First {
        async fn before(&self, call: Call, offset: u64, _: u64) -> Result<(), Error> {
            tokio::task::yield_now().await;
            assert!(call != Call::Write || offset > 0, "a device with a bug");
            Ok(())
        }
    }
    let served = Served::disk(8 * MIB, Hooked::new(Mem::new(8 * MIB), First)).await;
    for durability in [Durability::OnFlush, Durability::BeforeReply] {
        let client = served.client().await;
        let written = soon("an answer", client.write(0, vec![1; 4 << 20], durability)).await;
        assert!(written.is_err(), "its first mebibyte is not there");
    }
}

#[tokio::test]
async fn fast_zero_that_would_be_slow_is_not_supported_and_changes_nothing() {
    let mem = Mem::filled(MIB, 5);
    let served = Served::disk(MIB, mem.clone()).await;
    let client = served.client().await;
    let fast = ZeroFlags { fast: true, no_hole: false };
    let slow = client.zero(100, 65536, fast, Durability::OnFlush).await;
    assert_eq!(slow.unwrap_err().errno(), Some(95));
    assert_eq!(mem.content(), pattern(5, MIB as usize));
    client.zero(65536, 65536, fast, Durability::OnFlush).await.unwrap();
    assert_eq!(client.allocation(65536, 65536).await.unwrap()[0].status, 3);
}

#[tokio::test]
async fn an_export_that_does_not_open_is_a_polite_refusal_and_opening_is_left_to_go() {
    let disk = Disk::new(NAME, MIB, Mem::new(MIB)).broken(Error::new(ErrorKind::Io, "the image is locked"));
    let served = Served::with(disk, options()).await;
    let mut negotiation = served.negotiation().await;
    negotiation.info(NAME).await.unwrap();
    let Err((mut negotiation, error)) = negotiation.go_or_stay(NAME).await.unwrap() else { panic!("it opened") };
    let ClientError::Refused { reply, text, .. } = error else { panic!("{error:?}") };
    assert_eq!((reply, text.as_str()), (ReplyType::ERR_PLATFORM, "the image is locked"));
    assert_eq!(negotiation.list().await.unwrap().len(), 1);
    assert_eq!(served.stats.snapshot().connections, 0, "no place is kept for it");
}
