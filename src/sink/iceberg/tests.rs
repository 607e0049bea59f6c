use std::sync::Arc;

use arrow::array::AsArray;
use arrow::array::{
    ArrayRef, BinaryArray, BinaryBuilder, BooleanArray, Float64Array, Int32Array, Int64Array, ListBuilder, RecordBatch,
    StringArray, StringBuilder, StructBuilder, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Fields, Int64Type, Schema, TimeUnit};
use futures::TryStreamExt;
use tempfile::TempDir;

use super::*;
use crate::error::Kind;

pub(super) const DAY_US: i64 = 86_400_000_000;
/// 2026-01-01T00:00:00Z.
const NEW_YEAR_US: i64 = 1_767_225_600_000_000;

pub(super) struct Fixture {
    pub(super) dir: TempDir,
    query_id: Uuid,
}

impl Fixture {
    pub(super) fn new() -> Fixture {
        Fixture { dir: tempfile::tempdir().unwrap(), query_id: Uuid::new_v4() }
    }

    fn catalog(&self) -> CatalogConfig {
        let path = self.dir.path().join("db/catalog.db");
        CatalogConfig::Sqlite { path, warehouse: self.dir.path().join("warehouse").to_str().unwrap().into() }
    }

    pub(super) async fn open(&self, specs: &[TableSpec]) -> Result<IcebergSink, Error> {
        IcebergSink::open(&self.catalog(), self.query_id, "telemetry", specs).await
    }

    pub(super) async fn another_query(&self, specs: &[TableSpec]) -> IcebergSink {
        IcebergSink::open(&self.catalog(), Uuid::new_v4(), "another", specs).await.unwrap()
    }

    pub(super) fn data_files(&self, table: &str) -> Vec<String> {
        fn walk(folder: &std::path::Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path.to_str().unwrap().to_string()) }
            }
        }
        let mut found = Vec::new();
        walk(&self.dir.path().join("warehouse").join(table.replace('.', "/")).join("data"), &mut found);
        found
    }
}

fn utc() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

fn events_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("device_id", DataType::Utf8, false),
        Field::new("event_timestamp", utc(), false),
        Field::new("battery", DataType::Float64, true),
        Field::new("count", DataType::Int32, true),
        Field::new("ok", DataType::Boolean, true),
        Field::new("_kafka_offset", DataType::Int64, false),
    ]))
}

pub(super) fn spec(name: &str, partition_by: &[&str]) -> TableSpec {
    TableSpec {
        name: name.into(),
        schema: events_schema(),
        partition_by: partition_by.iter().map(|s| s.to_string()).collect(),
        sort_by: vec![],
        properties: BTreeMap::new(),
    }
}

/// `n` rows from `offset`, `step_us` apart.
pub(super) fn events(offset: i64, n: i64, step_us: i64) -> RecordBatch {
    let range = || offset..offset + n;
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(range().map(|i| format!("device-{}", i % 5)))),
        Arc::new(
            TimestampMicrosecondArray::from_iter_values(range().map(|i| NEW_YEAR_US + i * step_us))
                .with_timezone("UTC"),
        ),
        Arc::new(Float64Array::from_iter(range().map(|i| (i % 7 != 0).then_some(i as f64 / 3.0)))),
        Arc::new(Int32Array::from_iter(range().map(|i| Some(i as i32)))),
        Arc::new(BooleanArray::from_iter(range().map(|i| Some(i % 2 == 0)))),
        Arc::new(Int64Array::from_iter_values(range())),
    ];
    RecordBatch::try_new(events_schema(), columns).unwrap()
}

pub(super) async fn write(sink: &IcebergSink, table: usize, batch: BatchId, rows: Vec<RecordBatch>) -> Vec<DataFile> {
    let mut writer = sink.writer(table, batch, Uuid::new_v4(), 0);
    tokio::task::spawn_blocking(move || {
        rows.iter().for_each(|rows| writer.write(rows).unwrap());
        writer.finish().unwrap()
    })
    .await
    .unwrap()
}

pub(super) async fn batch_commit(sink: &IcebergSink, batch: BatchId, files: Vec<Vec<DataFile>>) -> BatchCommit {
    BatchCommit {
        marker: Marker { pipeline: "telemetry".into(), batch, plan: format!("sha256:{batch}") },
        tables: sink.load().await.unwrap().into_iter().map(|t| (t.name, t.uuid)).collect(),
        properties: BTreeMap::new(),
        summary: [("floe.offsets".to_string(), "{}".to_string())].into(),
        files,
    }
}

pub(super) async fn metadata(sink: &IcebergSink, table: usize) -> Arc<TableMetadata> {
    sink.0.load_all().await.unwrap()[table].metadata.clone()
}

