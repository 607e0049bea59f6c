//! Window assignment and the watermark: pure. The semantics are Spark's.
//!
//! Owns: which tumbling window a time falls into, how the watermark advances, when a window is closed, when a batch
//! without data runs; [`watermark`]: over which partitions. Does not own: the groups inside a window ([`crate::state`]).
//! Times are microseconds since the epoch, watermarks milliseconds, as in Spark. The watermark never goes back; where it
//! starts is the policy's. Windows are aligned to the epoch in UTC, `[start, end)`.

pub mod watermark;

/// Before all time: a watermark that is not set yet, where one is compared with. Nothing is late and no window closed.
pub const UNSET_WATERMARK_MS: i64 = i64::MIN;
/// Where a watermark starts: at the epoch, as Spark's does.
pub const INITIAL_WATERMARK_MS: i64 = 0;

/// The start of the tumbling window that holds `time_us`. The window that would begin before the smallest `i64` begins
/// there instead. `size_us` is positive (a size below 1 counts as 1).
pub fn window_start(time_us: i64, size_us: i64) -> i64 {
    time_us.saturating_sub(time_us.rem_euclid(size_us.max(1)))
}

/// The end of the window that [`window_start`] gave; one that would lie beyond the largest `i64` lies there.
pub fn window_end(start_us: i64, size_us: i64) -> i64 {
    let size = size_us.max(1);
    // The remainder is 0 except in the window that is cut short at the lower end of the range.
    start_us.saturating_add(size - start_us.rem_euclid(size))
}

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

    const MINUTE: i64 = 60_000_000;

    #[test]
    fn windows_are_aligned_to_the_epoch_and_half_open() {
        assert_eq!(window_start(0, MINUTE), 0);
        assert_eq!(window_start(MINUTE - 1, MINUTE), 0);
        assert_eq!(window_start(MINUTE, MINUTE), MINUTE);
        assert_eq!(window_start(-1, MINUTE), -MINUTE);
        assert_eq!(window_end(-MINUTE, MINUTE), 0);
        // a week starts on Thursday
        let week = 7 * 24 * 60 * MINUTE;
        assert_eq!(window_start(1_704_067_200_000_000, week), 1_703_721_600_000_000);
    }

    #[test]
    fn the_ends_of_the_range_do_not_overflow() {
        for size in [1, 7, MINUTE, i64::MAX] {
            for time in [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX - 1, i64::MAX] {
                let start = window_start(time, size);
                let end = window_end(start, size);
                assert!(start <= time && (time < end || end == i64::MAX), "{time} in {size}: [{start}, {end})");
                assert_eq!(window_start(start, size), start);
            }
        }
        // the window cut short at the lower end still ends where the next one begins
        let end = window_end(window_start(i64::MIN, MINUTE), MINUTE);
        assert_eq!(end.rem_euclid(MINUTE), 0);
        assert!(end - i64::MIN < MINUTE);
    }

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
        assert!(!closed(window_end(window_start(i64::MIN, 1), 1), UNSET_WATERMARK_MS));
        assert!(runs_without_data(1, 0) && !runs_without_data(1, 1));
    }
}
