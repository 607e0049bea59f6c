use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

use serde_json::json;

use crate::support::broker::{Broker, Rec};
use crate::support::check::{
    DEAD_LETTERS, ROWS, WINDOWS, dead_by_reason, everything, fill, records, windows, windows_are,
};
use crate::support::floe::{Ended, Pipeline};
use crate::support::telemetry::{Telemetry, Window};
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 5_000, ..Telemetry::default() }
}

fn topic() -> &'static str {
    static FILLED: OnceLock<&str> = OnceLock::new();
    FILLED.get_or_init(|| {
        fill(Broker::shared(), "recover", &telemetry());
        "recover"
    })
}

/// Five batches, and one without data that closes the last windows.
fn pipeline() -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic());
    pipeline.set("source.max_offsets_per_trigger", 1_000);
    pipeline
}

fn floe(pipeline: &Pipeline, arguments: &[&str]) -> Ended {
    let file = pipeline.config_file();
    let output = pipeline.command().args(arguments).arg(file).output().expect("floe");
    let text = [output.stdout, output.stderr].concat();
    Ended { status: output.status, output: String::from_utf8_lossy(&text).into_owned() }
}

fn recover(pipeline: &Pipeline) -> Ended {
    floe(pipeline, &["recover", "--from-table"])
}

fn lose_checkpoint(pipeline: &Pipeline) {
    fs::remove_dir_all(pipeline.checkpoint()).expect("a checkpoint");
}

