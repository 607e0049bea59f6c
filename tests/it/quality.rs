use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use crate::support::broker::Broker;
use crate::support::check::{dead_by_reason, each_offset_once, offsets_in_tables, produced, until_in_tables};
use crate::support::floe::{Ended, Floe, Pipeline, shown};
use crate::support::turn;

/// A valid message whose duration is its number.
fn message(index: u64) -> String {
    let (minute, second) = (index / 60 % 60, index % 60);
    let battery = index as f64 / 2.0 % 100.0;
    let status = if index % 10 == 9 { "null" } else { "\"online\"" };
    format!(
        r#"{{"device_id":"d-{}","event_timestamp":"2026-01-01T00:{minute:02}:{second:02}Z","battery_level":{battery},"duration_ms":{index},"status":{status}}}"#,
        index % 3
    )
}

/// Messages of which one in `one_bad_in` is not JSON.
fn messages(range: std::ops::Range<u64>, one_bad_in: u64) -> Vec<String> {
    range.map(|i| if i % one_bad_in == 0 { "nonsense".into() } else { message(i) }).collect()
}

fn topic(name: &str, payloads: &[String]) {
    let broker = Broker::shared();
    broker.create_topic(name, 2, &[]);
    send(name, payloads);
}

/// Message `i` goes to partition `i % 2`, so that its offset is half its place in the list.
fn send(name: &str, payloads: &[String]) {
    for partition in 0..2 {
        let of_partition: Vec<&String> = payloads.iter().skip(partition).step_by(2).collect();
        Broker::shared().produce(name, Some(partition as i32), None, of_partition);
    }
}

fn expectations(list: &[(&str, &str, &str)]) -> toml::Value {
    let entry = |(name, sql, on_fail): &(&str, &str, &str)| {
        let entries = [("name", *name), ("sql", *sql), ("on_fail", *on_fail)];
        toml::Value::Table(entries.into_iter().map(|(k, v)| (k.to_string(), v.into())).collect())
    };
    list.iter().map(entry).collect::<Vec<_>>().into()
}

fn breaker(pipeline: &mut Pipeline) -> &mut Pipeline {
    pipeline.set("quality.max_error_rate", 0.1).set("quality.min_records", 100).set("quality.probe_interval", "300 ms")
}

/// One more `floe resume`.
fn resume(pipeline: &Pipeline) -> (Option<i32>, String) {
    let file = pipeline.config_file();
    let done = pipeline.command().arg("resume").arg(file).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    (done.status.code(), text)
}

fn until_held(floe: &mut Floe) -> String {
    floe.until("/readyz is red because of the breaker", |floe| {
        let (code, body) = floe.get("/readyz")?;
        (code == 503 && body.contains("is held back")).then_some(body)
    })
}

fn sum(status: &Value, count: impl Fn(&Value) -> u64) -> u64 {
    status["batches"].as_array().unwrap().iter().map(|batch| count(&batch["counts"])).sum()
}

fn by_name(counts: &Value) -> u64 {
    counts.as_object().map_or(0, |names| names.values().filter_map(Value::as_u64).sum())
}

