//! Verifications: one at a time per hub, each pins what it reads and reads on blocking threads. What is read is the business of
//! `inspect` and `take`, and what it means is decided in `settle`. Which ones there are is kept in `registry`.

mod registry;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::finding::{Finding, Severity};
use super::folder::FolderError;
use super::inspect::{self, Inspection, Subject, SubjectDisk};
use super::pace::Reading;
use super::pins::Pins;
use super::settle::is_there;
use super::take::{Content, ExamineError, Examined, examine};
use super::verification::{Outcome, Phase, Request, Scope, Verification, VerifiedPoint};
use super::{Points, paths};
use crate::clock::UtcTime;
use crate::id::{BackupId, TaskId};
use crate::store::{StoreError, leases, points, repositories};

pub use registry::{Totals, Verifications};

/// How often a point is read again whose folder was exchanged meanwhile. A guess: its pins should not let it happen once.
const EXCHANGES_MAX: usize = 3;
/// How many verifications that somebody asked for may be under way or wait. A guess: each holds its points, so that none of them
/// can be merged or deleted, and they are read one after the other.
pub const OPEN_MAX: usize = 64;

/// Why a point is not verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// There is no such point, or it is going.
    #[error("there is no restore point {0}")]
    NotFound(BackupId),
    /// Another task changes it.
    #[error("restore point {point} is in use by {holder}")]
    InUse {
        /// The point, or one below the one asked for.
        point: BackupId,
        /// Who has it.
        holder: String,
    },
    /// As many as may wait do so.
    #[error("{OPEN_MAX} verifications are under way or wait for their turn")]
    TooMany,
    /// The service stops.
    #[error("the service is stopping")]
    Stopping,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A verification that holds its points. Dropped before its end, by a panic or a caller that went away, it has failed and holds
/// nothing.
struct Begun {
    verification: Arc<Verification>,
    points: Points,
    pins: Pins,
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.points.shared.verifications.known().open.remove(&self.verification.id);
        if self.verification.view().phase != Phase::Ended {
            self.verification.change(|view| (view.phase, view.outcome) = (Phase::Ended, Some(Outcome::Failed)));
        }
    }
}

impl Points {
    /// Begins to verify a point, or finds that just that is under way. It is pinned when this returns.
    ///
    /// # Errors
    /// See [`VerifyError`].
    pub async fn verify(&self, id: &BackupId, request: Request) -> Result<Arc<Verification>, VerifyError> {
        {
            let known = self.shared.verifications.known();
            if let Some(same) = known.open.values().find(|open| open.point_id == *id && open.request == request) {
                return Ok(Arc::clone(same));
            }
            if known.open.len() >= OPEN_MAX {
                return Err(VerifyError::TooMany);
            }
        }
        let begun = self.begin_verification(id, request).await?;
        let verification = Arc::clone(&begun.verification);
        let points = self.clone();
        self.shared.verifications.spawn(async move {
            let turn = points.turn().await;
            Box::pin(points.run_verification(begun)).await;
            drop(turn);
        });
        Ok(verification)
    }

    /// Verifies a point whose turn it is, and waits for the end.
    ///
    /// # Errors
    /// See [`VerifyError`].
    pub(super) async fn verify_now(&self, id: &BackupId, request: Request) -> Result<Arc<Verification>, VerifyError> {
        let begun = self.begin_verification(id, request).await?;
        let verification = Arc::clone(&begun.verification);
        Box::pin(self.run_verification(begun)).await;
        Ok(verification)
    }

    /// Reads the files of a point and says what is not as it was. Nothing is written or concluded.
    ///
    /// # Errors
    /// There is no such point, or the service stops.
    pub async fn inspect(&self, id: &BackupId) -> Result<Inspection, VerifyError> {
        let (subject, _) = self.subject(id).await?.ok_or_else(|| VerifyError::NotFound(id.clone()))?;
        let reading = Reading { gate: Arc::clone(&self.shared.verifications.gate), ..Reading::default() };
        let inspected = tokio::task::spawn_blocking(move || inspect::inspect(&subject, &reading)).await;
        inspected.ok().and_then(Result::ok).ok_or(VerifyError::Stopping)
    }

    /// Pins a point with all below it, in the transaction in which nobody else is seen to change any of them.
    async fn begin_verification(&self, id: &BackupId, request: Request) -> Result<Begun, VerifyError> {
        let verifications = &self.shared.verifications;
        if verifications.gate.is_stopped() {
            return Err(VerifyError::Stopping);
        }
        let task = TaskId::new();
        let mut transaction = self.shared.store.write().await?;
        let row = points::find(&mut transaction, id).await?;
        row.filter(|row| is_there(row.state)).ok_or_else(|| VerifyError::NotFound(id.clone()))?;
        let mut chain = Vec::new();
        for (below, _) in points::ancestry(&mut transaction, id).await? {
            for holder in leases::holders(&mut transaction, &below).await? {
                let reads = holder.parse().is_ok_and(|holder: TaskId| verifications.known().open.contains_key(&holder));
                if holder.parse::<TaskId>().is_ok() && !reads {
                    return Err(VerifyError::InUse { point: below, holder });
                }
            }
            if let Some(row) = points::find(&mut transaction, &below).await? {
                chain.push(row);
            }
        }
        let pins = Pins::of(&self.shared.store, task.as_str());
        leases::pin_chain(&mut transaction, id, task.as_str(), &self.shared.boot_id).await?;
        // Parents are committed before what builds upon them.
        chain.sort_by_key(|row| row.sequence);
        let order = match request.scope {
            Scope::Chain => chain.into_iter().map(|row| row.id).collect(),
            Scope::Point => vec![id.clone()],
        };
        let verification = Arc::new(Verification::new(task.clone(), id.clone(), request, order));
        // Known before its pins can be seen.
        {
            let mut known = verifications.known();
            known.open.insert(task.clone(), Arc::clone(&verification));
            known.last.insert(id.clone(), Arc::clone(&verification));
        }
        let begun = Begun { verification, points: self.clone(), pins };
        transaction.commit().await?;
        Ok(begun)
    }

