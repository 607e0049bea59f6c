use std::fs;

use serde_json::json;

use crate::exactly_once::STEPS;
use crate::registry::{Registry, framed};
use crate::support::broker::{Broker, Rec};
use crate::support::floe::{Ended, Floe, Pipeline};
use crate::support::reader::Tables;
use crate::support::turn;

const READING: &str = r#"{"type": "object", "required": ["kind", "device", "at"], "additionalProperties": false, "properties": {
    "kind": {"const": "reading"}, "device": {"type": "string"}, "at": {"type": "string", "format": "date-time"},
    "level": {"type": "integer", "maximum": 100}}}"#;
const ALERT: &str = r#"{"type": "object", "required": ["code", "raised_at"], "properties": {
    "code": {"type": "integer"}, "raised_at": {"type": "string", "format": "date-time"}}}"#;
const ORDER: &str = r#"{"type": "object", "required": ["id"], "properties": {
    "id": {"type": "integer"}, "total": {"type": "number"}}}"#;

/// Readings and alerts in one topic, orders in another; windows of readings and of alerts.
fn pipeline(broker: &Broker, devices: &str, orders: &str) -> Pipeline {
    let mut pipeline = Pipeline::new(&broker.bootstrap, devices);
    for (file, schema) in [("reading.json", READING), ("alert.json", ALERT), ("order.json", ORDER)] {
        fs::write(pipeline.dir().join(file), schema).unwrap();
    }
    let types: toml::Table = format!(
        r#"
        [[types]]
        name = "reading"
        topic = "{devices}"
        field = "kind"
        equals = "reading"
        schema = "reading.json"
        table = "fleet.readings"
        [[types]]
        name = "alert"
        topic = "{devices}"
        field = "kind"
        equals = "7"
        schema = "alert.json"
        event_time = "raised_at"
        columns = {{ severe = "code > 10" }}
        table = "fleet.alerts"
        [[types]]
        name = "order"
        topic = "{orders}"
        schema = "order.json"
        filter = "total > 0"
        table = "shop.orders"
        [[windows]]
        type = "reading"
        table = "fleet.reading_minutes"
        size = "1 minute"
        group_by = ["device"]
        aggregates = {{ readings = "count(*)", level_sum = "sum(level)" }}
        [[windows]]
        type = "alert"
        table = "fleet.alert_minutes"
        size = "1 minute"
        aggregates = {{ alerts = "count(*)" }}
        "#
    )
    .parse()
    .unwrap();
    pipeline.remove("schema").remove("rows").remove("windows");
    for (key, value) in types {
        pipeline.set(&key, value);
    }
    pipeline.set("source.topics", vec![devices.to_string(), orders.to_string()]);
    pipeline.set("event_time.column", "at").set("event_time.watermark_delay", "0 seconds");
    pipeline.set("dead_letters.table", "fleet.dead_letters");
    pipeline
}

fn at(second: u32) -> String {
    format!("2026-03-01T00:{:02}:{:02}Z", second / 60, second % 60)
}

/// The `i`th record of the topic of devices, one a second, and what becomes of it.
fn device_record(i: u32) -> (String, &'static str) {
    match i % 6 {
        0..=2 => (
            json!({"kind": "reading", "device": format!("d{}", i % 2), "at": at(i), "level": i % 100}).to_string(),
            "reading",
        ),
        3 => (json!({"raised_at": at(i), "code": i, "kind": 7}).to_string(), "alert"),
        4 => (json!({"kind": "reading", "device": "d0", "at": at(i), "level": 101}).to_string(), "out_of_range"),
        _ => match i % 12 {
            5 => (json!({"kind": "other", "at": at(i)}).to_string(), "unknown_type"),
            _ => ("{\"kind\": ".to_string(), "malformed_json"),
        },
    }
}

