//! A point absorbs its parents: its images are made anew over what lay below those, so that nothing needs them any more.
//!
//! A published file is never written. The new images are built in a folder of their own (`build`), proven to read as the old
//! ones do, and take the place of the old folder in one step of the file system; only then the record follows. Whoever has
//! the old files open keeps them. What a crash leaves is told from the names of folders alone (`recover`), and `docs/durability.md`
//! goes through it step by step.

mod build;
mod error;
mod plan;
mod recover;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;

use super::Points;
use super::folder::FolderError;
use super::turns::Turns;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, TaskId};
use crate::repositories::promises::Promise;
use crate::repository::directory;
use crate::repository::manifest::Manifest;
use crate::repository::merging::{self, Exchange};
use crate::store::events::{self, Actor};
use crate::store::points;
use crate::words::point::PointState;

pub use error::MergeError;
use plan::{Plan, refuse_untrusted};
use recover::Settled;
pub(crate) use recover::{recover, recover_imported};

/// The first pause before a step after the exchange is repeated; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(100);
/// A guess: a person who has repaired a disk or a database should not wait long for the merge to notice.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long a stopping service waits for a merge: it ends with the piece that it copies.
const STOP_LIMIT: Duration = Duration::from_secs(30);

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes of its disks that were gone through: once to copy and once to compare.
    pub done_bytes: u64,
    /// How many there are of these.
    pub total_bytes: u64,
}

/// How far each merge is that is under way, by its point.
pub type UnderWay = BTreeMap<BackupId, MergeProgress>;

/// What merges share: those in one repository take turns.
#[derive(Debug, Default)]
pub(super) struct Merges {
    turns: Turns,
    stop: Arc<AtomicBool>,
    progress: Arc<watch::Sender<UnderWay>>,
}

