use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arrow::array::*;
use arrow::datatypes::{DataType, Field, Fields, Int64Type, Schema, SchemaRef, TimeUnit};
use floe::config::{CatalogConfig, MaintenanceConfig};
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, Round, TableReport, TableSpec};
use serde_json::json;
use uuid::Uuid;

use crate::support::reader::Tables;
use crate::support::turn;

pub(super) const TABLE: &str = "t.everything";

/// A table that is written without a pipeline.
pub(super) struct Written {
    pub(super) dir: tempfile::TempDir,
    pub(super) runtime: tokio::runtime::Runtime,
    query: Uuid,
    batch: AtomicU64,
}

impl Written {
    pub(super) fn new() -> Written {
        Written {
            dir: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap(),
            query: Uuid::new_v4(),
            batch: AtomicU64::new(0),
        }
    }

    pub(super) fn open(&self, schema: &SchemaRef) -> IcebergSink {
        let catalog = CatalogConfig::Sqlite {
            path: self.dir.path().join("catalog.db"),
            warehouse: self.dir.path().join("warehouse").display().to_string(),
        };
        let spec = TableSpec {
            name: TABLE.into(),
            schema: schema.clone(),
            partition_by: vec![],
            sort_by: vec![],
            properties: BTreeMap::new(),
        };
        self.runtime.block_on(IcebergSink::open(&catalog, self.query, "everything", &[spec])).unwrap()
    }

    /// One data file a batch.
    pub(super) fn commit(&self, sink: &IcebergSink, rows: &[RecordBatch]) {
        for rows in rows {
            let batch = self.batch.fetch_add(1, Ordering::Relaxed);
            let mut writer = sink.writer(0, batch, Uuid::new_v4(), 0);
            writer.write(rows).unwrap();
            let commit = BatchCommit {
                properties: std::collections::BTreeMap::new(),
                marker: Marker { pipeline: "everything".into(), batch, plan: format!("sha256:{batch}") },
                tables: BTreeMap::new(),
                summary: BTreeMap::new(),
                files: vec![writer.finish().unwrap()],
            };
            self.runtime.block_on(sink.commit(&commit)).unwrap();
        }
    }

    pub(super) fn maintain(&self, sink: &IcebergSink) -> TableReport {
        let policy = MaintenanceConfig {
            enabled: true,
            interval: Duration::from_secs(600),
            time_budget: Duration::from_secs(60),
            max_snapshot_age: Duration::from_secs(86_400),
            max_snapshots: 4,
            compact_min_files: 3,
            compact_after: Duration::from_secs(3_600),
            orphan_grace: Duration::from_secs(3_600),
        };
        let report = self.runtime.block_on(sink.maintainer().run(&Round::new(policy, true))).remove(0);
        assert!(report.errors.is_empty(), "{report:?}");
        report
    }

    pub(super) fn tables(&self) -> Tables {
        Tables::new(self.dir.path().join("catalog.db"))
    }
}

const UTC: &str = "UTC";

fn instant() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into()))
}

fn inner() -> Fields {
    vec![Field::new("x", DataType::Float64, true), Field::new("at", instant(), true)].into()
}

fn structure() -> Fields {
    vec![
        Field::new("n", DataType::Int64, true),
        Field::new("s", DataType::Utf8, true),
        Field::new("inner", DataType::Struct(inner()), true),
    ]
    .into()
}

/// Every type that a schema can lead to. `wide`: after a new version of it.
pub(super) fn schema(wide: bool) -> SchemaRef {
    let column = |name: &str, kind: DataType| Field::new(name, kind, true);
    let mut columns = vec![
        Field::new("id", DataType::Int64, false),
        column("text", DataType::Utf8),
        column("i32", if wide { DataType::Int64 } else { DataType::Int32 }),
        column("i64", DataType::Int64),
        column("f32", if wide { DataType::Float64 } else { DataType::Float32 }),
        column("f64", DataType::Float64),
        column("flag", DataType::Boolean),
        column("instant", instant()),
        column("local", DataType::Timestamp(TimeUnit::Microsecond, None)),
        column("date", DataType::Date32),
        column("time", DataType::Time64(TimeUnit::Microsecond)),
        column("d9", DataType::Decimal128(9, 2)),
        column("d18", DataType::Decimal128(18, 4)),
        column("d38", DataType::Decimal128(38, 9)),
        column("bytes", DataType::Binary),
        column("record", DataType::Struct(structure())),
        column("list", DataType::List(Arc::new(Field::new("element", DataType::Int64, true)))),
        column("records", DataType::List(Arc::new(Field::new("element", DataType::Struct(structure()), true)))),
        column("lists", {
            let inner = Field::new("element", DataType::Utf8, true);
            DataType::List(Arc::new(Field::new("element", DataType::List(Arc::new(inner)), true)))
        }),
        column("map", {
            let entry = vec![Field::new("key", DataType::Utf8, false), Field::new("value", DataType::Int64, true)];
            DataType::Map(Arc::new(Field::new("key_value", DataType::Struct(entry.into()), false)), false)
        }),
    ];
    if wide {
        columns.push(column("added", DataType::Utf8));
    }
    Arc::new(Schema::new(columns))
}

