//! Bytes per second over the last ten seconds, in eleven counters: enough to be steady, short enough to show a stall.

use tokio::time::Instant;

/// Whole seconds that are looked back at.
const WINDOW_S: u64 = 10;
/// One counter per second of the window and one for the second that is running.
const COUNTERS: usize = WINDOW_S as usize + 1;

/// A rate over a sliding window.
#[derive(Debug)]
pub(super) struct Rate {
    born: Instant,
    /// The second since `born` that a counter is for, and its bytes.
    counters: [(u64, u64); COUNTERS],
}

impl Rate {
    pub(super) fn new(born: Instant) -> Self {
        Self { born, counters: [(0, 0); COUNTERS] }
    }

    pub(super) fn add(&mut self, bytes: u64, now: Instant) {
        let second = self.second(now);
        // The remainder is below the number of counters, so there always is one.
        let index = (second % COUNTERS as u64) as usize;
        if let Some(counter) = self.counters.get_mut(index) {
            if counter.0 != second {
                *counter = (second, 0);
            }
            counter.1 += bytes;
        }
    }

    /// Only whole seconds count, so that the running one does not make the rate sag.
    pub(super) fn per_second(&self, now: Instant) -> u64 {
        let second = self.second(now);
        let first = second.saturating_sub(WINDOW_S);
        let bytes: u64 =
            self.counters.iter().filter(|(at, _)| (first..second).contains(at)).map(|(_, bytes)| bytes).sum();
        bytes / (second - first).max(1)
    }

    fn second(&self, now: Instant) -> u64 {
        now.duration_since(self.born).as_secs()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_steady_while_bytes_come_and_falls_to_zero_when_they_stop() {
        let born = Instant::now();
        let at = |seconds: u64| born + Duration::from_secs(seconds);
        let mut rate = Rate::new(born);
        assert_eq!(rate.per_second(at(0)), 0);
        for second in 0..30 {
            rate.add(1000, at(second));
        }
        assert_eq!(rate.per_second(at(30)), 1000);
        assert_eq!(rate.per_second(at(35)), 500);
        assert_eq!(rate.per_second(at(40)), 0);
    }
}
