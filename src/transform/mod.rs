//! SQL filter and derived columns, by DataFusion's expressions.
//!
//! Owns: `[transform]`, compiled once and applied to every decoded batch. Does not own: SQL itself ([`sql`]), where
//! refused rows go.
//! Derived columns come first, in the order of the file, and may refer to those before them; the filter sees them all and
//! keeps a row only when it is true (null drops the row, as in SQL). A row on which an expression fails, by a division by
//! zero or a cast, is refused alone: its batch goes on without it.

pub mod sql;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, UInt32Array};
use arrow::compute::{filter_record_batch, prep_null_mask_filter, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use datafusion_common::DataFusionError;
use datafusion_physical_expr::PhysicalExpr;

use crate::config::TransformConfig;
use crate::error::Kind;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("[transform] cannot be evaluated: {0}")]
    Evaluate(String),
}

impl Error {
    pub fn kind(&self) -> Kind {
        Kind::Fatal
    }
}

/// `[transform]`, compiled against the columns that decoding gives.
pub struct Transform {
    derived: Vec<Derived>,
    filter: Option<Arc<dyn PhysicalExpr>>,
    output: SchemaRef,
}

struct Derived {
    expr: Arc<dyn PhysicalExpr>,
    data_type: DataType,
    /// The columns up to and with this one.
    schema: SchemaRef,
}

/// What became of a batch. Every row of the input is kept, failed or dropped by the filter.
#[derive(Debug)]
pub struct Transformed {
    pub batch: RecordBatch,
    /// Row i of `batch` is row `kept[i]` of the input. None: every row was kept.
    pub kept: Option<Vec<u32>>,
    /// Rows of the input on which an expression failed, in order, with the reason.
    pub failed: Vec<(usize, String)>,
}

impl Transform {
    pub fn compile(config: &TransformConfig, input: &SchemaRef) -> Result<Transform, Vec<String>> {
        let mut errors = Vec::new();
        let mut schema = input.clone();
        let mut derived = Vec::new();
        for (name, text) in &config.columns {
            match derive(name, text, &schema) {
                Ok(column) => {
                    schema = column.schema.clone();
                    derived.push(column);
                }
                Err(e) => errors.push(format!("transform.columns.{name} = {text:?}: {e}")),
            }
        }
        let filter = config.filter.as_ref().and_then(|text| match compile_filter(text, &schema) {
            Ok(filter) => Some(filter),
            Err(e) => {
                errors.push(format!("transform.filter = {text:?}: {e}"));
                None
            }
        });
        if errors.is_empty() { Ok(Transform { derived, filter, output: schema }) } else { Err(errors) }
    }

    pub fn output_schema(&self) -> SchemaRef {
        self.output.clone()
    }

    pub fn apply(&self, batch: &RecordBatch) -> Result<Transformed, Error> {
        if self.derived.is_empty() && self.filter.is_none() {
            return Ok(Transformed { batch: batch.clone(), kept: None, failed: Vec::new() });
        }
        if let Ok((derived, keep)) = self.evaluate(batch) {
            return select(derived, keep, None, Vec::new());
        }
        let failed = sql::failing_rows(batch, &|rows| self.evaluate(rows).map(|_| ()));
        let mut bad = failed.iter().map(|(row, _)| *row).peekable();
        let good: Vec<u32> =
            (0..batch.num_rows()).filter(|row| bad.next_if_eq(row).is_none()).map(|row| row as u32).collect();
        let rest =
            take_record_batch(batch, &UInt32Array::from(good.clone())).map_err(|e| Error::Evaluate(e.to_string()))?;
        let (derived, keep) = self.evaluate(&rest).map_err(|e| Error::Evaluate(sql::first_line(&e)))?;
        select(derived, keep, Some(good), failed)
    }

