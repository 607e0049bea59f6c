use std::fs;

use serde_json::{Value, json};

use crate::support::broker::{Broker, Rec};
use crate::support::floe::Pipeline;
use crate::support::turn;

fn pipeline(topic: &str, windows: &[&str]) -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic);
    let nullable = |of: &str| json!({"type": [of, "null"]});
    let schema = json!({"type": "object", "properties": {
        "at": {"type": ["string", "null"], "format": "date-time"}, "device": nullable("string"),
        "n": nullable("integer"), "x": nullable("number"),
    }});
    let file = pipeline.dir().join("edges.json");
    fs::write(&file, schema.to_string()).unwrap();
    pipeline.set("schema.file", file.display().to_string()).set("event_time.column", "at");
    pipeline.set("event_time.policy", "partition-min").set("event_time.watermark_delay", "1 minute");
    pipeline.set("rows.table", "e.rows").set("rows.partition_by", toml::Value::Array(Vec::new()));
    pipeline.set("dead_letters.table", "e.dead_letters");
    pipeline.remove_window("telemetry.device_minutes");
    for window in windows {
        pipeline.add_window(window);
    }
    pipeline
}

fn record(value: Value) -> Rec {
    Rec { partition: Some(0), value: Some(value.to_string().into_bytes()), ..Rec::default() }
}

/// No rows at all, null keys and times, times before 1970 and at both ends of what RFC 3339 can say, sums that overflow, NaN.
#[test]
fn of_values_and_times() {
    let _turn = turn();
    let broker = Broker::shared();
    broker.create_topic("edges", 1, &[]);
    let by_device = r#"
        table = "e.minutes"
        size = "1 minute"
        group_by = ["device"]
        aggregates = { events = "count(*)", total = "sum(n)", low = "min(x)", high = "max(nan)", sum_nan = "sum(nan)" }
    "#;
    let by_nan = r#"
        table = "e.by_nan"
        size = "1 hour"
        group_by = ["nan"]
        aggregates = { events = "count(*)" }
    "#;
    let sessions = r#"
        table = "e.sessions"
        session_gap = "1 minute"
        group_by = ["device"]
        aggregates = { events = "count(*)", total = "sum(n)", low = "min(x)", nan = "max(nan)" }
    "#;
    let early = r#"
        table = "e.early"
        size = "1 day"
        output_mode = "update"
        aggregates = { events = "count(*)", total = "sum(n)" }
    "#;
    let mut pipeline = pipeline("edges", &[by_device, by_nan, sessions, early]);
    pipeline.set("transform.columns.nan", "x / (x - x)");
    let tables = pipeline.tables();
    pipeline.run();
    for table in ["e.rows", "e.minutes", "e.by_nan", "e.sessions", "e.early", "e.dead_letters"] {
        assert_eq!(tables.value::<u64>(&format!("select count(*) from {{{table}}}")), 0, "{table}");
    }

    let row = |at: Option<&str>, device: Option<&str>, n: Option<i64>, x: Option<f64>| {
        record(json!({"at": at, "device": device, "n": n, "x": x}))
    };
    broker.produce_records(
        "edges",
        [
            row(Some("0001-01-01T00:00:00Z"), Some("first"), Some(1), Some(1.5)),
            row(Some("1969-12-31T23:59:59.999999Z"), Some("before"), Some(2), None),
            row(Some("1970-01-01T00:00:00Z"), Some("after"), None, None),
            row(Some("2026-01-01T00:00:00Z"), None, Some(3), Some(-0.0)),
            row(Some("2026-01-01T00:00:59.999999Z"), None, Some(4), Some(0.0)),
            row(Some("2026-01-01T00:00:30Z"), Some("much"), Some(i64::MAX), None),
            row(Some("2026-01-01T00:00:31Z"), Some("much"), Some(1), None),
            row(Some("2026-01-01T00:00:32Z"), Some("fits"), Some(i64::MAX), None),
            row(Some("2026-01-01T00:00:33Z"), Some("fits"), Some(i64::MIN), None),
            row(None, Some("never"), Some(5), None),
            row(None, None, None, None),
        ],
    );
    pipeline.run();
    // Everything before closes; this one never does.
    broker.produce_records("edges", [row(Some("9999-12-31T23:59:59.999999Z"), Some("last"), Some(6), None)]);
    pipeline.run();
    type Found = (i64, Option<String>, i64, Option<i64>, Option<f64>);
    let found: Vec<Found> = tables
        .query("select epoch_us(window_start), device, events, total, low from {e.minutes} order by 1, 2 nulls first");
    let new_year = 1_767_225_600_000_000;
    let some = |text: &str| Some(text.to_string());
    let expected: Vec<Found> = vec![
        (-62_135_596_800_000_000, some("first"), 1, Some(1), Some(1.5)),
        (-60_000_000, some("before"), 1, Some(2), None),
        (0, some("after"), 1, None, None),
        (new_year, None, 2, Some(7), Some(0.0)),
        (new_year, some("fits"), 2, Some(-1), None),
        (new_year, some("much"), 2, None, None),
    ];
    assert_eq!(found, expected);
    assert_eq!(tables.value::<u64>("select count(*) from {e.rows}"), 12, "rows without event time are rows");
    let dead: Vec<(String, u64)> = tables.query("select reason, count(*) from {e.dead_letters} group by all");
    assert_eq!(dead, [("overflow".to_string(), 3)], "in the minute, in the session and in the day so far");
    type Session = (i64, i64, Option<String>, i64, Option<i64>, Option<f64>);
    let sessions: Vec<Session> = tables.query(
        "select epoch_us(window_start), epoch_us(window_end), device, events, total, low from {e.sessions} \
         order by 1, 3 nulls first",
    );
    let minute = 60_000_000;
    let expected: Vec<Session> = vec![
        (-62_135_596_800_000_000, -62_135_596_800_000_000 + minute, some("first"), 1, Some(1), Some(1.5)),
        (-1, minute - 1, some("before"), 1, Some(2), None),
        (0, minute, some("after"), 1, None, None),
        (new_year, new_year + 2 * minute - 1, None, 2, Some(7), Some(0.0)),
        (new_year + minute / 2, new_year + minute / 60 * 91, some("much"), 2, None, None),
        (new_year + minute / 60 * 32, new_year + minute / 60 * 93, some("fits"), 2, Some(-1), None),
    ];
    assert_eq!(sessions, expected);
    // Early results do not wait, not even those of the last day there is.
    let days: Vec<(i64, i64, Option<i64>)> = tables.query(
        "select epoch_us(window_start), events, total from {e.early} \
         qualify row_number() over (partition by window_start order by revision desc) = 1 order by 1",
    );
    let day = 24 * 60 * minute;
    let expected = vec![
        (-62_135_596_800_000_000, 1, Some(1)),
        (-day, 1, Some(2)),
        (0, 1, None),
        (new_year, 6, None),
        (253_402_300_800_000_000 - day, 1, Some(6)),
    ];
    assert_eq!(days, expected);
    // What is told of it does not stop at the end of the calendar; there it is in milliseconds.
    let told = pipeline.watermark();
    assert_eq!(told["next_windows"][0]["window_start"], "253402300740000", "{told}");
    assert_eq!(told["next_windows"][2]["window_start"], "253402300799999", "{told}");
    // 0.0 / 0.0, twice: NaNs are one group, and the largest number there is.
    let nan: Vec<(i64, bool, bool)> =
        tables.query("select events, isnan(high), isnan(sum_nan) from {e.minutes} where device is null");
    assert_eq!(nan, [(2, true, true)]);
    let groups: Vec<(u64,)> = tables.query("select events from {e.by_nan} where isnan(nan)");
    assert_eq!(groups, [(2,)]);
}

