//! Step 3 of the protocol: one planned batch becomes data files and partial aggregates, on all cores.
//!
//! Owns: the workers of a batch, the order in which a partition's chunks are aggregated, the account of what became of
//! every record. Does not own: what a batch is, the state it is merged into, or when its files become visible.
//!
//! Workers take whole chunks (records of one partition) from one channel, so there is no per-row channel, lock or
//! allocation. Any worker may decode any chunk; a partition's decoded chunks are aggregated in offset order by whoever
//! finds the [`OrderedLane`] free, and lanes are merged in the order of the plan. That makes sums of doubles, and with
//! them every result, independent of the number of workers and of who got which chunk.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray,
};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, SchemaRef, TimeUnit, TimestampMicrosecondType};
use arrow::record_batch::RecordBatch;
use iceberg::spec::DataFile;
use uuid::Uuid;

use crate::batch::{BatchId, MicroBatch, TopicPartition};
use crate::checkpoint::Counts;
use crate::dead_letter::retry::Places;
use crate::dead_letter::{self, Reason};
use crate::decode::registry::BatchRegistry;
use crate::decode::route::Split;
use crate::decode::{RecordDecoder, Rejection};
use crate::error::Error;
use crate::late;
use crate::pipeline::{MessageType, Pipeline};
use crate::quality::{Expectations, Violation};
use crate::sink::iceberg::{IcebergSink, TableWriter};
use crate::source::{Chunk, Chunks};
use crate::state::{Closing, Lane, StateStore};

/// What step 3 hands to the steps after it.
pub struct Executed {
    /// By table, in the order of [`Pipeline::tables`].
    pub files: Vec<Vec<DataFile>>,
    /// Partial states of the windows that stay open.
    pub delta: crate::state::Delta,
    pub state: StateStore,
    pub counts: Counts,
    pub event_times: EventTimes,
    pub workers: WorkerTimes,
}

/// What the workers spent on what, summed over them: `read` is waiting for the next chunk, `decode` includes checks, derived columns
/// and filters, `write` is Parquet and the upload, `merge` the batch's partial aggregates into the state, `close` the evaluation of
/// closed windows.
#[derive(Clone, Debug, Default)]
pub struct WorkerTimes(BTreeMap<&'static str, Duration>);

impl WorkerTimes {
    fn add(&mut self, stage: &'static str, took: Duration) {
        *self.0.entry(stage).or_default() += took;
    }

    pub fn millis(&self) -> BTreeMap<String, u64> {
        self.0.iter().map(|(stage, took)| ((*stage).to_string(), took.as_millis() as u64)).collect()
    }
}

/// The event times of the rows of a batch; rows without one do not count.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EventTimes {
    pub min_us: Option<i64>,
    pub max_us: Option<i64>,
    sum_us: i128,
    rows: u64,
    /// By partition.
    pub latest_us: BTreeMap<TopicPartition, i64>,
}

impl EventTimes {
    /// The rows of one chunk.
    fn take_in(&mut self, chunk: &Chunk, times: &TimestampMicrosecondArray) {
        let (Some(min), Some(max)) = (arrow::compute::min(times), arrow::compute::max(times)) else { return };
        let mut chunk_times = EventTimes {
            min_us: Some(min),
            max_us: Some(max),
            rows: (times.len() - times.null_count()) as u64,
            ..EventTimes::default()
        };
        chunk_times.sum_us = match times.null_count() {
            0 => times.values().iter().map(|us| i128::from(*us)).sum(),
            _ => times.iter().flatten().map(i128::from).sum(),
        };
        chunk_times.latest_us.insert(TopicPartition::new(chunk.topic.clone(), chunk.partition), max);
        self.add(chunk_times);
    }

    fn add(&mut self, other: EventTimes) {
        self.min_us = self.min_us.into_iter().chain(other.min_us).min();
        self.max_us = self.max_us.max(other.max_us);
        self.sum_us += other.sum_us;
        self.rows += other.rows;
        for (tp, us) in other.latest_us {
            self.latest_us.entry(tp).and_modify(|latest| *latest = us.max(*latest)).or_insert(us);
        }
    }

