//! The one form of a point in time: UTC, RFC 3339, milliseconds, `Z`.
//!
//! The width is fixed so that text order is time order, in the database as in answers. Deadlines and durations are not
//! here: they use the monotonic clock of tokio.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A point in time, whole milliseconds, always UTC whatever the time zone of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UtcTime(Timestamp);

/// The text is not an RFC 3339 time with an offset.
#[derive(Debug, thiserror::Error)]
#[error("not an RFC 3339 time: {0}")]
pub struct TimeParseError(#[from] jiff::Error);

impl UtcTime {
    /// The wall clock now.
    pub fn now() -> Self {
        Self::truncated(Timestamp::now())
    }

    /// This time plus `seconds`; stays put where the sum would leave the years that RFC 3339 can write.
    #[must_use]
    pub fn plus_seconds(self, seconds: u64) -> Self {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        self.0.checked_add(SignedDuration::from_secs(seconds)).map_or(self, Self)
    }

    /// This time less `seconds`; stays put where the difference would leave the years that RFC 3339 can write.
    #[must_use]
    pub fn minus_seconds(self, seconds: u64) -> Self {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        self.0.checked_sub(SignedDuration::from_secs(seconds)).map_or(self, Self)
    }

    /// Whole seconds since 1970.
    pub fn unix_seconds(self) -> i64 {
        self.0.as_second()
    }

    /// Seconds from `earlier` to this time, negative when `earlier` is later.
    pub fn seconds_since(self, earlier: Self) -> f64 {
        self.0.duration_since(earlier.0).as_secs_f64()
    }

    /// Date and time of day in UTC, for rules that count days and weeks.
    pub fn calendar(self) -> jiff::civil::DateTime {
        jiff::tz::Offset::UTC.to_datetime(self.0)
    }

    fn truncated(time: Timestamp) -> Self {
        // Both bounds of a millisecond count lie inside the range of a timestamp that was valid before.
        Self(Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time))
    }
}

impl From<SystemTime> for UtcTime {
    /// The nearest time that RFC 3339 can write.
    fn from(time: SystemTime) -> Self {
        Self::truncated(Timestamp::try_from(time).unwrap_or(Timestamp::MAX))
    }
}

impl fmt::Display for UtcTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl FromStr for UtcTime {
    type Err = TimeParseError;

    fn from_str(text: &str) -> Result<Self, TimeParseError> {
        Ok(Self::truncated(text.parse()?))
    }
}

impl Serialize for UtcTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UtcTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_a_fixed_width_and_survives_a_round_trip() {
        for text in ["2026-11-23T22:00:00.000Z", "2026-11-23T22:00:00.512Z", "1999-01-01T00:00:00.001Z"] {
            assert_eq!(text.parse::<UtcTime>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_offsets_become_utc_and_finer_fractions_are_cut() {
        let time: UtcTime = "2026-11-23T23:00:00.123456+01:00".parse().unwrap();
        assert_eq!(time.to_string(), "2026-11-23T22:00:00.123Z");
        assert!("2026-11-23T22:00:00".parse::<UtcTime>().is_err(), "a time without an offset says nothing");
    }
}
