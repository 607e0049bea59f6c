use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::support::broker::{Broker, Rec};
use crate::support::check::{fill, produced, records, rows_are_true, until_in_tables};
use crate::support::floe::{Ended, Floe, Pipeline};
use crate::support::reader::Tables;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn command(pipeline: &Pipeline, arguments: &[&str]) -> std::process::Command {
    let file = pipeline.config_file();
    let mut command = pipeline.command();
    command.arg("dlq").arg(arguments[0]).arg(file).args(&arguments[1..]);
    command
}

/// `floe dlq`, with a number for its log.
fn start(pipeline: &Pipeline, number: u32, arguments: &[&str]) -> Floe {
    Floe::start(command(pipeline, arguments), pipeline.dir(), 2_000 + number, String::new())
}

fn dlq(pipeline: &Pipeline, arguments: &[&str]) -> Ended {
    start(pipeline, 0, arguments).wait().expect_code(0)
}

fn json_lines(ended: &Ended) -> Vec<Value> {
    ended.output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// Batteries up to 200 % are fine from now on.
fn mend(pipeline: &mut Pipeline) {
    let schema = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json")).unwrap();
    let mut schema: Value = serde_json::from_str(&schema).unwrap();
    schema["properties"]["battery_level"]["maximum"] = 200.into();
    let file = pipeline.dir().join("mended.json");
    fs::write(&file, schema.to_string()).unwrap();
    pipeline.set("schema.file", file.to_str().unwrap());
}

/// Every letter that passes the mended schema is a row now, once, at its place in Kafka, and nothing else has changed.
fn mended_once(tables: &Tables) {
    let doubled: Vec<(String, i32, i64, i64)> = tables.query(
        "select _kafka_topic, _kafka_partition, _kafka_offset, count(*) from {telemetry.events} group by all having count(*) > 1",
    );
    assert!(doubled.is_empty(), "{doubled:?}");
    let places = |sql: &str| -> Vec<(String, i32, i64, i64)> { tables.query(sql) };
    let letters = places(
        "select topic, partition, \"offset\", epoch_ms(timestamp) from {telemetry.dead_letters} \
         where reason = 'out_of_range' order by all",
    );
    let rows = places(
        "select _kafka_topic, _kafka_partition, _kafka_offset, epoch_ms(_kafka_timestamp) from {telemetry.events} \
         where battery_level > 100 order by all",
    );
    assert!(!letters.is_empty());
    assert_eq!(rows, letters);
}

fn rows(tables: &Tables) -> u64 {
    tables.value("select count(*) from {telemetry.events}")
}

#[test]
fn list_and_show() {
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 3_000, partitions: 2, ..Telemetry::default() };
    fill(broker, "dlq_list", &telemetry);
    let header = vec![("trace".to_string(), Some(b"\xff\x01".to_vec()))];
    broker.produce_records(
        "dlq_list",
        [Rec {
            partition: Some(1),
            key: Some(b"the key".to_vec()),
            value: Some(b"nonsense \xfe".to_vec()),
            timestamp_ms: Some(1_767_225_600_123),
            headers: header,
        }],
    );
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_list");
    let nothing = start(&pipeline, 0, &["list"]).wait().expect_code(1);
    assert!(nothing.output.contains("has not run") && !pipeline.catalog().exists(), "{}", nothing.output);
    pipeline.set("source.max_offsets_per_trigger", 700);
    pipeline.run();

    let mut truth = telemetry.truth().dead;
    *truth.get_mut("invalid_utf8").unwrap() += 1;
    let mut listed: BTreeMap<String, u64> = BTreeMap::new();
    for group in json_lines(&dlq(&pipeline, &["list", "--json", "--by", "hour"])) {
        *listed.entry(group["reason"].as_str().unwrap().into()).or_default() += group["letters"].as_u64().unwrap();
        assert!(group["first"].as_str() <= group["last"].as_str() && group["from"].as_str() <= group["first"].as_str());
    }
    assert_eq!(listed, truth);
    let total = truth.values().sum::<u64>().to_string();
    let text = dlq(&pipeline, &["list"]).expect_output(&["letters", "wrong_type", "first", &total]);
    assert!(text.output.contains(&truth["wrong_type"].to_string()), "{}", text.output);
    let only = dlq(&pipeline, &["list", "--reason", "empty", "--reason", "null_value", "--since", "1 hour"]);
    assert!(only.output.contains("empty") && !only.output.contains("wrong_type"), "{}", only.output);
    dlq(&pipeline, &["list", "--until", "2026-01-01"]).expect_output(&["no such dead letters"]);
    start(&pipeline, 0, &["list", "--reason", "bad"]).wait().expect_code(2).expect_output(&["bad_format"]);

    let newest = dlq(&pipeline, &["show", "--limit", "1", "--reason", "invalid_utf8"]);
    let newest =
        newest.expect_output(&["dlq_list-1", "invalid_utf8", "the key", "trace = 0xff01", "0x6e6f6e73656e736520fe"]);
    assert!(newest.output.contains("2026-01-01T00:00:00.123Z"), "{}", newest.output);
    let shown = json_lines(&dlq(&pipeline, &["show", "--limit", "100000", "--json"]));
    assert_eq!(shown.len().to_string(), total);
    let letter = shown.iter().find(|letter| letter["reason"] == "bad_format").unwrap();
    assert!(letter["payload"].as_str().unwrap().contains("2026-13-01"), "{letter}");
    assert_eq!(letter["path"], "$.event_timestamp");
    // What `sha256sum` shows of the document.
    let schema = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json")).unwrap();
    let digest: String = <sha2::Sha256 as sha2::Digest>::digest(&schema).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(letter["schema_fingerprint"], digest[..12]);
    assert!(shown.windows(2).all(|pair| pair[0]["recorded_at"].as_str() >= pair[1]["recorded_at"].as_str()));
    assert_eq!(json_lines(&dlq(&pipeline, &["show", "--json"])).len(), 20);
}

