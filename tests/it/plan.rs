use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::broker::Broker;
use crate::support::check::{everything, records};
use crate::support::floe::Pipeline;
use crate::support::telemetry::{MINUTE_MS, START_MS, Telemetry};
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 4_000, devices: 12, ..Telemetry::default() }
}

const BY_STATUS: &str = r#"
    table = "telemetry.by_status"
    size = "5 minutes"
    group_by = ["status"]
    aggregates = { events = "count(*)" }
"#;

/// Verdict by subject.
fn verdicts(plan: &Value) -> BTreeMap<String, String> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    plan["changes"].as_array().unwrap().iter().map(|c| (text(&c["subject"]), text(&c["verdict"]))).collect()
}

fn verdicts_are(plan: &Value, expected: &[(&str, &str)]) {
    let expected = expected.iter().map(|(s, v)| (s.to_string(), v.to_string())).collect();
    assert_eq!(verdicts(plan), expected, "{plan:#}");
}

/// A run refuses what the plan refuses, with the same words, and changes nothing.
fn refused(pipeline: &Pipeline, subject: &str) -> Value {
    let plan = pipeline.plan(&[]);
    assert_eq!(plan["goes_on"], false, "{plan:#}");
    let change = plan["changes"].as_array().unwrap().iter().find(|c| c["subject"] == subject);
    let change = change.unwrap_or_else(|| panic!("{subject} is not in {plan:#}")).clone();
    let words = format!("{subject}: {}", change["change"].as_str().unwrap());
    pipeline.spawn().wait().expect_code(3).expect_output(&[&words, change["why"].as_str().unwrap()]);
    change
}

/// Windows come, go and change places while others are open, and these come out as if nothing had been.
#[test]
fn windows_come_and_go() {
    let _turn = turn();
    let broker = Broker::shared();
    let (topic, telemetry) = ("plan_windows", telemetry());
    broker.create_topic(topic, telemetry.partitions, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 300);
    let produce = |slice: u64| broker.produce_records(topic, records(&telemetry, slice * 1_000..(slice + 1) * 1_000));
    let new = pipeline.plan(&[]);
    assert_eq!((&new["goes_on"], &new["since_batch"]), (&Value::Bool(true), &Value::Null));
    produce(0);
    pipeline.run();
    verdicts_are(&pipeline.plan(&[]), &[]);

    // One more, in the first place.
    pipeline.insert_window(BY_STATUS);
    verdicts_are(
        &pipeline.plan(&[]),
        &[("windows telemetry.by_status", "safe"), ("table telemetry.by_status", "safe")],
    );
    produce(1);
    pipeline.run();
    verdicts_are(&pipeline.plan(&[]), &[]);

    // The same in another order.
    pipeline.remove_window("telemetry.by_status").add_window(BY_STATUS);
    verdicts_are(&pipeline.plan(&[]), &[]);
    pipeline.run();

    // Gone, with windows that are open.
    pipeline.remove_window("telemetry.by_status");
    let change = refused(&pipeline, "windows telemetry.by_status");
    assert_eq!(change["verdict"], "drops_state");
    assert!(change["why"].as_str().unwrap().contains("open window"), "{change:#}");
    pipeline.plan(&["--apply"]);
    produce(2);
    pipeline.run();
    verdicts_are(&pipeline.plan(&[]), &[]);

    // Back again: what was dropped stays so.
    pipeline.add_window(BY_STATUS);
    produce(3);
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
    let tables = pipeline.tables();
    let in_windows: u64 = tables.value("select sum(events)::bigint from {telemetry.by_status}");
    let rows: u64 = tables.value("select count(*) from {telemetry.events}");
    assert!(in_windows > 0 && in_windows < rows / 2 + 200, "{in_windows} of {rows}");
    let twice: u64 = tables.value(
        "select count(*) from (select window_start, status from {telemetry.by_status} group by all having count(*) > 1)",
    );
    assert_eq!(twice, 0);
}

