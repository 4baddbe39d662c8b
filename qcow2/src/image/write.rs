//! Writing: in place where the cluster is ours alone, otherwise into fresh space that becomes visible only when the payload
//! is on its way and every reader finds it there.

use super::flush::Durability;
use super::{Identical, Image};
use crate::buffer::{Buffer, BufferPool};
use crate::error::Result;
use crate::format::entry::{self, L2Entry};
use crate::payload::Piece;
use crate::room::Share;
use crate::sync::try_read;

/// A run of neighbouring guest clusters and the host space that their bytes go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    first: u64,
    clusters: u64,
    host: u64,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The clusters' own space; only the payload is written, no entry changes.
    InPlace,
    /// A kept zero cluster's own space, whose content is stale: the whole cluster is written.
    Stale,
    /// Space that was never used: reads as zeroes where nothing is written.
    Fresh,
}

impl Image {
    /// Writes the bytes at `offset`; any offset, any length.
    ///
    /// # Durability
    /// With [`Durability::OnFlush`] a crash before the next flush may lose the write, sector by sector, but changes no
    /// other byte. The payload may be in memory when this returns; if it then cannot be written, the image is poisoned,
    /// which every later change, the next flush and the close say. An error here poisons too, except for
    /// [`crate::Error::NoSpace`] and for errors while reading what lies around a partial cluster.
    pub fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<()> {
        self.write_from(offset, data.len() as u64, durability, || {
            // Memory that begins at a page, so that it can go around the page cache.
            let mut copy = BufferPool::shared().lend(data.len());
            copy.as_mut().copy_from_slice(data);
            copy
        })
    }

    /// As [`Image::write`], for payload that has its room already ([`Image::room`]).
    pub(crate) fn write_piece(&self, offset: u64, data: &Piece, durability: Durability) -> Result<()> {
        let _operation = self.writing()?;
        self.write_payload(offset, data, durability)
    }

    /// Waits for room for a payload, after a look at the range.
    pub(crate) async fn room(&self, offset: u64, length: u64) -> Result<Share> {
        self.check_range(offset, length)?;
        Ok(self.room.take_as_task(length).await)
    }

    /// Whether a write would find all it needs in memory, so that the thread that asks can do it without waiting for the disk.
    ///
    /// Others may change that before it is done. Then it waits a little: nothing depends on this but speed.
    pub(crate) fn write_is_quick(&self, offset: u64, length: u64) -> bool {
        let Some(_life) = try_read(&self.life) else { return false };
        let is_plain = self.compress.is_none() && self.identical == Identical::Write;
        if !is_plain || length == 0 || !self.session.has_begun() || self.tables.is_crowded() {
            return false;
        }
        let geometry = self.geometry();
        let (first, last) = (geometry.cluster_of(offset), geometry.cluster_of(offset + length - 1));
        if !self.clusters.are_free(first, last) {
            return false;
        }
        // A new cluster that is written in part keeps what reads there now.
        let is_partial = |cluster| {
            let start = geometry.start_of(cluster);
            start < offset || start + geometry.cluster_size() > offset + length
        };
        let mut fresh = 0;
        for (start, part) in geometry.by_table(offset, length) {
            let (first, last) = (geometry.cluster_of(start), geometry.cluster_of(start + part - 1));
            let Ok(table) = self.tables.glance(geometry.l1_index(first)) else { return false };
            for cluster in first..=last {
                let entry = table.as_ref().map_or(Ok(L2Entry::Unallocated), |table| table.entry(cluster));
                match entry {
                    Ok(L2Entry::Data { host, copied: true }) => {
                        let begin = start.max(geometry.start_of(cluster));
                        let end = (geometry.start_of(cluster) + geometry.cluster_size()).min(start + part);
                        if !self.write_behind.is_free(host + geometry.offset_in_cluster(begin), end - begin) {
                            return false;
                        }
                    }
                    Ok(L2Entry::Unallocated) if self.backing.is_none() || !is_partial(cluster) => fresh += 1,
                    Ok(L2Entry::Zero { host: None, .. }) => fresh += 1,
                    _ => return false,
                }
            }
        }
        fresh == 0 || self.allocator.has_ahead(fresh)
    }

    /// Whether the caller should call [`Image::reserve_ahead`], once.
    pub(crate) fn wants_space_ahead(&self) -> bool {
        self.allocator.wants_ahead()
    }

    /// Reserves space for writes to come. Waits for the file system.
    pub(crate) fn reserve_ahead(&self) {
        // The close cuts off what is ahead: not beside it.
        if let Ok(_operation) = self.reading() {
            self.allocator.reserve_ahead(&*self.storage);
        }
    }

    /// Writes `length` bytes that `data` makes once there is room for them.
    fn write_from<B>(&self, offset: u64, length: u64, durability: Durability, data: impl FnOnce() -> B) -> Result<()>
    where
        B: AsRef<[u8]> + Send + Sync + 'static,
    {
        self.check_range(offset, length)?;
        let _operation = self.writing()?;
        let share = self.room.take(length);
        self.write_payload(offset, &Piece::in_room(data(), share), durability)
    }

