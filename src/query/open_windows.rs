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

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::{cast, filter_record_batch};
use arrow::datatypes::{DataType, Int32Type, Int64Type, Schema, SchemaRef};
use futures::TryStreamExt;
use uuid::Uuid;

use super::blocking;
use super::rebuild::{Progress, property, refused};
use crate::batch::{self, Limits, MicroBatch, OffsetRange, Offsets, Ranges, TopicPartition};
use crate::checkpoint::{Checkpoint, LoggedPlan, StateFile, StateKind};
use crate::config::Config;
use crate::dead_letter::Reason;
use crate::dead_letter::letters::Selection;
use crate::dead_letter::retry::{self, PLACE, Places};
use crate::decode::registry::BatchRegistry;
use crate::error::Error;
use crate::execute;
use crate::pipeline::{MessageType, Pipeline};
use crate::sink::iceberg::{Datum, PinnedTable, Predicate, Reference};
use crate::source::Source;
use crate::source::kafka::{ChunkSettings, KafkaSource, QueryNames};
use crate::state::{Lane, StateStore, WindowQuery};
use crate::telemetry::rfc3339;
use crate::window;

/// Days of a time zone may be longer than their size says.
const SLACK_US: i64 = 24 * 3_600_000_000;
/// Columns of a rows table that no window reads.
const PROVENANCE: [&str; 4] = ["_kafka_topic", "_kafka_partition", "_kafka_offset", "_kafka_timestamp"];
const SCAN_ROWS: usize = 64 * 1024;
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
            match self.rows_table(of, &letters).await? {
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
            let rows = self.read_rows(of, &table, active.clone().into(), &letters.refused, deltas).await?;
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
    async fn rows_table(&self, of: &MessageType, letters: &Letters) -> Result<Result<PinnedTable, String>, Error> {
        let Some(rows) = of.rows else {
            return Ok(Err("there is no table of rows".into()));
        };
        let name = &self.pipeline.tables[rows].name;
        if !of.provenance {
            return Ok(Err(format!("{name} does not say where its rows came from (provenance = false)")));
        }
        let table = PinnedTable::open(&self.config.catalog, name).await?;
        let table = table.ok_or_else(|| refused(format!("table {name} is gone")))?;
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

    /// How many rows there were.
    async fn read_rows(
        &self,
        of: &MessageType,
        table: &PinnedTable,
        active: Arc<[usize]>,
        refused_once: &Places,
        deltas: &mut Deltas<'_>,
    ) -> Result<u64, Error> {
        let kept = Kept { ends: self.logged.plan.ends(), refused_once };
        let evict_ms = self.logged.plan.watermarks.evict();
        let columns = columns_of(of);
        let names: Vec<&str> = columns.fields().iter().map(|f| f.name().as_str()).chain(PLACE).collect();
        let mut scan = table.scan(&names, not_before(self.pipeline, of, &columns, evict_ms), SCAN_ROWS).await?;
        let event_time = of.event_time.unwrap_or_default();
        let empty = || Lane::new(self.pipeline.queries.clone(), active.clone(), event_time, evict_ms);
        let (mut lane, mut rows) = (empty(), 0);
        while let Some(batch) = scan.try_next().await? {
            let batch = kept.of(&batch, &columns)?;
            rows += batch.num_rows() as u64;
            lane = blocking(move || {
                lane.update(&batch)?;
                Ok(lane)
            })
            .await?;
            if lane.bytes() as u64 > deltas.budget {
                deltas.take(vec![std::mem::replace(&mut lane, empty())]).await?;
            }
        }
        deltas.take(vec![lane]).await?;
        Ok(rows)
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
        let Some(table) = PinnedTable::open(&config.catalog, &config.dead_letters.table).await? else {
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
        let refused_then = retry::places_of_letters(&table, filter)
            .await
            .map_err(|e| refused(format!("cannot read the dead letters: {e}")))?;
        Ok(Letters { refused: refused_then, shared_with })
    }
}

/// The records of Kafka that open windows may have been aggregated from.
struct Kafka {
    source: KafkaSource,
    ranges: Ranges,
}

impl Kafka {
    /// Or why the records are not to be had any more.
    async fn open(of: &Reopening<'_>) -> Result<Result<Kafka, String>, Error> {
        let plan = &of.logged.plan;
        let from = &of.progress.reread_from;
        if from.is_empty() {
            let why = "from which offsets Kafka would have to be read is not known: the batches were written by a version of Floe \
                       that did not keep it, or a topic was truncated meanwhile";
            return Ok(Err(why.into()));
        }
        let config = of.config;
        let chunks = ChunkSettings::with_buffer(config.execution.buffer_bytes);
        let (settings, names) = (config.source.clone(), QueryNames::of(&config.name));
        let (source, available) = blocking(move || {
            let mut source = KafkaSource::new(&settings, names, chunks)?;
            let available = source.available()?;
            Ok((source, available))
        })
        .await?;
        for (topic, then) in &plan.topic_ids {
            if let Some(now) = available.topic_ids.get(topic).filter(|now| *now != then) {
                return Ok(Err(format!("topic {topic} was deleted and created again (id {then} then, {now} now)")));
            }
        }
        let mut ranges = Ranges::new();
        let mut missing = Vec::new();
        for (tp, range) in &plan.ranges {
            let wanted = OffsetRange { start: from.get(tp).copied().unwrap_or(range.start), end: range.end };
            let OffsetRange { start, end } = wanted;
            match available.partitions.get(tp) {
                Some(there) if wanted.is_empty() || there.start <= start && end <= there.end => {}
                Some(there) => {
                    missing.push(format!("{tp} [{start}, {end}), of which there are [{}, {})", there.start, there.end))
                }
                None if wanted.is_empty() => continue,
                None => missing.push(format!("{tp} [{start}, {end}), of a partition that is gone")),
            }
            ranges.insert(tp.clone(), wanted);
        }
        if missing.is_empty() {
            return Ok(Ok(Kafka { source, ranges }));
        }
        let more = missing.len().saturating_sub(LISTED);
        missing.truncate(LISTED);
        let more = if more > 0 { format!(" and {more} more partitions") } else { String::new() };
        Ok(Err(format!("Kafka no longer has all of the offsets that are needed: {}{more}", missing.join("; "))))
    }

    /// Reads them as batches are read, with the same limits, and gives how many there were.
    async fn read(
        mut self,
        of: &Reopening<'_>,
        active: BTreeSet<usize>,
        letters: Letters,
        deltas: &mut Deltas<'_>,
    ) -> Result<u64, Error> {
        let mut pipeline = Pipeline::compile(of.config).map_err(|problems| Error::Compile(problems.join("\n")))?;
        for message_type in &mut pipeline.types {
            message_type.rows = None;
            message_type.queries = message_type.queries.iter().copied().filter(|q| active.contains(q)).collect();
        }
        pipeline.late_rows.fill(None);
        let registry = pipeline.registry.clone().map(|registry| Arc::new(BatchRegistry::new(registry, None)));
        let (pipeline, refused_then) = (Arc::new(pipeline), Arc::new(letters.refused));
        let mut starts: Offsets = self.ranges.iter().map(|(tp, range)| (tp.clone(), range.start)).collect();
        let (mut records, mut bytes) = (0, 0);
        loop {
            let limits = Limits {
                max_offsets: of.config.source.max_offsets_per_trigger,
                max_bytes: of.config.source.max_bytes_per_trigger,
                bytes_per_record: (records > 0).then(|| bytes as f64 / records as f64),
            };
            let ranges = batch::plan_ranges(&starts, &self.ranges, &limits)?;
            // Whatever the clock refused then is among the letters; and only what is still open is in time.
            let evict_ms = of.logged.plan.watermarks.evict_ms;
            let slice = MicroBatch {
                ranges,
                gaps: Vec::new(),
                trigger_time_ms: i64::MAX,
                watermarks: batch::Watermarks { late_ms: evict_ms, evict_ms },
                ..of.logged.plan.clone()
            };
            if slice.is_no_data() {
                return Ok(records);
            }
            starts = slice.ends();
            let (pipeline, registry, without) = (pipeline.clone(), registry.clone(), refused_then.clone());
            let mut source = self.source;
            let (back, lanes, counts) = blocking(move || {
                let chunks = source.read(&slice.ranges)?;
                let never = AtomicBool::new(false);
                let (lanes, counts) = execute::aggregate(&pipeline, &slice, registry, chunks, &without, &never)?;
                Ok((source, lanes, counts))
            })
            .await?;
            self.source = back;
            records += counts.records;
            bytes += counts.bytes;
            tracing::info!(records, "records read again");
            deltas.take(lanes).await?;
        }
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
    let zoned = matches!(field.data_type(), DataType::Timestamp(_, Some(_)));
    let from = if zoned { Datum::timestamptz_micros(from_us) } else { Datum::timestamp_micros(from_us) };
    Some(Reference::new(field.name()).greater_than_or_equal_to(from))
}

/// Which rows the batches up to one have brought.
struct Kept<'a> {
    ends: Offsets,
    /// A row at the offset of a dead letter is one that was tried again: no window has seen it.
    refused_once: &'a Places,
}

impl Kept<'_> {
    fn of(&self, batch: &RecordBatch, columns: &SchemaRef) -> Result<RecordBatch, Error> {
        let strange = |what: &str| refused(format!("the rows table is not as Floe writes it: {what}"));
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| strange(&format!("no column {name}")));
        let [topic, partition, offset] = PLACE;
        let topics = cast(column(topic)?, &DataType::Utf8).map_err(|e| strange(&e.to_string()))?;
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
