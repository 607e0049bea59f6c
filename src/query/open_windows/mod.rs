//! The windows that were open after a batch, aggregated again for a checkpoint that is rebuilt.
//!
//! Owns: by which road each table's windows come back: from the table of rows or, where there is none that can serve, from Kafka;
//! or that they are given up. Does not own: which batch that is ([`super::rebuild`]), how records become rows and rows groups
//! ([`crate::execute`], [`crate::state`]). Invariants: a road is either exact or not taken; memory is bounded whatever there is to
//! read, since partial aggregates go to the checkpoint as they grow.
//!
//! The open windows after a batch are exactly its rows, and those of all batches before, in windows that end beyond the batch's
//! watermark: such a window was open all along, so no row was late for it. Both roads give these rows: those below the offsets
//! at which the batch ended, less those that were refused when they were read. For that depends on more than the record (the
//! clock, what the schema registry knew, the configuration then), and what `floe dlq retry` made of them since is in the table of
//! rows but was never in a window: the dead letters tell. Of sessions this does not hold: a row that came after its
//! session was closed began another one, so that batches matter, and nobody remembers their bounds.

mod kafka;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::blocking;
use super::rebuild::{Progress, Tables, property, refused};
use crate::batch::{MicroBatch, OffsetRange, Ranges, TopicPartition};
use crate::checkpoint::{Checkpoint, LoggedPlan, StateFile, StateKind};
use crate::config::Config;
use crate::dead_letter::Reason;
use crate::dead_letter::letters::Selection;
use crate::dead_letter::retry::{self, Places};
use crate::error::Error;
use crate::pipeline::{MessageType, Pipeline};
use crate::sink::iceberg::{Datum, PinnedTable, Reference};
use crate::state::{Lane, StateStore, WindowQuery};
use crate::telemetry::rfc3339;
use crate::window;
use kafka::Kafka;

/// More partitions than this are not listed.
const LISTED: usize = 8;

/// How the windows of a table have come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reopened {
    pub table: String,
    pub road: Road,
    /// At most, where there is more than one state file.
    pub groups: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Road {
    /// None of them was open.
    Nothing,
    Rows {
        table: String,
        rows: u64,
    },
    Kafka {
        records: u64,
        read: Ranges,
    },
    /// They are given up.
    Dropped {
        lost: String,
    },
}

impl fmt::Display for Reopened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Reopened { table, road, groups } = self;
        match road {
            Road::Nothing => write!(f, "{table}: none"),
            Road::Rows { table: from, rows } => {
                write!(f, "{table}: {groups} groups, aggregated again from {rows} rows of {from}")
            }
            Road::Kafka { records, read } => {
                write!(f, "{table}: {groups} groups, aggregated again from {records} records of Kafka, ")?;
                ranges_text(f, read)
            }
            Road::Dropped { lost } => write!(f, "{table}: dropped: {lost}"),
        }
    }
}

