//! What a folder can do: each thing is tried, in files that are gone when it is over.

use std::io::{self, IoSlice};
use std::path::Path;
use std::time::{Duration, Instant};

use blockyard_qcow2::storage::{FileStorage, Reservation, Storage};
use blockyard_qcow2::{self as qcow2, Access, CreateOptions, Error, Image, OpenOptions};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{DoctorError, MIB};

/// So many syncs are timed, unless they take too long.
const SYNCS: usize = 20;
const SYNCS_TIME: Duration = Duration::from_secs(2);
const BLOCK: usize = 4096;

/// What works in a folder.
#[derive(Debug)]
pub(super) struct Support {
    pub(super) has_fallocate: bool,
    pub(super) has_punch: bool,
    /// Whether a second writer of an image is kept out.
    pub(super) has_locks: bool,
    pub(super) has_rename_noreplace: bool,
    /// The median of `syncs` syncs.
    pub(super) fdatasync: Duration,
    pub(super) syncs: usize,
}

/// # Errors
/// Something that every image needs does not work: a file, a lock, a sync.
pub(super) fn probe(folder: &Path) -> Result<Support, DoctorError> {
    // Never has a name, or loses it at once: a kill leaves nothing behind either.
    let file = tempfile::tempfile_in(folder).map_err(DoctorError::step(folder, "making a file"))?;
    let storage = FileStorage::new(file);
    let has_fallocate = match storage.reserve(0, MIB).map_err(DoctorError::step(folder, "reserving space"))? {
        Reservation::Done => true,
        Reservation::Unsupported => false,
    };
    let (fdatasync, syncs) = time_syncs(&storage).map_err(DoctorError::step(folder, "writing and syncing a file"))?;
    let has_punch = storage.punch(0, BLOCK as u64).is_ok();
    let (has_locks, has_rename_noreplace) = with_names(folder)?;
    Ok(Support { has_fallocate, has_punch, has_locks, has_rename_noreplace, fdatasync, syncs })
}

/// Median and number of syncs, each after a block was written in place.
fn time_syncs(storage: &FileStorage) -> io::Result<(Duration, usize)> {
    let block = [0x5a; BLOCK];
    let write = || storage.write(0, &mut [IoSlice::new(&block)]);
    write()?;
    storage.sync_data()?;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < SYNCS && (times.is_empty() || begin.elapsed() < SYNCS_TIME) {
        write()?;
        let start = Instant::now();
        storage.sync_data()?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok((times.get(times.len() / 2).copied().unwrap_or_default(), times.len()))
}

/// What can be tried only with names: whether locks hold, and whether a rename can be told not to replace.
fn with_names(folder: &Path) -> Result<(bool, bool), DoctorError> {
    let names = tempfile::Builder::new().prefix(".blockyard-doctor-").tempdir_in(folder);
    let names = names.map_err(DoctorError::step(folder, "making a folder"))?;
    let path = names.path().join("image.qcow2");
    qcow2::create(&path, &CreateOptions::new(MIB)).map_err(DoctorError::image(folder))?;
    let options = OpenOptions::new(Access::ReadWrite);
    let image = Image::open(&path, &options).map_err(|error| match error {
        // Of a file that was just made: the lock is refused.
        Error::Open { source, .. } => {
            DoctorError::step(folder, "locking an image (open file description locks)")(source)
        }
        error => DoctorError::image(folder)(error),
    })?;
    let has_locks = matches!(Image::open(&path, &options), Err(Error::Locked { .. }));
    image.close().map_err(DoctorError::image(folder))?;
    let renamed = renameat_with(CWD, &path, CWD, names.path().join("renamed"), RenameFlags::NOREPLACE);
    let has_rename_noreplace = match renamed {
        Ok(()) => true,
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => false,
        Err(errno) => return Err(DoctorError::step(folder, "renaming a file")(errno.into())),
    };
    names.close().map_err(DoctorError::step(folder, "removing a folder"))?;
    Ok((has_locks, has_rename_noreplace))
}
