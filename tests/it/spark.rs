use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::*;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use floe::config::CatalogConfig;
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, TableSpec};
use uuid::Uuid;

use super::readers::{Row, TABLE, Written, extremes, growing, schema, seen_wide};
use crate::support::broker::Broker;
use crate::support::catalogs::RestServer;
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, records};
use crate::support::floe::Pipeline;
use crate::support::reader::Tables;
use crate::support::spark::Spark;
use crate::support::telemetry::{MINUTE_MS, Reading, Telemetry, Truth, device_id};
use crate::support::turn;

/// Spark has no type for times of day, and so cannot open a table that has one.
fn without_time(rows: &RecordBatch) -> RecordBatch {
    let of = rows.schema();
    let columns: Vec<usize> = (0..of.fields().len()).filter(|i| of.field(*i).name() != "time").collect();
    rows.project(&columns).unwrap()
}

fn schema_without_time(wide: bool) -> SchemaRef {
    without_time(&RecordBatch::new_empty(schema(wide))).schema()
}

/// Every type but times of day, as all four engines read it, through the embedded catalog: as it was made, after a new
/// version of the schema, after Spark has written, after files were compacted and snapshots expired, and back in time.
#[test]
fn every_type_at_every_stage() {
    let _turn = turn();
    let written = Written::new();
    let (tables, spark) = (written.tables(), Spark::on(&written.tables()));
    let agree = |truth: &[RecordBatch], snapshot: Option<i64>| {
        let then = snapshot.map(|id| format!(" VERSION AS OF {id}")).unwrap_or_default();
        let rows = spark.rows(&format!("SELECT * FROM {TABLE}{then}"));
        tables.all_agree(TABLE, "id", Some(truth), snapshot, Some(&rows))
    };
    let narrow = written.open(&schema_without_time(false));
    let first: Vec<RecordBatch> = (0..3).map(|i| without_time(&extremes(i * 40..i * 40 + 40, false))).collect();
    written.commit(&narrow, &first);
    assert_eq!(agree(&first, None), 120);

    let wide = written.open(&schema_without_time(true));
    let mut all = vec![without_time(&seen_wide(0..120, Row::extreme))];
    let more: Vec<RecordBatch> = (3..6).map(|i| without_time(&extremes(i * 40..i * 40 + 40, true))).collect();
    written.commit(&wide, &more);
    all.extend(more);
    assert_eq!(agree(&all, None), 240);

    // Spark writes every type, and Floe goes on.
    let copied = without_time(&extremes(120..160, true));
    let ids = Int64Array::from_iter_values(1_120..1_160);
    let mut columns = copied.columns().to_vec();
    columns[0] = Arc::new(ids);
    let others: Vec<String> = copied.schema().fields()[1..].iter().map(|f| f.name().clone()).collect();
    spark.run(&format!(
        "INSERT INTO {TABLE} SELECT id + 1000 AS id, {} FROM {TABLE} WHERE id >= 120 AND id < 160",
        others.join(", ")
    ));
    all.push(RecordBatch::try_new(copied.schema(), columns).unwrap());
    let more: Vec<RecordBatch> = (6..9).map(|i| without_time(&extremes(i * 40..i * 40 + 40, true))).collect();
    written.commit(&wide, &more);
    all.extend(more);
    assert_eq!(agree(&all, None), 400);

    let report = written.maintain(&wide);
    assert!(report.snapshots_expired > 0 && report.files_compacted == 10, "{report:?}");
    assert_eq!(agree(&all, None), 400);
    for snapshot in tables.table(TABLE).snapshots {
        let rows: usize = snapshot.summary["total-records"].parse().unwrap();
        let then = &all[..1 + (rows - 120) / 40];
        assert_eq!(agree(then, Some(snapshot.id)), rows as u64);
    }
}

/// A table with a time of day: Spark says that it cannot, and the others read it.
#[test]
fn times_of_day_are_for_other_readers() {
    let _turn = turn();
    let written = Written::new();
    let sink = written.open(&schema(false));
    let rows = [extremes(0..40, false)];
    written.commit(&sink, &rows);
    let error = Spark::on(&written.tables()).try_sql(&format!("SELECT id FROM {TABLE}")).unwrap_err();
    assert!(error.contains("Spark does not support time fields"), "{error}");
    assert_eq!(written.tables().agree(TABLE, "id", Some(&rows), None), 40);
}

