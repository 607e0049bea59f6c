//! The bounds of a data file's columns, as manifests have them.
//!
//! Owns: what becomes of the smallest and largest values that the Parquet writer has seen. Long strings are cut, as Iceberg
//! does by default, so that no manifest carries whole payloads. Long binaries have none: Spark (Iceberg 1.10) takes cut ones
//! for `min` and `max` themselves. Invariant: a lower bound is never above a value of the file and an upper bound never
//! below one, in the order of any reader; where that cannot be had there is no bound.

use std::collections::HashMap;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{ArrowPrimitiveType, DataType, FieldRef, Float32Type, Float64Type};
use iceberg::spec::{DataFile, DataFileBuilder, Datum, PrimitiveLiteral};
use parquet::schema::types::ColumnPath;

/// Characters of strings and bytes of binaries: `truncate(16)`, the default of `write.metadata.metrics.default`.
const LENGTH: usize = 16;

/// The file with its bounds cut. The writer must not have cut any: it leaves out those that it has cut, so the bound of a
/// file in which other row groups have shorter values would be one of those.
pub fn build(file: &mut DataFileBuilder) -> Result<DataFile, iceberg::spec::DataFileBuilderError> {
    let made = file.build()?;
    let cut = |bounds: &HashMap<i32, Datum>, cut: fn(&Datum) -> Option<Datum>| -> HashMap<i32, Datum> {
        bounds.iter().filter_map(|(id, bound)| Some((*id, cut(bound)?))).collect()
    };
    file.lower_bounds(cut(made.lower_bounds(), lower)).upper_bounds(cut(made.upper_bounds(), upper)).build()
}

/// The columns, and members of records, in which there is a NaN. A file must have no statistics of these: they would be of
/// the numbers alone, and engines for which NaN is the largest of all (Spark, DuckDB) would look past the file for it.
pub fn with_nan(rows: &RecordBatch) -> Vec<ColumnPath> {
    fn has_nan<T: ArrowPrimitiveType<Native: Into<f64>>>(column: &ArrayRef) -> bool {
        column.as_primitive::<T>().values().iter().any(|value| (*value).into().is_nan())
    }
    fn look(path: &mut Vec<String>, field: &FieldRef, column: &ArrayRef, found: &mut Vec<ColumnPath>) {
        path.push(field.name().clone());
        let nan = match field.data_type() {
            DataType::Float32 => has_nan::<Float32Type>(column),
            DataType::Float64 => has_nan::<Float64Type>(column),
            DataType::Struct(fields) => {
                fields.iter().zip(column.as_struct().columns()).for_each(|(f, c)| look(path, f, c, found));
                false
            }
            _ => false,
        };
        if nan {
            found.push(ColumnPath::new(path.clone()));
        }
        path.pop();
    }
    let mut found = Vec::new();
    rows.schema_ref().fields().iter().zip(rows.columns()).for_each(|(f, c)| look(&mut Vec::new(), f, c, &mut found));
    found
}

fn lower(bound: &Datum) -> Option<Datum> {
    Some(match bound.literal() {
        PrimitiveLiteral::String(text) => Datum::string(prefix(text)),
        PrimitiveLiteral::Binary(bytes) if bytes.len() > LENGTH => return None,
        _ => bound.clone(),
    })
}

/// Cut and then made larger than everything that begins like it.
fn upper(bound: &Datum) -> Option<Datum> {
    match bound.literal() {
        PrimitiveLiteral::String(text) => {
            let cut = prefix(text);
            if cut.len() == text.len() { Some(bound.clone()) } else { Some(Datum::string(next_text(cut)?)) }
        }
        PrimitiveLiteral::Binary(bytes) if bytes.len() > LENGTH => None,
        _ => Some(bound.clone()),
    }
}

fn prefix(text: &str) -> &str {
    text.char_indices().nth(LENGTH).map_or(text, |(end, _)| &text[..end])
}

fn next_text(text: &str) -> Option<String> {
    text.char_indices().rev().find_map(|(at, character)| {
        // The step over the surrogates is the range's.
        let next = (character..=char::MAX).nth(1)?;
        Some(format!("{}{next}", &text[..at]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_values_are_their_own_bounds() {
        for text in ["", "a", "sixteen letters.", "ééééééééééééééé😀"] {
            let bound = Datum::string(text);
            assert_eq!((lower(&bound), upper(&bound)), (Some(bound.clone()), Some(bound)));
        }
        let bytes = Datum::binary([255; 16]);
        assert_eq!((lower(&bytes), upper(&bytes)), (Some(bytes.clone()), Some(bytes)));
        assert_eq!(upper(&Datum::long(7)), Some(Datum::long(7)));
    }

    #[test]
    fn long_values_are_cut_at_characters() {
        let text = |t: &str| Some(Datum::string(t));
        let cases = [
            ("sixteen letters. and more", "sixteen letters.", text("sixteen letters/")),
            // Characters of several bytes at the cut.
            ("fifteen letters😀 and more", "fifteen letters😀", text("fifteen letters😁")),
            ("ääääääääääääääääx", "ääääääääääääääää", text("äääääääääääääääå")),
            // The last character before the surrogates, and those that nothing comes after.
            ("fifteen letters\u{d7ff}x", "fifteen letters\u{d7ff}", text("fifteen letters\u{e000}")),
            ("fifteen letters\u{10ffff}x", "fifteen letters\u{10ffff}", text("fifteen lettert")),
        ];
        for (long, expected_lower, expected_upper) in cases {
            let bound = Datum::string(long);
            assert_eq!(lower(&bound), text(expected_lower), "{long}");
            assert_eq!(upper(&bound), expected_upper, "{long}");
            assert!(lower(&bound).unwrap() <= bound && bound < upper(&bound).unwrap());
        }
        assert_eq!(upper(&Datum::string("\u{10ffff}".repeat(17))), None);
        let bytes = Datum::binary([1; 17]);
        assert_eq!((lower(&bytes), upper(&bytes)), (None, None));
    }
}
