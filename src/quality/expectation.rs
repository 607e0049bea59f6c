//! Expectations: SQL conditions on valid rows, evaluated a chunk at a time.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, AsArray, BooleanArray};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::record_batch::RecordBatch;
use datafusion_common::DataFusionError;
use datafusion_physical_expr::PhysicalExpr;

use crate::config::{ExpectationConfig, OnFail};
use crate::transform::sql;

/// `[[quality.expect]]`, compiled against the columns that reach the rows table.
#[derive(Default)]
pub struct Expectations(Vec<Expectation>);

pub struct Expectation {
    pub name: String,
    pub sql: String,
    pub on_fail: OnFail,
    expr: Arc<dyn PhysicalExpr>,
}

/// What became of the rows of a chunk. A row that fails several expectations meets one fate, the gravest of them.
#[derive(Debug, Default)]
pub struct Checked {
    /// The rows that stay. None: all of them.
    pub kept: Option<BooleanArray>,
    /// Rows that fail, by expectation, in their order.
    pub failures: Vec<u64>,
    /// Rows that become dead letters, in order, with the message.
    pub refused: Vec<(usize, String)>,
    pub dropped: u64,
    /// The first row that must not be there at all, and the expectation that says so.
    pub violation: Option<(usize, usize)>,
}

/// A record that an expectation with `on_fail = "fail"` does not let pass. Ordered by place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
    pub name: String,
    pub sql: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { topic, partition, offset, name, sql } = self;
        write!(
            f,
            "expectation {name:?} ({sql}) does not hold for topic {topic}, partition {partition}, offset {offset}"
        )
    }
}

impl Expectations {
    /// The expectations of one message type.
    pub fn compile<'a>(
        configs: impl IntoIterator<Item = &'a ExpectationConfig>,
        columns: &SchemaRef,
    ) -> Result<Expectations, Vec<String>> {
        let mut errors = Vec::new();
        let mut compiled = Vec::new();
        for config in configs {
            match Self::compile_one(config, columns) {
                Ok(expectation) => compiled.push(expectation),
                Err(e) => errors.push(format!("expectation {}: {e}", config.name)),
            }
        }
        if errors.is_empty() { Ok(Expectations(compiled)) } else { Err(errors) }
    }

    /// The message says what is wrong with its SQL.
    pub fn compile_one(config: &ExpectationConfig, columns: &SchemaRef) -> Result<Expectation, String> {
        let expr = compile(&config.sql, columns).map_err(|e| format!("{:?}: {e}", config.sql))?;
        Ok(Expectation { name: config.name.clone(), sql: config.sql.clone(), on_fail: config.on_fail, expr })
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Expectation> {
        self.0.iter()
    }

    pub fn get(&self, index: usize) -> Option<&Expectation> {
        self.0.get(index)
    }

    /// An expectation holds only where it is true. Null does not, and neither does an expression that fails on the row,
    /// as a division by zero does.
    pub fn check(&self, rows: &RecordBatch) -> Result<Checked, DataFusionError> {
        let count = rows.num_rows();
        let mut checked = Checked { failures: vec![0; self.0.len()], ..Checked::default() };
        // By row: the gravest fate so far. Empty while all rows stay.
        let mut fates: Vec<OnFail> = Vec::new();
        let mut messages: BTreeMap<usize, String> = BTreeMap::new();
        for (index, expectation) in self.0.iter().enumerate() {
            let (holds, _) = sql::evaluate_or_null(&expectation.expr, rows, &DataType::Boolean)?;
            let holds = holds.as_boolean();
            let failed = count - holds.true_count();
            checked.failures[index] = failed as u64;
            if failed == 0 || expectation.on_fail == OnFail::Warn {
                continue;
            }
            fates.resize(count, OnFail::Warn);
            for row in (0..count).filter(|&row| holds.is_null(row) || !holds.value(row)) {
                fates[row] = fates[row].max(expectation.on_fail);
                match expectation.on_fail {
                    OnFail::Fail if checked.violation.is_none_or(|(first, _)| row < first) => {
                        checked.violation = Some((row, index));
                    }
                    OnFail::DeadLetter => {
                        let message = messages.entry(row).or_default();
                        if !message.is_empty() {
                            message.push_str("; ");
                        }
                        message.push_str(&format!("expectation {:?}: not true: {}", expectation.name, expectation.sql));
                    }
                    _ => {}
                }
            }
        }
        if fates.is_empty() {
            return Ok(checked);
        }
        checked.kept = Some(fates.iter().map(|fate| Some(*fate == OnFail::Warn)).collect());
        checked.dropped = fates.iter().filter(|fate| **fate == OnFail::Drop).count() as u64;
        checked.refused = messages.into_iter().filter(|(row, _)| fates[*row] == OnFail::DeadLetter).collect();
        Ok(checked)
    }
}

