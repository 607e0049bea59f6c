//! Windows that the watermark has passed, on their way to becoming rows.
//!
//! Owns: reading windows back that are in files only, in pieces of bounded size. Does not own: when a window closes.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, TimestampMicrosecondArray};
use arrow::compute::{max, min};
use arrow::record_batch::RecordBatch;
use datafusion_common::Result as DataFusionResult;

use super::aggregate::Finished;
use super::groups::{Accumulators, GroupTable, Partial};
use super::query::WindowQuery;
use super::sessions::bounds;
use super::shard::Shard;
use super::stored::{self, LiveFile, Reader, Span};
use super::table::Table;
use super::{Error, Unit, query_of};
use crate::transform::sql;

/// Rows of one batch that a closed window hands out.
const OUTPUT_ROWS: usize = 64 * 1024;

/// Closed windows that are handed out together: one that is in memory, or neighbours that are in files.
pub struct Closing {
    pub(super) queries: Arc<[WindowQuery]>,
    pub(super) content: Content,
}

pub(super) enum Content {
    /// The tables have no groups in common.
    Resident {
        unit: Unit,
        end_us: i64,
        tables: Vec<GroupTable>,
    },
    Sessions {
        unit: Unit,
        partial: Partial,
    },
    Stored(Stored),
}

pub(super) struct Stored {
    pub reader: Reader,
    pub files: Arc<Vec<LiveFile>>,
    /// One or more of one query, in order.
    pub windows: Vec<StoredWindow>,
    /// What the files have of them.
    pub bytes: u64,
    /// How much of it is read at once.
    pub share: u64,
}

pub(super) struct StoredWindow {
    pub unit: Unit,
    pub end_us: i64,
    /// What this batch adds, by lane.
    pub lanes: Vec<Partial>,
}

impl Closing {
    /// Gives the windows one after another. A window larger than what may be read at once comes in several pieces, each with
    /// groups of its own.
    pub fn windows<E: From<Error>>(self, mut each: impl FnMut(ClosedWindow) -> Result<(), E>) -> Result<(), E> {
        let Closing { queries, content } = self;
        let stored = match content {
            Content::Stored(stored) => stored,
            Content::Resident { unit, end_us, tables } => {
                let mut tables = tables.into_iter().filter(|table| table.groups() > 0);
                return tables.try_for_each(|table| {
                    each(ClosedWindow { queries: queries.clone(), unit, rows: Rows::Window { end_us, table } })
                });
            }
            Content::Sessions { unit, partial } => {
                return each(ClosedWindow { queries, unit, rows: Rows::Sessions(partial) });
            }
        };
        let units: Vec<Unit> = stored.windows.iter().map(|w| w.unit).collect();
        let share = if units.len() > 1 { u64::MAX } else { stored.share };
        for shard in Shard::split(stored.bytes, share) {
            let mut fetched = stored.reader.fetch(&queries, &stored.files, &Span { units: units.clone(), shard })?;
            for window in &stored.windows {
                let unit = window.unit;
                let query = query_of(&queries, unit)?;
                let mut table = Table::new(query).map_err(|e| query.error(&e))?;
                stored::merge(query, &mut table, &fetched.remove(&unit).unwrap_or_default(), shard)?;
                let Table::Window(mut table) = table else { continue };
                for lane in &window.lanes {
                    let partial = stored::filter(query, lane.clone(), shard)?;
                    table.merge(query, &partial).map_err(|e| query.error(&e))?;
                }
                for table in table.into_tables().into_iter().filter(|table| table.groups() > 0) {
                    let rows = Rows::Window { end_us: window.end_us, table };
                    each(ClosedWindow { queries: queries.clone(), unit, rows })?;
                }
            }
        }
        Ok(())
    }
}

/// A window that the watermark has passed, or a piece of it, or several sessions: ready to become rows.
pub struct ClosedWindow {
    queries: Arc<[WindowQuery]>,
    unit: Unit,
    rows: Rows,
}

enum Rows {
    Window { end_us: i64, table: GroupTable },
    Sessions(Partial),
}

impl ClosedWindow {
    /// Index of the query in `[[windows]]`.
    pub fn query(&self) -> usize {
        self.unit.query as usize
    }

    /// Of several sessions, of the first one.
    pub fn start_us(&self) -> i64 {
        match &self.rows {
            Rows::Window { .. } => self.unit.key,
            Rows::Sessions(partial) => self.session_bounds(partial).and_then(|b| min(b.0)).unwrap_or(i64::MIN),
        }
    }

    /// Of several sessions, of the last one.
    pub fn end_us(&self) -> i64 {
        match &self.rows {
            Rows::Window { end_us, .. } => *end_us,
            Rows::Sessions(partial) => self.session_bounds(partial).and_then(|b| max(b.1)).unwrap_or(i64::MAX),
        }
    }

    fn session_bounds<'a>(&self, partial: &'a Partial) -> Option<(&'a Int64Array, &'a Int64Array)> {
        bounds(query_of(&self.queries, self.unit).ok()?, partial).ok()
    }

    pub fn groups(&self) -> usize {
        match &self.rows {
            Rows::Window { table, .. } => table.groups(),
            Rows::Sessions(partial) => partial.groups,
        }
    }

    /// The rows of the window, in batches of at most 64 Ki, and how many of their values are null because they could not be
    /// computed: a sum that does not fit its type, an expression over aggregates that fails.
    pub fn evaluate(self) -> Result<(Vec<RecordBatch>, u64), Error> {
        let query = query_of(&self.queries, self.unit)?;
        let rows = self.groups();
        let (starts, ends, finished) = self.rows.evaluate(query, self.unit).map_err(|e| query.error(&e))?;
        let mut batches = Vec::with_capacity(rows.div_ceil(OUTPUT_ROWS));
        for offset in (0..rows).step_by(OUTPUT_ROWS) {
            let len = OUTPUT_ROWS.min(rows - offset);
            let mut columns: Vec<ArrayRef> = Vec::with_capacity(finished.columns.len() + 2);
            for bounds in [&starts, &ends] {
                columns.push(Arc::new(bounds.slice(offset, len).with_timezone_opt(query.time_zone())));
            }
            columns.extend(finished.columns.iter().map(|v| v.slice(offset, len)));
            let batch = sql::batch_of(query.output_schema(), columns, len).map_err(|e| query.error(&e.into()))?;
            batches.push(batch);
        }
        Ok((batches, finished.failed))
    }
}

impl Rows {
    /// Starts, ends, keys and values.
    fn evaluate(
        self,
        query: &WindowQuery,
        unit: Unit,
    ) -> DataFusionResult<(TimestampMicrosecondArray, TimestampMicrosecondArray, Finished)> {
        match self {
            Rows::Window { end_us, table } => {
                let groups = table.groups();
                let finished = table.evaluate(query)?;
                let bound = |us| TimestampMicrosecondArray::from_value(us, groups);
                Ok((bound(unit.key), bound(end_us), finished))
            }
            Rows::Sessions(partial) => {
                let (starts, ends) = bounds(query, &partial)?;
                let keys = partial.keys.iter().take(query.key_schema().fields().len()).cloned().collect();
                let mut accumulators = Accumulators::new(query)?;
                let groups: Vec<usize> = (0..partial.groups).collect();
                accumulators.merge(query, &partial.states, &groups, partial.groups)?;
                let finished = accumulators.evaluate(query, keys, partial.groups)?;
                Ok((starts.reinterpret_cast(), ends.reinterpret_cast(), finished))
            }
        }
    }
}
