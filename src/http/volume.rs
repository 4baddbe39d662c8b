//! Free and total space of a folder, without waiting for a hung mount.

use std::path::PathBuf;
use std::time::Duration;

/// A mount that does not answer within this time counts as gone. A guess: a healthy one answers in microseconds.
const LIMIT: Duration = Duration::from_secs(2);

/// Space of the file system that holds a folder, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Free for this user.
    pub free_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

/// The space around the folder at `path`; `None` when there is no folder or it does not answer.
pub async fn space(path: &str) -> Option<Space> {
    let path = PathBuf::from(path);
    let measure = tokio::task::spawn_blocking(move || {
        if !path.is_dir() {
            return None;
        }
        let volume = rustix::fs::statvfs(&path).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(volume.f_frsize);
        Some(Space { free_bytes: bytes(volume.f_bavail), total_bytes: bytes(volume.f_blocks) })
    });
    tokio::time::timeout(LIMIT, measure).await.ok()?.ok()?
}
