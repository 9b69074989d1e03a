//! Sizes and rates as people type them: `8GiB`, `40GB/s`.

/// Units of 1024 and of 1000, longest first so that `GiB` is not read as `B`. A bare letter means 1024, as in the tools
/// that people know.
const UNITS: &[(&str, f64)] = &[
    ("kib", 1024.0),
    ("mib", 1048576.0),
    ("gib", 1073741824.0),
    ("tib", 1099511627776.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("tb", 1e12),
    ("k", 1024.0),
    ("m", 1048576.0),
    ("g", 1073741824.0),
    ("t", 1099511627776.0),
    ("b", 1.0),
    ("", 1.0),
];

/// Bytes of `8GiB`, `512 MB`, `1.5g` or a plain number.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let value = number(text).ok_or_else(|| {
        format!("`{text}` is no size; write a number with KiB, MiB, GiB or TiB (or KB, MB, GB, TB), such as 8GiB")
    })?;
    // Above 2^63 no memory is meant.
    if (1.0..9.2e18).contains(&value) {
        Ok(value as u64)
    } else {
        Err(format!("`{text}` is not between 1 B and 8 EiB"))
    }
}

/// Bytes per second of `40GB/s`; the `/s` may be left out.
pub(crate) fn parse_rate(text: &str) -> Result<f64, String> {
    let value = number(text.trim().strip_suffix("/s").unwrap_or(text));
    value
        .filter(|value| *value >= 1.0)
        .ok_or_else(|| format!("`{text}` is no rate; write a number with a unit, such as 40GB/s"))
}

fn number(text: &str) -> Option<f64> {
    let text = text.trim().to_ascii_lowercase();
    let (digits, factor) = UNITS
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)))?;
    let digits = digits.trim_end();
    let plain = digits
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    let value: f64 = digits.parse().ok().filter(|_| plain)?;
    let value = value * factor;
    value.is_finite().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_rates_are_read() {
        assert_eq!(parse_bytes("8GiB"), Ok(8 << 30));
        assert_eq!(parse_bytes("1.5 g"), Ok(3 << 29));
        assert_eq!(parse_bytes("512MB"), Ok(512_000_000));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("12b"), Ok(12));
        assert_eq!(parse_rate("40GB/s"), Ok(4e10));
        assert_eq!(parse_rate("1GiB"), Ok(1073741824.0));
        for bad in [
            "",
            "GiB",
            "-1GiB",
            "8 XB",
            "inf",
            "1e3",
            "nan",
            "0",
            "99999999999TiB",
        ] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert!(parse_rate("0").is_err() && parse_rate("fast").is_err());
    }
}
