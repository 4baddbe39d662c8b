//! Reading: look the mapping up, let go of it, move bytes.

use std::ops::Range;

use super::Image;
use crate::compressed::{Compression, inflate};
use crate::error::{Error, Result};
use crate::format::entry::L2Entry;
use crate::sync::atomic::Ordering;
use crate::sync::try_read;

/// Where the bytes of a run of guest bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// From this host offset on.
    Host(u64),
    /// From a compressed cluster: `length` bytes at `host` give the whole cluster, of which the run is a part.
    Compressed { host: u64, length: u64 },
    /// Zeroes, said by an entry; with space of its own or without.
    Zero { allocated: bool },
    /// The layer below, or zeroes without one.
    Below,
}

/// A run of guest bytes with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) source: Source,
}

/// Parts of a buffer that read as zeroes and were not filled: ascending, apart, none empty.
#[derive(Debug, Default)]
pub(crate) struct Holes(Vec<Range<usize>>);

impl Holes {
    /// Adds `length` bytes from `at` on; behind all the others.
    pub(crate) fn push(&mut self, at: usize, length: usize) {
        match self.0.last_mut() {
            Some(last) if last.end == at => last.end += length,
            _ if length > 0 => self.0.push(at..at + length),
            _ => {}
        }
    }

    /// Puts zeroes there.
    pub(crate) fn fill(self, buffer: &mut [u8]) {
        self.0.into_iter().for_each(|hole| buffer[hole].fill(0));
    }
}