fn fill(broker: &Broker, devices: &str, orders: &str, records: std::ops::Range<u32>) {
    let headers = vec![("trace".to_string(), Some(b"1".to_vec()))];
    let record = |partition, value: Vec<u8>| Rec {
        partition: Some(partition),
        key: None,
        value: Some(value),
        timestamp_ms: None,
        headers: headers.clone(),
    };
    broker.produce_records(
        devices,
        records.clone().map(|i| record((i % 2) as i32, frame(devices, i, device_record(i).0.into_bytes()))),
    );
    let order = |i: u32| json!({"id": i, "total": f64::from(i % 4)}).to_string().into_bytes();
    broker.produce_records(orders, records.map(|i| record(0, order(i))));
}

/// Every other record of a topic of framed ones says by which schema of the registry it was written.
fn frame(topic: &str, i: u32, value: Vec<u8>) -> Vec<u8> {
    let id = if device_record(i).1 == "alert" { 2 } else { 1 };
    if topic.contains("framed") && i % 4 < 2 { framed(id, &String::from_utf8(value).unwrap()) } else { value }
}

fn count(records: u32, what: &str) -> u64 {
    (0..records).filter(|i| device_record(*i).1 == what).count() as u64
}

/// Every record is where it belongs, once, whatever happened on the way.
fn all_in_place(tables: &Tables, records: u32) {
    let value = |sql: &str| tables.value::<u64>(sql);
    assert_eq!(
        value("select count(distinct (_kafka_partition, _kafka_offset)) from {fleet.readings}"),
        count(records, "reading")
    );
    assert_eq!(value("select count(*) from {fleet.readings}"), count(records, "reading"));
    assert_eq!(value("select count(*) from {fleet.alerts}"), count(records, "alert"));
    assert_eq!(value("select count(*) from {fleet.alerts} where severe = (code > 10)"), count(records, "alert"));
    assert_eq!(value("select count(*) from {shop.orders}"), u64::from(records - records.div_ceil(4)));
    for reason in ["out_of_range", "unknown_type", "malformed_json"] {
        let sql = format!("select count(*) from {{fleet.dead_letters}} where reason = '{reason}' and len(headers) = 1");
        assert_eq!(value(&sql), count(records, reason), "{reason}");
    }
    let fingerprints: u64 = value("select count(*) from {fleet.dead_letters} where schema_fingerprint is null");
    assert_eq!(fingerprints, count(records, "unknown_type") + count(records, "malformed_json"));
    let places = value(
        "select count(*) from (select distinct _kafka_partition, _kafka_offset from {fleet.readings} union \
         select distinct _kafka_partition, _kafka_offset from {fleet.alerts} union \
         select \"partition\", \"offset\" from {fleet.dead_letters})",
    );
    assert_eq!(places, u64::from(records));
}

#[test]
fn a_topic_and_a_member_pick_schema_and_table() {
    let broker = Broker::shared();
    broker.create_topic("types_devices", 2, &[]);
    broker.create_topic("types_orders", 1, &[]);
    let records = 1_200;
    fill(broker, "types_devices", "types_orders", 0..records);
    let mut pipeline = pipeline(broker, "types_devices", "types_orders");
    pipeline.set("source.max_offsets_per_trigger", 500);
    pipeline.run();
    let tables = pipeline.tables();
    all_in_place(&tables, records);

    // One watermark for both, so that their windows close together; the last minutes are open.
    let closed =
        |table: &str| tables.value::<Option<i64>>(&format!("select epoch(max(window_end))::bigint from {{{table}}}"));
    assert!(closed("fleet.reading_minutes").is_some());
    assert_eq!(closed("fleet.reading_minutes"), closed("fleet.alert_minutes"));
    let differing: u64 = tables.value(
        "select count(*) from (select window_start, device, readings, level_sum from {fleet.reading_minutes} except \
         select date_trunc('minute', \"at\"), device, count(*), sum(level) from {fleet.readings} group by all)",
    );
    assert_eq!(differing, 0);
    let differing: u64 = tables.value(
        "select count(*) from (select window_start, alerts from {fleet.alert_minutes} except \
         select date_trunc('minute', raised_at), count(*) from {fleet.alerts} group by all)",
    );
    assert_eq!(differing, 0);
}

