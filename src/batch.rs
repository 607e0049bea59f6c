//! A micro-batch and how it is planned: pure values.
//!
//! Owns: identifiers, half-open offset ranges, the plan that the offset log records, the sharing out of a limit over
//! partitions. Does not own: where the latest offsets come from ([`crate::source`]) or where the plan goes
//! ([`crate::checkpoint`]).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::window::UNSET_WATERMARK_MS;
use crate::window::watermark::HeldBy;

pub type BatchId = u64;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    pub topic: Arc<str>,
    pub partition: i32,
}

impl TopicPartition {
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        TopicPartition { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// Half-open: `start` is the first offset inside, `end` the first one outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetRange {
    pub start: i64,
    pub end: i64,
}

impl OffsetRange {
    pub fn len(self) -> u64 {
        u64::try_from(self.end - self.start).unwrap_or(0)
    }

    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }
}

pub type Ranges = BTreeMap<TopicPartition, OffsetRange>;
pub type Offsets = BTreeMap<TopicPartition, i64>;

/// The watermarks in force while a batch runs, in milliseconds since the epoch; None: not set yet. Spark 3.4 and later keep
/// two: a row is late by the previous batch's watermark and a window closes by this batch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermarks {
    pub late_ms: Option<i64>,
    pub evict_ms: Option<i64>,
}

impl Watermarks {
    /// To be compared with: not set is before all time.
    pub fn late(self) -> i64 {
        self.late_ms.unwrap_or(UNSET_WATERMARK_MS)
    }

    /// To be compared with: not set is before all time.
    pub fn evict(self) -> i64 {
        self.evict_ms.unwrap_or(UNSET_WATERMARK_MS)
    }
}

/// Offsets that were promised and are gone: `fail_on_data_loss = false` steps over them and leaves a gap row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub topic: Arc<str>,
    pub partition: i32,
    pub range: OffsetRange,
    pub cause: String,
}

/// The plan of one batch, as the offset log records it. Executing it is a pure function of the plan, the state of the
/// batch before and the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MicroBatch {
    pub batch: BatchId,
    /// The owner that planned it.
    pub epoch: u64,
    pub trigger_time_ms: i64,
    pub config_fingerprint: String,
    /// Every known partition, those with nothing to read included: its `end` is where the next batch starts.
    #[serde(with = "by_topic")]
    pub ranges: Ranges,
    #[serde(default)]
    pub gaps: Vec<Gap>,
    pub topic_ids: BTreeMap<String, String>,
    pub watermarks: Watermarks,
    /// How many offsets of a partition wait beyond its range; partitions with none are left out.
    #[serde(default, with = "by_topic", skip_serializing_if = "BTreeMap::is_empty")]
    pub left_behind: BTreeMap<TopicPartition, u64>,
    /// Which partition holds the watermark back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_by: Option<HeldBy>,
    /// UUID of every table of the pipeline: one dropped and re-created in between is fatal.
    pub tables: BTreeMap<String, Uuid>,
}

impl MicroBatch {
    pub fn offsets(&self) -> u64 {
        self.ranges.values().map(|r| r.len()).sum()
    }

    pub fn is_no_data(&self) -> bool {
        self.ranges.values().all(|r| r.is_empty())
    }

    /// Where the next batch starts.
    pub fn ends(&self) -> Offsets {
        self.ranges.iter().map(|(tp, range)| (tp.clone(), range.end)).collect()
    }
}

/// How much one batch may take. Both limits hold; a batch that has anything to read takes at least one offset, unless
/// `max_offsets` is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    pub max_offsets: Option<u64>,
    pub max_bytes: Option<u64>,
    /// Measured on earlier batches. `None`, as for the first batch of a process, counts as [`ASSUMED_BYTES_PER_RECORD`].
    pub bytes_per_record: Option<f64>,
}

/// Large for a record on purpose: a first batch that is too small costs one trigger, one that is too large costs memory.
pub const ASSUMED_BYTES_PER_RECORD: f64 = 4096.0;

impl Limits {
    /// The two limits as one number of offsets. Offsets stand for records: where transactions or compaction leave holes a
    /// batch has fewer records than offsets, never more.
    fn offsets(&self) -> u64 {
        let by_bytes = self.max_bytes.map_or(u64::MAX, |max_bytes| {
            let measured = self.bytes_per_record.filter(|bytes| bytes.is_finite() && *bytes > 0.0);
            // A cast of a float saturates.
            ((max_bytes as f64 / measured.unwrap_or(ASSUMED_BYTES_PER_RECORD)) as u64).max(1)
        });
        self.max_offsets.unwrap_or(u64::MAX).min(by_bytes)
    }
}

