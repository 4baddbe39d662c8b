//! What is verified without being asked for: every point soon after its commit, and whatever was not read for long.
//!
//! Both wait for their turn behind one another and behind what somebody asked for; the second waits for running backups too.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Points;
use super::take::Content;
use super::verification::{Outcome, Request, Scope};
use super::verify::VerifyError;
use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::store::{StoreError, trust};
use crate::words::point::Trust;

/// How often it is looked for points that were not read for long, when nothing else happens.
const LOOK: Duration = Duration::from_secs(60);
/// How long a point that could not be read is left alone, in seconds. A guess: a day gives a person time, and its log lines a
/// bound.
const RETRY_S: f64 = 86_400.0;
const DAY_S: u64 = 86_400;

/// What one step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scrubbed {
    /// There was nothing to do, or nothing that can be done now.
    Nothing,
    /// A point was read.
    Point(BackupId, Outcome),
}

/// Points that could not be read, and when that was.
#[derive(Debug, Default)]
pub struct Passed(Mutex<HashMap<BackupId, UtcTime>>);

impl Passed {
    fn note(&self, id: &BackupId, now: UtcTime) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), now);
    }

    /// Whether it was passed over lately.
    pub fn holds(&self, id: &BackupId, now: UtcTime) -> bool {
        let passed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        passed.get(id).is_some_and(|then| now.seconds_since(*then) < RETRY_S)
    }
}

impl Points {
    /// Verifies the oldest point that nobody has read since its commit.
    ///
    /// # Errors
    /// The database's.
    pub async fn verify_next_new(&self, now: UtcTime) -> Result<Scrubbed, StoreError> {
        // Chosen when it is its turn: what was verified meanwhile is not verified twice.
        let _turn = self.turn().await;
        let new = trust::never_verified(&mut *self.shared.store.read().await?).await?;
        self.verify_first(new, now).await
    }

    /// Verifies the point that was not read for longest, if that is longer than `storage.scrub_interval_days`.
    ///
    /// # Errors
    /// The database's.
    pub async fn scrub_next(&self, now: UtcTime) -> Result<Scrubbed, StoreError> {
        let days = self.shared.config.storage.scrub_interval_days;
        if days == 0 {
            return Ok(Scrubbed::Nothing);
        }
        let due = now.minus_seconds(u64::from(days).saturating_mul(DAY_S));
        let _turn = self.turn().await;
        let old = trust::older_than(&mut *self.shared.store.read().await?, due).await?;
        self.verify_first(old, now).await
    }

    async fn verify_first(&self, ids: Vec<BackupId>, now: UtcTime) -> Result<Scrubbed, StoreError> {
        let request = Request { scope: Scope::Point, content: Content::Known };
        for id in ids.into_iter().filter(|id| !self.shared.passed.holds(id, now)) {
            match self.verify_now(&id, request).await {
                Ok(ended) => {
                    let outcome = ended.view().outcome.unwrap_or(Outcome::Failed);
                    if outcome == Outcome::Failed {
                        self.shared.passed.note(&id, now);
                    }
                    return Ok(Scrubbed::Point(id, outcome));
                }
                // Whoever makes it anew or removes it commits when that is done, and then it is looked at again.
                Err(VerifyError::NotFound(_) | VerifyError::InUse { .. }) => {}
                Err(VerifyError::Stopping | VerifyError::TooMany) => break,
                Err(VerifyError::Store(error)) => return Err(error),
            }
        }
        Ok(Scrubbed::Nothing)
    }

    /// Begins to do both by itself. `busy` says whether backups are running.
    pub fn verify_in_background(&self, busy: impl Fn() -> bool + Send + Sync + 'static) {
        let points = self.clone();
        self.shared.verifications.spawn(async move {
            let mut stopping = points.shared.verifications.stopping.subscribe();
            let mut commits = points.shared.store.watch_commits();
            loop {
                // What is committed while this is done is seen at the next look.
                commits.borrow_and_update();
                Box::pin(points.catch_up(&busy)).await;
                tokio::select! {
                    _ = stopping.wait_for(|stopping| *stopping) => return,
                    _ = commits.changed() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        });
    }

    async fn catch_up(&self, busy: &(impl Fn() -> bool + Send + Sync + 'static)) {
        loop {
            if self.shared.verifications.gate.is_stopped() {
                return;
            }
            let mut step = Ok(Scrubbed::Nothing);
            if self.shared.config.storage.verify_after_commit {
                step = self.verify_next_new(UtcTime::now()).await;
            }
            if matches!(step, Ok(Scrubbed::Nothing)) && !busy() {
                step = self.scrub_next(UtcTime::now()).await;
            }
            match step {
                Ok(Scrubbed::Nothing) => return,
                Ok(_) => {}
                Err(error) => return tracing::error!(%error, "points could not be verified; trying again later"),
            }
        }
    }

    /// What a backup tells of the verification of its point: `off`, `pending`, `running`, `failed`, or the point's trust.
    pub fn verify_facet(&self, id: &BackupId, point: Option<(Trust, bool)>) -> &'static str {
        let waits = if self.shared.config.storage.verify_after_commit { "pending" } else { "off" };
        if self.is_verifying(id) {
            return "running";
        }
        match point {
            Some((trust, true)) if trust != Trust::Unverified => trust.as_str(),
            Some(_) if self.shared.passed.holds(id, UtcTime::now()) => "failed",
            _ => waits,
        }
    }
}
