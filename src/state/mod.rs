//! Open windows, their groups and accumulators; deltas and runs.
//!
//! Owns: [`WindowQuery`] (one `[[windows]]` entry, compiled), [`Lane`] (the partial aggregation of one partition of one
//! batch), [`StateStore`] (the open windows), the format of the files that make the state durable. Does not own: where
//! those files lie and which of them count ([`crate::checkpoint`]), when windows close ([`crate::window`]).
//!
//! Durable state is a log of mergeable partial aggregates: a batch is aggregated into partial states first, these are the
//! delta, and merging them is how the store advances. So recovery is the same merge, from files, in the same order, and
//! gives the same bits. Floats depend on that order: lanes are merged in the order given, never as they come in.

mod file;
mod groups;
mod lane;
mod late;
mod query;
#[cfg(test)]
mod spark_vectors;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{ArrayRef, AsArray, TimestampMicrosecondArray};
use arrow::record_batch::RecordBatch;

use crate::error::Kind;
use crate::transform::sql;
use crate::window::closed;
use groups::GroupTable;

pub use lane::Lane;
pub use late::LateRows;
pub use query::WindowQuery;

/// Rows of one batch that a closed window hands out.
const OUTPUT_ROWS: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("state file is damaged: {0}; restore it from a copy of the checkpoint")]
    Damaged(String),
    #[error(
        "state file was written for other windows (fingerprint {found:08x}, this configuration has {expected:08x}): size, \
         slide, start, time_zone, filter, group_by or aggregates of [[windows]] have changed; undo the change or start over with a new checkpoint"
    )]
    OtherQueries { found: u32, expected: u32 },
    #[error("window table {table}: {message}")]
    Aggregate { table: String, message: String },
    #[error("column {column} of the batch is not the event time: {found} instead of a timestamp in microseconds")]
    EventTime { column: usize, found: String },
    #[error("internal error: a thread that merges state panicked")]
    Panicked,
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Panicked => Kind::Transient,
            _ => Kind::Fatal,
        }
    }
}

/// The bytes of a state file.
#[derive(Debug)]
pub struct Delta {
    pub bytes: Vec<u8>,
    /// The latest end of its windows: a watermark beyond it makes the file superfluous. None: it holds nothing and need
    /// not be written.
    pub max_window_end_us: Option<i64>,
    pub groups: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueryStats {
    pub open_windows: u64,
    pub groups: u64,
    pub bytes: u64,
    /// Where its first open window ends: the next one to close.
    pub next_end_us: Option<i64>,
}

/// What is open, by query in the order of `[[windows]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub queries: Vec<QueryStats>,
}

/// The open windows of all queries. After an error it may be half advanced: drop it and recover.
pub struct StateStore {
    queries: Arc<[WindowQuery]>,
    /// By query: window start to groups.
    open: Vec<BTreeMap<i64, GroupTable>>,
}

/// One window that a batch touched, to be merged on some thread.
struct Task {
    query: usize,
    start_us: i64,
    table: Option<GroupTable>,
    lanes: Vec<GroupTable>,
}

struct Merged {
    query: usize,
    start_us: i64,
    table: GroupTable,
    /// One a lane, in their order; none if the window is about to close.
    sections: Vec<file::Section>,
}

impl StateStore {
    pub fn new(queries: Arc<[WindowQuery]>) -> Self {
        let open = queries.iter().map(|_| BTreeMap::new()).collect();
        StateStore { queries, open }
    }

    /// Merges the lanes' partial aggregates in the order given, windows in parallel on up to `workers` threads, and gives the
    /// delta: the partials of those windows that stay open after `evict_ms`.
    pub fn merge_lanes(&mut self, lanes: Vec<Lane>, evict_ms: i64, workers: usize) -> Result<Delta, Error> {
        let mut touched: BTreeMap<(usize, i64), Vec<GroupTable>> = BTreeMap::new();
        for lane in lanes {
            for (query, windows) in lane.into_windows().into_iter().enumerate() {
                for (start_us, table) in windows {
                    touched.entry((query, start_us)).or_default().push(table);
                }
            }
        }
        let mut tasks = Vec::with_capacity(touched.len());
        for ((query, start_us), lanes) in touched {
            let table = self.open.get_mut(query).and_then(|windows| windows.remove(&start_us));
            tasks.push(Task { query, start_us, table, lanes });
        }
        let queries = self.queries.clone();
        let mut merged = in_parallel(tasks, workers, |task| merge_window(&queries, task, evict_ms))?;
        merged.sort_by_key(|m| (m.query, m.start_us));
        let sections = merged.iter_mut().flat_map(|m| std::mem::take(&mut m.sections)).collect();
        for Merged { query, start_us, table, .. } in merged {
            if let Some(windows) = self.open.get_mut(query) {
                windows.insert(start_us, table);
            }
        }
        Ok(file::encode(&self.queries, sections))
    }

