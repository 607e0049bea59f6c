//! Backoff between attempts and deadlines on stages: pure values and one helper that applies a deadline.

use std::future::Future;
use std::time::{Duration, Instant};

use crate::error::Error;

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
                let ceiling = initial.saturating_mul(1 << attempt.min(31)).min(max);
                let jittered = ceiling.as_secs_f64() * (0.5 + random.clamp(0.0, 1.0) / 2.0);
                // Fails for durations at the very end of the scale only, where rounding overflows.
                Duration::try_from_secs_f64(jittered).unwrap_or(ceiling).min(ceiling)
            }
            Strategy::Linear { step, max } => step.saturating_mul(attempt.saturating_add(1)).min(max),
            Strategy::Fixed { delay } => delay,
        }
    }
}

/// What [`Strategy::delay`] takes for `random`: uniform in `[0, 1)`. Jitter needs no better source.
pub fn random() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / (f64::from(u32::MAX) + 1.0)
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

/// Runs one stage of a batch within its deadline: warns once at 80% of it and gives up at 100%. Giving up drops the future;
/// what it had handed to other threads may still run to its end, which is why [`Error::Deadline`] is `Indeterminate`.
pub async fn with_deadline<T, E>(
    stage: &'static str,
    deadline: Duration,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, Error>
where
    Error: From<E>,
{
    let started = Instant::now();
    let mut future = std::pin::pin!(future);
    let first = deadline.mul_f64(0.8);
    if let Ok(result) = tokio::time::timeout(first, future.as_mut()).await {
        return Ok(result?);
    }
    tracing::warn!(stage, elapsed = ?started.elapsed(), ?deadline, "stage has taken 80% of its deadline");
    match tokio::time::timeout(deadline.saturating_sub(started.elapsed()), future).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Error::Deadline { stage, deadline }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Just, Strategy as _, any, prop_assert, prop_oneof, proptest};

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn exponential_doubles_up_to_its_maximum() {
        let strategy = Strategy::Exponential { initial: SECOND, max: 60 * SECOND };
        let ceilings: Vec<_> = (0..8).map(|n| strategy.delay(n, 1.0).as_secs()).collect();
        assert_eq!(ceilings, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(strategy.delay(3, 0.0), 4 * SECOND, "jitter takes away half at most");
    }

    #[test]
    fn linear_grows_by_steps_and_fixed_does_not() {
        let linear = Strategy::Linear { step: 2 * SECOND, max: 5 * SECOND };
        assert_eq!((0..4).map(|n| linear.delay(n, 0.5).as_secs()).collect::<Vec<_>>(), [2, 4, 5, 5]);
        assert_eq!(linear.delay(u32::MAX, 0.5), 5 * SECOND);
        assert_eq!(Strategy::Fixed { delay: SECOND }.delay(u32::MAX, 0.9), SECOND);
    }

    fn durations() -> impl proptest::strategy::Strategy<Value = Duration> {
        prop_oneof![
            Just(Duration::ZERO),
            Just(Duration::MAX),
            (0u64..1 << 40).prop_map(Duration::from_nanos),
            any::<u64>().prop_map(Duration::from_secs),
        ]
    }

    proptest! {
        #[test]
        fn jitter_stays_in_the_upper_half_and_nothing_overflows(
            initial in durations(), max in durations(), attempt in any::<u32>(), random in 0.0f64..1.0
        ) {
            let strategy = Strategy::Exponential { initial, max };
            let (low, delay, high) = (strategy.delay(attempt, 0.0), strategy.delay(attempt, random), strategy.delay(attempt, 1.0));
            prop_assert!(low <= delay && delay <= high && high <= max, "{low:?} {delay:?} {high:?}");
            prop_assert!((low.as_secs_f64() - high.as_secs_f64() / 2.0).abs() <= 1e-8 * high.as_secs_f64().max(1.0));
            prop_assert!(strategy.delay(attempt.saturating_add(1), 0.0) >= low);
            Strategy::Linear { step: initial, max }.delay(attempt, random);
        }
    }

    #[tokio::test]
    async fn a_stage_within_its_deadline_returns_its_own_result() {
        let done = with_deadline("commit", SECOND, async { Ok::<_, Error>(7) }).await;
        assert_eq!(done.unwrap(), 7);
        let late = async {
            tokio::time::sleep(Duration::from_millis(180)).await;
            Err::<(), _>(Error::Internal("its own".into()))
        };
        let failed = with_deadline("commit", Duration::from_millis(200), late).await;
        assert!(matches!(failed, Err(Error::Internal(_))), "a result that is there counts, even at the last moment");
    }

    #[tokio::test]
    async fn a_stage_beyond_its_deadline_is_given_up() {
        let started = Instant::now();
        let deadline = Duration::from_millis(50);
        let hung = with_deadline("commit", deadline, std::future::pending::<Result<(), Error>>()).await;
        assert!(matches!(hung, Err(Error::Deadline { stage: "commit", .. })));
        assert!(started.elapsed() >= deadline);
    }
}
