//! An inclusive range of TCP ports, written `first-last`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An inclusive range of TCP ports: `1 <= first <= last <= 65535`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// The text is no port range.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no port range: write first-last, such as 10100-10200, with 1 <= first <= last <= 65535")]
pub struct PortRangeError {
    text: String,
}

impl PortRange {
    /// The range that the nodes' tunnels forward.
    pub const DEFAULT: Self = Self { first: 10_100, last: 10_200 };

    /// Where restore points are exported.
    pub const RESTORE_DEFAULT: Self = Self { first: 10_300, last: 10_399 };

    /// The ports, lowest first.
    pub fn ports(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }

    /// Whether a port belongs to both ranges.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        text.split_once('-')
            .and_then(|(first, last)| Some((first.trim().parse().ok()?, last.trim().parse().ok()?)))
            .filter(|(first, last)| 1 <= *first && first <= last)
            .map(|(first, last)| Self { first, last })
            .ok_or_else(|| PortRangeError { text: text.to_owned() })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl TryFrom<String> for PortRange {
    type Error = PortRangeError;

    fn try_from(text: String) -> Result<Self, PortRangeError> {
        text.parse()
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> String {
        range.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_inclusive_and_only_the_written_form_is_one() {
        let range: PortRange = "10100-10101".parse().unwrap();
        assert_eq!(range.ports().collect::<Vec<_>>(), [10_100, 10_101]);
        for wrong in ["", "10100", "0-5", "5-4", "1-65536", "a-b", "1-2-3", "-", "-1-4"] {
            assert!(wrong.parse::<PortRange>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_that_share_one_port_overlap() {
        let range = |text: &str| text.parse::<PortRange>().unwrap();
        assert!(range("1-5").overlaps(range("5-9")));
        assert!(range("1-9").overlaps(range("3-4")));
        assert!(!range("1-5").overlaps(range("6-9")));
    }
}
