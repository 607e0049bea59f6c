//! RFC 3339 dates and times, strictly, to microseconds and days since the Unix epoch.
//!
//! The offset is required; `t` and `z` may be lower case; any number of fraction digits, cut off (not rounded) after
//! the microsecond. A leap second is accepted where RFC 3339 has them, at 23:59:60 UTC, and becomes the last microsecond
//! before it ends its minute (23:59:59.999999), so that it stays in its minute, its day and its window.

/// Microseconds since the epoch.
#[inline]
pub fn date_time(text: &[u8]) -> Option<i64> {
    let (day, rest) = text.split_first_chunk::<10>()?;
    let [b'T' | b't', rest @ ..] = rest else { return None };
    let (time, tail) = rest.split_first_chunk::<8>()?;
    let (days, (minutes, mut second)) = (date(day)?, minutes_and_second(time)?);
    let (mut micros, zone) = fraction(tail)?;
    let offset_minutes = offset(zone)?;
    let utc_minutes = i64::from(days) * 1440 + minutes - offset_minutes;
    if second == 60 {
        if utc_minutes.rem_euclid(1440) != 1439 {
            return None;
        }
        second = 59;
        micros = 999_999;
    }
    Some((utc_minutes * 60 + second) * 1_000_000 + micros)
}

/// Microseconds since the epoch of a date-time without an offset, as if it were in UTC.
pub fn local_date_time(text: &[u8]) -> Option<i64> {
    let (head, clock) = text.split_first_chunk::<11>()?;
    if !matches!(head[10], b'T' | b't') {
        return None;
    }
    Some(i64::from(date(&head[..10])?) * 86_400_000_000 + local_time(clock)?)
}

/// Microseconds since midnight of `HH:MM:SS` with an optional fraction. There is no telling where a leap second may be.
pub fn local_time(text: &[u8]) -> Option<i64> {
    let (minutes, second, micros, rest) = clock(text)?;
    (second < 60 && rest.is_empty()).then(|| (minutes * 60 + second) * 1_000_000 + micros)
}

/// Microseconds since midnight in UTC of a time with an offset.
pub fn time(text: &[u8]) -> Option<i64> {
    let (minutes, second, micros, rest) = clock(text)?;
    let minutes = (minutes - offset(rest)?).rem_euclid(1440);
    match second {
        60 if minutes == 1439 => Some(86_399_999_999),
        60 => None,
        _ => Some((minutes * 60 + second) * 1_000_000 + micros),
    }
}

/// Minutes, seconds to 60, microseconds, and what follows.
fn clock(text: &[u8]) -> Option<(i64, i64, i64, &[u8])> {
    let (time, tail) = text.split_first_chunk::<8>()?;
    let (minutes, second) = minutes_and_second(time)?;
    let (micros, rest) = fraction(tail)?;
    Some((minutes, second, micros, rest))
}

/// Of `HH:MM:SS`; seconds to 60.
#[inline]
fn minutes_and_second(text: &[u8; 8]) -> Option<(i64, i64)> {
    let pairs = pairs(text, b"00:00:00", 0x7676_7F76_767F_7676)?;
    let (hour, minute, second) = (pairs & 0xFF, pairs >> 24 & 0xFF, pairs >> 48 & 0xFF);
    (hour <= 23 && minute <= 59 && second <= 60).then_some(((hour * 60 + minute) as i64, second as i64))
}

/// Eight bytes at once: where `shape` has a zero a digit, elsewhere that very byte. What each two digits in a row stand for is in
/// the byte of the first. `limits` has for each byte what leads to 128 from the first value that is too large.
#[inline]
fn pairs(text: &[u8; 8], shape: &[u8; 8], limits: u64) -> Option<u64> {
    let values = u64::from_le_bytes(*text) ^ u64::from_le_bytes(*shape);
    // A carry comes only from a byte that is refused itself.
    let refused = (values.wrapping_add(limits) | values) & 0x8080_8080_8080_8080;
    (refused == 0).then(|| values.wrapping_mul(10).wrapping_add(values >> 8))
}

