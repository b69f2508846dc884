//! Byte sizes in human-readable form.

/// A text that is not a byte size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a byte size (expected a whole number, optionally with K, M, G or T)")]
pub struct ByteSizeError {
    text: String,
}

/// Parses a byte size: `64`, `64K`, `1M`, `2G`, `1T`; `KB` and `KiB` mean the same as `K`.
///
/// Suffixes are powers of 1024 and case does not matter, as in nccl-tests.
///
/// # Errors
/// [`ByteSizeError`] for anything else, including sizes above `u64::MAX`.
pub fn parse_bytes(text: &str) -> Result<u64, ByteSizeError> {
    let failed = || ByteSizeError { text: text.to_owned() };
    let trimmed = text.trim();
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = trimmed.split_at(digits);
    let scale = match suffix.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err(failed()),
    };
    let number: u64 = number.parse().map_err(|_| failed())?;
    number.checked_mul(scale).ok_or_else(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("64", 64),
            ("8B", 8),
            ("64K", 64 << 10),
            ("1m", 1 << 20),
            ("1 MiB", 1 << 20),
            ("2GB", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "K", "-1", "+1", "1.5M", "1X", "1Ki", "99999999999T", "18446744073709551616"]
        {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
