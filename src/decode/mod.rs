//! Payload bytes and a schema to columns, or to a rejection: pure.
//!
//! Owns: which records are valid and why the others are not. Does not own: what a schema document means
//! ([`crate::schema`]) and what becomes of rejected records ([`crate::dead_letter`]). One pass over the text reads,
//! checks and appends; a refused record is taken back from the columns and looked at once more for its most basic
//! fault, so that the reason does not depend on where in the document a fault stands: UTF-8, then JSON, then the
//! schema's checks in document order, then missing fields. Invariants: all columns have the same length between
//! records; work and memory are a constant times the payload; no payload panics. String offsets are 32 bits: a chunk
//! holds less than 2 GiB.

mod column;
mod fault;
pub mod framing;
#[cfg(test)]
mod reference;
pub mod registry;
mod scan;
#[cfg(test)]
mod tests;
mod time;

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use arrow::record_batch::RecordBatch;

use crate::dead_letter::Reason;
use crate::schema::Schema;
use crate::source::Chunk;

pub use framing::RecordDecoder;

use column::Column;
use fault::{Fault, Scan};
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
    keys: Keys,
    unknown: KeySet,
    scratch: Vec<u8>,
}

impl Decoder {
    pub fn new(schema: Arc<Schema>) -> Self {
        let keys = Keys::new(&schema);
        Decoder { schema, keys, unknown: KeySet::default(), scratch: Vec::new() }
    }

    pub fn decode(&mut self, chunk: &Chunk) -> Decoded {
        let schema = self.schema.clone();
        let capacity = chunk.records.len();
        let mut columns: Vec<Column> = schema.fields.iter().map(|field| Column::new(field, capacity)).collect();
        let mut records = Vec::with_capacity(capacity);
        let mut rejected = Vec::new();
        for record in 0..chunk.records.len() as u32 {
            match self.record(&schema, chunk.value(record as usize), &mut columns, records.len()) {
                Ok(()) => records.push(record),
                Err(fault) => {
                    columns.iter_mut().for_each(|column| column.truncate(records.len()));
                    let Fault { reason, path, message } = *fault;
                    rejected.push(Rejection { record, reason, path, message });
                }
            }
        }
        let arrays = columns.into_iter().map(Column::finish).collect();
        match RecordBatch::try_new(schema.arrow.clone(), arrays) {
            Ok(batch) => Decoded { batch, records, rejected },
            Err(e) => unreachable!("the columns are made from the schema: {e}"),
        }
    }

    /// Appends one row to all columns, or fails and leaves some of them longer than `rows`.
    #[inline]
    fn record(&mut self, schema: &Schema, payload: Option<&[u8]>, columns: &mut [Column], rows: usize) -> Scan<()> {
        let Some(payload) = payload else {
            return Err(Fault::new(Reason::NullValue, "$", "the record has no value (a tombstone)"));
        };
        // Most payloads are ASCII, which is checked several times faster.
        if !payload.is_ascii()
            && let Err(e) = std::str::from_utf8(payload)
        {
            let message = format!("byte {} is not valid UTF-8", e.valid_up_to());
            return Err(Fault::new(Reason::InvalidUtf8, "$", message));
        }
        self.object(schema, payload, columns, rows).map_err(|fault| {
            if payload.iter().all(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')) {
                return Fault::new(Reason::Empty, "$", "the value is empty");
            }
            fault.most_basic(payload)
        })
    }

    #[inline]
    fn object(&mut self, schema: &Schema, text: &[u8], columns: &mut [Column], rows: usize) -> Scan<()> {
        let Decoder { keys, unknown, scratch, .. } = self;
        let mut scanner = Scanner::new(text);
        scanner.skip_whitespace();
        if scanner.peek() != Some(b'{') {
            return Err(Fault::new(Reason::NotAnObject, "$", "allowed is an object"));
        }
        scanner.at += 1;
        scanner.skip_whitespace();
        let mut filled = 0;
        let mut previous = keys.start();
        unknown.clear();
        if scanner.peek() == Some(b'}') {
            scanner.at += 1;
        } else {
            loop {
                if let Some(index) = keys.read(&mut previous, &mut scanner, scratch)? {
                    let (field, column) = (&schema.fields[index], &mut columns[index]);
                    if column.len() > rows {
                        return Err(Fault::duplicate(field.name.as_bytes()));
                    }
                    scanner.colon()?;
                    column.push(field, &mut scanner, text, scratch)?;
                    filled += 1;
                } else {
                    if schema.closed {
                        return Err(Fault::unknown(&keys.unknown));
                    }
                    if !unknown.insert(&keys.unknown) {
                        return Err(Fault::duplicate(&keys.unknown));
                    }
                    scanner.colon()?;
                    scanner.skip_value(1)?;
                }
                scanner.skip_whitespace();
                match scanner.peek() {
                    Some(b',') => scanner.at += 1,
                    Some(b'}') => {
                        scanner.at += 1;
                        break;
                    }
                    _ => return Err(scanner.malformed("',' or '}'")),
                }
                scanner.skip_whitespace();
            }
        }
        scanner.end()?;
        if filled < columns.len() {
            for (field, column) in schema.fields.iter().zip(columns) {
                if column.len() == rows {
                    if field.required {
                        return Err(Fault::missing(field));
                    }
                    column.push_null();
                }
            }
        }
        Ok(())
    }
}

