//! Which open windows are in memory.
//!
//! Every open window is in the files, which are the state; some are in memory as well, so that closing them needs no
//! reading. What is beyond `state.memory_budget` leaves memory after a batch, the windows touched longest ago first, and is
//! not missed until it closes: a batch that touches such a window only writes its delta. So there is nothing to write when a
//! window leaves and nothing to read when one is touched, and memory is bounded by the budget, one batch and what is read
//! at once. Does not own: the files. Invariant: what a window comes to does not depend on whether it was in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::closed::{Closing, Content, Stored, StoredWindow};
use super::merge::in_parallel;
use super::query::WindowQuery;
use super::shard::Shard;
use super::sharded::ShardedTable;
use super::stored::{self, Extent, LiveFile, Reader, Span};
use super::table::Table;
use super::{Error, Groups, StateStore, Unit, Window, query_of};
use crate::checkpoint::StateFile;
use crate::failpoint;

/// A group takes more in memory than in a file: a slot in a hash table, room to grow. For planning only; what is held is
/// measured.
const MEMORY_PER_FILE_BYTE: u64 = 3;

/// At most so much is read from files at once, by each thread.
const SHARE_BYTES: u64 = 32 << 20;

pub(super) struct Residence {
    pub reader: Reader,
    pub budget_bytes: u64,
    /// How much is read from files at once, by each of the threads that read: little against the budget.
    pub share: u64,
}

impl StateStore {
    /// The state that the files make up, without the windows that `evict_ms` has closed. As many windows as the budget allows
    /// come into memory, those touched last first. Blocks.
    pub fn recover(
        queries: Arc<[WindowQuery]>,
        reader: Reader,
        files: &[StateFile],
        evict_ms: i64,
        budget_bytes: u64,
        workers: usize,
    ) -> Result<StateStore, Error> {
        let files = reader.block_on(reader.open(files))?;
        let residence = Residence { reader, budget_bytes, share: (budget_bytes / 32).clamp(1 << 20, SHARE_BYTES) };
        let extents = stored::extents(&files, evict_ms);
        let is_session = |unit: &Unit| queries.get(unit.query as usize).is_some_and(WindowQuery::is_session);
        let window = |unit: &Unit, extent: &Extent| Window {
            // When the first session ends, only reading them tells.
            first_end_us: if is_session(unit) { i64::MIN } else { extent.end_us },
            end_us: extent.end_us,
            groups: Groups::Stored(Vec::new()),
            touched: extent.last_file as u64,
            stored_groups: extent.groups,
        };
        let mut store = StateStore {
            open: extents.iter().map(|(unit, extent)| (*unit, window(unit, extent))).collect(),
            clock: files.len() as u64,
            files: Arc::new(files),
            residence: None,
            queries,
            ready: Vec::new(),
            evicted: BTreeMap::new(),
            closed_ms: evict_ms,
        };
        let mut wanted: Vec<(Unit, Extent)> = extents.into_iter().collect();
        wanted.sort_by_key(|(unit, e)| (std::cmp::Reverse(e.last_file), e.end_us, *unit));
        let mut held = 0;
        loop {
            // The files may have a group many times, so there may be room for more than was planned.
            let mut planned = held;
            let fits = wanted.iter().take_while(|(_, extent)| {
                planned += extent.bytes * MEMORY_PER_FILE_BYTE;
                planned <= budget_bytes
            });
            let mut chosen: Vec<(Unit, u64)> = fits.map(|(unit, extent)| (*unit, extent.bytes)).collect();
            if chosen.is_empty() {
                break;
            }
            wanted.drain(..chosen.len());
            chosen.sort();
            held += store.load(&residence, chosen, workers)?;
        }
        store.residence = Some(residence);
        store.shrink()?;
        Ok(store)
    }

