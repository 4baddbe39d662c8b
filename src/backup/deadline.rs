//! When a job has waited long enough: a pure function from what was seen to what must happen, and when to look again.
//!
//! The job asks after every event and sleeps until the time it is given. Signs of life come from the NBD layer and from
//! callbacks; telemetry is one of them and never more than that.

use std::time::Duration;

use tokio::time::Instant;

use crate::config;
use crate::words::{FailureCode, JobState};

/// The limits of `[jobs]` that this module watches.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `start_grace_s`
    pub start_grace: Duration,
    /// `first_contact_warn_s`
    pub first_contact_warn: Duration,
    /// `first_contact_s`
    pub first_contact: Duration,
    /// `idle_s`
    pub idle: Duration,
    /// `stalled_s`
    pub stalled: Duration,
    /// `reconnect_s`
    pub reconnect: Duration,
}

impl Limits {
    /// Those of the configuration.
    pub fn new(jobs: &config::Jobs) -> Self {
        Self {
            start_grace: Duration::from_secs(jobs.start_grace_s),
            first_contact_warn: Duration::from_secs(jobs.first_contact_warn_s),
            first_contact: Duration::from_secs(jobs.first_contact_s),
            idle: Duration::from_secs(jobs.idle_s),
            stalled: Duration::from_secs(jobs.stalled_s),
            reconnect: Duration::from_secs(jobs.reconnect_s),
        }
    }
}

/// What is known of the one call to the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePhase {
    /// It is under way.
    Calling,
    /// The node said yes at this time.
    Accepted(Instant),
    /// Nobody knows since this time.
    Ambiguous(Instant),
}

/// What was seen of a job.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Where it is: starting, transferring or stalled.
    pub state: JobState,
    /// The call to the node.
    pub node: NodePhase,
    /// Whether somebody was told that no client shows itself.
    pub warned: bool,
    /// The last sign of life.
    pub last_life: Option<Instant>,
    /// Since when a disk that was being written has had no connection: the earliest of all.
    pub disconnected_since: Option<Instant>,
}

/// What must happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing until then, or until something is seen.
    Wait(Option<Instant>),
    /// The job counts as stalled.
    Stall,
    /// A stalled job is alive again.
    Resume,
    /// No client shows itself, and somebody should look why.
    Warn,
    /// The job is over.
    Fail(FailureCode),
}

/// Judges a job at time `now`.
pub fn decide(seen: &Seen, limits: &Limits, now: Instant) -> Decision {
    let mut wake = None;
    let mut due = |at: Instant| {
        wake = Some(wake.map_or(at, |earlier: Instant| earlier.min(at)));
        now >= at
    };
    if let Some(since) = seen.disconnected_since
        && due(since + limits.reconnect)
    {
        return Decision::Fail(FailureCode::ClientDisconnected);
    }
    match (seen.last_life, seen.node) {
        (Some(life), _) => {
            let idle_at = life + limits.idle;
            if due(idle_at + limits.stalled) {
                return Decision::Fail(FailureCode::Stalled);
            }
            match seen.state {
                JobState::Stalled if now < idle_at => return Decision::Resume,
                JobState::Transferring if due(idle_at) => return Decision::Stall,
                _ => {}
            }
        }
        (None, NodePhase::Calling) => {}
        (None, NodePhase::Accepted(at)) => {
            if due(at + limits.first_contact) {
                return Decision::Fail(FailureCode::NoClient);
            }
            if !seen.warned && due(at + limits.first_contact_warn) {
                return Decision::Warn;
            }
        }
        (None, NodePhase::Ambiguous(at)) => {
            if due(at + limits.start_grace) {
                return Decision::Fail(FailureCode::NodeOutcomeUnknown);
            }
        }
    }
    Decision::Wait(wake)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        start_grace: Duration::from_secs(300),
        first_contact_warn: Duration::from_secs(120),
        first_contact: Duration::from_secs(1800),
        idle: Duration::from_secs(300),
        stalled: Duration::from_secs(1800),
        reconnect: Duration::from_secs(60),
    };

    fn after(seconds: u64, base: Instant) -> Instant {
        base + Duration::from_secs(seconds)
    }

    fn seen(state: JobState, node: NodePhase) -> Seen {
        Seen { state, node, warned: true, last_life: None, disconnected_since: None }
    }

    #[tokio::test]
    async fn an_accepted_start_waits_long_and_an_ambiguous_one_not_so_long() {
        let base = Instant::now();
        let accepted = seen(JobState::Starting, NodePhase::Accepted(base));
        assert_eq!(decide(&accepted, &LIMITS, after(1799, base)), Decision::Wait(Some(after(1800, base))));
        assert_eq!(decide(&accepted, &LIMITS, after(1800, base)), Decision::Fail(FailureCode::NoClient));
        let silent = Seen { warned: false, ..accepted };
        assert_eq!(decide(&silent, &LIMITS, after(119, base)), Decision::Wait(Some(after(120, base))));
        assert_eq!(decide(&silent, &LIMITS, after(120, base)), Decision::Warn);
        let ambiguous = seen(JobState::Starting, NodePhase::Ambiguous(base));
        assert_eq!(decide(&ambiguous, &LIMITS, after(299, base)), Decision::Wait(Some(after(300, base))));
        assert_eq!(decide(&ambiguous, &LIMITS, after(300, base)), Decision::Fail(FailureCode::NodeOutcomeUnknown));
        let calling = seen(JobState::Starting, NodePhase::Calling);
        assert_eq!(decide(&calling, &LIMITS, after(9999, base)), Decision::Wait(None));
    }

    #[tokio::test]
    async fn silence_stalls_a_transfer_and_then_ends_it_and_life_resumes_it() {
        let base = Instant::now();
        let mut transfer = seen(JobState::Transferring, NodePhase::Accepted(base));
        transfer.last_life = Some(base);
        assert_eq!(decide(&transfer, &LIMITS, after(299, base)), Decision::Wait(Some(after(300, base))));
        assert_eq!(decide(&transfer, &LIMITS, after(300, base)), Decision::Stall);
        transfer.state = JobState::Stalled;
        assert_eq!(decide(&transfer, &LIMITS, after(2099, base)), Decision::Wait(Some(after(2100, base))));
        assert_eq!(decide(&transfer, &LIMITS, after(2100, base)), Decision::Fail(FailureCode::Stalled));
        transfer.last_life = Some(after(2000, base));
        assert_eq!(decide(&transfer, &LIMITS, after(2000, base)), Decision::Resume);
    }

    #[tokio::test]
    async fn a_start_that_showed_life_ends_as_stalled_after_the_same_silence() {
        let base = Instant::now();
        let mut start = seen(JobState::Starting, NodePhase::Accepted(base));
        start.last_life = Some(base);
        assert_eq!(decide(&start, &LIMITS, after(2099, base)), Decision::Wait(Some(after(2100, base))));
        assert_eq!(decide(&start, &LIMITS, after(2100, base)), Decision::Fail(FailureCode::Stalled));
    }

    #[tokio::test]
    async fn a_disk_without_its_client_ends_the_job_even_while_others_are_alive() {
        let base = Instant::now();
        let mut transfer = seen(JobState::Transferring, NodePhase::Accepted(base));
        transfer.last_life = Some(after(60, base));
        transfer.disconnected_since = Some(base);
        assert_eq!(decide(&transfer, &LIMITS, after(59, base)), Decision::Wait(Some(after(60, base))));
        assert_eq!(decide(&transfer, &LIMITS, after(60, base)), Decision::Fail(FailureCode::ClientDisconnected));
    }
}
