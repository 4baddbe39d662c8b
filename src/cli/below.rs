//! `--backing-root`: where what lies below an image may be, for every command that opens one.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use blockyard_qcow2::{Access, Error, OpenOptions};
use clap::Args;

use super::CliError;
use super::image_error::ImageError;

/// Where what lies below an image may be.
#[derive(Debug, Args)]
pub(super) struct Below {
    /// Folder that backing files must be in, or beneath; the image's own when left out.
    #[arg(long, value_name = "DIR")]
    backing_root: Option<PathBuf>,
}

impl Below {
    /// The path to open an image by, and the folder for its backing files.
    ///
    /// Beneath is a matter of names to the engine: with the option both are told as the file system has them, without
    /// symbolic links and `..`. The image's own name stays: what it links to has another folder.
    pub(super) fn paths(&self, image: &Path) -> Result<(PathBuf, Option<PathBuf>), CliError> {
        let Some(root) = &self.backing_root else { return Ok((image.to_owned(), None)) };
        let root = folder(root).map_err(|source| CliError::BackingRoot { path: root.clone(), source })?;
        Ok((resolved(image)?, Some(root)))
    }

    /// How to open an image, and by which path.
    pub(super) fn options(&self, image: &Path, access: Access) -> Result<(PathBuf, OpenOptions), CliError> {
        if access == Access::ReadWrite {
            check_writable(image)?;
        }
        let (path, backing_root) = self.paths(image)?;
        Ok((path, OpenOptions { backing_root, ..OpenOptions::new(access) }))
    }
}

/// Refuses an image that nobody may write to: to root the file system would open it all the same, and an image of a restore point
/// that is written to is damaged. What cannot be looked at is refused where it is opened.
pub(super) fn check_writable(image: &Path) -> Result<(), CliError> {
    match image.metadata() {
        Ok(facts) if facts.permissions().mode() & 0o222 == 0 => {
            Err(CliError::WriteProtected { path: image.to_owned() })
        }
        _ => Ok(()),
    }
}

fn folder(path: &Path) -> io::Result<PathBuf> {
    let path = path.canonicalize()?;
    if path.is_dir() { Ok(path) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

/// The path with its folder as the file system has it.
fn resolved(image: &Path) -> Result<PathBuf, ImageError> {
    // A path without a name is a folder, which the engine refuses.
    let Some(name) = image.file_name() else { return Ok(image.to_owned()) };
    let parent = image.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = parent.canonicalize();
    Ok(folder.map_err(|source| Error::Open { path: image.to_owned(), source })?.join(name))
}
