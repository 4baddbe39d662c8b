//! What the fuzz targets of the handshake and of the client do with their bytes, so that an ordinary test can do the same
//! with the corpus. A finding is a panic; an error of the protocol never is one.
#![allow(dead_code, reason = "each target uses one function")]
#![allow(unreachable_pub, clippy::unwrap_used, clippy::panic, reason = "a finding is a panic")]

#[path = "../common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::client::{Client, ClientError, Negotiation};
use blockyard_nbd::handshake::{Action, ExportFacts, Handshake, ListPolicy, Policy, Stance, TlsPolicy};
use blockyard_nbd::wire::option::{OptionCode, OptionHeader, OptionReplyHeader, ReplyType, greeting};
use blockyard_nbd::wire::{CommandFlags, MAX_ERROR_TEXT, SIZE_LIMIT};
use blockyard_nbd::{ContextSet, Durability, ZeroFlags};
use common::devices::Mem;
pub use common::servers::{NAME, Served};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Runtime;

const SIZE: u64 = 1 << 20;

thread_local! {
    /// Made once: a server costs more than a conversation. The clock stands still unless everybody waits for it.
    static SERVED: (Runtime, Served) = {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let served = runtime.block_on(Served::disk(SIZE, Mem::filled(SIZE, 5)));
        (runtime, served)
    };
}

/// The value of the future; one that takes longer than an hour of a clock that need not be waited for hangs.
fn run<T>(future: impl AsyncFnOnce(&Served) -> T) -> T {
    SERVED.with(|(runtime, served)| {
        runtime.block_on(async {
            let hour = tokio::time::timeout(Duration::from_secs(3600), future(served)).await;
            hour.unwrap_or_else(|_| panic!("it hangs"))
        })
    })
}

/// What a handshake came to.
#[derive(Default)]
struct Heard {
    sent: Vec<u8>,
    entered: bool,
    /// Bytes that are not part of the handshake.
    rest: usize,
}

/// The pure handshake, fed in steps.
fn hear(bytes: &[u8], step: usize, policy: Policy, stance: Stance) -> Heard {
    let facts = ExportFacts {
        name: NAME.into(),
        description: "a disk for tests".into(),
        size: SIZE,
        read_only: false,
        fast_zero: true,
        contexts: ContextSet::ALL,
        preferred_block_size: 65536,
    };
    let mut handshake = Handshake::new(Arc::new([facts]), policy, stance);
    let mut heard = Heard::default();
    let mut opened = false;
    let mut fed = 0;
    'feeding: for piece in bytes.chunks(step) {
        handshake.feed(piece);
        fed += piece.len();
        loop {
            match handshake.next_action() {
                Action::Wait => break,
                Action::Send(bytes) => heard.sent.extend(bytes),
                Action::Open(export) => {
                    assert_eq!(export, 0, "there is only one");
                    opened = true;
                    handshake.opened(Ok(()));
                }
                // As if the bytes that follow were decrypted.
                Action::StartTls => handshake = handshake.secured(),
                Action::Enter(_) => {
                    assert!(opened, "it enters what was not opened");
                    heard.entered = true;
                    break 'feeding;
                }
                Action::Aborted | Action::Close(_) => break 'feeding,
            }
        }
    }
    assert!(!opened || heard.entered, "it opens and does not enter");
    heard.rest = handshake.into_rest().len() + bytes.len() - fed;
    heard
}

/// The option that ends `end` bytes into what the client sent.
fn option_before(bytes: &[u8], end: usize) -> Option<OptionCode> {
    let mut at = 4;
    loop {
        let header = OptionHeader::decode(*bytes.get(at..)?.first_chunk()?)?;
        at += 16 + header.length as usize;
        if at >= end {
            return (at == end).then_some(header.code);
        }
    }
}

/// The length of the option replies at the front of `sent`, each of them well formed.
fn option_replies(sent: &[u8]) -> usize {
    let mut at = 0;
    while let Some(header) = sent.get(at..).and_then(|rest| rest.first_chunk()).copied() {
        let Some(header) = OptionReplyHeader::decode(header) else { break };
        let data = sent.get(at + 20..at + 20 + header.length as usize).expect("half a reply");
        assert!(header.reply != ReplyType::ACK || data.is_empty(), "an ACK with data");
        if header.reply.is_error() {
            assert!(data.len() <= MAX_ERROR_TEXT && std::str::from_utf8(data).is_ok(), "a text nobody can read");
        }
        at += 20 + data.len();
    }
    at
}

