//! JSON Schema (draft 2020-12) to columns: an object becomes an Arrow schema and the checks of each field.
//!
//! Owns: what a schema document means, column order (the order of `properties` in the document), the limits that
//! [`crate::decode`] holds values to, and the validator for keywords that it does not check itself. Does not own:
//! decoding, nor the Iceberg types made from the Arrow ones. Invariants: a keyword that bears on a column is honoured,
//! by the decoder or by the validator, or refused at load, never ignored; `object.fields[i]` describes column `i`; every
//! problem of a document is reported at once, each with its JSON pointer, what was found and what is allowed.

mod compile;
pub(crate) mod document;
mod keywords;
mod pattern;
mod text_set;
mod validator;
mod words;

use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{self, DataType, SchemaRef, TimeUnit};
use regex::Regex;
use sha2::{Digest, Sha256};

pub use keywords::Types;
pub use text_set::{Packed, TextSet};
pub use validator::Validator;

/// A compiled schema document.
#[derive(Debug)]
pub struct Schema {
    pub arrow: SchemaRef,
    /// What a record is.
    pub object: ObjectType,
    /// The last column takes the members that the schema leaves open, as a JSON object.
    pub has_extra: bool,
    /// For what the decoder does not check itself; None if there is nothing of the kind.
    pub validator: Option<Validator>,
    /// Where keywords are that only the validator checks: `/properties/a: anyOf`.
    pub slow_keywords: Vec<String>,
    /// The first twelve hex digits of the document's SHA-256, as `sha256sum` shows it: what dead letters name the schema by.
    pub fingerprint: String,
}

/// A property, the element of a list or the value of a map. A property's column is at the same index in its parent.
#[derive(Debug)]
pub struct Field {
    pub name: String,
    /// The member must be present.
    pub required: bool,
    /// The column can be null: the member may be absent or may be `null`.
    pub nullable: bool,
    /// An explicit `null` is a valid value; an optional property without `null` among its types may only be left out.
    pub accepts_null: bool,
    pub value: ValueType,
    /// What is allowed, in words, for messages: `an integer from 0 to 100`.
    pub allowed: String,
}

/// What a value may be, by its JSON type, with the checks that go with it. Its tag is a byte of its own, because the decoder asks
/// for it with every member of a document.
#[derive(Debug)]
#[repr(u8)]
pub enum ValueType {
    Boolean(BooleanType),
    Integer(IntegerType),
    Number(NumberType),
    Decimal(DecimalType),
    Text(TextType),
    Object(ObjectType),
    List(Box<ListType>),
    Map(Box<MapType>),
    Json(JsonType),
}

#[derive(Debug, PartialEq)]
pub struct BooleanType {
    /// `enum` and `const`.
    pub only: Option<Vec<bool>>,
}

#[derive(Debug, PartialEq)]
pub struct IntegerType {
    /// The bounds of the column's type, int64 or (`format: int32`) int32.
    pub fits: (i64, i64),
    /// Inclusive: exclusive and fractional bounds of the document are rounded inwards.
    pub min: i64,
    pub max: i64,
    pub only: Option<Vec<i64>>,
    pub multiple_of: Option<i64>,
}

#[derive(Debug, PartialEq)]
pub struct NumberType {
    /// `format: float`: the column holds the nearest 32-bit float; bounds are those of the number as it was written.
    pub single: bool,
    /// Inclusive: an exclusive bound is the next double inwards.
    pub min: f64,
    pub max: f64,
    pub only: Option<Vec<f64>>,
}

/// `format: decimal` with `x-precision` and `x-scale`: exact, from the digits as they were written.
#[derive(Debug, PartialEq)]
pub struct DecimalType {
    /// A JSON number is accepted.
    pub numbers: bool,
    /// A string that holds a JSON number is accepted.
    pub strings: bool,
    pub precision: u8,
    pub scale: i8,
    /// Inclusive, in units of the last digit; for strings too.
    pub min: i128,
    pub max: i128,
}

#[derive(Debug)]
pub struct TextType {
    pub format: TextFormat,
    /// Lengths in Unicode code points, as JSON Schema counts.
    pub min_chars: usize,
    pub max_chars: usize,
    pub pattern: Option<Regex>,
    pub only: Option<TextSet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFormat {
    Plain,
    /// RFC 3339 with an offset, to microseconds.
    DateTime,
    /// RFC 3339 without an offset: a timestamp without a zone.
    LocalDateTime,
    /// RFC 3339 full-date.
    Date,
    /// RFC 3339 full-time, which has an offset: the column holds the time of day in UTC.
    Time,
    /// RFC 3339 without an offset.
    LocalTime,
    /// Checked, and kept as text.
    Uuid,
    /// `contentEncoding: base64`, RFC 4648 with padding: the column holds the bytes.
    Base64,
}

/// An object with named properties: a struct, or the record itself.
#[derive(Debug)]
pub struct ObjectType {
    pub fields: Vec<Field>,
    /// `additionalProperties: false`
    pub closed: bool,
}

#[derive(Debug)]
pub struct ListType {
    pub element: Field,
    pub min_items: usize,
    pub max_items: usize,
}

/// An object of which only `additionalProperties` says something: string keys, all values of one type.
#[derive(Debug)]
pub struct MapType {
    pub value: Field,
}

/// Anything else: the column holds the JSON text of the value, as it was written.
#[derive(Debug, PartialEq)]
pub struct JsonType {
    pub types: Types,
}

impl ValueType {
    pub fn arrow(&self) -> DataType {
        match self {
            ValueType::Boolean(_) => DataType::Boolean,
            ValueType::Integer(t) if t.is_int32() => DataType::Int32,
            ValueType::Integer(_) => DataType::Int64,
            ValueType::Number(t) if t.single => DataType::Float32,
            ValueType::Number(_) => DataType::Float64,
            ValueType::Decimal(t) => DataType::Decimal128(t.precision, t.scale),
            ValueType::Text(t) => match t.format {
                TextFormat::Plain | TextFormat::Uuid => DataType::Utf8,
                TextFormat::DateTime => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
                TextFormat::LocalDateTime => DataType::Timestamp(TimeUnit::Microsecond, None),
                TextFormat::Date => DataType::Date32,
                TextFormat::Time | TextFormat::LocalTime => DataType::Time64(TimeUnit::Microsecond),
                TextFormat::Base64 => DataType::Binary,
            },
            ValueType::Object(t) => DataType::Struct(t.fields.iter().map(Field::arrow).collect()),
            ValueType::List(t) => DataType::List(Arc::new(t.element.arrow())),
            ValueType::Map(t) => {
                let key = datatypes::Field::new("key", DataType::Utf8, false);
                let entries = DataType::Struct(vec![key, t.value.arrow()].into());
                DataType::Map(Arc::new(datatypes::Field::new("key_value", entries, false)), false)
            }
            ValueType::Json(_) => DataType::Utf8,
        }
    }

