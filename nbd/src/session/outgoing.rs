//! The writing half of a connection: everything that is ready goes out in one vectored write.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::ops::Range;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::{Connection, Ending, Slot};
use crate::Buffer;
use crate::budget::Permit;
use crate::wire::reply::Head;

/// How many parts go into one write. Guess: well below what any system takes.
const SLICES: usize = 64;

/// A piece of a reply with all it needs to live until the socket has taken it.
pub(crate) struct Frame {
    head: Head,
    body: Body,
    /// Bytes of head and body that are gone.
    sent: usize,
    _permit: Option<Permit>,
    _slot: Option<Slot>,
}

enum Body {
    Owned(Vec<u8>),
    Lent(Buffer),
    /// One after the other.
    Many(Vec<Buffer>),
    /// Chunks whose content is a part of the buffer each; that of a hole is empty.
    Chunks(Buffer, Vec<(Head, Range<usize>)>),
}

impl Frame {
    pub(crate) fn new(head: Head) -> Self {
        Self { head, body: Body::Owned(Vec::new()), sent: 0, _permit: None, _slot: None }
    }

    pub(crate) fn with_body(mut self, body: Vec<u8>) -> Self {
        self.body = Body::Owned(body);
        self
    }

    pub(crate) fn with_buffer(mut self, buffer: Buffer) -> Self {
        self.body = Body::Lent(buffer);
        self
    }

    pub(crate) fn with_buffers(mut self, buffers: Vec<Buffer>) -> Self {
        self.body = Body::Many(buffers);
        self
    }

    /// Several chunks: the header of each, and the part of the buffer that follows it.
    pub(crate) fn of_chunks(buffer: Buffer, chunks: Vec<(Head, Range<usize>)>) -> Self {
        Self { body: Body::Chunks(buffer, chunks), ..Self::new(Head::default()) }
    }

    /// The permit for the memory of the body.
    pub(crate) fn with_permit(mut self, permit: Permit) -> Self {
        self._permit = Some(permit);
        self
    }

    /// The slot that this frame, the last of its request, frees.
    pub(crate) fn with_slot(mut self, slot: Slot) -> Self {
        self._slot = Some(slot);
        self
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let (one, many, chunks): (&[u8], &[Buffer], &[_]) = match &self.body {
            Body::Owned(bytes) => (bytes, &[], &[]),
            Body::Lent(buffer) => ((**buffer).as_ref(), &[], &[]),
            Body::Many(buffers) => (&[], buffers, &[]),
            Body::Chunks(buffer, chunks) => ((**buffer).as_ref(), &[], chunks),
        };
        // The buffer of several chunks goes out in parts, each behind its own header.
        let whole = if chunks.is_empty() { one } else { &[] };
        let chunks = chunks.iter().flat_map(move |(head, part)| [head.as_bytes(), &one[part.clone()]]);
        [self.head.as_bytes(), whole].into_iter().chain(many.iter().map(|buffer| (**buffer).as_ref())).chain(chunks)
    }

    /// What is left to send, in order.
    fn unsent(&self) -> impl Iterator<Item = &[u8]> {
        let mut gone = self.sent;
        self.parts().filter_map(move |part| {
            let skip = gone.min(part.len());
            gone -= skip;
            Some(&part[skip..]).filter(|part| !part.is_empty())
        })
    }

    fn unsent_bytes(&self) -> usize {
        self.parts().map(<[u8]>::len).sum::<usize>() - self.sent
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({} bytes to send)", self.unsent_bytes())
    }
}

/// Sends what the connection has queued until it is finished, then closes the sending direction; ends the connection if
/// that fails.
pub(crate) async fn send<W: AsyncWrite + Unpin>(connection: &Connection, mut writer: W) {
    let mut batch = VecDeque::new();
    while connection.flight.collect(&mut batch).await {
        while !batch.is_empty() {
            match timeout(connection.limits.stall_deadline, write_some(&mut writer, &batch)).await {
                Ok(Ok(count)) if count > 0 => advance(&mut batch, count),
                Ok(_) => return connection.flight.kill(Ending::Gone),
                Err(_) => return connection.flight.kill(Ending::Stalled),
            }
        }
        // Waits for the peer only where the stream keeps bytes back, as TLS does.
        match timeout(connection.limits.stall_deadline, writer.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return connection.flight.kill(Ending::Gone),
            Err(_) => return connection.flight.kill(Ending::Stalled),
        }
    }
    // An error here means that the peer is gone, and all has been said.
    let _ = timeout(connection.limits.stall_deadline, writer.shutdown()).await;
}

async fn write_some<W: AsyncWrite + Unpin>(writer: &mut W, batch: &VecDeque<Frame>) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); SLICES];
    let mut count = 0;
    for (slice, part) in slices.iter_mut().zip(batch.iter().flat_map(Frame::unsent)) {
        *slice = IoSlice::new(part);
        count += 1;
    }
    writer.write_vectored(&slices[..count]).await
}

/// Frees the frames that are gone and notes how much of the next one is.
fn advance(batch: &mut VecDeque<Frame>, mut count: usize) {
    while let Some(frame) = batch.front_mut() {
        let unsent = frame.unsent_bytes();
        if count < unsent {
            frame.sent += count;
            return;
        }
        count -= unsent;
        batch.pop_front();
    }
}
