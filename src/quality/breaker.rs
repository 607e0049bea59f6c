//! The circuit breaker on the share of refused records, as a pure value.
//!
//! It looks at the records of the batches that this process has let through within the window, plus the batch in hand. It
//! trips when there are `min_records` of them or more, the share of refused ones is above the limit, and so is that of the
//! batch in hand: a batch that is better than the limit is never held back for what came before it. After a restart the
//! window begins anew.
//!
//! A batch of fewer than `min_records` that was held back passes once those before it have left the window: then it is the
//! trial of a half-open breaker, and the next batch, with all that has piled up meanwhile, decides.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::batch::BatchId;
use crate::config::BreakerConfig;

/// The wait between two probes doubles up to this many times the first one.
const LONGEST_WAIT: u32 = 32;

/// Records of one batch, and how many of them became dead letters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    pub records: u64,
    pub refused: u64,
}

impl Sample {
    fn rate(self) -> f64 {
        if self.records == 0 { 0.0 } else { self.refused as f64 / self.records as f64 }
    }
}

/// Why a batch is held back.
#[derive(Clone, Debug, PartialEq)]
pub struct Trip {
    pub batch: Sample,
    /// The batch included.
    pub window: Sample,
    pub limits: BreakerConfig,
}

impl fmt::Display for Trip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |rate: f64| (rate * 10_000.0).round() / 100.0;
        let Sample { records, refused } = self.batch;
        write!(f, "{refused} of its {records} records were refused ({} %)", percent(self.batch.rate()))?;
        if self.window != self.batch {
            let Sample { records, refused } = self.window;
            write!(f, ", {refused} of {records} within {:?}", self.limits.window)?;
        }
        write!(f, "; quality.max_error_rate allows {} %", percent(self.limits.max_error_rate))
    }
}

#[derive(Clone, Debug)]
pub struct Breaker {
    limits: BreakerConfig,
    /// Batches let through, oldest first, each with the time.
    passed: VecDeque<(i64, Sample)>,
    /// The batch that is held back, and how often it was found wanting.
    held: Option<(BatchId, u32)>,
}

impl Breaker {
    pub fn new(limits: BreakerConfig) -> Breaker {
        Breaker { limits, passed: VecDeque::new(), held: None }
    }

    /// Whether the batch may be committed.
    pub fn check(&mut self, now_ms: i64, batch: BatchId, sample: Sample) -> Result<(), Trip> {
        let window_ms = i64::try_from(self.limits.window.as_millis()).unwrap_or(i64::MAX);
        let oldest = now_ms.saturating_sub(window_ms);
        while self.passed.front().is_some_and(|(at, _)| *at < oldest) {
            self.passed.pop_front();
        }
        let mut window = sample;
        for (_, passed) in &self.passed {
            window.records += passed.records;
            window.refused += passed.refused;
        }
        let limit = self.limits.max_error_rate;
        if window.records < self.limits.min_records || window.rate() <= limit || sample.rate() <= limit {
            return Ok(());
        }
        self.held = match self.held {
            Some((held, times)) if held == batch => Some((batch, times.saturating_add(1))),
            _ => Some((batch, 0)),
        };
        Err(Trip { batch: sample, window, limits: self.limits.clone() })
    }

    /// The batch is committed. True when it had been held back.
    pub fn passed(&mut self, now_ms: i64, sample: Sample) -> bool {
        if sample.records > 0 {
            self.passed.push_back((now_ms, sample));
        }
        self.held.take().is_some()
    }

    /// The batch is committed without regard to the limit, because a person said so: what it was held back for counts no
    /// longer, or the next batch would be held back for it again. True when it had been held back.
    pub fn passed_regardless(&mut self) -> bool {
        self.passed.clear();
        self.held.take().is_some()
    }

