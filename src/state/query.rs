//! One `[[windows]]` entry, compiled against the columns that it reads.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, UInt32Array};
use arrow::compute::prep_null_mask_filter;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;
use arrow::row::{RowConverter, SortField};
use datafusion_common::{DataFusionError, Result as DataFusionResult};
use datafusion_physical_expr::PhysicalExpr;

use super::Error;
use super::aggregate::{Aggregates, Key, Planner, normalise_column};
use crate::config::expression::key_name;
use crate::config::{OutputMode, WindowConfig};
use crate::transform::{self, sql};
use crate::window::Windowing;

/// The column that tells the rows of one group apart in update mode: the batch that the row is of.
pub const REVISION: &str = "revision";

/// Windows of one kind with their filter, group keys and aggregates.
pub struct WindowQuery {
    table: String,
    windowing: Windowing,
    filter: Option<Arc<dyn PhysicalExpr>>,
    time_zone: Option<Arc<str>>,
    keys: Vec<Arc<dyn PhysicalExpr>>,
    key_schema: SchemaRef,
    key_rows: RowConverter,
    aggregates: Aggregates,
    state_schema: SchemaRef,
    output: SchemaRef,
    output_mode: OutputMode,
    definition: String,
}

impl WindowQuery {
    /// `input` is what [`crate::transform::Transform`] gives. All mistakes at once, each with its place.
    pub fn compile(config: &WindowConfig, input: &SchemaRef, event_time: &str) -> Result<WindowQuery, Vec<String>> {
        let table = &config.table.table;
        let at = |place: &str, message: &str| format!("window table {table}: {place}: {message}");
        let mut errors = Vec::new();

        let filter = config.filter.as_ref().and_then(|text| match transform::compile_filter(text, input) {
            Ok(filter) => Some(filter),
            Err(e) => {
                errors.push(at(&format!("filter = {text:?}"), &e));
                None
            }
        });
        let time_zone = match input.field_with_name(event_time).map(Field::data_type) {
            Ok(DataType::Timestamp(TimeUnit::Microsecond, zone)) => zone.clone(),
            Ok(other) => {
                errors.push(at("event_time", &format!("column {event_time} is {other}, not a timestamp")));
                None
            }
            Err(_) => {
                errors.push(at("event_time", &format!("there is no column {event_time}")));
                None
            }
        };
        let bound = DataType::Timestamp(TimeUnit::Microsecond, time_zone.clone());
        let mut output = vec![Field::new("window_start", bound.clone(), false), Field::new("window_end", bound, false)];

        let mut keys = Vec::new();
        for text in &config.group_by {
            match Key::compile(text, input) {
                Ok((key, physical)) => {
                    output.push(key.field.clone());
                    keys.push((key, physical));
                }
                Err(e) => errors.push(at("group_by", &e)),
            }
        }
        let (keys, key_exprs): (Vec<Key>, Vec<_>) = keys.into_iter().unzip();
        let mut planner = Planner::new(input, event_time, &keys).map_err(|e| vec![at("aggregates", &e)])?;
        for (name, text) in &config.aggregates {
            match planner.add(name, text) {
                Ok(field) => output.push(field),
                Err(e) => errors.push(at(&format!("aggregates.{name} = {text:?}"), &e)),
            }
        }
        if config.windowing.is_session() && config.group_by.is_empty() {
            errors.push(at("group_by", "sessions are of a key each: name at least one column"));
        }
        if config.aggregates.is_empty() {
            errors.push(at("aggregates", "needs at least one, such as events = \"count(*)\""));
        }
        for (i, field) in output.iter().enumerate() {
            if output.iter().skip(i + 1).any(|other| other.name() == field.name()) {
                errors.push(at(field.name(), "names two columns; give the aggregate or the key another name"));
            }
        }
        let key_fields: Vec<Field> = output.iter().skip(2).take(keys.len()).cloned().collect();
        let key_sorts = key_fields.iter().map(|f| SortField::new(f.data_type().clone())).collect();
        let key_rows = match RowConverter::new(key_sorts) {
            Ok(key_rows) if errors.is_empty() => key_rows,
            Ok(_) => return Err(errors),
            Err(e) => return Err([errors, vec![at("group_by", &e.to_string())]].concat()),
        };
        let aggregates = planner.finish();
        let bounds = ["start", "end"].map(|name| Field::new(name, DataType::Int64, false));
        let bounds = bounds.into_iter().filter(|_| config.windowing.is_session());
        let state_fields: Vec<Field> =
            key_fields.iter().cloned().chain(bounds).chain(aggregates.state_fields()).collect();
        let keys: Vec<String> = keys.iter().map(|key| format!("{} as {}", key.sql, key.field.data_type())).collect();
        let filter_text = config.filter.as_ref().map(|filter| format!(" {filter:?}")).unwrap_or_default();
        // In append mode the open windows have not been written, in update mode they have.
        let mode = if config.output_mode == OutputMode::Update { "\nupdate" } else { "" };
        let definition = format!(
            "{} {event_time}{filter_text}\n{}\n{}{mode}",
            config.windowing,
            keys.join(", "),
            aggregates.definition()
        );
        Ok(WindowQuery {
            table: table.clone(),
            windowing: config.windowing.clone(),
            filter,
            time_zone,
            keys: key_exprs,
            key_schema: Arc::new(Schema::new(key_fields)),
            key_rows,
            aggregates,
            state_schema: Arc::new(Schema::new(state_fields)),
            output: Arc::new(Schema::new(output)),
            output_mode: config.output_mode,
            definition,
        })
    }

