//! The way of a record into the tables: decoding, checks, `[transform]` and expectations.

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::TimestampMicrosecondType;

use crate::dead_letter::Reason;
use crate::dead_letter::retry::Places;
use crate::decode::{RecordDecoder, Rejection};
use crate::error::Error;
use crate::pipeline::MessageType;
use crate::quality::{Expectations, Violation};
use crate::source::Chunk;

/// What became of the records of one chunk: each is a row, or refused, or left out by the filter or an expectation.
pub struct Admitted {
    /// The columns that reach the tables; row i is record `records[i]` of the chunk.
    pub batch: RecordBatch,
    pub records: Vec<u32>,
    pub rejected: Vec<Rejection>,
    pub filtered: u64,
    /// By expectations of the kind `drop`.
    pub dropped: u64,
    /// Rows that failed, by expectation in their order.
    pub failures: Vec<u64>,
    /// The first record that an expectation of the kind `fail` does not let pass: nothing of the batch may be committed.
    pub violation: Option<Violation>,
}

impl Admitted {
    pub(super) fn leave_out(&mut self, places: &Places, chunk: &Chunk) -> Result<(), Error> {
        let Some(offsets) = places.get(&(chunk.topic.to_string(), chunk.partition)) else { return Ok(()) };
        let stays = |&record: &u32| Some(!offsets.contains(&chunk.records[record as usize].offset));
        let kept: BooleanArray = self.records.iter().map(stays).collect();
        self.batch = filter_record_batch(&self.batch, &kept).map_err(|e| Error::Internal(e.to_string()))?;
        self.records = keep_records(&self.records, &kept);
        Ok(())
    }
}

/// Decoding, checks, `[transform]` and expectations: the way of a record into the tables, the first time and when a dead letter is
/// tried again.
pub fn admit(
    of: &MessageType,
    trigger_time_ms: i64,
    chunk: &mut Chunk,
    decoder: &mut RecordDecoder,
) -> Result<Admitted, Error> {
    let decoded = decoder.decode(chunk)?;
    let (mut batch, mut records, mut rejected) = (decoded.batch, decoded.records, decoded.rejected);
    refuse_future(of, trigger_time_ms, &mut batch, &mut records, &mut rejected)?;
    let decoded_rows = batch.num_rows();
    let mut filtered = 0;
    if let Some(transform) = &of.transform {
        let transformed = transform.apply(&batch)?;
        for (row, message) in &transformed.failed {
            rejected.push(Rejection {
                record: records[*row],
                reason: Reason::ExpressionFailed,
                path: "$".into(),
                message: message.clone().into(),
            });
        }
        if let Some(kept) = &transformed.kept {
            records = kept.iter().map(|&row| records[row as usize]).collect();
        }
        filtered = (decoded_rows - transformed.failed.len() - transformed.batch.num_rows()) as u64;
        batch = transformed.batch;
    }
    let mut admitted =
        Admitted { batch, records, rejected, filtered, dropped: 0, failures: Vec::new(), violation: None };
    if !of.expectations.is_empty() {
        expect(&of.expectations, chunk, &mut admitted)?;
    }
    Ok(admitted)
}

/// `[[quality.expect]]`: what valid rows are to be beyond the schema.
fn expect(expectations: &Expectations, chunk: &Chunk, admitted: &mut Admitted) -> Result<(), Error> {
    let internal = |e: &dyn std::fmt::Display| Error::Internal(format!("expectations: {e}"));
    let checked = expectations.check(&admitted.batch).map_err(|e| internal(&e))?;
    let records = &admitted.records;
    if let Some((row, index)) = checked.violation
        && let Some(expectation) = expectations.get(index)
    {
        admitted.violation = Some(Violation {
            topic: chunk.topic.clone(),
            partition: chunk.partition,
            offset: chunk.records[records[row] as usize].offset,
            name: expectation.name.clone(),
            sql: expectation.sql.clone(),
        });
    }
    admitted.failures = checked.failures;
    admitted.dropped = checked.dropped;
    admitted.rejected.extend(checked.refused.into_iter().map(|(row, message)| Rejection {
        record: records[row],
        reason: Reason::ExpectationFailed,
        path: "$".into(),
        message: message.into(),
    }));
    if let Some(kept) = &checked.kept {
        admitted.batch = filter_record_batch(&admitted.batch, kept).map_err(|e| internal(&e))?;
        admitted.records = keep_records(records, kept);
    }
    Ok(())
}

/// A device with its clock in 2099 costs a dead letter, not everyone's windows.
fn refuse_future(
    of: &MessageType,
    trigger_time_ms: i64,
    batch: &mut RecordBatch,
    records: &mut Vec<u32>,
    rejected: &mut Vec<Rejection>,
) -> Result<(), Error> {
    let Some((column, max_future)) = of.future_guard else { return Ok(()) };
    let limit_us = trigger_time_ms.saturating_add(max_future.as_millis() as i64).saturating_mul(1000);
    let times = batch.column(column).as_primitive::<TimestampMicrosecondType>();
    if arrow::compute::max(times).is_none_or(|max| max <= limit_us) {
        return Ok(());
    }
    let kept: BooleanArray = (0..times.len()).map(|i| Some(times.is_null(i) || times.value(i) <= limit_us)).collect();
    let name = of.schema.arrow.field(column).name();
    for row in (0..times.len()).filter(|&row| !kept.value(row)) {
        let at = timestamp_text(times.value(row));
        rejected.push(Rejection {
            record: records[row],
            reason: Reason::FutureEventTime,
            path: format!("$.{name}").into(),
            message: format!("{at} is more than {max_future:?} ahead of the batch's trigger time").into(),
        });
    }
    *batch = filter_record_batch(batch, &kept).map_err(|e| Error::Internal(e.to_string()))?;
    *records = keep_records(records, &kept);
    Ok(())
}

pub(super) fn timestamp_text(micros: i64) -> String {
    jiff::Timestamp::from_microsecond(micros).map_or_else(|_| format!("{micros} µs"), |t| t.to_string())
}

fn keep_records(records: &[u32], kept: &BooleanArray) -> Vec<u32> {
    records.iter().zip(kept.iter()).filter(|(_, keep)| *keep == Some(true)).map(|(record, _)| *record).collect()
}
