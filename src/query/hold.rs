//! A batch that the circuit breaker holds back: executed, not committed, waiting.
//!
//! Owns: asking the breaker before step 4, the wait, and what people are told meanwhile. Does not own: when it trips
//! ([`crate::quality`]). While a batch is held back nothing is in memory and nothing of it in the tables, so that every way
//! out is the one of a restart: recover and replay the plan.

use std::time::{Duration, Instant};

use super::{Session, StreamingQuery};
use crate::batch::MicroBatch;
use crate::checkpoint::{Counts, Held};
use crate::dead_letter::Reason;
use crate::error::{Error, Kind};
use crate::execute::Executed;
use crate::quality::Sample;
use crate::trigger::Trigger;

/// How often a paused query looks whether a person has let the batch through.
const LOOK: Duration = Duration::from_secs(2);

/// What the breaker says of a batch that may be committed.
pub(super) enum Passed {
    /// It has nothing to say: there is none, or the tables have the batch already.
    Unasked,
    Below(Sample),
    /// `floe resume`
    ByHand,
}

impl Session {
    /// Between steps 3 and 4: an error when the batch is held back. What it has written is deleted then.
    pub(super) async fn ask_breaker(
        &self,
        query: &mut StreamingQuery,
        plan: &MicroBatch,
        digest: &str,
        executed: &Executed,
    ) -> Result<Passed, Error> {
        let Some(breaker) = &mut query.breaker else { return Ok(Passed::Unasked) };
        if self.in_tables == Some(plan.batch) {
            return Ok(Passed::Unasked);
        }
        let sample = sample(&executed.counts);
        let Err(trip) = breaker.check((query.clock)(), plan.batch, sample) else { return Ok(Passed::Below(sample)) };
        if self.checkpoint.is_resumed(plan.batch, digest).await? {
            return Ok(Passed::ByHand);
        }
        self.sink.discard(executed.files.iter().flatten()).await;
        let reasons: Vec<String> = executed.counts.dead_letters.iter().map(|(r, n)| format!("{r} {n}")).collect();
        let reason = format!("{trip} ({})", reasons.join(", "));
        let held = Held {
            batch: plan.batch,
            plan_digest: digest.to_string(),
            reason: reason.clone(),
            held_at: jiff::Timestamp::now().to_string(),
        };
        self.checkpoint.hold(&held).await?;
        Err(Error::BreakerOpen { batch: plan.batch, plan_digest: digest.to_string(), reason })
    }
}

/// Dead letters of records, among all records.
fn sample(counts: &Counts) -> Sample {
    let other = Reason::ALL.into_iter().filter(|r| !r.is_of_a_record());
    let other: u64 = other.filter_map(|r| counts.dead_letters.get(r.code())).sum();
    Sample { records: counts.records, refused: counts.dead_letters.values().sum::<u64>() - other }
}

impl StreamingQuery {
    /// Whether the query waits after this error rather than end: a service does, a job has somebody who waits for its end.
    pub(super) fn waits_for(&self, error: &Error) -> bool {
        matches!(error, Error::BreakerOpen { .. }) && self.config.trigger != Trigger::AvailableNow
    }

    /// Waits until the batch is to be tried again. True when the query is to stop instead.
    pub(super) async fn hold(&mut self, error: &Error) -> Result<bool, Error> {
        let Error::BreakerOpen { batch, plan_digest, .. } = error else { return Ok(false) };
        let wait = self.breaker.as_ref().map_or(LOOK, |b| b.wait());
        tracing::warn!(batch, probe_in_ms = wait.as_millis() as u64, "circuit breaker open: {error}");
        self.telemetry.breaker(Some(error.to_string()));
        let probe_at = Instant::now() + wait;
        loop {
            let left = probe_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if self.sleep(left.min(LOOK)).await {
                return Ok(true);
            }
            let Some(checkpoint) = self.checkpoint.clone() else { return Ok(false) };
            match checkpoint.is_resumed(*batch, plan_digest).await {
                Ok(true) => {
                    tracing::info!(batch, "the batch was let through by floe resume");
                    return Ok(false);
                }
                Ok(false) => {}
                Err(e) if e.kind() == Kind::Fatal => return Err(e.into()),
                Err(e) => tracing::debug!(error = %e, "cannot look for floe resume; looking again"),
            }
        }
    }

    /// The batch is committed.
    pub(super) fn let_through(&mut self, batch: u64, passed: Passed) {
        let Some(breaker) = &mut self.breaker else { return };
        let was_open = match passed {
            Passed::Below(sample) => breaker.passed((self.clock)(), sample),
            Passed::Unasked | Passed::ByHand => breaker.passed_regardless(),
        };
        if was_open {
            tracing::info!(batch, "circuit breaker closed");
            self.telemetry.breaker(None);
        }
    }
}
