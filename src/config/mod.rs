//! What the user writes: one TOML file and the environment become one typed, validated [`Config`], or all errors at once.
//!
//! Owns: the settings and their defaults ([`settings`]), places and messages of mistakes, which librdkafka properties are
//! Floe's. Does not own: whether broker, catalog or store can be reached ([`crate::cli::check`]).
//! Invariants: a `Config` that exists is sound; no error and no `Debug` shows a secret; nothing but the schema document and
//! `_FILE` variables is read besides the file.

mod build;
mod catalog;
mod definition;
mod document;
mod error;
pub mod expression;
mod fingerprint;
mod pipeline;
mod read;
mod registry;
pub mod settings;
#[cfg(test)]
mod tests;
mod types;
pub(crate) mod units;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use build::OWNED_PROPERTIES;
pub use catalog::{CatalogConfig, RestAuth, RestConfig};
pub use definition::{Definition, Difference};
pub use error::{ConfigError, ConfigErrors, Place};
pub use registry::RegistryConfig;

use crate::batch::Offsets;
use crate::decode::route::When;
use crate::schema::Schema;
use crate::trigger::Trigger;
use crate::window::Windowing;
use crate::window::watermark::WatermarkPolicy;

#[derive(Clone, Debug)]
pub struct Config {
    /// The pipeline's name: part of every marker.
    pub name: String,
    pub source: SourceConfig,
    pub trigger: Trigger,
    /// What records are held to and where their rows go: one, or those of `[[types]]`.
    pub types: Vec<TypeConfig>,
    /// Where the schemas of framed records are. None: payloads are plain JSON.
    pub registry: Option<RegistryConfig>,
    pub quality: QualityConfig,
    /// None: no windows and no watermark.
    pub event_time: Option<EventTimeConfig>,
    pub windows: Vec<WindowConfig>,
    pub dead_letters: TableConfig,
    /// A topic that gets every dead letter as well.
    pub dead_letter_topic: Option<String>,
    pub catalog: CatalogConfig,
    pub maintenance: MaintenanceConfig,
    /// A path or a URL (`s3://` …); relative paths are relative to the working directory.
    pub checkpoint_location: String,
    pub http: HttpConfig,
    pub retry: RetryConfig,
    pub execution: ExecutionConfig,
    pub state: StateConfig,
    /// Digest of everything that decides what a batch means; logged with each plan.
    pub fingerprint: String,
}

/// Reads the file and lays the environment over it.
pub fn load(path: &Path, env: &BTreeMap<String, String>) -> Result<Config, ConfigErrors> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        let problem = format!("cannot read the configuration: {e}");
        ConfigErrors(vec![ConfigError { place: Place::File(path.into(), 0), key: String::new(), problem }])
    })?;
    parse(&text, path, env)
}

/// `path` is where the text is from: for messages, and for the schema document, which is found relative to it.
pub fn parse(text: &str, path: &Path, env: &BTreeMap<String, String>) -> Result<Config, ConfigErrors> {
    let mut errors = Vec::new();
    let mut root = document::parse(text, path, &mut errors);
    document::overlay(&mut root, env, &mut errors);
    let mut reader = read::Reader { root: &root, file: path, errors };
    reader.check_keys();
    let config = build::build(&mut reader);
    let mut errors = reader.errors;
    match config {
        Some(config) if errors.is_empty() => Ok(config),
        _ => {
            errors.sort();
            errors.dedup();
            Err(ConfigErrors(errors))
        }
    }
}

impl Config {
    /// Every table of the pipeline, each once: rows, windows and their late rows, dead letters.
    pub fn tables(&self) -> impl Iterator<Item = &TableConfig> {
        let windows = self.windows.iter().enumerate().flat_map(|(index, window)| {
            let shared =
                |late: &&TableConfig| self.windows[..index].iter().any(|w| w.late_table.as_ref() == Some(late));
            std::iter::once(&window.table).chain(window.late_table.as_ref().filter(|late| !shared(late)))
        });
        self.types.iter().filter_map(|t| t.rows.as_ref()).chain(windows).chain(std::iter::once(&self.dead_letters))
    }

    /// What a reader of the tables may rely on, as it follows from the configuration and from what a REST catalog offers:
    /// `transactions` is whether it commits several tables in one request, None as long as it has not been asked.
    pub fn guarantee(&self, transactions: Option<bool>) -> String {
        let mut text = match self.source.kafka.get("isolation.level").map(String::as_str) {
            Some("read_uncommitted") => "exactly once, records of aborted transactions included".to_string(),
            _ => "exactly once".to_string(),
        };
        if !self.source.fail_on_data_loss {
            text.push_str(", but offsets that expire before they are read are only recorded in the dead letters");
        }
        let appear = match (&self.catalog, transactions) {
            (CatalogConfig::Sqlite { .. }, _) => "together (sqlite)",
            (CatalogConfig::Rest(_), Some(true)) => "together (rest transaction)",
            (CatalogConfig::Rest(_), Some(false)) => "one after another (rest)",
            (CatalogConfig::Rest(_), None) => "together if the rest catalog has transactions, else one after another",
        };
        text = format!("{text}; {} tables appear {appear}", self.tables().count());
        if let Some(topic) = &self.dead_letter_topic {
            text.push_str(&format!(
                "; dead letters follow in topic {topic}, each once for readers of committed records"
            ));
        }
        text
    }
}

#[derive(Clone)]
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

