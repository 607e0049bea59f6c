//! One column being filled: values and validity, a record at a time, so that a refused record can be taken back.
//!
//! Invariant: `len` counts complete values only; a value that fails a check is never pushed. What a struct, list or map
//! has inside may be longer than its own length says, until `truncate`.

use std::sync::Arc;

use arrow::array::builder::{BooleanBufferBuilder, NullBufferBuilder};
use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int32Array,
    Int64Array, ListArray, MapArray, StringArray, StructArray, Time64MicrosecondArray, TimestampMicrosecondArray,
};
use arrow::buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::DataType;

use crate::dead_letter::Reason;
use crate::schema::{
    DecimalType, Field, ListType, MapType, ObjectType, Packed, TextFormat, TextType, Types, ValueType,
};

use super::base64;
use super::fault::{Fault, Scan, step_to};
use super::object::{KeySet, Reader};
use super::scan::{NotInteger, Number, Scanner};
use super::time;

pub struct Column {
    values: Values,
    validity: NullBufferBuilder,
    /// As `validity` has it, which is asked for with every member.
    len: usize,
}

enum Values {
    Boolean(BooleanBufferBuilder),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Float32(Vec<f32>),
    Float64(Vec<f64>),
    /// In units of the last digit.
    Decimal(Vec<i128>),
    /// Also of JSON columns.
    Text(Texts),
    /// What base64 stands for.
    Binary(Texts),
    /// Microseconds since the epoch, with or without a zone.
    Timestamp(Vec<i64>),
    /// Days since the epoch.
    Date(Vec<i32>),
    /// Microseconds since midnight.
    Time(Vec<i64>),
    Struct(Box<Struct>),
    List(Box<List>),
    Map(Box<Map>),
}

struct Texts {
    ends: Vec<i32>,
    bytes: Vec<u8>,
}

struct Struct {
    reader: Reader,
    columns: Vec<Column>,
}

struct List {
    ends: Vec<i32>,
    elements: Column,
}

struct Map {
    ends: Vec<i32>,
    keys: Texts,
    values: Column,
    seen: KeySet,
}

impl Texts {
    fn new(capacity: usize) -> Texts {
        Texts { ends: ends(capacity), bytes: Vec::with_capacity(capacity * 16) }
    }

    #[inline]
    fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.end();
    }

    /// A short string is copied as sixteen bytes, of which the surplus is taken back: what copies just its bytes has a branch on
    /// how many they are.
    #[inline(always)]
    fn push_packed(&mut self, text: &[u8], packed: Packed) {
        if text.len() <= Packed::MOST {
            let end = self.bytes.len() + text.len();
            self.bytes.extend_from_slice(&packed.bytes());
            self.bytes.truncate(end);
        } else {
            self.bytes.extend_from_slice(text);
        }
        self.end();
    }

    /// A chunk holds less than 2 GiB, and no value is longer than its text.
    #[inline]
    fn end(&mut self) {
        self.ends.push(self.bytes.len() as i32);
    }

    fn truncate(&mut self, len: usize) {
        self.bytes.truncate(truncate_ends(&mut self.ends, len));
    }
}

fn ends(capacity: usize) -> Vec<i32> {
    let mut ends = Vec::with_capacity(capacity + 1);
    ends.push(0);
    ends
}

/// Returns where the last of them ends.
fn truncate_ends(ends: &mut Vec<i32>, len: usize) -> usize {
    ends.truncate(len + 1);
    ends.last().map_or(0, |end| *end as usize)
}

