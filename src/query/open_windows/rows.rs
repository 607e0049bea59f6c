//! Open windows from the table of rows: what the batches brought, less what `floe dlq retry` has added since.

use std::sync::Arc;

use arrow::array::{AsArray, BooleanArray, RecordBatch, new_null_array};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{DataType, Int32Type, Int64Type, Schema, SchemaRef};
use futures::TryStreamExt;

use super::{Deltas, Reopening};
use crate::batch::{Offsets, TopicPartition};
use crate::dead_letter::retry::{PLACE, Places};
use crate::error::Error;
use crate::execute::PROVENANCE;
use crate::pipeline::{MessageType, Pipeline};
use crate::query::blocking;
use crate::query::rebuild::refused;
use crate::sink::iceberg::{Datum, PinnedTable, Predicate, Reference};
use crate::state::Lane;

/// Days of a time zone may be longer than their size says.
const SLACK_US: i64 = 24 * 3_600_000_000;
const SCAN_ROWS: usize = 64 * 1024;

impl Reopening<'_> {
    /// How many rows there were.
    pub(super) async fn read_rows(
        &self,
        of: &MessageType,
        table: &PinnedTable,
        active: Arc<[usize]>,
        refused_once: &Places,
        deltas: &mut Deltas<'_>,
    ) -> Result<u64, Error> {
        let kept = Kept { ends: self.logged.plan.ends(), refused_once };
        let evict_ms = self.logged.plan.watermarks.evict();
        let columns = columns_of(of);
        if of.event_time.is_some_and(|time| !table.has_column(columns.field(time).name())) {
            return Ok(0);
        }
        // A column that only a later batch brings into the table is null in all rows that it has.
        let names = columns.fields().iter().map(|f| f.name().as_str()).filter(|name| table.has_column(name));
        let names: Vec<&str> = names.chain(PLACE).collect();
        let mut scan = table.scan(&names, not_before(self.pipeline, of, &columns, evict_ms), SCAN_ROWS).await?;
        let event_time = of.event_time.unwrap_or_default();
        let empty = || Lane::new(self.pipeline.queries.clone(), active.clone(), event_time, evict_ms);
        let (mut lane, mut rows) = (empty(), 0);
        while let Some(batch) = scan.try_next().await? {
            let batch = kept.of(&batch, &columns)?;
            rows += batch.num_rows() as u64;
            lane = blocking(move || {
                lane.update(&batch)?;
                Ok(lane)
            })
            .await?;
            if lane.bytes() as u64 > deltas.budget {
                deltas.take(vec![std::mem::replace(&mut lane, empty())]).await?;
            }
        }
        deltas.take(vec![lane]).await?;
        Ok(rows)
    }
}

/// The columns that reach the windows: those that say where a row came from do not.
fn columns_of(of: &MessageType) -> SchemaRef {
    let columns = of.rows_schema.fields().iter().filter(|f| !PROVENANCE.contains(&f.name().as_str()));
    Schema::new(columns.cloned().collect::<Vec<_>>()).into()
}

/// True for the rows of open windows, and some more.
fn not_before(pipeline: &Pipeline, of: &MessageType, columns: &SchemaRef, evict_ms: i64) -> Option<Predicate> {
    let queries = of.queries.iter().filter_map(|query| pipeline.queries.get(*query));
    let longest = queries.map(|q| q.windowing().size().as_micros()).max()?;
    let longest = i64::try_from(longest).ok()?.checked_add(SLACK_US)?;
    let from_us = evict_ms.checked_mul(1000)?.checked_sub(longest)?;
    let field = columns.field(of.event_time?);
    let zoned = matches!(field.data_type(), DataType::Timestamp(_, Some(_)));
    let from = if zoned { Datum::timestamptz_micros(from_us) } else { Datum::timestamp_micros(from_us) };
    Some(Reference::new(field.name()).greater_than_or_equal_to(from))
}

/// Which rows the batches up to one have brought.
struct Kept<'a> {
    ends: Offsets,
    /// A row at the offset of a dead letter is one that was tried again: no window has seen it.
    refused_once: &'a Places,
}

impl Kept<'_> {
    fn of(&self, batch: &RecordBatch, columns: &SchemaRef) -> Result<RecordBatch, Error> {
        let strange = |what: &str| refused(format!("the rows table is not as Floe writes it: {what}"));
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| strange(&format!("no column {name}")));
        let [topic, partition, offset] = PLACE;
        let topics = cast(column(topic)?, &DataType::Utf8).map_err(|e| strange(&e.to_string()))?;
        let topics = topics.as_string::<i32>();
        let (Some(partitions), Some(offsets)) =
            (column(partition)?.as_primitive_opt::<Int32Type>(), column(offset)?.as_primitive_opt::<Int64Type>())
        else {
            return Err(strange("the types of the _kafka_ columns"));
        };
        let mut current: Option<(TopicPartition, i64, _)> = None;
        let mut keep = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let (topic, partition, offset) = (topics.value(row), partitions.value(row), offsets.value(row));
            // Rows of one partition follow each other.
            if current.as_ref().is_none_or(|(tp, ..)| &*tp.topic != topic || tp.partition != partition) {
                let tp = TopicPartition::new(topic, partition);
                let end = self.ends.get(&tp).copied().unwrap_or(i64::MIN);
                current = Some((tp, end, self.refused_once.get(&(topic.to_string(), partition))));
            }
            keep.push(current.as_ref().is_some_and(|(_, end, refused)| {
                offset < *end && !refused.is_some_and(|refused| refused.contains(&offset))
            }));
        }
        let arrays = columns.fields().iter().map(|field| {
            let Some(found) = batch.column_by_name(field.name()) else {
                return Ok(new_null_array(field.data_type(), batch.num_rows()));
            };
            cast(found, field.data_type()).map_err(|e| strange(&format!("column {}: {e}", field.name())))
        });
        let rows = RecordBatch::try_new(columns.clone(), arrays.collect::<Result<_, _>>()?);
        let rows = rows.map_err(|e| strange(&e.to_string()))?;
        filter_record_batch(&rows, &BooleanArray::from(keep)).map_err(|e| strange(&e.to_string()))
    }
}
