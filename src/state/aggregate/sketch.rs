//! `approx_distinct`: a HyperLogLog a group, with 2^14 registers, so a standard error of 0.8%.
//!
//! DataFusion's takes 16 KiB for every group from its first value on. Here a group is a list of the registers in use until
//! these are many. The hash is part of the state's format: it may never change.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryBuilder, BooleanArray, Int64Array};
use arrow::datatypes::{DataType, Float64Type};
use datafusion_common::Result;
use datafusion_expr::{EmitTo, GroupsAccumulator};

use super::{chosen, normalise};

pub(super) const STATE: [DataType; 1] = [DataType::Binary];

const INDEX_BITS: u32 = 14;
const REGISTERS: usize = 1 << INDEX_BITS;
/// More registers in use than this are kept as an array of all.
const SPARSE: usize = 2048;

#[derive(Clone)]
enum Sketch {
    /// Register index << 8 | rank, sorted.
    Sparse(Vec<u32>),
    Dense(Box<[u8]>),
}

impl Sketch {
    fn set(&mut self, register: usize, rank: u8) {
        match self {
            Sketch::Dense(ranks) => {
                if let Some(known) = ranks.get_mut(register) {
                    *known = rank.max(*known);
                }
            }
            Sketch::Sparse(entries) => {
                let entry = (register as u32) << 8 | u32::from(rank);
                let at = entries.partition_point(|known| known >> 8 < register as u32);
                match entries.get_mut(at) {
                    Some(known) if *known >> 8 == register as u32 => *known = entry.max(*known),
                    _ => entries.insert(at, entry),
                }
                if entries.len() > SPARSE {
                    let mut dense = Sketch::Dense(vec![0; REGISTERS].into());
                    for entry in std::mem::take(entries) {
                        dense.set((entry >> 8) as usize, entry as u8);
                    }
                    *self = dense;
                }
            }
        }
    }

    fn add(&mut self, hash: u64) {
        let rank = (hash << INDEX_BITS | 1 << (INDEX_BITS - 1)).leading_zeros() as u8 + 1;
        self.set((hash >> (64 - INDEX_BITS)) as usize, rank);
    }

    fn merge(&mut self, state: &[u8]) {
        if state.len() == REGISTERS {
            for (register, &rank) in state.iter().enumerate().filter(|(_, rank)| **rank > 0) {
                self.set(register, rank);
            }
        } else {
            for entry in state.chunks_exact(4) {
                let entry = entry.iter().rev().fold(0, |entry, byte| entry << 8 | u32::from(*byte));
                self.set((entry >> 8) as usize, entry as u8);
            }
        }
    }

    /// The improved estimator of Ertl, "New cardinality estimation algorithms for HyperLogLog sketches" (2017).
    fn estimate(&self) -> i64 {
        const LARGEST: usize = 64 - INDEX_BITS as usize + 1;
        let mut counts = [0.0; LARGEST + 1];
        let mut count = |rank: u8| {
            if let Some(count) = counts.get_mut(usize::from(rank)) {
                *count += 1.0;
            }
        };
        match self {
            Sketch::Dense(ranks) => ranks.iter().for_each(|rank| count(*rank)),
            Sketch::Sparse(entries) => {
                entries.iter().for_each(|entry| count(*entry as u8));
                (entries.len()..REGISTERS).for_each(|_| count(0));
            }
        }
        let m = REGISTERS as f64;
        let [zeros, middle @ .., full] = counts;
        let mut z = m * tau(1.0 - full / m);
        for count in middle.iter().rev() {
            z = 0.5 * (z + count);
        }
        z += m * sigma(zeros / m);
        (m * m / (2.0 * std::f64::consts::LN_2 * z)).round() as i64
    }
}

fn sigma(mut x: f64) -> f64 {
    if x == 1.0 {
        return f64::INFINITY;
    }
    let (mut y, mut z) = (1.0, x);
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z == before {
            return z;
        }
    }
}

fn tau(mut x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let (mut y, mut z) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x) * (1.0 - x) * y;
        if z == before {
            return z / 3.0;
        }
    }
}

/// FNV-1a, then the finalizer of MurmurHash3, which spreads it over all bits.
fn hash(bytes: &[u8]) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let mut hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, fnv);
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

