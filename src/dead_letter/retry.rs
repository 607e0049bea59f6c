//! `floe dlq retry`: letters go once more through the pipeline as it is now, and those that pass become rows.
//!
//! Owns: which letters are still to be done, and the one commit that does them. Does not own: deciding what is valid
//! ([`execute::admit`]). No state of its own: a letter is done when its topic, partition and offset are in the rows table,
//! and the rows of a run appear in one commit that is conditional on the table being the one that was looked at. So a run
//! that is killed has done all or nothing, and two at a time, or a query that commits meanwhile, double nothing.
//! Where letters can go to several tables, a commit to one of them says nothing about the others: there a run first claims
//! all of them, each with a snapshot without rows, and whoever finds another's claim in front of its own does not commit.
//! Windows never see these rows: they are late for them, and counted as such.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::AsArray;
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::record_batch::RecordBatch;
use futures::TryStreamExt;
use futures::future::try_join_all;
use uuid::Uuid;

use super::letters::{self, Letters, Selection};
use crate::checkpoint::Checkpoint;
use crate::clock;
use crate::config::Config;
use crate::decode::RecordDecoder;
use crate::decode::registry::BatchRegistry;
use crate::decode::route::Split;
use crate::error::Error as QueryError;
use crate::execute::{self, Admitted};
use crate::failpoint;
use crate::pipeline::{MessageType, Pipeline};
use crate::retry::{Strategy, random};
use crate::sink;
use crate::sink::iceberg::{
    Append, DataFile, Datum, IcebergSink, PinnedTable, Predicate, Reference, Rows, TableWriter,
};
use crate::source::Chunk;
use crate::window;

/// How often another writer may be faster.
const ATTEMPTS: u32 = 40;
const BACKOFF: Strategy = Strategy::Exponential { initial: Duration::from_millis(10), max: Duration::from_secs(1) };
/// A chunk is cut when it has so many bytes.
const CHUNK_BYTES: usize = 16 << 20;
pub const PLACE: [&str; 3] = ["_kafka_topic", "_kafka_partition", "_kafka_offset"];
const PLACE_ROWS: usize = 16 * 1024;
/// The summary entry of a snapshot by which one run of `retry` claims a table.
const CLAIM: &str = "floe.retry-claim";
/// What letters are counted under whose message type has no table of rows.
const NO_TABLE: &str = "no_rows_table";
/// Up to so many offsets of a topic are looked for by name, more by their range.
const NAMED_OFFSETS: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Failed(#[from] QueryError),
}

impl From<sink::Error> for Error {
    fn from(error: sink::Error) -> Self {
        Error::Failed(error.into())
    }
}

/// What became of the letters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Records among the selected letters, each place in Kafka once.
    pub letters: u64,
    /// Done before: their places are in the rows table.
    pub already: u64,
    /// New rows.
    pub rows: u64,
    /// Left out by `transform.filter` or an expectation that drops.
    pub filtered: u64,
    /// Still refused, by reason code.
    pub failed: BTreeMap<String, u64>,
    /// New rows that the windows will not count, by window table.
    pub late: Vec<Late>,
    /// The snapshots with the new rows, by table; none in a dry run and where there were none.
    pub snapshots: Vec<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Late {
    pub table: String,
    /// How often a row missed a window that is closed, and written.
    pub closed: u64,
    /// How often one missed a window that is still open.
    pub open: u64,
}

impl Report {
    /// With what another message type adds. What was there before is the same for all of them.
    fn and(mut self, other: Report) -> Report {
        self.rows += other.rows;
        self.filtered += other.filtered;
        for (reason, count) in other.failed {
            *self.failed.entry(reason).or_default() += count;
        }
        for (late, other) in self.late.iter_mut().zip(other.late) {
            late.closed += other.closed;
            late.open += other.open;
        }
        self.snapshots.extend(other.snapshots);
        self
    }
}

/// Offsets by topic and partition.
pub type Places = BTreeMap<(String, i32), BTreeSet<i64>>;

