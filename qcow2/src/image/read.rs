//! Reading: look the mapping up, let go of it, move bytes.

use super::Image;
use crate::compressed::{Compression, inflate};
use crate::error::{Error, Result};
use crate::format::entry::L2Entry;

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

impl Image {
    /// Fills the buffer with the disk's bytes from `offset` on. Holes and everything past a shorter backing file read as
    /// zeroes. A read error poisons nothing; the buffer's content is then undefined.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let _operation = self.reading()?;
        self.check_range(offset, buffer.len() as u64)?;
        self.read_range(offset, buffer)
    }

    /// As [`Image::read`], inside an operation.
    pub(super) fn read_range(&self, offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        let too_early = mutant!("pending_before_mapping") && self.write_behind.is_idle();
        for (start, length) in self.geometry().by_table(offset, buffer.len() as u64) {
            for run in self.runs(start, length)? {
                let (part, rest) = buffer.split_at_mut(run.length as usize);
                buffer = rest;
                match run.source {
                    Source::Host(host) if too_early => {
                        self.storage.read(host, part).map_err(Error::io("read", host))?
                    }
                    Source::Host(host) => self.write_behind.read(host, part)?,
                    Source::Compressed { host, length } => self.read_compressed(host, length, run.offset, part)?,
                    Source::Zero { .. } => part.fill(0),
                    Source::Below => match &self.backing {
                        Some(layer) => layer.read(run.offset, part)?,
                        None => part.fill(0),
                    },
                }
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
