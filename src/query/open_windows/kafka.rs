//! Open windows from Kafka: the records that they were aggregated from, read and decoded again as batches are.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{Deltas, LISTED, Letters, Reopening};
use crate::batch::{self, Limits, MicroBatch, OffsetRange, Offsets, Ranges};
use crate::decode::registry::BatchRegistry;
use crate::error::Error;
use crate::execute;
use crate::pipeline::Pipeline;
use crate::query::blocking;
use crate::source::Source;
use crate::source::kafka::{ChunkSettings, KafkaSource, QueryNames};

/// The records of Kafka that open windows may have been aggregated from.
pub(super) struct Kafka {
    source: KafkaSource,
    pub ranges: Ranges,
}

impl Kafka {
    /// Or why the records are not to be had any more.
    pub async fn open(of: &Reopening<'_>) -> Result<Result<Kafka, String>, Error> {
        let plan = &of.logged.plan;
        let from = &of.progress.reread_from;
        if from.is_empty() {
            let why = "from which offsets Kafka would have to be read is not known: the batches were written by a version of Floe \
                       that did not keep it, or a topic was truncated meanwhile";
            return Ok(Err(why.into()));
        }
        let config = of.config;
        let chunks = ChunkSettings::with_buffer(config.execution.buffer_bytes);
        let (settings, names) = (config.source.clone(), QueryNames::of(&config.name));
        let (source, available, compaction) = blocking(move || {
            let mut source = KafkaSource::new(&settings, names, chunks)?;
            let available = source.available()?;
            let compaction = source.compaction()?;
            Ok((source, available, compaction))
        })
        .await?;
        if let Some(why) = compaction {
            return Ok(Err(why));
        }
        for (topic, then) in &plan.topic_ids {
            if let Some(now) = available.topic_ids.get(topic).filter(|now| *now != then) {
                return Ok(Err(format!("topic {topic} was deleted and created again (id {then} then, {now} now)")));
            }
        }
        let mut ranges = Ranges::new();
        let mut missing = Vec::new();
        for (tp, range) in &plan.ranges {
            let wanted = OffsetRange { start: from.get(tp).copied().unwrap_or(range.start), end: range.end };
            let OffsetRange { start, end } = wanted;
            match available.partitions.get(tp) {
                Some(there) if wanted.is_empty() || there.start <= start && end <= there.end => {}
                Some(there) => {
                    missing.push(format!("{tp} [{start}, {end}), of which there are [{}, {})", there.start, there.end))
                }
                None if wanted.is_empty() => continue,
                None => missing.push(format!("{tp} [{start}, {end}), of a partition that is gone")),
            }
            ranges.insert(tp.clone(), wanted);
        }
        if missing.is_empty() {
            return Ok(Ok(Kafka { source, ranges }));
        }
        let more = missing.len().saturating_sub(LISTED);
        missing.truncate(LISTED);
        let more = if more > 0 { format!(" and {more} more partitions") } else { String::new() };
        Ok(Err(format!("Kafka no longer has all of the offsets that are needed: {}{more}", missing.join("; "))))
    }

    /// Reads them as batches are read, with the same limits, and gives how many there were.
    pub async fn read(
        mut self,
        of: &Reopening<'_>,
        active: BTreeSet<usize>,
        letters: Letters,
        deltas: &mut Deltas<'_>,
    ) -> Result<u64, Error> {
        let mut pipeline = Pipeline::compile(of.config).map_err(|problems| Error::Compile(problems.join("\n")))?;
        for message_type in &mut pipeline.types {
            message_type.rows = None;
            message_type.queries = message_type.queries.iter().copied().filter(|q| active.contains(q)).collect();
        }
        pipeline.late_rows.fill(None);
        let registry = pipeline.registry.clone().map(|registry| Arc::new(BatchRegistry::new(registry, None)));
        let (pipeline, refused_then) = (Arc::new(pipeline), Arc::new(letters.refused));
        let mut starts: Offsets = self.ranges.iter().map(|(tp, range)| (tp.clone(), range.start)).collect();
        let (mut records, mut bytes) = (0, 0);
        loop {
            let limits = Limits {
                max_offsets: of.config.source.max_offsets_per_trigger,
                max_bytes: of.config.source.max_bytes_per_trigger,
                bytes_per_record: (records > 0).then(|| bytes as f64 / records as f64),
            };
            let ranges = batch::plan_ranges(&starts, &self.ranges, &limits)?;
            // Whatever the clock refused then is among the letters; and only what is still open is in time.
            let evict_ms = of.logged.plan.watermarks.evict_ms;
            let slice = MicroBatch {
                ranges,
                gaps: Vec::new(),
                trigger_time_ms: i64::MAX,
                watermarks: batch::Watermarks { late_ms: evict_ms, evict_ms },
                ..of.logged.plan.clone()
            };
            if slice.is_no_data() {
                return Ok(records);
            }
            starts = slice.ends();
            let (pipeline, registry, without) = (pipeline.clone(), registry.clone(), refused_then.clone());
            let mut source = self.source;
            let (back, lanes, counts) = blocking(move || {
                let chunks = source.read(&slice.ranges)?;
                let never = AtomicBool::new(false);
                let (lanes, counts) = execute::aggregate(&pipeline, &slice, registry, chunks, &without, &never)?;
                Ok((source, lanes, counts))
            })
            .await?;
            self.source = back;
            records += counts.records;
            bytes += counts.bytes;
            tracing::info!(records, "records read again");
            deltas.take(lanes).await?;
        }
    }
}