/// Calls `with` with the bytes of every value that is not null.
fn each_value(array: &ArrayRef, mut with: impl FnMut(usize, &[u8])) {
    match array.data_type() {
        DataType::Utf8 => {
            array.as_string::<i32>().iter().enumerate().for_each(|(i, v)| v.map_or((), |v| with(i, v.as_bytes())))
        }
        DataType::Binary => array.as_binary::<i32>().iter().enumerate().for_each(|(i, v)| v.map_or((), |v| with(i, v))),
        DataType::Boolean => {
            array.as_boolean().iter().enumerate().for_each(|(i, v)| v.map_or((), |v| with(i, &[u8::from(v)])))
        }
        DataType::Float64 => {
            let floats = array.as_primitive::<Float64Type>().iter();
            floats.enumerate().for_each(|(i, v)| v.map_or((), |v| with(i, &normalise(v).to_le_bytes())));
        }
        other => {
            let width = other.primitive_width().unwrap_or(1);
            let data = array.to_data();
            let bytes = data.buffers().first().and_then(|b| b.as_slice().get(data.offset() * width..));
            for (row, value) in bytes.unwrap_or_default().chunks_exact(width).enumerate().take(array.len()) {
                if array.is_valid(row) {
                    with(row, value);
                }
            }
        }
    }
}

#[derive(Default)]
pub(super) struct DistinctSketch {
    groups: Vec<Sketch>,
}

impl DistinctSketch {
    fn resize(&mut self, groups: usize) {
        self.groups.resize(groups, Sketch::Sparse(Vec::new()));
    }
}

impl GroupsAccumulator for DistinctSketch {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        indices: &[usize],
        filter: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.resize(groups);
        let [values] = values else { return super::misfit() };
        each_value(values, |row, bytes| {
            if chosen(filter, row)
                && let Some(sketch) = indices.get(row).and_then(|group| self.groups.get_mut(*group))
            {
                sketch.add(hash(bytes));
            }
        });
        Ok(())
    }

    fn merge_batch(
        &mut self,
        states: &[ArrayRef],
        indices: &[usize],
        _: Option<&BooleanArray>,
        groups: usize,
    ) -> Result<()> {
        self.resize(groups);
        let [states] = states else { return super::misfit() };
        for (state, &group) in states.as_binary::<i32>().iter().zip(indices) {
            if let (Some(state), Some(sketch)) = (state, self.groups.get_mut(group)) {
                sketch.merge(state);
            }
        }
        Ok(())
    }

    fn state(&mut self, _: EmitTo) -> Result<Vec<ArrayRef>> {
        let mut states = BinaryBuilder::new();
        for sketch in std::mem::take(&mut self.groups) {
            match sketch {
                Sketch::Sparse(entries) => {
                    states.append_value(entries.iter().flat_map(|e| e.to_le_bytes()).collect::<Vec<u8>>());
                }
                Sketch::Dense(ranks) => states.append_value(ranks),
            }
        }
        Ok(vec![Arc::new(states.finish())])
    }

    fn evaluate(&mut self, _: EmitTo) -> Result<ArrayRef> {
        let sketches = std::mem::take(&mut self.groups);
        Ok(Arc::new(Int64Array::from_iter_values(sketches.iter().map(Sketch::estimate))))
    }

    fn size(&self) -> usize {
        let heap = |sketch: &Sketch| match sketch {
            Sketch::Sparse(entries) => entries.capacity() * 4,
            Sketch::Dense(ranks) => ranks.len(),
        };
        self.groups.capacity() * size_of::<Sketch>() + self.groups.iter().map(heap).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sketch(values: std::ops::Range<u64>) -> Sketch {
        let mut sketch = Sketch::Sparse(Vec::new());
        values.for_each(|v| sketch.add(hash(&v.to_le_bytes())));
        sketch
    }

    #[test]
    fn estimates_are_within_three_standard_errors() {
        assert_eq!(sketch(0..0).estimate(), 0);
        for n in [1u64, 2, 10, 100, 1_000, 2_000, 5_000, 20_000, 50_000, 1_000_000] {
            let estimate = sketch(0..n).estimate() as f64;
            assert!((estimate - n as f64).abs() <= 0.025 * n as f64, "{n}: {estimate}");
        }
    }

    #[test]
    fn merging_equals_adding() {
        for (n, m) in [(0, 5), (10, 700), (100, 3_000), (3_000, 3_100), (4_000, 100)] {
            let mut accumulator = DistinctSketch { groups: vec![sketch(0..n)] };
            let state = DistinctSketch { groups: vec![sketch(n / 2..n / 2 + m)] }.state(EmitTo::All).unwrap();
            accumulator.merge_batch(&state, &[0], None, 1).unwrap();
            let both = DistinctSketch { groups: vec![sketch(0..n.max(n / 2 + m))] }.state(EmitTo::All).unwrap();
            assert_eq!(&accumulator.state(EmitTo::All).unwrap(), &both);
        }
    }

    #[test]
    fn the_hash_is_part_of_the_format() {
        assert_eq!(hash(b""), 0xefd0_1f60_ba99_2926);
    }
}