/// A filter on any column by any of its extremes finds every row, and so does every aggregate that Iceberg takes from
/// manifests; on columns that grow, the filter leaves out the files that cannot have the value.
#[test]
fn filters_prune_files_and_lose_no_row() {
    let _turn = turn();
    let checked = |rows: Vec<RecordBatch>, values: u32| {
        let written = Written::new();
        let sink = written.open(&rows[0].schema());
        written.commit(&sink, &rows);
        let spark = Spark::on(&written.tables());
        let unfiltered = spark.rows(&format!("SELECT * FROM {TABLE}"));
        written.tables().all_agree(TABLE, "id", Some(&rows), None, Some(&unfiltered));
        spark.filters(TABLE, &unfiltered, values)
    };
    checked((0..3).map(|i| without_time(&extremes(i * 20..i * 20 + 20, false))).collect(), 3);
    let fewest = checked((0..4).map(|i| without_time(&growing(i * 25..i * 25 + 25, false))).collect(), 1);
    for (column, files) in &fewest {
        // There are but two values of it.
        assert_eq!(*files, if column == "flag" { 4 } else { 1 }, "{column}");
    }
    assert_eq!(fewest.len(), 18);
}

/// Tables with every partition transform: each row is in the partition that Spark computes for it.
#[test]
fn partition_values_are_those_that_spark_computes() {
    let _turn = turn();
    let written = Written::new();
    let rows = without_time(&extremes(0..120, false));
    let tables: [(&str, &[&str]); 7] = [
        ("t.identity", &["text", "i32", "date", "flag", "bytes", "d38"]),
        ("t.years", &["year(instant)", "month(local)", "day(date)", "record.s"]),
        ("t.months", &["month(instant)", "year(local)", "year(date)"]),
        ("t.days", &["day(instant)", "hour(local)", "month(date)", "day(record.inner.at)"]),
        ("t.hours", &["hour(instant)", "day(local)"]),
        (
            "t.bucket",
            &[
                "bucket(7, i32)",
                "bucket(7, i64)",
                "bucket(16, text)",
                "bucket(5, bytes)",
                "bucket(3, date)",
                "bucket(5, instant)",
                "bucket(5, local)",
                "bucket(4, d9)",
                "bucket(4, d18)",
                "bucket(4, d38)",
            ],
        ),
        (
            "t.truncate",
            &[
                "truncate(10, i32)",
                "truncate(1000, i64)",
                "truncate(15, text)",
                "truncate(1, bytes)",
                "truncate(50, d9)",
            ],
        ),
    ];
    let specs: Vec<TableSpec> = tables
        .iter()
        .map(|(name, partition_by)| TableSpec {
            name: name.to_string(),
            schema: rows.schema(),
            partition_by: partition_by.iter().map(|p| p.to_string()).collect(),
            sort_by: vec![],
            properties: BTreeMap::new(),
        })
        .collect();
    let catalog = CatalogConfig::Sqlite {
        path: written.dir.path().join("catalog.db"),
        warehouse: written.dir.path().join("warehouse").display().to_string(),
    };
    let open = IcebergSink::open(&catalog, Uuid::new_v4(), "partitions", &specs);
    let sink = written.runtime.block_on(open).unwrap();
    let files = (0..specs.len()).map(|table| {
        let mut writer = sink.writer(table, 1, Uuid::new_v4(), 0);
        // Also a few at a time, and one by one, which takes another way.
        writer.write(&rows.slice(0, 60)).unwrap();
        (60..90).step_by(3).for_each(|n| writer.write(&rows.slice(n, 3)).unwrap());
        (90..120).for_each(|n| writer.write(&rows.slice(n, 1)).unwrap());
        writer.finish().unwrap()
    });
    let commit = BatchCommit {
        properties: BTreeMap::new(),
        marker: Marker { pipeline: "partitions".into(), batch: 1, plan: "sha256:1".into() },
        tables: BTreeMap::new(),
        summary: BTreeMap::new(),
        files: files.collect(),
    };
    written.runtime.block_on(sink.commit(&commit)).unwrap();

    let spark = Spark::on(&written.tables());
    for (table, partition_by) in tables {
        let all = spark.rows(&format!("SELECT * FROM {table}"));
        written.tables().all_agree(table, "id", Some(std::slice::from_ref(&rows)), None, Some(&all));
        for expression in partition_by {
            let (name, computed) = by_spark(expression);
            // The smallest decimal is truncated to one digit more than its type has, and is not even equal to itself then.
            let elsewhere = spark.try_sql(&format!(
                "SELECT DISTINCT _partition.`{name}`, {computed} FROM {table} \
                 WHERE NOT (_partition.`{name}` <=> {computed}) \
                 AND (d9 IS NULL OR d9 > -9999999)"
            ));
            assert_eq!(elsewhere, Ok(serde_json::json!([])), "{table}: {expression}: found and expected");
            let partitions: Vec<(u64,)> = spark.sql(&format!("SELECT count(DISTINCT {computed}) FROM {table}"));
            assert!(partitions[0].0 > 1, "{table}: {expression}");
        }
    }
}

