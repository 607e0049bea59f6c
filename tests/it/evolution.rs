use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Float64Array, Int32Array, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema};
use floe::config::CatalogConfig;
use floe::sink::iceberg::{BatchCommit, IcebergSink, Marker, TableSpec};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::broker::Broker;
use crate::support::check::{ROWS, everything, records};
use crate::support::floe::Pipeline;
use crate::support::reader::Tables;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 1_000, ..Telemetry::default() }
}

/// A pipeline with a schema file of its own, and the first half of the stream in its topic.
fn pipeline(topic: &str) -> Pipeline {
    let broker = Broker::shared();
    broker.create_topic(topic, telemetry().partitions, &[]);
    broker.produce_records(topic, records(&telemetry(), 0..500));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    let file = pipeline.dir().join("schema.json");
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json"), &file).unwrap();
    pipeline.set("schema.file", file.display().to_string());
    pipeline
}

/// A new version of the schema file.
fn change(pipeline: &Pipeline, change: impl Fn(&mut Value)) {
    let file = pipeline.dir().join("schema.json");
    let mut schema: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    change(&mut schema);
    fs::write(&file, schema.to_string()).unwrap();
}

fn add_firmware(pipeline: &Pipeline) {
    change(pipeline, |schema| schema["properties"]["firmware"] = json!({"type": ["string", "null"]}));
}

/// The second half of the stream; its valid messages say more than those of the first.
fn second_half(topic: &str, more: &str) {
    let mut half = records(&telemetry(), 500..1_000);
    for (record, index) in half.iter_mut().zip(500..) {
        if let (None, Some(value)) = (telemetry().reading(index).invalid, &mut record.value) {
            value.pop();
            value.extend_from_slice(format!(",{more}}}").as_bytes());
        }
    }
    Broker::shared().produce_records(topic, half);
}

fn valid(range: std::ops::Range<u64>) -> u64 {
    range.filter(|i| telemetry().reading(*i).invalid.is_none()).count() as u64
}

fn firmware(pipeline: &Pipeline) -> Vec<(Option<String>, u64)> {
    pipeline.tables().query("select firmware, count(*) from {telemetry.events} group by all order by all")
}

fn all_there(pipeline: &Pipeline) {
    everything(pipeline, Broker::shared(), &telemetry());
    let halves = vec![(Some("fw-2".to_string()), valid(500..1_000)), (None, valid(0..500))];
    assert_eq!(firmware(pipeline), halves);
    let table = pipeline.tables().table(ROWS);
    assert_eq!(table.rows, Some(valid(0..1_000)));
    let added: Vec<_> = table.columns.iter().filter(|(name, ..)| name == "firmware").collect();
    assert_eq!(added, [&("firmware".to_string(), "string".to_string(), false)]);
}

