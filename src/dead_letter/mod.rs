//! Records that were refused, and the table that keeps them: every one with its provenance and its reason.
//!
//! Owns: the closed set of reasons and the columns of the table; reading letters back ([`letters`]), trying them again
//! ([`retry`]) and handing them on to a Kafka topic ([`topic`]). Does not own: who refuses ([`crate::decode`] and later
//! checks) and how the table is written. Invariant: key, payload and headers are kept byte for byte as they came.

pub mod letters;
pub mod retry;
pub mod topic;

use std::sync::Arc;

use arrow::array::builder::{
    BinaryBuilder, Int32Builder, Int64Builder, ListBuilder, StringBuilder, StructBuilder, TimestampMicrosecondBuilder,
};
use arrow::array::{ArrayBuilder, ArrayRef};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use arrow::record_batch::RecordBatch;

use crate::batch::{BatchId, Gap};
use crate::decode::Rejection;
use crate::source::Chunk;

/// Why a record was refused: a closed set, documented in the README.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    NullValue,
    Empty,
    InvalidUtf8,
    MalformedJson,
    TooDeep,
    DuplicateKey,
    NotAnObject,
    MissingField,
    WrongType,
    NumberOutOfRange,
    OutOfRange,
    NotInEnum,
    BadFormat,
    BadLength,
    UnknownField,
    /// A keyword that only a general validator checks, such as `anyOf`.
    SchemaViolation,
    /// Begins as in a schema registry's framing, and no registry is configured.
    SchemaRegistryFraming,
    /// The schema registry has no schema of the record's id.
    UnknownSchemaId,
    /// The schema of the record's id is no JSON Schema.
    UnsupportedSchema,
    UnknownType,
    FutureEventTime,
    /// A derived column or the filter failed on the record, as a division by zero does.
    ExpressionFailed,
    /// It is valid, and fails an expectation with `on_fail = "dead_letter"`.
    ExpectationFailed,
    /// A value of a window could not be computed, such as a sum beyond its type, and is null.
    Overflow,
    /// Not a record: offsets that expired before they were read (`fail_on_data_loss = false`).
    DataLoss,
}

impl Reason {
    pub const ALL: [Reason; 25] = [
        Reason::NullValue,
        Reason::Empty,
        Reason::InvalidUtf8,
        Reason::MalformedJson,
        Reason::TooDeep,
        Reason::DuplicateKey,
        Reason::NotAnObject,
        Reason::MissingField,
        Reason::WrongType,
        Reason::NumberOutOfRange,
        Reason::OutOfRange,
        Reason::NotInEnum,
        Reason::BadFormat,
        Reason::BadLength,
        Reason::UnknownField,
        Reason::SchemaViolation,
        Reason::SchemaRegistryFraming,
        Reason::UnknownSchemaId,
        Reason::UnsupportedSchema,
        Reason::UnknownType,
        Reason::FutureEventTime,
        Reason::ExpressionFailed,
        Reason::ExpectationFailed,
        Reason::Overflow,
        Reason::DataLoss,
    ];

    /// Whether it is about a record; the others come on top of them.
    pub fn is_of_a_record(self) -> bool {
        !matches!(self, Reason::Overflow | Reason::DataLoss)
    }

    pub fn code(self) -> &'static str {
        match self {
            Reason::NullValue => "null_value",
            Reason::Empty => "empty",
            Reason::InvalidUtf8 => "invalid_utf8",
            Reason::MalformedJson => "malformed_json",
            Reason::TooDeep => "too_deep",
            Reason::DuplicateKey => "duplicate_key",
            Reason::NotAnObject => "not_an_object",
            Reason::MissingField => "missing_field",
            Reason::WrongType => "wrong_type",
            Reason::NumberOutOfRange => "number_out_of_range",
            Reason::OutOfRange => "out_of_range",
            Reason::NotInEnum => "not_in_enum",
            Reason::BadFormat => "bad_format",
            Reason::BadLength => "bad_length",
            Reason::UnknownField => "unknown_field",
            Reason::SchemaViolation => "schema_violation",
            Reason::SchemaRegistryFraming => "schema_registry_framing",
            Reason::UnknownSchemaId => "unknown_schema_id",
            Reason::UnsupportedSchema => "unsupported_schema",
            Reason::UnknownType => "unknown_type",
            Reason::FutureEventTime => "future_event_time",
            Reason::ExpressionFailed => "expression_failed",
            Reason::ExpectationFailed => "expectation_failed",
            Reason::Overflow => "overflow",
            Reason::DataLoss => "data_loss",
        }
    }

    pub fn of_code(code: &str) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.code() == code)
    }
}