fn count(places: &Places) -> u64 {
    places.values().map(|offsets| offsets.len() as u64).sum()
}

/// Runs the selected letters of the pipeline's topics through it, one message type after another: each has a rows table of
/// its own. A dry run writes nothing.
pub async fn retry(config: &Config, selection: &Selection, dry_run: bool) -> Result<Report, Error> {
    let pipeline = Pipeline::compile(config).map_err(|problems| QueryError::Compile(problems.join("\n")))?;
    let pipeline = Arc::new(pipeline);
    let without_provenance =
        "whether a letter is done shows in the _kafka_ columns of the rows table, which are missing";
    let mut targets = Vec::new();
    let mut specs = Vec::new();
    for (of, message_type) in pipeline.types.iter().enumerate() {
        let Some(spec) = message_type.rows.map(|rows| pipeline.tables[rows].clone()) else { continue };
        if !message_type.provenance {
            return Err(Error::Refused(format!(
                "table {} is written with provenance = false: {without_provenance}, so that letters could be doubled. Retry \
                 needs provenance = true",
                spec.name
            )));
        }
        let rows = open(config, &spec.name).await?;
        if let Some(column) = PLACE.iter().find(|column| !rows.has_column(column)) {
            return Err(Error::Refused(format!("table {} has no column {column}: {without_provenance}", spec.name)));
        }
        targets.push(Target { of, rows });
        specs.push(spec);
    }
    if targets.is_empty() {
        return Err(Error::Refused("the pipeline has no table of rows that retried letters could go to".into()));
    }
    let dead_letters = open(config, &config.dead_letters.table).await?;
    // A dry run does not even bring the tables in line with the pipeline.
    let sink = match dry_run {
        true => None,
        false => Some(IcebergSink::open(&config.catalog, Uuid::new_v4(), &config.name, &specs).await?),
    };
    let filter = of_topics(config, selection.predicate());
    let watermark_ms = watermark(config).await?;
    let letters = places_of_letters(&dead_letters, filter.clone()).await?;
    let run = Uuid::new_v4().to_string();
    let mut attempt = Attempt { run, claimed: false, pipeline, dead_letters, filter, letters, targets, watermark_ms };
    let mut report: Option<Report> = None;
    for target in 0..attempt.targets.len() {
        let mut tries = 0;
        let of_target = loop {
            if let Some(report) = attempt.run(sink.as_ref(), target, &mut tries).await? {
                break report;
            }
        };
        report = Some(match report {
            None => of_target,
            Some(before) => before.and(of_target),
        });
    }
    Ok(report.unwrap_or_default())
}

/// A table of rows, and the message type that it is of.
struct Target {
    of: usize,
    rows: PinnedTable,
}

async fn open(config: &Config, table: &str) -> Result<PinnedTable, Error> {
    PinnedTable::open(&config.catalog, table)
        .await?
        .ok_or_else(|| Error::Refused(format!("there is no table {table} yet: the pipeline has not run")))
}

/// Other pipelines may share the table; their topics are theirs.
pub fn of_topics(config: &Config, selected: Option<Predicate>) -> Predicate {
    let topics = Reference::new("topic").is_in(config.source.topics.iter().map(Datum::string));
    match selected {
        Some(selected) => selected.and(topics),
        None => topics,
    }
}

/// The watermark after the last committed batch; none where there is no checkpoint or no batch.
async fn watermark(config: &Config) -> Result<Option<i64>, Error> {
    let location = crate::storage::open(&config.checkpoint_location).map_err(QueryError::from)?;
    if Checkpoint::inspect(location.clone()).await.map_err(QueryError::from)?.is_none() {
        return Ok(None);
    }
    let checkpoint = Checkpoint::open(location, &config.name).await.map_err(QueryError::from)?;
    let recovered = checkpoint.recover().await.map_err(QueryError::from)?;
    Ok(recovered.commit.and_then(|commit| commit.watermark_next_ms))
}

