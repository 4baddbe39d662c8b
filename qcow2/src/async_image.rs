//! An image for asynchronous callers: each operation runs to its end on tokio's threads for blocking work, but for reads and
//! writes that find all they need in memory: handing them to another thread would cost several times what they do.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use tokio::sync::Semaphore;

use crate::buffer::{Buffer, BufferPool};
use crate::check::CheckReport;
use crate::error::{Error, Result};
use crate::image::{Durability, Extent, Image, OpenOptions, ZeroMode};
use crate::payload::Piece;
use crate::sync::Arc;

/// Operations of one image that run at once: writes end in memory, so few are enough; reads and flushes wait for the disk.
/// (`docs/performance.md`: cold reads are no faster with 16 or 32.)
const AT_ONCE: usize = 8;

/// A shared handle on an [`Image`]; clones are cheap and mean the same image.
///
/// # Cancellation
/// Every operation owns its buffer. Once it has begun it runs to its end, also when its future is dropped; one that still
/// waits for its turn is never begun.
///
/// # Dropping
/// As for [`Image`], but the last handle never waits for the disk: a write that is under way goes on, and the file stays
/// open and locked until it has ended.
#[derive(Clone, Debug)]
pub struct AsyncImage {
    image: Arc<Image>,
    turns: Arc<Semaphore>,
}

impl AsyncImage {
    /// As [`Image::open`].
    ///
    /// # Cancellation
    /// The opening goes on to its end; then the image is dropped, and its locks with it.
    pub async fn open(path: PathBuf, options: OpenOptions) -> Result<Self> {
        let opened = tokio::task::spawn_blocking(move || Image::open(&path, &options)).await;
        Ok(Self::new(opened.map_err(|_| Error::Panicked)??))
    }

    /// Shares an open image.
    pub fn new(image: Image) -> Self {
        image.never_wait_when_dropped();
        Self { image: Arc::new(image), turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Virtual size in bytes; it may grow ([`AsyncImage::grow`]).
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        self.image.cluster_size()
    }

    /// As [`Image::identical_bytes`].
    pub fn identical_bytes(&self) -> u64 {
        self.image.identical_bytes()
    }

    /// The first failed write or sync, if there was one.
    pub fn poison(&self) -> Option<&str> {
        self.image.poison()
    }

    /// Memory for a payload, aligned and used again; what it holds is arbitrary. Any other buffer will do too.
    pub fn buffer(&self, length: usize) -> Buffer {
        BufferPool::shared().lend(length)
    }

    /// As [`Image::read`]: fills the buffer from `offset` (in bytes) on and hands it back.
    ///
    /// # Cancellation
    /// Changes nothing; the buffer is dropped when the reading has ended.
    pub async fn read<B>(&self, offset: u64, mut buffer: B) -> Result<B>
    where
        B: AsMut<[u8]> + Send + 'static,
    {
        self.run(move |image| image.read(offset, buffer.as_mut()).map(|()| buffer)).await
    }

    /// As [`Image::read_sparse`]: hands the buffer back, and which parts of it are zeroes and were not filled.
    ///
    /// # Cancellation
    /// As for [`AsyncImage::read`].
    pub async fn read_sparse<B>(&self, offset: u64, mut buffer: B) -> Result<(B, Vec<Range<usize>>)>
    where
        B: AsMut<[u8]> + Send + 'static,
    {
        if let Some(holes) = self.image.read_cached(offset, buffer.as_mut()) {
            return Ok((buffer, holes));
        }
        self.run(move |image| image.read_sparse(offset, buffer.as_mut()).map(|holes| (buffer, holes))).await
    }

    /// As [`Image::write`], without a copy of the payload: the buffer is dropped when nobody needs its bytes any more.
    ///
    /// # Durability
    /// As for [`Image::write`].
    ///
    /// # Cancellation
    /// Done whole or not begun, and the caller cannot know which; a later flush covers it only if it was done before.
    pub async fn write<B>(&self, offset: u64, buffer: B, durability: Durability) -> Result<()>
    where
        B: AsRef<[u8]> + Send + Sync + 'static,
    {
        let length = buffer.as_ref().len() as u64;
        // Before the turn: whoever has a turn has all the memory that it needs, and waits for the disk alone.
        let share = self.image.room(offset, length).await?;
        let data = Piece::in_room(buffer, share);
        if durability == Durability::OnFlush && self.image.write_is_quick(offset, length) {
            let write = AssertUnwindSafe(|| self.image.write_piece(offset, &data, durability));
            let written = catch_unwind(write).unwrap_or(Err(Error::Panicked));
            if self.image.wants_space_ahead() {
                let image = self.image.clone();
                tokio::task::spawn_blocking(move || image.reserve_ahead());
            }
            return written;
        }
        self.run(move |image| image.write_piece(offset, &data, durability)).await
    }

    /// As [`Image::zero`].
    ///
    /// # Durability
    /// As for [`Image::zero`].
    ///
    /// # Cancellation
    /// Done whole or not begun, and the caller cannot know which.
    pub async fn zero(&self, offset: u64, length: u64, mode: ZeroMode, durability: Durability) -> Result<()> {
        self.run(move |image| image.zero(offset, length, mode, durability)).await
    }

    /// As [`Image::zero_is_fast`].
    ///
    /// # Cancellation
    /// Changes nothing.
    pub async fn zero_is_fast(&self, offset: u64, length: u64) -> bool {
        self.run(move |image| Ok(image.zero_is_fast(offset, length))).await.unwrap_or(false)
    }

    /// As [`Image::discard`].
    ///
    /// # Durability
    /// As for [`Image::discard`].
    ///
    /// # Cancellation
    /// Done whole or not begun, and the caller cannot know which.
    pub async fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        self.run(move |image| image.discard(offset, length, durability)).await
    }

