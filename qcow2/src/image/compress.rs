//! Compressed writes: the whole clusters of a request that need new space, compressed in parallel and packed into one run.
//!
//! Clusters that own space, partial ones, and those that do not become smaller are left to the ordinary path (`write`).

use rayon::prelude::*;

use super::Image;
use super::write::needs_space;
use crate::buffer::BufferPool;
use crate::compressed::{Compression, CompressionLevel, Compressor};
use crate::error::Result;
use crate::format::entry;
use crate::packing::Run;

/// Narrower refcounts cannot count the compressed clusters that may share one host cluster: with 2 MiB clusters, more than
/// 20,000 of the smallest ones fit into it.
const REFCOUNT_BITS_MIN: u32 = 16;

/// Compressed clusters with a place in the file, not on their way yet.
#[derive(Debug)]
pub(super) struct Packed<'a> {
    run: Run<'a>,
    /// Whole blocks.
    bytes: Vec<u8>,
    /// The new entry of each guest cluster.
    entries: Vec<(u64, u64)>,
}

impl Image {
    /// Compresses what can be of a write whose clusters the caller holds exclusively, finds room for it, and marks those
    /// clusters in `done`, which has one flag for each cluster that the write touches.
    pub(super) fn pack(&self, offset: u64, data: &[u8], done: &mut [bool]) -> Result<Option<Packed<'_>>> {
        let Some(level) = self.compress.filter(|_| self.header.refcount_width.bits() >= REFCOUNT_BITS_MIN) else {
            return Ok(None);
        };
        let geometry = self.geometry();
        let mut candidates = Vec::new();
        for (start, bytes) in self.whole_clusters_of(offset, data) {
            let cluster = geometry.cluster_of(start);
            let index = (cluster - geometry.cluster_of(offset)) as usize;
            if done.get(index) == Some(&false) && needs_space(self.entry(cluster)?) {
                candidates.push((cluster, index, bytes));
            }
        }
        let mut bytes = Vec::new();
        let mut placed = Vec::new();
        for ((cluster, index, _), compressed) in candidates.iter().zip(self.compress_all(level, &candidates)) {
            if let Some(compressed) = compressed {
                placed.push((*cluster, *index, bytes.len() as u64, compressed.len() as u64));
                bytes.extend_from_slice(&compressed);
            }
        }
        let (Some(first), Some(last)) = (placed.first(), placed.last()) else { return Ok(None) };
        self.make_tables(first.0, last.0)?;
        // Whole blocks, so that no later write has a part of the last one.
        bytes.resize(bytes.len().next_multiple_of(self.storage.block_size() as usize), 0);
        let run = self.packing.place(&*self.storage, &self.allocator, self.cluster_size(), bytes.len() as u64)?;
        let encode = |(cluster, _, at, length): &(u64, usize, u64, u64)| {
            entry::compressed(run.host + at, *length, geometry).map(|raw| (*cluster, raw))
        };
        // Past the last offset that a compressed entry can hold, clusters are stored as they are.
        let Some(entries) = placed.iter().map(encode).collect::<Option<Vec<_>>>() else { return Ok(None) };
        for (_, index, ..) in &placed {
            done[*index] = true;
        }
        Ok(Some(Packed { run, bytes, entries }))
    }

    /// Hands the run to the write-behind; returns the entries that may now be published.
    pub(super) fn put_packed(&self, packed: Option<Packed<'_>>) -> Result<Vec<(u64, u64)>> {
        let Some(packed) = packed else { return Ok(Vec::new()) };
        // In memory that may go around the page cache.
        let mut bytes = BufferPool::shared().lend(packed.bytes.len());
        bytes.as_mut().copy_from_slice(&packed.bytes);
        self.write_behind.put(packed.run.host, vec![self.filling(bytes)])?;
        Ok(packed.entries)
    }

    /// The whole clusters of a write: first byte and bytes. What ends at the end of the disk counts as whole.
    fn whole_clusters_of<'a>(&self, offset: u64, data: &'a [u8]) -> impl Iterator<Item = (u64, &'a [u8])> {
        let (size, cluster_size) = (self.size(), self.cluster_size());
        let skipped = ((offset.next_multiple_of(cluster_size) - offset) as usize).min(data.len());
        let start = offset + skipped as u64;
        let chunks = data.split_at(skipped).1.chunks(cluster_size as usize).enumerate();
        chunks
            .map(move |(index, bytes)| (start + index as u64 * cluster_size, bytes))
            .filter(move |(start, bytes)| bytes.len() as u64 == cluster_size || start + bytes.len() as u64 == size)
    }

    /// The compressed bytes of each cluster, `None` for those that do not become smaller; on all cores, and on no more
    /// threads than that however many requests there are.
    fn compress_all(&self, level: CompressionLevel, clusters: &[(u64, usize, &[u8])]) -> Vec<Option<Vec<u8>>> {
        let compression = Compression::from_header(self.header.compression_type);
        let cluster_size = self.cluster_size();
        let make = || Compressor::new(compression, level, cluster_size).ok();
        let compress = |compressor: &mut Option<Compressor>, (_, _, bytes): &(u64, usize, &[u8])| {
            let compressor = compressor.as_mut()?;
            if bytes.len() as u64 == cluster_size {
                return compressor.compress(bytes).map(<[u8]>::to_vec);
            }
            let mut padded = bytes.to_vec();
            padded.resize(cluster_size as usize, 0);
            compressor.compress(&padded).map(<[u8]>::to_vec)
        };
        clusters.par_iter().map_init(make, compress).collect()
    }
}