/// The name of a partition field, and its value as Spark's functions have it.
fn by_spark(expression: &str) -> (String, String) {
    let Some((function, arguments)) = expression.split_once('(') else {
        return (expression.replace('.', "_"), expression.to_owned());
    };
    let arguments = arguments.trim_end_matches(')');
    let flat = arguments.rsplit(", ").next().unwrap().replace('.', "_");
    match function {
        "bucket" => (format!("{flat}_bucket"), format!("floe.system.bucket({arguments})")),
        "truncate" => (format!("{flat}_trunc"), format!("floe.system.truncate({arguments})")),
        _ => (format!("{flat}_{function}"), format!("floe.system.{function}s({arguments})")),
    }
}

/// A row of telemetry, and where it comes from.
#[derive(Clone)]
struct Seen {
    topic: String,
    partition: i32,
    offset: i64,
    reading: Reading,
}

/// What is to be in the tables.
#[derive(Clone, Default)]
struct Expected {
    rows: Vec<Seen>,
    truth: Truth,
    next: BTreeMap<i32, i64>,
}

impl Expected {
    fn produce(&mut self, telemetry: &Telemetry, topic: &str, range: std::ops::Range<u64>) {
        for reading in range.map(|index| telemetry.reading(index)) {
            let partition = telemetry.partition(&reading);
            let next = self.next.entry(partition).or_default();
            self.truth.add(&reading);
            if reading.invalid.is_none() {
                self.rows.push(Seen { topic: topic.into(), partition, offset: *next, reading });
            }
            *next += 1;
        }
    }

    fn rows(&self) -> RecordBatch {
        let rows = || self.rows.iter();
        let doubles = |of: fn(&Reading) -> f64| -> ArrayRef {
            Arc::new(Float64Array::from_iter_values(rows().map(|r| of(&r.reading))))
        };
        let texts = |of: fn(&Seen) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(rows().map(of))) };
        let longs = |of: fn(&Seen) -> i64| -> ArrayRef { Arc::new(Int64Array::from_iter_values(rows().map(of))) };
        let micros = TimestampMicrosecondArray::from_iter_values(rows().map(|r| r.reading.event_ms * 1_000));
        RecordBatch::try_from_iter([
            ("device_id", texts(|r| r.reading.device_id())),
            ("event_timestamp", Arc::new(micros.with_timezone("UTC")) as ArrayRef),
            ("battery_level", doubles(|r| r.battery as f64 / 4.0)),
            ("signal_strength", doubles(|r| r.signal as f64 / 4.0)),
            ("latitude", doubles(|r| r.latitude as f64 / 10_000.0)),
            ("longitude", doubles(|r| r.longitude as f64 / 10_000.0)),
            ("duration_ms", longs(|r| r.reading.duration_ms)),
            ("status", texts(|r| r.reading.status_name().into())),
            ("_kafka_topic", texts(|r| r.topic.clone())),
            ("_kafka_partition", longs(|r| r.partition.into())),
            ("_kafka_offset", longs(|r| r.offset)),
        ])
        .unwrap()
    }

    fn windows(&self, delay_ms: i64) -> RecordBatch {
        let closed = self.truth.closed(delay_ms);
        let times = |add: i64| {
            let times = closed.keys().map(|(start, _)| (start + add) * 1_000);
            TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")
        };
        let quarters = |values: Vec<i64>| Float64Array::from_iter_values(values.into_iter().map(|q| q as f64 / 4.0));
        let of = || closed.values();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(times(0)),
            Arc::new(times(MINUTE_MS)),
            Arc::new(StringArray::from_iter_values(closed.keys().map(|(_, device)| device_id(*device)))),
            Arc::new(Int64Array::from_iter_values(of().map(|w| w.events))),
            Arc::new(quarters(of().map(|w| w.battery_sum).collect())),
            Arc::new(quarters(of().map(|w| w.battery_min).collect())),
            Arc::new(quarters(of().map(|w| w.battery_max).collect())),
            Arc::new(Int64Array::from_iter_values(of().map(|w| w.duration_sum))),
        ];
        let utc = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let fields = [
            ("window_start", utc.clone()),
            ("window_end", utc),
            ("device_id", DataType::Utf8),
            ("events", DataType::Int64),
            ("battery_sum", DataType::Float64),
            ("battery_min", DataType::Float64),
            ("battery_max", DataType::Float64),
            ("duration_sum", DataType::Int64),
        ];
        let fields: Vec<Field> = fields.map(|(name, kind)| Field::new(name, kind, false)).into();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
    }
}

