//! StreamingQuery: recover → plan → run a batch. Read this first.
//!
//! Owns: the order of things. Every step of the protocol ([`crate::checkpoint`]) is one call here, in sequence, in
//! [`Session::run_batch`]. Does not own: how any of them is done.
//!
//! Invariant: every failure that is not fatal takes the same road as a restart. What is in memory is dropped, the query
//! backs off and recovers from the checkpoint.

pub mod changes;
mod compaction;
mod hold;
mod open_windows;
mod packed;
mod progress;
mod rebuild;
mod recover;
mod upkeep;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;

use crate::batch::{self, BatchId, Gap, Limits, MicroBatch, OffsetRange, Offsets, TopicPartition, Watermarks};
use crate::checkpoint::{Checkpoint, CommitEntry, Counts, LoggedPlan, StateFile, StateKind, WindowStates};
use crate::clock::{self, ClockMs};
use crate::config::{Config, Definition, OnFail, StartingOffsets};
use crate::dead_letter::topic::DeadLetterTopic;
use crate::decode::registry::BatchRegistry;
use crate::error::{Error, Kind};
use crate::execute::{self, Executed};
use crate::failpoint;
use crate::pipeline::Pipeline;
use crate::quality::Breaker;
use crate::retry::{random, with_deadline};
use crate::sink::iceberg::{BatchCommit, IcebergSink, Marker};
use crate::source::kafka::KafkaSource;
use crate::source::{self, Available, Source};
use crate::state::{StateStore, WindowQuery};
use crate::telemetry::{self, BatchProgress, Telemetry};
use crate::trigger::Trigger;
use crate::window;
use crate::window::reread::Reread;
use crate::window::watermark::{self, EventTimeProgress, HeldBy, PartitionRead};

pub use self::open_windows::{Reopened, Road};
use self::progress::lag;
use self::rebuild::Progress;
pub use self::rebuild::{Rebuilt, rebuild};
use self::recover::{check_topics, marker_of};
use self::upkeep::Upkeep;

/// The table property that says up to which event time all windows are complete: they end no later, and all are in their
/// tables.
const VALID_THROUGH: &str = "floe.valid-through";
/// Logs older than this many batches are removed.
const RETAINED_BATCHES: u64 = 100;

/// Runs the query until it is done (`available_now`), told to stop, or fails for good.
pub async fn run(config: Config, shutdown: watch::Receiver<bool>) -> Result<(), Error> {
    run_observed(config, shutdown, |_| {}).await
}

/// As [`run`]; `on_batch` is told of every batch once it is done.
pub async fn run_observed(
    config: Config,
    shutdown: watch::Receiver<bool>,
    on_batch: impl Fn(&BatchProgress) + Send + Sync + 'static,
) -> Result<(), Error> {
    let pipeline = Pipeline::compile(&config).map_err(|problems| Error::Compile(problems.join("\n")))?;
    let guarantee = config.guarantee(None);
    tracing::info!(pipeline = config.name, guarantee, workers = pipeline.workers, "starting");
    let telemetry = Telemetry::new(&config.name, guarantee);
    let names = |indices: &[usize]| indices.iter().map(|&i| pipeline.tables[i].name.clone()).collect::<Vec<_>>();
    telemetry.expectations(&pipeline.expectations().map(|e| (e.name.clone(), e.on_fail.name())).collect::<Vec<_>>());
    telemetry.tables(&names(&(0..pipeline.tables.len()).collect::<Vec<_>>()), &names(&pipeline.windows));
    if let Some(listen) = config.http.listen {
        crate::telemetry::serve(listen, telemetry.clone(), shutdown.clone())
            .await
            .map_err(|e| Error::Http { listen, message: e.to_string() })?;
    }
    let breaker = config.quality.breaker.clone().map(Breaker::new);
    let upkeep = Upkeep::new(&config, telemetry.clone());
    let mut query = StreamingQuery {
        config: Arc::new(config),
        pipeline: Arc::new(pipeline),
        telemetry,
        shutdown,
        clock: clock::system(),
        run_id: Uuid::new_v4(),
        checkpoint: None,
        last_trigger: None,
        ends_at_start: None,
        breaker,
        upkeep,
        on_batch: Box::new(on_batch),
    };
    let ended = query.run().await;
    query.upkeep.stop().await;
    ended
}

