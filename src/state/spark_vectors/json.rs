//! Spark's `from_json` with a schema, as far as the vectors go: what does not parse is null where Floe makes a dead letter.

use std::fmt;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema};
use jiff::civil::{Date, DateTime, Time, date};
use jiff::tz::{Offset, TimeZone};
use jiff::{SignedDuration, Timestamp};
use regex::Regex;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

const EPOCH: DateTime = date(1970, 1, 1).at(0, 0, 0, 0);

pub struct FromJson {
    schema: Arc<Schema>,
    /// Of times that name none.
    zone: TimeZone,
    timestamp: Regex,
    offset: Regex,
}

impl FromJson {
    pub fn new(schema: Arc<Schema>, zone: &str) -> Self {
        let time = r"(\d{1,2})(?::(\d{1,2})(?::(\d{1,2})(?:\.(\d*))?\s*([A-Za-z+-][A-Za-z0-9:+/_-]*)?)?)?";
        let date = r"([+-]?\d{4,6})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ]";
        FromJson {
            schema,
            zone: TimeZone::get(zone).unwrap(),
            timestamp: Regex::new(&format!("^{date}(?:{time})?)?)?)?$")).unwrap(),
            offset: Regex::new(r"^(?:UTC|GMT|UT)?([+-])(\d{1,2})(?::?(\d{1,2})(?::?(\d{2}))?)?$").unwrap(),
        }
    }

    /// A row for every message.
    pub fn read(&self, messages: &[Value]) -> RecordBatch {
        let rows: Vec<Fields> = messages.iter().map(|message| fields(&text(message))).collect();
        let column = |field: &Arc<Field>| -> ArrayRef {
            let name = field.name();
            match field.data_type() {
                DataType::Utf8 => Arc::new(StringArray::from_iter(rows.iter().map(|r| r.last(name, string)))),
                DataType::Float64 => Arc::new(Float64Array::from_iter(rows.iter().map(|r| r.last(name, double)))),
                DataType::Int64 => Arc::new(Int64Array::from_iter(rows.iter().map(|r| r.last(name, Value::as_i64)))),
                DataType::Decimal128(precision, scale) => {
                    let values = rows.iter().map(|r| r.last(name, |v| decimal(v, *precision, *scale)));
                    let decimals = Decimal128Array::from_iter(values);
                    Arc::new(decimals.with_precision_and_scale(*precision, *scale).unwrap())
                }
                _ => {
                    let times = rows.iter().map(|r| r.last(name, |v| self.timestamp(v)));
                    Arc::new(TimestampMicrosecondArray::from_iter(times).with_timezone("+00:00"))
                }
            }
        };
        let columns = self.schema.fields().iter().map(column).collect();
        RecordBatch::try_new(self.schema.clone(), columns).unwrap()
    }

    fn timestamp(&self, value: &Value) -> Option<i64> {
        let text = match value {
            Value::Number(n) => return Some(n.as_i64()?.wrapping_mul(1_000_000)),
            Value::String(s) => s.trim_matches(|c: char| c.is_whitespace() || c.is_control()),
            _ => return None,
        };
        let found = self.timestamp.captures(text)?;
        let part = |i: usize| found.get(i).map(|m| m.as_str());
        let number = |i: usize, absent: i64| part(i).map_or(Some(absent), |t| t.parse::<i64>().ok());
        let small = |i: usize, absent| i8::try_from(number(i, absent)?).ok();
        let date = Date::new(number(1, 0)?.try_into().ok()?, small(2, 1)?, small(3, 1)?).ok()?;
        let time = Time::new(small(4, 0)?, small(5, 0)?, small(6, 0)?, 0).ok()?;
        let fraction: String = part(7).unwrap_or("").chars().chain("000000".chars()).take(6).collect();
        let micros = SignedDuration::from_micros(fraction.parse().ok()?);
        let local = date.to_datetime(time).checked_add(micros).ok()?;
        let zone = match part(8) {
            None => self.zone.clone(),
            Some(zone) => self.zone_of(zone)?,
        };
        // jiff's instants end a day before its calendar does
        let local_us = local.duration_since(EPOCH).as_micros() as i64;
        match zone.to_fixed_offset() {
            Ok(offset) => Some(local_us - i64::from(offset.seconds()) * 1_000_000),
            Err(_) => Some(zone.to_ambiguous_timestamp(local).compatible().ok()?.as_microsecond()),
        }
    }

