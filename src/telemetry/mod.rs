//! What an operator sees of a running query: metrics, logs, the HTTP server, the progress of the last batches.
//!
//! Owns: every metric name ([`metrics`]), the log format ([`logs`]), `/metrics` and its siblings ([`http`]), the record
//! of one batch ([`BatchProgress`]) and the query's health ([`Telemetry`]). Does not own: any decision; nothing here is
//! ever read back by the query. Everything but `http` is plain bookkeeping that cannot fail.

pub mod http;
pub mod logs;
pub mod metrics;
pub mod progress;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use uuid::Uuid;

pub use self::http::serve;
pub use self::logs::{init_logs, init_logs_at};
pub use self::progress::{
    BatchProgress, Counts, EventTime, PartitionProgress, SinkProgress, SourceProgress, StateMetrics, StateOperator,
    TableProgress, WatermarkHeldBy, rfc3339,
};
use crate::batch::TopicPartition;
use crate::clock::{self, ClockMs};
use crate::error::Kind;
use crate::sink::iceberg::TableReport;

/// How many batches `/status` remembers.
const KEPT_BATCHES: usize = 20;

/// A query that retries for longer than this is not ready any more: short trouble is no reason to page anyone.
const RETRY_GRACE_MS: i64 = 30_000;

/// What the query reports to; shared with the HTTP server. Cheap to clone.
#[derive(Clone)]
pub struct Telemetry(Arc<Shared>);

struct Shared {
    name: String,
    guarantee: String,
    clock: ClockMs,
    prometheus: PrometheusHandle,
    health: Mutex<Health>,
}

struct Health {
    /// Empty until the checkpoint has told it.
    query_id: String,
    state: State,
    since_ms: i64,
    /// Whether the query has been running since the process started.
    has_run: bool,
    /// Why the query is held back though it runs, such as an open circuit breaker.
    held: Option<String>,
    last_error: Option<LastError>,
    last_commit_ms: Option<i64>,
    watermark_ms: Option<i64>,
    lag: BTreeMap<TopicPartition, u64>,
    /// How many batches this process has committed; `batches` holds the last of them.
    committed: u64,
    batches: VecDeque<BatchProgress>,
    maintenance: Option<Maintenance>,
}

/// The last round of maintenance.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Maintenance {
    /// RFC 3339: when it ended.
    at: String,
    duration_ms: u64,
    tables: Vec<TableReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Recovering from the checkpoint; no batch has been planned yet.
    Starting,
    Running,
    Retrying,
    Stopping,
    Failed,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LastError {
    /// RFC 3339.
    at: String,
    kind: &'static str,
    message: String,
    attempt: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_in_ms: Option<u64>,
}

/// The JSON of `/status`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status<'a> {
    name: &'a str,
    id: &'a str,
    version: &'static str,
    guarantee: &'a str,
    state: State,
    /// RFC 3339: since when it is in this state.
    since: String,
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_ready_because: Option<String>,
    /// Offsets not yet committed to the tables, over all partitions.
    lag: u64,
    last_commit: Option<String>,
    last_error: Option<&'a LastError>,
    maintenance: Option<&'a Maintenance>,
    /// Oldest first.
    batches: &'a VecDeque<BatchProgress>,
}

impl Telemetry {
    /// Installs the process's metrics recorder the first time; later calls share it.
    pub fn new(name: impl Into<String>, guarantee: impl Into<String>) -> Self {
        Telemetry::with_clock(name, guarantee, clock::system())
    }

    pub fn with_clock(name: impl Into<String>, guarantee: impl Into<String>, clock: ClockMs) -> Self {
        let prometheus = metrics::install();
        metrics::register();
        let health = Health {
            query_id: String::new(),
            state: State::Starting,
            since_ms: clock(),
            has_run: false,
            held: None,
            last_error: None,
            last_commit_ms: None,
            watermark_ms: None,
            lag: BTreeMap::new(),
            committed: 0,
            batches: VecDeque::with_capacity(KEPT_BATCHES),
            maintenance: None,
        };
        let (name, guarantee) = (name.into(), guarantee.into());
        Telemetry(Arc::new(Shared { name, guarantee, clock, prometheus, health: Mutex::new(health) }))
    }

    /// The id that the checkpoint gave the query for ever.
    pub fn query_id(&self, query_id: Uuid) {
        metrics::record_query(&self.0.name, &query_id.to_string(), &self.0.guarantee);
        self.health().query_id = query_id.to_string();
    }

    /// Names the tables before the first batch, so that their counters start at 0 and rates see the first rows.
    pub fn tables(&self, tables: &[String], windows: &[String]) {
        metrics::register_tables(tables, windows);
    }