/// The checkpoint is lost, rebuilt, and the pipeline goes on as if nothing had happened.
fn lost_at(step: &str) {
    let _turn = turn();
    let pipeline = pipeline();
    for nth in [2, 1, 3] {
        pipeline.run_failing(&format!("{step}:kill:{nth}")).expect_killed();
        lose_checkpoint(&pipeline);
        recover(&pipeline).expect_code(0).expect_output(&["done: up to batch", "open windows"]);
    }
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

#[test]
fn lost_after_a_plan() {
    lost_at("plan.after_put");
}

#[test]
fn lost_with_data_files_that_no_table_knows() {
    lost_at("execute.files_written");
}

#[test]
fn lost_after_the_tables_are_committed() {
    lost_at("commit.committed");
}

#[test]
fn lost_after_a_batch_is_done() {
    lost_at("tidy");
}

/// Where a catalog commits one table after another, some may have a batch and others not.
#[test]
fn lost_between_two_tables_of_a_batch() {
    let _turn = turn();
    for (begun, behind) in
        [(3, vec![ROWS]), (3, vec![WINDOWS, DEAD_LETTERS]), (2, vec![ROWS, WINDOWS]), (1, vec![DEAD_LETTERS])]
    {
        let pipeline = pipeline();
        pipeline.run_failing(&format!("plan.after_put:kill:{begun}")).expect_killed();
        let before: Vec<String> = behind.iter().map(|table| pointer(&pipeline, table)).collect();
        pipeline.run_failing("commit.committed:kill:1").expect_killed();
        for (table, location) in behind.iter().zip(&before) {
            set_pointer(&pipeline, table, location);
        }
        lose_checkpoint(&pipeline);
        let pending = format!("begun: batch {}", begun - 1);
        recover(&pipeline).expect_code(0).expect_output(&[&pending]);
        pipeline.run();
        everything(&pipeline, Broker::shared(), &telemetry());
    }
}

/// The batch that all the others have brings the table of rows a column.
#[test]
fn lost_before_the_rows_have_their_new_column() {
    let _turn = turn();
    let mut pipeline = pipeline();
    pipeline.run_failing("plan.after_put:kill:3").expect_killed();
    let file = pipeline.dir().join("schema.json");
    let schema = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/schemas/telemetry.json")).unwrap();
    let mut schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    schema["properties"]["firmware"] = json!({"type": ["string", "null"]});
    fs::write(&file, schema.to_string()).unwrap();
    pipeline.set("schema.file", file.to_str().unwrap());
    let before = pointer(&pipeline, ROWS);
    pipeline.run_failing("commit.committed:kill:1").expect_killed();
    assert_ne!(pointer(&pipeline, ROWS), before);
    set_pointer(&pipeline, ROWS, &before);
    lose_checkpoint(&pipeline);
    recover(&pipeline).expect_code(0).expect_output(&["begun: batch 2", "rows of telemetry.events"]);
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
    assert!(pipeline.tables().table(ROWS).columns.iter().any(|(name, ..)| name == "firmware"));
}

fn pointer(pipeline: &Pipeline, table: &str) -> String {
    let (namespace, name) = table.split_once('.').unwrap();
    let sql = "select metadata_location from iceberg_tables where table_namespace = ?1 and table_name = ?2";
    let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
    catalog.query_row(sql, [namespace, name], |row| row.get(0)).unwrap()
}

fn set_pointer(pipeline: &Pipeline, table: &str, location: &str) {
    let (namespace, name) = table.split_once('.').unwrap();
    let sql = "update iceberg_tables set metadata_location = ?3 where table_namespace = ?1 and table_name = ?2";
    let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
    assert_eq!(catalog.execute(sql, [namespace, name, location]).unwrap(), 1);
}

/// The watermark of each partition comes back as well.
#[test]
fn lost_with_watermarks_by_partition() {
    let _turn = turn();
    let run = |lose: bool| {
        let mut pipeline = pipeline();
        pipeline.set("event_time.policy", "partition-min").set("event_time.idle_timeout", "1 hour");
        pipeline.run_failing("commit.committed:kill:3").expect_killed();
        if lose {
            lose_checkpoint(&pipeline);
            recover(&pipeline).expect_code(0);
        }
        pipeline.run();
        windows(&pipeline.tables())
    };
    let (undisturbed, recovered) = (run(false), run(true));
    assert!(!undisturbed.is_empty());
    assert_eq!(undisturbed, recovered);
}

/// Rows that `floe dlq retry` has brought into the rows table were never in a window, and are not after it either.
#[test]
fn letters_tried_again_do_not_enter_open_windows() {
    let _turn = turn();
    let expect = "[[expect]]\nname = \"short\"\nsql = \"duration_ms % 5 <> 0\"\non_fail = \"dead_letter\"";
    let quality: toml::Table = expect.parse().unwrap();
    let run = |lose: bool| {
        let mut pipeline = pipeline();
        pipeline.set("quality", quality.clone());
        pipeline.run_failing("tidy:kill:3").expect_killed();
        if lose {
            pipeline.remove("quality");
            floe(&pipeline, &["dlq", "retry"]).expect_code(0);
            pipeline.set("quality", quality.clone());
            lose_checkpoint(&pipeline);
            recover(&pipeline).expect_code(0);
        }
        let rows: u64 = pipeline.tables().value("select count(*) from {telemetry.events}");
        pipeline.run();
        (rows, windows(&pipeline.tables()))
    };
    let (undisturbed, recovered) = (run(false), run(true));
    assert!(undisturbed.0 < recovered.0, "letters became rows: {} {}", undisturbed.0, recovered.0);
    assert!(!undisturbed.1.is_empty());
    assert_eq!(undisturbed.1, recovered.1);
}

#[test]
fn what_cannot_be_rebuilt_is_refused_with_what_was_found() {
    let _turn = turn();
    let mut pipeline = pipeline();
    recover(&pipeline).expect_code(3).expect_output(&["nothing to rebuild", "there is no such table"]);
    assert!(!pipeline.checkpoint().join("metadata.json").exists());
    pipeline.run_failing("tidy:kill:3").expect_killed();

    recover(&pipeline).expect_code(3).expect_output(&["never overwritten"]);
    lose_checkpoint(&pipeline);
    // A pipeline that has lost its checkpoint says what to do.
    pipeline.spawn().wait().expect_code(3).expect_output(&["floe recover --from-table"]);
    lose_checkpoint(&pipeline);

    pipeline.set("event_time.watermark_delay", "3 minutes");
    recover(&pipeline).expect_code(3).expect_output(&["another configuration"]);
    pipeline.set("event_time.watermark_delay", "2 minutes");
    pipeline.set("name", "other");
    recover(&pipeline).expect_code(3).expect_output(&["anything of pipeline \"other\"", "of pipeline telemetry"]);
    pipeline.set("name", "telemetry");
    recover(&pipeline).expect_code(0);
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// `floe.valid-through`: all windows that end by then are in the table, and no others.
#[test]
fn tables_say_how_far_windows_are_complete() {
    let _turn = turn();
    let pipeline = pipeline();
    let mut before = None;
    for nth in [2, 2, 2] {
        pipeline.run_failing(&format!("tidy:kill:{nth}")).expect_killed();
        let tables = pipeline.tables();
        let said = tables.table(WINDOWS).properties["floe.valid-through"].parse::<jiff::Timestamp>().unwrap();
        assert!(before <= Some(said));
        before = Some(said);
        let through_ms = said.as_millisecond();
        let truth = telemetry().truth();
        // In five batches of a stream whose disorder is less than the delay.
        let complete = truth.windows.iter().filter(|((start, _), _)| start + 60_000 <= through_ms);
        let found = windows(&tables);
        assert_eq!(found.len(), complete.count(), "through {said}");
    }
}

/// Windows and dead letters alone: what was open is in Kafka only.
fn windows_only() -> Pipeline {
    let mut pipeline = pipeline();
    pipeline.remove("rows");
    pipeline
}

fn windows_are_true(pipeline: &Pipeline) {
    let (tables, truth) = (pipeline.tables(), telemetry().truth());
    windows_are(&tables, &truth.closed(pipeline.delay_ms()));
    assert_eq!(dead_by_reason(&tables), truth.dead, "dead letters by reason");
}

/// What a command has said after some words, up to a blank.
fn said<'a>(ended: &'a Ended, before: &str) -> &'a str {
    let (_, after) = ended.output.split_once(before).unwrap_or_else(|| panic!("no {before:?}: {}", ended.output));
    after.split_whitespace().next().unwrap_or_default().trim_end_matches([',', ':'])
}

