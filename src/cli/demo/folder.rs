//! The folder of one demo: temporary and gone at the end, or kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::DemoError;

const CONFIGURATION: &str = "blockyard.toml";

/// A folder with a place for each part. Dropped, it goes with all that is in it, unless it is kept.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    temporary: Option<TempDir>,
}

impl Folder {
    /// A new temporary folder, or `keep`, which must be empty or absent.
    pub(super) fn new(keep: Option<&Path>) -> Result<Self, DemoError> {
        let folder = match keep {
            None => {
                let temporary = tempfile::Builder::new()
                    .prefix("blockyard-demo-")
                    .tempdir()
                    .map_err(|source| DemoError::Make { path: std::env::temp_dir(), source })?;
                Self { path: absolute(temporary.path())?, temporary: Some(temporary) }
            }
            Some(path) => Self { path: empty_folder(path)?, temporary: None },
        };
        for part in [folder.disks(), folder.repository()] {
            fs::create_dir(&part).map_err(|source| DemoError::Make { path: part, source })?;
        }
        Ok(folder)
    }

    /// Whether it stays.
    pub(super) fn is_kept(&self) -> bool {
        self.temporary.is_none()
    }

    /// All of it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Generated disks.
    pub(super) fn disks(&self) -> PathBuf {
        self.path.join("disks")
    }

    /// The repository that the backup goes to.
    pub(super) fn repository(&self) -> PathBuf {
        self.path.join("repository")
    }

    /// Database, token and lock of the service.
    pub(super) fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    /// With which `blockyard serve` runs on what was kept.
    pub(super) fn configuration_file(&self) -> PathBuf {
        self.path.join(CONFIGURATION)
    }

    /// The password of the vCenter that there is not.
    pub(super) fn password_file(&self) -> PathBuf {
        self.path.join("vcenter-password")
    }
}

fn empty_folder(path: &Path) -> Result<PathBuf, DemoError> {
    let failed = |source| DemoError::Make { path: path.to_owned(), source };
    fs::create_dir_all(path).map_err(failed)?;
    if fs::read_dir(path).map_err(failed)?.next().is_some() {
        let path = absolute(path)?;
        let configuration = path.join(CONFIGURATION);
        return Err(if configuration.is_file() {
            DemoError::KeepIsDemo { serve: super::report::serve_command(&configuration), path }
        } else {
            DemoError::KeepNotEmpty { path }
        });
    }
    absolute(path)
}

/// Paths in requests are absolute.
fn absolute(path: &Path) -> Result<PathBuf, DemoError> {
    path.canonicalize().map_err(|source: io::Error| DemoError::Make { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_or_absent_folder_is_kept_and_a_temporary_one_goes() {
        let outer = tempfile::tempdir().unwrap();
        let kept = outer.path().join("a/b");
        assert!(Folder::new(Some(&kept)).unwrap().is_kept());
        assert!(kept.join("repository").is_dir());
        assert!(matches!(Folder::new(Some(&kept)), Err(DemoError::KeepNotEmpty { .. })));
        let temporary = Folder::new(None).unwrap();
        let path = temporary.path().to_owned();
        assert!(path.is_dir());
        drop(temporary);
        assert!(!path.exists());
    }
}
