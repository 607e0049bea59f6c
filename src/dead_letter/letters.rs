//! Letters read back from their table: which ones, and what each says.
//!
//! Owns: the selection by reason and time, pushed down into the scan, and the form in which a letter is handed out. Does
//! not own: what is done with it.

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use arrow::record_batch::RecordBatch;

use super::{Reason, arrow_schema};
use crate::sink::Error;
use crate::sink::iceberg::{Datum, PinnedTable, Predicate, Reference, Rows};
use crate::source::Headers;

/// Letters that are held in memory at a time: a payload may have megabytes.
pub const BATCH_ROWS: usize = 256;

/// Which letters. Times are those of the batch that refused them, `[since, until)`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Any, if empty.
    pub reasons: Vec<Reason>,
    pub since_ms: Option<i64>,
    pub until_ms: Option<i64>,
}

impl Selection {
    /// None: all of them.
    pub fn predicate(&self) -> Option<Predicate> {
        let recorded_at = || Reference::new("recorded_at");
        let micros = |ms: i64| Datum::timestamptz_micros(ms.saturating_mul(1000));
        let codes = self.reasons.iter().map(|reason| Datum::string(reason.code()));
        let reasons = (!self.reasons.is_empty()).then(|| Reference::new("reason").is_in(codes));
        let since = self.since_ms.map(|ms| recorded_at().greater_than_or_equal_to(micros(ms)));
        let until = self.until_ms.map(|ms| recorded_at().less_than(micros(ms)));
        [reasons, since, until].into_iter().flatten().reduce(Predicate::and)
    }
}

/// The columns of letters that the table has: an older table may lack the latest.
pub fn columns(table: &PinnedTable) -> Vec<String> {
    arrow_schema().fields().iter().map(|f| f.name().clone()).filter(|name| table.has_column(name)).collect()
}

/// Whole letters.
pub async fn scan(table: &PinnedTable, filter: Option<Predicate>) -> Result<Rows, Error> {
    let columns = columns(table);
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    table.scan(&columns, filter, BATCH_ROWS).await
}

/// One letter, borrowed from the batch that it was read in.
#[derive(Clone, Debug, PartialEq)]
pub struct Letter<'a> {
    pub reason: &'a str,
    pub path: Option<&'a str>,
    pub message: Option<&'a str>,
    pub topic: Option<&'a str>,
    pub partition: Option<i32>,
    pub offset: Option<i64>,
    pub end_offset: Option<i64>,
    pub timestamp_us: Option<i64>,
    pub key: Option<&'a [u8]>,
    pub payload: Option<&'a [u8]>,
    pub headers: Option<Headers>,
    pub batch_id: i64,
    pub recorded_at_us: i64,
    pub schema_fingerprint: Option<&'a str>,
}

/// Where a record stood in Kafka.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    pub topic: &'a str,
    pub partition: i32,
    pub offset: i64,
}

impl<'a> Letter<'a> {
    /// None for a letter that is no record, such as one about a gap.
    pub fn place(&self) -> Option<Place<'a>> {
        if Reason::of_code(self.reason).is_some_and(|reason| !reason.is_of_a_record()) || self.end_offset.is_some() {
            return None;
        }
        Some(Place { topic: self.topic?, partition: self.partition?, offset: self.offset? })
    }
}

/// The letters of one batch of a scan. Columns that were not asked for are null.
pub struct Letters<'a> {
    rows: usize,
    reason: Option<&'a StringArray>,
    path: Option<&'a StringArray>,
    message: Option<&'a StringArray>,
    topic: Option<&'a StringArray>,
    partition: Option<&'a Int32Array>,
    offset: Option<&'a Int64Array>,
    end_offset: Option<&'a Int64Array>,
    timestamp: Option<&'a TimestampMicrosecondArray>,
    key: Option<&'a ArrayRef>,
    payload: Option<&'a ArrayRef>,
    headers: Option<&'a ArrayRef>,
    batch_id: Option<&'a Int64Array>,
    recorded_at: Option<&'a TimestampMicrosecondArray>,
    schema_fingerprint: Option<&'a StringArray>,
}