struct StreamingQuery {
    config: Arc<Config>,
    pipeline: Arc<Pipeline>,
    telemetry: Telemetry,
    shutdown: watch::Receiver<bool>,
    clock: ClockMs,
    run_id: Uuid,
    /// Opened and claimed once a process: a retry keeps its epoch.
    checkpoint: Option<Arc<Checkpoint>>,
    last_trigger: Option<Instant>,
    /// `available_now`: where the partitions ended when this process first looked.
    ends_at_start: Option<Offsets>,
    breaker: Option<Breaker>,
    upkeep: Upkeep,
    on_batch: Box<dyn Fn(&BatchProgress) + Send + Sync>,
}

impl StreamingQuery {
    async fn run(&mut self) -> Result<(), Error> {
        let mut failures = 0;
        loop {
            let before = self.telemetry.batches();
            let mut error = match self.attempt().await {
                Ok(()) => return Ok(()),
                Err(e) => e,
            };
            if self.waits_for(&error) {
                match self.hold(&error).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => {
                        failures = 0;
                        continue;
                    }
                    Err(e) => error = e,
                }
            }
            if error.kind() == Kind::Fatal {
                self.telemetry.fatal(&error.to_string());
                return Err(error);
            }
            // A batch that went through in between makes it a new trouble.
            failures = if self.telemetry.batches() > before { 0 } else { failures };
            let delay = self.config.retry.strategy.delay(failures, random());
            failures += 1;
            self.telemetry.retrying(&error.to_string(), error.kind(), failures, delay);
            tracing::warn!(error = %error, kind = ?error.kind(), attempt = failures, delay_ms = delay.as_millis() as u64, "recovering after a failure");
            if self.sleep(delay).await {
                return Ok(());
            }
        }
    }

    /// Sleeps, or returns true as soon as the query is to stop.
    async fn sleep(&mut self, duration: Duration) -> bool {
        let stop = self.shutdown.wait_for(|stop| *stop);
        tokio::select! {
            _ = stop => true,
            () = tokio::time::sleep(duration) => false,
        }
    }

    /// How long since the batch before was triggered: what the input rate is measured over.
    fn since_last_trigger(&mut self, triggered: Instant) -> Duration {
        self.last_trigger.replace(triggered).map_or(Duration::ZERO, |last| triggered.saturating_duration_since(last))
    }

    fn stopping(&self) -> bool {
        *self.shutdown.borrow()
    }

    /// From the checkpoint onwards: recover, then batch after batch until stopped or failed.
    async fn attempt(&mut self) -> Result<(), Error> {
        let deadlines = self.config.retry.deadlines;
        let mut session = with_deadline("recover", deadlines.recover, Session::recover(self)).await?;
        self.telemetry.running();
        if let Some(pending) = session.pending.take() {
            tracing::info!(batch = pending.plan.batch, "replaying the batch that was planned and not committed");
            let started = Instant::now();
            session.run_batch(self, pending, BTreeMap::new(), started, true).await?;
        }
        let mut waiting_since = Instant::now();
        loop {
            let triggered = Instant::now();
            if self.stopping() {
                tracing::info!("stopping: everything read is committed");
                return Ok(());
            }
            match session.plan(self, waiting_since.elapsed()).await? {
                Planned::Run { plan, durations } => {
                    session.run_batch(self, *plan, durations, triggered, false).await?;
                    waiting_since = Instant::now();
                }
                Planned::Done => {
                    tracing::info!("everything that was there at the start is committed");
                    self.upkeep.finish(&session.sink, self.shutdown.clone()).await;
                    return Ok(());
                }
                Planned::Nothing => {}
            }
            self.upkeep.begin_if_due(&session.sink);
            if let Trigger::ProcessingTime(interval) = self.config.trigger
                && self.sleep(interval.saturating_sub(triggered.elapsed())).await
            {
                continue;
            }
        }
    }
}

type SharedSource = Arc<Mutex<KafkaSource>>;

enum Planned {
    Run { plan: Box<LoggedPlan>, durations: BTreeMap<String, u64> },
    Nothing,
    Done,
}

