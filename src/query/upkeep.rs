//! Maintenance of the tables beside the batches: when a round begins, and how it ends.
//!
//! Owns: one task at a time. Does not own: what is done ([`crate::sink::iceberg::Maintainer`]). Batches never wait for a
//! round: where both want to commit to a table, the one that is later loads it again. A round that fails fails nothing else;
//! the next one takes it up.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::MaintenanceConfig;
use crate::sink::iceberg::{IcebergSink, Round};
use crate::telemetry::Telemetry;

/// Looking for orphans lists every file of the tables: not more often than this.
const ORPHANS_EVERY: Duration = Duration::from_secs(86_400);
/// How long a round that is asked to stop is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) struct Upkeep {
    policy: MaintenanceConfig,
    telemetry: Telemetry,
    last: Instant,
    last_orphans: Option<Instant>,
    batches: usize,
    running: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Upkeep {
    pub(super) fn new(policy: MaintenanceConfig, telemetry: Telemetry) -> Upkeep {
        Upkeep { policy, telemetry, last: Instant::now(), last_orphans: None, batches: 0, running: None }
    }

    /// A batch may have added a snapshot to every table.
    pub(super) fn batch_done(&mut self) {
        self.batches += 1;
    }

    /// Begins a round if it is time to and none is under way.
    pub(super) fn begin_if_due(&mut self, sink: &IcebergSink) {
        let many = self.batches >= (self.policy.max_snapshots / 2).max(1);
        let due = self.policy.enabled && (many || self.last.elapsed() >= self.policy.interval);
        if !due || self.running.as_ref().is_some_and(|(_, task)| !task.is_finished()) {
            return;
        }
        let orphans = self.last_orphans.is_none_or(|last| last.elapsed() >= ORPHANS_EVERY);
        if orphans {
            self.last_orphans = Some(Instant::now());
        }
        let round = self.round(orphans);
        let stop = round.stop.clone();
        let task = tokio::spawn(run(sink.clone(), round, self.telemetry.clone()));
        self.running = Some((stop, task));
    }

    /// A round after the last batch of a job, which has no "beside". It does not look for orphans: jobs may start every minute.
    pub(super) async fn finish(&mut self, sink: &IcebergSink, mut shutdown: watch::Receiver<bool>) {
        self.stop().await;
        if !self.policy.enabled || self.batches == 0 {
            return;
        }
        let round = self.round(false);
        let stop = round.stop.clone();
        let mut running = pin!(run(sink.clone(), round, self.telemetry.clone()));
        tokio::select! {
            () = &mut running => return,
            _ = shutdown.wait_for(|stop| *stop) => stop.store(true, Ordering::Relaxed),
        }
        if tokio::time::timeout(PATIENCE, running).await.is_err() {
            tracing::info!("maintenance does not stop in time; what it leaves behind is removed later");
        }
    }

    pub(super) async fn stop(&mut self) {
        let Some((stop, mut task)) = self.running.take() else { return };
        stop.store(true, Ordering::Relaxed);
        if tokio::time::timeout(PATIENCE, &mut task).await.is_err() {
            tracing::info!("maintenance does not stop in time; what it leaves behind is removed later");
            task.abort();
        }
    }

    fn round(&mut self, orphans: bool) -> Round {
        self.last = Instant::now();
        self.batches = 0;
        Round::new(self.policy.clone(), orphans)
    }
}

async fn run(sink: IcebergSink, round: Round, telemetry: Telemetry) {
    let started = Instant::now();
    let reports = sink.maintainer().run(&round).await;
    telemetry.maintenance(started.elapsed(), reports);
}
