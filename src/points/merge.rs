//! A point absorbs its parents: its images are made anew over what lay below those, so that nothing needs them any more.
//!
//! A published file is never written. The new images are built in a folder of their own (`build`), proven to read as the old
//! ones do, and take the place of the old folder in one step of the file system; only then the record follows. Whoever has
//! the old files open keeps them. What a crash leaves is told from the names of folders alone (`recover`), and `docs/durability.md`
//! goes through it step by step.

mod build;
mod recover;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockyard_qcow2 as qcow2;
use serde_json::json;
use tokio::sync::{Mutex, watch};

use super::state::{PointState, Trust};
use super::{Points, paths};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, TaskId};
use crate::repository::directory;
use crate::repository::layout::BackupPaths;
use crate::repository::manifest::{Manifest, ManifestError};
use crate::repository::merging::{self, Exchange};
use crate::store::events::{self, Actor};
use crate::store::points::{self, PointDiskRow, PointRow};
use crate::store::repositories::{self, Repository};
use crate::store::{Connection, StoreError, leases};

pub(crate) use recover::recover;

/// The first pause before a step after the exchange is repeated; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);
/// A guess: a person who has repaired a disk or a database should not wait long for the merge to notice.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long a stopping service waits for a merge: it ends with the piece that it copies.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Owners of pins that are tasks begin so: what reads or changes the files of points, and is no job and no export.
const TASK: &str = "task-";

/// A point that was made anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The point.
    pub point: BackupId,
    /// What it does not need any more, oldest first.
    pub absorbed: Vec<BackupId>,
    /// How often it was made anew by now.
    pub generation: u32,
    /// The length of all its images in bytes.
    pub file_bytes: u64,
}

/// How far a merge is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeProgress {
    /// The point that is made anew.
    pub point: BackupId,
    /// Bytes of its disks that were gone through: once to copy and once to compare.
    pub done_bytes: u64,
    /// How many there are of these.
    pub total_bytes: u64,
}

/// Why a point was not made anew. Nothing was changed then, but where it is said.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// There is no such point, or only its record.
    #[error("there is no point {0}")]
    NotFound(BackupId),
    /// It, or something below it, is not there as it was committed.
    #[error("the point {point} is {state}")]
    NotCommitted {
        /// Which one.
        point: BackupId,
        /// What it is.
        state: PointState,
    },
    /// All its disks are full.
    #[error("the point {0} has no parent")]
    NoParent(BackupId),
    /// What would be copied is known to be wrong, or may be.
    #[error("the point {point} is {trust}")]
    Untrusted {
        /// Which one.
        point: BackupId,
        /// What is known of it.
        trust: Trust,
    },
    /// Something else works on its files.
    #[error("the point {point} is in use by {holder}")]
    Busy {
        /// Which one.
        point: BackupId,
        /// The id of the task.
        holder: String,
    },
    /// The repository cannot be used now.
    #[error("the repository {id} cannot be used: {reason}")]
    RepositoryUnavailable {
        /// Which one.
        id: RepositoryId,
        /// Why.
        reason: String,
    },
    /// Too little is free (`insufficient_storage`).
    #[error("a merge needs {needed_bytes} bytes in the repository {id}, and {free_bytes} are free beyond the reserve")]
    InsufficientStorage {
        /// Where.
        id: RepositoryId,
        /// As much as the images that are merged have now.
        needed_bytes: u64,
        /// What there is beyond `storage.min_free_bytes`.
        free_bytes: u64,
    },
    /// The repository became full on the way (`insufficient_storage`).
    #[error("the repository {0} became full during a merge")]
    StorageFull(RepositoryId),
    /// The file system cannot do it at all.
    #[error(
        "the file system of {} cannot exchange two folders in one step (renameat2 with RENAME_EXCHANGE): move the repository \
         to ext4, XFS, Btrfs or another local file system of Linux, or keep what the points build upon",
        path.display()
    )]
    NoExchange {
        /// The folder of the VM.
        path: PathBuf,
    },
    /// The chain on disk is not the one that is recorded.
    #[error("disk {disk_id} of {point} does not lie upon what its record says")]
    Mismatch {
        /// Whose disk.
        point: BackupId,
        /// Which one.
        disk_id: u32,
    },
    /// An image cannot be read or made.
    #[error("disk {disk_id}: {source}")]
    Image {
        /// Which one.
        disk_id: u32,
        /// What the engine says.
        source: qcow2::Error,
    },
    /// What was made does not read as what it was to replace. There is an alert.
    #[error("disk {disk_id} would read differently from byte {offset} on")]
    Unequal {
        /// Which one.
        disk_id: u32,
        /// The first byte.
        offset: u64,
    },
    /// The point's own manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The file system failed.
    #[error("the repository failed: {0}")]
    Files(#[from] io::Error),
    /// The database failed. Where the exchange was made before, the next start records it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The service is stopping.
    #[error("the service is stopping")]
    Stopping,
    /// A bug.
    #[error("the merge ended by a panic")]
    Panicked,
}