impl<'a> Letters<'a> {
    /// Fatal when a column has another type than the table of dead letters gives it.
    pub fn of(batch: &'a RecordBatch) -> Result<Letters<'a>, Error> {
        let column = |name: &str| batch.column_by_name(name);
        let wrong = |name: &str, found: &DataType| {
            Error::fatal(format!("the table is none of dead letters: its column {name} is {found}"))
        };
        let texts = |name: &str| match column(name) {
            Some(array) => array.as_string_opt::<i32>().map(Some).ok_or_else(|| wrong(name, array.data_type())),
            None => Ok(None),
        };
        let longs = |name: &str| match column(name) {
            Some(array) => {
                array.as_primitive_opt::<Int64Type>().map(Some).ok_or_else(|| wrong(name, array.data_type()))
            }
            None => Ok(None),
        };
        let times = |name: &str| match column(name) {
            Some(array) if matches!(array.data_type(), DataType::Timestamp(TimeUnit::Microsecond, _)) => {
                Ok(Some(array.as_primitive::<TimestampMicrosecondType>()))
            }
            Some(array) => Err(wrong(name, array.data_type())),
            None => Ok(None),
        };
        let binaries = |name: &str| match column(name) {
            Some(array) if matches!(array.data_type(), DataType::Binary | DataType::LargeBinary) => Ok(Some(array)),
            Some(array) => Err(wrong(name, array.data_type())),
            None => Ok(None),
        };
        let partition = match column("partition") {
            Some(array) => {
                Some(array.as_primitive_opt::<Int32Type>().ok_or_else(|| wrong("partition", array.data_type()))?)
            }
            None => None,
        };
        let headers = match column("headers") {
            Some(array) if array.as_list_opt::<i32>().is_none_or(|l| l.values().as_struct_opt().is_none()) => {
                return Err(wrong("headers", array.data_type()));
            }
            headers => headers,
        };
        Ok(Letters {
            rows: batch.num_rows(),
            reason: texts("reason")?,
            path: texts("path")?,
            message: texts("message")?,
            topic: texts("topic")?,
            partition,
            offset: longs("offset")?,
            end_offset: longs("end_offset")?,
            timestamp: times("timestamp")?,
            key: binaries("key")?,
            payload: binaries("payload")?,
            headers,
            batch_id: longs("batch_id")?,
            recorded_at: times("recorded_at")?,
            schema_fingerprint: texts("schema_fingerprint")?,
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = Letter<'a>> + '_ {
        (0..self.rows).map(|row| self.letter(row))
    }

    fn letter(&self, row: usize) -> Letter<'a> {
        let text = |column: Option<&'a StringArray>| column.filter(|c| c.is_valid(row)).map(|c| c.value(row));
        let long = |column: Option<&'a Int64Array>| column.filter(|c| c.is_valid(row)).map(|c| c.value(row));
        let time =
            |column: Option<&'a TimestampMicrosecondArray>| column.filter(|c| c.is_valid(row)).map(|c| c.value(row));
        Letter {
            reason: text(self.reason).unwrap_or_default(),
            path: text(self.path),
            message: text(self.message),
            topic: text(self.topic),
            partition: self.partition.filter(|c| c.is_valid(row)).map(|c| c.value(row)),
            offset: long(self.offset),
            end_offset: long(self.end_offset),
            timestamp_us: time(self.timestamp),
            key: self.key.and_then(|c| bytes(c, row)),
            payload: self.payload.and_then(|c| bytes(c, row)),
            headers: self.headers.and_then(|c| headers(c, row)),
            batch_id: long(self.batch_id).unwrap_or_default(),
            recorded_at_us: time(self.recorded_at).unwrap_or_default(),
            schema_fingerprint: text(self.schema_fingerprint),
        }
    }
}

fn bytes(column: &ArrayRef, row: usize) -> Option<&[u8]> {
    if column.is_null(row) {
        return None;
    }
    match column.as_binary_opt::<i32>() {
        Some(array) => Some(array.value(row)),
        None => column.as_binary_opt::<i64>().map(|array| array.value(row)),
    }
}

fn headers(column: &ArrayRef, row: usize) -> Option<Headers> {
    let list = column.as_list::<i32>();
    if list.is_null(row) {
        return None;
    }
    let entries = list.value(row);
    let entries = entries.as_struct();
    let (names, values) = (entries.column_by_name("name")?, entries.column_by_name("value")?);
    let names = names.as_string_opt::<i32>()?;
    Some((0..entries.len()).map(|i| (names.value(i).to_string(), bytes(values, i).map(<[u8]>::to_vec))).collect())
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::batch::{Gap, OffsetRange};
    use crate::dead_letter::{from_gaps, from_rejections};
    use crate::decode::Rejection;
    use crate::source::{Chunk, Record};

    #[test]
    fn a_letter_says_what_was_written() {
        let record = Record { offset: 10, timestamp_ms: 1_500, begin: 0, key_len: 2, value_len: 3 };
        let headers = vec![("h".to_owned(), Some(b"\x00\xff".to_vec())), ("n".to_owned(), None)];
        let chunk = Chunk {
            topic: "t".into(),
            partition: 3,
            data: b"k\xffbad".to_vec(),
            records: vec![record],
            headers: vec![(0, headers.clone())],
            ..Chunk::default()
        };
        let rejection =
            Rejection { record: 0, reason: Reason::WrongType, path: Cow::from("$.a"), message: Cow::from("m") };
        let rows = from_rejections(&chunk, &[rejection], Some("abc"), 7, 2_000);
        let letters = Letters::of(&rows).unwrap();
        let letter = letters.iter().next().unwrap();
        assert_eq!(letter.place(), Some(Place { topic: "t", partition: 3, offset: 10 }));
        assert_eq!((letter.reason, letter.path, letter.message), ("wrong_type", Some("$.a"), Some("m")));
        assert_eq!((letter.key, letter.payload), (Some(b"k\xff".as_slice()), Some(b"bad".as_slice())));
        assert_eq!((letter.timestamp_us, letter.recorded_at_us, letter.batch_id), (Some(1_500_000), 2_000_000, 7));
        assert_eq!((letter.headers, letter.schema_fingerprint), (Some(headers), Some("abc")));

        let range = OffsetRange { start: 5, end: 9 };
        let rows = from_gaps(&[Gap { topic: "t".into(), partition: 1, range, cause: "gone".to_owned() }], 2, 0);
        let letters = Letters::of(&rows).unwrap();
        assert_eq!(letters.iter().next().unwrap().place(), None, "a gap is no record");
    }

    #[test]
    fn a_selection_is_one_predicate() {
        assert!(Selection::default().predicate().is_none());
        let selection =
            Selection { reasons: vec![Reason::Empty, Reason::WrongType], since_ms: Some(1), until_ms: Some(2) };
        let predicate = selection.predicate().unwrap().to_string();
        for part in ["reason IN", "recorded_at >=", "recorded_at <"] {
            assert!(predicate.contains(part), "{predicate}");
        }
    }
}
