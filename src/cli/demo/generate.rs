//! Disks that look real, made in a second or two: one with a partition table and a file system, one mostly empty, one of
//! everything. They are the same in every run, but for the times in the file system.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::DemoError;
use super::data::{Data, PIECE};
use super::disks::DemoDisk;

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// Where partitions begin since disks have 4 KiB sectors.
const PARTITION_START: u64 = MIB;
/// Where `mke2fs` is: on the path, or where Debian keeps it out of the path of ordinary users.
const MKE2FS: [&str; 3] = ["mke2fs", "/usr/sbin/mke2fs", "/sbin/mke2fs"];
/// Identity of the file system: with it and the same `mke2fs`, its directories are laid out the same way.
const FILE_SYSTEM_UUID: &str = "626c6f63-6b79-4172-8420-64656d6f2031";

/// What was made.
#[derive(Debug)]
pub(super) struct Generated {
    pub(super) disks: Vec<DemoDisk>,
    /// Why the first disk has data instead of a file system, when it has.
    pub(super) without_file_system: Option<String>,
}

/// Makes the three disks as sparse files in `folder`.
///
/// # Errors
/// A file cannot be written.
pub(super) fn disks(folder: &Path) -> Result<Generated, DemoError> {
    let make = |name: &str, key: u32, write: &dyn Fn(&Path, &File) -> io::Result<Option<String>>| {
        let path = folder.join(name);
        let failed = |source| DemoError::Make { path: path.clone(), source };
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        let note = write(&path, &file).map_err(failed)?;
        Ok::<_, DemoError>((DemoDisk::open(&path, key)?, note))
    };
    let (system, without_file_system) = make("disk-0.raw", 2000, &system_disk)?;
    let (sparse, _) = make("disk-1.raw", 2001, &|_, file| sparse_disk(file).map(|()| None))?;
    // On another controller.
    let (mixed, _) = make("disk-2.raw", 2016, &|_, file| mixed_disk(file).map(|()| None))?;
    Ok(Generated { disks: vec![system, sparse, mixed], without_file_system })
}

/// A boot sector with one partition, and a file system with files in it.
fn system_disk(path: &Path, file: &File) -> io::Result<Option<String>> {
    let size = 448 * MIB;
    file.set_len(size)?;
    let tree = path.with_extension("files");
    write_files(&tree)?;
    let made = make_file_system(path, &tree, size - PARTITION_START);
    fs::remove_dir_all(&tree)?;
    if made.is_err() {
        let mut data = Data::new(1);
        for index in 0..96 {
            file.write_all_at(data.next(PIECE), PARTITION_START + index * 4 * MIB)?;
        }
    }
    file.write_all_at(&boot_sector(size), 0)?;
    Ok(made.err())
}

/// A master boot record with one Linux partition up to the end of the disk.
fn boot_sector(size: u64) -> [u8; 512] {
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX).to_le_bytes();
    let mut sector = [0; 512];
    // An endless loop is all the boot code there is.
    sector[..2].copy_from_slice(&[0xeb, 0xfe]);
    sector[440..444].copy_from_slice(b"demo");
    let entry = &mut sector[446..462];
    // Active; first and last sector beyond what cylinders, heads and sectors can say; type Linux.
    entry[..8].copy_from_slice(&[0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff]);
    entry[8..12].copy_from_slice(&sectors(PARTITION_START));
    entry[12..].copy_from_slice(&sectors(size - PARTITION_START));
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Runs `mke2fs -d`, which needs no root. The error is for people.
fn make_file_system(image: &Path, tree: &Path, size: u64) -> Result<(), String> {
    for program in MKE2FS {
        let extended = format!("offset={PARTITION_START},root_owner=0:0,hash_seed={FILE_SYSTEM_UUID}");
        let ran = Command::new(program)
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "demo", "-U", FILE_SYSTEM_UUID])
            .args(["-E", &extended, "-d"])
            .arg(tree)
            .arg(image)
            .arg(format!("{}k", size / 1024))
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output();
        match ran {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(format!("mke2fs: {}", said.lines().next().unwrap_or("it failed without a word")));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("mke2fs: {error}")),
        }
    }
    Err("mke2fs is not installed (Debian package e2fsprogs)".to_owned())
}

/// A tree as on a small server: logs, a database, many small files, a sparse one.
fn write_files(tree: &Path) -> io::Result<()> {
    let mut data = Data::new(2);
    for folder in ["etc/app.d", "var/log", "var/lib/db", "home/anna/Fotos ü"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    for number in 0..200_u32 {
        let text = format!("# unit {number}\nname = \"service-{number}\"\nport = {}\n", 8000 + number).repeat(20);
        fs::write(tree.join(format!("etc/app.d/{number:03}.toml")), text)?;
    }
    for day in 1..=4_u32 {
        let line = format!("2026-01-{day:02}T04:05:06Z host app[321]: request 200 GET /index.html 12 ms\n");
        fs::write(tree.join(format!("var/log/app.{day}.log")), line.repeat(60_000))?;
    }
    for (name, pieces) in [("var/lib/db/table.ibd", 48), ("var/lib/db/journal", 16), ("home/anna/Fotos ü/1.raw", 12)] {
        let file = File::create_new(tree.join(name))?;
        for index in 0..pieces {
            file.write_all_at(data.next(PIECE), index * MIB)?;
        }
    }
    let sparse = File::create_new(tree.join("var/lib/db/sparse"))?;
    sparse.set_len(64 * MIB)?;
    sparse.write_all_at(data.next(PIECE), 40 * MIB)?;
    std::os::unix::fs::symlink("app.1.log", tree.join("var/log/current"))
}

/// Islands of data in a disk that is otherwise empty; it ends in the middle of a cluster, and its last sector is used.
fn sparse_disk(file: &File) -> io::Result<()> {
    let size = 480 * MIB + 37 * SECTOR;
    file.set_len(size)?;
    let mut data = Data::new(3);
    for island in [0, 192, 352] {
        for piece in 0..24 {
            file.write_all_at(data.next(PIECE), (island + piece) * MIB)?;
        }
    }
    file.write_all_at(data.next(512), size - SECTOR)
}

/// Data, zeroes that were written, holes, runs of one byte, and lone sectors; an odd number of sectors.
fn mixed_disk(file: &File) -> io::Result<()> {
    let size = 128 * MIB + 3 * SECTOR;
    file.set_len(size)?;
    let mut data = Data::new(4);
    for index in 0..128 {
        let offset = index * MIB;
        match index % 4 {
            0 => file.write_all_at(data.next(PIECE), offset)?,
            1 => file.write_all_at(&vec![if index % 8 == 1 { 0 } else { 0xa5 }; PIECE], offset)?,
            2 => {
                for sector in (0..2048).step_by(331) {
                    file.write_all_at(data.next(512), offset + sector * SECTOR)?;
                }
            }
            // A hole.
            _ => {}
        }
    }
    file.write_all_at(data.next(512), size - SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_sector_holds_one_partition_that_ends_with_the_disk() {
        let sector = boot_sector(448 * MIB);
        let number = |range: std::ops::Range<usize>| u32::from_le_bytes(sector[range].try_into().unwrap());
        assert_eq!(number(454..458), 2048);
        assert_eq!(number(454..458) + number(458..462), 448 * 2048);
        assert_eq!(sector[510..], [0x55, 0xaa]);
    }
}
