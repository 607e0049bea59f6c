//! What a batch adds to the open windows: the lanes are merged into them, and what they had becomes the delta.
//!
//! In two steps, each on several threads: what a lane has of a window becomes partials and sections of the delta; then every
//! table takes in its partials. A window with many groups has a table for each shard of its keys, so even one window alone
//! keeps all threads busy. Invariant: a table takes in its lanes in the order given, whichever thread does it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use datafusion_common::Result as DataFusionResult;

use super::closed::{Closing, Content};
use super::groups::{GroupTable, Partial};
use super::lane::Lane;
use super::query::WindowQuery;
use super::sessions::SessionTable;
use super::shard::{self, Shard};
use super::sharded::{MANY_GROUPS, SHARD_BITS, ShardedTable};
use super::table::{self, Table};
use super::{Delta, Error, Groups, SECTION_GROUPS, StateStore, Unit, Window, closed, file, query_of};

/// What the lanes have of each unit, in their order.
#[derive(Default)]
struct Parts {
    windows: BTreeMap<Unit, Vec<GroupTable>>,
    sessions: BTreeMap<Unit, Vec<Partial>>,
}

/// A window that the batch has rows for.
struct Touched {
    end_us: i64,
    stays_open: bool,
    stored_groups: u64,
    /// None: it is in files only.
    tables: Option<ShardedTable>,
}

/// What one lane has of a window.
struct LanePart {
    unit: Unit,
    lane: usize,
    table: GroupTable,
    end_us: i64,
    /// Whether it belongs into the delta.
    stays_open: bool,
    /// How fine it is to be cut.
    bits: u8,
}

/// What a lane has of a shard of a window.
struct Piece {
    unit: Unit,
    shard: Shard,
    lane: usize,
    partial: Partial,
    section: Option<file::Section>,
}

enum Task {
    Table { unit: Unit, number: usize, table: GroupTable, partials: Vec<Partial>, may_split: bool },
    Sessions { unit: Unit, window: Option<Window>, partials: Vec<Partial> },
}

enum Merged {
    Tables {
        unit: Unit,
        number: usize,
        /// In place of a table that has become large there are several.
        tables: Vec<GroupTable>,
        /// In update mode, the groups that the batch has touched.
        touched: Option<GroupTable>,
    },
    Sessions {
        unit: Unit,
        window: Window,
        sections: Vec<file::Section>,
        /// Those that end.
        closed: Partial,
    },
}

impl StateStore {
    /// Merges the lanes' partial aggregates in the order given, on up to `workers` threads, and gives the delta: the partials
    /// of those windows that stay open after `evict_ms`. A window that is in files only stays there: what the batch adds to it
    /// is in the delta. In update mode it is read back, for its results are wanted now; so are sessions, for what they become
    /// is only known where they are known.
    pub fn merge_lanes(&mut self, lanes: Vec<Lane>, evict_ms: i64, workers: usize) -> Result<Delta, Error> {
        self.clock += 1;
        let parts = self.parts(lanes, evict_ms)?;
        let wanted = parts.windows.keys().chain(parts.sessions.keys()).filter(|unit| {
            let wanted = self.queries.get(unit.query as usize).is_some_and(|q| q.updates() || q.is_session());
            wanted && self.open.get(unit).is_some_and(|w| matches!(w.groups, Groups::Stored(_)))
        });
        let wanted: BTreeSet<Unit> = wanted.copied().collect();
        self.read_back(wanted.into_iter().collect(), workers)?;

        let (mut touched, lane_parts) = self.touch(parts.windows, evict_ms)?;
        let queries = self.queries.clone();
        let cut = in_parallel(lane_parts, workers, |part| part.cut(&queries))?;
        let mut pieces: Vec<Piece> = cut.into_iter().flatten().collect();
        // All lanes are cut alike.
        pieces.sort_by_key(|piece| (piece.unit, piece.shard.prefix, piece.lane));
        let mut sections: BTreeMap<Unit, Vec<file::Section>> = BTreeMap::new();
        let mut partials: BTreeMap<(Unit, usize), Vec<Partial>> = BTreeMap::new();
        for Piece { unit, shard, partial, section, .. } in pieces {
            let number = touched.get(&unit).map_or(0, |window| shard.number(window.bits()));
            partials.entry((unit, number)).or_default().push(partial);
            sections.entry(unit).or_default().extend(section);
        }

        let mut tasks = Vec::new();
        for (unit, window) in &mut touched {
            let tables = window.tables.take().map(ShardedTable::into_tables);
            let Some(tables) = tables else { continue };
            let may_split = window.stays_open && tables.len() == 1;
            for (number, table) in tables.into_iter().enumerate() {
                let partials = partials.remove(&(*unit, number)).unwrap_or_default();
                tasks.push(Task::Table { unit: *unit, number, table, partials, may_split });
            }
        }
        for (unit, partials) in parts.sessions {
            tasks.push(Task::Sessions { unit, window: self.open.remove(&unit), partials });
        }
        let clock = self.clock;
        let mut merged = in_parallel(tasks, workers, |task| task.run(&queries, evict_ms, clock))?;
        merged.sort_by_key(Merged::order);

        let mut merged_tables: BTreeMap<Unit, Vec<GroupTable>> = BTreeMap::new();
        let mut ready: BTreeMap<Unit, Content> = BTreeMap::new();
        for merged in merged {
            match merged {
                Merged::Tables { unit, tables, touched: changed, .. } => {
                    merged_tables.entry(unit).or_default().extend(tables);
                    let Some(changed) = changed else { continue };
                    let end_us = query_of(&self.queries, unit)?.windowing().end(unit.key);
                    let content = ready.entry(unit).or_insert(Content::Resident { unit, end_us, tables: Vec::new() });
                    if let Content::Resident { tables, .. } = content {
                        tables.push(changed);
                    }
                }
                Merged::Sessions { unit, window, sections: changed, closed } => {
                    sections.insert(unit, changed);
                    if closed.groups > 0 {
                        ready.insert(unit, Content::Sessions { unit, partial: closed });
                    }
                    // Of a share there may be no sessions left.
                    if !matches!(&window.groups, Groups::Resident(table) if table.groups() == 0) {
                        self.open.insert(unit, window);
                    }
                }
            }
        }
        for (unit, Touched { end_us, stays_open, stored_groups, .. }) in touched {
            let groups = match merged_tables.remove(&unit) {
                Some(tables) => Groups::Resident(Table::Window(ShardedTable::of(tables))),
                None if stays_open => Groups::Stored(Vec::new()),
                None => Groups::Stored(partials.remove(&(unit, 0)).unwrap_or_default()),
            };
            self.open.insert(unit, Window { first_end_us: end_us, end_us, groups, touched: clock, stored_groups });
        }
        let closing = |content| Closing { queries: queries.clone(), content };
        self.ready = ready.into_values().map(closing).collect();
        self.closed_ms = evict_ms;
        let mut builder = file::Builder::new();
        sections.values().flatten().for_each(|section| builder.push(section));
        Ok(builder.finish(&self.numbers()))
    }