/// Other aggregates over open windows cannot be had from what is there.
#[test]
fn windows_that_become_others_need_a_rebuild() {
    let _turn = turn();
    let broker = Broker::shared();
    let (topic, telemetry) = ("plan_rebuild", telemetry());
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(&telemetry, 0..2_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 200);
    pipeline.run();
    let mut other = Pipeline::new(&broker.bootstrap, topic);
    other.set("checkpoint.location", pipeline.checkpoint().display().to_string());
    other.set("catalog.path", pipeline.catalog().display().to_string());
    other.set("catalog.warehouse", pipeline.dir().join("warehouse").display().to_string());
    other.set_window("size", "2 minutes");
    let change = refused(&other, "windows telemetry.device_minutes");
    assert_eq!((&change["verdict"], &change["change"]), (&Value::from("needs_rebuild"), &Value::from("size")));

    // From there on, the windows that were open are whole.
    let offsets = change["starting_offsets"][topic].as_object().unwrap();
    assert_eq!(offsets.len(), telemetry.partitions as usize, "{change:#}");
    assert!(offsets.values().any(|offset| offset.as_i64().unwrap() > 0), "{change:#}");
    let why = change["why"].as_str().unwrap();
    assert!(why.contains(&format!("source.starting_offsets = {{ \"{topic}\" = {{ 0 = ")), "{why}");
    assert!(why.contains("floe plan FILE --apply"), "{why}");
    broker.produce_records(topic, records(&telemetry, 2_000..4_000));
    let mut anew = Pipeline::new(&broker.bootstrap, topic);
    anew.set_window("size", "2 minutes");
    let offsets: toml::Table =
        offsets.iter().map(|(partition, offset)| (partition.clone(), offset.as_i64().unwrap().into())).collect();
    anew.set("source.starting_offsets", toml::Table::from_iter([(topic.to_string(), offsets.into())]));
    anew.run();
    let mut whole = Pipeline::new(&broker.bootstrap, topic);
    whole.set_window("size", "2 minutes");
    whole.run();
    let from = why.split("whole from ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let sql = format!(
        "select epoch_ms(window_start), device_id, events, duration_sum from {{telemetry.device_minutes}} \
         where window_start >= timestamptz '{from}' order by all"
    );
    let expected: Vec<(i64, String, i64, i64)> = whole.tables().query(&sql);
    assert!(!expected.is_empty());
    assert_eq!(anew.tables().query::<(i64, String, i64, i64)>(&sql), expected);

    // Undone, it goes on.
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
}

/// Agreed to, the table goes on with the other windows, killed at whatever step: those that begin after what was read are whole,
/// and the state of the other tables is left alone.
#[test]
fn windows_that_become_others_go_on_without_the_open_ones_once_somebody_agrees() {
    let _turn = turn();
    let broker = Broker::shared();
    let (topic, telemetry) = ("plan_others", telemetry());
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(&telemetry, 0..2_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 200).add_window(BY_STATUS);
    pipeline.run();
    let closed = |pipeline: &Pipeline, bounds: &str| -> Vec<(i64, i64, String, i64, i64)> {
        pipeline.tables().query(&format!(
            "select epoch_ms(window_start), epoch_ms(window_end), device_id, events, duration_sum \
             from {{telemetry.device_minutes}} where {bounds} order by all"
        ))
    };
    let before = closed(&pipeline, "true");
    pipeline.set_window("size", "2 minutes");
    let change = refused(&pipeline, "windows telemetry.device_minutes");
    let read_ms =
        (0..2_000).map(|i| telemetry.reading(i)).filter(|r| r.invalid.is_none()).map(|r| r.event_ms).max().unwrap();
    let read = jiff::Timestamp::from_millisecond(read_ms).unwrap().to_string();
    assert!(change["why"].as_str().unwrap().contains(&format!("begin by {read}")), "{change:#}");
    let plan = pipeline.plan(&["--apply"]);
    assert_eq!(plan["agreed_to_drop"], json!(["telemetry.device_minutes"]), "{plan:#}");
    assert_eq!(verdicts(&plan)["windows telemetry.device_minutes"], "needs_rebuild");
    broker.produce_records(topic, records(&telemetry, 2_000..4_000));
    for point in ["execute.files_written:kill", "commit_log.before_put:kill", "commit_log.after_put:kill"] {
        pipeline.run_failing(point).expect_killed();
    }
    pipeline.run();
    verdicts_are(&pipeline.plan(&[]), &[]);

    let mut whole = Pipeline::new(&broker.bootstrap, topic);
    whole.set("source.max_offsets_per_trigger", 200).add_window(BY_STATUS).set_window("size", "2 minutes");
    whole.run();
    let ones = "window_end - window_start = interval 1 minute";
    assert_eq!(closed(&pipeline, ones), before, "what was there stays");
    let after = format!("window_end - window_start = interval 2 minutes and window_start > timestamptz '{read}'");
    let expected = closed(&whole, &after);
    assert!(expected.len() > 10, "{} windows", expected.len());
    assert_eq!(closed(&pipeline, &after), expected);
    let by_status = |pipeline: &Pipeline| -> Vec<(i64, Option<String>, i64)> {
        pipeline.tables().query("select epoch_ms(window_start), status, events from {telemetry.by_status} order by all")
    };
    assert_eq!(by_status(&pipeline), by_status(&whole), "windows of another table");
}

fn early(table: &str, mode: &str) -> String {
    format!(
        "table = \"telemetry.{table}\"\nsize = \"1 minute\"\nfilter = \"device_id <> 'closer'\"\noutput_mode = \"{mode}\"\n\
         aggregates = {{ events = \"count(*)\" }}"
    )
}

