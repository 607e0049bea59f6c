//! The registry is a small HTTP server here, which can be told to fail. The last test, ignored by
//! default, uses a real one, where schemas are registered through the same API.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::support::broker::{Broker, Rec};
use crate::support::check::{each_offset_once, produced};
use crate::support::floe::{Pipeline, free_port};

const READER: &str = r#"{"type": "object", "required": ["device_id", "event_timestamp"], "properties": {
    "device_id": {"type": "string"}, "event_timestamp": {"type": "string", "format": "date-time"},
    "battery_level": {"type": ["number", "null"]}}}"#;
/// As serializers write it: draft-07, and without a column that the reader has.
const FIRST: &str = r#"{"$schema": "http://json-schema.org/draft-07/schema#", "title": "Reading", "type": "object",
    "required": ["device_id"], "properties": {"device_id": {"type": "string", "maxLength": 3},
    "event_timestamp": {"type": "string"}}, "additionalProperties": false}"#;
const SECOND: &str = r#"{"type": "object", "properties": {"device_id": {"type": "string"},
    "event_timestamp": {"type": "string"}, "battery_level": {"type": "number"}, "more": {"type": "integer"}}}"#;

/// Schemas by id behind Confluent's paths.
pub struct Registry {
    pub url: String,
    schemas: Arc<Mutex<BTreeMap<u32, (String, String)>>>,
    broken: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
}

impl Registry {
    pub fn start() -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let registry = Registry {
            url: format!("http://{}", listener.local_addr().unwrap()),
            schemas: Arc::default(),
            broken: Arc::default(),
            requests: Arc::default(),
        };
        let (schemas, broken, requests) =
            (registry.schemas.clone(), registry.broken.clone(), registry.requests.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                requests.fetch_add(1, Ordering::SeqCst);
                let mut stream = stream.unwrap();
                let path = request_path(&mut stream);
                let id = path.strip_prefix("/schemas/ids/").and_then(|id| id.parse().ok());
                let schema = id.and_then(|id: u32| schemas.lock().unwrap().get(&id).cloned());
                let (status, body) = match schema {
                    _ if broken.load(Ordering::SeqCst) => ("503 Service Unavailable", "oops".to_string()),
                    Some((kind, schema)) => ("200 OK", json!({"schemaType": kind, "schema": schema}).to_string()),
                    None if path == "/schemas/types" => ("200 OK", r#"["JSON"]"#.to_string()),
                    None => ("404 Not Found", r#"{"error_code":40403,"message":"Schema not found"}"#.to_string()),
                };
                let length = body.len();
                let _ =
                    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
            }
        });
        registry
    }

    pub fn add(&self, id: u32, kind: &str, schema: &str) {
        self.schemas.lock().unwrap().insert(id, (kind.into(), schema.into()));
    }
}

fn request_path(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => request.extend_from_slice(&buffer[..n]),
        }
    }
    String::from_utf8_lossy(&request).split(' ').nth(1).unwrap_or_default().to_string()
}

pub fn framed(id: u32, document: &str) -> Vec<u8> {
    [&[0], id.to_be_bytes().as_slice(), document.as_bytes()].concat()
}