    /// Reads and settles its points, the lowest first, and gives the pins back before the end can be seen.
    async fn run_verification(&self, mut task: Begun) {
        let verification = &Arc::clone(&task.verification);
        let begun = Instant::now();
        verification.change(|view| {
            view.phase = Phase::Running;
            view.started_at = Some(UtcTime::now());
        });
        let mut outcome = Some(Outcome::Verified);
        for id in &verification.order {
            let point = match self.verify_point(verification, id).await {
                Ok(Some(point)) => point,
                Ok(None) => {
                    outcome = None;
                    break;
                }
                Err(error) => {
                    tracing::error!(point = %id, %error, "a point could not be verified");
                    let findings = vec![Finding::of_point(Severity::Failed, "database", error.to_string())];
                    VerifiedPoint { point_id: id.clone(), outcome: Outcome::Failed, findings }
                }
            };
            outcome = outcome.max(Some(point.outcome));
            verification.change(|view| view.points.push(point));
        }
        std::mem::replace(&mut task.pins, Pins::none()).release().await;
        // One that was stopped found nothing.
        let outcome = outcome.unwrap_or(Outcome::Failed);
        let [_, bytes, ..] = verification.progress();
        let mut known = self.shared.verifications.known();
        known.open.remove(&verification.id);
        *known.totals.outcomes.entry(outcome).or_default() += 1;
        known.totals.time += begun.elapsed();
        known.totals.bytes += bytes;
        drop(known);
        tracing::info!(point = %verification.point_id, task = %verification.id, %outcome, bytes, "verification ended");
        verification.change(|view| {
            view.phase = Phase::Ended;
            view.outcome = Some(outcome);
            view.ended_at = Some(UtcTime::now());
        });
    }

    /// Nothing when the service stops.
    async fn verify_point(
        &self,
        verification: &Verification,
        id: &BackupId,
    ) -> Result<Option<VerifiedPoint>, StoreError> {
        let content = if *id == verification.point_id { verification.request.content } else { Content::Known };
        let mut examined = failed("exchanged", "the folder of the point was exchanged while it was read");
        for _ in 0..EXCHANGES_MAX {
            // Before its record is read: what was cut there is settled by that.
            if let Some(unavailable) = self.unavailable(id).await? {
                examined = unavailable;
                break;
            }
            let Some((subject, repository)) = self.subject(id).await? else {
                examined = failed("folder_missing", "the point or its repository is no longer recorded");
                break;
            };
            let reading = verification.reading(&self.shared.verifications.gate);
            match tokio::task::spawn_blocking(move || read(&repository, &subject, content, &reading)).await {
                Ok(Ok(read)) => {
                    examined = read;
                    break;
                }
                Ok(Err(ExamineError::Stopped(_))) => return Ok(None),
                Ok(Err(ExamineError::Exchanged)) => {}
                Err(_) => {
                    examined = failed("panicked", "reading the point ended by a panic");
                    break;
                }
            }
        }
        self.settle(id, examined).await.map(Some)
    }

    /// What a look at a point whose repository cannot be used comes to.
    async fn unavailable(&self, id: &BackupId) -> Result<Option<Examined>, StoreError> {
        let point = points::find(&mut *self.shared.store.read().await?, id).await?;
        let Some(point) = point else { return Ok(None) };
        Ok(match self.own(&point.repository_id).await {
            Ok(_) | Err(FolderError::NotFound(_)) => None,
            Err(FolderError::Store(error)) => return Err(error),
            Err(error) => Some(failed("repository_unavailable", &error.to_string())),
        })
    }

    /// A point with what is recorded of it, and the folder of its repository.
    async fn subject(&self, id: &BackupId) -> Result<Option<(Subject, String)>, StoreError> {
        let mut connection = self.shared.store.read().await?;
        let Some(row) = points::find(&mut connection, id).await? else { return Ok(None) };
        let Some(repository) = repositories::find(&mut connection, &row.repository_id).await? else { return Ok(None) };
        let mut disks = Vec::new();
        for row in points::disks(&mut connection, id).await? {
            let below = match &row.parent_id {
                Some(parent) => points::disks(&mut connection, parent).await?,
                None => Vec::new(),
            };
            let below = below.iter().find(|below| (below.disk_id, below.size_bytes) == (row.disk_id, row.size_bytes));
            let below = below.and_then(|below| below.content_digest.as_deref()?.parse().ok());
            disks.push(SubjectDisk { row, below });
        }
        let folder = paths(&repository, &row).published;
        Ok(Some((Subject { id: id.clone(), folder, disks }, repository.path)))
    }
}

fn failed(code: &'static str, detail: &str) -> Examined {
    Examined { findings: vec![Finding::of_point(Severity::Failed, code, detail)], ..Examined::default() }
}

/// Looks at a point in a repository that is there before and after: a folder that is unmounted meanwhile lost nothing.
fn read(repository: &str, subject: &Subject, content: Content, reading: &Reading) -> Result<Examined, ExamineError> {
    let gone = || failed("repository_unavailable", "the folder of the repository is not there");
    if !inspect::repository_is_there(Path::new(repository)) {
        return Ok(gone());
    }
    reading.expect(inspect::bytes(subject));
    let examined = examine(subject, content, reading)?;
    Ok(if inspect::repository_is_there(Path::new(repository)) { examined } else { gone() })
}
