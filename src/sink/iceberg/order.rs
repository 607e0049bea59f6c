//! A table's sort order, applied: rows of a data file in the order that the table declares.
//!
//! Owns: comparing rows as the order says, transforms included. Does not own: which rows make up a file. Invariant: a file
//! that carries a sort order's id is sorted by it from its first row to its last.

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::{SortColumn, SortOptions, concat_batches, lexsort_to_indices, take_record_batch};
use arrow::datatypes::SchemaRef as ArrowSchemaRef;
use iceberg::spec::{NullOrder, SortDirection, SortOrder as TableOrder};

use super::files::{column_at, path_of};
use super::transform::TransformFunction;

#[derive(Debug)]
pub struct SortOrder {
    id: i32,
    columns: Vec<Column>,
}

#[derive(Debug)]
struct Column {
    /// Top-level column, then the children on the way down.
    path: Vec<usize>,
    transform: TransformFunction,
    options: SortOptions,
}

impl SortOrder {
    /// None for a table without a sort order. `schema` is the table's, with its field ids.
    pub fn new(order: &TableOrder, schema: &ArrowSchemaRef) -> iceberg::Result<Option<SortOrder>> {
        let mut columns = Vec::with_capacity(order.fields.len());
        for field in &order.fields {
            let path = path_of(schema.fields(), field.source_id).ok_or_else(|| {
                let message = format!("sort order {} is by a column that the table does not have", order.order_id);
                iceberg::Error::new(iceberg::ErrorKind::DataInvalid, message)
            })?;
            let options = SortOptions {
                descending: field.direction == SortDirection::Descending,
                nulls_first: field.null_order == NullOrder::First,
            };
            columns.push(Column { path, transform: TransformFunction::new(&field.transform)?, options });
        }
        let id = i32::try_from(order.order_id).unwrap_or_default();
        Ok((!columns.is_empty()).then_some(SortOrder { id, columns }))
    }

    /// What a sorted file's entry in a manifest says.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// How each of the [`keys`](SortOrder::keys) is compared.
    pub fn options(&self) -> Vec<SortOptions> {
        self.columns.iter().map(|column| column.options).collect()
    }

    /// The values that rows are compared by, and how.
    pub fn keys(&self, rows: &RecordBatch) -> iceberg::Result<Vec<SortColumn>> {
        let key = |column: &Column| -> iceberg::Result<SortColumn> {
            let values: ArrayRef = column.transform.transform(column_at(rows, &column.path))?;
            Ok(SortColumn { values, options: Some(column.options) })
        };
        self.columns.iter().map(key).collect()
    }

    /// All rows of `batches`, sorted. The batches have the table's columns.
    pub fn sort(&self, schema: &ArrowSchemaRef, batches: &[RecordBatch]) -> iceberg::Result<RecordBatch> {
        let rows = concat_batches(schema, batches)?;
        let indices = lexsort_to_indices(&self.keys(&rows)?, None)?;
        Ok(take_record_batch(&rows, &indices)?)
    }
}
