//! The life of a restore point after its commit.
//!
//! Whoever opens the files of a point to rely on them pins it first, with everything below it, in the transaction in which it
//! sees the point committed ([`leases::pin_chain`](crate::store::leases::pin_chain)); whoever removes files does so only to a
//! point that, in one transaction, nobody pins and nothing builds upon. So no file goes under a reader, whatever runs side by
//! side.
//!
//! Four look without a pin, and can: what they read may be gone or exchanged under them, and nothing is done to a point for what
//! they say. [`Points::inspect`] tells findings that nobody settles; [`Points::compare`](compare) reads leaves, and tells
//! "unknown" without them; the check of a repository ([`check`]) judges again what tasks hold or what has changed, and concludes
//! only from the folder's presence; a new backup looks at the chain that it means to build upon before it is accepted, and pins it
//! in the transaction that accepts it, if its records still stand.

pub(crate) mod chain;
pub mod check;
pub mod compare;
pub mod content;
pub mod delete;
pub mod digests;
pub mod files;
pub mod finding;
pub mod folder;
pub mod import;
pub mod inspect;
pub mod leaves;
pub mod merge;
pub mod pace;
pub(crate) mod pins;
pub mod protect;
pub mod prune;
pub mod retention;
pub mod scrub;
mod settle;
pub mod take;
mod turns;
pub mod verification;
pub mod verify;
mod witness;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::config::Config;
use crate::id::BackupId;
use crate::repositories::Repositories;
use crate::repository::layout::BackupPaths;
use crate::store::Store;
use crate::store::points::PointRow;
use crate::store::repositories::Repository;

/// The committed points of a hub, and the work on them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Points {
    shared: Arc<Shared>,
}

/// What all work on points needs.
#[derive(Debug)]
struct Shared {
    config: Arc<Config>,
    store: Store,
    repositories: Repositories,
    /// Names this process start; pins of another one are void.
    boot_id: String,
    verifications: verify::Verifications,
    passed: scrub::Passed,
    /// Points whose files are being removed by a task of this process.
    removals: Mutex<BTreeSet<BackupId>>,
    /// One prune at a time in each repository.
    pruning: turns::Turns,
    /// Whether the service is stopping.
    stopping: watch::Sender<bool>,
    merges: merge::Merges,
}

impl Points {
    /// The points that `store` has records of.
    pub fn new(config: Arc<Config>, store: Store, repositories: Repositories, boot_id: &str) -> Self {
        let shared = Shared {
            config,
            store,
            repositories,
            boot_id: boot_id.to_owned(),
            verifications: verify::Verifications::new(),
            passed: scrub::Passed::default(),
            merges: merge::Merges::default(),
            removals: Mutex::default(),
            pruning: turns::Turns::default(),
            stopping: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Ends what goes from point to point, between two of them. Whatever is cut in the middle is finished by the next start.
    pub fn stop(&self) {
        self.shared.stopping.send_replace(true);
    }
}

/// Where the files of a point are.
pub(crate) fn paths(repository: &Repository, point: &PointRow) -> BackupPaths {
    let vm_directory = Path::new(&point.dir).parent().unwrap_or(Path::new("")).to_string_lossy();
    BackupPaths::new(Path::new(&repository.path), &vm_directory, point.id.as_str())
}