fn total(metadata: &TableMetadata, key: &str) -> String {
    metadata.current_snapshot().unwrap().summary().additional_properties[key].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_committed_once_to_all_tables() {
    let fixture = Fixture::new();
    let specs = [spec("telemetry.events", &[]), spec("telemetry.minutes", &[]), spec("telemetry.dead", &[])];
    let sink = fixture.open(&specs).await.unwrap();
    assert!(sink.load().await.unwrap().iter().all(|t| t.marker.is_none() && t.others.is_empty()));

    let files = vec![
        write(&sink, 0, 1, vec![events(0, 100, 1000)]).await,
        write(&sink, 1, 1, vec![events(0, 9, 1)]).await,
        vec![],
    ];
    let commit = batch_commit(&sink, 1, files).await;
    let first = sink.commit(&commit).await.unwrap();
    assert!(!first.already);
    assert_eq!(first.snapshots.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false]);

    let again = fixture.open(&specs).await.unwrap().commit(&commit).await.unwrap();
    assert_eq!(again, Committed { already: true, snapshots: first.snapshots });
    assert!(sink.load().await.unwrap().iter().all(|t| t.marker.as_ref() == Some(&commit.marker)));
    let events_table = metadata(&sink, 0).await;
    assert_eq!(events_table.snapshots().len(), 1);
    assert_eq!(total(&events_table, "total-records"), "100");
    assert_eq!(total(&events_table, "floe.offsets"), "{}");

    let files = vec![write(&sink, 0, 2, vec![events(100, 50, 1000)]).await, vec![], vec![]];
    sink.commit(&batch_commit(&sink, 2, files).await).await.unwrap();
    let events_table = metadata(&sink, 0).await;
    assert_eq!(
        (total(&events_table, "total-records"), total(&events_table, "total-data-files")),
        ("150".into(), "2".into())
    );
    let list = sink.0.file_io.new_input(events_table.current_snapshot().unwrap().manifest_list()).unwrap();
    let list =
        iceberg::spec::ManifestList::parse_with_version(&list.read().await.unwrap(), events_table.format_version());
    assert_eq!(list.unwrap().entries().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_older_than_the_table_is_refused() {
    let fixture = Fixture::new();
    let specs = [spec("telemetry.events", &[]), spec("telemetry.minutes", &[])];
    let sink = fixture.open(&specs).await.unwrap();
    for batch in 1..=3 {
        let files = vec![write(&sink, 0, batch, vec![events(0, 10, 1)]).await, vec![]];
        sink.commit(&batch_commit(&sink, batch, files).await).await.unwrap();
    }
    let mut same_batch_other_plan = batch_commit(&sink, 3, vec![vec![], vec![]]).await;
    same_batch_other_plan.marker.plan = "sha256:other".into();
    for stale in [batch_commit(&sink, 2, vec![vec![], vec![]]).await, same_batch_other_plan] {
        let error = sink.commit(&stale).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Fatal);
        assert!(error.to_string().contains("this checkpoint is older than table telemetry.events"), "{error}");
        assert!(error.to_string().contains(&format!("batch {}", stale.marker.batch)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_table_is_refused() {
    let fixture = Fixture::new();
    let specs = [spec("telemetry.events", &[])];
    let sink = fixture.open(&specs).await.unwrap();
    let commit = batch_commit(&sink, 1, vec![vec![]]).await;
    let database = rusqlite::Connection::open(fixture.dir.path().join("db/catalog.db")).unwrap();
    database.execute("DELETE FROM iceberg_tables", []).unwrap();
    assert!(sink.commit(&commit).await.unwrap_err().to_string().contains("is gone"));
    fixture.open(&specs).await.unwrap();
    let error = sink.commit(&commit).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal);
    assert!(error.to_string().contains("dropped and re-created"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_writers_retry_and_lose_nothing() {
    let fixture = Fixture::new();
    let specs = [spec("telemetry.events", &[]), spec("telemetry.minutes", &[])];
    let mut sinks = vec![fixture.open(&specs).await.unwrap()];
    for _ in 0..3 {
        sinks.push(fixture.another_query(&specs).await);
    }
    let racers: Vec<_> = sinks
        .iter()
        .cloned()
        .map(|sink| {
            tokio::spawn(async move {
                for batch in 1..=4 {
                    let files = vec![write(&sink, 0, batch, vec![events(0, 10, 1)]).await, vec![]];
                    sink.commit(&batch_commit(&sink, batch, files).await).await.unwrap();
                }
            })
        })
        .collect();
    for racer in racers {
        racer.await.unwrap();
    }
    let info = &sinks[0].load().await.unwrap()[0];
    assert_eq!(info.others.len(), 3);
    assert!(info.others.iter().all(|(_, marker)| marker.batch == 4));
    let events_table = metadata(&sinks[0], 0).await;
    assert_eq!(total(&events_table, "total-records"), "160");
    assert_eq!(events_table.snapshots().len(), 16);
}

pub(super) async fn offsets(mut rows: Rows) -> Vec<i64> {
    let mut offsets = Vec::new();
    while let Some(batch) = rows.try_next().await.unwrap() {
        assert_eq!(batch.num_columns(), 1);
        offsets.extend(batch.column(0).as_primitive::<Int64Type>().values());
    }
    offsets.sort_unstable();
    offsets
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_needs_the_table_that_was_pinned_and_leaves_markers_alone() {
    const OFFSET: [&str; 1] = ["_kafka_offset"];
    let fixture = Fixture::new();
    let specs = [spec("telemetry.events", &["day(event_timestamp)"])];
    assert!(PinnedTable::open(&fixture.catalog(), "telemetry.events").await.unwrap().is_none());
    assert!(!fixture.dir.path().join("db").exists(), "looking creates nothing");
    let sink = fixture.open(&specs).await.unwrap();
    let files = vec![write(&sink, 0, 1, vec![events(0, 4, DAY_US)]).await];
    sink.commit(&batch_commit(&sink, 1, files).await).await.unwrap();
    let base = sink.pin(0).await.unwrap();
    let ours = write(&sink, 0, 9, vec![events(10, 4, DAY_US)]).await;
    let meanwhile = vec![write(&sink, 0, 2, vec![events(20, 2, DAY_US)]).await];
    let theirs = sink.commit(&batch_commit(&sink, 2, meanwhile).await).await.unwrap().snapshots[0].unwrap();

    let summary = BTreeMap::from([("floe.retry-of".to_string(), "x".to_string())]);
    assert_eq!(sink.append(0, &base, &ours, &summary).await.unwrap(), Append::Conflict);
    let now = sink.pin(0).await.unwrap();
    assert_eq!(offsets(now.scan_since(&base, &OFFSET, None, 100).await.unwrap()).await, [20, 21]);
    let few = Reference::new("_kafka_offset").less_than(Datum::long(21));
    assert_eq!(offsets(now.scan_since(&base, &OFFSET, Some(few), 100).await.unwrap()).await, [20]);
    let Append::Done { snapshot } = sink.append(0, &now, &ours, &summary).await.unwrap() else { panic!("a conflict") };

    let table = PinnedTable::open(&fixture.catalog(), "telemetry.events").await.unwrap().unwrap();
    assert_eq!(offsets(table.scan(&OFFSET, None, 3).await.unwrap()).await, [0, 1, 2, 3, 10, 11, 12, 13, 20, 21]);
    let some = Reference::new("_kafka_offset").is_in([Datum::long(3), Datum::long(12)]);
    assert_eq!(offsets(table.scan(&OFFSET, Some(some), 3).await.unwrap()).await, [3, 12]);
    for (id, expected) in [(snapshot, vec![10, 11, 12, 13]), (theirs, vec![20, 21])] {
        let added = table.scan_added_by(id, &OFFSET, 100).await.unwrap().unwrap();
        assert_eq!(offsets(added).await, expected);
    }
    assert!(table.scan_added_by(7, &OFFSET, 100).await.unwrap().is_none());
    assert_eq!(offsets(base.scan(&OFFSET, None, 100).await.unwrap()).await, [0, 1, 2, 3], "pinned is pinned");
    let metadata = metadata(&sink, 0).await;
    assert_eq!(total(&metadata, "total-records"), "10");
    assert_eq!(total(&metadata, "floe.retry-of"), "x");
    assert_eq!(sink.load().await.unwrap()[0].marker.as_ref().unwrap().batch, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_on_one_table_leaves_the_others_untouched() {
    let fixture = Fixture::new();
    let specs = [spec("telemetry.events", &[]), spec("telemetry.minutes", &[])];
    let sink = fixture.open(&specs).await.unwrap();
    let before = sink.0.load_all().await.unwrap();
    let other = fixture.another_query(&specs[1..]).await;
    other.commit(&batch_commit(&other, 1, vec![vec![]]).await).await.unwrap();

    let changes: Vec<_> = before
        .iter()
        .zip(&sink.0.tables)
        .map(|(base, table)| catalog::TableChange::new(&table.name, base, Ok).unwrap())
        .collect();
    let error = sink.0.catalog.commit(&changes).await.unwrap_err();
    assert!(matches!(error, catalog::CommitError::Conflict(_)), "{error:?}");
    assert_eq!(sink.0.load_all().await.unwrap()[0].metadata_location, before[0].metadata_location);
    let metadata_files = std::fs::read_dir(fixture.dir.path().join("warehouse/telemetry/events/metadata")).unwrap();
    assert_eq!(metadata_files.count(), 1, "metadata of the failed attempt is deleted");
}

/// What a change requires follows from its updates; applied to the base, they make the metadata that it carries.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_the_same_in_both_of_its_forms() {
    use iceberg::{TableRequirement, TableUpdate};

    let fixture = Fixture::new();
    let sink = fixture.open(&[spec("t.events", &[])]).await.unwrap();
    let files = write(&sink, 0, 1, vec![events(0, 10, 1)]).await;
    let bound = &sink.0.tables[0];
    let base = sink.0.load_all().await.unwrap().remove(0);
    let snapshot = sink.0.append(bound, &base, None, &files, [].into(), &mut Vec::new()).await.unwrap();
    let wider = one_column_more(&events_schema(), "fw", DataType::Utf8);
    let wider = iceberg::arrow::arrow_schema_to_schema_auto_assign_ids(&wider).unwrap();
    let change = catalog::TableChange::new(&bound.name, &base, |builder| {
        builder
            .set_properties([("floe.x".to_string(), "1".to_string())].into())?
            .set_branch_snapshot(snapshot, "main")?
            .add_current_schema(wider)
    })
    .unwrap();

    let mut builder = base.metadata.as_ref().clone().into_builder(Some(base.metadata_location.clone()));
    let json = serde_json::to_string(&change.updates).unwrap();
    for update in serde_json::from_str::<Vec<TableUpdate>>(&json).unwrap() {
        builder = update.apply(builder).unwrap();
    }
    let applied = builder.build().unwrap().metadata;
    assert_eq!(applied.current_snapshot_id(), change.metadata.current_snapshot_id());
    assert_eq!(applied.current_schema(), change.metadata.current_schema());
    assert_eq!(applied.properties(), change.metadata.properties());

    let required = change.requirements();
    assert_eq!(required.len(), 4, "{required:?}");
    assert!(required.iter().all(|r| r.check(Some(&base.metadata)).is_ok()));
    assert!(required.iter().any(|r| matches!(r, TableRequirement::RefSnapshotIdMatch { snapshot_id: None, .. })));
    assert!(required.iter().any(|r| r.check(Some(&change.metadata)).is_err()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_catalog_conforms() {
    let fixture = Fixture::new();
    let CatalogConfig::Sqlite { path, warehouse } = fixture.catalog() else { panic!() };
    let catalog = sqlite::SqliteCatalog::open(&path, &warehouse, TableStorage::default().file_io()).await.unwrap();
    conformance::conforms(&catalog, "conformance").await;

    // The same with tables in a bucket.
    let storage = TableStorage::with_store("s3://bucket/", Arc::new(object_store::memory::InMemory::new()));
    let path = path.with_file_name("bucket.db");
    let catalog = sqlite::SqliteCatalog::open(&path, "s3://bucket/lake", storage.file_io()).await.unwrap();
    conformance::conforms(&catalog, "two.levels").await;
    let table = TableName { namespace: "two.levels".into(), name: "one".into() };
    let at = catalog.load(&table).await.unwrap().unwrap().metadata_location;
    assert!(at.starts_with("s3://bucket/lake/"), "{at}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_split_by_partition() {
    let fixture = Fixture::new();
    let specs = [spec("t.by_day", &["day(event_timestamp)"]), spec("t.mixed", &["device_id", "bucket(4, device_id)"])];
    let sink = fixture.open(&specs).await.unwrap();
    // One batch within a day, one over three days.
    let rows = vec![events(0, 10, 1000), events(0, 6, DAY_US / 2)];
    let by_day = write(&sink, 0, 1, rows.clone()).await;
    assert_eq!(by_day.iter().map(|f| f.record_count()).sum::<u64>(), 16);
    assert_eq!(by_day.len(), 3);
    assert!(by_day.iter().any(|f| f.file_path().contains("/data/event_timestamp_day=2026-01-02/")));
    let mixed = write(&sink, 1, 1, rows).await;
    assert_eq!(mixed.len(), 5);
    assert!(mixed.iter().any(|f| f.file_path().contains("/data/device_id=device-3/device_id_bucket=")));
    sink.commit(&batch_commit(&sink, 1, vec![by_day, mixed]).await).await.unwrap();
    assert_eq!(total(&*metadata(&sink, 0).await, "total-records"), "16");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_failed_attempts_go_and_committed_ones_stay() {
    let fixture = Fixture::new();
    let specs = [spec("t.events", &["day(event_timestamp)"])];
    let sink = fixture.open(&specs).await.unwrap();
    let other = fixture.another_query(&specs).await;
    write(&sink, 0, 1, vec![events(0, 6, DAY_US / 2)]).await;
    write(&sink, 0, 2, vec![events(0, 5, 1)]).await;
    write(&other, 0, 1, vec![events(0, 5, 1)]).await;
    let committed = write(&sink, 0, 1, vec![events(0, 6, DAY_US / 2)]).await;
    assert_eq!(fixture.data_files("t.events").len(), 3 + 1 + 1 + 3);
    assert_eq!(sink.remove_failed_attempts(1).await.unwrap(), 0, "nothing goes before the batch is committed");

    sink.commit(&batch_commit(&sink, 1, vec![committed.clone()]).await).await.unwrap();
    assert_eq!(sink.remove_failed_attempts(1).await.unwrap(), 3);
    let left = fixture.data_files("t.events");
    assert_eq!(left.len(), 5);
    assert!(committed.iter().all(|f| left.iter().any(|path| f.file_path().ends_with(path.as_str()))));
    assert_eq!(sink.remove_failed_attempts(1).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_roll_at_the_target_size_and_empty_writers_leave_none() {
    let fixture = Fixture::new();
    let mut small = spec("t.events", &[]);
    small.properties.insert("write.target-file-size-bytes".into(), "20000".into());
    small.properties.insert("write.parquet.compression-codec".into(), "uncompressed".into());
    let sink = fixture.open(&[small]).await.unwrap();
    assert!(write(&sink, 0, 1, vec![events(0, 0, 1)]).await.is_empty());
    let files = write(&sink, 0, 1, (0..10).map(|i| events(i * 1000, 1000, 1000)).collect()).await;
    assert!(files.len() > 1, "{}", files.len());
    assert_eq!(files.iter().map(|f| f.record_count()).sum::<u64>(), 10_000);
    assert_eq!(fixture.data_files("t.events").len(), files.len());
}

/// Larger than what goes out in one request: the file is uploaded in parts, row group by row group.
#[tokio::test(flavor = "multi_thread")]
async fn large_files_go_out_in_parts() {
    let fixture = Fixture::new();
    let schema = Arc::new(Schema::new(vec![Field::new("payload", DataType::Binary, true)]));
    let mut large = TableSpec { schema: schema.clone(), ..spec("t.payloads", &[]) };
    large.properties.insert("write.parquet.compression-codec".into(), "uncompressed".into());
    large.properties.insert("write.parquet.row-group-size-bytes".into(), (3 << 20).to_string());
    let sink = fixture.open(&[large]).await.unwrap();
    let rows = (0..25u8)
        .map(|i| {
            let column: ArrayRef = Arc::new(BinaryArray::from_iter_values([vec![i; 1 << 20]]));
            RecordBatch::try_new(schema.clone(), vec![column]).unwrap()
        })
        .collect();
    let files = write(&sink, 0, 1, rows).await;
    let on_disk = fixture.data_files("t.payloads");
    assert_eq!((files.len(), on_disk.len()), (1, 1));
    assert_eq!(std::fs::metadata(&on_disk[0]).unwrap().len(), files[0].file_size_in_bytes());
    assert!(files[0].split_offsets().unwrap().len() > 5);
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(std::fs::File::open(&on_disk[0]).unwrap(), 1);
    let first_bytes: Vec<u8> = reader
        .unwrap()
        .map(|batch| {
            let column = batch.unwrap().column(0).clone();
            arrow::array::AsArray::as_binary::<i64>(&column).value(0)[0]
        })
        .collect();
    assert_eq!(first_bytes, (0..25).collect::<Vec<u8>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn existing_tables_are_checked() {
    let fixture = Fixture::new();
    let name = |schema: Schema| TableSpec { schema: Arc::new(schema), ..spec("t.events", &[]) };
    let column = |name: &str, kind: DataType, nullable: bool| Field::new(name, kind, nullable);
    fixture
        .open(&[name(Schema::new(vec![column("a", DataType::Int64, true), column("b", DataType::Utf8, true)]))])
        .await
        .unwrap();
    // Fewer columns and narrower types fit.
    fixture.open(&[name(Schema::new(vec![column("a", DataType::Int32, false)]))]).await.unwrap();
    for (schema, complaint) in [
        (Schema::new(vec![column("a", DataType::Utf8, true)]), "  ! a       long          string           the types"),
        (Schema::new(vec![column("c", DataType::Utf8, false)]), "a new column has to be optional"),
        (Schema::new(vec![column("B", DataType::Utf8, true)]), "the table's column is \"b\""),
    ] {
        let error = fixture.open(&[spec("t.new", &[]), name(schema)]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Fatal);
        assert!(error.to_string().contains("table t.events does not fit the pipeline"), "{error}");
        assert!(error.to_string().contains(complaint), "{error}");
    }
    assert!(fixture.data_files("t.new").is_empty() && !fixture.dir.path().join("warehouse/t/new").exists());
    let twins = Schema::new(vec![column("a", DataType::Int64, true), column("A", DataType::Int64, true)]);
    let error = fixture.open(&[TableSpec { schema: Arc::new(twins), ..spec("t.new", &[]) }]).await.unwrap_err();
    assert!(error.to_string().contains("\"a\" and \"A\" differ in case only"), "{error}");
    for wrong in ["event_timestamp", "day(device_id)", "day(nope)", "bucket(0, device_id)", "week(event_timestamp)"] {
        let error = fixture.open(&[spec("t.other", &[wrong])]).await.unwrap_err();
        assert!(error.to_string().contains(wrong), "{error}");
    }
}

fn columns(metadata: &TableMetadata) -> Vec<(i32, String, String, bool)> {
    let fields = metadata.current_schema().as_struct().fields();
    fields.iter().map(|f| (f.id, f.name.clone(), f.field_type.to_string(), f.required)).collect()
}

fn one_column_more(of: &SchemaRef, name: &str, kind: DataType) -> SchemaRef {
    let mut fields: Vec<_> = of.fields().iter().cloned().collect();
    fields.push(Arc::new(Field::new(name, kind, true)));
    Arc::new(Schema::new(fields))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_table_evolves_once_and_keeps_all_else() {
    let fixture = Fixture::new();
    let old = [
        TableSpec { sort_by: vec!["device_id".into()], ..spec("t.events", &["bucket(4, count)"]) },
        spec("t.other", &[]),
    ];
    let sink = fixture.open(&old).await.unwrap();
    let files = vec![write(&sink, 0, 1, vec![events(0, 10, 1)]).await, vec![]];
    sink.commit(&batch_commit(&sink, 1, files).await).await.unwrap();
    let before = metadata(&sink, 0).await;

    // `count` widens, `battery` may be null as it was, `device_id` may be null now, and there is a new column.
    let mut fields: Vec<_> = one_column_more(&events_schema(), "fw", DataType::Utf8).fields().iter().cloned().collect();
    fields[0] = Arc::new(Field::new("device_id", DataType::Utf8, true));
    fields[3] = Arc::new(Field::new("count", DataType::Int64, true));
    let mut new = old.clone();
    new[0].schema = Arc::new(Schema::new(fields));
    let planned = IcebergSink::plan(&fixture.catalog(), &new).await.unwrap();
    assert_eq!(
        planned.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["t.events: will let device_id be null, widen count from int to long, add fw string", "t.other: fits"]
    );
    assert_eq!(metadata(&sink, 0).await, before, "a plan changes nothing");

    // It comes with the first commit, in one step with the rows.
    let evolved = fixture.open(&new).await.unwrap();
    let files = vec![write(&evolved, 0, 2, vec![events(10, 10, 1)]).await, vec![]];
    assert_eq!(metadata(&sink, 0).await, before, "opening changes nothing");
    evolved.commit(&batch_commit(&evolved, 2, files).await).await.unwrap();
    let after = metadata(&evolved, 0).await;
    assert_eq!(after.metadata_log().len(), before.metadata_log().len() + 1);
    let snapshot = after.current_snapshot().unwrap();
    assert_eq!(snapshot.parent_snapshot_id(), before.current_snapshot_id());
    assert_eq!(snapshot.schema_id(), Some(after.current_schema_id()));
    assert_ne!(after.current_schema_id(), before.current_schema_id());
    let kinds: Vec<_> = columns(&after)
        .into_iter()
        .map(|(id, name, kind, required)| format!("{id} {name} {kind} {required}"))
        .collect();
    assert_eq!(kinds[0], "1 device_id string false");
    assert_eq!(kinds[3], "4 count long false");
    assert_eq!(kinds[6], "7 fw string false");
    assert_eq!(after.default_partition_spec_id(), before.default_partition_spec_id());
    assert_eq!(after.default_sort_order().fields, before.default_sort_order().fields);
    assert_eq!(evolved.load().await.unwrap()[0].marker.as_ref().unwrap().batch, 2);

    // Once more nothing happens; nor does it when the pipeline goes back to its old schema.
    for (batch, specs) in [(3, &new), (4, &old)] {
        let again = fixture.open(specs).await.unwrap();
        let files = vec![write(&again, 0, batch, vec![events(batch as i64 * 10, 10, 1)]).await, vec![]];
        again.commit(&batch_commit(&again, batch, files).await).await.unwrap();
        assert_eq!(metadata(&again, 0).await.current_schema(), after.current_schema());
    }

    // A process that still has the old schema commits what it has written.
    let late = vec![write(&sink, 0, 5, vec![events(50, 10, 1)]).await, vec![]];
    sink.commit(&batch_commit(&sink, 5, late).await).await.unwrap();
    let now = metadata(&evolved, 0).await;
    assert_eq!((total(&now, "total-records"), columns(&now)), ("50".into(), columns(&after)));
}

/// Field ids that files carry are the table's, or the files are not committed.
#[tokio::test(flavor = "multi_thread")]
async fn columns_that_change_between_opening_and_committing() {
    let fixture = Fixture::new();
    fixture.open(&[spec("t.events", &[])]).await.unwrap();
    let with =
        |name: &str, kind| TableSpec { schema: one_column_more(&events_schema(), name, kind), ..spec("t.events", &[]) };
    let first = fixture.open(&[with("fw", DataType::Utf8)]).await.unwrap();
    let alike = fixture.another_query(&[with("fw", DataType::Utf8)]).await;
    let other = fixture.another_query(&[with("site", DataType::Int64)]).await;
    let commit = async |sink: &IcebergSink, batch| {
        let files = vec![write(sink, 0, batch, vec![events(0, 5, 1)]).await];
        sink.commit(&batch_commit(sink, batch, files).await).await
    };
    commit(&first, 1).await.unwrap();
    commit(&alike, 1).await.unwrap();
    let error = commit(&other, 1).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Transient);
    assert!(error.to_string().contains("columns of table t.events were changed by another writer"), "{error}");
    let other = fixture.another_query(&[with("site", DataType::Int64)]).await;
    commit(&other, 1).await.unwrap();
    commit(&first, 2).await.unwrap();
    let now = metadata(&first, 0).await;
    let added: Vec<_> = columns(&now).into_iter().skip(6).map(|(id, name, ..)| (id, name)).collect();
    assert_eq!(added, [(7, "fw".to_string()), (8, "site".to_string())]);
    assert_eq!(total(&now, "total-records"), "20");
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_pipelines_evolve_one_table_together() {
    let fixture = Arc::new(Fixture::new());
    fixture.open(&[spec("t.events", &[])]).await.unwrap();
    let racers: Vec<_> = (0..4)
        .map(|i| {
            let fixture = fixture.clone();
            tokio::spawn(async move {
                let schema = one_column_more(&events_schema(), &format!("c{i}"), DataType::Utf8);
                // As a query does it: what failed for now is done anew.
                loop {
                    let sink =
                        fixture.another_query(&[TableSpec { schema: schema.clone(), ..spec("t.events", &[]) }]).await;
                    let files = vec![write(&sink, 0, 1, vec![events(0, 1, 1)]).await];
                    match sink.commit(&batch_commit(&sink, 1, files).await).await {
                        Ok(_) => return,
                        Err(error) => assert_eq!(error.kind(), Kind::Transient, "{error}"),
                    }
                }
            })
        })
        .collect();
    for racer in racers {
        racer.await.unwrap();
    }
    let sink = fixture.open(&[spec("t.events", &[])]).await.unwrap();
    let now = metadata(&sink, 0).await;
    assert_eq!(total(&now, "total-records"), "4");
    let now = columns(&now);
    assert_eq!(now.iter().map(|c| c.0).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    let mut added: Vec<_> = now[6..].iter().map(|c| c.1.as_str()).collect();
    added.sort();
    assert_eq!(added, ["c0", "c1", "c2", "c3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_column_named_like_a_partition_is_refused() {
    let fixture = Fixture::new();
    fixture.open(&[spec("t.events", &["day(event_timestamp)"])]).await.unwrap();
    let schema = one_column_more(&events_schema(), "event_timestamp_day", DataType::Int32);
    let error = fixture.open(&[TableSpec { schema, ..spec("t.events", &[]) }]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal);
    assert!(error.to_string().contains("add event_timestamp_day int"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_catalog_a_plan_creates_none_and_finds_what_creation_would_refuse() {
    let fixture = Fixture::new();
    let specs = [spec("t.events", &[]), spec("t.wrong", &["event_timestamp"])];
    let plans = IcebergSink::plan(&fixture.catalog(), &specs).await.unwrap();
    assert_eq!(plans[0].step, TableStep::Create);
    assert!(
        matches!(&plans[1].step, TableStep::Refuse(why) if why.contains("a partition of every value")),
        "{plans:?}"
    );
    assert_eq!(std::fs::read_dir(fixture.dir.path()).unwrap().count(), 0);
}

fn metadata_files(fixture: &Fixture, table: &str, suffix: &str) -> usize {
    let folder = fixture.dir.path().join("warehouse").join(table.replace('.', "/")).join("metadata");
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(suffix)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn old_metadata_is_deleted_after_the_commit() {
    let fixture = Fixture::new();
    let mut kept = spec("t.kept", &[]);
    kept.properties.insert("write.metadata.delete-after-commit.enabled".into(), "false".into());
    let sink = fixture.open(&[spec("t.events", &[]), kept]).await.unwrap();
    for batch in 1..=40 {
        sink.commit(&batch_commit(&sink, batch, vec![vec![], vec![]]).await).await.unwrap();
    }
    assert_eq!(metadata_files(&fixture, "t.events", ".metadata.json"), 21);
    assert_eq!(metadata_files(&fixture, "t.kept", ".metadata.json"), 41);
    let log = metadata(&sink, 0).await;
    for entry in log.metadata_log() {
        assert!(sink.0.file_io.exists(&entry.metadata_file).await.unwrap(), "{}", entry.metadata_file);
    }
}

async fn manifests(sink: &IcebergSink, table: usize) -> Vec<iceberg::spec::ManifestFile> {
    let metadata = metadata(sink, table).await;
    let list = sink.0.file_io.new_input(metadata.current_snapshot().unwrap().manifest_list()).unwrap();
    let bytes = list.read().await.unwrap();
    let list = iceberg::spec::ManifestList::parse_with_version(&bytes, metadata.format_version()).unwrap();
    list.consume_entries().into_iter().collect()
}

/// Merged in tiers: every file stays, with the snapshot and sequence number that it came with.
#[tokio::test(flavor = "multi_thread")]
async fn small_manifests_are_merged_in_ordinary_commits() {
    let fixture = Fixture::new();
    let mut merging = spec("t.events", &["day(event_timestamp)"]);
    merging.properties.insert("commit.manifest.min-count-to-merge".into(), "5".into());
    let sink = fixture.open(&[merging.clone()]).await.unwrap();
    let mut came_with = BTreeMap::new();
    let mut sink_now = sink;
    for batch in 1..=60 {
        if batch == 30 {
            merging.schema = one_column_more(&events_schema(), "fw", DataType::Utf8);
            sink_now = fixture.open(&[merging.clone()]).await.unwrap();
        }
        let files = write(&sink_now, 0, batch, vec![events(batch as i64 * 3, 3, DAY_US)]).await;
        let written = files.clone();
        sink_now.commit(&batch_commit(&sink_now, batch, vec![files]).await).await.unwrap();
        let snapshot = metadata(&sink_now, 0).await.current_snapshot().unwrap().clone();
        let numbers = (snapshot.snapshot_id(), snapshot.sequence_number());
        came_with.extend(written.into_iter().map(|file| (file.file_path().to_string(), (file, numbers))));
        assert!(manifests(&sink_now, 0).await.len() <= 5 * 3, "batch {batch}");
    }
    let mut found = BTreeMap::new();
    for manifest in manifests(&sink_now, 0).await {
        let loaded = manifest.load_manifest(&sink_now.0.file_io).await.unwrap();
        for entry in loaded.entries().iter().filter(|e| e.is_alive()) {
            assert_eq!(entry.sequence_number(), entry.file_sequence_number);
            let numbers = (entry.snapshot_id().unwrap(), entry.sequence_number().unwrap());
            assert!(found.insert(entry.file_path().to_string(), (entry.data_file().clone(), numbers)).is_none());
        }
    }
    assert_eq!(found, came_with);
    let snapshots = metadata(&sink_now, 0).await;
    let last_merge = snapshots
        .snapshots()
        .map(|s| &s.summary().additional_properties)
        .filter(|summary| summary["manifests-replaced"] != "0")
        .max_by_key(|summary| summary["total-records"].parse::<u64>().unwrap())
        .unwrap();
    assert_eq!((last_merge["manifests-created"].as_str(), last_merge["added-data-files"].as_str()), ("2", "3"));
}

/// Manifests of an identity partition whose column was widened cannot be mixed with newer ones.
#[tokio::test(flavor = "multi_thread")]
async fn manifests_of_a_widened_partition_column_stay_apart() {
    let fixture = Fixture::new();
    let mut by_count = spec("t.events", &["count"]);
    by_count.properties.insert("commit.manifest.min-count-to-merge".into(), "4".into());
    let mut rows = 0;
    for batch in 1..=12 {
        if batch == 6 {
            let mut fields: Vec<_> = events_schema().fields().iter().cloned().collect();
            fields[3] = Arc::new(Field::new("count", DataType::Int64, true));
            by_count.schema = Arc::new(Schema::new(fields));
        }
        let sink = fixture.open(&[by_count.clone()]).await.unwrap();
        let files = write(&sink, 0, batch, vec![events(batch as i64, 1, 1)]).await;
        rows += files.len();
        sink.commit(&batch_commit(&sink, batch, vec![files]).await).await.unwrap();
        let mut alive = 0;
        for manifest in manifests(&sink, 0).await {
            alive += manifest
                .load_manifest(&sink.0.file_io)
                .await
                .unwrap()
                .entries()
                .iter()
                .filter(|e| e.is_alive())
                .count();
        }
        assert_eq!(alive, rows, "batch {batch}");
    }
}

/// The dead letters' shape: lists of structs with binary values, whose field ids Iceberg assigns.
#[tokio::test(flavor = "multi_thread")]
async fn nested_columns_are_written() {
    let fixture = Fixture::new();
    let header =
        Fields::from(vec![Field::new("name", DataType::Utf8, false), Field::new("value", DataType::Binary, true)]);
    let item = Arc::new(Field::new("item", DataType::Struct(header.clone()), true));
    let schema = Arc::new(Schema::new(vec![
        Field::new("payload", DataType::Binary, true),
        Field::new("headers", DataType::List(item.clone()), true),
    ]));
    let mut headers = ListBuilder::new(StructBuilder::from_fields(header, 1)).with_field(item);
    headers.values().field_builder::<StringBuilder>(0).unwrap().append_value("trace");
    headers.values().field_builder::<BinaryBuilder>(1).unwrap().append_value(b"\x01");
    headers.values().append(true);
    headers.append(true);
    let payload = BinaryArray::from_iter_values([b"\xff{"]);
    let rows = RecordBatch::try_new(schema.clone(), vec![Arc::new(payload), Arc::new(headers.finish())]).unwrap();
    let sink = fixture.open(&[TableSpec { schema, ..spec("t.dead", &[]) }]).await.unwrap();
    let files = write(&sink, 0, 1, vec![rows]).await;
    assert_eq!(files[0].value_counts().len(), 3, "statistics of every leaf: {:?}", files[0].value_counts());
    sink.commit(&batch_commit(&sink, 1, vec![files]).await).await.unwrap();
}

/// Every type that a schema can ask for, read back from the Parquet file as the decoder made it.
#[tokio::test(flavor = "multi_thread")]
async fn every_type_of_a_schema_is_written() {
    let schema = crate::schema::Schema::parse(
        r#"{"type":"object","required":["s"],"properties":{
            "s":{"type":"string"},"i":{"type":"integer","format":"int32"},"l":{"type":"integer"},
            "f":{"type":"number","format":"float"},"d":{"type":"number"},"b":{"type":"boolean"},
            "small":{"type":"number","format":"decimal","x-precision":9,"x-scale":2},
            "middle":{"type":"number","format":"decimal","x-precision":18,"x-scale":4},
            "large":{"type":"string","format":"decimal","x-precision":38,"x-scale":10},
            "day":{"type":"string","format":"date"},"time":{"type":"string","format":"time"},
            "at":{"type":"string","format":"date-time"},"local":{"type":"string","format":"local-date-time"},
            "id":{"type":"string","format":"uuid"},"bytes":{"type":"string","contentEncoding":"base64"},"any":true,
            "list":{"type":"array","items":{"type":["integer","null"]}},
            "lists":{"type":"array","items":{"type":"array","items":{"type":"string"}}},
            "map":{"type":"object","additionalProperties":{"type":["number","null"]}},
            "maps":{"type":"object","additionalProperties":{"type":"object","required":["x"],"properties":{"x":{"type":"integer"}}}},
            "struct":{"type":"object","required":["a"],"properties":{"a":{"type":"integer"},
                "inner":{"type":"object","properties":{"t":{"type":"string","format":"local-time"}}}}},
            "structs":{"type":"array","items":{"type":"object","properties":{"p":{"type":"number","format":"decimal","x-precision":4,"x-scale":1}}}}
        }}"#,
    )
    .unwrap();
    let full = r#"{"s":"ü","i":-7,"l":9223372036854775807,"f":0.1,"d":0.1,"b":true,"small":-1.25,"middle":12345678901234.5678,
        "large":"-1234567890123456789012345678.0123456789","day":"2026-01-31","time":"23:59:59.999999Z",
        "at":"2026-01-31T23:59:59.5+01:00","local":"2026-01-31T23:59:59.5","id":"123e4567-e89b-12d3-a456-426614174000",
        "bytes":"AP8=","any":{"x":[1]},"list":[1,null,3],"lists":[[],["a","b"]],"map":{"k":1.5,"n":null},
        "maps":{"k":{"x":1}},"struct":{"a":1,"inner":{"t":"01:02:03"}},"structs":[{"p":0.1},{}]}"#;
    let payloads = [full, r#"{"s":""}"#, r#"{"s":"x","list":[],"map":{},"struct":{"a":2},"structs":[]}"#];
    let mut chunk = crate::source::Chunk::default();
    for payload in payloads {
        let (begin, value_len) = (chunk.data.len() as u32, payload.len() as u32);
        chunk.data.extend_from_slice(payload.as_bytes());
        let key_len = crate::source::Record::NONE;
        chunk.records.push(crate::source::Record { offset: 0, timestamp_ms: 0, begin, key_len, value_len });
    }
    let decoded = crate::decode::Decoder::new(schema.clone()).decode(&chunk);
    assert!(decoded.rejected.is_empty(), "{:?}", decoded.rejected);

    let fixture = Fixture::new();
    let table = TableSpec { schema: schema.arrow.clone(), ..spec("t.types", &["day(at)"]) };
    let sink = fixture.open(std::slice::from_ref(&table)).await.unwrap();
    let rows = decoded.batch.clone();
    let files = write(&sink, 0, 1, vec![rows.slice(0, 1)]).await;
    let path = files[0].file_path().to_string();
    let path = path.strip_prefix("file://").unwrap_or(&path);
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(path).unwrap());
    let read = reader.unwrap().build().unwrap().next().unwrap().unwrap();
    let mut files = files;
    files.extend(write(&sink, 0, 1, vec![rows.slice(1, 2)]).await);
    sink.commit(&batch_commit(&sink, 1, vec![files]).await).await.unwrap();
    let metadata = metadata(&sink, 0).await;
    let columns = layout::arrow_schema(&TableName::parse(&table.name).unwrap(), &metadata).unwrap();
    let expected = layout::conform(&rows.slice(0, 1), &columns).unwrap();
    assert_eq!(read.num_columns(), expected.num_columns());
    for (field, (read, expected)) in columns.fields().iter().zip(read.columns().iter().zip(expected.columns())) {
        assert_eq!(format!("{read:?}"), format!("{expected:?}"), "{}", field.name());
    }
    // The table as it is now takes the next run of the pipeline.
    fixture.open(&[table]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn catalogs_of_older_programs_and_other_files_are_told_apart() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.dir.path().join("db")).unwrap();
    let path = fixture.dir.path().join("db/catalog.db");
    rusqlite::Connection::open(&path)
        .unwrap()
        .execute_batch(
            "CREATE TABLE iceberg_tables (catalog_name TEXT, table_namespace TEXT, table_name TEXT, metadata_location TEXT,
             previous_metadata_location TEXT, PRIMARY KEY (catalog_name, table_namespace, table_name))",
        )
        .unwrap();
    let sink = fixture.open(&[spec("t.events", &[])]).await.unwrap();
    sink.commit(&batch_commit(&sink, 1, vec![vec![]]).await).await.unwrap();
    assert_eq!(sink.load().await.unwrap()[0].marker.as_ref().unwrap().batch, 1);

    let other = Fixture::new();
    std::fs::create_dir(other.dir.path().join("db")).unwrap();
    std::fs::write(other.dir.path().join("db/catalog.db"), "not a database, but long enough to look at ".repeat(50))
        .unwrap();
    let error = other.open(&[spec("t.events", &[])]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_catalog_is_transient() {
    let fixture = Fixture::new();
    let sink = fixture.open(&[spec("t.events", &[])]).await.unwrap();
    let commit = batch_commit(&sink, 1, vec![vec![]]).await;
    let blocker = rusqlite::Connection::open(fixture.dir.path().join("db/catalog.db")).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = sink.commit(&commit).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Transient, "{error}");
    blocker.execute_batch("ROLLBACK").unwrap();
    assert!(!sink.commit(&commit).await.unwrap().already);
}

/// A catalog whose answers get lost: the commit happens, or does not, and nobody knows.
#[derive(Debug)]
struct LostReply {
    inner: Arc<dyn Catalog>,
    happens: bool,
}

#[async_trait::async_trait]
impl Catalog for LostReply {
    fn commits_together(&self) -> bool {
        self.inner.commits_together()
    }

    fn guards_properties(&self) -> bool {
        self.inner.guards_properties()
    }

    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error> {
        self.inner.load(table).await
    }

    async fn create(&self, table: &TableName, creation: iceberg::TableCreation) -> Result<LoadedTable, Error> {
        self.inner.create(table, creation).await
    }

    async fn commit(&self, changes: &[catalog::TableChange]) -> Result<(), catalog::CommitError> {
        if self.happens {
            self.inner.commit(changes).await?;
        }
        Err(Error::indeterminate("the reply was lost").into())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_of_unknown_outcome_is_looked_up() {
    let fixture = Fixture::new();
    let sink = fixture.open(&[spec("t.events", &[])]).await.unwrap();
    let commit = batch_commit(&sink, 1, vec![write(&sink, 0, 1, vec![events(0, 10, 1)]).await]).await;
    for happens in [false, true] {
        let inner = &sink.0;
        let lossy = IcebergSink(Arc::new(Inner {
            catalog: Arc::new(LostReply { inner: inner.catalog.clone(), happens }),
            storage: inner.storage.clone(),
            file_io: inner.file_io.clone(),
            runtime: inner.runtime.clone(),
            query_id: inner.query_id,
            marker_property: inner.marker_property.clone(),
            carriers: Default::default(),
            tables: vec![BoundTable {
                name: inner.tables[0].name.clone(),
                files: inner.tables[0].files.clone(),
                evolves: None,
            }],
        }));
        match lossy.commit(&commit).await {
            Ok(committed) => assert!(happens && !committed.already && committed.snapshots[0].is_some()),
            Err(error) => assert!(!happens && error.kind() == Kind::Indeterminate, "{error}"),
        }
    }
    assert!(sink.commit(&commit).await.unwrap().already);
    assert_eq!(total(&*metadata(&sink, 0).await, "total-records"), "10");
}

/// Null, odd and escaped partition values, and more partitions than a worker keeps files open.
#[tokio::test(flavor = "multi_thread")]
async fn any_partition_value_makes_a_file() {
    let fixture = Fixture::new();
    let schema = Arc::new(Schema::new(vec![Field::new("name", DataType::Utf8, true)]));
    let sink = fixture.open(&[TableSpec { schema: schema.clone(), ..spec("t.names", &["name"]) }]).await.unwrap();
    let mut names = vec![None, Some("../a/b".to_string()), Some("100% é#1".into()), Some(String::new())];
    names.extend((0..60).map(|i| Some(format!("n{i}"))));
    let column: ArrayRef = Arc::new(StringArray::from_iter(names.iter().chain(&names).cloned()));
    let rows = RecordBatch::try_new(schema, vec![column]).unwrap();
    let files = write(&sink, 0, 1, vec![rows]).await;
    assert_eq!(files.len(), names.len());
    assert!(files.iter().all(|f| f.record_count() == 2));
    assert!(files.iter().any(|f| f.file_path().contains("/data/name=..%2Fa%2Fb/")));
    sink.commit(&batch_commit(&sink, 1, vec![files]).await).await.unwrap();
    assert_eq!(total(&*metadata(&sink, 0).await, "total-records"), "128");
}

/// Leaves tables for other readers to judge: `FLOE_INTEROP_DIR=… cargo test interop -- --ignored`; with
/// `FLOE_INTEROP_WAREHOUSE=s3://…` in a bucket.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes to the folder that FLOE_INTEROP_DIR names"]
async fn interop_tables() {
    let dir = std::path::PathBuf::from(std::env::var("FLOE_INTEROP_DIR").unwrap());
    let catalog = CatalogConfig::Sqlite {
        path: dir.join("catalog.db"),
        warehouse: std::env::var("FLOE_INTEROP_WAREHOUSE").unwrap_or(dir.join("warehouse").to_str().unwrap().into()),
    };
    let mut specs =
        [spec("telemetry.events", &["day(event_timestamp)"]), spec("telemetry.by_device", &["device_id", "count"])];
    specs.iter_mut().for_each(|s| drop(s.properties.insert("commit.manifest.min-count-to-merge".into(), "2".into())));
    let query_id = Uuid::new_v4();
    for batch in 1..=9 {
        // A column more, and a partition column that is widened.
        if batch == 5 {
            let mut fields: Vec<_> = one_column_more(&events_schema(), "fw", DataType::Utf8).fields().to_vec();
            fields[3] = Arc::new(Field::new("count", DataType::Int64, true));
            specs.iter_mut().for_each(|s| s.schema = Arc::new(Schema::new(fields.clone())));
        }
        let sink = IcebergSink::open(&catalog, query_id, "interop", &specs).await.unwrap();
        let rows = vec![events(batch * 20, 20, DAY_US / 500)];
        let files = vec![write(&sink, 0, batch as u64, rows.clone()).await, write(&sink, 1, batch as u64, rows).await];
        sink.commit(&batch_commit(&sink, batch as u64, files).await).await.unwrap();
    }
}
