//! A repository held against its records, both ways: points without their folders, folders without their points, and whether each
//! point's files are those that were recorded, down its chains.
//!
//! Points that are being made anew meanwhile are judged when their record is what their files are.
//!
//! Heads of images are read, content is not: that is what a verification does. Nothing in the repository is changed; of the
//! records, only whether a point's files are there.

mod judgement;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;
use utoipa::ToSchema;

use judgement::{Before, Judged, Looked};

use super::Points;
use super::chain::{Settling, Sign};
use super::folder::{FolderError, on_disk};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId};
use crate::repository::manifest::Manifest;
use crate::repository::survey::{self, Fault, Other, OtherKind, PointFolder};
use crate::store::points;
use crate::store::{Connection, StoreError, backups, repositories};

/// What a check found.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CheckReport {
    /// Where.
    #[schema(value_type = String)]
    pub repository_id: RepositoryId,
    /// When it ended.
    #[schema(value_type = String, format = DateTime)]
    pub checked_at: UtcTime,
    /// The worst of the findings.
    pub result: CheckResult,
    /// Points that are recorded, short of deleted ones.
    pub points: usize,
    /// Of those, the ones whose files are as recorded, with everything below them.
    pub intact: usize,
    /// What is not as it should be, by path.
    pub findings: Vec<Finding>,
}

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckResult {
    /// Everything is as recorded, and nothing else is there.
    Clean,
    /// Every recorded point is intact; something else is there.
    Warnings,
    /// A recorded point is not intact.
    Damaged,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// Where, relative to the repository.
    pub path: String,
    /// The point, where the name is that of one.
    #[schema(value_type = Option<String>)]
    pub point_id: Option<BackupId>,
    /// For people.
    pub detail: String,
}

/// What a check may find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A recorded point whose folder, or an image in it, is not there.
    Missing,
    /// A point that was missing and is there again.
    Back,
    /// A recorded point whose files, or files below them, are not those that were recorded.
    Damaged,
    /// A recorded point whose files are as they were recorded, and which is `suspect`.
    Suspect,
    /// A folder of a point that is not recorded and can be imported.
    Importable,
    /// A folder with the name of a point that is not recorded and cannot be imported.
    Unusable,
    /// Staged data of a job that does not run.
    Staged,
    /// Data that was put aside.
    Quarantined,
    /// What is left of a point that was being removed.
    Deleting,
    /// What is left of a point that was being made anew.
    Merging,
    /// Something that no hub has made.
    Unknown,
}

impl FindingKind {
    fn result(self) -> CheckResult {
        match self {
            Self::Missing | Self::Damaged => CheckResult::Damaged,
            _ => CheckResult::Warnings,
        }
    }
}