/// What is in memory between two failures.
struct Session {
    checkpoint: Arc<Checkpoint>,
    sink: IcebergSink,
    /// UUIDs by table, as recovery found them.
    tables: BTreeMap<String, Uuid>,
    source: SharedSource,
    /// The state after the last committed batch. Taken while a batch runs.
    state: Option<StateStore>,
    compaction: compaction::Background,
    /// By which numbers the state files know the windows.
    windows: WindowStates,
    last: Option<Last>,
    /// What each partition has shown up to the last committed batch.
    event_times: EventTimeProgress,
    /// From where on the open windows could be aggregated again; None: there are none.
    reread: Option<Reread>,
    /// Logged by an earlier attempt, this process's or another's.
    pending: Option<LoggedPlan>,
    /// The pending batch, when tables have it already and only its commit log is missing.
    in_tables: Option<BatchId>,
    /// Measured on earlier batches: what a byte limit is translated with.
    bytes_per_record: Option<f64>,
    /// Where the partitions ended at the last planning.
    latest: Offsets,
    checkpoint_bytes: u64,
    dead_letter_topic: Option<DeadLetterTopic>,
}

/// The last committed batch.
struct Last {
    plan: MicroBatch,
    watermark_next_ms: Option<i64>,
}

impl Session {
    /// Steps 1 and 2: what the next batch reads, logged before a byte is read.
    async fn plan(&mut self, query: &mut StreamingQuery, waited: Duration) -> Result<Planned, Error> {
        self.checkpoint.check_owner().await?;
        let deadlines = query.config.retry.deadlines;
        let started = Instant::now();
        let available = with_deadline("latest_offsets", deadlines.latest_offsets, self.available()).await?;
        let starts = match &self.last {
            Some(last) => last.plan.ends(),
            None => self.starting_offsets(&query.config, &available).await?,
        };
        let mut durations = BTreeMap::from([("latest_offset".to_string(), millis(started))]);
        if let Some(last) = &self.last {
            check_topics(&last.plan, &available)?;
        }

        let gaps = batch::data_loss(&starts, &available.partitions);
        if !gaps.is_empty() && query.config.source.fail_on_data_loss {
            return Err(Error::DataLoss { gaps });
        }
        let starts = batch::step_over(&starts, &gaps);
        let mut readable = available.partitions.clone();
        if query.config.trigger == Trigger::AvailableNow {
            let ends = query
                .ends_at_start
                .get_or_insert_with(|| readable.iter().map(|(tp, range)| (tp.clone(), range.end)).collect());
            readable = batch::cap(&readable, ends);
        }
        let backlog = batch::backlog(&starts, &readable);
        query.telemetry.lag(&lag(&starts, &available));
        self.latest = available.partitions.iter().map(|(tp, range)| (tp.clone(), range.end)).collect();

        let trigger_time_ms = (query.clock)();
        let (watermarks, held_by) = self.watermarks(&query.config, trigger_time_ms, &starts, &available);
        // Spark's rule: a batch without data runs when the watermark has moved since the last one.
        let no_data = window::runs_without_data(watermarks.evict(), watermarks.late());
        let source = &query.config.source;
        let available_now = query.config.trigger == Trigger::AvailableNow;
        let enough = available_now
            || batch::should_run(backlog, source.min_offsets_per_trigger, waited, source.max_trigger_delay);
        let has_data = backlog > 0 && enough || !gaps.is_empty();
        // The first batch runs even without data: it is what remembers where the query starts, for `latest` and timestamps.
        let first = self.last.is_none();
        if !has_data && !no_data && !first {
            return Ok(if available_now { Planned::Done } else { Planned::Nothing });
        }
        let limits = Limits {
            max_offsets: if has_data { source.max_offsets_per_trigger } else { Some(0) },
            max_bytes: source.max_bytes_per_trigger,
            bytes_per_record: self.bytes_per_record,
        };
        gaps.iter().for_each(warn_of_gap);
        let ranges = batch::plan_ranges(&starts, &readable, &limits)?;
        let batch = self.last.as_ref().map_or(0, |l| l.plan.batch + 1);
        let held_before = self.last.as_ref().and_then(|l| l.plan.held_by.as_ref());
        let plan = MicroBatch {
            batch,
            epoch: self.checkpoint.epoch(),
            trigger_time_ms,
            config_fingerprint: query.config.fingerprint.clone(),
            left_behind: batch::left_behind(&ranges, &available.partitions),
            ranges,
            gaps,
            topic_ids: available.topic_ids,
            watermarks,
            held_by: held_by.map(|tp| HeldBy::at(&tp, held_before, batch, trigger_time_ms)),
            tables: self.tables.clone(),
        };
        let started = Instant::now();
        let plan = with_deadline("wal_commit", deadlines.checkpoint, self.checkpoint.log_plan(&plan)).await?;
        durations.insert("wal_commit".into(), millis(started));
        Ok(Planned::Run { plan: Box::new(plan), durations })
    }

