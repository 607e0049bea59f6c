//! The partial aggregation of one partition of one batch, for all window queries: the hot path.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{Array, AsArray, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::{max, min, take};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::record_batch::RecordBatch;
use datafusion_common::Result as DataFusionResult;

use super::Error;
use super::groups::GroupTable;
use super::query::WindowQuery;
use crate::window::{closed, window_end, window_start};

/// Chunks of one partition go in, in the order of their offsets. Its own group tables, so lanes need no locks.
pub struct Lane {
    queries: Arc<[WindowQuery]>,
    /// Index of the event time column.
    event_time: usize,
    late_ms: i64,
    /// By query: window start to groups.
    windows: Vec<BTreeMap<i64, GroupTable>>,
    max_event_time_us: Option<i64>,
    late_rows: Vec<u64>,
    failed_values: Vec<u64>,
    rows_without_time: u64,
    /// Scratch: the group of every row.
    indices: Vec<usize>,
}

impl Lane {
    /// `event_time` is the index of the event time column; `late_ms` the watermark that rows are judged by.
    pub fn new(queries: Arc<[WindowQuery]>, event_time: usize, late_ms: i64) -> Self {
        Lane {
            event_time,
            late_ms,
            windows: queries.iter().map(|_| BTreeMap::new()).collect(),
            max_event_time_us: None,
            late_rows: vec![0; queries.len()],
            failed_values: vec![0; queries.len()],
            rows_without_time: 0,
            indices: Vec::new(),
            queries,
        }
    }

    pub fn update(&mut self, batch: &RecordBatch) -> Result<(), Error> {
        let found = || match batch.schema().fields().get(self.event_time) {
            Some(field) => format!("{} {}", field.name(), field.data_type()),
            None => "nothing".to_string(),
        };
        let times = batch.columns().get(self.event_time).and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>());
        let times = times.ok_or_else(|| Error::EventTime { column: self.event_time, found: found() })?;

        let nulls = times.null_count();
        self.rows_without_time += nulls as u64;
        // Spark counts a null time as the epoch; a row without a time is in no window.
        let latest = max(times);
        self.max_event_time_us = self.max_event_time_us.max(latest).max((nulls > 0).then_some(0));
        let (Some(earliest), Some(latest)) = (min(times), latest) else { return Ok(()) };

        for (index, query) in self.queries.clone().iter().enumerate() {
            let first = window_start(earliest, query.size_us());
            let windows = if nulls == 0 && window_start(latest, query.size_us()) == first {
                vec![(first, None)]
            } else {
                assign(times, query.size_us())
            };
            self.aggregate(index, query, batch, windows).map_err(|e| query.error(&e))?;
        }
        Ok(())
    }

    /// Adds the rows of each window to its groups. Rows `None`: all of the batch.
    fn aggregate(
        &mut self,
        index: usize,
        query: &WindowQuery,
        batch: &RecordBatch,
        windows: Vec<(i64, Option<Vec<u32>>)>,
    ) -> DataFusionResult<()> {
        let (arguments, failed) = query.arguments(batch)?;
        let (keys, failed_keys) = query.key_columns(batch)?;
        if let Some(count) = self.failed_values.get_mut(index) {
            *count += failed + failed_keys;
        }
        let (Some(late), Some(tables)) = (self.late_rows.get_mut(index), self.windows.get_mut(index)) else {
            return Ok(());
        };
        for (start_us, rows) in windows {
            let count = rows.as_ref().map_or(batch.num_rows(), Vec::len);
            if closed(window_end(start_us, query.size_us()), self.late_ms) {
                *late += count as u64;
                continue;
            }
            let table = match tables.entry(start_us) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => entry.insert(GroupTable::new(query)?),
            };
            match rows {
                None => table.update(query, &keys, &arguments, count, &mut self.indices)?,
                Some(rows) => {
                    let rows = UInt32Array::from(rows);
                    let keys = keys.iter().map(|key| take(key, &rows, None)).collect::<Result<Vec<_>, _>>()?;
                    let arguments = query.gather(&arguments, &rows)?;
                    table.update(query, &keys, &arguments, count, &mut self.indices)?;
                }
            }
        }
        Ok(())
    }

    /// The latest event time, late rows included; a row without a time counts as the epoch. None: no rows.
    pub fn max_event_time_us(&self) -> Option<i64> {
        self.max_event_time_us
    }

    /// Rows whose window was closed already, by query.
    pub fn late_rows(&self) -> &[u64] {
        &self.late_rows
    }

    /// Arguments of aggregates and group keys that are null because their expression failed on the row, by query.
    pub fn failed_values(&self) -> &[u64] {
        &self.failed_values
    }

    /// Rows without an event time: in no window.
    pub fn rows_without_time(&self) -> u64 {
        self.rows_without_time
    }

    /// Memory held by the groups.
    pub fn bytes(&self) -> usize {
        self.windows.iter().flat_map(BTreeMap::values).map(GroupTable::bytes).sum()
    }

    pub(super) fn into_windows(self) -> Vec<BTreeMap<i64, GroupTable>> {
        self.windows
    }
}

/// The rows of each window. Rows mostly fall into the same few windows, so the last window is tried first, then those of
/// the chunk, then a map.
fn assign(times: &TimestampMicrosecondArray, size_us: i64) -> Vec<(i64, Option<Vec<u32>>)> {
    const FEW: usize = 8;
    struct Bucket {
        start_us: i64,
        end_us: i64,
        rows: Vec<u32>,
    }
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut by_start: HashMap<i64, usize> = HashMap::new();
    let mut last = 0;
    for (row, &time) in times.values().iter().enumerate() {
        if times.is_null(row) {
            continue;
        }
        // a window that ends at the end of the range holds its last microsecond too
        let holds = |b: &Bucket| b.start_us <= time && (time < b.end_us || b.end_us == i64::MAX);
        if !buckets.get(last).is_some_and(holds) {
            let known = match buckets.len() <= FEW {
                true => buckets.iter().position(holds),
                false => by_start.get(&window_start(time, size_us)).copied(),
            };
            last = known.unwrap_or_else(|| {
                let start_us = window_start(time, size_us);
                by_start.insert(start_us, buckets.len());
                let rows = Vec::with_capacity(times.len() / (buckets.len() + 1));
                buckets.push(Bucket { start_us, end_us: window_end(start_us, size_us), rows });
                buckets.len() - 1
            });
        }
        if let Some(bucket) = buckets.get_mut(last) {
            bucket.rows.push(row as u32);
        }
    }
    buckets.into_iter().map(|b| (b.start_us, Some(b.rows))).collect()
}