pub async fn places_of_letters(table: &PinnedTable, filter: Predicate) -> Result<Places, Error> {
    let columns = ["reason", "topic", "partition", "offset", "end_offset"];
    let mut rows = table.scan(&columns, Some(filter), PLACE_ROWS).await?;
    let mut places = Places::new();
    while let Some(batch) = rows.try_next().await? {
        for place in Letters::of(&batch)?.iter().filter_map(|letter| letter.place()) {
            insert(&mut places, place.topic, place.partition, place.offset);
        }
    }
    Ok(places)
}

fn insert(places: &mut Places, topic: &str, partition: i32, offset: i64) {
    places.entry((topic.to_string(), partition)).or_default().insert(offset);
}

/// True for the rows at these places, and perhaps for others.
fn around(places: &Places) -> Option<Predicate> {
    let mut topics: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for ((topic, _), offsets) in places {
        let of_topic = topics.entry(topic).or_default();
        if of_topic.len() <= NAMED_OFFSETS && offsets.len() <= NAMED_OFFSETS {
            of_topic.extend(offsets);
        } else {
            // Only the ends matter from here on.
            of_topic.extend(offsets.iter().take(NAMED_OFFSETS + 1));
            of_topic.extend(offsets.last());
        }
    }
    let of_topic = |(topic, offsets): (&str, BTreeSet<i64>)| {
        let (first, last) = (*offsets.first()?, *offsets.last()?);
        let offset = || Reference::new(PLACE[2]);
        let offsets = if offsets.len() <= NAMED_OFFSETS {
            offset().is_in(offsets.into_iter().map(Datum::long))
        } else {
            let not_before = offset().greater_than_or_equal_to(Datum::long(first));
            not_before.and(offset().less_than_or_equal_to(Datum::long(last)))
        };
        Some(Reference::new(PLACE[0]).equal_to(Datum::string(topic)).and(offsets))
    };
    topics.into_iter().filter_map(of_topic).reduce(Predicate::or)
}

/// Which of the places are among the rows.
async fn present(mut rows: Rows, among: &Places) -> Result<Places, Error> {
    let mut found = Places::new();
    while let Some(batch) = rows.try_next().await? {
        let columns = PLACE.map(|name| batch.column_by_name(name));
        let [Some(topics), Some(partitions), Some(offsets)] = columns else { continue };
        let (Some(topics), Some(partitions), Some(offsets)) = (
            topics.as_string_opt::<i32>(),
            partitions.as_primitive_opt::<Int32Type>(),
            offsets.as_primitive_opt::<Int64Type>(),
        ) else {
            return Err(Error::Refused(
                "the _kafka_ columns of the rows table are not of the types Floe gives them".into(),
            ));
        };
        // Rows of one partition follow each other.
        let mut partition_of: Option<(String, i32)> = None;
        let mut wanted = None;
        for row in 0..batch.num_rows() {
            let (topic, partition, offset) = (topics.value(row), partitions.value(row), offsets.value(row));
            if partition_of.as_ref().is_none_or(|(t, p)| t != topic || *p != partition) {
                wanted = among.get(partition_of.insert((topic.to_string(), partition)));
            }
            if wanted.is_some_and(|wanted: &BTreeSet<i64>| wanted.contains(&offset)) {
                insert(&mut found, topic, partition, offset);
            }
        }
    }
    Ok(found)
}

struct Attempt {
    /// What this run's claims go by.
    run: String,
    claimed: bool,
    pipeline: Arc<Pipeline>,
    dead_letters: PinnedTable,
    filter: Predicate,
    letters: Places,
    targets: Vec<Target>,
    watermark_ms: Option<i64>,
}

impl Attempt {
    async fn pin(&self, sink: Option<&IcebergSink>, target: usize) -> Result<PinnedTable, Error> {
        match sink {
            Some(sink) => Ok(sink.pin(target).await?),
            None => Ok(self.targets[target].rows.clone()),
        }
    }

    async fn pin_all(&self, sink: Option<&IcebergSink>) -> Result<Vec<PinnedTable>, Error> {
        try_join_all((0..self.targets.len()).map(|target| self.pin(sink, target))).await
    }

