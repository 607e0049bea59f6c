use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use floe::config::{CatalogConfig, MaintenanceConfig};
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, Round, TableReport, TableSpec};
use uuid::Uuid;

use crate::support::broker::Broker;
use crate::support::check::{WINDOWS, everything, records};
use crate::support::floe::Pipeline;
use crate::support::reader::Tables;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

const EVENTS: &str = "t.events";
const MINUTE_US: i64 = 60_000_000;

/// A table written in batches of ten rows, ten minutes of event time each.
struct Stream {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    schema: SchemaRef,
    sink: IcebergSink,
}

impl Stream {
    fn new(partition_by: &[&str]) -> Stream {
        let dir = tempfile::tempdir().unwrap();
        let catalog = CatalogConfig::Sqlite {
            path: dir.path().join("catalog.db"),
            warehouse: dir.path().join("warehouse").display().to_string(),
        };
        let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false), Field::new("at", utc, false)]));
        let spec = TableSpec {
            name: EVENTS.into(),
            schema: schema.clone(),
            partition_by: partition_by.iter().map(|p| p.to_string()).collect(),
            sort_by: vec!["n".into()],
            properties: BTreeMap::new(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let sink = runtime.block_on(IcebergSink::open(&catalog, Uuid::new_v4(), "numbers", &[spec])).unwrap();
        Stream { dir, runtime, schema, sink }
    }

    fn tables(&self) -> Tables {
        Tables::new(self.dir.path().join("catalog.db"))
    }

    fn commit(&self, batch: u64) {
        let range = || (batch as i64 * 10)..(batch as i64 * 10 + 10);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from_iter_values(range())),
            Arc::new(TimestampMicrosecondArray::from_iter_values(range().map(|n| n * MINUTE_US)).with_timezone("UTC")),
        ];
        let mut writer = self.sink.writer(0, batch, Uuid::new_v4(), 0);
        writer.write(&RecordBatch::try_new(self.schema.clone(), columns).unwrap()).unwrap();
        let commit = BatchCommit {
            marker: Marker { pipeline: "numbers".into(), batch, plan: format!("sha256:{batch}") },
            tables: BTreeMap::new(),
            properties: BTreeMap::new(),
            summary: BTreeMap::new(),
            files: vec![writer.finish().unwrap()],
        };
        self.runtime.block_on(self.sink.commit(&commit)).unwrap();
    }

    fn maintain(&self, orphan_grace: Duration) -> TableReport {
        let policy = MaintenanceConfig {
            enabled: true,
            interval: Duration::from_secs(600),
            time_budget: Duration::from_secs(60),
            max_snapshot_age: Duration::from_secs(86_400),
            max_snapshots: 50,
            compact_min_files: 20,
            compact_after: Duration::from_secs(3_600),
            orphan_grace,
        };
        let report = self.runtime.block_on(self.sink.maintainer().run(&Round::new(policy, true))).remove(0);
        assert!(report.errors.is_empty(), "{report:?}");
        report
    }

    fn files(&self) -> BTreeSet<String> {
        fn walk(folder: &Path, found: &mut BTreeSet<String>) {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found)
                } else {
                    found.extend(path.to_str().map(String::from))
                };
            }
        }
        let mut found = BTreeSet::new();
        walk(&self.dir.path().join("warehouse"), &mut found);
        found
    }
}

/// Five hundred small batches with maintenance between them: few files in each partition, bounded metadata, nothing in the
/// warehouse that nothing needs; and PyIceberg, DuckDB and a look back in time find every row.
#[test]
fn five_hundred_small_batches() {
    let _turn = turn();
    let stream = Stream::new(&["hour(at)"]);
    for batch in 0..500 {
        stream.commit(batch);
        if batch % 50 == 49 {
            stream.maintain(Duration::from_secs(3_600));
        }
    }
    let tables = stream.tables();
    let truth = (5_000, (0..5_000).sum::<i64>(), 5_000);
    let all = "select count(*), sum(n)::bigint, count(distinct n) from {t.events}";
    assert_eq!(tables.query::<(i64, i64, i64)>(all), [truth]);
    let table = tables.table(EVENTS);
    assert_eq!(table.rows, Some(5_000));
    assert!(table.snapshots.len() <= 60, "{}", table.snapshots.len());

    // 83 hours; all files are far below the target size.
    let files: Vec<(String, i64)> = tables.data_files(EVENTS);
    let mut by_hour: BTreeMap<u32, u32> = BTreeMap::new();
    for (partition, _) in &files {
        let hour: String = partition.chars().filter(char::is_ascii_digit).collect();
        *by_hour.entry(hour.parse().unwrap()).or_default() += 1;
    }
    // Event time is at 83:19: an hour past 82 of them.
    assert!(by_hour.iter().all(|(hour, files)| *hour > 81 || *files <= 3), "{by_hour:?}");
    assert_eq!(by_hour.len(), 84);

    // A filter prunes by the new files' bounds and loses no row.
    assert_eq!(
        tables.query::<(i64,)>("select n from {t.events} where n between 17 and 19 order by n"),
        [(17,), (18,), (19,)]
    );
    // Every kept snapshot can be read, with the rows that were there then.
    for snapshot in table.snapshots.iter().step_by(10) {
        let then = tables.rows_at(EVENTS, snapshot.id);
        assert_eq!(Some(then), snapshot.summary["total-records"].parse().ok(), "{}", snapshot.id);
    }

    // Files that compaction has replaced stay for readers; then they are orphans.
    let past = std::time::SystemTime::now() - Duration::from_secs(7_200);
    for file in stream.files() {
        fs::File::open(file).unwrap().set_modified(past).unwrap();
    }
    stream.maintain(Duration::from_secs(3_600));
    let (listed, needed) = (stream.files(), tables.needed_files(EVENTS));
    let left: Vec<_> = listed.iter().filter(|f| !needed.contains(*f)).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(tables.query::<(i64, i64, i64)>(all), [truth]);
    let metadata: u64 =
        listed.iter().filter(|f| f.contains("/metadata/")).map(|f| fs::metadata(f).unwrap().len()).sum();
    assert!(metadata < 7 << 20, "{metadata} bytes of metadata");
}

