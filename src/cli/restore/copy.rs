//! A disk read once from its first byte to its last, many requests in flight, copied and hashed on the way.

use std::collections::VecDeque;

use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};

use super::disk::{Disk, DiskError, Run, RunKind, Target};
use crate::digest::Digest;
use crate::points::content::{BLOCK_BYTES, Root, leaf_of_zeroes};

/// Blocks on their way at once: enough that neither side waits for a round trip, and what a copy has in memory, in MiB. A guess.
const IN_FLIGHT: usize = 16;
/// The longest piece of zeroes: bounds the time of one request to the target.
const ZERO_MAX: u64 = 128 << 20;
/// Bytes whose runs are asked for at a time.
const WINDOW: u64 = 1 << 30;

/// What was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    /// Of all that was read.
    pub(super) digest: Digest,
    /// Bytes that were written to the target; the others are zeroes.
    pub(super) written_bytes: u64,
}

/// Which side failed, and where.
#[derive(Debug)]
pub(super) enum CopyError {
    Read(u64, DiskError),
    Write(u64, DiskError),
}

impl CopyError {
    fn read(offset: u64) -> impl FnOnce(DiskError) -> Self {
        move |error| Self::Read(error.offset.unwrap_or(offset), error)
    }
}

/// Blocks of the disk that are handled in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    /// A multiple of the block's size.
    offset: u64,
    /// At most one block of data, any number of blocks of zeroes; shorter than whole blocks at the end of the disk only.
    run: Run,
}

/// What became of a piece.
struct Done {
    end: u64,
    leaf: Digest,
    /// How often, and of what the last block is if it is a shorter one.
    blocks: u64,
    tail: Option<Digest>,
    written_bytes: u64,
}

/// Reads `size_bytes` of a disk; copies them if there is a target. `progress` hears how far it is.
///
/// # Cancellation
/// Requests that were sent are done by whoever got them.
pub(super) async fn copy(
    source: &dyn Disk,
    target: Option<&dyn Target>,
    size_bytes: u64,
    mut progress: impl FnMut(u64),
) -> Result<Copied, CopyError> {
    let zero_leaf = leaf_of_zeroes(BLOCK_BYTES);
    let plan = Plan { source, size_bytes, at: 0, runs: VecDeque::new() };
    let pieces = stream::unfold(plan, |mut plan| async move { plan.next().await.map(|piece| (Ok(piece), plan)) });
    let mut done =
        std::pin::pin!(pieces.map_ok(|piece| handle(source, target, piece, zero_leaf)).try_buffered(IN_FLIGHT));
    let (mut root, mut written_bytes) = (Root::default(), 0);
    while let Some(done) = done.try_next().await? {
        (0..done.blocks).for_each(|_| root.add(done.leaf));
        done.tail.into_iter().for_each(|leaf| root.add(leaf));
        written_bytes += done.written_bytes;
        progress(done.end);
    }
    Ok(Copied { digest: root.finish(), written_bytes })
}

/// Cuts a disk into pieces, from its first byte on.
struct Plan<'a> {
    source: &'a dyn Disk,
    size_bytes: u64,
    at: u64,
    /// What is known of the disk from `at` on.
    runs: VecDeque<Run>,
}

