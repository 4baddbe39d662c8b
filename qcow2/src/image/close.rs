//! Closing: the end of a session. Refcounts are set, the dirty bit goes, and only then is unused space given back.

use super::Image;
use crate::backing::Layer;
use crate::check::{self, CheckReport};
use crate::error::Result;
use crate::finish::finish;
use crate::lock::Access;
use crate::refcounts::RefcountTable;
use crate::references;
use crate::repair;
use crate::sync::lock;

impl Image {
    /// Waits for running operations, writes all metadata, clears the dirty bit, and gives up the locks. Every later
    /// operation fails with [`crate::Error::Closed`]; closing again does nothing, whatever became of the first time.
    ///
    /// # Durability
    /// On success the image is complete on stable storage, and a check finds no error and no leak. On an error (a poisoned
    /// image, a full disk) the dirty bit stays: what was flushed is there, and the image can be opened again.
    pub fn close(&self) -> Result<()> {
        let Some(_operation) = self.closing() else { return Ok(()) };
        let finished = if self.access == Access::ReadWrite { self.finish() } else { Ok(()) };
        if !mutant!("unlocked_too_early") {
            self.write_behind.stop();
        }
        self.unlock();
        finished
    }

    /// Checks the image as it is on disk, also after the close, through the same open file. Between the first change and the
    /// close it is dirty there, and its refcounts mean nothing.
    pub fn check(&self) -> Result<CheckReport> {
        check::check_on(&*self.storage)
    }

    fn unlock(&self) {
        self.storage.unlock();
        match &self.backing {
            Some(Layer::Image(image)) => image.unlock(),
            Some(Layer::Raw { storage, .. }) => storage.unlock(),
            None => {}
        }
    }

    fn finish(&self) -> Result<()> {
        let rebuild = self.header.is_dirty();
        if mutant!("clean_when_poisoned") && self.poison().is_some() {
            return self.set_refcounts(rebuild);
        }
        if !self.session.has_begun() && !rebuild {
            return self.refuse_poisoned();
        }
        // A dirty image that nobody wrote to is made whole all the same.
        self.session_alone()?;
        self.flush_changes()?;
        // A write that failed midway may have left payload that no change counts: nobody may write it past the end later.
        self.write_behind.drain(self.write_behind.last_id())?;
        self.set_refcounts(rebuild).map_err(|error| self.poison.by(error))
    }

    fn set_refcounts(&self, rebuild: bool) -> Result<()> {
        let (storage, header) = (&*self.storage, self.current_header());
        // After a crash the old structures may say anything; new ones are made, and the old ones become free space.
        let table = if rebuild { None } else { Some(RefcountTable::load(storage, &header)?) };
        let mut found = references::count(storage, &header, table.as_ref())?;
        let needs_copied_bits = found.lacks_copied_bits();
        found.faults.refuse()?;
        if needs_copied_bits {
            // Entries shared a cluster, and one of them was given another: what is left to the last owner is its own.
            repair::set_copied_bits(storage, &header, &found.counts)?;
        }
        let (table, end) = (table.unwrap_or_default(), self.allocator.end());
        finish(storage, &header, &mut lock(&self.session.sector), table, &mut found.counts, end)
    }
}
