//! The groups of one window: their keys and accumulators. Lanes and the store use the same table.
//!
//! Invariant: group i of the keys is group i of every accumulator, and groups keep the order of their first row.

use arrow::array::{ArrayRef, UInt32Array};
use arrow::compute::take;
use datafusion_common::{Result, internal_err};
use datafusion_expr::{EmitTo, GroupsAccumulator};
use datafusion_physical_plan::aggregates::group_values::{GroupValues, new_group_values};
use datafusion_physical_plan::aggregates::order::GroupOrdering;

use super::aggregate::Finished;
use super::query::WindowQuery;

/// How many groups a window may have before its keys move into a hash table. An empty hash table takes some 12 KiB: too
/// much for windows of a few groups, of which a backlog of sparse data opens tens of thousands at once.
const FEW_GROUPS: usize = 16;
/// A window that is given this many rows at once gets its hash table, however few groups they have: it is faster.
const MANY_ROWS: usize = 64;

enum Keys {
    /// No `group_by`: one group.
    None,
    /// In Arrow's row format, compared one after another.
    Few(Vec<Box<[u8]>>),
    Many(Box<dyn GroupValues>),
}

pub(super) struct GroupTable {
    keys: Keys,
    groups: usize,
    accumulators: Accumulators,
}

/// The accumulators of a query, for groups that someone else keeps.
pub(super) struct Accumulators {
    list: Vec<Box<dyn GroupsAccumulator>>,
}

/// What a table holds, as columns that can be encoded and merged.
#[derive(Clone)]
pub(super) struct Partial {
    pub groups: usize,
    pub keys: Vec<ArrayRef>,
    /// Of all accumulators, one after another.
    pub states: Vec<ArrayRef>,
}

impl Partial {
    /// The given groups, in the order given.
    pub fn gather(&self, groups: Vec<u32>) -> Result<Partial> {
        let groups = UInt32Array::from(groups);
        let gather =
            |columns: &[ArrayRef]| columns.iter().map(|c| Ok(take(c, &groups, None)?)).collect::<Result<Vec<_>>>();
        Ok(Partial { groups: groups.len(), keys: gather(&self.keys)?, states: gather(&self.states)? })
    }
}

impl Accumulators {
    pub fn new(query: &WindowQuery) -> Result<Self> {
        let list = query.aggregates().accumulators().iter().map(|a| a.create()).collect::<Result<_>>()?;
        Ok(Accumulators { list })
    }

    pub fn bytes(&self) -> usize {
        self.list.iter().map(|a| a.size()).sum()
    }

    /// `groups` is how many there are with those of these rows.
    pub fn update(
        &mut self,
        query: &WindowQuery,
        arguments: &[ArrayRef],
        indices: &[usize],
        groups: usize,
    ) -> Result<()> {
        for (accumulator, call) in self.list.iter_mut().zip(query.aggregates().accumulators()) {
            call.update(accumulator.as_mut(), arguments, indices, groups)?;
        }
        Ok(())
    }

    pub fn merge(
        &mut self,
        query: &WindowQuery,
        mut states: &[ArrayRef],
        indices: &[usize],
        groups: usize,
    ) -> Result<()> {
        for (accumulator, call) in self.list.iter_mut().zip(query.aggregates().accumulators()) {
            let Some((state, rest)) = states.split_at_checked(call.state().len()) else {
                return internal_err!("a partial aggregate lacks state columns");
            };
            accumulator.merge_batch(state, indices, None, groups)?;
            states = rest;
        }
        Ok(())
    }

    /// Gives the states of all groups away.
    pub fn states(&mut self) -> Result<Vec<ArrayRef>> {
        let mut states = Vec::new();
        for accumulator in &mut self.list {
            states.extend(accumulator.state(EmitTo::All)?);
        }
        Ok(states)
    }

    /// Keys and final values.
    pub fn evaluate(mut self, query: &WindowQuery, keys: Vec<ArrayRef>, groups: usize) -> Result<Finished> {
        let mut results = Vec::with_capacity(self.list.len());
        for (accumulator, call) in self.list.iter_mut().zip(query.aggregates().accumulators()) {
            results.push(call.results(accumulator.as_mut())?);
        }
        let mut finished = query.aggregates().finish(&keys, &results, groups)?;
        finished.columns.splice(0..0, keys);
        Ok(finished)
    }
}

impl GroupTable {
    pub fn new(query: &WindowQuery) -> Result<Self> {
        let keys = if query.key_schema().fields().is_empty() { Keys::None } else { Keys::Few(Vec::new()) };
        Ok(GroupTable { keys, groups: 0, accumulators: Accumulators::new(query)? })
    }

    pub fn groups(&self) -> usize {
        self.groups
    }

