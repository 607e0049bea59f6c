//! The promises, each kept by a module: a real broker, the real binary, and other people's readers as the judges.
//!
//! `FLOE_TEST_KILLS=500 cargo test --test it random_kills` kills five hundred times instead of twenty.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

/// Aggregates equal what another engine computes from the rows.
mod aggregates;
/// `available_now` drains exactly what was there at its start; aborted transactions leave no trace.
mod available_now;
/// The broker stopped, restarted, frozen.
mod broker_faults;
/// `floe check`, and configurations that are wrong.
mod check;
/// A checkpoint that is older than the tables, gone, or damaged is refused.
mod checkpoint;
/// Expired offsets, topics re-created, partitions added.
mod data_loss;
/// The Kafka topic of dead letters has each refused offset once, whatever is killed.
mod dead_letter_topic;
/// `floe demo`.
mod demo;
/// Dead letters listed, shown and tried again: each becomes a row once, whatever is killed and whoever commits meanwhile.
mod dlq;
/// Nulls, NaN, overflow, times at the ends of the range, no rows at all; a million groups and a hot key.
mod edges;
/// A new version of the schema: tables follow where they can, and a start is refused where they cannot.
mod evolution;
/// Killed at every step of the protocol, each offset is in the tables once.
mod exactly_once;
/// The harness itself: the generator's truth and the readers.
mod harness;
/// Whatever is in a record, it becomes a row or a dead letter with its reason.
mod invalid_data;
/// Snapshots expire, small files are compacted, orphans go; whatever is killed meanwhile, and whoever else writes.
mod maintenance;
/// Random streams, stops and batch sizes: the tables equal a naive model.
mod model;
/// Other engines append, delete, expire and branch meanwhile, and keep what they have done.
mod neighbours;
/// Nessie: OAuth2 tokens, and a history that its tables do not show.
mod nessie;
/// Metrics, health, status; a locked catalog and a full disk.
mod operating;
/// Two processes on one checkpoint.
mod ownership;
/// The pipeline changes over its checkpoint: `floe plan` says what that comes to, and `floe run` does as it said.
mod plan;
/// Expectations on rows; too many refused records hold a batch back.
mod quality;
/// Killed at random moments.
mod random_kills;
/// Other people's readers agree, at every stage of a table's life, and their filters lose nothing.
mod readers;
/// A lost checkpoint is rebuilt from the tables, and the pipeline goes on exactly once.
mod recover;
/// Records framed with a schema id, by a registry that may be away.
mod registry;
/// REST catalogs: exactly once whatever becomes of a request; evolution, permissions, tokens.
mod rest;
/// What is read back from Iceberg equals the documents, to the last digit and microsecond.
mod round_trip;
/// Checkpoint and tables on an S3-compatible store, whatever becomes of its answers.
mod s3;
/// Nested types, decimals and times reach other readers as they were written; any keyword is held to.
mod schemas;
/// TLS, SASL and secrets.
mod security;
/// SIGTERM commits the batch in hand; a second one does not wait.
mod shutdown;
/// The source reads exactly the planned ranges, whatever brokers, transactions and retention do.
mod source;
/// Spark reads what Floe writes, writes to it, and maintains it, and Floe goes on.
mod spark;
/// State larger than its budget: windows leave memory, whatever is killed meanwhile, and damage is named.
mod state;
/// When a batch runs: at its interval, with enough records, or after the longest delay.
mod triggers;
/// Several message types in one pipeline: topic and members pick schema and table.
mod types;
/// Tables stay small and fast, whatever the number of commits.
mod upkeep;
/// The watermark by partitions: who holds it back, who is idle, and what is late.
mod watermark;
/// Windows equal the truth under disorder, and late rows are counted.
mod windows;
/// Many writers on one table: all exact, none starves.
mod writers;
