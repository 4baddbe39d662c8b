//! A repository held against its records, both ways: points without their folders, folders without their points, and whether each
//! point's files are those that were recorded, down its chains.
//!
//! Heads of images are read, content is not: that is what a verification does. Nothing in the repository is changed; of the
//! records, only whether a point's folder is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;
use utoipa::ToSchema;

use super::Points;
use super::folder::{FolderError, on_disk};
use super::state::PointState;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId};
use crate::repository::manifest::Manifest;
use crate::repository::survey::{self, Fault, OtherKind, PointFolder};
use crate::store::points::{self, PointDiskRow, PointRow};
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
    /// A recorded point whose folder is not there.
    Missing,
    /// A point that was missing and is there again.
    Back,
    /// A recorded point whose files, or files below them, are not those that were recorded.
    Damaged,
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
        let before = points::all_in(&mut *self.shared.store.read().await?, id).await?;
        let (root, name) = (PathBuf::from(&repository.path), id.clone());
        let looked = on_disk(&repository, move || {
            let survey = survey::survey(&root)?;
            let read = survey.points.into_iter().map(|folder| {
                let manifest = survey::read(&root, &folder, &name);
                (folder, manifest)
            });
            Ok((read.collect::<Vec<(PointFolder, Result<Manifest, Fault>)>>(), survey.others))
        });
        let (folders, others) = looked.await?;

        let mut transaction = self.shared.store.write().await?;
        let mut findings = Vec::new();
        let by_dir: BTreeMap<String, &Result<Manifest, Fault>> =
            folders.iter().map(|(folder, manifest)| (folder.dir(), manifest)).collect();
        let (mut recorded, mut bad) = (0, BTreeSet::new());
        // In the order of their commits, so that what is wrong below is known before what stands upon it.
        for point in points::all_in(&mut transaction, id).await? {
            // Those on their way out, and those that were committed after the look began, are not judged.
            if point.state == PointState::Deleting || !before.iter().any(|known| known.id == point.id) {
                continue;
            }
            recorded += 1;
            let (kind, detail) = match by_dir.get(&point.dir) {
                None => {
                    if point.state == PointState::Committed {
                        points::set_presence(&mut transaction, &point, PointState::Missing).await?;
                    }
                    (FindingKind::Missing, "the folder is not there".to_owned())
                }
                Some(found) => {
                    if point.state == PointState::Missing {
                        points::set_presence(&mut transaction, &point, PointState::Committed).await?;
                        findings.push(finding(FindingKind::Back, &point, "the folder is there again".to_owned()));
                    }
                    match judge(&mut transaction, &point, found, &bad).await? {
                        None => continue,
                        Some(detail) => (FindingKind::Damaged, detail),
                    }
                }
            };
            bad.insert(point.id.clone());
            findings.push(finding(kind, &point, detail));
        }
        let running: BTreeSet<BackupId> =
            backups::unfinished(&mut transaction).await?.into_iter().map(|backup| backup.id).collect();
        for (folder, manifest) in &folders {
            findings.extend(unrecorded(&mut transaction, folder, manifest, &running).await?);
        }
        for other in others {
            let busy = match &other.id {
                Some(id) => running.contains(id) || points::is_worked_on(&mut transaction, id).await?,
                None => false,
            };
            if !busy {
                let (kind, detail) = told(other.kind);
                findings.push(Finding { kind, path: other.path, point_id: other.id, detail: detail.to_owned() });
            }
        }
        let checked_at = UtcTime::now();
        repositories::set_checked(&mut transaction, id, checked_at).await?;
        transaction.commit().await?;
        findings.sort_by(|one, other| one.path.cmp(&other.path));
        let result = findings.iter().map(|finding| finding.kind.result()).max().unwrap_or(CheckResult::Clean);
        tracing::info!(repository = %id, points = recorded, findings = findings.len(), ?result, "repository checked");
        let intact = recorded - bad.len();
        Ok(CheckReport { repository_id: id.clone(), checked_at, result, points: recorded, intact, findings })
    }
}

fn finding(kind: FindingKind, point: &PointRow, detail: String) -> Finding {
    Finding { kind, path: point.dir.clone(), point_id: Some(point.id.clone()), detail }
}

/// What is wrong with a point whose folder is there.
async fn judge(
    connection: &mut Connection,
    point: &PointRow,
    found: &Result<Manifest, Fault>,
    bad: &BTreeSet<BackupId>,
) -> Result<Option<String>, StoreError> {
    let manifest = match found {
        Ok(manifest) => manifest,
        Err(fault) => return Ok(Some(fault.to_string())),
    };
    let disks = points::disks(connection, &point.id).await?;
    if disks.len() != manifest.disks.len() || manifest.vm.id != point.vm_id {
        return Ok(Some("the manifest has another VM or other disks than the record".to_owned()));
    }
    for disk in disks {
        if !agrees(&disk, manifest) {
            return Ok(Some(format!("disk {} is another in the manifest than in the record", disk.disk_id)));
        }
        if let Some(parent) = disk.parent_id.filter(|parent| bad.contains(parent)) {
            return Ok(Some(format!("disk {} builds upon {parent}, which is not intact", disk.disk_id)));
        }
    }
    Ok(None)
}

fn agrees(disk: &PointDiskRow, manifest: &Manifest) -> bool {
    manifest.disks.iter().any(|told| {
        told.disk_id == disk.disk_id
            && told.device_key == disk.device_key
            && told.size_bytes == disk.size_bytes
            && told.file == disk.file
            && told.file_bytes == disk.file_bytes
            && told.backup_type == disk.backup_type
            && told.parent_id == disk.parent_id
            && told.change_id == disk.change_id
    })
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