    /// Recovery: merges a state file, a delta or a run, read back. Windows that `evict_ms` has closed are passed over.
    pub fn apply(&mut self, file: &[u8], evict_ms: i64) -> Result<(), Error> {
        for section in file::sections(&self.queries, file)? {
            let Some(query) = self.queries.get(section.query) else { continue };
            if closed(query.windowing().end(section.start_us), evict_ms) {
                continue;
            }
            let partial = section.decode(query)?;
            let windows = self.open.get_mut(section.query).ok_or(Error::Panicked)?;
            let mut table = match windows.remove(&section.start_us) {
                Some(table) => table,
                None => GroupTable::new(query).map_err(|e| query.error(&e))?,
            };
            table.merge(query, &partial).map_err(|e| query.error(&e))?;
            windows.insert(section.start_us, table);
        }
        Ok(())
    }

    /// Removes and hands out the windows that `evict_ms` closes, by query and time.
    pub fn close(&mut self, evict_ms: i64) -> Vec<ClosedWindow> {
        let mut out = Vec::new();
        for (index, (query, windows)) in self.queries.iter().zip(&mut self.open).enumerate() {
            while let Some(first) = windows.first_entry() {
                if !closed(query.windowing().end(*first.key()), evict_ms) {
                    break;
                }
                let (start_us, table) = first.remove_entry();
                out.push(ClosedWindow { queries: self.queries.clone(), query: index, start_us, table });
            }
        }
        out
    }

    /// The complete open state as one file, a run, which replaces all files before it. The accumulators can only give their
    /// state away, so every window is taken out, encoded and merged back in; [`compact`] does the same from files, without
    /// touching the store of a running query.
    pub fn encode_run(&mut self) -> Result<Delta, Error> {
        let mut sections = Vec::new();
        for (index, (query, windows)) in self.queries.iter().zip(&mut self.open).enumerate() {
            for (start_us, table) in windows.iter_mut() {
                let fresh = GroupTable::new(query).map_err(|e| query.error(&e))?;
                let partial = std::mem::replace(table, fresh).into_partial(query).map_err(|e| query.error(&e))?;
                sections.push(file::Section::encode(query, index, *start_us, &partial)?);
                table.merge(query, &partial).map_err(|e| query.error(&e))?;
            }
        }
        Ok(file::encode(&self.queries, sections))
    }

    pub fn stats(&self) -> Stats {
        let of = |(query, windows): (&WindowQuery, &BTreeMap<i64, GroupTable>)| QueryStats {
            open_windows: windows.len() as u64,
            groups: windows.values().map(|t| t.groups() as u64).sum(),
            bytes: windows.values().map(|t| t.bytes() as u64).sum(),
            next_end_us: windows.keys().next().map(|start| query.windowing().end(*start)),
        };
        Stats { queries: self.queries.iter().zip(&self.open).map(of).collect() }
    }
}

/// The windows in a state file, `[start, end)` by query, without reading their groups.
pub fn windows_of(queries: &[WindowQuery], file: &[u8]) -> Result<Vec<(usize, i64, i64)>, Error> {
    let sections = file::sections(queries, file)?.into_iter();
    let window = |section: file::SectionView<'_>| {
        let query = queries.get(section.query)?;
        Some((section.query, section.start_us, query.windowing().end(section.start_us)))
    };
    Ok(sections.filter_map(window).collect())
}

/// Merges state files, in the order in which they were written, into one run that replaces them.
pub fn compact(queries: Arc<[WindowQuery]>, files: &[&[u8]], evict_ms: i64) -> Result<Delta, Error> {
    let mut store = StateStore::new(queries);
    for file in files {
        store.apply(file, evict_ms)?;
    }
    store.encode_run()
}

