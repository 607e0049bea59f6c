//! What a unit of state is in memory: the groups of a window, or the open sessions of a share of the keys.

use arrow::compute::max;
use datafusion_common::Result;

use super::Unit;
use super::groups::Partial;
use super::query::WindowQuery;
use super::sessions::{SessionTable, bounds};
use super::sharded::ShardedTable;

pub(super) enum Table {
    Window(ShardedTable),
    Sessions(SessionTable),
}

impl Table {
    pub fn new(query: &WindowQuery) -> Result<Table> {
        Ok(match query.is_session() {
            true => Table::Sessions(SessionTable::default()),
            false => Table::Window(ShardedTable::new(query)?),
        })
    }

    /// Takes in what a file has, files in their order. They have the groups of a window as what every batch adds, sessions as
    /// they were after each batch that touched them: so a file can go once all its sessions have ended, however long what
    /// they have become goes on.
    pub fn read(&mut self, query: &WindowQuery, partial: &Partial) -> Result<()> {
        match self {
            Table::Window(table) => table.merge(query, partial),
            Table::Sessions(table) => table.replace(query, partial),
        }
    }

    /// Files still have the sessions that have been closed.
    pub fn forget_closed(&mut self, evict_ms: i64) -> Result<()> {
        match self {
            Table::Window(_) => Ok(()),
            Table::Sessions(table) => table.close(evict_ms).map(|_| ()),
        }
    }

    /// When something of it closes first.
    pub fn first_end(&self, query: &WindowQuery, unit: Unit) -> i64 {
        match self {
            Table::Window(_) => query.windowing().end(unit.key),
            Table::Sessions(table) => table.first_end().unwrap_or(i64::MAX),
        }
    }

    /// When all of it is closed.
    pub fn last_end(&self, query: &WindowQuery, unit: Unit) -> i64 {
        match self {
            Table::Window(_) => query.windowing().end(unit.key),
            Table::Sessions(table) => table.last_end().unwrap_or(i64::MIN),
        }
    }

    pub fn groups(&self) -> usize {
        match self {
            Table::Window(table) => table.groups(),
            Table::Sessions(table) => table.sessions(),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Table::Window(table) => table.bytes(),
            Table::Sessions(table) => table.bytes(),
        }
    }

    pub fn into_partials(self, query: &WindowQuery) -> Result<Vec<Partial>> {
        match self {
            Table::Window(table) => table.into_tables().into_iter().map(|table| table.into_partial(query)).collect(),
            Table::Sessions(table) => Ok(vec![table.into_partial()?]),
        }
    }
}

/// When all that a partial of the unit holds is closed.
pub(super) fn end_of(query: &WindowQuery, unit: Unit, partial: &Partial) -> Result<i64> {
    match query.is_session() {
        true => Ok(max(bounds(query, partial)?.1).unwrap_or(i64::MIN)),
        false => Ok(query.windowing().end(unit.key)),
    }
}