fn ranges_text(f: &mut fmt::Formatter<'_>, ranges: &Ranges) -> fmt::Result {
    let read: Vec<_> = ranges.iter().filter(|(_, range)| !range.is_empty()).collect();
    if read.len() > LISTED {
        let offsets: u64 = read.iter().map(|(_, range)| range.len()).sum();
        return write!(f, "{offsets} offsets of {} partitions", read.len());
    }
    let one = |(tp, range): &(&TopicPartition, &OffsetRange)| format!("{tp} [{}, {})", range.start, range.end);
    write!(f, "offsets {}", read.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// The state that was rebuilt.
pub(super) struct OpenWindows {
    pub files: Vec<StateFile>,
    /// In the order of the configuration.
    pub windows: Vec<Reopened>,
}

/// What it is rebuilt with.
pub(super) struct Reopening<'a> {
    pub config: &'a Config,
    pub pipeline: &'a Arc<Pipeline>,
    pub checkpoint: &'a Checkpoint,
    pub query_id: Uuid,
    pub tables: &'a Tables,
    /// The batch after which the windows were open, and what the tables say of it.
    pub logged: &'a LoggedPlan,
    pub progress: &'a Progress,
    /// Windows that cannot be rebuilt are given up.
    pub drop_open_windows: bool,
}

impl Reopening<'_> {
    /// Puts the state of the open windows into the checkpoint; after a failure nothing of it stays there.
    pub async fn run(&self) -> Result<OpenWindows, Error> {
        let mut deltas = Deltas {
            checkpoint: self.checkpoint,
            pipeline: self.pipeline,
            plan: &self.logged.plan,
            budget: self.config.state.memory_budget_bytes / 4,
            lanes: Vec::new(),
            files: Vec::new(),
            groups: vec![0; self.pipeline.queries.len()],
        };
        let roads = self.aggregate(&mut deltas).await;
        let Deltas { files, groups, .. } = deltas;
        match roads {
            Ok(roads) => {
                let names = self.pipeline.queries.iter().map(|query| query.table().to_string());
                let windows = names.zip(roads).zip(groups);
                let windows = windows.map(|((table, road), groups)| Reopened { table, road, groups }).collect();
                Ok(OpenWindows { files, windows })
            }
            Err(e) => {
                if let Err(left) = self.checkpoint.remove_state(&files).await {
                    tracing::error!(error = %left, "state of a rebuilding that failed stays behind; delete it");
                }
                Err(e)
            }
        }
    }

    /// By query.
    async fn aggregate(&self, deltas: &mut Deltas<'_>) -> Result<Vec<Road>, Error> {
        let queries = &self.pipeline.queries;
        let mut roads: Vec<Road> = queries.iter().map(|_| Road::Nothing).collect();
        if !queries.iter().any(|query| self.any_open(query)) {
            return Ok(roads);
        }
        let letters = Letters::read(self).await?;
        let mut rows_tables = Vec::new();
        // By query, why not from the table of rows.
        let mut from_kafka: BTreeMap<usize, String> = BTreeMap::new();
        let mut given_up: BTreeMap<usize, String> = BTreeMap::new();
        for of in self.pipeline.types.iter() {
            let open = of.queries.iter().copied().filter(|&q| queries.get(q).is_some_and(|q| self.any_open(q)));
            let (sessions, open): (Vec<usize>, Vec<usize>) =
                open.partition(|&q| queries.get(q).is_some_and(WindowQuery::is_session));
            let why = "which rows are of sessions that were still open depends on the batches that they came in";
            given_up.extend(sessions.into_iter().map(|query| (query, why.to_string())));
            if open.is_empty() {
                continue;
            }
            match self.rows_table(of, &letters)? {
                Ok(table) => rows_tables.push((of, table, open)),
                Err(why) => from_kafka.extend(open.into_iter().map(|query| (query, why.clone()))),
            }
        }
        let mut kafka = None;
        if !from_kafka.is_empty() {
            match Kafka::open(self).await? {
                Ok(opened) => kafka = Some(opened),
                Err(why) => {
                    let why_not = |(query, rows): (usize, String)| (query, format!("{rows}; {why}"));
                    given_up.extend(std::mem::take(&mut from_kafka).into_iter().map(why_not));
                }
            }
        }
        if !given_up.is_empty() && !self.drop_open_windows {
            return Err(self.refuse(&given_up));
        }

        for (of, table, active) in rows_tables {
            let rows = self.read_rows(of, table, active.clone().into(), &letters.refused, deltas).await?;
            for query in active {
                set(&mut roads, query, Road::Rows { table: table.name(), rows });
            }
        }
        if let Some(kafka) = kafka {
            let read = kafka.ranges.clone();
            let records = kafka.read(self, from_kafka.keys().copied().collect(), letters, deltas).await?;
            for query in from_kafka.into_keys() {
                set(&mut roads, query, Road::Kafka { records, read: read.clone() });
            }
        }
        for query in given_up.into_keys() {
            let lost = queries.get(query).map(|query| self.lost(query)).unwrap_or_default();
            set(&mut roads, query, Road::Dropped { lost });
        }
        deltas.flush().await?;
        Ok(roads)
    }

    /// Whether a window of the query may have been open.
    fn any_open(&self, query: &WindowQuery) -> bool {
        // Known to the millisecond, rounded down.
        let latest_us = self.progress.event_times.latest_ms().map(|ms| ms.saturating_mul(1000).saturating_add(999));
        let evict_ms = self.logged.plan.watermarks.evict();
        latest_us.is_some_and(|us| !window::closed(query.windowing().last_end(us), evict_ms))
    }

    fn refuse(&self, given_up: &BTreeMap<usize, String>) -> Error {
        let mut text = "windows that were open cannot be rebuilt:".to_string();
        for (query, why) in given_up {
            let Some(query) = self.pipeline.queries.get(*query) else { continue };
            text.push_str(&format!("\n  {}: {why}. Without them {}", query.table(), self.lost(query)));
        }
        text.push_str(
            "\nNothing was changed. With --drop-open-windows the checkpoint is rebuilt without these windows",
        );
        refused(text)
    }

    /// What there is not in the table in the end.
    fn lost(&self, query: &WindowQuery) -> String {
        let MicroBatch { batch, watermarks, .. } = &self.logged.plan;
        let which = match watermarks.evict_ms {
            Some(ms) => format!("that end after {}", rfc3339(ms)),
            None => "of all times".to_string(),
        };
        let latest = self.progress.event_times.latest_ms().map_or("the latest".to_string(), rfc3339);
        if query.is_session() {
            return format!("sessions {which} lack their rows up to batch {batch}: event times up to {latest}");
        }
        let first = watermarks.evict_ms.and_then(|ms| {
            let starts = query.windowing().covering(ms.saturating_mul(1000)).starts;
            starts.last().map(|us| rfc3339(us.div_euclid(1000)))
        });
        let first = first.map_or("the earliest".to_string(), |first| first);
        format!("windows {which} lack their rows up to batch {batch}: event times from {first} to {latest}")
    }

    /// The rows of a message type, if they are all there and nobody else's, or why they cannot serve.
    fn rows_table(&self, of: &MessageType, letters: &Letters) -> Result<Result<&PinnedTable, String>, Error> {
        let Some(rows) = of.rows else {
            return Ok(Err("there is no table of rows".into()));
        };
        let name = &self.pipeline.tables[rows].name;
        if !of.provenance {
            return Ok(Err(format!("{name} does not say where its rows came from (provenance = false)")));
        }
        let table = self.tables.get(name).ok_or_else(|| refused(format!("table {name} is gone")))?;
        if let Some((id, other)) = table.markers().into_iter().find(|(id, _)| *id != self.query_id) {
            let pipeline = &other.pipeline;
            return Ok(Err(format!(
                "pipeline {pipeline:?} (query {id}) writes to {name} as well: whose row is whose is not known"
            )));
        }
        if let Some(other) = &letters.shared_with {
            let letters = &self.config.dead_letters.table;
            return Ok(Err(format!(
                "query {other} reads the same topic and writes to {letters} as well: whose letter is whose is not known"
            )));
        }
        Ok(Ok(table))
    }
}

