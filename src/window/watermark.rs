//! How the watermark is computed over partitions: pure values.
//!
//! Owns: the two policies, what is remembered of each partition, when a partition is idle and which one holds the watermark
//! back. Does not own: what a watermark closes ([`super::closed`]), the logs it is kept in ([`crate::checkpoint`]).
//!
//! - `global-max`, Spark's: the latest event time of all rows, less the delay. A batch decides it for the next one.
//! - `partition-min`: the least, over the partitions that are not idle, of each one's latest event time, less the delay. Planning
//!   decides it, since only planning knows which partitions have a backlog; the plan logs it, so a replay uses the same.
//!
//! Invariants: it never goes back. Under `partition-min` it is never beyond the latest event time, less the delay, of a
//! partition that was not idle; so a row that came within the delay on its own partition is late only if its partition was
//! idle before. What is remembered after a batch depends on the logged plan and the records alone, never on the clock.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{INITIAL_WATERMARK_MS, advance};
use crate::batch::{BatchId, TopicPartition, by_topic};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatermarkPolicy {
    GlobalMax,
    PartitionMin {
        /// A partition that had nothing to read and no row with an event time for so long, while others had, holds the watermark
        /// back no longer.
        idle_timeout_ms: i64,
    },
}

impl WatermarkPolicy {
    pub fn name(self) -> &'static str {
        match self {
            WatermarkPolicy::GlobalMax => "global-max",
            WatermarkPolicy::PartitionMin { .. } => "partition-min",
        }
    }

    /// What silence and idleness are measured by; what is remembered does not depend on the policy otherwise.
    pub fn idle_timeout_ms(self) -> i64 {
        match self {
            WatermarkPolicy::GlobalMax => i64::MAX,
            WatermarkPolicy::PartitionMin { idle_timeout_ms } => idle_timeout_ms,
        }
    }

    /// Where a new query starts. Spark's watermark starts at the epoch; with `partition-min` there is none, and nothing is
    /// late, until every partition has shown an event time or is idle.
    pub fn initial(self) -> Option<i64> {
        match self {
            WatermarkPolicy::GlobalMax => Some(INITIAL_WATERMARK_MS),
            WatermarkPolicy::PartitionMin { .. } => None,
        }
    }

    /// What a batch says of the next one's watermark, to be logged in its commit: with `global-max` what it will be, with
    /// `partition-min` the least that it will be.
    pub fn after_batch(self, evict_ms: Option<i64>, max_event_time_us: Option<i64>, delay_ms: i64) -> Option<i64> {
        match self {
            WatermarkPolicy::GlobalMax => {
                let current = evict_ms.unwrap_or(INITIAL_WATERMARK_MS).max(INITIAL_WATERMARK_MS);
                Some(advance(current, max_event_time_us, delay_ms))
            }
            WatermarkPolicy::PartitionMin { .. } => evict_ms,
        }
    }
}

/// What is remembered of a partition after a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionTime {
    /// The latest event time so far, late rows included; rows without one, refused or left out do not count.
    pub max_event_time_ms: Option<i64>,
    /// The trigger time of the last batch that had an event time from it or left some of it unread; at first, of the batch that
    /// first planned it.
    pub active_at_ms: i64,
    /// The trigger times of the first and the last batch since then that read all there was and found no event time in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub barren_ms: Option<(i64, i64)>,
}

impl PartitionTime {
    fn new(trigger_time_ms: i64) -> Self {
        PartitionTime { max_event_time_ms: None, active_at_ms: trigger_time_ms, barren_ms: None }
    }

    /// Whether all that was read for the whole timeout was without event time. The time that the process was away for does not
    /// count: nobody knows what has come meanwhile.
    fn is_barren(&self, idle_timeout_ms: i64) -> bool {
        self.barren_ms.is_some_and(|(from, to)| to.saturating_sub(from) >= idle_timeout_ms)
    }
}

/// What is remembered of all partitions after a batch: what the next watermark is computed from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventTimeProgress {
    #[serde(with = "by_topic")]
    pub partitions: BTreeMap<TopicPartition, PartitionTime>,
    /// The trigger time of the batch with which records began to come again after the last silence.
    pub records_since_ms: i64,
}

