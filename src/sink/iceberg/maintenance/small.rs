//! Which small data files are compacted together. Pure.
//!
//! A partition that is quiet, because event time or the clock is well past it, is brought down to a few files whatever
//! their number. One that is still written is compacted when it has many, by tiers: a file that is larger than all the
//! smaller ones together waits until they have grown up to it, so that no row is rewritten over and over.

use std::collections::HashMap;
use std::sync::Arc;

use iceberg::spec::{Literal, PartitionSpec, PrimitiveLiteral, PrimitiveType, Schema, Struct, Transform, Type};

use crate::config::MaintenanceConfig;

/// A quiet partition may keep so many small files.
const FEW: usize = 3;

/// What counts of a data file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SmallFile {
    pub path: String,
    /// The manifest that it is in.
    pub manifest: Arc<str>,
    pub bytes: u64,
    pub records: u64,
    pub sequence_number: i64,
    /// Sorted as the table declares.
    pub sorted: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Partition {
    pub files: Vec<SmallFile>,
    /// When its newest file was, at the latest.
    pub last_written_ms: i64,
}

pub(super) struct Rules<'a> {
    pub policy: &'a MaintenanceConfig,
    pub target_bytes: u64,
    pub now_ms: i64,
    pub time: Option<PartitionTime>,
    /// The latest value in the table of the column that partitions go by.
    pub newest_us: Option<i64>,
}

/// Files of one partition that become one.
#[derive(Debug, PartialEq)]
pub(super) struct Group {
    pub partition: Struct,
    pub files: Vec<SmallFile>,
}

impl Group {
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl Rules<'_> {
    pub fn is_small(&self, bytes: u64) -> bool {
        bytes < self.target_bytes / 2
    }

    fn is_quiet(&self, key: &Struct, partition: &Partition) -> bool {
        let after = i64::try_from(self.policy.compact_after.as_millis()).unwrap_or(i64::MAX);
        if partition.last_written_ms.saturating_add(after) <= self.now_ms {
            return true;
        }
        let end_us = self.time.as_ref().and_then(|time| time.end_us(key));
        match (end_us, self.newest_us) {
            (Some(end_us), Some(newest_us)) => end_us.saturating_add(after.saturating_mul(1000)) <= newest_us,
            _ => false,
        }
    }

    /// Those with most files first.
    pub fn groups(&self, partitions: HashMap<Struct, Partition>) -> Vec<Group> {
        let mut groups = Vec::new();
        for (key, mut partition) in partitions {
            if self.is_quiet(&key, &partition) {
                if partition.files.len() <= FEW {
                    continue;
                }
            } else {
                partition.files.sort_by(|a, b| (a.bytes, &a.path).cmp(&(b.bytes, &b.path)));
                let mut sum: u64 = partition.files.iter().map(|file| file.bytes).sum();
                while let Some(largest) = partition.files.last().filter(|largest| largest.bytes > sum - largest.bytes) {
                    sum -= largest.bytes;
                    partition.files.pop();
                }
                if partition.files.len() < self.policy.compact_min_files {
                    continue;
                }
            }
            // As they came, so that rows that were written together stay together.
            let order = |file: &SmallFile| (file.sequence_number, file.path.clone());
            partition.files.sort_by_cached_key(order);
            groups.extend(self.fill(&key, partition.files));
        }
        groups.sort_by_key(|group| std::cmp::Reverse(group.files.len()));
        groups
    }

    /// Each group is one file of the target size, or less.
    fn fill(&self, key: &Struct, files: Vec<SmallFile>) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut bytes = u64::MAX;
        for file in files {
            if bytes.saturating_add(file.bytes) > self.target_bytes {
                groups.push(Group { partition: key.clone(), files: Vec::new() });
                bytes = 0;
            }
            bytes += file.bytes;
            if let Some(group) = groups.last_mut() {
                group.files.push(file);
            }
        }
        groups.retain(|group| group.files.len() > 1);
        groups
    }
}

/// The partition field that is made of time.
#[derive(Clone, Debug)]
pub(super) struct PartitionTime {
    index: usize,
    transform: Transform,
    pub source_id: i32,
}

const DAY_US: i64 = 86_400_000_000;

impl PartitionTime {
    pub fn of(spec: &PartitionSpec, schema: &Schema) -> Option<PartitionTime> {
        let is_date = |id| {
            let field = schema.field_by_id(id);
            field.is_some_and(|f| *f.field_type == Type::Primitive(PrimitiveType::Date))
        };
        spec.fields().iter().enumerate().find_map(|(index, field)| {
            let transform = match field.transform {
                Transform::Identity if is_date(field.source_id) => Transform::Day,
                Transform::Year | Transform::Month | Transform::Day | Transform::Hour => field.transform,
                _ => return None,
            };
            Some(PartitionTime { index, transform, source_id: field.source_id })
        })
    }