    pub fn avg_ms(&self) -> Option<i64> {
        let rows = i128::from(self.rows);
        (rows > 0).then(|| i64::try_from(self.sum_us.div_euclid(rows * 1000)).unwrap_or_default())
    }
}

/// Runs one attempt at a batch. Blocks; `cancel` makes it stop within a fraction of a second.
#[allow(clippy::too_many_arguments)]
pub fn execute(
    pipeline: &Arc<Pipeline>,
    sink: &IcebergSink,
    mut state: StateStore,
    plan: &MicroBatch,
    registry: Option<Arc<BatchRegistry>>,
    chunks: Chunks,
    attempt: Uuid,
    cancel: &AtomicBool,
) -> Result<Executed, Error> {
    let workers = pipeline.workers;
    let job = Job::new(pipeline, Some(sink), plan, registry, chunks, attempt, cancel);
    let mut account = job.run()?;
    if !plan.gaps.is_empty() {
        let mut tables = job.writers(workers);
        let gaps = dead_letter::from_gaps(&plan.gaps, plan.batch, plan.trigger_time_ms);
        tables.write(pipeline.dead_letters, &gaps)?;
        account.files(tables.finish()?.0);
    }

    let lanes = job.into_lanes()?;
    for lane in &lanes {
        account.counts.max_event_time_us = account.counts.max_event_time_us.max(lane.max_event_time_us());
        account.counts.without_event_time += lane.rows_without_time();
        account.counts.failed_values += lane.failed_values().iter().sum::<u64>();
        for (query, late) in lane.late_rows().iter().enumerate() {
            *account.counts.late.entry(pipeline.tables[pipeline.windows[query]].name.clone()).or_default() += late;
        }
    }
    let evict_ms = plan.watermarks.evict();
    let started = Instant::now();
    let delta = state.merge_lanes(lanes, evict_ms, workers)?;
    // It has all the workers.
    account.workers.add("merge", started.elapsed() * workers as u32);
    let closed = Mutex::new(state.close(evict_ms).into_iter());
    let emit = Emit { pipeline, sink, plan, attempt, cancel, closed };
    // Worker numbers continue, so that no file name is used twice in an attempt.
    for output in run_workers(workers, cancel, |worker| emit.run(workers + 1 + worker))? {
        account.add(output);
    }
    let Account { files, counts, event_times, workers } = account;
    Ok(Executed { files, delta, state, counts, event_times, workers })
}

/// The part of it that windows see, of records that have been read before: partial aggregates by partition and type. Nothing is
/// written. `without` are the records that were refused then.
pub fn aggregate(
    pipeline: &Pipeline,
    plan: &MicroBatch,
    registry: Option<Arc<BatchRegistry>>,
    chunks: Chunks,
    without: &Places,
    cancel: &AtomicBool,
) -> Result<(Vec<Lane>, Counts), Error> {
    let mut job = Job::new(pipeline, None, plan, registry, chunks, Uuid::nil(), cancel);
    job.without = Some(without);
    let account = job.run()?;
    Ok((job.into_lanes()?, account.counts))
}

/// Runs `work` on every worker and returns what each produced, in worker order. The first failure cancels the others.
fn run_workers<T: Send>(
    workers: usize,
    cancel: &AtomicBool,
    work: impl Fn(usize) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    let results: Vec<Result<T, Error>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|worker| {
                let work = &work;
                scope.spawn(move || {
                    // Caught here and not at the join, so that the others hear of it at once.
                    let result = catch_unwind(AssertUnwindSafe(|| work(worker))).unwrap_or_else(|_| Err(panicked()));
                    if result.is_err() {
                        cancel.store(true, Ordering::Relaxed);
                    }
                    result
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|_| Err(panicked()))).collect()
    });
    let mut outputs = Vec::with_capacity(workers);
    let mut cancelled = None;
    for result in results {
        match result {
            Ok(output) => outputs.push(output),
            // Another worker's failure is the reason; this one only followed it.
            Err(e @ Error::Cancelled) => cancelled = Some(e),
            Err(e) => return Err(e),
        }
    }
    cancelled.map_or(Ok(outputs), Err)
}