fn compile(text: &str, columns: &SchemaRef) -> Result<Arc<dyn PhysicalExpr>, String> {
    let scope = sql::Scope::new(columns)?;
    let expr = scope.parse(text)?;
    match scope.data_type(&expr)? {
        DataType::Boolean => scope.physical(&expr),
        other => Err(format!("an expectation is true or false, this is of type {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Int64Array, StringArray};
    use arrow::datatypes::{Field, Schema};

    fn rows() -> RecordBatch {
        let schema = Arc::new(Schema::new(vec![
            Field::new("level", DataType::Int64, true),
            Field::new("status", DataType::Utf8, true),
        ]));
        let level: ArrayRef = Arc::new(Int64Array::from(vec![Some(50), Some(150), None, Some(0), Some(-1)]));
        let status: ArrayRef = Arc::new(StringArray::from(vec![Some("ok"), Some("ok"), Some("ok"), None, Some("bad")]));
        RecordBatch::try_new(schema, vec![level, status]).unwrap()
    }

    fn compiled(expectations: &[(&str, &str, OnFail)]) -> Result<Expectations, Vec<String>> {
        let configs: Vec<ExpectationConfig> = expectations
            .iter()
            .map(|(name, sql, on_fail)| ExpectationConfig {
                of: 0,
                name: name.to_string(),
                sql: sql.to_string(),
                on_fail: *on_fail,
            })
            .collect();
        Expectations::compile(&configs, &rows().schema())
    }

    fn check(expectations: &[(&str, &str, OnFail)]) -> Checked {
        compiled(expectations).unwrap().check(&rows()).unwrap()
    }

    fn kept(checked: &Checked) -> Vec<usize> {
        let kept = checked.kept.as_ref().unwrap();
        (0..kept.len()).filter(|&row| kept.value(row)).collect()
    }

    const RANGE: &str = "level BETWEEN 0 AND 100";

    #[test]
    fn false_and_null_fail_and_warn_keeps_all() {
        let checked = check(&[("range", RANGE, OnFail::Warn), ("always", "status is null or true", OnFail::Drop)]);
        assert_eq!(checked.failures, [3, 0]);
        assert!(checked.kept.is_none() && checked.refused.is_empty() && checked.violation.is_none());
    }

    #[test]
    fn failing_rows_are_dropped_or_refused_under_their_name() {
        let checked = check(&[("range", RANGE, OnFail::Drop)]);
        assert_eq!((kept(&checked), checked.dropped), (vec![0, 3], 3));
        let checked = check(&[("range", RANGE, OnFail::DeadLetter)]);
        assert_eq!((kept(&checked), checked.dropped), (vec![0, 3], 0));
        let rows: Vec<usize> = checked.refused.iter().map(|(row, _)| *row).collect();
        assert_eq!(rows, [1, 2, 4]);
        assert!(checked.refused[0].1.contains("\"range\"") && checked.refused[0].1.contains(RANGE));
    }

    #[test]
    fn a_row_meets_the_gravest_fate_once_and_is_counted_under_every_name() {
        let checked = check(&[
            ("range", RANGE, OnFail::DeadLetter),
            ("status", "status = 'ok'", OnFail::Drop),
            ("again", "level < 100", OnFail::DeadLetter),
        ]);
        assert_eq!(checked.failures, [3, 2, 2]);
        assert_eq!(kept(&checked), [0]);
        assert_eq!(checked.dropped, 1, "row 3 only: row 4 is a dead letter");
        assert_eq!(checked.refused.len(), 3);
        assert!(checked.refused[0].1.contains("\"range\"") && checked.refused[0].1.contains("\"again\""));
    }

    #[test]
    fn an_expression_that_fails_on_a_row_is_a_failure_of_that_row() {
        let checked = check(&[("inverse", "100 / level > 1", OnFail::Drop)]);
        assert_eq!(checked.failures, [4], "150, null, the division by zero and -1");
        assert_eq!(kept(&checked), [0]);
    }

    #[test]
    fn the_first_row_that_must_not_be_is_named() {
        let checked = check(&[("status", "status = 'ok'", OnFail::Fail), ("range", RANGE, OnFail::Fail)]);
        assert_eq!(checked.violation, Some((1, 1)));
    }

    #[test]
    fn mistakes_are_named_all_at_once() {
        let errors = compiled(&[("a", "level", OnFail::Drop), ("b", "levl > 0", OnFail::Drop)]).err().unwrap();
        assert!(errors[0].starts_with("expectation a: \"level\": an expectation is true or false"), "{errors:?}");
        assert!(errors[1].contains("columns: level, status"), "{errors:?}");
    }
}
