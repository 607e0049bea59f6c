//! Every metric, with its unit and help text: base units, few labels, prefix `floe_`.
//!
//! One process runs one pipeline, so metrics carry no pipeline label; `floe_query_info` names it.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use super::progress::BatchProgress;
use crate::dead_letter::Reason;
use crate::error::Kind;
use crate::sink::iceberg::TableReport;

enum Type {
    Counter,
    Gauge,
    Histogram,
}
use Type::{Counter, Gauge, Histogram};

pub const BUILD_INFO: &str = "floe_build_info";
pub const QUERY_INFO: &str = "floe_query_info";
pub const READY: &str = "floe_ready";
pub const BATCHES: &str = "floe_batches_total";
pub const BATCH_ID: &str = "floe_batch_id";
pub const BATCH_DURATION: &str = "floe_batch_duration_seconds";
pub const STAGE_DURATION: &str = "floe_batch_stage_duration_seconds";
pub const OFFSETS: &str = "floe_source_offsets_total";
pub const RECORDS: &str = "floe_source_records_total";
pub const MISSING_OFFSETS: &str = "floe_source_missing_offsets_total";
pub const LAG: &str = "floe_source_lag_records";
pub const ROWS: &str = "floe_sink_rows_total";
pub const FILES: &str = "floe_sink_files_total";
pub const FILTERED: &str = "floe_filtered_rows_total";
pub const DROPPED: &str = "floe_dropped_rows_total";
pub const EXPECTATION_FAILURES: &str = "floe_expectation_failures_total";
pub const BREAKER_OPEN: &str = "floe_breaker_open";
pub const DEAD_LETTERS: &str = "floe_dead_letters_total";
pub const LATE_ROWS: &str = "floe_late_rows_total";
pub const STATE_GROUPS: &str = "floe_state_groups";
pub const STATE_WINDOWS: &str = "floe_state_windows";
pub const STATE_BYTES: &str = "floe_state_bytes";
pub const STATE_STORED_WINDOWS: &str = "floe_state_stored_windows";
pub const STATE_FILES: &str = "floe_state_files";
pub const STATE_FILE_BYTES: &str = "floe_state_file_bytes";
pub const STATE_COMPACTIONS: &str = "floe_state_compactions_total";
pub const STATE_COMPACTED_BYTES: &str = "floe_state_compacted_bytes_total";
pub const CHECKPOINT_BYTES: &str = "floe_checkpoint_bytes";
pub const WATERMARK: &str = "floe_watermark_timestamp_seconds";
pub const WATERMARK_DELAY: &str = "floe_watermark_delay_seconds";
pub const WATERMARK_HELD_BY: &str = "floe_watermark_held_by";
pub const WATERMARK_IDLE: &str = "floe_watermark_idle_partitions";
pub const WATERMARK_BEHIND: &str = "floe_watermark_partition_behind_seconds";
pub const LAST_COMMIT: &str = "floe_last_commit_timestamp_seconds";
pub const LAST_COMMIT_AGE: &str = "floe_last_commit_age_seconds";
pub const RETRIES: &str = "floe_retries_total";
pub const ERRORS: &str = "floe_errors_total";
pub const MAINTENANCE_DURATION: &str = "floe_maintenance_duration_seconds";
pub const MAINTENANCE_FAILURES: &str = "floe_maintenance_failures_total";
pub const SNAPSHOTS_EXPIRED: &str = "floe_maintenance_snapshots_expired_total";
pub const FILES_EXPIRED: &str = "floe_maintenance_files_expired_total";
pub const FILES_COMPACTED: &str = "floe_maintenance_files_compacted_total";
pub const BYTES_COMPACTED: &str = "floe_maintenance_bytes_compacted_total";
pub const ORPHANS_REMOVED: &str = "floe_maintenance_orphans_removed_total";