    fn name(&self) -> String {
        let name = match self {
            ValueType::Boolean(_) => "boolean",
            ValueType::Integer(t) if t.is_int32() => "int32",
            ValueType::Integer(_) => "int64",
            ValueType::Number(t) if t.single => "float32",
            ValueType::Number(_) => "float64",
            ValueType::Decimal(t) => return format!("decimal({}, {})", t.precision, t.scale),
            ValueType::Text(t) => match t.format {
                TextFormat::Plain => "string",
                TextFormat::Uuid => "string (uuid)",
                TextFormat::DateTime => "timestamptz(us)",
                TextFormat::LocalDateTime => "timestamp(us)",
                TextFormat::Date => "date",
                TextFormat::Time | TextFormat::LocalTime => "time(us)",
                TextFormat::Base64 => "binary",
            },
            ValueType::Object(_) => "struct",
            ValueType::List(_) => "list",
            ValueType::Map(_) => "map",
            ValueType::Json(_) => "string (json)",
        };
        name.to_owned()
    }
}

impl Field {
    pub fn arrow(&self) -> datatypes::Field {
        datatypes::Field::new(&self.name, self.value.arrow(), self.nullable)
    }
}

impl IntegerType {
    pub fn is_int32(&self) -> bool {
        self.fits.1 == i64::from(i32::MAX)
    }
}

impl Schema {
    /// Reads and compiles a schema document. Every problem is reported, each with its JSON pointer.
    pub fn load(path: &Path) -> Result<Arc<Schema>, Vec<String>> {
        let at = |problem: String| format!("{}: {problem}", path.display());
        let text = std::fs::read_to_string(path).map_err(|e| vec![at(e.to_string())])?;
        Schema::parse(&text).map_err(|problems| problems.into_iter().map(at).collect())
    }

    pub fn parse(text: &str) -> Result<Arc<Schema>, Vec<String>> {
        Schema::parse_with_extra(text, None)
    }

    /// `extra_column` names a column for the members that the schema leaves open.
    pub fn parse_with_extra(text: &str, extra_column: Option<&str>) -> Result<Arc<Schema>, Vec<String>> {
        let document = document::read(text).map_err(|problem| vec![problem])?;
        let compiled = compile::compile(&document, extra_column)?;
        let validator = if compiled.slow_keywords.is_empty() {
            None
        } else {
            Some(Validator::new(text).map_err(|problem| vec![problem])?)
        };
        let mut columns: Vec<datatypes::Field> = compiled.object.fields.iter().map(Field::arrow).collect();
        columns.extend(extra_column.map(|name| datatypes::Field::new(name, DataType::Utf8, true)));
        Ok(Arc::new(Schema {
            arrow: Arc::new(datatypes::Schema::new(columns)),
            object: compiled.object,
            has_extra: extra_column.is_some(),
            validator,
            slow_keywords: compiled.slow_keywords,
            fingerprint: Sha256::digest(text).iter().take(6).map(|b| format!("{b:02x}")).collect(),
        }))
    }

    /// A line per column and nested field: name, type, whether it can be null, and what is allowed; then a line per
    /// keyword that sends the whole document through the validator.
    pub fn describe(&self) -> Vec<String> {
        fn walk<'a>(prefix: &str, field: &'a Field, lines: &mut Vec<(String, &'a Field)>) {
            let name = format!("{prefix}{}", field.name);
            lines.push((name.clone(), field));
            match &field.value {
                ValueType::Object(t) => t.fields.iter().for_each(|f| walk(&format!("{name}."), f, lines)),
                ValueType::List(t) => walk(&format!("{name}."), &t.element, lines),
                ValueType::Map(t) => walk(&format!("{name}."), &t.value, lines),
                _ => {}
            }
        }
        let mut fields = Vec::new();
        self.object.fields.iter().for_each(|field| walk("", field, &mut fields));
        let name_width = fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let type_width = fields.iter().map(|(_, f)| f.value.name().len()).max().unwrap_or(0);
        let line = |(name, f): &(String, &Field)| {
            let null = if f.nullable { "nullable" } else { "not null" };
            format!("{name:name_width$}  {:type_width$}  {null}  {}", f.value.name(), f.allowed)
        };
        let slow = self.slow_keywords.iter().map(|place| format!("checked the slow way: {place}"));
        fields.iter().map(line).chain(slow).collect()
    }
}

#[cfg(test)]
mod suite;
#[cfg(test)]
mod tests;
