//! A hint that a range will be read soon: the storage may fetch it meanwhile.

use super::Image;
use super::read::Source;
use crate::error::Result;

/// Of one hint so much is looked at, from its start on: as much as the largest request that clients usually send.
const PREFETCH_BYTES: u64 = 32 << 20;

impl Image {
    /// Tells the storage that the range will be read soon, as far as it holds data, in this image or a layer below; beyond
    /// the first 32 MiB it is ignored. Waits for tables, not for data.
    ///
    /// Nothing comes of it when that fails, or when the range is not inside the disk: whoever reads will hear of it.
    pub fn prefetch(&self, offset: u64, length: u64) {
        let _ = self.try_prefetch(offset, length.min(PREFETCH_BYTES));
    }

    fn try_prefetch(&self, offset: u64, length: u64) -> Result<()> {
        let _operation = self.reading()?;
        self.check_range(offset, length)?;
        for (start, piece) in self.geometry().by_table(offset, length) {
            for run in self.runs(start, piece)? {
                match (run.source, &self.backing) {
                    (Source::Host(host), _) => self.storage.prefetch(host, run.length),
                    (Source::Compressed { host, length }, _) => self.storage.prefetch(host, length),
                    (Source::Below, Some(layer)) => layer.prefetch(run.offset, run.length),
                    (Source::Zero { .. }, _) | (Source::Below, None) => {}
                }
            }
        }
        Ok(())
    }
}
