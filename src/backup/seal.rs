//! The durability barrier of one disk: nobody writes any more, every byte is there, the image is closed and sound.
//!
//! Only then is the disk sealed, in one transaction. What fails here fails the whole job, because half a VM is worth
//! nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use blockyard_qcow2 as qcow2;
use sha2::{Digest, Sha256};

use super::commit::{COVERAGE_INCOMPLETE, SUSPECT_ZEROES};
use super::ending::{End, Failed};
use super::job::{Job, SealedDisk, observed};
use super::prepare::{backing, image_failure};
use crate::config::CoverageFull;
use crate::export::erased::{Erased, erased};
use crate::store::backups::{self, DiskUpdate};
use crate::store::events::Actor;
use crate::words::{DiskState, FailureCode};

/// How much of a disk's beginning is compared with the other disks': its partition table and what follows.
const HEAD_BYTES: u64 = 1 << 20;
/// How much of the last restore point is read to see that what became zero was zero before. A guess: seconds on any disk, while the
/// client waits; where more was zeroed, a person may look.
const ERASED_READ_MAX: u64 = 256 << 20;
const GIB: u64 = 1 << 30;

impl Job {
    /// Seals the disk at `index` of the job's disks.
    pub(super) async fn seal(&mut self, index: usize, change_id: Option<String>) -> Result<(), End> {
        let written = self.disks[index].export.meter().reading().written_bytes;
        let limit = Duration::from_secs(self.shared.config.jobs.seal_s + written.div_ceil(GIB));
        match tokio::time::timeout(limit, Box::pin(self.seal_in_time(index, change_id))).await {
            Ok(sealed) => Ok(sealed?),
            Err(_) => {
                let message = format!("a disk could not be made durable within {} s", limit.as_secs());
                let disk_id = self.disks[index].disk.plan.disk_id;
                Err(Failed::new(FailureCode::SealTimeout, message).by(Actor::Clock).at_disk(disk_id).into())
            }
        }
    }

    async fn seal_in_time(&mut self, index: usize, change_id: Option<String>) -> Result<(), Failed> {
        let disk_id = self.disks[index].disk.plan.disk_id;
        let at_disk = |failed: Failed| failed.at_disk(disk_id);
        self.store_disk(index, DiskState::Draining, None).await?;
        let export = self.disks[index].export.clone();
        export.refuse();
        export.drained().await;
        self.refuse_failed_disks()?;

        let (effective_type, finding) = self.prove_coverage(index, change_id.as_deref()).map_err(at_disk)?;
        let warnings = finding.into_iter().chain(self.suspect_zeroes(index, effective_type).await).collect();
        let head = head(&export, disk_id).await.map_err(at_disk)?;
        let image = export.image();
        let closed = image.close().await;
        closed.map_err(|error| at_disk(image_failure("an image could not be made durable", &error)))?;
        self.check_image(index).await.map_err(at_disk)?;
        // A write that came while the image was being closed was refused, and means that the client was not done.
        self.refuse_failed_disks()?;

        let sealed = SealedDisk { change_id, effective_type: effective_type.to_owned(), head, warnings };
        self.store_disk(index, DiskState::Sealed, Some(&sealed)).await?;
        if let Some(live) = self.handle.live().get(index) {
            live.sealed.store(true, Ordering::Release);
        }
        tracing::info!(job_id = %self.facts.id, disk_id, "disk sealed");
        self.disks[index].sealed = Some(sealed);
        Ok(())
    }

    /// What the image is by the bytes that came, and what the operator must know about that.
    ///
    /// A full image must have received every byte, or it is a delta that calls itself full. An overlay must have received every
    /// byte or a delta since its parent, and there is none across a gap in change tracking.
    fn prove_coverage(&self, index: usize, change_id: Option<&str>) -> Result<(&'static str, Option<String>), Failed> {
        let running = &self.disks[index];
        let (disk_id, size) = (running.disk.plan.disk_id, running.disk.plan.size_bytes);
        let coverage = running.export.meter().coverage();
        if let Some(parent) = &running.disk.plan.parent {
            if coverage.is_whole(size) {
                return Ok(("full_copy_into_overlay", None));
            }
            if change_id.map(epoch) == Some(epoch(&parent.change_id)) {
                return Ok(("incremental", None));
            }
            let message = format!(
                "disk {disk_id} was completed with {} of {size} bytes and a change id that does not continue that of {}",
                coverage.covered_bytes(),
                parent.point_id
            );
            return Err(Failed::new(FailureCode::EpochMismatch, message).by(Actor::Client));
        }
        if coverage.is_whole(size) {
            return Ok(("full", None));
        }
        let (offset, length) = coverage.first_gap(size).unwrap_or((size, 0));
        let message = format!(
            "disk {disk_id} was completed with {} of {size} bytes; the first {length} bytes missing are at offset {offset}",
            coverage.covered_bytes()
        );
        match self.shared.config.storage.coverage_full {
            CoverageFull::Require => Err(Failed::new(FailureCode::CoverageIncomplete, message).by(Actor::Client)),
            CoverageFull::Warn => Ok(("full", Some(format!("{COVERAGE_INCOMPLETE}: {message}")))),
        }
    }

