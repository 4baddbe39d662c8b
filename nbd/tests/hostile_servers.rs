//! The client against servers that lie, one misbehaviour per case: it ends with a typed error, never with wrong bytes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use blockyard_nbd::client::{Client, ClientError, Negotiation};
use blockyard_nbd::wire::option::{OptionCode, ReplyType, encode_reply, greeting};
use blockyard_nbd::wire::reply::{ChunkHeader, ChunkType, Head, Last, error_payload, simple};
use blockyard_nbd::wire::request::{COMPACT_LENGTH, Request};
use blockyard_nbd::{Durability, Extent};
use common::soon;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// What the test server says in the handshake, option by option, whatever it is asked.
fn option(code: OptionCode, replies: &[(ReplyType, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (reply, data) in replies {
        encode_reply(&mut bytes, code, *reply, &[data]);
    }
    bytes
}

fn export_info(size: u64, flags: u16) -> Vec<u8> {
    [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn block_sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    [&[0, 3][..], &minimum.to_be_bytes(), &preferred.to_be_bytes(), &maximum.to_be_bytes()].concat()
}

/// A pipe on whose other end these bytes lie ready.
async fn says(bytes: &[u8]) -> DuplexStream {
    let (mut server, client) = tokio::io::duplex(1 << 20);
    server.write_all(bytes).await.unwrap();
    // The client may send what it likes into the other direction; only then is it closed.
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut server, &mut tokio::io::sink()).await;
    });
    client
}

async fn negotiates(replies: &[u8]) -> Negotiation {
    Negotiation::over(says(&[&greeting(), replies].concat()).await).await.unwrap()
}

#[track_caller]
fn assert_protocol<T: std::fmt::Debug>(result: &Result<T, ClientError>, what: &str) {
    assert!(matches!(result, Err(ClientError::Protocol(_))), "{what}: {result:?}");
}

#[tokio::test]
async fn greetings_that_are_not_fixed_newstyle_are_refused() {
    let oldstyle = [&b"NBDMAGIC"[..], &0x0000_4202_8186_1253_u64.to_be_bytes(), &[0; 136]].concat();
    let not_fixed = b"NBDMAGICIHAVEOPT\x00\x02".to_vec();
    let http = b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec();
    let second = b"NBDMAGICIHAVEOPS\x00\x03".to_vec();
    for bytes in [oldstyle, not_fixed, http, second] {
        assert_protocol(&Negotiation::over(says(&bytes).await).await, "greeting");
    }
    let (server, client) = tokio::io::duplex(64);
    drop(server);
    assert!(matches!(Negotiation::over(client).await, Err(ClientError::Connection(_))));
}

#[tokio::test]
async fn sizes_flags_and_block_sizes_that_make_no_sense_are_refused() {
    let good = export_info(1 << 20, 0x6d);
    for (what, infos) in [
        ("size 2^63", vec![export_info(1 << 63, 0x6d)]),
        ("size 2^64-1", vec![export_info(u64::MAX, 0x6d)]),
        ("flags 0", vec![export_info(1, 0)]),
        ("no size", vec![block_sizes(1, 4096, 1 << 25)]),
        ("a short size", vec![good[..11].to_vec()]),
        ("a long size", vec![[&good[..], &[0]].concat()]),
        ("no type", vec![vec![0]]),
        ("a minimum of 0", vec![good.clone(), block_sizes(0, 4096, 1 << 25)]),
        ("an odd minimum", vec![good.clone(), block_sizes(3, 4096, 1 << 25)]),
        ("a large minimum", vec![good.clone(), block_sizes(1 << 17, 1 << 17, 1 << 25)]),
        ("a small maximum", vec![good.clone(), block_sizes(1, 4096, 4095)]),
        ("a long name", vec![good.clone(), [&[0, 1][..], &[b'n'; 4097]].concat()]),
        ("a name with NUL", vec![good.clone(), b"\0\x01a\0b".to_vec()]),
    ] {
        let mut replies: Vec<(ReplyType, &[u8])> = infos.iter().map(|info| (ReplyType::INFO, &info[..])).collect();
        replies.push((ReplyType::ACK, b""));
        let result = negotiates(&option(OptionCode::GO, &replies)).await.go("x").await;
        assert_protocol(&result, what);
    }
    let replies = option(OptionCode::GO, &[(ReplyType::INFO, &good), (ReplyType::ACK, b"")]);
    assert_eq!(negotiates(&replies).await.go("x").await.unwrap().size(), 1 << 20);
}

