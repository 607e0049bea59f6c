//! Where records come from: [`Source`] and the chunks it hands out. The only implementation of production is [`kafka`].
//!
//! Invariants: a range is read exactly, no record twice and none left out; chunks of one partition come in offset order;
//! nothing here remembers a position across batches other than as a cache.

pub mod kafka;

use std::collections::BTreeMap;
use std::sync::mpsc::Receiver;

use crate::batch::{OffsetRange, Offsets, Ranges, TopicPartition};
use crate::error::Kind;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{message}")]
    Transient { message: String },
    #[error("{message}")]
    Fatal { message: String },
    /// Records that a plan promised are gone from the brokers. What then happens is the query's decision.
    #[error("{partition}: records from offset {wanted} on were planned, but {}", describe(*.available))]
    DataLoss { partition: TopicPartition, wanted: i64, available: Option<OffsetRange> },
}

fn describe(available: Option<OffsetRange>) -> String {
    match available {
        Some(r) => format!("the brokers hold only offsets {} to {} (exclusive) now", r.start, r.end),
        None => "the brokers no longer hold them".into(),
    }
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Transient { .. } => Kind::Transient,
            Error::Fatal { .. } | Error::DataLoss { .. } => Kind::Fatal,
        }
    }
}

/// What the brokers hold now.
#[derive(Clone, Debug, Default)]
pub struct Available {
    /// By partition: first offset still there and, by the isolation level that is read with, one past the last readable one.
    pub partitions: BTreeMap<TopicPartition, OffsetRange>,
    /// Topic name to the id Kafka gave it; a topic that was deleted and re-created has another one. Empty for
    /// brokers too old to tell.
    pub topic_ids: BTreeMap<String, String>,
}

/// Records of one partition, in offset order, copied out of the client's buffers into one allocation.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Index of the partition in the order of the batch's `Ranges`.
    pub lane: usize,
    /// 0, 1, 2 … within the lane: the order in which its chunks are aggregated.
    pub sequence: u64,
    pub topic: std::sync::Arc<str>,
    pub partition: i32,
    pub data: Vec<u8>,
    pub records: Vec<Record>,
    /// Headers of the few records that have them, by record index: name and value.
    pub headers: Vec<(u32, Headers)>,
}

/// Names, which may repeat, and values.
pub type Headers = Vec<(String, Option<Vec<u8>>)>;

/// Where a record's parts stand in `Chunk::data`: key first, then value. `NONE` as a length means null.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    pub offset: i64,
    /// Milliseconds since the epoch; i64::MIN when the record has none.
    pub timestamp_ms: i64,
    pub begin: u32,
    pub key_len: u32,
    pub value_len: u32,
}

impl Record {
    pub const NONE: u32 = u32::MAX;
}

impl Chunk {
    /// Appends a record. Called for every one that is read: copies, and allocates nothing of its own.
    #[inline]
    pub fn push(
        &mut self,
        offset: i64,
        timestamp_ms: Option<i64>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: Option<Headers>,
    ) {
        // Both below 2^31: a Kafka record's parts are, and a chunk is sent long before.
        let begin = self.data.len() as u32;
        let mut copy = |part: Option<&[u8]>| {
            part.map_or(Record::NONE, |bytes| {
                self.data.extend_from_slice(bytes);
                bytes.len() as u32
            })
        };
        let (key_len, value_len) = (copy(key), copy(value));
        if let Some(headers) = headers {
            self.headers.push((self.records.len() as u32, headers));
        }
        let timestamp_ms = timestamp_ms.unwrap_or(i64::MIN);
        self.records.push(Record { offset, timestamp_ms, begin, key_len, value_len });
    }

    /// A chunk of some of the records, which takes the data with it; it is to be given back.
    pub fn take_part(&mut self, records: &[u32]) -> Chunk {
        let headers = (0..).zip(records).filter_map(|(index, record)| {
            let at = self.headers.binary_search_by_key(record, |(of, _)| *of).ok()?;
            Some((index, self.headers[at].1.clone()))
        });
        Chunk {
            lane: self.lane,
            sequence: self.sequence,
            topic: self.topic.clone(),
            partition: self.partition,
            headers: headers.collect(),
            records: records.iter().map(|&record| self.records[record as usize]).collect(),
            data: std::mem::take(&mut self.data),
        }
    }

    pub fn key(&self, index: usize) -> Option<&[u8]> {
        let r = &self.records[index];
        (r.key_len != Record::NONE).then(|| &self.data[r.begin as usize..][..r.key_len as usize])
    }

    pub fn value(&self, index: usize) -> Option<&[u8]> {
        let r = &self.records[index];
        let key_len = if r.key_len == Record::NONE { 0 } else { r.key_len as usize };
        (r.value_len != Record::NONE).then(|| &self.data[r.begin as usize + key_len..][..r.value_len as usize])
    }
}

/// One batch being read. The channel closes after the last chunk; an error is the last message. Dropping the receiver
/// cancels the read.
pub type Chunks = Receiver<Result<Chunk, Error>>;

/// A source of records with offsets. Methods block; the query calls them from a blocking context.
pub trait Source: Send {
    fn available(&mut self) -> Result<Available, Error>;

    /// For each partition the offset of the first record at or after the time; the end of the partition when there is none.
    fn offsets_at(&mut self, timestamp_ms: i64) -> Result<Offsets, Error>;

    /// Starts reading exactly these ranges.
    fn read(&mut self, ranges: &Ranges) -> Result<Chunks, Error>;

    /// Tells lag tools how far the tables are. Never read back; failing is logged and has no consequence.
    fn report(&mut self, offsets: &Offsets);
}