impl Column {
    pub fn new(value: &ValueType, capacity: usize) -> Column {
        let values = match value {
            ValueType::Boolean(_) => Values::Boolean(BooleanBufferBuilder::new(capacity)),
            ValueType::Integer(t) if t.is_int32() => Values::Int32(Vec::with_capacity(capacity)),
            ValueType::Integer(_) => Values::Int64(Vec::with_capacity(capacity)),
            ValueType::Number(t) if t.single => Values::Float32(Vec::with_capacity(capacity)),
            ValueType::Number(_) => Values::Float64(Vec::with_capacity(capacity)),
            ValueType::Decimal(_) => Values::Decimal(Vec::with_capacity(capacity)),
            ValueType::Text(t) => match t.format {
                TextFormat::Plain | TextFormat::Uuid => Values::Text(Texts::new(capacity)),
                TextFormat::DateTime | TextFormat::LocalDateTime => Values::Timestamp(Vec::with_capacity(capacity)),
                TextFormat::Date => Values::Date(Vec::with_capacity(capacity)),
                TextFormat::Time | TextFormat::LocalTime => Values::Time(Vec::with_capacity(capacity)),
                TextFormat::Base64 => Values::Binary(Texts::new(capacity)),
            },
            ValueType::Object(t) => {
                let columns = t.fields.iter().map(|field| Column::new(&field.value, capacity)).collect();
                Values::Struct(Box::new(Struct { reader: Reader::new(t), columns }))
            }
            ValueType::List(t) => {
                Values::List(Box::new(List { ends: ends(capacity), elements: Column::new(&t.element.value, capacity) }))
            }
            ValueType::Map(t) => Values::Map(Box::new(Map {
                ends: ends(capacity),
                keys: Texts::new(capacity),
                values: Column::new(&t.value.value, capacity),
                seen: KeySet::default(),
            })),
            ValueType::Json(_) => Values::Text(Texts::new(capacity)),
        };
        Column { values, validity: NullBufferBuilder::new(capacity), len: 0 }
    }

    /// A column of strings that no field describes.
    pub fn text(capacity: usize) -> Column {
        Column { values: Values::Text(Texts::new(capacity)), validity: NullBufferBuilder::new(capacity), len: 0 }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.validity.truncate(len);
        match &mut self.values {
            Values::Boolean(v) => v.truncate(len),
            Values::Int32(v) | Values::Date(v) => v.truncate(len),
            Values::Int64(v) | Values::Timestamp(v) | Values::Time(v) => v.truncate(len),
            Values::Float32(v) => v.truncate(len),
            Values::Float64(v) => v.truncate(len),
            Values::Decimal(v) => v.truncate(len),
            Values::Text(v) | Values::Binary(v) => v.truncate(len),
            Values::Struct(v) => v.columns.iter_mut().for_each(|column| column.truncate(len)),
            Values::List(v) => v.elements.truncate(truncate_ends(&mut v.ends, len)),
            Values::Map(v) => {
                let entries = truncate_ends(&mut v.ends, len);
                v.keys.truncate(entries);
                v.values.truncate(entries);
            }
        }
    }

    pub fn push_null(&mut self) {
        self.validity.append_null();
        self.len += 1;
        match &mut self.values {
            Values::Boolean(v) => v.append(false),
            Values::Int32(v) | Values::Date(v) => v.push(0),
            Values::Int64(v) | Values::Timestamp(v) | Values::Time(v) => v.push(0),
            Values::Float32(v) => v.push(0.0),
            Values::Float64(v) => v.push(0.0),
            Values::Decimal(v) => v.push(0),
            Values::Text(v) | Values::Binary(v) => v.end(),
            Values::Struct(v) => v.columns.iter_mut().for_each(Column::push_null),
            Values::List(v) => v.ends.push(v.elements.len() as i32),
            Values::Map(v) => v.ends.push(v.values.len() as i32),
        }
    }

    /// Appends a string that comes in parts.
    pub fn push_text<const N: usize>(&mut self, parts: [&[u8]; N]) {
        if let Values::Text(texts) = &mut self.values {
            parts.into_iter().for_each(|part| texts.bytes.extend_from_slice(part));
            texts.end();
            self.validity.append_non_null();
            self.len += 1;
        }
    }

