//! JSON Schema (draft 2020-12) to columns: a flat object becomes an Arrow schema and the checks of each field.

use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;

/// A compiled schema document.
#[derive(Debug)]
pub struct Schema {
    pub arrow: SchemaRef,
    pub fields: Vec<Field>,
    /// `additionalProperties: false`
    pub closed: bool,
}

/// One property: its column is at the same index in `Schema::arrow`.
#[derive(Debug)]
pub struct Field {
    pub name: String,
    pub required: bool,
    pub nullable: bool,
}

impl Schema {
    /// Reads and compiles a schema document. Every problem is reported, each with its JSON pointer.
    pub fn load(path: &Path) -> Result<Arc<Schema>, Vec<String>> {
        let text = std::fs::read_to_string(path).map_err(|e| vec![format!("{}: {e}", path.display())])?;
        Schema::parse(&text)
    }

    pub fn parse(_text: &str) -> Result<Arc<Schema>, Vec<String>> {
        unimplemented!()
    }
}
