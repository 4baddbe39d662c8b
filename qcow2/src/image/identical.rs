//! Writes that change nothing: clusters that read already as they are to be written are left as they are.

use super::Image;
use crate::error::Result;
use crate::format::entry::L2Entry;

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

/// Bytes compared at a time, in whole clusters: bounds the memory of a request.
const STEP: u64 = 1 << 20;

impl Image {
    /// Marks in `done`, which has one flag for each cluster that the write touches, those that need no writing. The caller
    /// holds the clusters exclusively, for this and for the writing of the others.
    pub(super) fn skip_identical(&self, offset: u64, data: &[u8], done: &mut [bool]) -> Result<()> {
        if self.identical == Identical::Write {
            return Ok(());
        }
        let geometry = self.geometry();
        let end = offset + data.len() as u64;
        let step = STEP.max(geometry.cluster_size());
        let mut index = 0;
        let mut below = Vec::new();
        let mut from = offset;
        while from < end {
            let to = (from / step * step + step).min(end);
            let clusters = (geometry.cluster_of(to - 1) - geometry.cluster_of(from) + 1) as usize;
            let mut bare = Vec::with_capacity(clusters);
            for cluster in geometry.cluster_of(from)..=geometry.cluster_of(to - 1) {
                bare.push(matches!(self.entry(cluster)?, L2Entry::Unallocated | L2Entry::Zero { host: None, .. }));
            }
            if bare.contains(&true) {
                below.resize((to - from) as usize, 0);
                self.read_range(from, &mut below)?;
                let mut at = from;
                for (bare, done) in bare.iter().zip(done.iter_mut().skip(index)) {
                    let stop = geometry.start_of(geometry.cluster_of(at) + 1).min(to);
                    let (new, now) = (
                        (at - offset) as usize..(stop - offset) as usize,
                        (at - from) as usize..(stop - from) as usize,
                    );
                    *done = *bare && data.get(new) == below.get(now);
                    at = stop;
                }
            }
            index += clusters;
            from = to;
        }
        Ok(())
    }
}
