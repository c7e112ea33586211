//! Sizes and shares as people write and read them on the command line.

use std::fmt;
use std::str::FromStr;

/// A number of bytes: `65536`, `64KiB`, `1MiB`, `4GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no size; write 65536, 64KiB, 1MiB or 4GiB");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &text[digits.len()..];
        let factor = if unit.is_empty() {
            1
        } else {
            UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(bad)?.1
        };
        let n: u64 = digits.trim().parse().map_err(|_| bad())?;
        n.checked_mul(factor).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) =
            UNITS.iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor)).unwrap_or(&UNITS[3]);
        write!(f, "{}{name}", self.0 / factor)
    }
}

/// Block sizes and their weights: `64KiB:0.5,1MiB:0.5`.
#[derive(Clone, Debug, PartialEq)]
pub struct SizeMix(Vec<(ByteSize, f64)>);

/// Most sizes of one mix.
pub const MIX_SIZES_MAX: usize = 16;

impl SizeMix {
    /// The sizes, each with its share of 1.
    pub fn shares(&self) -> &[(ByteSize, f64)] {
        &self.0
    }

    /// The size that a uniform draw from 0 to 1 falls on.
    pub fn pick(&self, draw: f64) -> ByteSize {
        let mut left = draw;
        for (size, share) in &self.0 {
            if left < *share {
                return *size;
            }
            left -= share;
        }
        // Rounding may leave a crumb above the last share.
        self.0[self.0.len() - 1].0
    }

    /// The largest size.
    pub fn largest(&self) -> ByteSize {
        self.0.iter().map(|(size, _)| *size).max().unwrap_or(ByteSize(0))
    }
}

impl FromStr for SizeMix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut sizes = Vec::new();
        for item in text.split(',').take(MIX_SIZES_MAX + 1) {
            let (size, weight) = match item.split_once(':') {
                Some((size, weight)) => (size, weight.parse().map_err(|_| format!("{weight:?} is no weight"))?),
                None => (item, 1.0f64),
            };
            let size: ByteSize = size.parse()?;
            if size.0 == 0 || !(weight.is_finite() && weight > 0.0) {
                return Err(format!("{item:?}: a mix has sizes and weights above 0"));
            }
            sizes.push((size, weight));
        }
        if sizes.len() > MIX_SIZES_MAX {
            return Err(format!("a mix has at most {MIX_SIZES_MAX} sizes"));
        }
        let sum: f64 = sizes.iter().map(|(_, w)| w).sum();
        Ok(Self(sizes.into_iter().map(|(s, w)| (s, w / sum)).collect()))
    }
}

impl fmt::Display for SizeMix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (size, share)) in self.0.iter().enumerate() {
            write!(f, "{}{size}:{share:.3}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// A share: 0 to 1.
pub fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(format!("{text:?} is no share; write a number from 0 to 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!("64KiB".parse(), Ok(ByteSize(65536)));
        assert_eq!("7".parse(), Ok(ByteSize(7)));
        assert_eq!("4gib".parse(), Ok(ByteSize(4 << 30)));
        assert_eq!(ByteSize(1 << 20).to_string(), "1MiB");
        for bad in ["", "KiB", "1XiB", "-1", "99999999999GiB"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mix_picks_by_share() {
        let mix: SizeMix = "64KiB:1,1MiB:3".parse().unwrap();
        assert_eq!(mix.pick(0.2), ByteSize(65536));
        assert_eq!(mix.pick(0.3), ByteSize(1 << 20));
        assert_eq!(mix.pick(1.0), ByteSize(1 << 20));
        assert!("64KiB:0".parse::<SizeMix>().is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".*") {
            let _ = text.parse::<ByteSize>();
            let _ = text.parse::<SizeMix>();
            let _ = parse_share(&text);
        }
    }
}
