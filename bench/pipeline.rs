//! The whole pipeline against a real broker; `bench/run` says what it measures and how to run it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use support::broker::{Broker, Options};
use support::floe::{Pipeline, shown};
use support::telemetry::{Invalid, MINUTE_MS, Telemetry};

const TOPIC: &str = "telemetry";
const DELAY_MS: i64 = 10 * MINUTE_MS;

fn main() {
    let argument = std::env::args().skip(1).find(|a| !a.starts_with("--")).map(|a| a.replace('_', ""));
    let messages = argument.map_or(5_000_000, |a| a.parse().expect("the number of messages"));
    let telemetry = Telemetry {
        seed: 42,
        messages,
        devices: 100_000,
        partitions: 8,
        span_ms: 30 * MINUTE_MS,
        disorder_ms: 30_000,
        invalid_per_mille: 5,
        invalid: Invalid::ALL,
        ..Telemetry::default()
    };
    let modes = std::env::var("FLOE_BENCH_MODES").unwrap_or("rows,windows,both".into());
    let rounds = std::env::var("FLOE_BENCH_ROUNDS").map_or(1, |r| r.parse().expect("FLOE_BENCH_ROUNDS"));

    // The readers first: what they need is installed before anything is measured.
    support::reader::python();
    let broker = Broker::start_options(Options { heap: "1g".into(), quick_start: false, ..Options::default() });
    let from = Instant::now();
    let (bytes, truth) = fill(&broker, &telemetry);
    eprintln!(
        "{messages} messages of {} bytes in 8 partitions, {} valid, {} (device, minute) windows; filled in {:.0?}",
        bytes / messages.max(1),
        truth.valid,
        truth.windows.len(),
        from.elapsed()
    );
    println!("{:<8} {:>10} {:>10} {:>16} {:>10}   checked", "mode", "seconds", "msg/s", "CPU s / million", "peak MiB");
    for mode in modes.split(',') {
        for _ in 0..rounds {
            measure(&broker, mode, messages, &truth);
        }
    }
}

/// The sums that the tables have to show.
#[derive(Default)]
struct Truth {
    valid: u64,
    dead: u64,
    duration_sum: i64,
    battery_sum: i64,
    max_event_ms: i64,
    /// By start of the window and device: events, sum of durations, sum of batteries in quarters.
    windows: HashMap<(i64, u64), (i64, i64, i64)>,
}

/// Fills the topic from several threads, each the owner of some partitions so that their order is the stream's, while
/// another thread works out the truth.
fn fill(broker: &Broker, telemetry: &Telemetry) -> (u64, Truth) {
    broker.create_topic(TOPIC, telemetry.partitions, &[("retention.ms", "-1")]);
    thread::scope(|scope| {
        let fillers: Vec<_> =
            (0..2).map(|filler| scope.spawn(move || fill_partitions(broker, telemetry, filler, 2))).collect();
        let mut truth = Truth::default();
        for index in 0..telemetry.messages {
            let reading = telemetry.reading(index);
            if reading.invalid.is_some() {
                truth.dead += 1;
                continue;
            }
            truth.valid += 1;
            truth.duration_sum += reading.duration_ms;
            truth.battery_sum += reading.battery;
            truth.max_event_ms = truth.max_event_ms.max(reading.event_ms);
            let start = reading.event_ms.div_euclid(MINUTE_MS) * MINUTE_MS;
            let window = truth.windows.entry((start, reading.device)).or_default();
            window.0 += 1;
            window.1 += reading.duration_ms;
            window.2 += reading.battery;
        }
        (fillers.into_iter().map(|f| f.join().expect("filler")).sum(), truth)
    })
}

fn fill_partitions(broker: &Broker, telemetry: &Telemetry, filler: i32, fillers: i32) -> u64 {
    let producer: ThreadedProducer<DefaultProducerContext> = broker
        .client_config()
        .set("acks", "1")
        .set("linger.ms", "20")
        .set("batch.size", "262144")
        .set("queue.buffering.max.messages", "500000")
        // The order within a partition is part of the workload.
        .set("max.in.flight.requests.per.connection", "1")
        .create()
        .expect("producer");
    let mut buffer = Vec::new();
    let mut bytes = 0;
    for index in 0..telemetry.messages {
        let reading = telemetry.reading(index);
        let partition = telemetry.partition(&reading);
        if partition % fillers != filler {
            continue;
        }
        let key = reading.device_id();
        let value = reading.value(&mut buffer);
        bytes += value.map_or(0, |v| v.len() as u64);
        let mut record: BaseRecord<'_, str, [u8]> = BaseRecord::to(TOPIC).partition(partition).key(&key);
        record.payload = value;
        while let Err((error, again)) = producer.send(record) {
            assert_eq!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
            thread::sleep(Duration::from_millis(2));
            record = again;
        }
    }
    producer.flush(Duration::from_secs(120)).expect("flush");
    bytes
}