impl Plan<'_> {
    async fn next(&mut self) -> Option<Piece> {
        let offset = self.at;
        let left = self.size_bytes - offset;
        if left == 0 {
            return None;
        }
        let wanted = left.min(ZERO_MAX);
        let zeroes = self.zeroes(wanted).await;
        let blocks = if zeroes == left { left } else { zeroes - zeroes % BLOCK_BYTES };
        let run = if blocks > 0 {
            Run { length: blocks, kind: RunKind::Zero }
        } else {
            Run { length: left.min(BLOCK_BYTES), kind: RunKind::Data }
        };
        self.pass(run.length);
        Some(Piece { offset, run })
    }

    /// How many bytes from here on are known to be zeroes, at most `wanted`.
    async fn zeroes(&mut self, wanted: u64) -> u64 {
        let (mut index, mut length) = (0, 0);
        while length < wanted {
            match self.runs.get(index) {
                Some(Run { length: more, kind: RunKind::Zero }) => length += more,
                Some(Run { kind: RunKind::Data, .. }) => break,
                None => {
                    let at = self.at + length;
                    let window = (self.size_bytes - at).min(WINDOW);
                    // What nobody can tell of a range is found out by reading it; a failure has its place then.
                    let unknown = Run { length: window.min(BLOCK_BYTES), kind: RunKind::Data };
                    match self.source.map(at, window).await {
                        Ok(runs) if !runs.is_empty() => self.runs.extend(runs),
                        Ok(_) | Err(_) => self.runs.push_back(unknown),
                    }
                    continue;
                }
            }
            index += 1;
        }
        length.min(wanted)
    }

    /// Forgets what is known of so many bytes.
    fn pass(&mut self, mut length: u64) {
        self.at += length;
        while let Some(run) = self.runs.front_mut() {
            if run.length > length {
                run.length -= length;
                return;
            }
            length -= run.length;
            self.runs.pop_front();
        }
    }
}

async fn handle(
    source: &dyn Disk,
    target: Option<&dyn Target>,
    Piece { offset, run }: Piece,
    zero_leaf: Digest,
) -> Result<Done, CopyError> {
    let end = offset + run.length;
    if run.kind == RunKind::Zero {
        if let Some(target) = target {
            target.zero(offset, run.length).await.map_err(|error| CopyError::Write(offset, error))?;
        }
        let tail = run.length % BLOCK_BYTES;
        let tail = (tail > 0).then(|| leaf_of_zeroes(tail));
        return Ok(Done { end, leaf: zero_leaf, blocks: run.length / BLOCK_BYTES, tail, written_bytes: 0 });
    }
    // A block has 1 MiB.
    let length = u32::try_from(run.length).unwrap_or(u32::MAX);
    let data = source.read(offset, length).await.map_err(CopyError::read(offset))?;
    if data.len() as u64 != run.length {
        return Err(CopyError::Read(offset, DiskError::new("the answer is too short")));
    }
    let grain = target.map(Target::grain);
    let hashed = tokio::task::spawn_blocking(move || {
        let runs = grain.map(|grain| runs(&data, grain)).unwrap_or_default();
        (Digest::of(&data), runs, Bytes::from(data))
    });
    let (leaf, runs, data) = hashed.await.map_err(|panic| CopyError::Read(offset, DiskError::new(panic)))?;
    let (mut at, mut written_bytes) = (0, 0);
    for run in runs {
        let (from, next) = (offset + at as u64, at + usize::try_from(run.length).unwrap_or(0));
        if let Some(target) = target {
            let wrote = match run.kind {
                RunKind::Zero => target.zero(from, run.length).await,
                RunKind::Data => {
                    written_bytes += run.length;
                    target.write(from, data.slice(at..next)).await
                }
            };
            wrote.map_err(|error| CopyError::Write(from, error))?;
        }
        at = next;
    }
    Ok(Done { end, leaf, blocks: 1, tail: None, written_bytes })
}

