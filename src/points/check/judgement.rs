//! Each recorded point held against its folder, and which of these judgements may be different in a moment.

use std::collections::{BTreeMap, BTreeSet};

use super::{Finding, FindingKind};
use crate::id::{BackupId, RepositoryId};
use crate::points::chain::Sign;
use crate::repository::manifest::Manifest;
use crate::repository::survey::{Fault, PointFolder, Presence};
use crate::store::points::{self, PointDiskRow, PointRow};
use crate::store::{Connection, Store, StoreError};
use crate::words::point::{PointState, Trust};

/// A folder, and its manifest when all of it is what that says.
pub(super) type Looked = (PointFolder, Result<Manifest, Fault>);

/// A name for each point: its folder, or one of its images.
type Names = Vec<(BackupId, String)>;

/// What was recorded before the folders were looked at.
#[derive(Debug)]
pub(super) struct Before {
    disks: BTreeMap<BackupId, Vec<PointDiskRow>>,
    worked_on: BTreeSet<BackupId>,
    dirs: Names,
}

/// What was found of the recorded points.
#[derive(Debug)]
pub(super) struct Judged {
    /// How many there are.
    pub(super) recorded: usize,
    /// Those that are not intact.
    pub(super) bad: BTreeSet<BackupId>,
    /// What is to be told.
    pub(super) findings: Vec<Finding>,
    /// Points whose files went or came back, as they are recorded, and what they are to be.
    pub(super) changes: Vec<(PointRow, PointState)>,
}

impl Before {
    pub(super) async fn read(store: &Store, repository: &RepositoryId) -> Result<Self, StoreError> {
        let mut snapshot = store.snapshot().await?;
        let (mut disks, mut worked_on, mut dirs) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        for point in points::all_in(&mut snapshot, repository).await? {
            if points::is_worked_on(&mut snapshot, &point.id).await? {
                worked_on.insert(point.id.clone());
            }
            disks.insert(point.id.clone(), points::disks(&mut snapshot, &point.id).await?);
            dirs.push((point.id, point.dir));
        }
        Ok(Self { disks, worked_on, dirs })
    }

    /// What is recorded now of points that are to be looked at again.
    pub(super) async fn read_again(&mut self, store: &Store, ids: &BTreeSet<BackupId>) -> Result<(), StoreError> {
        let mut snapshot = store.snapshot().await?;
        for id in ids {
            self.disks.insert(id.clone(), points::disks(&mut snapshot, id).await?);
        }
        Ok(())
    }

    /// The folder of each point, and the names of all images by point.
    pub(super) fn files(&self) -> (Names, Names) {
        let of_point = |(id, disks): (&BackupId, &Vec<PointDiskRow>)| {
            disks.iter().map(|disk| (id.clone(), disk.file.clone())).collect::<Vec<_>>()
        };
        (self.dirs.clone(), self.disks.iter().flat_map(of_point).collect())
    }

    /// Whether the files of a point were being removed or made anew.
    pub(super) fn is_worked_on(&self, id: &BackupId) -> bool {
        self.worked_on.contains(id)
    }

    /// Those of the points that did not fit which may do so in a moment, and why.
    pub(super) async fn doubt(
        &self,
        connection: &mut Connection,
        bad: &BTreeSet<BackupId>,
    ) -> Result<(BTreeSet<BackupId>, Option<Sign>), StoreError> {
        let (mut doubted, mut sign) = (BTreeSet::new(), None);
        for id in bad {
            if self.disks.get(id) != Some(&points::disks(connection, id).await?) {
                sign = Some(Sign::Changed);
            } else if points::is_worked_on(connection, id).await? {
                sign = sign.or(Some(Sign::Held));
            } else {
                continue;
            }
            doubted.insert(id.clone());
        }
        Ok((doubted, sign))
    }
}

/// Records what became of points, each of which is looked at again: whether all of them were what they had been judged as.
///
/// # Errors
/// The database's.
pub(super) async fn record(
    connection: &mut Connection,
    changes: &[(PointRow, PointState)],
) -> Result<bool, StoreError> {
    let mut all = true;
    for (point, state) in changes {
        let now = points::find(connection, &point.id).await?;
        let same = now.is_some_and(|now| (now.state, now.generation) == (point.state, point.generation));
        if same {
            points::set_presence(connection, point, *state).await?;
        } else {
            all = false;
        }
    }
    Ok(all)
}

/// Judges every recorded point that was there before the look began. Nothing is written.
///
/// # Errors
/// The database's.
pub(super) async fn judge_all(
    connection: &mut Connection,
    repository: &RepositoryId,
    before: &Before,
    folders: &[Looked],
    presence: &BTreeMap<BackupId, Presence>,
) -> Result<Judged, StoreError> {
    let by_dir: BTreeMap<String, &Result<Manifest, Fault>> =
        folders.iter().map(|(folder, manifest)| (folder.dir(), manifest)).collect();
    let (mut recorded, mut bad, mut findings, mut changes) = (0, BTreeSet::new(), Vec::new(), Vec::new());
    // In the order of their commits, so that what is wrong below is known before what stands upon it.
    for point in points::all_in(connection, repository).await? {
        // Those on their way out, and those that were committed after the look began, are not judged.
        if point.state == PointState::Deleting || !before.disks.contains_key(&point.id) {
            continue;
        }
        recorded += 1;
        let (kind, detail) = match (presence.get(&point.id), by_dir.get(&point.dir)) {
            (Some(Presence::Gone(what)), _) => {
                if point.state == PointState::Committed {
                    changes.push((point.clone(), PointState::Missing));
                }
                (FindingKind::Missing, what.clone())
            }
            (Some(Presence::There), Some(found)) => {
                if point.state == PointState::Missing {
                    changes.push((point.clone(), PointState::Committed));
                    findings.push(finding(FindingKind::Back, &point, "its files are there again".to_owned()));
                }
                match judge(connection, &point, found, &bad).await? {
                    // No content is read here, but what is known of it is told.
                    None => match point.trust {
                        Trust::Corrupt => (FindingKind::Damaged, known(&point)),
                        Trust::Suspect => {
                            findings.push(finding(FindingKind::Suspect, &point, known(&point)));
                            continue;
                        }
                        Trust::Unverified | Trust::Verified => continue,
                    },
                    Some(detail) => (FindingKind::Damaged, detail),
                }
            }
            (Some(Presence::Unclear(error)), _) => (FindingKind::Damaged, format!("it cannot be looked at: {error}")),
            // It came or went while it was looked for.
            (Some(Presence::There), None) | (None, _) => continue,
        };
        bad.insert(point.id.clone());
        findings.push(finding(kind, &point, detail));
    }
    Ok(Judged { recorded, bad, findings, changes })
}

fn known(point: &PointRow) -> String {
    let reason = point.trust_reason.as_deref().unwrap_or("the reason is not recorded");
    format!("it is known to be {}: {reason}", point.trust)
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
    if manifest.generation != point.generation {
        let (files, record) = (manifest.generation, point.generation);
        return Ok(Some(format!(
            "its files are of generation {files} and its record of {record}: the next start follows them if it can"
        )));
    }
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