    /// Takes the windows out that the lanes have something of.
    fn touch(
        &mut self,
        lanes: BTreeMap<Unit, Vec<GroupTable>>,
        evict_ms: i64,
    ) -> Result<(BTreeMap<Unit, Touched>, Vec<LanePart>), Error> {
        let mut touched = BTreeMap::new();
        let mut parts = Vec::new();
        for (unit, lanes) in lanes {
            let query = query_of(&self.queries, unit)?;
            let end_us = query.windowing().end(unit.key);
            let stays_open = !closed(end_us, evict_ms);
            let mut lanes = lanes.into_iter();
            let (tables, stored_groups) = match self.open.remove(&unit) {
                Some(Window { groups: Groups::Resident(Table::Sessions(_)), .. }) => return Err(Error::Panicked),
                Some(Window { groups: Groups::Resident(Table::Window(tables)), stored_groups, .. }) => {
                    (Some(tables), stored_groups)
                }
                Some(Window { groups: Groups::Stored(_), stored_groups, .. }) => (None, stored_groups),
                // What comes and goes within a batch begins as its first lane.
                None if !stays_open && !query.updates() => (lanes.next().map(ShardedTable::from), 0),
                None => (Some(ShardedTable::new(query).map_err(|e| query.error(&e))?), 0),
            };
            let window = Touched { end_us, stays_open, stored_groups, tables };
            let bits = window.bits_of_pieces(lanes.as_slice());
            let part = |(lane, table)| LanePart { unit, lane, table, end_us, stays_open, bits };
            parts.extend(lanes.enumerate().map(part));
            touched.insert(unit, window);
        }
        Ok((touched, parts))
    }

    /// What the lanes have, by unit; also shares with sessions that only close.
    fn parts(&self, lanes: Vec<Lane>, evict_ms: i64) -> Result<Parts, Error> {
        let mut parts = Parts::default();
        for lane in lanes {
            let (windows, sessions) = lane.into_parts();
            for (query, windows) in (0..).zip(windows) {
                for (key, table) in windows {
                    parts.windows.entry(Unit { query, key }).or_default().push(table);
                }
            }
            for ((query, lane), compiled) in (0..).zip(sessions).zip(self.queries.iter()) {
                let Some(lane) = lane else { continue };
                for (key, partial) in lane.into_partials(compiled).map_err(|e| compiled.error(&e))? {
                    parts.sessions.entry(Unit { query, key }).or_default().push(partial);
                }
            }
        }
        for (unit, _) in self.open.iter().filter(|(_, w)| closed(w.first_end_us, evict_ms)) {
            if query_of(&self.queries, *unit)?.is_session() {
                parts.sessions.entry(*unit).or_default();
            }
        }
        Ok(parts)
    }
}

