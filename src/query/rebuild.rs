//! `floe recover --from-table`: a lost checkpoint, rebuilt from the tables.
//!
//! Owns: what every batch leaves in its tables for that ([`Progress`]), finding the batch to go on from, aggregating the open
//! windows again. Does not own: going on ([`super::recover`]), which treats the result as any other checkpoint. Invariants: nothing
//! is changed but the new checkpoint, never an existing one; plans are restored to the byte, so that the tables' markers fit.
//!
//! The open windows after a batch are exactly its rows, and those of all batches before, in windows that end beyond the batch's
//! watermark: such a window was open all along, so no row was late for it. The rows table has them, with the offsets that say
//! which batches they are of. What `floe dlq retry` has added later is told apart by the dead letter at the same offset.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{Int32Type, Int64Type, Schema, SchemaRef};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{blocking, packed};
use crate::batch::{BatchId, Offsets, TopicPartition};
use crate::checkpoint::{Checkpoint, CommitEntry, Counts, LoggedPlan, StateKind, WindowStates};
use crate::clock;
use crate::config::{Config, Definition};
use crate::dead_letter::retry::{self, PLACE, Places};
use crate::error::Error;
use crate::pipeline::{MessageType, Pipeline};
use crate::sink::iceberg::{Datum, Marker, PinnedTable, Predicate, Reference, marker_property};
use crate::state::{Lane, StateStore};
use crate::window::watermark::EventTimeProgress;

/// Days of a time zone may be longer than their size says.
const SLACK_US: i64 = 24 * 3_600_000_000;
/// Columns of a rows table that no window reads.
const PROVENANCE: [&str; 4] = ["_kafka_topic", "_kafka_partition", "_kafka_offset", "_kafka_timestamp"];
const SCAN_ROWS: usize = 64 * 1024;

/// Where a table says what [`Progress`] is.
pub(super) fn property(query_id: Uuid) -> String {
    format!("{}.progress", marker_property(query_id))
}

/// What the checkpoint knows of a batch beside its open windows: the value, packed JSON, of the table property
/// `floe.<query-id>.progress`, set with the marker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// `offsets/<batch>.json`, to the byte.
    pub plan: String,
    pub watermark_next_ms: Option<i64>,
    pub event_times: EventTimeProgress,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter_topic: Option<String>,
}

impl Progress {
    pub fn to_property(&self) -> Result<String, Error> {
        let json = serde_json::to_string(self).map_err(|e| Error::Internal(e.to_string()))?;
        packed::pack(json).map_err(|e| Error::Internal(e.to_string()))
    }

    fn of_property(text: &str) -> Result<Progress, String> {
        serde_json::from_str(&packed::unpack(text)?).map_err(|e| e.to_string())
    }
}

/// What was rebuilt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    pub query_id: Uuid,
    pub checkpoint: String,
    /// The last batch that is done.
    pub committed: Option<BatchId>,
    /// The batch that some tables have and others do not: the next start finishes it.
    pub pending: Option<BatchId>,
    /// The tables that open windows were aggregated from, where there are windows.
    pub rows_tables: Vec<String>,
    pub rows: u64,
    pub groups: u64,
}

impl fmt::Display for Rebuilt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rebuilt {} of query {}", self.checkpoint, self.query_id)?;
        match self.committed {
            Some(batch) => writeln!(f, "done: up to batch {batch}")?,
            None => writeln!(f, "done: no batch")?,
        }
        if let Some(batch) = self.pending {
            writeln!(f, "begun: batch {batch}, which only some of the tables have; the next `floe run` finishes it")?;
        }
        if self.rows_tables.is_empty() {
            return write!(f, "open windows: none");
        }
        let tables = self.rows_tables.join(", ");
        write!(f, "open windows: {} groups, aggregated again from {} rows of {tables}", self.groups, self.rows)
    }
}

/// A table of the pipeline as it is now.
struct Found {
    table: PinnedTable,
    marker: Marker,
}

