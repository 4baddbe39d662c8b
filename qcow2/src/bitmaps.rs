//! Persistent bitmaps, as far as a check needs them: which clusters they own. Nothing here writes them; opening an image for
//! writing retires them (`image::session`).

use crate::error::{Error, Result};
use crate::format::header::{AUTOCLEAR_BITMAPS, Header};
use crate::format::{be32, be64};
use crate::geometry::ENTRY;
use crate::references::each_entry;
use crate::storage::Storage;

/// QEMU's limits.
const BITMAPS_MAX: u32 = 65_535;
const DIRECTORY_BYTES_MAX: u64 = 65_535 * 1024;
/// Bound on the entries of all tables together: what a check is ready to read, 128 MiB.
const TABLE_ENTRIES_MAX: u64 = 1 << 24;
/// Fixed part of a directory entry ("Bitmap directory").
const ENTRY_BYTES: u64 = 24;
/// Bits 9..=55 of a bitmap table entry: host offset of a cluster of bits.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bit 0 of an entry without a cluster: all its bits are one.
const ALL_ONES: u64 = 1;

/// Calls `own` with the structure's name, offset and length of everything that valid bitmaps own in the file.
pub(crate) fn each_range(
    storage: &dyn Storage,
    header: &Header,
    mut own: impl FnMut(&'static str, u64, u64),
) -> Result<()> {
    let Some(at) = header.bitmaps_extension else { return Ok(()) };
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        // A writer that does not know them has been there: they mean nothing any more.
        return Ok(());
    }
    let corrupt = |structure, at, value, rule| Err(Error::corrupt(structure, at, value, rule));
    let cluster_size = header.geometry.cluster_size();
    let length = storage.length().map_err(Error::io("fstat", 0))?;
    let file_end = length.next_multiple_of(cluster_size);
    // Aligned, behind the header, inside the file, its last cluster perhaps cut short.
    let sound = |offset: u64, bytes: u64| {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= file_end);
        offset >= cluster_size && offset < length && offset.is_multiple_of(cluster_size) && inside
    };
    let mut extension = [0; 24];
    storage.read(at as u64 + 8, &mut extension).map_err(Error::io("read", at as u64))?;
    let count = be32(&extension, 0).unwrap_or(0);
    let (bytes, offset) = (be64(&extension, 8).unwrap_or(0), be64(&extension, 16).unwrap_or(0));
    if count == 0 || count > BITMAPS_MAX || bytes > DIRECTORY_BYTES_MAX || !sound(offset, bytes) {
        let rule = "must be aligned, inside the file, and within the format's limits";
        return corrupt("bitmap directory", at as u64, offset, rule);
    }
    own("bitmap directory", offset, bytes);
    let (mut position, mut all_entries) = (0, 0);
    for _ in 0..count {
        let at = offset + position;
        let mut entry = [0; ENTRY_BYTES as usize];
        storage.read(at, &mut entry).map_err(Error::io("read", at))?;
        let (table, entries) = (be64(&entry, 0).unwrap_or(0), u64::from(be32(&entry, 8).unwrap_or(0)));
        // The name's length is the low half of its word, behind type and granularity.
        let (name, extra) = (be32(&entry, 16).unwrap_or(0) & 0xffff, be32(&entry, 20).unwrap_or(0));
        position += (ENTRY_BYTES + u64::from(name) + u64::from(extra)).next_multiple_of(8);
        if position > bytes {
            return corrupt("bitmap directory", at, bytes, "an entry must end inside the directory");
        }
        all_entries += entries;
        if all_entries > TABLE_ENTRIES_MAX || !sound(table, entries * ENTRY) {
            let rule = "a bitmap table must be aligned, inside the file, and small enough";
            return corrupt("bitmap directory", at, table, rule);
        }
        own("bitmap table", table, entries * ENTRY);
        each_entry(storage, table, entries, |at, raw| {
            let host = raw & OFFSET;
            if raw & RESERVED != 0 || (host == 0 && raw & !ALL_ONES != 0) || (host != 0 && !sound(host, 1)) {
                let rule = "must be aligned and inside the file, reserved bits zero";
                return corrupt("bitmap table entry", at, raw, rule);
            }
            if host != 0 {
                own("bitmap", host, cluster_size);
            }
            Ok(())
        })?;
    }
    Ok(())
}
