//! The two tasks of a connected client: one sends requests, one receives replies and hands them to whoever waits.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::ClientError;
use super::collect::{Collector, Outcome, Payload};
use crate::wire::reply::{ChunkType, EXTENDED_CHUNK_LENGTH, ReplyHeader};

type Result<T, E = ClientError> = std::result::Result<T, E>;

/// Room for headers on both sides, in bytes; larger payloads bypass it.
const HEADERS: usize = 8 << 10;

/// A request on its way out.
pub(super) struct Outgoing {
    pub(super) header: Vec<u8>,
    pub(super) payload: Bytes,
}

/// A request that waits for its reply.
pub(super) struct Waiting {
    pub(super) collector: Collector,
    pub(super) done: oneshot::Sender<Result<Outcome>>,
    /// One of so many requests in flight; it counts also when nobody waits any more.
    pub(super) _permit: OwnedSemaphorePermit,
}

/// All requests that wait, or why nothing more will come.
#[derive(Default)]
pub(super) struct Pending(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: HashMap<u64, Waiting>,
    dead: Option<ClientError>,
}

impl Pending {
    /// Waits for a reply with this cookie.
    pub(super) fn insert(&self, cookie: u64, waiting: Waiting) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.dead {
            Some(error) => Err(error.clone()),
            None => {
                state.waiting.insert(cookie, waiting);
                Ok(())
            }
        }
    }

    fn take(&self, cookie: u64) -> Result<Waiting> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.remove(&cookie).ok_or(ClientError::Protocol("a reply to a request that was not sent"))
    }

    /// Nothing more will come: everybody who waits learns why.
    pub(super) fn fail(&self, error: &ClientError) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let error = state.dead.get_or_insert_with(|| error.clone()).clone();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for (_, waiting) in waiting {
            let _ = waiting.done.send(Err(error.clone()));
        }
    }
}

/// Sends until the channel closes, then closes the sending direction.
pub(super) async fn send(
    writer: impl AsyncWrite + Unpin,
    mut requests: mpsc::UnboundedReceiver<Outgoing>,
    pending: Arc<Pending>,
) {
    let mut writer = BufWriter::with_capacity(HEADERS, writer);
    let sent: io::Result<()> = async {
        while let Some(mut request) = requests.recv().await {
            loop {
                writer.write_all(&request.header).await?;
                writer.write_all(&request.payload).await?;
                match requests.try_recv() {
                    Ok(next) => request = next,
                    Err(_) => break,
                }
            }
            writer.flush().await?;
        }
        writer.shutdown().await
    }
    .await;
    if let Err(error) = sent {
        pending.fail(&error.into());
    }
}

/// Receives until the server closes or breaks a rule.
pub(super) async fn receive(reader: impl AsyncRead + Unpin, pending: Arc<Pending>) {
    let mut reader = BufReader::with_capacity(HEADERS, reader);
    loop {
        if let Err(error) = receive_one(&mut reader, &pending).await {
            return pending.fail(&error);
        }
    }
}

async fn receive_one(reader: &mut (impl AsyncRead + Unpin), pending: &Pending) -> Result<()> {
    let mut bytes = [0; EXTENDED_CHUNK_LENGTH];
    let (magic, rest) = bytes.split_at_mut(4);
    reader.read_exact(magic).await?;
    let magic = u32::from_be_bytes([magic[0], magic[1], magic[2], magic[3]]);
    let length = ReplyHeader::length_for(magic).ok_or(ClientError::Protocol("the magic of a reply is wrong"))?;
    reader.read_exact(&mut rest[..length - 4]).await?;
    match ReplyHeader::decode(&bytes[..length]) {
        Some(ReplyHeader::Simple { errno, cookie }) => {
            let mut waiting = pending.take(cookie)?;
            let result = async {
                reader.read_exact(waiting.collector.simple(errno)?).await?;
                Ok(())
            };
            finish(result.await, waiting)
        }
        Some(ReplyHeader::Chunk { flags, kind, cookie, offset, length }) => {
            let mut waiting = pending.take(cookie)?;
            let last = flags & 1 != 0;
            if kind == ChunkType::NONE && !last {
                return finish(Err(ClientError::Protocol("an empty chunk that is not the last")), waiting);
            }
            match chunk(reader, &mut waiting.collector, kind, offset, length).await {
                Ok(()) if !last => pending.insert(cookie, waiting),
                result => finish(result, waiting),
            }
        }
        None => Err(ClientError::Protocol("a reply is not well formed")),
    }
}

async fn chunk(
    reader: &mut (impl AsyncRead + Unpin),
    collector: &mut Collector,
    kind: ChunkType,
    offset: Option<u64>,
    length: u64,
) -> Result<()> {
    match collector.chunk(kind, offset, length)? {
        Payload::Small(length) => {
            let mut payload = vec![0; length as usize];
            reader.read_exact(&mut payload).await?;
            collector.payload(kind, &payload)
        }
        Payload::Data(length) => {
            let offset = reader.read_u64().await?;
            reader.read_exact(collector.place(offset, length)?).await?;
            Ok(())
        }
    }
}

/// Tells the one who waits; what broke the connection is also told to all others.
fn finish(received: Result<()>, waiting: Waiting) -> Result<()> {
    let Waiting { collector, done, .. } = waiting;
    match received.and_then(|()| collector.finish()) {
        // An error here means that nobody waits any more.
        Ok(result) => {
            let _ = done.send(result);
            Ok(())
        }
        Err(error) => {
            let _ = done.send(Err(error.clone()));
            Err(error)
        }
    }
}
