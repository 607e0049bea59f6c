//! `approx_percentile_cont`: a t-digest a group. One digest answers every percentile of its column.
//!
//! A group of up to 512 values keeps them all and its percentiles are exact; beyond that they become some two hundred
//! centroids, finest at both ends. Unlike DataFusion's, the outcome does not depend on how rows were cut into batches, and
//! merging into an empty digest changes nothing. NaN is the largest value and never mixes with others.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, Float64Builder, ListBuilder};
use arrow::datatypes::{DataType, Field, Float64Type};
use datafusion_common::Result;
use datafusion_expr::{EmitTo, GroupsAccumulator};

use super::chosen;

/// How many centroids may wait before they are compressed.
const FULL: usize = 512;
const COMPRESSION: f64 = 200.0;

/// Smallest value, largest value, then mean and weight of every centroid; empty: no values.
pub(super) fn state() -> Vec<DataType> {
    vec![DataType::List(Arc::new(Field::new_list_field(DataType::Float64, true)))]
}

#[derive(Clone, Copy)]
struct Centroid {
    mean: f64,
    weight: f64,
}

#[derive(Clone, Default)]
struct Digest {
    /// In the order in which they came since the last compression, sorted before that.
    centroids: Vec<Centroid>,
    min: f64,
    max: f64,
}

impl Digest {
    fn push(&mut self, centroid: Centroid, min: f64, max: f64) {
        if self.centroids.is_empty() {
            (self.min, self.max) = (min, max);
        }
        if min.total_cmp(&self.min).is_lt() {
            self.min = min;
        }
        if max.total_cmp(&self.max).is_gt() {
            self.max = max;
        }
        self.centroids.push(centroid);
        if self.centroids.len() > FULL {
            self.compress();
        }
    }

    fn sort(&mut self) {
        self.centroids.sort_by(|a, b| a.mean.total_cmp(&b.mean));
    }

    /// Merges neighbours as long as they stay within one unit of the scale `q ↦ k`, which is steep at both ends.
    fn compress(&mut self) {
        self.sort();
        let total: f64 = self.centroids.iter().map(|c| c.weight).sum();
        let limit = |k: f64| {
            let part = k / COMPRESSION;
            total * if part < 0.5 { 2.0 * part * part } else { 1.0 - 2.0 * (1.0 - part) * (1.0 - part) }
        };
        let mut k = 1.0;
        let mut seen = 0.0;
        let mut merged: Vec<Centroid> = Vec::with_capacity(FULL);
        for centroid in std::mem::take(&mut self.centroids) {
            seen += centroid.weight;
            match merged.last_mut() {
                Some(last) if last.mean.to_bits() == centroid.mean.to_bits() && seen <= limit(k) => {
                    last.weight += centroid.weight;
                }
                Some(last) if last.mean.is_finite() && centroid.mean.is_finite() && seen <= limit(k) => {
                    last.weight += centroid.weight;
                    last.mean += (centroid.mean - last.mean) * (centroid.weight / last.weight);
                }
                _ => {
                    while k < COMPRESSION && seen > limit(k) {
                        k += 1.0;
                    }
                    merged.push(centroid);
                }
            }
        }
        self.centroids = merged;
    }

    /// The value at `q` of the way from the smallest to the largest, interpolated, as `PERCENTILE_CONT` does.
    fn quantile(&self, q: f64) -> Option<f64> {
        let total: f64 = self.centroids.iter().map(|c| c.weight).sum();
        let rank = q * (total - 1.0);
        // Rank and value on the left; a centroid lies in the middle of the ranks that it stands for.
        let mut left = (0.0, self.min);
        let mut before = 0.0;
        for centroid in &self.centroids {
            let right = (before + (centroid.weight - 1.0) / 2.0, centroid.mean);
            if rank <= right.0 {
                return Some(between(left, right, rank));
            }
            left = right;
            before += centroid.weight;
        }
        (!self.centroids.is_empty()).then(|| between(left, (total - 1.0, self.max), rank))
    }
}

fn between(left: (f64, f64), right: (f64, f64), rank: f64) -> f64 {
    let part = (rank - left.0) / (right.0 - left.0);
    if right.0 <= left.0 || part >= 1.0 {
        return right.1;
    }
    if part <= 0.0 || left.1 == right.1 || left.1.is_infinite() {
        return left.1;
    }
    left.1 + (right.1 - left.1) * part
}

#[derive(Default)]
pub(super) struct DigestAccumulator {
    groups: Vec<Digest>,
}

