//! The demo's broker and its devices: librdkafka's mock cluster, a paced stream of telemetry, and the truth about it.
//!
//! Owns: what is sent, and a record of all of it by partition and offset and by window ([`Truth`]). Does not own: any
//! opinion on what the pipeline makes of it ([`super::verify`]). Invariant: at most [`MAX_UNCOMMITTED`] records of a
//! partition are not yet in the tables, because the mock cluster keeps only 5 MiB of each and drops the oldest.
//! One thread owns the cluster and the producer, since both are blocking clients.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer as _, ProducerContext};

use crate::dead_letter::Reason;

pub const TOPIC: &str = "telemetry";
pub const PARTITIONS: usize = 8;
pub const WINDOW_MS: i64 = 60_000;
/// Event time runs this much faster than the wall clock, so that one-minute windows close while one watches.
pub const SPEED: i64 = 20;
/// On-time records are out of order by at most this much event time.
const DISORDER_MS: u64 = 5_000;
/// Late records are behind by 4 to 10 minutes of event time.
const LATE_MS: (i64, u64) = (240_000, 360_000);
/// About 2 MiB of the 5 MiB that the mock cluster keeps of a partition.
const MAX_UNCOMMITTED: i64 = 8_000;
const TICK: Duration = Duration::from_millis(10);
const STATUSES: [&str; 4] = ["online", "idle", "charging", "offline"];

/// The ways in which a record is bad, and what each must be refused for.
const BAD: [Reason; 8] = [
    Reason::MalformedJson,
    Reason::MissingField,
    Reason::WrongType,
    Reason::OutOfRange,
    Reason::NotInEnum,
    Reason::BadFormat,
    Reason::NullValue,
    Reason::InvalidUtf8,
];

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Records a second.
    pub rate: u32,
    pub devices: u32,
    /// No on-time record is older, milliseconds since the epoch.
    pub start_ms: i64,
    pub seed: u64,
}

/// What one record is and what must become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Row,
    DeadLetter(Reason),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowTruth {
    pub events: i64,
    pub duration_total: i64,
}

/// Everything the broker has acknowledged.
#[derive(Debug, Default)]
pub struct Truth {
    /// By partition, then offset. None: an offset that no acknowledgement has named.
    pub fates: Vec<Vec<Option<Fate>>>,
    /// By device and window start in milliseconds; rows behind the watermark are in here too.
    pub windows: HashMap<(u32, i64), WindowTruth>,
    /// Records that were sent with an old event time on purpose.
    pub sent_late: u64,
    /// Sends that failed: then nobody knows what the broker holds.
    pub failed: Vec<String>,
}

impl Truth {
    pub fn produced(&self) -> u64 {
        self.fates.iter().map(|p| p.len() as u64).sum()
    }

    fn acknowledge(&mut self, partition: usize, offset: usize, sent: &Sent) {
        self.fates.resize_with(self.fates.len().max(partition + 1), Vec::new);
        let fates = &mut self.fates[partition];
        fates.resize(fates.len().max(offset + 1), None);
        fates[offset] = Some(sent.fate);
        if sent.fate == Fate::Row {
            let window =
                self.windows.entry((sent.device, sent.event_ms - sent.event_ms.rem_euclid(WINDOW_MS))).or_default();
            window.events += 1;
            window.duration_total += sent.duration_ms;
            self.sent_late += u64::from(sent.late);
        }
    }
}

pub fn device_name(device: u32) -> String {
    format!("device-{device:04}")
}

pub fn device_number(name: &str) -> Option<u32> {
    name.strip_prefix("device-")?.parse().ok()
}

#[derive(Debug)]
struct Sent {
    device: u32,
    event_ms: i64,
    duration_ms: i64,
    late: bool,
    fate: Fate,
}

struct Shared {
    stop: AtomicBool,
    end: AtomicBool,
    /// Nothing more will be sent and everything sent is acknowledged.
    flushed: AtomicBool,
    /// By partition: one past the last offset that is in the tables.
    committed: [AtomicI64; PARTITIONS],
    truth: Mutex<Truth>,
}

struct Acknowledgements(Arc<Shared>);

impl ClientContext for Acknowledgements {}

impl ProducerContext for Acknowledgements {
    type DeliveryOpaque = Box<Sent>;

