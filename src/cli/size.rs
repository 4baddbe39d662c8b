//! Sizes as people write and read them: powers of 1024, `40G` or `40 GiB`.

use std::str::FromStr;

/// A size in bytes that was written with or without a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

/// Why a text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum SizeError {
    /// Nothing that could be read as one.
    #[error("{text:?} is no size: write bytes, or a whole number with K, M, G or T (powers of 1024)")]
    Unreadable { text: String },
    /// What other tools take for a change of the size.
    #[error("{text:?} has a sign: write the whole size that is wanted, not what is added or taken away")]
    Sign { text: String },
}

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError::Unreadable { text: text.to_owned() };
        // Two of them begin an option that stands where the size should.
        if text.trim_start().starts_with(['+', '-']) && !text.starts_with("--") {
            return Err(SizeError::Sign { text: text.to_owned() });
        }
        let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text[number.len()..].to_ascii_uppercase();
        let unit = unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit);
        let shift = match unit {
            "" => 0,
            unit => UNITS.iter().find(|(name, _)| unit == name.to_string()).ok_or_else(error)?.1,
        };
        let number: u64 = number.trim().parse().map_err(|_| error())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

/// Bytes with the unit that leaves one to four digits before the point: `40.0 GiB`.
pub(super) fn readable(bytes: u64) -> String {
    // One decimal is shown: what a float of 53 bits rounds away is far below it.
    #[allow(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let scaled = |shift: u32| bytes as f64 / (1_u64 << shift) as f64;
    match UNITS.iter().rev().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}iB", scaled(*shift)),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [("512", 512), ("40G", 40 << 30), ("1k", 1024), ("3 MiB", 3 << 20), ("2TB", 2 << 40)] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for wrong in ["", "G", "-1", "1.5G", "1X", "99999999999T", "1GG"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
        for signed in ["+1G", "-1", " +5", "-0"] {
            assert_eq!(signed.parse::<Size>(), Err(SizeError::Sign { text: signed.into() }));
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (40 << 30, "40.0 GiB")] {
            assert_eq!(readable(bytes), text);
        }
    }
}
