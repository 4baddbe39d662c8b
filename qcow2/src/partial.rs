//! A new file built under a name of its own, which gets its final one when it is whole, so that not even a power cut leaves
//! half a disk under the name that was asked for.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::create::sync_parent;
use crate::error::{Error, Result};
use crate::image::Image;

/// Makes `<path>.partial` by `create` and `fill`, then gives it its name. Neither name may exist. What `create` made is
/// removed when anything after it fails; what `fill` returns must be on stable storage.
///
/// # Durability
/// The name is durable when this returns.
pub(crate) fn build<C, T>(
    path: &Path,
    create: impl FnOnce(&Path) -> Result<C>,
    fill: impl FnOnce(&Path, C) -> Result<T>,
) -> Result<T> {
    // The rename at the end refuses as well; this saves the work.
    if std::fs::symlink_metadata(path).is_ok() {
        return Err(Error::Open { path: path.to_owned(), source: std::io::ErrorKind::AlreadyExists.into() });
    }
    let partial = PathBuf::from({
        let mut name = path.as_os_str().to_owned();
        name.push(".partial");
        name
    });
    let created = create(&partial)?;
    let unfinished = Unfinished(&partial);
    let done = fill(&partial, created)?;
    rename(&partial, path)?;
    std::mem::forget(unfinished);
    let unfinished = Unfinished(path);
    sync_parent(path)?;
    std::mem::forget(unfinished);
    Ok(done)
}

/// Closes an image that was just written and holds it against every rule.
pub(crate) fn close_clean(image: &Image) -> Result<()> {
    image.close()?;
    let report = image.check()?;
    if report.is_clean() {
        return Ok(());
    }
    let detail = report.details.first().cloned().unwrap_or_else(|| "refcounts".into());
    Err(Error::Unclean { errors: report.errors, leaks: report.leaks, detail })
}

/// A file that is removed unless it becomes whole.
struct Unfinished<'a>(&'a Path);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // The error that is reported is the one that made it unfinished.
        let _ = std::fs::remove_file(self.0);
    }
}

/// Gives the file its name; never replaces anything.
fn rename(partial: &Path, path: &Path) -> Result<()> {
    match rustix::fs::renameat_with(CWD, partial, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // Network file systems do not know the flag. A second name is refused just as well where the first one is taken.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => std::fs::hard_link(partial, path)
            .and_then(|()| std::fs::remove_file(partial))
            .map_err(|source| Error::Open { path: path.to_owned(), source }),
        Err(errno) => Err(Error::Open { path: path.to_owned(), source: errno.into() }),
    }
}