    fn write_payload(&self, offset: u64, data: &Piece, durability: Durability) -> Result<()> {
        if data.len() == 0 {
            return Ok(());
        }
        let geometry = self.geometry();
        let (first, last) = (geometry.cluster_of(offset), geometry.cluster_of(offset + data.len() - 1));
        let in_place = {
            let _shared = self.clusters.shared(first, last);
            self.write_in_place(offset, data, durability)?
        };
        let durable = match in_place {
            Some(durable) => durable,
            None => {
                let _exclusive = if mutant!("mapping_shares") {
                    self.clusters.shared(first, last)
                } else {
                    self.clusters.exclusive(first, last)
                };
                self.write_mapping(offset, data)?;
                false
            }
        };
        self.settle(durability, durable)
    }

    /// Writes if every cluster of the range can be written in place; `Some(true)`: durably. `None`: nothing was done.
    /// The caller holds the clusters at least shared.
    fn write_in_place(&self, offset: u64, data: &Piece, durability: Durability) -> Result<Option<bool>> {
        let geometry = self.geometry();
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        let mut entries_durable = true;
        for (start, length) in geometry.by_table(offset, data.len()) {
            let (first, last) = (geometry.cluster_of(start), geometry.cluster_of(start + length - 1));
            let Some(table) = self.tables.view(&*self.storage, geometry.l1_index(first))? else { return Ok(None) };
            for cluster in first..=last {
                let L2Entry::Data { host, copied } = table.entry(cluster)? else { return Ok(None) };
                if !copied && !mutant!("shared_in_place") {
                    return Ok(None);
                }
                let begin = start.max(geometry.start_of(cluster));
                let piece = (geometry.start_of(cluster) + geometry.cluster_size()).min(start + length) - begin;
                let at = host + geometry.offset_in_cluster(begin);
                entries_durable &= table.is_durable(cluster) || mutant!("fua_by_memory");
                match pieces.last_mut() {
                    Some((last_at, last_length)) if *last_at + *last_length == at => *last_length += piece,
                    _ => pieces.push((at, piece)),
                }
            }
        }
        // One write that is durable by itself is enough only if the way to it is durable too.
        let durable = durability == Durability::BeforeReply && entries_durable;
        let mut done = 0;
        for (host, length) in pieces {
            let piece = data.part(done, length);
            done += length;
            if durable {
                self.write_behind.write_durable(host, &piece)?;
            } else {
                self.write_behind.put(host, vec![piece])?;
            }
        }
        Ok(Some(durable))
    }

    /// Writes a range some of whose clusters need new space. The caller holds the clusters exclusively.
    pub(super) fn write_mapping(&self, offset: u64, data: &Piece) -> Result<()> {
        let geometry = self.geometry();
        let end = offset + data.len();
        let (first, last) = (geometry.cluster_of(offset), geometry.cluster_of(end - 1));
        let mut done = vec![false; (last - first + 1) as usize];
        self.skip_identical(offset, data.bytes(), &mut done)?;
        let packed = self.pack(offset, data.bytes(), &mut done)?;
        let targets = self.targets(first, &done)?;
        let packed = self.put_packed(packed)?;
        for target in &targets {
            let start = geometry.start_of(target.first).max(offset);
            let stop = geometry.start_of(target.first + target.clusters).min(end);
            if mutant!("published_first") {
                self.publish_target(target)?;
            }
            self.write_target(target, start, data.part(start - offset, stop - start))?;
        }
        targets.iter().try_for_each(|target| self.publish_target(target))?;
        packed.into_iter().try_for_each(|(cluster, raw)| self.publish(cluster, raw))
    }

    /// Changes the entries of clusters whose payload is on its way.
    fn publish_target(&self, target: &Target) -> Result<()> {
        if target.kind == Kind::InPlace {
            return Ok(());
        }
        for index in 0..target.clusters {
            let cluster = target.first + index;
            if mutant!("punched_at_overwrite")
                && let L2Entry::Compressed { host, length } = self.entry(cluster)?
            {
                let _ = self.storage.punch(host, length);
            }
            self.publish(cluster, entry::data(target.host + index * self.cluster_size()))?;
        }
        Ok(())
    }

    /// Decides where each cluster goes and reserves everything, so that a full disk is met before anything changes.
    /// One flag for each cluster from `first` on says whether it is taken care of already.
    fn targets(&self, first: u64, done: &[bool]) -> Result<Vec<Target>> {
        let geometry = self.geometry();
        let mut targets: Vec<Target> = Vec::new();
        for (cluster, _) in (first..).zip(done).filter(|(_, done)| !**done) {
            let (kind, host) = place_of(self.entry(cluster)?);
            match targets.last_mut() {
                Some(run)
                    if run.kind == kind
                        && run.first + run.clusters == cluster
                        && is_next(run, host, geometry.cluster_size()) =>
                {
                    run.clusters += 1;
                }
                _ => targets.push(Target { first: cluster, clusters: 1, host, kind }),
            }
        }
        for target in targets.iter_mut().filter(|target| target.kind == Kind::Fresh) {
            self.make_tables(target.first, target.first + target.clusters - 1)?;
            target.host = self.allocator.allocate(&*self.storage, target.clusters)?;
        }
        Ok(targets)
    }

