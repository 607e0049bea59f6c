//! Payload bytes and a schema to columns, or to a rejection: pure.

use std::borrow::Cow;
use std::sync::Arc;

use arrow::record_batch::RecordBatch;

use crate::dead_letter::Reason;
use crate::schema::Schema;
use crate::source::Chunk;

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
pub struct Decoded {
    /// The columns of `Schema::arrow`; row i is record `records[i]` of the chunk.
    pub batch: RecordBatch,
    pub records: Vec<u32>,
    pub rejected: Vec<Rejection>,
}

/// Reusable buffers of one worker.
pub struct Decoder {
    schema: Arc<Schema>,
}

impl Decoder {
    pub fn new(schema: Arc<Schema>) -> Self {
        Decoder { schema }
    }

    pub fn decode(&mut self, _chunk: &Chunk) -> Decoded {
        let _ = &self.schema;
        unimplemented!()
    }
}
