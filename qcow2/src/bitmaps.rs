//! Persistent bitmaps, as far as a check needs them: which clusters they own. Nothing here writes them; opening an image for
//! writing retires them (`image::session`).

use crate::error::{Error, Result};
use crate::format::header::{AUTOCLEAR_BITMAPS, Header};
use crate::format::{be32, be64};
use crate::geometry::ENTRY;
use crate::references::read_table;
use crate::storage::Storage;

/// QEMU's limits.
const BITMAPS_MAX: u32 = 65_535;
const DIRECTORY_BYTES_MAX: u64 = 65_535 * 1024;
const TABLE_ENTRIES_MAX: u64 = 0x800_0000;
/// Fixed part of a directory entry ("Bitmap directory").
const ENTRY_BYTES: u64 = 24;
/// Bytes of a bitmap table looked at in one go.
const PIECE: u64 = 64 << 10;
/// Bits 9..=55 of a bitmap table entry: host offset of a cluster of bits.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Calls `own` with offset and length of everything that valid bitmaps own in the file.
pub(crate) fn each_range(storage: &dyn Storage, header: &Header, mut own: impl FnMut(u64, u64)) -> Result<()> {
    let Some(at) = header.bitmaps_extension else { return Ok(()) };
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        // A writer that does not know them has been there: they mean nothing any more.
        return Ok(());
    }
    let corrupt = |at, value, rule| Err(Error::corrupt("bitmap directory", at, value, rule));
    let cluster_size = header.geometry.cluster_size();
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    let mut extension = [0; 24];
    storage.read(at as u64 + 8, &mut extension).map_err(Error::io("read", at as u64))?;
    let count = be32(&extension, 0).unwrap_or(0);
    let (bytes, offset) = (be64(&extension, 8).unwrap_or(0), be64(&extension, 16).unwrap_or(0));
    if count > BITMAPS_MAX || bytes > DIRECTORY_BYTES_MAX || !offset.is_multiple_of(cluster_size) || offset >= length {
        return corrupt(at as u64, offset, "must be aligned, inside the file, and within the format's limits");
    }
    own(offset, bytes);
    let mut directory = vec![0; bytes as usize];
    storage.read(offset, &mut directory).map_err(Error::io("read", offset))?;
    let mut position = 0;
    for _ in 0..count {
        let entry = directory.get(position as usize..).unwrap_or_default();
        let (Some(table), Some(entries), Some(name), Some(extra)) =
            (be64(entry, 0), be32(entry, 8), be32(entry, 16), be32(entry, 20))
        else {
            return corrupt(offset + position, bytes, "an entry must end inside the directory");
        };
        let entries = u64::from(entries);
        if entries > TABLE_ENTRIES_MAX || !table.is_multiple_of(cluster_size) || table >= length {
            return corrupt(offset + position, table, "a bitmap table must be aligned and inside the file");
        }
        own(table, entries * ENTRY);
        let end = table + (entries * ENTRY).min(length - table);
        for start in (table..end).step_by(PIECE as usize) {
            for raw in read_table(storage, start, PIECE.min(end - start) / ENTRY)? {
                if raw & OFFSET != 0 {
                    own(raw & OFFSET, cluster_size);
                }
            }
        }
        // The name's length is the low half of its word, behind type and granularity.
        let tail = u64::from(name & 0xffff) + u64::from(extra);
        position += (ENTRY_BYTES + tail).next_multiple_of(8);
    }
    Ok(())
}
