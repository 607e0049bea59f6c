//! Open windows, their groups and accumulators; deltas and runs.
//!
//! Owns: [`WindowQuery`] (one `[[windows]]` entry, compiled), [`Lane`] (the partial aggregation of one partition of one
//! batch), [`StateStore`] (the open windows), the format of the files that make the state durable, which of the windows are in
//! memory ([`residence`]), [`Compaction`] of the files. Does not own: where those files lie and which of them count
//! ([`crate::checkpoint`]), when windows close ([`crate::window`]).
//!
//! Durable state is a log of mergeable partial aggregates: a batch is aggregated into partial states first, these are the
//! delta, and merging them is how the store advances. So reading back is the same merge, from files, in the same order, and
//! gives the same bits, whether at recovery or for a window that has left memory. Floats depend on that order: lanes are
//! merged in the order given, never as they come in, and compaction only ever merges the oldest files.

mod aggregate;
mod closed;
mod compaction;
mod file;
mod groups;
mod lane;
mod late;
mod numbers;
mod query;
mod residence;
mod session_lane;
mod sessions;
mod shard;
#[cfg(test)]
mod spark_vectors;
mod stored;
#[cfg(test)]
mod stored_tests;
mod table;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_aggregates;
#[cfg(test)]
mod tests_sessions;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::StateFile;
use crate::error::Kind;
use crate::window::closed;
use closed::{Content, StoredWindow};
use groups::{GroupTable, Partial};
use sessions::SessionTable;
use shard::Shard;
use table::Table;

pub use closed::{ClosedWindow, Closing};
pub use compaction::{Compacted, Compaction};
pub use lane::Lane;
pub use late::LateRows;
pub use numbers::Numbers;
pub use query::{REVISION, WindowQuery};
pub use residence::first_sessions;
pub use stored::{LiveFile, Reader, StoredWindowStats, open_windows};

/// A partial of more groups is split by a hash of the key when it is written. Tests have few groups and split nevertheless.
const SECTION_GROUPS: u64 = if cfg!(test) { 16 } else { 16 * 1024 };

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("state file {file} is damaged: {problem}; restore it from a copy of the checkpoint")]
    Damaged { file: String, problem: String },
    #[error("window table {table}: its state cannot be read, though its checksum is right: {what}; report this")]
    Undecodable { table: String, what: String },
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    #[error("window table {table}: {message}")]
    Aggregate { table: String, message: String },
    #[error("column {column} of the batch is not the event time: {found} instead of a timestamp in microseconds")]
    EventTime { column: usize, found: String },
    #[error("internal error: a thread that merges state panicked")]
    Panicked,
    #[error("failpoint {0}")]
    Failpoint(&'static str),
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Panicked | Error::Failpoint(_) => Kind::Transient,
            Error::Checkpoint(e) => e.kind(),
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
    index: Arc<file::Index>,
}

impl Delta {
    /// By which the commit log knows the file.
    pub fn crc32(&self) -> u32 {
        self.index.crc32
    }

    /// Where the windows keep the numbers of a new store.
    pub fn groups_of(&self, query: usize) -> u64 {
        self.index.entries.iter().filter(|entry| entry.unit.query as usize == query).map(|entry| entry.groups).sum()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueryStats {
    pub open_windows: u64,
    /// Of the open windows, those that are in files only.
    pub stored_windows: u64,
    /// At most: a group of a window that is in files only counts once for every file that has some of it.
    pub groups: u64,
    /// In memory.
    pub bytes: u64,
    /// In update mode, groups that the last batch let go with the windows that it closed; at most, as `groups`.
    pub evicted: u64,
    /// Where its first open window ends: the next one to close.
    pub next_end_us: Option<i64>,
}

/// What is open, by query in the order of `[[windows]]`, and the files that hold it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub queries: Vec<QueryStats>,
    pub files: u64,
    pub file_bytes: u64,
}

/// What comes into memory and leaves it as a whole: a window of a query, by its start, or the sessions of a share of the keys,
/// by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unit {
    query: u32,
    key: i64,
}

impl Unit {
    fn show(self, query: &WindowQuery) -> String {
        if query.is_session() {
            return format!("share {} of the sessions of table {}", self.key, query.table());
        }
        let start = jiff::Timestamp::from_microsecond(self.key);
        let start = start.map_or_else(|_| format!("{} µs", self.key), |t| t.to_string());
        format!("the window {start} of table {}", query.table())
    }
}

fn query_of(queries: &[WindowQuery], unit: Unit) -> Result<&WindowQuery, Error> {
    queries.get(unit.query as usize).ok_or(Error::Panicked)
}

