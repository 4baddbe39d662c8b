//! Which part of the last ten seconds an export had requests in flight: what tells a slow source from a slow target.
//!
//! Several requests at once count once: what is added up is time in which there was any. The sum is written down at each whole
//! second, so that the last ten can be looked back at whoever asked when. Told of the two moments that matter only, the first
//! request coming in and the last one leaving; nothing here reads the clock.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use utoipa::ToSchema;

/// Whole seconds that are looked back at.
const WINDOW_S: u64 = 10;
/// A mark for each boundary of a second in the window.
const MARKS: usize = WINDOW_S as usize + 1;
/// Above this share of the time one side is what all wait for.
const MOST: f64 = 0.8;

/// What a copy waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Bottleneck {
    /// The backup client: for more than 80 % of the time there was no request.
    Source,
    /// The storage: for more than 80 % of the time a request waited for it.
    Target,
    /// Neither for so long.
    Balanced,
}

/// The time with requests in flight.
#[derive(Debug, Default)]
pub(super) struct Busy {
    /// The first request, from which whole seconds count, and what has been seen since.
    seen: Option<Seen>,
}

#[derive(Debug)]
struct Seen {
    born: Instant,
    /// How far the sum goes.
    now: Instant,
    in_flight: bool,
    sum: Duration,
    /// The sum at each of the last whole seconds; that of second `n` is at `n % MARKS`.
    marks: [Duration; MARKS],
}

impl Busy {
    /// The first request is in flight.
    pub(super) fn begin(&mut self, now: Instant) {
        let marks = [Duration::ZERO; MARKS];
        let seen = self.seen.get_or_insert(Seen { born: now, now, in_flight: false, sum: Duration::ZERO, marks });
        seen.reach(now);
        seen.in_flight = true;
    }

    /// The last request is done.
    pub(super) fn end(&mut self, now: Instant) {
        if let Some(seen) = &mut self.seen {
            seen.reach(now);
            seen.in_flight = false;
        }
    }

    /// What it waited for in the last ten whole seconds; nothing before there was one.
    pub(super) fn bottleneck(&mut self, now: Instant) -> Option<Bottleneck> {
        let seen = self.seen.as_mut()?;
        seen.reach(now);
        let last = seen.second(seen.now);
        let first = last.saturating_sub(WINDOW_S);
        if first == last {
            return None;
        }
        let share = (seen.mark(last) - seen.mark(first)).as_secs_f64() / (last - first) as f64;
        Some(match share {
            share if share < 1.0 - MOST => Bottleneck::Source,
            share if share > MOST => Bottleneck::Target,
            _ => Bottleneck::Balanced,
        })
    }
}

impl Seen {
    /// Brings the sum up to `now`, and the marks that were passed. A time that was read before another one and comes after it
    /// changes nothing.
    fn reach(&mut self, now: Instant) {
        if now <= self.now {
            return;
        }
        let (from, to) = (self.second(self.now), self.second(now));
        // Older ones are of no use any more.
        for second in (from + 1).max(to.saturating_sub(WINDOW_S))..=to {
            let boundary = self.born + Duration::from_secs(second);
            let passed = boundary.saturating_duration_since(self.now);
            // The remainder is below the number of marks, so there always is one.
            if let Some(mark) = self.marks.get_mut((second % MARKS as u64) as usize) {
                *mark = if self.in_flight { self.sum + passed } else { self.sum };
            }
        }
        if self.in_flight {
            self.sum += now - self.now;
        }
        self.now = now;
    }

    fn mark(&self, second: u64) -> Duration {
        self.marks.get((second % MARKS as u64) as usize).copied().unwrap_or_default()
    }

    fn second(&self, at: Instant) -> u64 {
        at.duration_since(self.born).as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(born: Instant, milliseconds: u64) -> Instant {
        born + Duration::from_millis(milliseconds)
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_before_there_is_a_second_of_data() {
        let born = Instant::now();
        let mut busy = Busy::default();
        assert_eq!(busy.bottleneck(at(born, 60_000)), None, "no request ever came");
        busy.begin(at(born, 60_000));
        assert_eq!(busy.bottleneck(at(born, 60_999)), None);
        assert_eq!(busy.bottleneck(at(born, 61_000)), Some(Bottleneck::Target));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_waited_for_most_of_the_time_is_the_bottleneck() {
        for (busy_ms, expected) in [
            (0, Bottleneck::Source),
            (190, Bottleneck::Source),
            (200, Bottleneck::Balanced),
            (500, Bottleneck::Balanced),
            (800, Bottleneck::Balanced),
            (810, Bottleneck::Target),
            (1000, Bottleneck::Target),
        ] {
            let born = Instant::now();
            let mut busy = Busy::default();
            for second in 0..30 {
                busy.begin(at(born, second * 1000));
                busy.end(at(born, second * 1000 + busy_ms));
            }
            assert_eq!(busy.bottleneck(at(born, 30_000)), Some(expected), "{busy_ms} of 1000 ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_long_request_fills_every_second_that_it_lasts_and_is_forgotten_after_ten() {
        let born = Instant::now();
        let mut busy = Busy::default();
        busy.begin(born);
        // Longer than the window, and still in flight.
        assert_eq!(busy.bottleneck(at(born, 25_500)), Some(Bottleneck::Target));
        busy.end(at(born, 26_000));
        assert_eq!(busy.bottleneck(at(born, 31_000)), Some(Bottleneck::Balanced));
        assert_eq!(busy.bottleneck(at(born, 36_000)), Some(Bottleneck::Source));
        // Nothing for an hour, then a short one.
        busy.begin(at(born, 3_600_000));
        busy.end(at(born, 3_600_100));
        assert_eq!(busy.bottleneck(at(born, 3_601_000)), Some(Bottleneck::Source));
    }

    #[tokio::test(start_paused = true)]
    async fn a_time_that_comes_late_takes_nothing_back() {
        let born = Instant::now();
        let mut busy = Busy::default();
        busy.begin(at(born, 0));
        busy.end(at(born, 950));
        busy.begin(at(born, 900));
        busy.end(at(born, 1000));
        assert_eq!(busy.bottleneck(at(born, 1000)), Some(Bottleneck::Target));
    }
}
