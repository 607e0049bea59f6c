//! The distinct values of every group: the state of `count(DISTINCT x)`, `sum(DISTINCT x)` and `avg(DISTINCT x)`.
//!
//! One hash table of (group, value) for all groups of a window. Values keep the order in which they were first seen, so that
//! a sum of floats over them comes out the same whenever it is made.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, ListArray, UInt32Array, UInt64Array};
use arrow::buffer::OffsetBuffer;
use arrow::compute::{filter, take};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, UInt64Type};
use datafusion_common::Result;
use datafusion_expr::{EmitTo, GroupsAccumulator};
use datafusion_physical_plan::aggregates::group_values::{GroupValues, new_group_values};
use datafusion_physical_plan::aggregates::order::GroupOrdering;

use super::{chosen, normalise_column};

fn item(value: &DataType) -> FieldRef {
    Arc::new(Field::new_list_field(value.clone(), true))
}

pub(super) fn state(value: &DataType) -> Vec<DataType> {
    vec![DataType::List(item(value))]
}

pub(super) struct Distinct {
    data_type: DataType,
    /// None until there is a value: an empty table takes kilobytes.
    pairs: Option<Box<dyn GroupValues>>,
    groups: usize,
    scratch: Vec<usize>,
}

impl Distinct {
    pub(super) fn new(data_type: DataType) -> Self {
        Distinct { data_type, pairs: None, groups: 0, scratch: Vec::new() }
    }

    /// Adds values that are not null.
    fn add(&mut self, groups: UInt64Array, values: ArrayRef) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let pairs = match &mut self.pairs {
            Some(pairs) => pairs,
            none => {
                let fields = vec![
                    Field::new("group", DataType::UInt64, false),
                    Field::new("value", self.data_type.clone(), true),
                ];
                none.insert(new_group_values(Arc::new(Schema::new(fields)), &GroupOrdering::None)?)
            }
        };
        pairs.intern(&[Arc::new(groups), normalise_column(&values)], &mut self.scratch)
    }
}

impl GroupsAccumulator for Distinct {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        indices: &[usize],
        opt_filter: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.groups = groups;
        let [values] = values else { return super::misfit() };
        let numbers = UInt64Array::from_iter_values(indices.iter().map(|g| *g as u64));
        if opt_filter.is_none() && values.null_count() == 0 {
            return self.add(numbers, values.clone());
        }
        let keep = (0..values.len()).map(|row| Some(chosen(opt_filter, row) && values.is_valid(row)));
        let keep: BooleanArray = keep.collect();
        self.add(filter(&numbers, &keep)?.as_primitive::<UInt64Type>().clone(), filter(values, &keep)?)
    }

    fn merge_batch(
        &mut self,
        states: &[ArrayRef],
        indices: &[usize],
        _: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.groups = groups;
        let [states] = states else { return super::misfit() };
        let (rows, values) = flatten(states);
        let numbers = rows.iter().map(|row| indices.get(*row).copied().unwrap_or_default() as u64);
        self.add(UInt64Array::from_iter_values(numbers), values)
    }

    fn state(&mut self, _: EmitTo) -> Result<Vec<ArrayRef>> {
        let groups = std::mem::take(&mut self.groups);
        let Some(mut pairs) = self.pairs.take() else {
            return Ok(vec![Arc::new(ListArray::new_null(item(&self.data_type), groups))]);
        };
        let columns = pairs.emit(EmitTo::All)?;
        let [numbers, values] = columns.as_slice() else { return super::misfit() };
        let numbers = numbers.as_primitive::<UInt64Type>().values();
        let mut lengths = vec![0; groups];
        for number in numbers {
            if let Some(length) = lengths.get_mut(*number as usize) {
                *length += 1;
            }
        }
        let mut order: Vec<u32> = (0..numbers.len() as u32).collect();
        order.sort_by_key(|row| numbers.get(*row as usize));
        let values = take(values, &UInt32Array::from(order), None)?;
        let lists = ListArray::try_new(item(&self.data_type), OffsetBuffer::from_lengths(lengths), values, None)?;
        Ok(vec![Arc::new(lists)])
    }

    fn evaluate(&mut self, _: EmitTo) -> Result<ArrayRef> {
        super::misfit()
    }

    fn size(&self) -> usize {
        self.pairs.as_ref().map_or(0, |pairs| pairs.size()) + self.scratch.capacity() * size_of::<usize>()
    }
}

/// The values in all lists, and of each the row of its list.
pub(super) fn flatten(lists: &ArrayRef) -> (Vec<usize>, ArrayRef) {
    let lists = lists.as_list::<i32>();
    let mut rows = Vec::new();
    for (row, length) in lists.offsets().lengths().enumerate() {
        rows.extend(std::iter::repeat_n(row, length));
    }
    let start = lists.offsets().first().copied().unwrap_or_default() as usize;
    (rows, lists.values().slice(start, lists.offsets().lengths().sum()))
}

pub(super) fn counts(states: &[ArrayRef]) -> Result<ArrayRef> {
    let [lists] = states else { return super::misfit() };
    let lengths = lists.as_list::<i32>().offsets().lengths();
    Ok(Arc::new(Int64Array::from_iter_values(lengths.map(|length| length as i64))))
}
