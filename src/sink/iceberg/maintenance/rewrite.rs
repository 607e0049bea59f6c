//! The rows of some data files of one partition, written anew into one.
//!
//! Owns: reading them in a stream, merged by the table's sort order if the files are sorted by it. Does not own: which files
//! they are and what becomes of the new one. Invariant: as many rows go out as the files are said to have, all of them to
//! the partition that they were in.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::SortOptions;
use arrow::datatypes::{Field, Schema, SchemaRef as ArrowSchemaRef};
use datafusion_common::DataFusionError;
use datafusion_execution::memory_pool::{MemoryConsumer, MemoryPool, UnboundedMemoryPool};
use datafusion_physical_expr::expressions::Column;
use datafusion_physical_expr::{LexOrdering, PhysicalSortExpr};
use datafusion_physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet};
use datafusion_physical_plan::sorts::streaming_merge::StreamingMergeBuilder;
use datafusion_physical_plan::stream::RecordBatchStreamAdapter;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use iceberg::Runtime;
use iceberg::arrow::ArrowReaderBuilder;
use iceberg::scan::FileScanTask;
use iceberg::spec::{DataFile, DataFileFormat};
use tokio::runtime::Handle;
use uuid::Uuid;

use super::Round;
use super::small::{Group, SmallFile};
use crate::sink::Error;
use crate::sink::iceberg::commit::delete_all;
use crate::sink::iceberg::files::{FileLayout, TableWriter};
use crate::sink::iceberg::layout;
use crate::sink::iceberg::order::SortOrder;

const BATCH_ROWS: usize = 8_192;

/// No batch's files begin with it.
const NAME_PREFIX: &str = "compacted-";

type Rows = BoxStream<'static, Result<RecordBatch, Error>>;

/// The new file, or a few; none when the round is stopped in between.
pub(super) async fn rewrite(
    layout: &Arc<FileLayout>,
    group: &Group,
    round: &Round,
) -> Result<Option<Vec<DataFile>>, Error> {
    let is_sorted = group.files.iter().all(|file| file.sorted);
    let rows = match &layout.order {
        Some(order) if is_sorted => merged(layout, order, &group.files)?,
        _ => {
            let files = group.files.iter().map(|file| read(layout, file)).collect::<Result<Vec<_>, _>>()?;
            futures::stream::iter(files).flatten().boxed()
        }
    };
    let writer = TableWriter::new(layout.clone(), Handle::current(), NAME_PREFIX, Uuid::new_v4(), 0);
    // Unsorted rows of a table with a sort order become sorted runs, which a later round merges.
    let writer = if is_sorted { writer.of_sorted_rows() } else { writer };
    let round = round.clone();
    let written = tokio::task::spawn_blocking(move || write(writer, rows, &round)).await;
    let (files, outcome) =
        written.unwrap_or_else(|e| (Vec::new(), Err(Error::transient(format!("compaction did not end well: {e}")))));
    let outcome = match outcome {
        Ok(true) => check(layout, group, &files).map(|()| true),
        stopped_or_failed => stopped_or_failed,
    };
    match outcome {
        Ok(true) => Ok(Some(files)),
        other => {
            delete_all(&layout.file_io, files.iter().map(|file| file.file_path().to_string()).collect()).await;
            other.map(|_| None)
        }
    }
}

/// What was written, and whether that is all.
fn write(mut writer: TableWriter, mut rows: Rows, round: &Round) -> (Vec<DataFile>, Result<bool, Error>) {
    let runtime = Handle::current();
    let outcome = loop {
        if round.stopped() {
            break Ok(false);
        }
        match runtime.block_on(rows.try_next()) {
            Ok(Some(batch)) => {
                if let Err(e) = writer.write(&batch) {
                    break Err(e);
                }
            }
            Ok(None) => break Ok(true),
            Err(e) => break Err(e),
        }
    };
    match writer.finish() {
        Ok(files) => (files, outcome),
        Err(e) => (Vec::new(), Err(e)),
    }
}

fn check(layout: &FileLayout, group: &Group, files: &[DataFile]) -> Result<(), Error> {
    let records: u64 = group.files.iter().map(|file| file.records).sum();
    let written: u64 = files.iter().map(|file| file.record_count()).sum();
    let elsewhere = files.iter().any(|file| *file.partition() != group.partition);
    if records == written && !elsewhere {
        return Ok(());
    }
    Err(Error::fatal(format!(
        "table {}: {records} rows of one partition were to be rewritten and {written} were{}; nothing is changed",
        layout.table,
        if elsewhere { ", not all in that partition" } else { "" }
    )))
}

