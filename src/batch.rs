//! A micro-batch and how it is planned: pure values.
//!
//! Owns: identifiers, half-open offset ranges, the plan that the offset log records, the sharing out of a limit over
//! partitions. Does not own: where the latest offsets come from ([`crate::source`]) or where the plan goes
//! ([`crate::checkpoint`]).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub type BatchId = u64;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    pub topic: Arc<str>,
    pub partition: i32,
}

impl TopicPartition {
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        TopicPartition { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// Half-open: `start` is the first offset inside, `end` the first one outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetRange {
    pub start: i64,
    pub end: i64,
}

impl OffsetRange {
    pub fn len(self) -> u64 {
        u64::try_from(self.end - self.start).unwrap_or(0)
    }

    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }
}

pub type Ranges = BTreeMap<TopicPartition, OffsetRange>;
pub type Offsets = BTreeMap<TopicPartition, i64>;

/// The watermarks in force while a batch runs, in milliseconds since the epoch. Spark 3.4 and later keep two: a row is
/// late by the previous batch's watermark and a window closes by this batch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermarks {
    pub late_ms: i64,
    pub evict_ms: i64,
}

/// Offsets that were promised and are gone: `fail_on_data_loss = false` steps over them and leaves a gap row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub topic: Arc<str>,
    pub partition: i32,
    pub range: OffsetRange,
    pub cause: String,
}

/// The plan of one batch, as the offset log records it. Executing it is a pure function of the plan, the state of the
/// batch before and the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MicroBatch {
    pub batch: BatchId,
    /// The owner that planned it.
    pub epoch: u64,
    pub trigger_time_ms: i64,
    pub config_fingerprint: String,
    /// Every known partition, those with nothing to read included: its `end` is where the next batch starts.
    #[serde(with = "by_topic")]
    pub ranges: Ranges,
    #[serde(default)]
    pub gaps: Vec<Gap>,
    pub topic_ids: BTreeMap<String, String>,
    pub watermarks: Watermarks,
    /// UUID of every table of the pipeline: one dropped and re-created in between is fatal.
    pub tables: BTreeMap<String, Uuid>,
}

impl MicroBatch {
    pub fn offsets(&self) -> u64 {
        self.ranges.values().map(|r| r.len()).sum()
    }

    pub fn is_no_data(&self) -> bool {
        self.ranges.values().all(|r| r.is_empty())
    }
}

/// Maps keyed by [`TopicPartition`] as `{topic: {partition: value}}`, the shape that JSON can carry and Spark users know.
pub mod by_topic {
    use super::*;
    use serde::de::DeserializeOwned;
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer, V: Serialize>(map: &BTreeMap<TopicPartition, V>, s: S) -> Result<S::Ok, S::Error> {
        let mut nested: BTreeMap<&str, BTreeMap<i32, &V>> = BTreeMap::new();
        for (tp, value) in map {
            nested.entry(&tp.topic).or_default().insert(tp.partition, value);
        }
        nested.serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, V: DeserializeOwned>(
        d: D,
    ) -> Result<BTreeMap<TopicPartition, V>, D::Error> {
        let nested: BTreeMap<String, BTreeMap<i32, V>> = BTreeMap::deserialize(d)?;
        let mut map = BTreeMap::new();
        for (topic, partitions) in nested {
            let topic: Arc<str> = topic.into();
            for (partition, value) in partitions {
                map.insert(TopicPartition { topic: topic.clone(), partition }, value);
            }
        }
        Ok(map)
    }
}
