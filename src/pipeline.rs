//! The configuration, compiled: everything that a batch is executed with, decided once.
//!
//! Owns: which tables there are and what each is fed with. Does not own: how any of it is done.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;

use crate::config::{Config, TableConfig};
use crate::dead_letter;
use crate::decode::RecordDecoder;
use crate::decode::registry::{BatchRegistry, Registry};
use crate::decode::route::Router;
use crate::execute;
use crate::late;
use crate::quality::{Expectation, Expectations};
use crate::schema::Schema;
use crate::sink::iceberg::TableSpec;
use crate::state::WindowQuery;
use crate::transform::Transform;

/// The configuration, compiled: what a batch is executed with.
pub struct Pipeline {
    /// Which type a record is of.
    pub router: Router,
    /// None: payloads are plain JSON.
    pub registry: Option<Arc<Registry>>,
    pub types: Vec<MessageType>,
    /// Of all types.
    pub queries: Arc<[WindowQuery]>,
    /// Every table of the pipeline; the indices below point into it.
    pub tables: Vec<TableSpec>,
    /// By window query.
    pub windows: Vec<usize>,
    /// By window query: where its late rows are kept, if they are.
    pub late_rows: Vec<Option<usize>>,
    pub dead_letters: usize,
    pub workers: usize,
}

/// Records of one kind: what they are held to and where they go.
pub struct MessageType {
    pub schema: Arc<Schema>,
    pub transform: Option<Transform>,
    pub expectations: Expectations,
    /// Index of the event time among the columns that reach the windows. None: they have no say in the watermark.
    pub event_time: Option<usize>,
    /// Index of the event time among the decoded columns, and how far ahead of the trigger time it may be.
    pub future_guard: Option<(usize, Duration)>,
    /// The table of its rows, among those of the pipeline.
    pub rows: Option<usize>,
    pub rows_schema: SchemaRef,
    pub provenance: bool,
    /// Its window queries, among those of the pipeline.
    pub queries: Arc<[usize]>,
}

impl Pipeline {
    /// Compiles what the configuration says; every problem is reported.
    pub fn compile(config: &Config) -> Result<Pipeline, Vec<String>> {
        let mut errors = Vec::new();
        let mut tables = Vec::new();
        let mut types = Vec::with_capacity(config.types.len());
        let mut columns_of = Vec::with_capacity(config.types.len());
        let max_future = config.event_time.as_ref().and_then(|e| e.max_future);
        for (index, of) in config.types.iter().enumerate() {
            let decoded = &of.schema.arrow;
            let transform = (of.transform.filter.is_some() || !of.transform.columns.is_empty())
                .then(|| Transform::compile(&of.transform, decoded))
                .transpose()
                .unwrap_or_else(|e| {
                    errors.extend(e);
                    None
                });
            let columns = transform.as_ref().map_or_else(|| decoded.clone(), |t| t.output_schema());
            let expectations = config.quality.expectations.iter().filter(|e| e.of == index);
            let expectations = Expectations::compile(expectations, &columns).unwrap_or_else(|e| {
                errors.extend(e);
                Expectations::default()
            });
            let provenance = of.rows.as_ref().is_some_and(|r| r.provenance);
            let rows_schema = execute::rows_schema(&columns, provenance);
            let event_time = of.event_time.as_deref();
            types.push(MessageType {
                schema: of.schema.clone(),
                transform,
                expectations,
                event_time: event_time.and_then(|name| columns.index_of(name).ok()),
                future_guard: max_future.and_then(|max| Some((decoded.index_of(event_time?).ok()?, max))),
                rows: of.rows.as_ref().map(|table| add(&mut tables, table, rows_schema.clone())),
                rows_schema,
                provenance,
                queries: config.windows.iter().enumerate().filter(|(_, w)| w.of == index).map(|(i, _)| i).collect(),
            });
            columns_of.push(columns);
        }
        let mut queries = Vec::new();
        let mut windows = Vec::new();
        let mut late_rows = Vec::new();
        for window in &config.windows {
            let (Some(of), Some(columns)) = (config.types.get(window.of), columns_of.get(window.of)) else {
                errors.push(format!("window table {}: its message type is not there", window.table.table));
                continue;
            };
            match WindowQuery::compile(window, columns, of.event_time.as_deref().unwrap_or_default()) {
                Ok(query) => {
                    windows.push(add(&mut tables, &window.table, query.output_schema()));
                    late_rows.push(window.late_table.as_ref().map(|late| {
                        let shared = tables.iter().position(|table| table.name == late.table);
                        shared.unwrap_or_else(|| add(&mut tables, late, late::schema(columns)))
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
        Ok(Pipeline {
            router: Router::new(config.types.iter().map(|of| of.when.clone()).collect(), registry.is_some()),
            registry: registry.map(Arc::new),
            types,
            queries: queries.into(),
            tables,
            windows,
            late_rows,
            dead_letters,
            workers: config.execution.workers,
        })
    }

    /// Of all types.
    pub fn expectations(&self) -> impl Iterator<Item = &Expectation> {
        self.types.iter().flat_map(|of| of.expectations.iter())
    }

    /// One for each type: what a worker decodes with.
    pub fn decoders(&self, registry: Option<&Arc<BatchRegistry>>) -> Vec<RecordDecoder> {
        self.types.iter().map(|of| RecordDecoder::new(of.schema.clone(), registry.cloned())).collect()
    }
}

/// The index of the new table.
fn add(tables: &mut Vec<TableSpec>, table: &TableConfig, schema: SchemaRef) -> usize {
    tables.push(TableSpec {
        name: table.table.clone(),
        schema,
        partition_by: table.partition_by.clone(),
        sort_by: table.sort_by.clone(),
        properties: table.properties.clone(),
    });
    tables.len() - 1
}