/// Nothing is opened without GO or EXPORT_NAME, what is sent parses, and the server says the same as the pure handshake.
pub fn handshake(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let list = if first & 1 == 0 { ListPolicy::Show } else { ListPolicy::Hide };
    let stance = match first >> 1 & 3 {
        0 | 1 => Stance::Welcome,
        2 => Stance::Refused("not today".into()),
        _ => Stance::ShuttingDown,
    };
    let tls = [TlsPolicy::Off, TlsPolicy::Off, TlsPolicy::On, TlsPolicy::Required][usize::from(first >> 3 & 3)];
    let plain = first & 1 == 0 && tls == TlsPolicy::Off && stance == Stance::Welcome;
    let step = [usize::MAX, 1, 3, 16, 100, 1000, 4096, 5000][usize::from(first >> 5)];
    let policy = Policy { list, tls, options: 256, option_bytes: 4 << 20 };
    let heard = hear(bytes, step, policy, stance);
    let replies = option_replies(&heard.sent);
    let by_name = if heard.entered {
        let code = option_before(bytes, bytes.len() - heard.rest).expect("it enters in the middle of an option");
        assert!(code == OptionCode::GO || code == OptionCode::EXPORT_NAME, "{code:?} enters");
        code == OptionCode::EXPORT_NAME
    } else {
        false
    };
    let behind = heard.sent.len() - replies;
    assert!(if by_name { behind == 10 || behind == 134 } else { behind == 0 }, "{behind} bytes that are no reply");
    if plain {
        let said = run(async |served: &Served| {
            let (mut reader, mut writer) = tokio::io::split(served.pipe(64 << 10));
            let mut said = Vec::new();
            let sending = async {
                let _ = writer.write_all(bytes).await;
                let _ = writer.shutdown().await;
            };
            let receiving = async {
                let _ = reader.read_to_end(&mut said).await;
            };
            tokio::join!(sending, receiving);
            served.connections(0).await;
            said
        });
        let expected = [&greeting()[..], &heard.sent].concat();
        // A client that leaves while the answer is on its way may miss the end of it, but gets nothing else.
        assert!(said.starts_with(&expected) || expected.starts_with(&said), "another answer than the pure handshake");
        assert!(heard.entered || said.len() <= expected.len(), "replies without a transmission phase");
    }
}

/// What the client is asked to do, by the bits of a byte.
pub async fn exercise(stream: impl AsyncRead + AsyncWrite + Send + 'static, plan: u8) -> Result<(), ClientError> {
    let mut negotiation = Negotiation::over(stream).await?;
    let refusable = |result| match result {
        Ok(()) | Err(ClientError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    };
    if plan & 1 != 0 {
        refusable(negotiation.list().await.map(drop))?;
        refusable(negotiation.info(NAME).await.map(drop))?;
    }
    if plan & 16 != 0 {
        refusable(negotiation.extended_headers().await)?;
    }
    if plan & 2 != 0 {
        refusable(negotiation.structured_replies().await)?;
    }
    if plan & 4 != 0 {
        refusable(negotiation.list_meta_contexts(NAME, &[]).await.map(drop))?;
        refusable(negotiation.set_meta_contexts(NAME, &["base:allocation", "qemu:allocation-depth"]).await.map(drop))?;
    }
    let client = match plan & 8 {
        0 => negotiation.go(NAME).await?,
        _ => negotiation.export_name(NAME).await?,
    };
    assert!(client.size() < SIZE_LIMIT);
    requests(&client).await;
    client.disconnect().await
}

/// Requests that are in flight together.
async fn requests(client: &Client) {
    let read = async |offset, length: u32, flags| {
        if let Ok(bytes) = client.read_with(offset, length, flags).await {
            assert_eq!(bytes.len(), length as usize, "a success without every byte");
        }
    };
    let status = async |flags| {
        for context in client.block_status_with(4096, 100_000, flags).await.unwrap_or_default() {
            assert!(!context.extents.is_empty() && context.extents.iter().all(|extent| extent.length > 0));
        }
    };
    let _ = tokio::join!(
        read(0, 4096, CommandFlags(0)),
        read(65536, 3000, CommandFlags::DF),
        async { client.write(512, vec![7; 512], Durability::BeforeReply).await },
        status(CommandFlags(0)),
        status(CommandFlags::REQ_ONE),
        async { client.block_status_of(0, 1 << 20, &[2]).await },
        async { client.zero(0, 65536, ZeroFlags::default(), Durability::OnFlush).await },
        async { client.trim(65536, 65536, Durability::OnFlush).await },
        async { client.cache(0, 4096).await },
        async { client.flush().await },
        read(1 << 40, 512, CommandFlags(0)),
    );
}

/// Whatever a server sends, every call of the client ends, and none succeeds with less than was asked for.
pub fn client(bytes: &[u8]) {
    let Some((plan, bytes)) = bytes.split_first() else { return };
    run(async |_: &Served| {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (mut reader, mut writer) = tokio::io::split(theirs);
        let bytes = bytes.to_vec();
        let server = tokio::spawn(async move {
            let _ = writer.write_all(&bytes).await;
            let _ = writer.shutdown().await;
            let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
        });
        let _ = exercise(ours, *plan).await;
        server.abort();
    });
}

/// What a good server says to [`exercise`]: the seed of a plan.
pub fn conversation(plan: u8) -> Vec<u8> {
    run(async |served: &Served| {
        let (ours, middle) = tokio::io::duplex(64 << 10);
        let (mut from_client, mut to_client) = tokio::io::split(middle);
        let (mut from_server, mut to_server) = tokio::io::split(served.pipe(64 << 10));
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
            let _ = to_server.shutdown().await;
        });
        let recording = tokio::spawn(async move {
            let mut recorded = vec![plan];
            let mut chunk = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from_server.read(&mut chunk).await {
                recorded.extend(&chunk[..count]);
                to_client.write_all(&chunk[..count]).await.unwrap();
            }
            let _ = to_client.shutdown().await;
            recorded
        });
        exercise(ours, plan).await.unwrap();
        recording.await.unwrap()
    })
}