    /// The watermarks of a batch that is planned now, and the partition that holds them back. A partition counts as having a
    /// backlog whatever part of it the batch will take.
    fn watermarks(
        &self,
        config: &Config,
        trigger_time_ms: i64,
        starts: &Offsets,
        available: &Available,
    ) -> (Watermarks, Option<TopicPartition>) {
        let Some(event_time) = config.event_time.as_ref().filter(|_| !config.windows.is_empty()) else {
            return (Watermarks::default(), None);
        };
        let (late_ms, at_least_ms) = match &self.last {
            Some(last) => (last.plan.watermarks.evict_ms, last.watermark_next_ms),
            None => (event_time.policy.initial(), event_time.policy.initial()),
        };
        let has_backlog = |(tp, range): (&TopicPartition, &OffsetRange)| {
            (tp.clone(), range.end > starts.get(tp).copied().unwrap_or(range.start))
        };
        let backlog = available.partitions.iter().map(has_backlog).collect();
        let decision = watermark::decide(
            event_time.policy,
            event_time.watermark_delay.as_millis() as i64,
            at_least_ms,
            &self.event_times,
            trigger_time_ms,
            &backlog,
        );
        (Watermarks { late_ms, evict_ms: decision.watermark_ms }, decision.held_by)
    }

    async fn available(&self) -> Result<Available, Error> {
        let source = self.source.clone();
        blocking(move || Ok(lock(&source).available()?)).await
    }

    async fn starting_offsets(&self, config: &Config, available: &Available) -> Result<Offsets, Error> {
        let partitions = &available.partitions;
        Ok(match &config.source.starting_offsets {
            StartingOffsets::Earliest => partitions.iter().map(|(tp, range)| (tp.clone(), range.start)).collect(),
            StartingOffsets::Latest => partitions.iter().map(|(tp, range)| (tp.clone(), range.end)).collect(),
            StartingOffsets::Timestamp(ms) => {
                let (source, ms) = (self.source.clone(), *ms);
                blocking(move || Ok(lock(&source).offsets_at(ms)?)).await?
            }
            StartingOffsets::Explicit(offsets) => {
                let mut starts: Offsets = partitions.iter().map(|(tp, range)| (tp.clone(), range.start)).collect();
                starts.extend(offsets.iter().map(|(tp, offset)| (tp.clone(), *offset)));
                starts
            }
        })
    }

