//! Dead letters in a Kafka topic as well, each once: `dead_letters.topic`.
//!
//! The table is the truth. Once `commits/N` says that batch N is done and that its letters are owed to a topic, they are
//! read back from the snapshot that has them and published in one transaction, which also sets the committed offset of the
//! group `floe-dlq-<query-id>` to N+1. Batch N+1 is not planned before that. So at a start at most the newest batch is
//! owed, and the committed offset says whether it still is.
//!
//! Owns: what a record of the topic looks like, and whether a batch is published. Does not own: transactions
//! ([`crate::sink::kafka`]).

use std::sync::Arc;

use futures::TryStreamExt;
use uuid::Uuid;

use super::letters::{BATCH_ROWS, Letter, Letters, Place, columns};
use crate::batch::BatchId;
use crate::checkpoint::CommitEntry;
use crate::config::Config;
use crate::dead_letter::Reason;
use crate::error::Error;
use crate::failpoint;
use crate::sink;
use crate::sink::iceberg::IcebergSink;
use crate::sink::kafka::{Outgoing, TransactionalTopic};

pub struct DeadLetterTopic {
    name: String,
    /// Name and index among the sink's tables.
    table: (String, usize),
    topic: Arc<TransactionalTopic>,
}

impl DeadLetterTopic {
    /// None where the configuration names no topic. Shuts out a former process of the query.
    pub async fn open(config: &Config, table: usize, query_id: Uuid) -> Result<Option<DeadLetterTopic>, Error> {
        let Some(name) = config.dead_letter_topic.clone() else { return Ok(None) };
        let (source, topic, timeout) = (config.source.clone(), name.clone(), config.retry.deadlines.commit);
        let id = format!("floe-dlq-{query_id}");
        let topic = blocking(move || TransactionalTopic::open(&source, &topic, &id, timeout)).await?;
        let table = (config.dead_letters.table.clone(), table);
        Ok(Some(DeadLetterTopic { name, table, topic: Arc::new(topic) }))
    }

    /// At a start: publishes what the newest batch owes, unless that has been done.
    pub async fn settle(&self, sink: &IcebergSink, newest: &CommitEntry) -> Result<(), Error> {
        if newest.dead_letter_topic.as_ref() != Some(&self.name) {
            return Ok(());
        }
        let topic = self.topic.clone();
        match blocking(move || topic.committed()).await? {
            Some(next) if next > number(newest.batch) => Ok(()),
            _ => self.publish(sink, newest).await,
        }
    }

    /// Publishes the letters of a batch that is done.
    pub async fn publish(&self, sink: &IcebergSink, done: &CommitEntry) -> Result<(), Error> {
        let (table, index) = &self.table;
        let snapshot = done.snapshots.get(table).copied().flatten();
        let records = |(code, _): &(&String, &u64)| Reason::of_code(code).is_none_or(Reason::is_of_a_record);
        let expected: u64 = done.counts.dead_letters.iter().filter(records).map(|(_, count)| count).sum();
        let Some(snapshot) = snapshot else {
            return if expected == 0 { Ok(()) } else { Err(self.expired(done.batch).into()) };
        };
        let pinned = sink.pin(*index).await?;
        let columns = columns(&pinned);
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let rows = pinned.scan_added_by(snapshot, &columns, BATCH_ROWS).await?;
        let mut rows = rows.ok_or_else(|| self.expired(done.batch))?;
        fail_at("dead_letter_topic.begin")?;
        let topic = self.topic.clone();
        blocking(move || topic.begin()).await?;
        let mut published = 0;
        while let Some(batch) = rows.try_next().await? {
            let topic = self.topic.clone();
            published += blocking(move || {
                let mut sent = 0u64;
                for letter in Letters::of(&batch)?.iter() {
                    if let Some(place) = letter.place() {
                        send(&topic, &letter, place)?;
                        sent += 1;
                    }
                }
                Ok(sent)
            })
            .await?;
        }
        fail_at("dead_letter_topic.sent")?;
        let (topic, next, digest) = (self.topic.clone(), number(done.batch) + 1, done.plan_digest.clone());
        blocking(move || topic.commit(next, &digest)).await?;
        tracing::debug!(batch = done.batch, topic = self.name, records = published, "dead letters published");
        fail_at("dead_letter_topic.published")
    }

    fn expired(&self, batch: BatchId) -> sink::Error {
        sink::Error::fatal(format!(
            "the snapshot of table {} with the dead letters of batch {batch} is gone before they were published to topic {}. \
             Leave dead_letters.topic out for one batch to go on without them",
            self.table.0, self.name
        ))
    }
}

fn number(batch: BatchId) -> i64 {
    i64::try_from(batch).unwrap_or(i64::MAX - 1)
}

/// The record as it came, with why and where it came from in headers.
fn send(topic: &TransactionalTopic, letter: &Letter<'_>, place: Place<'_>) -> Result<(), sink::Error> {
    let partition = place.partition.to_string();
    let offset = place.offset.to_string();
    let timestamp = letter.timestamp_us.map(|us| us.div_euclid(1000).to_string());
    let batch = letter.batch_id.to_string();
    let facts = [
        ("floe.reason", Some(letter.reason)),
        ("floe.path", letter.path),
        ("floe.message", letter.message),
        ("floe.topic", Some(place.topic)),
        ("floe.partition", Some(partition.as_str())),
        ("floe.offset", Some(offset.as_str())),
        ("floe.timestamp", timestamp.as_deref()),
        ("floe.batch", Some(batch.as_str())),
    ];
    let original = letter.headers.iter().flatten().map(|(name, value)| (name.as_str(), value.as_deref()));
    let headers: Vec<_> = original.chain(facts.map(|(name, value)| (name, value.map(str::as_bytes)))).collect();
    topic.send(&Outgoing { key: letter.key, value: letter.payload, headers: &headers })
}

fn fail_at(name: &str) -> Result<(), Error> {
    if failpoint::hit(name) { Err(sink::Error::transient(format!("failpoint {name}")).into()) } else { Ok(()) }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, sink::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(e) => Err(Error::Internal(format!("a blocking task did not end well: {e}"))),
    }
}