#[test]
fn killed_at_every_step_each_record_is_in_one_table_once() {
    let _turn = turn();
    let broker = Broker::shared();
    broker.create_topic("types_killed", 2, &[]);
    broker.create_topic("types_killed_orders", 1, &[]);
    let mut pipeline = pipeline(broker, "types_killed", "types_killed_orders");
    pipeline.set("source.max_offsets_per_trigger", 150).set("execution.workers", 2);
    let mut filled = 0;
    for (nth, step) in STEPS.iter().enumerate() {
        fill(broker, "types_killed", "types_killed_orders", filled..filled + 120);
        filled += 120;
        // In the first batch of a run or in the second.
        pipeline.run_failing(&format!("{step}:kill:{}", 1 + nth % 2)).expect_killed();
        if nth % 3 == 0 {
            pipeline.run_failing(&format!("{step}:kill")).expect_killed();
        }
        pipeline.run();
    }
    all_in_place(&pipeline.tables(), filled);
}

/// The records' own schemas come by the registry, whichever type they are of; plain ones are among them.
#[test]
fn records_that_a_registry_has_the_schemas_of() {
    let broker = Broker::shared();
    let (devices, orders) = ("types_framed", "types_framed_orders");
    broker.create_topic(devices, 2, &[]);
    broker.create_topic(orders, 1, &[]);
    let registry = Registry::start();
    let lenient =
        |schema: &str| schema.replace("\"additionalProperties\": false, ", "").replace(", \"maximum\": 100", "");
    registry.add(1, "JSON", &lenient(READING));
    registry.add(2, "JSON", ALERT);
    let mut pipeline = pipeline(broker, devices, orders);
    pipeline.set("schema.registry", registry.url.as_str()).set("source.max_offsets_per_trigger", 200);
    fill(broker, devices, orders, 0..240);
    pipeline.run_failing("execute.files_written:kill:2").expect_killed();
    pipeline.run();
    let tables = pipeline.tables();
    all_in_place(&tables, 240);

    // An alert by the schema of readings is still an alert by its member, and held to both schemas; of an unknown schema
    // nothing is known.
    let alert = json!({"raised_at": at(240), "code": 1, "kind": 7}).to_string();
    let reading = json!({"kind": "reading", "device": "d0", "at": at(240)}).to_string();
    broker.produce(devices, Some(0), None, [framed(1, &alert), framed(77, &reading), framed(1, &reading)]);
    pipeline.run();
    let refused: Vec<(String, u64)> = tables.query(
        "select reason, count(*) from {fleet.dead_letters} where reason not in ('out_of_range', 'unknown_type', 'malformed_json') \
         group by all order by all",
    );
    assert_eq!(refused, [("unknown_schema_id".to_string(), 1), ("wrong_type".to_string(), 1)]);
    assert_eq!(tables.value::<u64>("select count(*) from {fleet.readings}"), count(240, "reading") + 1);
}

#[test]
fn the_number_of_workers_does_not_matter() {
    let _turn = turn();
    let broker = Broker::shared();
    broker.create_topic("types_workers", 2, &[]);
    broker.create_topic("types_workers_orders", 1, &[]);
    fill(broker, "types_workers", "types_workers_orders", 0..3_000);
    let mut found = Vec::new();
    for (workers, offsets) in [(1, 10_000), (4, 10_000), (3, 1_700)] {
        let mut pipeline = pipeline(broker, "types_workers", "types_workers_orders");
        pipeline.set("execution.workers", workers).set("source.max_offsets_per_trigger", offsets);
        pipeline.run();
        let tables = pipeline.tables();
        all_in_place(&tables, 3_000);
        let columns = [
            ("fleet.readings", "*"),
            ("fleet.alerts", "*"),
            ("shop.orders", "*"),
            ("fleet.reading_minutes", "*"),
            ("fleet.alert_minutes", "*"),
            ("fleet.dead_letters", "* exclude (batch_id, recorded_at)"),
        ];
        let whole = |(table, columns): (&str, &str)| -> String {
            let sql = format!(
                "select md5(string_agg(t::varchar, '|' order by t::varchar)) from (select {columns} from {{{table}}}) t"
            );
            format!("{table}: {}", tables.value::<String>(&sql))
        };
        found.push(columns.map(whole));
    }
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0], found[2]);
}