    /// `window_start`, `window_end` (timestamptz in microseconds, not null), the keys, the aggregates.
    pub fn output_schema(&self) -> SchemaRef {
        self.output.clone()
    }

    /// What the table has: [`Self::output_schema`], and in update mode [`REVISION`].
    pub fn table_schema(&self) -> SchemaRef {
        if !self.updates() {
            return self.output_schema();
        }
        let revision = Arc::new(Field::new(REVISION, DataType::Int64, false));
        let fields: Vec<_> = self.output.fields().iter().cloned().chain([revision]).collect();
        Arc::new(Schema::new(fields))
    }

    /// Its windows are sessions: of each key its own.
    pub fn is_session(&self) -> bool {
        self.windowing.is_session()
    }

    /// How many columns of the state come before those of the aggregates: the keys, and the bounds of sessions.
    pub(super) fn state_keys(&self) -> usize {
        self.key_schema.fields().len() + if self.is_session() { 2 } else { 0 }
    }

    /// Whether it hands out what every batch touches, and not what closes.
    pub fn updates(&self) -> bool {
        self.output_mode == OutputMode::Update
    }

    pub fn windowing(&self) -> &Windowing {
        &self.windowing
    }

    /// Which rows the filter keeps, and on how many it failed; these are left out. None: it keeps all.
    pub(super) fn filter(&self, batch: &RecordBatch) -> DataFusionResult<(Option<BooleanArray>, u64)> {
        let Some(filter) = &self.filter else { return Ok((None, 0)) };
        let (keep, failed) = sql::evaluate_or_null(filter, batch, &DataType::Boolean)?;
        let keep = keep.as_boolean();
        let keep = if keep.null_count() > 0 { prep_null_mask_filter(keep) } else { keep.clone() };
        Ok(((keep.true_count() < keep.len()).then_some(keep), failed))
    }

    /// The table that its windows go to.
    pub fn table(&self) -> &str {
        &self.table
    }

    pub(super) fn time_zone(&self) -> Option<Arc<str>> {
        self.time_zone.clone()
    }

    pub(super) fn key_schema(&self) -> &SchemaRef {
        &self.key_schema
    }

    /// Keys as bytes that are equal when the keys are.
    pub(super) fn key_rows(&self) -> &RowConverter {
        &self.key_rows
    }

    /// Keys, then the states of all aggregates.
    pub(super) fn state_schema(&self) -> &SchemaRef {
        &self.state_schema
    }

    pub(super) fn aggregates(&self) -> &Aggregates {
        &self.aggregates
    }

    /// Everything that the meaning of this query's state depends on. Names of columns and what is computed from the results
    /// of aggregate calls are not in it: they can change while windows are open.
    pub fn state_definition(&self) -> &str {
        &self.definition
    }

    pub(super) fn error(&self, error: &DataFusionError) -> Error {
        Error::Aggregate { table: self.table.clone(), message: sql::first_line(error) }
    }

    /// The group keys, and how many of them became null because their expression failed.
    pub(super) fn key_columns(&self, batch: &RecordBatch) -> DataFusionResult<(Vec<ArrayRef>, u64)> {
        let mut failed = 0;
        let mut columns = Vec::with_capacity(self.keys.len());
        for (key, field) in self.keys.iter().zip(self.key_schema.fields()) {
            let (column, rows) = sql::evaluate_or_null(key, batch, field.data_type())?;
            failed += rows;
            columns.push(normalise_column(&column));
        }
        Ok((columns, failed))
    }

    /// What the aggregates read, and how many values became null because their expression failed.
    pub(super) fn arguments(&self, batch: &RecordBatch) -> DataFusionResult<(Vec<ArrayRef>, u64)> {
        self.aggregates.arguments(batch)
    }

    /// The given rows of [`Self::arguments`].
    pub(super) fn gather(&self, columns: &[ArrayRef], rows: &UInt32Array) -> DataFusionResult<Vec<ArrayRef>> {
        self.aggregates.gather(columns, rows)
    }
}

impl Key {
    /// `device_id`, `upper(region) as region`.
    fn compile(text: &str, input: &SchemaRef) -> Result<(Key, Arc<dyn PhysicalExpr>), String> {
        let columns: Vec<&str> = input.fields().iter().map(|f| f.name().as_str()).collect();
        let (text, name) = key_name(text, &columns)?;
        let scope = sql::Scope::new(input)?;
        let (sql, nullable) = match input.field_with_name(text) {
            Ok(column) => (scope.column(text), column.is_nullable()),
            Err(_) => (scope.read(text)?, true),
        };
        if sql::calls_aggregate(&sql) {
            return Err(format!("{text} is an aggregate; it belongs into [windows.aggregates]"));
        }
        let typed = scope.typed(sql.clone())?;
        let found = scope.data_type(&typed)?;
        let data_type = sql::column_type(&found).ok_or_else(|| format!("{name} is {found}, not a flat column"))?;
        Ok((Key { sql, field: Field::new(name, data_type, nullable) }, scope.physical(&typed)?))
    }
}