fn millis(text: &str) -> i64 {
    text.parse::<jiff::Timestamp>().unwrap_or_else(|e| panic!("{text}: {e}")).as_millisecond()
}

/// Killed at random, and the checkpoint lost each time; in one state file, and in many.
#[test]
fn without_rows_windows_come_back_from_kafka() {
    let _turn = turn();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let mut random = u64::from(now.subsec_nanos());
    eprintln!("seed {random}");
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let steps = ["plan.after_put", "execute.files_written", "commit.committed", "commit_log.before_put", "tidy"];
    for budget in ["1 GiB", "0 B"] {
        let mut pipeline = windows_only();
        pipeline.set("state.memory_budget", budget).set("source.max_offsets_per_trigger", 500);
        for _ in 0..3 {
            let point = format!("{}:kill:{}", steps[below(steps.len() as u64) as usize], 2 + below(2));
            eprintln!("{point}");
            pipeline.run_failing(&point).expect_killed();
            lose_checkpoint(&pipeline);
            recover(&pipeline)
                .expect_code(0)
                .expect_output(&["done: up to batch", "records of Kafka, offsets recover-"]);
        }
        pipeline.run();
        windows_are_true(&pipeline);
    }
}

/// Whatever there is before is in windows that are closed.
#[test]
fn kafka_is_not_read_from_the_beginning() {
    let _turn = turn();
    let pipeline = windows_only();
    pipeline.run();
    lose_checkpoint(&pipeline);
    let recovered = recover(&pipeline).expect_code(0);
    let records: u64 = said(&recovered, "aggregated again from ").parse().unwrap();
    assert!((1..telemetry().messages / 2).contains(&records), "{}", recovered.output);
    pipeline.run();
    windows_are_true(&pipeline);
}

#[test]
fn without_rows_lost_between_two_tables_of_a_batch() {
    let _turn = turn();
    for behind in [WINDOWS, DEAD_LETTERS] {
        let pipeline = windows_only();
        pipeline.run_failing("plan.after_put:kill:3").expect_killed();
        let before = pointer(&pipeline, behind);
        pipeline.run_failing("commit.committed:kill:1").expect_killed();
        set_pointer(&pipeline, behind, &before);
        lose_checkpoint(&pipeline);
        recover(&pipeline).expect_code(0).expect_output(&["begun: batch 2", "records of Kafka"]);
        pipeline.run();
        windows_are_true(&pipeline);
    }
}

