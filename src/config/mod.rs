//! What the user writes: one TOML file and the environment become one typed, validated [`Config`], or all errors at once.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::Offsets;
use crate::schema::Schema;
use crate::trigger::Trigger;

#[derive(Clone, Debug)]
pub struct Config {
    /// The pipeline's name: part of every marker.
    pub name: String,
    pub source: SourceConfig,
    pub trigger: Trigger,
    pub schema: Arc<Schema>,
    pub transform: TransformConfig,
    /// None: no windows and no watermark.
    pub event_time: Option<EventTimeConfig>,
    pub rows: Option<TableConfig>,
    pub windows: Vec<WindowConfig>,
    pub dead_letters: TableConfig,
    pub catalog: CatalogConfig,
    /// A path or a URL (`s3://` …); relative paths are relative to the working directory.
    pub checkpoint_location: String,
    pub http: HttpConfig,
    pub retry: RetryConfig,
    pub execution: ExecutionConfig,
    /// Digest of everything that decides what a batch means; logged with each plan.
    pub fingerprint: String,
}

#[derive(Clone, Debug)]
pub struct SourceConfig {
    pub bootstrap_servers: String,
    pub topics: Vec<String>,
    pub starting_offsets: StartingOffsets,
    pub max_offsets_per_trigger: Option<u64>,
    pub max_bytes_per_trigger: Option<u64>,
    pub min_offsets_per_trigger: u64,
    pub max_trigger_delay: Duration,
    pub fail_on_data_loss: bool,
    /// Any librdkafka property, passed through.
    pub kafka: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum StartingOffsets {
    Earliest,
    Latest,
    /// Milliseconds since the epoch: the first record at or after it, by partition.
    Timestamp(i64),
    Explicit(Offsets),
}

#[derive(Clone, Debug, Default)]
pub struct TransformConfig {
    pub filter: Option<String>,
    /// Name and SQL expression, in the order of the file.
    pub columns: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
pub struct EventTimeConfig {
    pub column: String,
    pub watermark_delay: Duration,
    /// Timestamps further ahead of the trigger time than this become dead letters. None: no guard.
    pub max_future: Option<Duration>,
}

#[derive(Clone, Debug)]
pub struct TableConfig {
    /// `namespace.table`
    pub table: String,
    pub partition_by: Vec<String>,
    pub sort_by: Vec<String>,
    pub properties: BTreeMap<String, String>,
    /// Whether rows carry `_kafka_topic`, `_kafka_partition`, `_kafka_offset`, `_kafka_timestamp` (rows table only).
    pub provenance: bool,
}

#[derive(Clone, Debug)]
pub struct WindowConfig {
    pub table: TableConfig,
    pub size: Duration,
    pub group_by: Vec<String>,
    /// Output column and SQL aggregate, in the order of the file.
    pub aggregates: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
pub enum CatalogConfig {
    Sqlite { path: PathBuf, warehouse: String },
}

#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// None: no HTTP server (`listen = ""`).
    pub listen: Option<SocketAddr>,
}

#[derive(Clone, Debug)]
pub struct RetryConfig {
    pub strategy: crate::retry::Strategy,
    pub deadlines: crate::retry::Deadlines,
}

#[derive(Clone, Debug)]
pub struct ExecutionConfig {
    pub workers: usize,
    /// Bytes of records that may be held between the broker and the tables: librdkafka's queues plus chunks in flight.
    pub buffer_bytes: u64,
    pub shutdown_timeout: Duration,
}
