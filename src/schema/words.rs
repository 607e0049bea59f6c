//! What a field allows, in words, for the messages of dead letters.

use super::{BooleanType, IntegerType, NumberType, TextFormat, TextType, ValueType};

pub fn in_words(value: &ValueType, null: bool) -> String {
    let mut words = match value {
        ValueType::Boolean(BooleanType { only: Some(only) }) => list(only),
        ValueType::Integer(IntegerType { only: Some(only), .. }) => list(only),
        ValueType::Number(NumberType { only: Some(only), .. }) => list(only),
        ValueType::Text(TextType { only: Some(only), .. }) => list(only.sorted()),
        ValueType::Boolean(_) => "true or false".to_owned(),
        ValueType::Integer(t) => {
            let noun = if t.is_int32() { "a 32-bit integer" } else { "an integer" };
            let words = range(noun, Some(t.min).filter(|m| *m != t.fits.0), Some(t.max).filter(|m| *m != t.fits.1));
            match t.multiple_of {
                Some(n) => format!("{words} that is a multiple of {n}"),
                None => words,
            }
        }
        ValueType::Number(t) => {
            range("a number", Some(t.min).filter(|m| *m != f64::MIN), Some(t.max).filter(|m| *m != f64::MAX))
        }
        ValueType::Decimal(t) => {
            let noun = match (t.numbers, t.strings) {
                (true, true) => "a number, or a number in a string,",
                (false, true) => "a number in a string",
                _ => "a number",
            };
            let digits =
                format!("{noun} of at most {} digits before the point and {} after it", t.whole_digits(), t.scale);
            let limit = t.limit();
            let bound = |n: i128| Some(n).filter(|n| n.abs() != limit).map(|n| t.show(n));
            range(&digits, bound(t.min), bound(t.max))
        }
        ValueType::Text(t) => {
            let noun = match t.format {
                TextFormat::Plain => "a string",
                TextFormat::DateTime => "an RFC 3339 date-time with an offset, such as 2026-01-31T23:59:59.5Z",
                TextFormat::LocalDateTime => "a date-time without an offset, such as 2026-01-31T23:59:59.5",
                TextFormat::Date => "an RFC 3339 date, such as 2026-01-31",
                TextFormat::Time => "an RFC 3339 time with an offset, such as 23:59:59.5Z",
                TextFormat::LocalTime => "a time without an offset, such as 23:59:59.5",
                TextFormat::Uuid => "a UUID, such as 123e4567-e89b-12d3-a456-426614174000",
                TextFormat::Base64 => "base64 with padding, such as Zmxv",
            };
            let words = counted(noun, "characters", t.min_chars, t.max_chars);
            match &t.pattern {
                Some(pattern) => format!("{words} that matches {}", shorten(pattern.as_str())),
                None => words,
            }
        }
        ValueType::Object(_) | ValueType::Map(_) => "an object".to_owned(),
        ValueType::List(t) => counted("a list", "items", t.min_items, t.max_items),
        ValueType::Json(t) => t.types.in_words(),
    };
    if null && !matches!(value, ValueType::Json(_)) {
        words.push_str(", or null");
    }
    words
}

fn list<T: std::fmt::Debug>(only: &[T]) -> String {
    let shown: Vec<String> = only.iter().take(12).map(|v| format!("{v:?}")).collect();
    format!("one of {}{}", shown.join(", "), if only.len() > 12 { ", …" } else { "" })
}

fn range<T: std::fmt::Display>(noun: &str, lower: Option<T>, upper: Option<T>) -> String {
    match (lower, upper) {
        (None, None) => noun.to_owned(),
        (Some(min), None) => format!("{noun} from {min}"),
        (None, Some(max)) => format!("{noun} up to {max}"),
        (Some(min), Some(max)) => format!("{noun} from {min} to {max}"),
    }
}

fn counted(noun: &str, unit: &str, min: usize, max: usize) -> String {
    match (min, max) {
        (0, usize::MAX) => noun.to_owned(),
        (min, usize::MAX) => format!("{noun} of at least {min} {unit}"),
        (0, max) => format!("{noun} of at most {max} {unit}"),
        (min, max) => format!("{noun} of {min} to {max} {unit}"),
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_owned(),
    }
}

impl super::DecimalType {
    fn whole_digits(&self) -> i16 {
        i16::from(self.precision) - i16::from(self.scale)
    }

    /// The largest magnitude that has the precision.
    pub fn limit(&self) -> i128 {
        10i128.pow(u32::from(self.precision.min(38))) - 1
    }

    fn show(&self, n: i128) -> String {
        let scale = self.scale.unsigned_abs() as usize;
        let digits = format!("{:0width$}", n.unsigned_abs(), width = scale + 1);
        let (whole, fraction) = digits.split_at(digits.len() - scale);
        let point = if scale > 0 { "." } else { "" };
        format!("{}{whole}{point}{fraction}", if n < 0 { "-" } else { "" })
    }
}