    fn zone_of(&self, text: &str) -> Option<TimeZone> {
        if matches!(text, "Z" | "UTC" | "GMT" | "UT") {
            return Some(TimeZone::UTC);
        }
        let Some(found) = self.offset.captures(text) else {
            // only the IANA names: none of the vectors has one of Java's short ids
            return text.contains('/').then(|| TimeZone::get(text).ok())?;
        };
        let number = |i: usize| found.get(i).map_or(0, |m| m.as_str().parse::<i32>().unwrap());
        let seconds = number(2) * 3600 + number(3) * 60 + number(4);
        let signed = if &found[1] == "-" { -seconds } else { seconds };
        (seconds <= 18 * 3600).then(|| Offset::from_seconds(signed).ok().map(TimeZone::fixed))?
    }
}

/// The message as text; none is an empty one, which is a row of nulls too.
fn text(message: &Value) -> String {
    let text = match message {
        Value::Object(bytes) => String::from_utf8_lossy(&base64(bytes["b64"].as_str().unwrap())).into_owned(),
        other => other.as_str().unwrap_or_default().to_string(),
    };
    // Spark takes these numbers bare or quoted, serde_json not at all
    let mut text = text.replace(":1e999", ":\"Infinity\"");
    for number in ["NaN", "Infinity", "-Infinity", "+INF", "-INF"] {
        for space in ["", " "] {
            text = text.replace(&format!(":{space}{number}"), &format!(":\"{number}\""));
        }
    }
    text
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(digit).collect();
    let bits = digits.iter().flat_map(|d| (0..6).rev().map(move |i| d >> i & 1)).collect::<Vec<u8>>();
    bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | bit)).collect()
}

/// The fields of an object in their order, the same name more than once included.
#[derive(Default)]
struct Fields(Vec<(String, Value)>);

impl Fields {
    /// The last duplicate wins, but one that fails leaves the value before it; null overwrites.
    fn last<T>(&self, name: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let mut last = None;
        for (_, value) in self.0.iter().filter(|(n, _)| n == name) {
            match value {
                Value::Null => last = None,
                value => last = read(value).or(last),
            }
        }
        last
    }
}

/// Of the first value of the text: anything but an object has none, whatever follows it is not looked at.
fn fields(text: &str) -> Fields {
    let first = serde_json::Deserializer::from_str(text).into_iter::<Fields>().next();
    first.and_then(Result::ok).unwrap_or_default()
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some(entry) = map.next_entry()? {
                    fields.0.push(entry);
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn string(value: &Value) -> Option<String> {
    Some(match value {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    })
}

pub fn double(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) if n.to_string() == "-0" => Some(0.0),
        Value::Number(n) => n.as_f64(),
        Value::String(s) => match s.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" | "+Infinity" | "+INF" => Some(f64::INFINITY),
            "-Infinity" | "-INF" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// A number, bare or quoted, half up; None if it does not fit.
fn decimal(value: &Value, precision: u8, scale: i8) -> Option<i128> {
    let text = match value {
        Value::Number(n) => n.to_string(),
        Value::String(s) => s.clone(),
        _ => return None,
    };
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.as_str()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let kept: String = fraction.chars().chain(std::iter::repeat('0')).take(scale as usize).collect();
    let up = fraction.chars().nth(scale as usize).is_some_and(|digit| digit >= '5');
    let unscaled = format!("{whole}{kept}").parse::<i128>().ok()? + i128::from(up);
    let fits = unscaled < 10i128.pow(u32::from(precision));
    fits.then_some(if negative { -unscaled } else { unscaled })
}

/// RFC 3339 of a time, for SQL.
pub fn rfc3339(micros: i64) -> String {
    Timestamp::from_microsecond(micros).unwrap().to_string()
}