impl MergeError {
    /// The same for callers: without what may name paths.
    pub fn public(&self) -> String {
        match self {
            Self::NoExchange { .. } => "the file system cannot exchange two folders in one step".to_owned(),
            Self::Image { disk_id, .. } => format!("disk {disk_id}: an image cannot be read or made"),
            Self::Manifest(_) => "the manifest of the point cannot be used".to_owned(),
            Self::Files(error) => format!("the repository failed ({})", error.kind()),
            Self::Store(_) => "the database failed".to_owned(),
            other => other.to_string(),
        }
    }
}

/// What merges share: they take turns.
#[derive(Debug, Default)]
pub(super) struct Merges {
    turn: Mutex<()>,
    stop: Arc<AtomicBool>,
    progress: Arc<watch::Sender<Option<MergeProgress>>>,
}

/// Everything that was decided in the transaction in which the point was pinned.
#[derive(Debug)]
struct Plan {
    point: PointRow,
    repository: Repository,
    paths: BackupPaths,
    disks: Vec<PlannedDisk>,
    /// The direct parents, oldest first.
    absorbed: Vec<PointRow>,
    needed_bytes: u64,
}

/// One disk of the point.
#[derive(Debug)]
struct PlannedDisk {
    row: PointDiskRow,
    /// The image of the parent; nothing for a disk that is carried over.
    parent: Option<(BackupId, PointDiskRow)>,
    /// What will lie below, with the name of its image; nothing for what will be a full.
    base: Option<(BackupId, PointDiskRow)>,
}

impl Points {
    /// Makes a point anew so that it needs its direct parents no more: each disk that has a parent gets an image over that
    /// parent's own parent, or a full one; the others are carried over. Its id, change ids and content stay what they are.
    ///
    /// Merges take turns. Backups of the VM and exports may go on meanwhile, also upon this point.
    ///
    /// # Cancellation
    /// The merge goes on to its end when the future is dropped; [`Self::drain_merges`] stops it.
    ///
    /// # Durability
    /// The merged point and its record survive a power cut when this returns. After a crash before that, the next start finds
    /// the old or the new point, whole, and clears up the rest.
    ///
    /// # Errors
    /// See [`MergeError`].
    pub async fn merge(&self, child: &BackupId) -> Result<Merged, MergeError> {
        let (points, child, task) = (self.clone(), child.clone(), TaskId::new());
        let whole = tokio::spawn(async move {
            let merges = &points.shared.merges;
            let _turn = merges.turn.lock().await;
            let (inner, id, owner) = (points.clone(), child.clone(), task.clone());
            let merged = tokio::spawn(async move { Box::pin(inner.merge_pinned(&id, &owner)).await }).await;
            points.release_merge(&task).await;
            merges.progress.send_replace(None);
            merged.unwrap_or(Err(MergeError::Panicked))
        });
        whole.await.unwrap_or(Err(MergeError::Panicked))
    }