    /// The batch with its derived columns, and which rows the filter keeps.
    fn evaluate(&self, batch: &RecordBatch) -> Result<(RecordBatch, Option<BooleanArray>), DataFusionError> {
        let mut batch = batch.clone();
        for column in &self.derived {
            let array = sql::evaluate(&column.expr, &batch, &column.data_type)?;
            let mut columns: Vec<ArrayRef> = batch.columns().to_vec();
            columns.push(array);
            batch = sql::batch_of(column.schema.clone(), columns, batch.num_rows())?;
        }
        let Some(filter) = &self.filter else { return Ok((batch, None)) };
        let keep = sql::evaluate(filter, &batch, &DataType::Boolean)?;
        let keep = keep.as_boolean();
        let keep = if keep.null_count() > 0 { prep_null_mask_filter(keep) } else { keep.clone() };
        Ok((batch, Some(keep)))
    }
}

fn select(
    batch: RecordBatch,
    keep: Option<BooleanArray>,
    rows: Option<Vec<u32>>,
    failed: Vec<(usize, String)>,
) -> Result<Transformed, Error> {
    let keep = match keep {
        Some(keep) if keep.true_count() < keep.len() => keep,
        _ => return Ok(Transformed { batch, kept: rows, failed }),
    };
    let kept = keep.values().set_indices_u32();
    let kept = match rows {
        Some(rows) => kept.map(|i| rows.get(i as usize).copied().unwrap_or(i)).collect(),
        None => kept.collect(),
    };
    let batch = filter_record_batch(&batch, &keep).map_err(|e| Error::Evaluate(e.to_string()))?;
    Ok(Transformed { batch, kept: Some(kept), failed })
}

fn derive(name: &str, text: &str, schema: &SchemaRef) -> Result<Derived, String> {
    if schema.field_with_name(name).is_ok() {
        return Err("there is a column of this name already".to_string());
    }
    let scope = sql::Scope::new(schema)?;
    let expr = scope.parse(text)?;
    let physical = scope.physical(&expr)?;
    let found = scope.data_type(&expr)?;
    let data_type = sql::column_type(&found)
        .ok_or_else(|| format!("its type is {found}, which a table cannot keep; CAST it to another type"))?;
    let mut fields: Vec<Arc<Field>> = schema.fields().to_vec();
    fields.push(Arc::new(Field::new(name, data_type.clone(), true)));
    let schema = Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()));
    Ok(Derived { expr: physical, data_type, schema })
}