    fn delivery(&self, result: &DeliveryResult<'_>, sent: Box<Sent>) {
        let mut truth = self.0.truth.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(m) => match (usize::try_from(m.partition()), usize::try_from(m.offset())) {
                (Ok(partition), Ok(offset)) => truth.acknowledge(partition, offset, &sent),
                _ => truth.failed.push("the broker did not say which offset a record got".to_string()),
            },
            Err((e, _)) => truth.failed.push(e.to_string()),
        }
    }
}

/// A running broker with devices that send to it. Dropping it ends both.
pub struct Producer {
    pub bootstrap_servers: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Producer {
    /// Starts the broker and the stream. Blocks until the broker is up.
    pub fn start(plan: Plan) -> Result<Producer, String> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            end: AtomicBool::new(false),
            flushed: AtomicBool::new(false),
            committed: Default::default(),
            truth: Mutex::new(Truth::default()),
        });
        let (up, is_up) = std::sync::mpsc::channel();
        let thread_shared = shared.clone();
        let thread = std::thread::Builder::new()
            .name("demo-devices".to_string())
            .spawn(move || match broker(&thread_shared) {
                Ok((cluster, producer)) => {
                    let _ = up.send(Ok(cluster.bootstrap_servers()));
                    produce(&producer, &plan, &thread_shared);
                    while !thread_shared.end.load(Ordering::Relaxed) {
                        producer.poll(Duration::from_millis(50));
                    }
                }
                Err(e) => drop(up.send(Err(format!("the embedded broker did not start: {e}")))),
            })
            .map_err(|e| format!("cannot start a thread: {e}"))?;
        let bootstrap_servers = is_up
            .recv_timeout(Duration::from_secs(15))
            .map_err(|_| "the embedded broker did not start".to_string())??;
        Ok(Producer { bootstrap_servers, shared, thread: Some(thread) })
    }

    /// The tables hold this partition up to `end`: the devices may go on.
    pub fn committed(&self, partition: i32, end: i64) {
        if let Some(committed) = usize::try_from(partition).ok().and_then(|p| self.shared.committed.get(p)) {
            committed.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// No more records; the broker stays.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// After [`Producer::stop`]: every record is acknowledged, and every partition is in the tables to its end.
    pub fn is_drained(&self) -> bool {
        self.shared.flushed.load(Ordering::Relaxed) && {
            let truth = self.truth();
            truth.fates.iter().zip(&self.shared.committed).all(|(p, c)| c.load(Ordering::Relaxed) >= p.len() as i64)
        }
    }

    pub fn truth(&self) -> std::sync::MutexGuard<'_, Truth> {
        self.shared.truth.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panicked if this is an error; the truth then says what is missing.
            let _ = thread.join();
        }
    }
}

type Broker = (MockCluster<'static, DefaultProducerContext>, BaseProducer<Acknowledgements>);

fn broker(shared: &Arc<Shared>) -> Result<Broker, KafkaError> {
    let cluster = MockCluster::new(1)?;
    cluster.create_topic(TOPIC, PARTITIONS as i32, 1)?;
    let producer = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("enable.idempotence", "true")
        .set("linger.ms", "5")
        .set("client.id", "floe-demo-devices")
        .create_with_context(Acknowledgements(shared.clone()))?;
    Ok((cluster, producer))
}

fn produce(producer: &BaseProducer<Acknowledgements>, plan: &Plan, shared: &Shared) {
    let mut devices = Devices { plan: *plan, random: Random(plan.seed), payload: Vec::with_capacity(256) };
    let mut sent = [0i64; PARTITIONS];
    let mut index = 0u64;
    let mut due = 0.0f64;
    let mut last = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        producer.poll(TICK);
        let now = Instant::now();
        // After a pause the stream goes on at its pace; it does not catch up.
        due = (due + (now - last).as_secs_f64() * f64::from(plan.rate)).min(f64::from(plan.rate) / 5.0);
        last = now;
        while due >= 1.0 {
            let device = devices.random.below(u64::from(plan.devices)) as u32;
            let partition = device as usize % PARTITIONS;
            if sent[partition] - shared.committed[partition].load(Ordering::Relaxed) >= MAX_UNCOMMITTED {
                due = 0.0;
                break;
            }
            let (key, record) = (device_name(device), devices.next(device, index));
            if !send(producer, partition as i32, &key, &devices.payload, record) {
                shared
                    .truth
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .failed
                    .push("a send was refused".to_string());
                break;
            }
            sent[partition] += 1;
            index += 1;
            due -= 1.0;
        }
        std::thread::sleep(TICK);
    }
    if let Err(e) = producer.flush(Duration::from_secs(15)) {
        shared.truth.lock().unwrap_or_else(PoisonError::into_inner).failed.push(format!("the last records: {e}"));
    }
    shared.flushed.store(true, Ordering::Relaxed);
}

