//! Backoff between attempts and deadlines on stages: pure values and one helper that applies a deadline.

use std::time::Duration;

/// How long to wait before the nth retry of one and the same trouble; success resets the count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Strategy {
    /// `initial * 2^n` up to `max`, each with full jitter in its upper half.
    Exponential {
        initial: Duration,
        max: Duration,
    },
    /// `step * (n + 1)` up to `max`.
    Linear {
        step: Duration,
        max: Duration,
    },
    Fixed {
        delay: Duration,
    },
}

impl Strategy {
    /// `random` is in `[0, 1)`.
    pub fn delay(self, attempt: u32, random: f64) -> Duration {
        match self {
            Strategy::Exponential { initial, max } => {
                let ceiling = initial.saturating_mul(1u32.checked_shl(attempt.min(20)).unwrap_or(u32::MAX)).min(max);
                ceiling.mul_f64(0.5 + random / 2.0)
            }
            Strategy::Linear { step, max } => step.saturating_mul(attempt.saturating_add(1)).min(max),
            Strategy::Fixed { delay } => delay,
        }
    }
}

/// The longest that each stage of a batch may take; a warning is logged at 80% of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deadlines {
    pub recover: Duration,
    /// Asking the brokers for latest offsets.
    pub latest_offsets: Duration,
    /// Reading, decoding, aggregating and writing files.
    pub add_batch: Duration,
    /// Writing to the checkpoint: offset log, state, commit log.
    pub checkpoint: Duration,
    /// Committing the tables.
    pub commit: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            recover: Duration::from_secs(300),
            latest_offsets: Duration::from_secs(30),
            add_batch: Duration::from_secs(600),
            checkpoint: Duration::from_secs(60),
            commit: Duration::from_secs(120),
        }
    }
}
