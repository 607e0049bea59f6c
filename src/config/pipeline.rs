//! Compiles the SQL of a pipeline against its schema, to find what is wrong with it before anything runs.

use arrow::datatypes::SchemaRef;

use super::{EventTimeConfig, TransformConfig, WindowConfig};
use crate::state::WindowQuery;
use crate::transform::Transform;

/// The mistakes, each with the key of its section.
pub fn compile_pipeline(
    schema: &SchemaRef,
    transform: &TransformConfig,
    event_time: Option<&EventTimeConfig>,
    windows: &[WindowConfig],
) -> Vec<(String, String)> {
    let columns = match Transform::compile(transform, schema) {
        Ok(transform) => transform.output_schema(),
        // Windows may use the very columns that are wrong.
        Err(problems) => return problems.into_iter().map(|p| ("transform".to_string(), p)).collect(),
    };
    let Some(event_time) = event_time else { return Vec::new() };
    let mut found = Vec::new();
    for (index, window) in windows.iter().enumerate() {
        if let Err(problems) = WindowQuery::compile(window, &columns, &event_time.column) {
            found.extend(problems.into_iter().map(|p| (format!("windows.{index}"), p)));
        }
    }
    found
}