/// Hands a record to the client, waiting while its queue is full.
fn send(producer: &BaseProducer<Acknowledgements>, partition: i32, key: &str, payload: &[u8], sent: Sent) -> bool {
    let is_null = sent.fate == Fate::DeadLetter(Reason::NullValue);
    let mut record: BaseRecord<'_, str, [u8], Box<Sent>> =
        BaseRecord::with_opaque_to(TOPIC, Box::new(sent)).partition(partition).key(key);
    if !is_null {
        record = record.payload(payload);
    }
    loop {
        match producer.send(record) {
            Ok(()) => return true,
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), refused)) => {
                producer.poll(Duration::from_millis(20));
                record = refused;
            }
            Err(_) => return false,
        }
    }
}

struct Devices {
    plan: Plan,
    random: Random,
    payload: Vec<u8>,
}

impl Devices {
    /// Puts the next record into `payload`. Its event time follows from its index alone, so that a stalled stream makes no
    /// record late.
    fn next(&mut self, device: u32, index: u64) -> Sent {
        let r = &mut self.random;
        let since_ms = (index as f64 * 1000.0 * SPEED as f64 / f64::from(self.plan.rate)) as i64;
        let stream_ms = self.plan.start_ms + DISORDER_MS as i64 + since_ms;
        let dice = r.below(1000);
        let fate = if dice < 10 { Fate::DeadLetter(BAD[r.below(BAD.len() as u64) as usize]) } else { Fate::Row };
        let late = (10..14).contains(&dice);
        let behind = if late { LATE_MS.0 + r.below(LATE_MS.1) as i64 } else { r.below(DISORDER_MS) as i64 };
        let sent = Sent { device, event_ms: stream_ms - behind, duration_ms: r.below(5_000) as i64, late, fate };

        let bad = |reason| fate == Fate::DeadLetter(reason);
        let mut json = String::with_capacity(256);
        json.push('{');
        if !bad(Reason::MissingField) {
            let _ = write!(json, "\"device_id\":\"{}\",", device_name(device));
        }
        let time = crate::telemetry::rfc3339(sent.event_ms);
        let time = if bad(Reason::BadFormat) { "yesterday" } else { time.as_str() };
        let battery = match fate {
            Fate::DeadLetter(Reason::WrongType) => "\"full\"".to_string(),
            Fate::DeadLetter(Reason::OutOfRange) => "250".to_string(),
            _ => r.below(101).to_string(),
        };
        let status = if bad(Reason::NotInEnum) { "on fire" } else { STATUSES[r.below(4) as usize] };
        // Writing to a String cannot fail.
        let _ = write!(
            json,
            "\"event_timestamp\":\"{time}\",\"battery_level\":{battery},\"signal_strength\":{},\"latitude\":{:.5},\"longitude\":{:.5},\"duration_ms\":{},\"status\":\"{status}\"}}",
            -(r.below(151) as i64),
            47.0 + r.below(100_000) as f64 / 1e5,
            8.0 + r.below(100_000) as f64 / 1e5,
            sent.duration_ms,
        );
        self.payload.clear();
        self.payload.extend_from_slice(json.as_bytes());
        if bad(Reason::MalformedJson) {
            self.payload.truncate(json.len() - 20);
        }
        if bad(Reason::InvalidUtf8) {
            // Inside the device's name.
            self.payload[16] = 0xff;
        }
        sent
    }
}

