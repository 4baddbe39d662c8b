//! One verification as others see it: what was asked for, how far it is, what it found.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::finding::Finding;
use super::pace::{Gate, Progress, Reading};
use super::take::Content;
use crate::clock::UtcTime;
use crate::id::{BackupId, TaskId};
use crate::words::words;

/// Which points a verification reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The point and everything that it builds upon, each image once.
    #[default]
    Chain,
    /// The files of the point alone.
    Point,
}

/// Where a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Another one is running; there is one at a time.
    Queued,
    /// It reads.
    Running,
    /// It is over.
    Ended,
}

/// What came of a verification, of one point or of all that it read, from the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The files are what was committed.
    Verified,
    /// It could not be done, and nothing was concluded.
    Failed,
    /// Something below is damaged, or what was committed can no longer be proven.
    Suspect,
    /// The files are not there.
    Missing,
    /// The files are not what was committed.
    Corrupt,
}

words!(Outcome {
    Verified = "verified",
    Failed = "failed",
    Suspect = "suspect",
    Missing = "missing",
    Corrupt = "corrupt",
});

/// What came of one point.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VerifiedPoint {
    /// Which.
    #[schema(value_type = String)]
    pub point_id: BackupId,
    /// What came of it.
    pub outcome: Outcome,
    /// What was found, warnings included.
    pub findings: Vec<Finding>,
}

/// What changes while a verification goes on.
#[derive(Clone, Debug)]
pub struct View {
    /// Where it is.
    pub phase: Phase,
    /// What came of the points that were read.
    pub points: Vec<VerifiedPoint>,
    /// What came of all of them; nothing before the end.
    pub outcome: Option<Outcome>,
    /// When it began to read.
    pub started_at: Option<UtcTime>,
    /// When it was over.
    pub ended_at: Option<UtcTime>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which points.
    pub scope: Scope,
    /// Whether the virtual disks of the point itself are read too.
    pub content: Content,
}

/// One verification.
#[derive(Debug)]
pub struct Verification {
    /// Its id, under which it pins the points.
    pub id: TaskId,
    /// The point it was asked for.
    pub point_id: BackupId,
    /// What was asked for.
    pub request: Request,
    /// The points it reads, the lowest first.
    pub order: Vec<BackupId>,
    progress: Arc<Progress>,
    view: watch::Sender<View>,
}

impl Verification {
    /// One that waits for its turn.
    pub fn new(id: TaskId, point_id: BackupId, request: Request, order: Vec<BackupId>) -> Self {
        let (phase, points) = (Phase::Queued, Vec::new());
        let view = View { phase, points, outcome: None, started_at: None, ended_at: None };
        let (progress, view) = (Arc::new(Progress::default()), watch::Sender::new(view));
        Self { id, point_id, request, order, progress, view }
    }

    /// How it stands.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Tells when that changes.
    pub fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Changes how it stands.
    pub fn change(&self, change: impl FnOnce(&mut View)) {
        self.view.send_modify(change);
    }

    /// Its reading, through this gate.
    pub fn reading(&self, gate: &Arc<Gate>) -> Reading {
        Reading { gate: Arc::clone(gate), progress: Arc::clone(&self.progress) }
    }

    /// Files hashed, bytes read, bytes done and bytes to do, which count holes of disks too, and bytes compared.
    pub fn progress(&self) -> [u64; 5] {
        let Progress { files, read, done, total, compared } = &*self.progress;
        [files, read, done, total, compared].map(|counter| counter.load(Ordering::Relaxed))
    }
}
