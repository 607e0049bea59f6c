//! The partial aggregation of one partition of one batch, for all window queries: the hot path.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use arrow::array::{Array, AsArray, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::{filter_record_batch, max, min, take};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::record_batch::RecordBatch;
use datafusion_common::Result as DataFusionResult;

use super::Error;
use super::groups::GroupTable;
use super::query::WindowQuery;
use crate::window::{Covering, Windowing, closed};

/// Chunks of one partition go in, in the order of their offsets. Its own group tables, so lanes need no locks.
pub struct Lane {
    queries: Arc<[WindowQuery]>,
    /// Those of the queries that these rows are for.
    active: Arc<[usize]>,
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
    /// `active` are the queries that the rows are for; `event_time` is the index of the event time column; `late_ms` the
    /// watermark that rows are judged by.
    pub fn new(queries: Arc<[WindowQuery]>, active: Arc<[usize]>, event_time: usize, late_ms: i64) -> Self {
        Lane {
            active,
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
        let times = event_times(batch, self.event_time)?;
        let nulls = times.null_count();
        self.rows_without_time += nulls as u64;
        // Spark counts a null time as the epoch; a row without a time is in no window. The filters of the windows have no say in
        // the watermark.
        self.max_event_time_us = self.max_event_time_us.max(max(times)).max((nulls > 0).then_some(0));
        if nulls == times.len() {
            return Ok(());
        }
        let queries = self.queries.clone();
        for &index in self.active.clone().iter() {
            let Some(query) = queries.get(index) else { continue };
            let (keep, failed) = query.filter(batch).map_err(|e| query.error(&e))?;
            if let Some(count) = self.failed_values.get_mut(index) {
                *count += failed;
            }
            match keep {
                None => self.aggregate(index, query, batch),
                Some(keep) => {
                    let kept = filter_record_batch(batch, &keep).map_err(|e| query.error(&e.into()))?;
                    self.aggregate(index, query, &kept)
                }
            }?;
        }
        Ok(())
    }

    /// Adds the rows of a batch to the groups of their windows.
    fn aggregate(&mut self, index: usize, query: &WindowQuery, batch: &RecordBatch) -> Result<(), Error> {
        let windows = assign(event_times(batch, self.event_time)?, query.windowing());
        self.aggregate_windows(index, query, batch, windows).map_err(|e| query.error(&e))
    }

    fn aggregate_windows(
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
            if closed(query.windowing().end(start_us), self.late_ms) {
                *late += count as u64;
                continue;
            }
            let table = match tables.entry(start_us) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(GroupTable::new(query)?),
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

    /// How often a row missed a window, because it was closed already, by query.
    pub fn late_rows(&self) -> &[u64] {
        &self.late_rows
    }

    /// Arguments of aggregates, filters and group keys that are null because their expression failed on the row, by query.
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

/// The event times of a batch.
pub(super) fn event_times(batch: &RecordBatch, column: usize) -> Result<&TimestampMicrosecondArray, Error> {
    let found = || match batch.schema().fields().get(column) {
        Some(field) => format!("{} {}", field.name(), field.data_type()),
        None => "nothing".to_string(),
    };
    let times = batch.columns().get(column).and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>());
    times.ok_or_else(|| Error::EventTime { column, found: found() })
}

/// The rows of each window, in their order, windows by their start; rows `None`: all of them. None is in a window twice.
pub(super) fn assign(times: &TimestampMicrosecondArray, windowing: &Windowing) -> Vec<(i64, Option<Vec<u32>>)> {
    let (Some(earliest), Some(latest)) = (min(times), max(times)) else { return Vec::new() };
    let first = windowing.covering(earliest);
    if times.null_count() == 0 && first.holds(latest) {
        return first.starts.into_iter().rev().map(|start_us| (start_us, None)).collect();
    }
    let mut windows: BTreeMap<i64, Vec<u32>> = BTreeMap::new();
    for Segment { covering, rows } in segments(times, windowing) {
        if let Some((last, others)) = covering.starts.split_last() {
            for start_us in others {
                windows.entry(*start_us).or_default().extend(&rows);
            }
            match windows.entry(*last) {
                Entry::Occupied(mut entry) => entry.get_mut().extend(rows),
                Entry::Vacant(entry) => {
                    entry.insert(rows);
                }
            }
        }
    }
    let in_order = |mut rows: Vec<u32>| {
        if !rows.is_sorted() {
            rows.sort();
        }
        Some(rows)
    };
    windows.into_iter().map(|(start_us, rows)| (start_us, in_order(rows))).collect()
}

/// Rows that are in the very same windows.
struct Segment {
    covering: Covering,
    rows: Vec<u32>,
}

/// Rows mostly fall into the same few segments, so the last one is tried first, then those of the chunk, then a map.
fn segments(times: &TimestampMicrosecondArray, windowing: &Windowing) -> Vec<Segment> {
    const FEW: usize = 8;
    let mut segments: Vec<Segment> = Vec::new();
    let mut by_time: BTreeMap<i64, usize> = BTreeMap::new();
    let mut last = 0;
    for (row, &time) in times.values().iter().enumerate() {
        if times.is_null(row) {
            continue;
        }
        let holds = |segment: &Segment| segment.covering.holds(time);
        if !segments.get(last).is_some_and(holds) {
            let known = match segments.len() <= FEW {
                true => segments.iter().position(holds),
                false => by_time.range(..=time).next_back().map(|(_, index)| *index).filter(|i| holds(&segments[*i])),
            };
            last = known.unwrap_or_else(|| {
                let covering = windowing.covering(time);
                by_time.insert(covering.from_us(), segments.len());
                let rows = Vec::with_capacity(times.len() / (segments.len() + 1));
                segments.push(Segment { covering, rows });
                segments.len() - 1
            });
        }
        if let Some(segment) = segments.get_mut(last) {
            segment.rows.push(row as u32);
        }
    }
    segments
}