/// Columns of the dead letters table: `reason`, `path`, `message` (string); `topic` (string), `partition` (int), `offset`,
/// `end_offset` (long; `end_offset` only for `data_loss`), `timestamp` (timestamptz µs); `key`, `payload` (binary), `headers`
/// (list of struct name string, value binary); `batch_id` (long); `recorded_at` (timestamptz µs, the batch's trigger time);
/// `schema_fingerprint` (string; what the record was held to).
pub fn arrow_schema() -> SchemaRef {
    let timestamp = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let headers = Field::new("element", DataType::Struct(header_fields()), false);
    Arc::new(Schema::new(vec![
        Field::new("reason", DataType::Utf8, false),
        Field::new("path", DataType::Utf8, true),
        Field::new("message", DataType::Utf8, true),
        Field::new("topic", DataType::Utf8, true),
        Field::new("partition", DataType::Int32, true),
        Field::new("offset", DataType::Int64, true),
        Field::new("end_offset", DataType::Int64, true),
        Field::new("timestamp", timestamp(), true),
        Field::new("key", DataType::Binary, true),
        Field::new("payload", DataType::Binary, true),
        Field::new("headers", DataType::List(Arc::new(headers)), true),
        Field::new("batch_id", DataType::Int64, false),
        Field::new("recorded_at", timestamp(), false),
        Field::new("schema_fingerprint", DataType::Utf8, true),
    ]))
}

fn header_fields() -> Fields {
    Fields::from(vec![Field::new("name", DataType::Utf8, false), Field::new("value", DataType::Binary, true)])
}

/// The rejected records of one chunk as rows of the dead letters table.
/// `schema` is the fingerprint of the schema that they were held to.
pub fn from_rejections(
    chunk: &Chunk,
    rejected: &[Rejection],
    schema: Option<&str>,
    batch: BatchId,
    trigger_time_ms: i64,
) -> RecordBatch {
    let mut rows = Rows::new(batch, trigger_time_ms);
    for rejection in rejected {
        let index = rejection.record as usize;
        let record = &chunk.records[index];
        let headers = chunk.headers.iter().find(|(of, _)| *of == rejection.record);
        rows.push(Row {
            reason: rejection.reason,
            path: Some(&rejection.path),
            message: &rejection.message,
            topic: Some(&chunk.topic),
            partition: Some(chunk.partition),
            offset: Some(record.offset),
            end_offset: None,
            timestamp_ms: Some(record.timestamp_ms).filter(|ms| *ms != i64::MIN),
            key: chunk.key(index),
            payload: chunk.value(index),
            headers: headers.map(|(_, headers)| headers.as_slice()),
            schema,
        });
    }
    rows.finish()
}

/// A row per gap: offsets `[offset, end_offset)` that were gone before they were read.
pub fn from_gaps(gaps: &[Gap], batch: BatchId, trigger_time_ms: i64) -> RecordBatch {
    let mut rows = Rows::new(batch, trigger_time_ms);
    for gap in gaps {
        rows.push(Row {
            topic: Some(&gap.topic),
            partition: Some(gap.partition),
            offset: Some(gap.range.start),
            end_offset: Some(gap.range.end),
            ..Row::of_no_record(Reason::DataLoss, &gap.cause)
        });
    }
    rows.finish()
}

/// Rows for windows with values that could not be computed: only reason, message, batch and time are set.
pub fn from_overflows(messages: &[String], batch: BatchId, trigger_time_ms: i64) -> RecordBatch {
    let mut rows = Rows::new(batch, trigger_time_ms);
    for message in messages {
        rows.push(Row::of_no_record(Reason::Overflow, message));
    }
    rows.finish()
}

/// Name and value.
type Header = (String, Option<Vec<u8>>);

struct Row<'a> {
    reason: Reason,
    path: Option<&'a str>,
    message: &'a str,
    topic: Option<&'a str>,
    partition: Option<i32>,
    offset: Option<i64>,
    end_offset: Option<i64>,
    timestamp_ms: Option<i64>,
    key: Option<&'a [u8]>,
    payload: Option<&'a [u8]>,
    headers: Option<&'a [Header]>,
    schema: Option<&'a str>,
}