    /// How long to wait before the batch that is held back is tried again.
    pub fn wait(&self) -> Duration {
        let times = self.held.map_or(0, |(_, times)| times);
        self.limits.probe_interval.saturating_mul(1u32.checked_shl(times).unwrap_or(u32::MAX).min(LONGEST_WAIT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn breaker(max_error_rate: f64, min_records: u64) -> Breaker {
        let (window, probe_interval) = (Duration::from_secs(60), Duration::from_secs(1));
        Breaker::new(BreakerConfig { max_error_rate, min_records, window, probe_interval })
    }

    fn sample(records: u64, refused: u64) -> Sample {
        Sample { records, refused }
    }

    #[test]
    fn it_trips_above_the_limit_and_not_at_it() {
        let mut breaker = breaker(0.1, 100);
        assert!(breaker.check(0, 0, sample(1_000, 100)).is_ok());
        let trip = breaker.check(0, 0, sample(1_000, 101)).unwrap_err();
        assert_eq!(
            trip.to_string(),
            "101 of its 1000 records were refused (10.1 %); quality.max_error_rate allows 10 %"
        );
        assert!(breaker.held.is_some());
    }

    #[test]
    fn few_records_prove_nothing() {
        let mut breaker = breaker(0.1, 100);
        assert!(breaker.check(0, 0, sample(99, 99)).is_ok());
        assert!(breaker.check(0, 0, sample(100, 100)).is_err());
        assert!(breaker.check(0, 0, sample(0, 0)).is_ok());
    }

    #[test]
    fn small_batches_add_up_within_the_window_and_are_forgotten_after_it() {
        let mut breaker = breaker(0.5, 100);
        breaker.passed(0, sample(60, 60));
        let trip = breaker.check(1_000, 1, sample(60, 60)).unwrap_err();
        assert_eq!(trip.window, sample(120, 120));
        assert!(trip.to_string().contains("120 of 120 within 60s"), "{trip}");
        assert!(breaker.check(60_000, 1, sample(60, 60)).is_err(), "as old as the window");
        assert!(breaker.check(60_001, 1, sample(60, 60)).is_ok());
        assert!(breaker.passed(60_001, sample(60, 60)), "it had been held back");
        assert!(breaker.held.is_none());
    }

    #[test]
    fn a_clean_past_outweighs_a_bad_batch_and_a_bad_past_holds_no_clean_batch() {
        let mut breaker = breaker(0.1, 100);
        breaker.passed(0, sample(10_000, 0));
        assert!(breaker.check(1, 1, sample(100, 100)).is_ok());
        let mut breaker = self::breaker(0.1, 100);
        breaker.passed(0, sample(99, 99));
        assert!(breaker.check(1, 1, sample(100, 5)).is_ok());
    }

    #[test]
    fn waits_double_while_the_same_batch_is_held_back() {
        let mut breaker = breaker(0.0, 1);
        let mut waits = Vec::new();
        for _ in 0..8 {
            assert!(breaker.check(0, 7, sample(1, 1)).is_err());
            waits.push(breaker.wait().as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 32, 32]);
        assert!(breaker.check(0, 8, sample(1, 1)).is_err());
        assert_eq!(breaker.wait().as_secs(), 1, "another batch, another count");
    }

    #[test]
    fn a_batch_that_a_person_lets_through_does_not_hold_up_the_next() {
        let mut breaker = breaker(0.1, 100);
        breaker.passed(0, sample(99, 99));
        assert!(breaker.check(1, 1, sample(100, 100)).is_err());
        assert!(breaker.passed_regardless());
        assert!(breaker.held.is_none());
        assert!(breaker.check(2, 2, sample(50, 50)).is_ok());
    }

    proptest! {
        #[test]
        fn it_holds_back_nothing_that_is_within_the_limit(
            batches in proptest::collection::vec((0u64..5_000, 0.0f64..=1.0, 0i64..100_000), 1..50),
            limit in 0.0f64..1.0, min in 1u64..3_000,
        ) {
            let mut breaker = breaker(limit, min);
            let mut now = 0;
            for (batch, (records, share, wait)) in (0..).zip(batches) {
                now += wait;
                let sample = sample(records, (records as f64 * share) as u64);
                match breaker.check(now, batch, sample) {
                    Ok(()) => { breaker.passed(now, sample); }
                    Err(trip) => {
                        prop_assert!(trip.window.records >= min && trip.window.records >= records);
                        prop_assert!(trip.window.rate() > limit && sample.rate() > limit);
                    }
                }
            }
        }
    }
}