fn read(layout: &FileLayout, file: &SmallFile) -> Result<Rows, Error> {
    let name = layout.table.clone();
    let failed = move |e: iceberg::Error| Error::transient(format!("table {name}: cannot read its small files: {e}"));
    let fields = layout.schema.as_struct().fields().iter().map(|field| field.id).collect();
    let task = FileScanTask::builder()
        .with_file_size_in_bytes(file.bytes)
        .with_start(0)
        .with_length(file.bytes)
        .with_record_count(Some(file.records))
        .with_data_file_path(file.path.clone())
        .with_data_file_format(DataFileFormat::Parquet)
        .with_schema(layout.schema.clone())
        .with_project_field_ids(fields)
        .with_case_sensitive(true)
        .build();
    let reader = ArrowReaderBuilder::new(layout.file_io.clone(), Runtime::try_current().map_err(&failed)?)
        .with_batch_size(BATCH_ROWS)
        .with_data_file_concurrency_limit(1)
        .build();
    let rows = reader.read(futures::stream::iter([Ok(task)]).boxed()).map_err(&failed)?.stream();
    Ok(rows.map_err(failed).boxed())
}

/// The rows of sorted files, sorted. The values that they are compared by go along as columns of their own.
fn merged(layout: &Arc<FileLayout>, order: &SortOrder, files: &[SmallFile]) -> Result<Rows, Error> {
    let name = layout.table.clone();
    let failed = move |e: DataFusionError| Error::transient(format!("table {name}: cannot merge its small files: {e}"));
    let columns = layout.arrow_schema.fields().len();
    let empty = RecordBatch::new_empty(layout.arrow_schema.clone());
    let schema = with_keys(order, &empty).map_err(&failed)?.schema();
    let expressions = order.options().into_iter().enumerate().map(|(i, options): (usize, SortOptions)| {
        let index = columns + i;
        PhysicalSortExpr::new(Arc::new(Column::new(schema.field(index).name(), index)), options)
    });
    let Some(ordering) = LexOrdering::new(expressions) else {
        return Err(Error::transient(format!("table {}: its sort order has no columns", layout.table)));
    };
    let mut streams = Vec::with_capacity(files.len());
    for file in files {
        let layout_of_file = layout.clone();
        let keyed = read(layout, file)?.map(move |rows| {
            let rows = rows.map_err(|e| DataFusionError::External(Box::new(e)))?;
            let rows = layout::conform(&rows, &layout_of_file.arrow_schema)?;
            match &layout_of_file.order {
                Some(order) => with_keys(order, &rows),
                None => Ok(rows),
            }
        });
        let stream = RecordBatchStreamAdapter::new(schema.clone(), keyed);
        streams.push(Box::pin(stream) as datafusion_physical_plan::SendableRecordBatchStream);
    }
    let pool: Arc<dyn MemoryPool> = Arc::new(UnboundedMemoryPool::default());
    let sorted = StreamingMergeBuilder::new()
        .with_streams(streams)
        .with_schema(schema)
        .with_expressions(&ordering)
        .with_metrics(BaselineMetrics::new(&ExecutionPlanMetricsSet::new(), 0))
        .with_batch_size(BATCH_ROWS)
        .with_reservation(MemoryConsumer::new("compaction").register(&pool))
        .build()
        .map_err(&failed)?;
    let all: Vec<usize> = (0..columns).collect();
    Ok(sorted.map(move |rows| rows.and_then(|rows| Ok(rows.project(&all)?)).map_err(&failed)).boxed())
}

fn with_keys(order: &SortOrder, rows: &RecordBatch) -> Result<RecordBatch, DataFusionError> {
    let keys = order.keys(rows).map_err(|e| DataFusionError::External(Box::new(e)))?;
    let mut fields: Vec<Arc<Field>> = rows.schema().fields().iter().cloned().collect();
    let mut columns = rows.columns().to_vec();
    for (i, key) in keys.into_iter().enumerate() {
        fields.push(Arc::new(Field::new(format!("sort key {i}"), key.values.data_type().clone(), true)));
        columns.push(key.values);
    }
    let schema: ArrowSchemaRef = Arc::new(Schema::new(fields));
    Ok(RecordBatch::try_new(schema, columns)?)
}
