//! The upper layers of a chain made into one new image over what lies below them, so that the layers between can go.
//!
//! Only what these layers decide is copied: their data, and their zeroes where they hide something. What they leave to the
//! layers below, the new image leaves to its own backing file, which must show the same.

use std::path::Path;

use crate::buffer::{Buffer, BufferPool};
use crate::create::{CreateOptions, create};
use crate::disk::unreadable;
use crate::error::{Error, Result};
use crate::flatten::{PIECE, nonzero_runs};
use crate::image::{Durability, Extent, ExtentKind, Identical, Image, OpenOptions, ZeroMode};
use crate::lock::Access;
use crate::partial::{build, close_clean};
use crate::progress::{Watch, tell};

/// Guest bytes whose map is asked for in one go: bounds the time between two looks at the caller's wish to stop.
const WINDOW: u64 = 1 << 30;

/// Extents that are remembered at most: bounds the memory.
const EXTENTS_MAX: usize = 4096;

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Virtual size of the new disk in bytes.
    pub size: u64,
    /// Bytes of data that the upper layers decide and that were handed to the new image. What reads the same from below
    /// was not stored.
    pub written: u64,
    /// Bytes that the upper layers decide to be zeroes. They take space only where they hide a part of a cluster.
    pub zeroed: u64,
}

/// Copies what the upper `layers` images of a chain decide, `source` being the first of them, into a new image at a path that
/// must not exist yet.
///
/// `shape.backing` names what lies below those layers in the chain, for the folder of the new image; it must be absent when
/// there is nothing. That it is the same is the caller's business, or that of a comparison ([`crate::compare`]) afterwards:
/// only the names are taken on trust. The size in `shape` is not looked at, it is the disk's. Of `options`, the new image
/// takes everything but the access and what becomes of identical clusters, which are never stored.
///
/// While it is being made the file is called `<path>.partial`, which must not exist either: it is what a killed process or
/// a power cut leaves. Every error, and every break from `watch`, ends the copy and removes the file; a range that cannot
/// be read is named ([`Error::Unreadable`]).
///
/// # Durability
/// The new file and its name are on stable storage when this returns, and the image has passed its check. After a crash
/// before that, the path is absent.
pub fn merge(
    source: &Image,
    layers: u32,
    path: &Path,
    shape: &CreateOptions,
    options: &OpenOptions,
    watch: &mut Watch<'_>,
) -> Result<Merged> {
    let invalid = |option, reason: &str| Err(Error::InvalidOption { option, reason: reason.into() });
    if layers == 0 {
        return invalid("layers", "one is the least that can be copied");
    }
    match (source.chain().len() > layers as usize, shape.backing.is_some()) {
        (true, false) => return invalid("backing file", "must be what lies below the layers that are merged"),
        (false, true) => return invalid("backing file", "there is nothing below the layers that are merged"),
        (true, true) | (false, false) => {}
    }
    let shape = CreateOptions { size: source.size(), ..shape.clone() };
    let options = OpenOptions { access: Access::ReadWrite, identical: Identical::Skip, ..options.clone() };
    build(
        path,
        |partial| create(partial, &shape),
        |partial, ()| {
            let target = Image::open(partial, &options)?;
            let buffer = BufferPool::shared().lend(PIECE.max(target.cluster_size()) as usize);
            let mut copy = Copy { source, target, buffer, done: Merged { size: shape.size, ..Merged::default() } };
            copy.extents(layers, watch)?;
            close_clean(&copy.target)?;
            Ok(copy.done)
        },
    )
}

struct Copy<'a> {
    source: &'a Image,
    target: Image,
    buffer: Buffer,
    done: Merged,
}

impl Copy<'_> {
    fn extents(&mut self, layers: u32, watch: &mut Watch<'_>) -> Result<()> {
        let size = self.source.size();
        let mut at = 0;
        while at < size {
            tell(watch, at, size)?;
            let length = WINDOW.min(size - at);
            let extents = self.source.map(at, length, EXTENTS_MAX).map_err(unreadable(at, length))?;
            for extent in extents {
                at = extent.offset + extent.length;
                // Depth 0 is what no layer holds: past the end of one that is shorter than what is above it. It reads as
                // zeroes whatever the layers further down hold there, so it is decided here.
                match extent.kind {
                    _ if extent.depth > layers => {}
                    ExtentKind::Data => self.data(extent, watch)?,
                    ExtentKind::Zero | ExtentKind::ZeroAllocated => {
                        zero(&self.target, extent.offset, extent.length, &mut self.done)?;
                    }
                }
            }
        }
        tell(watch, size, size)
    }

    /// In pieces that begin at a cluster of the new image, the first one apart.
    fn data(&mut self, extent: Extent, watch: &mut Watch<'_>) -> Result<()> {
        let Self { source, target, buffer, done } = self;
        let cluster = target.cluster_size();
        let (mut at, end) = (extent.offset, extent.offset + extent.length);
        while at < end {
            tell(watch, at, done.size)?;
            let piece = if at.is_multiple_of(cluster) { PIECE.max(cluster) } else { cluster - at % cluster };
            let length = piece.min(end - at);
            let (bytes, _) = buffer.as_mut().split_at_mut(length as usize);
            source.read(at, bytes).map_err(unreadable(at, length))?;
            let mut behind = at;
            for (index, run) in nonzero_runs(bytes, cluster as usize) {
                let start = at + index as u64;
                zero(target, behind, start - behind, done)?;
                target.write(start, run, Durability::OnFlush)?;
                done.written += run.len() as u64;
                behind = start + run.len() as u64;
            }
            zero(target, behind, at + length - behind, done)?;
            at += length;
        }
        Ok(())
    }
}

/// Zeroes a range. Parts of clusters are written: a part that is data of zeroes below is then found to be the same, which
/// the tables alone do not tell.
fn zero(target: &Image, offset: u64, length: u64, done: &mut Merged) -> Result<()> {
    let (cluster, end) = (target.cluster_size(), offset + length);
    let start = offset.next_multiple_of(cluster).min(end);
    let stop = if end == target.size() { end } else { (end - end % cluster).max(start) };
    for (from, to) in [(offset, start), (stop, end)] {
        if from < to {
            target.write(from, &vec![0; (to - from) as usize], Durability::OnFlush)?;
        }
    }
    if start < stop {
        target.zero(start, stop - start, ZeroMode::Unmap, Durability::OnFlush)?;
    }
    done.zeroed += length;
    Ok(())
}