    pub fn bytes(&self) -> usize {
        let keys = match &self.keys {
            Keys::None => 0,
            Keys::Few(keys) => keys.iter().map(|key| key.len() + size_of::<Box<[u8]>>()).sum(),
            Keys::Many(keys) => keys.size(),
        };
        keys + self.accumulators.bytes()
    }

    /// Aggregates rows; `arguments` are those of the query, `indices` is scratch space.
    pub fn update(
        &mut self,
        query: &WindowQuery,
        keys: &[ArrayRef],
        arguments: &[ArrayRef],
        rows: usize,
        indices: &mut Vec<usize>,
    ) -> Result<()> {
        self.intern(query, keys, rows, indices)?;
        self.accumulators.update(query, arguments, indices, self.groups)
    }

    pub fn merge(&mut self, query: &WindowQuery, partial: &Partial) -> Result<()> {
        if partial.groups == 0 {
            return Ok(());
        }
        let mut indices = Vec::with_capacity(partial.groups);
        self.intern(query, &partial.keys, partial.groups, &mut indices)?;
        self.accumulators.merge(query, &partial.states, &indices, self.groups)
    }

    fn intern(&mut self, query: &WindowQuery, keys: &[ArrayRef], rows: usize, indices: &mut Vec<usize>) -> Result<()> {
        indices.clear();
        if let Keys::Few(few) = &mut self.keys {
            if rows < MANY_ROWS && intern_few(query, few, keys, indices)? {
                self.groups = few.len();
                return Ok(());
            }
            let mut many = new_group_values(query.key_schema().clone(), &GroupOrdering::None)?;
            if !few.is_empty() {
                many.intern(&few_columns(query, few)?, indices)?;
            }
            self.keys = Keys::Many(many);
        }
        match &mut self.keys {
            Keys::Many(many) => {
                many.intern(keys, indices)?;
                self.groups = many.len();
            }
            _ => {
                indices.resize(rows, 0);
                self.groups = self.groups.max(rows.min(1));
            }
        }
        Ok(())
    }

    /// The groups of these partials in a table of their own, to be evaluated; all of them have to be in this one, which stays
    /// what it is. Accumulators can only give their state away, so all of it goes out and in again.
    pub fn copy_of(&mut self, query: &WindowQuery, partials: &[Partial]) -> Result<GroupTable> {
        let mut touched = Vec::new();
        let mut indices = Vec::new();
        for partial in partials {
            self.intern(query, &partial.keys, partial.groups, &mut indices)?;
            touched.extend(indices.iter().map(|group| *group as u32));
        }
        touched.sort();
        touched.dedup();
        let partial = std::mem::replace(self, GroupTable::new(query)?).into_partial(query)?;
        self.merge(query, &partial)?;
        let mut copy = GroupTable::new(query)?;
        match touched.len() == partial.groups {
            true => copy.merge(query, &partial)?,
            false => copy.merge(query, &partial.gather(touched)?)?,
        }
        Ok(copy)
    }

    pub fn into_partial(mut self, query: &WindowQuery) -> Result<Partial> {
        let keys = self.emit_keys(query)?;
        Ok(Partial { groups: self.groups, keys, states: self.accumulators.states()? })
    }

    /// Keys and final values.
    pub fn evaluate(mut self, query: &WindowQuery) -> Result<Finished> {
        let keys = self.emit_keys(query)?;
        self.accumulators.evaluate(query, keys, self.groups)
    }

    fn emit_keys(&mut self, query: &WindowQuery) -> Result<Vec<ArrayRef>> {
        match &mut self.keys {
            Keys::None => Ok(Vec::new()),
            Keys::Few(few) => few_columns(query, few),
            Keys::Many(many) => many.emit(EmitTo::All),
        }
    }
}

/// Finds or adds the group of every row; false if they become more than a few, `few` is then valid, `indices` is not.
fn intern_few(
    query: &WindowQuery,
    few: &mut Vec<Box<[u8]>>,
    keys: &[ArrayRef],
    indices: &mut Vec<usize>,
) -> Result<bool> {
    let rows = query.key_rows().convert_columns(keys)?;
    for row in &rows {
        let key = row.as_ref();
        let group = match few.iter().position(|known| known.as_ref() == key) {
            Some(group) => group,
            None if few.len() == FEW_GROUPS => return Ok(false),
            None => {
                few.push(key.into());
                few.len() - 1
            }
        };
        indices.push(group);
    }
    Ok(true)
}

fn few_columns(query: &WindowQuery, few: &[Box<[u8]>]) -> Result<Vec<ArrayRef>> {
    let parser = query.key_rows().parser();
    Ok(query.key_rows().convert_rows(few.iter().map(|key| parser.parse(key)))?)
}
