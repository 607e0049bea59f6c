//! Batches of three tables, as a pipeline commits them every ten seconds, without the pipeline.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{
    ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use floe::config::{CatalogConfig, MaintenanceConfig};
use floe::sink::iceberg::{BatchCommit, DataFile, IcebergSink, Marker, Round, TableReport, TableSpec};
use uuid::Uuid;

use super::reader::Tables;

pub const TABLES: [&str; 3] = ["fleet.events", "fleet.device_minutes", "fleet.dead_letters"];
/// Of each table in each batch.
pub const ROWS: i64 = 20;
/// A trigger every ten seconds and maintenance every ten minutes.
pub const COMMITS_A_ROUND: u64 = 60;
/// 2026-01-01T18:00:00Z: the day ends in the course of a long run.
const START_US: i64 = 1_767_290_400_000_000;
const TRIGGER_US: i64 = 10_000_000;

pub struct Commits {
    pub folder: PathBuf,
    runtime: tokio::runtime::Runtime,
    sink: IcebergSink,
    schemas: Vec<SchemaRef>,
    uuids: BTreeMap<String, Uuid>,
}

/// The defaults.
pub fn policy() -> MaintenanceConfig {
    MaintenanceConfig {
        enabled: true,
        interval: Duration::from_secs(600),
        time_budget: Duration::from_secs(60),
        max_snapshot_age: Duration::from_secs(5 * 86_400),
        max_snapshots: 100,
        compact_min_files: 20,
        compact_after: Duration::from_secs(3_600),
        orphan_grace: Duration::from_secs(3 * 86_400),
    }
}

fn schemas() -> Vec<SchemaRef> {
    let utc = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    let schema = |columns: Vec<(&str, DataType)>| -> SchemaRef {
        Arc::new(Schema::new(columns.into_iter().map(|(name, kind)| Field::new(name, kind, false)).collect::<Vec<_>>()))
    };
    vec![
        schema(vec![
            ("event_id", DataType::Utf8),
            ("device_id", DataType::Utf8),
            ("event_type", DataType::Utf8),
            ("event_timestamp", utc()),
            ("duration_ms", DataType::Int64),
            ("battery_level", DataType::Float64),
            ("signal", DataType::Int32),
            ("firmware", DataType::Utf8),
            ("_kafka_topic", DataType::Utf8),
            ("_kafka_partition", DataType::Int32),
            ("_kafka_offset", DataType::Int64),
            ("_kafka_timestamp", utc()),
        ]),
        schema(vec![
            ("window_start", utc()),
            ("window_end", utc()),
            ("device_id", DataType::Utf8),
            ("events", DataType::Int64),
            ("duration_sum", DataType::Int64),
            ("battery_avg", DataType::Float64),
        ]),
        schema(vec![
            ("topic", DataType::Utf8),
            ("partition", DataType::Int32),
            ("offset", DataType::Int64),
            ("ingested_at", utc()),
            ("reason", DataType::Utf8),
            ("message", DataType::Utf8),
            ("payload", DataType::Utf8),
        ]),
    ]
}

fn rows(schema: &SchemaRef, batch: u64) -> RecordBatch {
    let range = || (batch as i64 * ROWS)..(batch as i64 * ROWS + ROWS);
    let time = |n: i64| START_US + batch as i64 * TRIGGER_US + n % ROWS * 400_000;
    let column = |field: &Arc<Field>| -> ArrayRef {
        match field.data_type() {
            DataType::Utf8 => Arc::new(StringArray::from_iter_values(range().map(|n| match field.name().as_str() {
                "event_id" => format!("{:016x}-{n:08}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as i64)),
                name => format!("{name}-{:05}", n * 7919 % 1_000),
            }))),
            DataType::Timestamp(..) => {
                Arc::new(TimestampMicrosecondArray::from_iter_values(range().map(time)).with_timezone("UTC"))
            }
            DataType::Int32 => Arc::new(Int32Array::from_iter_values(range().map(|n| (n % 8) as i32))),
            DataType::Float64 => Arc::new(Float64Array::from_iter_values(range().map(|n| n as f64 / 4.0))),
            _ => Arc::new(Int64Array::from_iter_values(range())),
        }
    };
    RecordBatch::try_new(schema.clone(), schema.fields().iter().map(column).collect()).expect("rows")
}

impl Commits {
    pub fn new(folder: &Path) -> Commits {
        let catalog = CatalogConfig::Sqlite {
            path: folder.join("catalog.db"),
            warehouse: folder.join("warehouse").display().to_string(),
        };
        let schemas = schemas();
        let times = ["event_timestamp", "window_start", "ingested_at"];
        let specs: Vec<TableSpec> = TABLES
            .iter()
            .zip(&schemas)
            .zip(times)
            .map(|((name, schema), time)| TableSpec {
                name: name.to_string(),
                schema: schema.clone(),
                partition_by: vec![format!("day({time})")],
                sort_by: vec![],
                properties: BTreeMap::new(),
            })
            .collect();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        let sink = runtime.block_on(IcebergSink::open(&catalog, Uuid::new_v4(), "fleet", &specs)).expect("tables");
        let infos = runtime.block_on(sink.load()).expect("tables");
        let uuids = infos.into_iter().map(|info| (info.name, info.uuid)).collect();
        Commits { folder: folder.to_path_buf(), runtime, sink, schemas, uuids }
    }

    /// Writes and commits a batch; how long the commit alone has taken.
    pub fn commit(&self, batch: u64) -> Duration {
        let write = |(table, schema): (usize, &SchemaRef)| -> Vec<DataFile> {
            let mut writer = self.sink.writer(table, batch, Uuid::new_v4(), 0);
            writer.write(&rows(schema, batch)).expect("rows are written");
            writer.finish().expect("a file")
        };
        let offsets: BTreeMap<String, [u64; 2]> =
            (0..8).map(|p| (format!("telemetry-{p}"), [batch * 1_250_000, (batch + 1) * 1_250_000])).collect();
        let commit = BatchCommit {
            properties: std::collections::BTreeMap::new(),
            marker: Marker { pipeline: "fleet".into(), batch, plan: format!("sha256:{batch:064}") },
            tables: self.uuids.clone(),
            summary: [
                ("floe.offsets".to_owned(), serde_json::to_string(&offsets).expect("JSON")),
                ("floe.watermark".to_owned(), format!("{}", START_US + batch as i64 * TRIGGER_US)),
            ]
            .into(),
            files: self.schemas.iter().enumerate().map(write).collect(),
        };
        let from = Instant::now();
        self.runtime.block_on(self.sink.commit(&commit)).expect("a commit");
        from.elapsed()
    }

    pub fn maintain(&self) -> Vec<TableReport> {
        let reports = self.runtime.block_on(self.sink.maintainer().run(&Round::new(policy(), false)));
        assert!(reports.iter().all(|report| report.errors.is_empty()), "{reports:?}");
        reports
    }

    pub fn tables(&self) -> Tables {
        Tables::new(self.folder.join("catalog.db"))
    }

    /// Of all tables together.
    pub fn metadata_bytes(&self) -> u64 {
        let folder = |table: &str| self.folder.join("warehouse").join(table.replace('.', "/")).join("metadata");
        let files = TABLES.iter().flat_map(|table| fs::read_dir(folder(table)).expect("a folder of metadata"));
        files.map(|file| file.and_then(|file| file.metadata()).expect("a file").len()).sum()
    }
}

pub fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}