/// What a batch read of a partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartitionRead {
    pub any_offsets: bool,
    /// There was more than it could take.
    pub left_behind: bool,
    pub max_event_time_us: Option<i64>,
}

impl EventTimeProgress {
    pub fn is_empty(&self) -> bool {
        self.partitions.is_empty()
    }

    /// Of all partitions.
    pub fn latest_ms(&self) -> Option<i64> {
        self.partitions.values().filter_map(|time| time.max_event_time_ms).max()
    }

    /// Silence: no partition has been active for the timeout, be it that nothing came, or that nobody looked.
    pub fn is_silent(&self, trigger_time_ms: i64, idle_timeout_ms: i64) -> bool {
        let last = self.partitions.values().map(|time| time.active_at_ms).max();
        last.is_some_and(|last| trigger_time_ms.saturating_sub(last) >= idle_timeout_ms)
    }

    /// Whether a batch planned at `trigger_time_ms` goes on without waiting for the partition.
    ///
    /// - One with a backlog is never idle, unless everything read from it for the whole timeout was without event time.
    /// - While records come, one is idle when it has not been active for the timeout, nor has the last silence ended within it.
    /// - In silence all have been without records for as long, which says nothing of any: those are idle that have not had a row
    ///   since the silence before. An outage, of producers, brokers or this process, makes no partition idle.
    pub fn is_idle(&self, tp: &TopicPartition, trigger_time_ms: i64, has_backlog: bool, idle_timeout_ms: i64) -> bool {
        let time = self.partitions.get(tp).copied().unwrap_or(PartitionTime::new(trigger_time_ms));
        if has_backlog && !time.is_barren(idle_timeout_ms) {
            return false;
        }
        if self.is_silent(trigger_time_ms, idle_timeout_ms) {
            return time.max_event_time_ms.is_none() || time.active_at_ms < self.records_since_ms;
        }
        let since = time.active_at_ms.max(self.records_since_ms);
        trigger_time_ms.saturating_sub(since) >= idle_timeout_ms
    }

    /// What is remembered after a batch. Partitions that it does not know are forgotten.
    pub fn after_batch(
        &self,
        trigger_time_ms: i64,
        idle_timeout_ms: i64,
        read: impl IntoIterator<Item = (TopicPartition, PartitionRead)>,
    ) -> EventTimeProgress {
        let mut any_active = false;
        let after = |(tp, read): (TopicPartition, PartitionRead)| {
            let mut time = self.partitions.get(&tp).copied().unwrap_or(PartitionTime::new(trigger_time_ms));
            let latest = read.max_event_time_us.map(|us| us.div_euclid(1000));
            time.max_event_time_ms = time.max_event_time_ms.max(latest);
            if latest.is_some() || read.left_behind {
                any_active = true;
                time.active_at_ms = time.active_at_ms.max(trigger_time_ms);
                time.barren_ms = None;
            } else if read.any_offsets {
                time.barren_ms = Some((time.barren_ms.map_or(trigger_time_ms, |(from, _)| from), trigger_time_ms));
            }
            (tp, time)
        };
        let partitions = read.into_iter().map(after).collect();
        let begins = self.is_empty() || any_active && self.is_silent(trigger_time_ms, idle_timeout_ms);
        let records_since_ms = if begins { trigger_time_ms } else { self.records_since_ms };
        EventTimeProgress { partitions, records_since_ms }
    }
}

/// The partition that holds the watermark back, and since when it is that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBy {
    pub topic: String,
    pub partition: i32,
    pub since_batch: BatchId,
    /// The trigger time of that batch.
    pub since_ms: i64,
}

impl HeldBy {
    fn is(&self, tp: &TopicPartition) -> bool {
        self.topic == *tp.topic && self.partition == tp.partition
    }

    /// `since` of the plan before stays when it is the same partition still.
    pub fn at(tp: &TopicPartition, before: Option<&HeldBy>, batch: BatchId, trigger_time_ms: i64) -> HeldBy {
        match before.filter(|before| before.is(tp)) {
            Some(before) => before.clone(),
            None => HeldBy {
                topic: tp.topic.to_string(),
                partition: tp.partition,
                since_batch: batch,
                since_ms: trigger_time_ms,
            },
        }
    }
}

