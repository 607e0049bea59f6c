//! From a [`TableSpec`] to Iceberg's schema, partition spec and sort order, and whether an existing table fits it.
//!
//! Pure. Invariant: a table that fits takes every batch of its spec without loss: types are equal or widen, and no column
//! of the spec is missing.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, MapArray, RecordBatch, StructArray, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, FieldRef, Fields, SchemaRef as ArrowSchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow::error::ArrowError;
use iceberg::TableCreation;
use iceberg::arrow::{arrow_schema_to_schema_auto_assign_ids, schema_to_arrow_schema};
use iceberg::spec::{
    FormatVersion, NullOrder, PrimitiveType, Schema, SortDirection, SortField, SortOrder, TableMetadata, Transform,
    Type, UnboundPartitionField, UnboundPartitionSpec,
};

use super::TableSpec;
use super::catalog::{TableName, iceberg_error};
use super::evolution::{self, Evolution};
use crate::sink::Error;

/// What keeps a table with millions of commits small: a bounded log of metadata files, those that leave it deleted, and
/// manifests merged early.
const DEFAULTS: [(&str, &str); 3] = [
    ("write.metadata.previous-versions-max", "20"),
    (super::metadata::DELETE_AFTER_COMMIT, "true"),
    (super::manifests::MIN_COUNT_TO_MERGE, "50"),
];

pub fn creation(spec: &TableSpec) -> Result<TableCreation, Error> {
    let schema = iceberg_schema(spec)?;
    if let Some((a, b)) = evolution::ambiguous_name(schema.as_struct()) {
        return Err(Error::fatal(format!(
            "table {}: columns {a:?} and {b:?} differ in case only, which most engines cannot tell apart; rename one",
            spec.name
        )));
    }
    let partition_spec = partition_spec(spec, &schema)?;
    let sort_order = sort_order(spec, &schema)?;
    let mut properties: HashMap<String, String> =
        DEFAULTS.iter().map(|(property, value)| (property.to_string(), value.to_string())).collect();
    properties.extend(spec.properties.clone());
    Ok(TableCreation::builder()
        .name(spec.name.clone())
        .schema(schema)
        .partition_spec(partition_spec)
        .sort_order(sort_order)
        .properties(properties)
        .format_version(FormatVersion::V2)
        .build())
}

fn iceberg_schema(spec: &TableSpec) -> Result<Schema, Error> {
    arrow_schema_to_schema_auto_assign_ids(&spec.schema)
        .map_err(|e| Error::fatal(format!("table {}: a column has no Iceberg type: {e}", spec.name)))
}

/// `day(ts)`, `bucket(16, id)`, `truncate(4, name)` or a column.
fn parse_transform(expression: &str) -> Option<(Transform, String)> {
    let expression = expression.trim();
    let Some((function, arguments)) = expression.split_once('(') else {
        return Some((Transform::Identity, expression.to_string()));
    };
    let arguments: Vec<&str> = arguments.strip_suffix(')')?.split(',').map(str::trim).collect();
    let function = function.trim().to_ascii_lowercase();
    match (function.as_str(), arguments.as_slice()) {
        ("identity", [column]) => Some((Transform::Identity, column.to_string())),
        ("year" | "years", [column]) => Some((Transform::Year, column.to_string())),
        ("month" | "months", [column]) => Some((Transform::Month, column.to_string())),
        ("day" | "days", [column]) => Some((Transform::Day, column.to_string())),
        ("hour" | "hours", [column]) => Some((Transform::Hour, column.to_string())),
        ("bucket", [n, column]) => Some((Transform::Bucket(n.parse().ok().filter(|n| *n > 0)?), column.to_string())),
        ("truncate", [n, column]) => {
            Some((Transform::Truncate(n.parse().ok().filter(|n| *n > 0)?), column.to_string()))
        }
        _ => None,
    }
}

fn source(
    spec: &TableSpec,
    schema: &Schema,
    setting: &str,
    expression: &str,
) -> Result<(Transform, String, i32), Error> {
    let fail = |message: String| Error::fatal(format!("table {}: {setting} {expression:?}: {message}", spec.name));
    let (transform, column) = parse_transform(expression).ok_or_else(|| {
        fail("expected a column or year, month, day, hour(column), bucket(n, column) or truncate(n, column)".into())
    })?;
    let field = schema.field_by_name(&column).ok_or_else(|| fail(format!("there is no column {column:?}")))?;
    transform
        .result_type(&field.field_type)
        .map_err(|_| fail(format!("{transform} does not apply to column {column:?} of type {}", field.field_type)))?;
    Ok((transform, column, field.id))
}

fn partition_spec(spec: &TableSpec, schema: &Schema) -> Result<UnboundPartitionSpec, Error> {
    let mut fields = Vec::new();
    for expression in &spec.partition_by {
        let (transform, column, source_id) = source(spec, schema, "partition_by", expression)?;
        let continuous =
            [PrimitiveType::Timestamptz, PrimitiveType::Timestamp, PrimitiveType::Double, PrimitiveType::Float];
        let field_type = schema.field_by_id(source_id).map(|f| f.field_type.as_ref());
        if transform == Transform::Identity
            && matches!(field_type, Some(Type::Primitive(primitive)) if continuous.contains(primitive))
        {
            return Err(Error::fatal(format!(
                "table {}: partition_by {expression:?} would make a partition of every value; use day({column}), hour({column}) or bucket(n, {column})",
                spec.name
            )));
        }
        let flat = column.replace('.', "_");
        let name = match transform {
            Transform::Identity => flat,
            Transform::Bucket(_) => format!("{flat}_bucket"),
            Transform::Truncate(_) => format!("{flat}_trunc"),
            other => format!("{flat}_{other}"),
        };
        fields.push(UnboundPartitionField { source_id, field_id: None, name, transform });
    }
    UnboundPartitionSpec::builder()
        .add_partition_fields(fields)
        .map(|builder| builder.build())
        .map_err(|e| Error::fatal(format!("table {}: partition_by: {e}", spec.name)))
}

