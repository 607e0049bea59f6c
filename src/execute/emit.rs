//! Closed windows on their way into files, each by whichever worker comes to it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::SchemaRef;
use uuid::Uuid;

use super::admit::timestamp_text;
use super::{EventTimes, Output, WorkerTimes, Writers, lock};
use crate::batch::{BatchId, MicroBatch};
use crate::checkpoint::Counts;
use crate::dead_letter::{self, Reason};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::sink::iceberg::IcebergSink;
use crate::state::Closing;

/// Writing the windows that the watermark has closed.
pub(super) struct Emit<'a> {
    pub pipeline: &'a Pipeline,
    pub sink: &'a IcebergSink,
    pub plan: &'a MicroBatch,
    pub attempt: Uuid,
    pub cancel: &'a AtomicBool,
    pub closed: Mutex<std::vec::IntoIter<Closing>>,
}

impl Emit<'_> {
    pub fn run(&self, worker: usize) -> Result<Output, Error> {
        let started = Instant::now();
        let mut writers = Writers::new(Some(self.sink), self.plan, self.attempt, worker);
        let mut counts = Counts::default();
        loop {
            let next = lock(&self.closed).next();
            let Some(closing) = next else { break };
            // By table and window: a large one comes in pieces.
            let mut overflows: BTreeMap<(usize, i64, i64), u64> = BTreeMap::new();
            closing.windows::<Error>(|window| {
                if self.cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let table = self.pipeline.windows[window.query()];
                let bounds = (table, window.start_us(), window.end_us());
                let updates = self.pipeline.queries[window.query()].updates();
                let (batches, overflowed) = window.evaluate()?;
                for mut batch in batches {
                    if updates {
                        batch = with_revision(&self.pipeline.tables[table].schema, &batch, self.plan.batch)?;
                    }
                    *counts.windows.entry(self.pipeline.tables[table].name.clone()).or_default() +=
                        batch.num_rows() as u64;
                    writers.write(table, &batch)?;
                }
                *overflows.entry(bounds).or_default() += overflowed;
                Ok(())
            })?;
            for ((table, start, end), overflowed) in overflows.into_iter().filter(|(_, overflowed)| *overflowed > 0) {
                let message = format!(
                    "{overflowed} values of {} in the window [{}, {}) could not be computed and are null: a sum beyond its type, or an expression over aggregates that failed",
                    self.pipeline.tables[table].name,
                    timestamp_text(start),
                    timestamp_text(end)
                );
                tracing::warn!(table = self.pipeline.tables[table].name, window_start = %timestamp_text(start), values = overflowed, "aggregates could not be computed");
                let dead = dead_letter::from_overflows(&[message], self.plan.batch, self.plan.trigger_time_ms);
                writers.write(self.pipeline.dead_letters, &dead)?;
                *counts.dead_letters.entry(Reason::Overflow.code().to_string()).or_default() += 1;
            }
        }
        let (files, took) = writers.finish()?;
        let mut times = WorkerTimes::default();
        times.add("write", took);
        times.add("close", started.elapsed().saturating_sub(took));
        Ok(Output { files, counts, event_times: EventTimes::default(), times })
    }
}

/// Rows of a window in update mode: which batch they are of.
fn with_revision(schema: &SchemaRef, rows: &RecordBatch, batch: BatchId) -> Result<RecordBatch, Error> {
    let revision: ArrayRef = Arc::new(Int64Array::from_value(batch as i64, rows.num_rows()));
    let columns = rows.columns().iter().cloned().chain([revision]).collect();
    RecordBatch::try_new(schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))
}
