//! All disks are sealed: the manifest, one rename, one transaction. Before the rename the job can still fail; after it the
//! restore point exists and the job only goes forward, however often a step must be repeated.

use std::io;
use std::time::Duration;

use serde_json::json;

use super::ending::{End, Failed};
use super::job::{Job, RunningDisk};
use super::prepare::storage;
use crate::clock::UtcTime;
use crate::repository::directory;
use crate::repository::layout::{self, BackupPaths};
use crate::repository::manifest::{FORMAT, Manifest, ManifestDisk, ManifestVm};
use crate::store::backups::{self, Change, ChangeError};
use crate::store::events::{self, Actor};
use crate::store::points::{self, NewPoint, PointDiskRow};
use crate::store::{Store, StoreError, leases};
use crate::words::point::Trust;
use crate::words::{FailureCode, JobResult, JobState};

/// The first pause before a step is repeated; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);
/// A guess: a person who has repaired a disk or a database should not wait long for the job to notice.
const PAUSE_MAX: Duration = Duration::from_secs(5);

impl Job {
    /// Publishes the restore point and ends the job. On an error nothing was published.
    pub(super) async fn commit(&mut self) -> Result<(), End> {
        self.refuse_failed_disks()?;
        let findings = self.findings();
        if !findings.is_empty() {
            // Before the rename, so that a restart that rolls forward knows them too.
            self.add_warnings(&findings).await?;
            self.alert_zeroes(&findings).await?;
        }
        self.advance(JobState::Committing, Actor::Service).await?;
        let manifest = Box::pin(self.manifest()).await?;
        let bytes = manifest.encode().map_err(|error| storage(&error.into()))?;
        let paths = self.facts.paths.clone();
        self.work
            .run(move || directory::finish_staged(&paths, &bytes))
            .await
            .map_err(|error: io::Error| storage(&error))?;
        // The last moment at which a late write can be seen and believed.
        self.refuse_failed_disks()?;
        let (paths, id) = (self.facts.paths.clone(), self.facts.id.clone());
        let published = self.work.run(move || publish(&paths, &id)).await;
        published.map_err(|error: io::Error| storage(&error))?;
        self.forward(&manifest).await;
        Ok(())
    }

    /// What follows the rename. Nothing here is ever undone.
    async fn forward(&mut self, manifest: &Manifest) {
        let id = self.facts.id.clone();
        let mut pause = PAUSE;
        loop {
            let paths = self.facts.paths.clone();
            match self.work.run(move || directory::sync_published(&paths)).await {
                Ok(()) => break,
                Err::<(), io::Error>(error) => {
                    tracing::error!(job_id = %id, %error, "the published directory is not durable yet; trying again");
                }
            }
            rest(&mut pause).await;
        }
        // Given back before anyone can see that the job is over.
        let answer = self.completer.take().map(|completer| {
            let change_id = self.change_id_of(completer.disk_id);
            (completer.reply, self.sealed_answer(completer.disk_id, change_id))
        });
        self.close_listeners(Duration::ZERO).await;
        self.disks.clear();
        self.slot = None;
        let mut pause = PAUSE;
        let result = loop {
            match record(&self.shared.store, manifest, &self.facts.paths).await {
                Ok(result) => break result,
                Err(error) => {
                    tracing::error!(job_id = %id, %error, "the restore point is published but not recorded; trying again");
                }
            }
            rest(&mut pause).await;
        };
        self.view.send_modify(|view| {
            view.state = JobState::Committed;
            view.result = result;
        });
        tracing::info!(job_id = %id, %result, "backup committed");
        self.presence = None;
        if let Some((reply, answer)) = answer {
            // A client that hung up has nothing to be told.
            let _ = reply.send(Ok(answer));
        }
        if let Err(error) = self.alert_low_space().await {
            tracing::warn!(job_id = %id, error = &error as &dyn std::error::Error, "an alert could not be raised");
        }
    }

    /// Tells, once a day and repository, that it will soon be too full for backups. Nobody waits for this.
    async fn alert_low_space(&mut self) -> Result<(), StoreError> {
        let repository = &self.facts.repository;
        let min_free_bytes = self.shared.config.storage.min_free_bytes;
        let path = self.facts.paths.repository.clone();
        let space = self.work.run(move || directory::space(&path)).await;
        let Ok::<_, io::Error>((free_bytes, _)) = space else { return Ok(()) };
        if free_bytes >= min_free_bytes.saturating_mul(2) {
            return Ok(());
        }
        let mut transaction = self.shared.store.write().await?;
        let subject = repository.id.as_str();
        let now = UtcTime::now();
        let last = events::last_alert(&mut transaction, subject, SPACE_LOW).await?;
        if last.is_some_and(|last| now.seconds_since(last) < DAY_S) {
            return Ok(());
        }
        let data = json!({
            "alert": SPACE_LOW, "repository_id": repository.id, "free_bytes": free_bytes,
            "min_free_bytes": min_free_bytes,
            "detail": "The repository has less than twice the space left that backups must leave free.",
        });
        events::append(&mut transaction, "alert", subject, &data, Actor::Service, now).await?;
        transaction.commit().await
    }

