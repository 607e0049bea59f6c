//! Where a query stands when it starts, or starts again after a failure, and whether it may go on at all.
//!
//! Owns: claiming and reading the checkpoint, opening the tables, comparing the two. Does not own: the logs of a batch.
//! Invariant: no batch is planned, read or committed, and no table created or changed, before checkpoint and tables have been
//! found to agree.

use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;

use super::changes::{self, Change};
use super::{Last, Session, StreamingQuery, blocking, compaction, warn_of_gap};
use crate::batch::{self, Gap, MicroBatch, Offsets, TopicPartition};
use crate::checkpoint::{self, Checkpoint, LoggedPlan};
use crate::config::Config;
use crate::dead_letter::topic::DeadLetterTopic;
use crate::error::Error;
use crate::sink::iceberg::{IcebergSink, Marker, TableInfo, TableSpec};
use crate::source::Available;
use crate::source::kafka::{ChunkSettings, KafkaSource, QueryNames};
use crate::state::{Numbers, Reader, StateStore, WindowQuery};
use crate::window;

impl Session {
    pub(super) async fn recover(query: &mut StreamingQuery) -> Result<Session, Error> {
        let config = query.config.clone();
        let checkpoint = match &query.checkpoint {
            Some(checkpoint) => checkpoint.clone(),
            None => {
                let location = crate::storage::open(&config.checkpoint_location)?;
                Checkpoint::probe(&location).await?;
                let mut checkpoint = Checkpoint::open(location, &config.name).await?;
                let epoch = checkpoint.claim().await?;
                tracing::info!(query_id = %checkpoint.query_id(), epoch, checkpoint = checkpoint.url(), "checkpoint claimed");
                query.telemetry.query_id(checkpoint.query_id());
                query.checkpoint.insert(Arc::new(checkpoint)).clone()
            }
        };
        checkpoint.check_owner().await?;
        let recovered = checkpoint.recover().await?;
        let pipeline = query.pipeline.clone();
        let changes = changes::assess(&config, &pipeline, &checkpoint, &recovered).await?;
        changes.check()?;
        for change in &changes.list {
            let Change { subject, change, why, .. } = change;
            tracing::info!(since_batch = changes.since, subject, change, why, "the configuration has changed");
        }
        let query_id = checkpoint.query_id();
        let agree = |there: &[TableInfo]| {
            check_existence(&recovered, &pipeline.tables, there)?;
            check_tables(&config, &checkpoint, &recovered, there)
        };
        let sink = IcebergSink::open_if(&config.catalog, query_id, &config.name, &pipeline.tables, agree).await?;
        query.telemetry.guarantee(config.guarantee(Some(sink.commits_together())));
        let tables = sink.load().await?;
        check_tables(&config, &checkpoint, &recovered, &tables)?;

        let dead_letter_topic = DeadLetterTopic::open(&config, pipeline.dead_letters, checkpoint.query_id()).await?;
        if let (Some(topic), Some(commit)) = (&dead_letter_topic, &recovered.commit) {
            topic.settle(&sink, commit).await?;
        }

        let mut pending = None;
        let mut in_tables = None;
        let mut last = None;
        let mut evict_ms = window::UNSET_WATERMARK_MS;
        if let Some(plan) = recovered.plan {
            match &recovered.commit {
                Some(commit) if commit.batch == plan.plan.batch => {
                    evict_ms = plan.plan.watermarks.evict();
                    last = Some(Last { plan: plan.plan, watermark_next_ms: commit.watermark_next_ms });
                }
                _ => {
                    check_config(&config, &plan, &tables)?;
                    let batch = plan.plan.batch;
                    if tables.iter().any(|t| t.marker.as_ref().is_some_and(|m| m.batch == batch)) {
                        in_tables = Some(batch);
                    }
                    // The state is that of the batch before, in which windows closed by its own watermark.
                    evict_ms = plan.plan.watermarks.late();
                    pending = Some(plan);
                }
            }
        }
        let state_files = recovered.commit.as_ref().map(|c| c.state.clone()).unwrap_or_default();
        let event_times = recovered.commit.as_ref().map(|c| c.event_times.clone()).unwrap_or_default();
        // From before there was one: begins anew where nothing is open, and is not known else.
        let reread = recovered.commit.as_ref().and_then(|c| match &c.reread {
            None if c.state.is_empty() => None,
            known => Some(known.clone().unwrap_or_default()),
        });
        let (queries, workers) = (pipeline.queries.clone(), pipeline.workers);
        let numbers = Numbers::of(&changes.windows, queries.iter().map(WindowQuery::table));
        let reader = Reader::new(checkpoint.clone(), Handle::current(), numbers);
        let budget = config.state.memory_budget_bytes;
        let files = state_files.clone();
        let state =
            blocking(move || Ok(StateStore::recover(queries, reader, &files, evict_ms, budget, workers)?)).await?;
        let bytes_per_record = recovered
            .commit
            .as_ref()
            .filter(|c| c.counts.records > 0)
            .map(|c| c.counts.bytes as f64 / c.counts.records as f64);
        let name = config.name.clone();
        let source = blocking(move || {
            Ok(KafkaSource::new(
                &config.source,
                QueryNames::of(&name),
                ChunkSettings::with_buffer(config.execution.buffer_bytes),
            )?)
        })
        .await?;
        tracing::info!(
            batch = last.as_ref().map(|l| l.plan.batch),
            pending = pending.as_ref().map(|p| p.plan.batch),
            state_files = state_files.len(),
            "recovered"
        );
        Ok(Session {
            checkpoint,
            sink,
            tables: tables.into_iter().map(|table| (table.name, table.uuid)).collect(),
            source: Arc::new(Mutex::new(source)),
            state: Some(state),
            compaction: compaction::Background::default(),
            windows: changes.windows,
            last,
            event_times,
            reread,
            pending,
            in_tables,
            bytes_per_record,
            latest: Offsets::new(),
            checkpoint_bytes: 0,
            dead_letter_topic,
        })
    }

