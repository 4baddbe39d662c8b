//! The file system steps of a merge: a folder beside that of the point, in which it is made anew; the exchange of the two; and
//! the removal of the one that is not the point any more.
//!
//! All functions block. No step changes a published file, and each can be repeated after any crash. Which of the two folders
//! is the newer one is told by the `generation` in their manifests, never by their names.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::directory::{DIRECTORY_MODE, finish, foreign_in, load, sync_directory};
use super::layout::BackupPaths;
use super::manifest::{Manifest, ManifestError};
use crate::id::BackupId;

/// What is appended once more to the name of the second folder of a try of the exchange.
pub(crate) const PROBE_SUFFIX: &str = ".probe";

/// Whether a file system can do what a merge needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// Two folders can take each other's names in one step.
    Possible,
    /// They cannot; nothing was left behind.
    Impossible,
}

/// Makes the folder `<id>.merging`, which must be new, after a try whether the file system can exchange folders at all.
///
/// # Errors
/// Any error of the file system; that the folder exists is one. Nothing is left behind then, as far as can be.
pub fn create_merging(paths: &BackupPaths) -> io::Result<Exchange> {
    let mut builder = DirBuilder::new();
    builder.mode(DIRECTORY_MODE);
    builder.create(&paths.merging)?;
    let probe = probe(paths);
    let tried = builder.create(&probe).and_then(|()| Ok(exchange_names(&paths.merging, &probe)?));
    // Both are empty, whichever has which name.
    let removed = fs::remove_dir(&probe);
    let can = match tried {
        Ok(()) => removed.map(|()| Exchange::Possible),
        Err(error) if is_unsupported(&error) => removed.map(|()| Exchange::Impossible),
        Err(error) => Err(error),
    };
    match can {
        Ok(Exchange::Possible) => sync_directory(&paths.vm)?,
        // The error that is reported is the first one; an empty folder is removed by the next merge or start.
        Ok(Exchange::Impossible) | Err(_) => drop(fs::remove_dir(&paths.merging)),
    }
    can
}

/// The second folder of the try.
pub(crate) fn probe(paths: &BackupPaths) -> PathBuf {
    let mut name = paths.merging.clone().into_os_string();
    name.push(PROBE_SUFFIX);
    name.into()
}

fn exchange_names(one: &Path, other: &Path) -> Result<(), Errno> {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
}

/// What file systems answer that do not know the flag, or not for folders.
fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::XDEV].iter().any(|known| errno == Some(known.raw_os_error()))
}

/// Brings a file of the published folder into the new one as it is: by a second name, or, where that cannot be had, by a
/// copy, for which `room` tells how many bytes may be taken now.
///
/// # Errors
/// Any error of the file system; [`io::ErrorKind::StorageFull`] when a copy would take what is not ours.
pub fn carry_over(paths: &BackupPaths, file: &str, room: impl FnOnce() -> io::Result<u64>) -> io::Result<()> {
    let (from, to) = (paths.published.join(file), paths.merging.join(file));
    match fs::hard_link(&from, &to) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => Err(error),
        Err(_) if fs::metadata(&from)?.len() > room()? => Err(io::ErrorKind::StorageFull.into()),
        Err(_) => fs::copy(&from, &to).map(drop),
    }
}

/// Writes the manifest into the new folder and makes all of it durable.
///
/// # Errors
/// Any error of the file system.
pub fn finish_merging(paths: &BackupPaths, manifest: &[u8]) -> io::Result<()> {
    finish(&paths.merging, manifest)
}

/// Exchanges the two folders. One exchange that happened although it was reported as failed counts as done.
///
/// # Errors
/// Any error of the file system. The names are as before then.
///
/// # Durability
/// None before [`super::directory::sync_published`].
pub fn exchange(paths: &BackupPaths, id: &BackupId, generation: u32) -> io::Result<()> {
    exchange_names(&paths.published, &paths.merging).or_else(|errno| match load(&paths.published, id) {
        Ok(manifest) if manifest.generation == generation => Ok(()),
        _ => Err(errno.into()),
    })
}

/// Removes `<id>.merging` with everything in it; nothing to do when it is gone already.
///
/// # Errors
/// Any error of the file system but "not found".
pub fn remove_merging(paths: &BackupPaths) -> io::Result<()> {
    // Of a try that was cut; nothing but an empty folder has this name.
    let probed = fs::remove_dir(probe(paths));
    match fs::remove_dir_all(&paths.merging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) if probed.is_err() => return Ok(()),
        Ok(()) | Err(_) => {}
    }
    sync_directory(&paths.vm)
}

/// What became of the rest of a merge whose point goes, or is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Orphan {
    /// Nothing is left of it, or there was none.
    Gone,
    /// It is not proven to be ours, and why; it is left alone.
    Foreign(String),
}

/// Removes what a merge left of a point whose record says that it is being deleted, or is deleted. Old files and new ones, whole
/// or not, are of that point and of no other; a folder that says something else, or holds something else, is not such a rest.
///
/// # Errors
/// Any error of the file system but "not found".
pub fn remove_orphaned(paths: &BackupPaths, id: &BackupId) -> io::Result<Orphan> {
    if let Some(foreign) = foreign_in(&paths.merging)? {
        return Ok(Orphan::Foreign(foreign));
    }
    match Manifest::read(&paths.merging) {
        Ok(manifest) if manifest.backup_id == *id => {}
        Ok(manifest) => return Ok(Orphan::Foreign(format!("its manifest is that of {}", manifest.backup_id))),
        // Not begun, or cut while it was written.
        Err(ManifestError::Read(error)) if error.kind() == io::ErrorKind::NotFound => {}
        Err(ManifestError::Invalid(_)) => {}
        Err(ManifestError::Read(error)) => return Err(error),
        Err(error) => return Ok(Orphan::Foreign(error.to_string())),
    }
    match remove_merging(paths) {
        // The folder of the VM went before, with its last point.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(Orphan::Gone),
    }
}

