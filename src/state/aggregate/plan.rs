//! From the SQL of `[windows.aggregates]` to calls, accumulators and the expressions around them.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use datafusion_common::ScalarValue;
use datafusion_common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion_expr::expr::{AggregateFunction, NullTreatment};
use datafusion_expr::{AggregateUDF, Expr};
use datafusion_functions_aggregate::{bool_and_or, count};
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::aggregate::AggregateExprBuilder;
use datafusion_physical_expr::expressions::{Column, Literal};

use super::finish::{Finish, OverDistinct};
use super::{Accumulator, Aggregates, Argument, Call, Kind, Output, digest, distinct, first_last, moments, sketch};
use crate::transform::sql::{self, Scope};

/// Sums of 64-bit integers are kept in 128 bits, so that only the final value can be too large.
const INTEGER_SUM: DataType = DataType::Decimal128(38, 0);

/// A group key: its SQL as it was read and its column in the table.
pub struct Key {
    pub sql: Expr,
    pub field: Field,
}

/// Collects the aggregates of one query.
pub struct Planner<'a> {
    scope: Scope,
    input: &'a SchemaRef,
    event_time: &'a str,
    keys: &'a [Key],
    arguments: Vec<Argument>,
    accumulators: Vec<Accumulator>,
    /// With the SQL of each.
    calls: Vec<(AggregateFunction, Call)>,
    outputs: Vec<Output>,
}

