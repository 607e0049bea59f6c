//! Nanoseconds per telemetry message from payload to columns, on one core: `cargo bench --bench decode`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use floe::decode::Decoder;
use floe::schema::Schema;
use floe::source::{Chunk, Record};

const MESSAGES: usize = 10_000;
const STATUSES: [&str; 4] = ["online", "offline", "charging", "error"];

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

/// Messages whose members `edit` may change, drop or reorder.
fn chunk(edit: impl Fn(&mut Numbers, &mut Vec<String>)) -> Chunk {
    let mut numbers = Numbers(42);
    let mut chunk = Chunk::default();
    for offset in 0..MESSAGES {
        let mut members = message(&mut numbers);
        edit(&mut numbers, &mut members);
        let text = format!("{{{}}}", members.join(","));
        let begin = chunk.data.len() as u32;
        chunk.data.extend_from_slice(text.as_bytes());
        let value_len = text.len() as u32;
        chunk.records.push(Record { offset: offset as i64, timestamp_ms: 0, begin, key_len: Record::NONE, value_len });
    }
    chunk
}

fn measure(name: &str, decoder: &mut Decoder, chunk: &Chunk) {
    let mut best = Duration::MAX;
    let started = Instant::now();
    let mut rejected = 0;
    while started.elapsed() < Duration::from_secs(2) {
        let begin = Instant::now();
        let decoded = black_box(decoder.decode(black_box(chunk)));
        best = best.min(begin.elapsed());
        rejected = decoded.rejected.len();
    }
    let bytes = chunk.data.len() / MESSAGES;
    let nanos = best.as_nanos() as f64 / MESSAGES as f64;
    println!("{name:28} {nanos:6.0} ns/message  {bytes} bytes  {rejected} of {MESSAGES} refused");
}

fn main() {
    let schema: Arc<Schema> = match Schema::parse(include_str!("../schemas/telemetry.json")) {
        Ok(schema) => schema,
        Err(problems) => return eprintln!("schemas/telemetry.json: {}", problems.join("; ")),
    };
    let mut decoder = Decoder::new(schema);
    let mut run = |name: &str, edit: &dyn Fn(&mut Numbers, &mut Vec<String>)| measure(name, &mut decoder, &chunk(edit));
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
}