/// `column`, `column desc`, `day(ts) desc`. Nulls first when ascending, last when descending, as in Spark.
fn sort_order(spec: &TableSpec, schema: &Schema) -> Result<SortOrder, Error> {
    let mut fields = Vec::new();
    for expression in &spec.sort_by {
        let lower = expression.trim().to_ascii_lowercase();
        let (length, direction, null_order) = match (lower.strip_suffix(" desc"), lower.strip_suffix(" asc")) {
            (Some(rest), _) => (rest.len(), SortDirection::Descending, NullOrder::Last),
            (_, Some(rest)) => (rest.len(), SortDirection::Ascending, NullOrder::First),
            _ => (lower.len(), SortDirection::Ascending, NullOrder::First),
        };
        let (transform, _, source_id) = source(spec, schema, "sort_by", &expression.trim()[..length])?;
        fields.push(SortField { source_id, transform, direction, null_order });
    }
    if fields.is_empty() {
        return Ok(SortOrder::unsorted_order());
    }
    Ok(SortOrder { order_id: 1, fields })
}

/// What it takes to make an existing table fit its spec.
pub fn evolution(spec: &TableSpec, metadata: &TableMetadata) -> Result<Evolution, Error> {
    let version = metadata.format_version();
    if version != FormatVersion::V2 {
        return Ok(Evolution::Refuse(format!("  it has format version {}; only version 2 is written", version as u8)));
    }
    Ok(evolution::plan(metadata.current_schema(), metadata.last_column_id(), &iceberg_schema(spec)?))
}

/// The columns of a table as batches have to come.
pub fn arrow_schema(table: &TableName, metadata: &TableMetadata) -> Result<ArrowSchemaRef, Error> {
    let schema = schema_to_arrow_schema(metadata.current_schema());
    Ok(Arc::new(schema.map_err(|e| iceberg_error("write to", table, e))?))
}

/// Whether the table is partitioned as the spec says. It need not be: the table's own partitioning is what is used.
pub fn is_partitioned_as(spec: &TableSpec, metadata: &TableMetadata) -> bool {
    let fields = metadata.default_partition_spec().fields();
    let schema = metadata.current_schema();
    fields.len() == spec.partition_by.len()
        && spec.partition_by.iter().zip(fields).all(|(expression, field)| {
            parse_transform(expression).is_some_and(|(transform, column)| {
                transform == field.transform && schema.name_by_field_id(field.source_id) == Some(column.as_str())
            })
        })
}

/// `rows` with the columns, types and field ids of `table`. Values are shared, not copied, unless a type widens.
pub fn conform(rows: &RecordBatch, table: &ArrowSchemaRef) -> Result<RecordBatch, ArrowError> {
    let mut columns = Vec::with_capacity(table.fields().len());
    for field in table.fields() {
        columns.push(match rows.column_by_name(field.name()) {
            Some(column) => conform_array(column, field.data_type())?,
            None => new_null_array(field.data_type(), rows.num_rows()),
        });
    }
    RecordBatch::try_new(table.clone(), columns)
}

fn conform_array(array: &ArrayRef, to: &DataType) -> Result<ArrayRef, ArrowError> {
    if array.data_type() == to {
        return Ok(array.clone());
    }
    Ok(match (array.data_type(), to) {
        // The same instants under another name of UTC.
        (DataType::Timestamp(TimeUnit::Microsecond, _), DataType::Timestamp(TimeUnit::Microsecond, zone)) => {
            Arc::new(array.as_primitive::<TimestampMicrosecondType>().clone().with_timezone_opt(zone.clone()))
        }
        (DataType::List(_), DataType::List(element)) => {
            let list = array.as_list::<i32>();
            let values = conform_array(list.values(), element.data_type())?;
            Arc::new(ListArray::try_new(element.clone(), list.offsets().clone(), values, list.nulls().cloned())?)
        }
        (DataType::Struct(_), DataType::Struct(fields)) => {
            Arc::new(conform_struct(array.as_struct(), fields, |from, field, _| from.column_by_name(field.name()))?)
        }
        (DataType::Map(_, _), DataType::Map(entries, sorted)) => {
            let map = array.as_map();
            let DataType::Struct(fields) = entries.data_type() else {
                return Err(ArrowError::SchemaError("a map without key and value".into()));
            };
            let conformed = conform_struct(map.entries(), fields, |from, _, i| from.columns().get(i))?;
            let nulls = map.nulls().cloned();
            Arc::new(MapArray::try_new(entries.clone(), map.offsets().clone(), conformed, nulls, *sorted)?)
        }
        (_, to) => cast_with_options(array, to, &CastOptions { safe: false, ..Default::default() })?,
    })
}

fn conform_struct<'a>(
    from: &'a StructArray,
    fields: &Fields,
    child: impl Fn(&'a StructArray, &FieldRef, usize) -> Option<&'a ArrayRef>,
) -> Result<StructArray, ArrowError> {
    let columns = fields
        .iter()
        .enumerate()
        .map(|(i, field)| match child(from, field, i) {
            Some(column) => conform_array(column, field.data_type()),
            None => Ok(new_null_array(field.data_type(), from.len())),
        })
        .collect::<Result<Vec<_>, _>>()?;
    StructArray::try_new_with_length(fields.clone(), columns, from.nulls().cloned(), from.len())
}