/// The open windows of all queries. After an error it may be half advanced: drop it and recover.
pub struct StateStore {
    queries: Arc<[WindowQuery]>,
    open: BTreeMap<Unit, Window>,
    /// All files that make up the state, in the order in which they merge: runs, then deltas.
    files: Arc<Vec<LiveFile>>,
    /// None: everything stays in memory.
    residence: Option<residence::Residence>,
    /// Counts batches, to know which windows were touched longest ago.
    clock: u64,
    /// For [`StateStore::close`] to hand out: what the batch in hand has touched of the queries in update mode, and the sessions
    /// that end with it.
    ready: Vec<Closing>,
    /// By query in update mode: groups that the last batch let go.
    evicted: BTreeMap<u32, u64>,
    /// What ended by it has been handed out, though files may still have it.
    closed_ms: i64,
}

struct Window {
    /// When something of it closes first; before that, for sessions that are in files only and have not been read yet.
    first_end_us: i64,
    /// When all of it is closed.
    end_us: i64,
    groups: Groups,
    /// When a batch last had rows for it.
    touched: u64,
    /// How many groups the files have of it, at most.
    stored_groups: u64,
}

enum Groups {
    Resident(Table),
    /// In files only, but for what the batch in hand adds where the window closes with it.
    Stored(Vec<Partial>),
}

/// One window that a batch touched, to be merged on some thread.
struct Task {
    unit: Unit,
    end_us: i64,
    /// What there is of it already; None: it is new.
    window: Option<Window>,
    lanes: Vec<LanePart>,
}

/// What a lane has of a unit.
enum LanePart {
    Window(GroupTable),
    Sessions(Partial),
}

struct Merged {
    unit: Unit,
    window: Window,
    /// By lane, in their order; none if the window is about to close.
    sections: Vec<file::Section>,
    /// What is to be handed out now.
    ready: Option<Content>,
}

impl StateStore {
    /// Empty, without files: everything stays in memory. A running query begins with [`StateStore::recover`].
    pub fn new(queries: Arc<[WindowQuery]>) -> Self {
        StateStore {
            queries,
            open: BTreeMap::new(),
            files: Arc::default(),
            residence: None,
            clock: 0,
            ready: Vec::new(),
            evicted: BTreeMap::new(),
            closed_ms: i64::MIN / 1000,
        }
    }

    /// Merges the lanes' partial aggregates in the order given, windows in parallel on up to `workers` threads, and gives the
    /// delta: the partials of those windows that stay open after `evict_ms`. A window that is in files only stays there: what
    /// the batch adds to it is in the delta. In update mode it is read back, for its results are wanted now; so are sessions,
    /// for what they become is only known where they are known.
    pub fn merge_lanes(&mut self, lanes: Vec<Lane>, evict_ms: i64, workers: usize) -> Result<Delta, Error> {
        self.clock += 1;
        let mut touched: BTreeMap<Unit, Vec<LanePart>> = BTreeMap::new();
        for lane in lanes {
            let (windows, sessions) = lane.into_parts();
            for (query, windows) in (0..).zip(windows) {
                for (key, table) in windows {
                    touched.entry(Unit { query, key }).or_default().push(LanePart::Window(table));
                }
            }
            for ((query, lane), compiled) in (0..).zip(sessions).zip(self.queries.iter()) {
                let Some(lane) = lane else { continue };
                for (key, partial) in lane.into_partials(compiled).map_err(|e| compiled.error(&e))? {
                    touched.entry(Unit { query, key }).or_default().push(LanePart::Sessions(partial));
                }
            }
        }
        for (unit, _) in self.open.iter().filter(|(_, w)| closed(w.first_end_us, evict_ms)) {
            if query_of(&self.queries, *unit)?.is_session() {
                touched.entry(*unit).or_default();
            }
        }
        let wanted = touched.keys().filter(|unit| {
            let wanted = self.queries.get(unit.query as usize).is_some_and(|q| q.updates() || q.is_session());
            wanted && self.open.get(unit).is_some_and(|w| matches!(w.groups, Groups::Stored(_)))
        });
        self.read_back(wanted.copied().collect(), workers)?;
        let mut tasks = Vec::with_capacity(touched.len());
        for (unit, lanes) in touched {
            let end_us = query_of(&self.queries, unit)?.windowing().end(unit.key);
            tasks.push(Task { unit, end_us, window: self.open.remove(&unit), lanes });
        }
        let (queries, clock) = (self.queries.clone(), self.clock);
        let mut merged = in_parallel(tasks, workers, |task| merge_window(&queries, task, evict_ms, clock))?;
        merged.sort_by_key(|m| m.unit);
        let mut builder = file::Builder::new();
        self.ready.clear();
        for Merged { unit, window, sections, ready } in merged {
            sections.iter().for_each(|section| builder.push(section));
            self.ready.extend(ready.map(|content| Closing { queries: self.queries.clone(), content }));
            // Of a share there may be no sessions left.
            if !matches!(&window.groups, Groups::Resident(table) if table.groups() == 0) {
                self.open.insert(unit, window);
            }
        }
        self.closed_ms = evict_ms;
        Ok(builder.finish(&self.numbers()))
    }