/// Finds the field of a key. Producers write the members of every message in the same order: the field that followed
/// the last one before is tried first, by comparing bytes of the document, without reading the key as a string.
struct Keys {
    /// By field: its name as JSON, quotes included.
    quoted: Vec<String>,
    /// By field: the one that came next; at the end an entry for the first of a document.
    next: Vec<usize>,
    /// Names with their fields, sorted.
    sorted: Vec<(String, usize)>,
    /// The last key read that is no field.
    unknown: Vec<u8>,
}

impl Keys {
    fn new(schema: &Schema) -> Keys {
        let names = || schema.fields.iter().map(|field| field.name.clone());
        let mut sorted: Vec<(String, usize)> = names().zip(0..).collect();
        sorted.sort_unstable();
        let next = (1..=sorted.len()).chain([0]).collect();
        let quoted = names().map(|name| serde_json::Value::from(name).to_string()).collect();
        Keys { quoted, next, sorted, unknown: Vec::new() }
    }

    fn start(&self) -> usize {
        self.quoted.len()
    }

    /// The field of the key that `scanner` stands on; None if there is no such field: then the key is in `unknown`.
    #[inline]
    fn read(&mut self, previous: &mut usize, scanner: &mut Scanner<'_>, scratch: &mut Vec<u8>) -> Scan<Option<usize>> {
        let mut guess = self.next[*previous];
        // Two guesses: an optional member may have been left out.
        for _ in 0..2 {
            let Some(quoted) = self.quoted.get(guess) else { break };
            if scanner.rest().starts_with(quoted.as_bytes()) {
                scanner.at += quoted.len();
                *previous = guess;
                return Ok(Some(guess));
            }
            guess = self.next[guess];
        }
        if scanner.peek() != Some(b'"') {
            return Err(scanner.malformed("a key in quotes"));
        }
        let key = scanner.string(scratch)?;
        // Few names are told apart by their length, mostly.
        let position = if self.sorted.len() <= 16 {
            self.sorted.iter().position(|(name, _)| name.as_bytes() == key)
        } else {
            self.sorted.binary_search_by(|(name, _)| name.as_bytes().cmp(key)).ok()
        };
        if let Some(position) = position {
            let index = self.sorted[position].1;
            self.next[*previous] = index;
            *previous = index;
            return Ok(Some(index));
        }
        self.unknown.clear();
        self.unknown.extend_from_slice(key);
        Ok(None)
    }
}

/// The unknown keys of one document: the first few compared one by one, many by hash.
#[derive(Default)]
struct KeySet {
    few: Vec<u8>,
    ends: Vec<usize>,
    many: HashSet<Box<[u8]>>,
}

impl KeySet {
    const FEW: usize = 16;
    /// What is kept for the next document.
    const KEPT: usize = 1 << 16;

    #[inline]
    fn clear(&mut self) {
        if !self.ends.is_empty() {
            self.few.clear();
            self.ends.clear();
            self.few.shrink_to(KeySet::KEPT);
            if !self.many.is_empty() {
                self.many = HashSet::new();
            }
        }
    }

    /// False if the key was there before.
    fn insert(&mut self, key: &[u8]) -> bool {
        let mut begin = 0;
        for end in &self.ends {
            if &self.few[begin..*end] == key {
                return false;
            }
            begin = *end;
        }
        if self.ends.len() < KeySet::FEW {
            self.few.extend_from_slice(key);
            self.ends.push(self.few.len());
            return true;
        }
        self.many.insert(key.into())
    }
}
