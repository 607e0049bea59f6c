//! Payload bytes and a schema to columns, or to a rejection: pure.
//!
//! Owns: which records are valid and why the others are not. Does not own: what a schema document means
//! ([`crate::schema`]) and what becomes of rejected records ([`crate::dead_letter`]). One pass over the text reads,
//! checks and appends; a document that is fine so far goes through the schema's validator, if it has one; a refused record
//! is taken back from the columns and looked at once more for its most basic fault, so that the reason does not depend on
//! where in the document a fault stands: UTF-8, then JSON, then the schema's checks in document order, then missing
//! fields. Invariants: all columns have the same length between
//! records; work and memory are a constant times the payload; no payload panics. String offsets are 32 bits: a chunk
//! holds less than 2 GiB.

mod base64;
mod column;
mod fault;
pub mod framing;
mod object;
#[cfg(test)]
mod reference;
pub mod registry;
pub mod route;
mod scan;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_types;
pub mod time;
mod whole;

use std::borrow::Cow;
use std::sync::Arc;

use arrow::record_batch::RecordBatch;

use crate::dead_letter::Reason;
use crate::schema::Schema;
use crate::source::Chunk;

pub use framing::RecordDecoder;

use column::Column;
use fault::{Fault, Scan};
use object::Reader;
use scan::Scanner;

/// Why one record was refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejection {
    /// Index of the record in its chunk.
    pub record: u32,
    pub reason: Reason,
    /// JSON path of the offending value, `$` for the document.
    pub path: Cow<'static, str>,
    pub message: Cow<'static, str>,
}

/// A chunk, decoded: every record of the chunk is in `records` or in `rejected`, never in both.
#[derive(Debug)]
pub struct Decoded {
    /// The columns of `Schema::arrow`; row i is record `records[i]` of the chunk.
    pub batch: RecordBatch,
    pub records: Vec<u32>,
    pub rejected: Vec<Rejection>,
}

/// Reusable buffers of one worker.
pub struct Decoder {
    schema: Arc<Schema>,
    reader: Reader,
    /// The members of one record that are no columns, as JSON, for the extra column.
    extra: Option<Vec<u8>>,
    scratch: Vec<u8>,
}

impl Decoder {
    pub fn new(schema: Arc<Schema>) -> Self {
        let reader = Reader::new(&schema.object);
        let extra = schema.has_extra.then(Vec::new);
        Decoder { schema, reader, extra, scratch: Vec::new() }
    }

    pub fn decode(&mut self, chunk: &Chunk) -> Decoded {
        let schema = self.schema.clone();
        let capacity = chunk.records.len();
        let fields = &schema.object.fields;
        let mut columns: Vec<Column> = fields.iter().map(|field| Column::new(&field.value, capacity)).collect();
        let mut open = self.extra.is_some().then(|| Column::text(capacity));
        let mut records = Vec::with_capacity(capacity);
        let mut rejected = Vec::new();
        // Most are, and it is found out several times faster of all of them at once.
        let ascii = chunk.data.is_ascii();
        for record in 0..chunk.records.len() as u32 {
            match self.record(&schema, chunk.value(record as usize), ascii, &mut columns, records.len()) {
                Ok(()) => {
                    records.push(record);
                    if let (Some(column), Some(members)) = (&mut open, &mut self.extra) {
                        push_members(column, members);
                    }
                }
                Err(fault) => {
                    columns.iter_mut().for_each(|column| column.truncate(records.len()));
                    let Fault { reason, path, message } = *fault;
                    rejected.push(Rejection { record, reason, path, message });
                }
            }
        }
        let mut arrays: Vec<_> = columns.into_iter().zip(fields).map(|(c, field)| c.finish(&field.value)).collect();
        arrays.extend(open.map(Column::finish_text));
        match RecordBatch::try_new(schema.arrow.clone(), arrays) {
            Ok(batch) => Decoded { batch, records, rejected },
            Err(e) => unreachable!("the columns are made from the schema: {e}"),
        }
    }

    /// Appends one row to all columns, or fails and leaves some of them longer than `rows`.
    #[inline]
    fn record(
        &mut self,
        schema: &Schema,
        payload: Option<&[u8]>,
        ascii: bool,
        columns: &mut [Column],
        rows: usize,
    ) -> Scan<()> {
        let payload = readable(payload, ascii)?;
        self.document(schema, payload, columns, rows).map_err(|fault| fault.most_basic(payload))?;
        if let Some(validator) = &schema.validator {
            let document = whole::read(payload)?;
            if let Err((pointer, message)) = validator.check(&document) {
                return Err(Fault::violation(&document, &pointer, message));
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn document(&mut self, schema: &Schema, text: &[u8], columns: &mut [Column], rows: usize) -> Scan<()> {
        let mut scanner = Scanner::new(text);
        scanner.skip_whitespace();
        if scanner.peek() != Some(b'{') {
            return Err(Fault::new(Reason::NotAnObject, "$", "allowed is an object"));
        }
        if let Some(extra) = &mut self.extra {
            extra.clear();
        }
        let Decoder { reader, extra, scratch, .. } = self;
        reader.members(&schema.object, &mut scanner, columns, rows, 1, extra.as_mut(), scratch)?;
        scanner.end()?;
        reader.complete(&schema.object, columns, rows)
    }
}

/// The payload as text; `ascii`: it is known to be.
#[inline]
fn readable(payload: Option<&[u8]>, ascii: bool) -> Scan<&[u8]> {
    let Some(payload) = payload else {
        return Err(Fault::new(Reason::NullValue, "$", "the record has no value (a tombstone)"));
    };
    if !ascii
        && !payload.is_ascii()
        && let Err(e) = std::str::from_utf8(payload)
    {
        let message = format!("byte {} is not valid UTF-8", e.valid_up_to());
        return Err(Fault::new(Reason::InvalidUtf8, "$", message));
    }
    Ok(payload)
}

/// `members` are `"a":1,"b":2,`, or nothing.
fn push_members(column: &mut Column, members: &mut [u8]) {
    match members.split_last() {
        Some((_, members)) => column.push_text([b"{", members, b"}"]),
        None => column.push_null(),
    }
}