    /// Names the expectations, each with what it does, for the same reason.
    pub fn expectations(&self, expectations: &[(String, &'static str)]) {
        metrics::register_expectations(expectations);
    }

    /// How many rows of a committed batch failed an expectation.
    pub fn expectation_failures(&self, name: &str, on_fail: &'static str, failures: u64) {
        metrics::record_expectation(name, on_fail, failures);
    }

    /// A batch is held back, and why; or none is any more.
    pub fn breaker(&self, open_because: Option<String>) {
        metrics::record_breaker(open_because.is_some());
        self.set_ready(open_because);
    }

    /// State files were merged in the background, and what came of it is in use.
    pub fn compaction(&self, bytes_written: u64) {
        metrics::record_compaction(bytes_written);
    }

    /// A batch is committed. Call it once a batch, also when recovery finds that only its commit log was missing.
    pub fn batch(&self, progress: BatchProgress) {
        metrics::record_batch(&progress);
        for source in &progress.sources {
            for p in &source.partitions {
                metrics::record_lag(&source.topic, p.partition, p.lag);
            }
        }
        let now = (self.0.clock)();
        let mut health = self.health();
        health.last_commit_ms = Some(now);
        health.watermark_ms = progress.event_time.watermark_ms.or(health.watermark_ms);
        for source in &progress.sources {
            let topic: Arc<str> = source.topic.as_str().into();
            for p in &source.partitions {
                health.lag.insert(TopicPartition { topic: topic.clone(), partition: p.partition }, p.lag);
            }
        }
        if health.batches.len() == KEPT_BATCHES {
            health.batches.pop_front();
        }
        health.batches.push_back(progress);
        health.committed += 1;
        health.enter(State::Running, now);
        drop(health);
        // Histograms keep every sample until they are drained; without this an unscraped process would grow.
        self.0.prometheus.run_upkeep();
    }

    /// A round of maintenance has ended.
    pub fn maintenance(&self, took: Duration, tables: Vec<TableReport>) {
        metrics::record_maintenance(took, &tables);
        let at = rfc3339((self.0.clock)());
        let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.health().maintenance = Some(Maintenance { at, duration_ms, tables });
    }

    /// How many batches this process has committed.
    pub fn batches(&self) -> u64 {
        self.health().committed
    }

    /// Recovered, or recovered again, and about to plan.
    pub fn running(&self) {
        let now = (self.0.clock)();
        self.health().enter(State::Running, now);
    }

    /// An attempt failed and the next one starts after `delay`. `attempt` counts from 1; the stage is part of the message.
    pub fn retrying(&self, error: &str, kind: Kind, attempt: u32, delay: Duration) {
        metrics::record_error(kind);
        metrics::record_retry();
        let now = (self.0.clock)();
        let mut health = self.health();
        let retry_in_ms = Some(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
        health.last_error = Some(LastError {
            at: rfc3339(now),
            kind: kind_name(kind),
            message: error.to_string(),
            attempt,
            retry_in_ms,
        });
        health.enter(State::Retrying, now);
    }

    /// The query has given up; the process is about to end.
    pub fn fatal(&self, message: &str) {
        metrics::record_error(Kind::Fatal);
        let now = (self.0.clock)();
        let mut health = self.health();
        health.last_error = Some(LastError {
            at: rfc3339(now),
            kind: kind_name(Kind::Fatal),
            message: message.to_string(),
            attempt: 0,
            retry_in_ms: None,
        });
        health.enter(State::Failed, now);
    }

    /// A shutdown was asked for: `/readyz` turns red while the batch in hand is finished.
    pub fn stopping(&self) {
        let now = (self.0.clock)();
        self.health().enter(State::Stopping, now);
    }

    /// Holds `/readyz` red for the given reason although the query runs; `None` releases it.
    pub fn set_ready(&self, not_ready_because: Option<String>) {
        self.health().held = not_ready_because;
    }

    /// How many offsets each partition holds beyond what is committed: to be called when a trigger finds that out.
    pub fn lag(&self, lag: &BTreeMap<TopicPartition, u64>) {
        for (tp, lag) in lag {
            metrics::record_lag(&tp.topic, tp.partition, *lag);
        }
        self.health().lag.extend(lag.iter().map(|(tp, lag)| (tp.clone(), *lag)));
    }

    /// None: ready. Otherwise why not.
    pub fn not_ready(&self) -> Option<String> {
        let now = (self.0.clock)();
        self.health().not_ready(now)
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The text of `/metrics`. Ages are computed now, so that they grow while nothing is committed.
    pub fn render_metrics(&self) -> String {
        let now = (self.0.clock)();
        let (last_commit_ms, watermark_ms, ready) = {
            let health = self.health();
            (health.last_commit_ms, health.watermark_ms, health.not_ready(now).is_none())
        };
        metrics::refresh(now, last_commit_ms, watermark_ms, ready);
        self.0.prometheus.render()
    }

    /// The JSON of `/status`.
    pub fn render_status(&self) -> String {
        let now = (self.0.clock)();
        let health = self.health();
        let not_ready_because = health.not_ready(now);
        let status = Status {
            name: &self.0.name,
            id: &health.query_id,
            version: env!("CARGO_PKG_VERSION"),
            guarantee: &self.0.guarantee,
            state: health.state,
            since: rfc3339(health.since_ms),
            ready: not_ready_because.is_none(),
            not_ready_because,
            lag: health.lag.values().sum(),
            last_commit: health.last_commit_ms.map(rfc3339),
            last_error: health.last_error.as_ref(),
            maintenance: health.maintenance.as_ref(),
            batches: &health.batches,
        };
        serde_json::to_string_pretty(&status).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"))
    }

    /// The status page.
    pub fn render_page(&self) -> String {
        let now = (self.0.clock)();
        http::page(&self.0, &self.health(), now)
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        // What a panicking thread left behind is still a consistent record: every change is a single assignment.
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    /// Nothing follows a failure, and only a failure follows a shutdown.
    fn enter(&mut self, state: State, now: i64) {
        let settled = match self.state {
            State::Failed => true,
            State::Stopping => state != State::Failed,
            State::Starting | State::Running | State::Retrying => false,
        };
        if !settled && self.state != state {
            self.state = state;
            self.since_ms = now;
        }
        self.has_run |= state == State::Running;
    }

    fn not_ready(&self, now: i64) -> Option<String> {
        match self.state {
            State::Starting => Some("starting: recovering from the checkpoint".to_string()),
            State::Stopping => Some("stopping: finishing the batch in hand".to_string()),
            State::Failed => Some(match &self.last_error {
                Some(e) => format!("failed: {}", e.message),
                None => "failed".to_string(),
            }),
            State::Retrying if !self.has_run || now - self.since_ms > RETRY_GRACE_MS => Some(match &self.last_error {
                Some(e) => {
                    format!("retrying for {} s, attempt {}: {}", (now - self.since_ms) / 1000, e.attempt, e.message)
                }
                None => "retrying".to_string(),
            }),
            State::Running | State::Retrying => self.held.clone(),
        }
    }
}

pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Transient => "transient",
        Kind::Indeterminate => "indeterminate",
        Kind::Fatal => "fatal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering};

    fn with_time() -> (Telemetry, Arc<AtomicI64>) {
        let time = Arc::new(AtomicI64::new(1_700_000_000_000));
        let clock = time.clone();
        (Telemetry::with_clock("t", "exactly once", Arc::new(move || clock.load(Ordering::SeqCst))), time)
    }

    #[test]
    fn readiness_follows_the_state() {
        let (t, time) = with_time();
        assert!(t.not_ready().unwrap().contains("recovering"));
        t.running();
        assert_eq!(t.not_ready(), None);
        t.retrying("broker away", Kind::Transient, 1, Duration::from_secs(1));
        assert_eq!(t.not_ready(), None, "short trouble is tolerated");
        time.fetch_add(RETRY_GRACE_MS / 2 + 1, Ordering::SeqCst);
        t.retrying("broker away", Kind::Transient, 2, Duration::from_secs(1));
        assert_eq!(t.not_ready(), None);
        time.fetch_add(RETRY_GRACE_MS / 2 + 1, Ordering::SeqCst);
        assert!(t.not_ready().unwrap().contains("attempt 2: broker away"));
        t.batch(BatchProgress::default());
        assert_eq!(t.not_ready(), None);
        t.set_ready(Some("error rate".to_string()));
        assert_eq!(t.not_ready().as_deref(), Some("error rate"));
        t.set_ready(None);
        t.stopping();
        assert!(t.not_ready().unwrap().starts_with("stopping"));
        t.fatal("two owners");
        assert_eq!(t.not_ready().as_deref(), Some("failed: two owners"));
    }

    #[test]
    fn retrying_before_the_first_batch_is_not_ready() {
        let (t, _) = with_time();
        t.retrying("no such host", Kind::Transient, 1, Duration::from_secs(1));
        assert!(t.not_ready().is_some());
    }

    #[test]
    fn status_keeps_the_last_batches() {
        let (t, _) = with_time();
        for batch_id in 0..25 {
            t.batch(BatchProgress { batch_id, ..Default::default() });
        }
        let status: serde_json::Value = serde_json::from_str(&t.render_status()).unwrap();
        let ids: Vec<u64> =
            status["batches"].as_array().unwrap().iter().map(|b| b["batchId"].as_u64().unwrap()).collect();
        assert_eq!(ids, (5..25).collect::<Vec<_>>());
        assert_eq!(t.batches(), 25);
        assert_eq!(status["state"], "running");
        assert_eq!(status["lastCommit"], "2023-11-14T22:13:20Z");
    }
}