/// Rebuilds the checkpoint of a pipeline from its tables.
pub async fn rebuild(config: &Config) -> Result<Rebuilt, Error> {
    let pipeline = Pipeline::compile(config).map_err(|problems| Error::Compile(problems.join("\n")))?;
    let pipeline = Arc::new(pipeline);
    let location = crate::storage::open(&config.checkpoint_location)?;
    let (query_id, found) = find(config, &pipeline).await?;
    let checkpoint = Checkpoint::rebuild(location, &config.name, query_id).await?;

    let newest = found.values().map(|f| f.marker.batch).max().unwrap_or_default();
    let (last, last_plan) = progress_of(&checkpoint, query_id, &found, newest)?
        .ok_or_else(|| refused(format!("no table says how far batch {newest} was")))?;
    check_tables(config, &pipeline, query_id, &found, &last_plan).await?;
    let of_plan = |name: &str| last_plan.plan.tables.contains_key(name);
    let partly = last_plan.plan.tables.keys().any(|name| found.get(name).is_none_or(|f| f.marker.batch != newest));
    let base = match (partly, newest.checked_sub(1)) {
        (false, _) => Some((last, last_plan.clone())),
        (true, None) => None,
        (true, Some(before)) => {
            let behind: BTreeMap<String, Found> = found.into_iter().filter(|(name, _)| of_plan(name)).collect();
            let base = progress_of(&checkpoint, query_id, &behind, before)?;
            Some(base.ok_or_else(|| refused(format!("no table says how far batch {before} was")))?)
        }
    };

    let mut rebuilt = Rebuilt {
        query_id,
        checkpoint: checkpoint.url().to_string(),
        committed: base.as_ref().map(|(_, plan)| plan.plan.batch),
        pending: partly.then_some(newest),
        rows_tables: Vec::new(),
        rows: 0,
        groups: 0,
    };
    if let Some((progress, logged)) = base {
        let mut state = Vec::new();
        if !pipeline.windows.is_empty() {
            let open = OpenWindows::aggregate(config, pipeline.clone(), &logged, query_id).await?;
            rebuilt.rows_tables = open.tables;
            rebuilt.rows = open.rows;
            rebuilt.groups = open.delta.groups;
            if open.delta.groups > 0 {
                let (crc32, end) = (open.delta.crc32(), open.delta.max_window_end_us);
                let (batch, attempt) = (logged.plan.batch, Uuid::new_v4());
                let put = checkpoint.put_state(batch, attempt, StateKind::Delta, open.delta.bytes, crc32, end);
                state.push(put.await?);
            }
        }
        let mut snapshots = BTreeMap::new();
        for name in logged.plan.tables.keys() {
            let table = PinnedTable::open(&config.catalog, name).await?;
            snapshots.insert(name.clone(), table.and_then(|t| t.snapshot_of(query_id, logged.plan.batch)));
        }
        checkpoint.restore_plan(&logged).await?;
        let queries = pipeline.queries.iter().map(|q| (q.table(), q.state_definition()));
        let entry = CommitEntry {
            batch: logged.plan.batch,
            epoch: logged.plan.epoch,
            plan_digest: logged.digest,
            watermark_next_ms: progress.watermark_next_ms,
            event_times: progress.event_times,
            // The numbers of a new store: the queries in their order.
            windows: WindowStates::default().with(queries),
            definition: Definition::of(config),
            state,
            snapshots,
            counts: Counts::default(),
            committed_at_ms: clock::system()(),
            dead_letter_topic: progress.dead_letter_topic,
        };
        checkpoint.log_commit(&entry).await?;
    }
    if partly {
        checkpoint.restore_plan(&last_plan).await?;
    }
    checkpoint.finish_rebuilding().await?;
    Ok(rebuilt)
}

fn refused(problem: impl Into<String>) -> Error {
    Error::NotRebuilt(problem.into())
}

/// The one query of this pipeline that has written to its tables, and what it has left there.
async fn find(config: &Config, pipeline: &Pipeline) -> Result<(Uuid, BTreeMap<String, Found>), Error> {
    let mut queries: BTreeMap<Uuid, BTreeMap<String, Found>> = BTreeMap::new();
    let mut seen = String::new();
    for spec in &pipeline.tables {
        let Some(table) = PinnedTable::open(&config.catalog, &spec.name).await? else {
            seen.push_str(&format!("\n  {}: there is no such table", spec.name));
            continue;
        };
        let markers = table.markers();
        if markers.is_empty() {
            seen.push_str(&format!("\n  {}: nothing of any query", spec.name));
        }
        for (id, marker) in markers {
            let Marker { pipeline, batch, .. } = &marker;
            seen.push_str(&format!("\n  {}: batch {batch} of pipeline {pipeline}, query {id}", spec.name));
            if *pipeline == config.name {
                let found = Found { table: table.clone(), marker };
                queries.entry(id).or_default().insert(spec.name.clone(), found);
            }
        }
    }
    let several = queries.len() > 1;
    match queries.pop_first() {
        Some(found) if !several => Ok(found),
        Some(_) => Err(refused(format!(
            "several queries called {:?} have written to these tables, so that it is not clear whose checkpoint was lost; remove \
             the properties floe.<query> of those that are of no use any more. Found:{seen}",
            config.name
        ))),
        None => Err(refused(format!(
            "no table has anything of pipeline {:?}: there is nothing to rebuild a checkpoint from, and nothing to lose by \
             starting with a new one. Found:{seen}",
            config.name
        ))),
    }
}

