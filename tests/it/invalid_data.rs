use std::collections::BTreeMap;

use crate::support::broker::{Broker, Rec};
use crate::support::check::{each_offset_once, produced};
use crate::support::floe::Pipeline;
use crate::support::turn;

const DEVICE: &str = r#""device_id":"d","#;
const TIME: &str = r#""event_timestamp":"2026-01-01T00:00:00Z""#;

/// A valid message with more fields.
fn with(fields: &str) -> Vec<u8> {
    format!("{{{DEVICE}{TIME},{fields}}}").into_bytes()
}

fn text(text: &str) -> Option<Vec<u8>> {
    Some(text.as_bytes().to_vec())
}

/// What is refused, why, and where in the document.
fn refused() -> Vec<(Option<Vec<u8>>, &'static str, &'static str)> {
    let time = |value: &str| text(&format!(r#"{{{DEVICE}"event_timestamp":{value}}}"#));
    let mut cases = vec![
        (None, "null_value", "$"),
        (text(""), "empty", "$"),
        // Not JSON.
        (text("{"), "malformed_json", "$"),
        (text("nonsense"), "malformed_json", "$"),
        (Some(with(r#""battery_level":NaN"#)), "malformed_json", "$"),
        (Some(with(r#""battery_level":01"#)), "malformed_json", "$"),
        (Some(with(r#""battery_level":1,"#)), "malformed_json", "$"),
        (Some(with("\"status\":\"a\nb\"")), "malformed_json", "$"),
        (Some(with(r#""other":"\ud800""#)), "malformed_json", "$"),
        (Some([with(r#""battery_level":1"#), b" x".to_vec()].concat()), "malformed_json", "$"),
        (Some([b"\xef\xbb\xbf".to_vec(), with(r#""battery_level":1"#)].concat()), "malformed_json", "$"),
        (Some(vec![b'x'; 1_000_000]), "malformed_json", "$"),
        (Some(b"\xff\xfe\x00\x01".to_vec()), "invalid_utf8", "$"),
        (Some([br#"{"device_id":""#.as_slice(), b"\xed\xa0\x80\"}"].concat()), "invalid_utf8", "$"),
        (Some([vec![b'['; 10_000], vec![b']'; 10_000]].concat()), "too_deep", "$"),
        (Some(with(&format!("\"other\":{}{}", "[".repeat(10_000), "]".repeat(10_000)))), "too_deep", "$"),
        (Some(with(&format!("\"other\":{}1{}", r#"{"a":"#.repeat(10_000), "}".repeat(10_000)))), "too_deep", "$"),
        (Some(with(r#""battery_level":1,"battery_level":2"#)), "duplicate_key", "$.battery_level"),
        (Some(with(r#""battery_level":1,"battery\u005flevel":1"#)), "duplicate_key", "$.battery_level"),
        // Not an object.
        (text("[]"), "not_an_object", "$"),
        (text("null"), "not_an_object", "$"),
        (text("1"), "not_an_object", "$"),
        (text("\"text\""), "not_an_object", "$"),
        // Missing.
        (text("{}"), "missing_field", "$.device_id"),
        (text(&format!("{{{TIME}}}")), "missing_field", "$.device_id"),
        (text(r#"{"device_id":"d"}"#), "missing_field", "$.event_timestamp"),
        (text(&format!(r#"{{"Device_id":"d",{TIME}}}"#)), "missing_field", "$.device_id"),
        // Of the wrong type.
        (text(&format!(r#"{{"device_id":null,{TIME}}}"#)), "wrong_type", "$.device_id"),
        (text(&format!(r#"{{"device_id":5,{TIME}}}"#)), "wrong_type", "$.device_id"),
        (text(&format!(r#"{{"device_id":{{}},{TIME}}}"#)), "wrong_type", "$.device_id"),
        (time("1767225600"), "wrong_type", "$.event_timestamp"),
        (Some(with(r#""battery_level":"50""#)), "wrong_type", "$.battery_level"),
        (Some(with(r#""battery_level":true"#)), "wrong_type", "$.battery_level"),
        (Some(with(r#""battery_level":[50]"#)), "wrong_type", "$.battery_level"),
        (Some(with(r#""duration_ms":5.5"#)), "wrong_type", "$.duration_ms"),
        (Some(with(r#""status":1"#)), "wrong_type", "$.status"),
        // Numbers that do not fit.
        (Some(with(r#""battery_level":1e400"#)), "number_out_of_range", "$.battery_level"),
        (Some(with(r#""duration_ms":9223372036854775808"#)), "number_out_of_range", "$.duration_ms"),
        // Out of the schema's ranges.
        (Some(with(r#""battery_level":-0.1"#)), "out_of_range", "$.battery_level"),
        (Some(with(r#""battery_level":100.00000000000001"#)), "out_of_range", "$.battery_level"),
        (Some(with(r#""signal_strength":-150.5"#)), "out_of_range", "$.signal_strength"),
        (Some(with(r#""signal_strength":0.5"#)), "out_of_range", "$.signal_strength"),
        (Some(with(r#""latitude":90.5"#)), "out_of_range", "$.latitude"),
        (Some(with(r#""longitude":-180.5"#)), "out_of_range", "$.longitude"),
        (Some(with(r#""duration_ms":-1"#)), "out_of_range", "$.duration_ms"),
        (Some(with(r#""status":"ONLINE""#)), "not_in_enum", "$.status"),
        (text(&format!(r#"{{"device_id":"",{TIME}}}"#)), "bad_length", "$.device_id"),
        // A megabyte, well-formed, and still not one of ours.
        (text(&format!(r#"{{"device_id":"{}"}}"#, "x".repeat(1_000_000))), "missing_field", "$.event_timestamp"),
    ];
    for value in [
        "\"\"",
        "\"yesterday\"",
        "\"2026-01-01\"",
        "\"2026-01-01T00:00:00\"",
        "\"2026-13-01T00:00:00Z\"",
        "\"2026-02-30T00:00:00Z\"",
        "\"2026-01-01T25:00:00Z\"",
        "\"2026-01-01T00:00:00Zx\"",
    ] {
        cases.push((time(value), "bad_format", "$.event_timestamp"));
    }
    cases
}

/// Unusual, and valid.
fn accepted() -> Vec<Vec<u8>> {
    let mut valid: Vec<Vec<u8>> = [
        r#""battery_level":0"#,
        r#""battery_level":100.0"#,
        r#""battery_level":1e2"#,
        r#""battery_level":null,"signal_strength":null,"duration_ms":null,"status":null"#,
        r#""signal_strength":-150,"latitude":-90,"longitude":180"#,
        r#""duration_ms":9223372036854775807"#,
        r#""status":"\u006fnline""#,
        r#""other":{"nested":[1,2,{"a":null}]},"another":1e400"#,
    ]
    .map(with)
    .into();
    valid.push(format!("  {{\n{DEVICE}\t{TIME}\r\n}} \n").into_bytes());
    valid.push(format!(r#"{{"device_id":"{}",{TIME}}}"#, "\u{1f6f0}".repeat(1_000)).into_bytes());
    valid.push(format!(r#"{{{DEVICE}"event_timestamp":"2026-01-01T02:00:00.123456+02:00"}}"#).into_bytes());
    valid.push(with(&format!("\"other\":\"{}\"", "x".repeat(1_000_000))));
    valid
}

#[test]
fn every_kind_becomes_a_dead_letter_with_its_reason() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "invalid_data";
    broker.create_topic(topic, 1, &[("max.message.bytes", "10000000"), ("retention.ms", "-1")]);
    let (refused, accepted) = (refused(), accepted());
    // Mixed, so that every dead letter has rows around it.
    let mut records = Vec::new();
    let mut expected: BTreeMap<i64, usize> = BTreeMap::new();
    for index in 0..refused.len().max(accepted.len()) {
        if let Some(value) = accepted.get(index) {
            records.push(Rec { partition: Some(0), value: Some(value.clone()), ..Rec::default() });
        }
        if let Some((value, _, _)) = refused.get(index) {
            expected.insert(records.len() as i64, index);
            records.push(Rec {
                partition: Some(0),
                key: Some(format!("key {index}").into_bytes()),
                value: value.clone(),
                timestamp_ms: Some(1_767_225_600_000 + index as i64),
                headers: vec![("trace".into(), Some(vec![index as u8, 0xff])), ("empty".into(), None)],
            });
        }
    }
    broker.produce_records(topic, records.clone());
    let pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.run();

    let tables = pipeline.tables();
    each_offset_once(&tables, topic, &produced(broker, topic, 1));
    let rows: u64 = tables.value("select count(*) from {telemetry.events}");
    assert_eq!(rows, accepted.len() as u64);

    type DeadLetter = (i64, String, String, String, Option<String>, String, i64, i64);
    let dead: Vec<DeadLetter> = tables.query(
        "select \"offset\", reason, path, message, hex(payload[:1000]), key::varchar, epoch_ms(timestamp), batch_id \
         from {telemetry.dead_letters} order by \"offset\"",
    );
    let mut wrong = Vec::new();
    for (offset, reason, path, message, payload, key, timestamp, batch) in dead {
        let index = *expected.get(&offset).unwrap_or_else(|| {
            let value = &records[offset as usize].value.as_deref().unwrap_or_default();
            panic!(
                "refused although valid, {reason}: {message}: {}",
                String::from_utf8_lossy(&value[..value.len().min(200)])
            )
        });
        let (value, expected_reason, expected_path) = &refused[index];
        // Where in a broken document the path points is a matter of taste; in a document that can be read it is not.
        let same_path = path == *expected_path || (*expected_path == "$" && path.starts_with('$'));
        if reason != *expected_reason || !same_path || message.is_empty() {
            let shown = value.as_ref().map(|v| String::from_utf8_lossy(&v[..v.len().min(120)]).into_owned());
            wrong.push(format!(
                "{reason} at {path} ({message}), expected {expected_reason} at {expected_path}: {shown:?}"
            ));
        }
        assert_eq!(key, format!("key {index}"));
        assert_eq!(timestamp, 1_767_225_600_000 + index as i64);
        assert_eq!(batch, 0);
        let stored = value.as_ref().map(|v| hex(&v[..v.len().min(1_000)]));
        assert_eq!(payload, stored, "the payload of {reason} is kept as it came");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let lengths: Vec<(i64, i64)> = tables.query(
        "select \"offset\", octet_length(payload) from {telemetry.dead_letters} where payload is not null order by 1",
    );
    for (offset, length) in lengths {
        assert_eq!(length as usize, records[offset as usize].value.as_ref().map_or(0, Vec::len), "offset {offset}");
    }
    let headers: String =
        tables.value("select to_json(headers)::varchar from {telemetry.dead_letters} order by \"offset\" limit 1");
    assert!(headers.contains("trace") && headers.contains("empty"), "{headers}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02X}")).collect()
}

/// A topic of nothing but garbage is drained like any other.
#[test]
fn nothing_but_garbage() {
    let broker = Broker::shared();
    let topic = "garbage";
    broker.create_topic(topic, 2, &[]);
    let mut random = 7u64;
    let garbage: Vec<Rec> = (0..2_000)
        .map(|index| {
            let bytes = (0..index % 97).map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (random >> 56) as u8
            });
            Rec { partition: Some(index % 2), value: Some(bytes.collect()), ..Rec::default() }
        })
        .collect();
    broker.produce_records(topic, garbage);
    let pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.run();
    each_offset_once(&pipeline.tables(), topic, &produced(broker, topic, 2));
}

/// A clock that is wrong by years does not drag the watermark along.
#[test]
fn timestamps_from_the_future() {
    let broker = Broker::shared();
    let topic = "future";
    broker.create_topic(topic, 1, &[]);
    let message = |time: &str| format!(r#"{{{DEVICE}"event_timestamp":"{time}"}}"#);
    broker.produce(topic, Some(0), None, [message("2026-01-01T00:00:00Z"), message("2999-01-01T00:00:00Z")]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("event_time.max_future", "1 hour");
    pipeline.run();
    broker.produce(topic, Some(0), None, [message("2026-01-01T00:00:30Z"), message("2026-01-01T00:05:00Z")]);
    pipeline.run();
    let tables = pipeline.tables();
    let dead: Vec<(i64, String)> = tables.query("select \"offset\", reason from {telemetry.dead_letters}");
    assert_eq!(dead, [(1, "future_event_time".to_string())]);
    let windows: Vec<(i64, i64)> =
        tables.query("select epoch_ms(window_start), events from {telemetry.device_minutes}");
    assert_eq!(windows, [(1_767_225_600_000, 2)]);
}