#[test]
fn every_kind_of_expectation() {
    let _turn = turn();
    let name = "expectations";
    let mut payloads: Vec<String> = (0..200).map(message).collect();
    payloads.push("nonsense".into());
    topic(name, &payloads);
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    pipeline.service("100 ms").set("transform.columns.half_ms", "duration_ms / 2").set(
        "quality.expect",
        expectations(&[
            ("charged", "battery_level >= 10", "warn"),
            ("short", "half_ms < 95", "drop"),
            ("online", "status = 'online'", "dead_letter"),
            ("never", "device_id like 'd-%'", "fail"),
        ]),
    );
    let mut floe = pipeline.spawn();
    // Twenty have no status, which is not true; of the ten that are too long one has none either.
    until_in_tables(&mut floe, &pipeline.tables(), 171 + 20 + 1);
    let text = floe.until("the counts are on the metrics page", |floe| {
        floe.get("/metrics").map(|(_, text)| text).filter(|text| text.contains("floe_dropped_rows_total 9"))
    });
    for line in [
        "floe_expectation_failures_total{name=\"charged\",on_fail=\"warn\"} 20",
        "floe_expectation_failures_total{name=\"short\",on_fail=\"drop\"} 10",
        "floe_expectation_failures_total{name=\"online\",on_fail=\"dead_letter\"} 20",
        "floe_expectation_failures_total{name=\"never\",on_fail=\"fail\"} 0",
        "floe_dead_letters_total{reason=\"expectation_failed\"} 20",
        "floe_breaker_open 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let status = floe.status().unwrap();
    let count = |key: &'static str| sum(&status, |counts| counts[key].as_u64().unwrap());
    let dead = sum(&status, |counts| by_name(&counts["deadLetters"]));
    assert_eq!((count("rows"), count("filtered"), count("dropped"), dead), (171, 0, 9, 21));
    assert_eq!(count("records"), 201);
    assert_eq!(sum(&status, |counts| counts["expectations"]["charged"].as_u64().unwrap_or(0)), 20);
    floe.terminate();
    let output = floe.wait().expect_code(0).output;
    let warnings = output.lines().filter(|l| l.contains("charged") && l.contains("are kept")).count();
    assert!((1..=4).contains(&warnings), "{warnings} warnings, one a batch with such rows");

    let tables = pipeline.tables();
    let dead = dead_by_reason(&tables);
    assert_eq!(dead, BTreeMap::from([("expectation_failed".to_string(), 20), ("malformed_json".to_string(), 1)]));
    assert_eq!(tables.table("telemetry.events").rows, Some(171));
    let wrong: u64 = tables.value(
        "select count(*) from {telemetry.events} where not (duration_ms < 190 and coalesce(status = 'online', false))",
    );
    assert_eq!(wrong, 0);
    let letters: Vec<(i32, i64, String, String)> = tables.query(
        "select partition, \"offset\", message, payload::varchar from {telemetry.dead_letters} \
         where reason = 'expectation_failed' order by all",
    );
    let numbers: Vec<u64> =
        letters.iter().map(|(partition, offset, ..)| (2 * offset) as u64 + *partition as u64).collect();
    assert_eq!(numbers, (0..20).map(|i| 10 * i + 9).collect::<Vec<_>>());
    assert!(
        letters.iter().all(|(.., message, payload)| message.contains("\"online\"") && payload.contains("device_id"))
    );
}

/// Windows see the rows that the rows table has.
#[test]
fn dropped_rows_are_in_no_window() {
    let _turn = turn();
    let name = "expectations_windows";
    topic(name, &(0..600).map(message).collect::<Vec<_>>());
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    pipeline.set("quality.expect", expectations(&[("online", "status = 'online'", "drop")]));
    pipeline.run();
    let tables = pipeline.tables();
    let found: Vec<(i64, i64)> = tables.query(
        "select epoch_ms(window_start), sum(events)::bigint from {telemetry.device_minutes} group by all order by all",
    );
    let expected: Vec<(i64, i64)> = tables.query(
        "select epoch_ms(date_trunc('minute', event_timestamp)), count(*) from {telemetry.events} \
         where event_timestamp < (select max(window_end) from {telemetry.device_minutes}) group by all order by all",
    );
    assert!(found.len() > 3 && found.iter().all(|(_, events)| *events == 54), "{found:?}");
    assert_eq!(found, expected);
}

#[test]
fn an_expectation_that_fails_stops_the_query_before_its_batch() {
    let _turn = turn();
    let name = "expectation_fails";
    topic(name, &(0..400).map(message).collect::<Vec<_>>());
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    pipeline.set("quality.expect", expectations(&[("short", "duration_ms < 301 or duration_ms = 303", "fail")]));
    for _ in 0..2 {
        // 302 is the first in partition 0, where its offset is 151.
        let ended = pipeline.spawn().wait().expect_code(3);
        ended.expect_output(&["\"short\"", name, "partition 0", "offset 151", "on_fail", "nothing is lost"]);
        assert_eq!(offsets_in_tables(&pipeline.tables()), 0);
    }
    pipeline.set("quality.expect", expectations(&[("short", "duration_ms < 301", "dead_letter")]));
    pipeline.run();
    let tables = pipeline.tables();
    each_offset_once(&tables, name, &produced(Broker::shared(), name, 2));
    assert_eq!(dead_by_reason(&tables), BTreeMap::from([("expectation_failed".to_string(), 99)]));
}

/// A service with a topic of which every fifth message is nonsense.
fn held(name: &str) -> (Pipeline, Floe) {
    topic(name, &messages(0..500, 5));
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    breaker(pipeline.service("100 ms"));
    let mut floe = pipeline.spawn();
    let reason = until_held(&mut floe);
    for part in ["batch 0", "500 records", "20 %", "10 %", "malformed_json 100", "floe resume"] {
        assert!(reason.contains(part), "{part:?} is not in {reason}");
    }
    assert_eq!(floe.metric("floe_breaker_open"), Some(1.0));
    assert_eq!(floe.metric("floe_batches_total"), Some(0.0));
    assert_eq!(floe.get("/healthz").unwrap().0, 200);
    assert!(floe.status().unwrap()["notReadyBecause"].as_str().unwrap().contains("is held back"));
    nothing_is_committed(&pipeline);
    (pipeline, floe)
}

fn nothing_is_committed(pipeline: &Pipeline) {
    assert_eq!(offsets_in_tables(&pipeline.tables()), 0);
    let commits = fs::read_dir(pipeline.checkpoint().join("commits")).map_or(0, |files| files.count());
    assert_eq!(commits, 0);
}

fn all_are_there(pipeline: &Pipeline) {
    each_offset_once(&pipeline.tables(), &pipeline.topic, &produced(Broker::shared(), &pipeline.topic, 2));
}

#[test]
fn a_batch_is_held_back_until_a_person_lets_it_through() {
    let _turn = turn();
    let (pipeline, mut floe) = held("held_back");
    // It stays so, however often it is tried.
    floe.until("it is tried again", |floe| (floe.output().matches("circuit breaker open").count() >= 3).then_some(()));
    until_held(&mut floe);
    nothing_is_committed(&pipeline);
    let files = fs::read_dir(pipeline.dir().join("warehouse/telemetry/events/data")).map_or(0, |f| f.count());
    assert!(files <= 4, "{files} data files of attempts that were not committed");

    let (code, text) = resume(&pipeline);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("batch 0") && text.contains("20 %"), "{text}");
    until_in_tables(&mut floe, &pipeline.tables(), 500);
    floe.until_ready();
    assert_eq!(floe.metric("floe_breaker_open"), Some(0.0));
    let (code, text) = resume(&pipeline);
    assert!(code == Some(1) && text.contains("nothing to resume"), "{code:?} {text}");

    // What came before is forgiven, what comes next is not.
    send(&pipeline.topic, &messages(500..1_000, 1_000));
    until_in_tables(&mut floe, &pipeline.tables(), 1_000);
    floe.until_ready();
    // All in one batch: the rest of the bad ones would be held back anew.
    floe.signal(libc::SIGSTOP);
    floe.until_stopped();
    send(&pipeline.topic, &messages(1_000..3_000, 2));
    floe.signal(libc::SIGCONT);
    until_held(&mut floe);
    // Told to stop while it waits, it stops.
    floe.terminate();
    floe.wait().expect_code(0);
    assert_eq!(resume(&pipeline).0, Some(0));
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &pipeline.tables(), 3_000);
    floe.kill();
    all_are_there(&pipeline);
}

