//! Writes that change nothing: clusters that read already as they are to be written are left as they are.

use super::Image;
use crate::error::Result;
use crate::format::entry::L2Entry;
use crate::sync::atomic::Ordering;

/// What becomes of written clusters that read the same already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Identical {
    /// They are written: nothing is read, and the image holds what it was given.
    #[default]
    Write,
    /// A cluster without space of its own in this image (never written, or zeroed) is left so when the bytes written to it,
    /// a part of it or the whole, are what it reads as now, be that from below, from a zero entry, or from nothing.
    ///
    /// The price is that every first write of a cluster reads what lies below it. A write that changed nothing is still
    /// part of the next flush, and [`crate::Durability::BeforeReply`] waits for one: what it found may itself be waiting.
    Skip,
}

impl Image {
    /// Marks in `done`, which has one flag for each cluster that the write touches, those that need no writing. The caller
    /// holds the clusters exclusively, for this and for the writing of the others.
    pub(super) fn skip_identical(&self, offset: u64, data: &[u8], done: &mut [bool]) -> Result<()> {
        if self.identical == Identical::Write {
            return Ok(());
        }
        let geometry = self.geometry();
        let (mut at, mut rest) = (offset, data);
        // Cluster by cluster: the memory for what is read stays small whatever the request.
        let mut now = Vec::new();
        for (cluster, done) in (geometry.cluster_of(offset)..).zip(done) {
            let length = (geometry.cluster_size() - geometry.offset_in_cluster(at)).min(rest.len() as u64);
            let (new, behind) = rest.split_at(length as usize);
            *done = match self.entry(cluster)? {
                L2Entry::Zero { host: None, .. } => new.iter().all(|byte| *byte == 0),
                L2Entry::Unallocated => {
                    now.resize(new.len(), 0);
                    self.read_range(at, &mut now)?;
                    new == now
                }
                _ => false,
            };
            if *done {
                self.identical_bytes.fetch_add(length, Ordering::Relaxed);
            }
            (at, rest) = (at + length, behind);
        }
        Ok(())
    }
}