    /// A full copy that zeroed what was data before: the guest may have erased it, or the client judged it by samples. Zeroes over
    /// what was nothing but zeroes are neither.
    async fn suspect_zeroes(&self, index: usize, effective_type: &str) -> Option<String> {
        let running = &self.disks[index];
        let bytes = running.export.meter().reading().zeroed_over_data_bytes;
        if bytes == 0 || effective_type == "incremental" {
            return None;
        }
        let disk_id = running.disk.plan.disk_id;
        match erased(running.export.image(), running.export.known()?, ERASED_READ_MAX).await {
            Ok(Erased::Nothing) => return None,
            Ok(Erased::Something(_) | Erased::Unknown) => {}
            // Nothing says that it was zero.
            Err(error) => tracing::warn!(job_id = %self.facts.id, disk_id, %error, "zeroes cannot be judged"),
        }
        Some(format!(
            "{SUSPECT_ZEROES}: disk {disk_id}: {bytes} bytes that the last restore point has data for were sent as zeroes"
        ))
    }

    /// The image as it lies on disk now: no error, no leak, the right size, its parent below it and nothing else.
    async fn check_image(&mut self, index: usize) -> Result<(), Failed> {
        let plan = &self.disks[index].disk.plan;
        let (disk_id, size, below) = (plan.disk_id, plan.size_bytes, plan.parent.as_ref().map(backing));
        let path = self.facts.paths.staged_image(disk_id);
        let report = self.disks[index].export.image().check().await;
        let report = report.map_err(|error| image_failure("an image could not be checked", &error))?;
        if !report.is_clean() {
            tracing::error!(job_id = %self.facts.id, disk_id, ?report, "the structure check failed");
            let found = format!("{} errors and {} leaks", report.errors, report.leaks);
            return Err(Failed::new(FailureCode::ImageFailed, format!("disk {disk_id}: the image has {found}")));
        }
        let info = self.work.run(move || qcow2::info(&path).map_err(std::io::Error::other)).await;
        let info = info.map_err(|error: std::io::Error| {
            tracing::error!(%error, "an image could not be read back");
            Failed::new(FailureCode::ImageFailed, format!("disk {disk_id}: the image cannot be read back"))
        })?;
        if info.size != size || info.backing != below {
            return Err(Failed::new(
                FailureCode::ImageFailed,
                format!("disk {disk_id}: the image has {} bytes instead of {size}, or another backing file", info.size),
            ));
        }
        Ok(())
    }

    /// Stores where a disk is, with everything that was measured.
    pub(super) async fn store_disk(
        &self,
        index: usize,
        state: DiskState,
        sealed: Option<&SealedDisk>,
    ) -> Result<(), Failed> {
        let running = &self.disks[index];
        let reading = running.export.meter().reading();
        let mut transaction = self.store().write().await?;
        let update = DiskUpdate {
            disk_id: running.disk.plan.disk_id,
            state,
            measured: Some(reading),
            effective_type: sealed.map(|sealed| sealed.effective_type.as_str()),
            change_id: sealed.and_then(|sealed| sealed.change_id.as_deref()),
        };
        if state == DiskState::Draining {
            self.note_disk(&mut transaction, index, observed(&reading)).await?;
        }
        backups::update_disk(&mut transaction, &self.facts.id, &update).await?;
        transaction.commit().await?;
        Ok(())
    }
}

/// The part of a change id that names the history it belongs to.
fn epoch(change_id: &str) -> &str {
    change_id.split('/').next().unwrap_or_default()
}

/// The digest of the first MiB of a disk, or nothing when that is all zero.
async fn head(export: &crate::export::ImageExport, disk_id: u32) -> Result<Option<[u8; 32]>, Failed> {
    let length = usize::try_from(export.image().size().min(HEAD_BYTES)).unwrap_or(0);
    let bytes = export
        .image()
        .read(0, vec![0_u8; length])
        .await
        .map_err(|error| image_failure(&format!("disk {disk_id}: the image cannot be read back"), &error))?;
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    Ok(Some(Sha256::digest(&bytes).into()))
}
