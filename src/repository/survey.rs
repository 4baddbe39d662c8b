//! A look at everything in a repository: which folders are restore points by their manifests and the heads of their images, and
//! what else lies there.
//!
//! What is found was written by anybody: names are taken from the folder and never from a manifest, links are not followed,
//! files are bounded before they are read, and one thing that is wrong makes one finding. Nothing is changed and no content is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use blockyard_qcow2 as qcow2;

use super::layout;
use super::lock::is_marked;
use super::manifest::{Manifest, ManifestDisk, ManifestError};
use crate::id::{BackupId, RepositoryId};
use crate::words::BackupType;

/// The longest name, path or id in a manifest, in bytes: what the API takes is shorter.
const TEXT_MAX: usize = 4000;

/// What lies in a repository, by its names.
#[derive(Debug, Default)]
pub struct Survey {
    /// Folders that are named as published points are.
    pub points: Vec<PointFolder>,
    /// Everything else in the folders of VMs, and what lies beside them.
    pub others: Vec<Other>,
}

/// A folder with the name of a published point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointFolder {
    /// Its name.
    pub id: BackupId,
    /// The folder of its VM.
    pub vm_directory: String,
}

impl PointFolder {
    /// The folder at this place, relative to the repository; nothing when no point can be there.
    pub fn of_dir(dir: &str) -> Option<Self> {
        let (vm_directory, id) = dir.split_once('/')?;
        Some(Self { id: id.parse().ok()?, vm_directory: vm_directory.to_owned() })
    }

    /// Where it is, relative to the repository.
    pub fn dir(&self) -> String {
        format!("{}/{}", self.vm_directory, self.id)
    }
}

/// Something that is no published point.
#[derive(Debug)]
pub struct Other {
    /// Where it is, relative to the repository.
    pub path: String,
    /// The backup that it belongs to by its name.
    pub id: Option<BackupId>,
    /// What it is by its name.
    pub kind: OtherKind,
}

/// What a folder is by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherKind {
    /// `.partial`: of a job that is not committed.
    Staged,
    /// `.failed`: put aside for people to look at.
    Quarantined,
    /// `.deleting`: of a point that is being removed.
    Deleting,
    /// `.merging`: of a point that is made anew.
    Merging,
    /// Nothing of this service.
    Unknown,
}

/// Why a folder is no usable restore point.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The folder or an image is a link or something else that is no folder or file.
    #[error("{0} is a link or a special file")]
    NotPlain(String),
    /// The manifest is of another folder.
    #[error("the manifest is that of {0}")]
    OtherBackup(BackupId),
    /// The manifest is of another repository.
    #[error("the manifest is one of repository {0}")]
    OtherRepository(RepositoryId),
    /// Something in the manifest cannot be.
    #[error("the manifest is not sound: {0}")]
    Unsound(String),
    /// A file is not as the manifest says.
    #[error("{file}: {what}")]
    File {
        /// Which one.
        file: String,
        /// What is wrong.
        what: String,
    },
}

/// Lists a repository. A folder that cannot be listed ends the look: half a look would call points missing.
///
/// # Errors
/// The file system's.
pub fn survey(root: &Path) -> io::Result<Survey> {
    let mut survey = Survey::default();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy().into_owned();
        // The marker, the lock, and what file systems keep for themselves.
        if text.starts_with('.') {
            continue;
        }
        if !entry.file_type()?.is_dir() || name.to_str().is_none() {
            survey.others.push(Other { path: text, id: None, kind: OtherKind::Unknown });
            continue;
        }
        survey_vm(root, &text, &mut survey)?;
    }
    survey.points.sort_by(|one, other| (&one.id, &one.vm_directory).cmp(&(&other.id, &other.vm_directory)));
    survey.others.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(survey)
}

fn survey_vm(root: &Path, vm_directory: &str, survey: &mut Survey) -> io::Result<()> {
    let folder = match fs::read_dir(root.join(vm_directory)) {
        Ok(folder) => folder,
        // The folder of a VM goes with its last job when that leaves nothing.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in folder {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if let Ok(id) = name.parse::<BackupId>() {
            survey.points.push(PointFolder { id, vm_directory: vm_directory.to_owned() });
            continue;
        }
        let (id, kind) = kind_of(&name);
        survey.others.push(Other { path: format!("{vm_directory}/{name}"), id, kind });
    }
    Ok(())
}

