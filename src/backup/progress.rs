//! How far a disk is, in numbers that people and programs are shown: measured at the NBD layer, never told by the client.

use serde::Serialize;
use utoipa::ToSchema;

use super::job::LiveDisk;
use crate::export::busy::Bottleneck;
use crate::words::{BackupType, DiskState};

/// One disk of a running job.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct DiskProgress {
    /// Where it is.
    pub state: DiskState,
    /// Its size.
    pub size_bytes: u64,
    /// Distinct bytes written or zeroed.
    pub covered_bytes: u64,
    /// Payload of writes.
    pub written_bytes: u64,
    /// Length of zero requests.
    pub zeroed_bytes: u64,
    /// Received, equal to what lies below, and not stored.
    pub identical_bytes: u64,
    /// Payload written per second, over the last ten seconds; zeroes do not count.
    pub rate_bps: u64,
    /// 0 to 100, to a tenth, of the bytes covered; `null` while nobody knows how much will come, as of an incremental.
    pub percent: Option<f64>,
    /// Seconds until it is covered, at the pace of the last ten seconds; `null` where `percent` is, and while nothing moves.
    pub eta_s: Option<u64>,
    /// What it waits for; `null` before there was a second of requests.
    pub bottleneck: Option<Bottleneck>,
    /// Connections open now.
    pub connections: usize,
}

impl DiskProgress {
    /// A disk as it is now; `state` is where it is by the record or by what can be seen.
    pub fn of(live: &LiveDisk, state: DiskState) -> Self {
        let reading = live.meter.reading();
        let total_known = state == DiskState::Sealed
            || live.backup_type == BackupType::Full
            || reading.covered_bytes >= live.size_bytes;
        // An incremental is done with what came.
        let (covered, total) =
            if state == DiskState::Sealed { (1, 1) } else { (reading.covered_bytes, live.size_bytes) };
        let eta_s = total_known.then(|| eta_s(total.saturating_sub(covered), live.meter.covered_per_second()));
        Self {
            state,
            size_bytes: live.size_bytes,
            covered_bytes: reading.covered_bytes,
            written_bytes: reading.written_bytes,
            zeroed_bytes: reading.zeroed_bytes,
            identical_bytes: reading.identical_bytes,
            rate_bps: live.meter.written_per_second(),
            percent: total_known.then(|| percent(covered, total)),
            eta_s: eta_s.flatten(),
            bottleneck: if state == DiskState::Sealed { None } else { live.gate.bottleneck() },
            connections: reading.connections,
        }
    }
}

/// To a tenth, so that a poll shows movement and not noise.
pub fn percent(covered: u64, total: u64) -> f64 {
    if total == 0 {
        return 0.0;
    }
    let tenths = u128::from(covered) * 1000 / u128::from(total);
    f64::from(u32::try_from(tenths).unwrap_or(1000)) / 10.0
}

/// Whole seconds for the rest at this pace; nothing while nothing moves.
pub fn eta_s(remaining: u64, per_second: u64) -> Option<u64> {
    match (remaining, per_second) {
        (0, _) => Some(0),
        (_, 0) => None,
        (remaining, per_second) => Some(remaining.div_ceil(per_second)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_is_exact_at_both_ends() {
        assert_eq!(percent(0, 512), 0.0);
        assert_eq!(percent(511, 512), 99.8);
        assert_eq!(percent(512, 512), 100.0);
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99.9);
        assert_eq!(percent(0, 0), 0.0);
    }

    #[test]
    fn the_rest_is_divided_by_the_pace_and_by_nothing_else() {
        assert_eq!(eta_s(1000, 100), Some(10));
        assert_eq!(eta_s(1001, 100), Some(11));
        assert_eq!(eta_s(0, 0), Some(0));
        assert_eq!(eta_s(1, 0), None);
    }
}