fn panicked() -> Error {
    Error::Internal("a worker panicked; the message is in the log".into())
}

/// Files by table, in the order of [`Pipeline::tables`].
type TableFiles = Vec<(usize, Vec<DataFile>)>;

/// What one worker did.
struct Output {
    files: TableFiles,
    counts: Counts,
    event_times: EventTimes,
    times: WorkerTimes,
}

struct Account {
    files: Vec<Vec<DataFile>>,
    counts: Counts,
    event_times: EventTimes,
    workers: WorkerTimes,
}

impl Account {
    fn new(pipeline: &Pipeline) -> Self {
        Account {
            files: pipeline.tables.iter().map(|_| Vec::new()).collect(),
            counts: Counts::default(),
            event_times: EventTimes::default(),
            workers: WorkerTimes::default(),
        }
    }

    fn add(&mut self, output: Output) {
        self.files(output.files);
        self.counts.add(&output.counts);
        self.event_times.add(output.event_times);
        output.times.0.into_iter().for_each(|(stage, took)| self.workers.add(stage, took));
    }

    fn files(&mut self, files: TableFiles) {
        for (table, files) in files {
            self.files[table].extend(files);
        }
    }
}

/// The file writers of one worker, opened when first written to.
struct Writers<'a> {
    /// None: nothing is kept.
    sink: Option<&'a IcebergSink>,
    plan: &'a MicroBatch,
    attempt: Uuid,
    worker: usize,
    open: BTreeMap<usize, TableWriter>,
    took: Duration,
}

impl<'a> Writers<'a> {
    fn new(sink: Option<&'a IcebergSink>, plan: &'a MicroBatch, attempt: Uuid, worker: usize) -> Writers<'a> {
        Writers { sink, plan, attempt, worker, open: BTreeMap::new(), took: Duration::ZERO }
    }

    fn write(&mut self, table: usize, rows: &RecordBatch) -> Result<(), Error> {
        let Some(sink) = self.sink.filter(|_| rows.num_rows() > 0) else { return Ok(()) };
        let started = Instant::now();
        let writer =
            self.open.entry(table).or_insert_with(|| sink.writer(table, self.plan.batch, self.attempt, self.worker));
        writer.write(rows)?;
        self.took += started.elapsed();
        Ok(())
    }

    /// The files, and the time that writing has taken.
    fn finish(self) -> Result<(TableFiles, Duration), Error> {
        let started = Instant::now();
        let files = self.open.into_iter().map(|(table, writer)| Ok((table, writer.finish()?)));
        let files = files.collect::<Result<_, Error>>()?;
        Ok((files, self.took + started.elapsed()))
    }
}

/// Reading, decoding, aggregating and writing rows: what the workers of a batch share.
struct Job<'a> {
    pipeline: &'a Pipeline,
    sink: Option<&'a IcebergSink>,
    plan: &'a MicroBatch,
    registry: Option<Arc<BatchRegistry>>,
    attempt: Uuid,
    cancel: &'a AtomicBool,
    chunks: Mutex<Chunks>,
    /// By partition in the order of the plan, and by message type.
    lanes: Vec<OrderedLane>,
    /// The first record that an expectation does not let pass.
    violation: Mutex<Option<Violation>>,
    /// Records to be left out.
    without: Option<&'a Places>,
}

/// What one worker has done so far.
struct Done<'a> {
    writers: Writers<'a>,
    counts: Counts,
    event_times: EventTimes,
    times: WorkerTimes,
}

