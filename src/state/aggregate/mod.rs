//! What a window computes: its aggregate calls and the expressions around them.
//!
//! Owns: the distinct calls of a query with their arguments and filters ([`plan`]), their accumulators, and the projection
//! of their results when a window closes. Does not own: groups ([`super::groups`]), SQL ([`crate::transform::sql`]).
//! Invariants: every call and every argument is evaluated once, however often it is written; a state merged into an empty
//! accumulator is that state again, to the bit; nothing depends on how rows were cut into batches.

mod digest;
mod distinct;
mod finish;
mod first_last;
mod moments;
mod plan;
mod sketch;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, UInt32Array};
use arrow::compute::{prep_null_mask_filter, take};
use arrow::datatypes::{
    DataType, Decimal128Type, Decimal256Type, Field, FieldRef, Float64Type, Int64Type, SchemaRef, i256,
};
use arrow::record_batch::RecordBatch;
use datafusion_common::{Result, internal_err};
use datafusion_expr::{EmitTo, GroupsAccumulator};
use datafusion_functions_aggregate_common::aggregate::groups_accumulator::prim_op::PrimitiveGroupsAccumulator;
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::aggregate::AggregateFunctionExpr;

use crate::transform::sql;
use finish::Finish;
pub(super) use plan::{Key, Planner};

/// All aggregates of a query.
pub(super) struct Aggregates {
    arguments: Vec<Argument>,
    /// Sorted by definition, so that their order does not depend on that of the configuration.
    accumulators: Vec<Accumulator>,
    /// The distinct calls.
    calls: Vec<Call>,
    /// Keys, then the results of the calls: what the outputs are computed from.
    results: SchemaRef,
    outputs: Vec<Output>,
}

struct Argument {
    expr: Arc<dyn PhysicalExpr>,
    definition: String,
    data_type: DataType,
    /// Sums are kept in more bits than their values have.
    widen: Option<DataType>,
    /// The same value for every row, as in `count(*)`.
    constant: bool,
    /// A filter: null is false.
    filter: bool,
}

pub(super) struct Accumulator {
    kind: Kind,
    /// Indices into the arguments.
    arguments: Vec<usize>,
    filter: Option<usize>,
    state: Vec<DataType>,
    definition: String,
}

#[derive(Clone)]
enum Kind {
    DataFusion(Arc<AggregateFunctionExpr>),
    /// Of integers and decimals; DataFusion's wraps.
    WideSum(DataType),
    /// DataFusion's leave NaN and the infinities to chance; here NaN is the largest value and the first of equals stays.
    FloatMin,
    FloatMax,
    Moments,
    Digest,
    Sketch,
    Distinct(DataType),
    FirstLast {
        last: bool,
        ignore_nulls: bool,
        value: DataType,
    },
}

/// One aggregate call: an accumulator, and how its result is read off.
struct Call {
    accumulator: usize,
    finish: Finish,
    /// Of the result, nullable or not.
    field: FieldRef,
}

/// One column of the table: a result as it is, or an expression over results and keys.
struct Output {
    expr: Arc<dyn PhysicalExpr>,
    data_type: DataType,
}

/// What closing a window gives: the columns, and how many of their values are null because they could not be computed.
pub(super) struct Finished {
    pub columns: Vec<ArrayRef>,
    pub failed: u64,
}

impl Aggregates {
    pub fn accumulators(&self) -> &[Accumulator] {
        &self.accumulators
    }

    /// What the aggregates read, and how many values became null because their expression failed.
    pub fn arguments(&self, batch: &RecordBatch) -> Result<(Vec<ArrayRef>, u64)> {
        let mut failed = 0;
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.arguments.len());
        for argument in &self.arguments {
            let (column, rows) = sql::evaluate_or_null(&argument.expr, batch, &argument.data_type)?;
            failed += rows;
            columns.push(match &argument.widen {
                Some(wide) => widen(&column, wide),
                None if argument.filter && column.null_count() > 0 => {
                    Arc::new(prep_null_mask_filter(column.as_boolean()))
                }
                None => column,
            });
        }
        Ok((columns, failed))
    }

    /// The given rows of [`Self::arguments`].
    pub fn gather(&self, columns: &[ArrayRef], rows: &UInt32Array) -> Result<Vec<ArrayRef>> {
        let gather = |(argument, column): (&Argument, &ArrayRef)| match argument.constant {
            true => Ok(column.slice(0, rows.len())),
            false => Ok(take(column, rows, None)?),
        };
        self.arguments.iter().zip(columns).map(gather).collect()
    }

    /// The outputs, from keys and what [`Accumulator::results`] gave.
    pub fn finish(&self, keys: &[ArrayRef], results: &[Vec<ArrayRef>], groups: usize) -> Result<Finished> {
        let mut failed = 0;
        let mut columns = keys.to_vec();
        for call in &self.calls {
            let Some(result) = results.get(call.accumulator) else { return misfit() };
            let (column, overflowed) = call.finish.apply(result, results, groups)?;
            failed += overflowed;
            columns.push(column);
        }
        let batch = sql::batch_of(self.results.clone(), columns, groups)?;
        let mut columns = Vec::with_capacity(self.outputs.len());
        for output in &self.outputs {
            let (column, rows) = sql::evaluate_or_null(&output.expr, &batch, &output.data_type)?;
            failed += rows;
            columns.push(column);
        }
        Ok(Finished { columns, failed })
    }

    /// The columns of the states of all accumulators.
    pub fn state_fields(&self) -> Vec<Field> {
        let fields = self.accumulators.iter().enumerate().flat_map(|(i, accumulator)| {
            let field = move |(j, state): (usize, &DataType)| Field::new(format!("{i}.{j}"), state.clone(), true);
            accumulator.state.iter().enumerate().map(field)
        });
        fields.collect()
    }

    /// What the meaning of the state depends on, a line a call; not what is computed from the calls.
    pub fn definition(&self) -> String {
        self.accumulators.iter().map(|a| format!("{} -> {:?}\n", a.definition, a.state)).collect()
    }
}