/// 0001-01-01 and the last microsecond of 9999.
const FIRST_US: i64 = -62_135_596_800_000_000;
const LAST_US: i64 = 253_402_300_799_999_999;
const DAY_US: i64 = 86_400_000_000;

const TEXTS: [&str; 10] = [
    "",
    "a",
    "it's \"quoted\" \\ \n",
    "sixteen letters.",
    "sixteen letters. and more",
    "fifteen letters😀 and more",
    "ääääääääääääääääää",
    "fifteen letters\u{d7ff} and more",
    "\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}\u{10ffff}",
    "longer than what a Parquet writer keeps of its statistics by default, which are sixty-four bytes",
];
const INTS: [i32; 6] = [i32::MIN, -1, 0, 1, 65_536, i32::MAX];
const LONGS: [i64; 7] = [i64::MIN, i32::MIN as i64 - 1, -1, 0, 1 << 53, i64::MAX - 1, i64::MAX];
const DOUBLES: [f64; 10] =
    [f64::NEG_INFINITY, f64::MIN, -1.5, -0.0, 0.0, f64::MIN_POSITIVE, 0.1, f64::MAX, f64::INFINITY, f64::NAN];
const TIMES_US: [i64; 8] = [FIRST_US, -DAY_US - 500_000, -DAY_US - 1, -1, 0, 1, 1_767_225_600_123_456, LAST_US];
const D38: i128 = 10_i128.pow(38) - 1;

/// Row `n` of a table of extremes: each column walks through its own at its own pace, nulls among them.
struct Walk {
    n: i64,
    column: std::cell::Cell<i64>,
}

impl Walk {
    fn pick<T: Copy>(&self, of: &[T]) -> Option<T> {
        self.column.set(self.column.get() + 1);
        let k = (self.n * (2 * self.column.get() + 1) + self.n / 7 + self.column.get()) % (of.len() as i64 + 1);
        of.get(k as usize).copied()
    }
}

pub(super) fn extremes(range: std::ops::Range<i64>, wide: bool) -> RecordBatch {
    let rows: Vec<Row> = range.map(|n| Row::extreme(n, wide)).collect();
    batch(&rows, wide)
}

/// Ever larger values: each range has its own in every column.
pub(super) fn growing(range: std::ops::Range<i64>, wide: bool) -> RecordBatch {
    let rows: Vec<Row> = range.map(|n| Row::growing(n, wide)).collect();
    batch(&rows, wide)
}

/// Of the type [`structure`].
type Record = (Option<i64>, Option<String>, Option<(Option<f64>, Option<i64>)>);

#[derive(Clone)]
pub(super) struct Row {
    id: i64,
    text: Option<String>,
    int: Option<i32>,
    long: Option<i64>,
    float: Option<f32>,
    double: Option<f64>,
    flag: Option<bool>,
    instant: Option<i64>,
    local: Option<i64>,
    date: Option<i32>,
    time: Option<i64>,
    decimals: [Option<i128>; 3],
    bytes: Option<Vec<u8>>,
    /// None: the record is null.
    record: Option<Record>,
    list: Option<Vec<Option<i64>>>,
    map: Option<Vec<(String, Option<i64>)>>,
    added: Option<String>,
}

