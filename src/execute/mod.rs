//! Step 3 of the protocol: one planned batch becomes data files and partial aggregates, on all cores.
//!
//! Owns: the workers of a batch, the order in which a partition's chunks are aggregated, the account of what became of
//! every record. Does not own: what a batch is, the state it is merged into, or when its files become visible.
//!
//! Workers take whole chunks (records of one partition) from one channel, so there is no per-row channel, lock or
//! allocation. Any worker may decode any chunk; a partition's decoded chunks are aggregated in offset order by whoever
//! finds the [`OrderedLane`] free, and lanes are merged in the order of the plan. That makes sums of doubles, and with
//! them every result, independent of the number of workers and of who got which chunk.

mod admit;
mod emit;
mod ordered_lane;
mod rows;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::{Array, AsArray, TimestampMicrosecondArray};
use arrow::datatypes::TimestampMicrosecondType;
use arrow::record_batch::RecordBatch;
use iceberg::spec::DataFile;
use uuid::Uuid;

use crate::batch::{MicroBatch, TopicPartition};
use crate::checkpoint::Counts;
use crate::dead_letter;
use crate::dead_letter::retry::Places;
use crate::decode::registry::BatchRegistry;
use crate::decode::route::Split;
use crate::decode::{RecordDecoder, Rejection};
use crate::error::Error;
use crate::late;
use crate::pipeline::Pipeline;
use crate::quality::Violation;
use crate::sink::iceberg::{IcebergSink, TableWriter};
use crate::source::{Chunk, Chunks};
use crate::state::{Lane, StateStore};

pub use admit::{Admitted, admit};
use emit::Emit;
use ordered_lane::OrderedLane;
pub use rows::{PROVENANCE, rows_schema, with_provenance};

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panicked fails the whole attempt, whose values are then dropped.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