impl Accumulator {
    pub fn state(&self) -> &[DataType] {
        &self.state
    }

    /// Passes the rows on, whose groups are in `indices`; `arguments` are those of the query.
    pub fn update(
        &self,
        accumulator: &mut dyn GroupsAccumulator,
        arguments: &[ArrayRef],
        indices: &[usize],
        groups: usize,
    ) -> Result<()> {
        let filter = match self.filter {
            Some(index) => match arguments.get(index) {
                Some(filter) => Some(filter.as_boolean()),
                None => return misfit(),
            },
            None => None,
        };
        if let [index] = self.arguments.as_slice() {
            let Some(argument) = arguments.get(*index) else { return misfit() };
            return accumulator.update_batch(std::slice::from_ref(argument), indices, filter, groups);
        }
        let own: Vec<ArrayRef> = self.arguments.iter().filter_map(|index| arguments.get(*index).cloned()).collect();
        accumulator.update_batch(&own, indices, filter, groups)
    }

    /// What the results of the calls are read off from: for some kinds the state itself.
    pub fn results(&self, accumulator: &mut dyn GroupsAccumulator) -> Result<Vec<ArrayRef>> {
        match self.kind {
            Kind::Moments | Kind::Digest | Kind::Distinct(_) => accumulator.state(EmitTo::All),
            _ => Ok(vec![accumulator.evaluate(EmitTo::All)?]),
        }
    }

    pub fn create(&self) -> Result<Box<dyn GroupsAccumulator>> {
        self.kind.create()
    }
}

impl Kind {
    fn create(&self) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(match self {
            Kind::DataFusion(expr) => expr.create_groups_accumulator()?,
            // 2^64 values of 64 bits fit into 128, as do 10^10 of 28 digits; into 256 fits every sum
            Kind::WideSum(wide @ DataType::Decimal256(_, _)) => {
                let add = |sum: &mut i256, value: i256| *sum = sum.wrapping_add(value);
                Box::new(PrimitiveGroupsAccumulator::<Decimal256Type, _>::new(wide, add))
            }
            Kind::WideSum(wide) => {
                let add = |sum: &mut i128, value: i128| *sum = sum.wrapping_add(value);
                Box::new(PrimitiveGroupsAccumulator::<Decimal128Type, _>::new(wide, add))
            }
            Kind::FloatMin => Box::new(
                PrimitiveGroupsAccumulator::<Float64Type, _>::new(&DataType::Float64, |min: &mut f64, value: f64| {
                    if value < *min || min.is_nan() {
                        *min = value;
                    }
                })
                .with_starting_value(f64::NAN),
            ),
            Kind::FloatMax => Box::new(
                PrimitiveGroupsAccumulator::<Float64Type, _>::new(&DataType::Float64, |max: &mut f64, value: f64| {
                    if value > *max || value.is_nan() {
                        *max = value;
                    }
                })
                .with_starting_value(f64::NEG_INFINITY),
            ),
            Kind::Moments => Box::new(moments::MomentsAccumulator::default()),
            Kind::Digest => Box::new(digest::DigestAccumulator::default()),
            Kind::Sketch => Box::new(sketch::DistinctSketch::default()),
            Kind::Distinct(value) => Box::new(distinct::Distinct::new(value.clone())),
            Kind::FirstLast { last, ignore_nulls, value } => {
                Box::new(first_last::FirstLast::new(*last, *ignore_nulls, value)?)
            }
        })
    }
}

/// Integers and decimals with the digits that their sum may need.
fn widen(column: &ArrayRef, wide: &DataType) -> ArrayRef {
    match (column.data_type(), wide) {
        (DataType::Int64, _) => {
            let values = column.as_primitive::<Int64Type>().unary::<_, Decimal128Type>(i128::from);
            Arc::new(values.with_data_type(wide.clone()))
        }
        (_, DataType::Decimal256(_, _)) => {
            let values = column.as_primitive::<Decimal128Type>().unary::<_, Decimal256Type>(i256::from_i128);
            Arc::new(values.with_data_type(wide.clone()))
        }
        _ => Arc::new(column.as_primitive::<Decimal128Type>().clone().with_data_type(wide.clone())),
    }
}

/// -0.0 and 0.0 are one value, shown as 0.0, and all NaNs are one value, as in Spark.
fn normalise(value: f64) -> f64 {
    if value.is_nan() { f64::NAN } else { value + 0.0 }
}

pub(super) fn normalise_column(column: &ArrayRef) -> ArrayRef {
    match column.as_primitive_opt::<Float64Type>() {
        Some(floats) => {
            let normal: Float64Array = floats.unary(normalise);
            Arc::new(normal)
        }
        None => column.clone(),
    }
}

fn chosen(filter: Option<&BooleanArray>, row: usize) -> bool {
    filter.is_none_or(|filter| filter.value(row))
}

fn misfit<T>() -> Result<T> {
    internal_err!("an aggregate was given other columns than it has")
}
