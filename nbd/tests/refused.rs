//! The lines of `docs/nbd-support.md` that say "refused" or "not applicable", each with what a client sees of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::sync::Arc;

use blockyard_nbd::client::raw::Raw;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::option::{InfoRequest, MetaRequest, OptionCode, ReplyType, WantedInfo, greeting};
use blockyard_nbd::wire::request::Request;
use blockyard_nbd::wire::{Command, CommandFlags};
use blockyard_nbd::{ErrorKind, Exports, Tls};
use common::devices::{Disk, Mem};
use common::servers::{MODES, NAME, Served, options};
use common::{ask, request, soon, verdict};
use tokio::io::DuplexStream;

const MIB: u64 = 1 << 20;

/// What a client sees.
enum Seen {
    /// The option is answered so, and the handshake goes on.
    Answer(OptionCode, Vec<u8>, ReplyType),
    /// The option succeeds with these replies before the ACK.
    Told(OptionCode, Vec<u8>, Vec<ReplyType>),
    /// These client flags are answered with a close.
    FlagsClose(u32),
    /// These bytes in the place of a request are answered with a close.
    Close(Mode, Vec<u8>),
    /// The request is answered with this error, and the connection goes on.
    Errno(Mode, Request, u32),
    /// These transmission flags are set for no export in no mode.
    NeverSet(u16),
    /// No error of a device becomes this number.
    NeverSent(u32),
    /// Something about the bytes of the greeting.
    Greeting(fn(&[u8]) -> bool),
    /// Exports of this size are not served.
    NotServed(u64),
    /// There is no way to configure it.
    NotConfigurable,
}

