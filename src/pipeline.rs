//! The configuration, compiled: everything that a batch is executed with, decided once.
//!
//! Owns: which tables there are and what each is fed with. Does not own: how any of it is done.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;

use crate::config::Config;
use crate::dead_letter;
use crate::decode::registry::Registry;
use crate::execute;
use crate::late;
use crate::quality::Expectations;
use crate::schema::Schema;
use crate::sink::iceberg::TableSpec;
use crate::state::WindowQuery;
use crate::transform::Transform;

/// The configuration, compiled: what a batch is executed with.
pub struct Pipeline {
    pub schema: Arc<Schema>,
    /// None: payloads are plain JSON.
    pub registry: Option<Arc<Registry>>,
    pub transform: Option<Transform>,
    pub expectations: Option<Expectations>,
    pub queries: Arc<[WindowQuery]>,
    /// Index of the event time among the columns that reach the windows.
    pub event_time: usize,
    /// Index of the event time among the decoded columns, and how far ahead of the trigger time it may be.
    pub future_guard: Option<(usize, Duration)>,
    /// Every table of the pipeline; the indices below point into it.
    pub tables: Vec<TableSpec>,
    pub rows: Option<usize>,
    pub rows_schema: SchemaRef,
    pub provenance: bool,
    /// By window query.
    pub windows: Vec<usize>,
    /// By window query: where its late rows are kept, if they are.
    pub late_rows: Vec<Option<usize>>,
    pub dead_letters: usize,
    pub workers: usize,
}

impl Pipeline {
    /// Compiles what the configuration says; every problem is reported.
    pub fn compile(config: &Config) -> Result<Pipeline, Vec<String>> {
        let mut errors = Vec::new();
        let decoded = config.schema.arrow.clone();
        let transform = (config.transform.filter.is_some() || !config.transform.columns.is_empty())
            .then(|| Transform::compile(&config.transform, &decoded))
            .transpose()
            .unwrap_or_else(|e| {
                errors.extend(e);
                None
            });
        let columns = transform.as_ref().map_or_else(|| decoded.clone(), |t| t.output_schema());
        let expectations = Some(&config.quality.expectations)
            .filter(|list| !list.is_empty())
            .map(|list| Expectations::compile(list, &columns))
            .transpose()
            .unwrap_or_else(|e| {
                errors.extend(e);
                None
            });
        let event_time_name = config.event_time.as_ref().map_or("", |e| e.column.as_str());

        let mut tables = Vec::new();
        let add = |tables: &mut Vec<TableSpec>, table: &crate::config::TableConfig, schema: SchemaRef| {
            tables.push(TableSpec {
                name: table.table.clone(),
                schema,
                partition_by: table.partition_by.clone(),
                sort_by: table.sort_by.clone(),
                properties: table.properties.clone(),
            });
            tables.len() - 1
        };
        let provenance = config.rows.as_ref().is_some_and(|r| r.provenance);
        let rows_schema = execute::rows_schema(&columns, provenance);
        let rows = config.rows.as_ref().map(|t| add(&mut tables, t, rows_schema.clone()));
        let mut queries = Vec::new();
        let mut windows = Vec::new();
        let mut late_rows = Vec::new();
        for window in &config.windows {
            match WindowQuery::compile(window, &columns, event_time_name) {
                Ok(query) => {
                    windows.push(add(&mut tables, &window.table, query.table_schema()));
                    late_rows.push(window.late_table.as_ref().map(|late| {
                        let shared = tables.iter().position(|table| table.name == late.table);
                        shared.unwrap_or_else(|| add(&mut tables, late, late::schema(&columns)))
                    }));
                    queries.push(query);
                }
                Err(e) => errors.extend(e),
            }
        }
        let dead_letters = add(&mut tables, &config.dead_letters, dead_letter::arrow_schema());
        let registry = config.registry.as_ref().map(Registry::new).transpose().unwrap_or_else(|e| {
            errors.push(e);
            None
        });
        if !errors.is_empty() {
            return Err(errors);
        }
        let max_future = config.event_time.as_ref().and_then(|e| e.max_future);
        Ok(Pipeline {
            event_time: columns.index_of(event_time_name).unwrap_or_default(),
            future_guard: max_future.and_then(|m| Some((decoded.index_of(event_time_name).ok()?, m))),
            schema: config.schema.clone(),
            registry: registry.map(Arc::new),
            transform,
            expectations,
            queries: queries.into(),
            tables,
            rows,
            rows_schema,
            provenance,
            windows,
            late_rows,
            dead_letters,
            workers: config.execution.workers,
        })
    }
}
