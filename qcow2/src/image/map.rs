//! What lies where: extents of equal state through the whole chain ("block status").

use std::path::{Path, PathBuf};

use super::Image;
use super::read::Source;
use crate::backing::Layer;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// Units of the mapping looked at in one go, a bound on the memory for their runs.
const RUNS_AT_ONCE: u64 = 8192;
/// Units of the mapping looked at for one map, in all layers together: neighbours are merged, so the extents asked for do
/// not bound the tables that are read.
const UNITS_PER_MAP: u64 = 1 << 20;

/// How a run of guest bytes is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Holds data.
    Data,
    /// Reads as zeroes and keeps space in the file.
    ZeroAllocated,
    /// Reads as zeroes and takes no space: never written, or zeroed.
    Zero,
}

/// A run of guest bytes of one kind, in one layer of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First guest byte.
    pub offset: u64,
    /// Bytes, above 0.
    pub length: u64,
    /// How it is stored.
    pub kind: ExtentKind,
    /// The layer that decides it: 1 for this image, 2 for its backing file, and so on; 0 when no layer holds it.
    pub depth: u32,
}

impl Image {
    /// The extents of a range: in order, without gaps, none empty, neighbours of equal kind and depth merged, at most
    /// `max` of them. They cover the range from its start on, but not always to its end: a map ends early when `max` is
    /// reached, or when it has looked at a million clusters (or subclusters), those of the layers below included; space
    /// without an L2 table counts little. Something is covered, unless the range is empty or `max` is 0.
    pub fn map(&self, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>> {
        let _operation = self.reading()?;
        self.check_range(offset, length)?;
        let mut extents = Extents { list: Vec::new(), max, units_left: UNITS_PER_MAP };
        self.collect(offset, length, 1, &mut extents)?;
        Ok(extents.list)
    }

    /// The extents of the whole disk, as many as it takes, neighbours merged.
    pub fn map_all(&self) -> Result<Vec<Extent>> {
        let mut all = Extents { list: Vec::new(), max: usize::MAX, units_left: 0 };
        let (mut at, end) = (0, self.size());
        while at < end {
            let part = self.map(at, end - at, usize::MAX)?;
            at = part.last().map_or(end, |last| last.offset + last.length);
            part.into_iter().for_each(|extent| all.push(extent));
        }
        Ok(all.list)
    }

    /// The files of the chain, this image first: the one at index `n` has depth `n + 1` in a map.
    pub fn chain(&self) -> Vec<PathBuf> {
        let mut files = vec![self.path.clone()];
        match (&self.backing, &self.header.backing) {
            (Some(Layer::Image(image)), _) => files.extend(image.chain()),
            (Some(Layer::Raw { .. }), Some(backing)) => {
                files.push(self.path.parent().unwrap_or(Path::new("")).join(&backing.name));
            }
            _ => {}
        }
        files
    }

    fn collect(&self, offset: u64, length: u64, depth: u32, extents: &mut Extents) -> Result<()> {
        // A table of the largest clusters has millions of subclusters: not all of their runs at once.
        let step = self.geometry().unit() * RUNS_AT_ONCE;
        for (start, piece) in self.geometry().by_table(offset, length) {
            for start_of_step in (start..start + piece).step_by(step as usize) {
                let part = step.min(start + piece - start_of_step);
                self.collect_part(start_of_step, part, depth, extents)?;
                if extents.is_done() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The extents of a range within one L2 table.
    fn collect_part(&self, offset: u64, length: u64, depth: u32, extents: &mut Extents) -> Result<()> {
        let geometry = self.geometry();
        let has_table = self.tables.has(geometry.l1_index(geometry.cluster_of(offset)));
        extents.looked_at(if has_table { length / geometry.unit() } else { 0 } + 1);
        for run in self.runs(offset, length)? {
            let kind = match run.source {
                Source::Host(_) | Source::Compressed { .. } => ExtentKind::Data,
                Source::Zero { allocated: true } => ExtentKind::ZeroAllocated,
                Source::Zero { allocated: false } => ExtentKind::Zero,
                Source::Below => {
                    self.collect_below(run.offset, run.length, depth + 1, extents)?;
                    if extents.is_done() {
                        return Ok(());
                    }
                    continue;
                }
            };
            extents.push(Extent { offset: run.offset, length: run.length, kind, depth });
        }
        Ok(())
    }

    fn collect_below(&self, offset: u64, length: u64, depth: u32, extents: &mut Extents) -> Result<()> {
        let size = self.backing.as_ref().map_or(0, Layer::size);
        let inside = size.saturating_sub(offset).min(length);
        if inside > 0 {
            match &self.backing {
                Some(Layer::Image(image)) => image.collect(offset, inside, depth, extents)?,
                Some(Layer::Raw { storage, .. }) => collect_raw(&**storage, offset, inside, depth, extents)?,
                None => {}
            }
        }
        if length > inside {
            let kind = ExtentKind::Zero;
            extents.push(Extent { offset: offset + inside, length: length - inside, kind, depth: 0 });
        }
        Ok(())
    }

    /// Whether the range reads as zeroes, as far as the tables tell without reading data.
    pub(super) fn reads_zero(&self, offset: u64, length: u64) -> Result<bool> {
        for (start, piece) in self.geometry().by_table(offset, length) {
            for run in self.runs(start, piece)? {
                let is_zero = match run.source {
                    Source::Host(_) | Source::Compressed { .. } => false,
                    Source::Zero { .. } => true,
                    Source::Below => self.below_reads_zero(run.offset, run.length)?,
                };
                if !is_zero {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Whether the layers below read as zeroes there, as far as the tables tell.
    pub(super) fn below_reads_zero(&self, offset: u64, length: u64) -> Result<bool> {
        let size = self.backing.as_ref().map_or(0, Layer::size);
        let inside = size.saturating_sub(offset).min(length);
        match &self.backing {
            Some(Layer::Image(image)) if inside > 0 => image.reads_zero(offset, inside),
            Some(Layer::Raw { storage, .. }) if inside > 0 => Ok(storage.is_hole(offset, inside)),
            _ => Ok(true),
        }
    }
}

/// Raw bytes are data, but for the holes that the file system knows of.
fn collect_raw(storage: &dyn Storage, offset: u64, length: u64, depth: u32, extents: &mut Extents) -> Result<()> {
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let (start, length) = storage.data_run(at, end).map_err(Error::io("lseek", at))?.unwrap_or((end, 0));
        for (offset, length, kind) in [(at, start - at, ExtentKind::Zero), (start, length, ExtentKind::Data)] {
            if length > 0 {
                extents.push(Extent { offset, length, kind, depth });
            }
        }
        at = start + length;
        extents.looked_at(1);
        if extents.is_done() {
            break;
        }
    }
    Ok(())
}

struct Extents {
    list: Vec<Extent>,
    max: usize,
    units_left: u64,
}

impl Extents {
    fn looked_at(&mut self, units: u64) {
        self.units_left = self.units_left.saturating_sub(units);
    }

    /// Nothing further on need be looked at: the list is at its limit, or enough was looked at. What is pushed all the same
    /// is taken if it goes on where the list ends.
    fn is_done(&self) -> bool {
        self.list.len() >= self.max || self.units_left == 0
    }

    fn push(&mut self, extent: Extent) {
        let is_full = self.list.len() >= self.max;
        match self.list.last_mut() {
            // Somebody stopped before this.
            Some(last) if last.offset + last.length != extent.offset => {}
            Some(last) if (last.kind, last.depth) == (extent.kind, extent.depth) => last.length += extent.length,
            _ if is_full => {}
            _ => self.list.push(extent),
        }
    }
}
