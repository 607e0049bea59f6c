use serde_json::json;

use crate::support::reader::Tables;
use crate::support::telemetry::{Invalid, START_MS, Telemetry, timestamp};

#[test]
fn messages_are_about_190_bytes_and_the_same_every_time() {
    let telemetry = Telemetry { invalid_per_mille: 5, ..Telemetry::default() };
    let mut buffer = Vec::new();
    let mut bytes = 0;
    for index in 0..telemetry.messages {
        let reading = telemetry.reading(index);
        let value = reading.value(&mut buffer).map(<[u8]>::to_vec);
        bytes += value.as_ref().map_or(0, Vec::len);
        assert_eq!(value.as_deref(), telemetry.reading(index).value(&mut buffer));
        if reading.invalid.is_none() {
            let json: serde_json::Value = serde_json::from_slice(&value.unwrap()).unwrap();
            assert_eq!(json["battery_level"], reading.battery as f64 / 4.0);
            assert_eq!(json["duration_ms"], reading.duration_ms);
            let at: jiff::Timestamp = json["event_timestamp"].as_str().unwrap().parse().unwrap();
            assert_eq!(at.as_millisecond(), reading.event_ms);
        }
    }
    let mean = bytes as u64 / telemetry.messages;
    assert!((180..=200).contains(&mean), "{mean} bytes");
}

#[test]
fn timestamps_are_right_on_every_day() {
    for day in -1_000..40_000_i64 {
        let ms = day * 86_400_000 + (day.rem_euclid(86_400)) * 1000 + 7;
        let mut text = Vec::new();
        timestamp(&mut text, ms);
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.parse::<jiff::Timestamp>().unwrap().as_millisecond(), ms, "{text}");
    }
}

#[test]
fn the_truth_adds_up() {
    let telemetry = Telemetry::default();
    let truth = telemetry.truth();
    assert_eq!(truth.valid + truth.dead_letters(), telemetry.messages);
    assert_eq!(truth.windows.values().map(|w| w.events as u64).sum::<u64>(), truth.valid);
    let reasons: std::collections::BTreeSet<_> = Invalid::ALL.iter().map(|i| i.reason()).collect();
    assert_eq!(truth.dead.keys().map(String::as_str).collect::<std::collections::BTreeSet<_>>(), reasons);
    assert!(truth.closed(120_000).keys().all(|(start, _)| start + 60_000 <= START_MS + telemetry.span_ms - 120_000));
}

#[test]
fn readers_read_what_pyiceberg_has_written() {
    let dir = tempfile::tempdir().unwrap();
    let tables = Tables::new(dir.path().join("catalog.db"));
    std::fs::create_dir(dir.path().join("warehouse")).unwrap();
    tables.write("a.b", &json!([{"n": 1, "s": "x"}, {"n": 2, "s": "y"}]));
    tables.write("a.b", &json!([{"n": 3, "s": "z"}]));
    let rows: Vec<(i64, String)> = tables.query("select n, s from {a.b} order by n");
    assert_eq!(rows, [(1, "x".into()), (2, "y".into()), (3, "z".into())]);
    let before = tables.table("a.b");
    assert_eq!((before.rows, before.snapshots.len()), (Some(3), 2));

    tables.recreate("a.b");
    assert_ne!(tables.table("a.b").uuid, before.uuid);
    assert_eq!(tables.value::<i64>("select count(*) from {a.b}"), 0, "a table without a snapshot");
    assert!(tables.try_query::<(i64,)>("select * from {a.missing}").unwrap_err().contains("NoSuchTable"));
}
