//! A copy of the repository in the demo's folder, and a second hub that learns from the copy alone what is in it. There
//! points may be merged and damaged, and the three that were made stay what they are.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs as system;
use rustix::io::Errno;
use serde_json::json;
use tempfile::TempDir;

use super::DemoError;
use super::folder::Folder;
use super::hub::Hub;
use super::stage::REPOSITORY_ID;
use crate::cli::{CliError, Output};

/// How many of the three points retention is told to keep.
pub(super) const KEEP_LAST: u32 = 2;

/// The copy and its hub. Dropped, the copy goes.
#[derive(Debug)]
pub(super) struct Replica {
    hub: Hub,
    folder: Arc<TempDir>,
}

impl Replica {
    /// Copies the repository and starts a hub that knows nothing yet.
    ///
    /// # Errors
    /// The copy cannot be made, or the hub not be started.
    pub(super) async fn start(folder: &Arc<Folder>, output: &Output) -> Result<Self, CliError> {
        output.note("copying the repository for a second service");
        let parent = folder.path().to_owned();
        let made = tempfile::Builder::new().prefix("copy-").tempdir_in(&parent);
        let copy = Arc::new(made.map_err(|source| DemoError::Make { path: parent, source })?);
        // Both folders stay until the copy is finished, also when nobody waits for it any more.
        let (outer, inner) = (Arc::clone(folder), Arc::clone(&copy));
        let copied = tokio::task::spawn_blocking(move || copy_folder(&outer.repository(), &repository(&inner)));
        let failed = |source| DemoError::Make { path: repository(&copy), source };
        copied.await.map_err(|_| DemoError::Panicked)?.map_err(failed)?;
        // Nothing is verified and nothing pinned there but what the demo asks for.
        let hub = Hub::start(copy.path().join("state"), |config| {
            config.storage.verify_after_commit = false;
            config.storage.scrub_interval_days = 0;
        });
        Ok(Self { hub: hub.await?, folder: copy })
    }

    /// Makes the copy a repository of its hub, which finds the points in it, and tells it what to keep.
    ///
    /// # Errors
    /// The hub refuses.
    pub(super) async fn import(&self) -> Result<(), DemoError> {
        let client = self.hub.client();
        let (path, retention) = (repository(&self.folder), json!({"keep_last": KEEP_LAST}));
        let body = json!({"id": REPOSITORY_ID, "name": "Copy", "path": path, "retention": retention});
        client.post("/repositories", &body).await?;
        client.post(&format!("/repositories/{REPOSITORY_ID}/import"), &json!({})).await?;
        Ok(())
    }

    /// The hub of the copy.
    pub(super) fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Ends the hub, then removes the copy.
    pub(super) async fn stop(self) {
        self.hub.stop().await;
        drop(self.folder);
    }
}

fn repository(copy: &TempDir) -> PathBuf {
    copy.path().join("repository")
}

/// Copies a folder with all in it but locks. What is shared or empty in a file stays so where the file system can do it.
fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type()? {
            kind if kind.is_dir() => copy_folder(&source, &target)?,
            kind if kind.is_file() && entry.file_name() != ".lock" => copy_file(&source, &target)?,
            _ => {}
        }
    }
    fs::set_permissions(to, fs::metadata(from)?.permissions())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    let mut target = File::options().write(true).create_new(true).open(to)?;
    if system::ioctl_ficlone(&target, &source).is_err() {
        let length = source.metadata()?.len();
        target.set_len(length)?;
        let mut position = 0;
        while let Some((start, end)) = data_after(&source, position, length)? {
            source.seek(SeekFrom::Start(start))?;
            target.seek(SeekFrom::Start(start))?;
            io::copy(&mut io::Read::take(&source, end - start), &mut target)?;
            position = end;
        }
    }
    fs::set_permissions(to, source.metadata()?.permissions())
}

/// The next range that is no hole.
fn data_after(file: &File, position: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match system::seek(file, system::SeekFrom::Data(position)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system without holes.
        Err(Errno::INVAL) if position < length => return Ok(Some((position, length))),
        Err(error) => return Err(error.into()),
    };
    Ok(Some((start, system::seek(file, system::SeekFrom::Hole(start))?)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn copy_is_equal_and_as_sparse_and_has_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("vm/point")).unwrap();
        let image = from.join("vm/point/disk-0.qcow2");
        let file = File::create(&image).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 100_000], 1 << 20).unwrap();
        file.write_all_at(&[8; 10], 40 << 20).unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o440)).unwrap();
        fs::write(from.join("empty"), "").unwrap();
        fs::write(from.join(".lock"), "").unwrap();
        copy_folder(&from, &to).unwrap();
        let copy = to.join("vm/point/disk-0.qcow2");
        assert!(fs::read(&copy).unwrap() == fs::read(&image).unwrap());
        let [original, copied] = [&image, &copy].map(|path| fs::metadata(path).unwrap());
        assert!(copied.blocks() <= original.blocks() + 64, "{} > {}", copied.blocks(), original.blocks());
        assert_eq!(copied.mode(), original.mode());
        assert!(to.join("empty").is_file() && !to.join(".lock").exists());
    }
}
