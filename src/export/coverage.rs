//! Which bytes of a disk were written or zeroed in one job: the proof that a full backup is full.
//!
//! A set of byte ranges, kept as few as possible by joining neighbours: a client that hops between three distant regions
//! needs three entries, whatever the size of the disk. The set knows nothing of images or requests; the export adds to
//! it what a client was told is done, and the seal asks whether everything is there.

use std::collections::BTreeMap;

/// A run of bytes: `offset, length`, never empty.
pub type Run = (u64, u64);

/// A set of bytes below 2^63, as disjoint ranges that never touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Start of a range to its end (exclusive); `start < end`, and each end is below the next start.
    ranges: BTreeMap<u64, u64>,
    /// The sum of all lengths, kept so that progress costs nothing.
    covered_bytes: u64,
}

impl Coverage {
    /// Nothing covered.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `offset, length` and says how many of these bytes were not covered before.
    ///
    /// A range that would pass 2^64 is cut there; the session checks requests against the size of the disk long before.
    pub fn add(&mut self, offset: u64, length: u64) -> u64 {
        if length == 0 {
            return 0;
        }
        let before = self.covered_bytes;
        let mut start = offset;
        let mut end = offset.saturating_add(length);
        // A range that begins before us and reaches us (or ends exactly where we begin) is taken in.
        if let Some((&left_start, &left_end)) = self.ranges.range(..=start).next_back()
            && left_end >= start
        {
            start = left_start;
            end = end.max(left_end);
        }
        // So is every range that begins inside us or exactly at our end. Joining can only lengthen, so one pass is enough.
        while let Some((&right_start, &right_end)) = self.ranges.range(start..=end).next() {
            self.ranges.remove(&right_start);
            self.covered_bytes -= right_end - right_start;
            end = end.max(right_end);
        }
        self.ranges.insert(start, end);
        self.covered_bytes += end - start;
        self.covered_bytes - before
    }

    /// How many bytes are covered.
    pub fn covered_bytes(&self) -> u64 {
        self.covered_bytes
    }

    /// Whether exactly `[0, size)` is covered: nothing missing, nothing beyond.
    pub fn is_whole(&self, size: u64) -> bool {
        match self.ranges.first_key_value() {
            None => size == 0,
            Some((&start, &end)) => self.ranges.len() == 1 && start == 0 && end == size,
        }
    }

    /// The first run of `[0, size)` that is not covered.
    pub fn first_gap(&self, size: u64) -> Option<Run> {
        let mut position = 0;
        for (&start, &end) in &self.ranges {
            if start > position {
                break;
            }
            position = end;
        }
        if position >= size {
            return None;
        }
        let next = self.ranges.range(position..).next().map_or(size, |(&start, _)| start.min(size));
        Some((position, next - position))
    }

    /// All ranges in ascending order, in the form in which they can be stored.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = Run> + '_ {
        self.ranges.iter().map(|(&start, &end)| (start, end - start))
    }
}

impl FromIterator<Run> for Coverage {
    fn from_iter<I: IntoIterator<Item = Run>>(runs: I) -> Self {
        let mut coverage = Self::new();
        for (offset, length) in runs {
            coverage.add(offset, length);
        }
        coverage
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 64;

    fn model(runs: &[Run]) -> Vec<bool> {
        let mut bytes = vec![false; SIZE as usize];
        for &(offset, length) in runs {
            for byte in &mut bytes[offset as usize..(offset + length) as usize] {
                *byte = true;
            }
        }
        bytes
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        prop::collection::vec((0..SIZE).prop_flat_map(|offset| (Just(offset), 0..=SIZE - offset)), 0..24)
    }

    proptest! {
        #[test]
        fn covered_bytes_and_gaps_agree_with_a_map_of_single_bytes(runs in runs()) {
            let coverage: Coverage = runs.iter().copied().collect();
            let bytes = model(&runs);
            prop_assert_eq!(coverage.covered_bytes(), bytes.iter().filter(|covered| **covered).count() as u64);
            prop_assert_eq!(coverage.is_whole(SIZE), bytes.iter().all(|covered| *covered));
            let gap = bytes.iter().position(|covered| !covered).map(|start| {
                let length = bytes[start..].iter().take_while(|covered| !**covered).count();
                (start as u64, length as u64)
            });
            prop_assert_eq!(coverage.first_gap(SIZE), gap);
        }

        #[test]
        fn order_of_the_ranges_does_not_matter_and_stored_runs_give_the_same_set(runs in runs()) {
            let coverage: Coverage = runs.iter().copied().collect();
            let backwards: Coverage = runs.iter().rev().copied().collect();
            prop_assert_eq!(&coverage, &backwards);
            let stored: Coverage = coverage.runs().collect();
            prop_assert_eq!(&coverage, &stored);
        }

        #[test]
        fn ranges_never_touch_and_the_new_bytes_add_up(runs in runs()) {
            let mut coverage = Coverage::new();
            let mut sum = 0;
            for (offset, length) in runs {
                sum += coverage.add(offset, length);
                prop_assert_eq!(sum, coverage.covered_bytes());
            }
            let kept: Vec<Run> = coverage.runs().collect();
            for pair in kept.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 < pair[1].0);
            }
        }
    }

    #[test]
    fn three_interleaved_regions_need_three_entries() {
        let mut coverage = Coverage::new();
        for step in 0..1000_u64 {
            for region in 0..3_u64 {
                coverage.add(region * 1_000_000 + step * 512, 512);
            }
        }
        assert_eq!(coverage.runs().count(), 3);
    }

    #[test]
    fn a_byte_beyond_the_end_is_not_whole() {
        let coverage: Coverage = [(0, 1024)].into_iter().collect();
        assert!(coverage.is_whole(1024));
        assert!(!coverage.is_whole(1000));
        assert!(Coverage::new().is_whole(0));
    }

    #[test]
    fn a_range_at_the_end_of_numbers_does_not_wrap() {
        let mut coverage = Coverage::new();
        assert_eq!(coverage.add(u64::MAX - 10, 100), 10);
    }
}
