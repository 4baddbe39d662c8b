//! The last steps of a session, shared by closing and repairing: refcounts, length, and the header that vouches for them.
//!
//! The dirty bit is durable when this begins, and everything that the tables point at.

use std::io::IoSlice;

use crate::error::{Error, Result};
use crate::format::header::{CORRUPT, DIRTY, Header, field};
use crate::geometry::SECTOR;
use crate::refcounts::{self, RefcountTable};
use crate::references::Counts;
use crate::storage::Storage;

/// The first sector of the file, in which every header field lies that changes.
pub(crate) type HeaderSector = [u8; SECTOR as usize];

/// Stores a big-endian field of the header's first sector.
pub(crate) fn put64(sector: &mut HeaderSector, at: usize, value: u64) {
    sector[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Stores a big-endian field of 32 bits.
pub(crate) fn put32(sector: &mut HeaderSector, at: usize, value: u32) {
    sector[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Sets the refcounts to `counts`, appending what is new at `end`, and clears the dirty and corrupt bits.
pub(crate) fn finish(
    storage: &dyn Storage,
    header: &Header,
    sector: &mut HeaderSector,
    table: RefcountTable,
    counts: &mut Counts,
    end: u64,
) -> Result<()> {
    let cluster = header.geometry.cluster_size();
    if mutant!("clean_before_counts") {
        put64(sector, field::INCOMPATIBLE, header.incompatible & !(DIRTY | CORRUPT));
        storage.write(0, &mut [IoSlice::new(&sector[..])]).map_err(Error::io("write", 0))?;
    }
    let (table, end) = refcounts::set(storage, header.geometry, header.refcount_width, table, counts, end)?;
    storage.set_length(end).map_err(Error::io("ftruncate", end))?;
    // B3: what the header is going to vouch for is durable.
    if !mutant!("no_b3") {
        storage.sync_data().map_err(Error::io("fdatasync", 0))?;
    }

    put64(sector, field::REFCOUNT_TABLE_OFFSET, table.offset);
    put32(sector, field::REFCOUNT_TABLE_CLUSTERS, table.clusters as u32);
    put64(sector, field::INCOMPATIBLE, header.incompatible & !(DIRTY | CORRUPT));
    storage.write(0, &mut [IoSlice::new(&sector[..])]).map_err(Error::io("write", 0))?;
    // B4: the image is whole.
    if !mutant!("no_b4") {
        storage.sync_data().map_err(Error::io("fdatasync", 0))?;
    }

    for (first, stop) in counts.unused_runs(end / cluster) {
        // Best effort: a file system that cannot punch keeps the space, nothing else depends on it.
        if storage.punch(first * cluster, (stop - first) * cluster).is_err() {
            break;
        }
    }
    Ok(())
}
