//! Where things lie in a repository and what they are called.
//!
//! ```text
//! <repository>/.blockyard-repository.json, .lock
//! <repository>/<vm-dir>/<id>.partial/disk-0.qcow2      while writing; never listed
//! <repository>/<vm-dir>/<id>/disk-0.qcow2              published; never written again
//! <repository>/<vm-dir>/<id>/manifest.json
//! <repository>/<vm-dir>/<id>.failed/                   put aside for people to look at
//! <repository>/<vm-dir>/<id>.merging/                  while a point is made anew without its parent
//! <repository>/<vm-dir>/<id>.deleting/                 while a point is removed
//! ```
//! Names only; `directory` beside it touches the file system. Names of VMs come from strangers: whatever they contain, the
//! result is one path component and one NBD export name that the backup client can parse.

use std::path::{Path, PathBuf};

use crate::id::BackupId;

/// The name of the manifest in a published directory.
pub const MANIFEST: &str = "manifest.json";
/// The name of the file that has the digests of a published directory.
pub const DIGESTS: &str = "digests.json";
/// An image, and the digests of its blocks.
const IMAGE_EXTENSIONS: [&str; 2] = ["qcow2", "blocks"];
/// What the name of a file ends in until it is whole: one of ours, and an image that a merge builds.
const UNFINISHED_SUFFIXES: [&str; 2] = [".new", ".partial"];
/// What a staged directory that belongs to nobody is called instead of `.partial`.
pub const QUARANTINE_EXTENSION: &str = "failed";
/// What is appended to the directory of a job that is not committed.
const STAGED_SUFFIX: &str = ".partial";
/// What is appended to the directory in which a point is made anew without its parent.
const MERGING_SUFFIX: &str = ".merging";
/// What is appended to the directory of a point that is being deleted.
const DELETING_SUFFIX: &str = ".deleting";
/// A VM name is cut here in export and directory names: the contract's bound, far below the 255 bytes of a file name.
const VM_NAME_MAX_CHARS: usize = 128;
/// How much of the VM's id makes its directory name unique at first; more when that is taken.
const ID_SUFFIX_CHARS: usize = 4;

/// A name of which only `[A-Za-z0-9._-]` is left, every other character being `_`, cut to 128 characters.
///
/// Never empty, and never a name that begins with a dot: `.`, `..` and hidden files are not reachable through a VM name.
pub fn sanitised(name: &str) -> String {
    let mut safe: String = name
        .chars()
        .take(VM_NAME_MAX_CHARS)
        .map(|character| match character {
            'A'..='Z' | 'a'..='z' | '0'..='9' | '.' | '_' | '-' => character,
            _ => '_',
        })
        .collect();
    if safe.is_empty() {
        safe.push('_');
    } else if safe.starts_with('.') {
        safe.replace_range(0..1, "_");
    }
    safe
}

/// The export name of a disk: `<VM>-disk<N>`. The backup client finds N by the pattern `disk(\d+)$`.
pub fn export_name(vm_name: &str, disk_id: u32) -> String {
    format!("{}-disk{disk_id}", sanitised(vm_name))
}

/// The same with something in the middle that nobody can guess (`nbd.export_names = "unguessable"`).
pub fn unguessable_export_name(vm_name: &str, secret: &str, disk_id: u32) -> String {
    format!("{}-{secret}-disk{disk_id}", sanitised(vm_name))
}

/// The export name of a disk of a restore point: `<VM>-<point>-disk<N>`.
pub fn point_export_name(vm_name: &str, point: &str, disk_id: u32) -> String {
    unguessable_export_name(vm_name, point, disk_id)
}

/// Directory names for a VM, the best first: its sanitised name and the last 4, then 8, … characters of its id. The caller
/// takes the first that no other VM has, and keeps it for ever.
pub fn vm_directory_names(vm_name: &str, vm_id: &str) -> impl Iterator<Item = String> {
    let name = sanitised(vm_name);
    let id = sanitised(vm_id);
    let longest = id.len();
    (ID_SUFFIX_CHARS..longest).step_by(ID_SUFFIX_CHARS).chain([longest]).map(move |chars| {
        // The id is ASCII after sanitising, so every index is a character boundary.
        let suffix = id.get(id.len().saturating_sub(chars)..).unwrap_or(&id);
        format!("{name}-{suffix}")
    })
}

/// The image of a disk inside a staged or published directory.
pub fn image_file_name(disk_id: u32) -> String {
    format!("disk-{disk_id}.qcow2")
}

/// Whether this service writes files of this name into the folder of a backup: images, what it knows of them, the manifest, and
/// each of these while it is written.
pub fn is_backup_file(name: &str) -> bool {
    let name = UNFINISHED_SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
    if name == MANIFEST || name == DIGESTS {
        return true;
    }
    let number = name.strip_prefix("disk-").and_then(|rest| rest.split_once('.'));
    number.is_some_and(|(number, extension)| number.parse::<u32>().is_ok() && IMAGE_EXTENSIONS.contains(&extension))
}

