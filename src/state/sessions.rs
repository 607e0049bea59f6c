//! The open sessions of a share of the keys.
//!
//! Owns: which sessions a partial joins, their states, when they end. A session is of one key and reaches from its first event
//! to a gap after its last one; sessions of a key that overlap or touch are one. What is merged costs what it touches: states
//! lie in immutable segments, found by key; what is replaced stays behind until half of a table is such.
//!
//! Invariants: sessions of a key are in the order of time, with time between them. What a session comes to follows from the
//! partials and their order, not from the segments.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array};
use arrow::compute::interleave;
use arrow::datatypes::Int64Type;
use datafusion_common::{Result, internal_err};

use super::groups::{Accumulators, Partial};
use super::query::WindowQuery;
use crate::window::closed;

type Key = Arc<[u8]>;

/// Where a session is that is being made of others; its row counts these.
const MAKING: usize = usize::MAX;

#[derive(Default)]
pub(super) struct SessionTable {
    sessions: HashMap<Key, Vec<Session>>,
    /// No two sessions of a key end together.
    by_end: BTreeSet<(i64, Key)>,
    segments: Vec<Segment>,
    /// Keys whose sessions have changed since [`SessionTable::changed`].
    changed: BTreeSet<Key>,
}

#[derive(Clone, Copy)]
struct Session {
    start_us: i64,
    end_us: i64,
    segment: usize,
    row: usize,
    changed: bool,
}

struct Segment {
    partial: Partial,
    keys: Vec<Key>,
}

/// A session that rows of a partial make, of themselves and of the sessions that they join.
struct Making {
    /// Rows of segments, the one behind the last being the partial; none: it has become part of another.
    members: Vec<(usize, usize)>,
    start_us: i64,
    end_us: i64,
}

/// First and end of every session of a partial.
pub(super) fn bounds<'a>(query: &WindowQuery, partial: &'a Partial) -> Result<(&'a Int64Array, &'a Int64Array)> {
    let at = query.key_schema().fields().len();
    let bound = |i: usize| partial.keys.get(at + i).and_then(|c| c.as_primitive_opt::<Int64Type>());
    match (bound(0), bound(1)) {
        (Some(starts), Some(ends)) => Ok((starts, ends)),
        _ => internal_err!("sessions lack their bounds"),
    }
}

fn keys_of(query: &WindowQuery, partial: &Partial) -> Result<Vec<Key>> {
    let keys = partial.keys.get(..query.key_schema().fields().len()).unwrap_or_default();
    let rows = query.key_rows().convert_columns(keys)?;
    Ok(rows.iter().map(|row| row.as_ref().into()).collect())
}

impl SessionTable {
    pub fn sessions(&self) -> usize {
        self.by_end.len()
    }

    pub fn bytes(&self) -> usize {
        // An entry of each of the two indexes, and the key.
        const INDEX: usize = size_of::<(Key, Vec<Session>)>() + size_of::<Session>() + size_of::<(i64, Key)>() + 48;
        let of = |segment: &Segment| {
            let columns = segment.partial.keys.iter().chain(&segment.partial.states);
            columns.map(|c| c.get_array_memory_size()).sum::<usize>() + segment.keys.len() * size_of::<Key>()
        };
        self.segments.iter().map(of).sum::<usize>() + self.by_end.len() * INDEX
    }

    /// When the first of them ends.
    pub fn first_end(&self) -> Option<i64> {
        self.by_end.first().map(|(end, _)| *end)
    }

    /// First event and end of the session that ends first.
    pub fn first(&self) -> Option<(i64, i64)> {
        let (end_us, key) = self.by_end.first()?;
        let session = self.sessions.get(key)?.iter().find(|s| s.end_us == *end_us)?;
        Some((session.start_us, *end_us))
    }

    pub fn last_end(&self) -> Option<i64> {
        self.by_end.last().map(|(end, _)| *end)
    }

