use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use floe::config::CatalogConfig;
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, TableSpec};
use uuid::Uuid;

use crate::support::commits::{COMMITS_A_ROUND, Commits, ROWS, TABLES, median};
use crate::support::reader::Tables;
use crate::support::turn;

const COMMITS: u64 = 300;

/// A table of numbers, one a commit.
struct Numbers {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    schema: SchemaRef,
    sink: IcebergSink,
}

impl Numbers {
    fn new() -> Numbers {
        let dir = tempfile::tempdir().unwrap();
        let catalog = CatalogConfig::Sqlite {
            path: dir.path().join("catalog.db"),
            warehouse: dir.path().join("warehouse").display().to_string(),
        };
        let schema: SchemaRef = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        let spec = TableSpec {
            name: "t.numbers".into(),
            schema: schema.clone(),
            partition_by: vec!["bucket(2, n)".into()],
            sort_by: vec![],
            properties: BTreeMap::new(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let sink = runtime.block_on(IcebergSink::open(&catalog, Uuid::new_v4(), "numbers", &[spec])).unwrap();
        Numbers { dir, runtime, schema, sink }
    }

    /// How long the commit alone has taken.
    fn commit(&self, batch: u64) -> Duration {
        let column: ArrayRef = Arc::new(Int64Array::from(vec![batch as i64]));
        let mut writer = self.sink.writer(0, batch, Uuid::new_v4(), 0);
        writer.write(&RecordBatch::try_new(self.schema.clone(), vec![column]).unwrap()).unwrap();
        let commit = BatchCommit {
            marker: Marker { pipeline: "numbers".into(), batch, plan: format!("sha256:{batch}") },
            tables: BTreeMap::new(),
            properties: BTreeMap::new(),
            summary: BTreeMap::new(),
            files: vec![writer.finish().unwrap()],
        };
        let started = Instant::now();
        self.runtime.block_on(self.sink.commit(&commit)).unwrap();
        started.elapsed()
    }
}

/// Three hundred commits of one row each: few manifests, few metadata files, every row there, and the last commits do not
/// take much longer than the early ones.
#[test]
fn many_small_commits() {
    let _turn = turn();
    // The early ones are those of a young table, made in turn with the last ones of the old one: what else the machine does
    // slows down both.
    let (old, young) = (Numbers::new(), Numbers::new());
    for batch in 0..COMMITS - 30 {
        old.commit(batch);
    }
    for batch in 0..35 {
        young.commit(batch);
    }
    let (mut early, mut late) = (Vec::new(), Vec::new());
    for n in 0..30 {
        early.push(young.commit(35 + n));
        late.push(old.commit(COMMITS - 30 + n));
    }
    let tables = Tables::new(old.dir.path().join("catalog.db"));
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

    let folder = old.dir.path().join("warehouse/t/numbers/metadata");
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.filter(|name| name.ends_with(".metadata.json")).count() <= 21);

    let (early, late) = (median(&early), median(&late));
    println!("commit: median {early:?} at 50, {late:?} at 300");
    // The metadata still lists every snapshot; without optimization, writing that is most of a commit.
    let growth = if cfg!(debug_assertions) { 4.0 } else { 1.5 };
    assert!(late < early.mul_f64(growth) + Duration::from_millis(5), "{early:?} at 50, {late:?} at 300");
}

/// Four hundred batches of three tables with maintenance as in a service (`bench/commits.rs` makes thousands): commits, the
/// metadata on disk and the files that a scan has to read stay as they were.
#[test]
fn commits_of_three_tables_with_maintenance() {
    let _turn = turn();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [commits, young] = [Commits::new(dirs[0].path()), Commits::new(dirs[1].path())];
    let commit = |commits: &Commits, batch: u64| -> Duration {
        let time = commits.commit(batch);
        if batch % COMMITS_A_ROUND == COMMITS_A_ROUND - 1 {
            commits.maintain();
        }
        time
    };
    // As above: the early ones are those of young tables, beside the last ones.
    for batch in 0..400 - COMMITS_A_ROUND {
        commit(&commits, batch);
    }
    for batch in 0..100 {
        commit(&young, batch);
    }
    let (mut early, mut late) = (Vec::new(), Vec::new());
    for n in 0..COMMITS_A_ROUND {
        early.push(commit(&young, 100 + n));
        late.push(commit(&commits, 400 - COMMITS_A_ROUND + n));
    }
    let (early, late) = (median(&early), median(&late));
    println!("commit: median {early:?} of 100..160, {late:?} of 340..400");
    assert!(late < early.mul_f64(1.5) + Duration::from_millis(10), "{early:?} of 100..160, {late:?} of 340..400");
    assert!(commits.metadata_bytes() < 20_000_000, "{} bytes of metadata", commits.metadata_bytes());
    let tables = commits.tables();
    for table in TABLES {
        let (time, files) = tables.plan(table);
        assert!(files < 150, "{table}: {files} files, planned in {time:?}");
        assert_eq!(tables.table(table).rows, Some(400 * ROWS as u64), "{table}");
    }
}
