//! From payload to columns, on one core: `cargo bench --bench decode`. Times are of [`MESSAGES`] telemetry messages; the
//! throughput is in messages a second, so that 5 Melem/s are 200 ns a message.

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use floe::config::RegistryConfig;
use floe::decode::registry::{BatchRegistry, Registry};
use floe::decode::{Decoder, RecordDecoder, time};
use floe::schema::Schema;
use floe::source::Chunk;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

/// The service's: the columns of 10,000 messages are given back and taken again, which another allocator lets the kernel pay for.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MESSAGES: usize = 10_000;
const STATUSES: [&str; 4] = ["online", "offline", "charging", "error"];
const TELEMETRY: &str = include_str!("../schemas/telemetry.json");
/// The same columns, without a keyword that says what their values may be.
const UNCONSTRAINED: &str = r#"{"type": "object", "required": ["device_id", "event_timestamp"], "properties": {
    "device_id": {"type": "string"}, "event_timestamp": {"type": "string", "format": "date-time"},
    "battery_level": {"type": ["number", "null"]}, "signal_strength": {"type": ["number", "null"]},
    "latitude": {"type": ["number", "null"]}, "longitude": {"type": ["number", "null"]},
    "duration_ms": {"type": ["integer", "null"]}, "status": {"type": ["string", "null"]}}}"#;

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn message(n: &mut Numbers) -> Vec<String> {
    vec![
        format!(r#""device_id":"device-{:06}""#, n.below(100_000)),
        format!(r#""event_timestamp":"2026-11-20T12:{:02}:{:02}.{:03}Z""#, n.below(60), n.below(60), n.below(1000)),
        format!(r#""battery_level":{}.{}"#, n.below(100), n.below(10)),
        format!(r#""signal_strength":-{}"#, n.below(150)),
        format!(r#""latitude":{}.{:06}"#, n.below(90), n.below(1_000_000)),
        format!(r#""longitude":-{}.{:06}"#, n.below(180), n.below(1_000_000)),
        format!(r#""duration_ms":{}"#, n.below(100_000)),
        format!(r#""status":"{}""#, STATUSES[n.below(4) as usize]),
    ]
}

/// Messages behind `prefix` whose members `edit` may change, drop or reorder.
fn chunk(prefix: &[u8], edit: impl Fn(&mut Numbers, &mut Vec<String>)) -> Chunk {
    let mut numbers = Numbers(42);
    let mut chunk = Chunk::default();
    for offset in 0..MESSAGES as i64 {
        let mut members = message(&mut numbers);
        edit(&mut numbers, &mut members);
        let value = [prefix, format!("{{{}}}", members.join(",")).as_bytes()].concat();
        chunk.push(offset, None, None, Some(&value), None);
    }
    chunk
}

fn schema(text: &str) -> Arc<Schema> {
    Schema::parse(text).unwrap_or_else(|problems| unreachable!("{}", problems.join("; ")))
}

/// How the members of the messages differ from one to the next.
fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(MESSAGES as u64));
    let mut decoder = Decoder::new(schema(TELEMETRY));
    let mut run = |name: &str, edit: &dyn Fn(&mut Numbers, &mut Vec<String>)| {
        let chunk = chunk(b"", edit);
        group.bench_function(name, |b| b.iter(|| decoder.decode(black_box(&chunk))));
    };
    run("as the schema orders it", &|_, _| {});
    run("another, constant order", &|_, members| members.reverse());
    run("any order", &|n, members| (0..8).for_each(|i| members.swap(i, n.below(8) as usize)));
    run("one member left out", &|n, members| {
        members.remove(2 + n.below(6) as usize);
    });
    run("two unknown members", &|_, members| {
        members.insert(1, r#""firmware":"1.2.3""#.to_owned());
        members.push(r#""tags":["a",{"b":1}]"#.to_owned());
    });
    run("0.5% out of range", &|n, members| {
        if n.below(200) == 0 {
            members[2] = r#""battery_level":500"#.to_owned();
        }
    });
    group.finish();
}

/// The same messages by other ways: what the checks of the schema cost, the registry's framing, and serde_json.
fn ways(c: &mut Criterion) {
    let mut group = c.benchmark_group("ways");
    group.throughput(Throughput::Elements(MESSAGES as u64));
    let plain = chunk(b"", |_, _| {});
    for (name, text) in [("constraints", TELEMETRY), ("no constraints", UNCONSTRAINED)] {
        let mut decoder = Decoder::new(schema(text));
        group.bench_with_input(BenchmarkId::from_parameter(name), &plain, |b, chunk| b.iter(|| decoder.decode(chunk)));
    }
    group.bench_with_input(BenchmarkId::from_parameter("serde_json"), &plain, |b, chunk| {
        b.iter(|| {
            let mut columns = Columns::default();
            let valid = (0..chunk.records.len())
                .filter(|&record| {
                    let payload = chunk.value(record).unwrap_or_default();
                    let mut deserializer = serde_json::Deserializer::from_slice(payload);
                    columns.deserialize(&mut deserializer).is_ok() && deserializer.end().is_ok()
                })
                .count();
            assert_eq!(valid, MESSAGES);
            columns
        });
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.unwrap_or_else(|e| unreachable!("{e}"));
    let registry = runtime.block_on(async { Registry::new(&serve(TELEMETRY)) });
    let registry = registry.unwrap_or_else(|e| unreachable!("{e}"));
    let registry = BatchRegistry::new(Arc::new(registry), None);
    let mut decoder = RecordDecoder::new(schema(TELEMETRY), Some(Arc::new(registry)));
    let mut framed = chunk(&[0, 0, 0, 0, 7], |_, _| {});
    group.bench_function("registry", |b| b.iter(|| decoder.decode(&mut framed).map(|d| d.records.len()).ok()));
    group.finish();
}

/// A registry that has one schema, under every id.
fn serve(document: &'static str) -> RegistryConfig {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| unreachable!("{e}"));
    let address = listener.local_addr().map(|a| a.to_string()).unwrap_or_default();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let body = serde_json::json!({"schemaType": "JSON", "schema": document}).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all((head + &body).as_bytes());
        }
    });
    let url = url::Url::parse(&format!("http://{address}/")).unwrap_or_else(|e| unreachable!("{e}"));
    RegistryConfig { url, credentials: None }
}

/// What serde_json's own parser takes for the same columns, checked alike, with nothing in between: the least that any
/// decoder on top of it can cost.
#[derive(Default)]
struct Columns {
    seen: [bool; 8],
    device_ids: Texts,
    event_timestamps: Vec<i64>,
    numbers: [Vec<Option<f64>>; 4],
    durations: Vec<Option<i64>>,
    statuses: Texts,
}

#[derive(Default)]
struct Texts {
    ends: Vec<usize>,
    text: String,
}

impl Texts {
    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }
}

impl<'de> DeserializeSeed<'de> for &mut Columns {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Columns {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        const RANGES: [(f64, f64); 4] = [(0.0, 100.0), (-150.0, 0.0), (-90.0, 90.0), (-180.0, 180.0)];
        let refused = || de::Error::custom("refused");
        self.seen = [false; 8];
        while let Some(key) = members.next_key::<&str>()? {
            let index = match key {
                "device_id" => 0,
                "event_timestamp" => 1,
                "battery_level" => 2,
                "signal_strength" => 3,
                "latitude" => 4,
                "longitude" => 5,
                "duration_ms" => 6,
                "status" => 7,
                _ => {
                    members.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if std::mem::replace(&mut self.seen[index], true) {
                return Err(refused());
            }
            match index {
                0 => {
                    let text = members.next_value::<&str>()?;
                    if text.is_empty() {
                        return Err(refused());
                    }
                    self.device_ids.push(text);
                }
                1 => {
                    let text = members.next_value::<&str>()?;
                    self.event_timestamps.push(time::date_time(text.as_bytes()).ok_or_else(refused)?);
                }
                2..6 => {
                    let (number, (min, max)) = (members.next_value::<Option<f64>>()?, RANGES[index - 2]);
                    if number.is_some_and(|n| n < min || n > max) {
                        return Err(refused());
                    }
                    self.numbers[index - 2].push(number);
                }
                6 => {
                    let number = members.next_value::<Option<i64>>()?;
                    if number.is_some_and(|n| n < 0) {
                        return Err(refused());
                    }
                    self.durations.push(number);
                }
                _ => {
                    let text = members.next_value::<&str>()?;
                    if !["online", "offline", "charging", "idle", "error", "test"].contains(&text) {
                        return Err(refused());
                    }
                    self.statuses.push(text);
                }
            }
        }
        if self.seen == [true; 8] { Ok(()) } else { Err(refused()) }
    }
}

criterion_group!(benches, decode, ways);
criterion_main!(benches);
