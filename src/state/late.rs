//! Which rows of a batch missed which windows: the rows themselves, where a [`super::Lane`] only counts them.

use arrow::compute::min;
use arrow::record_batch::RecordBatch;

use super::Error;
use super::lane::{assign, event_times};
use super::query::WindowQuery;
use crate::window::closed;

/// The rows of one batch that came too late for a window.
#[derive(Debug, PartialEq, Eq)]
pub struct LateRows {
    pub start_us: i64,
    pub end_us: i64,
    /// Indices in the batch.
    pub rows: Vec<u32>,
}

impl WindowQuery {
    /// The windows of the rows that the filter keeps, each with its rows.
    pub fn rows_by_window(&self, batch: &RecordBatch, event_time: usize) -> Result<Vec<(i64, Vec<u32>)>, Error> {
        let (keep, _) = self.filter(batch).map_err(|e| self.error(&e))?;
        let windows = assign(event_times(batch, event_time)?, self.windowing());
        let of_window = |(start_us, rows): (i64, Option<Vec<u32>>)| {
            let mut rows = rows.unwrap_or_else(|| (0..batch.num_rows() as u32).collect());
            if let Some(keep) = &keep {
                rows.retain(|&row| keep.value(row as usize));
            }
            (!rows.is_empty()).then_some((start_us, rows))
        };
        Ok(windows.into_iter().filter_map(of_window).collect())
    }

    /// What the lanes count as late by the same watermark. A row of several windows may have missed some of them.
    pub fn late_rows(&self, batch: &RecordBatch, event_time: usize, late_ms: i64) -> Result<Vec<LateRows>, Error> {
        let times = event_times(batch, event_time)?;
        // Mostly nothing is late, and the earliest row knows.
        let any = min(times).is_some_and(|earliest| closed(self.windowing().first_end(earliest), late_ms));
        if !any {
            return Ok(Vec::new());
        }
        let mut late = Vec::new();
        for (start_us, rows) in self.rows_by_window(batch, event_time)? {
            let end_us = self.windowing().end(start_us);
            if closed(end_us, late_ms) {
                late.push(LateRows { start_us, end_us, rows });
            }
        }
        Ok(late)
    }
}
