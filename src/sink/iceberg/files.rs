//! Data files: rows of one worker and one batch, split by partition, as Parquet.
//!
//! Owns: file names, encodings, when a file is full. Does not own: making files visible ([`super::commit`]). Invariants: a
//! file name is unique to query, batch, attempt and worker; a file that `finish` returns is durable and closed.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray, RecordBatch, StructArray, UInt32Array};
use arrow::compute::{max, min, take_record_batch};
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Date32Type, FieldRef, Int32Type, Int64Type, SchemaRef as ArrowSchemaRef, TimeUnit,
    TimestampMicrosecondType,
};
use arrow::row::{RowConverter, SortField};
use futures::future::try_join_all;
use iceberg::arrow::{arrow_struct_to_literal, type_to_arrow_type};
use iceberg::io::FileIO;
use iceberg::spec::{
    DataFile, DataFileBuilder, Literal, PartitionSpecRef, SchemaRef, Struct, StructType, TableMetadata, Type,
};
use iceberg::writer::CurrentFileStatus;
use iceberg::writer::file_writer::{FileWriter, FileWriterBuilder, ParquetWriter, ParquetWriterBuilder};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use parquet::schema::types::ColumnPath;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::catalog::{TableName, iceberg_error};
use super::order::SortOrder;
use super::transform::TransformFunction;
use super::{bounds, layout};
use crate::batch::BatchId;
use crate::sink::Error;

/// Files one worker has open at a time: rows that are spread over more partitions than this make more, smaller files
/// instead of taking more memory.
const MAX_OPEN_FILES: usize = 32;
const DEFAULT_TARGET_FILE_BYTES: usize = 512 << 20;

/// Rows that one worker holds back to sort them, where the table has a sort order: when they are more, they become files,
/// each sorted for itself. Compaction makes larger sorted files of them.
const SORT_BUFFER_BYTES: usize = 128 << 20;
/// Sorted rows go to the Parquet writer in pieces, so that files end near their target size.
const SLICE_ROWS: usize = 64 * 1024;

/// What writing to a table needs, as the table was when it was opened.
#[derive(Debug)]
pub struct FileLayout {
    pub table: String,
    pub file_io: FileIO,
    pub data_location: String,
    pub schema: SchemaRef,
    pub arrow_schema: ArrowSchemaRef,
    pub spec: PartitionSpecRef,
    pub order: Option<SortOrder>,
    pub properties: WriterProperties,
    pub target_file_bytes: usize,
}

impl FileLayout {
    pub fn of(table: &TableName, metadata: &TableMetadata, file_io: &FileIO) -> Result<FileLayout, Error> {
        let arrow_schema = layout::arrow_schema(table, metadata)?;
        let properties = metadata.properties();
        let data_location = match properties.get("write.data.path") {
            Some(path) => path.trim_end_matches('/').to_string(),
            None => format!("{}/data", metadata.location().trim_end_matches('/')),
        };
        let target_file_bytes = properties
            .get("write.target-file-size-bytes")
            .and_then(|bytes| bytes.parse().ok())
            .unwrap_or(DEFAULT_TARGET_FILE_BYTES);
        Ok(FileLayout {
            table: table.to_string(),
            file_io: file_io.clone(),
            data_location,
            schema: metadata.current_schema().clone(),
            spec: metadata.default_partition_spec().clone(),
            order: SortOrder::new(metadata.default_sort_order(), &arrow_schema)
                .map_err(|e| iceberg_error("write to", table, e))?,
            properties: writer_properties(&table.to_string(), properties, &arrow_schema),
            arrow_schema,
            target_file_bytes,
        })
    }
}

/// The beginning of every file name of a batch.
pub fn name_prefix(query_id: Uuid, batch: BatchId) -> String {
    format!("{}-{batch:06}-", &query_id.simple().to_string()[..8])
}

