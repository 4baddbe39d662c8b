//! The files of a point's folder: read once from the disk and hashed, or written so that they are whole or not there.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{Advice, OFlags, fadvise};

use super::pace::{Reading, Stopped};
use crate::digest::Digest;
use crate::repository::directory;

/// Bytes that are read and hashed in one go: the time between two looks at the wish to stop.
const PIECE: usize = 1 << 20;
/// As images and manifests have it: read by the service and its group, written by nobody.
const FILE_MODE: u32 = 0o440;

/// Why a file was not hashed.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// The service stops.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Opens a file that must be a regular one: a pipe in its place must not make us wait.
///
/// # Errors
/// Any error of the file system, and something else than a file.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))
    }
}

/// The whole of a small file; nothing when it is longer than `bytes_max`.
///
/// # Errors
/// Any error of the file system.
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    open(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= bytes_max).then_some(bytes))
}

/// Hashes a file as the disk has it: what the page cache still held is let go first, and not kept afterwards.
///
/// # Errors
/// It cannot be read, or the service stops.
pub fn hash(file: &mut File, reading: &Reading) -> Result<Digest, HashError> {
    // Advice: a file system that does not take it reads from memory, which costs nothing but that look at the disk.
    let forget = |file: &File| fadvise(file, 0, None, Advice::DontNeed);
    let _ = forget(file);
    let _ = fadvise(&*file, 0, None, Advice::Sequential);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE];
    loop {
        let length = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        hasher.update(buffer.get(..length).unwrap_or_default());
        reading.read(length as u64)?;
    }
    let _ = forget(file);
    reading.file();
    Ok(hasher.finalize().into())
}

/// Device and inode of a folder, by which one that was exchanged for another under the same name is told.
///
/// # Errors
/// Any error of the file system.
pub fn identity(folder: &Path) -> io::Result<(u64, u64)> {
    let facts = fs::metadata(folder)?;
    Ok((facts.dev(), facts.ino()))
}

/// A file that is being written under another name beside its own.
#[derive(Debug)]
pub struct Beside {
    file: BufWriter<File>,
}

impl Beside {
    /// Begins to write `name` in `folder`. What a crash left of an earlier attempt goes.
    ///
    /// # Errors
    /// Any error of the file system.
    pub fn create(folder: &Path, name: &str) -> io::Result<Self> {
        let path = folder.join(beside(name));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)?;
        // Whatever the umask took away.
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
        Ok(Self { file: BufWriter::new(file) })
    }

    /// Gives it its name, in the place of what had it.
    ///
    /// # Errors
    /// Any error of the file system.
    ///
    /// # Durability
    /// The bytes survive a power cut, the name only after [`directory::sync_directory`].
    pub fn publish(self, folder: &Path, name: &str) -> io::Result<()> {
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(folder.join(beside(name)), folder.join(name))
    }
}

impl Write for Beside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes a whole small file and makes it durable with its folder.
///
/// # Errors
/// Any error of the file system; the file is the old one then, or there is none.
pub fn replace(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = Beside::create(folder, name)?;
    file.write_all(bytes)?;
    file.publish(folder, name)?;
    directory::sync_directory(folder)
}

fn beside(name: &str) -> String {
    format!("{name}.new")
}
