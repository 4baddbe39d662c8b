//! The reading half of a connection: request headers through a small buffer, payloads straight into the memory of the
//! device.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// Room for headers and for small payloads that came with them, in bytes. Measured: 4 KiB writes gain nothing from more.
const STAGE: usize = 32 << 10;
/// After a payload of at least this many bytes the next header is read alone, so that the payload behind it need not be
/// copied out of the stage. Guess: where a copy costs about as much as a system call.
const LARGE: usize = 8 << 10;

/// Why nothing more comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dry {
    /// The peer closed or the socket failed.
    Gone,
    /// The peer stopped in the middle of a message.
    Stalled,
}

/// See the module.
pub(crate) struct Intake<R> {
    reader: R,
    stage: Vec<u8>,
    start: usize,
    end: usize,
    stall: Duration,
    frugal: bool,
}

impl<R: AsyncRead + Unpin> Intake<R> {
    /// Reads from `reader`, after the bytes of `rest` that came too early.
    pub(crate) fn new(reader: R, rest: &[u8], stall: Duration) -> Self {
        let mut stage = vec![0; STAGE.max(rest.len())];
        stage[..rest.len()].copy_from_slice(rest);
        Self { reader, stage, start: 0, end: rest.len(), stall, frugal: false }
    }

    /// The next `N` bytes. Waits for the first of them without limit, for the others at most the stall deadline.
    ///
    /// # Cancellation
    /// Bytes that came stay.
    pub(crate) async fn header<const N: usize>(&mut self) -> Result<[u8; N], Dry> {
        loop {
            if let Some(header) = self.stage[self.start..self.end].first_chunk::<N>() {
                self.start += N;
                return Ok(*header);
            }
            let staged = self.end - self.start;
            self.stage.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, staged);
            let room = if self.frugal { N } else { self.stage.len() };
            let read = self.reader.read(&mut self.stage[staged..room]);
            let count = if staged == 0 { read.await } else { in_time(self.stall, read).await? };
            self.end += some(count)?;
        }
    }

    /// Fills `into` with payload.
    pub(crate) async fn payload(&mut self, into: &mut [u8]) -> Result<(), Dry> {
        let mut filled = self.unstage(into.len());
        into[..filled].copy_from_slice(&self.stage[self.start - filled..self.start]);
        while filled < into.len() {
            filled += some(in_time(self.stall, self.reader.read(&mut into[filled..])).await?)?;
        }
        self.frugal = into.len() >= LARGE;
        Ok(())
    }

    /// Drops `length` bytes of payload.
    pub(crate) async fn discard(&mut self, length: u32) -> Result<(), Dry> {
        let mut left = length as usize - self.unstage(length as usize);
        while left > 0 {
            // Whatever was staged is used up by now.
            let room = left.min(self.stage.len());
            left -= some(in_time(self.stall, self.reader.read(&mut self.stage[..room])).await?)?;
        }
        Ok(())
    }

    /// Reads and drops what still comes, at most `bytes` of it; the caller sets the time.
    pub(crate) async fn drain(&mut self, bytes: u64) {
        let mut left = bytes;
        while left > 0 {
            match self.reader.read(&mut self.stage).await {
                Ok(count) if count > 0 => left = left.saturating_sub(count as u64),
                _ => return,
            }
        }
    }

    /// Uses up to `length` staged bytes.
    fn unstage(&mut self, length: usize) -> usize {
        let count = length.min(self.end - self.start);
        self.start += count;
        count
    }
}

async fn in_time<T>(stall: Duration, read: impl Future<Output = T>) -> Result<T, Dry> {
    timeout(stall, read).await.map_err(|_| Dry::Stalled)
}

fn some(count: std::io::Result<usize>) -> Result<usize, Dry> {
    count.ok().filter(|count| *count > 0).ok_or(Dry::Gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn headers_and_payloads_come_out_alike_however_the_bytes_arrive() {
        let stream: Vec<u8> = (0..60_000u32).map(|at| (at % 251) as u8).collect();
        for step in [1, 7, 4096, 60_000] {
            for rest in [0, 5, 40_000] {
                let mut mock = tokio_test_reader(&stream[rest..], step);
                let mut intake = Intake::new(&mut mock, &stream[..rest], Duration::from_secs(1));
                let mut seen = Vec::new();
                for payload in [0, 3, 20_000, 10_000, 1, 9000] {
                    seen.extend(intake.header::<28>().await.unwrap());
                    let mut buffer = vec![0; payload];
                    intake.payload(&mut buffer).await.unwrap();
                    seen.extend(buffer);
                }
                assert!(stream.starts_with(&seen), "step {step}, rest {rest}");
                intake.discard(50).await.unwrap();
                let at = seen.len() + 50;
                assert_eq!(intake.header::<4>().await.unwrap(), stream[at..at + 4]);
            }
        }
    }

    /// A reader that gives at most `step` bytes at a time.
    fn tokio_test_reader(bytes: &[u8], step: usize) -> impl AsyncRead + Unpin {
        struct Steps(std::collections::VecDeque<u8>, usize);
        impl AsyncRead for Steps {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
                buffer: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                let count = self.1.min(buffer.remaining()).min(self.0.len());
                let bytes: Vec<u8> = self.0.drain(..count).collect();
                buffer.put_slice(&bytes);
                std::task::Poll::Ready(Ok(()))
            }
        }
        Steps(bytes.iter().copied().collect(), step)
    }

    #[tokio::test(start_paused = true)]
    async fn silence_between_requests_is_no_stall_but_inside_one_it_is() {
        let (mut peer, ours) = tokio::io::duplex(64);
        let mut intake = Intake::new(ours, &[], Duration::from_secs(60));
        let hour = timeout(Duration::from_secs(3600), intake.header::<4>()).await;
        assert!(hour.is_err(), "still waiting");
        tokio::io::AsyncWriteExt::write_all(&mut peer, &[1, 2]).await.unwrap();
        assert_eq!(intake.header::<4>().await, Err(Dry::Stalled));
        drop(peer);
        assert_eq!(intake.header::<4>().await, Err(Dry::Gone));
    }
}
