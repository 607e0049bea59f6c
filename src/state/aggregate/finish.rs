//! From what the accumulators hold to the results of the calls.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Decimal128Array, Int64Array};
use arrow::datatypes::{DataType, Decimal128Type, Decimal256Type, Int64Type, i256};
use datafusion_common::Result;

use super::{Accumulator, digest, distinct, misfit, moments, widen};

pub(super) enum Finish {
    /// The accumulator's own result.
    Value,
    /// A sum in more bits than its type has: null where it does not fit.
    Fit(DataType),
    /// A sum of decimals over the count of another accumulator, rounded half up.
    DecimalAverage {
        count: usize,
        /// Of the sum.
        scale: i8,
        data_type: DataType,
    },
    Variance {
        sample: bool,
        root: bool,
    },
    Quantile(f64),
    CountDistinct,
    /// Another call over the distinct values, which are its only argument.
    OverDistinct(Box<OverDistinct>),
}

pub(super) struct OverDistinct {
    pub accumulators: Vec<Accumulator>,
    pub widen: Option<DataType>,
    pub finish: Finish,
}

impl Finish {
    /// The result of a call and in how many groups it could not be computed. `own` is what its accumulator holds, `all`
    /// what every accumulator does.
    pub fn apply(&self, own: &[ArrayRef], all: &[Vec<ArrayRef>], groups: usize) -> Result<(ArrayRef, u64)> {
        let Some(first) = own.first() else { return misfit() };
        Ok(match self {
            Finish::Value => (first.clone(), 0),
            Finish::Fit(data_type) => fit(first, data_type),
            Finish::DecimalAverage { count, scale, data_type } => {
                let Some(counts) = all.get(*count).and_then(|result| result.first()) else { return misfit() };
                decimal_average(first, counts.as_primitive::<Int64Type>(), *scale, data_type)
            }
            Finish::Variance { sample, root } => (moments::variance(own, *sample, *root)?, 0),
            Finish::Quantile(q) => (digest::quantiles(own, *q)?, 0),
            Finish::CountDistinct => (distinct::counts(own)?, 0),
            Finish::OverDistinct(over) => over.apply(first, groups)?,
        })
    }
}

impl OverDistinct {
    fn apply(&self, lists: &ArrayRef, groups: usize) -> Result<(ArrayRef, u64)> {
        let (indices, values) = distinct::flatten(lists);
        let wide = self.widen.as_ref().map_or_else(|| values.clone(), |data_type| widen(&values, data_type));
        // Without a filter DataFusion's accumulators take it that every group has a value.
        let all_rows = BooleanArray::from(vec![true; values.len()]);
        let mut all = Vec::with_capacity(self.accumulators.len());
        for spec in &self.accumulators {
            let mut accumulator = spec.create()?;
            let argument = if matches!(spec.kind, super::Kind::WideSum(_)) { &wide } else { &values };
            accumulator.update_batch(std::slice::from_ref(argument), &indices, Some(&all_rows), groups)?;
            all.push(spec.results(accumulator.as_mut())?);
        }
        let Some(own) = all.first() else { return misfit() };
        self.finish.apply(own, &all, groups)
    }
}

fn wide_sums(sums: &ArrayRef) -> Box<dyn Iterator<Item = Option<i256>> + '_> {
    match sums.data_type() {
        DataType::Decimal256(_, _) => Box::new(sums.as_primitive::<Decimal256Type>().iter()),
        _ => Box::new(sums.as_primitive::<Decimal128Type>().iter().map(|sum| sum.map(i256::from_i128))),
    }
}

fn fit(sums: &ArrayRef, data_type: &DataType) -> (ArrayRef, u64) {
    let mut overflowed = 0;
    if let DataType::Decimal128(precision, _) = data_type {
        let narrow = wide_sums(sums).map(|sum| count_none(decimal(sum?, *precision), &mut overflowed));
        let narrow: Decimal128Array = narrow.collect();
        return (Arc::new(narrow.with_data_type(data_type.clone())), overflowed);
    }
    let sums = sums.as_primitive::<Decimal128Type>();
    let narrow = sums.iter().map(|sum| count_none(i64::try_from(sum?).ok(), &mut overflowed));
    let narrow: Int64Array = narrow.collect();
    (Arc::new(narrow), overflowed)
}

fn decimal_average(sums: &ArrayRef, counts: &Int64Array, scale: i8, data_type: &DataType) -> (ArrayRef, u64) {
    let DataType::Decimal128(precision, to) = data_type else { return (sums.clone(), 0) };
    let factor = i256::from_i128(10i128.pow(to.saturating_sub(scale).max(0) as u32));
    let mut overflowed = 0;
    let average = |(sum, count): (Option<i256>, Option<i64>)| {
        let (sum, count) = (sum?, i256::from_i128(i128::from(count?)));
        let quotient = sum.checked_mul(factor).and_then(|sum| half_up(sum, count));
        count_none(quotient.and_then(|q| decimal(q, *precision)), &mut overflowed)
    };
    let averages: Decimal128Array = wide_sums(sums).zip(counts).map(average).collect();
    (Arc::new(averages.with_data_type(data_type.clone())), overflowed)
}

/// Rounds halves away from zero.
fn half_up(dividend: i256, divisor: i256) -> Option<i256> {
    let (quotient, rest) = (dividend.checked_div(divisor)?, dividend.checked_rem(divisor)?);
    let rest = rest.wrapping_abs();
    let away = if dividend < i256::ZERO { i256::MINUS_ONE } else { i256::ONE };
    Some(if rest.checked_add(rest)? >= divisor { quotient.checked_add(away)? } else { quotient })
}

fn decimal(value: i256, precision: u8) -> Option<i128> {
    let value = value.to_i128()?;
    (value.unsigned_abs() < 10u128.pow(u32::from(precision))).then_some(value)
}

fn count_none<T>(value: Option<T>, nones: &mut u64) -> Option<T> {
    *nones += u64::from(value.is_none());
    value
}