    fn change_id_of(&self, disk_id: u32) -> Option<String> {
        let running = self.disks.iter().find(|running| running.disk.plan.disk_id == disk_id)?;
        running.sealed.as_ref()?.change_id.clone()
    }

    /// What the operator must know about the restore point.
    fn findings(&self) -> Vec<String> {
        let of_disks =
            self.disks.iter().filter_map(|running| running.sealed.as_ref()).flat_map(|sealed| sealed.warnings.clone());
        of_disks.chain(same_heads(&self.disks)).collect()
    }

    /// The backup client may have erased data: a person must look before older points go.
    async fn alert_zeroes(&self, findings: &[String]) -> Result<(), Failed> {
        let suspect: Vec<&String> = findings.iter().filter(|finding| finding.starts_with(SUSPECT_ZEROES)).collect();
        if suspect.is_empty() {
            return Ok(());
        }
        let (id, vm) = (&self.facts.id, &self.facts.vm);
        tracing::warn!(job_id = %id, ?suspect, "zeroes were sent for what was data");
        let data = json!({
            "alert": SUSPECT_ZEROES, "job_id": id, "vm_context_id": vm.id, "vm_name": vm.name, "found": suspect,
            "detail": "The backup client judges large chunks by samples and may have sent zeroes for data. Compare the disk \
                       with its last restore point before that goes.",
        });
        let mut transaction = self.shared.store.write().await?;
        events::append(&mut transaction, "alert", id.as_str(), &data, Actor::Service, UtcTime::now()).await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn manifest(&mut self) -> Result<Manifest, Failed> {
        let mut disks = Vec::with_capacity(self.disks.len());
        for index in 0..self.disks.len() {
            let path = self.facts.paths.staged_image(self.disks[index].disk.plan.disk_id);
            let file_bytes = self.work.run(move || directory::file_bytes(&path)).await;
            let file_bytes = file_bytes.map_err(|error: io::Error| storage(&error))?;
            disks.push(manifest_disk(&self.disks[index], file_bytes)?);
        }
        let facts = &self.facts;
        Ok(Manifest {
            readme: Manifest::readme_for(&disks),
            format: FORMAT,
            backup_id: facts.id.clone(),
            repository_id: facts.repository.id.clone(),
            vm: ManifestVm {
                id: facts.vm.id.clone(),
                name: facts.vm.name.clone(),
                vcenter: facts.vm.vcenter.clone(),
                path: facts.vm.path.clone(),
                uuid: facts.vm.uuid.clone(),
            },
            created_at: facts.created_at,
            committed_at: UtcTime::now(),
            requested_type: facts.requested_type,
            backup_type: facts.backup_type,
            tags: facts.tags.clone(),
            service_version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: 0,
            merged: Vec::new(),
            received: Manifest::received_root(&disks),
            disks,
        })
    }
}

/// The beginnings of warnings that are about the restore point and not about the request.
const FINDINGS: [&str; 3] = [COVERAGE_INCOMPLETE, SAME_FIRST_MIB, SUSPECT_ZEROES];
/// A full image was committed without all of its bytes, as the configuration allows.
pub(super) const COVERAGE_INCOMPLETE: &str = FailureCode::CoverageIncomplete.as_str();
const SAME_FIRST_MIB: &str = "same_first_mib";
/// A full copy sent zeroes for what was data before.
pub(super) const SUSPECT_ZEROES: &str = "suspect_zeroes";
/// The alert that a repository will soon be too full.
const SPACE_LOW: &str = "space_low";
const DAY_S: f64 = 86_400.0;

fn manifest_disk(running: &RunningDisk, file_bytes: u64) -> Result<ManifestDisk, Failed> {
    let plan = &running.disk.plan;
    let Some(sealed) = &running.sealed else {
        return Err(Failed::new(FailureCode::ImageFailed, format!("disk {} is not sealed", plan.disk_id)));
    };
    let reading = running.export.meter().reading();
    let (coverage, received) = running.export.meter().received().unzip();
    Ok(ManifestDisk {
        disk_id: plan.disk_id,
        device_key: plan.device_key,
        vmdk_uuid: plan.vmdk_uuid.clone(),
        vmdk_path: plan.vmdk_path.clone(),
        size_bytes: plan.size_bytes,
        file: layout::image_file_name(plan.disk_id),
        file_bytes,
        backup_type: plan.backup_type(),
        effective_type: sealed.effective_type.clone(),
        reason: plan.reason,
        change_id: sealed.change_id.clone(),
        from_change_id: plan.parent.as_ref().map(|parent| parent.change_id.clone()),
        parent_id: plan.parent.as_ref().map(|parent| parent.point_id.clone()),
        chain_depth: plan.chain_depth(),
        written_bytes: reading.written_bytes,
        zeroed_bytes: reading.zeroed_bytes,
        zeroed_over_data_bytes: reading.zeroed_over_data_bytes,
        identical_bytes: reading.identical_bytes,
        coverage: coverage.unwrap_or_default(),
        received,
    })
}

/// Two disks that begin with the same data: perhaps one was written twice and the other never.
fn same_heads(disks: &[RunningDisk]) -> Vec<String> {
    let head = |running: &RunningDisk| running.sealed.as_ref().and_then(|sealed| sealed.head);
    let mut warnings = Vec::new();
    for (index, first) in disks.iter().enumerate() {
        for second in disks.iter().skip(index + 1) {
            if head(first).is_some() && head(first) == head(second) {
                let (first, second) = (first.disk.plan.disk_id, second.disk.plan.disk_id);
                warnings.push(format!("{SAME_FIRST_MIB}: disks {first} and {second} begin with the same data"));
            }
        }
    }
    warnings
}

/// The rename; one that happened although it was reported as failed counts as done.
fn publish(paths: &BackupPaths, id: &crate::id::BackupId) -> io::Result<()> {
    match directory::publish(paths) {
        Ok(()) => Ok(()),
        Err(error) => match directory::load_published(paths, id) {
            Ok(Some(_)) if !paths.staged.exists() => Ok(()),
            _ => Err(error),
        },
    }
}

/// The last transaction: the point, its disks, the job committed, its leases gone. Repeatable until it succeeds, and
/// done by a restart for a job that died between the rename and here.
pub(super) async fn record(store: &Store, manifest: &Manifest, paths: &BackupPaths) -> Result<JobResult, ChangeError> {
    let id = &manifest.backup_id;
    let mut transaction = store.write().await?;
    let row = backups::load(&mut transaction, id).await?;
    if row.state == JobState::Committed {
        return Ok(row.result);
    }
    let found = |finding: &str| row.warnings.iter().any(|warning| warning.starts_with(finding));
    let result = if FINDINGS.into_iter().any(found) { JobResult::Warning } else { JobResult::Success };
    // What a full lacks, every incremental on it would lack, without a word.
    let trust = if found(COVERAGE_INCOMPLETE) { Trust::Suspect } else { Trust::Unverified };
    let disks: Vec<PointDiskRow> = manifest.disks.iter().map(point_disk).collect();
    let directory_name = paths.published.strip_prefix(&paths.repository).unwrap_or(&paths.published);
    let point = NewPoint {
        id,
        vm_id: &manifest.vm.id,
        repository_id: &manifest.repository_id,
        dir: &directory_name.to_string_lossy(),
        trust,
        committed_at: manifest.committed_at,
        generation: manifest.generation,
        disks: &disks,
    };
    points::insert(&mut transaction, &point).await?;
    let change = Change {
        id,
        vm_id: &manifest.vm.id,
        from: row.state,
        to: JobState::Committed,
        result,
        code: None,
        message: None,
        by: Actor::Service,
    };
    backups::change_state(&mut transaction, &change).await?;
    leases::release_all(&mut transaction, id.as_str()).await?;
    transaction.commit().await?;
    Ok(result)
}

/// A disk of a point as the database keeps it.
pub(crate) fn point_disk(disk: &ManifestDisk) -> PointDiskRow {
    PointDiskRow {
        disk_id: disk.disk_id,
        device_key: disk.device_key,
        vmdk_uuid: disk.vmdk_uuid.clone(),
        vmdk_path: disk.vmdk_path.clone(),
        size_bytes: disk.size_bytes,
        backup_type: disk.backup_type,
        file: disk.file.clone(),
        file_bytes: disk.file_bytes,
        change_id: disk.change_id.clone(),
        parent_id: disk.parent_id.clone(),
        chain_depth: disk.chain_depth,
        effective_type: Some(disk.effective_type.clone()),
        from_change_id: disk.from_change_id.clone(),
        identical_bytes: Some(disk.identical_bytes),
        digest: None,
        content_digest: None,
    }
}

/// Waits before a step is repeated, longer each time.
pub(super) async fn rest(pause: &mut Duration) {
    tokio::time::sleep(*pause).await;
    *pause = (*pause * 2).min(PAUSE_MAX);
}

/// The first pause of [`rest`].
pub(super) fn first_pause() -> Duration {
    PAUSE
}