/// Partitions that a batch has read and that the brokers no longer have: data loss, as Kafka never removes a partition
/// other than with its topic.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} gone from the brokers: {}", if .partitions.len() == 1 { "a partition is" } else { "partitions are" }, list(.partitions))]
pub struct Vanished {
    pub partitions: Vec<TopicPartition>,
}

fn list(partitions: &[TopicPartition]) -> String {
    partitions.iter().map(TopicPartition::to_string).collect::<Vec<_>>().join(", ")
}

/// The ranges of the next batch. `start` is where each partition's next range starts: the ends of the plan before, or the
/// starting offsets for the first batch. A partition that `start` does not know is new and starts at its earliest offset.
///
/// The limit is shared out in proportion to backlog. Every partition with a backlog gets at least one offset if the limit
/// allows for that; if not, the largest backlogs go first, so that none waits for ever. Every known partition is in the
/// result, with an empty range when there is nothing to read. No range starts anywhere but at `start`, even when the
/// offsets there are gone: that is for [`data_loss`] to find and for [`step_over`] to skip.
pub fn plan_ranges(
    start: &Offsets,
    available: &BTreeMap<TopicPartition, OffsetRange>,
    limits: &Limits,
) -> Result<Ranges, Vanished> {
    let partitions: Vec<_> = start.keys().filter(|tp| !available.contains_key(*tp)).cloned().collect();
    if !partitions.is_empty() {
        return Err(Vanished { partitions });
    }
    let starts: Vec<i64> = available.iter().map(|(tp, range)| start.get(tp).copied().unwrap_or(range.start)).collect();
    let backlogs: Vec<u64> = available
        .values()
        .zip(&starts)
        .map(|(range, start)| range.end.abs_diff(*start) * u64::from(range.end > *start))
        .collect();
    let shares = share_out(limits.offsets(), &backlogs);
    let ranges = starts
        .iter()
        .zip(shares)
        .map(|(start, share)| OffsetRange { start: *start, end: start.saturating_add_unsigned(share) });
    Ok(available.keys().cloned().zip(ranges).collect())
}

/// Shares `limit` out over backlogs, none getting more than it has; ties go to the earlier one.
fn share_out(limit: u64, backlogs: &[u64]) -> Vec<u64> {
    let total: u128 = backlogs.iter().map(|b| u128::from(*b)).sum();
    if total <= u128::from(limit) {
        return backlogs.to_vec();
    }
    let mut shares: Vec<u64> = backlogs.iter().map(|b| u64::from(*b > 0)).collect();
    let waiting = shares.iter().sum::<u64>();
    let mut order: Vec<usize> = (0..backlogs.len()).collect();
    if limit < waiting {
        order.sort_by_key(|i| std::cmp::Reverse(backlogs[*i]));
        let rank_of_last = usize::try_from(limit).unwrap_or(usize::MAX);
        order.iter().skip(rank_of_last).for_each(|i| shares[*i] = 0);
        return shares;
    }
    // One each is given. The rest by largest remainder: whoever is rounded down the most gets one more.
    let (rest, total) = (u128::from(limit - waiting), total - u128::from(waiting));
    let exact = |i: usize| rest * u128::from(backlogs[i].saturating_sub(1));
    for (i, share) in shares.iter_mut().enumerate() {
        *share += u64::try_from(exact(i) / total).unwrap_or(u64::MAX);
    }
    let left = limit - shares.iter().sum::<u64>();
    order.sort_by_key(|i| std::cmp::Reverse(exact(*i) % total));
    order.iter().take(usize::try_from(left).unwrap_or(usize::MAX)).for_each(|i| shares[*i] += 1);
    shares
}

/// Offsets that a batch from `start` needs and the brokers do not have. Vanished partitions are not among them: see
/// [`plan_ranges`].
pub fn data_loss(start: &Offsets, available: &BTreeMap<TopicPartition, OffsetRange>) -> Vec<Gap> {
    let gap = |tp: &TopicPartition, start, end, cause: &str| Gap {
        topic: tp.topic.clone(),
        partition: tp.partition,
        range: OffsetRange { start, end },
        cause: cause.to_string(),
    };
    let mut gaps = Vec::new();
    for (tp, range) in available {
        match start.get(tp) {
            Some(start) if *start < range.start => {
                gaps.push(gap(
                    tp,
                    *start,
                    range.start,
                    "expired: the topic's retention removed them before they were read",
                ));
            }
            Some(start) if *start > range.end => gaps.push(gap(
                tp,
                range.end,
                *start,
                "truncated or re-created: the topic holds less than was read from it before",
            )),
            _ => {}
        }
    }
    gaps
}