/// What the tables that have exactly this batch say of it; they all have to say the same.
fn progress_of(
    checkpoint: &Checkpoint,
    query_id: Uuid,
    found: &BTreeMap<String, Found>,
    batch: BatchId,
) -> Result<Option<(Progress, LoggedPlan)>, Error> {
    let mut said: Option<(&str, &Marker, Progress, LoggedPlan)> = None;
    for (name, Found { table, marker }) in found.iter().filter(|(_, f)| f.marker.batch == batch) {
        let Some(json) = table.property(query_id, &property(query_id)) else {
            return Err(refused(format!(
                "table {name} has batch {batch}, but no property {}: it was written by a version of Floe that did not keep \
                 there what a checkpoint is rebuilt from",
                property(query_id)
            )));
        };
        let progress = Progress::of_property(json)
            .map_err(|e| refused(format!("table {name}: cannot read property {}: {e}", property(query_id))))?;
        let logged = checkpoint.decode_plan(progress.plan.clone())?;
        if marker.plan.split('+').next() != Some(logged.digest.as_str()) || logged.plan.batch != batch {
            return Err(refused(format!("table {name}: the properties of query {query_id} are of different batches")));
        }
        match &said {
            Some((other, first, _, _)) if *first != marker => {
                return Err(refused(format!(
                    "tables {other} and {name} both have batch {batch}, but from different executions"
                )));
            }
            Some(_) => {}
            None => said = Some((name, marker, progress, logged)),
        }
    }
    Ok(said.map(|(_, _, progress, logged)| (progress, logged)))
}

/// Every table of the last batch has to be there, be the same one, and have that batch or the one before it.
async fn check_tables(
    config: &Config,
    pipeline: &Pipeline,
    query_id: Uuid,
    found: &BTreeMap<String, Found>,
    last: &LoggedPlan,
) -> Result<(), Error> {
    let newest = last.plan.batch;
    for (name, then) in &last.plan.tables {
        if !pipeline.tables.iter().any(|t| t.name == *name) {
            return Err(refused(format!(
                "batch {newest} wrote to table {name}, which is not in this configuration; recover with the configuration of that \
                 batch, change it afterwards"
            )));
        }
        let Some(table) = PinnedTable::open(&config.catalog, name).await? else {
            return Err(refused(format!("table {name}, which batch {newest} was planned for, is gone")));
        };
        if table.uuid() != *then {
            return Err(Error::TableRecreated { table: name.clone(), then: *then, now: table.uuid(), batch: newest });
        }
        let has = found.get(name).map(|f| f.marker.batch);
        if has.map_or(newest > 0, |has| has + 1 < newest) {
            let has = has.map_or("no batch".to_string(), |batch| format!("batch {batch}"));
            return Err(refused(format!(
                "table {name} has {has} of query {query_id}, others have batch {newest}: rows in between are missing from it. \
                 Restore the newest catalog"
            )));
        }
    }
    let executed_with = found.values().find(|f| f.marker.batch == newest).and_then(|f| f.marker.plan.split_once('+'));
    let fingerprint = executed_with.map_or(last.plan.config_fingerprint.as_str(), |(_, fingerprint)| fingerprint);
    if fingerprint != config.fingerprint {
        return Err(refused(format!(
            "batch {newest} was executed with another configuration: schema, transform, event time, windows or tables have \
             changed since. Recover with the configuration of that batch, change it afterwards"
        )));
    }
    Ok(())
}

struct OpenWindows {
    tables: Vec<String>,
    rows: u64,
    delta: crate::state::Delta,
}

