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
mod merge;
mod numbers;
mod query;
mod residence;
mod session_lane;
mod sessions;
mod shard;
mod sharded;
#[cfg(test)]
mod spark_vectors;
mod stored;
#[cfg(test)]
mod stored_tests;
mod table;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_aggregates;
#[cfg(test)]
mod tests_sessions;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::checkpoint::StateFile;
use crate::error::Kind;
use crate::window::closed;
use closed::{Content, StoredWindow};
use groups::Partial;
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
                    content: Content::Resident { unit, end_us, tables: table.into_tables() },
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