    /// Whether nobody has claimed the table since this run has.
    fn check_claim(&self, table: &PinnedTable) -> Result<(), Error> {
        if table.newest_summary(CLAIM) == Some(self.run.as_str()) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "another `floe dlq retry` has begun meanwhile and has taken over table {}: its types may be others, and so a letter \
             could become a row twice. What this run has committed stays; run it again once the other has ended",
            table.name()
        )))
    }

    /// Makes every run that has claimed these tables before find itself overtaken.
    async fn claim(&mut self, sink: &IcebergSink) -> Result<(), Error> {
        let summary = BTreeMap::from([(CLAIM.to_string(), self.run.clone())]);
        for target in 0..self.targets.len() {
            let mut tries = 0;
            while sink.append(target, &sink.pin(target).await?, &[], &summary).await? == Append::Conflict {
                overtaken(&self.targets[target].rows, &mut tries).await?;
            }
        }
        self.claimed = true;
        match failpoint::hit("dlq.claimed") {
            true => Err(QueryError::Internal("failpoint dlq.claimed".into()).into()),
            false => Ok(()),
        }
    }

    /// None: someone else has brought some of the letters into the table meanwhile; look again.
    async fn run(
        &mut self,
        sink: Option<&IcebergSink>,
        target: usize,
        tries: &mut u32,
    ) -> Result<Option<Report>, Error> {
        let bases = self.pin_all(sink).await?;
        // A letter may have become a row of another type, when types were told apart in another way.
        let mut found = Places::new();
        if let Some(filter) = around(&self.letters) {
            for table in &bases {
                let rows = table.scan(&PLACE, Some(filter.clone()), PLACE_ROWS).await?;
                for (partition, offsets) in present(rows, &self.letters).await? {
                    found.entry(partition).or_default().extend(offsets);
                }
            }
        }
        let mut todo = self.letters.clone();
        for (partition, done) in &found {
            if let Some(offsets) = todo.get_mut(partition) {
                offsets.retain(|offset| !done.contains(offset));
            }
        }
        let mut work = Work::new(self, sink, target, todo);
        work.report.letters = count(&self.letters);
        work.report.already = count(&found);
        if !work.todo.values().all(BTreeSet::is_empty) {
            let mut letters = letters::scan(&self.dead_letters, Some(self.filter.clone())).await?;
            while let Some(batch) = letters.try_next().await? {
                // Writing blocks.
                work = blocking(move || work.take(&batch).map(|()| work)).await?;
            }
        }
        let (mut report, written, files) = blocking(move || work.finish()).await?;
        let Some(sink) = sink.filter(|_| !files.is_empty()) else { return Ok(Some(report)) };
        if failpoint::hit("dlq.files_written") {
            return Err(QueryError::Internal("failpoint dlq.files_written".into()).into());
        }
        match self.commit(sink, target, bases, &files, &written, tries).await {
            Ok(Some(snapshot)) => {
                report.snapshots.push(snapshot);
                Ok(Some(report))
            }
            nothing_done @ (Ok(None) | Err(Error::Refused(_))) => {
                sink.discard(&files).await;
                nothing_done.map(|_| None)
            }
            Err(error) => Err(error),
        }
    }

    /// The snapshot with the new rows; none where some of the letters have become rows since `bases` were pinned.
    async fn commit(
        &mut self,
        sink: &IcebergSink,
        target: usize,
        mut bases: Vec<PinnedTable>,
        files: &[DataFile],
        written: &Places,
        tries: &mut u32,
    ) -> Result<Option<i64>, Error> {
        let mut summary = BTreeMap::from([
            ("floe.retry-of".to_string(), self.dead_letters.name()),
            ("floe.retry-letters".to_string(), count(written).to_string()),
        ]);
        let exclusive = self.targets.len() > 1;
        if exclusive {
            summary.insert(CLAIM.to_string(), self.run.clone());
            if !self.claimed {
                self.claim(sink).await?;
            }
            let now = self.pin_all(Some(sink)).await?;
            for (base, now) in bases.iter().zip(&now) {
                self.check_claim(now)?;
                if any_since(base, now, written).await? {
                    return Ok(None);
                }
            }
            bases = now;
        }
        let mut base = bases.swap_remove(target);
        loop {
            match sink.append(target, &base, files, &summary).await? {
                Append::Done { .. } if failpoint::hit("dlq.committed") => {
                    return Err(QueryError::Internal("failpoint dlq.committed".into()).into());
                }
                Append::Done { snapshot } => return Ok(Some(snapshot)),
                Append::Conflict => {
                    overtaken(&base, tries).await?;
                    let now = sink.pin(target).await?;
                    if exclusive {
                        self.check_claim(&now)?;
                    }
                    if any_since(&base, &now, written).await? {
                        return Ok(None);
                    }
                    base = now;
                }
            }
        }
    }
}