/// A table has the columns of one mode: from append to update and back is another table, for which the plan is safe once nothing
/// is open.
#[test]
fn the_output_mode_changes() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "plan_modes";
    broker.create_topic(topic, 1, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 300).set_window("filter", "device_id <> 'closer'");
    pipeline.add_window(&early("early", "update"));
    // A thousand readings from an hour on.
    let produce = |hour: i64| {
        let start_ms = START_MS + hour * 60 * MINUTE_MS;
        let telemetry = Telemetry { partitions: 1, invalid_per_mille: 0, start_ms, ..telemetry() };
        broker.produce_records(topic, records(&telemetry, 0..1_000));
    };
    // Closes what is open, and is in no window itself.
    let close = |hour: u32| {
        let at = format!("2026-01-01T{hour:02}:00:00Z");
        broker.produce(topic, Some(0), None, [json!({"device_id": "closer", "event_timestamp": at}).to_string()]);
    };
    let both = ["telemetry.device_minutes", "telemetry.early"];
    produce(0);
    pipeline.run();
    let before = both.map(|table| pipeline.tables().table(table).snapshots.len());
    pipeline.set_window("output_mode", "update");
    pipeline.remove_window("telemetry.early").add_window(&early("early", "append"));
    for table in both {
        let change = refused(&pipeline, &format!("windows {table}"));
        assert_eq!((&change["verdict"], &change["change"]), (&"needs_rebuild".into(), &"output_mode".into()));
        assert!(change["why"].as_str().unwrap().contains("of the other mode"), "{change:#}");
    }
    pipeline.set_window("output_mode", "append");
    pipeline.remove_window("telemetry.early").add_window(&early("early", "update"));
    close(2);
    pipeline.run();
    let closed = both.map(|table| pipeline.tables().table(table).snapshots.len());
    assert!(closed[0] > before[0], "{before:?} {closed:?}");

    pipeline.set_window("output_mode", "update");
    pipeline.remove_window("telemetry.early").add_window(&early("early", "append"));
    let plan = pipeline.plan(&[]);
    let found = verdicts(&plan);
    for table in both {
        assert_eq!(found[&format!("windows {table}")], "safe", "{plan:#}");
        assert_eq!(found[&format!("table {table}")], "refused", "{plan:#}");
    }
    assert!(plan.to_string().contains("revision") && plan.to_string().contains("write to a new table"), "{plan:#}");
    pipeline.spawn().wait().expect_code(3).expect_output(&["revision", "write to a new table"]);
    assert_eq!(both.map(|table| pipeline.tables().table(table).snapshots.len()), closed, "nothing was changed");

    // To other tables both go.
    pipeline.set_window("table", "telemetry.minutes_so_far");
    pipeline.remove_window("telemetry.early").add_window(&early("late", "append"));
    produce(3);
    close(5);
    pipeline.run();
    let tables = pipeline.tables();
    let newest = "(select *, row_number() over (partition by window_start, device_id order by revision desc) as n \
                  from {telemetry.minutes_so_far})";
    let sums: Vec<(i64, i64, i64)> = tables.query(&format!(
        "select (select sum(events) from {newest} where n = 1)::bigint, \
         (select sum(events) from {{telemetry.late}})::bigint, (select sum(events) from {{telemetry.device_minutes}})::bigint"
    ));
    assert_eq!(sums, [(1_000, 1_000, 1_000)]);
}

/// What is safe is named and goes on; a topic that is left out is refused.
#[test]
fn settings_change() {
    let _turn = turn();
    let broker = Broker::shared();
    let (topic, telemetry) = ("plan_settings", telemetry());
    for topic in [topic, "plan_settings_more"] {
        broker.create_topic(topic, telemetry.partitions, &[]);
    }
    broker.produce_records(topic, records(&telemetry, 0..1_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.run();
    pipeline.set("source.topics", vec![topic, "plan_settings_more"]).set("event_time.watermark_delay", "3 minutes");
    pipeline.set("transform.filter", "device_id <> 'dev-1'").set("dead_letters.table", "telemetry.refused");
    pipeline.set("event_time.policy", "partition-min");
    let plan = pipeline.plan(&[]);
    let settings = [
        "dead_letters.table",
        "event_time.idle_timeout",
        "event_time.policy",
        "event_time.watermark_delay",
        "source.topics",
        "table telemetry.refused",
        "transform.filter",
    ];
    verdicts_are(&plan, &settings.map(|setting| (setting, "safe")));
    broker.produce_records(topic, records(&telemetry, 1_000..2_000));
    pipeline.run();
    verdicts_are(&pipeline.plan(&[]), &[]);
    pipeline.set("source.topics", vec![topic]);
    let change = refused(&pipeline, "source.topics");
    assert_eq!(change["verdict"], "refused");
    // Another warehouse does not have the tables.
    pipeline.set("source.topics", vec![topic, "plan_settings_more"]);
    pipeline.set("catalog.path", pipeline.dir().join("other.db").display().to_string());
    let plan = pipeline.plan(&[]);
    assert_eq!(verdicts(&plan)["table telemetry.events"], "refused");
    pipeline.spawn().wait().expect_code(3).expect_output(&["is not in the catalog", "Nothing was created"]);
}