impl<'a> Job<'a> {
    fn new(
        pipeline: &'a Pipeline,
        sink: Option<&'a IcebergSink>,
        plan: &'a MicroBatch,
        registry: Option<Arc<BatchRegistry>>,
        chunks: Chunks,
        attempt: Uuid,
        cancel: &'a AtomicBool,
    ) -> Job<'a> {
        Job {
            pipeline,
            sink,
            plan,
            registry,
            attempt,
            cancel,
            chunks: Mutex::new(chunks),
            lanes: (plan.ranges.keys())
                .flat_map(|_| pipeline.types.iter().map(|of| OrderedLane::new(pipeline, of, plan)))
                .collect(),
            violation: Mutex::new(None),
            without: None,
        }
    }

    fn run(&self) -> Result<Account, Error> {
        let mut account = Account::new(self.pipeline);
        for output in run_workers(self.pipeline.workers, self.cancel, |worker| self.read(worker))? {
            account.add(output);
        }
        // All of the batch has been looked at: the record that is named is the first one whoever was faster.
        match lock(&self.violation).take() {
            Some(violation) => Err(Error::Expectation(violation)),
            None => Ok(account),
        }
    }

    fn into_lanes(self) -> Result<Vec<Lane>, Error> {
        self.lanes.into_iter().map(OrderedLane::into_lane).collect()
    }

    fn writers(&self, worker: usize) -> Writers<'a> {
        Writers::new(self.sink, self.plan, self.attempt, worker)
    }

    fn read(&self, worker: usize) -> Result<Output, Error> {
        let mut decoders = self.pipeline.decoders(self.registry.as_ref());
        let mut done = Done {
            writers: self.writers(worker),
            counts: Counts::default(),
            event_times: EventTimes::default(),
            times: WorkerTimes::default(),
        };
        loop {
            let started = Instant::now();
            let next = self.next_chunk()?;
            done.times.add("read", started.elapsed());
            let Some(chunk) = next else { break };
            self.process(chunk, &mut decoders, &mut done)?;
            if crate::failpoint::hit("execute.chunk") {
                return Err(Error::Internal("failpoint execute.chunk".into()));
            }
        }
        let Done { writers, counts, event_times, mut times } = done;
        let (files, took) = writers.finish()?;
        times.add("write", took);
        Ok(Output { files, counts, event_times, times })
    }

    fn next_chunk(&self) -> Result<Option<Chunk>, Error> {
        let chunks = lock(&self.chunks);
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            match chunks.recv_timeout(Duration::from_millis(50)) {
                Ok(chunk) => return Ok(Some(chunk?)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    /// Routes the records of a chunk to their types.
    fn process(&self, mut chunk: Chunk, decoders: &mut [RecordDecoder], done: &mut Done<'_>) -> Result<(), Error> {
        done.counts.records += chunk.records.len() as u64;
        done.counts.bytes += chunk.data.len() as u64;
        match self.pipeline.router.split(&chunk) {
            Split::Whole(of) => self.process_type(of, &mut chunk, &mut decoders[of], done),
            Split::Parts { records, rejected } => {
                // Every type, also one that has no record here: its lane takes the chunks of the partition one after another.
                for (of, (records, decoder)) in records.iter().zip(decoders).enumerate() {
                    let mut part = chunk.take_part(records);
                    self.process_type(of, &mut part, decoder, done)?;
                    chunk.data = part.data;
                }
                self.refuse(&chunk, &rejected, None, done)
            }
        }
    }

    fn process_type(
        &self,
        of: usize,
        chunk: &mut Chunk,
        decoder: &mut RecordDecoder,
        done: &mut Done<'_>,
    ) -> Result<(), Error> {
        let message_type = &self.pipeline.types[of];
        let started = Instant::now();
        let mut admitted = admit(message_type, self.plan.trigger_time_ms, chunk, decoder)?;
        if let Some(without) = self.without {
            admitted.leave_out(without, chunk)?;
        }
        let Admitted { batch, records, rejected, filtered, dropped, failures, violation } = admitted;
        done.times.add("decode", started.elapsed());
        done.counts.filtered += filtered;
        done.counts.dropped += dropped;
        for (expectation, failures) in message_type.expectations.iter().zip(&failures) {
            *done.counts.expectations.entry(expectation.name.clone()).or_default() += failures;
        }
        if let Some(found) = violation {
            let mut first = lock(&self.violation);
            if first.as_ref().is_none_or(|first| found < *first) {
                *first = Some(found);
            }
        }
        done.counts.rows += batch.num_rows() as u64;
        self.refuse(chunk, &rejected, Some(&message_type.schema.fingerprint), done)?;
        if let Some(table) = message_type.rows {
            if message_type.provenance {
                let rows = with_provenance(&message_type.rows_schema, &batch, chunk, &records)?;
                done.writers.write(table, &rows)?;
            } else {
                done.writers.write(table, &batch)?;
            }
        }
        let Some(event_time) = message_type.event_time.filter(|_| !self.pipeline.windows.is_empty()) else {
            return Ok(());
        };
        let watermark_ms = self.plan.watermarks.late();
        for &query in message_type.queries.iter() {
            let (Some(table), query) = (self.pipeline.late_rows[query], &self.pipeline.queries[query]) else {
                continue;
            };
            for late in query.late_rows(&batch, event_time, watermark_ms)? {
                done.writers.write(table, &late::rows(query.table(), late, watermark_ms, &batch, chunk, &records)?)?;
            }
        }
        if let Some(times) = batch.column(event_time).as_primitive_opt::<TimestampMicrosecondType>() {
            done.event_times.take_in(chunk, times);
        }
        let started = Instant::now();
        self.lanes[chunk.lane * self.pipeline.types.len() + of].submit(chunk.sequence, batch, self)?;
        done.times.add("aggregate", started.elapsed());
        Ok(())
    }

    fn refuse(
        &self,
        chunk: &Chunk,
        rejected: &[Rejection],
        schema: Option<&str>,
        done: &mut Done<'_>,
    ) -> Result<(), Error> {
        if rejected.is_empty() || self.sink.is_none() {
            return Ok(());
        }
        for rejection in rejected {
            *done.counts.dead_letters.entry(rejection.reason.code().to_string()).or_default() += 1;
        }
        let (batch, trigger_time_ms) = (self.plan.batch, self.plan.trigger_time_ms);
        let dead = dead_letter::from_rejections(chunk, rejected, schema, batch, trigger_time_ms);
        done.writers.write(self.pipeline.dead_letters, &dead)
    }
}

/// What became of the records of one chunk: each is a row, or refused, or left out by the filter or an expectation.
pub struct Admitted {
    /// The columns that reach the tables; row i is record `records[i]` of the chunk.
    pub batch: RecordBatch,
    pub records: Vec<u32>,
    pub rejected: Vec<Rejection>,
    pub filtered: u64,
    /// By expectations of the kind `drop`.
    pub dropped: u64,
    /// Rows that failed, by expectation in their order.
    pub failures: Vec<u64>,
    /// The first record that an expectation of the kind `fail` does not let pass: nothing of the batch may be committed.
    pub violation: Option<Violation>,
}

impl Admitted {
    fn leave_out(&mut self, places: &Places, chunk: &Chunk) -> Result<(), Error> {
        let Some(offsets) = places.get(&(chunk.topic.to_string(), chunk.partition)) else { return Ok(()) };
        let stays = |&record: &u32| Some(!offsets.contains(&chunk.records[record as usize].offset));
        let kept: BooleanArray = self.records.iter().map(stays).collect();
        self.batch = filter_record_batch(&self.batch, &kept).map_err(|e| Error::Internal(e.to_string()))?;
        self.records = keep_records(&self.records, &kept);
        Ok(())
    }
}

/// Decoding, checks, `[transform]` and expectations: the way of a record into the tables, the first time and when a dead letter is
/// tried again.
pub fn admit(
    of: &MessageType,
    trigger_time_ms: i64,
    chunk: &mut Chunk,
    decoder: &mut RecordDecoder,
) -> Result<Admitted, Error> {
    let decoded = decoder.decode(chunk)?;
    let (mut batch, mut records, mut rejected) = (decoded.batch, decoded.records, decoded.rejected);
    refuse_future(of, trigger_time_ms, &mut batch, &mut records, &mut rejected)?;
    let decoded_rows = batch.num_rows();
    let mut filtered = 0;
    if let Some(transform) = &of.transform {
        let transformed = transform.apply(&batch)?;
        for (row, message) in &transformed.failed {
            rejected.push(Rejection {
                record: records[*row],
                reason: Reason::ExpressionFailed,
                path: "$".into(),
                message: message.clone().into(),
            });
        }
        if let Some(kept) = &transformed.kept {
            records = kept.iter().map(|&row| records[row as usize]).collect();
        }
        filtered = (decoded_rows - transformed.failed.len() - transformed.batch.num_rows()) as u64;
        batch = transformed.batch;
    }
    let mut admitted =
        Admitted { batch, records, rejected, filtered, dropped: 0, failures: Vec::new(), violation: None };
    if !of.expectations.is_empty() {
        expect(&of.expectations, chunk, &mut admitted)?;
    }
    Ok(admitted)
}

/// `[[quality.expect]]`: what valid rows are to be beyond the schema.
fn expect(expectations: &Expectations, chunk: &Chunk, admitted: &mut Admitted) -> Result<(), Error> {
    let internal = |e: &dyn std::fmt::Display| Error::Internal(format!("expectations: {e}"));
    let checked = expectations.check(&admitted.batch).map_err(|e| internal(&e))?;
    let records = &admitted.records;
    if let Some((row, index)) = checked.violation
        && let Some(expectation) = expectations.get(index)
    {
        admitted.violation = Some(Violation {
            topic: chunk.topic.clone(),
            partition: chunk.partition,
            offset: chunk.records[records[row] as usize].offset,
            name: expectation.name.clone(),
            sql: expectation.sql.clone(),
        });
    }
    admitted.failures = checked.failures;
    admitted.dropped = checked.dropped;
    admitted.rejected.extend(checked.refused.into_iter().map(|(row, message)| Rejection {
        record: records[row],
        reason: Reason::ExpectationFailed,
        path: "$".into(),
        message: message.into(),
    }));
    if let Some(kept) = &checked.kept {
        admitted.batch = filter_record_batch(&admitted.batch, kept).map_err(|e| internal(&e))?;
        admitted.records = keep_records(records, kept);
    }
    Ok(())
}

/// A device with its clock in 2099 costs a dead letter, not everyone's windows.
fn refuse_future(
    of: &MessageType,
    trigger_time_ms: i64,
    batch: &mut RecordBatch,
    records: &mut Vec<u32>,
    rejected: &mut Vec<Rejection>,
) -> Result<(), Error> {
    let Some((column, max_future)) = of.future_guard else { return Ok(()) };
    let limit_us = trigger_time_ms.saturating_add(max_future.as_millis() as i64).saturating_mul(1000);
    let times = batch.column(column).as_primitive::<TimestampMicrosecondType>();
    if arrow::compute::max(times).is_none_or(|max| max <= limit_us) {
        return Ok(());
    }
    let kept: BooleanArray = (0..times.len()).map(|i| Some(times.is_null(i) || times.value(i) <= limit_us)).collect();
    let name = of.schema.arrow.field(column).name();
    for row in (0..times.len()).filter(|&row| !kept.value(row)) {
        let at = timestamp_text(times.value(row));
        rejected.push(Rejection {
            record: records[row],
            reason: Reason::FutureEventTime,
            path: format!("$.{name}").into(),
            message: format!("{at} is more than {max_future:?} ahead of the batch's trigger time").into(),
        });
    }
    *batch = filter_record_batch(batch, &kept).map_err(|e| Error::Internal(e.to_string()))?;
    *records = keep_records(records, &kept);
    Ok(())
}

fn timestamp_text(micros: i64) -> String {
    jiff::Timestamp::from_microsecond(micros).map_or_else(|_| format!("{micros} µs"), |t| t.to_string())
}

fn keep_records(records: &[u32], kept: &BooleanArray) -> Vec<u32> {
    records.iter().zip(kept.iter()).filter(|(_, keep)| *keep == Some(true)).map(|(record, _)| *record).collect()
}

/// The columns that let anyone prove with one query that nothing is missing or doubled.
pub fn provenance_fields() -> Vec<Field> {
    vec![
        Field::new("_kafka_topic", DataType::Utf8, false),
        Field::new("_kafka_partition", DataType::Int32, false),
        Field::new("_kafka_offset", DataType::Int64, false),
        Field::new("_kafka_timestamp", DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), true),
    ]
}

/// The schema of the rows table: the row's columns and, where asked for, where each came from.
pub fn rows_schema(columns: &SchemaRef, provenance: bool) -> SchemaRef {
    let mut fields: Vec<_> = columns.fields().iter().cloned().collect();
    if provenance {
        fields.extend(provenance_fields().into_iter().map(Arc::new));
    }
    Arc::new(ArrowSchema::new(fields))
}

/// `batch` with the columns that say where each row came from; `records` are its rows' indices in the chunk.
pub fn with_provenance(
    schema: &SchemaRef,
    batch: &RecordBatch,
    chunk: &Chunk,
    records: &[u32],
) -> Result<RecordBatch, Error> {
    let rows = records.len();
    let topic: ArrayRef = Arc::new(StringArray::from_iter_values(std::iter::repeat_n(&*chunk.topic, rows)));
    let partition: ArrayRef = Arc::new(Int32Array::from_value(chunk.partition, rows));
    let offsets: ArrayRef =
        Arc::new(Int64Array::from_iter_values(records.iter().map(|&record| chunk.records[record as usize].offset)));
    let timestamps: TimestampMicrosecondArray = records
        .iter()
        .map(|&record| {
            let ms = chunk.records[record as usize].timestamp_ms;
            (ms != i64::MIN).then(|| ms.saturating_mul(1000))
        })
        .collect();
    let mut columns = batch.columns().to_vec();
    columns.extend([topic, partition, offsets, Arc::new(timestamps.with_timezone("UTC")) as ArrayRef]);
    RecordBatch::try_new(schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))
}