impl Row {
    pub(super) fn extreme(n: i64, wide: bool) -> Row {
        let walk = Walk { n, column: std::cell::Cell::new(0) };
        let text = |walk: &Walk| walk.pick(&TEXTS).map(str::to_owned);
        let date = |us: i64| us.div_euclid(DAY_US) as i32;
        let record = walk.pick(&[0, 1, 2]).map(|kind| {
            let inner = (kind > 0).then(|| (walk.pick(&DOUBLES), walk.pick(&TIMES_US)));
            (walk.pick(&LONGS), text(&walk), inner)
        });
        Row {
            id: n,
            text: text(&walk),
            int: walk.pick(&INTS),
            long: walk.pick(&LONGS),
            float: walk.pick(&DOUBLES).map(|d| d as f32),
            double: walk.pick(&DOUBLES),
            flag: walk.pick(&[true, false]),
            instant: walk.pick(&TIMES_US),
            local: walk.pick(&TIMES_US),
            date: walk.pick(&TIMES_US).map(date),
            time: walk.pick(&[0, 1, 43_200_000_000, DAY_US - 1]),
            decimals: [
                walk.pick(&[-999_999_999, -1, 0, 1, 999_999_999]),
                walk.pick(&[-(10_i128.pow(18) - 1), -1, 0, 1, 10_i128.pow(18) - 1]),
                walk.pick(&[-D38, -(1 << 70), -1, 0, 1, 1 << 64, D38]),
            ],
            bytes: walk
                .pick(&[
                    &b""[..],
                    b"\0",
                    b"\xff",
                    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
                    b"sixteen letters. and more",
                ])
                .map(<[u8]>::to_vec),
            record,
            list: walk.pick(&[0, 1, 5]).map(|len| (0..len).map(|_| walk.pick(&LONGS)).collect()),
            map: walk.pick(&[0, 1, 3]).map(|len| (0..len).map(|i| (format!("{i}ü"), walk.pick(&LONGS))).collect()),
            added: if wide { text(&walk) } else { None },
        }
    }

    pub(super) fn growing(n: i64, wide: bool) -> Row {
        let day = -10_957 + n * 100;
        Row {
            id: n,
            // A long common beginning would be all that is left of it.
            text: Some(format!("{n:06} with much more text than sixteen characters")),
            int: Some(-500 + n as i32),
            long: Some(n * 1_000_000_007 - (1 << 40)),
            float: Some(n as f32 / 4.0 - 100.0),
            double: Some(n as f64 / 3.0 - 100.0),
            flag: Some(n % 2 == 0),
            instant: Some(day * DAY_US + 1),
            local: Some(day * DAY_US - 1),
            date: Some(day as i32),
            time: Some(n * 60_000_001),
            decimals: [Some(n as i128 - 500), Some((n as i128 - 500) * 1_000_000_007), Some((n as i128 - 500) << 80)],
            bytes: Some(format!("{n:06}{}", "\u{ff}".repeat(5)).into_bytes()),
            record: Some((Some(n), Some(format!("{n:06}")), Some((Some(n as f64), Some(day * DAY_US))))),
            list: Some(vec![Some(n)]),
            map: Some(vec![("n".into(), Some(n))]),
            added: wide.then(|| format!("{n:06}")),
        }
    }
}

fn structs<'a>(records: impl Iterator<Item = Option<&'a Record>>) -> StructArray {
    let (mut n, mut s, mut x, mut at) =
        (Int64Builder::new(), StringBuilder::new(), Float64Builder::new(), TimestampMicrosecondBuilder::new());
    let (mut valid, mut inner_valid) = (Vec::new(), Vec::new());
    for record in records {
        let inner_value = record.and_then(|(_, _, inner)| inner.as_ref());
        n.append_option(record.and_then(|(n, _, _)| *n));
        s.append_option(record.and_then(|(_, s, _)| s.as_ref()));
        x.append_option(inner_value.and_then(|(x, _)| *x));
        at.append_option(inner_value.and_then(|(_, at)| *at));
        valid.push(record.is_some());
        inner_valid.push(inner_value.is_some());
    }
    let nested: Vec<ArrayRef> = vec![Arc::new(x.finish()), Arc::new(at.finish().with_timezone(UTC))];
    let nested = StructArray::new(inner(), nested, Some(inner_valid.into()));
    let columns: Vec<ArrayRef> = vec![Arc::new(n.finish()), Arc::new(s.finish()), Arc::new(nested)];
    StructArray::new(structure(), columns, Some(valid.into()))
}

