//! What one batch did, in the names of Spark's `StreamingQueryProgress` where they apply.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::batch::BatchId;

/// One committed batch: an element of `batches` in `/status`. Keys are camelCase in JSON.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchProgress {
    /// The query: stays the same across restarts.
    pub id: String,
    /// This process's run of it.
    pub run_id: String,
    pub name: String,
    pub batch_id: BatchId,
    /// RFC 3339: the trigger time.
    pub timestamp: String,
    pub batch_duration_ms: u64,
    /// By stage: `latest_offset`, `wal_commit`, `add_batch`, `state_commit`, `commit_tables`, `commit_log`, `tidy`.
    pub duration_ms: BTreeMap<String, u64>,
    /// What of `add_batch` the workers spent on what, summed over them: `read` (waiting for data), `decode`, `aggregate`, `write`,
    /// `merge`, `close`.
    pub worker_ms: BTreeMap<String, u64>,
    pub num_input_rows: u64,
    pub input_rows_per_second: f64,
    pub processed_rows_per_second: f64,
    pub event_time: EventTime,
    pub state_operators: Vec<StateOperator>,
    pub sources: Vec<SourceProgress>,
    pub sink: SinkProgress,
    pub counts: Counts,
    pub checkpoint_bytes: u64,
    /// The files that make up the state, a part of the checkpoint.
    pub state_files: u64,
    pub state_file_bytes: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EventTime {
    /// The watermark in force in this batch: every window that ends at or before it has been emitted. None: no event time.
    #[serde(rename = "watermark", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub watermark_ms: Option<i64>,
    /// Of the rows of this batch that have an event time.
    #[serde(rename = "min", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub min_ms: Option<i64>,
    #[serde(rename = "avg", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub avg_ms: Option<i64>,
    #[serde(rename = "max", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub max_ms: Option<i64>,
    /// Which partition holds the watermark back (`partition-min`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_by: Option<WatermarkHeldBy>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WatermarkHeldBy {
    pub topic: String,
    pub partition: i32,
    pub since_batch: BatchId,
    /// The trigger time of that batch.
    #[serde(rename = "since", serialize_with = "as_rfc3339")]
    pub since_ms: i64,
}

/// The open windows of one window table after the batch.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StateOperator {
    pub table: String,
    /// Groups (window and key) that are open.
    pub num_rows_total: u64,
    pub num_windows: u64,
    /// The watermark that closes the next window.
    #[serde(rename = "nextWindowEnd", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub next_window_end_ms: Option<i64>,
    pub memory_used_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_rows_updated: Option<u64>,
    /// Groups that left with the windows that this batch closed.
    pub num_rows_removed: u64,
    /// Late rows of this batch.
    pub num_rows_dropped_by_watermark: u64,
    pub custom_metrics: StateMetrics,
}

/// What Spark has no name for.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StateMetrics {
    /// Of the open windows, those that are in the checkpoint only. Their groups are counted at most.
    pub stored_windows: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceProgress {
    pub topic: String,
    pub partitions: Vec<PartitionProgress>,
}

/// The batch's range `[start_offset, end_offset)`; `latest_offset` is one past the last one that could be read.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PartitionProgress {
    pub partition: i32,
    pub start_offset: i64,
    pub end_offset: i64,
    pub latest_offset: i64,
    pub lag: u64,
    /// The latest event time so far.
    #[serde(rename = "maxEventTime", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub max_event_time_ms: Option<i64>,
    /// There since it does not hold the watermark back for being idle: when it was last active.
    #[serde(rename = "idleSince", serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub idle_since_ms: Option<i64>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SinkProgress {
    pub tables: Vec<TableProgress>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TableProgress {
    pub table: String,
    pub rows: u64,
    pub files: u64,
    pub snapshot_id: Option<i64>,
}

/// Where every offset of the batch went: `offsets = records + missing_offsets`, `records = rows + filtered + dropped + dead letters`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub offsets: u64,
    pub records: u64,
    pub rows: u64,
    pub filtered: u64,
    /// Valid rows left out by an expectation with `on_fail = "drop"`.
    pub dropped: u64,
    /// Rows that failed an expectation, by its name; a row may fail several.
    pub expectations: BTreeMap<String, u64>,
    /// By reason code.
    pub dead_letters: BTreeMap<String, u64>,
    /// Rows behind the watermark, by window table; they are rows nevertheless.
    pub late: BTreeMap<String, u64>,
    /// Offsets without a record: control records, aborted transactions, compaction.
    pub missing_offsets: u64,
}

impl BatchProgress {
    pub fn dead_letters(&self) -> u64 {
        self.counts.dead_letters.values().sum()
    }

    pub fn late(&self) -> u64 {
        self.counts.late.values().sum()
    }

    pub fn lag(&self) -> u64 {
        self.sources.iter().flat_map(|s| &s.partitions).map(|p| p.lag).sum()
    }

    /// Rows appended to a table by this batch.
    pub fn rows_of(&self, table: &str) -> u64 {
        self.sink.tables.iter().filter(|t| t.table == table).map(|t| t.rows).sum()
    }
}

/// Milliseconds since the epoch as RFC 3339, UTC; the number itself when it is beyond the calendar.
pub fn rfc3339(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map(|t| t.to_string()).unwrap_or_else(|_| ms.to_string())
}

fn as_rfc3339<S: Serializer>(ms: &i64, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&rfc3339(*ms))
}

fn optional_rfc3339<S: Serializer>(ms: &Option<i64>, s: S) -> Result<S::Ok, S::Error> {
    match ms {
        Some(ms) => s.serialize_str(&rfc3339(*ms)),
        None => s.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_sparks_names() {
        let progress = BatchProgress {
            batch_id: 7,
            event_time: EventTime { watermark_ms: Some(1_700_000_000_123), ..EventTime::default() },
            duration_ms: [("add_batch".to_string(), 12)].into(),
            state_operators: vec![StateOperator { table: "a.b".into(), num_rows_total: 3, ..Default::default() }],
            ..Default::default()
        };
        let json = serde_json::to_value(&progress).unwrap();
        assert_eq!(json["batchId"], 7);
        assert_eq!(json["durationMs"]["add_batch"], 12);
        assert_eq!(json["eventTime"], serde_json::json!({"watermark": "2023-11-14T22:13:20.123Z"}));
        assert_eq!(json["stateOperators"][0]["numRowsTotal"], 3);
        assert!(json["inputRowsPerSecond"].is_number());
    }
}
