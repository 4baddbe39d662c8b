//! Placeholder for the engine that makes a point anew without its parent: says that it cannot.

use super::Points;
use crate::id::BackupId;

/// What became of a merge.
#[derive(Clone, Debug)]
pub struct Merged {}

/// Why a point was not made anew.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// There is no engine.
    #[error("{0} cannot be made anew without its parent: this build does not merge")]
    Unsupported(BackupId),
}

impl Points {
    /// Makes a point anew without its parent.
    ///
    /// # Errors
    /// Always.
    #[allow(clippy::unused_async, reason = "the signature of the engine")]
    pub async fn merge(&self, child: &BackupId) -> Result<Merged, MergeError> {
        Err(MergeError::Unsupported(child.clone()))
    }
}
