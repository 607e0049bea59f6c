//! One `[[windows]]` entry, compiled against the columns that it reads.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, UInt32Array};
use arrow::compute::{prep_null_mask_filter, take};
use arrow::datatypes::{DataType, Decimal128Type, Field, Float64Type, Int64Type, Schema, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;
use arrow::row::{RowConverter, SortField};
use datafusion_common::{DataFusionError, Result as DataFusionResult};
use datafusion_expr::{Expr, GroupsAccumulator};
use datafusion_functions_aggregate_common::aggregate::groups_accumulator::GroupsAccumulatorAdapter;
use datafusion_functions_aggregate_common::aggregate::groups_accumulator::prim_op::PrimitiveGroupsAccumulator;
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::aggregate::{AggregateExprBuilder, AggregateFunctionExpr};
use datafusion_physical_expr::expressions::Literal;

use super::Error;
use crate::config::WindowConfig;
use crate::transform::{self, sql};
use crate::window::Windowing;

/// Sums of 64-bit integers are kept in 128 bits, so that only the final value can be too large.
const INTEGER_SUM: DataType = DataType::Decimal128(38, 0);

/// Windows of one kind with their filter, group keys and aggregates.
pub struct WindowQuery {
    table: String,
    windowing: Windowing,
    filter: Option<Arc<dyn PhysicalExpr>>,
    time_zone: Option<Arc<str>>,
    /// Indices of the key columns in the input.
    keys: Vec<usize>,
    key_schema: SchemaRef,
    key_rows: RowConverter,
    /// What the aggregates read, each once.
    arguments: Vec<Argument>,
    aggregates: Vec<Aggregate>,
    state_schema: SchemaRef,
    output: SchemaRef,
    definition: String,
}

struct Argument {
    expr: Arc<dyn PhysicalExpr>,
    data_type: DataType,
    /// An integer column to be summed in 128 bits.
    widen: bool,
    /// The same value for every row, as in `count(*)`.
    constant: bool,
}

pub(super) struct Aggregate {
    /// Index into the query's arguments.
    argument: usize,
    kind: Kind,
    state: Vec<DataType>,
}

enum Kind {
    DataFusion(Arc<AggregateFunctionExpr>),
    /// DataFusion's wraps.
    IntegerSum,
    /// DataFusion's leave NaN and the infinities to chance; here NaN is the largest value and the first of equals stays.
    FloatMin,
    FloatMax,
}

impl WindowQuery {
    /// `input` is what [`crate::transform::Transform`] gives. All mistakes at once, each with its place.
    pub fn compile(config: &WindowConfig, input: &SchemaRef, event_time: &str) -> Result<WindowQuery, Vec<String>> {
        let table = &config.table.table;
        let at = |place: &str, message: &str| format!("window table {table}: {place}: {message}");
        let mut errors = Vec::new();

        let filter = config.filter.as_ref().and_then(|text| match transform::compile_filter(text, input) {
            Ok(filter) => Some(filter),
            Err(e) => {
                errors.push(at(&format!("filter = {text:?}"), &e));
                None
            }
        });
        let time_zone = match input.field_with_name(event_time).map(Field::data_type) {
            Ok(DataType::Timestamp(TimeUnit::Microsecond, zone)) => zone.clone(),
            Ok(other) => {
                errors.push(at("event_time", &format!("column {event_time} is {other}, not a timestamp")));
                None
            }
            Err(_) => {
                errors.push(at("event_time", &format!("there is no column {event_time}")));
                None
            }
        };
        let bound = DataType::Timestamp(TimeUnit::Microsecond, time_zone.clone());
        let mut output = vec![Field::new("window_start", bound.clone(), false), Field::new("window_end", bound, false)];

        let mut keys = Vec::new();
        for name in &config.group_by {
            match input.column_with_name(name) {
                Some((index, field)) if sql::column_type(field.data_type()).is_some() => {
                    keys.push(index);
                    output.push(field.clone().with_metadata(Default::default()));
                }
                Some((_, field)) => {
                    errors.push(at("group_by", &format!("{name} is {}, not a flat column", field.data_type())));
                }
                None => {
                    let columns: Vec<&str> = input.fields().iter().map(|f| f.name().as_str()).collect();
                    errors.push(at("group_by", &format!("there is no column {name}; columns: {}", columns.join(", "))));
                }
            }
        }
        let mut arguments = Vec::new();
        let mut aggregates = Vec::new();
        for (name, text) in &config.aggregates {
            match Aggregate::compile(name, text, input, &mut arguments) {
                Ok((aggregate, field)) => {
                    aggregates.push(aggregate);
                    output.push(field);
                }
                Err(e) => errors.push(at(&format!("aggregates.{name} = {text:?}"), &e)),
            }
        }
        if config.aggregates.is_empty() {
            errors.push(at("aggregates", "needs at least one, such as events = \"count(*)\""));
        }
        for (i, field) in output.iter().enumerate() {
            if output.iter().skip(i + 1).any(|other| other.name() == field.name()) {
                errors.push(at(field.name(), "names two columns; give the aggregate or the key another name"));
            }
        }
        let key_fields: Vec<Field> = output.iter().skip(2).take(keys.len()).cloned().collect();
        let key_sorts = key_fields.iter().map(|f| SortField::new(f.data_type().clone())).collect();
        let key_rows = match RowConverter::new(key_sorts) {
            Ok(key_rows) if errors.is_empty() => key_rows,
            Ok(_) => return Err(errors),
            Err(e) => return Err([errors, vec![at("group_by", &e.to_string())]].concat()),
        };
        let states = aggregates.iter().enumerate().flat_map(|(i, aggregate)| {
            let field =
                move |(j, data_type): (usize, &DataType)| Field::new(format!("{i}.{j}"), data_type.clone(), true);
            aggregate.state.iter().enumerate().map(field)
        });
        let state_fields: Vec<Field> = key_fields.iter().cloned().chain(states).collect();
        let mut definition = format!("{} {event_time} {state_fields:?} {:?}", config.windowing, config.aggregates);
        if let Some(filter) = &config.filter {
            definition.push_str(&format!(" {filter:?}"));
        }
        Ok(WindowQuery {
            table: table.clone(),
            windowing: config.windowing.clone(),
            filter,
            time_zone,
            keys,
            key_schema: Arc::new(Schema::new(key_fields)),
            key_rows,
            arguments,
            aggregates,
            state_schema: Arc::new(Schema::new(state_fields)),
            output: Arc::new(Schema::new(output)),
            definition,
        })
    }

    /// `window_start`, `window_end` (timestamptz in microseconds, not null), the keys, the aggregates.
    pub fn output_schema(&self) -> SchemaRef {
        self.output.clone()
    }

    pub fn windowing(&self) -> &Windowing {
        &self.windowing
    }

    /// Which rows the filter keeps, and on how many it failed; these are left out. None: it keeps all.
    pub(super) fn filter(&self, batch: &RecordBatch) -> DataFusionResult<(Option<BooleanArray>, u64)> {
        let Some(filter) = &self.filter else { return Ok((None, 0)) };
        let (keep, failed) = sql::evaluate_or_null(filter, batch, &DataType::Boolean)?;
        let keep = keep.as_boolean();
        let keep = if keep.null_count() > 0 { prep_null_mask_filter(keep) } else { keep.clone() };
        Ok(((keep.true_count() < keep.len()).then_some(keep), failed))
    }

    /// The table that its windows go to.
    pub fn table(&self) -> &str {
        &self.table
    }

    pub(super) fn time_zone(&self) -> Option<Arc<str>> {
        self.time_zone.clone()
    }

    pub(super) fn key_schema(&self) -> &SchemaRef {
        &self.key_schema
    }

    /// Keys as bytes that are equal when the keys are.
    pub(super) fn key_rows(&self) -> &RowConverter {
        &self.key_rows
    }

    /// Keys, then the states of all aggregates.
    pub(super) fn state_schema(&self) -> &SchemaRef {
        &self.state_schema
    }

    pub(super) fn aggregates(&self) -> &[Aggregate] {
        &self.aggregates
    }

    /// Everything that the meaning of this query's state depends on. Names of columns and what is computed from the results
    /// of aggregate calls are not in it: they can change while windows are open.
    pub fn state_definition(&self) -> &str {
        &self.definition
    }

    pub(super) fn error(&self, error: &DataFusionError) -> Error {
        Error::Aggregate { table: self.table.clone(), message: sql::first_line(error) }
    }

    pub(super) fn key_columns(&self, batch: &RecordBatch) -> Vec<ArrayRef> {
        self.keys.iter().map(|&index| normalise_key(batch.column(index))).collect()
    }

    /// What the aggregates read, and how many values became null because their expression failed.
    pub(super) fn arguments(&self, batch: &RecordBatch) -> DataFusionResult<(Vec<ArrayRef>, u64)> {
        let mut failed = 0;
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.arguments.len());
        for argument in &self.arguments {
            let (column, rows) = sql::evaluate_or_null(&argument.expr, batch, &argument.data_type)?;
            failed += rows;
            columns.push(match argument.widen {
                true => {
                    let wide = column.as_primitive::<Int64Type>().unary::<_, Decimal128Type>(i128::from);
                    Arc::new(wide.with_data_type(INTEGER_SUM))
                }
                false => column,
            });
        }
        Ok((columns, failed))
    }

    /// The given rows of [`Self::arguments`].
    pub(super) fn gather(&self, columns: &[ArrayRef], rows: &UInt32Array) -> DataFusionResult<Vec<ArrayRef>> {
        let gather = |(argument, column): (&Argument, &ArrayRef)| match argument.constant {
            true => Ok(column.slice(0, rows.len())),
            false => Ok(take(column, rows, None)?),
        };
        self.arguments.iter().zip(columns).map(gather).collect()
    }
}