#[test]
fn retry_after_the_schema_was_mended() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 4_000, invalid_per_mille: 200, ..Telemetry::default() };
    fill(broker, "dlq_retry", &telemetry);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_retry");
    pipeline.set("source.max_offsets_per_trigger", 1_000);
    pipeline.run();
    let tables = pipeline.tables();
    let truth = telemetry.truth();
    let mendable = truth.dead["out_of_range"];
    let snapshots = || tables.table("telemetry.events").snapshots.len();

    // As long as nothing is mended, everything still fails, and the table is left alone.
    let before = snapshots();
    dlq(&pipeline, &["retry"]).expect_output(&["still fail", &format!("{mendable}   out_of_range")]);
    rows_are_true(&tables, &truth);
    mend(&mut pipeline);
    let dry = dlq(&pipeline, &["retry", "--dry-run"]);
    dry.expect_output(&[&format!("{mendable} would become rows"), "nothing was written"]);
    dlq(&pipeline, &["retry", "--reason", "empty"]).expect_output(&["still fail"]);
    dlq(&pipeline, &["retry", "--since", "2100-01-01"]).expect_output(&["0 dead letters"]);
    rows_are_true(&tables, &truth);
    assert_eq!(snapshots(), before);

    let done = dlq(&pipeline, &["retry"]);
    let late = format!("{mendable} late for telemetry.device_minutes");
    let done = done.expect_output(&[&format!("{mendable} are rows of telemetry.events now"), &late, "malformed_json"]);
    let rest = truth.dead_letters() - mendable;
    assert!(done.output.contains(&format!("{rest} still fail")), "{}", done.output);
    mended_once(&tables);
    assert_eq!(rows(&tables), truth.valid + mendable);
    let table = tables.table("telemetry.events");
    assert_eq!(table.snapshots.len(), before + 1);
    let summaries = table.snapshots.iter().map(|snapshot| &snapshot.summary);
    let last = summaries.clone().find(|summary| summary.contains_key("floe.retry-of")).unwrap();
    assert_eq!(last["floe.retry-of"], "telemetry.dead_letters");
    assert_eq!(last["total-records"], rows(&tables).to_string(), "{last:?}");

    let again = dlq(&pipeline, &["retry"]).expect_output(&[&format!("{mendable} are in telemetry.events already")]);
    assert!(!again.output.contains("now"), "{}", again.output);
    assert_eq!(snapshots(), before + 1);

    // The query goes on as if nothing had been.
    pipeline.run();
    broker.produce_records("dlq_retry", records(&telemetry, 0..100));
    pipeline.run();
    let all = produced(broker, "dlq_retry", telemetry.partitions).len() as u64;
    let letters: u64 = tables.value("select count(*) from {telemetry.dead_letters}");
    assert_eq!(rows(&tables) + letters, all + mendable, "{mendable} letters are rows too");
}