/// One window with a million groups, far beyond the budget, and one group that has nine rows of ten.
#[test]
fn of_sizes() {
    let _turn = turn();
    const ROWS: i64 = 1_000_000;
    let broker = Broker::shared();
    broker.create_topic("edges_sizes", 2, &[]);
    let of_each = r#"
        table = "e.each"
        size = "1 day"
        group_by = ["n"]
        aggregates = { events = "count(*)", xs = "sum(x)" }
    "#;
    let of_hot = r#"
        table = "e.hot"
        size = "1 hour"
        group_by = ["device"]
        aggregates = { events = "count(*)", ns = "sum(n)" }
    "#;
    let row = |n: i64| {
        let (second, minute) = (n % 60, n / 60 % 60);
        let device = if n % 10 == 0 { format!("d{}", n / 10 % 100) } else { "hot".to_string() };
        let text = format!(r#"{{"at":"2026-01-01T00:{minute:02}:{second:02}Z","device":"{device}","n":{n},"x":0.5}}"#);
        Rec { partition: Some((n % 2) as i32), value: Some(text.into_bytes()), ..Rec::default() }
    };
    broker.produce_records("edges_sizes", (0..ROWS).map(row));
    let closing = |partition| Rec { partition: Some(partition), ..record(json!({"at": "2026-01-03T00:00:00Z"})) };
    let mut pipeline = pipeline("edges_sizes", &[of_each, of_hot]);
    pipeline.remove("rows").set("state.memory_budget", "8 MiB").set("source.max_offsets_per_trigger", 300_000);
    pipeline.run();
    broker.produce_records("edges_sizes", [closing(0), closing(1)]);
    pipeline.run();
    let tables = pipeline.tables();
    let each: Vec<(i64, i64, i64, f64)> =
        tables.query("select count(*), count(distinct n), max(events)::bigint, sum(xs) from {e.each}");
    assert_eq!(each, [(ROWS, ROWS, 1, ROWS as f64 / 2.0)]);
    let hot: Vec<(i64, i64)> = tables.query("select events, ns::bigint from {e.hot} where device = 'hot'");
    let all = ROWS * (ROWS - 1) / 2;
    let others = (0..ROWS / 10).map(|n| n * 10).sum::<i64>();
    assert_eq!(hot, [(ROWS / 10 * 9, all - others)]);
    let others: Vec<(i64, i64)> =
        tables.query("select count(*), sum(events)::bigint from {e.hot} where device <> 'hot'");
    assert_eq!(others, [(100, ROWS / 10)]);
}
