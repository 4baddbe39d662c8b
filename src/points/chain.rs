//! A disk of a committed point, opened by its record with everything below it: the one way for whoever reads it or means to
//! build upon it.
//!
//! What can be known without reading the disk is looked at: the presence and length of each file, that the top opens, is closed
//! and of the right size. Damage beyond that is for a verification to find, or for the read that meets it.
//!
//! A merge publishes its files a moment before its record follows. Whoever comes between the two finds files that do not fit
//! the rows, and nothing is damaged. So what does not fit is called so only when no task holds the chain and its rows are
//! still what they were when they were read, or when that has lasted for [`PATIENCE`]: see [`Settling`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockyard_qcow2 as qcow2;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::id::BackupId;
use crate::repository::directory;
use crate::store::points::{self, ChainImage};
use crate::store::{Store, StoreError};

/// How long files that do not fit their rows are given while a task holds them. A guess: a record follows its files within
/// milliseconds; one that fails is tried again for ever, and nobody who asks for a disk waits as long as that.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the rows of a chain may change between two looks. Each time something was merged or verified.
const CHANGES_MAX: u32 = 100;

/// The images of a disk as they are recorded, from the top down to the full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordedChain<'a> {
    /// The folder of the repository.
    pub(crate) repository: &'a Path,
    /// The images; their folders are relative to that.
    pub(crate) images: &'a [ChainImage],
    /// Size of the disk in bytes.
    pub(crate) size_bytes: u64,
}

/// What of a chain is not as it is recorded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    /// Nothing is recorded.
    #[error("no image is recorded")]
    Empty,
    /// A file has another length.
    #[error("{image} has {bytes} bytes instead of {recorded}")]
    Length {
        /// Relative to the repository.
        image: String,
        /// What it has.
        bytes: u64,
        /// What it had when it was published.
        recorded: u64,
    },
    /// The disk has another size.
    #[error("the disk has {bytes} bytes instead of {recorded}")]
    Size {
        /// What the image says.
        bytes: u64,
        /// What is recorded.
        recorded: u64,
    },
    /// The top was not closed.
    #[error("the image is not closed")]
    NotClosed,
    /// An image cannot be opened. The error names paths.
    #[error(transparent)]
    Image(#[from] qcow2::Error),
}

impl Unfit {
    /// Whether a file is simply not there.
    pub(crate) fn is_missing(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Image(qcow2::Error::Open { source, .. }) => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

impl RecordedChain<'_> {
    /// The image on top.
    pub(crate) fn top(&self) -> Option<PathBuf> {
        self.images.first().map(|top| self.path(top))
    }

    fn path(&self, image: &ChainImage) -> PathBuf {
        self.repository.join(&image.dir).join(&image.file)
    }

    /// Opens the disk read-only when everything fits. Blocks; tables are read when they are needed, so a deep chain opens as
    /// fast as a file. `cache_bytes` is for the tables of the top.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub(crate) fn open(&self, cache_bytes: usize) -> Result<qcow2::Image, Unfit> {
        for image in self.images {
            let path = self.path(image);
            let bytes = directory::file_bytes(&path).map_err(|source| qcow2::Error::Open { path, source })?;
            if bytes != image.file_bytes {
                let (image, recorded) = (format!("{}/{}", image.dir, image.file), image.file_bytes);
                return Err(Unfit::Length { image, bytes, recorded });
            }
        }
        let image = self.open_as_it_is(cache_bytes)?;
        if image.size() != self.size_bytes {
            return Err(Unfit::Size { bytes: image.size(), recorded: self.size_bytes });
        }
        if image.is_dirty() {
            return Err(Unfit::NotClosed);
        }
        Ok(image)
    }

    /// The same for whoever wants the disk although it is damaged: whatever opens will do.
    ///
    /// # Errors
    /// It does not open.
    pub(crate) fn open_as_it_is(&self, cache_bytes: usize) -> Result<qcow2::Image, Unfit> {
        let path = self.top().ok_or(Unfit::Empty)?;
        let options = qcow2::OpenOptions {
            // The folder of the VM: a chain never leaves it.
            backing_root: path.parent().and_then(Path::parent).map(Path::to_owned),
            cache_bytes,
            ..qcow2::OpenOptions::new(qcow2::Access::ReadOnly)
        };
        Ok(qcow2::Image::open(&path, &options)?)
    }
}

/// Why what does not fit may fit in a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// The rows are not what was read any more.
    Changed,
    /// A task holds a point of the chain.
    Held,
}

/// Tells whether what does not fit may yet fit: files and rows of a point that is made anew agree again in a moment.
#[derive(Debug)]
pub(crate) struct Settling {
    store: Store,
    commits: watch::Receiver<()>,
    settling: watch::Sender<usize>,
    /// Set by the first thing that did not fit.
    deadline: Option<Instant>,
    changes: u32,
}

impl Settling {
    /// For one attempt to open something; nothing has happened yet.
    pub(crate) fn new(store: &Store) -> Self {
        let settling = store.settling().clone();
        Self { store: store.clone(), commits: store.watch_commits(), settling, deadline: None, changes: 0 }
    }

    /// Something of these chains (number of a disk and the rows that were read) of `point` did not fit. Whether the rows are
    /// to be read, and the files to be looked at, once more. Waits while that would be no use.
    ///
    /// # Errors
    /// The database's.
    pub(crate) async fn look_again(
        &mut self,
        point: &BackupId,
        read: &[(u32, &[ChainImage])],
    ) -> Result<bool, StoreError> {
        self.seen();
        // One state of the database: a merge gives its pins back after its record, so either the one or the other is seen.
        let mut snapshot = self.store.snapshot().await?;
        let (mut changed, mut held) = (false, false);
        for (disk_id, images) in read {
            changed |= points::chain(&mut snapshot, point, *disk_id).await? != *images;
        }
        for (below, _) in points::ancestry(&mut snapshot, point).await? {
            held |= points::is_worked_on(&mut snapshot, &below).await?;
        }
        drop(snapshot);
        let sign = if changed { Some(Sign::Changed) } else { held.then_some(Sign::Held) };
        Ok(match sign {
            Some(sign) => self.wait(sign).await,
            None => false,
        })
    }

    /// Waits until another look may find something else; whether there is to be one. Note what was committed with
    /// [`Self::seen`] before reading what is expected to change.
    pub(crate) async fn wait(&mut self, sign: Sign) -> bool {
        if sign == Sign::Changed && self.changes < CHANGES_MAX {
            self.changes += 1;
            return true;
        }
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
        if Instant::now() >= deadline {
            return false;
        }
        let _waiting = Waiting::begin(&self.settling);
        // When the time is up, one last look.
        let _ = tokio::time::timeout_at(deadline, self.commits.changed()).await;
        true
    }

    /// Everything that was committed so far is known, or about to be read.
    pub(crate) fn seen(&mut self) {
        self.commits.mark_unchanged();
    }
}

/// One more that waits for a record, until dropped.
struct Waiting<'a>(&'a watch::Sender<usize>);

impl<'a> Waiting<'a> {
    fn begin(settling: &'a watch::Sender<usize>) -> Self {
        settling.send_modify(|waiting| *waiting += 1);
        Self(settling)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}