impl fmt::Debug for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kafka: BTreeMap<&str, &str> =
            self.kafka.iter().map(|(k, v)| (k.as_str(), if is_secret(k) { "(hidden)" } else { v.as_str() })).collect();
        f.debug_struct("SourceConfig")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("topics", &self.topics)
            .field("starting_offsets", &self.starting_offsets)
            .field("max_offsets_per_trigger", &self.max_offsets_per_trigger)
            .field("max_bytes_per_trigger", &self.max_bytes_per_trigger)
            .field("min_offsets_per_trigger", &self.min_offsets_per_trigger)
            .field("max_trigger_delay", &self.max_trigger_delay)
            .field("fail_on_data_loss", &self.fail_on_data_loss)
            .field("kafka", &kafka)
            .finish()
    }
}

/// Whether a property's value must not be shown. By its name, so it errs on the side of hiding.
pub fn is_secret(property: &str) -> bool {
    let name = property.to_ascii_lowercase();
    ["password", "secret", "key", "token", "jaas", "credential", "oauthbearer.config"].iter().any(|s| name.contains(s))
}

#[derive(Clone, Debug, PartialEq)]
pub enum StartingOffsets {
    Earliest,
    Latest,
    /// Milliseconds since the epoch: the first record at or after it, by partition.
    Timestamp(i64),
    /// Partitions of the topics that are not named begin at their earliest offset.
    Explicit(Offsets),
}

/// Records of one kind.
#[derive(Clone, Debug)]
pub struct TypeConfig {
    /// Empty for the only one of a pipeline without `[[types]]`.
    pub name: String,
    pub when: When,
    pub schema: Arc<Schema>,
    pub transform: TransformConfig,
    /// Its column of event times. None: its rows have no say in the watermark.
    pub event_time: Option<String>,
    pub rows: Option<TableConfig>,
}

#[derive(Clone, Debug, Default)]
pub struct TransformConfig {
    pub filter: Option<String>,
    /// Name and SQL expression, in the order of the file.
    pub columns: Vec<(String, String)>,
}

#[derive(Clone, Debug, Default)]
pub struct QualityConfig {
    /// In the order of the file.
    pub expectations: Vec<ExpectationConfig>,
    /// None: however many records are refused, the query goes on.
    pub breaker: Option<BreakerConfig>,
}

#[derive(Clone, Debug)]
pub struct ExpectationConfig {
    /// Index of the message type whose rows it looks at.
    pub of: usize,
    pub name: String,
    pub sql: String,
    pub on_fail: OnFail,
}

/// What becomes of a row that fails an expectation, from the mildest to the gravest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnFail {
    /// It stays.
    Warn,
    /// It is left out, and counted.
    Drop,
    DeadLetter,
    /// It stops the query.
    Fail,
}

impl OnFail {
    pub const ALL: [OnFail; 4] = [OnFail::Warn, OnFail::Drop, OnFail::DeadLetter, OnFail::Fail];

    /// As it is written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            OnFail::Warn => "warn",
            OnFail::Drop => "drop",
            OnFail::DeadLetter => "dead_letter",
            OnFail::Fail => "fail",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct BreakerConfig {
    /// Share of refused records above which a batch is held back: from 0 to below 1.
    pub max_error_rate: f64,
    pub min_records: u64,
    pub window: Duration,
    /// The first wait before a batch that is held back is tried again.
    pub probe_interval: Duration,
}

#[derive(Clone, Debug)]
pub struct EventTimeConfig {
    pub column: String,
    pub watermark_delay: Duration,
    pub policy: WatermarkPolicy,
    /// Timestamps further ahead of the trigger time than this become dead letters. None: no guard.
    pub max_future: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TableConfig {
    /// `namespace.table`
    pub table: String,
    pub partition_by: Vec<String>,
    pub sort_by: Vec<String>,
    pub properties: BTreeMap<String, String>,
    /// Whether rows carry `_kafka_topic`, `_kafka_partition`, `_kafka_offset`, `_kafka_timestamp` (rows table only).
    pub provenance: bool,
}

/// When rows of a window are written, as in Spark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputMode {
    /// Once, when it closes.
    Append,
    /// With every batch that has rows for it, the groups that it touched.
    Update,
}

impl OutputMode {
    pub const ALL: [OutputMode; 2] = [OutputMode::Append, OutputMode::Update];

    /// As it is written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            OutputMode::Append => "append",
            OutputMode::Update => "update",
        }
    }
}

#[derive(Clone, Debug)]
pub struct WindowConfig {
    /// Index of the message type whose rows it aggregates.
    pub of: usize,
    pub table: TableConfig,
    pub windowing: Windowing,
    pub output_mode: OutputMode,
    /// SQL over the columns of a row: the rows that the windows are made of. None: all.
    pub filter: Option<String>,
    /// Where late rows are kept. None: they are only counted. Windows may share one.
    pub late_table: Option<TableConfig>,
    pub group_by: Vec<String>,
    /// Output column and SQL aggregate, in the order of the file.
    pub aggregates: Vec<(String, String)>,
}

/// What keeps the tables small and fast while they are written.
#[derive(Clone, Debug, PartialEq)]
pub struct MaintenanceConfig {
    pub enabled: bool,
    pub interval: Duration,
    /// The longest that one run takes up new work.
    pub time_budget: Duration,
    /// Of tables that do not say so themselves (`history.expire.max-snapshot-age-ms`).
    pub max_snapshot_age: Duration,
    /// Of Floe's own snapshots, in tables that name no age themselves.
    pub max_snapshots: usize,
    /// So many small files of a partition that is still written are compacted; of a quiet one, any more than three.
    pub compact_min_files: usize,
    /// How long ago the event time, or the last write, of a partition has to be for it to count as quiet.
    pub compact_after: Duration,
    /// A file that nothing references is deleted once it is that old.
    pub orphan_grace: Duration,
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

#[derive(Clone, Debug)]
pub struct StateConfig {
    /// Most bytes of open windows that stay in memory between two batches; the rest is in the checkpoint only.
    pub memory_budget_bytes: u64,
}
