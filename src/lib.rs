//! Floe: Kafka topics in, Apache Iceberg tables out, exactly once.
//!
//! The modules in reading order, which is also the order in which the data flows:
//!
//! - [`query`]: one streaming query: recover, plan, run a batch. Start here. [`execute`] is the step with all the work in it.
//! - [`pipeline`]: the configuration, compiled.
//! - [`checkpoint`]: the protocol: ownership, offset log, commit log.
//! - [`batch`], [`trigger`]: what a micro-batch is and when the next one runs.
//! - [`source`]: records out of Kafka, exactly the planned ranges.
//! - [`schema`], [`decode`]: JSON Schema to columns; payloads to columns or dead letters.
//! - [`transform`]: SQL filter and derived columns.
//! - [`quality`]: expectations on rows; the circuit breaker on refused records.
//! - [`window`], [`state`], [`late`]: window assignment and the watermark; open windows and their groups; rows too late for
//!   them.
//! - [`sink`], [`dead_letter`]: Iceberg tables; what becomes of records that were refused. librdkafka is used in
//!   [`source::kafka`] and [`sink::kafka`] and nowhere else.
//! - [`config`], [`cli`]: what the user writes; one file a subcommand.
//! - [`storage`], [`retry`], [`telemetry`], [`clock`], [`error`], [`failpoint`]: what all of them stand on.

pub mod batch;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod config;
pub mod dead_letter;
pub mod decode;
pub mod error;
pub mod execute;
pub mod failpoint;
pub mod late;
pub mod pipeline;
pub mod quality;
pub mod query;
pub mod retry;
pub mod schema;
pub mod sink;
pub mod source;
pub mod state;
pub mod storage;
pub mod telemetry;
pub mod transform;
pub mod trigger;
pub mod window;
