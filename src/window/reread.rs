//! From where on a topic would have to be read again to aggregate the open windows once more: what a lost checkpoint is
//! rebuilt from where there is no table of rows. Pure; the commit log keeps it.
//!
//! Nothing but offsets is remembered of batches long done, so a place is chosen, with the latest event time of everything
//! before it, and holds as soon as the watermark has closed all windows of that time. Meanwhile the place before holds. So there
//! is about twice as much to read again as the open windows reach back.
//!
//! Invariant: every record that a batch has read from before [`Reread::from`] is in closed windows only.

use serde::{Deserialize, Serialize};

use crate::batch::{Gap, MicroBatch, Offsets, TopicPartition, by_topic};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reread {
    /// Of every partition of the last plan; empty: not known.
    #[serde(default, with = "by_topic", skip_serializing_if = "Offsets::is_empty")]
    pub from: Offsets,
    /// The place that is next.
    #[serde(default, with = "by_topic", skip_serializing_if = "Offsets::is_empty")]
    next: Offsets,
    /// The latest event time before `next`; None: there is none.
    latest_ms: Option<i64>,
}

impl Reread {
    /// For the first batch with windows: none are open before it.
    pub fn begin(plan: &MicroBatch) -> Reread {
        let starts = plan.ranges.iter().map(|(tp, range)| (tp.clone(), range.start));
        Reread { from: starts.collect(), ..Reread::default() }
    }

    /// After a batch that `from` is known of, and the latest event time of it and all before it.
    pub fn after(from: Offsets, plan: &MicroBatch, latest_ms: Option<i64>) -> Reread {
        Reread { from, next: plan.ends(), latest_ms }
    }

    /// `latest_ms` is the latest event time of all batches up to this one; `closed` says of a time in microseconds whether the
    /// batch has closed all of its windows.
    pub fn after_batch(&self, plan: &MicroBatch, latest_ms: Option<i64>, closed: impl Fn(i64) -> bool) -> Reread {
        let from = carry(&self.from, plan);
        let next = carry(&self.next, plan);
        if next.is_empty() {
            return Reread::after(from, plan, latest_ms);
        }
        // Event times are known to the millisecond, rounded down.
        match self.latest_ms.is_none_or(|ms| closed(ms.saturating_mul(1000).saturating_add(999))) {
            true => Reread::after(next, plan, latest_ms),
            false => Reread { from, next, latest_ms: self.latest_ms },
        }
    }
}