/// Minutes of `Z` or `±HH:MM`.
#[inline]
fn offset(zone: &[u8]) -> Option<i64> {
    match zone {
        [b'Z' | b'z'] => Some(0),
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (two(*h1, *h2), two(*m1, *m2));
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = i64::from(hours * 60 + minutes);
            Some(if *sign == b'+' { offset } else { -offset })
        }
        _ => None,
    }
}

/// Days since the epoch of `YYYY-MM-DD`.
#[inline]
pub fn date(text: &[u8]) -> Option<i32> {
    let (year_and_month, day) = text.split_first_chunk::<8>()?;
    let [tens, ones] = *day else { return None };
    let pairs = pairs(year_and_month, b"0000-00-", 0x7F76_767F_7676_7676)?;
    let (century, year, month) = (pairs as u8, (pairs >> 16) as u8, (pairs >> 40) as u8);
    let (year, month, day) = (i32::from(century) * 100 + i32::from(year), i32::from(month), two(tens, ones));
    if !(1..=12).contains(&month) || day < 1 {
        return None;
    }
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        2 => 28 + i32::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if day > last {
        return None;
    }
    // Days from civil (H. Hinnant): years that begin in March, counted in eras of 400.
    let shifted = year - i32::from(month <= 2);
    let (era, of_era) = (shifted.div_euclid(400), shifted.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    Some(era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468)
}

/// Microseconds of an optional `.digits`, and what follows it.
#[inline]
fn fraction(text: &[u8]) -> Option<(i64, &[u8])> {
    let Some(digits) = text.strip_prefix(b".") else { return Some((0, text)) };
    let (mut micros, mut unit, mut count) = (0, 100_000, 0);
    while let Some(digit @ b'0'..=b'9') = digits.get(count) {
        micros += i64::from(digit - b'0') * unit;
        unit /= 10;
        count += 1;
    }
    (count > 0).then(|| (micros, &digits[count..]))
}

/// A number of two digits; anything else is 255, beyond every limit.
#[inline]
fn two(tens: u8, ones: u8) -> i32 {
    let (tens, ones) = (tens.wrapping_sub(b'0'), ones.wrapping_sub(b'0'));
    if tens > 9 || ones > 9 { 255 } else { i32::from(tens) * 10 + i32::from(ones) }
}

/// The text form of RFC 9562: 32 hexadecimal digits in groups of 8-4-4-4-12.
pub fn is_uuid(text: &[u8]) -> bool {
    text.len() == 36
        && text.iter().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => *b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn date_times_agree_with_jiff() {
        for text in [
            "1970-01-01T00:00:00Z",
            "1969-12-31T23:59:59.999999Z",
            "2024-02-29T12:34:56.7Z",
            "2000-02-29T00:00:00-12:30",
            "1900-03-01T00:00:00+14:00",
            "0001-01-01T00:00:00Z",
            "9999-12-30T21:59:59Z",
            "2026-11-20T23:59:00.123456Z",
            "2026-11-20t23:59:00.123z",
        ] {
            let expected: jiff::Timestamp = text.to_uppercase().parse().unwrap();
            assert_eq!(date_time(text.as_bytes()), Some(expected.as_microsecond()), "{text}");
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut expected = date(b"0000-01-01").unwrap();
        for year in 0..10_000 {
            for month in 1..=12 {
                for day in 1..=31 {
                    if let Some(days) = date(format!("{year:04}-{month:02}-{day:02}").as_bytes()) {
                        assert_eq!(days, expected);
                        expected += 1;
                    }
                }
            }
        }
        assert_eq!(expected, date(b"9999-12-31").unwrap() + 1);
        assert_eq!(date(b"1970-01-01"), Some(0));
    }

    #[test]
    fn fractions_are_cut_after_the_microsecond() {
        assert_eq!(date_time(b"1970-01-01T00:00:00.1234569Z"), Some(123_456));
        assert_eq!(date_time(b"1970-01-01T00:00:00.000000999999999999999999999Z"), Some(0));
    }

    #[test]
    fn leap_seconds_are_accepted_where_they_can_be() {
        let last = date_time(b"1998-12-31T23:59:59.999999Z");
        for text in ["1998-12-31T23:59:60Z", "1998-12-31T15:59:60.123-08:00", "1999-01-01T00:59:60+01:00"] {
            assert_eq!(date_time(text.as_bytes()), last, "{text}");
        }
        for text in
            ["1998-12-31T23:58:60Z", "1998-12-31T22:59:60Z", "1998-12-31T23:59:60-08:00", "1998-12-31T23:59:61Z"]
        {
            assert_eq!(date_time(text.as_bytes()), None, "{text}");
        }
    }

    /// The cases of the JSON Schema test suite for `date-time` and `date`, and some more.
    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "2026-11-20",
            "2026-11-20T12:00:00",
            "2026-11-20 12:00:00Z",
            "2026-11-20T12:00Z",
            "2026-11-20T12:00:00.Z",
            "2026-11-20T12:00:00,5Z",
            "2026-11-20T12:00:00ZZ",
            "2026-11-20T12:00:00Z ",
            " 2026-11-20T12:00:00Z",
            "2026-11-20T12:00:00+0100",
            "2026-11-20T12:00:00+01",
            "2026-11-20T12:00:00+24:00",
            "2026-11-20T12:00:00+01:60",
            "2026-02-29T12:00:00Z",
            "2100-02-29T12:00:00Z",
            "2026-04-31T12:00:00Z",
            "2026-00-10T12:00:00Z",
            "2026-13-10T12:00:00Z",
            "2026-01-00T12:00:00Z",
            "2026-01-10T24:00:00Z",
            "2026-01-10T12:60:00Z",
            "26-01-10T12:00:00Z",
            "+2026-01-10T12:00:00Z",
            "02026-01-10T12:00:00Z",
            "2026-1-10T12:00:00Z",
            "2026-350T01:01:01Z",
            "1963-06-1\u{09ea}T00:00:00Z",
            "06/19/1963 08:30:06 PST",
            "2013-350T01:01:01",
        ] {
            assert_eq!(date_time(text.as_bytes()), None, "{text}");
        }
        for text in ["", "1998-1-20", "1998-01-1", "1998-02-29", "06/19/1963", "19980120", "1998-01-20Z", "2020-W01"] {
            assert_eq!(date(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn times_of_day() {
        assert_eq!(time(b"12:00:00+02:00"), Some(36_000_000_000));
        assert_eq!(time(b"00:30:00.25+01:00"), Some(84_600_250_000));
        assert_eq!(time(b"23:59:60Z"), Some(86_399_999_999));
        assert_eq!(time(b"15:59:60.5-08:00"), Some(86_399_999_999));
        assert_eq!(local_time(b"23:59:59.9999999"), Some(86_399_999_999));
        assert_eq!(local_date_time(b"1970-01-02T00:00:01.5"), Some(86_401_500_000));
        for text in ["", "12:00:00", "12:00Z", "24:00:00Z", "12:60:00Z", "22:59:60Z", "12:00:00+24:00", "12:00:00.Z"] {
            assert_eq!(time(text.as_bytes()), None, "{text}");
        }
        for text in ["", "12:00:00Z", "12:00", "23:59:60", "1:00:00", "12:00:00."] {
            assert_eq!(local_time(text.as_bytes()), None, "{text}");
            assert_eq!(local_date_time(format!("2026-01-01T{text}").as_bytes()), None, "{text}");
        }
        assert_eq!(local_date_time(b"2026-01-01 12:00:00"), None);
    }

    #[test]
    fn uuids() {
        assert!(is_uuid(b"2EB8AA08-aa98-11ea-b4aa-73b441d16380"));
        for text in [
            "",
            "2eb8aa08-aa98-11ea-b4aa-73b441d1638",
            "2eb8aa08aa9811eab4aa73b441d16380",
            "{eb8aa08-aa98-11ea-b4aa-73b441d1638}",
            "2eb8aa08-aa98-11ea-b4ga-73b441d16380",
            "2eb8-aa08-aa98-11ea-b4aa73b44-1d16380",
        ] {
            assert!(!is_uuid(text.as_bytes()), "{text}");
        }
    }
}