/// Whether some of the places have come into the table between two looks at it.
async fn any_since(base: &PinnedTable, now: &PinnedTable, places: &Places) -> Result<bool, Error> {
    let since = now.scan_since(base, &PLACE, around(places), PLACE_ROWS).await?;
    Ok(!present(since, places).await?.is_empty())
}

/// After a conflict: waits before the next try, if there is one.
async fn overtaken(table: &PinnedTable, tries: &mut u32) -> Result<(), Error> {
    if *tries == ATTEMPTS {
        let message =
            format!("other writers of {} were faster {ATTEMPTS} times; nothing was done, try again", table.name());
        return Err(Error::Refused(message));
    }
    tokio::time::sleep(BACKOFF.delay((*tries).min(6), random())).await;
    *tries += 1;
    Ok(())
}

/// Letters on their way to rows of one message type.
struct Work {
    pipeline: Arc<Pipeline>,
    of: usize,
    /// The first type also counts the letters that are of none.
    first: bool,
    decoder: RecordDecoder,
    /// None in a dry run.
    writer: Option<TableWriter>,
    now_ms: i64,
    watermark_ms: Option<i64>,
    todo: Places,
    written: Places,
    report: Report,
}

impl Work {
    fn new(attempt: &Attempt, sink: Option<&IcebergSink>, target: usize, todo: Places) -> Work {
        let pipeline = attempt.pipeline.clone();
        let of = attempt.targets[target].of;
        let registry = pipeline.registry.clone().map(|registry| BatchRegistry::new(registry, None));
        let late = |&table: &usize| Late { table: pipeline.tables[table].name.clone(), ..Late::default() };
        let report = Report { late: pipeline.windows.iter().map(late).collect(), ..Report::default() };
        Work {
            decoder: RecordDecoder::new(pipeline.types[of].schema.clone(), registry.map(Arc::new)),
            pipeline,
            of,
            first: target == 0,
            writer: sink.map(|sink| sink.writer_of(target, "retry-", Uuid::new_v4())),
            now_ms: (clock::system())(),
            watermark_ms: attempt.watermark_ms,
            todo,
            written: Places::new(),
            report,
        }
    }

    /// Tries those letters of a batch that are still to be done; none is tried twice.
    fn take(&mut self, batch: &RecordBatch) -> Result<(), Error> {
        let mut chunks: BTreeMap<(String, i32), Chunk> = BTreeMap::new();
        for letter in Letters::of(batch)?.iter() {
            let Some(place) = letter.place() else { continue };
            let partition = (place.topic.to_string(), place.partition);
            if !self.todo.get_mut(&partition).is_some_and(|offsets| offsets.remove(&place.offset)) {
                continue;
            }
            let chunk = chunks.entry(partition).or_insert_with_key(|(topic, partition)| Chunk {
                topic: topic.as_str().into(),
                partition: *partition,
                ..Chunk::default()
            });
            let timestamp_ms = letter.timestamp_us.map(|us| us.div_euclid(1000));
            chunk.push(place.offset, timestamp_ms, letter.key, letter.payload, letter.headers.clone());
            if chunk.data.len() >= CHUNK_BYTES {
                let mut full = std::mem::take(chunk);
                chunk.topic = full.topic.clone();
                chunk.partition = full.partition;
                self.admit(&mut full)?;
            }
        }
        chunks.values_mut().try_for_each(|chunk| self.admit(chunk))
    }