fn merge_window(queries: &[WindowQuery], task: Task, evict_ms: i64) -> Result<Merged, Error> {
    let Task { query: index, start_us, mut table, lanes } = task;
    let query = queries.get(index).ok_or(Error::Panicked)?;
    let stays_open = !closed(query.windowing().end(start_us), evict_ms);
    let mut sections = Vec::new();
    for lane in lanes {
        if table.is_none() && !stays_open {
            table = Some(lane);
            continue;
        }
        let partial = lane.into_partial(query).map_err(|e| query.error(&e))?;
        if stays_open {
            sections.push(file::Section::encode(query, index, start_us, &partial)?);
        }
        let into = match table.take() {
            Some(table) => table,
            None => GroupTable::new(query).map_err(|e| query.error(&e))?,
        };
        table.insert(into).merge(query, &partial).map_err(|e| query.error(&e))?;
    }
    let table = table.ok_or(Error::Panicked)?;
    Ok(Merged { query: index, start_us, table, sections })
}

/// Runs every task on up to `workers` threads. The results come in no particular order.
fn in_parallel<T: Send, R: Send>(
    tasks: Vec<T>,
    workers: usize,
    run: impl Fn(T) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    let threads = workers.min(tasks.len());
    if threads <= 1 {
        return tasks.into_iter().map(run).collect();
    }
    let queue = Mutex::new(tasks.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || std::iter::from_fn(next).map(&run).collect::<Result<Vec<R>, Error>>();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut results = Vec::new();
        for thread in threads {
            results.extend(thread.join().map_err(|_| Error::Panicked)??);
        }
        Ok(results)
    })
}

/// A window that the watermark has passed: ready to become rows.
pub struct ClosedWindow {
    queries: Arc<[WindowQuery]>,
    query: usize,
    start_us: i64,
    table: GroupTable,
}

impl ClosedWindow {
    /// Index of the query in `[[windows]]`.
    pub fn query(&self) -> usize {
        self.query
    }

    pub fn start_us(&self) -> i64 {
        self.start_us
    }

    pub fn end_us(&self) -> i64 {
        self.queries.get(self.query).map_or(i64::MAX, |q| q.windowing().end(self.start_us))
    }

    pub fn groups(&self) -> usize {
        self.table.groups()
    }

    /// The rows of the window, in batches of at most 64 Ki, and the number of groups in which the sum of integers did not
    /// fit into 64 bits: these sums are null.
    pub fn evaluate(self) -> Result<(Vec<RecordBatch>, u64), Error> {
        let end_us = self.end_us();
        let query = self.queries.get(self.query).ok_or(Error::Panicked)?;
        let rows = self.table.groups();
        let (values, overflowed) = self.table.evaluate(query).map_err(|e| query.error(&e))?;
        let mut batches = Vec::with_capacity(rows.div_ceil(OUTPUT_ROWS));
        for offset in (0..rows).step_by(OUTPUT_ROWS) {
            let len = OUTPUT_ROWS.min(rows - offset);
            let mut columns: Vec<ArrayRef> = Vec::with_capacity(values.len() + 2);
            for bound in [self.start_us, end_us] {
                let array = TimestampMicrosecondArray::from_value(bound, len);
                columns.push(Arc::new(array.with_timezone_opt(query.time_zone())));
            }
            columns.extend(values.iter().map(|v| v.slice(offset, len)));
            let batch = sql::batch_of(query.output_schema(), columns, len).map_err(|e| query.error(&e.into()))?;
            batches.push(batch);
        }
        Ok((batches, overflowed))
    }
}

/// A decimal(38, 0) column of sums as int64; null and counted where it does not fit.
fn narrow_sums(sums: &ArrayRef, overflowed: &mut [bool]) -> ArrayRef {
    let sums = sums.as_primitive::<arrow::datatypes::Decimal128Type>();
    let narrow = sums.iter().enumerate().map(|(group, sum)| {
        let sum = sum?;
        let narrow = i64::try_from(sum).ok();
        if narrow.is_none()
            && let Some(flag) = overflowed.get_mut(group)
        {
            *flag = true;
        }
        narrow
    });
    Arc::new(narrow.collect::<arrow::array::Int64Array>())
}
