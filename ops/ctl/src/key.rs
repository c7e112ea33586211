//! Keys as people type and see them. Engines' keys are opaque bytes, mostly hashes, sometimes text.

use std::str::FromStr;

use bytes::Bytes;
use kvkeep_core::ids::KEY_BYTES_MAX;

/// A key or a prefix of one: hexadecimal, or `text:...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyArg(pub Bytes);

impl FromStr for KeyArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = match text.strip_prefix("text:") {
            Some(plain) => plain.as_bytes().to_vec(),
            None => from_hex(text.strip_prefix("0x").unwrap_or(text))?,
        };
        if bytes.is_empty() || bytes.len() > KEY_BYTES_MAX {
            return Err(format!("a key has 1 to {KEY_BYTES_MAX} bytes, this one has {}", bytes.len()));
        }
        Ok(Self(bytes.into()))
    }
}

fn from_hex(text: &str) -> Result<Vec<u8>, String> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    match digits {
        Some(digits) if digits.len() % 2 == 0 => Ok(digits.chunks_exact(2).map(|p| p[0] << 4 | p[1]).collect()),
        Some(_) => Err("a hexadecimal key has an even number of digits".to_owned()),
        None => Err("a key is hexadecimal digits, or text:ANY TEXT".to_owned()),
    }
}

/// Hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// As [`KeyArg`] reads it back: text where it is all printable ASCII, else hexadecimal.
pub fn show(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) if !text.is_empty() && key.iter().all(|b| b.is_ascii_graphic()) => format!("text:{text}"),
        _ => hex(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_key_that_is_shown_can_be_typed(key in proptest::collection::vec(any::<u8>(), 1..=KEY_BYTES_MAX)) {
            prop_assert_eq!(show(&key).parse::<KeyArg>().map(|k| k.0.to_vec()), Ok(key));
        }

        #[test]
        fn nothing_that_is_typed_panics(text in ".*") {
            let _ = text.parse::<KeyArg>();
        }
    }

    #[test]
    fn hexadecimal_and_text_are_told_apart() {
        assert_eq!("0x00ff".parse::<KeyArg>().unwrap().0.as_ref(), [0, 255]);
        assert_eq!("text:00ff".parse::<KeyArg>().unwrap().0.as_ref(), b"00ff");
        for bad in ["", "0x", "text:", "abc", "xyz", &"00".repeat(129)] {
            assert!(bad.parse::<KeyArg>().is_err(), "{bad}");
        }
    }
}
