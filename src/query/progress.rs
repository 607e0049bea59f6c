//! What a batch did, for people and dashboards.

use std::collections::BTreeMap;

use super::{Session, StreamingQuery};
use crate::batch::{MicroBatch, OffsetRange, Offsets, TopicPartition};
use crate::checkpoint::CommitEntry;
use crate::execute::EventTimes;
use crate::source::Available;
use crate::state::StateStore;
use crate::telemetry::{
    self, BatchProgress, EventTime, PartitionProgress, SinkProgress, SourceProgress, StateOperator, TableProgress,
    WatermarkHeldBy,
};
use crate::window::watermark::WatermarkPolicy;

impl Session {
    /// What the batch did, for people and dashboards.
    pub(super) fn progress(
        &self,
        query: &StreamingQuery,
        plan: &MicroBatch,
        entry: &CommitEntry,
        written: &[(u64, u64)],
        state: &StateStore,
        event_times: &EventTimes,
    ) -> BatchProgress {
        let counts = &entry.counts;
        let mut sources: Vec<SourceProgress> = Vec::new();
        for (tp, range) in &plan.ranges {
            let latest_offset = self.latest.get(tp).copied().unwrap_or(range.end);
            let partition = PartitionProgress {
                partition: tp.partition,
                start_offset: range.start,
                end_offset: range.end,
                latest_offset,
                lag: u64::try_from(latest_offset - range.end).unwrap_or(0),
                max_event_time_ms: entry.event_times.partitions.get(tp).and_then(|time| time.max_event_time_ms),
                idle_since_ms: idle_since(query, plan, entry, tp),
            };
            match sources.last_mut().filter(|s| *s.topic == *tp.topic) {
                Some(source) => source.partitions.push(partition),
                None => sources.push(SourceProgress { topic: tp.topic.to_string(), partitions: vec![partition] }),
            }
        }
        let tables = query.pipeline.tables.iter().zip(written).map(|(table, (rows, files))| TableProgress {
            table: table.name.clone(),
            rows: *rows,
            files: *files,
            snapshot_id: entry.snapshots.get(&table.name).copied().flatten(),
        });
        let state_operators = state.stats().queries.into_iter().zip(&query.pipeline.windows).map(|(stats, &table)| {
            let table = query.pipeline.tables[table].name.clone();
            StateOperator {
                num_rows_total: stats.groups,
                num_windows: stats.open_windows,
                next_window_end_ms: stats.next_end_us.map(|us| us.div_euclid(1000)),
                memory_used_bytes: stats.bytes,
                num_rows_updated: None,
                num_rows_dropped_by_watermark: counts.late.get(&table).copied().unwrap_or(0),
                table,
            }
        });
        BatchProgress {
            id: self.checkpoint.query_id().to_string(),
            run_id: query.run_id.to_string(),
            name: query.config.name.clone(),
            batch_id: plan.batch,
            timestamp: telemetry::rfc3339(plan.trigger_time_ms),
            num_input_rows: counts.records,
            event_time: EventTime {
                watermark_ms: plan.watermarks.evict_ms,
                min_ms: event_times.min_us.map(|us| us.div_euclid(1000)),
                avg_ms: event_times.avg_ms(),
                max_ms: event_times.max_us.map(|us| us.div_euclid(1000)),
                held_by: plan.held_by.as_ref().map(|held| WatermarkHeldBy {
                    topic: held.topic.clone(),
                    partition: held.partition,
                    since_batch: held.since_batch,
                    since_ms: held.since_ms,
                }),
            },
            state_operators: state_operators.collect(),
            sources,
            sink: SinkProgress { tables: tables.collect() },
            counts: telemetry::Counts {
                offsets: plan.offsets(),
                records: counts.records,
                rows: counts.rows,
                filtered: counts.filtered,
                dropped: counts.dropped,
                expectations: counts.expectations.clone(),
                dead_letters: counts.dead_letters.clone(),
                late: counts.late.clone(),
                missing_offsets: plan.offsets().saturating_sub(counts.records),
            },
            checkpoint_bytes: self.checkpoint_bytes,
            ..BatchProgress::default()
        }
    }
}

/// Since when a partition has not held the watermark back any more, if it is idle.
fn idle_since(query: &StreamingQuery, plan: &MicroBatch, entry: &CommitEntry, tp: &TopicPartition) -> Option<i64> {
    let WatermarkPolicy::PartitionMin { idle_timeout_ms } = query.config.event_time.as_ref()?.policy else {
        return None;
    };
    let time = entry.event_times.partitions.get(tp)?;
    let has_backlog = plan.left_behind.contains_key(tp);
    let idle = entry.event_times.is_idle(tp, plan.trigger_time_ms, has_backlog, idle_timeout_ms);
    idle.then_some(time.active_at_ms)
}

/// How far the committed batches are behind what can be read, by partition.
pub(super) fn lag(starts: &Offsets, available: &Available) -> BTreeMap<TopicPartition, u64> {
    let behind = |(tp, range): (&TopicPartition, &OffsetRange)| {
        let start = starts.get(tp).copied().unwrap_or(range.start);
        (tp.clone(), OffsetRange { start, end: range.end }.len())
    };
    available.partitions.iter().map(behind).collect()
}