fn set(roads: &mut [Road], query: usize, road: Road) {
    if let Some(of) = roads.get_mut(query) {
        *of = road;
    }
}

/// Partial aggregates on their way into state files.
struct Deltas<'a> {
    checkpoint: &'a Checkpoint,
    pipeline: &'a Pipeline,
    plan: &'a MicroBatch,
    /// Bytes of lanes that are held before they become a file.
    budget: u64,
    lanes: Vec<Lane>,
    files: Vec<StateFile>,
    /// By query.
    groups: Vec<u64>,
}

impl Deltas<'_> {
    async fn take(&mut self, lanes: Vec<Lane>) -> Result<(), Error> {
        self.lanes.extend(lanes);
        if self.lanes.iter().map(|lane| lane.bytes() as u64).sum::<u64>() > self.budget {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let lanes = std::mem::take(&mut self.lanes);
        let (evict_ms, workers) = (self.plan.watermarks.evict(), self.pipeline.workers);
        let mut state = StateStore::new(self.pipeline.queries.clone());
        let delta = blocking(move || Ok(state.merge_lanes(lanes, evict_ms, workers)?)).await?;
        if delta.groups == 0 {
            return Ok(());
        }
        for (query, groups) in self.groups.iter_mut().enumerate() {
            *groups += delta.groups_of(query);
        }
        let (crc32, end) = (delta.crc32(), delta.max_window_end_us);
        let (batch, attempt) = (self.plan.batch, Uuid::new_v4());
        let put = self.checkpoint.put_state(batch, attempt, StateKind::Delta, delta.bytes, crc32, end);
        self.files.push(put.await?);
        Ok(())
    }
}

/// Records that were refused when they were read.
struct Letters {
    refused: Places,
    /// Another query that reads one of the same topics and has its letters in the same table. Then only those count here that no
    /// second reading would refuse again.
    shared_with: Option<Uuid>,
}

impl Letters {
    async fn read(of: &Reopening<'_>) -> Result<Letters, Error> {
        let config = of.config;
        let Some(table) = of.tables.get(&config.dead_letters.table) else {
            return Ok(Letters { refused: Places::new(), shared_with: None });
        };
        let topics = |progress: &str| -> Option<BTreeSet<Arc<str>>> {
            let progress = Progress::of_property(progress).ok()?;
            let plan = of.checkpoint.decode_plan(progress.plan).ok()?.plan;
            Some(plan.ranges.into_keys().map(|tp| tp.topic).collect())
        };
        let ours: BTreeSet<Arc<str>> = of.logged.plan.ranges.keys().map(|tp| tp.topic.clone()).collect();
        let reads_the_same = |id: &Uuid| {
            // From one that does not say what it reads anything may be.
            table.property(*id, &property(*id)).and_then(topics).is_none_or(|theirs| !theirs.is_disjoint(&ours))
        };
        let others = table.markers().into_iter().map(|(id, _)| id).filter(|id| *id != of.query_id);
        let shared_with = others.into_iter().find(reads_the_same);
        let mut selection = Selection::default();
        if shared_with.is_some() {
            selection.reasons = vec![Reason::FutureEventTime, Reason::UnknownSchemaId];
        }
        let mut filter = retry::of_topics(config, selection.predicate());
        // No record before is in an open window.
        if let Some(first) = of.progress.reread_from.values().min() {
            filter = filter.and(Reference::new("offset").greater_than_or_equal_to(Datum::long(*first)));
        }
        let refused_then = retry::places_of_letters(table, filter)
            .await
            .map_err(|e| refused(format!("cannot read the dead letters: {e}")))?;
        Ok(Letters { refused: refused_then, shared_with })
    }
}
