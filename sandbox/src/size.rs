//! Sizes as people write them: `512M`, `4GiB`, `1048576`.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error as _, Visitor};

/// A number of bytes. Suffixes are powers of 1024, as they are to Docker and Kubernetes' `Mi` and `Gi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size: write a number of bytes, or one with a suffix such as 512M or 4G")]
pub struct SizeError(String);

const UNITS: [(char, u32); 5] = [('B', 0), ('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl Size {
    /// Mebibytes, rounded up.
    pub fn mib_rounded_up(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError(text.chars().take(64).collect());
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let mut letters = suffix.chars().map(|c| c.to_ascii_uppercase());
        let unit = letters.next().unwrap_or('B');
        let shift = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?.1;
        let rest: String = letters.collect();
        let rest_ok = rest.is_empty() || (shift > 0 && (rest == "B" || rest == "I" || rest == "IB"));
        let bytes = number.checked_mul(1 << shift).filter(|_| rest_ok).ok_or_else(error)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) =
            UNITS.iter().rev().find(|(_, shift)| self.0 >= 1 << shift).copied().unwrap_or(('B', 0));
        if shift == 0 {
            return write!(f, "{} B", self.0);
        }
        let tenths = (u128::from(self.0) * 10) >> shift;
        if tenths.is_multiple_of(10) {
            write!(f, "{} {unit}iB", tenths / 10)
        } else {
            write!(f, "{}.{} {unit}iB", tenths / 10, tenths % 10)
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"512M\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("17b", 17),
            ("512M", 512 << 20),
            ("4GiB", 4 << 30),
            ("1gb", 1 << 30),
            ("2Ki", 2048),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "1.5G", "1X", "1GG", "1BB", "1bi", "99999999999T", "1 G"] {
            assert!(text.parse::<Size>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_size_is_shown_in_its_largest_unit() {
        assert_eq!(Size(1 << 30).to_string(), "1 GiB");
        assert_eq!(Size(1_600 << 20).to_string(), "1.5 GiB");
        assert_eq!(Size(12).to_string(), "12 B");
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_understood(text in ".{0,20}") {
            let _ = text.parse::<Size>();
        }
    }
}
