//! Compiles the SQL of a pipeline against its schema, to find what is wrong with it before anything runs.

use arrow::datatypes::SchemaRef;

use super::{EventTimeConfig, TransformConfig, WindowConfig};

/// Mistakes with the key of the section that each is in.
pub fn compile_pipeline(
    _schema: &SchemaRef,
    _transform: &TransformConfig,
    _event_time: Option<&EventTimeConfig>,
    _windows: &[WindowConfig],
) -> Vec<(String, String)> {
    Vec::new()
}
