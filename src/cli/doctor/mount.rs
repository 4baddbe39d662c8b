//! What lies below a folder: its file system, from where that is mounted, and its space.

use std::fs;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::DoctorError;
use crate::repository::directory;

/// Types of file systems whose disk is in another machine. Those of FUSE come with `fuse.` before the name.
const NETWORK: [&str; 15] = [
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
    "sshfs",
    "rclone",
];

/// Where a folder lies.
#[derive(Debug)]
pub(super) struct Mount {
    /// `None` where the system does not tell which mount it is (before Linux 5.8).
    pub(super) entry: Option<Entry>,
    /// Bytes that we can still use.
    pub(super) free_bytes: u64,
    pub(super) total_bytes: u64,
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) file_system: String,
    /// A device, or what the file system calls its source.
    pub(super) device: String,
    pub(super) mount_point: String,
}

impl Entry {
    pub(super) fn is_network(&self) -> bool {
        NETWORK.contains(&self.file_system.strip_prefix("fuse.").unwrap_or(&self.file_system))
    }

    pub(super) fn is_memory(&self) -> bool {
        ["tmpfs", "ramfs"].contains(&self.file_system.as_str())
    }
}

pub(super) fn below(folder: &Path) -> Result<Mount, DoctorError> {
    let failed = |source| DoctorError::Folder { path: folder.to_owned(), source };
    if !fs::metadata(folder).map_err(failed)?.is_dir() {
        return Err(DoctorError::NotAFolder { path: folder.to_owned() });
    }
    let (free_bytes, total_bytes) = directory::space(folder).map_err(failed)?;
    let facts = statx(CWD, folder, AtFlags::empty(), StatxFlags::MNT_ID).map_err(|errno| failed(errno.into()))?;
    let id = (facts.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(facts.stx_mnt_id);
    // Without /proc only the names stay unknown.
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let entry = id.and_then(|id| find(&String::from_utf8_lossy(&mounts), id));
    Ok(Mount { entry, free_bytes, total_bytes })
}

/// The mount with this id: `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [OPTIONAL…] - TYPE SOURCE OPTIONS`.
fn find(mounts: &str, id: u64) -> Option<Entry> {
    let line = mounts.lines().find(|line| line.split(' ').next().and_then(|first| first.parse().ok()) == Some(id))?;
    let (place, what) = line.split_once(" - ")?;
    let mut what = what.split(' ');
    let (file_system, device) = (plain(what.next()?), plain(what.next()?));
    Some(Entry { file_system, device, mount_point: plain(place.split(' ').nth(4)?) })
}

/// A field without the escapes that the kernel writes for blanks and backslashes (`\040`).
fn plain(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (code, part.get(3..)) {
            (Some(code), Some(rest)) => {
                bytes.push(code);
                bytes.extend(rest.as_bytes());
            }
            _ => bytes.extend(part.as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_by_its_id_and_its_names_are_plain() {
        let mounts = "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                      210 21 0:44 / /srv/two\\040words rw shared:5 master:1 - nfs4 nas:/b\\134c rw,vers=4.2\n";
        let root = Entry { file_system: "ext4".into(), device: "/dev/vda".into(), mount_point: "/".into() };
        assert_eq!(find(mounts, 21), Some(root));
        let share = find(mounts, 210).unwrap();
        assert_eq!((share.mount_point.as_str(), share.device.as_str()), ("/srv/two words", "nas:/b\\c"));
        assert!(share.is_network() && !share.is_memory());
        assert_eq!(find(mounts, 2), None);
    }

    #[test]
    fn file_systems_of_other_machines_and_of_memory_are_known_by_their_types() {
        let entry = |file_system: &str| Entry {
            file_system: file_system.into(),
            device: String::new(),
            mount_point: String::new(),
        };
        assert!(entry("fuse.sshfs").is_network() && entry("9p").is_network());
        assert!(!entry("ext4").is_network() && !entry("fuse.mergerfs").is_network() && !entry("ext4").is_memory());
        assert!(entry("tmpfs").is_memory());
    }
}