impl Points {
    /// Makes a point anew so that it needs its direct parents no more: each disk that has a parent gets an image over that
    /// parent's own parent, or a full one; the others are carried over. Its id, change ids and content stay what they are.
    ///
    /// Merges in one repository take turns. Backups of the VM and exports may go on meanwhile, also upon this point.
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
            let repository = points.repository_of_point(&child).await?;
            let merges = &points.shared.merges;
            let _turn = merges.turns.take(&repository).await;
            let (inner, point) = (points.clone(), child.clone());
            let merged = tokio::spawn(async move { Box::pin(inner.merge_in_turn(&child, &repository, &task)).await });
            let merged = merged.await;
            merges.progress.send_if_modified(|under_way| under_way.remove(&point).is_some());
            merged.unwrap_or(Err(MergeError::Panicked))
        });
        whole.await.unwrap_or(Err(MergeError::Panicked))
    }

    /// Tells of the merges that are under way.
    pub fn watch_merges(&self) -> watch::Receiver<UnderWay> {
        self.shared.merges.progress.subscribe()
    }

    /// Stops the merges that are under way, refuses others, and waits until none is left. What is left after a while all the
    /// same is done by the next start.
    pub async fn drain_merges(&self) {
        self.abandon_merges();
        if tokio::time::timeout(STOP_LIMIT, self.shared.merges.turns.had()).await.is_err() {
            tracing::error!("a merge could not be stopped in time; the next start clears up");
        }
    }

    /// Stops the merges that are under way and refuses others, without waiting.
    pub(crate) fn abandon_merges(&self) {
        self.shared.merges.stop.store(true, Ordering::Relaxed);
    }

    fn merges_stop(&self) -> bool {
        self.shared.merges.stop.load(Ordering::Relaxed)
    }

    async fn merge_in_turn(
        &self,
        child: &BackupId,
        repository: &RepositoryId,
        task: &TaskId,
    ) -> Result<Merged, MergeError> {
        if self.merges_stop() {
            return Err(MergeError::Stopping);
        }
        self.own_for_merge(repository).await?;
        let (plan, pins) = self.pin(child, task).await?;
        let merged = self.merge_pinned(child, &Arc::new(plan)).await;
        pins.release().await;
        merged
    }

    async fn merge_pinned(&self, child: &BackupId, plan: &Arc<Plan>) -> Result<Merged, MergeError> {
        let promise = self.claim_room(plan).await?;
        if let Settled::LeftAlone(reason) = recover::settle(&self.shared.store, &plan.paths, &plan.point).await? {
            return Err(MergeError::Leftover { point: child.clone(), reason });
        }
        let built = self.build(plan, promise).await;
        let published = match built {
            Ok(manifest) => self.publish(plan, &manifest).await.map(|()| manifest),
            Err(error) => Err(error),
        };
        let manifest = match published {
            Ok(manifest) => manifest,
            Err(error) => {
                // Which folder is which is judged anew: an exchange may have happened although it was reported as failed.
                if let Err(error) = recover::settle(&self.shared.store, &plan.paths, &plan.point).await {
                    tracing::error!(point = %child, %error, "what a merge left is cleared up by the next merge or start");
                }
                return Err(error);
            }
        };
        self.forward(plan, &manifest).await?;
        let file_bytes = manifest.disks.iter().map(|disk| disk.file_bytes).sum();
        let absorbed: Vec<BackupId> = plan.absorbed.iter().map(|point| point.id.clone()).collect();
        tracing::info!(point = %child, ?absorbed, generation = manifest.generation, "a point was made anew");
        Ok(Merged { point: child.clone(), absorbed, generation: manifest.generation, file_bytes })
    }

    async fn repository_of_point(&self, child: &BackupId) -> Result<RepositoryId, MergeError> {
        let point = points::find(&mut *self.shared.store.read().await?, child).await?;
        Ok(point.ok_or_else(|| MergeError::NotFound(child.clone()))?.repository_id)
    }

    /// The repository is ours: before anything is concluded from what is recorded of it.
    async fn own_for_merge(&self, repository: &RepositoryId) -> Result<(), MergeError> {
        self.own(repository).await.map(|_| ()).map_err(|error| match error {
            FolderError::Unavailable { id, reason } => MergeError::RepositoryUnavailable { id, reason },
            FolderError::NotFound(id) => MergeError::RepositoryUnavailable { id, reason: "it was removed".to_owned() },
            FolderError::Store(error) => error.into(),
            FolderError::Panicked => MergeError::Panicked,
        })
    }

    /// The repository has room, which is the merge's from now on.
    async fn claim_room(&self, plan: &Arc<Plan>) -> Result<Arc<Promise>, MergeError> {
        let promise = Arc::new(self.shared.repositories.promise(&plan.repository.id, plan.needed_bytes()));
        let (earlier, min_free) = (Arc::clone(&promise), self.shared.config.storage.min_free_bytes);
        blocking(plan, move |plan| {
            let id = &plan.repository.id;
            let (free, _) = directory::space(Path::new(&plan.repository.path)).map_err(|error| {
                MergeError::RepositoryUnavailable { id: id.clone(), reason: error.kind().to_string() }
            })?;
            let free_bytes = free.saturating_sub(earlier.earlier_bytes()).saturating_sub(min_free);
            let needed_bytes = plan.needed_bytes();
            if free_bytes < needed_bytes {
                return Err(MergeError::InsufficientStorage { id: id.clone(), needed_bytes, free_bytes });
            }
            Ok(())
        })
        .await?;
        Ok(promise)
    }

    /// How many bytes a merge may take of the repository now beyond what it was promised. What others were promised is theirs,
    /// although it is not written yet. Asking blocks.
    fn room(&self, plan: &Plan, promise: Arc<Promise>) -> impl Fn() -> io::Result<u64> + Send + 'static {
        let (path, min_free) = (plan.repository.path.clone(), self.shared.config.storage.min_free_bytes);
        move || {
            let (free, _) = directory::space(Path::new(&path))?;
            Ok(free.saturating_sub(promise.spoken_for()).saturating_sub(min_free))
        }
    }

    /// Makes the folder with everything in it. Whatever this made is the caller's to remove when it fails.
    async fn build(&self, plan: &Arc<Plan>, promise: Arc<Promise>) -> Result<Manifest, MergeError> {
        let merges = &self.shared.merges;
        let (stop, progress) = (Arc::clone(&merges.stop), Arc::clone(&merges.progress));
        let left = Arc::new(AtomicU64::new(plan.needed_bytes()));
        let outstanding = Arc::clone(&left);
        promise.follow(move || outstanding.load(Ordering::Relaxed));
        let room = self.room(plan, promise);
        let built = blocking(plan, move |plan| {
            if merging::create_merging(&plan.paths)? == Exchange::Impossible {
                return Err(MergeError::NoExchange { path: plan.paths.vm.clone() });
            }
            build::build(plan, &room, &stop, &left, &progress)
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

    /// What follows the exchange. Nothing here is ever undone; a service that stops leaves it to the next start. Until it succeeds
    /// the files are not what is recorded, so that the pins stay, and the turn: nothing else of the repository is made anew.
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
}

/// Runs file system steps on a thread where they may wait.
async fn blocking<T: Send + 'static>(
    plan: &Arc<Plan>,
    step: impl FnOnce(&Plan) -> Result<T, MergeError> + Send + 'static,
) -> Result<T, MergeError> {
    let plan = Arc::clone(plan);
    tokio::task::spawn_blocking(move || step(&plan)).await.unwrap_or(Err(MergeError::Panicked))
}