impl OpenWindows {
    /// Those after a batch.
    async fn aggregate(
        config: &Config,
        pipeline: Arc<Pipeline>,
        logged: &LoggedPlan,
        query_id: Uuid,
    ) -> Result<OpenWindows, Error> {
        let refused_once = match PinnedTable::open(&config.catalog, &config.dead_letters.table).await? {
            Some(letters) => retry::places_of_letters(&letters, retry::of_topics(config, None))
                .await
                .map_err(|e| refused(format!("cannot read the dead letters: {e}")))?,
            None => Places::new(),
        };
        let kept = Kept { ends: logged.plan.ends(), refused_once };
        let evict_ms = logged.plan.watermarks.evict();
        let (mut tables, mut lanes, mut rows) = (Vec::new(), Vec::new(), 0);
        for of in pipeline.types.iter().filter(|of| !of.queries.is_empty()) {
            let table = rows_table(config, &pipeline, of, query_id).await?;
            let columns = columns_of(of);
            let names: Vec<&str> = columns.fields().iter().map(|f| f.name().as_str()).chain(PLACE).collect();
            let mut scan = table.scan(&names, not_before(&pipeline, of, &columns, evict_ms), SCAN_ROWS).await?;
            let event_time = of.event_time.unwrap_or_default();
            let mut lane = Lane::new(pipeline.queries.clone(), of.queries.clone(), event_time, evict_ms);
            while let Some(batch) = scan.try_next().await? {
                let batch = kept.of(&batch, &columns)?;
                rows += batch.num_rows() as u64;
                lane = blocking(move || {
                    lane.update(&batch)?;
                    Ok(lane)
                })
                .await?;
            }
            tables.push(table.name());
            lanes.push(lane);
        }
        let workers = pipeline.workers;
        let mut state = StateStore::new(pipeline.queries.clone());
        let delta = blocking(move || Ok(state.merge_lanes(lanes, evict_ms, workers)?)).await?;
        Ok(OpenWindows { tables, rows, delta })
    }
}

/// The rows of a message type, if they are all there and nobody else's.
async fn rows_table(
    config: &Config,
    pipeline: &Pipeline,
    of: &MessageType,
    query_id: Uuid,
) -> Result<PinnedTable, Error> {
    let why = "windows that were open cannot be rebuilt: they are aggregated again from the rows table";
    if of.queries.iter().filter_map(|query| pipeline.queries.get(*query)).any(|query| query.is_session()) {
        return Err(refused(format!("{why}, which does not tell how far back the sessions of a session_gap reach")));
    }
    let Some(rows) = of.rows.filter(|_| of.provenance) else {
        return Err(refused(format!("{why}, which this pipeline has not, or not with rows.provenance = true")));
    };
    let name = &pipeline.tables[rows].name;
    let table = PinnedTable::open(&config.catalog, name).await?;
    let table = table.ok_or_else(|| refused(format!("table {name} is gone")))?;
    match table.markers().into_iter().find(|(id, _)| *id != query_id) {
        Some((id, other)) => Err(refused(format!(
            "{why} {name}, which pipeline {:?} (query {id}) writes to as well: whose row is whose cannot be told",
            other.pipeline
        ))),
        None => Ok(table),
    }
}

/// The columns that reach the windows.
fn columns_of(of: &MessageType) -> SchemaRef {
    let columns = of.rows_schema.fields().iter().filter(|f| !PROVENANCE.contains(&f.name().as_str()));
    Schema::new(columns.cloned().collect::<Vec<_>>()).into()
}

/// True for the rows of open windows, and some more.
fn not_before(pipeline: &Pipeline, of: &MessageType, columns: &SchemaRef, evict_ms: i64) -> Option<Predicate> {
    let queries = of.queries.iter().filter_map(|query| pipeline.queries.get(*query));
    let longest = queries.map(|q| q.windowing().size().as_micros()).max()?;
    let longest = i64::try_from(longest).ok()?.checked_add(SLACK_US)?;
    let from_us = evict_ms.checked_mul(1000)?.checked_sub(longest)?;
    let field = columns.field(of.event_time?);
    let zoned = matches!(field.data_type(), arrow::datatypes::DataType::Timestamp(_, Some(_)));
    let from = if zoned { Datum::timestamptz_micros(from_us) } else { Datum::timestamp_micros(from_us) };
    Some(Reference::new(field.name()).greater_than_or_equal_to(from))
}