fn batch(rows: &[Row], wide: bool) -> RecordBatch {
    let decimals = |i: usize, precision: u8, scale: i8| -> ArrayRef {
        let values = Decimal128Array::from_iter(rows.iter().map(|r| r.decimals[i]));
        Arc::new(values.with_precision_and_scale(precision, scale).unwrap())
    };
    let ints: ArrayRef = match wide {
        true => Arc::new(Int64Array::from_iter(rows.iter().map(|r| r.int.map(i64::from)))),
        false => Arc::new(Int32Array::from_iter(rows.iter().map(|r| r.int))),
    };
    let floats: ArrayRef = match wide {
        true => Arc::new(Float64Array::from_iter(rows.iter().map(|r| r.float.map(f64::from)))),
        false => Arc::new(Float32Array::from_iter(rows.iter().map(|r| r.float))),
    };
    // A row's record as often as its list is long; its text in lists of one and two.
    let times = |r: &Row| r.list.as_ref().map(Vec::len);
    let records = structs(rows.iter().flat_map(|r| std::iter::repeat_n(r.record.as_ref(), times(r).unwrap_or(0))));
    let lengths = arrow::buffer::OffsetBuffer::from_lengths(rows.iter().map(|r| times(r).unwrap_or(0)));
    let valid: Vec<bool> = rows.iter().map(|r| r.list.is_some()).collect();
    let element = Arc::new(Field::new("element", DataType::Struct(structure()), true));
    let records = ListArray::new(element, lengths, Arc::new(records), Some(valid.into()));
    let text = Arc::new(Field::new("element", DataType::Utf8, true));
    let lists_of = ListBuilder::new(StringBuilder::new()).with_field(text.clone());
    let outer = Arc::new(Field::new("element", DataType::List(text), true));
    let mut lists = ListBuilder::new(lists_of).with_field(outer);
    let names = MapFieldNames { entry: "key_value".into(), key: "key".into(), value: "value".into() };
    let mut map = MapBuilder::new(Some(names), StringBuilder::new(), Int64Builder::new());
    for row in rows {
        for length in 0..times(row).unwrap_or(0).min(3) {
            (0..length).for_each(|_| lists.values().values().append_option(row.text.as_ref()));
            lists.values().append(length != 1);
        }
        lists.append(row.list.is_some());
        for (key, value) in row.map.iter().flatten() {
            map.keys().append_value(key);
            map.values().append_option(*value);
        }
        map.append(row.map.is_some()).unwrap();
    }
    let instants = |of: fn(&Row) -> Option<i64>| TimestampMicrosecondArray::from_iter(rows.iter().map(of));
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter(rows.iter().map(|r| Some(r.id)))),
        Arc::new(StringArray::from_iter(rows.iter().map(|r| r.text.as_ref()))),
        ints,
        Arc::new(Int64Array::from_iter(rows.iter().map(|r| r.long))),
        floats,
        Arc::new(Float64Array::from_iter(rows.iter().map(|r| r.double))),
        Arc::new(BooleanArray::from_iter(rows.iter().map(|r| r.flag))),
        Arc::new(instants(|r| r.instant).with_timezone(UTC)),
        Arc::new(instants(|r| r.local)),
        Arc::new(Date32Array::from_iter(rows.iter().map(|r| r.date))),
        Arc::new(Time64MicrosecondArray::from_iter(rows.iter().map(|r| r.time))),
        decimals(0, 9, 2),
        decimals(1, 18, 4),
        decimals(2, 38, 9),
        Arc::new(BinaryArray::from_iter(rows.iter().map(|r| r.bytes.as_ref()))),
        Arc::new(structs(rows.iter().map(|r| r.record.as_ref()))),
        {
            let values = ListArray::from_iter_primitive::<Int64Type, _, _>(rows.iter().map(|r| r.list.clone()));
            let (_, offsets, values, nulls) = values.into_parts();
            Arc::new(ListArray::new(Arc::new(Field::new("element", DataType::Int64, true)), offsets, values, nulls))
        },
        Arc::new(records),
        Arc::new(lists.finish()),
        Arc::new(map.finish()),
    ];
    if wide {
        columns.push(Arc::new(StringArray::from_iter(rows.iter().map(|r| r.added.as_ref()))));
    }
    RecordBatch::try_new(schema(wide), columns).unwrap()
}

/// What was written before the new version, as it is seen after it.
pub(super) fn seen_wide(of: std::ops::Range<i64>, row: fn(i64, bool) -> Row) -> RecordBatch {
    let rows: Vec<Row> = of.map(|n| row(n, false)).collect();
    batch(&rows, true)
}

/// PyIceberg, DuckDB and Polars read every type as it was written, to the last bit, at each stage of a table's life: as it
/// was made, after a new version of the schema, after files were compacted and snapshots expired, and back in time.
#[test]
fn all_readers_agree_at_every_stage() {
    let _turn = turn();
    let written = Written::new();
    let narrow = written.open(&schema(false));
    let tables = written.tables();
    let first = [extremes(0..40, false), extremes(40..80, false), extremes(80..120, false)];
    written.commit(&narrow, &first);
    assert_eq!(tables.agree(TABLE, "id", Some(&first), None), 120);

    let wide = written.open(&schema(true));
    let second: Vec<RecordBatch> = (3..8).map(|i| extremes(i * 40..i * 40 + 40, true)).collect();
    written.commit(&wide, &second);
    let all: Vec<RecordBatch> = std::iter::once(seen_wide(0..120, Row::extreme)).chain(second).collect();
    assert_eq!(tables.agree(TABLE, "id", Some(&all), None), 320);

    let report = written.maintain(&wide);
    assert!(report.snapshots_expired > 0 && report.files_compacted == 8, "{report:?}");
    assert_eq!(tables.agree(TABLE, "id", Some(&all), None), 320);
    for snapshot in tables.table(TABLE).snapshots {
        let rows: usize = snapshot.summary["total-records"].parse().unwrap();
        let then = &all[..1 + (rows - 120) / 40];
        assert_eq!(tables.agree(TABLE, "id", Some(then), Some(snapshot.id)), rows as u64);
    }
}