#[test]
fn killed_while_it_waits() {
    let _turn = turn();
    let (mut pipeline, floe) = held("held_killed");
    floe.kill();
    assert_eq!(resume(&pipeline).0, Some(0), "also while nothing runs");
    // Killed again between the tables and the commit log: the batch is not asked about twice.
    let resumed = pipeline.checkpoint().join("control/resume-00000000000000000000.json");
    pipeline.run_failing("commit_log.before_put:kill").expect_killed();
    fs::remove_file(resumed).unwrap();
    pipeline.remove("trigger").set("trigger.available_now", true).set("http.listen", "");
    pipeline.run();
    all_are_there(&pipeline);
}

/// What was wrong is the schema: mended, the batch that was held back is executed with the new one.
#[test]
fn a_mended_schema_lets_it_go_on() {
    let _turn = turn();
    let name = "held_mended";
    topic(name, &(0..500).map(message).collect::<Vec<_>>());
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    let good = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json")).unwrap();
    let schema = pipeline.dir().join("schema.json");
    fs::write(&schema, good.replace("\"maximum\": 100", "\"maximum\": 10")).unwrap();
    pipeline.set("schema.file", schema.display().to_string());
    breaker(pipeline.service("100 ms"));
    let mut floe = pipeline.spawn();
    assert!(until_held(&mut floe).contains("out_of_range"));
    floe.terminate();
    floe.wait().expect_code(0);
    nothing_is_committed(&pipeline);

    fs::write(&schema, good).unwrap();
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &pipeline.tables(), 500);
    floe.until_ready();
    floe.terminate();
    floe.wait().expect_code(0);
    let tables = pipeline.tables();
    assert_eq!(tables.value::<u64>("select count(*) from {telemetry.events}"), 500);
    all_are_there(&pipeline);
}