impl Points {
    /// Holds a repository against its records.
    ///
    /// # Errors
    /// There is no such repository, it cannot be used or looked at, or the database fails.
    pub async fn check(&self, id: &RepositoryId) -> Result<CheckReport, FolderError> {
        let repository = self.own(id).await?;
        let mut settling = Settling::new(&self.shared.store);
        let mut before = Before::read(&self.shared.store, id).await?;
        let (dirs, files) = before.files();
        let (root, name) = (PathBuf::from(&repository.path), id.clone());
        let looked = on_disk(&repository, move || {
            let survey = survey::survey(&root)?;
            let read = survey.points.into_iter().map(|folder| {
                let manifest = survey::read(&root, &folder, &name);
                (folder, manifest)
            });
            let read = read.collect::<Vec<Looked>>();
            Ok((read, survey.others, survey::presences(&root, dirs, &files)?))
        });
        let (mut folders, others, mut presence) = looked.await?;

        let mut given_up = false;
        let (judged, checked_at) = loop {
            settling.seen();
            // Nobody who writes waits for the judgement of all points.
            let mut snapshot = self.shared.store.snapshot().await?;
            let mut judged = judgement::judge_all(&mut snapshot, id, &before, &folders, &presence).await?;
            let (mut doubted, sign) = before.doubt(&mut snapshot, &judged.bad).await?;
            let sign = if let Some(sign) = sign.filter(|_| !given_up) {
                drop(snapshot);
                sign
            } else {
                judged.findings.extend(unknown(&mut snapshot, &before, &folders, &others).await?);
                drop(snapshot);
                let mut transaction = self.shared.store.write().await?;
                let checked_at = UtcTime::now();
                repositories::set_checked(&mut transaction, id, checked_at).await?;
                if judgement::record(&mut transaction, &judged.changes).await? || given_up {
                    transaction.commit().await?;
                    break (judged, checked_at);
                }
                doubted.extend(judged.changes.iter().map(|(point, _)| point.id.clone()));
                Sign::Changed
            };
            // Nothing is kept of this judgement. A point that is made anew has its files a moment before its record.
            given_up = !settling.wait(sign).await;
            before.read_again(&self.shared.store, &doubted).await?;
            let (root, name) = (PathBuf::from(&repository.path), id.clone());
            let (dirs, files) = before.files();
            (folders, presence) = on_disk(&repository, move || {
                for (folder, manifest) in folders.iter_mut().filter(|(folder, _)| doubted.contains(&folder.id)) {
                    *manifest = survey::read(&root, folder, &name);
                }
                Ok((folders, survey::presences(&root, dirs, &files)?))
            })
            .await?;
        };
        let Judged { recorded, bad, mut findings, .. } = judged;
        findings.sort_by(|one, other| one.path.cmp(&other.path));
        let result = findings.iter().map(|finding| finding.kind.result()).max().unwrap_or(CheckResult::Clean);
        tracing::info!(repository = %id, points = recorded, findings = findings.len(), ?result, "repository checked");
        let intact = recorded - bad.len();
        Ok(CheckReport { repository_id: id.clone(), checked_at, result, points: recorded, intact, findings })
    }
}

/// What is there that no record leads to.
async fn unknown(
    connection: &mut Connection,
    before: &Before,
    folders: &[Looked],
    others: &[Other],
) -> Result<Vec<Finding>, StoreError> {
    let mut findings = Vec::new();
    let running: BTreeSet<BackupId> =
        backups::unfinished(connection).await?.into_iter().map(|backup| backup.id).collect();
    for (folder, manifest) in folders {
        findings.extend(unrecorded(connection, folder, manifest, &running).await?);
    }
    for other in others {
        let busy = match &other.id {
            Some(id) => running.contains(id) || before.is_worked_on(id) || points::is_worked_on(connection, id).await?,
            None => false,
        };
        if !busy {
            let (kind, detail) = told(other.kind);
            let (path, point_id) = (other.path.clone(), other.id.clone());
            findings.push(Finding { kind, path, point_id, detail: detail.to_owned() });
        }
    }
    Ok(findings)
}

/// A folder that no record leads to, unless a job is about to make one.
async fn unrecorded(
    connection: &mut Connection,
    folder: &PointFolder,
    manifest: &Result<Manifest, Fault>,
    running: &BTreeSet<BackupId>,
) -> Result<Option<Finding>, StoreError> {
    let (kind, detail) = match points::find(connection, &folder.id).await? {
        Some(point) if point.dir != folder.dir() => {
            (FindingKind::Unusable, format!("the point is recorded at {}", point.dir))
        }
        // It was there when the look began.
        Some(_) => return Ok(None),
        None if running.contains(&folder.id) => return Ok(None),
        None => match (backups::find(connection, &folder.id).await?, manifest) {
            (Some(backup), _) => (FindingKind::Unusable, format!("the backup is recorded as {}", backup.state)),
            (None, Ok(_)) => (FindingKind::Importable, "it is not recorded; an import would take it".to_owned()),
            (None, Err(fault)) => (FindingKind::Unusable, fault.to_string()),
        },
    };
    Ok(Some(Finding { kind, path: folder.dir(), point_id: Some(folder.id.clone()), detail }))
}

fn told(kind: OtherKind) -> (FindingKind, &'static str) {
    match kind {
        OtherKind::Staged => {
            (FindingKind::Staged, "staged data of a job that does not run; the next start puts it aside")
        }
        OtherKind::Quarantined => {
            (FindingKind::Quarantined, "put aside for people to look at; remove it when you have")
        }
        OtherKind::Deleting => (FindingKind::Deleting, "left of a point that was being removed"),
        OtherKind::Merging => (FindingKind::Merging, "left of a point that was being made anew"),
        OtherKind::Unknown => (FindingKind::Unknown, "not made by this service"),
    }
}
