//! Making a job ready for its client: staged directory, images, listeners. Then one transaction says so, and that the node
//! is about to be called.

use std::io;
use std::path::Path;
use std::time::Duration;

use blockyard_qcow2::{self as qcow2, AsyncImage, CreateOptions, OpenOptions};

use super::ending::{End, Failed};
use super::job::{Job, LiveDisk, RunningDisk};
use super::noted::Noted;
use super::plan::Parent;
use crate::export::ImageExport;
use crate::listeners::DiskListener;
use crate::listeners::live::ServedDisk;
use crate::repository::directory;
use crate::store::backups::{self, Change, DiskUpdate, NodeOutcome};
use crate::store::events::Actor;
use crate::words::{DiskState, FailureCode, JobResult, JobState};

/// Memory for the tables of an older state of a disk: one table of 64 KiB maps 512 MiB, and clients go through a disk in a few
/// places at once.
const KNOWN_CACHE_BYTES: usize = 1 << 20;

impl Job {
    /// Brings the job from accepted to starting.
    pub(super) async fn prepare(&mut self) -> Result<(), End> {
        let limit = Duration::from_secs(self.shared.config.jobs.prepare_s);
        match tokio::time::timeout(limit, Box::pin(self.make_ready())).await {
            Ok(done) => done,
            Err(_) => Err(Failed::new(
                FailureCode::PrepareTimeout,
                format!("ports, images and listeners were not ready within {} s", limit.as_secs()),
            )
            .by(Actor::Clock)
            .into()),
        }
    }

    async fn make_ready(&mut self) -> Result<(), End> {
        self.advance(JobState::Preparing, Actor::Service).await?;
        let paths = self.facts.paths.clone();
        self.work.run(move || directory::create_staged(&paths)).await.map_err(|error: io::Error| storage(&error))?;
        let images = self.create_images().await?;
        self.serve(images)?;
        self.persist().await?;
        Ok(())
    }

    /// Creates and opens the images of all disks, several at once: each one waits for the disk more than it works.
    async fn create_images(&mut self) -> Result<Vec<Opened>, Failed> {
        let cluster_size = self.shared.config.storage.cluster_bytes;
        let drop_identical = self.shared.config.storage.drop_identical;
        let facts = std::sync::Arc::clone(&self.facts);
        let begun: Vec<_> = facts
            .disks
            .iter()
            .map(|disk| {
                let path = facts.paths.staged_image(disk.plan.disk_id);
                let backing = disk.plan.parent.as_ref().map(backing);
                let mut options = OpenOptions::new(qcow2::Access::ReadWrite);
                options.backing_root = Some(facts.paths.vm.clone());
                if backing.is_some() && drop_identical {
                    options.identical = qcow2::Identical::Skip;
                }
                let known = disk.known_image.clone();
                let shape = CreateOptions { cluster_size, backing, ..CreateOptions::new(disk.plan.size_bytes) };
                self.work.begin(move || {
                    qcow2::create(&path, &shape)?;
                    Ok((qcow2::Image::open(&path, &options)?, known.and_then(|known| open_known(&known))))
                })
            })
            .collect();
        let mut images = Vec::with_capacity(begun.len());
        for (image, disk) in begun.into_iter().zip(&facts.disks) {
            let disk_id = disk.plan.disk_id;
            match image.await {
                Ok(Ok((image, known))) => {
                    images.push(Opened { image: AsyncImage::new(image), known: known.map(AsyncImage::new) });
                }
                Ok(Err(error)) => return Err(image_failure("an image could not be made", &error).at_disk(disk_id)),
                Err(_) => {
                    let panicked = Failed::new(FailureCode::ImageFailed, "making an image ended by a panic");
                    return Err(panicked.at_disk(disk_id));
                }
            }
        }
        Ok(images)
    }