impl<'a> Planner<'a> {
    pub fn new(input: &'a SchemaRef, event_time: &'a str, keys: &'a [Key]) -> Result<Planner<'a>, String> {
        Ok(Planner {
            scope: Scope::new(input)?,
            input,
            event_time,
            keys,
            arguments: Vec::new(),
            accumulators: Vec::new(),
            calls: Vec::new(),
            outputs: Vec::new(),
        })
    }

    /// Adds one column of the table.
    pub fn add(&mut self, name: &str, text: &str) -> Result<Field, String> {
        let sql = self.scope.read(text)?;
        let mut called = 0;
        let mut problem = None;
        let over_results = sql.transform_down(|node| {
            let replaced = match &node {
                Expr::AggregateFunction(call) => {
                    called += 1;
                    self.call(call)
                }
                key if self.keys.iter().any(|k| k.sql == *key) => {
                    let key = self.keys.iter().find(|k| k.sql == node);
                    key.map(|k| k.field.name().clone()).ok_or_else(String::new)
                }
                Expr::Column(column) => Err(format!(
                    "column {} is neither inside an aggregate nor a group key, so a group has no one value of it",
                    column.name
                )),
                _ => return Ok(Transformed::no(node)),
            };
            Ok(match replaced {
                Ok(column) => {
                    let column = Expr::Column(datafusion_common::Column::new_unqualified(column));
                    Transformed::new(column, true, TreeNodeRecursion::Jump)
                }
                Err(e) => {
                    problem = Some(e);
                    Transformed::new(node, false, TreeNodeRecursion::Stop)
                }
            })
        });
        if let Some(problem) = problem {
            return Err(problem);
        }
        let over_results = over_results.map_err(|e| sql::first_line(&e))?.data;
        if called == 0 {
            return Err(format!("must call an aggregate: {}", sql::aggregate_names()));
        }
        let scope = Scope::new(&self.results())?;
        let expr = scope.typed(over_results)?;
        let found = scope.data_type(&expr)?;
        let data_type = sql::column_type(&found)
            .ok_or_else(|| format!("its type is {found}, which a table cannot keep; CAST it to another type"))?;
        let physical = scope.physical(&expr)?;
        let plain = physical.as_any().downcast_ref::<Column>().map(Column::index);
        let nullable = plain
            .and_then(|i| self.calls.get(i.checked_sub(self.keys.len())?))
            .is_none_or(|(_, call)| call.field.is_nullable());
        self.outputs.push(Output { expr: physical, data_type: data_type.clone() });
        Ok(Field::new(name, data_type, nullable))
    }

    pub fn finish(mut self) -> Aggregates {
        let mut order: Vec<usize> = (0..self.accumulators.len()).collect();
        order.sort_by(|a, b| {
            let definition = |i: &usize| self.accumulators.get(*i).map(|a| a.definition.as_str());
            definition(a).cmp(&definition(b))
        });
        let place = |old: usize| order.iter().position(|i| *i == old).unwrap_or(old);
        for (_, call) in &mut self.calls {
            call.accumulator = place(call.accumulator);
            if let Finish::DecimalAverage { count, .. } = &mut call.finish {
                *count = place(*count);
            }
        }
        let results = self.results();
        self.accumulators.sort_by(|a, b| a.definition.cmp(&b.definition));
        Aggregates {
            arguments: self.arguments,
            accumulators: self.accumulators,
            calls: self.calls.into_iter().map(|(_, call)| call).collect(),
            results,
            outputs: self.outputs,
        }
    }

    /// Keys, then the results of the calls so far.
    fn results(&self) -> SchemaRef {
        let keys = self.keys.iter().map(|key| Arc::new(key.field.clone()));
        let fields: Vec<FieldRef> = keys.chain(self.calls.iter().map(|(_, call)| call.field.clone())).collect();
        Arc::new(Schema::new(fields))
    }

    /// The name of the call's result.
    fn call(&mut self, sql: &AggregateFunction) -> Result<String, String> {
        if let Some((_, known)) = self.calls.iter().find(|(known, _)| known == sql) {
            return Ok(known.field.name().clone());
        }
        let mut name = Expr::AggregateFunction(sql.clone()).to_string();
        while self.results().field_with_name(&name).is_ok() {
            name.push(' ');
        }
        let (accumulator, finish, data_type, nullable) = self.compile(sql)?;
        let field = Arc::new(Field::new(&name, data_type, nullable));
        self.calls.push((sql.clone(), Call { accumulator, finish, field }));
        Ok(name)
    }

    fn compile(&mut self, sql: &AggregateFunction) -> Result<(usize, Finish, DataType, bool), String> {
        let inner = sql.params.args.iter().chain(sql.params.filter.as_deref());
        if inner.clone().any(sql::calls_aggregate) {
            return Err("an aggregate cannot stand inside another".to_string());
        }
        let Expr::AggregateFunction(AggregateFunction { func, params }) =
            self.scope.coerce(Expr::AggregateFunction(sql.clone()))?
        else {
            return Err("it is not an aggregate".to_string());
        };
        let function = func.name().to_string();
        let percentile = function == "approx_percentile_cont";
        if !params.order_by.is_empty() && !percentile {
            return Err(match function.as_str() {
                "first_value" | "last_value" => {
                    format!("{function} goes by event time and takes no ORDER BY; use min or max for other orders")
                }
                _ => format!("the result of {function} does not depend on an order: leave out ORDER BY"),
            });
        }
        let ignore_nulls = params.null_treatment == Some(NullTreatment::IgnoreNulls);
        if ignore_nulls && !matches!(function.as_str(), "first_value" | "last_value") {
            return Err(format!("{function} ignores nulls already: leave out IGNORE NULLS"));
        }
        let filter = match params.filter {
            Some(filter) => Some(self.filter(*filter)?),
            None => None,
        };
        let descending = params.order_by.first().is_some_and(|sort| !sort.asc);
        let mut args = params.args.into_iter();
        let (Some(argument), fraction, None) = (args.next(), args.next(), args.next()) else {
            return Err(format!("{function} was given too few or too many arguments"));
        };
        if percentile != fraction.is_some() {
            return Err(match percentile {
                true => "approx_percentile_cont takes a column and a fraction, as in approx_percentile_cont(x, 0.95)"
                    .to_string(),
                false => format!("{function} takes one argument"),
            });
        }
        let argument = self.scope.simplify(argument)?;
        let found = self.scope.data_type(&argument)?;
        if function == "count" && !params.distinct && sql::column_type(&found).is_none() {
            return self.data_fusion(func, argument, found, filter);
        }
        let flat = sql::column_type(&found).ok_or_else(|| format!("{function} of {found} is not supported"))?;
        let flat = match function.as_str() {
            "sum" if flat.is_integer() => DataType::Int64,
            _ => flat,
        };
        let argument = self.scope.cast(argument, &flat)?;
        if params.distinct {
            match function.as_str() {
                "count" | "sum" | "avg" => return self.distinct(func, argument, flat, filter),
                // The same with and without.
                "min" | "max" | "bool_and" | "bool_or" | "bit_and" | "bit_or" | "approx_distinct" => {}
                _ => return Err(format!("DISTINCT is for count, sum and avg, not for {function}")),
            }
        }
        let of_floats = |planner: &mut Self, kind: Kind, state: Vec<DataType>| {
            let argument = planner.scope.cast(argument.clone(), &DataType::Float64)?;
            let argument = planner.argument(argument, DataType::Float64, None)?;
            Ok::<usize, String>(planner.accumulator(kind, vec![argument], filter, state))
        };
        let variance = |sample, root| Finish::Variance { sample, root };
        let moments = || (Kind::Moments, moments::STATE.to_vec());
        let digest = || (Kind::Digest, digest::state());
        let (accumulator, finish) = match function.as_str() {
            "sum" | "avg" if matches!(flat, DataType::Int64 | DataType::Decimal128(_, _)) => {
                return self.exact(&func, argument, flat, filter);
            }
            "var" | "var_pop" | "stddev" | "stddev_pop" => {
                let (kind, state) = moments();
                let finish = variance(!function.ends_with("_pop"), function.starts_with("stddev"));
                (of_floats(self, kind, state)?, finish)
            }
            "approx_median" => {
                let (kind, state) = digest();
                (of_floats(self, kind, state)?, Finish::Quantile(0.5))
            }
            "approx_percentile_cont" => {
                let fraction = fraction.map(|f| self.scope.simplify(f)).transpose()?;
                let Some(Expr::Literal(ScalarValue::Float64(Some(q)), _)) = fraction else {
                    return Err("the fraction of approx_percentile_cont must be a number, such as 0.95".to_string());
                };
                if !(0.0..=1.0).contains(&q) {
                    return Err(format!("the fraction of approx_percentile_cont lies between 0 and 1, not at {q}"));
                }
                let (kind, state) = digest();
                (of_floats(self, kind, state)?, Finish::Quantile(if descending { 1.0 - q } else { q }))
            }
            "approx_distinct" => {
                let argument = self.argument(argument, flat, None)?;
                let accumulator = self.accumulator(Kind::Sketch, vec![argument], filter, sketch::STATE.to_vec());
                return Ok((accumulator, Finish::Value, DataType::Int64, false));
            }
            "first_value" | "last_value" => {
                let value = self.argument(argument, flat.clone(), None)?;
                let time = Expr::Column(datafusion_common::Column::new_unqualified(self.event_time));
                let time_type = self.scope.data_type(&time)?;
                let time = self.argument(time, time_type, None)?;
                let kind = Kind::FirstLast { last: function == "last_value", ignore_nulls, value: flat.clone() };
                let accumulator = self.accumulator(kind, vec![value, time], filter, first_last::state(&flat));
                return Ok((accumulator, Finish::Value, flat, true));
            }
            "min" | "max" if flat == DataType::Float64 => {
                let kind = if function == "min" { Kind::FloatMin } else { Kind::FloatMax };
                (of_floats(self, kind, vec![flat])?, Finish::Value)
            }
            // The order of booleans is false, true.
            "min" if flat == DataType::Boolean => {
                return self.data_fusion(bool_and_or::bool_and_udaf(), argument, flat, filter);
            }
            "max" if flat == DataType::Boolean => {
                return self.data_fusion(bool_and_or::bool_or_udaf(), argument, flat, filter);
            }
            _ => return self.data_fusion(func, argument, flat, filter),
        };
        Ok((accumulator, finish, DataType::Float64, true))
    }

    /// An aggregate of DataFusion's as it is.
    fn data_fusion(
        &mut self,
        func: Arc<AggregateUDF>,
        argument: Expr,
        data_type: DataType,
        filter: Option<usize>,
    ) -> Result<(usize, Finish, DataType, bool), String> {
        let (kind, state, output) = self.data_fusion_kind(func.clone(), &argument)?;
        let argument = self.argument(argument, data_type, None)?;
        let accumulator = self.accumulator(kind, vec![argument], filter, state);
        Ok((accumulator, Finish::Value, output, func.name() != "count"))
    }

    fn data_fusion_kind(
        &self,
        func: Arc<AggregateUDF>,
        argument: &Expr,
    ) -> Result<(Kind, Vec<DataType>, DataType), String> {
        let line = |e| sql::first_line(&e);
        let physical = self.scope.physical(argument)?;
        let name = func.name().to_string();
        let builder = AggregateExprBuilder::new(func, vec![physical]);
        let expr = builder.schema(self.input.clone()).alias(&name).build().map_err(line)?;
        let output = expr.field().data_type().clone();
        if !expr.groups_accumulator_supported() {
            return Err(format!("{name} of {} is not supported", self.scope.data_type(argument)?));
        }
        let state = expr.state_fields().map_err(line)?.iter().map(|f| f.data_type().clone()).collect();
        Ok((Kind::DataFusion(Arc::new(expr)), state, output))
    }

    /// Sums and averages of integers and decimals, as Spark has them: the sum of decimal(p, s) is decimal(p + 10, s), the
    /// average decimal(p + 4, s + 4).
    fn exact(
        &mut self,
        func: &Arc<AggregateUDF>,
        argument: Expr,
        flat: DataType,
        filter: Option<usize>,
    ) -> Result<(usize, Finish, DataType, bool), String> {
        let (wide, finish, output) = exact(func, &flat);
        let summed = self.argument(argument.clone(), flat.clone(), Some(wide.clone()))?;
        let accumulator = self.accumulator(Kind::WideSum(wide.clone()), vec![summed], filter, vec![wide]);
        let finish = match finish {
            Finish::DecimalAverage { scale, data_type, .. } => {
                let (count, ..) = self.data_fusion(count::count_udaf(), argument, flat, filter)?;
                Finish::DecimalAverage { count, scale, data_type }
            }
            other => other,
        };
        Ok((accumulator, finish, output, true))
    }

    /// `count`, `sum` and `avg` of the distinct values, which are the state of all three.
    fn distinct(
        &mut self,
        func: Arc<AggregateUDF>,
        argument: Expr,
        flat: DataType,
        filter: Option<usize>,
    ) -> Result<(usize, Finish, DataType, bool), String> {
        let (finish, output) = match func.name() {
            "count" => (Finish::CountDistinct, DataType::Int64),
            _ => {
                let part = |kind, state| Accumulator {
                    kind,
                    arguments: vec![0],
                    filter: None,
                    state,
                    definition: String::new(),
                };
                let (accumulators, widen, finish, output) = match &flat {
                    DataType::Int64 | DataType::Decimal128(_, _) => {
                        let (wide, finish, output) = exact(&func, &flat);
                        let mut parts = vec![part(Kind::WideSum(wide.clone()), Vec::new())];
                        if matches!(finish, Finish::DecimalAverage { .. }) {
                            let (kind, state, _) = self.data_fusion_kind(count::count_udaf(), &argument)?;
                            parts.push(part(kind, state));
                        }
                        (parts, Some(wide), finish, output)
                    }
                    _ => {
                        let (kind, state, output) = self.data_fusion_kind(func, &argument)?;
                        (vec![part(kind, state)], None, Finish::Value, output)
                    }
                };
                (Finish::OverDistinct(Box::new(OverDistinct { accumulators, widen, finish })), output)
            }
        };
        let nullable = !matches!(finish, Finish::CountDistinct);
        let argument = self.argument(argument, flat.clone(), None)?;
        let state = distinct::state(&flat);
        Ok((self.accumulator(Kind::Distinct(flat), vec![argument], filter, state), finish, output, nullable))
    }

    fn filter(&mut self, filter: Expr) -> Result<usize, String> {
        let filter = self.scope.simplify(filter)?;
        match self.scope.data_type(&filter)? {
            DataType::Boolean => {
                let definition = format!("{filter}");
                let physical = self.scope.physical(&filter)?;
                Ok(self.known_or_new(Argument::new(physical, definition, DataType::Boolean, None, true)))
            }
            other => Err(format!("FILTER (WHERE ...) is true or false, this is of type {other}")),
        }
    }

    /// Index of an argument, which is added unless it is known.
    fn argument(&mut self, expr: Expr, data_type: DataType, widen: Option<DataType>) -> Result<usize, String> {
        let definition = format!("{expr} as {data_type}");
        let physical = self.scope.physical(&expr)?;
        Ok(self.known_or_new(Argument::new(physical, definition, data_type, widen, false)))
    }

    fn known_or_new(&mut self, argument: Argument) -> usize {
        self.arguments.iter().position(|known| known.same(&argument)).unwrap_or_else(|| {
            self.arguments.push(argument);
            self.arguments.len() - 1
        })
    }

    fn accumulator(&mut self, kind: Kind, arguments: Vec<usize>, filter: Option<usize>, state: Vec<DataType>) -> usize {
        let text = |index: &usize| self.arguments.get(*index).map_or("", |a| a.definition.as_str());
        let arguments_text: Vec<&str> = arguments.iter().map(text).collect();
        let filter_text = filter.map(|f| format!(" filter {}", text(&f))).unwrap_or_default();
        let definition = format!("{}({}){filter_text}", kind.name(), arguments_text.join(", "));
        let known = self.accumulators.iter().position(|a| a.definition == definition && a.state == state);
        known.unwrap_or_else(|| {
            self.accumulators.push(Accumulator { kind, arguments, filter, state, definition });
            self.accumulators.len() - 1
        })
    }
}

impl Argument {
    fn new(
        expr: Arc<dyn PhysicalExpr>,
        definition: String,
        data_type: DataType,
        widen: Option<DataType>,
        filter: bool,
    ) -> Argument {
        let constant = expr.as_any().is::<Literal>();
        Argument { expr, definition, data_type, widen, constant, filter }
    }

