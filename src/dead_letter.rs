//! Records that were refused, and the table that keeps them: every one with its provenance and its reason.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
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
    FutureEventTime,
    /// A window's integer sum did not fit; the window's value is null.
    Overflow,
    /// Not a record: offsets that expired before they were read (`fail_on_data_loss = false`).
    DataLoss,
}

impl Reason {
    pub const ALL: [Reason; 18] = [
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
        Reason::FutureEventTime,
        Reason::Overflow,
        Reason::DataLoss,
    ];

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
            Reason::FutureEventTime => "future_event_time",
            Reason::Overflow => "overflow",
            Reason::DataLoss => "data_loss",
        }
    }
}

/// Columns of the dead letters table: `reason`, `path`, `message` (string); `topic` (string), `partition` (int), `offset`,
/// `end_offset` (long; `end_offset` only for `data_loss`), `timestamp` (timestamptz µs); `key`, `payload` (binary), `headers`
/// (list of struct name string, value binary); `batch_id` (long); `recorded_at` (timestamptz µs, the batch's trigger time).
pub fn arrow_schema() -> SchemaRef {
    unimplemented!()
}

/// The rejected records of one chunk as rows of the dead letters table.
pub fn from_rejections(_chunk: &Chunk, _rejected: &[Rejection], _batch: BatchId, _trigger_time_ms: i64) -> RecordBatch {
    unimplemented!()
}

pub fn from_gaps(_gaps: &[Gap], _batch: BatchId, _trigger_time_ms: i64) -> RecordBatch {
    unimplemented!()
}

/// Rows for windows whose integer sum overflowed: only reason, message, batch and time are set.
pub fn from_overflows(_messages: &[String], _batch: BatchId, _trigger_time_ms: i64) -> RecordBatch {
    unimplemented!()
}

#[allow(unused)]
fn _uses(_: Arc<str>) {}