    fn numbers(&self) -> Numbers {
        self.residence.as_ref().map(|r| r.reader.numbers().clone()).unwrap_or_default()
    }

    /// Removes the windows that `evict_ms` closes and hands them out, by query and time. Of a query in update mode it hands out
    /// what the batch has touched instead: all that there is to a window has been handed out when it closes.
    pub fn close(&mut self, evict_ms: i64) -> Vec<Closing> {
        let is_session = |unit: &Unit| self.queries.get(unit.query as usize).is_some_and(WindowQuery::is_session);
        let done = self.open.iter().filter(|(unit, w)| closed(w.end_us, evict_ms) && !is_session(unit));
        let done: Vec<Unit> = done.map(|(unit, _)| *unit).collect();
        let mut closing = std::mem::take(&mut self.ready);
        self.evicted.clear();
        let mut stored: BTreeMap<Unit, StoredWindow> = BTreeMap::new();
        for unit in done {
            let Some(Window { end_us, groups, stored_groups, .. }) = self.open.remove(&unit) else { continue };
            if self.queries.get(unit.query as usize).is_some_and(WindowQuery::updates) {
                *self.evicted.entry(unit.query).or_default() += match groups {
                    Groups::Resident(table) => table.groups() as u64,
                    Groups::Stored(_) => stored_groups,
                };
                continue;
            }
            match groups {
                // They have been closed by the merge.
                Groups::Resident(Table::Sessions(_)) => {}
                Groups::Resident(Table::Window(table)) => closing.push(Closing {
                    queries: self.queries.clone(),
                    content: Content::Resident { unit, end_us, table },
                }),
                Groups::Stored(lanes) => drop(stored.insert(unit, StoredWindow { unit, end_us, lanes })),
            }
        }
        closing.extend(self.close_stored(stored));
        closing
    }

    /// The file now holds what the delta says. Call it once the file is durable, with every delta that has groups.
    pub fn add(&mut self, file: StateFile, delta: &Delta) {
        for entry in &delta.index.entries {
            if let Some(window) = self.open.get_mut(&entry.unit) {
                window.stored_groups += entry.groups;
            }
        }
        Arc::make_mut(&mut self.files).push(LiveFile { file, index: delta.index.clone() });
    }

    /// Forgets the files whose windows `evict_ms` has all closed.
    pub fn drop_superfluous(&mut self, evict_ms: i64) {
        let superfluous = |f: &LiveFile| f.file.max_window_end_us.is_some_and(|end| closed(end, evict_ms));
        if self.files.iter().any(superfluous) {
            Arc::make_mut(&mut self.files).retain(|f| !superfluous(f));
        }
    }

    /// The files that make up the state, as the commit log is to name them.
    pub fn files(&self) -> Vec<StateFile> {
        self.files.iter().map(|live| live.file.clone()).collect()
    }

    pub fn stats(&self) -> Stats {
        let mut queries = vec![QueryStats::default(); self.queries.len()];
        for (unit, window) in &self.open {
            let Some(stats) = queries.get_mut(unit.query as usize) else { continue };
            // Each session is a window.
            let sessions = self.queries.get(unit.query as usize).is_some_and(WindowQuery::is_session);
            stats.open_windows += match &window.groups {
                Groups::Resident(table) if sessions => table.groups() as u64,
                Groups::Stored(_) if sessions => window.stored_groups,
                _ => 1,
            };
            // Of sessions that are in files only it is not known until they are read.
            if window.first_end_us > i64::MIN {
                let end = window.first_end_us;
                stats.next_end_us = Some(stats.next_end_us.map_or(end, |next| next.min(end)));
            }
            match &window.groups {
                Groups::Resident(table) => {
                    stats.groups += table.groups() as u64;
                    stats.bytes += table.bytes() as u64;
                }
                Groups::Stored(_) => {
                    stats.groups += window.stored_groups;
                    stats.stored_windows += if sessions { window.stored_groups } else { 1 };
                }
            }
        }
        for (query, evicted) in &self.evicted {
            if let Some(stats) = queries.get_mut(*query as usize) {
                stats.evicted = *evicted;
            }
        }
        let file_bytes = self.files.iter().map(|live| live.file.bytes).sum();
        Stats { queries, files: self.files.len() as u64, file_bytes }
    }
}