    /// Adds what a lane has: it joins what it overlaps or touches, in the order of time.
    pub fn merge(&mut self, query: &WindowQuery, partial: &Partial) -> Result<()> {
        let (starts, ends) = bounds(query, partial)?;
        let keys = keys_of(query, partial)?;
        let new = self.segments.len();
        let mut making: Vec<Making> = Vec::new();
        let mut making_keys: Vec<(Key, usize)> = Vec::new();
        for (row, key) in keys.iter().enumerate() {
            let (mut start_us, mut end_us) = (starts.value(row), ends.value(row));
            let mut members = Vec::new();
            let (at, joined) = self.take(key, start_us, end_us);
            for session in joined {
                start_us = start_us.min(session.start_us);
                end_us = end_us.max(session.end_us);
                match session.segment {
                    MAKING => {
                        if let Some(other) = making.get_mut(session.row) {
                            members.append(&mut other.members);
                        }
                    }
                    segment => members.push((segment, session.row)),
                }
            }
            members.push((new, row));
            let session = Session { start_us, end_us, segment: MAKING, row: making.len(), changed: true };
            making.push(Making { members, start_us, end_us });
            making_keys.push((key.clone(), row));
            self.put(key, at, session);
        }

        let mut groups = Vec::new();
        let mut members = Vec::new();
        let mut made = Vec::new();
        for (making, (key, row)) in making.iter().zip(making_keys).filter(|(m, _)| !m.members.is_empty()) {
            groups.extend(std::iter::repeat_n(made.len(), making.members.len()));
            members.extend(&making.members);
            made.push((making, key, row));
        }
        let mut accumulators = Accumulators::new(query)?;
        let states = self.gather_columns(&members, Some(partial), |p| &p.states)?;
        accumulators.merge(query, &states, &groups, made.len())?;
        // The keys are those of any of the rows.
        let rows: Vec<u32> = made.iter().map(|(_, _, row)| *row as u32).collect();
        let mut keys = partial.gather(rows)?.keys;
        keys.truncate(query.key_schema().fields().len());
        keys.push(Arc::new(made.iter().map(|(m, _, _)| Some(m.start_us)).collect::<Int64Array>()));
        keys.push(Arc::new(made.iter().map(|(m, _, _)| Some(m.end_us)).collect::<Int64Array>()));
        let segment_keys: Vec<Key> = made.iter().map(|(_, key, _)| key.clone()).collect();
        for (row, (making, key, _)) in made.iter().enumerate() {
            if let Some(session) = self.find(key, making.start_us) {
                (session.segment, session.row) = (new, row);
            }
        }
        self.changed.extend(segment_keys.iter().cloned());
        let partial = Partial { groups: segment_keys.len(), keys, states: accumulators.states()? };
        self.segments.push(Segment { partial, keys: segment_keys });
        self.tidy()
    }

    /// Takes sessions from a file, as they are: each stands in the place of those that it overlaps or touches, which are what
    /// it has been made of, or closed.
    pub fn replace(&mut self, query: &WindowQuery, partial: &Partial) -> Result<()> {
        let (starts, ends) = bounds(query, partial)?;
        let keys = keys_of(query, partial)?;
        let segment = self.segments.len();
        for (row, key) in keys.iter().enumerate() {
            let (start_us, end_us) = (starts.value(row), ends.value(row));
            let (at, _) = self.take(key, start_us, end_us);
            self.put(key, at, Session { start_us, end_us, segment, row, changed: false });
        }
        self.segments.push(Segment { partial: partial.clone(), keys });
        self.tidy()
    }

    /// Sessions of a key that overlap or touch a time, removed, and where they were.
    fn take(&mut self, key: &Key, start_us: i64, end_us: i64) -> (usize, Vec<Session>) {
        let Some(sessions) = self.sessions.get_mut(key) else { return (0, Vec::new()) };
        let from = sessions.partition_point(|s| s.end_us < start_us);
        let to = sessions.partition_point(|s| s.start_us <= end_us);
        let taken: Vec<Session> = sessions.drain(from..to.max(from)).collect();
        for session in &taken {
            self.by_end.remove(&(session.end_us, key.clone()));
        }
        (from, taken)
    }

    fn put(&mut self, key: &Key, at: usize, session: Session) {
        self.by_end.insert((session.end_us, key.clone()));
        self.sessions.entry(key.clone()).or_default().insert(at, session);
    }

    fn find(&mut self, key: &Key, start_us: i64) -> Option<&mut Session> {
        self.sessions.get_mut(key)?.iter_mut().find(|s| s.start_us == start_us)
    }