impl Touched {
    /// How many bits of a key's hash tell which of its tables the key is in.
    fn bits(&self) -> u8 {
        self.tables.as_ref().map_or(0, ShardedTable::bits)
    }

    /// How fine all lanes are cut: for each of the tables, and so that sections do not become too large. Those of a large window
    /// that is in files only are cut like any large window's: whoever reads it a share at a time has to read less.
    fn bits_of_pieces(&self, lanes: &[GroupTable]) -> u8 {
        if !self.stays_open {
            return self.bits();
        }
        let groups = lanes.iter().map(GroupTable::groups).max().unwrap_or_default();
        let of_lanes = shard::extra_bits(Shard::WHOLE, groups as u64, SECTION_GROUPS);
        let is_large = self.tables.is_none() && self.stored_groups > MANY_GROUPS as u64;
        self.bits().max(of_lanes).max(if is_large { SHARD_BITS } else { 0 })
    }
}

impl LanePart {
    fn cut(self, queries: &[WindowQuery]) -> Result<Vec<Piece>, Error> {
        let LanePart { unit, lane, table, end_us, stays_open, bits } = self;
        let query = query_of(queries, unit)?;
        let cut = || shard::cut(query, table.into_partial(query)?, Shard::WHOLE, bits);
        let pieces = cut().map_err(|e| query.error(&e))?.into_iter().map(|(shard, partial)| {
            let encode = || file::Section::encode(query, unit, shard, end_us, &partial);
            let section = stays_open.then(encode).transpose()?;
            Ok(Piece { unit, shard, lane, partial, section })
        });
        pieces.collect()
    }
}

impl Task {
    fn run(self, queries: &[WindowQuery], evict_ms: i64, clock: u64) -> Result<Merged, Error> {
        match self {
            Task::Table { unit, number, mut table, partials, may_split } => {
                let query = query_of(queries, unit)?;
                let merge = || {
                    partials.iter().try_for_each(|partial| table.merge(query, partial))?;
                    let touched = query.updates() && !partials.is_empty();
                    let touched = touched.then(|| table.copy_of(query, &partials)).transpose()?;
                    let tables = match may_split {
                        true => ShardedTable::split_if_large(query, table)?.into_tables(),
                        false => vec![table],
                    };
                    DataFusionResult::Ok((tables, touched))
                };
                let (tables, touched) = merge().map_err(|e| query.error(&e))?;
                Ok(Merged::Tables { unit, number, tables, touched })
            }
            Task::Sessions { unit, window, partials } => {
                merge_sessions(query_of(queries, unit)?, unit, window, partials, evict_ms, clock)
            }
        }
    }
}

impl Merged {
    fn order(&self) -> (Unit, usize) {
        match self {
            Merged::Tables { unit, number, .. } => (*unit, *number),
            Merged::Sessions { unit, .. } => (*unit, 0),
        }
    }
}

/// A share of the sessions: the delta has those that the batch has touched, as they are now.
fn merge_sessions(
    query: &WindowQuery,
    unit: Unit,
    window: Option<Window>,
    partials: Vec<Partial>,
    evict_ms: i64,
    clock: u64,
) -> Result<Merged, Error> {
    let failed = |e| query.error(&e);
    let (mut table, stored_groups) = match window {
        None => (SessionTable::default(), 0),
        Some(Window { groups: Groups::Resident(Table::Sessions(table)), stored_groups, .. }) => (table, stored_groups),
        Some(_) => return Err(Error::Panicked),
    };
    for partial in &partials {
        table.merge(query, partial).map_err(failed)?;
    }
    let changed = table.changed(evict_ms).map_err(failed)?;
    let mut sections = Vec::new();
    if changed.groups > 0 {
        for (shard, partial) in shard::split(query, changed, Shard::WHOLE, SECTION_GROUPS).map_err(failed)? {
            let end_us = table::end_of(query, unit, &partial).map_err(failed)?;
            sections.push(file::Section::encode(query, unit, shard, end_us, &partial)?);
        }
    }
    let closed = table.close(evict_ms).map_err(failed)?;
    let table = Table::Sessions(table);
    let window = Window {
        first_end_us: table.first_end(query, unit),
        end_us: table.last_end(query, unit),
        groups: Groups::Resident(table),
        touched: clock,
        stored_groups,
    };
    Ok(Merged::Sessions { unit, window, sections, closed })
}

/// Runs every task on up to `workers` threads. The results come in no particular order.
pub(super) fn in_parallel<T: Send, R: Send>(
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