#[test]
fn letters_become_rows_of_their_type_once_its_schema_is_mended() {
    let broker = Broker::shared();
    broker.create_topic("types_retry", 2, &[]);
    broker.create_topic("types_retry_orders", 1, &[]);
    fill(broker, "types_retry", "types_retry_orders", 0..120);
    let pipeline = pipeline(broker, "types_retry", "types_retry_orders");
    pipeline.run();
    fs::write(pipeline.dir().join("reading.json"), READING.replace("\"maximum\": 100", "\"maximum\": 200")).unwrap();
    let retry = || {
        let mut command = pipeline.command();
        let output = command.arg("dlq").arg("retry").arg(pipeline.config_file()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let (mended, unknown, malformed) =
        (count(120, "out_of_range"), count(120, "unknown_type"), count(120, "malformed_json"));
    let first = retry();
    for part in [
        format!("{mended} are rows of fleet.readings, fleet.alerts, shop.orders now"),
        format!("{unknown}   unknown_type"),
        format!("{malformed}   malformed_json"),
    ] {
        assert!(first.contains(&part), "{part}: {first}");
    }
    let again = retry();
    assert!(again.contains(&format!("{mended} are in")), "{again}");
    let tables = pipeline.tables();
    let readings: u64 = tables.value("select count(distinct (_kafka_partition, _kafka_offset)) from {fleet.readings}");
    assert_eq!(readings, count(120, "reading") + mended);
    assert_eq!(tables.value::<u64>("select count(*) from {fleet.readings}"), readings);
}

fn retry(pipeline: &Pipeline, failpoint: &str) -> Floe {
    let mut command = pipeline.command();
    command.arg("dlq").arg("retry").arg(pipeline.config_file()).env("FLOE_FAILPOINT", failpoint);
    Floe::start(command, pipeline.dir(), 3_000 + u32::from(failpoint.is_empty()), String::new())
}

const EITHER: &str = r#"{"type": "object", "required": ["kind", "n"], "properties": {
    "kind": {"type": "string"}, "n": {"type": "integer", "maximum": 10}}}"#;

/// Records of `kind` go to `t.some`, all others to `t.others`.
fn either(pipeline: &mut Pipeline, kind: &str) {
    let types: toml::Table = format!(
        r#"
        [[types]]
        name = "some"
        field = "kind"
        equals = "{kind}"
        schema = "either.json"
        table = "t.some"
        [[types]]
        name = "others"
        schema = "either.json"
        table = "t.others"
        "#
    )
    .parse()
    .unwrap();
    pipeline.set("types", types["types"].clone());
}

/// A batch of letters of both kinds, and from then on a schema that takes them.
fn letters_of_either(topic: &str) -> (Pipeline, u64) {
    let broker = Broker::shared();
    broker.create_topic(topic, 1, &[]);
    let letters = 60;
    broker.produce(
        topic,
        Some(0),
        None,
        (0..2 * letters).map(|i| json!({"kind": (["x", "y"][i % 2]), "n": 11 - i / letters}).to_string()),
    );
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.remove("schema").remove("rows").remove("windows").remove("event_time");
    let schema = pipeline.dir().join("either.json");
    fs::write(&schema, EITHER).unwrap();
    either(&mut pipeline, "x");
    pipeline.set("dead_letters.table", "t.dead_letters");
    pipeline.run();
    let tables = pipeline.tables();
    assert_eq!(tables.value::<usize>("select count(*) from {t.dead_letters} where reason = 'out_of_range'"), letters);
    fs::write(&schema, EITHER.replace("10", "20")).unwrap();
    (pipeline, 2 * letters as u64)
}

