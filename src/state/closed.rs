//! Windows that the watermark has passed, on their way to becoming rows.
//!
//! Owns: reading windows back that are in files only, in pieces of bounded size. Does not own: when a window closes.

use std::sync::Arc;

use arrow::array::{ArrayRef, TimestampMicrosecondArray};
use arrow::record_batch::RecordBatch;

use super::groups::{GroupTable, Partial};
use super::query::WindowQuery;
use super::shard::Shard;
use super::stored::{self, LiveFile, Reader, Span};
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
    Resident { unit: Unit, end_us: i64, table: GroupTable },
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
            Content::Resident { unit, end_us, table } => return each(ClosedWindow { queries, unit, end_us, table }),
        };
        let units: Vec<Unit> = stored.windows.iter().map(|w| w.unit).collect();
        let share = if units.len() > 1 { u64::MAX } else { stored.share };
        for shard in Shard::split(stored.bytes, share) {
            let mut fetched = stored.reader.fetch(&queries, &stored.files, &Span { units: units.clone(), shard })?;
            for window in &stored.windows {
                let unit = window.unit;
                let query = query_of(&queries, unit)?;
                let mut table = GroupTable::new(query).map_err(|e| query.error(&e))?;
                stored::merge(query, &mut table, &fetched.remove(&unit).unwrap_or_default(), shard)?;
                for lane in &window.lanes {
                    let partial = stored::filter(query, lane.clone(), shard)?;
                    table.merge(query, &partial).map_err(|e| query.error(&e))?;
                }
                if table.groups() > 0 {
                    each(ClosedWindow { queries: queries.clone(), unit, end_us: window.end_us, table })?;
                }
            }
        }
        Ok(())
    }
}

/// A window that the watermark has passed, or a piece of it: ready to become rows.
pub struct ClosedWindow {
    queries: Arc<[WindowQuery]>,
    unit: Unit,
    end_us: i64,
    table: GroupTable,
}

impl ClosedWindow {
    /// Index of the query in `[[windows]]`.
    pub fn query(&self) -> usize {
        self.unit.query as usize
    }

    pub fn start_us(&self) -> i64 {
        self.unit.key
    }

    pub fn end_us(&self) -> i64 {
        self.end_us
    }

    pub fn groups(&self) -> usize {
        self.table.groups()
    }

    /// The rows of the window, in batches of at most 64 Ki, and how many of their values are null because they could not be
    /// computed: a sum that does not fit its type, an expression over aggregates that fails.
    pub fn evaluate(self) -> Result<(Vec<RecordBatch>, u64), Error> {
        let query = query_of(&self.queries, self.unit)?;
        let rows = self.table.groups();
        let finished = self.table.evaluate(query).map_err(|e| query.error(&e))?;
        let mut batches = Vec::with_capacity(rows.div_ceil(OUTPUT_ROWS));
        for offset in (0..rows).step_by(OUTPUT_ROWS) {
            let len = OUTPUT_ROWS.min(rows - offset);
            let mut columns: Vec<ArrayRef> = Vec::with_capacity(finished.columns.len() + 2);
            for bound in [self.unit.key, self.end_us] {
                let array = TimestampMicrosecondArray::from_value(bound, len);
                columns.push(Arc::new(array.with_timezone_opt(query.time_zone())));
            }
            columns.extend(finished.columns.iter().map(|v| v.slice(offset, len)));
            let batch = sql::batch_of(query.output_schema(), columns, len).map_err(|e| query.error(&e.into()))?;
            batches.push(batch);
        }
        Ok((batches, finished.failed))
    }
}