fn kind_of(name: &str) -> (Option<BackupId>, OtherKind) {
    let Some((id, extension)) = name.split_once('.') else { return (None, OtherKind::Unknown) };
    let Ok(id) = id.parse() else { return (None, OtherKind::Unknown) };
    let kind = match extension {
        "partial" => OtherKind::Staged,
        "deleting" => OtherKind::Deleting,
        "merging" | "merging.probe" => OtherKind::Merging,
        layout::QUARANTINE_EXTENSION => OtherKind::Quarantined,
        _ => OtherKind::Unknown,
    };
    (Some(id), kind)
}

/// Whether the files of a recorded point are where they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The folder, and every image that is recorded, as a plain file.
    There,
    /// What is not.
    Gone(String),
    /// It could not be seen, which says nothing.
    Unclear(io::ErrorKind),
}

/// Whether the files of recorded points are there: each with its folder, and the names of all images by point.
///
/// # Errors
/// The repository itself went away meanwhile, so that nothing can be said of any of them.
pub fn presences(
    root: &Path,
    points: Vec<(BackupId, String)>,
    files: &[(BackupId, String)],
) -> io::Result<BTreeMap<BackupId, Presence>> {
    let mut names: BTreeMap<&BackupId, Vec<&str>> = BTreeMap::new();
    for (id, file) in files {
        names.entry(id).or_default().push(file);
    }
    let seen = points.into_iter().map(|(id, dir)| {
        let presence = presence(&root.join(dir), names.get(&id).map(Vec::as_slice).unwrap_or_default());
        (id, presence)
    });
    let seen = seen.collect();
    if is_marked(root) { Ok(seen) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn presence(folder: &Path, files: &[&str]) -> Presence {
    let gone = |what: &str| Presence::Gone(format!("{what} is not there"));
    match fs::symlink_metadata(folder) {
        Ok(facts) if facts.is_dir() => {}
        Ok(_) => return gone("the folder"),
        Err(error) if is_absence(&error) => return gone("the folder"),
        Err(error) => return Presence::Unclear(error.kind()),
    }
    let mut presence = Presence::There;
    for file in files {
        match fs::symlink_metadata(folder.join(file)) {
            Ok(facts) if facts.is_file() => {}
            Ok(_) => return gone(file),
            Err(error) if is_absence(&error) => return gone(file),
            Err(error) => presence = Presence::Unclear(error.kind()),
        }
    }
    presence
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The manifest of a folder, held against the folder's name, itself, and the files beside it as far as their heads tell.
///
/// # Errors
/// What is wrong first.
pub fn read(root: &Path, point: &PointFolder, repository: &RepositoryId) -> Result<Manifest, Fault> {
    let (folder, id) = (root.join(&point.vm_directory).join(point.id.as_str()), &point.id);
    let unreadable = |error: io::Error| Fault::Manifest(error.into());
    if !fs::symlink_metadata(&folder).map_err(unreadable)?.is_dir() {
        return Err(Fault::NotPlain(id.to_string()));
    }
    let manifest = Manifest::read(&folder)?;
    if manifest.backup_id != *id {
        return Err(Fault::OtherBackup(manifest.backup_id));
    }
    if manifest.repository_id != *repository {
        return Err(Fault::OtherRepository(manifest.repository_id));
    }
    check_texts(&manifest)?;
    let (mut numbers, mut keys) = (BTreeSet::new(), BTreeSet::new());
    for disk in &manifest.disks {
        if !numbers.insert(disk.disk_id) || !keys.insert(disk.device_key) {
            return Err(Fault::Unsound(format!("disk {} is there twice", disk.disk_id)));
        }
        check_disk(&manifest, disk)?;
        check_file(&folder, disk)?;
    }
    if manifest.disks.is_empty() {
        return Err(Fault::Unsound("it has no disks".to_owned()));
    }
    Ok(manifest)
}

/// Texts that a database and a person can take.
fn check_texts(manifest: &Manifest) -> Result<(), Fault> {
    let vm = &manifest.vm;
    let needed = [("vm.name", &vm.name), ("vm.vcenter", &vm.vcenter), ("vm.path", &vm.path)];
    let of_disks = manifest.disks.iter().flat_map(|disk| {
        [
            ("vmdk_uuid", disk.vmdk_uuid.as_ref()),
            ("vmdk_path", disk.vmdk_path.as_ref()),
            ("change_id", disk.change_id.as_ref()),
            ("from_change_id", disk.from_change_id.as_ref()),
            ("effective_type", Some(&disk.effective_type)),
        ]
    });
    let optional = of_disks.chain([("vm.uuid", vm.uuid.as_ref())]);
    let all = needed.into_iter().chain(optional.filter_map(|(name, text)| Some((name, text?))));
    for (name, text) in all {
        if text.is_empty() || text.len() > TEXT_MAX || text.contains('\0') {
            return Err(Fault::Unsound(format!("{name} is empty or too long")));
        }
    }
    Ok(())
}

fn check_disk(manifest: &Manifest, disk: &ManifestDisk) -> Result<(), Fault> {
    let wrong = |what: &str| Err(Fault::Unsound(format!("disk {}: {what}", disk.disk_id)));
    let storable = |bytes: u64| i64::try_from(bytes).is_ok();
    let counts = [
        disk.size_bytes,
        disk.file_bytes,
        disk.written_bytes,
        disk.zeroed_bytes,
        disk.zeroed_over_data_bytes,
        disk.identical_bytes,
    ];
    if disk.file != layout::image_file_name(disk.disk_id) {
        return wrong("its file has another name");
    }
    if disk.size_bytes == 0
        || !disk.size_bytes.is_multiple_of(512)
        || disk.device_key == 0
        || !counts.into_iter().all(storable)
    {
        return wrong("a number is out of range");
    }
    if disk.parent_id.is_some() != (disk.backup_type == BackupType::Incremental) {
        return wrong("a full has a parent, or an incremental has none");
    }
    if disk.parent_id.as_ref() == Some(&manifest.backup_id) {
        return wrong("it is its own parent");
    }
    if disk.coverage.iter().any(|(offset, length)| offset.checked_add(*length).is_none_or(|end| end > disk.size_bytes))
    {
        return wrong("its coverage is outside of it");
    }
    Ok(())
}

/// The image as far as its head tells: a file of the recorded length, closed, with the size and the backing file that the manifest
/// says, which can only be the same disk in another folder of the VM.
fn check_file(folder: &Path, disk: &ManifestDisk) -> Result<(), Fault> {
    let wrong = |what: String| Fault::File { file: disk.file.clone(), what };
    let path = folder.join(&disk.file);
    let facts = fs::symlink_metadata(&path).map_err(|error| wrong(error.kind().to_string()))?;
    if !facts.is_file() {
        return Err(Fault::NotPlain(disk.file.clone()));
    }
    if facts.len() != disk.file_bytes {
        return Err(wrong(format!("has {} bytes instead of {}", facts.len(), disk.file_bytes)));
    }
    let info = qcow2::info(&path).map_err(|error| wrong(error.to_string()))?;
    let backing = disk.parent_id.as_ref().map(|parent| qcow2::Backing {
        name: layout::backing_name(parent, &disk.file),
        format: qcow2::BackingFormat::Qcow2,
    });
    if info.backing != backing {
        return Err(wrong("has another backing file than the manifest says".to_owned()));
    }
    if info.size != disk.size_bytes {
        return Err(wrong(format!("is a disk of {} bytes instead of {}", info.size, disk.size_bytes)));
    }
    if info.dirty || info.corrupt {
        return Err(wrong("was not closed, or is marked as damaged".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_told_apart_by_their_names() {
        let id = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB";
        for (extension, kind) in [
            ("partial", OtherKind::Staged),
            ("failed", OtherKind::Quarantined),
            ("deleting", OtherKind::Deleting),
            ("merging", OtherKind::Merging),
            ("merging.probe", OtherKind::Merging),
            ("partial.old", OtherKind::Unknown),
        ] {
            assert_eq!(kind_of(&format!("{id}.{extension}")), (Some(id.parse().unwrap()), kind));
        }
        assert_eq!(kind_of("notes.partial"), (None, OtherKind::Unknown));
        assert_eq!(kind_of("notes"), (None, OtherKind::Unknown));
    }
}