fn measure(broker: &Broker, mode: &str, messages: u64, truth: &Truth) {
    let mut pipeline = Pipeline::new(&broker.bootstrap, TOPIC);
    pipeline.set("event_time.watermark_delay", "10 minutes");
    let (rows, windows) = match mode {
        "rows" => (true, false),
        "windows" => (false, true),
        "both" => (true, true),
        other => panic!("unknown mode {other}: rows, windows or both"),
    };
    if !rows {
        pipeline.remove("rows");
    }
    if !windows {
        pipeline.remove("windows").remove("event_time");
    }
    if let Ok(batch) = std::env::var("FLOE_BENCH_BATCH") {
        pipeline.set("source.max_offsets_per_trigger", batch.parse::<i64>().expect("FLOE_BENCH_BATCH"));
    }

    let log = pipeline.dir().join("floe.log");
    let file = File::create(&log).unwrap();
    let config = pipeline.config_file();
    let mut command = pipeline.command();
    command.env("FLOE_LOG", "info,floe::query=debug").env("FLOE_LOG_FORMAT", "json");
    command.arg("run").arg(config).stdout(file.try_clone().unwrap()).stderr(file);
    let from = Instant::now();
    // Waited for by `wait`, which says what it has used.
    #[allow(clippy::zombie_processes)]
    let child = command.spawn().expect("floe");
    let (status, usage) = wait(child.id());
    let seconds = from.elapsed().as_secs_f64();
    assert_eq!(status, 0, "floe failed\n{}", shown(&fs::read_to_string(&log).unwrap_or_default()));

    let checked = check(&pipeline, rows, windows, truth);
    let time = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    println!(
        "{mode:<8} {seconds:>10.2} {:>10.0} {:>16.2} {:>10}   {checked}",
        messages as f64 / seconds,
        cpu * 1e6 / messages as f64,
        usage.ru_maxrss / 1024,
    );
    let log = fs::read_to_string(&log).unwrap();
    println!("         batches: {}", shares(&log, "stages"));
    println!("         workers: {}", shares(&log, "workers"));
}

/// The share of each stage of all that the batches have logged, largest first.
fn shares(log: &str, field: &str) -> String {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains("milliseconds of the batch")) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let millis = line[field].as_str().expect("the field");
        let millis: BTreeMap<String, u64> = serde_json::from_str(millis).unwrap();
        millis.into_iter().for_each(|(stage, ms)| *sums.entry(stage).or_default() += ms);
    }
    let all: u64 = sums.values().sum();
    assert!(all > 0, "no batch has said what it took");
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, ms)| std::cmp::Reverse(*ms));
    let share = |(stage, ms): (String, u64)| format!("{stage} {:.1}%", ms as f64 * 100.0 / all as f64);
    sums.into_iter().map(share).collect::<Vec<_>>().join(", ")
}

/// Waits for the process; its exit status and what it alone has used.
fn wait(pid: u32) -> (i32, libc::rusage) {
    let mut status = 0;
    // SAFETY: a plain structure of numbers, for which zeros are a value.
    #[allow(unsafe_code)]
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to locals that outlive the call; the process is a child of this one and not waited for elsewhere.
    #[allow(unsafe_code)]
    let waited = unsafe { libc::wait4(pid as i32, &mut status, 0, &mut usage) };
    assert_eq!(waited, pid as i32, "wait4: {}", std::io::Error::last_os_error());
    (status, usage)
}

fn check(pipeline: &Pipeline, rows: bool, windows: bool, truth: &Truth) -> String {
    let tables = pipeline.tables();
    let mut checked = Vec::new();
    let dead: u64 = tables.value("select count(*) from {telemetry.dead_letters}");
    assert_eq!(dead, truth.dead, "dead letters");
    if rows {
        let found: Vec<(u64, u64, i64, i64)> = tables.query(
            "select count(*), count(distinct _kafka_partition::bigint << 40 | _kafka_offset), \
             sum(duration_ms)::bigint, (sum(battery_level) * 4)::bigint from {telemetry.events}",
        );
        assert_eq!(found, [(truth.valid, truth.valid, truth.duration_sum, truth.battery_sum)], "rows");
        checked.push(format!("{} rows", truth.valid));
    }
    if windows {
        let closed: Vec<_> =
            truth.windows.iter().filter(|((start, _), _)| start + MINUTE_MS <= truth.max_event_ms - DELAY_MS).collect();
        let sum = |part: fn(&(i64, i64, i64)) -> i64| closed.iter().map(|(_, w)| part(w)).sum::<i64>();
        let found: Vec<(u64, u64, i64, i64, i64)> = tables.query(
            "select count(*), count(distinct (window_start, device_id)), sum(events)::bigint, sum(duration_sum)::bigint, \
             (sum(battery_sum) * 4)::bigint from {telemetry.device_minutes}",
        );
        let count = closed.len() as u64;
        assert_eq!(found, [(count, count, sum(|w| w.0), sum(|w| w.1), sum(|w| w.2))], "windows");
        checked.push(format!("{count} closed windows"));
    }
    checked.push(format!("{dead} dead letters"));
    checked.join(", ")
}