/// Rows of a window in update mode: which batch they are of.
fn with_revision(schema: &SchemaRef, rows: &RecordBatch, batch: BatchId) -> Result<RecordBatch, Error> {
    let revision: ArrayRef = Arc::new(Int64Array::from_value(batch as i64, rows.num_rows()));
    let columns = rows.columns().iter().cloned().chain([revision]).collect();
    RecordBatch::try_new(schema.clone(), columns).map_err(|e| Error::Internal(e.to_string()))
}

/// The aggregation of one partition's rows of one type: chunks may arrive in any order and are taken in offset order.
struct OrderedLane {
    state: Mutex<LaneState>,
    drained: Condvar,
}

struct LaneState {
    next: u64,
    waiting: BTreeMap<u64, RecordBatch>,
    /// None while a worker is aggregating into it.
    lane: Option<Lane>,
}

impl OrderedLane {
    fn new(pipeline: &Pipeline, of: &MessageType, plan: &MicroBatch) -> Self {
        let event_time = of.event_time.unwrap_or_default();
        let lane = Lane::new(pipeline.queries.clone(), of.queries.clone(), event_time, plan.watermarks.late());
        OrderedLane {
            state: Mutex::new(LaneState { next: 0, waiting: BTreeMap::new(), lane: Some(lane) }),
            drained: Condvar::new(),
        }
    }