/// `start` after the gaps, for `fail_on_data_loss = false`: past what expired, back to the end of what was truncated.
pub fn step_over(start: &Offsets, gaps: &[Gap]) -> Offsets {
    let mut start = start.clone();
    for gap in gaps {
        if let Some(offset) = start.get_mut(&TopicPartition::new(gap.topic.clone(), gap.partition)) {
            *offset = if *offset == gap.range.start { gap.range.end } else { gap.range.start };
        }
    }
    start
}

/// How many offsets of each partition wait beyond `ranges`, for those where there are any.
pub fn left_behind(
    ranges: &Ranges,
    available: &BTreeMap<TopicPartition, OffsetRange>,
) -> BTreeMap<TopicPartition, u64> {
    let left = |(tp, range): (&TopicPartition, &OffsetRange)| {
        let left = OffsetRange { start: range.end, end: available.get(tp)?.end }.len();
        (left > 0).then(|| (tp.clone(), left))
    };
    ranges.iter().filter_map(left).collect()
}

/// How many offsets wait to be read.
pub fn backlog(start: &Offsets, available: &BTreeMap<TopicPartition, OffsetRange>) -> u64 {
    let behind = |(tp, range): (&TopicPartition, &OffsetRange)| {
        OffsetRange { start: start.get(tp).copied().unwrap_or(range.start), end: range.end }.len()
    };
    available.iter().map(behind).fold(0, u64::saturating_add)
}

/// `min_offsets_per_trigger`: wait for that many, but not beyond `max_trigger_delay`. Nothing to read is no reason to run.
pub fn should_run(backlog: u64, min: u64, waited: Duration, max_delay: Duration) -> bool {
    backlog > 0 && (backlog >= min || waited >= max_delay)
}

/// What a query that drains may read: partitions and ends as they were at its start. Look for [`data_loss`] in what
/// is available before it is capped.
pub fn cap(available: &BTreeMap<TopicPartition, OffsetRange>, ends: &Offsets) -> BTreeMap<TopicPartition, OffsetRange> {
    let capped = |(tp, range): (&TopicPartition, &OffsetRange)| {
        ends.get(tp).map(|end| (tp.clone(), OffsetRange { start: range.start, end: range.end.min(*end) }))
    };
    available.iter().filter_map(capped).collect()
}