const KEY: &str = "_kafka_topic,_kafka_partition,_kafka_offset";

/// A pipeline, the tables that it writes on a REST catalog, and Spark on them.
struct Shared {
    telemetry: Telemetry,
    produced: u64,
    pipeline: Pipeline,
    tables: Tables,
    spark: Spark,
    expected: Expected,
    _server: RestServer,
}

impl Shared {
    fn new(topic: &str) -> Shared {
        let server = RestServer::start();
        let broker = Broker::shared();
        // Four days.
        let telemetry = Telemetry { messages: 6_000, span_ms: 4 * 86_400_000, ..Telemetry::default() };
        broker.create_topic(topic, telemetry.partitions, &[]);
        let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
        pipeline.rest(&server.uri, &server.uri).set("source.max_offsets_per_trigger", 200);
        let tables = pipeline.tables();
        let spark = Spark::on(&tables);
        Shared { telemetry, produced: 0, pipeline, tables, spark, expected: Expected::default(), _server: server }
    }

    /// Spark does something, and Floe goes on with more messages.
    fn step(&mut self, name: &str, spark: impl FnOnce(&Spark, &mut Vec<Seen>)) {
        spark(&self.spark, &mut self.expected.rows);
        self.goes_on(name);
    }

    fn goes_on(&mut self, name: &str) {
        self.produce();
        self.pipeline.run();
        self.is_as_expected(name);
    }

    fn produce(&mut self) {
        let range = self.produced..self.produced + 400;
        self.produced = range.end;
        Broker::shared().produce_records(&self.pipeline.topic, records(&self.telemetry, range.clone()));
        self.expected.produce(&self.telemetry, &self.pipeline.topic, range);
    }

    fn is_as_expected(&self, name: &str) {
        let expected = &self.expected;
        let agree = |table: &str, key: &str, truth: RecordBatch| {
            let rows = self.spark.rows(&format!("SELECT * FROM {table}"));
            let count = self.tables.all_agree(table, key, Some(std::slice::from_ref(&truth)), None, Some(&rows));
            assert_eq!(count, truth.num_rows() as u64, "{table} after {name}");
        };
        agree(ROWS, KEY, expected.rows());
        agree(WINDOWS, "window_start,device_id", expected.windows(self.pipeline.delay_ms()));
        let dead: Vec<(String, u64)> =
            self.spark.sql(&format!("SELECT reason, count(*) FROM {DEAD_LETTERS} GROUP BY reason"));
        assert_eq!(dead.into_iter().collect::<BTreeMap<_, _>>(), expected.truth.dead, "after {name}");
    }

    fn count(&self, sql: &str) -> u64 {
        self.spark.sql::<(u64,)>(sql)[0].0
    }
}