    /// Hands in a decoded chunk. If no one is aggregating, this worker does, for as long as the next chunk is there.
    fn submit(&self, sequence: u64, batch: RecordBatch, job: &Job<'_>) -> Result<(), Error> {
        let mut state = lock(&self.state);
        state.waiting.insert(sequence, batch);
        loop {
            let next = state.next;
            if state.lane.is_none() {
                // Someone else is aggregating and will come to ours; wait only so that a single hot partition
                // cannot be decoded far ahead of its aggregation.
                if state.waiting.len() <= 2 * job.pipeline.workers {
                    return Ok(());
                }
                if job.cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let timeout = Duration::from_millis(50);
                state = self.drained.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let Some(batch) = state.waiting.remove(&next) else { return Ok(()) };
            let Some(mut lane) = state.lane.take() else { return Ok(()) };
            state.next += 1;
            drop(state);
            let updated = lane.update(&batch);
            state = lock(&self.state);
            state.lane = Some(lane);
            self.drained.notify_all();
            updated?;
        }
    }

    fn into_lane(self) -> Result<Lane, Error> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !state.waiting.is_empty() {
            return Err(Error::Internal(format!("chunk {} of a partition never arrived", state.next)));
        }
        state.lane.ok_or_else(|| Error::Internal("a worker left with a partition's aggregation".into()))
    }
}