    /// Tells of the merge that is under way, if there is one.
    pub fn watch_merge(&self) -> watch::Receiver<Option<MergeProgress>> {
        self.shared.merges.progress.subscribe()
    }

    /// Stops the merge that is under way, refuses others, and waits until none is left. What is left after a while all the
    /// same is done by the next start.
    pub async fn drain_merges(&self) {
        self.abandon_merges();
        if tokio::time::timeout(STOP_LIMIT, self.shared.merges.turn.lock()).await.is_err() {
            tracing::error!("a merge could not be stopped in time; the next start clears up");
        }
    }

    /// Stops the merge that is under way and refuses others, without waiting.
    pub(crate) fn abandon_merges(&self) {
        self.shared.merges.stop.store(true, Ordering::Relaxed);
    }

    fn merges_stop(&self) -> bool {
        self.shared.merges.stop.load(Ordering::Relaxed)
    }

    async fn merge_pinned(&self, child: &BackupId, task: &TaskId) -> Result<Merged, MergeError> {
        if self.merges_stop() {
            return Err(MergeError::Stopping);
        }
        let plan = Arc::new(self.pin(child, task).await?);
        self.prepare_repository(&plan).await?;
        recover::settle(&self.shared.store, &plan.paths, &plan.point).await?;
        let built = self.build(&plan).await;
        let published = match built {
            Ok(manifest) => self.publish(&plan, &manifest).await.map(|()| manifest),
            Err(error) => Err(error),
        };
        let manifest = match published {
            Ok(manifest) => manifest,
            Err(error) => {
                self.remove_merging(&plan).await;
                return Err(error);
            }
        };
        self.forward(&plan, &manifest).await?;
        let file_bytes = manifest.disks.iter().map(|disk| disk.file_bytes).sum();
        let absorbed: Vec<BackupId> = plan.absorbed.iter().map(|point| point.id.clone()).collect();
        tracing::info!(point = %child, ?absorbed, generation = manifest.generation, "a point was made anew");
        Ok(Merged { point: child.clone(), absorbed, generation: manifest.generation, file_bytes })
    }

    /// The transaction in which everything that a merge relies on is seen, and pinned.
    async fn pin(&self, child: &BackupId, task: &TaskId) -> Result<Plan, MergeError> {
        let mut transaction = self.shared.store.write().await?;
        let point = points::find(&mut transaction, child).await?;
        let point = point.filter(|point| point.state != PointState::Deleted);
        let point = point.ok_or_else(|| MergeError::NotFound(child.clone()))?;
        for (id, state) in points::ancestry(&mut transaction, child).await? {
            if state != PointState::Committed {
                return Err(MergeError::NotCommitted { point: id, state });
            }
        }
        let (disks, absorbed) = plan_disks(&mut transaction, child).await?;
        for concerned in absorbed.iter().chain([&point]) {
            refuse_unfit(&mut transaction, concerned).await?;
        }
        let repository = repositories::find(&mut transaction, &point.repository_id).await?;
        let repository = repository.ok_or_else(|| MergeError::RepositoryUnavailable {
            id: point.repository_id.clone(),
            reason: "it was removed".to_owned(),
        })?;
        leases::pin_chain(&mut transaction, child, task.as_str(), &self.shared.boot_id).await?;
        transaction.commit().await?;
        // The new image holds what one of the two holds, cluster by cluster.
        let needed_bytes = disks
            .iter()
            .filter_map(|disk| Some(disk.row.file_bytes + disk.parent.as_ref()?.1.file_bytes))
            .fold(0, u64::saturating_add);
        let paths = paths(&repository, &point);
        Ok(Plan { point, repository, paths, disks, absorbed, needed_bytes })
    }

