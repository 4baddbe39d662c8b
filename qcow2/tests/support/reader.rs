//! A second reader of the format, written apart from the engine: what it cannot read is corrupt.

#![allow(unreachable_pub, reason = "part of the tests that include it")]

use std::collections::HashSet;

use super::sim_disk::Content;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The disk as the tables say, over the bytes of a backing file. `Err` names the first broken rule.
pub fn read_disk(file: &Content, backing: &[u8]) -> Result<Vec<u8>, String> {
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
            if l2 & !(OFFSET | 1 << 63 | 1) != 0 || (host == 0) != (l2 >> 63 == 0) {
                return Err(format!("L2 entry {l2_index} of table {l1_index}: {l2:#x}"));
            }
            if host != 0 {
                own(host, "data cluster")?;
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
            if l2 & 1 != 0 {
                part.fill(0);
            } else {
                file.read(host, part);
            }
        }
    }
    Ok(disk)
}

/// Whether the header says that the image was closed.
pub fn is_closed(file: &Content) -> bool {
    let mut features = [0; 8];
    file.read(72, &mut features);
    features[7] & 1 == 0
}
