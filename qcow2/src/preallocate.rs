//! The body of a new image whose clusters all have their place from the start: L1, then all L2 tables, then the data, each in
//! one run. Refcounts and header are the creator's business (`create`).

use std::io::IoSlice;

use crate::create::Preallocation;
use crate::error::{Error, Result};
use crate::format::entry;
use crate::geometry::{ENTRY, Geometry};
use crate::storage::{Reservation, Storage};

/// Zeroes written in one go.
const PIECE: u64 = 1 << 20;

/// Where things lie, in host bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    l1: u64,
    l2: u64,
    data: u64,
    /// End of the data.
    pub(crate) end: u64,
}

impl Layout {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let cluster = geometry.cluster_size();
        // A disk of size 0 has a table of one entry all the same.
        let l2 = cluster + geometry.round_up(geometry.l1_entries().max(1) * ENTRY);
        let data = l2 + geometry.l1_entries() * cluster;
        Self { l1: cluster, l2, data, end: data + geometry.clusters() * cluster }
    }
}

/// Writes the tables and prepares the data's space as asked for; returns the end of it all.
pub(crate) fn preallocate(storage: &dyn Storage, geometry: Geometry, preallocation: Preallocation) -> Result<u64> {
    let layout = Layout::new(geometry);
    let cluster = geometry.cluster_size();
    let write = |offset: u64, bytes: &[u8]| {
        storage.write(offset, &mut [IoSlice::new(bytes)]).map_err(Error::io("write", offset))
    };
    if matches!(preallocation, Preallocation::Falloc | Preallocation::Full) {
        // First, so that a disk that is too small is found before anything is written.
        let (offset, length) = (layout.data, layout.end - layout.data);
        let reservation = if length == 0 { Ok(Reservation::Done) } else { storage.reserve(offset, length) };
        match reservation {
            Ok(Reservation::Unsupported) if preallocation == Preallocation::Falloc => {
                return Err(Error::unsupported("preallocation by fallocate: the file system cannot reserve space"));
            }
            Ok(_) => {}
            Err(source) => {
                let error = Error::Io { operation: "fallocate", offset, source };
                return Err(if error.is_no_space() { Error::NoSpace { offset, length } } else { error });
            }
        }
    }
    let hosts = |first: u64, count: u64| (0..count).map(move |index| first + index * cluster);
    let l1: Vec<u8> =
        hosts(layout.l2, geometry.l1_entries()).flat_map(|host| entry::encode_l1(host).to_be_bytes()).collect();
    write(layout.l1, &l1)?;
    for index in 0..geometry.l1_entries() {
        let first = index * geometry.l2_entries();
        let count = geometry.l2_entries().min(geometry.clusters() - first);
        let table: Vec<u8> =
            hosts(layout.data + first * cluster, count).flat_map(|host| entry::data(host).to_be_bytes()).collect();
        write(layout.l2 + index * cluster, &table)?;
    }
    if preallocation == Preallocation::Full {
        let zeroes = vec![0; PIECE.min(layout.end - layout.data) as usize];
        for offset in (layout.data..layout.end).step_by(PIECE as usize) {
            write(offset, &zeroes[..PIECE.min(layout.end - offset) as usize])?;
        }
    }
    Ok(layout.end)
}
