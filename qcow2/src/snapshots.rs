//! Internal snapshots, as far as a check needs them: where their tables are. Nothing here writes them.

use crate::error::{Error, Result};
use crate::format::header::{Header, L1_BYTES_MAX};
use crate::format::{be32, be64};
use crate::geometry::ENTRY;
use crate::storage::Storage;

/// QEMU's limit.
const SNAPSHOTS_MAX: u32 = 65_536;
/// Fixed part of an entry of the snapshot table ("Snapshots").
const ENTRY_BYTES: usize = 40;
/// Bound on extra data, id and name together: what 16-bit lengths and QEMU's extra data can add up to.
const ENTRY_TAIL_MAX: u64 = 256 << 10;

/// Bound on the whole table: 1 KiB for each of the most snapshots.
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Bound on the L1 tables of all snapshots together: what a check is ready to read.
const ALL_L1_BYTES_MAX: u64 = 256 << 20;

/// The snapshot table.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    /// Its length in bytes; 0 for an image without snapshots.
    pub(crate) bytes: u64,
    /// Offset and entries of the L1 table of each snapshot.
    pub(crate) l1_tables: Vec<(u64, u64)>,
}

/// Reads the snapshot table; empty for an image without snapshots.
pub(crate) fn load(storage: &dyn Storage, header: &Header, file_length: u64) -> Result<Snapshots> {
    let cluster_size = header.geometry.cluster_size();
    let corrupt = |at, value, rule| Err(Error::corrupt("snapshot table", at, value, rule));
    if header.snapshots == 0 {
        return Ok(Snapshots::default());
    }
    if header.snapshots > SNAPSHOTS_MAX {
        return corrupt(60, u64::from(header.snapshots), "an image has at most 65536 snapshots");
    }
    let file_end = file_length.next_multiple_of(cluster_size);
    let mut at = header.snapshots_offset;
    let mut l1_tables = Vec::new();
    let mut l1_bytes = 0;
    for _ in 0..header.snapshots {
        if at >= file_length {
            return corrupt(at, file_length, "must be inside the file");
        }
        let mut bytes = [0; ENTRY_BYTES];
        storage.read(at, &mut bytes).map_err(Error::io("read", at))?;
        let (l1_offset, l1_entries) = (be64(&bytes, 0).unwrap_or(0), u64::from(be32(&bytes, 8).unwrap_or(0)));
        let lengths = be32(&bytes, 12).unwrap_or(0);
        let tail = u64::from(be32(&bytes, 36).unwrap_or(0)) + u64::from(lengths >> 16) + u64::from(lengths & 0xffff);
        let table_bytes = l1_entries * ENTRY;
        let outside = l1_offset.checked_add(table_bytes).is_none_or(|end| end > file_end);
        if table_bytes > L1_BYTES_MAX || !l1_offset.is_multiple_of(cluster_size) || outside {
            return corrupt(at, l1_offset, "the L1 table must be aligned, inside the file and at most 32 MiB");
        }
        if tail > ENTRY_TAIL_MAX {
            return corrupt(at, tail, "extra data, id and name must not be longer than 256 KiB");
        }
        l1_bytes += table_bytes;
        if l1_bytes > ALL_L1_BYTES_MAX {
            return Err(Error::unsupported("snapshots whose L1 tables have more than 256 MiB together"));
        }
        l1_tables.push((l1_offset, l1_entries));
        at += (ENTRY_BYTES as u64 + tail).next_multiple_of(8);
        if at - header.snapshots_offset > TABLE_BYTES_MAX || at > file_end {
            return corrupt(at, at - header.snapshots_offset, "must end inside the file, and before 64 MiB");
        }
    }
    Ok(Snapshots { bytes: at - header.snapshots_offset, l1_tables })
}