/// -0.0 and 0.0 are one group, shown as 0.0, and all NaNs are one group, as in Spark.
fn normalise_key(column: &ArrayRef) -> ArrayRef {
    match column.as_primitive_opt::<Float64Type>() {
        Some(floats) => {
            let normal: Float64Array = floats.unary(|v| if v.is_nan() { f64::NAN } else { v + 0.0 });
            Arc::new(normal)
        }
        None => column.clone(),
    }
}

impl Argument {
    fn same(&self, other: &Argument) -> bool {
        self.expr.eq(&other.expr) && self.data_type == other.data_type && self.widen == other.widen
    }
}

impl Aggregate {
    fn compile(
        name: &str,
        text: &str,
        input: &SchemaRef,
        arguments: &mut Vec<Argument>,
    ) -> Result<(Aggregate, Field), String> {
        let allowed = || format!("must be one aggregate: {}", sql::AGGREGATES.map(|f| format!("{f}(...)")).join(", "));
        let scope = sql::Scope::new(input)?;
        let parsed = scope.parse(text).map_err(|e| match e.starts_with("Invalid function") {
            true => format!("{e}; {}", allowed()),
            false => e,
        })?;
        let Expr::AggregateFunction(call) = parsed else { return Err(allowed()) };
        let params = call.params;
        if params.distinct || params.filter.is_some() || !params.order_by.is_empty() || params.null_treatment.is_some()
        {
            return Err("DISTINCT, FILTER, ORDER BY and IGNORE NULLS are not supported in a window yet".to_string());
        }
        let function = call.func.name().to_string();
        let Ok([argument]) = <[Expr; 1]>::try_from(params.args) else {
            return Err(format!("{function} takes one argument"));
        };
        let found = scope.data_type(&argument)?;
        let flat = sql::column_type(&found).ok_or_else(|| format!("{function} of {found} is not supported"))?;
        let argument = scope.cast(argument, &flat)?;
        let decimal = matches!(flat, DataType::Decimal128(_, _));
        if decimal && matches!(function.as_str(), "sum" | "avg") {
            return Err(format!("{function} of {flat} is not supported; CAST it to DOUBLE"));
        }
        let argument = match function.as_str() {
            "sum" if flat.is_integer() => scope.cast(argument, &DataType::Int64)?,
            _ => argument,
        };
        let argument_type = scope.data_type(&argument)?;
        let physical = scope.physical(&argument)?;
        let (kind, state, output) = match function.as_str() {
            "sum" if flat.is_integer() => (Kind::IntegerSum, vec![INTEGER_SUM], DataType::Int64),
            "min" if flat == DataType::Float64 => (Kind::FloatMin, vec![flat.clone()], flat),
            "max" if flat == DataType::Float64 => (Kind::FloatMax, vec![flat.clone()], flat),
            _ => {
                let expr = AggregateExprBuilder::new(call.func, vec![physical.clone()])
                    .schema(input.clone())
                    .alias(name)
                    .build()
                    .map_err(|e| sql::first_line(&e))?;
                let state = expr.state_fields().map_err(|e| sql::first_line(&e))?;
                let state = state.iter().map(|f| f.data_type().clone()).collect();
                let output = expr.field().data_type().clone();
                (Kind::DataFusion(Arc::new(expr)), state, output)
            }
        };
        if sql::column_type(&output).as_ref() != Some(&output) {
            return Err(format!("{function} gives {output}, which a table cannot keep"));
        }
        let field = Field::new(name, output, function != "count");
        let argument = Argument {
            constant: physical.as_any().is::<Literal>(),
            expr: physical,
            data_type: argument_type,
            widen: matches!(kind, Kind::IntegerSum),
        };
        let index = arguments.iter().position(|known| known.same(&argument)).unwrap_or_else(|| {
            arguments.push(argument);
            arguments.len() - 1
        });
        Ok((Aggregate { argument: index, kind, state }, field))
    }

    pub(super) fn argument(&self) -> usize {
        self.argument
    }

    pub(super) fn states(&self) -> usize {
        self.state.len()
    }

    pub(super) fn is_integer_sum(&self) -> bool {
        matches!(self.kind, Kind::IntegerSum)
    }

    pub(super) fn accumulator(&self) -> DataFusionResult<Box<dyn GroupsAccumulator>> {
        Ok(match &self.kind {
            Kind::DataFusion(expr) if expr.groups_accumulator_supported() => expr.create_groups_accumulator()?,
            Kind::DataFusion(expr) => {
                let expr = expr.clone();
                Box::new(GroupsAccumulatorAdapter::new(move || expr.create_accumulator()))
            }
            // 2^64 rows of 64 bits fit into 128
            Kind::IntegerSum => Box::new(PrimitiveGroupsAccumulator::<Decimal128Type, _>::new(
                &INTEGER_SUM,
                |sum: &mut i128, value: i128| *sum = sum.wrapping_add(value),
            )),
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
        })
    }
}