const METRICS: [(&str, Type, Unit, &str); 44] = [
    (BUILD_INFO, Gauge, Unit::Count, "Always 1; the label is the version."),
    (QUERY_INFO, Gauge, Unit::Count, "Always 1; the labels name the pipeline, its query id and its guarantee."),
    (READY, Gauge, Unit::Count, "1 when /readyz answers 200, else 0."),
    (BATCHES, Counter, Unit::Count, "Batches committed by this process."),
    (BATCH_ID, Gauge, Unit::Count, "The last committed batch."),
    (BATCH_DURATION, Histogram, Unit::Seconds, "From trigger to commit log, by batch."),
    (STAGE_DURATION, Histogram, Unit::Seconds, "Time spent in each stage of a batch."),
    (OFFSETS, Counter, Unit::Count, "Offsets of all committed batches."),
    (RECORDS, Counter, Unit::Count, "Records read from Kafka."),
    (
        MISSING_OFFSETS,
        Counter,
        Unit::Count,
        "Offsets that hold no record: transaction markers, aborted or compacted ones.",
    ),
    (LAG, Gauge, Unit::Count, "Offsets of a partition that are not yet committed to the tables."),
    (ROWS, Counter, Unit::Count, "Rows committed to a table."),
    (FILES, Counter, Unit::Count, "Data files committed to a table."),
    (FILTERED, Counter, Unit::Count, "Valid rows that the filter left out."),
    (DROPPED, Counter, Unit::Count, "Valid rows that an expectation left out."),
    (EXPECTATION_FAILURES, Counter, Unit::Count, "Rows that failed an expectation, by its name and what it does."),
    (BREAKER_OPEN, Gauge, Unit::Count, "1 while a batch is held back because too many of its records are refused."),
    (DEAD_LETTERS, Counter, Unit::Count, "Records refused, by reason."),
    (LATE_ROWS, Counter, Unit::Count, "Rows behind the watermark, by the window table that left them out."),
    (
        STATE_GROUPS,
        Gauge,
        Unit::Count,
        "Open groups (window and key) of a window table; at most so many where windows are in the checkpoint only.",
    ),
    (STATE_WINDOWS, Gauge, Unit::Count, "Open windows of a window table."),
    (STATE_BYTES, Gauge, Unit::Bytes, "Memory held by the open windows of a window table."),
    (STATE_STORED_WINDOWS, Gauge, Unit::Count, "Open windows of a window table that are in the checkpoint only."),
    (STATE_FILES, Gauge, Unit::Count, "Files of the checkpoint that make up the state."),
    (STATE_FILE_BYTES, Gauge, Unit::Bytes, "Size of the files that make up the state."),
    (STATE_COMPACTIONS, Counter, Unit::Count, "Times that state files were merged in the background."),
    (STATE_COMPACTED_BYTES, Counter, Unit::Bytes, "Bytes of state files written by merging them."),
    (CHECKPOINT_BYTES, Gauge, Unit::Bytes, "Size of the checkpoint."),
    (WATERMARK, Gauge, Unit::Seconds, "The watermark, in seconds since the epoch; absent until there is one."),
    (WATERMARK_DELAY, Gauge, Unit::Seconds, "How far the watermark is behind the wall clock."),
    (WATERMARK_HELD_BY, Gauge, Unit::Count, "1 for the partition that holds the watermark back, 0 for the others."),
    (WATERMARK_IDLE, Gauge, Unit::Count, "Partitions that do not hold the watermark back because they are idle."),
    (
        WATERMARK_BEHIND,
        Gauge,
        Unit::Seconds,
        "How far the latest event time of a partition is behind that of the partition furthest ahead.",
    ),
    (LAST_COMMIT, Gauge, Unit::Seconds, "When the last batch was committed, in seconds since the epoch."),
    (LAST_COMMIT_AGE, Gauge, Unit::Seconds, "How long ago the last batch was committed."),
    (RETRIES, Counter, Unit::Count, "Attempts that failed and were tried again."),
    (ERRORS, Counter, Unit::Count, "Errors by kind: transient, indeterminate, fatal."),
    (MAINTENANCE_DURATION, Histogram, Unit::Seconds, "Time that a round of maintenance took, over all tables."),
    (
        MAINTENANCE_FAILURES,
        Counter,
        Unit::Count,
        "Steps of maintenance that failed, by table; the next round tries again.",
    ),
    (SNAPSHOTS_EXPIRED, Counter, Unit::Count, "Snapshots that maintenance has expired, by table."),
    (FILES_EXPIRED, Counter, Unit::Count, "Files deleted with expired snapshots, by table."),
    (FILES_COMPACTED, Counter, Unit::Count, "Small data files that were made into larger ones, by table."),
    (BYTES_COMPACTED, Counter, Unit::Bytes, "Size of the small data files that were compacted, by table."),
    (ORPHANS_REMOVED, Counter, Unit::Count, "Files deleted because nothing referenced them, by table."),
];