#[test]
fn a_job_ends_and_says_what_to_do() {
    let _turn = turn();
    let name = "held_job";
    topic(name, &messages(0..500, 5));
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    breaker(&mut pipeline);
    let says = |ended: Ended| ended.expect_code(3).expect_output(&["batch 0 is held back", "floe resume", "20 %"]);
    says(pipeline.spawn().wait());
    says(pipeline.spawn().wait());
    nothing_is_committed(&pipeline);
    assert_eq!(resume(&pipeline).0, Some(0));
    pipeline.run();
    all_are_there(&pipeline);
    // Failed expectations count as refused, dropped rows do not.
    send(name, &(1_000..1_500).map(message).collect::<Vec<_>>());
    pipeline.set("quality.expect", expectations(&[("few", "duration_ms < 1100", "dead_letter")]));
    pipeline.spawn().wait().expect_code(3).expect_output(&["is held back", "expectation_failed 400"]);
    pipeline.set("quality.expect", expectations(&[("few", "duration_ms < 1100", "drop")]));
    pipeline.run();
    assert_eq!(offsets_in_tables(&pipeline.tables()), 600);
}

/// A few bad records do not prove anything; the same few within a short time do, and later they do not any more.
#[test]
fn a_small_batch_passes_when_those_before_it_are_long_ago() {
    let _turn = turn();
    let name = "held_trickle";
    topic(name, &messages(0..60, 1));
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, name);
    breaker(pipeline.service("100 ms")).set("quality.window", "8 s");
    let mut floe = pipeline.spawn();
    // By its metrics, which answer at once: a reader that takes seconds to start would use up the window.
    floe.until("the first batch is done", |floe| (floe.metric("floe_batches_total")? >= 1.0).then_some(()));
    send(name, &messages(60..120, 1));
    let reason = until_held(&mut floe);
    assert!(reason.contains("within 8s"), "{reason}\n{}", shown(&floe.output()));
    sleep(Duration::from_secs(2));
    until_in_tables(&mut floe, &pipeline.tables(), 120);
    floe.until_ready();
    floe.kill();
    all_are_there(&pipeline);
}
