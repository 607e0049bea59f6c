//! From a [`TableSpec`] to Iceberg's schema, partition spec and sort order, and whether an existing table fits it.
//!
//! Pure. Invariant: a table that was checked takes every batch of its spec without loss: types are equal or widen, and no
//! column of the spec is missing.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, MapArray, RecordBatch, StructArray, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, FieldRef, Fields, SchemaRef as ArrowSchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow::error::ArrowError;
use iceberg::TableCreation;
use iceberg::arrow::{arrow_schema_to_schema_auto_assign_ids, schema_to_arrow_schema};
use iceberg::spec::{
    FormatVersion, NestedFieldRef, NullOrder, PrimitiveType, Schema, SortDirection, SortField, SortOrder, StructType,
    TableMetadata, Transform, Type, UnboundPartitionField, UnboundPartitionSpec,
};

use super::TableSpec;
use super::catalog::iceberg_error;
use crate::sink::Error;

/// Without a bound the metadata file of every commit lists all those before it.
const PREVIOUS_VERSIONS_MAX: &str = "20";

pub fn creation(spec: &TableSpec) -> Result<TableCreation, Error> {
    let schema = iceberg_schema(spec)?;
    let partition_spec = partition_spec(spec, &schema)?;
    let sort_order = sort_order(spec, &schema)?;
    let mut properties: HashMap<String, String> =
        [("write.metadata.previous-versions-max".to_string(), PREVIOUS_VERSIONS_MAX.to_string())].into();
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

/// The columns of an existing table as batches have to come, or why the table does not fit the spec.
pub fn check(spec: &TableSpec, metadata: &TableMetadata) -> Result<ArrowSchemaRef, Error> {
    if metadata.format_version() != FormatVersion::V2 {
        return Err(Error::fatal(format!(
            "table {} has format version {}; only version 2 is written",
            spec.name,
            metadata.format_version() as u8
        )));
    }
    let wanted = schema_to_arrow_schema(&iceberg_schema(spec)?).map_err(|e| iceberg_error("check", &spec.name, e))?;
    let found = schema_to_arrow_schema(metadata.current_schema()).map_err(|e| iceberg_error("check", &spec.name, e))?;
    let mut problems = Vec::new();
    compare("", wanted.fields(), found.fields(), &mut problems);
    if !problems.is_empty() {
        return Err(Error::fatal(format!(
            "table {} does not fit the pipeline: {}. Change the table or the pipeline, or write to a new table.\n  the pipeline has: {}\n  the table has:    {}",
            spec.name,
            problems.join("; "),
            describe(iceberg_schema(spec)?.as_struct()),
            describe(metadata.current_schema().as_struct()),
        )));
    }
    Ok(Arc::new(found))
}

/// `a long, b required struct<c string>`.
fn describe(columns: &StructType) -> String {
    fn kind(of: &Type) -> String {
        match of {
            Type::Primitive(primitive) => primitive.to_string(),
            Type::Struct(columns) => format!("struct<{}>", describe(columns)),
            Type::List(list) => format!("list<{}>", kind(&list.element_field.field_type)),
            Type::Map(map) => {
                format!("map<{}, {}>", kind(&map.key_field.field_type), kind(&map.value_field.field_type))
            }
        }
    }
    let column =
        |f: &NestedFieldRef| format!("{} {}{}", f.name, if f.required { "required " } else { "" }, kind(&f.field_type));
    columns.fields().iter().map(column).collect::<Vec<_>>().join(", ")
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

fn compare(prefix: &str, wanted: &Fields, found: &Fields, problems: &mut Vec<String>) {
    for field in wanted {
        let name = format!("{prefix}{}", field.name());
        match found.find(field.name()) {
            None => problems.push(format!("the table has no column {name:?} and columns are not added to it")),
            Some((_, there)) => compare_field(&name, field, there, problems),
        }
    }
    for field in found.iter().filter(|f| !f.is_nullable() && wanted.find(f.name()).is_none()) {
        problems.push(format!(
            "the table requires column {:?}, which the pipeline does not have",
            format!("{prefix}{}", field.name())
        ));
    }
}

fn compare_field(name: &str, wanted: &FieldRef, found: &FieldRef, problems: &mut Vec<String>) {
    if wanted.is_nullable() && !found.is_nullable() {
        problems.push(format!("column {name:?} may be null here and is required in the table"));
    }
    match (wanted.data_type(), found.data_type()) {
        (DataType::Struct(wanted), DataType::Struct(found)) => compare(&format!("{name}."), wanted, found, problems),
        (DataType::List(wanted), DataType::List(found)) => {
            compare_field(&format!("{name}.element"), wanted, found, problems)
        }
        (DataType::Map(wanted, _), DataType::Map(found, _)) => match (wanted.data_type(), found.data_type()) {
            (DataType::Struct(wanted), DataType::Struct(found)) if wanted.len() == 2 && found.len() == 2 => {
                compare_field(&format!("{name}.key"), &wanted[0], &found[0], problems);
                compare_field(&format!("{name}.value"), &wanted[1], &found[1], problems);
            }
            _ => problems.push(format!("column {name:?} is not a map of the same form")),
        },
        (wanted, found) if wanted == found => {}
        (DataType::Int32, DataType::Int64) | (DataType::Float32, DataType::Float64) => {}
        (wanted, found) => problems.push(format!("column {name:?} is {wanted} here and {found} in the table")),
    }
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
