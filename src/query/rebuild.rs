//! `floe recover --from-table`: a lost checkpoint, rebuilt from the tables.
//!
//! Owns: what every batch leaves in its tables for that ([`Progress`]), finding the batch to go on from. Does not own: the windows
//! that were open after it ([`super::open_windows`]); going on ([`super::recover`]), which treats the result as any other
//! checkpoint. Invariants: nothing is changed but the new checkpoint, never an existing one; plans are restored to the byte, so
//! that the tables' markers fit.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::open_windows::{Reopened, Reopening};
use super::packed;
use crate::batch::{BatchId, Offsets, by_topic};
use crate::checkpoint::{Checkpoint, CommitEntry, Counts, LoggedPlan, WindowStates};
use crate::clock;
use crate::config::{Config, Definition};
use crate::error::Error;
use crate::pipeline::Pipeline;
use crate::sink::iceberg::{Marker, PinnedTable, marker_property};
use crate::window::reread::Reread;
use crate::window::watermark::EventTimeProgress;

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
    /// [`Reread::from`].
    #[serde(default, with = "by_topic", skip_serializing_if = "Offsets::is_empty")]
    pub reread_from: Offsets,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter_topic: Option<String>,
}

impl Progress {
    pub fn to_property(&self) -> Result<String, Error> {
        let json = serde_json::to_string(self).map_err(|e| Error::Internal(e.to_string()))?;
        packed::pack(json).map_err(|e| Error::Internal(e.to_string()))
    }

    pub fn of_property(text: &str) -> Result<Progress, String> {
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
    /// In the order of the configuration; none where no batch is done.
    pub windows: Vec<Reopened>,
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
        if self.windows.is_empty() {
            return write!(f, "open windows: none");
        }
        write!(f, "open windows:")?;
        self.windows.iter().try_for_each(|windows| write!(f, "\n  {windows}"))
    }
}

/// The tables of the pipeline that there are, by name, as they were when they were looked at.
pub(super) type Tables = BTreeMap<String, PinnedTable>;
/// What those say that have something of the query.
type Markers = BTreeMap<String, Marker>;

