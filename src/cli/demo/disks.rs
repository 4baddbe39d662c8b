//! The disks of the pretended VM: raw files or block devices, opened for reading only.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use super::DemoError;

/// The first bytes of every qcow2 image.
const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";
/// Disks are made of sectors.
const SECTOR_BYTES: u64 = 512;
/// The key of the first disk on the first SCSI controller, and how far the keys of two controllers are apart.
const FIRST_KEY: u32 = 2000;
const KEYS_PER_CONTROLLER: u32 = 16;
/// The unit number of the controller itself, which no disk has.
const CONTROLLER_UNIT: u32 = 7;

/// One disk. Its number is its place in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DemoDisk {
    /// VMware's number of it.
    pub(super) device_key: u32,
    /// What is on it.
    pub(super) path: PathBuf,
    /// Its size.
    pub(super) size_bytes: u64,
    /// Whether it begins as qcow2 images do. It is a raw disk all the same.
    pub(super) looks_like_qcow2: bool,
}

impl DemoDisk {
    /// A file or block device as a disk.
    ///
    /// # Errors
    /// It cannot be read, is neither, or has a size that no disk has.
    pub(super) fn open(path: &Path, device_key: u32) -> Result<Self, DemoError> {
        let unreadable = |source| DemoError::DiskUnreadable { path: path.to_owned(), source };
        // Looked at before it is opened: opening a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(unreadable)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DemoError::NotADisk { path: path.to_owned() });
        }
        let mut file = File::open(path).map_err(unreadable)?;
        // A block device has no length, but an end.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DemoError::DiskSize { path: path.to_owned(), size_bytes });
        }
        let mut magic = [0; QCOW2_MAGIC.len()];
        file.read_exact_at(&mut magic, 0).map_err(unreadable)?;
        Ok(Self { device_key, path: path.to_owned(), size_bytes, looks_like_qcow2: magic == *QCOW2_MAGIC })
    }
}

/// All given disks, with the keys they would have on the controllers of a VM.
pub(super) fn open(paths: &[PathBuf]) -> Result<Vec<DemoDisk>, DemoError> {
    paths.iter().zip(device_keys()).map(|(path, key)| DemoDisk::open(path, key)).collect()
}

fn device_keys() -> impl Iterator<Item = u32> {
    (0..).filter(|unit| unit % KEYS_PER_CONTROLLER != CONTROLLER_UNIT).map(|unit| FIRST_KEY + unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_skip_the_unit_of_the_controller() {
        let keys: Vec<u32> = device_keys().take(17).collect();
        assert_eq!(keys[6..9], [2006, 2008, 2009]);
        assert_eq!(keys[14..], [2015, 2016, 2017]);
    }

    #[test]
    fn what_is_no_disk_is_refused_before_anything_starts() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let open = |path: &Path| DemoDisk::open(path, 2000);
        assert!(matches!(open(folder.path()), Err(DemoError::NotADisk { .. })));
        assert!(matches!(open(&folder.path().join("absent")), Err(DemoError::DiskUnreadable { .. })));
        assert!(matches!(open(&file("empty", b"")), Err(DemoError::DiskSize { size_bytes: 0, .. })));
        assert!(matches!(open(&file("odd", &[1; 513])), Err(DemoError::DiskSize { size_bytes: 513, .. })));
        assert!(!open(&file("raw", &[1; 512])).unwrap().looks_like_qcow2);
        let mut image = vec![0; 1024];
        image[..4].copy_from_slice(QCOW2_MAGIC);
        assert!(open(&file("image", &image)).unwrap().looks_like_qcow2);
    }
}
