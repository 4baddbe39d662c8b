//! A relay between a client and our server that keeps what the client sent: what was negotiated is seen on the wire.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use crate::clients::{NAME, SIZE};
use crate::our_client::qemu_has_extended_headers;
use crate::programs::succeeds;
use crate::{Served, Transport};

/// Listens in front of a server.
struct Recorder {
    /// The server's, with the port of the recorder.
    uri: String,
    /// What each connection sent, in the order of their arrival.
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    fn start(runtime: &Runtime, server: &str) -> Self {
        let address = server.strip_prefix("nbd://").unwrap().split_once('/').unwrap().0.to_owned();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let uri = server.replace(&address, &listener.local_addr().unwrap().to_string());
        let sent = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let recorded = sent.clone();
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&address).await.unwrap();
                let number = {
                    let mut sent = recorded.lock().unwrap();
                    sent.push(Vec::new());
                    sent.len() - 1
                };
                tokio::spawn(relay(client, server, recorded.clone(), number));
            }
        });
        Self { uri, sent }
    }
}

async fn relay(client: TcpStream, server: TcpStream, sent: Arc<Mutex<Vec<Vec<u8>>>>, number: usize) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
    });
    let mut buffer = vec![0; 65536];
    while let Ok(length @ 1..) = from_client.read(&mut buffer).await {
        sent.lock().unwrap()[number].extend(&buffer[..length]);
        if to_server.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
}

#[test]
fn qemu_img_negotiates_extended_headers() {
    let served = Served::new(Transport::Ipv4, NAME, SIZE);
    let recorder = Recorder::start(&served.runtime, &served.target.uri);
    let source = served.target.source(1);
    succeeds(&["qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", &source, &recorder.uri]);
    succeeds(&["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", &source, &recorder.uri]);
    assert!(served.mem.content() == std::fs::read(&source).unwrap());
    let connections = recorder.sent.lock().unwrap();
    assert!(connections.len() >= 2);
    for sent in connections.iter() {
        let requests = first_request(sent);
        let extended = qemu_has_extended_headers();
        assert_eq!(requests, if extended { 0x21e4_1c71 } else { 0x2560_9513 }, "extended: {extended}");
    }
}

/// Magic of what follows the client flags and the options.
fn first_request(mut sent: &[u8]) -> u32 {
    sent = &sent[4..];
    while let Some(option) = sent.strip_prefix(b"IHAVEOPT") {
        let length = u32::from_be_bytes(*option[4..].first_chunk().unwrap());
        sent = &option[8 + length as usize..];
    }
    u32::from_be_bytes(*sent.first_chunk().unwrap())
}