    /// Gives each disk its listener. The ports are bound since the job was accepted; from here on they answer.
    fn serve(&mut self, images: Vec<Opened>) -> Result<(), Failed> {
        let ports = std::mem::take(&mut self.ports);
        let mut live = Vec::with_capacity(images.len());
        for ((disk, Opened { image, known }), port) in self.facts.disks.iter().zip(images).zip(ports) {
            let name = &disk.plan.export_name;
            let export = ImageExport::new(name, image, qcow2::Access::ReadWrite, std::sync::Arc::clone(&self.signals))
                .comparing_zeroes(known);
            let served = ServedDisk::Job { job_id: self.facts.id.clone(), disk_id: disk.plan.disk_id };
            let listener = DiskListener::serve(port, &export, served, &self.shared.listeners).map_err(|error| {
                tracing::error!(%error, "a listener could not be made");
                let disk_id = disk.plan.disk_id;
                Failed::new(FailureCode::ImageFailed, format!("disk {disk_id} cannot be served")).at_disk(disk_id)
            })?;
            let figures = listener.figures();
            live.push(LiveDisk {
                disk_id: disk.plan.disk_id,
                size_bytes: disk.plan.size_bytes,
                backup_type: disk.plan.backup_type(),
                meter: export.meter().clone(),
                gate: export.gate().clone(),
                figures,
                sealed: std::sync::Arc::default(),
            });
            let (disk, noted) = (disk.clone(), Noted::listening());
            self.disks.push(RunningDisk { disk, export, listener: Some(listener), noted, sealed: None });
        }
        // Set once per job: this is the only place, and it runs once.
        let _ = self.handle.live.set(live);
        Ok(())
    }

    /// Stores that everything listens and that the node is about to be called: after a restart this means that a client
    /// may have been launched.
    async fn persist(&self) -> Result<(), Failed> {
        let mut transaction = self.store().write().await?;
        for running in &self.disks {
            let update = DiskUpdate::state_only(running.disk.plan.disk_id, DiskState::Listening);
            backups::update_disk(&mut transaction, &self.facts.id, &update).await?;
        }
        backups::set_node_outcome(&mut transaction, &self.facts.id, NodeOutcome::Intended).await?;
        let change = Change {
            id: &self.facts.id,
            vm_id: &self.facts.vm.id,
            from: JobState::Preparing,
            to: JobState::Starting,
            result: JobResult::None,
            code: None,
            message: None,
            by: Actor::Service,
        };
        backups::change_state(&mut transaction, &change).await?;
        transaction.commit().await?;
        self.show(JobState::Starting);
        Ok(())
    }
}

/// The image of a disk that is written, and an older state of it.
struct Opened {
    image: AsyncImage,
    known: Option<AsyncImage>,
}

/// An older state of a disk, to be looked at. A backup does not fail for the lack of it.
fn open_known(path: &Path) -> Option<qcow2::Image> {
    let options = OpenOptions {
        backing_root: path.parent().and_then(Path::parent).map(Path::to_owned),
        cache_bytes: KNOWN_CACHE_BYTES,
        ..OpenOptions::new(qcow2::Access::ReadOnly)
    };
    let opened = qcow2::Image::open(path, &options);
    opened.inspect_err(|error| tracing::warn!(%error, "zeroes are not held against the last restore point")).ok()
}

/// What an overlay has below it. It is the same before and after the rename: both folders lie beside the parent's.
pub(super) fn backing(parent: &Parent) -> qcow2::Backing {
    qcow2::Backing { name: parent.backing_name(), format: qcow2::BackingFormat::Qcow2 }
}

/// A failure of the repository's file system, in the words of the contract.
pub(super) fn storage(error: &io::Error) -> Failed {
    tracing::error!(%error, "the repository failed");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Failed::new(FailureCode::InsufficientStorage, "the repository is full")
        }
        kind => Failed::new(FailureCode::ImageFailed, format!("the repository cannot be written ({kind})")),
    }
}

/// A failure of an image, in the words of the contract. What the engine says goes to the log: it may name paths.
pub(super) fn image_failure(what: &str, error: &qcow2::Error) -> Failed {
    tracing::error!(%error, "{what}");
    if error.is_no_space() {
        return Failed::new(FailureCode::InsufficientStorage, format!("{what}: the repository is full"));
    }
    Failed::new(FailureCode::ImageFailed, what)
}