/// A filter on any column, by any of its extremes, finds every row, whatever the bounds in manifests and files say; on
/// columns that grow, it leaves out the files that cannot have the value.
#[test]
fn filters_prune_files_and_lose_no_row() {
    let _turn = turn();
    let written = Written::new();
    let sink = written.open(&schema(false));
    let rows: Vec<RecordBatch> = (0..6).map(|i| extremes(i * 20..i * 20 + 20, false)).collect();
    written.commit(&sink, &rows);
    written.tables().filters(TABLE, "id", &rows, 12);

    let written = Written::new();
    let sink = written.open(&schema(false));
    let rows: Vec<RecordBatch> = (0..4).map(|i| growing(i * 25..i * 25 + 25, false)).collect();
    written.commit(&sink, &rows);
    let fewest = written.tables().filters(TABLE, "id", &rows, 3);
    for (column, files) in &fewest {
        // There are but two values of it.
        assert_eq!(*files, if column == "flag" { 4 } else { 1 }, "{column}");
    }
    assert_eq!(fewest.len(), 19);
}

/// Counts of nulls and NaN, and bounds, as other engines read them from the manifests.
#[test]
fn statistics_say_what_is_in_the_file() {
    let _turn = turn();
    let written = Written::new();
    let sink = written.open(&schema(false));
    let row = |id: i64, text: Option<&str>, double: Option<f64>| Row {
        id,
        text: text.map(str::to_owned),
        double,
        ..Row::growing(id, false)
    };
    let cut = "fifteen letters😀 and more";
    let files = [
        vec![row(0, Some(cut), Some(-0.0)), row(1, None, Some(2.5)), row(2, None, None)],
        vec![
            row(3, Some(TEXTS[8]), Some(f64::NAN)),
            row(4, Some("b"), Some(1.0)),
            Row { bytes: Some(vec![0xff; 17]), ..row(5, Some("c"), Some(f64::NAN)) },
        ],
        vec![row(6, None, Some(f64::NAN)), row(7, None, None)],
    ];
    let batches: Vec<RecordBatch> = files.iter().map(|rows| batch(rows, false)).collect();
    written.commit(&sink, &batches);
    let mut found = written.tables().statistics(TABLE);
    found.sort_by_key(|file| file["id"]["lower_bound"].as_i64());
    let metrics = |column: &str| -> Vec<[serde_json::Value; 5]> {
        const KEYS: [&str; 5] = ["value_count", "null_value_count", "nan_value_count", "lower_bound", "upper_bound"];
        found.iter().map(|file| KEYS.map(|key| file[column][key].clone())).collect()
    };
    let none = json!(null);
    let texts = [
        json!([3, 2, none, "fifteen letters😀", "fifteen letters😁"]),
        // Nothing comes after the last character there is.
        json!([3, 0, none, "b", none]),
        json!([2, 2, none, none, none]),
    ];
    assert_eq!(json!(metrics("text")), json!(texts));
    let doubles = [
        json!([3, 1, 0, "-0.0", "2.5"]),
        // Bounds would be of the numbers alone, and for some engines NaN is larger than all of these.
        json!([3, none, 2, none, none]),
        json!([2, none, 1, none, none]),
    ];
    assert_eq!(json!(metrics("f64")), json!(doubles));
    // Of short ones the values themselves; of longer ones none, which Spark would take for these.
    let of_bytes: Vec<_> = metrics("bytes").into_iter().map(|[_, _, _, lower, upper]| json!([lower, upper])).collect();
    let bytes = |of: &str| format!("{of}{}", "c3bf".repeat(5));
    let expected = [
        json!([bytes("303030303030"), bytes("303030303032")]),
        json!([bytes("303030303033"), none]),
        json!([bytes("303030303036"), bytes("303030303037")]),
    ];
    assert_eq!(of_bytes, expected);
}