/// One file writer of one worker. Its methods block: call them from plain threads.
pub struct TableWriter {
    layout: Arc<FileLayout>,
    runtime: Handle,
    name_stem: String,
    partitioner: Option<Partitioner>,
    open: HashMap<Struct, OpenFile>,
    /// Rows that wait to be sorted, by partition. Empty for a table without a sort order.
    unsorted: HashMap<Struct, Vec<RecordBatch>>,
    unsorted_bytes: usize,
    /// The rows come in the table's sort order.
    sorted: bool,
    started: usize,
    writes: u64,
    /// Columns in which there has been a NaN: files begun since then have no statistics of them.
    with_nan: Vec<ColumnPath>,
    done: Vec<DataFile>,
}

struct OpenFile {
    writer: ParquetWriter,
    last_write: u64,
    /// How many columns with NaN were known when it was begun.
    with_nan: usize,
}

impl TableWriter {
    pub(super) fn new(layout: Arc<FileLayout>, runtime: Handle, prefix: &str, attempt: Uuid, worker: usize) -> Self {
        TableWriter {
            name_stem: format!("{prefix}{}-{worker}", attempt.simple()),
            layout,
            runtime,
            partitioner: None,
            open: HashMap::new(),
            unsorted: HashMap::new(),
            unsorted_bytes: 0,
            sorted: false,
            started: 0,
            writes: 0,
            with_nan: Vec::new(),
            done: Vec::new(),
        }
    }

    /// For rows that come in the table's sort order.
    pub(super) fn of_sorted_rows(self) -> Self {
        TableWriter { sorted: true, ..self }
    }