/// SplitMix64: a demo that shows the same stream each time needs no more.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Chunk, Record};

    const PLAN: Plan = Plan { rate: 2_000, devices: 20, start_ms: 1_700_000_000_000, seed: 7 };

    #[test]
    fn records_are_what_their_fate_says() {
        let mut devices = Devices { plan: PLAN, random: Random(1), payload: Vec::new() };
        let mut seen: HashMap<Option<Reason>, u32> = HashMap::new();
        for index in 0..50_000 {
            let sent = devices.next(3, index);
            let parsed = serde_json::from_slice::<serde_json::Value>(&devices.payload);
            let reason = match sent.fate {
                Fate::Row => {
                    let json = parsed.unwrap();
                    assert_eq!(json["device_id"], "device-0003");
                    assert_eq!(json["event_timestamp"], crate::telemetry::rfc3339(sent.event_ms).as_str());
                    assert_eq!(json["duration_ms"], sent.duration_ms);
                    None
                }
                Fate::DeadLetter(reason) => {
                    match reason {
                        Reason::MalformedJson => assert!(parsed.is_err()),
                        Reason::InvalidUtf8 => assert!(std::str::from_utf8(&devices.payload).is_err()),
                        Reason::MissingField => assert!(parsed.unwrap().get("device_id").is_none()),
                        Reason::OutOfRange => assert_eq!(parsed.unwrap()["battery_level"], 250),
                        _ => assert!(parsed.is_ok()),
                    }
                    Some(reason)
                }
            };
            *seen.entry(reason).or_default() += 1;
        }
        assert_eq!(seen.len(), 1 + BAD.len());
        let bad: u32 = seen.iter().filter(|(r, _)| r.is_some()).map(|(_, n)| n).sum();
        assert!((400..600).contains(&bad), "about 1%: {bad}");
    }

    /// The decoder and the devices must agree on why each record is bad, or the demo would accuse itself.
    #[test]
    fn the_decoder_refuses_what_is_bad_for_the_right_reason() {
        let mut devices = Devices { plan: PLAN, random: Random(2), payload: Vec::new() };
        let mut chunk = Chunk { topic: TOPIC.into(), ..Default::default() };
        let mut fates = Vec::new();
        for index in 0..20_000 {
            let sent = devices.next(5, index);
            let is_null = sent.fate == Fate::DeadLetter(Reason::NullValue);
            chunk.records.push(Record {
                offset: index as i64,
                timestamp_ms: 0,
                begin: chunk.data.len() as u32,
                key_len: Record::NONE,
                value_len: if is_null { Record::NONE } else { devices.payload.len() as u32 },
            });
            chunk.data.extend_from_slice(&devices.payload);
            fates.push(sent.fate);
        }
        let schema = crate::schema::Schema::parse(crate::cli::demo::SCHEMA).unwrap();
        let decoded = crate::decode::Decoder::new(schema).decode(&chunk);
        assert_eq!(decoded.records.len() + decoded.rejected.len(), fates.len());
        assert!(decoded.records.iter().all(|r| fates[*r as usize] == Fate::Row));
        for rejection in &decoded.rejected {
            assert_eq!(fates[rejection.record as usize], Fate::DeadLetter(rejection.reason), "{rejection:?}");
        }
    }

    #[test]
    fn the_truth_holds_everything_and_the_stream_waits_for_the_tables() {
        let producer = Producer::start(Plan { rate: 400_000, ..PLAN }).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let limit = MAX_UNCOMMITTED as u64 * PARTITIONS as u64;
        // With nothing committed, the stream stops at the limit of one of its partitions.
        while producer.truth().produced() < limit / 2 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(300));
        assert!(producer.truth().produced() <= limit);
        producer.stop();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !producer.shared.flushed.load(Ordering::Relaxed) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!producer.is_drained());
        let ends: Vec<usize> = producer.truth().fates.iter().map(Vec::len).collect();
        for (partition, end) in ends.iter().enumerate() {
            producer.committed(partition as i32, *end as i64);
        }
        assert!(producer.is_drained());
        let truth = producer.truth();
        assert_eq!(truth.failed, Vec::<String>::new());
        assert!(truth.fates.iter().flatten().all(Option::is_some));
        let events: i64 = truth.windows.values().map(|w| w.events).sum();
        let bad = truth.fates.iter().flatten().filter(|f| **f != Some(Fate::Row)).count() as u64;
        assert_eq!(events as u64 + bad, truth.produced());
        assert!(truth.sent_late > 0);
    }
}