    /// Reads the value that `scanner` stands on, checks it and appends it. `depth` objects and lists are around it.
    #[inline(always)]
    pub fn push(&mut self, field: &Field, scanner: &mut Scanner<'_>, depth: u32, scratch: &mut Vec<u8>) -> Scan<()> {
        let at = scanner.at;
        let text = scanner.text();
        let refuse = |reason| Err(Fault::value(reason, field, text, at));
        match (&field.value, scanner.peek()) {
            (ValueType::Text(t), Some(b'"')) => {
                let (found, packed) = scanner.packed_string(scratch)?;
                if let Err(reason) = self.push_string(t, found, packed) {
                    return refuse(reason);
                }
            }
            (ValueType::Number(t), Some(b'-' | b'0'..=b'9')) => {
                let number = scanner.number()?;
                let Some(n) = number.to_f64() else { return refuse(Reason::NumberOutOfRange) };
                if t.only.as_ref().is_some_and(|only| !only.contains(&n)) {
                    return refuse(Reason::NotInEnum);
                }
                if n < t.min || n > t.max {
                    return refuse(Reason::OutOfRange);
                }
                match &mut self.values {
                    Values::Float64(v) => v.push(n),
                    Values::Float32(v) => match number.to_f32() {
                        Some(n) => v.push(n),
                        None => return refuse(Reason::NumberOutOfRange),
                    },
                    _ => {}
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
                if n < t.min || n > t.max || t.multiple_of.is_some_and(|of| n % of != 0) {
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
            _ => scanner.apart(|scanner| self.push_other(field, scanner, depth, scratch))?,
        }
        self.validity.append_non_null();
        self.len += 1;
        Ok(())
    }

    /// The rarer types, away from the way of the others.
    #[inline(never)]
    fn push_other(&mut self, field: &Field, scanner: &mut Scanner<'_>, depth: u32, scratch: &mut Vec<u8>) -> Scan<()> {
        let at = scanner.at;
        let text = scanner.text();
        let refuse = |reason| Err(Fault::value(reason, field, text, at));
        let first = scanner.peek();
        match (&field.value, &mut self.values, first) {
            (ValueType::Decimal(t), Values::Decimal(v), Some(b'-' | b'0'..=b'9')) if t.numbers => {
                match decimal(t, &scanner.number()?) {
                    Ok(n) => v.push(n),
                    Err(reason) => return refuse(reason),
                }
            }
            (ValueType::Decimal(t), Values::Decimal(v), Some(b'"')) if t.strings => {
                let mut inner = Scanner::new(scanner.string(scratch)?);
                let number = inner.number().ok().filter(|_| inner.rest().is_empty());
                match number.ok_or(Reason::BadFormat).and_then(|n| decimal(t, &n)) {
                    Ok(n) => v.push(n),
                    Err(reason) => return refuse(reason),
                }
            }
            (ValueType::Object(t), Values::Struct(v), Some(b'{')) => v.push(t, scanner, self.len, depth, scratch)?,
            (ValueType::List(t), Values::List(v), Some(b'[')) => {
                v.push(t, scanner, depth, scratch)?;
                let len = v.ends.len();
                let items = (v.ends[len - 1] - v.ends[len - 2]) as usize;
                if items < t.min_items || items > t.max_items {
                    return refuse(Reason::BadLength);
                }
            }
            (ValueType::Map(t), Values::Map(v), Some(b'{')) => v.push(t, scanner, depth, scratch)?,
            (ValueType::Json(t), Values::Text(v), _) => {
                let number = matches!(first, Some(b'-' | b'0'..=b'9'));
                // A number is asked about only where it has to be an integer.
                if number && t.types.meets(Types::INTEGER) && !t.types.contains(Types::NUMBER) {
                    if scanner.number()?.to_i64() == Err(NotInteger::Fraction) {
                        return refuse(Reason::WrongType);
                    }
                } else {
                    scanner.skip_value(depth)?;
                }
                let fits = match first {
                    Some(b'"') => t.types.contains(Types::STRING),
                    Some(b't' | b'f') => t.types.contains(Types::BOOLEAN),
                    Some(b'[') => t.types.contains(Types::ARRAY),
                    Some(b'{') => t.types.contains(Types::OBJECT),
                    _ => t.types.meets(Types::NUMBER),
                };
                if !fits {
                    return refuse(Reason::WrongType);
                }
                v.push(text.get(at..scanner.at).unwrap_or_default());
            }
            _ => return refuse(Reason::WrongType),
        }
        Ok(())
    }

    #[inline]
    fn push_string(&mut self, t: &TextType, found: &[u8], packed: Packed) -> Result<(), Reason> {
        if t.only.as_ref().is_some_and(|only| !only.contains(found, packed)) {
            return Err(Reason::NotInEnum);
        }
        if !is_long_enough(found, t.min_chars) || is_too_long(found, t.max_chars) {
            return Err(Reason::BadLength);
        }
        if let Some(pattern) = &t.pattern
            && !std::str::from_utf8(found).is_ok_and(|found| pattern.is_match(found))
        {
            return Err(Reason::BadFormat);
        }
        let parsed = match &mut self.values {
            Values::Text(v) => {
                if t.format == TextFormat::Uuid && !time::is_uuid(found) {
                    return Err(Reason::BadFormat);
                }
                v.push_packed(found, packed);
                Some(())
            }
            Values::Timestamp(v) if t.format == TextFormat::DateTime => time::date_time(found).map(|n| v.push(n)),
            Values::Timestamp(v) => time::local_date_time(found).map(|n| v.push(n)),
            Values::Date(v) => time::date(found).map(|n| v.push(n)),
            Values::Time(v) if t.format == TextFormat::Time => time::time(found).map(|n| v.push(n)),
            Values::Time(v) => time::local_time(found).map(|n| v.push(n)),
            Values::Binary(v) => base64::decode(found, &mut v.bytes).map(|()| v.end()),
            _ => None,
        };
        parsed.ok_or(Reason::BadFormat)
    }

    /// The filled column; its buffers go along with it.
    pub fn finish(mut self, value: &ValueType) -> ArrayRef {
        let len = self.len;
        let nulls: Option<NullBuffer> = self.validity.finish();
        match (self.values, value, value.arrow()) {
            (Values::Boolean(mut v), ..) => Arc::new(BooleanArray::new(v.finish(), nulls)),
            (Values::Int32(v), ..) => Arc::new(Int32Array::new(v.into(), nulls)),
            (Values::Int64(v), ..) => Arc::new(Int64Array::new(v.into(), nulls)),
            (Values::Float32(v), ..) => Arc::new(Float32Array::new(v.into(), nulls)),
            (Values::Float64(v), ..) => Arc::new(Float64Array::new(v.into(), nulls)),
            (Values::Decimal(v), _, arrow) => Arc::new(Decimal128Array::new(v.into(), nulls).with_data_type(arrow)),
            (Values::Date(v), ..) => Arc::new(Date32Array::new(v.into(), nulls)),
            (Values::Time(v), ..) => Arc::new(Time64MicrosecondArray::new(v.into(), nulls)),
            (Values::Timestamp(v), _, arrow) => {
                Arc::new(TimestampMicrosecondArray::new(v.into(), nulls).with_data_type(arrow))
            }
            (Values::Text(v), ..) => finish_text(v, nulls),
            (Values::Binary(v), ..) => Arc::new(BinaryArray::new(offsets(v.ends), Buffer::from_vec(v.bytes), nulls)),
            (Values::Struct(v), ValueType::Object(t), DataType::Struct(fields)) => {
                let columns =
                    v.columns.into_iter().zip(&t.fields).map(|(c, field)| c.finish(&field.value)).collect::<Vec<_>>();
                of_schema(StructArray::try_new_with_length(fields, columns, nulls, len))
            }
            (Values::List(v), ValueType::List(t), DataType::List(element)) => {
                of_schema(ListArray::try_new(element, offsets(v.ends), v.elements.finish(&t.element.value), nulls))
            }
            (Values::Map(v), ValueType::Map(t), DataType::Map(entries, sorted)) => {
                let DataType::Struct(fields) = entries.data_type() else {
                    unreachable!("the entries of a map are structs")
                };
                let Map { ends, keys, values, .. } = *v;
                let columns = vec![finish_text(keys, None), values.finish(&t.value.value)];
                of_schema(
                    StructArray::try_new(fields.clone(), columns, None)
                        .and_then(|structs| MapArray::try_new(entries.clone(), offsets(ends), structs, nulls, sorted)),
                )
            }
            _ => unreachable!("the column is made from the schema"),
        }
    }

    pub fn finish_text(mut self) -> ArrayRef {
        let nulls = self.validity.finish();
        match self.values {
            Values::Text(v) => finish_text(v, nulls),
            _ => unreachable!("only a column of strings is finished so"),
        }
    }
}

fn finish_text(texts: Texts, nulls: Option<NullBuffer>) -> ArrayRef {
    Arc::new(StringArray::new(offsets(texts.ends), Buffer::from_vec(texts.bytes), nulls))
}

fn offsets(ends: Vec<i32>) -> OffsetBuffer<i32> {
    OffsetBuffer::new(ScalarBuffer::from(ends))
}

fn of_schema<A: arrow::array::Array + 'static>(array: Result<A, arrow::error::ArrowError>) -> ArrayRef {
    match array {
        Ok(array) => Arc::new(array),
        Err(e) => unreachable!("the column is made from the schema: {e}"),
    }
}

impl Struct {
    fn push(
        &mut self,
        t: &ObjectType,
        scanner: &mut Scanner<'_>,
        rows: usize,
        depth: u32,
        scratch: &mut Vec<u8>,
    ) -> Scan<()> {
        self.reader.members(t, scanner, &mut self.columns, rows, depth + 1, None, scratch)?;
        self.reader.complete(t, &mut self.columns, rows)
    }
}

impl List {
    fn push(&mut self, t: &ListType, scanner: &mut Scanner<'_>, depth: u32, scratch: &mut Vec<u8>) -> Scan<()> {
        let begin = self.elements.len();
        scanner.at += 1;
        scanner.skip_whitespace();
        if scanner.peek() == Some(b']') {
            scanner.at += 1;
        } else {
            loop {
                self.elements
                    .push(&t.element, scanner, depth + 1, scratch)
                    .map_err(|fault| fault.within(&format!("[{}]", self.elements.len() - begin)))?;
                scanner.skip_whitespace();
                match scanner.peek() {
                    Some(b',') => scanner.at += 1,
                    Some(b']') => {
                        scanner.at += 1;
                        break;
                    }
                    _ => return Err(scanner.malformed("',' or ']'")),
                }
                scanner.skip_whitespace();
            }
        }
        self.ends.push(self.elements.len() as i32);
        Ok(())
    }
}

impl Map {
    fn push(&mut self, t: &MapType, scanner: &mut Scanner<'_>, depth: u32, scratch: &mut Vec<u8>) -> Scan<()> {
        self.seen.clear();
        scanner.at += 1;
        scanner.skip_whitespace();
        if scanner.peek() == Some(b'}') {
            scanner.at += 1;
        } else {
            loop {
                if scanner.peek() != Some(b'"') {
                    return Err(scanner.malformed("a key in quotes"));
                }
                let key = scanner.string(scratch)?;
                if !self.seen.insert(key) {
                    return Err(Fault::duplicate(key));
                }
                self.keys.push(key);
                scanner.colon()?;
                self.values
                    .push(&t.value, scanner, depth + 1, scratch)
                    .map_err(|fault| fault.within(&step_to(&self.keys.last())))?;
                scanner.skip_whitespace();
                match scanner.peek() {
                    Some(b',') => scanner.at += 1,
                    Some(b'}') => {
                        scanner.at += 1;
                        break;
                    }
                    _ => return Err(scanner.malformed("',' or '}'")),
                }
                scanner.skip_whitespace();
            }
        }
        self.ends.push(self.values.len() as i32);
        Ok(())
    }
}

impl Texts {
    fn last(&self) -> String {
        let begin = self.ends.len().checked_sub(2).map_or(0, |i| self.ends[i] as usize);
        String::from_utf8_lossy(self.bytes.get(begin..).unwrap_or_default()).into_owned()
    }
}

fn decimal(t: &DecimalType, number: &Number<'_>) -> Result<i128, Reason> {
    let n = number.scaled(i64::from(t.scale), i64::from(t.precision)).map_err(|_| Reason::NumberOutOfRange)?;
    if n < t.min || n > t.max { Err(Reason::OutOfRange) } else { Ok(n) }
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