    pub fn write(&mut self, rows: &RecordBatch) -> Result<(), Error> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        let rows = layout::conform(rows, &self.layout.arrow_schema).map_err(|e| self.invalid(e))?;
        if self.layout.spec.is_unpartitioned() {
            return self.put(Struct::empty(), rows);
        }
        if self.partitioner.is_none() {
            self.partitioner = Some(Partitioner::new(&self.layout).map_err(|e| self.invalid(e))?);
        }
        let parts = match &self.partitioner {
            Some(partitioner) => partitioner.split(rows).map_err(|e| self.invalid(e))?,
            None => Vec::new(),
        };
        parts.into_iter().try_for_each(|(partition, rows)| self.put(partition, rows))
    }

    fn put(&mut self, partition: Struct, rows: RecordBatch) -> Result<(), Error> {
        if self.layout.order.is_none() || self.sorted {
            return self.append(partition, &rows);
        }
        self.unsorted_bytes +=
            rows.columns().iter().map(|c| c.to_data().get_slice_memory_size().unwrap_or_default()).sum::<usize>();
        self.unsorted.entry(partition).or_default().push(rows);
        if self.unsorted_bytes < SORT_BUFFER_BYTES {
            return Ok(());
        }
        self.sort()?;
        // What comes next is another sorted run: it must not go into these files.
        self.close_all()
    }

    /// Writes what waits to be sorted, one sorted run a partition.
    fn sort(&mut self) -> Result<(), Error> {
        self.unsorted_bytes = 0;
        for (partition, batches) in std::mem::take(&mut self.unsorted) {
            let sorted = match &self.layout.order {
                Some(order) => order.sort(&self.layout.arrow_schema, &batches).map_err(|e| self.invalid(e))?,
                None => continue,
            };
            drop(batches);
            for start in (0..sorted.num_rows()).step_by(SLICE_ROWS) {
                let slice = sorted.slice(start, SLICE_ROWS.min(sorted.num_rows() - start));
                self.append(partition.clone(), &slice)?;
            }
        }
        Ok(())
    }

    /// Closes every file, all at once: what takes long is waiting for the store. No rows written: no files.
    pub fn finish(mut self) -> Result<Vec<DataFile>, Error> {
        self.sort()?;
        self.close_all()?;
        Ok(self.done)
    }

    fn close_all(&mut self) -> Result<(), Error> {
        let open = std::mem::take(&mut self.open);
        let closing = open.into_iter().map(|(partition, file)| async move {
            let closed = file.writer.close().await?;
            Ok::<_, iceberg::Error>((partition, closed))
        });
        let closed = self.runtime.block_on(try_join_all(closing)).map_err(|e| self.failed("close a data file", e))?;
        closed.into_iter().try_for_each(|(partition, files)| self.keep(partition, files))
    }

    fn append(&mut self, partition: Struct, rows: &RecordBatch) -> Result<(), Error> {
        self.writes += 1;
        let with_nan = bounds::with_nan(rows);
        if let Some(file) = self.open.get(&partition)
            && with_nan.iter().any(|column| !self.with_nan[..file.with_nan].contains(column))
            && let Some(file) = self.open.remove(&partition)
        {
            self.close(partition.clone(), file)?;
        }
        for column in with_nan {
            if !self.with_nan.contains(&column) {
                self.with_nan.push(column);
            }
        }
        if !self.open.contains_key(&partition) {
            self.make_room()?;
            let writer = self.start(&partition)?;
            self.open.insert(partition.clone(), OpenFile { writer, last_write: 0, with_nan: self.with_nan.len() });
        }
        let Some(file) = self.open.get_mut(&partition) else { return Ok(()) };
        file.last_write = self.writes;
        let written = self.runtime.block_on(file.writer.write(rows));
        let full = file.writer.current_written_size() >= self.layout.target_file_bytes;
        written.map_err(|e| self.failed("write a data file", e))?;
        if full && let Some(file) = self.open.remove(&partition) {
            self.close(partition, file)?;
        }
        Ok(())
    }

    /// Closes the file that has waited longest for rows when too many are open.
    fn make_room(&mut self) -> Result<(), Error> {
        if self.open.len() < MAX_OPEN_FILES {
            return Ok(());
        }
        let oldest = self.open.iter().min_by_key(|(_, file)| file.last_write).map(|(partition, _)| partition.clone());
        if let Some(partition) = oldest
            && let Some(file) = self.open.remove(&partition)
        {
            self.close(partition, file)?;
        }
        Ok(())
    }

    fn start(&mut self, partition: &Struct) -> Result<ParquetWriter, Error> {
        let folder = partition_folder(&self.layout, partition).map_err(|e| self.failed("name a partition", e))?;
        let location = format!("{}/{folder}{}-{}.parquet", self.layout.data_location, self.name_stem, self.started);
        self.started += 1;
        let output = self.layout.file_io.new_output(location).map_err(|e| self.failed("write a data file", e))?;
        let mut properties = self.layout.properties.clone();
        if !self.with_nan.is_empty() {
            let without = |builder: WriterPropertiesBuilder, column: &ColumnPath| {
                builder.set_column_statistics_enabled(column.clone(), EnabledStatistics::None)
            };
            properties = self.with_nan.iter().fold(properties.into_builder(), without).build();
        }
        let builder = ParquetWriterBuilder::new(properties, self.layout.schema.clone());
        self.runtime.block_on(builder.build(output)).map_err(|e| self.failed("write a data file", e))
    }

    fn close(&mut self, partition: Struct, file: OpenFile) -> Result<(), Error> {
        let closed = self.runtime.block_on(file.writer.close()).map_err(|e| self.failed("close a data file", e))?;
        self.keep(partition, closed)
    }

    fn keep(&mut self, partition: Struct, closed: Vec<DataFileBuilder>) -> Result<(), Error> {
        for mut file in closed {
            file.partition(partition.clone()).partition_spec_id(self.layout.spec.spec_id());
            if let Some(order) = &self.layout.order {
                file.sort_order_id(order.id());
            }
            self.done.push(bounds::build(&mut file).map_err(|e| self.invalid(e))?);
        }
        Ok(())
    }

    fn failed(&self, action: &str, error: iceberg::Error) -> Error {
        Error::transient(format!("table {}: cannot {action}: {error}", self.layout.table))
    }

    fn invalid(&self, error: impl std::fmt::Display) -> Error {
        Error::fatal(format!("table {}: rows do not fit it: {error}", self.layout.table))
    }
}

