//! Compiles the SQL of a pipeline against its schema, to find what is wrong with it before anything runs.

use arrow::datatypes::SchemaRef;

use super::{EventTimeConfig, ExpectationConfig, TransformConfig, WindowConfig};
use crate::quality::Expectations;
use crate::state::WindowQuery;
use crate::transform::Transform;

/// The mistakes, each with its key.
pub fn compile_pipeline(
    schema: &SchemaRef,
    transform: &TransformConfig,
    expectations: &[ExpectationConfig],
    event_time: Option<&EventTimeConfig>,
    windows: &[WindowConfig],
) -> Vec<(String, String)> {
    let columns = match Transform::compile(transform, schema) {
        Ok(transform) => transform.output_schema(),
        // Windows may use the very columns that are wrong.
        Err(problems) => return problems.iter().map(|p| with_key("", p)).collect(),
    };
    let mut found = Vec::new();
    if let Err(problems) = Expectations::compile(expectations, &columns) {
        found.extend(problems.iter().map(|p| with_key("", p)));
    }
    let Some(event_time) = event_time else { return found };
    for (index, window) in windows.iter().enumerate() {
        if let Err(problems) = WindowQuery::compile(window, &columns, &event_time.column) {
            let subject = format!("window table {}: ", window.table.table);
            let section = format!("windows.{index}.");
            found.extend(problems.iter().map(|p| with_key(&section, p.strip_prefix(&subject).unwrap_or(p))));
        }
    }
    found
}

/// The compilers' messages begin with what they are about: `transform.filter = "…": …`, `group_by: …`.
fn with_key(section: &str, message: &str) -> (String, String) {
    let end = message.find([' ', ':']).unwrap_or(0);
    let problem = message[end..].trim_start_matches([' ', ':', '=']);
    (format!("{section}{}", &message[..end]), problem.to_string())
}