    /// The sessions that have changed since the last time and do not end by `evict_ms`: what the state files lack.
    pub fn changed(&mut self, evict_ms: i64) -> Result<Partial> {
        let mut rows = Vec::new();
        for key in std::mem::take(&mut self.changed) {
            for session in self.sessions.get_mut(&key).into_iter().flatten().filter(|s| s.changed) {
                session.changed = false;
                if !closed(session.end_us, evict_ms) {
                    rows.push((session.segment, session.row));
                }
            }
        }
        self.gather(&rows)
    }

    /// Removes the sessions that end by `evict_ms` and gives them, by their end.
    pub fn close(&mut self, evict_ms: i64) -> Result<Partial> {
        let mut rows = Vec::new();
        while let Some((end_us, key)) = self.by_end.pop_first() {
            if !closed(end_us, evict_ms) {
                self.by_end.insert((end_us, key));
                break;
            }
            if let Entry::Occupied(mut entry) = self.sessions.entry(key) {
                let sessions = entry.get_mut();
                if let Some(at) = sessions.iter().position(|s| s.end_us == end_us) {
                    let session = sessions.remove(at);
                    rows.push((session.segment, session.row));
                }
                if sessions.is_empty() {
                    entry.remove();
                }
            }
        }
        let closed = self.gather(&rows)?;
        self.tidy()?;
        Ok(closed)
    }

    pub fn into_partial(self) -> Result<Partial> {
        let mut rows: Vec<(usize, usize)> = self.sessions.values().flatten().map(|s| (s.segment, s.row)).collect();
        rows.sort();
        self.gather(&rows)
    }

    fn gather(&self, rows: &[(usize, usize)]) -> Result<Partial> {
        Ok(Partial {
            groups: rows.len(),
            keys: self.gather_columns(rows, None, |p| &p.keys)?,
            states: self.gather_columns(rows, None, |p| &p.states)?,
        })
    }

    /// `last` counts as one more segment.
    fn gather_columns(
        &self,
        rows: &[(usize, usize)],
        last: Option<&Partial>,
        columns: impl Fn(&Partial) -> &Vec<ArrayRef>,
    ) -> Result<Vec<ArrayRef>> {
        let partials: Vec<&Partial> = self.segments.iter().map(|s| &s.partial).chain(last).collect();
        let count = partials.first().map_or(0, |p| columns(p).len());
        let gather = |column: usize| {
            let arrays: Vec<&dyn Array> =
                partials.iter().filter_map(|p| columns(p).get(column).map(|c| c.as_ref())).collect();
            Ok(interleave(&arrays, rows)?)
        };
        (0..count).map(gather).collect()
    }

    /// Keeps segments few, their sizes falling, and at least half of all rows in use: every row is copied some times as often
    /// as the table doubles.
    fn tidy(&mut self) -> Result<()> {
        let rows: usize = self.segments.iter().map(|s| s.keys.len()).sum();
        let mut from = self.segments.len();
        if rows > 2 * self.by_end.len() + 64 {
            from = 0;
        } else {
            let mut size = 0;
            while from > 0 && (from == self.segments.len() || self.segments[from - 1].keys.len() <= 2 * size) {
                from -= 1;
                size += self.segments[from].keys.len();
            }
            if from + 1 >= self.segments.len() {
                return Ok(());
            }
        }
        let mut keys = Vec::new();
        let mut old = Vec::new();
        for (number, segment) in self.segments.iter().enumerate().skip(from) {
            for (row, key) in segment.keys.iter().enumerate() {
                let sessions = self.sessions.get_mut(key).map(Vec::as_mut_slice).unwrap_or_default();
                // A row that has just been moved lies before those that are looked at here.
                if let Some(session) = sessions.iter_mut().find(|s| s.segment == number && s.row == row) {
                    (session.segment, session.row) = (from, keys.len());
                    old.push((number, row));
                    keys.push(key.clone());
                }
            }
        }
        let partial = self.gather(&old)?;
        self.segments.truncate(from);
        if !keys.is_empty() {
            self.segments.push(Segment { partial, keys });
        }
        Ok(())
    }
}

#[cfg(test)]
impl SessionTable {
    /// Segments and rows in them.
    pub fn size(&self) -> (usize, usize) {
        (self.segments.len(), self.segments.iter().map(|s| s.keys.len()).sum())
    }
}