/// `name=value/…/`, names and values percent-encoded: a value may hold anything, a slash too.
fn partition_folder(layout: &FileLayout, partition: &Struct) -> iceberg::Result<String> {
    let types = layout.spec.partition_type(&layout.schema)?;
    let mut folder = String::new();
    for ((field, value), kind) in layout.spec.fields().iter().zip(partition.fields()).zip(types.fields()) {
        encode(&field.name, &mut folder);
        folder.push('=');
        encode(&field.transform.to_human_string(&kind.field_type, value.as_ref()), &mut folder);
        folder.push('/');
    }
    Ok(folder)
}

fn encode(text: &str, out: &mut String) {
    use std::fmt::Write;
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_-.".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

/// Computes partition values and splits batches by them.
struct Partitioner {
    fields: Vec<PartitionColumn>,
    partition_type: StructType,
    arrow_fields: Vec<FieldRef>,
    rows: RowConverter,
}

struct PartitionColumn {
    /// Top-level column, then the children on the way down.
    path: Vec<usize>,
    transform: TransformFunction,
}

impl Partitioner {
    fn new(layout: &FileLayout) -> iceberg::Result<Partitioner> {
        let partition_type = layout.spec.partition_type(&layout.schema)?;
        let arrow_type = type_to_arrow_type(&Type::Struct(partition_type.clone()))?;
        let arrow_fields: Vec<FieldRef> = match arrow_type {
            DataType::Struct(fields) => fields.iter().cloned().collect(),
            _ => Vec::new(),
        };
        let mut fields = Vec::new();
        for field in layout.spec.fields() {
            let path = path_of(layout.arrow_schema.fields(), field.source_id).ok_or_else(|| {
                let message = format!("partition field {} has no source column", field.name);
                iceberg::Error::new(iceberg::ErrorKind::DataInvalid, message)
            })?;
            fields.push(PartitionColumn { path, transform: TransformFunction::new(&field.transform)? });
        }
        let sort = arrow_fields.iter().map(|f| SortField::new(f.data_type().clone())).collect();
        Ok(Partitioner { fields, partition_type, arrow_fields, rows: RowConverter::new(sort)? })
    }

    fn split(&self, batch: RecordBatch) -> iceberg::Result<Vec<(Struct, RecordBatch)>> {
        let sources: Vec<ArrayRef> = self.fields.iter().map(|f| column_at(&batch, &f.path)).collect();
        if let Some(partition) = self.single(&sources)? {
            return Ok(vec![(partition, batch)]);
        }
        let values = self.transform(&sources)?;
        let keys = self.rows.convert_columns(&values)?;
        let mut groups: HashMap<&[u8], usize> = HashMap::new();
        let mut members: Vec<Vec<u32>> = Vec::new();
        let mut last: (&[u8], usize) = (&[], usize::MAX);
        for (i, key) in keys.iter().enumerate() {
            let key = key.data();
            if last.1 == usize::MAX || last.0 != key {
                let group = *groups.entry(key).or_insert_with(|| {
                    members.push(Vec::new());
                    members.len() - 1
                });
                last = (key, group);
            }
            members[last.1].push(u32::try_from(i).unwrap_or(u32::MAX));
        }
        if members.len() == 1 {
            return Ok(vec![(self.partition(&values, 0)?, batch)]);
        }
        let mut parts = Vec::with_capacity(members.len());
        for rows in members {
            let partition = self.partition(&values, rows[0] as usize)?;
            parts.push((partition, take_record_batch(&batch, &UInt32Array::from(rows))?));
        }
        Ok(parts)
    }

    /// The usual case, by the least work: the smallest and the largest value lie in the same partition.
    fn single(&self, sources: &[ArrayRef]) -> iceberg::Result<Option<Struct>> {
        let mut bounds = Vec::with_capacity(sources.len());
        for (field, source) in self.fields.iter().zip(sources) {
            match bounds_of(source).filter(|_| field.transform.preserves_order()) {
                Some(pair) => bounds.push(pair),
                None => return Ok(None),
            }
        }
        let values = self.transform(&bounds)?;
        let same = values.iter().all(|v| v.slice(0, 1).as_ref() == v.slice(1, 1).as_ref());
        if same { self.partition(&values, 0).map(Some) } else { Ok(None) }
    }

    fn transform(&self, sources: &[ArrayRef]) -> iceberg::Result<Vec<ArrayRef>> {
        self.fields.iter().zip(sources).map(|(field, source)| field.transform.transform(source.clone())).collect()
    }

    fn partition(&self, values: &[ArrayRef], row: usize) -> iceberg::Result<Struct> {
        let columns: Vec<ArrayRef> = values.iter().map(|v| v.slice(row, 1)).collect();
        let row: ArrayRef = Arc::new(StructArray::try_new(self.arrow_fields.clone().into(), columns, None)?);
        match arrow_struct_to_literal(&row, &self.partition_type)?.pop() {
            Some(Some(Literal::Struct(partition))) => Ok(partition),
            _ => Err(iceberg::Error::new(iceberg::ErrorKind::Unexpected, "a row without a partition value")),
        }
    }
}

pub(super) fn path_of(fields: &arrow::datatypes::Fields, id: i32) -> Option<Vec<usize>> {
    let id_text = id.to_string();
    for (i, field) in fields.iter().enumerate() {
        if field.metadata().get(parquet::arrow::PARQUET_FIELD_ID_META_KEY) == Some(&id_text) {
            return Some(vec![i]);
        }
        if let DataType::Struct(children) = field.data_type()
            && let Some(mut path) = path_of(children, id)
        {
            path.insert(0, i);
            return Some(path);
        }
    }
    None
}

pub(super) fn column_at(batch: &RecordBatch, path: &[usize]) -> ArrayRef {
    let mut column = batch.column(path[0]).clone();
    for i in &path[1..] {
        let parent = column.as_struct();
        let child = parent.column(*i);
        // A child of a null struct is null, whatever its slot holds.
        let nulls = arrow::buffer::NullBuffer::union(parent.nulls(), child.nulls());
        let data = child.to_data().into_builder().nulls(nulls);
        column = data.build().map(arrow::array::make_array).unwrap_or_else(|_| child.clone());
    }
    column
}

/// The smallest and the largest value as an array of two, if that is cheap to know and there are no nulls.
fn bounds_of(array: &ArrayRef) -> Option<ArrayRef> {
    fn pair<T: ArrowPrimitiveType>(array: &ArrayRef) -> Option<ArrayRef> {
        let values = array.as_primitive::<T>();
        let bounds = vec![min(values)?, max(values)?];
        Some(Arc::new(PrimitiveArray::<T>::new(bounds.into(), None).with_data_type(array.data_type().clone())))
    }
    if array.null_count() > 0 {
        return None;
    }
    match array.data_type() {
        DataType::Timestamp(TimeUnit::Microsecond, _) => pair::<TimestampMicrosecondType>(array),
        DataType::Date32 => pair::<Date32Type>(array),
        DataType::Int32 => pair::<Int32Type>(array),
        DataType::Int64 => pair::<Int64Type>(array),
        _ => None,
    }
}

/// Encodings by type, measured on telemetry: numbers and timestamps as deltas, dictionaries only for strings, where the
/// writer falls back by itself when there are too many. Doubles stay plain: BYTE_STREAM_SPLIT is smaller, but Spark's
/// vectorized Iceberg reader (1.10), which is its default, refuses it. The table's own `write.parquet.*` properties
/// decide about compression and sizes.
pub fn writer_properties(
    table: &str,
    properties: &HashMap<String, String>,
    schema: &ArrowSchemaRef,
) -> WriterProperties {
    let bytes = |name: &str| -> Option<usize> {
        let value = properties.get(&format!("write.parquet.{name}"))?;
        let parsed = value.parse().ok().filter(|n| *n > 0);
        if parsed.is_none() {
            tracing::warn!(table, property = %format!("write.parquet.{name}"), value, "table property is not a positive number; using the default");
        }
        parsed
    };
    let mut builder = WriterProperties::builder()
        // Java readers trust the statistics of strings only where they can parse this form.
        .set_created_by(concat!("floe version ", env!("CARGO_PKG_VERSION")).to_string())
        .set_compression(compression(table, properties))
        .set_dictionary_enabled(false)
        // Whole: see `bounds`. Indexes of pages are cut all the same.
        .set_statistics_truncate_length(None)
        .set_max_row_group_bytes(Some(bytes("row-group-size-bytes").unwrap_or(128 << 20)));
    if let Some(limit) = bytes("page-size-bytes") {
        builder = builder.set_data_page_size_limit(limit);
    }
    if let Some(limit) = bytes("page-row-limit") {
        builder = builder.set_data_page_row_count_limit(limit);
    }
    if let Some(limit) = bytes("dict-size-bytes") {
        builder = builder.set_dictionary_page_size_limit(limit);
    }
    for field in schema.fields() {
        builder = encodings(builder, &mut Vec::new(), field);
    }
    builder.build()
}

/// Of the `write.parquet.*` properties those that act on the files.
const PARQUET: [&str; 6] = [
    "compression-codec",
    "compression-level",
    "row-group-size-bytes",
    "page-size-bytes",
    "page-row-limit",
    "dict-size-bytes",
];

/// Properties of a table that say how files are to be written, and that Floe does not heed.
pub(super) fn without_effect(properties: &HashMap<String, String>) -> Vec<&str> {
    let has_none = |(name, value): (&String, &String)| match name.strip_prefix("write.parquet.") {
        Some(parquet) => !PARQUET.contains(&parquet),
        None if name == "write.format.default" => value != "parquet",
        None if name == "write.object-storage.enabled" => value != "false",
        None => name.starts_with("write.metadata.metrics."),
    };
    let mut found: Vec<&str> =
        properties.iter().filter(|(name, value)| has_none((name, value))).map(|(name, _)| name.as_str()).collect();
    found.sort_unstable();
    found
}

fn compression(table: &str, properties: &HashMap<String, String>) -> Compression {
    let level = properties.get("write.parquet.compression-level").and_then(|level| level.parse().ok()).unwrap_or(1);
    let zstd = Compression::ZSTD(ZstdLevel::try_new(level).unwrap_or_default());
    match properties.get("write.parquet.compression-codec").map(|codec| codec.to_ascii_lowercase()).as_deref() {
        None | Some("zstd") => zstd,
        Some("uncompressed" | "none") => Compression::UNCOMPRESSED,
        Some(codec) => {
            tracing::warn!(table, codec, "compression codec is not built in; using zstd");
            zstd
        }
    }
}

fn encodings(builder: WriterPropertiesBuilder, path: &mut Vec<String>, field: &FieldRef) -> WriterPropertiesBuilder {
    path.push(field.name().clone());
    let column = || ColumnPath::new(path.clone());
    let builder = match field.data_type() {
        DataType::Int32 | DataType::Int64 | DataType::Date32 | DataType::Time64(_) | DataType::Timestamp(_, _) => {
            builder.set_column_encoding(column(), Encoding::DELTA_BINARY_PACKED)
        }
        DataType::Utf8 | DataType::LargeUtf8 => builder.set_column_dictionary_enabled(column(), true),
        DataType::Struct(fields) => fields.iter().fold(builder, |b, field| encodings(b, path, field)),
        DataType::List(element) => {
            path.push("list".into());
            let builder = encodings(builder, path, element);
            path.pop();
            builder
        }
        DataType::Map(entries, _) => encodings(builder, path, entries),
        _ => builder,
    };
    path.pop();
    builder
}
