//! A second reader of the format, written apart from the engine: what it cannot read is corrupt.

#![allow(dead_code, unreachable_pub, reason = "part of the tests that include it")]

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::ops::Range;

use super::sim_disk::Content;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The disk as the tables say, over the bytes of a backing file. `Err` names the first broken rule.
pub fn read_disk(file: &Content, backing: &[u8]) -> Result<Vec<u8>, String> {
    read_disk_and_packed(file, backing).map(|(disk, _)| disk)
}

/// As [`read_disk`], with the ranges of the file that compressed entries refer to, to the ends of their last sectors.
pub fn read_disk_and_packed(file: &Content, backing: &[u8]) -> Result<(Vec<u8>, Vec<Range<u64>>), String> {
    let number = |at: u64, bytes: usize| {
        let mut buffer = [0; 8];
        file.read(at, &mut buffer[8 - bytes..]);
        u64::from_be_bytes(buffer)
    };
    if number(0, 4) != 0x5146_49fb || number(4, 4) != 3 {
        return Err("no header".into());
    }
    let cluster = 1u64 << number(20, 4);
    let size = number(24, 8);
    let compression = if number(72, 8) >> 3 & 1 == 1 { number(104, 1) } else { 0 };
    // Of each host cluster with compressed data, its owners: they may be many, but all of that kind.
    let mut packed: HashMap<u64, usize> = HashMap::new();
    let mut ranges = Vec::new();
    let (l1_entries, l1_offset) = (number(36, 4), number(40, 8));
    let mut owned: HashSet<u64> = HashSet::from([0]);
    let mut own = |host: u64, what: &str| {
        if !host.is_multiple_of(cluster) || host >= file.length() || !owned.insert(host) {
            return Err(format!("{what} at {host:#x}: misaligned, outside the file, or owned twice"));
        }
        Ok(())
    };
    for host in (l1_offset..l1_offset + l1_entries * 8).step_by(cluster as usize) {
        own(host, "L1 table")?;
    }
    let mut disk = vec![0; size as usize];
    let below = backing.len().min(disk.len());
    disk[..below].copy_from_slice(&backing[..below]);
    for l1_index in 0..l1_entries {
        let l1 = number(l1_offset + l1_index * 8, 8);
        if l1 == 0 {
            continue;
        }
        if l1 & !OFFSET != 1 << 63 {
            return Err(format!("L1 entry {l1_index}: {l1:#x}"));
        }
        own(l1 & OFFSET, "L2 table")?;
        for l2_index in 0..cluster / 8 {
            let l2 = number((l1 & OFFSET) + l2_index * 8, 8);
            let host = l2 & OFFSET;
            if l2 == 0 {
                continue;
            }
            let start = (l1_index * (cluster / 8) + l2_index) * cluster;
            let end = (start + cluster).min(size);
            if start >= end && l2 == 1 {
                // Hidden by a grow that a crash cut short.
                continue;
            }
            if start >= end {
                return Err(format!("L2 entry {l2_index} of table {l1_index} lies past the disk"));
            }
            let part = &mut disk[start as usize..end as usize];
            if l2 >> 62 == 1 {
                let range = compressed_range(l2, cluster);
                let last = (range.end - 1) / cluster;
                if range.start < cluster || last * cluster >= file.length() {
                    return Err(format!("compressed cluster at {range:x?}: in the header or outside the file"));
                }
                (range.start / cluster..=last).for_each(|host| *packed.entry(host * cluster).or_default() += 1);
                let mut payload = vec![0; (range.end - range.start) as usize];
                file.read(range.start, &mut payload);
                let whole = inflate(compression, &payload, cluster as usize)
                    .map_err(|error| format!("compressed cluster at {range:x?}: {error}"))?;
                part.copy_from_slice(&whole[..part.len()]);
                ranges.push(range);
                continue;
            }
            if l2 & !(OFFSET | 1 << 63 | 1) != 0 || (host == 0) != (l2 >> 63 == 0) {
                return Err(format!("L2 entry {l2_index} of table {l1_index}: {l2:#x}"));
            }
            if host != 0 {
                own(host, "data cluster")?;
            }
            if l2 & 1 != 0 {
                part.fill(0);
            } else {
                file.read(host, part);
            }
        }
    }
    if let Some((host, owners)) = packed.iter().find(|(host, _)| owned.contains(host)) {
        return Err(format!("host cluster {host:#x} has {owners} compressed owners, and one of another kind"));
    }
    Ok((disk, ranges))
}

/// The bytes of the file that a compressed entry refers to.
fn compressed_range(l2: u64, cluster: u64) -> Range<u64> {
    let offset_bits = 62 - (cluster.trailing_zeros() - 8);
    let offset = l2 & ((1 << offset_bits.min(56)) - 1);
    let further_sectors = (l2 & ((1 << 62) - 1)) >> offset_bits;
    offset..(offset / 512 + further_sectors + 1) * 512
}

/// Exactly one cluster; deflate with the window that QEMU has.
fn inflate(compression: u64, payload: &[u8], cluster: usize) -> Result<Vec<u8>, String> {
    let mut whole = vec![0; cluster];
    if compression == 1 {
        let mut frames = zstd::stream::read::Decoder::with_buffer(payload).map_err(|error| error.to_string())?;
        frames.read_exact(&mut whole).map_err(|error| error.to_string())?;
    } else {
        let mut stream = flate2::Decompress::new_with_window_bits(false, 12);
        let ended = stream.decompress(payload, &mut whole, flate2::FlushDecompress::Finish);
        if ended.map_err(|error| error.to_string())? != flate2::Status::StreamEnd
            || stream.total_out() != cluster as u64
        {
            return Err(format!("the stream holds {} bytes", stream.total_out()));
        }
    }
    Ok(whole)
}

/// Whether the header says that the image was closed.
pub fn is_closed(file: &Content) -> bool {
    let mut features = [0; 8];
    file.read(72, &mut features);
    features[7] & 1 == 0
}
