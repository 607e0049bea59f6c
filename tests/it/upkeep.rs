use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use floe::config::CatalogConfig;
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, TableSpec};
use uuid::Uuid;

use crate::support::reader::Tables;
use crate::support::turn;

const COMMITS: u64 = 300;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

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

    let (early, late) = (median(times[35..65].to_vec()), median(times[270..].to_vec()));
    let slowest = times.iter().max().unwrap();
    println!("commit: median {early:?} at 50, {late:?} at 300; slowest {slowest:?}");
    // The metadata still lists every snapshot; without optimization, writing that is most of a commit.
    let growth = if cfg!(debug_assertions) { 4.0 } else { 1.5 };
    assert!(late < early.mul_f64(growth) + Duration::from_millis(5), "{early:?} at 50, {late:?} at 300");
}