/// From a commit on a local disk to the longest deadline of a stage.
const SECONDS_BUCKETS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

const KINDS: [Kind; 3] = [Kind::Transient, Kind::Indeterminate, Kind::Fatal];

/// Makes this the process's recorder, once.
pub(super) fn install() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let builder = PrometheusBuilder::new();
            // Fails on an empty list of buckets only.
            let builder = builder.set_buckets(&SECONDS_BUCKETS).unwrap_or_else(|_| PrometheusBuilder::new());
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder is installed: /metrics stays empty");
            }
            for (name, kind, unit, help) in METRICS {
                match kind {
                    Counter => describe_counter!(name, unit, help),
                    Gauge => describe_gauge!(name, unit, help),
                    Histogram => describe_histogram!(name, unit, help),
                }
            }
            handle
        })
        .clone()
}

/// Everything whose labels are known beforehand starts at 0: a rate needs a value to start from.
pub(super) fn register() {
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    for total in [
        BATCHES,
        OFFSETS,
        RECORDS,
        MISSING_OFFSETS,
        FILTERED,
        DROPPED,
        RETRIES,
        STATE_COMPACTIONS,
        STATE_COMPACTED_BYTES,
    ] {
        counter!(total).increment(0);
    }
    gauge!(BREAKER_OPEN).set(0.0);
    for reason in Reason::ALL {
        counter!(DEAD_LETTERS, "reason" => reason.code()).increment(0);
    }
    for kind in KINDS {
        counter!(ERRORS, "kind" => super::kind_name(kind)).increment(0);
    }
}

pub(super) fn record_query(name: &str, query_id: &str, guarantee: &str) {
    let labels = [("name", name.to_string()), ("query_id", query_id.to_string()), ("guarantee", guarantee.to_string())];
    gauge!(QUERY_INFO, &labels).set(1.0);
}

pub(super) fn register_tables(tables: &[String], windows: &[String]) {
    for table in tables {
        counter!(ROWS, "table" => table.clone()).increment(0);
        counter!(FILES, "table" => table.clone()).increment(0);
        record_maintenance_of(&TableReport { table: table.clone(), ..TableReport::default() });
    }
    for table in windows {
        counter!(LATE_ROWS, "table" => table.clone()).increment(0);
    }
}