/// Writing the windows that the watermark has closed.
struct Emit<'a> {
    pipeline: &'a Pipeline,
    sink: &'a IcebergSink,
    plan: &'a MicroBatch,
    attempt: Uuid,
    cancel: &'a AtomicBool,
    closed: Mutex<std::vec::IntoIter<Closing>>,
}

impl Emit<'_> {
    fn run(&self, worker: usize) -> Result<Output, Error> {
        let started = Instant::now();
        let mut writers = Writers::new(Some(self.sink), self.plan, self.attempt, worker);
        let mut counts = Counts::default();
        loop {
            let next = lock(&self.closed).next();
            let Some(closing) = next else { break };
            // By table and window: a large one comes in pieces.
            let mut overflows: BTreeMap<(usize, i64, i64), u64> = BTreeMap::new();
            closing.windows::<Error>(|window| {
                if self.cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let table = self.pipeline.windows[window.query()];
                let bounds = (table, window.start_us(), window.end_us());
                let updates = self.pipeline.queries[window.query()].updates();
                let (batches, overflowed) = window.evaluate()?;
                for mut batch in batches {
                    if updates {
                        batch = with_revision(&self.pipeline.tables[table].schema, &batch, self.plan.batch)?;
                    }
                    *counts.windows.entry(self.pipeline.tables[table].name.clone()).or_default() +=
                        batch.num_rows() as u64;
                    writers.write(table, &batch)?;
                }
                *overflows.entry(bounds).or_default() += overflowed;
                Ok(())
            })?;
            for ((table, start, end), overflowed) in overflows.into_iter().filter(|(_, overflowed)| *overflowed > 0) {
                let message = format!(
                    "{overflowed} values of {} in the window [{}, {}) could not be computed and are null: a sum beyond its type, or an expression over aggregates that failed",
                    self.pipeline.tables[table].name,
                    timestamp_text(start),
                    timestamp_text(end)
                );
                tracing::warn!(table = self.pipeline.tables[table].name, window_start = %timestamp_text(start), values = overflowed, "aggregates could not be computed");
                let dead = dead_letter::from_overflows(&[message], self.plan.batch, self.plan.trigger_time_ms);
                writers.write(self.pipeline.dead_letters, &dead)?;
                *counts.dead_letters.entry(Reason::Overflow.code().to_string()).or_default() += 1;
            }
        }
        let (files, took) = writers.finish()?;
        let mut times = WorkerTimes::default();
        times.add("write", took);
        times.add("close", started.elapsed().saturating_sub(took));
        Ok(Output { files, counts, event_times: EventTimes::default(), times })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panicked fails the whole attempt, whose values are then dropped.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