/// Another program deletes and appends rows while Floe compacts, and nothing of what either has done is lost.
#[test]
fn another_program_changes_the_table_meanwhile() {
    let _turn = turn();
    let stream = Stream::new(&[]);
    let tables = stream.tables();
    let mut deleted = 0;
    for round in 0..5u64 {
        (round * 24..round * 24 + 24).for_each(|batch| stream.commit(batch));
        let (rival, first) = (tables.clone(), round as i64 * 240);
        let other = std::thread::spawn(move || {
            rival.delete(EVENTS, &format!("n >= {first} and n < {}", first + 7));
        });
        let mut compacted = 0;
        while !other.is_finished() {
            compacted += stream.maintain(Duration::from_secs(3_600)).files_compacted;
        }
        other.join().unwrap();
        deleted += 7;
        compacted += stream.maintain(Duration::from_secs(3_600)).files_compacted;
        assert!(compacted > 0);
        let rows: i64 = tables.value("select count(*) from {t.events}");
        assert_eq!(rows, (round as i64 + 1) * 240 - deleted);
        let distinct: i64 = tables.value("select count(distinct n) from {t.events}");
        assert_eq!(rows, distinct);
    }
    assert_eq!(tables.table(EVENTS).rows, Some(5 * 240 - deleted as u64));
}

/// Killed at each step of maintenance: the tables hold what they held, and the next start goes on.
#[test]
fn killed_during_maintenance() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "maintenance_kills";
    let telemetry = Telemetry { messages: 6_000, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 100);
    pipeline.set("maintenance.max_snapshots", 3).set("maintenance.compact_min_files", 4);
    let steps = [
        "maintenance.expired",
        "maintenance.deleting",
        "maintenance.rewritten",
        "maintenance.replaced",
        "maintenance.rewritten",
        "maintenance.replaced",
    ];
    for (i, step) in steps.iter().enumerate() {
        let first = i as u64 * 1_000;
        broker.produce_records(topic, records(&telemetry, first..first + 1_000));
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
    let out = pipeline.maintain(&["--dry-run"]);
    out.expect_output(&["telemetry.events: ", "telemetry.device_minutes: ", "telemetry.dead_letters: "]).expect_code(0);
    pipeline.maintain(&[]).expect_code(0);
    everything(&pipeline, broker, &telemetry);
    let table = pipeline.tables().table(WINDOWS);
    assert!(table.snapshots.len() <= 5, "{}", table.snapshots.len());
}

/// A service looks after its tables by itself and says so.
#[test]
fn a_service_maintains_its_tables() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "maintenance_service";
    let telemetry = Telemetry { messages: 2_000, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(&telemetry, 0..2_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 100).service("50 ms");
    pipeline.set("maintenance.max_snapshots", 4).set("maintenance.compact_min_files", 5);
    let mut floe = pipeline.spawn();
    floe.until("maintenance has done something", |floe| {
        let sum = |name: &str| floe.metric(&format!("{name}{{table=\"telemetry.events\"}}")).unwrap_or(0.0);
        let done = sum("floe_maintenance_snapshots_expired_total") > 0.0
            && sum("floe_maintenance_files_compacted_total") > 0.0
            && sum("floe_maintenance_failures_total") == 0.0;
        done.then_some(())
    });
    let status = floe.status().unwrap();
    assert_eq!(status["maintenance"]["tables"][0]["table"], "telemetry.events", "{status}");
    floe.terminate();
    floe.wait().expect_code(0);
    pipeline.remove("trigger").set("trigger.available_now", true);
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
}