    /// The letters of this type, that is; those of others have their turn.
    fn admit(&mut self, chunk: &mut Chunk) -> Result<(), Error> {
        let pipeline = self.pipeline.clone();
        let (mut by_type, rejected) = match pipeline.router.split(chunk) {
            Split::Whole(of) if of == self.of => return self.admit_own(chunk),
            Split::Whole(of) => (vec![(of, chunk.records.len())], Vec::new()),
            Split::Parts { records, rejected } => {
                if let Some(own) = records.get(self.of) {
                    let mut part = chunk.take_part(own);
                    self.admit_own(&mut part)?;
                    chunk.data = part.data;
                }
                (records.iter().map(Vec::len).enumerate().collect(), rejected)
            }
        };
        if self.first {
            by_type.retain(|(of, letters)| *letters > 0 && pipeline.types[*of].rows.is_none());
            for (_, letters) in by_type {
                *self.report.failed.entry(NO_TABLE.to_string()).or_default() += letters as u64;
            }
            for rejection in rejected {
                *self.report.failed.entry(rejection.reason.code().to_string()).or_default() += 1;
            }
        }
        Ok(())
    }

    fn admit_own(&mut self, chunk: &mut Chunk) -> Result<(), Error> {
        let pipeline = self.pipeline.clone();
        let of = &pipeline.types[self.of];
        let Admitted { batch, records, rejected, filtered, dropped, violation, .. } =
            execute::admit(of, self.now_ms, chunk, &mut self.decoder)?;
        if let Some(violation) = violation {
            return Err(QueryError::Expectation(violation).into());
        }
        self.report.rows += batch.num_rows() as u64;
        self.report.filtered += filtered + dropped;
        for rejection in &rejected {
            *self.report.failed.entry(rejection.reason.code().to_string()).or_default() += 1;
        }
        self.count_late(of, &batch)?;
        for &record in &records {
            let offset = chunk.records[record as usize].offset;
            insert(&mut self.written, &chunk.topic, chunk.partition, offset);
        }
        if let Some(writer) = &mut self.writer {
            writer.write(&execute::with_provenance(&of.rows_schema, &batch, chunk, &records)?)?;
        }
        Ok(())
    }

    fn count_late(&mut self, of: &MessageType, batch: &RecordBatch) -> Result<(), QueryError> {
        let Some(event_time) = of.event_time else { return Ok(()) };
        for &index in of.queries.iter() {
            let (query, late) = (&self.pipeline.queries[index], &mut self.report.late[index]);
            for (start_us, rows) in query.rows_by_window(batch, event_time)? {
                let end_us = query.windowing().end(start_us);
                if self.watermark_ms.is_some_and(|watermark| window::closed(end_us, watermark)) {
                    late.closed += rows.len() as u64;
                } else {
                    late.open += rows.len() as u64;
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(Report, Places, Vec<DataFile>), Error> {
        let files = self.writer.map(TableWriter::finish).transpose()?.unwrap_or_default();
        Ok((self.report, self.written, files))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(QueryError::Internal(format!("a blocking task did not end well: {e}")).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_offsets_are_looked_for_by_name_and_many_by_range() {
        let mut places = Places::new();
        assert!(around(&places).is_none());
        insert(&mut places, "a", 0, 7);
        insert(&mut places, "a", 1, 9);
        let few = around(&places).unwrap().to_string();
        assert!(few.contains("_kafka_offset IN") && !few.contains(">="), "{few}");
        (100..1_000).for_each(|offset| insert(&mut places, "b", 3, offset));
        insert(&mut places, "b", 4, 5);
        let many = around(&places).unwrap().to_string();
        assert!(many.contains("_kafka_offset >= 5") && many.contains("_kafka_offset <= 999"), "{many}");
    }
}
