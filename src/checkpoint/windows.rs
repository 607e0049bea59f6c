//! Which state belongs to which window table: the commit log gives every window query a number, by which the state files know it.
//!
//! Invariant: no number is given twice, so that state whose window was taken out, or became another one, is nobody's for ever,
//! whatever files still have it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The window queries whose state the checkpoint has, by table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowStates {
    /// What the next new one gets.
    next: u32,
    tables: BTreeMap<String, WindowState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowState {
    /// In the state files.
    pub number: u32,
    /// Everything that the meaning of the state depends on.
    pub definition: String,
}

impl WindowStates {
    pub fn is_empty(&self) -> bool {
        self.next == 0
    }

    pub fn get(&self, table: &str) -> Option<&WindowState> {
        self.tables.get(table)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &WindowState)> {
        self.tables.iter().map(|(table, state)| (table.as_str(), state))
    }

    /// With these queries, table and definition each: state goes on where both are the same, and starts empty elsewhere.
    pub fn with<'a>(&self, queries: impl IntoIterator<Item = (&'a str, &'a str)>) -> WindowStates {
        let mut next = self.next;
        let mut tables = BTreeMap::new();
        for (table, definition) in queries {
            let state = self.get(table).filter(|state| state.definition == definition).cloned();
            let state = state.unwrap_or_else(|| {
                next += 1;
                WindowState { number: next - 1, definition: definition.to_string() }
            });
            tables.insert(table.to_string(), state);
        }
        WindowStates { next, tables }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_with_table_and_definition_and_never_come_back() {
        let numbers = |states: &WindowStates| -> Vec<(String, u32)> {
            states.iter().map(|(table, state)| (table.to_string(), state.number)).collect()
        };
        let named = |n: &[(&str, u32)]| n.iter().map(|(t, n)| (t.to_string(), *n)).collect::<Vec<_>>();
        let first = WindowStates::default().with([("a", "x"), ("b", "y")]);
        assert_eq!(numbers(&first), named(&[("a", 0), ("b", 1)]));
        let reordered = first.with([("b", "y"), ("a", "x")]);
        assert_eq!(reordered, first);
        let without = first.with([("a", "x")]);
        assert_eq!(numbers(&without), named(&[("a", 0)]));
        let again = without.with([("b", "y"), ("a", "x")]);
        assert_eq!(numbers(&again), named(&[("a", 0), ("b", 2)]));
        let other = again.with([("b", "z"), ("a", "x")]);
        assert_eq!(numbers(&other), named(&[("a", 0), ("b", 3)]));
    }
}
