//! What lies below an overlay: another image or raw bytes, opened read-only, locked, and never by a name that leads out of
//! the folder it may be in.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use crate::error::{Error, Result};
use crate::format::header::{Backing, BackingFormat};
use crate::image::{Caching, Holes, Image, read_header};
use crate::lock::{self, Access};
use crate::storage::{FileStorage, Storage};
use crate::sync::Arc;

/// The longest chain: a bound on recursion, far above what a repository allows.
const DEPTH_MAX: usize = 64;

/// A raw layer is asked for holes in steps of so many bytes.
const RAW_STEP: u64 = 1 << 20;

/// The layer below an image.
#[derive(Debug)]
pub enum Layer {
    /// Another image, open read-only.
    Image(Box<Image>),
    /// The bytes of the disk themselves.
    Raw {
        /// Where they are.
        storage: Arc<dyn Storage>,
        /// How many of them belong to the disk; the rest reads as zeroes.
        size: u64,
    },
}

/// Where names of backing files are looked up, and which files the chain holds already.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// Backing files must be beneath this folder.
    pub(crate) root: PathBuf,
    /// How they are read.
    pub(crate) caching: Caching,
    /// Device and inode of every file of the chain so far.
    pub(crate) seen: Vec<(u64, u64)>,
}

impl Chain {
    /// Remembers a file; a file that comes a second time closes a circle.
    pub(crate) fn enter(&mut self, name: &Path, file: &File) -> Result<()> {
        let refuse = |reason: String| Err(Error::Backing { name: name.display().to_string(), reason });
        let facts = file.metadata().map_err(|source| Error::Open { path: name.to_owned(), source })?;
        if !facts.is_file() {
            return refuse("is not a regular file".into());
        }
        let identity = (facts.dev(), facts.ino());
        if self.seen.contains(&identity) {
            return refuse("the chain of backing files closes a circle".into());
        }
        if self.seen.len() == DEPTH_MAX {
            return refuse(format!("the chain is longer than {DEPTH_MAX} images"));
        }
        self.seen.push(identity);
        Ok(())
    }
}

impl Layer {
    /// Opens what `backing` names, for the image at `overlay`.
    pub(crate) fn open(backing: &Backing, overlay: &Path, mut chain: Chain, cache_bytes: usize) -> Result<Self> {
        let path = resolve(&backing.name, overlay, &chain.root)?;
        let file = open_beneath(&backing.name, &path, &chain.root)?;
        chain.enter(&path, &file)?;
        lock::lock(&file, &path, Access::ReadOnly)?;
        let storage = chain.caching.for_reading(file);
        match backing.format {
            BackingFormat::Raw => {
                let size = storage.length().map_err(Error::io("fstat", 0))?;
                Ok(Self::Raw { storage: Arc::new(storage), size })
            }
            BackingFormat::Qcow2 => {
                Ok(Self::Image(Box::new(Image::open_file(storage, &path, Access::ReadOnly, chain, cache_bytes)?)))
            }
        }
    }

    /// Virtual size in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Image(image) => image.size(),
            Self::Raw { size, .. } => *size,
        }
    }

    /// Fills the buffer; past the end of the layer there are zeroes.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut holes = Holes::default();
        self.read_sparse(offset, buffer, 0, &mut holes)?;
        holes.fill(buffer);
        Ok(())
    }

    /// Fills a part of a buffer, which begins at `at` of the whole, but for its holes.
    pub(crate) fn read_sparse(&self, offset: u64, part: &mut [u8], at: usize, holes: &mut Holes) -> Result<()> {
        let inside = self.size().saturating_sub(offset).min(part.len() as u64) as usize;
        let (head, tail) = part.split_at_mut(inside);
        if !head.is_empty() {
            match self {
                Self::Image(image) => image.read_layer(offset, head, at, holes)?,
                Self::Raw { storage, .. } => read_raw(&**storage, offset, head, at, holes)?,
            }
        }
        if !mutant!("past_backing_unset") {
            holes.push(at + inside, tail.len());
        }
        Ok(())
    }

    /// As [`Image::prefetch`]; the range may reach past the end of the layer.
    pub(crate) fn prefetch(&self, offset: u64, length: u64) {
        let inside = self.size().saturating_sub(offset).min(length);
        match self {
            _ if inside == 0 => {}
            Self::Image(image) => image.prefetch(offset, inside),
            Self::Raw { storage, .. } => storage.prefetch(offset, inside),
        }
    }
}