    /// Steps 3 to 7 of the protocol, from a logged plan to a batch that is done.
    async fn run_batch(
        &mut self,
        query: &mut StreamingQuery,
        logged: LoggedPlan,
        mut durations: BTreeMap<String, u64>,
        triggered: Instant,
        replay: bool,
    ) -> Result<(), Error> {
        let LoggedPlan { plan, digest, bytes: logged } = logged;
        let deadlines = query.config.retry.deadlines;
        let attempt = Uuid::new_v4();
        self.adopt_compaction(query).await?;

        // 3. Execute: data files that no table knows yet, and the state as it will be.
        let started = Instant::now();
        let registry = self.batch_registry(query, &plan, &digest);
        let registry = with_deadline("registry", deadlines.checkpoint, registry).await?;
        let executed = with_deadline("add_batch", deadlines.add_batch, async {
            let left = if replay { self.still_readable(&plan, &query.config).await? } else { plan.clone() };
            self.execute(query, left, registry.clone(), attempt).await
        })
        .await?;
        durations.insert("add_batch".into(), millis(started));
        if failpoint::hit("execute.files_written") {
            return Err(Error::Internal("failpoint execute.files_written".into()));
        }
        let asked = self.ask_breaker(query, &plan, &digest, &executed);
        let passed = with_deadline("breaker", deadlines.checkpoint, asked).await?;
        if let Some(registry) = &registry {
            let logged = self.log_unknown_ids(plan.batch, &digest, registry);
            with_deadline("log_unknown_ids", deadlines.checkpoint, logged).await?;
        }
        let Executed { files, mut delta, mut state, counts, event_times } = executed;

        // 4. Persist what this attempt adds to the state.
        let started = Instant::now();
        let evict_ms = plan.watermarks.evict();
        state.drop_superfluous(evict_ms);
        if delta.groups > 0 {
            let bytes = std::mem::take(&mut delta.bytes);
            let (crc32, end) = (delta.crc32(), delta.max_window_end_us);
            let put = self.checkpoint.put_state(plan.batch, attempt, StateKind::Delta, bytes, crc32, end);
            state.add(with_deadline("state_commit", deadlines.checkpoint, put).await?, &delta);
        }
        let state_files = state.files();
        durations.insert("state_commit".into(), millis(started));

        let mut watermark_next_ms = plan.watermarks.evict_ms;
        let mut progressed = EventTimeProgress::default();
        let mut reread = None;
        if let Some(event_time) = query.config.event_time.as_ref().filter(|_| !query.pipeline.windows.is_empty()) {
            let delay_ms = event_time.watermark_delay.as_millis() as i64;
            watermark_next_ms = event_time.policy.after_batch(watermark_next_ms, counts.max_event_time_us, delay_ms);
            let read = plan.ranges.iter().map(|(tp, range)| {
                let read = PartitionRead {
                    any_offsets: !range.is_empty(),
                    left_behind: plan.left_behind.contains_key(tp),
                    max_event_time_us: event_times.latest_us.get(tp).copied(),
                };
                (tp.clone(), read)
            });
            let idle_timeout_ms = event_time.policy.idle_timeout_ms();
            progressed = self.event_times.after_batch(plan.trigger_time_ms, idle_timeout_ms, read);
            let queries = &query.pipeline.queries;
            let closed = |time_us| {
                // How far back sessions reach is not known anyway.
                let closed = |q: &WindowQuery| window::closed(q.windowing().last_end(time_us), evict_ms);
                queries.iter().filter(|q| !q.is_session()).all(closed)
            };
            let before = self.reread.clone().unwrap_or_else(|| Reread::begin(&plan));
            reread = Some(before.after_batch(&plan, progressed.latest_ms(), closed));
        }
        // 5. Commit the tables, all of them or none.
        let started = Instant::now();
        let written: Vec<(u64, u64)> =
            files.iter().map(|files| (files.iter().map(|f| f.record_count()).sum(), files.len() as u64)).collect();
        let marker = marker_of(&plan, &digest, &query.config.fingerprint);
        let commit = BatchCommit {
            marker: Marker { pipeline: query.config.name.clone(), batch: plan.batch, plan: marker },
            tables: plan.tables.clone(),
            summary: summary(&plan)?,
            properties: self.properties(query, &plan, &logged, watermark_next_ms, &progressed, reread.as_ref())?,
            files,
        };
        let committed = with_deadline("commit_tables", deadlines.commit, async {
            match self.sink.commit(&commit).await {
                Ok(committed) => Ok(committed),
                Err(e) => {
                    // A successor that has moved on explains a marker beyond ours better than an old checkpoint does.
                    self.checkpoint.check_owner().await?;
                    Err(Error::from(e))
                }
            }
        })
        .await?;
        durations.insert("commit_tables".into(), millis(started));

        // 6. Log the commit: now the batch is done.
        let started = Instant::now();
        let entry = CommitEntry {
            batch: plan.batch,
            epoch: self.checkpoint.epoch(),
            plan_digest: digest,
            watermark_next_ms,
            event_times: progressed,
            reread,
            windows: self.windows.clone(),
            definition: Definition::of(&query.config),
            state: state_files.clone(),
            snapshots: query.pipeline.tables.iter().map(|t| t.name.clone()).zip(committed.snapshots.clone()).collect(),
            counts: counts.clone(),
            committed_at_ms: (query.clock)(),
            dead_letter_topic: query.config.dead_letter_topic.clone(),
        };
        with_deadline("commit_log", deadlines.checkpoint, self.checkpoint.log_commit(&entry)).await?;
        durations.insert("commit_log".into(), millis(started));

        // 7. Tidy. Nothing here can fail the batch, which is done.
        let started = Instant::now();
        self.tidy(&plan, &state_files, replay).await;
        let state = blocking(move || {
            let windows = state.shrink()?;
            tracing::debug!(windows, "windows have left memory");
            Ok(state)
        })
        .await?;
        durations.insert("tidy".into(), millis(started));

        let mut progress = self.progress(query, &plan, &entry, &written, &state, &event_times);
        progress.batch_duration_ms = millis(triggered);
        let seconds = triggered.elapsed().as_secs_f64();
        progress.processed_rows_per_second = counts.records as f64 / seconds;
        progress.input_rows_per_second =
            counts.records as f64 / query.since_last_trigger(triggered).as_secs_f64().max(seconds);
        progress.duration_ms = durations;
        tracing::info!(
            batch = plan.batch,
            records = counts.records,
            rows = counts.rows,
            filtered = counts.filtered,
            dropped = counts.dropped,
            dead_letters = counts.dead_letters.values().sum::<u64>(),
            late = counts.late.values().sum::<u64>(),
            window_rows = counts.windows.values().sum::<u64>(),
            watermark = progress.event_time.watermark_ms.map(telemetry::rfc3339),
            ms = progress.batch_duration_ms,
            "batch committed"
        );
        report_expectations(query, plan.batch, &counts);
        query.let_through(plan.batch, passed);
        query.telemetry.batch(progress.clone());
        query.upkeep.batch_done();
        (query.on_batch)(&progress);

        if counts.records > 0 {
            self.bytes_per_record = Some(counts.bytes as f64 / counts.records as f64);
        }
        self.compaction.start(&state, Some((plan.batch, evict_ms)));
        self.state = Some(state);
        self.last = Some(Last { plan, watermark_next_ms });
        self.event_times = entry.event_times.clone();
        self.reread = entry.reread.clone();

        // The batch is done and stays so; its dead letters are published before there is another one.
        if let Some(topic) = &self.dead_letter_topic {
            with_deadline("publish_dead_letters", deadlines.commit, topic.publish(&self.sink, &entry)).await?;
        }
        Ok(())
    }

