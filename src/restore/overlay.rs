//! The scratch file that takes the writes to an export, on the image of a point that is open read-only.
//!
//! The file is ours alone and never outlives its export. Its growth has a bound, because whoever writes to an export would
//! otherwise fill the file system that holds the hub's database.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockyard_qcow2::storage::{FileStorage, Reservation, Storage, WriteQueue};
use blockyard_qcow2::{self as qcow2, Backing, BackingFormat, CreateOptions, Image, Layer};

use crate::id::ExportId;

/// Memory for the tables of an overlay; a guess: 16 MiB map 128 GiB of disk.
const CACHE_BYTES: usize = 16 << 20;
const EXTENSION: &str = "qcow2";

/// An overlay cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Its file cannot be made.
    #[error("the overlay {} cannot be made", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its image cannot be made.
    #[error("the overlay cannot be made")]
    Image(#[from] qcow2::Error),
}

impl OverlayError {
    /// Whether the file system is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Image(error) => error.is_no_space(),
        }
    }
}

/// The file of an overlay; removed when dropped.
#[derive(Debug)]
pub(super) struct OverlayFile {
    path: PathBuf,
}

impl Drop for OverlayFile {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(path = %self.path.display(), %error, "an overlay is left; the next start removes it");
            }
            _ => {}
        }
    }
}

/// Puts an empty overlay of `export` on a base that is open read-only; its file never gets longer than `limit_bytes`.
pub(super) fn create(
    folder: &Path,
    export: &ExportId,
    base: Image,
    limit_bytes: u64,
) -> Result<(Image, OverlayFile), OverlayError> {
    let path = folder.join(format!("{export}.{EXTENSION}"));
    let failed = |source| OverlayError::File { path: path.clone(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
    let overlay = OverlayFile { path: path.clone() };
    let storage = Arc::new(Limited { file: Arc::new(FileStorage::with_direct_access(file)), limit_bytes });
    // The name is for people who find the file after a crash; the base is given by hand, open and locked.
    let backing = Backing { name: base.path().display().to_string(), format: BackingFormat::Qcow2 };
    let shape = CreateOptions { backing: Some(backing), ..CreateOptions::new(base.size()) };
    qcow2::create_on(&*storage, &shape)?;
    let options = qcow2::OpenOptions { cache_bytes: CACHE_BYTES, ..qcow2::OpenOptions::new(qcow2::Access::ReadWrite) };
    let image = Image::open_on_with(storage, Some(Layer::Image(Box::new(base))), &options)?;
    Ok((image, overlay))
}

/// Removes what exports of earlier processes left, and says how many files. Anything else in the folder stays.
pub(super) fn remove_leftovers(folder: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let path = entry?.path();
        let is_overlay = path.extension().is_some_and(|extension| extension == EXTENSION);
        let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<ExportId>().ok());
        if is_overlay && id.is_some() {
            fs::remove_file(&path)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// A file that does not get longer than its limit: beyond it, it is a full disk.
#[derive(Debug)]
struct Limited {
    file: Arc<FileStorage>,
    limit_bytes: u64,
}

impl Limited {
    fn refuse_beyond(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.limit_bytes => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn refuse_slices(&self, offset: u64, slices: &[IoSlice<'_>]) -> io::Result<()> {
        self.refuse_beyond(offset, slices.iter().map(|slice| slice.len() as u64).sum())
    }
}

impl Storage for Limited {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, buffer)
    }

    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.file.read_cached(offset, buffer)
    }

    fn write(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.refuse_slices(offset, slices)?;
        self.file.write(offset, slices)
    }

    fn write_durable(&self, offset: u64, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.refuse_slices(offset, slices)?;
        self.file.write_durable(offset, slices)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.refuse_beyond(0, length)?;
        self.file.set_length(length)
    }

    /// The place where the limit is met: space is reserved before it is written, so a request that has none fails by itself.
    fn reserve(&self, offset: u64, length: u64) -> io::Result<Reservation> {
        self.refuse_beyond(offset, length)?;
        match self.file.reserve(offset, length)? {
            Reservation::Done => Ok(Reservation::Done),
            // To say so would be never to be asked again. The file gets its length, and what a full disk then does to a write
            // it would have done anyway.
            Reservation::Unsupported => {
                if self.file.length()? < offset + length {
                    self.file.set_length(offset + length)?;
                }
                Ok(Reservation::Done)
            }
        }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch(offset, length)
    }

    fn data_run(&self, offset: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
        self.file.data_run(offset, end)
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.file.drop_cache()
    }

    fn prefetch(&self, offset: u64, length: u64) {
        self.file.prefetch(offset, length);
    }

    fn block_size(&self) -> u64 {
        self.file.block_size()
    }

    fn is_hole(&self, offset: u64, length: u64) -> bool {
        self.file.is_hole(offset, length)
    }

    /// What is written this way was reserved before.
    fn queue(self: Arc<Self>) -> Option<Box<dyn WriteQueue>> {
        Arc::clone(&self.file).queue()
    }

    fn unlock(&self) {
        self.file.unlock();
    }
}
