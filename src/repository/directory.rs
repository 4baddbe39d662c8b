//! The file system steps of a backup's life: make the staged directory, publish it by one rename, or remove it; and, at its
//! end, remove what was published.
//!
//! All functions block and are called on blocking threads. Each can be repeated after any crash; what a step promises
//! about a power cut is said where it returns.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::layout::{self, BackupPaths, MANIFEST};
use super::manifest::{Manifest, ManifestError};
use crate::id::BackupId;

/// Directories may be listed by the group of the service, images read by it, by nobody else.
pub(super) const DIRECTORY_MODE: u32 = 0o750;
const PUBLISHED_FILE_MODE: u32 = 0o440;

/// How often `<vm-dir>` is made again after it went while it was empty. Each time another point of the VM was removed to its
/// end meanwhile, so twice is rare already.
const VM_DIRECTORY_ATTEMPTS: usize = 8;

/// Makes `<vm-dir>` when it is missing, and the staged directory, which must be new.
///
/// # Errors
/// Any error of the file system; the staged directory existing already is one.
///
/// # Durability
/// Both directories survive a power cut.
pub fn create_staged(paths: &BackupPaths) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.mode(DIRECTORY_MODE);
    let mut attempts = VM_DIRECTORY_ATTEMPTS;
    loop {
        match builder.create(&paths.vm) {
            Ok(()) => sync_directory(&paths.repository)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        attempts -= 1;
        match builder.create(&paths.staged) {
            Ok(()) => return sync_directory(&paths.vm),
            // The removal of the VM's last point took the empty folder along.
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempts > 0 => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes the staged directory with everything in it; nothing to do when it is gone already. An empty `<vm-dir>` of a VM
/// without points goes too.
///
/// # Errors
/// Any error of the file system but "not found".
pub fn remove_staged(paths: &BackupPaths) -> io::Result<()> {
    match fs::remove_dir_all(&paths.staged) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    sync_emptied(paths)
}

/// Takes the published directory of a point out of the way: from now on it is one that is being removed. Nothing to do when it
/// is not there. Never replaces anything.
///
/// # Errors
/// Any error of the file system, also when something has the name already. Nothing is renamed then.
///
/// # Durability
/// The new name survives a power cut, so that no crash ever shows a point's directory with only some of its files.
pub fn retire(paths: &BackupPaths) -> io::Result<()> {
    match rename_to_nothing(&paths.published, &paths.deleting) {
        Ok(()) => sync_directory(&paths.vm),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what [`retire`] put aside; nothing to do when it is gone already. An empty `<vm-dir>` goes too.
///
/// # Errors
/// Any error of the file system but "not found".
///
/// # Durability
/// The removal survives a power cut.
pub fn remove_retired(paths: &BackupPaths) -> io::Result<()> {
    match fs::remove_dir_all(&paths.deleting) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    match sync_emptied(paths) {
        // With it went the last point of the VM, by another removal or before a crash.
        Err(error) if error.kind() == io::ErrorKind::NotFound => sync_directory(&paths.repository),
        synced => synced,
    }
}

/// Makes a removal from `<vm-dir>` durable, and removes that too when nothing is left in it.
fn sync_emptied(paths: &BackupPaths) -> io::Result<()> {
    sync_directory(&paths.vm)?;
    // Fails with "not empty" for every VM that has points, which is as it should be.
    if fs::remove_dir(&paths.vm).is_ok() {
        sync_directory(&paths.repository)?;
    }
    Ok(())
}

/// Puts the staged directory aside for people to look at; nothing to do when it is gone already.
///
/// # Errors
/// Any error of the file system but "not found".
pub fn quarantine_staged(paths: &BackupPaths) -> io::Result<()> {
    match fs::rename(&paths.staged, &paths.quarantined) {
        Ok(()) => sync_directory(&paths.vm),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// What became of what a job has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leftover {
    /// Nothing of it is there.
    Gone,
    /// It is not all ours, and what is not; nothing was removed.
    Foreign(String),
}

/// Removes what a job without a point has left, which is over: what was put aside, and what could not be removed at its end. An
/// empty `<vm-dir>` goes too.
///
/// # Errors
/// Any error of the file system but "not found".
///
/// # Durability
/// The removal survives a power cut.
pub fn remove_left(paths: &BackupPaths) -> io::Result<Leftover> {
    let folders = [&paths.quarantined, &paths.staged];
    for folder in folders {
        if let Some(foreign) = foreign_in(folder)? {
            return Ok(Leftover::Foreign(foreign));
        }
    }
    let mut removed = false;
    for folder in folders {
        match fs::remove_dir_all(folder) {
            Ok(()) => removed = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    if removed {
        sync_emptied(paths)?;
    }
    Ok(Leftover::Gone)
}

/// Sets the modes of the staged files, writes the manifest, and makes all of it durable under the staged name.
///
/// # Errors
/// Any error of the file system. Nothing is published then.
pub fn finish_staged(paths: &BackupPaths, manifest: &[u8]) -> io::Result<()> {
    finish(&paths.staged, manifest)
}

/// The same for a folder of any name.
pub(super) fn finish(folder: &Path, manifest: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(folder.join(MANIFEST))?;
    file.write_all(manifest)?;
    file.set_permissions(Permissions::from_mode(PUBLISHED_FILE_MODE))?;
    file.sync_all()?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // The images are durable since their seal; opening them again makes the mode durable too.
        let image = File::open(entry.path())?;
        image.set_permissions(Permissions::from_mode(PUBLISHED_FILE_MODE))?;
        image.sync_all()?;
    }
    fs::set_permissions(folder, Permissions::from_mode(DIRECTORY_MODE))?;
    sync_directory(folder)
}

/// The commit: gives the staged directory its final name. Never replaces anything.
///
/// # Errors
/// Any error of the file system, also when the final name exists. Nothing is renamed then.
///
/// # Durability
/// None before [`sync_published`].
pub fn publish(paths: &BackupPaths) -> io::Result<()> {
    rename_to_nothing(&paths.staged, &paths.published)
}

/// Renames a directory to a name that must be free.
fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // Network file systems do not know the flag. A plain rename is as good here: it cannot replace a directory that
        // holds anything, and a published one always holds its manifest.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => fs::rename(from, to),
        Err(error) => Err(error.into()),
    }
}

/// Makes the rename survive a power cut. Repeatable, and repeated when a restart rolls forward.
///
/// # Errors
/// Any error of the file system.
pub fn sync_published(paths: &BackupPaths) -> io::Result<()> {
    sync_directory(&paths.vm)?;
    sync_directory(&paths.repository)
}

/// The manifest of a published directory, or nothing when there is no such directory.
///
/// # Errors
/// A directory whose manifest is missing, unreadable, or belongs to another backup.
pub fn load_published(paths: &BackupPaths, backup_id: &BackupId) -> Result<Option<Manifest>, ManifestError> {
    if !paths.published.try_exists()? {
        return Ok(None);
    }
    load(&paths.published, backup_id).map(Some)
}

/// The manifest of a folder that must be whole: it belongs to this backup, and every image has the length that it says.
///
/// # Errors
/// Anything that is not so.
pub fn load(folder: &Path, backup_id: &BackupId) -> Result<Manifest, ManifestError> {
    let manifest = Manifest::read(folder)?;
    if manifest.backup_id != *backup_id {
        return Err(ManifestError::OtherBackup { found: manifest.backup_id });
    }
    for disk in &manifest.disks {
        if fs::metadata(folder.join(&disk.file))?.len() != disk.file_bytes {
            return Err(ManifestError::OtherLength { file: disk.file.clone() });
        }
    }
    Ok(manifest)
}

/// What in the folder of a backup this service cannot have written, by its name or because it is no plain file; nothing when
/// all of it is ours, or there is no such folder.
///
/// # Errors
/// Any error of the file system but "not found".
pub(super) fn foreign_in(folder: &Path) -> io::Result<Option<String>> {
    let entries = match fs::symlink_metadata(folder) {
        Ok(facts) if facts.is_dir() => fs::read_dir(folder)?,
        Ok(_) => return Ok(Some("it is no folder".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if !entry.file_type()?.is_file() || !name.to_str().is_some_and(layout::is_backup_file) {
            return Ok(Some(format!("{} in it is not of this service", name.to_string_lossy())));
        }
    }
    Ok(None)
}

/// The length of a file in bytes.
///
/// # Errors
/// Any error of the file system.
pub fn file_bytes(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.len())
}

/// Bytes that an unprivileged writer can still use, and the size of the file system.
///
/// # Errors
/// Any error of the file system.
pub fn space(path: &Path) -> io::Result<(u64, u64)> {
    let facts = rustix::fs::statvfs(path)?;
    Ok((facts.f_bavail.saturating_mul(facts.f_frsize), facts.f_blocks.saturating_mul(facts.f_frsize)))
}

/// Makes the names in a folder survive a power cut.
///
/// # Errors
/// Any error of the file system.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(root: &Path) -> BackupPaths {
        BackupPaths::new(root, "db-4X7Z", "backup-1")
    }

    #[test]
    fn a_staged_directory_must_be_new_and_goes_with_the_vm_directory_it_made() {
        let root = tempfile::tempdir().unwrap();
        let paths = paths(root.path());
        create_staged(&paths).unwrap();
        assert_eq!(create_staged(&paths).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        fs::write(paths.staged_image(0), b"x").unwrap();
        remove_staged(&paths).unwrap();
        remove_staged(&paths).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn publishing_never_replaces_and_sets_the_modes() {
        let root = tempfile::tempdir().unwrap();
        let paths = paths(root.path());
        create_staged(&paths).unwrap();
        fs::write(paths.staged_image(0), b"x").unwrap();
        finish_staged(&paths, b"{}").unwrap();
        fs::create_dir(&paths.published).unwrap();
        assert!(publish(&paths).is_err());
        fs::remove_dir(&paths.published).unwrap();
        publish(&paths).unwrap();
        sync_published(&paths).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&paths.published), 0o750);
        assert_eq!(mode(&paths.published_image(0)), 0o440);
        assert_eq!(mode(&paths.published.join(MANIFEST)), 0o440);
        // The directory of a VM that has a point stays.
        fs::create_dir(&paths.staged).unwrap();
        remove_staged(&paths).unwrap();
        assert!(paths.published.exists());
    }

    #[test]
    fn a_published_directory_is_removed_in_two_steps_that_can_be_repeated_and_replace_nothing() {
        let root = tempfile::tempdir().unwrap();
        let paths = paths(root.path());
        fs::create_dir_all(&paths.published).unwrap();
        fs::write(paths.published_image(0), b"x").unwrap();
        fs::create_dir(&paths.deleting).unwrap();
        assert!(retire(&paths).is_err(), "what somebody else put there is not replaced");
        assert!(paths.published_image(0).exists());
        fs::remove_dir(&paths.deleting).unwrap();
        retire(&paths).unwrap();
        retire(&paths).unwrap();
        assert!(!paths.published.exists() && paths.deleting.exists());
        remove_retired(&paths).unwrap();
        remove_retired(&paths).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "the folder of the VM goes with its last point");
        // Nothing is made where there is no repository.
        fs::remove_dir(root.path()).unwrap();
        retire(&paths).unwrap();
        assert!(remove_retired(&paths).is_err());
        fs::create_dir(root.path()).unwrap();
    }

    #[test]
    fn what_a_job_left_goes_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let paths = paths(root.path());
        assert_eq!(remove_left(&paths).unwrap(), Leftover::Gone, "there is nothing");
        create_staged(&paths).unwrap();
        fs::write(paths.staged_image(0), b"x").unwrap();
        quarantine_staged(&paths).unwrap();
        fs::write(paths.quarantined.join("what I found.txt"), b"mine").unwrap();
        assert!(matches!(remove_left(&paths).unwrap(), Leftover::Foreign(what) if what.contains("what I found.txt")));
        assert!(paths.quarantined.join("disk-0.qcow2").exists());
        fs::remove_file(paths.quarantined.join("what I found.txt")).unwrap();
        fs::create_dir(&paths.staged).unwrap();
        assert_eq!(remove_left(&paths).unwrap(), Leftover::Gone);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_published_directory_without_a_valid_manifest_is_an_error_and_none_is_none() {
        let root = tempfile::tempdir().unwrap();
        let paths = paths(root.path());
        let id = BackupId::new();
        assert!(load_published(&paths, &id).unwrap().is_none());
        fs::create_dir_all(&paths.published).unwrap();
        assert!(load_published(&paths, &id).is_err());
        fs::write(paths.published.join(MANIFEST), b"{").unwrap();
        assert!(load_published(&paths, &id).is_err());
    }
}
