//! One column being filled: values and validity, a record at a time, so that a refused record can be taken back.
//!
//! Invariant: `len` counts complete values only; a value that fails a check is never pushed.

use std::sync::Arc;

use arrow::array::builder::{BooleanBufferBuilder, NullBufferBuilder};
use arrow::array::{
    ArrayRef, BooleanArray, Date32Array, Float64Array, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray,
};
use arrow::buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};

use crate::dead_letter::Reason;
use crate::schema::{Field, TextFormat, TextType, ValueType};

use super::fault::{Fault, Scan};
use super::scan::{NotInteger, Scanner};
use super::time;

pub struct Column {
    values: Values,
    validity: NullBufferBuilder,
}

enum Values {
    Boolean(BooleanBufferBuilder),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Float64(Vec<f64>),
    Text {
        ends: Vec<i32>,
        bytes: Vec<u8>,
    },
    /// Microseconds since the epoch.
    Timestamp(Vec<i64>),
    /// Days since the epoch.
    Date(Vec<i32>),
}

impl Column {
    pub fn new(field: &Field, capacity: usize) -> Column {
        let values = match &field.value {
            ValueType::Boolean(_) => Values::Boolean(BooleanBufferBuilder::new(capacity)),
            ValueType::Integer(t) if t.is_int32() => Values::Int32(Vec::with_capacity(capacity)),
            ValueType::Integer(_) => Values::Int64(Vec::with_capacity(capacity)),
            ValueType::Number(_) => Values::Float64(Vec::with_capacity(capacity)),
            ValueType::Text(t) => match t.format {
                TextFormat::Plain | TextFormat::Uuid => {
                    let mut ends = Vec::with_capacity(capacity + 1);
                    ends.push(0);
                    Values::Text { ends, bytes: Vec::with_capacity(capacity * 16) }
                }
                TextFormat::DateTime => Values::Timestamp(Vec::with_capacity(capacity)),
                TextFormat::Date => Values::Date(Vec::with_capacity(capacity)),
            },
        };
        Column { values, validity: NullBufferBuilder::new(capacity) }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.validity.len()
    }

    pub fn truncate(&mut self, len: usize) {
        self.validity.truncate(len);
        match &mut self.values {
            Values::Boolean(v) => v.truncate(len),
            Values::Int32(v) | Values::Date(v) => v.truncate(len),
            Values::Int64(v) | Values::Timestamp(v) => v.truncate(len),
            Values::Float64(v) => v.truncate(len),
            Values::Text { ends, bytes } => {
                ends.truncate(len + 1);
                bytes.truncate(ends.last().map_or(0, |end| *end as usize));
            }
        }
    }

    pub fn push_null(&mut self) {
        self.validity.append_null();
        match &mut self.values {
            Values::Boolean(v) => v.append(false),
            Values::Int32(v) | Values::Date(v) => v.push(0),
            Values::Int64(v) | Values::Timestamp(v) => v.push(0),
            Values::Float64(v) => v.push(0.0),
            Values::Text { ends, bytes } => ends.push(bytes.len() as i32),
        }
    }