    /// What of a plan logged earlier can still be read: the plan itself, unless records expired since.
    pub(super) async fn still_readable(&self, plan: &MicroBatch, config: &Config) -> Result<MicroBatch, Error> {
        let available = self.available().await?;
        check_topics(plan, &available)?;
        let starts: Offsets = plan.ranges.iter().map(|(tp, range)| (tp.clone(), range.start)).collect();
        let gaps: Vec<Gap> = batch::data_loss(&starts, &available.partitions)
            .into_iter()
            .filter_map(|mut gap| {
                let range = plan.ranges.get(&TopicPartition::new(gap.topic.clone(), gap.partition))?;
                gap.range.end = gap.range.end.min(range.end);
                (!range.is_empty()).then_some(gap)
            })
            .collect();
        if gaps.is_empty() {
            return Ok(plan.clone());
        }
        if config.source.fail_on_data_loss {
            return Err(Error::DataLoss { gaps });
        }
        let mut left = plan.clone();
        for gap in gaps {
            warn_of_gap(&gap);
            if let Some(range) = left.ranges.get_mut(&TopicPartition::new(gap.topic.clone(), gap.partition)) {
                range.start = gap.range.end.max(range.start);
            }
            left.gaps.push(gap);
        }
        Ok(left)
    }
}

/// A topic that was deleted and created again has other records under the same offsets.
pub(super) fn check_topics(plan: &MicroBatch, available: &Available) -> Result<(), Error> {
    for (topic, then) in &plan.topic_ids {
        if let Some(now) = available.topic_ids.get(topic)
            && now != then
        {
            return Err(Error::TopicRecreated { topic: topic.clone(), then: then.clone(), now: now.clone() });
        }
    }
    Ok(())
}

/// What the marker says of a batch, besides its number: the digest of its plan and, where it is executed with another
/// configuration than it was planned with, which one. Two executions that may differ never pass for each other.
pub(super) fn marker_of(plan: &MicroBatch, digest: &str, fingerprint: &str) -> String {
    if plan.config_fingerprint == fingerprint { digest.to_string() } else { format!("{digest}+{fingerprint}") }
}

fn is_of_plan(marker: &Marker, logged: &LoggedPlan) -> bool {
    marker.plan.split('+').next() == Some(logged.digest.as_str())
}

