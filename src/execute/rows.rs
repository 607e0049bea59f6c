//! The columns of the rows tables that say where each row came from.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, SchemaRef, TimeUnit};

use crate::error::Error;
use crate::source::Chunk;

/// The columns that let anyone prove with one query that nothing is missing or doubled.
pub const PROVENANCE: [&str; 4] = ["_kafka_topic", "_kafka_partition", "_kafka_offset", "_kafka_timestamp"];

fn provenance_fields() -> Vec<Field> {
    let [topic, partition, offset, timestamp] = PROVENANCE;
    vec![
        Field::new(topic, DataType::Utf8, false),
        Field::new(partition, DataType::Int32, false),
        Field::new(offset, DataType::Int64, false),
        Field::new(timestamp, DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), true),
    ]
}

/// The schema of the rows table: the row's columns and, where asked for, where each came from.
pub fn rows_schema(columns: &SchemaRef, provenance: bool) -> SchemaRef {
    let mut fields: Vec<_> = columns.fields().iter().cloned().collect();
    if provenance {
        fields.extend(provenance_fields().into_iter().map(Arc::new));
    }
    Arc::new(ArrowSchema::new(fields))
}

/// `batch` with the columns that say where each row came from; `records` are its rows' indices in the chunk.
pub fn with_provenance(
    schema: &SchemaRef,
    batch: &RecordBatch,
    chunk: &Chunk,
    records: &[u32],
) -> Result<RecordBatch, Error> {
    let rows = records.len();
    let topic: ArrayRef = Arc::new(StringArray::from_iter_values(std::iter::repeat_n(&*chunk.topic, rows)));
    let partition: ArrayRef = Arc::new(Int32Array::from_value(chunk.partition, rows));
    let offsets: ArrayRef =
        Arc::new(Int64Array::from_iter_values(records.iter().map(|&record| chunk.records[record as usize].offset)));
    let timestamps: TimestampMicrosecondArray = records
        .iter()
        .map(|&record| {
            let ms = chunk.records[record as usize].timestamp_ms;
            (ms != i64::MIN).then(|| ms.saturating_mul(1000))
        })
        .collect();
    let mut columns = batch.columns().to_vec();
    columns.extend([topic, partition, offsets, Arc::new(timestamps.with_timezone("UTC")) as ArrayRef]);
    RecordBatch::try_new(schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))
}