    async fn adopt_compaction(&mut self, query: &StreamingQuery) -> Result<(), Error> {
        let Some(state) = &mut self.state else { return Ok(()) };
        let last = self.last.as_ref().map(|l| (l.plan.batch, l.plan.watermarks.evict()));
        if let Some(compacted) = self.compaction.before_batch(state, last).await? {
            query.telemetry.compaction(compacted.bytes_written);
            compaction::adopt(state, compacted)?;
        }
        Ok(())
    }

    /// What every table says of the batch beside the marker: all that a checkpoint needs to be rebuilt, and how far windows
    /// are complete.
    fn properties(
        &self,
        query: &StreamingQuery,
        plan: &MicroBatch,
        logged: &[u8],
        watermark_next_ms: Option<i64>,
        event_times: &EventTimeProgress,
        reread: Option<&Reread>,
    ) -> Result<BTreeMap<String, String>, Error> {
        let progress = Progress {
            plan: String::from_utf8_lossy(logged).into_owned(),
            watermark_next_ms,
            event_times: event_times.clone(),
            reread_from: reread.map(|r| r.from.clone()).unwrap_or_default(),
            dead_letter_topic: query.config.dead_letter_topic.clone(),
        };
        let progress = (rebuild::property(self.checkpoint.query_id()), progress.to_property()?);
        let mut properties = BTreeMap::from([progress]);
        if let Some(evict_ms) = plan.watermarks.evict_ms.filter(|_| !query.pipeline.windows.is_empty()) {
            properties.insert(VALID_THROUGH.to_string(), telemetry::rfc3339(evict_ms));
        }
        Ok(properties)
    }

    /// With what an earlier execution has found unknown: the tables may have it already.
    async fn batch_registry(
        &self,
        query: &StreamingQuery,
        plan: &MicroBatch,
        digest: &str,
    ) -> Result<Option<Arc<BatchRegistry>>, Error> {
        let Some(registry) = &query.pipeline.registry else { return Ok(None) };
        let unknown = self.checkpoint.unknown_ids(plan.batch, digest).await?;
        Ok(Some(Arc::new(BatchRegistry::new(registry.clone(), unknown))))
    }

    /// Not sooner: while the batch is held back, a schema may still be registered for it.
    async fn log_unknown_ids(&self, batch: BatchId, digest: &str, registry: &BatchRegistry) -> Result<(), Error> {
        if self.checkpoint.log_unknown_ids(batch, digest, registry.unknown()).await? {
            return Ok(());
        }
        // A successor explains it; otherwise it is executed again, with the ids of the first.
        self.checkpoint.check_owner().await?;
        Err(Error::Internal(format!("batch {batch} was executed by another process, with other schemas known")))
    }