/// Name and `on_fail` of every expectation.
pub(super) fn register_expectations(expectations: &[(String, &'static str)]) {
    for (name, on_fail) in expectations {
        counter!(EXPECTATION_FAILURES, "name" => name.clone(), "on_fail" => *on_fail).increment(0);
    }
}

pub(super) fn record_expectation(name: &str, on_fail: &'static str, failures: u64) {
    counter!(EXPECTATION_FAILURES, "name" => name.to_string(), "on_fail" => on_fail).increment(failures);
}

pub(super) fn record_breaker(open: bool) {
    gauge!(BREAKER_OPEN).set(if open { 1.0 } else { 0.0 });
}

pub(super) fn record_batch(p: &BatchProgress) {
    counter!(BATCHES).increment(1);
    gauge!(BATCH_ID).set(p.batch_id as f64);
    histogram!(BATCH_DURATION).record(seconds(p.batch_duration_ms));
    for (stage, ms) in &p.duration_ms {
        histogram!(STAGE_DURATION, "stage" => stage.clone()).record(seconds(*ms));
    }
    counter!(OFFSETS).increment(p.counts.offsets);
    counter!(RECORDS).increment(p.counts.records);
    counter!(MISSING_OFFSETS).increment(p.counts.missing_offsets);
    counter!(FILTERED).increment(p.counts.filtered);
    counter!(DROPPED).increment(p.counts.dropped);
    for (reason, n) in &p.counts.dead_letters {
        counter!(DEAD_LETTERS, "reason" => reason.clone()).increment(*n);
    }
    for (table, n) in &p.counts.late {
        counter!(LATE_ROWS, "table" => table.clone()).increment(*n);
    }
    for t in &p.sink.tables {
        counter!(ROWS, "table" => t.table.clone()).increment(t.rows);
        counter!(FILES, "table" => t.table.clone()).increment(t.files);
    }
    for s in &p.state_operators {
        gauge!(STATE_GROUPS, "table" => s.table.clone()).set(s.num_rows_total as f64);
        gauge!(STATE_WINDOWS, "table" => s.table.clone()).set(s.num_windows as f64);
        gauge!(STATE_BYTES, "table" => s.table.clone()).set(s.memory_used_bytes as f64);
        gauge!(STATE_STORED_WINDOWS, "table" => s.table.clone()).set(s.custom_metrics.stored_windows as f64);
    }
    gauge!(STATE_FILES).set(p.state_files as f64);
    gauge!(STATE_FILE_BYTES).set(p.state_file_bytes as f64);
    gauge!(CHECKPOINT_BYTES).set(p.checkpoint_bytes as f64);
    record_partitions(p);
}

/// Nothing where there are no windows: then no partition has an event time.
fn record_partitions(p: &BatchProgress) {
    let partitions = || p.sources.iter().flat_map(|s| s.partitions.iter().map(move |partition| (s, partition)));
    let Some(furthest) = partitions().filter_map(|(_, p)| p.max_event_time_ms).max() else { return };
    gauge!(WATERMARK_IDLE).set(partitions().filter(|(_, p)| p.idle_since_ms.is_some()).count() as f64);
    for (source, partition) in partitions() {
        let labels = [("topic", source.topic.clone()), ("partition", partition.partition.to_string())];
        let held_by = p.event_time.held_by.as_ref();
        let holds = held_by.is_some_and(|h| h.topic == source.topic && h.partition == partition.partition);
        gauge!(WATERMARK_HELD_BY, &labels).set(if holds { 1.0 } else { 0.0 });
        if let Some(own) = partition.max_event_time_ms {
            gauge!(WATERMARK_BEHIND, &labels).set((furthest - own) as f64 / 1000.0);
        }
    }
}

pub(super) fn record_maintenance(took: Duration, reports: &[TableReport]) {
    histogram!(MAINTENANCE_DURATION).record(took.as_secs_f64());
    reports.iter().for_each(record_maintenance_of);
}

fn record_maintenance_of(report: &TableReport) {
    for (total, n) in [
        (MAINTENANCE_FAILURES, report.errors.len() as u64),
        (SNAPSHOTS_EXPIRED, report.snapshots_expired),
        (FILES_EXPIRED, report.files_expired),
        (FILES_COMPACTED, report.files_compacted),
        (BYTES_COMPACTED, report.bytes_compacted),
        (ORPHANS_REMOVED, report.orphans_removed),
    ] {
        counter!(total, "table" => report.table.clone()).increment(n);
    }
}

pub(super) fn record_lag(topic: &str, partition: i32, lag: u64) {
    gauge!(LAG, "topic" => topic.to_string(), "partition" => partition.to_string()).set(lag as f64);
}

pub(super) fn record_compaction(bytes_written: u64) {
    counter!(STATE_COMPACTIONS).increment(1);
    counter!(STATE_COMPACTED_BYTES).increment(bytes_written);
}

pub(super) fn record_retry() {
    counter!(RETRIES).increment(1);
}

pub(super) fn record_error(kind: Kind) {
    counter!(ERRORS, "kind" => super::kind_name(kind)).increment(1);
}

/// Gauges that change by themselves as time goes by.
pub(super) fn refresh(now_ms: i64, last_commit_ms: Option<i64>, watermark_ms: Option<i64>, ready: bool) {
    gauge!(READY).set(if ready { 1.0 } else { 0.0 });
    if let Some(ms) = last_commit_ms {
        gauge!(LAST_COMMIT).set(ms as f64 / 1000.0);
        gauge!(LAST_COMMIT_AGE).set((now_ms - ms).max(0) as f64 / 1000.0);
    }
    // A watermark of 0 is the one that a query starts with: nothing has been seen yet.
    if let Some(ms) = watermark_ms.filter(|ms| *ms > 0) {
        gauge!(WATERMARK).set(ms as f64 / 1000.0);
        gauge!(WATERMARK_DELAY).set((now_ms - ms) as f64 / 1000.0);
    }
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