#[tokio::test]
async fn option_replies_that_break_the_frame_are_refused() {
    let good = export_info(1 << 20, 0x6d);
    let mut wrong_magic = option(OptionCode::INFO, &[(ReplyType::ACK, b"")]);
    wrong_magic[7] ^= 1;
    let mut huge = option(OptionCode::INFO, &[(ReplyType::INFO, b"")]);
    huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    for (what, bytes) in [
        ("another option", option(OptionCode::LIST, &[(ReplyType::ACK, b"")])),
        ("wrong magic", wrong_magic),
        ("4 GiB of information", huge),
        ("an ACK with data", option(OptionCode::INFO, &[(ReplyType::INFO, &good), (ReplyType::ACK, b"x")])),
    ] {
        assert_protocol(&negotiates(&bytes).await.info("x").await, what);
    }
    for (what, data) in [("no length", &b"\0\0"[..]), ("a lie", b"\0\0\0\x09disk"), ("no UTF-8", b"\0\0\0\x01\xff")] {
        let bytes = option(OptionCode::LIST, &[(ReplyType::SERVER, data), (ReplyType::ACK, b"")]);
        assert_protocol(&negotiates(&bytes).await.list().await, what);
    }
    let context = option(OptionCode::LIST_META_CONTEXT, &[(ReplyType::META_CONTEXT, b"\0"), (ReplyType::ACK, b"")]);
    assert_protocol(&negotiates(&context).await.list_meta_contexts("x", &[]).await, "half a context");
    let unsupported = option(OptionCode::STRUCTURED_REPLY, &[(ReplyType::ERR_UNSUP, &[b'x'; 5000])]);
    let Err(ClientError::Refused { text, .. }) = negotiates(&unsupported).await.structured_replies().await else {
        panic!("not refused")
    };
    assert_eq!(text.len(), 4096, "the text is bounded");
}

#[tokio::test]
async fn answers_that_do_not_end_are_cut_off() {
    let (mut server, client) = tokio::io::duplex(64 << 10);
    let endless = tokio::spawn(async move {
        server.write_all(&greeting()).await.unwrap();
        let info = option(OptionCode::INFO, &[(ReplyType::INFO, &export_info(1, 1))]);
        while server.write_all(&info).await.is_ok() {}
    });
    let mut negotiation = Negotiation::over(client).await.unwrap();
    assert_protocol(&soon("the end of patience", negotiation.info("x")).await, "endless information");
    drop(negotiation);
    soon("the server", endless).await.unwrap();
}

/// A connected client whose server answers its first request with what `answer` makes of the cookie, and closes.
async fn answers(structured: bool, answer: impl Fn(u64) -> Vec<u8> + Send + 'static) -> Client {
    let (mut server, client) = tokio::io::duplex(1 << 20);
    let mut bytes = greeting();
    if structured {
        bytes.extend(option(OptionCode::STRUCTURED_REPLY, &[(ReplyType::ACK, b"")]));
        let context = [(ReplyType::META_CONTEXT, &b"\0\0\0\x05base:allocation"[..]), (ReplyType::ACK, b"")];
        bytes.extend(option(OptionCode::SET_META_CONTEXT, &context));
    }
    let infos = [(ReplyType::INFO, &export_info(1 << 30, 0xfff)[..]), (ReplyType::ACK, b"")];
    bytes.extend(option(OptionCode::GO, &infos));
    server.write_all(&bytes).await.unwrap();
    let mut negotiation = Negotiation::over(client).await.unwrap();
    if structured {
        negotiation.structured_replies().await.unwrap();
        negotiation.set_meta_contexts("x", &["base:allocation"]).await.unwrap();
    }
    let client = negotiation.go("x").await.unwrap();
    tokio::spawn(async move {
        // What the client sent in the handshake comes first; the request is found by its magic.
        let mut seen = Vec::new();
        let request = loop {
            if server.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                return;
            }
            let start = seen.windows(4).position(|bytes| bytes == 0x2560_9513u32.to_be_bytes());
            let header = start.and_then(|start| seen[start..].first_chunk::<COMPACT_LENGTH>());
            if let Some(request) = header.and_then(Request::decode_compact) {
                break request;
            }
        };
        let _ = server.write_all(&answer(request.cookie)).await;
        let _ = server.shutdown().await;
        let _ = tokio::io::copy(&mut server, &mut tokio::io::sink()).await;
    });
    client
}