/// The same place with a plan's partitions. Empty when the records behind it are no longer those that were read.
fn carry(place: &Offsets, plan: &MicroBatch) -> Offsets {
    let mut carried: Offsets =
        plan.ranges.iter().map(|(tp, range)| (tp.clone(), place.get(tp).copied().unwrap_or(range.start))).collect();
    if place.is_empty() {
        return Offsets::new();
    }
    for Gap { topic, partition, range: gap, .. } in &plan.gaps {
        let tp = TopicPartition::new(topic.clone(), *partition);
        let (Some(at), Some(range)) = (carried.get_mut(&tp), plan.ranges.get(&tp)) else { continue };
        let stepped_back = range.start == gap.start;
        if stepped_back && *at < gap.end {
            return Offsets::new();
        }
        // Nothing has been read since, neither the gap nor anything before it.
        if *at >= gap.start {
            *at = range.start;
        }
    }
    carried
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{OffsetRange, Ranges, Watermarks};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn tp(partition: i32) -> TopicPartition {
        TopicPartition::new("t", partition)
    }

    fn plan(batch: u64, ranges: &[(i64, i64)]) -> MicroBatch {
        let ranges: Ranges =
            (0..).map(tp).zip(ranges.iter().map(|(start, end)| OffsetRange { start: *start, end: *end })).collect();
        MicroBatch {
            batch,
            epoch: 1,
            trigger_time_ms: 0,
            config_fingerprint: String::new(),
            ranges,
            gaps: Vec::new(),
            topic_ids: BTreeMap::new(),
            watermarks: Watermarks::default(),
            left_behind: BTreeMap::new(),
            held_by: None,
            tables: BTreeMap::new(),
        }
    }

    fn gap(start: i64, end: i64) -> Gap {
        Gap { topic: "t".into(), partition: 0, range: OffsetRange { start, end }, cause: String::new() }
    }

    fn from(reread: &Reread) -> Vec<i64> {
        reread.from.values().copied().collect()
    }

    #[test]
    fn a_place_holds_once_everything_before_it_is_closed() {
        let first = plan(0, &[(7, 10)]);
        let reread = Reread::begin(&first).after_batch(&first, Some(100), |_| false);
        assert_eq!((from(&reread), reread.next.clone()), (vec![7], first.ends()));
        // not closed, and a partition more
        let reread = reread.after_batch(&plan(1, &[(10, 20), (3, 5)]), Some(300), |us| us < 100_000);
        assert_eq!((from(&reread), reread.latest_ms), (vec![7, 3], Some(100)));
        let reread = reread.after_batch(&plan(2, &[(20, 30), (5, 5)]), Some(400), |us| us <= 100_999);
        assert_eq!((from(&reread), reread.latest_ms), (vec![10, 3], Some(400)));
        let json = serde_json::to_string(&reread).unwrap();
        assert_eq!(serde_json::from_str::<Reread>(&json).unwrap(), reread);
    }

    #[test]
    fn records_without_a_time_need_not_be_read_again() {
        let first = plan(0, &[(0, 10)]);
        let reread = Reread::begin(&first).after_batch(&first, None, |_| false);
        assert_eq!(from(&reread.after_batch(&plan(1, &[(10, 20)]), Some(1), |_| false)), [10]);
    }

    #[test]
    fn what_is_not_known_is_known_again_in_the_end() {
        let reread = Reread::default().after_batch(&plan(5, &[(50, 60)]), Some(9), |_| false);
        assert!(reread.from.is_empty());
        assert_eq!(from(&reread.after_batch(&plan(6, &[(60, 70)]), Some(20), |us| us < 10_000)), [60]);
    }

    /// Offsets that expired unread are stepped over; those that were read stay, for Kafka to be found without them.
    #[test]
    fn gaps() {
        let after = |read: (i64, i64), next: (i64, i64), gap| {
            let first = plan(0, &[read]);
            let reread = Reread::begin(&first).after_batch(&first, Some(100), |_| false);
            let second = MicroBatch { gaps: vec![gap], ..plan(1, &[next]) };
            from(&reread.after_batch(&second, Some(100), |_| false))
        };
        assert_eq!(after((7, 7), (50, 60), gap(7, 50)), [50], "expired, nothing read before");
        assert_eq!(after((7, 10), (50, 60), gap(10, 50)), [7], "expired, some read before");
        assert_eq!(after((7, 10), (4, 6), gap(4, 10)), [0; 0], "truncated: other records have taken the place");
        assert_eq!(after((10, 10), (4, 6), gap(4, 10)), [4], "truncated, nothing read before");
    }

    proptest! {
        /// One partition; a row each offset, in a window of ten.
        #[test]
        fn no_row_of_an_open_window_is_before_it(
            batches in proptest::collection::vec((proptest::collection::vec(0..40_i64, 0..5), 0..6_i64), 1..40),
        ) {
            let (mut rows, mut watermark) = (Vec::<i64>::new(), 0);
            let mut reread: Option<Reread> = None;
            for (batch, (jitters, advance)) in (0..).zip(batches) {
                let start = rows.len() as i64;
                rows.extend(jitters.iter().enumerate().map(|(i, jitter)| start + i as i64 + jitter));
                let plan = plan(batch, &[(start, rows.len() as i64)]);
                watermark += advance;
                let open = |ms: i64| (ms.div_euclid(10) + 1) * 10 > watermark;
                let latest = rows.iter().max().copied();
                let before = reread.take().unwrap_or_else(|| Reread::begin(&plan));
                let after = before.after_batch(&plan, latest, |us| !open(us.div_euclid(1000)));
                let first = from(&after)[0];
                prop_assert!(first >= before.from[&tp(0)]);
                for (offset, ms) in (0..first).zip(&rows) {
                    prop_assert!(!open(*ms), "offset {offset} is before {first} and open at {watermark}");
                }
                reread = Some(after);
            }
        }
    }
}