    /// The repository is ours, and has room.
    async fn prepare_repository(&self, plan: &Arc<Plan>) -> Result<(), MergeError> {
        let (locks, min_free) = (Arc::clone(&self.shared.locks), self.shared.config.storage.min_free_bytes);
        blocking(plan, move |plan| {
            let (id, path) = (&plan.repository.id, Path::new(&plan.repository.path));
            let unavailable = |reason| MergeError::RepositoryUnavailable { id: id.clone(), reason };
            locks.acquire(id.as_str(), path).map_err(|error| unavailable(error.public()))?;
            let (free, _) = directory::space(path).map_err(|error| unavailable(error.kind().to_string()))?;
            let (free_bytes, needed_bytes) = (free.saturating_sub(min_free), plan.needed_bytes);
            if free_bytes < needed_bytes {
                return Err(MergeError::InsufficientStorage { id: id.clone(), needed_bytes, free_bytes });
            }
            Ok(())
        })
        .await
    }

    /// Makes the folder with everything in it. Whatever this made is the caller's to remove when it fails.
    async fn build(&self, plan: &Arc<Plan>) -> Result<Manifest, MergeError> {
        let merges = &self.shared.merges;
        let (stop, progress) = (Arc::clone(&merges.stop), Arc::clone(&merges.progress));
        let built = blocking(plan, move |plan| {
            if merging::create_merging(&plan.paths)? == Exchange::Impossible {
                return Err(MergeError::NoExchange { path: plan.paths.vm.clone() });
            }
            build::build(plan, &stop, &progress)
        })
        .await;
        if let Err(MergeError::Unequal { disk_id, offset }) = &built {
            self.alert_unequal(plan, *disk_id, *offset).await;
        }
        built.map_err(|error| match &error {
            MergeError::Image { source, .. } if source.is_no_space() => {
                MergeError::StorageFull(plan.repository.id.clone())
            }
            MergeError::Files(source)
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                MergeError::StorageFull(plan.repository.id.clone())
            }
            _ => error,
        })
    }

    /// A bug, or damage that nobody knows of: an operator must hear of it. Nothing is wrong with the point for all we know.
    async fn alert_unequal(&self, plan: &Plan, disk_id: u32, offset: u64) {
        let point = &plan.point.id;
        tracing::error!(%point, disk_id, offset, "a merge was given up: the result reads differently");
        let data = json!({
            "alert": "merge_unequal", "point_id": point, "disk_id": disk_id, "offset": offset,
            "detail": "The images that were to replace those of this point read differently and were thrown away. The point \
                       is as it was. Verify it with all that it builds upon.",
        });
        let told = async {
            let mut transaction = self.shared.store.write().await?;
            events::append(&mut transaction, "alert", point.as_str(), &data, Actor::Service, UtcTime::now()).await?;
            transaction.commit().await
        };
        if let Err(error) = told.await {
            tracing::error!(%point, %error, "an alert could not be stored");
        }
    }

    /// The exchange, unless something became known of the point while it was copied.
    async fn publish(&self, plan: &Arc<Plan>, manifest: &Manifest) -> Result<(), MergeError> {
        let mut connection = self.shared.store.read().await?;
        for concerned in plan.absorbed.iter().chain([&plan.point]) {
            let now = points::find(&mut connection, &concerned.id).await?;
            let now = now.ok_or_else(|| MergeError::NotFound(concerned.id.clone()))?;
            if now.state != PointState::Committed {
                return Err(MergeError::NotCommitted { point: now.id, state: now.state });
            }
            refuse_untrusted(&now)?;
        }
        drop(connection);
        if self.merges_stop() {
            return Err(MergeError::Stopping);
        }
        let generation = manifest.generation;
        blocking(plan, move |plan| Ok(merging::exchange(&plan.paths, &plan.point.id, generation)?)).await
    }

    /// What follows the exchange. Nothing here is ever undone; a service that stops leaves it to the next start.
    async fn forward(&self, plan: &Arc<Plan>, manifest: &Manifest) -> Result<(), MergeError> {
        let mut pause = PAUSE;
        loop {
            let step = async {
                blocking(plan, |plan| Ok(directory::sync_published(&plan.paths)?)).await?;
                recover::follow(&self.shared.store, manifest).await?;
                Ok::<(), MergeError>(())
            };
            match step.await {
                Ok(()) => break,
                Err(error) if self.merges_stop() => return Err(error),
                Err(error) => {
                    tracing::error!(point = %plan.point.id, %error, "a merge is published but not recorded; trying again");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        self.remove_merging(plan).await;
        Ok(())
    }

    async fn remove_merging(&self, plan: &Arc<Plan>) {
        if let Err(error) = blocking(plan, |plan| Ok(merging::remove_merging(&plan.paths)?)).await {
            let path = plan.paths.merging.display();
            tracing::error!(%path, %error, "what a merge left could not be removed; the next merge or start will");
        }
    }

    async fn release_merge(&self, task: &TaskId) {
        let released = async {
            let mut transaction = self.shared.store.write().await?;
            leases::release_all(&mut transaction, task.as_str()).await?;
            transaction.commit().await
        };
        if let Err(error) = released.await {
            tracing::error!(%task, %error, "the pins of a merge stay until the next start");
        }
    }
}

/// Runs file system steps on a thread where they may wait.
async fn blocking<T: Send + 'static>(
    plan: &Arc<Plan>,
    step: impl FnOnce(&Plan) -> Result<T, MergeError> + Send + 'static,
) -> Result<T, MergeError> {
    let plan = Arc::clone(plan);
    tokio::task::spawn_blocking(move || step(&plan)).await.unwrap_or(Err(MergeError::Panicked))
}

/// What becomes of each disk, and the points that are absorbed by that, oldest first.
async fn plan_disks(
    connection: &mut Connection,
    child: &BackupId,
) -> Result<(Vec<PlannedDisk>, Vec<PointRow>), MergeError> {
    let (mut disks, mut parents) = (Vec::new(), BTreeSet::new());
    for row in points::disks(connection, child).await? {
        let mismatch = || MergeError::Mismatch { point: child.clone(), disk_id: row.disk_id };
        let (mut parent, mut base) = (None, None);
        if let Some(id) = &row.parent_id {
            let below = disk_of(connection, id, row.disk_id).await?.ok_or_else(mismatch)?;
            if let Some(id) = &below.parent_id {
                let below = disk_of(connection, id, row.disk_id).await?.ok_or_else(mismatch)?;
                base = Some((id.clone(), below));
            }
            parents.insert(id.clone());
            parent = Some((id.clone(), below));
        }
        disks.push(PlannedDisk { row, parent, base });
    }
    let mut absorbed = Vec::new();
    for id in parents {
        absorbed.push(points::find(connection, &id).await?.ok_or(MergeError::NotFound(id))?);
    }
    if absorbed.is_empty() {
        return Err(MergeError::NoParent(child.clone()));
    }
    absorbed.sort_by_key(|point| point.sequence);
    Ok((disks, absorbed))
}

async fn disk_of(
    connection: &mut Connection,
    point: &BackupId,
    disk_id: u32,
) -> Result<Option<PointDiskRow>, StoreError> {
    Ok(points::disks(connection, point).await?.into_iter().find(|disk| disk.disk_id == disk_id))
}

async fn refuse_unfit(connection: &mut Connection, point: &PointRow) -> Result<(), MergeError> {
    refuse_untrusted(point)?;
    let holders = leases::holders(connection, &point.id).await?;
    match holders.into_iter().find(|holder| holder.starts_with(TASK)) {
        Some(holder) => Err(MergeError::Busy { point: point.id.clone(), holder }),
        None => Ok(()),
    }
}

fn refuse_untrusted(point: &PointRow) -> Result<(), MergeError> {
    match point.trust {
        Trust::Suspect | Trust::Corrupt => Err(MergeError::Untrusted { point: point.id.clone(), trust: point.trust }),
        Trust::Unverified | Trust::Verified => Ok(()),
    }
}
