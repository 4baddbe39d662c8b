//! Where a restore point is in its life, and what is known of its content.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words::words;

/// Where a restore point is in its life. `committed` and `missing` follow each other; the rest only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PointState {
    /// It can be restored from.
    Committed,
    /// Its directory was not there when it was looked for.
    Missing,
    /// Its files are being removed.
    Deleting,
    /// Only its record is left.
    Deleted,
}

words!(PointState {
    Committed = "committed",
    Missing = "missing",
    Deleting = "deleting",
    Deleted = "deleted",
});

/// What is known of the content of a restore point. Only a verification raises it, from `unverified`; `corrupt` is final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Nobody has read it since its commit.
    Unverified,
    /// When it was last read, it was what was committed.
    Verified,
    /// Something below it is damaged, or it lacks bytes: it may hold wrong ones.
    Suspect,
    /// Its own files are not what was committed.
    Corrupt,
}

words!(Trust {
    Unverified = "unverified",
    Verified = "verified",
    Suspect = "suspect",
    Corrupt = "corrupt",
});
