//! JSON Schema (draft 2020-12) to columns: a flat object becomes an Arrow schema and the checks of each field.
//!
//! Owns: what a schema document means, column order (the order of `properties` in the document), and the limits that
//! [`crate::decode`] holds values to. Does not own: decoding, nor the Iceberg types made from the Arrow ones.
//! Invariants: a keyword is either honoured or refused at load, never ignored; `fields[i]` describes column `i`; every
//! problem of a document is reported at once, each with its JSON pointer, what was found and what is allowed.

mod compile;
pub(crate) mod document;

use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{DataType, SchemaRef, TimeUnit};
use sha2::{Digest, Sha256};

/// A compiled schema document.
#[derive(Debug)]
pub struct Schema {
    pub arrow: SchemaRef,
    pub fields: Vec<Field>,
    /// `additionalProperties: false`
    pub closed: bool,
    /// The first twelve hex digits of the document's SHA-256, as `sha256sum` shows it: what dead letters name the schema by.
    pub fingerprint: String,
}

/// One property: its column is at the same index in `Schema::arrow`.
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

/// What a value may be, by its JSON type, with the checks that go with it.
#[derive(Debug, Clone, PartialEq)]
pub enum ValueType {
    Boolean(BooleanType),
    Integer(IntegerType),
    Number(NumberType),
    Text(TextType),
}

#[derive(Debug, Clone, PartialEq)]
pub struct BooleanType {
    /// `enum` and `const`.
    pub only: Option<Vec<bool>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct IntegerType {
    /// The bounds of the column's type, int64 or (`format: int32`) int32.
    pub fits: (i64, i64),
    /// Inclusive: exclusive and fractional bounds of the document are rounded inwards.
    pub min: i64,
    pub max: i64,
    pub only: Option<Vec<i64>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NumberType {
    /// Inclusive: an exclusive bound is the next double inwards.
    pub min: f64,
    pub max: f64,
    pub only: Option<Vec<f64>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TextType {
    pub format: TextFormat,
    /// Lengths in Unicode code points, as JSON Schema counts.
    pub min_chars: usize,
    pub max_chars: usize,
    /// Sorted.
    pub only: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFormat {
    Plain,
    /// RFC 3339 with an offset, to microseconds.
    DateTime,
    /// RFC 3339 full-date.
    Date,
    /// Checked, and kept as text.
    Uuid,
}

impl ValueType {
    pub fn arrow(&self) -> DataType {
        match self {
            ValueType::Boolean(_) => DataType::Boolean,
            ValueType::Integer(t) if t.is_int32() => DataType::Int32,
            ValueType::Integer(_) => DataType::Int64,
            ValueType::Number(_) => DataType::Float64,
            ValueType::Text(t) => match t.format {
                TextFormat::Plain | TextFormat::Uuid => DataType::Utf8,
                TextFormat::DateTime => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
                TextFormat::Date => DataType::Date32,
            },
        }
    }

    fn name(&self) -> &'static str {
        match self {
            ValueType::Boolean(_) => "boolean",
            ValueType::Integer(t) if t.is_int32() => "int32",
            ValueType::Integer(_) => "int64",
            ValueType::Number(_) => "float64",
            ValueType::Text(t) => match t.format {
                TextFormat::Plain => "string",
                TextFormat::Uuid => "string (uuid)",
                TextFormat::DateTime => "timestamptz(us)",
                TextFormat::Date => "date",
            },
        }
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
        let document = document::read(text).map_err(|problem| vec![problem])?;
        let mut schema = compile::compile(&document)?;
        schema.fingerprint = Sha256::digest(text).iter().take(6).map(|b| format!("{b:02x}")).collect();
        Ok(Arc::new(schema))
    }

    /// A line per column: name, type, whether it can be null, and what is allowed. For `floe check`.
    pub fn describe(&self) -> Vec<String> {
        let name_width = self.fields.iter().map(|f| f.name.chars().count()).max().unwrap_or(0);
        let type_width = self.fields.iter().map(|f| f.value.name().len()).max().unwrap_or(0);
        let line = |f: &Field| {
            let null = if f.nullable { "nullable" } else { "not null" };
            format!("{:name_width$}  {:type_width$}  {null}  {}", f.name, f.value.name(), f.allowed)
        };
        self.fields.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests;