impl<'a> Row<'a> {
    fn of_no_record(reason: Reason, message: &'a str) -> Row<'a> {
        Row {
            reason,
            path: None,
            message,
            topic: None,
            partition: None,
            offset: None,
            end_offset: None,
            timestamp_ms: None,
            key: None,
            payload: None,
            headers: None,
            schema: None,
        }
    }
}

/// The table's columns being filled, in the order of [`arrow_schema`].
struct Rows {
    batch: i64,
    recorded_at_us: i64,
    reason: StringBuilder,
    path: StringBuilder,
    message: StringBuilder,
    topic: StringBuilder,
    partition: Int32Builder,
    offset: Int64Builder,
    end_offset: Int64Builder,
    timestamp: TimestampMicrosecondBuilder,
    key: BinaryBuilder,
    payload: BinaryBuilder,
    headers: ListBuilder<StructBuilder>,
    batch_id: Int64Builder,
    recorded_at: TimestampMicrosecondBuilder,
    schema: StringBuilder,
}

impl Rows {
    fn new(batch: BatchId, trigger_time_ms: i64) -> Rows {
        let columns: Vec<Box<dyn ArrayBuilder>> = vec![Box::new(StringBuilder::new()), Box::new(BinaryBuilder::new())];
        let element = Field::new("element", DataType::Struct(header_fields()), false);
        Rows {
            batch: i64::try_from(batch).unwrap_or(i64::MAX),
            recorded_at_us: trigger_time_ms.saturating_mul(1000),
            reason: StringBuilder::new(),
            path: StringBuilder::new(),
            message: StringBuilder::new(),
            topic: StringBuilder::new(),
            partition: Int32Builder::new(),
            offset: Int64Builder::new(),
            end_offset: Int64Builder::new(),
            timestamp: TimestampMicrosecondBuilder::new().with_timezone("UTC"),
            key: BinaryBuilder::new(),
            payload: BinaryBuilder::new(),
            headers: ListBuilder::new(StructBuilder::new(header_fields(), columns)).with_field(element),
            batch_id: Int64Builder::new(),
            recorded_at: TimestampMicrosecondBuilder::new().with_timezone("UTC"),
            schema: StringBuilder::new(),
        }
    }

    fn push(&mut self, row: Row<'_>) {
        self.reason.append_value(row.reason.code());
        self.path.append_option(row.path);
        self.message.append_value(row.message);
        self.topic.append_option(row.topic);
        self.partition.append_option(row.partition);
        self.offset.append_option(row.offset);
        self.end_offset.append_option(row.end_offset);
        // A producer may have set any number as the time: one that does not fit the column is no time.
        self.timestamp.append_option(row.timestamp_ms.and_then(|ms| ms.checked_mul(1000)));
        self.key.append_option(row.key);
        self.payload.append_option(row.payload);
        for (name, value) in row.headers.unwrap_or_default() {
            let header = self.headers.values();
            if let Some(names) = header.field_builder::<StringBuilder>(0) {
                names.append_value(name);
            }
            if let Some(values) = header.field_builder::<BinaryBuilder>(1) {
                values.append_option(value.as_deref());
            }
            header.append(true);
        }
        self.headers.append(row.headers.is_some());
        self.batch_id.append_value(self.batch);
        self.recorded_at.append_value(self.recorded_at_us);
        self.schema.append_option(row.schema);
    }

