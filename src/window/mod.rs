//! Window assignment and the watermark: pure. The semantics are Spark's.
//!
//! Owns: which windows a time falls into ([`Windowing`]), how the watermark advances, when a window is closed, when a batch
//! without data runs; [`watermark`]: over which partitions; [`reread`]: how far back in the topics open windows reach. Does not own: the groups inside a window ([`crate::state`]).
//! Times are microseconds since the epoch, watermarks milliseconds, as in Spark. The watermark never goes back; where it
//! starts is the policy's. Windows are half-open, `[start, end)`.

pub mod reread;
pub mod watermark;
mod windowing;

pub use windowing::{Covering, Windowing};

/// Before all time: a watermark that is not set yet, where one is compared with. Nothing is late and no window closed.
pub const UNSET_WATERMARK_MS: i64 = i64::MIN;
/// Where a watermark starts: at the epoch, as Spark's does.
pub const INITIAL_WATERMARK_MS: i64 = 0;

/// The watermark after a batch: the largest event time of the batch, floored to milliseconds, less the delay; never back.
/// `max_event_us` counts late rows too and is `None` for a batch without rows.
pub fn advance(current_ms: i64, max_event_us: Option<i64>, delay_ms: i64) -> i64 {
    match max_event_us {
        Some(time_us) => current_ms.max(time_us.div_euclid(1000).saturating_sub(delay_ms)),
        None => current_ms,
    }
}

/// Whether the watermark has passed a window. Lateness asks this with the previous batch's watermark, eviction with the
/// batch's own; both look at the window's end, never at a row's time.
pub fn closed(window_end_us: i64, watermark_ms: i64) -> bool {
    window_end_us <= watermark_ms.saturating_mul(1000)
}

/// Whether a batch runs although there is nothing to read: iff the watermark has moved since the last batch. The batch
/// itself leaves the watermark alone, so at most one follows each batch with data.
pub fn runs_without_data(next_ms: i64, last_executed_ms: i64) -> bool {
    next_ms > last_executed_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watermark_floors_to_milliseconds_and_never_goes_back() {
        assert_eq!(advance(0, None, 10), 0);
        assert_eq!(advance(0, Some(-5), 0), 0);
        assert_eq!(advance(0, Some(1_999), 0), 1);
        assert_eq!(advance(5, Some(1_000), 0), 5);
        assert_eq!(advance(0, Some(20_000_999), 10_000), 10_000);
        assert_eq!(advance(3, Some(i64::MIN), i64::MAX), 3);
        assert_eq!(advance(-9, Some(-7_001), 0), -8);
    }

    #[test]
    fn a_window_closes_when_the_watermark_reaches_its_end() {
        assert!(closed(60_000_000, 60_000));
        assert!(!closed(60_000_001, 60_000));
        assert!(closed(0, INITIAL_WATERMARK_MS));
        assert!(!closed(i64::MAX, i64::MAX / 1000));
        assert!(!closed(i64::MIN + 1, UNSET_WATERMARK_MS));
        assert!(runs_without_data(1, 0) && !runs_without_data(1, 1));
    }
}