/// Late for the batch that reads them, starting in the middle of the topic, in windows that overlap, with a filter and an
/// expectation: the same windows and the same late rows as if nothing had been lost.
#[test]
fn from_kafka_everything_is_as_if_nothing_had_been_lost() {
    let _turn = turn();
    let run = |lose: bool| {
        let mut pipeline = windows_only();
        pipeline.set("event_time.watermark_delay", "0 minutes").set("source.max_offsets_per_trigger", 400);
        pipeline
            .set_window("late", "table")
            .set_window("slide", "20 seconds")
            .set_window("filter", "duration_ms > 1000");
        let quality = "[[expect]]\nname = \"short\"\nsql = \"duration_ms % 5 <> 0\"\non_fail = \"dead_letter\"";
        pipeline.set("quality", quality.parse::<toml::Table>().unwrap());
        pipeline.set("transform.filter", "status <> 'error'");
        let offsets: toml::Table = "recover = { 0 = 150, 1 = 200, 2 = 0, 3 = 17 }".parse().unwrap();
        pipeline.set("source.starting_offsets", offsets);
        for nth in [2, 3] {
            pipeline.run_failing(&format!("tidy:kill:{nth}")).expect_killed();
            if lose {
                lose_checkpoint(&pipeline);
                recover(&pipeline).expect_code(0).expect_output(&["records of Kafka"]);
            }
        }
        pipeline.run();
        let sql = "select window_table, count(*), sum(_kafka_offset)::bigint from {telemetry.device_minutes_late} group by all";
        (windows(&pipeline.tables()), pipeline.tables().query::<(String, u64, i64)>(sql))
    };
    let (undisturbed, recovered) = (run(false), run(true));
    assert!(!undisturbed.0.is_empty() && undisturbed.1[0].1 > 100, "{:?}", undisturbed.1);
    assert_eq!(undisturbed, recovered);
}

/// What was refused for the clock then is not let in now.
#[test]
fn records_refused_for_their_time_stay_refused() {
    let _turn = turn();
    let broker = Broker::shared();
    broker.create_topic("recover_future", 1, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "recover_future");
    pipeline.remove("rows").set("event_time.max_future", "1 second");
    let now = jiff::Timestamp::now().as_millisecond();
    let record = |at_ms: i64| {
        let at = jiff::Timestamp::from_millisecond(at_ms).unwrap().to_string();
        let (mut buffer, reading) = (Vec::new(), Telemetry { invalid_per_mille: 0, ..telemetry() }.reading(7));
        let mut value: serde_json::Value = serde_json::from_slice(reading.value(&mut buffer).unwrap()).unwrap();
        value["event_timestamp"] = json!(at);
        Rec { partition: Some(0), value: Some(value.to_string().into_bytes()), ..Rec::default() }
    };
    // By the time of the rebuilding it is the present.
    broker.produce_records("recover_future", [record(now - 100_000), record(now + 30_000), record(now - 90_000)]);
    pipeline.run();
    assert_eq!(dead_by_reason(&pipeline.tables()), BTreeMap::from([("future_event_time".to_string(), 1)]));
    lose_checkpoint(&pipeline);
    while jiff::Timestamp::now().as_millisecond() < now + 30_000 {
        sleep(Duration::from_millis(200));
    }
    recover(&pipeline).expect_code(0).expect_output(&["3 records of Kafka"]);
    let state = floe(&pipeline, &["state"]).expect_code(0).output;
    let windows: Vec<&str> = state.lines().filter(|line| line.starts_with(WINDOWS)).collect();
    assert!(windows.len() <= 2 && !windows.is_empty(), "{state}");
    let groups: u64 = windows.iter().map(|line| line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()).sum();
    assert_eq!(groups, windows.len() as u64, "{state}");
    let last = windows.iter().map(|line| millis(line.split_whitespace().nth(1).unwrap())).max();
    assert!(last <= Some(now - 90_000), "{state}");
}