/// Maps keyed by [`TopicPartition`] as `{topic: {partition: value}}`, the shape that JSON can carry and Spark users know.
pub mod by_topic {
    use super::*;
    use serde::de::DeserializeOwned;
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer, V: Serialize>(map: &BTreeMap<TopicPartition, V>, s: S) -> Result<S::Ok, S::Error> {
        let mut nested: BTreeMap<&str, BTreeMap<i32, &V>> = BTreeMap::new();
        for (tp, value) in map {
            nested.entry(&tp.topic).or_default().insert(tp.partition, value);
        }
        nested.serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, V: DeserializeOwned>(
        d: D,
    ) -> Result<BTreeMap<TopicPartition, V>, D::Error> {
        let nested: BTreeMap<String, BTreeMap<i32, V>> = BTreeMap::deserialize(d)?;
        let mut map = BTreeMap::new();
        for (topic, partitions) in nested {
            let topic: Arc<str> = topic.into();
            for (partition, value) in partitions {
                map.insert(TopicPartition { topic: topic.clone(), partition }, value);
            }
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tp(partition: i32) -> TopicPartition {
        TopicPartition::new("t", partition)
    }

    fn offsets(values: &[i64]) -> Offsets {
        (0..).map(tp).zip(values.iter().copied()).collect()
    }

    fn available(values: &[(i64, i64)]) -> BTreeMap<TopicPartition, OffsetRange> {
        (0..).map(tp).zip(values.iter().map(|(start, end)| OffsetRange { start: *start, end: *end })).collect()
    }

    fn max_offsets(n: u64) -> Limits {
        Limits { max_offsets: Some(n), ..Limits::default() }
    }

    fn lens(ranges: &Ranges) -> Vec<u64> {
        ranges.values().map(|r| r.len()).collect()
    }

    #[test]
    fn without_a_limit_everything_is_read_and_new_partitions_start_at_their_earliest() {
        let ranges =
            plan_ranges(&offsets(&[5, 10]), &available(&[(0, 8), (0, 10), (3, 9)]), &Limits::default()).unwrap();
        let starts_and_ends: Vec<_> = ranges.values().map(|r| (r.start, r.end)).collect();
        assert_eq!(starts_and_ends, [(5, 8), (10, 10), (3, 9)]);
    }

    #[test]
    fn the_limit_is_shared_in_proportion_and_nobody_starves() {
        let all = available(&[(0, 8_000), (0, 2_000), (0, 0), (0, 1)]);
        assert_eq!(lens(&plan_ranges(&Offsets::new(), &all, &max_offsets(1_000)).unwrap()), [799, 200, 0, 1]);
        assert_eq!(lens(&plan_ranges(&Offsets::new(), &all, &max_offsets(2)).unwrap()), [1, 1, 0, 0]);
        assert_eq!(lens(&plan_ranges(&Offsets::new(), &all, &max_offsets(0)).unwrap()), [0, 0, 0, 0]);
    }

    #[test]
    fn bytes_bound_a_batch_and_an_unknown_record_size_is_taken_for_large() {
        let all = available(&[(0, 1_000_000)]);
        let planned = |max_bytes, bytes_per_record| {
            let limits = Limits { max_offsets: Some(100_000), max_bytes: Some(max_bytes), bytes_per_record };
            lens(&plan_ranges(&Offsets::new(), &all, &limits).unwrap())[0]
        };
        assert_eq!(planned(1 << 20, Some(100.0)), 10_485);
        assert_eq!(planned(1 << 20, None), 256);
        assert_eq!(planned(1 << 20, Some(f64::NAN)), 256);
        assert_eq!(planned(1 << 40, Some(1.0)), 100_000);
        assert_eq!(planned(10, Some(100.0)), 1, "a record larger than the limit is still read");
    }

    #[test]
    fn a_partition_that_vanished_is_an_error_that_names_it() {
        let gone = plan_ranges(&offsets(&[1, 2, 3]), &available(&[(0, 5)]), &Limits::default()).unwrap_err();
        assert_eq!(gone.to_string(), "partitions are gone from the brokers: t-1, t-2");
    }

    #[test]
    fn lost_offsets_are_named_exactly_and_can_be_stepped_over() {
        let (start, now) = (offsets(&[5, 50, 7, 3]), available(&[(9, 20), (0, 40), (7, 7), (0, 3)]));
        let gaps = data_loss(&start, &now);
        let found: Vec<_> = gaps.iter().map(|g| (g.partition, g.range.start, g.range.end)).collect();
        assert_eq!(found, [(0, 5, 9), (1, 40, 50)]);
        assert!(gaps[0].cause.starts_with("expired") && gaps[1].cause.starts_with("truncated"));
        let after = step_over(&start, &gaps);
        assert_eq!(after, offsets(&[9, 40, 7, 3]));
        assert_eq!(data_loss(&after, &now), []);
    }

    #[test]
    fn no_range_moves_off_its_start_when_offsets_are_lost() {
        let ranges = plan_ranges(&offsets(&[5, 50]), &available(&[(9, 20), (0, 40)]), &Limits::default()).unwrap();
        assert_eq!(ranges[&tp(0)], OffsetRange { start: 5, end: 20 });
        assert_eq!(ranges[&tp(1)], OffsetRange { start: 50, end: 50 });
    }

    #[test]
    fn a_trigger_waits_for_enough_offsets_but_not_for_ever() {
        let (short, long) = (Duration::from_secs(1), Duration::from_secs(60));
        assert!(should_run(1, 0, Duration::ZERO, long));
        assert!(!should_run(0, 0, long, short), "nothing to read");
        assert!(!should_run(9, 10, short, long));
        assert!(should_run(10, 10, short, long));
        assert!(should_run(1, 10, long, long));
    }

    #[test]
    fn draining_stops_at_the_ends_recorded_at_the_start() {
        let ends = offsets(&[10, 20]);
        let capped = cap(&available(&[(0, 15), (25, 30), (0, 5)]), &ends);
        assert_eq!(capped, available(&[(0, 10), (25, 20)]));
        assert_eq!(backlog(&offsets(&[4, 20]), &capped), 6);
        let last = plan_ranges(&ends, &capped, &Limits::default()).unwrap();
        assert!(last.values().all(|r| r.is_empty()));
    }

    #[test]
    fn plans_from_before_watermarks_could_be_unset_are_read() {
        let plan: MicroBatch = serde_json::from_str(
            r#"{"batch":3,"epoch":1,"trigger_time_ms":1,"config_fingerprint":"f","ranges":{"t":{"0":{"start":1,"end":2}}},"gaps":[],
                "topic_ids":{},"watermarks":{"late_ms":0,"evict_ms":5},"tables":{}}"#,
        )
        .unwrap();
        assert_eq!(plan.watermarks, Watermarks { late_ms: Some(0), evict_ms: Some(5) });
        assert!(plan.left_behind.is_empty() && plan.held_by.is_none());
        let unset = Watermarks::default();
        assert!(unset.evict() < i64::MIN + 1 && unset.late_ms < plan.watermarks.late_ms);
    }

    #[test]
    fn a_plan_survives_json() {
        let plan = MicroBatch {
            batch: 3,
            epoch: 2,
            trigger_time_ms: 1,
            config_fingerprint: "f".into(),
            ranges: [
                (TopicPartition::new("a.b", 10), OffsetRange { start: 1, end: 2 }),
                (tp(2), OffsetRange { start: 0, end: 0 }),
            ]
            .into(),
            gaps: data_loss(&offsets(&[0]), &available(&[(2, 3)])),
            topic_ids: BTreeMap::new(),
            watermarks: Watermarks { late_ms: None, evict_ms: Some(i64::MAX) },
            left_behind: [(tp(3), 7)].into(),
            held_by: None,
            tables: [("t".to_string(), Uuid::from_u128(7))].into(),
        };
        let json = serde_json::to_string(&plan).unwrap();
        assert!(
            json.contains(r#""ranges":{"a.b":{"10":{"start":1,"end":2}},"t":{"2":{"start":0,"end":0}}}"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<MicroBatch>(&json).unwrap(), plan);
        assert_eq!((plan.offsets(), plan.is_no_data()), (1, false));
        assert_eq!(plan.ends()[&TopicPartition::new("a.b", 10)], 2);
    }

    fn backlogs() -> impl Strategy<Value = Vec<u64>> {
        let backlog = prop_oneof![Just(0), 1u64..5, 0u64..1_000_000, Just(i64::MAX as u64)];
        proptest::collection::vec(backlog, 0..40)
    }

    proptest! {
        #[test]
        fn shares_use_the_limit_up_and_never_exceed_it(backlogs in backlogs(), limit in prop_oneof![0u64..50, 0u64..2_000_000, Just(u64::MAX)]) {
            let shares = share_out(limit, &backlogs);
            let total: u128 = backlogs.iter().map(|b| u128::from(*b)).sum();
            let shared: u128 = shares.iter().map(|s| u128::from(*s)).sum();
            prop_assert_eq!(shared, total.min(u128::from(limit)));
            let waiting = backlogs.iter().filter(|b| **b > 0).count() as u64;
            for (share, backlog) in shares.iter().zip(&backlogs) {
                prop_assert!(share <= backlog);
                prop_assert!(limit < waiting || *backlog == 0 || *share > 0);
            }
            // In proportion: a larger backlog never gets less.
            for i in 0..backlogs.len() {
                for j in 0..backlogs.len() {
                    prop_assert!(backlogs[i] <= backlogs[j] || shares[i] + 1 >= shares[j]);
                }
            }
            prop_assert_eq!(share_out(limit, &backlogs), shares);
        }

        #[test]
        fn batches_in_a_row_read_every_offset_once(ends in proptest::collection::vec(0i64..200, 1..8), limit in 1u64..50) {
            let all = available(&ends.iter().map(|end| (0, *end)).collect::<Vec<_>>());
            let (mut start, mut read) = (Offsets::new(), 0);
            for _ in 0..2_000 {
                let ranges = plan_ranges(&start, &all, &max_offsets(limit)).unwrap();
                prop_assert!(ranges.iter().all(|(tp, range)| start.get(tp).is_none_or(|s| *s == range.start)));
                read += ranges.values().map(|r| r.len()).sum::<u64>();
                start = ranges.into_iter().map(|(tp, range)| (tp, range.end)).collect();
                if backlog(&start, &all) == 0 {
                    break;
                }
            }
            prop_assert_eq!(read, ends.iter().sum::<i64>() as u64);
        }
    }
}