/// A plan that is not committed may be executed with another configuration than it was planned with, unless some table has
/// it already: then what the checkpoint would say of the batch, its open windows above all, would not be what the table
/// has. Other tables than those of the plan cannot tell.
fn check_config(config: &Config, logged: &LoggedPlan, tables: &[TableInfo]) -> Result<(), Error> {
    let LoggedPlan { plan, digest, .. } = logged;
    let marker = marker_of(plan, digest, &config.fingerprint);
    let other_tables = plan.tables.len() != tables.len() || tables.iter().any(|t| !plan.tables.contains_key(&t.name));
    let elsewhere = plan.config_fingerprint != config.fingerprint && other_tables;
    let done_otherwise =
        tables.iter().filter_map(|t| t.marker.as_ref()).any(|m| m.batch == plan.batch && m.plan != marker);
    if elsewhere || done_otherwise {
        return Err(Error::ConfigChanged { batch: plan.batch });
    }
    if plan.config_fingerprint != config.fingerprint {
        tracing::info!(
            batch = plan.batch,
            "the batch that was planned is executed with the configuration as it is now"
        );
    }
    Ok(())
}

/// A table that was there when the newest batch was planned: what it held is gone.
fn check_existence(recovered: &checkpoint::Recovered, specs: &[TableSpec], there: &[TableInfo]) -> Result<(), Error> {
    let Some(LoggedPlan { plan, .. }) = &recovered.plan else { return Ok(()) };
    let wanted = plan.tables.iter().filter(|(name, _)| specs.iter().any(|spec| spec.name == **name));
    match wanted.clone().find(|(name, _)| there.iter().all(|table| table.name != **name)) {
        Some((name, uuid)) => Err(Error::TableGone { table: name.clone(), uuid: *uuid, batch: plan.batch }),
        None => Ok(()),
    }
}

/// Compares every table's marker with the checkpoint before anything is done. Every batch sets the marker of every
/// table, so the two always agree up to the batch in hand; where they do not, someone restored, deleted or re-created
/// one of them, and going on would lose rows or double them.
fn check_tables(
    config: &Config,
    checkpoint: &Checkpoint,
    recovered: &checkpoint::Recovered,
    tables: &[TableInfo],
) -> Result<(), Error> {
    let Some(logged) = &recovered.plan else {
        for table in tables {
            let stranger = table.others.iter().find(|(_, marker)| marker.pipeline == config.name);
            if let Some((query_id, marker)) = stranger {
                return Err(Error::CheckpointLost {
                    table: table.name.clone(),
                    pipeline: config.name.clone(),
                    query_id: *query_id,
                    batch: marker.batch,
                    checkpoint: checkpoint.url().to_string(),
                });
            }
            if let Some(marker) = &table.marker {
                return Err(older_checkpoint(checkpoint, "no batch", table, marker));
            }
        }
        return Ok(());
    };
    let newest = logged.plan.batch;
    let committed = recovered.commit.as_ref().map(|c| c.batch);
    for table in tables {
        let Some(known) = logged.plan.tables.get(&table.name) else { continue };
        if *known != table.uuid {
            return Err(Error::TableRecreated {
                table: table.name.clone(),
                then: *known,
                now: table.uuid,
                batch: newest,
            });
        }
        match &table.marker {
            Some(marker) if marker.batch > newest || marker.batch == newest && !is_of_plan(marker, logged) => {
                return Err(older_checkpoint(checkpoint, &format!("batch {newest}"), table, marker));
            }
            marker => {
                let has = marker.as_ref().map(|m| m.batch);
                if has < committed {
                    return Err(Error::TableOlder {
                        table: table.name.clone(),
                        has,
                        committed: committed.unwrap_or_default(),
                    });
                }
            }
        }
    }
    Ok(())
}

fn older_checkpoint(checkpoint: &Checkpoint, newest: &str, table: &TableInfo, marker: &Marker) -> Error {
    Error::CheckpointOlder {
        checkpoint: checkpoint.url().to_string(),
        newest: newest.to_string(),
        table: table.name.clone(),
        batch: marker.batch,
    }
}