/// Reads raw bytes, but for steps that are a hole as a whole. That costs one question for each step; to know where
/// data ends would have the file system walk all of it.
fn read_raw(storage: &dyn Storage, offset: u64, part: &mut [u8], at: usize, holes: &mut Holes) -> Result<()> {
    let end = part.len();
    let mut read = |from: usize, to: usize| {
        let start = offset + from as u64;
        let data = part.get_mut(from..to).filter(|data| !data.is_empty());
        data.map_or(Ok(()), |data| storage.read(start, data).map_err(Error::io("read", start)))
    };
    let (mut data, mut from) = (0, 0);
    while from < end {
        let step = (RAW_STEP - (offset + from as u64) % RAW_STEP).min((end - from) as u64);
        let to = from + step as usize;
        if storage.is_hole(offset + from as u64, step) {
            read(data, from)?;
            holes.push(at + from, to - from);
            data = to;
        }
        from = to;
    }
    read(data, end)
}

/// Virtual size in bytes of what an overlay at `overlay` would have below it. Where that may be is bounded by `backing_root`,
/// or, without one, by the overlay's own folder.
///
/// Refuses an image that was not closed: other tools would write to it without repairing it first, once it is a base.
pub fn backing_size(backing: &Backing, overlay: &Path, backing_root: Option<&Path>) -> Result<u64> {
    let root = backing_root.or(overlay.parent()).unwrap_or(Path::new("")).to_owned();
    let chain = Chain { root, caching: Caching::default(), seen: Vec::new() };
    let layer = Layer::open(backing, overlay, chain, 0)?;
    match &layer {
        Layer::Image(image) if image.is_dirty() => Err(not_closed(backing)),
        _ => Ok(layer.size()),
    }
}

/// Refuses a base that was not closed, or is being written to just now. Whether the base is there, and may be used at all,
/// is decided when the overlay is opened: only then the folder is known that it must be in.
pub(crate) fn refuse_dirty_base(backing: &Backing, overlay: &Path) -> Result<()> {
    if backing.format != BackingFormat::Qcow2 || backing.name.starts_with('/') || backing.name.contains(':') {
        return Ok(());
    }
    let path = overlay.parent().unwrap_or(Path::new("")).join(&backing.name);
    // Nothing but a file is opened: to open a FIFO or a device does something to it.
    if !std::fs::symlink_metadata(&path).is_ok_and(|facts| facts.is_file()) {
        return Ok(());
    }
    let Ok(file) = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) else {
        return Ok(());
    };
    match read_header(&FileStorage::new(File::from(file))) {
        Ok((header, _)) if header.is_dirty() => Err(not_closed(backing)),
        _ => Ok(()),
    }
}

fn not_closed(backing: &Backing) -> Error {
    Error::Backing { name: backing.name.clone(), reason: "was not closed; repair it first".into() }
}

/// The path of a relative name, made without following anything, beneath the root.
fn resolve(name: &str, overlay: &Path, root: &Path) -> Result<PathBuf> {
    let refuse = |reason: &str| Err(Error::Backing { name: name.to_owned(), reason: reason.into() });
    if name.starts_with('/') || name.contains(':') {
        return refuse("must be a relative path without a protocol or colon");
    }
    let folder = overlay.parent().unwrap_or(Path::new(""));
    let Ok(inside) = folder.strip_prefix(root) else {
        return refuse("the image is outside the folder that backing files may be in");
    };
    let mut resolved = inside.to_owned();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => resolved.push(part),
            Component::CurDir => {}
            Component::ParentDir if resolved.pop() => {}
            _ => return refuse("leads out of the folder that backing files may be in"),
        }
    }
    Ok(root.join(resolved))
}

/// Opens a path beneath the root; the kernel refuses symbolic links and anything that leaves it.
fn open_beneath(name: &str, path: &Path, root: &Path) -> Result<File> {
    let open = |source: std::io::Error| Error::Open { path: path.to_owned(), source };
    let root_path = if root == Path::new("") { Path::new(".") } else { root };
    let folder = rustix::fs::openat(CWD, root_path, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| open(errno.into()))?;
    let inside = path.strip_prefix(root).unwrap_or(path);
    // Non-blocking: opening a FIFO must not wait for somebody to write into it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match rustix::fs::openat2(&folder, inside, flags, Mode::empty(), resolve) {
        Ok(fd) => Ok(File::from(fd)),
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::XDEV) => {
            Err(Error::Backing { name: name.to_owned(), reason: "must not be reached through a symbolic link".into() })
        }
        Err(errno) => Err(open(errno.into())),
    }
}
