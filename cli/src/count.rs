//! Options that are counts, each with its limits.

use std::ops::RangeInclusive;

/// The parser of an option that takes a whole number within `limits`. Its error names them.
pub fn within(limits: RangeInclusive<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone {
    move |text| {
        text.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| text.parse().ok())
            .flatten()
            .filter(|number| limits.contains(number))
            .ok_or_else(|| {
                format!(
                    "it is a whole number from {} to {}",
                    limits.start(),
                    limits.end()
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold() {
        let parse = within(1..=8192);
        assert_eq!(parse("1"), Ok(1));
        assert_eq!(parse("8192"), Ok(8192));
        for bad in ["", "0", "8193", "-1", "+1", "1.0", " 1", "99999999999999"] {
            assert_eq!(
                parse(bad).unwrap_err(),
                "it is a whole number from 1 to 8192",
                "{bad}"
            );
        }
    }
}