    /// Makes sure that every cluster of a range has an L2 table.
    pub(super) fn make_tables(&self, first: u64, last: u64) -> Result<()> {
        let geometry = self.geometry();
        for l1_index in geometry.l1_index(first)..=geometry.l1_index(last) {
            if !self.tables.has(l1_index) {
                let host = self.allocator.allocate(&*self.storage, 1)?;
                // If another thread made it meanwhile, this cluster stays unused until the close gives it back.
                self.tables.make(l1_index, host);
            }
        }
        Ok(())
    }

    /// The entry of a guest cluster as it is now.
    pub(super) fn entry(&self, cluster: u64) -> Result<L2Entry> {
        match self.tables.view(&*self.storage, self.geometry().l1_index(cluster))? {
            Some(table) => table.entry(cluster),
            None => Ok(L2Entry::Unallocated),
        }
    }

    /// Changes one entry in memory; its table exists.
    pub(super) fn publish(&self, cluster: u64, raw: u64) -> Result<()> {
        if let Some(mut table) = self.tables.view(&*self.storage, self.geometry().l1_index(cluster))? {
            table.set(cluster, raw);
        }
        Ok(())
    }

    /// Writes a payload and, around it, what the partial first and last cluster must keep: one write, so that nobody ever
    /// finds a cluster half filled.
    fn write_target(&self, target: &Target, start: u64, payload: Piece) -> Result<()> {
        let geometry = self.geometry();
        let begin = geometry.start_of(target.first);
        let end = begin + target.clusters * geometry.cluster_size();
        let stop = start + payload.len();
        let keep = |from: u64, to: u64| match target.kind {
            Kind::InPlace => Ok(None),
            Kind::Stale if mutant!("stale_shows") => Ok(None),
            Kind::Fresh if mutant!("no_filling") => Ok(None),
            Kind::Stale => Ok(self.zeroes(to - from)),
            Kind::Fresh => self.keep(from, to),
        };
        // Around a payload within one cluster: one piece of memory, because that costs one read below and one slice here.
        let is_inside = target.clusters == 1 && begin < start && stop < end;
        if is_inside && let Some(mut whole) = keep(begin, end)? {
            let at = (start - begin) as usize;
            whole.as_mut()[at..at + payload.bytes().len()].copy_from_slice(payload.bytes());
            return self.write_behind.put(target.host, vec![self.filling(whole)]);
        }
        let (head, tail) = if is_inside { (None, None) } else { (keep(begin, start)?, keep(stop, end)?) };
        let host = target.host + (start - begin) - head.as_ref().map_or(0, |head| head.as_ref().len() as u64);
        let filling = |bytes| self.filling(bytes);
        let pieces = [head.map(filling), Some(payload), tail.map(filling)];
        self.write_behind.put(host, pieces.into_iter().flatten().collect())
    }

    /// Bytes that go to the file beside a request's payload.
    pub(super) fn filling(&self, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Piece {
        let share = self.room.add(bytes.as_ref().len() as u64);
        Piece::in_room(bytes, share)
    }

    /// Memory of zeroes that can go around the page cache, unless there are none.
    fn zeroes(&self, length: u64) -> Option<Buffer> {
        let mut zeroes = (length > 0).then(|| BufferPool::shared().lend(length as usize))?;
        zeroes.as_mut().fill(0);
        Some(zeroes)
    }

    /// The bytes of a range that new space must be filled with, zeroes past the end of the disk; `None` where all are zeroes, as
    /// fresh space is.
    fn keep(&self, from: u64, to: u64) -> Result<Option<Buffer>> {
        let end = to.min(self.size());
        if from >= end || self.reads_zero(from, end - from)? {
            return Ok(None);
        }
        let mut bytes = BufferPool::shared().lend((to - from) as usize);
        let (kept, past) = bytes.as_mut().split_at_mut((end - from) as usize);
        self.read_range(from, kept)?;
        past.fill(0);
        Ok(Some(bytes))
    }
}

/// Where the bytes of a cluster with this entry go.
fn place_of(entry: L2Entry) -> (Kind, u64) {
    match entry {
        L2Entry::Data { host, copied: true } => (Kind::InPlace, host),
        L2Entry::Zero { host: Some(host), copied: true } => (Kind::Stale, host),
        _ => (Kind::Fresh, 0),
    }
}

/// Whether a write to a cluster with this entry takes new space.
pub(super) fn needs_space(entry: L2Entry) -> bool {
    place_of(entry).0 == Kind::Fresh
}

/// Whether a cluster at `host` goes on where a run ends. Fresh space has no place yet: it always does.
fn is_next(run: &Target, host: u64, cluster_size: u64) -> bool {
    run.kind == Kind::Fresh || run.host + run.clusters * cluster_size == host
}