    /// Reads the value that `scanner` stands on, checks it and appends it.
    #[inline]
    pub fn push(&mut self, field: &Field, scanner: &mut Scanner<'_>, text: &[u8], scratch: &mut Vec<u8>) -> Scan<()> {
        let at = scanner.at;
        let refuse = |reason| Err(Fault::value(reason, field, text, at));
        match (&field.value, scanner.peek()) {
            (ValueType::Text(t), Some(b'"')) => {
                let found = scanner.string(scratch)?;
                if let Err(reason) = self.push_text(t, found) {
                    return refuse(reason);
                }
            }
            (ValueType::Number(t), Some(b'-' | b'0'..=b'9')) => {
                let Some(n) = scanner.number()?.to_f64() else { return refuse(Reason::NumberOutOfRange) };
                if t.only.as_ref().is_some_and(|only| !only.contains(&n)) {
                    return refuse(Reason::NotInEnum);
                }
                if n < t.min || n > t.max {
                    return refuse(Reason::OutOfRange);
                }
                if let Values::Float64(v) = &mut self.values {
                    v.push(n);
                }
            }
            (ValueType::Integer(t), Some(b'-' | b'0'..=b'9')) => {
                let n = match scanner.number()?.to_i64() {
                    Ok(n) if n >= t.fits.0 && n <= t.fits.1 => n,
                    Ok(_) | Err(NotInteger::OutOfRange) => return refuse(Reason::NumberOutOfRange),
                    Err(NotInteger::Fraction) => return refuse(Reason::WrongType),
                };
                if t.only.as_ref().is_some_and(|only| !only.contains(&n)) {
                    return refuse(Reason::NotInEnum);
                }
                if n < t.min || n > t.max {
                    return refuse(Reason::OutOfRange);
                }
                match &mut self.values {
                    Values::Int64(v) => v.push(n),
                    Values::Int32(v) => v.push(n as i32),
                    _ => {}
                }
            }
            (ValueType::Boolean(t), Some(b't' | b'f')) => {
                let b = scanner.peek() == Some(b't');
                scanner.literal(if b { "true" } else { "false" })?;
                if t.only.as_ref().is_some_and(|only| !only.contains(&b)) {
                    return refuse(Reason::NotInEnum);
                }
                if let Values::Boolean(v) = &mut self.values {
                    v.append(b);
                }
            }
            (_, Some(b'n')) => {
                scanner.literal("null")?;
                if !field.accepts_null {
                    return refuse(Reason::WrongType);
                }
                self.push_null();
                return Ok(());
            }
            _ => return refuse(Reason::WrongType),
        }
        self.validity.append_non_null();
        Ok(())
    }

    #[inline]
    fn push_text(&mut self, t: &TextType, found: &[u8]) -> Result<(), Reason> {
        if let Some(only) = &t.only {
            let listed = if only.len() <= 8 {
                only.iter().any(|text| text.as_bytes() == found)
            } else {
                only.binary_search_by(|text| text.as_bytes().cmp(found)).is_ok()
            };
            if !listed {
                return Err(Reason::NotInEnum);
            }
        }
        if !is_long_enough(found, t.min_chars) || is_too_long(found, t.max_chars) {
            return Err(Reason::BadLength);
        }
        match &mut self.values {
            Values::Text { ends, bytes } => {
                if t.format == TextFormat::Uuid && !time::is_uuid(found) {
                    return Err(Reason::BadFormat);
                }
                bytes.extend_from_slice(found);
                ends.push(bytes.len() as i32);
            }
            Values::Timestamp(v) => v.push(time::date_time(found).ok_or(Reason::BadFormat)?),
            Values::Date(v) => v.push(time::date(found).ok_or(Reason::BadFormat)?),
            _ => {}
        }
        Ok(())
    }

    /// The filled column; its buffers go along with it.
    pub fn finish(mut self) -> ArrayRef {
        let nulls: Option<NullBuffer> = self.validity.finish();
        match self.values {
            Values::Boolean(mut v) => Arc::new(BooleanArray::new(v.finish(), nulls)),
            Values::Int32(v) => Arc::new(Int32Array::new(v.into(), nulls)),
            Values::Int64(v) => Arc::new(Int64Array::new(v.into(), nulls)),
            Values::Float64(v) => Arc::new(Float64Array::new(v.into(), nulls)),
            Values::Date(v) => Arc::new(Date32Array::new(v.into(), nulls)),
            Values::Timestamp(v) => Arc::new(TimestampMicrosecondArray::new(v.into(), nulls).with_timezone("UTC")),
            Values::Text { ends, bytes } => {
                let offsets = OffsetBuffer::new(ScalarBuffer::from(ends));
                Arc::new(StringArray::new(offsets, Buffer::from_vec(bytes), nulls))
            }
        }
    }
}

/// A code point is one to four bytes, so that most strings need no counting.
#[inline]
fn is_long_enough(text: &[u8], min_chars: usize) -> bool {
    text.len() >= min_chars && (text.len() / 4 >= min_chars || code_points(text) >= min_chars)
}

#[inline]
fn is_too_long(text: &[u8], max_chars: usize) -> bool {
    text.len() > max_chars && code_points(text) > max_chars
}

fn code_points(text: &[u8]) -> usize {
    text.iter().filter(|b| (**b & 0xC0) != 0x80).count()
}