fn info(infos: &[u16]) -> Vec<u8> {
    let mut data = InfoRequest { name: NAME, wanted: WantedInfo::default() }.encode();
    data.truncate(4 + NAME.len());
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

fn flagged(command: Command, flags: CommandFlags) -> Request {
    Request { flags, ..request(command, 7, 0, 65536) }
}

/// By the names of the page.
fn table() -> Vec<(&'static str, Seen)> {
    use CommandFlags as F;
    use Seen::{Answer, Close, Errno, FlagsClose, Greeting, NeverSent, NeverSet, NotServed, Told};
    let [simple, structured, extended] = MODES;
    let read = request(Command::READ, 7, 0, 512);
    let (compact, wide) = (read.encode_compact().unwrap(), read.encode_extended());
    let odd = MetaRequest::encode(NAME, &["qemu:dirty-bitmap:b0", "nbdkit:x", "base:other"]);
    let unsupported = ReplyType::ERR_UNSUP;
    vec![
        ("oldstyle", Greeting(|bytes| bytes[8..16] == *b"IHAVEOPT")),
        ("other client flags", FlagsClose(4)),
        ("other client flags", FlagsClose(0x8000_0003)),
        ("NBD_OPT_PEEK_EXPORT", Answer(OptionCode::PEEK_EXPORT, b"disk0".to_vec(), unsupported)),
        ("other options", Answer(OptionCode(12), Vec::new(), unsupported)),
        ("other options", Answer(OptionCode(u32::MAX), vec![1; 70_000], unsupported)),
        // A client that does not ask for block sizes is served all the same.
        ("NBD_REP_ERR_BLOCK_SIZE_REQD", Told(OptionCode::GO, info(&[]), vec![ReplyType::INFO; 2])),
        ("other informations", Told(OptionCode::INFO, info(&[4, 17, 0xffff]), vec![ReplyType::INFO; 2])),
        ("exports of 2^63 bytes and more", NotServed(1 << 63)),
        ("exports of 2^63 bytes and more", NotServed(u64::MAX)),
        ("other contexts", Told(OptionCode::LIST_META_CONTEXT, odd, Vec::new())),
        ("NBD_FLAG_ROTATIONAL", NeverSet(0x10)),
        ("NBD_FLAG_SEND_RESIZE", NeverSet(0x200)),
        ("any other magic, and that of the other form", Close(simple, wide.clone())),
        ("any other magic, and that of the other form", Close(structured, wide)),
        ("any other magic, and that of the other form", Close(extended, [compact, vec![0; 4]].concat())),
        ("NBD_CMD_RESIZE", Errno(simple, request(Command(8), 7, 0, 2 * MIB), 22)),
        ("NBD_CMD_RESIZE", Errno(structured, request(Command(8), 7, 0, 2 * MIB), 22)),
        ("NBD_CMD_RESIZE", Errno(extended, request(Command(8), 7, 0, 2 * MIB), 22)),
        ("other commands", Errno(extended, request(Command(9), 7, 0, 512), 22)),
        ("DF without structured replies", Errno(simple, flagged(Command::READ, F::DF), 22)),
        ("PAYLOAD_LEN without extended headers", Errno(simple, flagged(Command::READ, F::PAYLOAD_LEN), 22)),
        ("PAYLOAD_LEN without extended headers", Errno(structured, flagged(Command::BLOCK_STATUS, F::PAYLOAD_LEN), 22)),
        ("FAST_ZERO that was not offered", Errno(structured, flagged(Command::WRITE_ZEROES, F::FAST_ZERO), 22)),
        ("other flags", Errno(extended, flagged(Command::FLUSH, F(0x40)), 22)),
        ("other flags", Errno(structured, flagged(Command::TRIM, F::NO_HOLE), 22)),
        // Each mode has the chunk types of its own, and `malformed` knows no others.
        ("other chunk types", Errno(structured, request(Command::BLOCK_STATUS, 7, 0, 512), 0)),
        ("NBD_ENOMEM", NeverSent(12)),
        ("pre-shared keys, anonymous TLS", Seen::NotConfigurable),
    ]
}

/// The last reply to an option, and the types before it.
async fn answer(raw: &mut Raw<DuplexStream>, code: OptionCode, data: &[u8]) -> (Vec<ReplyType>, ReplyType) {
    raw.option(code, data).await.unwrap();
    let mut before = Vec::new();
    loop {
        let (header, _) = soon("an answer", raw.option_reply()).await.unwrap();
        assert_eq!(header.code, code);
        if header.reply == ReplyType::ACK || header.reply.is_error() {
            return (before, header.reply);
        }
        before.push(header.reply);
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_page_calls_refused_or_not_applicable_is() {
    let disk = |read_only| {
        let disk = Disk::new(NAME, MIB, Mem::new(MIB)).without_fast_zero();
        if read_only { disk.read_only() } else { disk }
    };
    let served = [Served::with(disk(false), options()).await, Served::with(disk(true), options()).await];
    let greet = async || {
        let mut raw = Raw(served[0].pipe(1 << 17));
        raw.greet(3).await.unwrap();
        raw
    };
    for (line, seen) in table() {
        match seen {
            Seen::Answer(code, data, expected) => {
                let mut raw = greet().await;
                assert_eq!(answer(&mut raw, code, &data).await, (Vec::new(), expected), "{line}");
                assert_eq!(answer(&mut raw, OptionCode::LIST, b"").await.1, ReplyType::ACK, "{line}");
            }
            Seen::Told(code, data, expected) => {
                assert_eq!(answer(&mut greet().await, code, &data).await, (expected, ReplyType::ACK), "{line}");
            }
            Seen::FlagsClose(flags) => {
                let mut raw = Raw(served[0].pipe(4096));
                raw.greet(flags).await.unwrap();
                assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"", "{line}");
            }
            Seen::Close(mode, bytes) => {
                let mut raw = served[0].raw(mode, 4096).await;
                raw.send(&bytes).await.unwrap();
                assert_eq!(soon("the close", raw.receive_all()).await.unwrap(), b"", "{line}");
            }
            Seen::Errno(mode, asked, errno) => {
                let mut raw = served[0].raw(mode, 64 << 10).await;
                ask(&mut raw, mode, asked, b"").await;
                assert_eq!(verdict(&soon("a reply", raw.reply()).await.unwrap()), (errno, 7), "{line}");
                ask(&mut raw, mode, request(Command::FLUSH, 8, 0, 0), b"").await;
                assert_eq!(verdict(&soon("the next reply", raw.reply()).await.unwrap()), (0, 8), "{line}");
            }
            Seen::NeverSet(flag) => {
                for (served, mode) in served.iter().flat_map(|served| MODES.map(|mode| (served, mode))) {
                    let client = served.client_in(mode).await;
                    assert_eq!(client.details().info.flags.0 & flag, 0, "{line}");
                }
            }
            Seen::NeverSent(errno) => {
                use ErrorKind as E;
                let kinds = [E::NotPermitted, E::Io, E::Invalid, E::NoSpace, E::Overflow, E::NotSupported, E::Shutdown];
                assert!(kinds.iter().all(|kind| kind.errno() != errno), "{line}");
                let memory = std::io::Error::from(std::io::ErrorKind::OutOfMemory);
                assert_eq!(ErrorKind::from(&memory), E::Io, "{line}");
            }
            Seen::Greeting(is_right) => assert!(is_right(&greeting()), "{line}"),
            // An exhaustive match, so that a new way of configuring TLS is looked at here.
            Seen::NotConfigurable => match Tls::default() {
                Tls::Off | Tls::On(_) | Tls::Required(_) => {}
            },
            Seen::NotServed(size) => {
                assert!(Exports::single(Arc::new(Disk::new(NAME, size, Mem::new(MIB)))).is_err(), "{line}");
            }
        }
    }
}