/// Spark reads, appends, deletes in both ways, rewrites, branches, expires, evolves; in between Floe goes on. At each step
/// Spark, PyIceberg, DuckDB and Polars find exactly what was produced, and what Spark has made of it.
#[test]
fn spark_works_on_the_tables_and_floe_goes_on() {
    let _turn = turn();
    let mut shared = Shared::new("spark");
    shared.goes_on("the first batches");
    shared.step("an append", |spark, rows| {
        let columns =
            "device_id, event_timestamp, battery_level, signal_strength, latitude, longitude, duration_ms, status";
        spark.run(&format!(
            "INSERT INTO {ROWS} ({columns}, _kafka_topic, _kafka_partition, _kafka_offset, _kafka_timestamp) \
             SELECT {columns}, 'of spark', _kafka_partition, _kafka_offset, _kafka_timestamp FROM {ROWS} \
             WHERE _kafka_offset < 20"
        ));
        let copies: Vec<Seen> = rows.iter().filter(|r| r.offset < 20).cloned().collect();
        rows.extend(copies.into_iter().map(|row| Seen { topic: "of spark".into(), ..row }));
    });
    shared.step("a delete that copies files", |spark, rows| {
        spark.run(&format!("DELETE FROM {ROWS} WHERE device_id IN ('dev-000003', 'dev-000017')"));
        rows.retain(|r| ![3, 17].contains(&r.reading.device));
    });
    // Killed with a batch planned and its files written; Spark comes between.
    let committed = shared.expected.rows.len();
    shared.produce();
    shared.pipeline.run_failing("execute.files_written:kill").expect_killed();
    shared.step("a delete by position", move |spark, rows| {
        spark.run(&format!("ALTER TABLE {ROWS} SET TBLPROPERTIES ('write.delete.mode' = 'merge-on-read')"));
        spark.run(&format!("DELETE FROM {ROWS} WHERE duration_ms % 7 = 0"));
        let planned = rows.split_off(committed);
        rows.retain(|r| r.reading.duration_ms % 7 != 0);
        rows.extend(planned);
    });
    assert!(shared.count(&format!("SELECT count(*) FROM {ROWS}.delete_files")) > 0);
    shared.pipeline.set("maintenance.compact_min_files", 2).set("maintenance.max_snapshots", 3);
    shared.pipeline.maintain(&[]).expect_code(0);
    shared.is_as_expected("Floe's maintenance of a table with deletes by position");
    let then = shared.expected.rows();
    shared.step("a branch and a tag", |spark, _| {
        spark.run(&format!("ALTER TABLE {ROWS} CREATE TAG kept"));
        spark.run(&format!("ALTER TABLE {ROWS} CREATE BRANCH audit"));
        spark.run(&format!("DELETE FROM {ROWS}.branch_audit WHERE status <> 'online'"));
    });
    let audit = shared.count(&format!("SELECT count(*) FROM {ROWS}.branch_audit"));
    assert!(audit > 0);
    shared.step("rewrite_data_files and its kin", |spark, _| {
        spark.run(&format!(
            "CALL floe.system.rewrite_data_files(table => '{ROWS}', options => map('rewrite-all', 'true'))"
        ));
        spark.run(&format!(
            "CALL floe.system.rewrite_position_delete_files(table => '{ROWS}', options => map('rewrite-all', 'true'))"
        ));
        spark.run(&format!("CALL floe.system.rewrite_manifests('{ROWS}')"));
        spark.run(&format!(
            "CALL floe.system.rewrite_data_files(table => '{WINDOWS}', options => map('rewrite-all', 'true'))"
        ));
    });
    shared.step("expire_snapshots", |spark, _| {
        for table in [ROWS, WINDOWS, DEAD_LETTERS] {
            spark.run(&format!(
                "CALL floe.system.expire_snapshots(table => '{table}', older_than => TIMESTAMP '2100-01-01 00:00:00', retain_last => 1)"
            ));
        }
    });
    shared.step("a new column and another partitioning", |spark, _| {
        spark.run(&format!("ALTER TABLE {ROWS} ADD COLUMN note STRING"));
        spark.run(&format!("ALTER TABLE {ROWS} ADD PARTITION FIELD bucket(4, device_id)"));
    });
    assert!(shared.count(&format!("SELECT count(*) FROM {ROWS}.files WHERE spec_id > 0")) > 0);
    shared.pipeline.maintain(&[]).expect_code(0);
    shared.is_as_expected("Floe's maintenance of two partitionings");

    // The tag and the branch are as they were.
    assert_eq!(shared.count(&format!("SELECT count(*) FROM {ROWS}.branch_audit")), audit);
    let kept = shared.count(&format!("SELECT snapshot_id FROM {ROWS}.refs WHERE name = 'kept'")) as i64;
    for version in [kept.to_string(), "'kept'".into()] {
        let rows = shared.spark.rows(&format!("SELECT * FROM {ROWS} VERSION AS OF {version}"));
        let found = shared.tables.all_agree(ROWS, KEY, Some(std::slice::from_ref(&then)), Some(kept), Some(&rows));
        assert_eq!(found, then.num_rows() as u64);
    }
    shared.goes_on("everything");
}