    /// Brings windows into memory, which come in order with their bytes in files. Returns the memory they take.
    fn load(&mut self, residence: &Residence, units: Vec<(Unit, u64)>, workers: usize) -> Result<u64, Error> {
        let is_session = |unit: &Unit| self.queries.get(unit.query as usize).is_some_and(WindowQuery::is_session);
        let mut tasks: Vec<Vec<Span>> = Vec::new();
        for span in stored::spans(units, residence.share) {
            match tasks.last_mut() {
                // Of a window, every shard that is read at once has a table of its own; sessions have one table.
                Some(spans)
                    if spans.first().is_some_and(|s| s.shard.bits > 0 && s.units == span.units)
                        && span.units.iter().all(is_session) =>
                {
                    spans.push(span);
                }
                _ => tasks.push(vec![span]),
            }
        }
        let (queries, files) = (self.queries.clone(), self.files.clone());
        let loaded = in_parallel(tasks, workers, |spans| {
            let tables = read_tables(&queries, &residence.reader, &files, &spans)?;
            if failpoint::hit("state.recovery") {
                return Err(Error::Failpoint("state.recovery"));
            }
            let shard = spans.first().map_or(Shard::WHOLE, |span| span.shard);
            Ok(tables.into_iter().map(|(unit, table)| (unit, shard, table)).collect::<Vec<_>>())
        })?;
        let mut tables: BTreeMap<Unit, Table> = BTreeMap::new();
        for (unit, shard, table) in loaded.into_iter().flatten() {
            let query = query_of(&self.queries, unit)?;
            let whole = match (tables.remove(&unit), table) {
                (known, Table::Window(table)) => {
                    let mut whole = match known {
                        Some(Table::Window(whole)) => whole,
                        _ => ShardedTable::of_bits(query, shard.bits).map_err(|e| query.error(&e))?,
                    };
                    whole.put(shard, table);
                    Table::Window(whole)
                }
                (_, table) => table,
            };
            tables.insert(unit, whole);
        }
        let mut held = 0;
        for (unit, mut table) in tables {
            let query = query_of(&self.queries, unit)?;
            table.forget_closed(self.closed_ms).map_err(|e| query.error(&e))?;
            held += table.bytes() as u64;
            if let Some(window) = self.open.get_mut(&unit) {
                window.first_end_us = table.first_end(query, unit);
                window.groups = Groups::Resident(table);
            }
        }
        Ok(held)
    }

    /// Brings windows into memory that are in files only, whatever the budget: they may leave again after the batch.
    pub(super) fn read_back(&mut self, units: Vec<Unit>, workers: usize) -> Result<(), Error> {
        if units.is_empty() {
            return Ok(());
        }
        let Some(residence) = self.residence.take() else { return Ok(()) };
        let units = units.into_iter().map(|unit| (unit, self.stored_bytes(unit))).collect();
        let loaded = self.load(&residence, units, workers);
        self.residence = Some(residence);
        loaded.map(|_| ())
    }

    fn stored_bytes(&self, unit: Unit) -> u64 {
        self.files.iter().flat_map(|f| f.index.between(unit, unit)).map(|entry| entry.length).sum()
    }

    /// Lets windows leave memory until what stays is within the budget: those touched longest ago, and of these the ones
    /// that close last. Only between batches: every window has to be in the files as it is. Returns how many have left.
    pub fn shrink(&mut self) -> Result<u64, Error> {
        let Some(Residence { budget_bytes, .. }) = self.residence else { return Ok(0) };
        let mut resident = Vec::new();
        let mut held = 0;
        for (unit, window) in &self.open {
            if let Groups::Resident(table) = &window.groups {
                let bytes = table.bytes() as u64;
                held += bytes;
                resident.push((window.touched, std::cmp::Reverse(window.end_us), *unit, bytes));
            }
        }
        if held <= budget_bytes {
            return Ok(0);
        }
        resident.sort();
        let mut left = 0;
        for (.., unit, bytes) in resident {
            if held <= budget_bytes {
                break;
            }
            if let Some(window) = self.open.get_mut(&unit) {
                window.groups = Groups::Stored(Vec::new());
                held -= bytes;
                left += 1;
            }
            if failpoint::hit("state.spill") {
                return Err(Error::Failpoint("state.spill"));
            }
        }
        Ok(left)
    }