/// Windows as the truth has them, but for those that `recover` has said lack rows.
fn windows_lack_what_was_said(pipeline: &Pipeline, recovered: &Ended) {
    let end_after = millis(said(recovered, "that end after "));
    let (_, times) = recovered.output.split_once("event times from ").unwrap();
    let latest = millis(times.split_whitespace().nth(2).unwrap());
    let (found, truth) = (windows(&pipeline.tables()), telemetry().truth().closed(pipeline.delay_ms()));
    let untouched = |of: &BTreeMap<(i64, u64), Window>| {
        let untouched = of.iter().filter(|((start, _), _)| start + 60_000 <= end_after || *start > latest);
        untouched.map(|(key, window)| (*key, window.clone())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(untouched(&found), untouched(&truth));
    assert!(found.iter().all(|(key, window)| truth.get(key).is_some_and(|truth| truth.events >= window.events)));
    assert_ne!(found, truth, "some windows lack rows");
}

#[test]
fn kafka_without_the_records_is_refused_and_open_windows_are_dropped_if_asked_for() {
    let _turn = turn();
    let broker = Broker::shared();
    fill(broker, "recover_deleted", &telemetry());
    let mut pipeline = Pipeline::new(&broker.bootstrap, "recover_deleted");
    pipeline.set("source.max_offsets_per_trigger", 1_000).remove("rows");
    pipeline.run_failing("tidy:kill:3").expect_killed();
    lose_checkpoint(&pipeline);
    broker.delete_records("recover_deleted", 2, 700);
    recover(&pipeline).expect_code(3).expect_output(&[
        "telemetry.device_minutes: there is no table of rows; Kafka no longer has all of the offsets that are needed: recover_deleted-2 [",
        "of which there are [700, ",
        "--drop-open-windows",
    ]);
    assert!(!pipeline.checkpoint().join("metadata.json").exists());
    assert!(!pipeline.checkpoint().join("state").exists());
    let recovered = floe(&pipeline, &["recover", "--from-table", "--drop-open-windows"]);
    let recovered =
        recovered.expect_code(0).expect_output(&["telemetry.device_minutes: dropped: windows that end after "]);
    pipeline.run();
    windows_lack_what_was_said(&pipeline, &recovered);
    assert_eq!(dead_by_reason(&pipeline.tables()), telemetry().truth().dead);

    // Nothing more is lost with the next one.
    pipeline.set("source.max_offsets_per_trigger", 100_000);
    lose_checkpoint(&pipeline);
    let before = windows(&pipeline.tables());
    floe(&pipeline, &["recover", "--from-table", "--drop-open-windows"])
        .expect_code(0)
        .expect_output(&["records of Kafka"]);
    pipeline.run();
    assert_eq!(windows(&pipeline.tables()), before);
}

/// Its offsets are all there, the records between them need not be.
#[test]
fn a_compacted_topic_is_refused() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "recover_compacted";
    broker.create_topic(topic, telemetry().partitions, &[("cleanup.policy", "compact,delete")]);
    broker.produce_records(topic, records(&telemetry(), 0..telemetry().messages));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.remove("rows");
    pipeline.run();
    lose_checkpoint(&pipeline);
    recover(&pipeline).expect_code(3).expect_output(&[
        "there is no table of rows; topic recover_compacted is compacted (cleanup.policy = compact,delete)",
        "--drop-open-windows",
    ]);
    floe(&pipeline, &["recover", "--from-table", "--drop-open-windows"]).expect_code(0);
}

#[test]
fn a_topic_created_again_is_refused() {
    let _turn = turn();
    let broker = Broker::shared();
    fill(broker, "recover_again", &telemetry());
    let mut pipeline = Pipeline::new(&broker.bootstrap, "recover_again");
    pipeline.remove("rows");
    pipeline.run();
    lose_checkpoint(&pipeline);
    broker.delete_topic("recover_again");
    fill(broker, "recover_again", &telemetry());
    recover(&pipeline).expect_code(3).expect_output(&["topic recover_again was deleted and created again (id "]);
}

/// Sessions cannot be had from either; what else is open is kept.
#[test]
fn sessions_are_refused_or_dropped_alone() {
    let _turn = turn();
    for rows in [true, false] {
        let mut pipeline = if rows { pipeline() } else { windows_only() };
        pipeline.add_window(
            "table = \"telemetry.sessions\"\nsession_gap = \"20 seconds\"\ngroup_by = [\"device_id\"]\n\
             [aggregates]\nevents = \"count(*)\"",
        );
        pipeline.run_failing("tidy:kill:3").expect_killed();
        lose_checkpoint(&pipeline);
        let refused = recover(&pipeline).expect_code(3);
        let refused = refused.expect_output(&["telemetry.sessions: which rows are of sessions", "--drop-open-windows"]);
        assert!(!refused.output.contains("device_minutes"), "{}", refused.output);
        let again = if rows { "rows of telemetry.events" } else { "records of Kafka" };
        floe(&pipeline, &["recover", "--from-table", "--drop-open-windows"])
            .expect_code(0)
            .expect_output(&["telemetry.sessions: dropped: sessions that end after ", again]);
        pipeline.run();
        windows_are_true(&pipeline);
    }
}

/// One type keeps its rows, the other does not: each comes back by its own road, and one watermark serves both.
#[test]
fn each_type_comes_back_by_its_own_road() {
    let _turn = turn();
    let broker = Broker::shared();
    broker.create_topic("recover_types", 2, &[]);
    let at = |i: i64| format!("2026-03-01T00:{:02}:{:02}Z", i / 60, i % 60);
    let value = |i: i64| match i % 4 {
        0 => json!({"kind": "alert", "at": at(i), "code": i}),
        1 => json!({"kind": "reading", "at": at(i), "code": "none"}),
        2 => json!({"kind": "other"}),
        _ => json!({"kind": "reading", "at": at(i), "code": i}),
    };
    let record = |i: i64| Rec {
        partition: Some((i % 3 % 2) as i32),
        value: Some(value(i).to_string().into_bytes()),
        ..Rec::default()
    };
    broker.produce_records("recover_types", (0..1_200).map(record));
    let run = |lose: bool| {
        let mut pipeline = Pipeline::new(&broker.bootstrap, "recover_types");
        let schema = r#"{"type": "object", "required": ["at", "code"], "properties": {"kind": {"type": "string"},
            "at": {"type": "string", "format": "date-time"}, "code": {"type": "integer"}}}"#;
        fs::write(pipeline.dir().join("schema.json"), schema).unwrap();
        let types: toml::Table = r#"
            [[types]]
            name = "reading"
            field = "kind"
            equals = "reading"
            schema = "schema.json"
            table = "fleet.readings"
            [[types]]
            name = "alert"
            field = "kind"
            equals = "alert"
            schema = "schema.json"
            [[windows]]
            type = "reading"
            table = "fleet.reading_windows"
            size = "5 minutes"
            aggregates = { n = "count(*)", codes = "sum(code)" }
            [[windows]]
            type = "alert"
            table = "fleet.alert_windows"
            size = "5 minutes"
            slide = "1 minute"
            aggregates = { n = "count(*)", codes = "sum(code)" }
            "#
        .parse()
        .unwrap();
        pipeline.remove("schema").remove("rows").remove("windows");
        for (key, value) in types {
            pipeline.set(&key, value);
        }
        pipeline.set("event_time.column", "at").set("event_time.watermark_delay", "1 minutes");
        pipeline.set("dead_letters.table", "fleet.dead_letters").set("source.max_offsets_per_trigger", 300);
        for nth in [2, 1] {
            pipeline.run_failing(&format!("tidy:kill:{nth}")).expect_killed();
            if lose {
                lose_checkpoint(&pipeline);
                recover(&pipeline)
                    .expect_code(0)
                    .expect_output(&["rows of fleet.readings", "records of Kafka, offsets recover_types-0 ["]);
            }
        }
        pipeline.run();
        let of = |table: &str| -> Vec<(i64, i64, i64)> {
            pipeline
                .tables()
                .query(&format!("select epoch_ms(window_start), n, codes::bigint from {{{table}}} order by all"))
        };
        [of("fleet.reading_windows"), of("fleet.alert_windows")]
    };
    let (undisturbed, recovered) = (run(false), run(true));
    assert!(undisturbed.iter().all(|windows| windows.len() > 2), "{undisturbed:?}");
    assert_eq!(undisturbed, recovered);
}
