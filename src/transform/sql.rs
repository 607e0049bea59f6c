//! SQL text to DataFusion expressions over the columns of a batch.
//!
//! Owns: parsing, planning, type coercion, simplification, the functions that may be called, evaluation row by row when
//! the evaluation of a whole batch fails. Does not own: what an expression is for.
//! Only functions that give the same result whenever they run are allowed: a batch that is replayed must come out the same. Integer arithmetic that overflows is an error of its row; it never wraps.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use arrow::array::{Array, ArrayRef, RecordBatchOptions, new_null_array};
use arrow::compute::{cast_with_options, concat};
use arrow::datatypes::{DataType, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;
use datafusion_common::config::ConfigOptions;
use datafusion_common::format::DEFAULT_CAST_OPTIONS;
use datafusion_common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion_common::{Column, DFSchema, DataFusionError, TableReference, plan_err};
use datafusion_expr::execution_props::ExecutionProps;
use datafusion_expr::planner::{ContextProvider, ExprPlanner};
use datafusion_expr::simplify::SimplifyContext;
use datafusion_expr::{
    AggregateUDF, Expr, ExprSchemable, Operator, ScalarUDF, TableSource, Volatility, WindowUDF, lit,
};
use datafusion_functions_aggregate::{
    approx_distinct, approx_median, approx_percentile_cont, average, bit_and_or_xor, bool_and_or, count, first_last,
    min_max, stddev, sum, variance,
};
use datafusion_optimizer::simplify_expressions::ExprSimplifier;
use datafusion_physical_expr::expressions::{BinaryExpr, lit as physical_lit};
use datafusion_physical_expr::{PhysicalExpr, create_physical_expr};
use datafusion_sql::parser::DFParser;
use datafusion_sql::planner::{ParserOptions, PlannerContext, SqlToRel};

/// Aggregates of SQL that a window cannot compute, and why.
const REFUSED: [(&[&str], &str); 4] = [
    (
        &["array_agg", "string_agg", "collect_list", "collect_set", "listagg"],
        "keeps every value, so its state has no bound and its result no order of its own; use count, first_value, last_value \
         or approx_percentile_cont, or read the rows table",
    ),
    (
        &["median", "percentile_cont", "quantile_cont", "percentile", "mode"],
        "needs all values of a window at once, so its state has no bound; use approx_median(x) or \
         approx_percentile_cont(x, 0.95)",
    ),
    (
        &["row_number", "rank", "dense_rank", "percent_rank", "cume_dist", "ntile", "lag", "lead", "nth_value"],
        "looks at other rows, which a stream does not have at hand; use first_value and last_value",
    ),
    (&["any_value", "grouping", "approx_percentile_cont_with_weight"], "is not supported in a window"),
];

static FUNCTIONS: LazyLock<Functions> = LazyLock::new(Functions::new);

/// What SQL text can name, besides columns.
struct Functions {
    scalar: HashMap<String, Arc<ScalarUDF>>,
    /// By name, without other names for the same.
    aggregate: BTreeMap<String, Arc<AggregateUDF>>,
    aggregate_alias: HashMap<String, Arc<AggregateUDF>>,
    planners: Vec<Arc<dyn ExprPlanner>>,
    options: ConfigOptions,
}

impl Functions {
    fn new() -> Self {
        let mut scalar = HashMap::new();
        let nested = datafusion_functions_nested::all_default_nested_functions();
        for function in datafusion_functions::all_default_functions().into_iter().chain(nested) {
            for alias in function.aliases() {
                scalar.insert(alias.clone(), function.clone());
            }
            scalar.insert(function.name().to_string(), function);
        }
        let aggregates = [
            approx_distinct::approx_distinct_udaf(),
            approx_median::approx_median_udaf(),
            approx_percentile_cont::approx_percentile_cont_udaf(),
            average::avg_udaf(),
            bit_and_or_xor::bit_and_udaf(),
            bit_and_or_xor::bit_or_udaf(),
            bit_and_or_xor::bit_xor_udaf(),
            bool_and_or::bool_and_udaf(),
            bool_and_or::bool_or_udaf(),
            count::count_udaf(),
            first_last::first_value_udaf(),
            first_last::last_value_udaf(),
            min_max::max_udaf(),
            min_max::min_udaf(),
            stddev::stddev_udaf(),
            stddev::stddev_pop_udaf(),
            sum::sum_udaf(),
            variance::var_samp_udaf(),
            variance::var_pop_udaf(),
        ];
        let mut aggregate_alias = HashMap::new();
        for function in &aggregates {
            for alias in function.aliases() {
                aggregate_alias.insert(alias.clone(), function.clone());
            }
        }
        let aggregate = aggregates.into_iter().map(|f| (f.name().to_string(), f)).collect();
        let planners: Vec<Arc<dyn ExprPlanner>> = vec![
            Arc::new(datafusion_functions::core::planner::CoreFunctionPlanner::default()),
            Arc::new(datafusion_functions_nested::planner::NestedFunctionPlanner),
            Arc::new(datafusion_functions_nested::planner::FieldAccessPlanner),
            Arc::new(datafusion_functions::datetime::planner::DatetimeFunctionPlanner),
            Arc::new(datafusion_functions::unicode::planner::UnicodeFunctionPlanner),
        ];
        Functions { scalar, aggregate, aggregate_alias, planners, options: ConfigOptions::default() }
    }
}

impl ContextProvider for &Functions {
    fn get_table_source(&self, name: TableReference) -> datafusion_common::Result<Arc<dyn TableSource>> {
        plan_err!("there is no table {name} here, an expression can only refer to columns")
    }

    fn get_expr_planners(&self) -> &[Arc<dyn ExprPlanner>] {
        &self.planners
    }

    fn get_function_meta(&self, name: &str) -> Option<Arc<ScalarUDF>> {
        self.scalar.get(name).cloned()
    }

    fn get_aggregate_meta(&self, name: &str) -> Option<Arc<AggregateUDF>> {
        self.aggregate.get(name).or_else(|| self.aggregate_alias.get(name)).cloned()
    }

    fn get_window_meta(&self, _name: &str) -> Option<Arc<WindowUDF>> {
        None
    }

    fn get_variable_type(&self, _names: &[String]) -> Option<DataType> {
        None
    }

    fn options(&self) -> &ConfigOptions {
        &self.options
    }

    fn udf_names(&self) -> Vec<String> {
        self.scalar.keys().cloned().collect()
    }

    fn udaf_names(&self) -> Vec<String> {
        self.aggregate.keys().cloned().collect()
    }

    fn udwf_names(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The columns that an expression can refer to. Names are case-sensitive, as in JSON.
pub struct Scope {
    schema: SchemaRef,
    columns: Arc<DFSchema>,
}

impl Scope {
    pub fn new(schema: &SchemaRef) -> Result<Scope, String> {
        let columns = DFSchema::try_from(schema.as_ref().clone()).map_err(|e| first_line(&e))?;
        Ok(Scope { schema: schema.clone(), columns: Arc::new(columns) })
    }

    /// Parses, resolves and types an expression. The error says what is wrong with it and which columns there are.
    pub fn parse(&self, sql: &str) -> Result<Expr, String> {
        self.typed(self.read(sql)?)
    }

    /// Parses and resolves an expression, as it was written.
    pub fn read(&self, sql: &str) -> Result<Expr, String> {
        let parsed = DFParser::parse_sql_into_expr(sql).map_err(|e| self.explain(&e))?;
        if parsed.alias.is_some() {
            return Err("an expression takes no alias (AS)".to_string());
        }
        let options =
            ParserOptions::new().with_enable_ident_normalization(false).with_map_string_types_to_utf8view(false);
        let functions = &*FUNCTIONS;
        let planner = SqlToRel::new_with_options(&functions, options);
        let expr = planner
            .sql_to_expr(parsed.expr, &self.columns, &mut PlannerContext::new())
            .map_err(|e| self.explain(&e))?;
        refuse_unfit(&expr)?;
        let plain = expr.transform_up(|node| Ok(count_rows_for_wildcard(node))).map_err(|e| self.explain(&e))?;
        Ok(plain.data)
    }

    /// Puts in the casts that types need, and simplifies.
    pub fn typed(&self, expr: Expr) -> Result<Expr, String> {
        self.simplify(self.coerce(expr)?)
    }

    pub fn coerce(&self, expr: Expr) -> Result<Expr, String> {
        self.simplifier().coerce(expr, &self.columns).map_err(|e| self.explain(&e))
    }

    pub fn simplify(&self, expr: Expr) -> Result<Expr, String> {
        self.simplifier().simplify(expr).map_err(|e| self.explain(&e))
    }

    fn simplifier(&self) -> ExprSimplifier {
        ExprSimplifier::new(SimplifyContext::default().with_schema(self.columns.clone()))
    }

    pub fn column(&self, name: &str) -> Expr {
        Expr::Column(Column::new_unqualified(name))
    }

    /// The expression ready to run. One that fails without looking at any row is refused here.
    pub fn physical(&self, expr: &Expr) -> Result<Arc<dyn PhysicalExpr>, String> {
        if calls_aggregate(expr) {
            return Err("aggregates belong into [windows.aggregates]".to_string());
        }
        let physical =
            create_physical_expr(expr, &self.columns, &ExecutionProps::new()).map_err(|e| self.explain(&e))?;
        let checked = physical.transform_up(|node| self.check(node)).map_err(|e| self.explain(&e))?.data;
        checked.evaluate(&RecordBatch::new_empty(self.schema.clone())).map_err(|e| first_line(&e))?;
        Ok(checked)
    }

    pub fn data_type(&self, expr: &Expr) -> Result<DataType, String> {
        expr.get_type(&self.columns).map_err(|e| self.explain(&e))
    }

    pub fn cast(&self, expr: Expr, data_type: &DataType) -> Result<Expr, String> {
        expr.cast_to(data_type, &self.columns).map_err(|e| self.explain(&e))
    }

    /// Arithmetic that fails instead of wrapping; comparisons of floats for which -0.0 equals 0.0 (Arrow orders them).
    fn check(&self, node: Arc<dyn PhysicalExpr>) -> datafusion_common::Result<Transformed<Arc<dyn PhysicalExpr>>> {
        let Some(binary) = node.as_any().downcast_ref::<BinaryExpr>() else { return Ok(Transformed::no(node)) };
        let op = *binary.op();
        if is_arithmetic(op) {
            return Ok(Transformed::yes(Arc::new(binary.clone().with_fail_on_overflow(true))));
        }
        if is_comparison(op) && binary.left().data_type(&self.schema)? == DataType::Float64 {
            let plus_zero = |side: &Arc<dyn PhysicalExpr>| -> Arc<dyn PhysicalExpr> {
                Arc::new(BinaryExpr::new(side.clone(), Operator::Plus, physical_lit(0.0)))
            };
            let both = BinaryExpr::new(plus_zero(binary.left()), op, plus_zero(binary.right()));
            return Ok(Transformed::yes(Arc::new(both)));
        }
        Ok(Transformed::no(node))
    }

    fn explain(&self, error: &DataFusionError) -> String {
        let names: Vec<&str> = self.schema.fields().iter().map(|f| f.name().as_str()).collect();
        let line = first_line(error);
        match line.strip_prefix("Invalid function '").and_then(|rest| rest.split_once('\'')) {
            Some((function, _)) => unknown_function(function),
            None => format!("{line}; columns: {}", names.join(", ")),
        }
    }
}

pub fn calls_aggregate(expr: &Expr) -> bool {
    expr.exists(|node| Ok(matches!(node, Expr::AggregateFunction(_)))).unwrap_or(true)
}

/// The aggregates that a window can compute.
pub fn aggregate_names() -> String {
    FUNCTIONS.aggregate.keys().cloned().collect::<Vec<_>>().join(", ")
}

fn unknown_function(function: &str) -> String {
    let known = REFUSED.iter().find(|(names, _)| names.contains(&function.to_ascii_lowercase().as_str()));
    match known {
        Some((_, reason)) => format!("{function} {reason}"),
        None => format!("there is no function {function}; aggregates are {}", aggregate_names()),
    }
}

/// `count(*)` counts a constant. Functions called by another name come with an alias, which says nothing here.
fn count_rows_for_wildcard(expr: Expr) -> Transformed<Expr> {
    match expr {
        Expr::AggregateFunction(mut aggregate) if aggregate.func.name() == "count" => {
            #[allow(deprecated)] // the parser still produces it
            let wildcard = matches!(aggregate.params.args.as_slice(), [] | [Expr::Wildcard { .. }]);
            if wildcard {
                aggregate.params.args = vec![lit(1i64)];
            }
            Transformed::yes(Expr::AggregateFunction(aggregate))
        }
        Expr::Alias(alias) => Transformed::yes(*alias.expr),
        other => Transformed::no(other),
    }
}

/// Names what cannot run on a stream.
fn refuse_unfit(expr: &Expr) -> Result<(), String> {
    let mut refused = None;
    let walked = expr.apply(|node| {
        refused = match node {
            Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_) | Expr::SetComparison(_) => {
                Some("a subquery cannot run on a stream".to_string())
            }
            Expr::WindowFunction(_) => {
                Some("OVER (...) cannot run on a stream; windows are configured in [[windows]]".to_string())
            }
            Expr::Placeholder(_) => Some("placeholders have no value here".to_string()),
            Expr::ScalarFunction(call) if call.func.signature().volatility != Volatility::Immutable => Some(format!(
                "{}() gives another result when it runs again, and a batch that is run again must come out the same",
                call.func.name()
            )),
            _ => None,
        };
        Ok(if refused.is_some() { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    });
    walked.map_err(|e| first_line(&e))?;
    refused.map_or(Ok(()), Err)
}

fn is_comparison(op: Operator) -> bool {
    use Operator::{Eq, Gt, GtEq, IsDistinctFrom, IsNotDistinctFrom, Lt, LtEq, NotEq};
    matches!(op, Eq | NotEq | Lt | LtEq | Gt | GtEq | IsDistinctFrom | IsNotDistinctFrom)
}

fn is_arithmetic(op: Operator) -> bool {
    matches!(op, Operator::Plus | Operator::Minus | Operator::Multiply | Operator::Divide | Operator::Modulo)
}

/// DataFusion's messages without its own classification, suggestions and backtraces.
pub fn first_line(error: &DataFusionError) -> String {
    const LABELS: [&str; 7] = [
        "Error during planning: ",
        "Schema error: ",
        "SQL error: ",
        "Arrow error: ",
        "Internal error: ",
        "External error: ",
        "Execution error: ",
    ];
    let text = error.strip_backtrace();
    let mut line = text.lines().next().unwrap_or_default();
    while let Some(rest) = LABELS.iter().find_map(|label| line.strip_prefix(label)) {
        line = rest;
    }
    if let Some(parser) = line.strip_prefix("ParserError(\"").and_then(|rest| rest.strip_suffix("\")")) {
        line = parser;
    }
    let line = line.split(", errors: ").next().unwrap_or(line);
    line.trim_end_matches('.').to_string()
}

/// The type under which tables keep values of `data_type`; `None` if they cannot.
pub fn column_type(data_type: &DataType) -> Option<DataType> {
    Some(match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::UInt8 | DataType::UInt16 => DataType::Int32,
        DataType::Int64 | DataType::UInt32 | DataType::UInt64 => DataType::Int64,
        DataType::Float16 | DataType::Float32 | DataType::Float64 => DataType::Float64,
        DataType::Boolean => DataType::Boolean,
        DataType::Date32 | DataType::Date64 => DataType::Date32,
        DataType::Time64(_) | DataType::Time32(_) => DataType::Time64(TimeUnit::Microsecond),
        DataType::Timestamp(_, None) => DataType::Timestamp(TimeUnit::Microsecond, None),
        DataType::Timestamp(_, Some(_)) => DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())),
        DataType::Decimal128(precision, scale) if *scale >= 0 => DataType::Decimal128(*precision, *scale),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        _ => return None,
    })
}

/// Evaluates to an array of `target`, which [`column_type`] gave. A value that does not fit is an error.
pub fn evaluate(
    expr: &Arc<dyn PhysicalExpr>,
    batch: &RecordBatch,
    target: &DataType,
) -> Result<ArrayRef, DataFusionError> {
    let array = expr.evaluate(batch)?.into_array(batch.num_rows())?;
    if array.data_type() == target {
        return Ok(array);
    }
    Ok(cast_with_options(&array, target, &DEFAULT_CAST_OPTIONS)?)
}

/// As [`evaluate`], but a row that cannot be evaluated is null. Also gives the number of such rows.
pub fn evaluate_or_null(
    expr: &Arc<dyn PhysicalExpr>,
    batch: &RecordBatch,
    target: &DataType,
) -> Result<(ArrayRef, u64), DataFusionError> {
    if let Ok(array) = evaluate(expr, batch, target) {
        return Ok((array, 0));
    }
    let failed = failing_rows(batch, &|rows| evaluate(expr, rows, target).map(|_| ()));
    let mut pieces = Vec::with_capacity(2 * failed.len() + 1);
    let mut next = 0;
    for (row, _) in &failed {
        pieces.push(evaluate(expr, &batch.slice(next, row - next), target)?);
        pieces.push(new_null_array(target, 1));
        next = row + 1;
    }
    pieces.push(evaluate(expr, &batch.slice(next, batch.num_rows() - next), target)?);
    let pieces: Vec<&dyn Array> = pieces.iter().map(|p| p.as_ref()).collect();
    Ok((concat(&pieces)?, failed.len() as u64))
}

/// The rows on which `evaluate` fails, each with its message, in order: halves the batch until single rows remain.
pub fn failing_rows(
    batch: &RecordBatch,
    evaluate: &dyn Fn(&RecordBatch) -> Result<(), DataFusionError>,
) -> Vec<(usize, String)> {
    let mut failed = Vec::new();
    let mut ranges = vec![(0, batch.num_rows())];
    while let Some((start, len)) = ranges.pop() {
        if len == 0 {
            continue;
        }
        if let Err(error) = evaluate(&batch.slice(start, len)) {
            if len == 1 {
                failed.push((start, first_line(&error)));
            } else {
                ranges.push((start + len / 2, len - len / 2));
                ranges.push((start, len / 2));
            }
        }
    }
    failed
}

/// A batch that may have no columns.
pub fn batch_of(
    schema: SchemaRef,
    columns: Vec<ArrayRef>,
    rows: usize,
) -> Result<RecordBatch, arrow::error::ArrowError> {
    RecordBatch::try_new_with_options(schema, columns, &RecordBatchOptions::new().with_row_count(Some(rows)))
}
