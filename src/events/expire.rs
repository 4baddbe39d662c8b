//! Old events are removed once a day, a few at a time.

use std::time::Duration;

use crate::clock::UtcTime;
use crate::store::{Store, StoreError, events};

/// How often it is looked.
const INTERVAL: Duration = Duration::from_secs(86_400);
/// Events that go in one transaction: the write lock is held for milliseconds.
const PORTION: u32 = 1000;
/// The pause between two portions, in which others write.
const BREATH: Duration = Duration::from_millis(50);

/// Removes events that are older than `keep_days`, now and every day. 0 keeps them for ever. Never returns otherwise.
pub async fn run(store: Store, keep_days: u64) {
    if keep_days == 0 {
        return;
    }
    loop {
        match remove(&store, keep_days).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, keep_days, "old events were removed"),
            Err(error) => tracing::warn!(%error, "old events could not be removed; tomorrow again"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn remove(store: &Store, keep_days: u64) -> Result<u64, StoreError> {
    let cutoff = UtcTime::now().minus_seconds(keep_days.saturating_mul(86_400));
    let mut all = 0;
    loop {
        let mut transaction = store.write().await?;
        let removed = events::remove_before(&mut transaction, cutoff, PORTION).await?;
        transaction.commit().await?;
        all += removed;
        if removed < u64::from(PORTION) {
            return Ok(all);
        }
        tokio::time::sleep(BREATH).await;
    }
}
