//! Disks that look like those of a real VM: a system disk with a partition table and a file system with files, a large and
//! mostly empty one, a small and full one. Their sizes are whole sectors and no whole clusters, as real ones are.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Where partitions begin, as every partitioning tool of today puts the first one.
const PARTITION_START: u64 = MIB;
/// Bytes of the system disk behind whole MiB: odd sectors.
const SYSTEM_BYTES: u64 = 96 * MIB + 3 * SECTOR;
const DATA_BYTES: u64 = 320 * MIB + 7 * SECTOR;
const DATABASE_BYTES: u64 = 40 * MIB + SECTOR;
/// Type of a Linux partition in a partition table.
const LINUX: u8 = 0x83;

/// Makes three disks in a new folder and returns their paths.
///
/// # Errors
/// Any error of the file system. A missing `mke2fs` is none: the system disk then has files without a file system.
pub fn generate(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir(folder)?;
    let path = |name: &str| folder.join(name);
    let (system, data, database) = (path("system.raw"), path("data.raw"), path("database.raw"));
    system_disk(&system, &path("files"))?;
    data_disk(&data)?;
    database_disk(&database)?;
    Ok(vec![system, data, database])
}

/// Bytes that a file takes on its file system; holes take none.
///
/// # Errors
/// Any error of the file system.
pub fn occupied_bytes(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * SECTOR)
}

/// A partition table and one partition with a file system.
fn system_disk(path: &Path, files: &Path) -> io::Result<()> {
    let disk = File::create(path)?;
    disk.set_len(SYSTEM_BYTES)?;
    write_partition_table(&disk, 0x5eed_0000, SYSTEM_BYTES)?;
    fs::create_dir(files)?;
    fs::create_dir(files.join("etc"))?;
    fs::write(files.join("etc/hostname"), "demo-vm\n")?;
    let mut random = Random(1);
    for number in 0..24_u64 {
        let mut file = File::create(files.join(format!("file-{number:02}.bin")))?;
        // From a few bytes to a few MiB, half of them text.
        let length = 1 << (4 + number % 18);
        let content = if number % 2 == 0 { random.bytes(length) } else { text(length) };
        file.write_all(&content)?;
    }
    if !make_file_system(path, files)? {
        let mut random = Random(2);
        for offset in (PARTITION_START..SYSTEM_BYTES - MIB).step_by(5 * MIB as usize) {
            disk.write_all_at(&random.bytes(MIB as usize), offset)?;
        }
    }
    fs::remove_dir_all(files)?;
    disk.sync_all()
}

/// An ext4 file system with these files in the first partition; false when there is no tool to make one.
fn make_file_system(disk: &Path, files: &Path) -> io::Result<bool> {
    let kib = (SYSTEM_BYTES - PARTITION_START) / 1024;
    for program in ["mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"] {
        let made = Command::new(program)
            .args(["-q", "-F", "-t", "ext4", "-E", &format!("offset={PARTITION_START}"), "-d"])
            .arg(files)
            .arg(disk)
            .arg(format!("{kib}k"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        match made {
            Ok(status) if status.success() => return Ok(true),
            // An old one without these options: as good as none.
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Mostly empty, with islands of data down to one sector, some of them across the borders of clusters.
fn data_disk(path: &Path) -> io::Result<()> {
    let disk = File::create(path)?;
    disk.set_len(DATA_BYTES)?;
    write_partition_table(&disk, 0x5eed_0001, DATA_BYTES)?;
    let mut random = Random(3);
    let mut offset = PARTITION_START;
    while offset < DATA_BYTES - 4 * MIB {
        let length = SECTOR << (random.next() % 13);
        disk.write_all_at(&random.bytes(usize::try_from(length).map_err(io::Error::other)?), offset)?;
        offset += (length + (random.next() % (8 * MIB))) / SECTOR * SECTOR;
    }
    // The very last sector, which is where sizes go wrong.
    disk.write_all_at(&random.bytes(SECTOR as usize), DATA_BYTES - SECTOR)?;
    disk.sync_all()
}

/// Full of pages that repeat in part, as a database's do.
fn database_disk(path: &Path) -> io::Result<()> {
    let disk = File::create(path)?;
    disk.set_len(DATABASE_BYTES)?;
    let mut random = Random(4);
    let mut offset = 0;
    while offset < DATABASE_BYTES {
        let mut page = text(8192);
        page.truncate(usize::try_from((DATABASE_BYTES - offset).min(8192)).map_err(io::Error::other)?);
        let head = random.bytes(page.len() / 4);
        page.iter_mut().zip(head).for_each(|(byte, random)| *byte = random);
        disk.write_all_at(&page, offset)?;
        offset += page.len() as u64;
    }
    disk.sync_all()
}

/// A master boot record with one Linux partition from 1 MiB to the end, in whole sectors.
fn write_partition_table(disk: &File, signature: u32, size: u64) -> io::Result<()> {
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).map_err(io::Error::other);
    let mut entry = [0_u8; 16];
    entry[4] = LINUX;
    entry[8..12].copy_from_slice(&sectors(PARTITION_START)?.to_le_bytes());
    entry[12..16].copy_from_slice(&sectors(size - PARTITION_START)?.to_le_bytes());
    disk.write_all_at(&signature.to_le_bytes(), 440)?;
    disk.write_all_at(&entry, 446)?;
    disk.write_all_at(&[0x55, 0xaa], 510)
}

fn text(length: usize) -> Vec<u8> {
    b"The quick brown fox jumps over the lazy dog.\n".iter().copied().cycle().take(length).collect()
}

/// Numbers that look random and are the same each time (xorshift64*), so that a demo can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 4);
        while bytes.len() < length {
            bytes.extend_from_slice(&(self.next() as u32).to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_disks_look_real() {
        let folder = tempfile::tempdir().unwrap();
        let paths = generate(&folder.path().join("disks")).unwrap();
        assert_eq!(paths.len(), 3);
        for path in &paths {
            let length = fs::metadata(path).unwrap().len();
            assert_eq!(length % SECTOR, 0);
            assert_ne!(length % 65_536, 0, "{}", path.display());
        }
        let mut table = [0; 512];
        File::open(&paths[0]).unwrap().read_exact_at(&mut table, 0).unwrap();
        assert_eq!((table[510], table[511], table[450]), (0x55, 0xaa, LINUX));
        let mut magic = [0; 2];
        File::open(&paths[0]).unwrap().read_exact_at(&mut magic, PARTITION_START + 1024 + 56).unwrap();
        assert_eq!(magic, [0x53, 0xef], "an ext4 file system (install the package e2fsprogs)");
        assert!(occupied_bytes(&paths[1]).unwrap() < fs::metadata(&paths[1]).unwrap().len() / 2, "sparse");
        let again = generate(&folder.path().join("again")).unwrap();
        assert_eq!(fs::read(&paths[2]).unwrap(), fs::read(&again[2]).unwrap());
    }
}