    fn finish(mut self) -> RecordBatch {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.reason.finish()),
            Arc::new(self.path.finish()),
            Arc::new(self.message.finish()),
            Arc::new(self.topic.finish()),
            Arc::new(self.partition.finish()),
            Arc::new(self.offset.finish()),
            Arc::new(self.end_offset.finish()),
            Arc::new(self.timestamp.finish()),
            Arc::new(self.key.finish()),
            Arc::new(self.payload.finish()),
            Arc::new(self.headers.finish()),
            Arc::new(self.batch_id.finish()),
            Arc::new(self.recorded_at.finish()),
            Arc::new(self.schema.finish()),
        ];
        match RecordBatch::try_new(arrow_schema(), columns) {
            Ok(batch) => batch,
            Err(e) => unreachable!("the columns are built for this schema: {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{Int32Type, Int64Type, TimestampMicrosecondType};

    use super::*;
    use crate::batch::OffsetRange;
    use crate::source::Record;

    #[test]
    fn a_rejection_keeps_the_record_as_it_came() {
        let record = |offset, timestamp_ms, begin, key_len, value_len| Record {
            offset,
            timestamp_ms,
            begin,
            key_len,
            value_len,
        };
        let chunk = Chunk {
            topic: "t".into(),
            partition: 3,
            data: b"k\xff{}bad".to_vec(),
            records: vec![
                record(10, 1_500, 0, 2, 2),
                record(11, i64::MIN, 4, Record::NONE, 3),
                record(13, i64::MAX, 7, 0, Record::NONE),
            ],
            headers: vec![(1, vec![("h".to_owned(), Some(b"\x00\xff".to_vec())), ("n".to_owned(), None)])],
            ..Chunk::default()
        };
        let reject = |record, reason| Rejection { record, reason, path: Cow::from("$"), message: Cow::from("m") };
        let rejected =
            [reject(0, Reason::MissingField), reject(1, Reason::MalformedJson), reject(2, Reason::NullValue)];
        let rows = from_rejections(&chunk, &rejected, Some("0123abcd"), 7, 2_000);
        assert_eq!(rows.schema(), arrow_schema());
        assert_eq!(rows.num_rows(), 3);
        let column = |name: &str| rows.column_by_name(name).unwrap().clone();
        assert_eq!(column("reason").as_string::<i32>().value(1), "malformed_json");
        assert_eq!(column("topic").as_string::<i32>().value(2), "t");
        assert_eq!(column("partition").as_primitive::<Int32Type>().value(0), 3);
        assert_eq!(column("offset").as_primitive::<Int64Type>().values(), &[10, 11, 13]);
        assert_eq!(column("end_offset").null_count(), 3);
        assert_eq!(column("timestamp").as_primitive::<TimestampMicrosecondType>().value(0), 1_500_000);
        assert!(column("timestamp").is_null(1) && column("timestamp").is_null(2));
        assert_eq!(column("key").as_binary::<i32>().value(0), b"k\xff");
        assert!(column("key").is_null(1) && column("key").is_valid(2));
        assert_eq!(column("payload").as_binary::<i32>().value(1), b"bad");
        assert!(column("payload").is_null(2));
        let headers = column("headers");
        let headers = headers.as_list::<i32>();
        assert!(headers.is_null(0) && headers.is_null(2));
        let of_second = headers.value(1);
        let of_second = of_second.as_struct();
        assert_eq!(of_second.column(0).as_string::<i32>().value(1), "n");
        assert_eq!(of_second.column(1).as_binary::<i32>().value(0), b"\x00\xff");
        assert!(of_second.column(1).is_null(1));
        assert_eq!(column("batch_id").as_primitive::<Int64Type>().value(2), 7);
        assert_eq!(column("recorded_at").as_primitive::<TimestampMicrosecondType>().value(2), 2_000_000);
        assert_eq!(column("schema_fingerprint").as_string::<i32>().value(0), "0123abcd");
    }

    #[test]
    fn gaps_and_overflows_are_rows_without_a_record() {
        let range = OffsetRange { start: 5, end: 9 };
        let gap = Gap { topic: "t".into(), partition: 1, range, cause: "retention".to_owned() };
        let rows = from_gaps(&[gap], 2, 0);
        let column = |name: &str| rows.column_by_name(name).unwrap().clone();
        assert_eq!(column("offset").as_primitive::<Int64Type>().value(0), 5);
        assert_eq!(column("end_offset").as_primitive::<Int64Type>().value(0), 9);
        assert_eq!(column("reason").as_string::<i32>().value(0), "data_loss");
        assert!(column("payload").is_null(0) && column("path").is_null(0));
        let rows = from_overflows(&["sum".to_owned()], 2, 0);
        assert_eq!(rows.column_by_name("message").unwrap().as_string::<i32>().value(0), "sum");
        assert!(rows.column_by_name("topic").unwrap().is_null(0));
        assert_eq!(from_overflows(&[], 2, 0).num_rows(), 0);
    }

    #[test]
    fn codes_are_distinct() {
        let codes: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|r| r.code()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
    }
}
