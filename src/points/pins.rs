//! What an export or a task holds of restore points in the database, as a value.

use std::time::Duration;

use crate::store::{Store, StoreError, leases};

/// The pause before leases that could not be given back are tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// All leases of one owner. Dropped, they are given back soon; [`Self::release`] waits for it. Either way it is tried until it
/// succeeds or the database is closed: what is left then is void with the process.
#[derive(Debug)]
pub(crate) struct Pins {
    held: Option<(Store, String)>,
}

impl Pins {
    /// The leases that `owner` takes in a transaction that is about to be committed. Made before the commit, so that they go
    /// whatever becomes of it.
    pub(crate) fn of(store: &Store, owner: &str) -> Self {
        Self { held: Some((store.clone(), owner.to_owned())) }
    }

    /// Of nothing.
    pub(crate) fn none() -> Self {
        Self { held: None }
    }

    /// Gives them back.
    ///
    /// # Cancellation
    /// They are given back all the same.
    pub(crate) async fn release(mut self) {
        if let Some((store, owner)) = &self.held {
            release(store, owner).await;
        }
        self.held = None;
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let Some((store, owner)) = self.held.take() else { return };
        // Without a runtime the process is at its end.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { release(&store, &owner).await });
        }
    }
}

async fn release(store: &Store, owner: &str) {
    while let Err(error) = try_release(store, owner).await {
        if store.is_closed() {
            return;
        }
        tracing::warn!(owner, %error, "pins could not be given back yet");
        tokio::time::sleep(PAUSE).await;
    }
}

async fn try_release(store: &Store, owner: &str) -> Result<(), StoreError> {
    let mut transaction = store.write().await?;
    leases::release_all(&mut transaction, owner).await?;
    transaction.commit().await
}
