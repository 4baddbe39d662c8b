//! QEMU-compatible image locks: shared open-file-description locks on single bytes.
//!
//! Byte 100 + p says "I use permission p", byte 200 + p "others must not have p". Both sides take their own locks first
//! and then test for conflicts, so that of two racing processes at least one sees the other.

use std::fs::File;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, Result};

const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;
const USES: u64 = 100;
const FORBIDS: u64 = 200;

/// What a handle on an image is going to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading; nobody else may write or resize meanwhile.
    ReadOnly,
    /// Reading and writing; others may neither write, nor resize, nor open it in a way that wants a consistent view.
    ReadWrite,
}

/// Takes the locks for `access` on the file that will be used, or none at all.
pub(crate) fn lock(file: &File, path: &Path, access: Access) -> Result<()> {
    let uses: &[u64] = match access {
        Access::ReadOnly => &[CONSISTENT_READ],
        Access::ReadWrite => &[CONSISTENT_READ, WRITE, RESIZE],
    };
    let forbids = [WRITE, RESIZE];
    let taken = take(file, uses, forbids).and_then(|()| find_conflict(file, uses, forbids));
    match taken {
        Ok(None) => Ok(()),
        Ok(Some(byte)) => {
            unlock(file);
            Err(Error::Locked { path: path.to_owned(), byte })
        }
        Err(errno) => {
            unlock(file);
            Err(Error::Open { path: path.to_owned(), source: errno.into() })
        }
    }
}

/// Gives up all locks; also done by closing the file.
pub(crate) fn unlock(file: &File) {
    let range = flock(libc::F_UNLCK as libc::c_short, USES, FORBIDS + RESIZE + 1 - USES);
    // An unlock can only fail when there is nothing to unlock.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range));
}

fn take(file: &File, uses: &[u64], forbids: [u64; 2]) -> nix::Result<()> {
    let bytes = uses.iter().map(|p| USES + p).chain(forbids.iter().map(|p| FORBIDS + p));
    for byte in bytes {
        fcntl(file, FcntlArg::F_OFD_SETLK(&flock(libc::F_RDLCK as libc::c_short, byte, 1)))?;
    }
    Ok(())
}

/// The byte that another handle holds against us, if any.
fn find_conflict(file: &File, uses: &[u64], forbids: [u64; 2]) -> nix::Result<Option<u64>> {
    let bytes = uses.iter().map(|p| FORBIDS + p).chain(forbids.iter().map(|p| USES + p));
    for byte in bytes {
        // Asking for a write lock makes the shared locks of other handles show; our own never conflict with us.
        let mut probe = flock(libc::F_WRLCK as libc::c_short, byte, 1);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe))?;
        if probe.l_type != libc::F_UNLCK as libc::c_short {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

fn flock(kind: libc::c_short, start: u64, length: u64) -> libc::flock {
    libc::flock {
        l_type: kind,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as libc::off_t,
        l_len: length as libc::off_t,
        l_pid: 0,
    }
}
