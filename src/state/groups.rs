//! The groups of one window: their keys and accumulators. Lanes and the store use the same table.

use arrow::array::ArrayRef;
use datafusion_common::{Result, internal_err};
use datafusion_expr::{EmitTo, GroupsAccumulator};
use datafusion_physical_plan::aggregates::group_values::{GroupValues, new_group_values};
use datafusion_physical_plan::aggregates::order::GroupOrdering;

use super::narrow_sums;
use super::query::WindowQuery;

pub(super) struct GroupTable {
    /// None: no `group_by`, one group.
    keys: Option<Box<dyn GroupValues>>,
    groups: usize,
    accumulators: Vec<Box<dyn GroupsAccumulator>>,
    /// How many state columns each accumulator has.
    states: Vec<usize>,
}

/// What a table holds, as columns that can be encoded and merged.
pub(super) struct Partial {
    pub groups: usize,
    pub keys: Vec<ArrayRef>,
    /// Of all accumulators, one after another.
    pub states: Vec<ArrayRef>,
}

impl GroupTable {
    pub fn new(query: &WindowQuery) -> Result<Self> {
        let keys = match query.key_schema().fields().is_empty() {
            true => None,
            false => Some(new_group_values(query.key_schema().clone(), &GroupOrdering::None)?),
        };
        let accumulators = query.aggregates().iter().map(|a| a.accumulator()).collect::<Result<_>>()?;
        let states = query.aggregates().iter().map(|a| a.states()).collect();
        Ok(GroupTable { keys, groups: 0, accumulators, states })
    }

    pub fn groups(&self) -> usize {
        self.groups
    }

    pub fn bytes(&self) -> usize {
        let accumulators: usize = self.accumulators.iter().map(|a| a.size()).sum();
        self.keys.as_ref().map_or(0, |keys| keys.size()) + accumulators
    }

    /// Aggregates rows: `arguments` has one column an accumulator. `indices` is scratch space.
    pub fn update(
        &mut self,
        keys: &[ArrayRef],
        arguments: &[ArrayRef],
        rows: usize,
        indices: &mut Vec<usize>,
    ) -> Result<()> {
        self.intern(keys, rows, indices)?;
        for (accumulator, argument) in self.accumulators.iter_mut().zip(arguments) {
            accumulator.update_batch(std::slice::from_ref(argument), indices, None, self.groups)?;
        }
        Ok(())
    }

    pub fn merge(&mut self, partial: &Partial) -> Result<()> {
        let mut indices = Vec::with_capacity(partial.groups);
        self.intern(&partial.keys, partial.groups, &mut indices)?;
        let mut states = partial.states.as_slice();
        for (accumulator, &count) in self.accumulators.iter_mut().zip(&self.states) {
            let Some((state, rest)) = states.split_at_checked(count) else {
                return internal_err!("a partial aggregate lacks state columns");
            };
            accumulator.merge_batch(state, &indices, None, self.groups)?;
            states = rest;
        }
        Ok(())
    }

    fn intern(&mut self, keys: &[ArrayRef], rows: usize, indices: &mut Vec<usize>) -> Result<()> {
        match &mut self.keys {
            Some(values) => {
                values.intern(keys, indices)?;
                self.groups = values.len();
            }
            None => {
                indices.clear();
                indices.resize(rows, 0);
                self.groups = self.groups.max(rows.min(1));
            }
        }
        Ok(())
    }

    pub fn into_partial(mut self) -> Result<Partial> {
        let keys = self.emit_keys()?;
        let mut states = Vec::with_capacity(self.states.iter().sum());
        for accumulator in &mut self.accumulators {
            states.extend(accumulator.state(EmitTo::All)?);
        }
        Ok(Partial { groups: self.groups, keys, states })
    }

    /// Keys and final values, and the number of groups in which an integer sum overflowed.
    pub fn evaluate(mut self, query: &WindowQuery) -> Result<(Vec<ArrayRef>, u64)> {
        let mut columns = self.emit_keys()?;
        let mut overflowed = vec![false; self.groups];
        for (accumulator, aggregate) in self.accumulators.iter_mut().zip(query.aggregates()) {
            let values = accumulator.evaluate(EmitTo::All)?;
            columns.push(match aggregate.is_integer_sum() {
                true => narrow_sums(&values, &mut overflowed),
                false => values,
            });
        }
        Ok((columns, overflowed.iter().filter(|o| **o).count() as u64))
    }

    fn emit_keys(&mut self) -> Result<Vec<ArrayRef>> {
        self.keys.as_mut().map_or(Ok(Vec::new()), |keys| keys.emit(EmitTo::All))
    }
}