    /// As [`Image::grow`].
    ///
    /// # Durability
    /// As for [`Image::grow`].
    ///
    /// # Cancellation
    /// Done whole or not begun, and the caller cannot know which.
    pub async fn grow(&self, size: u64) -> Result<()> {
        self.run(move |image| image.grow(size)).await
    }

    /// As [`Image::flush`]: covers what any clone of this handle was answered before the call.
    ///
    /// # Durability
    /// As for [`Image::flush`].
    ///
    /// # Cancellation
    /// A flush that has begun goes on to its end, but nobody hears of it: without the answer nothing is promised.
    pub async fn flush(&self) -> Result<()> {
        self.run(Image::flush).await
    }

    /// As [`Image::map`].
    ///
    /// # Cancellation
    /// Changes nothing.
    pub async fn map(&self, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>> {
        self.run(move |image| image.map(offset, length, max)).await
    }

    /// As [`Image::prefetch`].
    ///
    /// # Cancellation
    /// Changes nothing.
    pub async fn prefetch(&self, offset: u64, length: u64) {
        let hint = move |image: &Image| {
            image.prefetch(offset, length);
            Ok(())
        };
        let _ = self.run(hint).await;
    }

    /// As [`Image::close`]. It waits for operations that have begun; those still waiting for a turn then fail with
    /// [`Error::Closed`].
    ///
    /// # Durability
    /// As for [`Image::close`].
    ///
    /// # Cancellation
    /// The closing goes on to its end. Calling it again waits for that, and does not repeat its error.
    pub async fn close(&self) -> Result<()> {
        // Without a turn: closing must not wait behind requests that have not begun.
        self.run_now(Image::close).await
    }

    /// As [`Image::check`].
    ///
    /// # Cancellation
    /// Changes nothing.
    pub async fn check(&self) -> Result<CheckReport> {
        self.run_now(Image::check).await
    }

    async fn run<T, F>(&self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Image) -> Result<T> + Send + 'static,
    {
        let turn = self.turns.clone().acquire_owned().await.map_err(|_| Error::Closed)?;
        self.run_now(move |image| {
            let _turn = turn;
            operation(image)
        })
        .await
    }

    async fn run_now<T, F>(&self, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Image) -> Result<T> + Send + 'static,
    {
        let image = self.image.clone();
        match tokio::task::spawn_blocking(move || operation(&image)).await {
            Ok(result) => result,
            Err(_) => {
                self.image.poison_by_panic();
                Err(Error::Panicked)
            }
        }
    }
}