fn chunk(cookie: u64, kind: ChunkType, last: Last, length: u32) -> Head {
    ChunkHeader::Structured { cookie }.chunk(kind, last, length)
}

fn data_chunk(cookie: u64, last: Last, offset: u64, length: u32) -> Head {
    ChunkHeader::Structured { cookie }.data(last, offset, length)
}

fn status_payload(context: u32, extents: &[Extent]) -> Vec<u8> {
    ChunkHeader::Structured { cookie: 0 }.status(Last::Yes, context, extents).1
}

fn data(cookie: u64, last: Last, offset: u64, bytes: &[u8]) -> Vec<u8> {
    [data_chunk(cookie, last, offset, bytes.len() as u32).as_bytes(), bytes].concat()
}

fn any_chunk(cookie: u64, kind: ChunkType, last: Last, payload: &[u8]) -> Vec<u8> {
    [chunk(cookie, kind, last, payload.len() as u32).as_bytes(), payload].concat()
}

fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

type Answer = fn(u64) -> Vec<u8>;

#[tokio::test]
async fn reads_whose_reply_breaks_a_rule_fail_and_bring_no_bytes() {
    use Last::{No, Yes};
    // The request is for 1024 bytes at 4096.
    let cases: &[(&str, Answer)] = &[
        ("an unknown cookie", |cookie| data(cookie + 1, Yes, 4096, &[1; 1024])),
        ("no content", |cookie| any_chunk(cookie, ChunkType::NONE, Yes, b"")),
        ("too little content", |cookie| data(cookie, Yes, 4096, &[1; 1023])),
        ("a gap", |cookie| [data(cookie, No, 4096, &[1; 500]), data(cookie, Yes, 4600, &[1; 520])].concat()),
        ("an overlap", |cookie| [data(cookie, No, 4096, &[1; 600]), data(cookie, Yes, 4600, &[1; 520])].concat()),
        ("the same bytes twice", |cookie| {
            [data(cookie, No, 4096, &[1; 512]), data(cookie, Yes, 4096, &[2; 512])].concat()
        }),
        ("a hole over data", |cookie| {
            let hole = any_chunk(cookie, ChunkType::OFFSET_HOLE, Yes, &hole(4096, 1024));
            [data(cookie, No, 4096, &[1; 512]), hole].concat()
        }),
        ("an empty hole", |cookie| any_chunk(cookie, ChunkType::OFFSET_HOLE, Yes, &hole(4096, 0))),
        ("a hole of 13 bytes", |cookie| any_chunk(cookie, ChunkType::OFFSET_HOLE, Yes, &[0; 13])),
        ("a hole past the request", |cookie| any_chunk(cookie, ChunkType::OFFSET_HOLE, Yes, &hole(4096, u32::MAX))),
        ("content before the request", |cookie| data(cookie, Yes, 4095, &[1; 1024])),
        ("content behind the request", |cookie| data(cookie, Yes, 4097, &[1; 1024])),
        ("content far behind the request", |cookie| data(cookie, Yes, u64::MAX - 10, &[1; 1024])),
        ("more content than asked for", |cookie| data(cookie, Yes, 4096, &[1; 1025])),
        ("a data chunk without data", |cookie| any_chunk(cookie, ChunkType::OFFSET_DATA, Yes, &[0; 8])),
        ("a data chunk without offset", |cookie| any_chunk(cookie, ChunkType::OFFSET_DATA, Yes, &[0; 7])),
        ("a data chunk of 4 GiB", |cookie| data_chunk(cookie, Yes, 4096, u32::MAX - 8).as_bytes().to_vec()),
        ("an empty chunk that is not last", |cookie| any_chunk(cookie, ChunkType::NONE, No, b"")),
        ("an empty chunk with a payload", |cookie| any_chunk(cookie, ChunkType::NONE, Yes, b"x")),
        ("an unknown chunk", |cookie| any_chunk(cookie, ChunkType(77), Yes, b"")),
        ("a status for a read", |cookie| any_chunk(cookie, ChunkType::BLOCK_STATUS, Yes, &[0; 12])),
        ("a simple reply", |cookie| [simple(cookie, 0).as_bytes(), &[1; 1024]].concat()),
        ("an error 0", |cookie| any_chunk(cookie, ChunkType::ERROR, Yes, &error_payload(0, "fine", None))),
        ("an error outside the request", |cookie| {
            any_chunk(cookie, ChunkType::ERROR_OFFSET, Yes, &error_payload(5, "bad", Some(5120)))
        }),
        ("an error whose text is longer than it", |cookie| {
            any_chunk(cookie, ChunkType::ERROR, Yes, &[0, 0, 0, 5, 0xff, 0xff])
        }),
        ("an error of a mebibyte", |cookie| chunk(cookie, ChunkType::ERROR, Yes, 1 << 20).as_bytes().to_vec()),
        ("two last chunks", |cookie| [data(cookie, Yes, 4096, &[1; 512]), data(cookie, Yes, 4608, &[1; 512])].concat()),
        ("no magic", |_| vec![0; 64]),
        ("a request", |cookie| {
            let request = Request { cookie, ..common::request(blockyard_nbd::wire::Command::READ, 0, 0, 0) };
            request.encode_compact().unwrap()
        }),
    ];
    for (what, answer) in cases {
        let client = answers(true, answer).await;
        let result = soon("an end", client.read(4096, 1024)).await;
        assert_protocol(&result, what);
        let next = soon("the next read", client.read(0, 1)).await;
        assert!(next.is_err(), "{what}: the connection is over");
    }
}

