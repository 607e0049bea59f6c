//! `first_value` and `last_value` by event time.
//!
//! Of rows with the same time, first_value takes the one that came first and last_value the one that came last, in the order
//! of batches, then of the partitions in the batch's plan, then of offsets.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, BinaryArray, BooleanArray, Int64Array, PrimitiveArray, StringArray,
    downcast_primitive,
};
use arrow::datatypes::{DataType, Int64Type, TimestampMicrosecondType};
use datafusion_common::{Result, not_impl_err};
use datafusion_expr::{EmitTo, GroupsAccumulator};

use super::chosen;

const NONE: u32 = u32::MAX;

pub(super) fn state(value: &DataType) -> Vec<DataType> {
    vec![value.clone(), DataType::Int64]
}

/// One value a group.
trait Slots: Send {
    fn resize(&mut self, groups: usize);
    fn set(&mut self, group: usize, from: &ArrayRef, row: usize);
    fn take(&mut self) -> ArrayRef;
    fn bytes(&self) -> usize;
}

struct Primitives<T: ArrowPrimitiveType> {
    values: Vec<Option<T::Native>>,
    data_type: DataType,
}

impl<T: ArrowPrimitiveType> Slots for Primitives<T> {
    fn resize(&mut self, groups: usize) {
        self.values.resize(groups, None);
    }

    fn set(&mut self, group: usize, from: &ArrayRef, row: usize) {
        let from = from.as_primitive::<T>();
        if let Some(slot) = self.values.get_mut(group) {
            *slot = from.is_valid(row).then(|| from.value(row));
        }
    }

    fn take(&mut self) -> ArrayRef {
        let values: PrimitiveArray<T> = std::mem::take(&mut self.values).into_iter().collect();
        Arc::new(values.with_data_type(self.data_type.clone()))
    }

    fn bytes(&self) -> usize {
        self.values.capacity() * size_of::<Option<T::Native>>()
    }
}

/// Strings, byte strings and booleans.
struct Bytes {
    values: Vec<Option<Box<[u8]>>>,
    data_type: DataType,
    heap: usize,
}

impl Slots for Bytes {
    fn resize(&mut self, groups: usize) {
        self.values.resize(groups, None);
    }

    fn set(&mut self, group: usize, from: &ArrayRef, row: usize) {
        let Some(slot) = self.values.get_mut(group) else { return };
        let value = from.is_valid(row).then(|| match self.data_type {
            DataType::Utf8 => from.as_string::<i32>().value(row).as_bytes().into(),
            DataType::Binary => from.as_binary::<i32>().value(row).into(),
            _ => [u8::from(from.as_boolean().value(row))].into(),
        });
        let len = |value: &Option<Box<[u8]>>| value.as_ref().map_or(0, |v| v.len());
        self.heap = (self.heap + len(&value)).saturating_sub(len(slot));
        *slot = value;
    }

    fn take(&mut self) -> ArrayRef {
        self.heap = 0;
        let values = std::mem::take(&mut self.values);
        let values = values.iter().map(|v| v.as_deref());
        match self.data_type {
            DataType::Utf8 => Arc::new(StringArray::from_iter(values.map(|v| v.map(String::from_utf8_lossy)))),
            DataType::Binary => Arc::new(BinaryArray::from_iter(values)),
            _ => Arc::new(BooleanArray::from_iter(values.map(|v| v.map(|v| v == [1])))),
        }
    }

    fn bytes(&self) -> usize {
        self.values.capacity() * size_of::<Option<Box<[u8]>>>() + self.heap
    }
}

fn slots(data_type: &DataType) -> Result<Box<dyn Slots>> {
    macro_rules! primitive {
        ($t:ty) => {
            Ok(Box::new(Primitives::<$t> { values: Vec::new(), data_type: data_type.clone() }))
        };
    }
    downcast_primitive! {
        data_type => (primitive),
        DataType::Utf8 | DataType::Binary | DataType::Boolean => {
            Ok(Box::new(Bytes { values: Vec::new(), data_type: data_type.clone(), heap: 0 }))
        }
        other => not_impl_err!("first_value and last_value of {other}"),
    }
}

pub(super) struct FirstLast {
    last: bool,
    ignore_nulls: bool,
    times: Vec<Option<i64>>,
    values: Box<dyn Slots>,
    /// Scratch: the row that a group takes its value from, and the groups that have one.
    row_of: Vec<u32>,
    touched: Vec<usize>,
}

impl FirstLast {
    pub(super) fn new(last: bool, ignore_nulls: bool, data_type: &DataType) -> Result<Self> {
        let values = slots(data_type)?;
        Ok(FirstLast { last, ignore_nulls, times: Vec::new(), values, row_of: Vec::new(), touched: Vec::new() })
    }

    fn add(&mut self, values: &ArrayRef, time: impl Fn(usize) -> Option<i64>, indices: &[usize], groups: usize) {
        self.times.resize(groups, None);
        self.row_of.resize(groups, NONE);
        self.values.resize(groups);
        for (row, &group) in indices.iter().enumerate() {
            let (Some(time), Some(known)) = (time(row), self.times.get_mut(group)) else { continue };
            let better = known.is_none_or(|known| if self.last { time >= known } else { time < known });
            if better && let Some(from) = self.row_of.get_mut(group) {
                *known = Some(time);
                if *from == NONE {
                    self.touched.push(group);
                }
                *from = row as u32;
            }
        }
        for group in self.touched.drain(..) {
            if let Some(row) = self.row_of.get_mut(group) {
                self.values.set(group, values, *row as usize);
                *row = NONE;
            }
        }
    }
}

impl GroupsAccumulator for FirstLast {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        indices: &[usize],
        filter: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        let [values, times] = values else { return super::misfit() };
        let times = times.as_primitive::<TimestampMicrosecondType>();
        let ignore_nulls = self.ignore_nulls;
        let time = |row: usize| {
            let counts = chosen(filter, row) && times.is_valid(row) && !(ignore_nulls && values.is_null(row));
            counts.then(|| times.value(row))
        };
        self.add(values, time, indices, groups);
        Ok(())
    }

    fn merge_batch(
        &mut self,
        states: &[ArrayRef],
        indices: &[usize],
        _: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        let [values, times] = states else { return super::misfit() };
        let times = times.as_primitive::<Int64Type>();
        self.add(values, |row| times.is_valid(row).then(|| times.value(row)), indices, groups);
        Ok(())
    }

    fn state(&mut self, _: EmitTo) -> Result<Vec<ArrayRef>> {
        let times: Int64Array = std::mem::take(&mut self.times).into_iter().collect();
        self.row_of.clear();
        Ok(vec![self.values.take(), Arc::new(times)])
    }

    fn evaluate(&mut self, _: EmitTo) -> Result<ArrayRef> {
        self.times.clear();
        self.row_of.clear();
        Ok(self.values.take())
    }

    fn size(&self) -> usize {
        let times = self.times.capacity() * size_of::<Option<i64>>();
        times + self.row_of.capacity() * 4 + self.touched.capacity() * 8 + self.values.bytes()
    }
}