    /// A filter is not the same as a column of booleans: null is false in it.
    fn same(&self, other: &Argument) -> bool {
        self.expr.eq(&other.expr)
            && self.data_type == other.data_type
            && self.widen == other.widen
            && self.filter == other.filter
    }
}

impl Kind {
    fn name(&self) -> String {
        match self {
            Kind::DataFusion(expr) => expr.fun().name().to_string(),
            Kind::WideSum(_) => "sum".to_string(),
            Kind::FloatMin => "min".to_string(),
            Kind::FloatMax => "max".to_string(),
            Kind::Moments => "moments".to_string(),
            Kind::Digest => "digest".to_string(),
            Kind::Sketch => "sketch".to_string(),
            Kind::Distinct(_) => "distinct".to_string(),
            Kind::FirstLast { last, ignore_nulls, .. } => {
                let function = if *last { "last_value" } else { "first_value" };
                format!("{function}{}", if *ignore_nulls { " ignore nulls" } else { "" })
            }
        }
    }
}

/// The type in which integers or decimals are added up, how `sum` or `avg` reads it off, and the type of that.
fn exact(func: &Arc<AggregateUDF>, flat: &DataType) -> (DataType, Finish, DataType) {
    let DataType::Decimal128(precision, scale) = *flat else {
        return (INTEGER_SUM, Finish::Fit(DataType::Int64), DataType::Int64);
    };
    let wide = match precision {
        ..=28 => DataType::Decimal128(38, scale),
        _ => DataType::Decimal256(76, scale),
    };
    if func.name() == "sum" {
        let output = DataType::Decimal128(38.min(precision + 10), scale);
        return (wide, Finish::Fit(output.clone()), output);
    }
    let output = DataType::Decimal128(38.min(precision + 4), 38.min(scale + 4));
    (wide, Finish::DecimalAverage { count: 1, scale, data_type: output.clone() }, output)
}