#[tokio::test]
async fn a_reply_that_is_not_finished_is_a_broken_connection() {
    let cases: &[Answer] = &[
        |_| Vec::new(),
        |cookie| data(cookie, Last::No, 4096, &[1; 1024]),
        |cookie| data(cookie, Last::Yes, 4096, &[1; 1024])[..900].to_vec(),
        |cookie| data(cookie, Last::Yes, 4096, &[1; 1024])[..19].to_vec(),
    ];
    for answer in cases {
        let client = answers(true, answer).await;
        let result = soon("an end", client.read(4096, 1024)).await;
        assert!(matches!(result, Err(ClientError::Connection(_))), "{result:?}");
    }
}

#[tokio::test]
async fn good_replies_in_any_order_are_put_together() {
    let client = answers(true, |cookie| {
        [
            data(cookie, Last::No, 4608, &[2; 512]),
            any_chunk(cookie, ChunkType::OFFSET_HOLE, Last::No, &hole(4096, 12)),
            data(cookie, Last::No, 4108, &[1; 500]),
            any_chunk(cookie, ChunkType::NONE, Last::Yes, b""),
        ]
        .concat()
    })
    .await;
    let expected = [vec![0; 12], vec![1; 500], vec![2; 512]].concat();
    assert_eq!(soon("the read", client.read(4096, 1024)).await.unwrap(), expected);
}

#[tokio::test]
async fn an_error_after_content_is_the_result_and_the_connection_lives() {
    let client = answers(true, |cookie| {
        let error = any_chunk(cookie, ChunkType::ERROR_OFFSET, Last::Yes, &error_payload(5, "bad", Some(4600)));
        [data(cookie, Last::No, 4096, &[1; 504]), error].concat()
    })
    .await;
    let Err(ClientError::Request { errno, text, offset }) = client.read(4096, 1024).await else { panic!("no error") };
    assert_eq!((errno, text.as_str(), offset), (5, "bad", Some(4600)));
}