    /// Closed windows that are in files only: neighbours that are small are read together.
    pub(super) fn close_stored(&self, mut windows: BTreeMap<Unit, StoredWindow>) -> Vec<Closing> {
        let Some(residence) = self.residence.as_ref().filter(|_| !windows.is_empty()) else { return Vec::new() };
        let sizes: BTreeMap<Unit, u64> = windows.keys().map(|unit| (*unit, self.stored_bytes(*unit))).collect();
        // Of the shards of a large window, the first one stands for all.
        let spans = stored::spans(sizes.clone(), residence.share).into_iter().filter(|span| span.shard.prefix == 0);
        let content = |span: Span| {
            Content::Stored(Stored {
                reader: residence.reader.clone(),
                files: self.files.clone(),
                windows: span.units.iter().filter_map(|unit| windows.remove(unit)).collect(),
                bytes: span.units.iter().filter_map(|unit| sizes.get(unit)).sum(),
                share: residence.share,
            })
        };
        spans.map(content).map(|content| Closing { queries: self.queries.clone(), content }).collect()
    }
}

/// Of every query of sessions the one that ends first, from its first event to its end, as the files have it. Reads them all, a
/// share at a time. Blocks.
pub fn first_sessions(
    queries: &[WindowQuery],
    reader: &Reader,
    files: &[LiveFile],
    evict_ms: i64,
) -> Result<BTreeMap<usize, (i64, i64)>, Error> {
    let units = stored::extents(files, evict_ms).into_iter().map(|(unit, extent)| (unit, extent.bytes));
    let of_sessions = |(unit, _): &(Unit, u64)| queries.get(unit.query as usize).is_some_and(WindowQuery::is_session);
    let mut first: BTreeMap<usize, (i64, i64)> = BTreeMap::new();
    for span in stored::spans(units.filter(of_sessions), SHARE_BYTES) {
        for (unit, mut table) in read_tables(queries, reader, files, &[span])? {
            let query = query_of(queries, unit)?;
            table.forget_closed(evict_ms).map_err(|e| query.error(&e))?;
            let Table::Sessions(table) = table else { continue };
            let Some((start_us, end_us)) = table.first() else { continue };
            let known = first.entry(unit.query as usize).or_insert((start_us, end_us));
            if (end_us, start_us) < (known.1, known.0) {
                *known = (start_us, end_us);
            }
        }
    }
    Ok(first)
}

/// Reads units: several with one span, or one with the spans of its shards.
fn read_tables(
    queries: &[WindowQuery],
    reader: &Reader,
    files: &[LiveFile],
    spans: &[Span],
) -> Result<Vec<(Unit, Table)>, Error> {
    let mut tables: BTreeMap<Unit, Table> = BTreeMap::new();
    for span in spans {
        for (unit, pieces) in reader.fetch(queries, files, span)? {
            let query = query_of(queries, unit)?;
            let mut table = match tables.remove(&unit) {
                Some(table) => table,
                None => Table::new(query).map_err(|e| query.error(&e))?,
            };
            stored::merge(query, &mut table, &pieces, span.shard)?;
            tables.insert(unit, table);
        }
    }
    Ok(tables.into_iter().collect())
}

#[cfg(test)]
impl StateStore {
    /// Merges the bytes of a delta into windows in memory, as recovery does with files.
    pub(super) fn apply(&mut self, delta: &super::Delta, evict_ms: i64) -> Result<(), Error> {
        for entry in delta.index.entries.iter().filter(|e| !crate::window::closed(e.end_us, evict_ms)) {
            let query = query_of(&self.queries, entry.unit)?;
            let range = entry.offset as usize..(entry.offset + entry.length) as usize;
            let bytes = bytes::Bytes::copy_from_slice(&delta.bytes[range]);
            let pieces = vec![(0, super::file::Sections::new(query, "a delta", *entry, bytes)?)];
            let fresh = || Window {
                first_end_us: entry.end_us,
                end_us: entry.end_us,
                groups: Groups::Resident(Table::new(query).unwrap()),
                touched: 0,
                stored_groups: 0,
            };
            let window = self.open.entry(entry.unit).or_insert_with(fresh);
            let Groups::Resident(table) = &mut window.groups else { panic!("it is in memory") };
            stored::merge(query, table, &pieces, entry.shard)?;
            window.first_end_us = table.first_end(query, entry.unit);
            window.end_us = table.last_end(query, entry.unit);
        }
        self.closed_ms = self.closed_ms.max(evict_ms);
        for (unit, window) in &mut self.open {
            let query = query_of(&self.queries, *unit)?;
            if let Groups::Resident(table) = &mut window.groups {
                table.forget_closed(evict_ms).unwrap();
                window.first_end_us = table.first_end(query, *unit);
            }
        }
        Ok(())
    }
}