fn merge_window(queries: &[WindowQuery], task: Task, evict_ms: i64, clock: u64) -> Result<Merged, Error> {
    let Task { unit, end_us, window, lanes } = task;
    let query = query_of(queries, unit)?;
    if query.is_session() {
        return merge_sessions(query, unit, window, lanes, evict_ms, clock);
    }
    let stays_open = !closed(end_us, evict_ms);
    let (mut table, mut stored, stored_groups) = match window {
        None => (None, None, 0),
        Some(Window { groups: Groups::Resident(Table::Sessions(_)), .. }) => return Err(Error::Panicked),
        Some(Window { groups: Groups::Resident(Table::Window(table)), stored_groups, .. }) => {
            (Some(table), None, stored_groups)
        }
        Some(Window { groups: Groups::Stored(_), stored_groups, .. }) => (None, Some(Vec::new()), stored_groups),
    };
    let mut sections = Vec::new();
    let mut touched = Vec::new();
    for lane in lanes {
        let LanePart::Window(lane) = lane else { return Err(Error::Panicked) };
        if table.is_none() && stored.is_none() && !stays_open && !query.updates() {
            table = Some(lane);
            continue;
        }
        let partial = lane.into_partial(query).map_err(|e| query.error(&e))?;
        if query.updates() {
            touched.push((partial.groups, partial.keys.clone()));
        }
        match &mut stored {
            Some(lanes) if !stays_open => lanes.push(partial.clone()),
            Some(_) => {}
            None => {
                let into = match table.take() {
                    Some(table) => table,
                    None => GroupTable::new(query).map_err(|e| query.error(&e))?,
                };
                table.insert(into).merge(query, &partial).map_err(|e| query.error(&e))?;
            }
        }
        if stays_open {
            for (shard, partial) in
                shard::split(query, partial, Shard::WHOLE, SECTION_GROUPS).map_err(|e| query.error(&e))?
            {
                sections.push(file::Section::encode(query, unit, shard, end_us, &partial)?);
            }
        }
    }
    let ready = match &mut table {
        Some(table) if query.updates() => {
            let table = table.copy_of(query, &touched).map_err(|e| query.error(&e))?;
            Some(Content::Resident { unit, end_us, table })
        }
        _ => None,
    };
    let groups = match stored {
        Some(lanes) => Groups::Stored(lanes),
        None => Groups::Resident(Table::Window(table.ok_or(Error::Panicked)?)),
    };
    let window = Window { first_end_us: end_us, end_us, groups, touched: clock, stored_groups };
    Ok(Merged { unit, window, sections, ready })
}

/// A share of the sessions: the delta has those that the batch has touched, as they are now.
fn merge_sessions(
    query: &WindowQuery,
    unit: Unit,
    window: Option<Window>,
    lanes: Vec<LanePart>,
    evict_ms: i64,
    clock: u64,
) -> Result<Merged, Error> {
    let failed = |e| query.error(&e);
    let (mut table, stored_groups) = match window {
        None => (SessionTable::default(), 0),
        Some(Window { groups: Groups::Resident(Table::Sessions(table)), stored_groups, .. }) => (table, stored_groups),
        Some(_) => return Err(Error::Panicked),
    };
    for lane in lanes {
        let LanePart::Sessions(partial) = lane else { return Err(Error::Panicked) };
        table.merge(query, &partial).map_err(failed)?;
    }
    let changed = table.changed(evict_ms).map_err(failed)?;
    let mut sections = Vec::new();
    if changed.groups > 0 {
        for (shard, partial) in shard::split(query, changed, Shard::WHOLE, SECTION_GROUPS).map_err(failed)? {
            let end_us = table::end_of(query, unit, &partial).map_err(failed)?;
            sections.push(file::Section::encode(query, unit, shard, end_us, &partial)?);
        }
    }
    let partial = table.close(evict_ms).map_err(failed)?;
    let ready = (partial.groups > 0).then_some(Content::Sessions { unit, partial });
    let table = Table::Sessions(table);
    let window = Window {
        first_end_us: table.first_end(query, unit),
        end_us: table.last_end(query, unit),
        groups: Groups::Resident(table),
        touched: clock,
        stored_groups,
    };
    Ok(Merged { unit, window, sections, ready })
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
