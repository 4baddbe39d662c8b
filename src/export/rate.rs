//! Bytes per second over the last ten seconds, in eleven counters: enough to be steady, short enough to show a stall.

use tokio::time::Instant;

/// Whole seconds that are looked back at.
const WINDOW_S: u64 = 10;
/// One counter per second of the window and one for the second that is running.
const COUNTERS: usize = WINDOW_S as usize + 1;

/// Until a whole second is over, its bytes are divided by the time that they took, but by no less than this.
const SHORTEST_MS: u128 = 100;

/// A rate over a sliding window, from the first byte on.
#[derive(Debug, Default)]
pub(super) struct Rate {
    begun: Option<Instant>,
    /// The second since `begun` that a counter is for, and its bytes.
    counters: [(u64, u64); COUNTERS],
}

impl Rate {
    pub(super) fn add(&mut self, bytes: u64, now: Instant) {
        let second = now.duration_since(*self.begun.get_or_insert(now)).as_secs();
        // The remainder is below the number of counters, so there always is one.
        let index = (second % COUNTERS as u64) as usize;
        if let Some(counter) = self.counters.get_mut(index) {
            if counter.0 != second {
                *counter = (second, 0);
            }
            counter.1 += bytes;
        }
    }

    /// Only whole seconds count, so that the running one does not make the rate sag, but for the first.
    pub(super) fn per_second(&self, now: Instant) -> u64 {
        let Some(begun) = self.begun else { return 0 };
        let elapsed = now.duration_since(begun);
        let second = elapsed.as_secs();
        if second == 0 {
            let [(_, bytes), ..] = self.counters;
            let per_second = u128::from(bytes) * 1000 / elapsed.as_millis().max(SHORTEST_MS);
            return u64::try_from(per_second).unwrap_or(u64::MAX);
        }
        let first = second.saturating_sub(WINDOW_S);
        let bytes: u64 =
            self.counters.iter().filter(|(at, _)| (first..second).contains(at)).map(|(_, bytes)| bytes).sum();
        bytes / (second - first).max(1)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_steady_while_bytes_come_and_falls_to_zero_when_they_stop() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(at(0)), 0);
        for second in 0..30 {
            rate.add(1000, at(second));
        }
        assert_eq!(rate.per_second(at(30)), 1000);
        assert_eq!(rate.per_second(at(35)), 500);
        assert_eq!(rate.per_second(at(40)), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_of_half_a_second_has_a_rate_too() {
        let begun = Instant::now();
        let mut rate = Rate::default();
        rate.add(1000, begun);
        assert_eq!(rate.per_second(begun), 10_000);
        assert_eq!(rate.per_second(begun + Duration::from_millis(500)), 2000);
        assert_eq!(rate.per_second(begun + Duration::from_secs(1)), 1000);
    }
}
