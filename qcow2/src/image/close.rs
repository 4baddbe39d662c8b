//! Closing: the end of a session. Refcounts are set, the dirty bit goes, and only then is unused space given back.

use std::io::IoSlice;
use std::sync::atomic::Ordering;

use super::Image;
use super::session::put64;
use crate::backing::Layer;
use crate::check::{self, CheckReport};
use crate::error::{Error, Result};
use crate::format::header::{DIRTY, field};
use crate::lock::Access;
use crate::refcounts::{self, RefcountTable};
use crate::references;
use crate::sync::lock;

impl Image {
    /// Waits for running operations, writes all metadata, clears the dirty bit, and gives up the locks. Every later
    /// operation fails with [`Error::Closed`]; closing again does nothing.
    ///
    /// # Durability
    /// On success the image is complete on stable storage, and a check finds no error and no leak. On an error (a poisoned
    /// image, a full disk) the dirty bit stays: what was flushed is there, and the image can be opened again.
    pub fn close(&self) -> Result<()> {
        let _life = self.life.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let finished = if self.access == Access::ReadWrite { self.finish() } else { Ok(()) };
        self.unlock();
        finished
    }

    /// Checks the image as it is on disk, also after the close, through the same open file.
    pub fn check(&self) -> Result<CheckReport> {
        check::check_storage(&*self.storage)
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
        if !self.session.has_begun() && !rebuild {
            return self.refuse_poisoned();
        }
        // A dirty image that nobody wrote to is made whole all the same.
        self.session_for_close()?;
        self.flush_changes()?;
        self.set_refcounts(rebuild).map_err(|error| self.poison_by(error))
    }

    fn set_refcounts(&self, rebuild: bool) -> Result<()> {
        let (storage, geometry) = (&*self.storage, self.geometry());
        let cluster = geometry.cluster_size();
        // After a crash the old structures may say anything; new ones are made, and the old ones become free space.
        let table = if rebuild { None } else { Some(RefcountTable::load(storage, &self.header)?) };
        let mut found = references::count(storage, &self.header, table.as_ref())?;
        found.faults.refuse()?;
        let width = self.header.refcount_width;
        let table = table.unwrap_or_default();
        let (table, end) = refcounts::set(storage, geometry, width, table, &mut found.counts, self.allocator.end())?;
        storage.set_length(end).map_err(Error::io("ftruncate", end))?;
        // B3: what the header is going to vouch for is durable.
        storage.sync_data().map_err(Error::io("fdatasync", 0))?;

        let mut sector = lock(&self.session.sector);
        put64(&mut sector, field::REFCOUNT_TABLE_OFFSET, table.offset);
        let at = field::REFCOUNT_TABLE_CLUSTERS;
        sector[at..at + 4].copy_from_slice(&(table.clusters as u32).to_be_bytes());
        put64(&mut sector, field::INCOMPATIBLE, self.header.incompatible & !DIRTY);
        storage.write(0, &mut [IoSlice::new(&sector[..])]).map_err(Error::io("write", 0))?;
        // B4: the image is whole.
        storage.sync_data().map_err(Error::io("fdatasync", 0))?;

        for (first, stop) in found.counts.unused_runs(end / cluster) {
            // Best effort: a file system that cannot punch keeps the space, nothing else depends on it.
            if storage.punch(first * cluster, (stop - first) * cluster).is_err() {
                break;
            }
        }
        Ok(())
    }
}
