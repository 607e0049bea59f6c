//! By which number the state files know each window query.

use std::sync::Arc;

use crate::checkpoint::WindowStates;

/// In the order of the queries. By default a query's number is its index, as where nothing is read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers(Option<Arc<[u32]>>);

impl Numbers {
    /// Of the queries that write to these tables. State of a table without a number is nobody's.
    pub fn of<'a>(states: &WindowStates, tables: impl IntoIterator<Item = &'a str>) -> Numbers {
        let number = |table| states.get(table).map_or(u32::MAX, |state| state.number);
        Numbers(Some(tables.into_iter().map(number).collect()))
    }

    /// In files, for the index of a query.
    pub(super) fn number(&self, query: u32) -> u32 {
        self.0.as_ref().map_or(query, |numbers| numbers.get(query as usize).copied().unwrap_or(u32::MAX))
    }

    /// The query of a number in a file, if there still is one.
    pub(super) fn query(&self, number: u32) -> Option<u32> {
        match &self.0 {
            None => Some(number),
            Some(numbers) => numbers.iter().position(|n| *n == number && number != u32::MAX).map(|index| index as u32),
        }
    }
}