fn reading(device: &str, more: &str) -> String {
    format!(r#"{{"device_id":"{device}","event_timestamp":"2026-01-01T00:00:00Z"{more}}}"#)
}

/// A topic with these values and a pipeline with the reader's schema.
fn pipeline(broker: &Broker, topic: &str, values: Vec<Vec<u8>>) -> Pipeline {
    broker.create_topic(topic, 1, &[]);
    produce(broker, topic, values);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    let file = pipeline.dir().join("reader.json");
    std::fs::write(&file, READER).unwrap();
    pipeline.set("schema.file", file.to_str().unwrap()).remove("windows");
    pipeline
}

fn produce(broker: &Broker, topic: &str, values: Vec<Vec<u8>>) {
    let record = |value| Rec { key: Some(b"key".to_vec()), value: Some(value), ..Rec::default() };
    broker.produce_records(topic, values.into_iter().map(record).collect::<Vec<_>>());
}

#[test]
fn each_record_is_decoded_by_the_schema_of_its_id() {
    let broker = Broker::shared();
    let topic = "registry";
    let registry = Registry::start();
    registry.add(1, "JSON", FIRST);
    registry.add(70_000, "JSON", SECOND);
    registry.add(3, "AVRO", "\"string\"");
    let values = vec![
        framed(1, &reading("a", "")),
        framed(70_000, &reading("b", r#","battery_level":5.5,"more":1"#)),
        reading("c", r#","battery_level":1"#).into_bytes(),
        framed(1, &reading("long", "")),
        framed(70_000, &reading("d", r#","more":"1""#)),
        framed(70_000, r#"{"device_id":"e"}"#),
        framed(3, "\u{2}x"),
        framed(4, &reading("f", "")),
        framed(1, "{"),
    ];
    let payload = values[7].clone();
    let mut pipeline = pipeline(broker, topic, values);
    pipeline.set("schema.registry", registry.url.as_str());
    pipeline.check().expect_code(0).expect_output(&["schema 3 is AVRO", "schema 4 is unknown"]);
    pipeline.run();
    let tables = pipeline.tables();
    each_offset_once(&tables, topic, &produced(broker, topic, 1));
    let rows: Vec<(String, Option<f64>)> =
        tables.query("select device_id, battery_level from {telemetry.events} order by 1");
    assert_eq!(rows, [("a".to_string(), None), ("b".to_string(), Some(5.5)), ("c".to_string(), Some(1.0))]);
    let dead: Vec<(i64, String, String)> =
        tables.query("select \"offset\", reason, path from {telemetry.dead_letters} order by 1");
    let expected = [
        (3, "bad_length", "$.device_id"),
        (4, "wrong_type", "$.more"),
        (5, "missing_field", "$.event_timestamp"),
        (6, "unsupported_schema", "$"),
        (7, "unknown_schema_id", "$"),
        (8, "malformed_json", "$"),
    ];
    assert_eq!(dead, expected.map(|(offset, reason, path)| (offset, reason.to_string(), path.to_string())));
    let stored: String = tables.value("select hex(payload) from {telemetry.dead_letters} where \"offset\" = 7");
    let hex: String = payload.iter().map(|b| format!("{b:02X}")).collect();
    assert_eq!(stored, hex, "kept as it came, framing included");
}

/// The schema registered between two records is learned while the process runs; what is known is not asked for again.
#[test]
fn an_outage_costs_time_and_no_record() {
    let broker = Broker::shared();
    let topic = "registry_outage";
    let registry = Registry::start();
    registry.add(1, "JSON", FIRST);
    registry.broken.store(true, Ordering::SeqCst);
    let mut pipeline = pipeline(broker, topic, (0..100).map(|_| framed(1, &reading("a", ""))).collect());
    pipeline.service("100 ms").set("schema.registry", registry.url.as_str());
    let mut floe = pipeline.spawn();
    floe.until("several attempts have failed", |_| (registry.requests.load(Ordering::SeqCst) > 3).then_some(()));
    registry.broken.store(false, Ordering::SeqCst);
    let tables = pipeline.tables();
    crate::support::check::until_in_tables(&mut floe, &tables, 100);
    // The registry may go away again: what is known is enough, and a new id waits.
    registry.broken.store(true, Ordering::SeqCst);
    produce(broker, topic, vec![framed(1, &reading("b", ""))]);
    crate::support::check::until_in_tables(&mut floe, &tables, 101);
    produce(broker, topic, vec![framed(2, &reading("c", ""))]);
    thread::sleep(Duration::from_secs(1));
    registry.add(2, "JSON", SECOND);
    registry.broken.store(false, Ordering::SeqCst);
    crate::support::check::until_in_tables(&mut floe, &tables, 102);
    assert_eq!(tables.value::<u64>("select count(*) from {telemetry.dead_letters}"), 0);
    each_offset_once(&tables, topic, &produced(broker, topic, 1));
}

/// Killed when the tables have the batch and the checkpoint does not say so yet; then the schema is registered. The replay holds to
/// what the tables have: a record is a dead letter or a row and in its window, never both.
#[test]
fn an_id_that_becomes_known_changes_nothing_about_a_batch_in_the_tables() {
    let broker = Broker::shared();
    let topic = "registry_known_later";
    let registry = Registry::start();
    registry.add(1, "JSON", FIRST);
    let mut pipeline = pipeline(broker, topic, vec![framed(1, &reading("a", "")), framed(2, &reading("b", ""))]);
    pipeline.set("schema.registry", registry.url.as_str());
    pipeline.run_failing("commit_log.before_put:kill").expect_killed();
    registry.add(2, "JSON", SECOND);
    // Also without windows the account of the batch has to be that of its tables.
    pipeline.run();
    produce(broker, topic, vec![framed(2, &reading("c", ""))]);
    pipeline.run();
    let tables = pipeline.tables();
    each_offset_once(&tables, topic, &produced(broker, topic, 1));
    let rows: Vec<(String,)> = tables.query("select device_id from {telemetry.events} order by 1");
    assert_eq!(rows, [("a".to_string(),), ("c".to_string(),)]);
    assert_eq!(tables.value::<i64>("select \"offset\" from {telemetry.dead_letters}"), 1);
    let commit = std::fs::read_dir(pipeline.checkpoint().join("commits")).unwrap().flatten();
    let mut commits: Vec<_> = commit.map(|entry| entry.path()).collect();
    commits.sort();
    let first = std::fs::read_to_string(&commits[0]).unwrap();
    assert!(first.contains("unknown_schema_id"), "the replay's account: {first}");
}

#[test]
fn without_a_registry_check_says_so_before_a_million_dead_letters_do() {
    let broker = Broker::shared();
    let topic = "registry_missing";
    let pipeline = pipeline(broker, topic, vec![framed(1, &reading("a", "")), framed(258, &reading("b", ""))]);
    let ended = pipeline.check().expect_output(&["with a schema id in front: 1, 258", "schema.registry"]);
    assert_ne!(ended.code(), Some(0), "{}", ended.output);
    pipeline.run();
    let dead: Vec<(String, String)> = pipeline.tables().query("select reason, message from {telemetry.dead_letters}");
    assert_eq!(dead.len(), 2);
    assert!(
        dead.iter().all(|(reason, message)| reason == "schema_registry_framing" && message.contains("schema.registry"))
    );
}

#[test]
fn a_registry_out_of_reach_is_named_without_its_password() {
    let broker = Broker::shared();
    let topic = "registry_away";
    let mut pipeline = pipeline(broker, topic, vec![framed(1, &reading("a", ""))]);
    let address = format!("127.0.0.1:{}", free_port());
    pipeline.set("schema.registry", format!("http://floe:hunter2@{address}/path"));
    let ended = pipeline.check().expect_output(&[&address]);
    assert!(ended.code() != Some(0) && !ended.output.contains("hunter2"), "{}", ended.output);
}

/// `FLOE_TEST_REGISTRY=http://host:port/apis/ccompat/v7 cargo test --test it registry::a_real -- --ignored`
#[test]
#[ignore = "needs a real registry"]
fn a_real_registry() {
    let url = std::env::var("FLOE_TEST_REGISTRY").expect("FLOE_TEST_REGISTRY");
    let id = |subject: &str, schema: &str| -> u32 {
        let body = json!({"schemaType": "JSON", "schema": schema}).to_string();
        let answer = post(&format!("{url}/subjects/{subject}/versions"), &body);
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"));
        answer["id"].as_u64().unwrap_or_else(|| panic!("{answer}")) as u32
    };
    let (first, second) = (id("first-value", FIRST), id("second-value", SECOND));
    let broker = Broker::shared();
    let values = vec![
        framed(first, &reading("a", "")),
        framed(second, &reading("b", r#","battery_level":5.5"#)),
        framed(first, &reading("long", "")),
        framed(1_000_000, &reading("c", "")),
    ];
    let mut pipeline = pipeline(broker, "registry_real", values);
    pipeline.set("schema.registry", url.as_str());
    pipeline.check().expect_code(0).expect_output(&["schema 1000000 is unknown"]);
    pipeline.run();
    let tables = pipeline.tables();
    let rows: Vec<(String,)> = tables.query("select device_id from {telemetry.events} order by 1");
    assert_eq!(rows, [("a".to_string(),), ("b".to_string(),)]);
    let dead: Vec<(i64, String)> = tables.query("select \"offset\", reason from {telemetry.dead_letters} order by 1");
    assert_eq!(dead, [(2, "bad_length".to_string()), (3, "unknown_schema_id".to_string())]);
}

fn post(url: &str, body: &str) -> String {
    let rest = url.strip_prefix("http://").expect("http");
    let (address, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").map_or(answer.clone(), |(_, body)| body.to_string())
}