#[test]
fn killed_at_each_step() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 2_000, invalid_per_mille: 200, ..Telemetry::default() };
    fill(broker, "dlq_killed", &telemetry);
    for step in ["dlq.files_written", "commit.metadata_written", "commit.committed", "dlq.committed"] {
        let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_killed");
        pipeline.run();
        mend(&mut pipeline);
        let failing = |action: &str| {
            let mut command = command(&pipeline, &["retry"]);
            command.env("FLOE_FAILPOINT", format!("{step}:{action}"));
            Floe::start(command, pipeline.dir(), 3_000, String::new()).wait()
        };
        failing("kill").expect_killed();
        dlq(&pipeline, &["retry"]);
        mended_once(&pipeline.tables());
        // What a killed run has left behind is no concern of the query's.
        pipeline.run();
        dlq(&pipeline, &["retry"]);
        mended_once(&pipeline.tables());
    }
    // A commit whose outcome is unknown is looked at, not repeated.
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_killed");
    pipeline.run();
    mend(&mut pipeline);
    let mut unknown = command(&pipeline, &["retry"]);
    unknown.env("FLOE_FAILPOINT", "commit.committed:fail");
    Floe::start(unknown, pipeline.dir(), 3_000, String::new()).wait().expect_code(0).expect_output(&["now"]);
    mended_once(&pipeline.tables());
}

/// Three at a time, and a query that commits every few milliseconds.
#[test]
fn beside_a_running_query() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 6_000, invalid_per_mille: 100, ..Telemetry::default() };
    broker.create_topic("dlq_beside", telemetry.partitions, &[]);
    broker.produce_records("dlq_beside", records(&telemetry, 0..3_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_beside");
    pipeline.run();
    pipeline.service("20 ms").set("source.max_offsets_per_trigger", 100);
    let mut query = pipeline.spawn();
    query.until_ready();
    mend(&mut pipeline);
    for round in 0..3u64 {
        broker.produce_records("dlq_beside", records(&telemetry, 3_000 + round * 1_000..4_000 + round * 1_000));
        let retries: Vec<Floe> = (0..3).map(|number| start(&pipeline, number, &["retry"])).collect();
        retries.into_iter().for_each(|retry| drop(retry.wait().expect_code(0)));
    }
    let mended: u64 = pipeline.tables().value("select count(*) from {telemetry.events} where battery_level > 100");
    assert!(mended > 0);
    // Those are letters and rows.
    until_in_tables(&mut query, &pipeline.tables(), 6_000 + mended);
    query.terminate();
    query.wait().expect_code(0);
    dlq(&pipeline, &["retry"]);
    mended_once(&pipeline.tables());
    let truth = telemetry.truth();
    assert_eq!(rows(&pipeline.tables()), truth.valid + truth.dead["out_of_range"]);
}

#[test]
fn refused_where_it_could_double() {
    let broker = Broker::shared();
    fill(broker, "dlq_refused", &Telemetry { messages: 500, ..Telemetry::default() });
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_refused");
    pipeline.set("rows.provenance", false);
    pipeline.run();
    start(&pipeline, 0, &["retry"]).wait().expect_code(1).expect_output(&["needs provenance = true"]);
    pipeline.set("rows.provenance", true);
    start(&pipeline, 0, &["retry"]).wait().expect_code(1).expect_output(&["no column _kafka_topic"]);
}

#[test]
fn letters_of_an_expectation_become_rows_once_it_is_mended() {
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 2_000, invalid_per_mille: 0, ..Telemetry::default() };
    fill(broker, "dlq_expectation", &telemetry);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlq_expectation");
    let expect = |sql: &str| -> toml::Value {
        let text = format!("[[expect]]\nname = \"charged\"\nsql = \"{sql}\"\non_fail = \"dead_letter\"");
        text.parse::<toml::Table>().unwrap()["expect"].clone()
    };
    pipeline.set("quality.expect", expect("battery_level >= 50"));
    pipeline.run();
    let tables = pipeline.tables();
    let low: u64 = tables.value("select count(*) from {telemetry.dead_letters} where reason = 'expectation_failed'");
    assert!(low > 0 && rows(&tables) + low == 2_000);
    pipeline.set("quality.expect", expect("battery_level >= 25"));
    dlq(&pipeline, &["retry", "--reason", "expectation_failed"]);
    let middle: u64 = tables.value("select count(*) from {telemetry.events} where battery_level between 25 and 49.99");
    let still: u64 =
        tables.value("select count(*) from {telemetry.events} where battery_level < 25 or battery_level is null");
    assert!(middle > 0 && middle < low, "{middle} of {low}");
    assert_eq!(still, 0);
    dlq(&pipeline, &["retry"]);
    assert_eq!(rows(&tables), 2_000 - low + middle);
}