impl GroupsAccumulator for DigestAccumulator {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        indices: &[usize],
        filter: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.groups.resize(groups, Digest::default());
        let [values] = values else { return super::misfit() };
        let values = values.as_primitive::<Float64Type>();
        for (row, &group) in indices.iter().enumerate() {
            if chosen(filter, row)
                && values.is_valid(row)
                && let Some(digest) = self.groups.get_mut(group)
            {
                let mean = super::normalise(values.value(row));
                digest.push(Centroid { mean, weight: 1.0 }, mean, mean);
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
        self.groups.resize(groups, Digest::default());
        let [states] = states else { return super::misfit() };
        for (state, &group) in states.as_list::<i32>().iter().zip(indices) {
            let (Some(state), Some(digest)) = (state, self.groups.get_mut(group)) else { continue };
            let [min, max, centroids @ ..] = &state.as_primitive::<Float64Type>().values()[..] else { continue };
            for centroid in centroids.chunks_exact(2) {
                if let [mean, weight] = centroid {
                    digest.push(Centroid { mean: *mean, weight: *weight }, *min, *max);
                }
            }
        }
        Ok(())
    }

    fn state(&mut self, _: EmitTo) -> Result<Vec<ArrayRef>> {
        let mut states = ListBuilder::new(Float64Builder::new());
        for digest in std::mem::take(&mut self.groups) {
            if !digest.centroids.is_empty() {
                states.values().append_slice(&[digest.min, digest.max]);
            }
            for centroid in &digest.centroids {
                states.values().append_slice(&[centroid.mean, centroid.weight]);
            }
            states.append(true);
        }
        Ok(vec![Arc::new(states.finish())])
    }

    fn evaluate(&mut self, _: EmitTo) -> Result<ArrayRef> {
        super::misfit()
    }

    fn size(&self) -> usize {
        let heap = self.groups.iter().map(|d| d.centroids.capacity() * size_of::<Centroid>());
        self.groups.capacity() * size_of::<Digest>() + heap.sum::<usize>()
    }
}

pub(super) fn quantiles(states: &[ArrayRef], q: f64) -> Result<ArrayRef> {
    let [states] = states else { return super::misfit() };
    let of = |state: Option<ArrayRef>| {
        let state = state?;
        let [min, max, centroids @ ..] = &state.as_primitive::<Float64Type>().values()[..] else { return None };
        let centroids =
            centroids.chunks_exact(2).filter_map(|c| Some(Centroid { mean: *c.first()?, weight: *c.last()? }));
        let mut digest = Digest { centroids: centroids.collect(), min: *min, max: *max };
        digest.sort();
        digest.quantile(q)
    };
    let values: Float64Array = states.as_list::<i32>().iter().map(of).collect();
    Ok(Arc::new(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(values: impl IntoIterator<Item = f64>) -> Digest {
        let mut digest = Digest::default();
        values.into_iter().for_each(|v| digest.push(Centroid { mean: v, weight: 1.0 }, v, v));
        digest.sort();
        digest
    }

    #[test]
    fn few_values_are_exact() {
        assert_eq!(digest([]).quantile(0.5), None);
        let four = digest([4.0, 1.0, 3.0, 2.0]);
        for (q, value) in [(0.0, 1.0), (0.5, 2.5), (0.25, 1.75), (1.0, 4.0)] {
            assert_eq!(four.quantile(q), Some(value));
        }
        assert_eq!(digest([7.0]).quantile(0.9), Some(7.0));
        let odd = digest([f64::NAN, f64::NEG_INFINITY, 1.0, f64::INFINITY]);
        assert_eq!((odd.quantile(0.0), odd.quantile(1.0 / 3.0)), (Some(f64::NEG_INFINITY), Some(1.0)));
        assert!(odd.quantile(1.0).unwrap().is_nan());
    }

    #[test]
    fn many_values_are_close_and_few_centroids() {
        let n = 100_000u64;
        // A permutation, so that the order is not the sorted one.
        let many = digest((0..n).map(|i| (i * 48_271 % n) as f64));
        assert!(many.centroids.len() <= FULL, "{}", many.centroids.len());
        assert_eq!(many.centroids.iter().map(|c| c.weight).sum::<f64>(), n as f64);
        for q in [0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0] {
            let (found, exact) = (many.quantile(q).unwrap(), q * (n - 1) as f64);
            let error = (found - exact).abs() / n as f64;
            assert!(error <= 0.02 * (q * (1.0 - q)).max(0.04), "{q}: {found} for {exact}");
        }
    }

    #[test]
    fn not_a_number_stays_apart() {
        let mixed = digest((0..10_000).map(|i| if i % 10 == 0 { f64::NAN } else { f64::from(i) }));
        assert!(mixed.quantile(0.95).unwrap().is_nan());
        assert!(mixed.quantile(0.85).unwrap() < 10_000.0);
    }
}
