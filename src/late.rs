//! The table of late rows of a window query: the rows as they are, and the window that each missed.
//!
//! Owns: its columns. Does not own: which rows are late ([`crate::state`]). A row is in it once for every window that it
//! missed: it has as many rows as are counted late. Late rows are in the rows table as well, as all rows are.

use std::sync::Arc;

use arrow::array::{ArrayRef, StringArray, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;

use crate::error::Error;
use crate::execute::{rows_schema, with_provenance};
use crate::source::Chunk;
use crate::state::LateRows;

/// What comes before the columns of the row: the table of the windows, the window that was missed, the watermark that the
/// row was judged by.
pub const COLUMNS: [&str; 4] = ["window_table", "window_start", "window_end", "watermark"];

/// `columns` are those that reach the windows.
pub fn schema(columns: &SchemaRef) -> SchemaRef {
    rows_schema(&without_provenance(columns), true)
}

fn without_provenance(columns: &SchemaRef) -> SchemaRef {
    let time = DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into()));
    let [table, times @ ..] = COLUMNS;
    let added = std::iter::once(Field::new(table, DataType::Utf8, false));
    let added = added.chain(times.map(|name| Field::new(name, time.clone(), false))).map(Arc::new);
    Arc::new(Schema::new(added.chain(columns.fields().iter().cloned()).collect::<Vec<_>>()))
}

/// The rows of `batch` that missed a window of `table`; row i of the batch is record `records[i]` of the chunk.
pub fn rows(
    table: &str,
    late: LateRows,
    watermark_ms: i64,
    batch: &RecordBatch,
    chunk: &Chunk,
    records: &[u32],
) -> Result<RecordBatch, Error> {
    let count = late.rows.len();
    let records: Vec<u32> = late.rows.iter().filter_map(|&row| records.get(row as usize).copied()).collect();
    let internal = |e: arrow::error::ArrowError| Error::Internal(format!("late rows: {e}"));
    let rows = take_record_batch(batch, &UInt32Array::from(late.rows)).map_err(internal)?;
    let mut columns: Vec<ArrayRef> = vec![Arc::new(StringArray::from_iter_values(std::iter::repeat_n(table, count)))];
    for time_us in [late.start_us, late.end_us, watermark_ms.saturating_mul(1000)] {
        columns.push(Arc::new(TimestampMicrosecondArray::from_value(time_us, count).with_timezone("+00:00")));
    }
    columns.extend(rows.columns().iter().cloned());
    let rows = RecordBatch::try_new(without_provenance(&batch.schema()), columns).map_err(internal)?;
    with_provenance(&schema(&batch.schema()), &rows, chunk, &records)
}