fn each_once(tables: &Tables, records: u64) {
    let (rows, places): (u64, u64) = tables
        .query("select count(*), count(distinct _kafka_offset) from (select * from {t.some} union all select * from {t.others})")
        .remove(0);
    assert_eq!((rows, places), (records, records));
}

/// Also when the types are others by the time that the rest is done.
#[test]
fn a_retry_killed_between_the_tables_of_two_types_doubles_nothing() {
    let _turn = turn();
    for (topic, point) in [
        ("types_retry_claimed", "dlq.claimed:kill"),
        ("types_retry_first", "dlq.committed:kill:1"),
        ("types_retry_written", "dlq.files_written:kill:2"),
        ("types_retry_second", "dlq.committed:kill:2"),
    ] {
        let (mut pipeline, records) = letters_of_either(topic);
        retry(&pipeline, point).wait().expect_killed();
        either(&mut pipeline, "y");
        retry(&pipeline, "").wait().expect_code(0);
        each_once(&pipeline.tables(), records);
        retry(&pipeline, "").wait().expect_code(0).expect_output(&["already"]);
        each_once(&pipeline.tables(), records);
    }
}

/// One stands still before its commit, while another, for which the same letters are of the other type, does them all.
#[test]
fn retries_at_the_same_time_that_tell_types_apart_differently_double_nothing() {
    let _turn = turn();
    let both = |topic: &str, point: &str| -> (Ended, Pipeline, u64) {
        let (mut pipeline, records) = letters_of_either(topic);
        let mut first = retry(&pipeline, point);
        first.until_stopped();
        either(&mut pipeline, "y");
        retry(&pipeline, "").wait().expect_code(0).expect_output(&["are rows of"]);
        each_once(&pipeline.tables(), records);
        first.signal(libc::SIGCONT);
        (first.wait(), pipeline, records)
    };
    // It has not claimed the tables yet: it does so now, looks again and finds nothing to do.
    let (first, pipeline, records) = both("types_retry_apart", "dlq.files_written:stop");
    first.expect_code(0).expect_output(&["already"]);
    each_once(&pipeline.tables(), records);
    // It has, and meanwhile the other one has.
    for (topic, point) in
        [("types_retry_overtaken", "dlq.claimed:stop"), ("types_retry_midway", "dlq.files_written:stop:2")]
    {
        let (first, pipeline, records) = both(topic, point);
        first.expect_code(1).expect_output(&["another `floe dlq retry` has begun meanwhile", "run it again"]);
        each_once(&pipeline.tables(), records);
        retry(&pipeline, "").wait().expect_code(0).expect_output(&["already"]);
        each_once(&pipeline.tables(), records);
    }
}

#[test]
fn mistakes_are_found_before_anything_runs() {
    let broker = Broker::shared();
    broker.create_topic("types_check", 1, &[]);
    let mut sound = pipeline(broker, "types_check", "types_check");
    // Orders come by the same topic here, so that theirs is the type of what is left.
    sound.set("source.topics", vec!["types_check"]);
    sound.check().expect_code(0).expect_output(&[
        "reading: topic types_check, kind = \"reading\"; rows go to fleet.readings; event time at",
        "alert: topic types_check, kind = \"7\"; rows go to fleet.alerts; event time raised_at",
        "order: topic types_check; rows go to shop.orders",
        "severe boolean",
    ]);
    sound.set("source.topics", vec!["types_check", "types_other"]).set("rows.table", "a.b");
    sound
        .check()
        .expect_code(2)
        .expect_output(&["no type takes records of \"types_other\"", "has no meaning beside [[types]]"]);
}