/// Which rows the batches up to one have brought.
struct Kept {
    ends: Offsets,
    /// A row at the offset of a dead letter is one that was tried again: no window has seen it.
    refused_once: Places,
}

impl Kept {
    fn of(&self, batch: &RecordBatch, columns: &SchemaRef) -> Result<RecordBatch, Error> {
        let strange = |what: &str| refused(format!("the rows table is not as Floe writes it: {what}"));
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| strange(&format!("no column {name}")));
        let [topic, partition, offset] = PLACE;
        let topics = cast(column(topic)?, &arrow::datatypes::DataType::Utf8).map_err(|e| strange(&e.to_string()))?;
        let topics = topics.as_string::<i32>();
        let (Some(partitions), Some(offsets)) =
            (column(partition)?.as_primitive_opt::<Int32Type>(), column(offset)?.as_primitive_opt::<Int64Type>())
        else {
            return Err(strange("the types of the _kafka_ columns"));
        };
        let mut current: Option<(TopicPartition, i64, _)> = None;
        let mut keep = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let (topic, partition, offset) = (topics.value(row), partitions.value(row), offsets.value(row));
            // Rows of one partition follow each other.
            if current.as_ref().is_none_or(|(tp, ..)| &*tp.topic != topic || tp.partition != partition) {
                let tp = TopicPartition::new(topic, partition);
                let end = self.ends.get(&tp).copied().unwrap_or(i64::MIN);
                current = Some((tp, end, self.refused_once.get(&(topic.to_string(), partition))));
            }
            keep.push(current.as_ref().is_some_and(|(_, end, refused)| {
                offset < *end && !refused.is_some_and(|refused| refused.contains(&offset))
            }));
        }
        let arrays = columns.fields().iter().map(|field| {
            let found = column(field.name())?;
            cast(found, field.data_type()).map_err(|e| strange(&format!("column {}: {e}", field.name())))
        });
        let rows = RecordBatch::try_new(columns.clone(), arrays.collect::<Result<_, _>>()?);
        let rows = rows.map_err(|e| strange(&e.to_string()))?;
        filter_record_batch(&rows, &BooleanArray::from(keep)).map_err(|e| strange(&e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{MicroBatch, OffsetRange};
    use crate::window::watermark::PartitionTime;

    /// The property is in every version of every table's metadata.
    #[test]
    fn a_thousand_partitions_make_no_large_property() {
        let partition = |n: i64| TopicPartition::new("telemetry", n as i32);
        // Offsets and times that no two partitions share.
        let odd = |n: i64, of: i64| (n + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as i64).rem_euclid(of);
        let ranges = (0..1000).map(|n| {
            let start = 1_000_000_000 + odd(n, 1_000_000_000);
            (partition(n), OffsetRange { start, end: start + odd(n, 100_000) })
        });
        let left_behind = (0..1000).map(|n| (partition(n), odd(n, 1_000_000) as u64));
        let times = (0..1000).map(|n| {
            let max_event_time_ms = Some(1_767_225_600_000 + odd(n, 600_000));
            (partition(n), PartitionTime { max_event_time_ms, active_at_ms: 1_767_225_600_000, barren_ms: None })
        });
        let plan = MicroBatch {
            batch: 1_000_000,
            epoch: 12,
            trigger_time_ms: 1_767_225_600_000,
            config_fingerprint: "0123456789abcdef".repeat(4),
            ranges: ranges.collect(),
            gaps: Vec::new(),
            topic_ids: BTreeMap::new(),
            watermarks: Default::default(),
            left_behind: left_behind.collect(),
            held_by: None,
            tables: BTreeMap::from([("telemetry.events".to_string(), Uuid::new_v4())]),
        };
        let progress = Progress {
            plan: serde_json::to_string(&plan).unwrap(),
            watermark_next_ms: Some(1_767_225_600_000),
            event_times: EventTimeProgress { partitions: times.collect(), records_since_ms: 1_767_225_600_000 },
            dead_letter_topic: None,
        };
        let (json, property) = (serde_json::to_string(&progress).unwrap(), progress.to_property().unwrap());
        assert_eq!(Progress::of_property(&property).unwrap(), progress);
        assert_eq!(Progress::of_property(&json).unwrap(), progress);
        println!("{} bytes, of {} in JSON", property.len(), json.len());
        assert!(property.len() < 64 << 10, "{} bytes, of {} in JSON", property.len(), json.len());
    }
}
