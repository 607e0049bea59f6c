//! The sessions of one partition of one batch.
//!
//! Owns: which session a row joins. Every row goes straight into accumulators, in the order of the rows, so that chunks have
//! no say in the result; where a row joins two sessions, their accumulators are merged at the end, the older one first, and it
//! is the younger one that goes on: so of rows of the same time the one that came first also comes first in the merge.

use arrow::array::{Array, ArrayRef, Int64Array, TimestampMicrosecondArray, UInt32Array};
use arrow::compute::take;
use datafusion_common::Result;
use datafusion_expr::EmitTo;
use datafusion_physical_plan::aggregates::group_values::{GroupValues, new_group_values};
use datafusion_physical_plan::aggregates::order::GroupOrdering;
use std::sync::Arc;

use super::groups::{Accumulators, Partial};
use super::query::WindowQuery;
use super::shard;
use crate::window::closed;

pub(super) struct SessionLane {
    keys: Box<dyn GroupValues>,
    /// By key, in the order of time.
    sessions: Vec<Vec<Session>>,
    accumulators: Accumulators,
    /// By accumulator group: the one that it has become part of, or itself.
    parents: Vec<usize>,
    /// Scratch: the key of every row, and its group.
    indices: Vec<usize>,
    groups: Vec<usize>,
}

struct Session {
    start_us: i64,
    end_us: i64,
    group: usize,
}

impl SessionLane {
    pub fn new(query: &WindowQuery) -> Result<Self> {
        Ok(SessionLane {
            keys: new_group_values(query.key_schema().clone(), &GroupOrdering::None)?,
            sessions: Vec::new(),
            accumulators: Accumulators::new(query)?,
            parents: Vec::new(),
            indices: Vec::new(),
            groups: Vec::new(),
        })
    }

    pub fn bytes(&self) -> usize {
        self.keys.size() + self.accumulators.bytes() + self.parents.len() * (size_of::<Session>() + 32)
    }

    /// Adds the rows that have a time and are in time: whose own session, of them alone, has not ended by `late_ms`. Gives
    /// how many are late.
    pub fn update(
        &mut self,
        query: &WindowQuery,
        times: &TimestampMicrosecondArray,
        keys: &[ArrayRef],
        arguments: &[ArrayRef],
        late_ms: i64,
    ) -> Result<u64> {
        let end = |time_us: i64| query.windowing().end(time_us);
        let in_time = |row: &u32| !times.is_null(*row as usize) && !closed(end(times.value(*row as usize)), late_ms);
        let rows: Vec<u32> = (0..times.len() as u32).filter(in_time).collect();
        let late = (times.len() - times.null_count() - rows.len()) as u64;
        if rows.is_empty() {
            return Ok(late);
        }
        let rows = UInt32Array::from(rows);
        let all = rows.len() == times.len();
        let gather = |column: &ArrayRef| if all { Ok(column.clone()) } else { take(column, &rows, None) };
        let keys = keys.iter().map(gather).collect::<Result<Vec<_>, _>>()?;
        let arguments = if all { arguments.to_vec() } else { query.gather(arguments, &rows)? };
        self.indices.clear();
        self.keys.intern(&keys, &mut self.indices)?;
        self.sessions.resize_with(self.keys.len(), Vec::new);
        self.groups.clear();
        for (row, &key) in rows.values().iter().zip(&self.indices) {
            let time_us = times.value(*row as usize);
            let Some(sessions) = self.sessions.get_mut(key) else { continue };
            self.groups.push(join(sessions, &mut self.parents, time_us, end(time_us)));
        }
        self.accumulators.update(query, &arguments, &self.groups, self.parents.len())?;
        Ok(late)
    }

    /// By share of the keys: what a state merges.
    pub fn into_partials(mut self, query: &WindowQuery) -> Result<Vec<(i64, Partial)>> {
        // From groups to sessions, which are by key and time.
        let mut session_of = vec![0; self.parents.len()];
        let (mut keys, mut starts, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for (key, sessions) in self.sessions.iter().enumerate() {
            for session in sessions {
                if let Some(of) = session_of.get_mut(session.group) {
                    *of = starts.len();
                }
                keys.push(key as u32);
                starts.push(session.start_us);
                ends.push(session.end_us);
            }
        }
        let groups = starts.len();
        if groups == 0 {
            return Ok(Vec::new());
        }
        let of_group = |group: usize| session_of.get(root(&self.parents, group)).copied().unwrap_or_default();
        let indices: Vec<usize> = (0..self.parents.len()).map(of_group).collect();
        let mut merged = Accumulators::new(query)?;
        merged.merge(query, &self.accumulators.states()?, &indices, groups)?;

        let rows = UInt32Array::from(keys);
        let columns = self.keys.emit(EmitTo::All)?;
        let mut keys = columns.iter().map(|c| take(c, &rows, None)).collect::<Result<Vec<_>, _>>()?;
        keys.push(Arc::new(Int64Array::from(starts)));
        keys.push(Arc::new(Int64Array::from(ends)));
        shard::by_share(query, Partial { groups, keys, states: merged.states()? })
    }
}

/// The group of a row: of the session that it joins, of the youngest of several that it makes one, or a new one.
fn join(sessions: &mut Vec<Session>, parents: &mut Vec<usize>, start_us: i64, end_us: i64) -> usize {
    let from = sessions.partition_point(|s| s.end_us < start_us);
    let to = sessions.partition_point(|s| s.start_us <= end_us).max(from);
    if from == to {
        let group = parents.len();
        parents.push(group);
        sessions.insert(from, Session { start_us, end_us, group });
        return group;
    }
    let others: Vec<Session> = sessions.drain(from + 1..to).collect();
    let Some(session) = sessions.get_mut(from) else { return 0 };
    session.start_us = session.start_us.min(start_us);
    session.end_us = session.end_us.max(end_us);
    for other in others {
        session.end_us = session.end_us.max(other.end_us);
        let (older, younger) = (session.group.min(other.group), session.group.max(other.group));
        if let Some(parent) = parents.get_mut(older) {
            *parent = younger;
        }
        session.group = younger;
    }
    session.group
}

fn root(parents: &[usize], mut group: usize) -> usize {
    while let Some(&parent) = parents.get(group).filter(|parent| **parent != group) {
        group = parent;
    }
    group
}