/// What an overlay calls the image below it: from one backup's folder into the one beside it, whatever the repository is called.
pub fn backing_name(parent: &BackupId, file: &str) -> String {
    format!("../{parent}/{file}")
}

/// The directories of one backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupPaths {
    /// The root of the repository.
    pub repository: PathBuf,
    /// `<repository>/<vm-dir>`.
    pub vm: PathBuf,
    /// `<vm>/<id>.partial`: exists while the job runs.
    pub staged: PathBuf,
    /// `<vm>/<id>`: exists from the commit on.
    pub published: PathBuf,
    /// `<vm>/<id>.merging`: the point's images made anew, then, after the exchange, the old ones.
    pub merging: PathBuf,
    /// `<vm>/<id>.failed`: what a job staged that failed, where that is kept.
    pub quarantined: PathBuf,
    /// `<vm>/<id>.deleting`: what is left of a point that is being deleted.
    pub deleting: PathBuf,
}

impl BackupPaths {
    /// The paths of backup `backup_id` of the VM with directory `vm_directory`.
    pub fn new(repository: &Path, vm_directory: &str, backup_id: &str) -> Self {
        let vm = repository.join(vm_directory);
        Self {
            repository: repository.to_owned(),
            staged: vm.join(format!("{backup_id}{STAGED_SUFFIX}")),
            published: vm.join(backup_id),
            quarantined: vm.join(format!("{backup_id}.{QUARANTINE_EXTENSION}")),
            merging: vm.join(format!("{backup_id}{MERGING_SUFFIX}")),
            deleting: vm.join(format!("{backup_id}{DELETING_SUFFIX}")),
            vm,
        }
    }

    /// Where the image of a disk is written.
    pub fn staged_image(&self, disk_id: u32) -> PathBuf {
        self.staged.join(image_file_name(disk_id))
    }

    /// Where the image of a disk will be found after the commit; the path that is told to callers.
    pub fn published_image(&self, disk_id: u32) -> PathBuf {
        self.published.join(image_file_name(disk_id))
    }
}

/// The backup id of the name of a folder in which a point is made anew.
pub fn merging_backup_id(directory_name: &str) -> Option<&str> {
    directory_name.strip_suffix(MERGING_SUFFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_strangers_become_one_harmless_component() {
        for (name, expected) in [
            ("db-server", "db-server"),
            ("SQL 01, prod (50%)", "SQL_01__prod__50__"),
            ("../../etc/passwd", "_._.._etc_passwd"),
            ("..", "_."),
            (".", "_"),
            ("", "_"),
            ("größe/大", "gr__e__"),
            ("a\0b\nc", "a_b_c"),
        ] {
            assert_eq!(sanitised(name), expected, "{name:?}");
        }
        assert_eq!(sanitised(&"x".repeat(300)).len(), 128);
        assert_eq!(sanitised(&"ß".repeat(300)).len(), 128);
    }

    #[test]
    fn the_number_at_the_end_is_the_disk_whatever_the_vm_is_called() {
        assert_eq!(export_name("web-disk2-a", 0), "web-disk2-a-disk0");
        assert_eq!(export_name("x-disk-2000", 11), "x-disk-2000-disk11");
        assert_eq!(export_name("a b", 3), "a_b-disk3");
        assert_eq!(unguessable_export_name("a", "k3y", 3), "a-k3y-disk3");
    }

    #[test]
    fn what_the_service_writes_is_told_from_everything_else_by_its_name() {
        for ours in [
            "disk-0.qcow2",
            "disk-0.qcow2.partial",
            "disk-11.blocks",
            "disk-0.blocks.new",
            "manifest.json",
            "digests.json.new",
        ] {
            assert!(is_backup_file(ours), "{ours}");
        }
        for foreign in
            ["disk-.qcow2", "disk-a.qcow2", "disk-0.raw", "disk-0", "notes", ".new", ".partial", "disk-0.qcow2.old"]
        {
            assert!(!is_backup_file(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_vm_directory_ends_in_more_and_more_of_the_id() {
        let names: Vec<String> = vm_directory_names("db/server", "vm-01JC0A7K4X7Z").collect();
        assert_eq!(names[0], "db_server-4X7Z");
        assert_eq!(names[1], "db_server-0A7K4X7Z");
        assert_eq!(names.last().unwrap(), "db_server-vm-01JC0A7K4X7Z");
    }

    #[test]
    fn staged_and_published_lie_side_by_side() {
        let paths = BackupPaths::new(Path::new("/srv/r"), "db-4X7Z", "backup-1");
        assert_eq!(paths.staged_image(2), Path::new("/srv/r/db-4X7Z/backup-1.partial/disk-2.qcow2"));
        assert_eq!(paths.published_image(2), Path::new("/srv/r/db-4X7Z/backup-1/disk-2.qcow2"));
    }
}