/// A condition on rows, ready to run.
pub fn compile_filter(text: &str, schema: &SchemaRef) -> Result<Arc<dyn PhysicalExpr>, String> {
    let scope = sql::Scope::new(schema)?;
    let expr = scope.parse(text)?;
    match scope.data_type(&expr)? {
        DataType::Boolean => scope.physical(&expr),
        other => Err(format!("a filter is true or false, this is of type {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Float64Array, Int64Array, StringArray};
    use arrow::datatypes::{Float64Type, Int64Type};

    fn batch() -> RecordBatch {
        let schema = Schema::new(vec![
            Field::new("status", DataType::Utf8, true),
            Field::new("batteryLevel", DataType::Float64, true),
            Field::new("n", DataType::Int64, true),
        ]);
        let status = StringArray::from(vec![Some("ok"), None, Some("test"), Some("ok")]);
        let battery = Float64Array::from(vec![Some(5.0), Some(50.0), Some(10.0), None]);
        let n = Int64Array::from(vec![Some(0), Some(1), Some(2), Some(i64::MAX)]);
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(status), Arc::new(battery), Arc::new(n)]).unwrap()
    }

    fn compile(filter: Option<&str>, columns: &[(&str, &str)]) -> Result<Transform, Vec<String>> {
        let config = TransformConfig {
            filter: filter.map(str::to_string),
            columns: columns.iter().map(|(n, e)| (n.to_string(), e.to_string())).collect(),
        };
        Transform::compile(&config, &batch().schema())
    }

    #[test]
    fn nothing_to_do_keeps_everything() {
        let out = compile(None, &[]).unwrap().apply(&batch()).unwrap();
        assert_eq!(out.batch, batch());
        assert!(out.kept.is_none() && out.failed.is_empty());
    }

    #[test]
    fn a_filter_keeps_true_and_drops_null() {
        let out = compile(Some("status <> 'test'"), &[]).unwrap().apply(&batch()).unwrap();
        assert_eq!(out.kept, Some(vec![0, 3]));
        assert_eq!(out.batch.num_rows(), 2);
        let all = compile(Some("n >= 0"), &[]).unwrap().apply(&batch()).unwrap();
        assert_eq!((all.kept, all.batch.num_rows()), (None, 4));
    }

    #[test]
    fn derived_columns_see_those_before_them_and_the_filter_sees_all() {
        let columns = [("low", "batteryLevel < 20"), ("label", "CASE WHEN low THEN upper(status) ELSE 'fine' END")];
        let out = compile(Some("label = 'OK'"), &columns).unwrap().apply(&batch()).unwrap();
        assert_eq!(out.kept, Some(vec![0]));
        assert_eq!(out.batch.schema().field(3).data_type(), &DataType::Boolean);
        assert_eq!(out.batch.column(4).as_string::<i32>().value(0), "OK");
    }

    #[test]
    fn one_failing_row_is_refused_alone() {
        let columns = [("inverse", "10 / n"), ("more", "n + 1")];
        let out = compile(None, &columns).unwrap().apply(&batch()).unwrap();
        assert_eq!(out.failed.iter().map(|(row, _)| *row).collect::<Vec<_>>(), [0, 3]);
        assert!(out.failed[0].1.contains("Divide by zero"), "{:?}", out.failed);
        assert!(out.failed[1].1.to_lowercase().contains("overflow"), "{:?}", out.failed);
        assert_eq!(out.kept, Some(vec![1, 2]));
        assert_eq!(out.batch.column(3).as_primitive::<Int64Type>().values(), &[10, 5]);
        let filtered = compile(Some("10 / n > 5"), &[]).unwrap().apply(&batch()).unwrap();
        assert_eq!((filtered.kept, filtered.failed.len()), (Some(vec![1]), 1));
    }

    #[test]
    fn casts_functions_and_constants() {
        let columns = [
            ("f", "coalesce(batteryLevel, -1)"),
            ("s", "cast(n as varchar) || '!'"),
            ("l", "character_length(status)"),
            ("k", "7"),
            ("like_ok", "status LIKE 'o%' AND n BETWEEN 0 AND 5 AND status IN ('ok', 'x')"),
        ];
        let out = compile(None, &columns).unwrap().apply(&batch()).unwrap();
        assert_eq!(out.batch.column(3).as_primitive::<Float64Type>().value(3), -1.0);
        assert_eq!(out.batch.column(4).as_string::<i32>().value(2), "2!");
        assert_eq!(out.batch.schema().field(5).data_type(), &DataType::Int32);
        assert_eq!(out.batch.column(6).as_primitive::<Int64Type>().value(3), 7);
        assert!(out.batch.column(7).as_boolean().value(0));
    }

    #[test]
    fn every_group_of_functions_is_there() {
        let list = DataType::List(Arc::new(Field::new_list_field(DataType::Utf8, true)));
        let place = DataType::Struct(vec![Field::new("lat", DataType::Float64, true)].into());
        let fields = vec![
            Field::new("tags", list, true),
            Field::new("place", place, true),
            Field::new("at", DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, Some("+00:00".into())), true),
        ];
        let mut tags = arrow::array::ListBuilder::new(arrow::array::StringBuilder::new());
        tags.append_value([Some("b"), Some("a")]);
        let lat: ArrayRef = Arc::new(Float64Array::from(vec![1.25]));
        let place = arrow::array::StructArray::from(vec![(Arc::new(Field::new("lat", DataType::Float64, true)), lat)]);
        let at = arrow::array::TimestampMicrosecondArray::from(vec![86_400_000_000]).with_timezone("+00:00");
        let columns: Vec<ArrayRef> = vec![Arc::new(tags.finish()), Arc::new(place), Arc::new(at)];
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap();
        let mut wrong = Vec::new();
        for (sql, expected) in [
            ("tags[1]", "b"),
            ("array_length(tags)", "2"),
            ("array_has(tags, 'a')", "true"),
            ("array_to_string(array_sort(tags), '-')", "a-b"),
            ("place['lat']", "1.25"),
            ("place.lat * 2", "2.5"),
            ("date_trunc('month', at)", "1970-01-01T00:00:00Z"),
            ("extract(hour from at)", "0"),
            ("date_part('dow', at)", "5"),
            ("to_char(at, '%Y/%m/%d')", "1970/01/02"),
            ("date_bin(interval '1 hour', at)", "1970-01-02T00:00:00Z"),
            ("at + interval '1 day'", "1970-01-03T00:00:00Z"),
            ("cast(at as date)", "1970-01-02"),
            ("to_unixtime(at)", "86400"),
            ("round(sqrt(place.lat), 3)", "1.118"),
            ("regexp_replace('a-b', '-', '+')", "a+b"),
            ("regexp_like(tags[2], '^a')", "true"),
            ("split_part('x/y', '/', 2)", "y"),
            ("substr(upper(tags[1]) || 'cd', 2, 1)", "c"),
            ("substring('abcd' from 2 for 2)", "bc"),
            ("lpad('7', 3, '0')", "007"),
            ("strpos('abc', 'c')", "3"),
            ("encode('hi', 'hex')", "6869"),
            ("coalesce(nullif(tags[1], 'b'), greatest('x', 'y'))", "y"),
            ("CASE WHEN 'a' = ANY(tags) THEN 1 ELSE 0 END", "1"),
            ("position('b' in 'ab')", "2"),
            ("trim(' x ')", "x"),
        ] {
            let config = TransformConfig { filter: None, columns: vec![("out".to_string(), sql.to_string())] };
            let found = match Transform::compile(&config, &batch.schema()) {
                Ok(transform) => {
                    let out = transform.apply(&batch).unwrap().batch;
                    arrow::util::display::array_value_to_string(out.column(3), 0).unwrap()
                }
                Err(e) => e.join(" "),
            };
            if found != expected {
                wrong.push(format!("{sql}: {found}, not {expected}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn negative_zero_equals_zero() {
        let schema = Arc::new(Schema::new(vec![Field::new("x", DataType::Float64, true)]));
        let x: ArrayRef = Arc::new(Float64Array::from(vec![Some(-0.0), Some(0.0), None, Some(f64::NAN), Some(-1.0)]));
        let batch = RecordBatch::try_new(schema.clone(), vec![x]).unwrap();
        let kept = |filter: &str| {
            let config = TransformConfig { filter: Some(filter.to_string()), columns: Vec::new() };
            let out = Transform::compile(&config, &schema).unwrap().apply(&batch).unwrap();
            out.kept.unwrap_or_else(|| vec![0, 1, 2, 3, 4])
        };
        assert_eq!(kept("x >= 0"), [0, 1, 3]);
        assert_eq!(kept("x BETWEEN 0 AND 1"), [0, 1]);
        assert_eq!(kept("x = 0"), [0, 1]);
        assert_eq!(kept("x < 0.0"), [4]);
        assert_eq!(kept("x <> 0"), [3, 4]);
        assert_eq!(kept("0 <= x"), [0, 1, 3]);
    }

    #[test]
    fn mistakes_are_named_all_at_once() {
        let columns = [
            ("a", "battery_level < 20"),
            ("n", "1"),
            ("r", "random()"),
            ("t", "now()"),
            ("z", "1 / 0"),
            ("q", "(select 1)"),
            ("c", "count(*)"),
            ("p", "n +"),
        ];
        let errors = compile(Some("batteryLevel"), &columns).err().unwrap();
        assert_eq!(errors.len(), 9, "{errors:#?}");
        assert!(errors[0].contains("transform.columns.a") && errors[0].contains("columns: status, batteryLevel, n"));
        assert!(errors[8].contains("true or false"), "{errors:#?}");
        println!("{errors:#?}");
    }
}
