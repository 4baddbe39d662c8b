//! Every value that each sector of an image file may have after a crash, from the recorded calls, and with that every
//! value that a guest sector may read as: each host sector on the way (of L1, of L2, of the payload) is on its own what was
//! durable or anything that was pending. That is every subset of the pending writes, torn at every sector, at once.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]

use std::collections::{HashMap, HashSet};

use super::history::{History, Index, SECTOR, Value, ZEROES, value_of};
use super::sim_disk::{Call, Change, Content};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// One value that was written to a host sector.
struct Version {
    started: u64,
    /// When the disk could not forget it any more.
    durable: u64,
    bytes: Box<[u8; SECTOR]>,
    value: Value,
}

pub struct Registers {
    base: Content,
    /// By host sector, in the order of the page cache.
    sectors: HashMap<u64, Vec<Version>>,
    /// Lengths of the file in the same way: started, durable, length.
    lengths: Vec<(u64, u64, u64)>,
    cluster: u64,
    l1_offset: u64,
    size: u64,
}

impl Registers {
    pub fn new(base: &Content, calls: &[Call]) -> Self {
        let number = |at: u64, bytes: usize| {
            let mut buffer = [0; 8];
            base.read(at, &mut buffer[8 - bytes..]);
            u64::from_be_bytes(buffer)
        };
        let (cluster, l1_offset, size) = (1 << number(20, 4), number(40, 8), number(24, 8));
        let syncs: Vec<&Call> = calls.iter().filter(|call| call.change.is_none()).collect();
        let mut registers = Self {
            base: base.clone(),
            sectors: HashMap::new(),
            lengths: vec![(0, 0, base.length())],
            cluster,
            l1_offset,
            size,
        };
        let mut length = base.length();
        for call in calls {
            let Some(change) = &call.change else { continue };
            let covering = syncs.iter().filter(|sync| sync.started > call.ended).map(|sync| sync.ended).min();
            let own = if call.durable { call.ended } else { u64::MAX };
            let durable = covering.unwrap_or(u64::MAX).min(own);
            match change {
                Change::Write { offset, bytes } => {
                    for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                        let mut whole = Box::new([0; SECTOR]);
                        whole[..sector.len()].copy_from_slice(sector);
                        let version =
                            Version { started: call.started, durable, value: value_of(&*whole), bytes: whole };
                        registers.sectors.entry(offset / 512 + index as u64).or_default().push(version);
                    }
                    let end = offset + bytes.len() as u64;
                    if end > length {
                        length = end;
                        registers.lengths.push((call.started, durable, length));
                    }
                }
                Change::Length(to) => {
                    length = *to;
                    registers.lengths.push((call.started, durable, length));
                }
                // Only space that nothing points at is given back, after the end of a session.
                Change::Punch { .. } => {}
            }
        }
        registers
    }

    /// The values that a host sector may have at a time, as the page cache had them one after the other.
    fn each(&self, sector: u64, time: u64, mut visit: impl FnMut(Option<&Version>)) {
        let versions = self.sectors.get(&sector).map_or(&[][..], Vec::as_slice);
        let first = versions.iter().rposition(|version| version.durable <= time);
        if first.is_none() {
            visit(None);
        }
        versions[first.unwrap_or(0)..].iter().filter(|version| version.started <= time).for_each(|v| visit(Some(v)));
    }

    /// The values that an entry of a table may have at a time.
    fn entries(&self, at: u64, time: u64, found: &mut Vec<u64>) {
        found.clear();
        self.each(at / 512, time, |version| {
            let mut bytes = [0; 8];
            match version {
                Some(version) => bytes.copy_from_slice(&version.bytes[(at % 512) as usize..][..8]),
                None => self.base.read(at, &mut bytes),
            }
            let entry = u64::from_be_bytes(bytes);
            if !found.contains(&entry) {
                found.push(entry);
            }
        });
    }

    /// The shortest file that a crash may leave.
    fn shortest(&self, time: u64) -> u64 {
        let first = self.lengths.iter().rposition(|(_, durable, _)| *durable <= time).unwrap_or(0);
        let possible = self.lengths[first..].iter().filter(|(started, ..)| *started <= time);
        possible.map(|(.., length)| *length).min().unwrap_or(0)
    }

    /// Whether the header may say at a time that the image is closed.
    fn may_be_closed(&self, time: u64) -> bool {
        let mut closed = false;
        self.each(0, time, |version| {
            let mut features = [0; 8];
            match version {
                Some(version) => features.copy_from_slice(&version.bytes[72..80]),
                None => self.base.read(72, &mut features),
            }
            closed |= features[7] & 1 == 0;
        });
        closed
    }

    /// What is wrong with the states that a crash at `time` may leave: the first sector that may read as something that
    /// the history does not allow, or an entry that points outside of the file.
    pub fn fault(&self, index: &Index<'_>, below: &[Value], time: u64) -> Option<String> {
        let per_cluster = (self.cluster / 512) as usize;
        let (length, covered) = (self.shortest(time), index.covered(time));
        let (mut l1, mut l2) = (Vec::new(), Vec::new());
        let sectors = (self.size / 512) as usize;
        for cluster in 0..sectors.div_ceil(per_cluster) {
            let guest = cluster * per_cluster..((cluster + 1) * per_cluster).min(sectors);
            let legal = |sector: usize, value: Value| match index.allows_after_crash(sector, value, time, covered) {
                true => None,
                false => Some(format!("sector {sector} may read as {value:#x} after a crash at {time}")),
            };
            let from_below = |sector: usize| below.get(sector).copied().unwrap_or(ZEROES);
            let per_table = (self.cluster / 8) as usize;
            self.entries(self.l1_offset + (cluster / per_table) as u64 * 8, time, &mut l1);
            for table in l1.iter().copied() {
                l2.clear();
                if table == 0 {
                    l2.push(0);
                } else {
                    let host = table & OFFSET;
                    if table & !OFFSET != 1 << 63 || !host.is_multiple_of(self.cluster) || host >= length {
                        return Some(format!("L1 entry {table:#x} in a file of {length} bytes at {time}"));
                    }
                    self.entries(host + (cluster % per_table) as u64 * 8, time, &mut l2);
                }
                for entry in l2.iter().copied() {
                    let host = entry & OFFSET;
                    let reserved = entry & !(OFFSET | 1 << 63 | 1) != 0 || (host == 0) != (entry >> 63 == 0);
                    if reserved || !host.is_multiple_of(self.cluster) || host >= length {
                        return Some(format!("L2 entry {entry:#x} of cluster {cluster}, {length} bytes, at {time}"));
                    }
                    for sector in guest.clone() {
                        let mut fault = None;
                        if entry & 1 != 0 {
                            fault = legal(sector, ZEROES);
                        } else if host == 0 {
                            fault = legal(sector, from_below(sector));
                        } else {
                            let at = host / 512 + (sector - guest.start) as u64;
                            self.each(at, time, |version| {
                                let value = version.map_or_else(|| self.base_value(at), |version| version.value);
                                fault = fault.take().or_else(|| legal(sector, value));
                            });
                        }
                        if fault.is_some() {
                            return fault;
                        }
                    }
                }
            }
        }
        None
    }

    fn base_value(&self, sector: u64) -> Value {
        let mut bytes = [0; SECTOR];
        self.base.read(sector * 512, &mut bytes);
        value_of(&bytes)
    }

    /// One state that a crash at a time may leave: each sector, and the length, chosen on its own.
    pub fn state(&self, time: u64, random: &mut fastrand::Rng) -> Content {
        let mut content = self.base.clone();
        let first = self.lengths.iter().rposition(|(_, durable, _)| *durable <= time).unwrap_or(0);
        let possible: Vec<u64> =
            self.lengths[first..].iter().filter(|(started, ..)| *started <= time).map(|(.., length)| *length).collect();
        let mut hosts: Vec<u64> = self.sectors.keys().copied().collect();
        hosts.sort_unstable();
        for host in hosts {
            let mut versions = Vec::new();
            self.each(host, time, |version| versions.push(version.map(|version| version.bytes.to_vec())));
            if let Some(Some(bytes)) = versions.get(random.usize(..versions.len())) {
                content.apply(&Change::Write { offset: host * 512, bytes: bytes.clone() });
            }
        }
        content.apply(&Change::Length(possible[random.usize(..possible.len())]));
        content
    }

    /// Judges a crash at every moment that matters: what a crash may leave grows only when a write begins, and what is
    /// allowed shrinks only when a flush or a durable change is answered. Returns how many moments, and the first fault.
    pub fn judge(&self, calls: &[Call], history: &History, below: &[Value]) -> (usize, Option<String>) {
        let index = Index::new(history);
        let mut moments: HashSet<u64> = HashSet::from([0]);
        for call in calls.iter().filter(|call| call.change.is_some()) {
            moments.insert(call.started);
            let is_header = matches!(call.change, Some(Change::Write { offset: 0, .. }));
            let is_change = matches!(call.change, Some(Change::Write { .. }));
            if is_change && !is_header && self.may_be_closed(call.started) {
                return (moments.len(), Some(format!("written at {} without the dirty bit", call.started)));
            }
        }
        moments.extend(history.flushes.iter().map(|flush| flush.replied));
        moments.extend(history.events.iter().filter(|event| event.durable).map(|event| event.replied));
        moments.extend(calls.iter().map(|call| call.ended).max());
        let fault =
            moments.iter().filter_map(|time| self.fault(&index, below, *time).map(|fault| (*time, fault))).min();
        (moments.len(), fault.map(|(_, fault)| fault).or_else(|| index.fault_of_reads()))
    }
}
