//! A disk to be read from its first byte to its last, in large pieces and without a look at its holes.
//!
//! Reading here and there is `image`'s business; what is done with the pieces, that of [`crate::flatten`] and
//! [`crate::compare`].

use std::collections::VecDeque;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use crate::backing::{Chain, Layer};
use crate::error::{Error, Result};
use crate::format::header::BackingFormat;
use crate::image::{ExtentKind, Image, OpenOptions};
use crate::lock::{self, Access};
use crate::storage::Storage;
use crate::sync::Arc;

/// Guest bytes whose map is asked for in one go: bounds the time between two looks at the caller's wish to stop.
const WINDOW: u64 = 1 << 30;

/// Runs of data that are remembered at most: bounds the memory.
const RUNS_MAX: usize = 4096;

/// A whole disk, open for reading: an image with the chain below it, or raw bytes.
#[derive(Debug)]
pub struct Disk {
    layer: Layer,
}

impl Disk {
    /// Opens a file as a disk of this format, which is never guessed: a raw disk may begin with anything. Of the options
    /// the access is not looked at; it is read-only, and locked so.
    pub fn open(path: &Path, format: BackingFormat, options: &OpenOptions) -> Result<Self> {
        if format == BackingFormat::Qcow2 {
            return Ok(Image::open(path, &OpenOptions { access: Access::ReadOnly, ..options.clone() })?.into());
        }
        let open = |source| Error::Open { path: path.to_owned(), source };
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(open)?;
        Chain { root: path.to_owned(), caching: options.caching, seen: Vec::new() }.enter(path, &file)?;
        lock::lock(&file, path, Access::ReadOnly)?;
        let storage = options.caching.for_reading(file);
        let size = storage.length().map_err(Error::io("fstat", 0))?;
        Ok(Self::raw(Arc::new(storage), size))
    }

    /// The first `size` bytes of a storage as a raw disk.
    pub fn raw(storage: Arc<dyn Storage>, size: u64) -> Self {
        Self { layer: Layer::Raw { storage, size } }
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.layer.size()
    }

    /// Whether it is an image that was not closed. What was flushed is there.
    pub fn is_dirty(&self) -> bool {
        matches!(&self.layer, Layer::Image(image) if image.is_dirty())
    }

    /// Appends the runs of data of a range, in order, as offset and length; returns the end of what they cover, which may be
    /// short of the range's end.
    fn data(&self, offset: u64, end: u64, runs: &mut VecDeque<(u64, u64)>) -> Result<u64> {
        match &self.layer {
            Layer::Image(image) => {
                let extents = image.map(offset, end - offset, RUNS_MAX)?;
                runs.extend(
                    extents.iter().filter(|extent| extent.kind == ExtentKind::Data).map(|e| (e.offset, e.length)),
                );
                Ok(extents.last().map_or(end, |last| last.offset + last.length))
            }
            Layer::Raw { storage, .. } => {
                let mut at = offset;
                for _ in 0..RUNS_MAX {
                    let Some((start, length)) = storage.data_run(at, end).map_err(Error::io("lseek", at))? else {
                        return Ok(end);
                    };
                    runs.push_back((start, length));
                    at = start + length;
                }
                Ok(at)
            }
        }
    }
}

impl From<Image> for Disk {
    /// The disk that an image, open in any way, shows now.
    fn from(image: Image) -> Self {
        Self { layer: Layer::Image(Box::new(image)) }
    }
}

/// One reading of a disk, forwards only.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    disk: &'a Disk,
    /// Data below `mapped` that was not passed yet; everything else below it reads as zeroes.
    runs: VecDeque<(u64, u64)>,
    mapped: u64,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(disk: &'a Disk) -> Self {
        Self { disk, runs: VecDeque::new(), mapped: 0 }
    }

    /// The first byte at or behind `from` that may hold data, or a byte up to which there is none, in which case the next
    /// call goes on from there. `u64::MAX` when there is none up to the end.
    pub(crate) fn skip(&mut self, from: u64) -> Result<u64> {
        self.forget(from);
        if let Some((start, _)) = self.runs.front() {
            return Ok(from.max(*start));
        }
        let at = from.max(self.mapped);
        if at >= self.disk.size() {
            return Ok(u64::MAX);
        }
        self.map(at, at.saturating_add(WINDOW))?;
        Ok(self.runs.front().map_or(self.mapped, |(start, _)| *start))
    }

    /// Fills the buffer; zeroes are filled in without reading, also past the end of the disk.
    pub(crate) fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.forget(offset);
        let end = offset.saturating_add(buffer.len() as u64);
        while self.mapped < end.min(self.disk.size()) {
            self.map(self.mapped.max(offset), end)?;
        }
        buffer.fill(0);
        for (start, length) in &self.runs {
            let (start, stop) = ((*start).max(offset), (start + length).min(end));
            if start >= stop {
                break;
            }
            let part = buffer.get_mut((start - offset) as usize..(stop - offset) as usize).unwrap_or_default();
            self.disk.layer.read(start, part).map_err(unreadable(start, stop - start))?;
        }
        Ok(())
    }

    /// Forgets what lies before `offset`.
    fn forget(&mut self, offset: u64) {
        while self.runs.front().is_some_and(|(start, length)| start + length <= offset) {
            self.runs.pop_front();
        }
    }

    fn map(&mut self, from: u64, to: u64) -> Result<()> {
        let to = to.min(self.disk.size());
        self.mapped = self.disk.data(from, to, &mut self.runs).map_err(unreadable(from, to - from))?;
        Ok(())
    }
}

pub(crate) fn unreadable(offset: u64, length: u64) -> impl FnOnce(Error) -> Error {
    move |source| Error::Unreadable { offset, length, source: Box::new(source) }
}
