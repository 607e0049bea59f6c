//! Quantities as people write them, to numbers: durations, sizes, times. Pure.

use std::time::Duration;

/// `10 seconds`, `500 ms`, `1 hour 30 minutes`: Spark's spelling, in any case, singular or plural.
pub fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let (number, after) = leading_number(rest)?;
        let after = after.trim_start();
        let end = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let one = match after[..end].to_ascii_lowercase().as_str() {
            "us" | "µs" | "microsecond" | "microseconds" => Duration::from_micros(1),
            "ms" | "msec" | "msecs" | "millisecond" | "milliseconds" => Duration::from_millis(1),
            "s" | "sec" | "secs" | "second" | "seconds" => Duration::from_secs(1),
            "m" | "min" | "mins" | "minute" | "minutes" => Duration::from_secs(60),
            "h" | "hr" | "hour" | "hours" => Duration::from_secs(3_600),
            "d" | "day" | "days" => Duration::from_secs(86_400),
            "w" | "week" | "weeks" => Duration::from_secs(7 * 86_400),
            _ => return None,
        };
        let part = one.checked_mul(u32::try_from(number).ok()?)?;
        total = total.checked_add(part)?;
        rest = after[end..].trim_start();
    }
    // Times are microseconds in 64 bits further on: a thousand years keep far away from their ends.
    (total <= Duration::from_secs(1_000 * 366 * 86_400)).then_some(total)
}

/// `64 MiB`, `1 GB`, `4096`: bytes.
pub fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = leading_number(text.trim())?;
    let one: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" | "byte" | "bytes" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(one)
}

/// `1000`, `1_000_000`.
pub fn integer(text: &str) -> Option<u64> {
    match leading_number(text.trim())? {
        (number, "") => Some(number),
        _ => None,
    }
}

/// RFC 3339 with an offset, `2026-03-01T00:00:00Z`, to milliseconds since the epoch.
pub fn timestamp_ms(text: &str) -> Option<i64> {
    text.trim().parse::<jiff::Timestamp>().ok().map(|t| t.as_millisecond())
}

/// Digits with underscores between them, and what follows.
fn leading_number(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
    let digits = &text[..end];
    if digits.starts_with('_') || digits.ends_with('_') || digits.contains("__") {
        return None;
    }
    let number = digits.replace('_', "").parse().ok()?;
    Some((number, &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [
            ("10 seconds", Some(10_000)),
            ("1 second", Some(1_000)),
            ("1 minute", Some(60_000)),
            ("500 ms", Some(500)),
            ("500ms", Some(500)),
            ("2000 us", Some(2)),
            ("1 ms 1000µs", Some(2)),
            ("10s", Some(10_000)),
            ("1 Hour 30 Minutes", Some(5_400_000)),
            ("2 days", Some(172_800_000)),
            ("1 week", Some(604_800_000)),
            ("0 seconds", Some(0)),
            ("1_000 milliseconds", Some(1_000)),
            ("", None),
            ("10", None),
            ("seconds", None),
            ("-1 second", None),
            ("1.5 seconds", None),
            ("1 month", None),
            ("1 second,", None),
            ("99999999999999999999 s", None),
            ("4000000000 weeks", None),
        ] {
            assert_eq!(duration(text), ms.map(Duration::from_millis), "{text:?}");
        }
    }

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("64 MiB", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("1 gb", Some(1_000_000_000)),
            ("4_096", Some(4_096)),
            ("0", Some(0)),
            ("64 m", None),
            ("MiB", None),
            ("-1", None),
            ("99999999 TiB", None),
        ] {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
    }

    #[test]
    fn integers() {
        for (text, expected) in
            [("1_000_000", Some(1_000_000)), (" 7 ", Some(7)), ("1__0", None), ("_1", None), ("1.0", None), ("", None)]
        {
            assert_eq!(integer(text), expected, "{text:?}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(timestamp_ms("1970-01-01T00:00:01Z"), Some(1_000));
        assert_eq!(timestamp_ms("1970-01-01T01:00:00+01:00"), Some(0));
        assert_eq!(timestamp_ms("1970-01-01T00:00:00"), None);
        assert_eq!(timestamp_ms("yesterday"), None);
    }
}