    /// Where the time of a partition ends, exclusive.
    fn end_us(&self, partition: &Struct) -> Option<i64> {
        let Some(Some(Literal::Primitive(PrimitiveLiteral::Int(value)))) = partition.fields().get(self.index) else {
            return None;
        };
        let next = i64::from(*value).checked_add(1)?;
        let month = |months: i64| {
            let year = i32::try_from(1970 + months.div_euclid(12)).ok()?;
            let first = chrono::NaiveDate::from_ymd_opt(year, months.rem_euclid(12) as u32 + 1, 1)?;
            Some(first.and_hms_opt(0, 0, 0)?.and_utc().timestamp_micros())
        };
        match self.transform {
            Transform::Hour => next.checked_mul(DAY_US / 24),
            Transform::Day => next.checked_mul(DAY_US),
            Transform::Month => month(next),
            Transform::Year => month(next.checked_mul(12)?),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HOUR_MS: i64 = 3_600_000;

    fn policy() -> MaintenanceConfig {
        MaintenanceConfig { compact_min_files: 5, ..super::super::tests::policy() }
    }

    fn rules(policy: &MaintenanceConfig) -> Rules<'_> {
        let time = Some(PartitionTime { index: 0, transform: Transform::Hour, source_id: 1 });
        Rules { policy, target_bytes: 100, now_ms: 0, time, newest_us: Some(5 * HOUR_MS * 1000) }
    }

    fn hour(hour: i32) -> Struct {
        Struct::from_iter([Some(Literal::int(hour))])
    }

    fn files(sizes: &[u64]) -> Vec<SmallFile> {
        let file = |(i, bytes): (usize, &u64)| SmallFile {
            path: format!("{i:03}"),
            manifest: "m".into(),
            bytes: *bytes,
            records: 1,
            sequence_number: i as i64,
            sorted: false,
        };
        sizes.iter().enumerate().map(file).collect()
    }

    fn chosen(rules: &Rules<'_>, key: i32, sizes: &[u64]) -> Vec<Vec<u64>> {
        let partition = Partition { files: files(sizes), last_written_ms: 0 };
        let groups = rules.groups(HashMap::from([(hour(key), partition)]));
        groups.into_iter().map(|g| g.files.iter().map(|f| f.bytes).collect()).collect()
    }

    #[test]
    fn a_quiet_partition_is_brought_down_to_few_files() {
        let policy = policy();
        let rules = rules(&policy);
        // The event time of the table is at five o'clock: an hour past the partition from three to four.
        assert_eq!(chosen(&rules, 3, &[10, 40, 1, 2]), [[10, 40, 1, 2]]);
        assert!(chosen(&rules, 3, &[10, 40, 1]).is_empty());
        assert!(chosen(&rules, 4, &[10, 40, 1, 2]).is_empty());
        // Files of the target size each.
        assert_eq!(chosen(&rules, 1, &[45; 5]), [[45, 45], [45, 45]]);
        // Nobody has written to it for an hour.
        let later = Rules { now_ms: HOUR_MS, ..rules };
        assert_eq!(chosen(&later, 9, &[10, 10, 10, 10]), [[10, 10, 10, 10]]);
    }

    #[test]
    fn a_partition_in_use_is_compacted_by_tiers() {
        let policy = policy();
        let rules = rules(&policy);
        assert!(chosen(&rules, 9, &[1, 1, 1, 1]).is_empty());
        assert_eq!(chosen(&rules, 9, &[1, 1, 1, 1, 1]), [[1; 5]]);
        assert_eq!(chosen(&rules, 9, &[40, 1, 1, 1, 1, 1]), [[1; 5]]);
        assert_eq!(chosen(&rules, 9, &[5, 1, 1, 1, 1, 1]), [[5, 1, 1, 1, 1, 1]]);
        assert!(chosen(&rules, 9, &[]).is_empty());
    }

    #[test]
    fn the_end_of_a_partition() {
        let end = |transform, value| PartitionTime { index: 0, transform, source_id: 1 }.end_us(&hour(value));
        assert_eq!(end(Transform::Hour, 0), Some(3_600_000_000));
        assert_eq!(end(Transform::Day, -1), Some(0));
        assert_eq!(end(Transform::Month, 1), Some(59 * DAY_US));
        assert_eq!(end(Transform::Year, -1), Some(0));
        assert_eq!(end(Transform::Bucket(4), 1), None);
        let policy = MaintenanceConfig { compact_after: Duration::from_secs(3_600), ..policy() };
        assert!(!rules(&policy).is_quiet(&Struct::from_iter([None]), &Partition::default().written(1)));
    }

    impl Partition {
        fn written(self, last_written_ms: i64) -> Partition {
            Partition { last_written_ms, ..self }
        }
    }
}