/// Data and zeroes of a block told apart, in multiples of the grain but for the end.
fn runs(data: &[u8], grain: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for part in data.chunks(grain.max(1)) {
        let kind = if is_zero(part) { RunKind::Zero } else { RunKind::Data };
        let length = part.len() as u64;
        match runs.last_mut() {
            Some(last) if last.kind == kind => last.length += length,
            _ => runs.push(Run { length, kind }),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    // Groups, because a search for one byte is not turned into vector instructions.
    let (groups, rest) = bytes.as_chunks::<64>();
    groups.iter().all(|group| group.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;

    use super::*;

    /// A disk in memory whose map is told in runs of `step` bytes, and which cannot be read at `broken`.
    struct Memory {
        bytes: Mutex<Vec<u8>>,
        step: usize,
        broken: Option<u64>,
    }

    impl Memory {
        fn new(bytes: Vec<u8>) -> Self {
            Self { bytes: Mutex::new(bytes), step: 4096, broken: None }
        }
    }

    #[async_trait]
    impl Disk for Memory {
        async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, DiskError> {
            let bytes = self.bytes.lock().unwrap();
            let part = &bytes[offset as usize..(offset + length) as usize];
            let mut runs = runs(part, self.step);
            runs.truncate(3);
            Ok(runs)
        }

        async fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, DiskError> {
            let range = offset..offset + u64::from(length);
            match self.broken.filter(|broken| range.contains(broken)) {
                Some(_) => Err(DiskError::new("broken")),
                None => Ok(self.bytes.lock().unwrap()[range.start as usize..range.end as usize].to_vec()),
            }
        }
    }

    #[async_trait]
    impl Target for Memory {
        fn grain(&self) -> usize {
            512
        }

        async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
            self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data);
            Ok(())
        }

        async fn zero(&self, offset: u64, length: u64) -> Result<(), DiskError> {
            self.bytes.lock().unwrap()[offset as usize..][..length as usize].fill(0);
            Ok(())
        }

        async fn finish(&self) -> Result<Box<dyn Disk>, DiskError> {
            Ok(Box::new(Self::new(self.bytes.lock().unwrap().clone())))
        }
    }

    /// Data here and there, with long and short zeroes in between, of an odd size.
    fn disk() -> Vec<u8> {
        let mut bytes = vec![0_u8; (9 << 20) + 1536];
        let end = bytes.len();
        for range in [0..10, (1 << 20) + 77..(2 << 20) + 1, (6 << 20) - 1..(6 << 20), end - 3..end] {
            bytes[range].fill(0xa5);
        }
        bytes
    }

    #[tokio::test]
    async fn a_copy_is_equal_and_has_the_digest_of_its_disk() {
        for size in [512, 1 << 20, (1 << 20) + 512, disk().len()] {
            let mut bytes = disk();
            bytes.truncate(size);
            let source = Memory::new(bytes.clone());
            let target = Memory::new(vec![0xff; size]);
            let mut told = Vec::new();
            let copied = copy(&source, Some(&target), size as u64, |bytes| told.push(bytes)).await.unwrap();
            assert!(*target.bytes.lock().unwrap() == bytes, "{size}");
            assert_eq!(copied.digest, crate::points::content::root_of(&bytes), "{size}");
            assert!(told.is_sorted() && told.last() == Some(&(size as u64)), "{told:?}");
            let read = copy(&source, None, size as u64, |_| {}).await.unwrap();
            assert_eq!((read.digest, read.written_bytes), (copied.digest, 0));
        }
    }

    #[tokio::test]
    async fn a_read_that_fails_ends_the_copy_and_names_its_place() {
        let bytes = vec![1; 5 << 20];
        for block in 0..5_u64 {
            let source = Memory { broken: Some((block << 20) + 4711), ..Memory::new(bytes.clone()) };
            let target = Memory::new(vec![0; bytes.len()]);
            let failed = copy(&source, Some(&target), bytes.len() as u64, |_| {}).await.unwrap_err();
            assert!(matches!(failed, CopyError::Read(offset, _) if offset == block << 20), "{failed:?}");
        }
    }

    #[test]
    fn zeroes_are_told_apart_from_data_by_the_last_byte() {
        let mut block = vec![0; 4096];
        assert!(is_zero(&block) && is_zero(&block[..1]) && is_zero(&[]));
        for index in [0, 63, 64, 4095] {
            block[index] = 1;
            assert!(!is_zero(&block), "{index}");
            block[index] = 0;
        }
    }
}