#[tokio::test]
async fn statuses_that_break_a_rule_are_refused() {
    let extents = |list: &[u64]| -> Vec<Extent> { list.iter().map(|&length| Extent { length, status: 0 }).collect() };
    assert_eq!(status_payload(5, &extents(&[1024])).len(), 12);
    let cases: &[(&str, Answer)] = &[
        ("no extent", |cookie| any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &[0, 0, 0, 5])),
        ("half an extent", |cookie| any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &[5; 15])),
        ("an empty extent", |cookie| {
            any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &[0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0])
        }),
        ("an extent behind the request", |cookie| {
            let extents = [Extent { length: 1024, status: 0 }, Extent { length: 1, status: 0 }];
            any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &status_payload(5, &extents))
        }),
        ("one context twice", |cookie| {
            let payload = status_payload(5, &[Extent { length: 1024, status: 0 }]);
            let one = any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::No, &payload);
            [one, any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &payload)].concat()
        }),
        ("more contexts than there are", |cookie| {
            let payload = |id| status_payload(id, &[Extent { length: 1024, status: 0 }]);
            let one = any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::No, &payload(5));
            [one, any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &payload(6))].concat()
        }),
        ("a success without a status", |cookie| any_chunk(cookie, ChunkType::NONE, Last::Yes, b"")),
        ("a simple success", |cookie| simple(cookie, 0).as_bytes().to_vec()),
        ("data", |cookie| data(cookie, Last::Yes, 4096, &[1; 1024])),
        ("4 GiB of extents", |cookie| chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, u32::MAX).as_bytes().to_vec()),
    ];
    for (what, answer) in cases {
        let client = answers(true, answer).await;
        assert_protocol(&soon("an end", client.block_status(4096, 1024)).await, what);
    }
    let longer = answers(true, |cookie| {
        let extents = [Extent { length: 512, status: 0 }, Extent { length: 1 << 20, status: 3 }];
        any_chunk(cookie, ChunkType::BLOCK_STATUS, Last::Yes, &status_payload(5, &extents))
    })
    .await;
    let last = Extent { length: 512, status: 3 };
    assert_eq!(longer.allocation(4096, 1024).await.unwrap()[1], last, "the last one may be longer, and is cut");
}

#[tokio::test]
async fn chunks_that_were_not_agreed_are_refused() {
    let client = answers(false, |cookie| data(cookie, Last::Yes, 4096, &[1; 1024])).await;
    assert_protocol(&soon("an end", client.read(4096, 1024)).await, "a chunk in simple mode");
    let client = answers(false, |cookie| simple(cookie, 28).as_bytes().to_vec()).await;
    let full = client.write(0, vec![1; 512], Durability::OnFlush).await.unwrap_err();
    assert_eq!(full.errno(), Some(28));
}

#[tokio::test]
async fn any_bytes_at_all_end_in_an_error_or_an_answer() {
    let mut state = 11u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut ends = 0;
    for round in 0..600u64 {
        let (length, seed) = (next() % 200, next());
        let client = answers(true, move |cookie| {
            // A good reply with some bytes changed, or noise.
            let good = data(cookie, Last::Yes, 4096, &[1; 1024]);
            let mut bytes = if round % 3 == 0 { vec![seed as u8; length as usize] } else { good };
            for change in 0..round % 4 {
                let at = (seed.rotate_left(change as u32 * 9) % bytes.len().max(1) as u64) as usize;
                if let Some(byte) = bytes.get_mut(at % 40) {
                    *byte ^= 1 << (seed.rotate_left(change as u32) % 8);
                }
            }
            bytes
        })
        .await;
        if let Ok(bytes) = soon("an end", client.read(4096, 1024)).await {
            assert_eq!(bytes.len(), 1024);
        }
        ends += 1;
    }
    assert_eq!(ends, 600);
}

#[tokio::test]
async fn requests_that_cannot_be_sent_are_refused_without_sending() {
    let client = answers(false, |_| Vec::new()).await;
    let long = client.read(0, (32 << 20) + 1).await;
    assert!(matches!(long, Err(ClientError::Unsendable(_))), "{long:?}");
    let long = client.write(0, vec![0; (32 << 20) + 1], Durability::OnFlush).await;
    assert!(matches!(long, Err(ClientError::Unsendable(_))), "{long:?}");
    let status = client.allocation(0, 512).await;
    assert!(matches!(status, Err(ClientError::Unsendable(_))), "{status:?}");
}