/// What the folders of a point say about a merge that was cut.
#[derive(Debug)]
pub enum Remains {
    /// `<id>.merging` is not needed: it is unfinished, or holds what the point was before.
    Needless(Box<Manifest>),
    /// Nothing is known for certain, and nothing may go.
    Unclear(String),
}

/// Looks at the two folders of a point. Only what a whole published folder makes needless is called so.
pub fn judge(paths: &BackupPaths, id: &BackupId) -> Remains {
    let published = match load(&paths.published, id) {
        Ok(manifest) => manifest,
        Err(error) => return Remains::Unclear(format!("the published folder cannot be relied on: {error}")),
    };
    match load(&paths.merging, id) {
        Ok(beside) if beside.generation == published.generation => {
            Remains::Unclear("both folders say that they are the same".to_owned())
        }
        Err(error @ (ManifestError::Newer { .. } | ManifestError::NotPlain | ManifestError::TooLong(_))) => {
            Remains::Unclear(error.to_string())
        }
        Ok(_)
        | Err(
            ManifestError::Read(_)
            | ManifestError::Invalid(_)
            | ManifestError::OtherBackup { .. }
            | ManifestError::OtherLength { .. },
        ) => Remains::Needless(Box::new(published)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::MANIFEST;
    use super::*;

    #[test]
    fn a_merging_folder_must_be_new_and_goes_with_everything_in_it() {
        let root = tempfile::tempdir().unwrap();
        let paths = BackupPaths::new(root.path(), "db-4X7Z", "backup-1");
        fs::create_dir(&paths.vm).unwrap();
        assert_eq!(create_merging(&paths).unwrap(), Exchange::Possible);
        assert_eq!(create_merging(&paths).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        fs::write(paths.merging.join("disk-0.qcow2"), b"x").unwrap();
        fs::create_dir(probe(&paths)).unwrap();
        remove_merging(&paths).unwrap();
        remove_merging(&paths).unwrap();
        assert_eq!(fs::read_dir(&paths.vm).unwrap().count(), 0);
    }

    #[test]
    fn the_rest_of_a_merge_goes_with_its_point_when_it_is_all_ours() {
        let root = tempfile::tempdir().unwrap();
        let id = BackupId::new();
        let paths = BackupPaths::new(root.path(), "db-4X7Z", id.as_str());
        assert_eq!(remove_orphaned(&paths, &id).unwrap(), Orphan::Gone, "there is none");
        fs::create_dir_all(&paths.merging).unwrap();
        fs::create_dir(probe(&paths)).unwrap();
        fs::write(paths.merging.join("disk-0.qcow2"), b"x").unwrap();
        // Of a kill while an image was made.
        fs::write(paths.merging.join("disk-1.qcow2.partial"), b"x").unwrap();
        fs::write(paths.merging.join(MANIFEST), b"{").unwrap();
        fs::write(paths.merging.join("precious"), b"mine").unwrap();
        assert!(matches!(remove_orphaned(&paths, &id).unwrap(), Orphan::Foreign(_)));
        fs::remove_file(paths.merging.join("precious")).unwrap();
        fs::write(paths.merging.join(MANIFEST), br#"{"format": 99}"#).unwrap();
        assert!(matches!(remove_orphaned(&paths, &id).unwrap(), Orphan::Foreign(_)));
        assert!(paths.merging.join("disk-0.qcow2").exists());
        fs::write(paths.merging.join(MANIFEST), b"{").unwrap();
        assert_eq!(remove_orphaned(&paths, &id).unwrap(), Orphan::Gone);
        assert_eq!(fs::read_dir(&paths.vm).unwrap().count(), 0);
        // A link is not followed, and is nobody's rest.
        std::os::unix::fs::symlink(root.path(), &paths.merging).unwrap();
        assert!(matches!(remove_orphaned(&paths, &id).unwrap(), Orphan::Foreign(_)));
    }

    #[test]
    fn the_exchange_swaps_the_names_and_a_carried_file_is_the_same_file() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let paths = BackupPaths::new(root.path(), "db-4X7Z", "backup-1");
        fs::create_dir_all(&paths.published).unwrap();
        fs::write(paths.published.join("disk-0.qcow2"), b"x").unwrap();
        create_merging(&paths).unwrap();
        carry_over(&paths, "disk-0.qcow2", || Ok(0)).unwrap();
        assert!(carry_over(&paths, "disk-1.qcow2", || Ok(9)).is_err());
        fs::write(paths.merging.join("new"), b"x").unwrap();
        let inode = |folder: &Path| fs::metadata(folder.join("disk-0.qcow2")).unwrap().ino();
        assert_eq!(inode(&paths.published), inode(&paths.merging));
        exchange(&paths, &BackupId::new(), 1).unwrap();
        assert!(paths.published.join("new").exists() && !paths.merging.join("new").exists());
    }

    #[test]
    fn a_file_that_cannot_have_a_second_name_is_copied_only_into_room_that_is_ours() {
        let (root, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let paths = BackupPaths::new(root.path(), "db-4X7Z", "backup-1");
        fs::create_dir_all(&paths.published).unwrap();
        fs::write(paths.published.join("disk-0.qcow2"), b"x").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), &paths.merging).unwrap();
        let refused = carry_over(&paths, "disk-0.qcow2", || Ok(0)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        assert!(!elsewhere.path().join("disk-0.qcow2").exists());
        carry_over(&paths, "disk-0.qcow2", || Ok(1)).unwrap();
        assert_eq!(fs::read(elsewhere.path().join("disk-0.qcow2")).unwrap(), b"x");
    }
}