/// Windows that were open go on over the change.
#[test]
fn an_optional_column_is_added() {
    let _turn = turn();
    let topic = "evolving";
    let pipeline = pipeline(topic);
    pipeline.check().expect_code(0).expect_output(&["telemetry.events: will be created"]);
    pipeline.run();
    pipeline.check().expect_code(0).expect_output(&["telemetry.events: fits"]);

    add_firmware(&pipeline);
    second_half(topic, r#""firmware":"fw-2""#);
    let before = pipeline.tables().table(ROWS).metadata_location;
    let shown = pipeline.check().expect_code(0);
    let shown = shown.expect_output(&["telemetry.events: will add firmware string", "telemetry.device_minutes: fits"]);
    assert!(!shown.output.contains("FAIL"), "{}", shown.output);
    assert_eq!(pipeline.tables().table(ROWS).metadata_location, before);

    pipeline.run();
    all_there(&pipeline);
    pipeline.check().expect_code(0).expect_output(&["telemetry.events: fits"]);
}

#[test]
fn killed_around_the_change() {
    let _turn = turn();
    let topic = "evolving_killed";
    let pipeline = pipeline(topic);
    pipeline.run();
    add_firmware(&pipeline);
    second_half(topic, r#""firmware":"fw-2""#);
    // The column comes with the rows that fill it, or neither does.
    for (step, evolved) in [("commit.metadata_written", false), ("commit.committed", true)] {
        let ended = pipeline.run_failing(&format!("{step}:kill")).expect_killed();
        assert!(!ended.output.contains("batch committed"), "{}", ended.output);
        let table = pipeline.tables().table(ROWS);
        assert_eq!(table.columns.iter().any(|(name, ..)| name == "firmware"), evolved, "{step}");
        assert_eq!(table.rows, Some(valid(0..if evolved { 1_000 } else { 500 })), "{step}");
    }
    pipeline.run();
    all_there(&pipeline);
}

/// Wider numbers: what was written before reads as it did, also through the statistics of the old files.
#[test]
fn integers_widen() {
    let _turn = turn();
    let topic = "widening";
    let pipeline = pipeline(topic);
    change(&pipeline, |schema| schema["properties"]["duration_ms"]["format"] = json!("int32"));
    pipeline.run();
    let kind = |pipeline: &Pipeline| {
        let columns = pipeline.tables().table(ROWS).columns;
        columns.into_iter().find(|(name, ..)| name == "duration_ms").unwrap().1
    };
    assert_eq!(kind(&pipeline), "int");
    change(&pipeline, |schema| {
        schema["properties"]["duration_ms"].as_object_mut().unwrap().remove("format");
        schema["properties"]["uptime"] = json!({"type": "integer"});
    });
    second_half(topic, r#""uptime":9000000000"#);
    pipeline.check().expect_output(&["will widen duration_ms from int to long, add uptime long"]);
    pipeline.run();
    assert_eq!(kind(&pipeline), "long");
    everything(&pipeline, Broker::shared(), &telemetry());
    let tables = pipeline.tables();
    let wanted = telemetry().reading((0..500).find(|i| telemetry().reading(*i).invalid.is_none()).unwrap()).duration_ms;
    let expected =
        (0..1_000).map(|i| telemetry().reading(i)).filter(|r| r.invalid.is_none() && r.duration_ms == wanted).count()
            as u64;
    let found: u64 = tables.value(&format!("select count(*) from {{telemetry.events}} where duration_ms = {wanted}"));
    assert_eq!(found, expected);
    let long: u64 = tables.value("select count(*) from {telemetry.events} where uptime = 9000000000");
    assert_eq!(long, valid(500..1_000));
}

/// With both schemas side by side, before anything is read, planned or changed.
#[test]
fn an_incompatible_change_is_refused() {
    let _turn = turn();
    let topic = "incompatible";
    let pipeline = pipeline(topic);
    pipeline.run();
    let original = fs::read_to_string(pipeline.dir().join("schema.json")).unwrap();
    let plans = || fs::read_dir(pipeline.checkpoint().join("offsets")).unwrap().count();
    let before = (pipeline.tables().table(ROWS).metadata_location, plans());
    add_firmware(&pipeline);
    change(&pipeline, |schema| {
        schema["properties"]["status"] = json!({"type": ["integer", "null"]});
        schema["properties"]["site"] = json!({"type": "string"});
        schema["required"].as_array_mut().unwrap().push(json!("site"));
    });
    second_half(topic, r#""firmware":"fw-2""#);
    let diff = [
        "table telemetry.events does not fit the pipeline",
        "  ! status ",
        "  ! site ",
        "  + firmware ",
        "    device_id ",
        "in the table",
        "in the pipeline",
        "has to be optional",
    ];
    pipeline.spawn().wait().expect_code(3).expect_output(&diff).expect_output(&["no table was changed"]);
    pipeline.check().expect_code(1).expect_output(&diff);
    assert_eq!((pipeline.tables().table(ROWS).metadata_location, plans()), before);

    fs::write(pipeline.dir().join("schema.json"), original).unwrap();
    add_firmware(&pipeline);
    pipeline.run();
    all_there(&pipeline);
}

#[test]
fn columns_of_others_are_kept() {
    let _turn = turn();
    let topic = "shared_table";
    let pipeline = pipeline(topic);
    pipeline.run();
    pipeline.tables().add_column(ROWS, "theirs", false);
    add_firmware(&pipeline);
    second_half(topic, r#""firmware":"fw-2""#);
    pipeline.run();
    all_there(&pipeline);
    let nulls: u64 = pipeline.tables().value("select count(*) from {telemetry.events} where theirs is null");
    assert_eq!(nulls, valid(0..1_000));

    pipeline.tables().add_column(ROWS, "demanded", true);
    let said = ["! demanded", "the table requires it"];
    pipeline.spawn().wait().expect_code(3).expect_output(&said);
    pipeline.check().expect_code(1).expect_output(&said);
}

/// What creating a table would refuse is said before there is one.
#[test]
fn a_table_that_cannot_be_created_is_found_by_check() {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, "uncreatable");
    Broker::shared().create_topic("uncreatable", 1, &[]);
    pipeline.set("rows.partition_by", vec!["event_timestamp".to_string()]);
    pipeline.check().expect_code(1).expect_output(&["telemetry.events", "would make a partition of every value"]);
    assert!(!pipeline.catalog().exists());
}

/// A table of a struct and of a list of structs, each with the given columns, and one row.
fn nested(children: Vec<(&str, ArrayRef)>) -> RecordBatch {
    let fields: Fields = children.iter().map(|(name, a)| Field::new(*name, a.data_type().clone(), true)).collect();
    let place = StructArray::new(fields.clone(), children.into_iter().map(|(_, a)| a).collect(), None);
    let element = Arc::new(Field::new("element", DataType::Struct(fields), true));
    let list = ListArray::new(element, OffsetBuffer::from_lengths([1]), Arc::new(place.clone()), None);
    let schema = Schema::new(vec![
        Field::new("place", place.data_type().clone(), true),
        Field::new("stops", list.data_type().clone(), true),
    ]);
    RecordBatch::try_new(Arc::new(schema), vec![Arc::new(place), Arc::new(list)]).unwrap()
}

/// Inside structs, and inside the structs of lists, other readers find null in older rows too.
#[test]
fn nested_columns_are_added() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = CatalogConfig::Sqlite {
        path: dir.path().join("catalog.db"),
        warehouse: dir.path().join("warehouse").display().to_string(),
    };
    let lat = || Arc::new(Float64Array::from(vec![1.5])) as ArrayRef;
    let n = |n: i32| Arc::new(Int32Array::from(vec![n])) as ArrayRef;
    let name = Arc::new(StringArray::from(vec!["b"])) as ArrayRef;
    let versions =
        [nested(vec![("lat", lat()), ("n", n(1))]), nested(vec![("name", name), ("lat", lat()), ("n", n(2))])];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let query_id = Uuid::new_v4();
    for (batch, rows) in (0..).zip(versions) {
        let spec = TableSpec {
            name: "t.nested".into(),
            schema: rows.schema(),
            partition_by: vec![],
            sort_by: vec![],
            properties: BTreeMap::new(),
        };
        let sink = runtime.block_on(IcebergSink::open(&catalog, query_id, "nested", &[spec])).unwrap();
        let mut writer = sink.writer(0, batch, Uuid::new_v4(), 0);
        writer.write(&rows).unwrap();
        let commit = BatchCommit {
            marker: Marker { pipeline: "nested".into(), batch, plan: format!("sha256:{batch}") },
            tables: BTreeMap::new(),
            properties: BTreeMap::new(),
            summary: BTreeMap::new(),
            files: vec![writer.finish().unwrap()],
        };
        runtime.block_on(sink.commit(&commit)).unwrap();
    }
    type Row = (f64, i32, Option<String>, f64, Option<String>);
    let tables = Tables::new(dir.path().join("catalog.db"));
    let rows: Vec<Row> = tables
        .query("select place.lat, place.n, place.name, stops[1].lat, stops[1].name from {t.nested} order by place.n");
    let b = Some("b".to_string());
    assert_eq!(rows, [(1.5, 1, None, 1.5, None), (1.5, 2, b.clone(), 1.5, b)]);
    assert_eq!(tables.table("t.nested").rows, Some(2));
}
