use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use floe::config::CatalogConfig;
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, TableSpec};
use uuid::Uuid;

use crate::support::commits::{COMMITS_A_ROUND, Commits, ROWS, TABLES, median};
use crate::support::reader::Tables;
use crate::support::turn;

const COMMITS: u64 = 300;

/// Three hundred commits of one row each: few manifests, few metadata files, every row there, and the last commits do not
/// take much longer than the early ones.
#[test]
fn many_small_commits() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let catalog = CatalogConfig::Sqlite {
        path: dir.path().join("catalog.db"),
        warehouse: dir.path().join("warehouse").display().to_string(),
    };
    let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
    let spec = TableSpec {
        name: "t.numbers".into(),
        schema: schema.clone(),
        partition_by: vec!["bucket(2, n)".into()],
        sort_by: vec![],
        properties: BTreeMap::new(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let sink = runtime.block_on(IcebergSink::open(&catalog, Uuid::new_v4(), "numbers", &[spec])).unwrap();
    let mut times = Vec::new();
    for batch in 0..COMMITS {
        let column: ArrayRef = Arc::new(Int64Array::from(vec![batch as i64]));
        let mut writer = sink.writer(0, batch, Uuid::new_v4(), 0);
        writer.write(&RecordBatch::try_new(schema.clone(), vec![column]).unwrap()).unwrap();
        let commit = BatchCommit {
            marker: Marker { pipeline: "numbers".into(), batch, plan: format!("sha256:{batch}") },
            tables: BTreeMap::new(),
            properties: BTreeMap::new(),
            summary: BTreeMap::new(),
            files: vec![writer.finish().unwrap()],
        };
        let started = Instant::now();
        runtime.block_on(sink.commit(&commit)).unwrap();
        times.push(started.elapsed());
    }
    let tables = Tables::new(dir.path().join("catalog.db"));
    let found: Vec<(u64, i64)> = tables.query("select count(*), sum(n)::bigint from {t.numbers}");
    assert_eq!(found, [(COMMITS, (0..COMMITS as i64).sum())]);
    // A filter goes through the bounds in merged manifests.
    let one: Vec<(i64,)> = tables.query("select n from {t.numbers} where n = 17");
    assert_eq!(one, [(17,)]);
    let table = tables.table("t.numbers");
    assert_eq!(table.rows, Some(COMMITS));
    assert_eq!(table.snapshots.len() as u64, COMMITS);
    let summary = &table.snapshots.last().unwrap().summary;
    let kept: u64 = summary["manifests-kept"].parse().unwrap();
    assert!(kept <= 60, "{summary:?}");

    let folder = dir.path().join("warehouse/t/numbers/metadata");
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.filter(|name| name.ends_with(".metadata.json")).count() <= 21);

    let (early, late) = (median(&times[35..65]), median(&times[270..]));
    let slowest = times.iter().max().unwrap();
    println!("commit: median {early:?} at 50, {late:?} at 300; slowest {slowest:?}");
    // The metadata still lists every snapshot; without optimization, writing that is most of a commit.
    let growth = if cfg!(debug_assertions) { 4.0 } else { 1.5 };
    assert!(late < early.mul_f64(growth) + Duration::from_millis(5), "{early:?} at 50, {late:?} at 300");
}

/// Four hundred batches of three tables with maintenance as in a service (`bench/commits.rs` makes thousands): commits, the
/// metadata on disk and the files that a scan has to read stay as they were.
#[test]
fn commits_of_three_tables_with_maintenance() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let commits = Commits::new(dir.path());
    let mut times = Vec::new();
    for batch in 0..400 {
        times.push(commits.commit(batch));
        if batch % COMMITS_A_ROUND == COMMITS_A_ROUND - 1 {
            commits.maintain();
        }
    }
    let (early, late) = (median(&times[100..200]), median(&times[300..]));
    println!("commit: median {early:?} of 100..200, {late:?} of 300..400");
    // Other tests run beside this one.
    assert!(late < early.mul_f64(1.5) + Duration::from_millis(10), "{early:?} of 100..200, {late:?} of 300..400");
    assert!(commits.metadata_bytes() < 20_000_000, "{} bytes of metadata", commits.metadata_bytes());
    let tables = commits.tables();
    for table in TABLES {
        let (time, files) = tables.plan(table);
        assert!(files < 150, "{table}: {files} files, planned in {time:?}");
        assert_eq!(tables.table(table).rows, Some(400 * ROWS as u64), "{table}");
    }
}