    async fn execute(
        &mut self,
        query: &StreamingQuery,
        plan: MicroBatch,
        registry: Option<Arc<BatchRegistry>>,
        attempt: Uuid,
    ) -> Result<Executed, Error> {
        let state =
            self.state.take().ok_or_else(|| Error::Internal("the state was lost by an earlier failure".into()))?;
        let cancel = Arc::new(AtomicBool::new(false));
        // Set when this future is dropped, as a deadline does.
        let _guard = CancelOnDrop(cancel.clone());
        let (pipeline, sink, source) = (query.pipeline.clone(), self.sink.clone(), self.source.clone());
        let fail_on_data_loss = query.config.source.fail_on_data_loss;
        blocking(move || {
            let chunks = lock(&source).read(&plan.ranges)?;
            match execute::execute(&pipeline, &sink, state, &plan, registry, chunks, attempt, &cancel) {
                // Expired between planning and reading: recovery replays the plan with what is left of it.
                Err(Error::Source(source::Error::DataLoss { partition, wanted, .. })) if !fail_on_data_loss => {
                    Err(Error::Expired { partition, wanted })
                }
                other => other,
            }
        })
        .await
    }

    async fn tidy(&mut self, plan: &MicroBatch, live: &[StateFile], replay: bool) {
        if failpoint::hit("tidy") {
            return;
        }
        if replay {
            match self.sink.remove_failed_attempts(plan.batch).await {
                Ok(0) => {}
                Ok(files) => tracing::info!(batch = plan.batch, files, "removed the files of failed attempts"),
                Err(e) => tracing::warn!(batch = plan.batch, error = %e, "files of failed attempts stay behind"),
            }
        }
        if let Err(e) = self.checkpoint.purge(plan.batch, RETAINED_BATCHES, live, &self.compaction.in_use()).await {
            tracing::warn!(error = %e, "old checkpoint files stay until the next batch");
        }
        match self.checkpoint.size_bytes().await {
            Ok(bytes) => self.checkpoint_bytes = bytes,
            Err(e) => tracing::debug!(error = %e, "checkpoint size unknown"),
        }
        lock(&self.source).report(&plan.ends());
    }
}

/// Once a batch, and only for one that is committed.
fn report_expectations(query: &StreamingQuery, batch: BatchId, counts: &Counts) {
    for expectation in query.pipeline.expectations() {
        let failures = counts.expectations.get(&expectation.name).copied().unwrap_or(0);
        query.telemetry.expectation_failures(&expectation.name, expectation.on_fail.name(), failures);
        if failures > 0 && expectation.on_fail == OnFail::Warn {
            let (expectation, sql) = (&expectation.name, &expectation.sql);
            tracing::warn!(batch, expectation, sql, rows = failures, "rows fail an expectation and are kept");
        }
    }
}

fn warn_of_gap(gap: &Gap) {
    tracing::error!(
        topic = &*gap.topic,
        partition = gap.partition,
        start = gap.range.start,
        end = gap.range.end,
        cause = gap.cause,
        "data loss: offsets are gone; going on without them because fail_on_data_loss = false"
    );
}

/// What every new snapshot's summary says beyond the marker.
fn summary(plan: &MicroBatch) -> Result<BTreeMap<String, String>, Error> {
    let mut offsets: BTreeMap<&str, BTreeMap<i32, [i64; 2]>> = BTreeMap::new();
    for (tp, range) in &plan.ranges {
        offsets.entry(&tp.topic).or_default().insert(tp.partition, [range.start, range.end]);
    }
    let offsets = serde_json::to_string(&offsets).map_err(|e| Error::Internal(e.to_string()))?;
    let mut summary = BTreeMap::from([("floe.offsets".to_string(), offsets)]);
    if let Some(watermark_ms) = plan.watermarks.evict_ms {
        summary.insert("floe.watermark-ms".to_string(), watermark_ms.to_string());
    }
    Ok(summary)
}

/// Runs blocking work off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(Error::Internal(format!("a blocking task did not end well: {e}"))))
}

fn lock(source: &SharedSource) -> std::sync::MutexGuard<'_, KafkaSource> {
    source.lock().unwrap_or_else(PoisonError::into_inner)
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
