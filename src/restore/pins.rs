//! What an export holds of restore points in the database, as a value.

use std::time::Duration;

use crate::id::ExportId;
use crate::store::{Store, StoreError, leases};

/// How often giving pins back is tried, with [`PAUSE`] in between: as long as anybody holds the database. What is left is voided by
/// the next start.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_secs(1);

/// All leases of one owner. Dropped, they are given back soon; [`Self::release`] waits for it.
#[derive(Debug)]
pub(super) struct Pins {
    held: Option<(Store, ExportId)>,
}

impl Pins {
    /// The leases that `owner` takes in a transaction that is about to be committed.
    pub(super) fn of(store: &Store, owner: &ExportId) -> Self {
        Self { held: Some((store.clone(), owner.clone())) }
    }

    /// Gives them back.
    pub(super) async fn release(mut self) {
        if let Some((store, owner)) = self.held.take() {
            release(&store, &owner).await;
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let Some((store, owner)) = self.held.take() else { return };
        // Without a runtime the process is at its end, and the next one voids them.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { release(&store, &owner).await });
        }
    }
}

async fn release(store: &Store, owner: &ExportId) {
    for _ in 0..TRIES {
        match try_release(store, owner).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(export_id = %owner, %error, "pins could not be given back yet"),
        }
        tokio::time::sleep(PAUSE).await;
    }
    tracing::error!(export_id = %owner, "pins could not be given back; the next start voids them");
}

async fn try_release(store: &Store, owner: &ExportId) -> Result<(), StoreError> {
    let mut transaction = store.write().await?;
    leases::release_all(&mut transaction, owner.as_str()).await?;
    transaction.commit().await
}