impl Image {
    /// Fills the buffer with the disk's bytes from `offset` on. Holes and everything past a shorter backing file read as
    /// zeroes. A read error poisons nothing; the buffer's content is then undefined.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut holes = Holes::default();
        self.read_layer(offset, buffer, 0, &mut holes)?;
        holes.fill(buffer);
        Ok(())
    }

    /// As [`Image::read`], but what reads as zeroes as far as the tables tell is told instead of filled: byte ranges of
    /// the buffer, ascending, apart from each other, none empty; what the buffer holds there is left as it was. They are
    /// what [`Image::map`] tells to be something else than data, except that of a raw backing file only large holes count.
    pub fn read_sparse(&self, offset: u64, buffer: &mut [u8]) -> Result<Vec<Range<usize>>> {
        let mut holes = Holes::default();
        self.read_layer(offset, buffer, 0, &mut holes)?;
        Ok(holes.0)
    }

    /// As [`Image::read_sparse`], if that takes nothing but memory; otherwise `None`, and what the buffer holds is arbitrary.
    pub fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Option<Vec<Range<usize>>> {
        let _life = try_read(&self.life)?;
        let is_open = !self.closed.load(Ordering::Acquire);
        if !is_open || self.check_range(offset, buffer.len() as u64).is_err() {
            return None;
        }
        let geometry = self.geometry();
        let mut holes = Holes::default();
        let (mut rest, mut at) = (buffer, 0);
        let too_early = mutant!("pending_before_mapping") && self.write_behind.is_idle();
        for (start, length) in geometry.by_table(offset, rest.len() as u64) {
            self.tables.glance(geometry.l1_index(geometry.cluster_of(start))).ok()?;
            for run in self.runs(start, length).ok()? {
                let (part, behind) = rest.split_at_mut(run.length as usize);
                rest = behind;
                match (run.source, &self.backing) {
                    // Pending payload would have to be laid over what the file holds. In this order: what the entry names may
                    // be pending since a moment ago.
                    (Source::Host(host), _)
                        if (too_early || self.write_behind.is_idle()) && self.storage.read_cached(host, part) => {}
                    (Source::Zero { .. }, _) | (Source::Below, None) => holes.push(at, part.len()),
                    _ => return None,
                }
                at += part.len();
            }
        }
        Some(holes.0)
    }

    /// As [`Image::read_sparse`], for a part of a buffer that begins at `at` of the whole.
    pub(crate) fn read_layer(&self, offset: u64, part: &mut [u8], at: usize, holes: &mut Holes) -> Result<()> {
        let _operation = self.reading()?;
        self.check_range(offset, part.len() as u64)?;
        self.read_parts(offset, part, at, holes)
    }

    /// As [`Image::read`], inside an operation.
    pub(super) fn read_range(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut holes = Holes::default();
        self.read_parts(offset, buffer, 0, &mut holes)?;
        holes.fill(buffer);
        Ok(())
    }

    fn read_parts(&self, offset: u64, mut buffer: &mut [u8], mut at: usize, holes: &mut Holes) -> Result<()> {
        let too_early = mutant!("pending_before_mapping") && self.write_behind.is_idle();
        for (start, length) in self.geometry().by_table(offset, buffer.len() as u64) {
            for run in self.runs(start, length)? {
                let (part, rest) = buffer.split_at_mut(run.length as usize);
                buffer = rest;
                let length = part.len();
                match (run.source, &self.backing) {
                    (Source::Host(host), _) if too_early => {
                        self.storage.read(host, part).map_err(Error::io("read", host))?
                    }
                    (Source::Host(host), _) => self.write_behind.read(host, part)?,
                    (Source::Compressed { host, length }, _) => self.read_compressed(host, length, run.offset, part)?,
                    (Source::Below, Some(layer)) => layer.read_sparse(run.offset, part, at, holes)?,
                    (Source::Zero { .. }, _) | (Source::Below, None) => holes.push(at, length),
                }
                at += length;
            }
        }
        Ok(())
    }

    /// Fills `part`, which lies within one compressed cluster.
    fn read_compressed(&self, host: u64, length: u64, offset: u64, part: &mut [u8]) -> Result<()> {
        let cluster = self.inflated.cluster(host, || {
            let mut payload = vec![0; length as usize];
            self.write_behind.read(host, &mut payload)?;
            let compression = Compression::from_header(self.header.compression_type);
            inflate(compression, &payload, self.cluster_size(), host)
        })?;
        let within = self.geometry().offset_in_cluster(offset) as usize;
        part.copy_from_slice(&cluster[within..within + part.len()]);
        Ok(())
    }

    /// The sources of a range that lies within one L2 table, neighbours merged.
    pub(super) fn runs(&self, offset: u64, length: u64) -> Result<Vec<Run>> {
        let geometry = self.geometry();
        let first = geometry.cluster_of(offset);
        let Some(table) = self.tables.view(&*self.storage, geometry.l1_index(first))? else {
            return Ok(vec![Run { offset, length, source: Source::Below }]);
        };
        let end = offset + length;
        let mut runs: Vec<Run> = Vec::new();
        let mut at = offset;
        while at < end {
            let cluster = geometry.cluster_of(at);
            let unit = geometry.unit();
            let piece = (at / unit * unit + unit).min(end) - at;
            let within = geometry.offset_in_cluster(at);
            let source = match table.entry(cluster)? {
                L2Entry::Unallocated => Source::Below,
                L2Entry::Zero { host, .. } => Source::Zero { allocated: host.is_some() },
                L2Entry::Data { host, .. } => Source::Host(host + within),
                L2Entry::Compressed { host, length } => Source::Compressed { host, length },
                L2Entry::Subclusters { host, states, .. } => match (within / unit, host) {
                    (index, Some(host)) if states.is_allocated(index) => Source::Host(host + within),
                    (index, _) if states.reads_zero(index) => Source::Zero { allocated: host.is_some() },
                    _ => Source::Below,
                },
            };
            match runs.last_mut() {
                Some(last) if continues(last, source) => last.length += piece,
                _ => runs.push(Run { offset: at, length: piece, source }),
            }
            at += piece;
        }
        Ok(runs)
    }
}

/// Whether `source` follows on from a run.
fn continues(run: &Run, source: Source) -> bool {
    match (run.source, source) {
        (Source::Host(host), Source::Host(next)) => host + run.length == next,
        (before, after) => before == after,
    }
}
