//! Opening a path that has to be a regular file: a FIFO must not make us wait, nor a device do what devices do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Error, Result};
use crate::lock::Access;

/// Opens an existing file for what `access` says; locking it is the caller's business.
pub(crate) fn open(path: &Path, access: Access) -> Result<File> {
    let refuse = |source| Error::Open { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite).custom_flags(OFlags::NONBLOCK.bits() as i32);
    let file = options.open(path).map_err(refuse)?;
    if !file.metadata().map_err(refuse)?.is_file() {
        return Err(refuse(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    Ok(file)
}