/// What planning decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    pub watermark_ms: Option<i64>,
    /// The partition furthest behind of those that count, if it is behind any other. None with `global-max`.
    pub held_by: Option<TopicPartition>,
}

/// The watermark of a batch planned at `trigger_time_ms`. `at_least_ms` is what the batch before has logged for it: it never goes
/// back behind that. `backlog` says of every partition of the plan, new ones included, whether it has something to read. When
/// all partitions are idle the watermark stays where it is, as in Flink's sources.
pub fn decide(
    policy: WatermarkPolicy,
    delay_ms: i64,
    at_least_ms: Option<i64>,
    progress: &EventTimeProgress,
    trigger_time_ms: i64,
    backlog: &BTreeMap<TopicPartition, bool>,
) -> Decision {
    let WatermarkPolicy::PartitionMin { idle_timeout_ms } = policy else {
        return Decision { watermark_ms: at_least_ms.max(policy.initial()), held_by: None };
    };
    let latest = |tp: &TopicPartition| progress.partitions.get(tp).and_then(|time| time.max_event_time_ms);
    let counts = backlog
        .iter()
        .filter(|(tp, has)| !progress.is_idle(tp, trigger_time_ms, **has, idle_timeout_ms))
        .map(|(tp, _)| tp);
    // None is before every time: a partition that has shown nothing yet holds the watermark where it is.
    let least = counts.map(|tp| (latest(tp), tp)).min();
    let furthest = progress.partitions.values().filter_map(|time| time.max_event_time_ms).max();
    let reached = least.and_then(|(max, _)| max).map(|max| max.saturating_sub(delay_ms));
    Decision {
        watermark_ms: at_least_ms.max(reached),
        held_by: least.filter(|(max, _)| *max < furthest).map(|(_, tp)| tp.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: i64 = 60_000;
    const TIMEOUT: i64 = 5 * MINUTE;
    const POLICY: WatermarkPolicy = WatermarkPolicy::PartitionMin { idle_timeout_ms: TIMEOUT };

    fn tp(partition: i32) -> TopicPartition {
        TopicPartition::new("t", partition)
    }

    /// The latest event time in minutes, and when in minutes the partition was active; records have been coming since 0.
    fn progress(of: &[(Option<i64>, i64)]) -> EventTimeProgress {
        let time = |(max, active): &(Option<i64>, i64)| PartitionTime {
            max_event_time_ms: max.map(|m| m * MINUTE),
            active_at_ms: active * MINUTE,
            barren_ms: None,
        };
        EventTimeProgress { partitions: (0..).map(tp).zip(of.iter().map(time)).collect(), records_since_ms: 0 }
    }

    fn at(of: &EventTimeProgress, last: Option<i64>, now: i64, backlog: &[bool]) -> (Option<i64>, Option<i32>) {
        let backlog = (0..).map(tp).zip(backlog.iter().copied()).collect();
        let decision = decide(POLICY, 2 * MINUTE, last.map(|m| m * MINUTE), of, now * MINUTE, &backlog);
        (decision.watermark_ms.map(|ms| ms / MINUTE), decision.held_by.map(|tp| tp.partition))
    }

    #[test]
    fn the_partition_furthest_behind_decides() {
        let (none, of) = ([false; 3], progress(&[(Some(100), 0), (Some(40), 0), (Some(90), 0)]));
        assert_eq!(at(&of, None, 1, &none), (Some(38), Some(1)));
        // never back
        assert_eq!(at(&of, Some(50), 1, &none), (Some(50), Some(1)));
        assert_eq!(at(&progress(&[(Some(100), 0); 3]), Some(5), 1, &none), (Some(98), None));
        // before 1970
        assert_eq!(at(&progress(&[(Some(-100), 0)]), None, 1, &[false]), (Some(-102), None));
    }

    #[test]
    fn a_partition_that_has_shown_nothing_holds_the_watermark_until_it_is_idle() {
        let of = progress(&[(Some(100), 4), (None, 0)]);
        assert_eq!(at(&of, None, 4, &[false; 2]), (None, Some(1)));
        assert_eq!(at(&of, Some(7), 4, &[false; 2]), (Some(7), Some(1)));
        assert_eq!(at(&of, None, 5, &[false; 2]), (Some(98), None));
        // a new one, found at this planning
        assert_eq!(at(&progress(&[(Some(100), 4)]), Some(7), 5, &[false; 2]), (Some(7), Some(1)));
        assert_eq!(at(&EventTimeProgress::default(), None, 5, &[false; 2]), (None, None));
    }

    #[test]
    fn idle_partitions_do_not_count_and_a_backlog_is_never_idle() {
        let of = progress(&[(Some(100), 59), (Some(40), 55)]);
        assert_eq!(at(&of, None, 59, &[false; 2]), (Some(38), Some(1)));
        assert_eq!(at(&of, None, 60, &[false; 2]), (Some(98), None));
        assert_eq!(at(&of, None, 60, &[false, true]), (Some(38), Some(1)));
    }

    /// After eight hours in which nothing came, or in which nobody looked.
    #[test]
    fn silence_makes_nobody_idle_that_had_rows_since_the_silence_before() {
        let of = progress(&[(Some(100), 59), (Some(40), 57), (None, 0)]);
        for backlog in [[false; 3], [true, false, false], [false, true, false]] {
            assert_eq!(at(&of, Some(38), 540, &backlog), (Some(38), Some(1)));
        }
        assert_eq!(at(&of, None, 540, &[true, false, true]), (None, Some(2)), "a backlog counts whatever was before");

        // When records come again everyone has the timeout once more to come along.
        let seen = |at: i64| read(true, false, Some(at * MINUTE * 1000));
        let nothing = || read(false, false, None);
        let first = of.after_batch(540 * MINUTE, TIMEOUT, [(tp(0), seen(400)), (tp(1), nothing()), (tp(2), nothing())]);
        assert_eq!(first.records_since_ms, 540 * MINUTE);
        assert_eq!(at(&first, Some(38), 544, &[true, false, false]), (Some(38), Some(2)));
        let next =
            first.after_batch(544 * MINUTE, TIMEOUT, [(tp(0), seen(404)), (tp(1), nothing()), (tp(2), nothing())]);
        assert_eq!(next.records_since_ms, 540 * MINUTE);
        assert_eq!(at(&next, Some(38), 545, &[false; 3]), (Some(402), None));
        // Those that do not are left out of the next silence: a few records now and then are enough to go on.
        assert_eq!(at(&first, Some(38), 545, &[false; 3]), (Some(398), None));
        assert_eq!(at(&first, Some(38), 9_000, &[true, false, false]), (Some(398), None));
    }

    #[test]
    fn when_all_are_idle_the_watermark_stays() {
        let mut of = progress(&[(Some(100), 0), (None, 0)]);
        of.records_since_ms = 1;
        assert_eq!(at(&of, Some(38), 60, &[false; 2]), (Some(38), None));
        assert_eq!(at(&of, None, 60, &[false; 2]), (None, None));
    }

    fn read(any_offsets: bool, left_behind: bool, max_event_time_us: Option<i64>) -> PartitionRead {
        PartitionRead { any_offsets, left_behind, max_event_time_us }
    }

    #[test]
    fn the_idle_clock_runs_from_the_last_event_time() {
        let mut now = EventTimeProgress::default();
        let mut batch = |trigger: i64, r: PartitionRead| {
            // another partition that always has rows: there is no silence
            let other = (tp(1), read(true, false, Some(0)));
            now = now.after_batch(trigger * MINUTE, TIMEOUT, [(tp(0), r), other]);
            let mut later = now.clone();
            let mut idle = |at: i64, backlog| {
                later.partitions.get_mut(&tp(1)).unwrap().active_at_ms = at * MINUTE;
                later.is_idle(&tp(0), at * MINUTE, backlog, TIMEOUT)
            };
            (now.partitions[&tp(0)], [idle(trigger + 4, false), idle(trigger + 5, false), idle(trigger + 500, true)])
        };
        let (time, idle) = batch(10, read(false, false, None));
        assert_eq!((time.max_event_time_ms, time.active_at_ms), (None, 10 * MINUTE));
        assert_eq!(idle, [false, true, false]);
        let (time, idle) = batch(12, read(true, false, Some(-1)));
        assert_eq!((time.max_event_time_ms, time.active_at_ms), (Some(-1), 12 * MINUTE));
        assert_eq!(idle, [false, true, false]);
        // an older one changes no maximum; a clock that was set back, no activity
        let (time, _) = batch(11, read(true, false, Some(-5_000_000)));
        assert_eq!((time.max_event_time_ms, time.active_at_ms), (Some(-1), 12 * MINUTE));
        // what is left behind is unknown, so the partition is not idle
        let (time, idle) = batch(15, read(true, true, None));
        assert_eq!((time.active_at_ms, idle), (15 * MINUTE, [false, true, false]));
    }

    #[test]
    fn a_partition_of_which_every_record_is_refused_or_left_out_is_idle_in_the_end() {
        let rows = || (tp(1), read(true, false, Some(0)));
        let mut now = progress(&[(Some(7), 0), (Some(7), 0)]);
        let mut barren = |trigger: i64| {
            now = now.after_batch(trigger * MINUTE, TIMEOUT, [(tp(0), read(true, false, None)), rows()]);
            now.is_idle(&tp(0), (trigger + 1) * MINUTE, true, TIMEOUT)
        };
        assert_eq!([1, 3, 5, 6].map(&mut barren), [false, false, false, true]);
        // one of them right before a long stop says nothing of what has come meanwhile
        let last = progress(&[(Some(7), 0)]).after_batch(MINUTE, TIMEOUT, [(tp(0), read(true, false, None))]);
        assert!(!last.is_idle(&tp(0), 500 * MINUTE, true, TIMEOUT));
        // an event time ends it
        now = now.after_batch(7 * MINUTE, TIMEOUT, [(tp(0), read(true, false, Some(0))), rows()]);
        assert!(!now.is_idle(&tp(0), 500 * MINUTE, true, TIMEOUT));
    }

    #[test]
    fn held_since_stays_as_long_as_it_is_the_same_partition() {
        let first = HeldBy::at(&tp(3), None, 7, 70);
        assert_eq!((first.partition, first.since_batch, first.since_ms), (3, 7, 70));
        assert_eq!(HeldBy::at(&tp(3), Some(&first), 9, 90), first);
        assert_eq!(HeldBy::at(&tp(2), Some(&first), 9, 90).since_batch, 9);
    }

    #[test]
    fn a_policy_that_changes_goes_on_from_where_the_watermark_is() {
        let none = BTreeMap::from([(tp(0), false)]);
        // to partition-min: what the partitions have shown is remembered under both
        let seen = progress(&[(Some(50), 0)]);
        assert_eq!(decide(POLICY, 0, Some(70 * MINUTE), &seen, 1, &none).watermark_ms, Some(70 * MINUTE));
        // to global-max, also from a watermark that is unset or before 1970
        let global = WatermarkPolicy::GlobalMax;
        for (before, after) in [(Some(9), Some(9)), (None, Some(0)), (Some(-9), Some(0))] {
            assert_eq!(decide(global, 0, before, &seen, 1, &none).watermark_ms, after);
            assert_eq!(global.after_batch(before, None, 0), after);
        }
        assert_eq!(global.after_batch(Some(9), Some(20_999), 5), Some(15));
        assert_eq!(POLICY.after_batch(Some(9), Some(20_999), 5), Some(9));
    }

    /// A stream: by partition, event times in milliseconds in the order of their offsets.
    type Stream = Vec<Vec<i64>>;
    /// Partition, row and the watermark that it is judged by.
    type Judged = (usize, usize, Option<i64>);
    const DELAY: i64 = 100;

    /// What planning and executing do with a stream that is there from the start, cut as `takes` says (how many records of
    /// which partition, by batch), at one trigger a millisecond. Returns the watermarks by batch, and every row with the watermark
    /// that it is judged by.
    fn run(stream: &Stream, takes: &[Vec<usize>], timeout: i64) -> (Vec<Option<i64>>, Vec<Judged>) {
        let policy = WatermarkPolicy::PartitionMin { idle_timeout_ms: timeout };
        let mut progress = EventTimeProgress::default();
        let mut at = vec![0; stream.len()];
        let (mut watermarks, mut judged) = (Vec::new(), Vec::new());
        let mut watermark = policy.initial();
        let everything = vec![usize::MAX; stream.len()];
        for (trigger, take) in (0..).zip(takes.iter().chain([&everything, &everything, &everything])) {
            let late = watermark;
            let backlog = (0..).map(tp).zip(stream.iter().zip(&at).map(|(s, at)| s.len() > *at)).collect();
            watermark = decide(policy, DELAY, watermark, &progress, trigger, &backlog).watermark_ms;
            watermarks.push(watermark);
            let mut reads = Vec::new();
            for (p, rows) in stream.iter().enumerate() {
                let end = at[p].saturating_add(take[p]).min(rows.len());
                judged.extend((at[p]..end).map(|row| (p, row, late)));
                let max_event_time_us = rows[at[p]..end].iter().max().map(|ms| ms * 1000 + 999);
                let read = PartitionRead { any_offsets: end > at[p], left_behind: end < rows.len(), max_event_time_us };
                reads.push((tp(p as i32), read));
                at[p] = end;
            }
            progress = progress.after_batch(trigger, timeout, reads);
        }
        (watermarks, judged)
    }

    fn streams() -> impl Strategy<Value = (Stream, Vec<Vec<usize>>)> {
        // each partition has its own place in time: hours ahead or behind
        let partition = (-10_000_000..10_000_000_i64, proptest::collection::vec(-300..300_i64, 1..40));
        let partition = partition.prop_map(|(from, steps)| {
            steps.iter().scan(from, |now, step| Some(std::mem::replace(now, *now + step))).collect::<Vec<_>>()
        });
        proptest::collection::vec(partition, 1..5).prop_flat_map(|stream| {
            let takes = proptest::collection::vec(proptest::collection::vec(0..6_usize, stream.len()), 0..30);
            (Just(stream), takes)
        })
    }

    proptest! {
        #[test]
        fn it_never_goes_back((stream, takes) in streams(), timeout in 0..20_i64) {
            let (watermarks, _) = run(&stream, &takes, timeout);
            prop_assert!(watermarks.is_sorted());
        }

        /// Where no partition is ever idle: however batches are cut.
        #[test]
        fn no_row_within_the_delay_on_its_own_partition_is_late((stream, takes) in streams()) {
            let (_, judged) = run(&stream, &takes, i64::MAX);
            for (p, row, late) in judged {
                let time = stream[p][row];
                let ahead = stream[p][..row].iter().max().copied().unwrap_or(i64::MIN);
                if time >= ahead.saturating_sub(DELAY) {
                    prop_assert!(late.is_none_or(|late| time >= late), "{time} on partition {p}: {late:?}");
                }
            }
        }

        /// A backlog protects however short the timeout is: nobody is idle before its first stop of records.
        #[test]
        fn a_partition_is_not_idle_while_it_has_a_backlog((stream, takes) in streams()) {
            let (_, judged) = run(&stream, &takes, 0);
            for (p, row, late) in judged {
                let ahead = stream[p][..row].iter().max().copied().unwrap_or(i64::MIN);
                if stream[p][row] >= ahead.saturating_sub(DELAY) {
                    prop_assert!(late.is_none_or(|late| stream[p][row] >= late));
                }
            }
        }

        /// Once everything is read it is where the partition furthest behind has brought it, however batches were cut.
        #[test]
        fn in_the_end_batch_bounds_do_not_matter((stream, takes) in streams()) {
            let (watermarks, _) = run(&stream, &takes, i64::MAX);
            let least = stream.iter().map(|rows| rows.iter().max().copied().unwrap_or(i64::MIN)).min();
            prop_assert_eq!(watermarks.last().copied().flatten(), least.map(|ms| ms - DELAY));
        }
    }
}