/// Rebuilds the checkpoint of a pipeline from its tables, and from Kafka where windows that were open can be had only there.
/// Windows that cannot be had at all are a reason to refuse, or left out with `drop_open_windows`.
pub async fn rebuild(config: &Config, drop_open_windows: bool) -> Result<Rebuilt, Error> {
    let pipeline = Pipeline::compile(config).map_err(|problems| Error::Compile(problems.join("\n")))?;
    let pipeline = Arc::new(pipeline);
    let location = crate::storage::open(&config.checkpoint_location)?;
    let tables = open(config, &pipeline).await?;
    let (query_id, mut markers) = find(config, &pipeline, &tables)?;
    let checkpoint = Checkpoint::rebuild(location, &config.name, query_id).await?;

    let newest = markers.values().map(|marker| marker.batch).max().unwrap_or_default();
    let (last, last_plan) = progress_of(&checkpoint, query_id, &tables, &markers, newest)?;
    check_tables(config, &pipeline, query_id, &tables, &markers, &last_plan)?;
    markers.retain(|name, _| last_plan.plan.tables.contains_key(name));
    let partly = last_plan.plan.tables.keys().any(|name| markers.get(name).is_none_or(|m| m.batch != newest));
    let base = match (partly, newest.checked_sub(1)) {
        (false, _) => Some((last, last_plan.clone())),
        (true, None) => None,
        (true, Some(before)) => Some(progress_of(&checkpoint, query_id, &tables, &markers, before)?),
    };

    let mut rebuilt = Rebuilt {
        query_id,
        checkpoint: checkpoint.url().to_string(),
        committed: base.as_ref().map(|(_, plan)| plan.plan.batch),
        pending: partly.then_some(newest),
        windows: Vec::new(),
    };
    if let Some((progress, logged)) = base {
        let mut state = Vec::new();
        let mut reread = None;
        if !pipeline.windows.is_empty() {
            let reopening = Reopening {
                config,
                pipeline: &pipeline,
                checkpoint: &checkpoint,
                query_id,
                tables: &tables,
                logged: &logged,
                progress: &progress,
                drop_open_windows,
            };
            let open = reopening.run().await?;
            rebuilt.windows = open.windows;
            state = open.files;
            reread = Some(Reread::after(progress.reread_from, &logged.plan, progress.event_times.latest_ms()));
        }
        let snapshot_of = |name: &String| tables.get(name)?.snapshot_of(query_id, logged.plan.batch);
        let snapshots = logged.plan.tables.keys().map(|name| (name.clone(), snapshot_of(name))).collect();
        checkpoint.restore_plan(&logged).await?;
        let queries = pipeline.queries.iter().map(|q| (q.table(), q.state_definition()));
        let entry = CommitEntry {
            batch: logged.plan.batch,
            epoch: logged.plan.epoch,
            plan_digest: logged.digest,
            watermark_next_ms: progress.watermark_next_ms,
            event_times: progress.event_times,
            reread,
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

pub(super) fn refused(problem: impl Into<String>) -> Error {
    Error::NotRebuilt(problem.into())
}

async fn open(config: &Config, pipeline: &Pipeline) -> Result<Tables, Error> {
    let mut tables = Tables::new();
    for spec in &pipeline.tables {
        if let Some(table) = PinnedTable::open(&config.catalog, &spec.name).await? {
            tables.insert(spec.name.clone(), table);
        }
    }
    Ok(tables)
}

/// The one query of this pipeline that has written to its tables.
fn find(config: &Config, pipeline: &Pipeline, tables: &Tables) -> Result<(Uuid, Markers), Error> {
    let mut queries: BTreeMap<Uuid, Markers> = BTreeMap::new();
    let mut seen = String::new();
    for spec in &pipeline.tables {
        let Some(table) = tables.get(&spec.name) else {
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
                queries.entry(id).or_default().insert(spec.name.clone(), marker);
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
    tables: &Tables,
    markers: &Markers,
    batch: BatchId,
) -> Result<(Progress, LoggedPlan), Error> {
    let mut said: Option<(&str, &Marker, Progress, LoggedPlan)> = None;
    for (name, marker) in markers.iter().filter(|(_, marker)| marker.batch == batch) {
        let Some(json) = tables.get(name).and_then(|table| table.property(query_id, &property(query_id))) else {
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
    let (_, _, progress, logged) = said.ok_or_else(|| refused(format!("no table says how far batch {batch} was")))?;
    Ok((progress, logged))
}

/// Every table of the last batch has to be there, be the same one, and have that batch or the one before it.
fn check_tables(
    config: &Config,
    pipeline: &Pipeline,
    query_id: Uuid,
    tables: &Tables,
    markers: &Markers,
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
        let Some(table) = tables.get(name) else {
            return Err(refused(format!("table {name}, which batch {newest} was planned for, is gone")));
        };
        if table.uuid() != *then {
            return Err(Error::TableRecreated { table: name.clone(), then: *then, now: table.uuid(), batch: newest });
        }
        let has = markers.get(name).map(|marker| marker.batch);
        if has.map_or(newest > 0, |has| has + 1 < newest) {
            let has = has.map_or("no batch".to_string(), |batch| format!("batch {batch}"));
            return Err(refused(format!(
                "table {name} has {has} of query {query_id}, others have batch {newest}: rows in between are missing from it. \
                 Restore the newest catalog"
            )));
        }
    }
    let executed_with = markers.values().find(|m| m.batch == newest).and_then(|m| m.plan.split_once('+'));
    let fingerprint = executed_with.map_or(last.plan.config_fingerprint.as_str(), |(_, fingerprint)| fingerprint);
    if fingerprint != config.fingerprint {
        return Err(refused(format!(
            "batch {newest} was executed with another configuration: schema, transform, event time, windows or tables have \
             changed since. Recover with the configuration of that batch, change it afterwards"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{MicroBatch, OffsetRange, TopicPartition};
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
            reread_from: (0..1000).map(|n| (partition(n), 900_000_000 + odd(n, 1_000_000_000))).collect(),
            dead_letter_topic: None,
        };
        let (json, property) = (serde_json::to_string(&progress).unwrap(), progress.to_property().unwrap());
        assert_eq!(Progress::of_property(&property).unwrap(), progress);
        assert_eq!(Progress::of_property(&json).unwrap(), progress);
        println!("{} bytes, of {} in JSON", property.len(), json.len());
        assert!(property.len() < 64 << 10, "{} bytes, of {} in JSON", property.len(), json.len());
    }
}
