//! Count, mean and squared deviations of a column of floats: the state of variances and standard deviations.
//!
//! DataFusion's loses a bit of the mean when a state is merged into an empty one. Here that changes nothing, so that a state
//! that went through a file is the same as one that did not.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, UInt64Array};
use arrow::datatypes::{DataType, Float64Type, UInt64Type};
use datafusion_common::Result;
use datafusion_expr::{EmitTo, GroupsAccumulator};

use super::chosen;

pub(super) const STATE: [DataType; 3] = [DataType::UInt64, DataType::Float64, DataType::Float64];

/// Welford's method; states merge by Chan's.
#[derive(Clone, Copy, Default)]
struct Moments {
    count: u64,
    mean: f64,
    /// The sum of squared deviations from the mean.
    m2: f64,
}

impl Moments {
    fn add(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.m2 += before * (value - self.mean);
    }

    fn merge(&mut self, other: Moments) {
        if other.count == 0 {
            return;
        }
        if self.count == 0 {
            *self = other;
            return;
        }
        let (ours, theirs) = (self.count as f64, other.count as f64);
        let delta = other.mean - self.mean;
        self.count += other.count;
        self.mean += delta * (theirs / (ours + theirs));
        self.m2 += other.m2 + delta * delta * (ours * theirs / (ours + theirs));
    }
}

#[derive(Default)]
pub(super) struct MomentsAccumulator {
    groups: Vec<Moments>,
}

impl GroupsAccumulator for MomentsAccumulator {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        indices: &[usize],
        filter: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.groups.resize(groups, Moments::default());
        let [values] = values else { return super::misfit() };
        let values = values.as_primitive::<Float64Type>();
        for (row, &group) in indices.iter().enumerate() {
            if chosen(filter, row)
                && values.is_valid(row)
                && let Some(moments) = self.groups.get_mut(group)
            {
                moments.add(values.value(row));
            }
        }
        Ok(())
    }

    fn merge_batch(
        &mut self,
        states: &[ArrayRef],
        indices: &[usize],
        _: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.groups.resize(groups, Moments::default());
        let [counts, means, m2s] = states else { return super::misfit() };
        let (counts, means) = (counts.as_primitive::<UInt64Type>(), means.as_primitive::<Float64Type>());
        let m2s = m2s.as_primitive::<Float64Type>();
        for (row, &group) in indices.iter().enumerate() {
            if let Some(moments) = self.groups.get_mut(group) {
                moments.merge(Moments { count: counts.value(row), mean: means.value(row), m2: m2s.value(row) });
            }
        }
        Ok(())
    }

    fn state(&mut self, _: EmitTo) -> Result<Vec<ArrayRef>> {
        let groups = std::mem::take(&mut self.groups);
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(groups.iter().map(|m| m.count))),
            Arc::new(Float64Array::from_iter_values(groups.iter().map(|m| m.mean))),
            Arc::new(Float64Array::from_iter_values(groups.iter().map(|m| m.m2))),
        ])
    }

    fn evaluate(&mut self, _: EmitTo) -> Result<ArrayRef> {
        super::misfit()
    }

    fn size(&self) -> usize {
        self.groups.capacity() * size_of::<Moments>()
    }
}

/// The variance from the states; of a sample there is none of fewer than two values.
pub(super) fn variance(states: &[ArrayRef], sample: bool, root: bool) -> Result<ArrayRef> {
    let [counts, _, m2s] = states else { return super::misfit() };
    let (counts, m2s) = (counts.as_primitive::<UInt64Type>(), m2s.as_primitive::<Float64Type>());
    let of = |(count, m2): (&u64, &f64)| {
        let divisor = count.saturating_sub(u64::from(sample));
        let variance = (divisor > 0).then(|| m2 / divisor as f64)?;
        Some(if root { variance.sqrt() } else { variance })
    };
    let variances: Float64Array = counts.values().iter().zip(m2s.values()).map(of).collect();
    Ok(Arc::new(variances))
}
