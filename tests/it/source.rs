//! The Kafka source against a real broker: exactly the planned ranges, whatever brokers, transactions and retention do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use floe::batch::{OffsetRange, Offsets, Ranges, TopicPartition};
use floe::config::{SourceConfig, StartingOffsets};
use floe::error::Kind;
use floe::source::kafka::{ChunkSettings, KafkaSource, QueryNames};
use floe::source::{Chunk, Chunks, Error, Record, Source};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseRecord, Producer};

use crate::support::broker::{Broker, Rec, free_port};

const PATIENCE: Duration = Duration::from_secs(120);

fn config(broker: &str, topics: &[&str], kafka: &[(&str, &str)]) -> SourceConfig {
    SourceConfig {
        bootstrap_servers: broker.into(),
        topics: topics.iter().map(|t| t.to_string()).collect(),
        starting_offsets: StartingOffsets::Earliest,
        max_offsets_per_trigger: None,
        max_bytes_per_trigger: None,
        min_offsets_per_trigger: 0,
        max_trigger_delay: Duration::from_secs(60),
        fail_on_data_loss: true,
        kafka: kafka.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
    }
}

fn source(broker: &Broker, topics: &[&str]) -> KafkaSource {
    source_with(broker, topics, &[], ChunkSettings::default())
}

fn source_with(broker: &Broker, topics: &[&str], kafka: &[(&str, &str)], chunks: ChunkSettings) -> KafkaSource {
    KafkaSource::new(&config(&broker.bootstrap, topics, kafka), QueryNames::of(topics[0]), chunks).unwrap()
}

fn ranges(all: &[(&str, i32, i64, i64)]) -> Ranges {
    all.iter().map(|&(t, p, start, end)| (TopicPartition::new(t, p), OffsetRange { start, end })).collect()
}

/// A transaction's marker is written a moment after its commit returns.
fn wait_for(source: &mut KafkaSource, expected: &Ranges) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = everything(source);
        if found == *expected {
            return;
        }
        assert!(Instant::now() < deadline, "{found:?} is not {expected:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Everything that is available, as one batch.
fn everything(source: &mut KafkaSource) -> Ranges {
    source.available().unwrap().partitions
}

type Values = BTreeMap<(String, i32), Vec<(i64, String)>>;

/// Offsets and payloads by partition; fails when a chunk comes out of turn or the end does not come.
fn collect(chunks: Chunks) -> Result<Values, Error> {
    let mut values = Values::new();
    let mut sequences = BTreeMap::new();
    loop {
        let chunk = match chunks.recv_timeout(PATIENCE) {
            Ok(chunk) => chunk?,
            Err(RecvTimeoutError::Disconnected) => return Ok(values),
            Err(RecvTimeoutError::Timeout) => panic!("the range does not end; so far {values:?}"),
        };
        let sequence = sequences.entry(chunk.lane).or_insert(0);
        assert_eq!(chunk.sequence, *sequence);
        *sequence += 1;
        let all = values.entry((chunk.topic.to_string(), chunk.partition)).or_default();
        for (i, record) in chunk.records.iter().enumerate() {
            let value = String::from_utf8_lossy(chunk.value(i).unwrap_or(b"null")).into_owned();
            all.push((record.offset, value));
        }
    }
}

fn offsets(values: &Values, topic: &str, partition: i32) -> Vec<i64> {
    values.get(&(topic.to_string(), partition)).map(|v| v.iter().map(|r| r.0).collect()).unwrap_or_default()
}

fn numbers(n: std::ops::Range<i64>) -> Vec<String> {
    n.map(|i| format!("value {i}")).collect()
}

#[test]
fn ranges_are_read_exactly_batch_after_batch() {
    let broker = Broker::shared();
    let topic = "exact-ranges";
    broker.create_topic(topic, 3, &[]);
    for p in 0..3 {
        broker.produce(topic, Some(p), None, numbers(0..10_000));
    }
    let settings = ChunkSettings { target_bytes: 4096, max_records: 100, buffer_bytes: 1 << 20 };
    let mut source = source_with(broker, &[topic], &[], settings);
    let available = source.available().unwrap();
    assert_eq!(available.partitions, ranges(&[(topic, 0, 0, 10_000), (topic, 1, 0, 10_000), (topic, 2, 0, 10_000)]));
    assert_eq!(available.topic_ids.len(), 1);
    let mut starts = [0i64; 3];
    // Of different sizes, empty ones and ones of a single record among them.
    for sizes in [[1, 0, 5000], [0, 0, 0], [2500, 9999, 1], [7499, 1, 4999]] {
        let all: Vec<_> = (0..3).map(|p| (topic, p as i32, starts[p], starts[p] + sizes[p])).collect();
        let values = collect(source.read(&ranges(&all)).unwrap()).unwrap();
        for (_, p, start, end) in all {
            assert_eq!(offsets(&values, topic, p), (start..end).collect::<Vec<_>>(), "partition {p}");
            starts[p as usize] = end;
        }
        assert!(values.values().flatten().all(|(offset, value)| *value == format!("value {offset}")));
    }
    // Records that come later continue where the batch ended; and the same range again, as after a failure.
    broker.produce(topic, Some(1), None, numbers(10_000..10_010));
    let next = ranges(&[(topic, 0, 10_000, 10_000), (topic, 1, 10_000, 10_010), (topic, 2, 10_000, 10_000)]);
    for _ in 0..2 {
        let values = collect(source.read(&next).unwrap()).unwrap();
        assert_eq!(offsets(&values, topic, 1), (10_000..10_010).collect::<Vec<_>>());
    }
}

#[test]
fn a_batch_after_another_costs_no_seek() {
    let broker = Broker::shared();
    let topic = "no-seek";
    broker.create_topic(topic, 2, &[]);
    for p in 0..2 {
        broker.produce(topic, Some(p), None, numbers(0..1000));
    }
    let mut source = source(broker, &[topic]);
    collect(source.read(&ranges(&[(topic, 0, 0, 10), (topic, 1, 0, 10)])).unwrap()).unwrap();
    thread::sleep(Duration::from_millis(200));
    let mut times = Vec::new();
    for i in 1..50 {
        let batch = ranges(&[(topic, 0, i * 10, i * 10 + 10), (topic, 1, i * 10, i * 10 + 10)]);
        let begin = Instant::now();
        collect(source.read(&batch).unwrap()).unwrap();
        times.push(begin.elapsed());
    }
    times.sort();
    // Each of them would seek; a busy machine holds up some.
    assert!(times[times.len() / 2] < Duration::from_millis(20), "{times:?}");
}

#[test]
fn keys_headers_nulls_and_timestamps_arrive() {
    let broker = Broker::shared();
    let topic = "parts";
    broker.create_topic(topic, 1, &[]);
    let header = |name: &str, value: Option<&[u8]>| (name.to_string(), value.map(<[u8]>::to_vec));
    broker.produce_records(
        topic,
        [
            Rec { value: Some(b"v".to_vec()), timestamp_ms: Some(1_700_000_000_123), ..Rec::default() },
            Rec { key: Some(b"k".to_vec()), value: None, ..Rec::default() },
            Rec { key: Some(vec![]), value: Some(vec![]), ..Rec::default() },
            Rec {
                key: Some(b"key".to_vec()),
                value: Some(vec![0xff; 3_000_000]),
                headers: vec![header("a", Some(b"1")), header("a", None), header("", Some(b""))],
                ..Rec::default()
            },
        ],
    );
    let mut source = source(broker, &[topic]);
    let plan = everything(&mut source);
    let chunks: Vec<Chunk> = source.read(&plan).unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(chunks.len(), 1);
    let c = &chunks[0];
    assert_eq!((c.key(0), c.value(0), c.records[0].timestamp_ms), (None, Some(&b"v"[..]), 1_700_000_000_123));
    assert_eq!((c.key(1), c.value(1), c.records[1].value_len), (Some(&b"k"[..]), None, Record::NONE));
    assert_eq!((c.key(2), c.value(2)), (Some(&b""[..]), Some(&b""[..])));
    assert_eq!((c.key(3), c.value(3).map(<[u8]>::len)), (Some(&b"key"[..]), Some(3_000_000)));
    let expected = vec![header("a", Some(b"1")), header("a", None), header("", Some(b""))];
    assert_eq!(c.headers, vec![(3, expected)]);
}

#[test]
fn ranges_that_end_in_transactions_end_promptly() {
    let broker = Broker::shared();
    let topic = "transactions";
    broker.create_topic(topic, 1, &[]);
    let producer = broker.transactional_producer("transactions");
    let timeout = Duration::from_secs(60);
    let transaction = |commit: bool, n: i64| {
        producer.begin_transaction().unwrap();
        for i in 0..n {
            let payload = format!("{} {i}", if commit { "kept" } else { "aborted" });
            let record: BaseRecord<'_, (), str> = BaseRecord::to(topic).partition(0).payload(&payload);
            producer.send(record).map_err(|(e, _)| e).unwrap();
        }
        producer.flush(timeout).unwrap();
        if commit { producer.commit_transaction(timeout) } else { producer.abort_transaction(timeout) }.unwrap();
    };
    let mut source = source(broker, &[topic]);
    let read = |source: &mut KafkaSource, start, end| {
        let begin = Instant::now();
        let values = collect(source.read(&ranges(&[(topic, 0, start, end)])).unwrap()).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(20), "[{start}, {end}) took {:?}", begin.elapsed());
        offsets(&values, topic, 0)
    };
    transaction(true, 5); // 0..5 and a marker at 5
    wait_for(&mut source, &ranges(&[(topic, 0, 0, 6)]));
    assert_eq!(read(&mut source, 0, 6), [0, 1, 2, 3, 4]);
    transaction(false, 1000); // 6..1006 and a marker at 1006
    wait_for(&mut source, &ranges(&[(topic, 0, 0, 1007)]));
    assert_eq!(read(&mut source, 6, 500), [0i64; 0]);
    assert_eq!(read(&mut source, 500, 1007), [0i64; 0]);
    transaction(true, 1); // 1007 and a marker at 1008
    transaction(false, 3); // 1009..1012 and a marker at 1012
    transaction(true, 1); // 1013 and a marker at 1014
    // An open transaction: the last stable offset stays before it, and so does the plan.
    producer.begin_transaction().unwrap();
    producer.send(BaseRecord::<(), str>::to(topic).partition(0).payload("open")).map_err(|(e, _)| e).unwrap();
    producer.flush(timeout).unwrap();
    wait_for(&mut source, &ranges(&[(topic, 0, 0, 1015)]));
    for (start, end, expected) in [(1007, 1010, vec![1007]), (1010, 1013, vec![]), (1013, 1015, vec![1013])] {
        assert_eq!(read(&mut source, start, end), expected);
    }
    // The same when each range is the first that a client reads.
    for (start, end, expected) in [(1012, 1013, vec![]), (1006, 1007, vec![]), (5, 6, vec![]), (4, 1008, vec![4, 1007])]
    {
        assert_eq!(read(&mut source, start, end), expected);
    }
    let mut all = source_with(broker, &[topic], &[("isolation.level", "read_uncommitted")], ChunkSettings::default());
    wait_for(&mut all, &ranges(&[(topic, 0, 0, 1016)]));
    let values = collect(all.read(&ranges(&[(topic, 0, 1000, 1016)])).unwrap()).unwrap();
    assert_eq!(offsets(&values, topic, 0), [1000, 1001, 1002, 1003, 1004, 1005, 1007, 1009, 1010, 1011, 1013, 1015]);
    producer.abort_transaction(timeout).unwrap();
}

#[test]
fn holes_of_compaction_are_passed() {
    let broker = Broker::shared();
    let topic = "compacted";
    let compact = [
        ("cleanup.policy", "compact"),
        ("segment.ms", "200"),
        ("min.cleanable.dirty.ratio", "0.0"),
        ("max.compaction.lag.ms", "200"),
        ("delete.retention.ms", "0"),
    ];
    broker.create_topic(topic, 1, &compact);
    broker.produce(topic, Some(0), Some(b"same"), numbers(0..500));
    let deadline = Instant::now() + PATIENCE;
    let mut end = 500;
    let mut source = source(broker, &[topic]);
    loop {
        thread::sleep(Duration::from_millis(500));
        broker.produce(topic, Some(0), Some(b"same"), ["next"]); // rolls the segment
        end += 1;
        let values = collect(source.read(&ranges(&[(topic, 0, 0, 400)])).unwrap()).unwrap();
        if offsets(&values, topic, 0).is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "the broker does not compact");
    }
    for range in [(topic, 0, 400, 450), (topic, 0, 450, 451), (topic, 0, 451, end)] {
        let values = collect(source.read(&ranges(&[range])).unwrap()).unwrap();
        let expected = if range.3 == end { vec![end - 1] } else { vec![] };
        assert!(offsets(&values, topic, 0).ends_with(&expected));
    }
}

#[test]
fn deleted_records_are_data_loss() {
    let broker = Broker::shared();
    let topic = "retention";
    broker.create_topic(topic, 2, &[]);
    for p in 0..2 {
        broker.produce(topic, Some(p), None, numbers(0..100));
    }
    broker.delete_records(topic, 1, 60);
    let mut source = source(broker, &[topic]);
    assert_eq!(everything(&mut source), ranges(&[(topic, 0, 0, 100), (topic, 1, 60, 100)]));
    let plan = ranges(&[(topic, 0, 0, 100), (topic, 1, 20, 100)]);
    match collect(source.read(&plan).unwrap()) {
        Err(error @ Error::DataLoss { .. }) => {
            assert_eq!(error.kind(), Kind::Fatal);
            let text = error.to_string();
            assert!(text.contains("retention-1: records from offset 20 on"), "{text}");
            assert!(text.contains("60 to 100"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // The source goes on with what the query then decides to read.
    let values = collect(source.read(&ranges(&[(topic, 0, 0, 100), (topic, 1, 60, 100)])).unwrap()).unwrap();
    assert_eq!(offsets(&values, topic, 1), (60..100).collect::<Vec<_>>());
    // Beyond the end is loss as well: a topic re-created, or a log cut short.
    match collect(source.read(&ranges(&[(topic, 0, 500, 501)])).unwrap()) {
        Err(Error::DataLoss { wanted: 500, available: Some(OffsetRange { start: 0, end: 100 }), .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_topic_created_again_has_another_id() {
    let broker = Broker::shared();
    let topic = "again";
    broker.create_topic(topic, 1, &[]);
    broker.produce(topic, Some(0), None, numbers(0..10));
    let mut source = source(broker, &[topic]);
    let first = source.available().unwrap();
    collect(source.read(&first.partitions).unwrap()).unwrap();
    broker.delete_topic(topic);
    let gone = source.available().unwrap_err();
    assert_eq!(gone.kind(), Kind::Fatal);
    assert!(gone.to_string().contains("topic again was deleted"), "{gone}");
    broker.create_topic(topic, 1, &[]);
    let second = source.available().unwrap();
    assert_ne!(first.topic_ids[topic], second.topic_ids[topic]);
    assert_eq!(second.partitions, ranges(&[(topic, 0, 0, 0)]));
}

#[test]
fn a_topic_deleted_under_a_read_ends_it() {
    let broker = Broker::shared();
    let topic = "vanished";
    broker.create_topic(topic, 1, &[]);
    broker.produce(topic, Some(0), None, numbers(0..10));
    let soon = [("topic.metadata.refresh.interval.ms", "500"), ("topic.metadata.propagation.max.ms", "1000")];
    let mut source = source_with(broker, &[topic], &soon, ChunkSettings::default());
    let chunks = source.read(&ranges(&[(topic, 0, 0, 20)])).unwrap();
    thread::sleep(Duration::from_millis(500));
    broker.delete_topic(topic);
    let error = collect(chunks).unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal, "{error}");
    assert!(error.to_string().contains("vanished-0 no longer exists"), "{error}");
}

#[test]
fn a_topic_that_is_not_there_is_named() {
    let broker = Broker::shared();
    let error = source(broker, &["missing"]).available().unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal);
    let text = error.to_string();
    assert!(text.contains("topic missing does not exist") && text.contains(&broker.bootstrap), "{text}");
}

#[test]
fn added_partitions_join() {
    let broker = Broker::shared();
    let topic = "growing";
    broker.create_topic(topic, 1, &[]);
    broker.produce(topic, Some(0), None, numbers(0..10));
    let mut source = source(broker, &[topic]);
    let plan = everything(&mut source);
    collect(source.read(&plan).unwrap()).unwrap();
    broker.add_partitions(topic, 3);
    for p in 0..3 {
        broker.produce(topic, Some(p), None, numbers(0..10));
    }
    assert_eq!(everything(&mut source), ranges(&[(topic, 0, 0, 20), (topic, 1, 0, 10), (topic, 2, 0, 10)]));
    let plan = ranges(&[(topic, 0, 10, 20), (topic, 1, 0, 10), (topic, 2, 0, 10)]);
    let values = collect(source.read(&plan).unwrap()).unwrap();
    assert_eq!(offsets(&values, topic, 0), (10..20).collect::<Vec<_>>());
    assert_eq!(offsets(&values, topic, 2), (0..10).collect::<Vec<_>>());
}

#[test]
fn several_topics_are_told_apart() {
    let broker = Broker::shared();
    for topic in ["one", "two"] {
        broker.create_topic(topic, 1, &[]);
        broker.produce(topic, Some(0), None, (0..100).map(|i| format!("{topic} {i}")));
    }
    let mut source = source(broker, &["one", "two"]);
    for (start, end) in [(0, 30), (30, 31), (31, 100)] {
        let values = collect(source.read(&ranges(&[("one", 0, start, end), ("two", 0, start, end)])).unwrap()).unwrap();
        for topic in ["one", "two"] {
            let expected: Vec<_> = (start..end).map(|i| (i, format!("{topic} {i}"))).collect();
            assert_eq!(values[&(topic.to_string(), 0)], expected);
        }
    }
}

#[test]
fn offsets_by_time() {
    let broker = Broker::shared();
    let topic = "times";
    broker.create_topic(topic, 2, &[]);
    let at = |ms: i64| Rec {
        partition: Some(0),
        value: Some(vec![b'x']),
        timestamp_ms: Some(1_700_000_000_000 + ms),
        ..Rec::default()
    };
    broker.produce_records(topic, (0..10).map(|i| at(i * 1000)));
    let mut source = source(broker, &[topic]);
    let expected = |zero, one| -> Offsets {
        [(TopicPartition::new(topic, 0), zero), (TopicPartition::new(topic, 1), one)].into_iter().collect()
    };
    assert_eq!(source.offsets_at(1_700_000_003_500).unwrap(), expected(4, 0));
    assert_eq!(source.offsets_at(1_800_000_000_000).unwrap(), expected(10, 0));
    assert_eq!(source.offsets_at(-5).unwrap(), expected(0, 0));
}

#[test]
fn a_cancelled_read_leaves_the_source_usable() {
    let broker = Broker::shared();
    let topic = "cancelled";
    broker.create_topic(topic, 1, &[]);
    broker.produce(topic, Some(0), None, numbers(0..20_000));
    let settings = ChunkSettings { target_bytes: 1000, max_records: 10, buffer_bytes: 1 << 20 };
    let mut source = source_with(broker, &[topic], &[], settings);
    for taken in [0, 1, 100] {
        let chunks = source.read(&ranges(&[(topic, 0, 0, 20_000)])).unwrap();
        assert_eq!(chunks.iter().take(taken).filter(Result::is_ok).count(), taken);
        drop(chunks);
    }
    // One that waits for records that do not come.
    drop(source.read(&ranges(&[(topic, 0, 20_000, 20_001)])).unwrap());
    let begin = Instant::now();
    let values = collect(source.read(&ranges(&[(topic, 0, 0, 20_000)])).unwrap()).unwrap();
    assert_eq!(offsets(&values, topic, 0), (0..20_000).collect::<Vec<_>>());
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    let _unread = source.read(&ranges(&[(topic, 0, 20_000, 20_001)])).unwrap();
    let begin = Instant::now();
    drop(source);
    // A reader that does not end is given up after two seconds.
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
}

#[test]
fn reported_offsets_are_the_groups() {
    let broker = Broker::shared();
    let topic = "reported";
    broker.create_topic(topic, 1, &[]);
    let mut source = source(broker, &[topic]);
    source.available().unwrap();
    source.report(&[(TopicPartition::new(topic, 0), 42)].into_iter().collect());
    drop(source);
    let group: BaseConsumer = broker.client_config().set("group.id", "floe-reported").create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition(topic, 0);
    let committed = group.committed_offsets(list, Duration::from_secs(20)).unwrap();
    assert_eq!(committed.elements()[0].offset(), rdkafka::Offset::Offset(42));
}

#[test]
fn a_broker_that_dies_and_comes_back_loses_nothing() {
    let broker = Broker::start();
    let topic = "restarted";
    broker.create_topic(topic, 2, &[]);
    for p in 0..2 {
        broker.produce(topic, Some(p), None, numbers(0..50_000));
    }
    let settings = ChunkSettings { target_bytes: 10_000, max_records: 100, buffer_bytes: 1 << 20 };
    let mut source = source_with(&broker, &[topic], &[], settings);
    let plan = everything(&mut source);
    let chunks = source.read(&plan).unwrap();
    let first = chunks.recv().unwrap().unwrap();
    assert!(!first.records.is_empty());
    broker.kill();
    let begin = Instant::now();
    let away = source.available().unwrap_err();
    assert_eq!(away.kind(), Kind::Transient, "{away}");
    assert!(away.to_string().contains("onnect"), "{away}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    let (reader, done) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let rest: Result<Vec<Chunk>, Error> = chunks.into_iter().collect();
        let _ = reader.send(rest);
    });
    thread::sleep(Duration::from_millis(500));
    broker.restart();
    let rest = done.recv_timeout(PATIENCE).unwrap().unwrap();
    let read: usize = first.records.len() + rest.iter().map(|c| c.records.len()).sum::<usize>();
    assert_eq!(read, 100_000);
    assert_eq!(everything(&mut source), plan);
    // Frozen: nothing is refused, nothing answers.
    broker.produce(topic, Some(0), None, numbers(0..100));
    broker.pause();
    let chunks = source.read(&ranges(&[(topic, 0, 50_000, 50_100), (topic, 1, 50_000, 50_000)])).unwrap();
    assert!(matches!(chunks.recv_timeout(Duration::from_secs(2)), Err(RecvTimeoutError::Timeout) | Ok(Ok(_))));
    broker.resume();
    while let Ok(chunk) = chunks.recv_timeout(PATIENCE) {
        chunk.unwrap();
    }
    // Away while the source is dropped.
    broker.kill();
    let _chunks = source.read(&ranges(&[(topic, 0, 0, 10)])).unwrap();
    let begin = Instant::now();
    drop(source);
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[test]
fn refused_credentials_are_fatal_and_valid_ones_read() {
    let sasl = free_port();
    let listeners =
        format!("PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{controller_port}},SASL://127.0.0.1:{sasl}");
    let broker = Broker::start_with(&[
        ("listeners", &listeners),
        ("advertised.listeners", &format!("PLAINTEXT://127.0.0.1:{{port}},SASL://127.0.0.1:{sasl}")),
        ("listener.security.protocol.map", "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT"),
        ("listener.name.sasl.sasl.enabled.mechanisms", "PLAIN"),
        (
            "listener.name.sasl.plain.sasl.jaas.config",
            "org.apache.kafka.common.security.plain.PlainLoginModule required user_floe=\"right\";",
        ),
    ]);
    broker.create_topic("secured", 1, &[]);
    broker.produce("secured", Some(0), None, ["a"]);
    let with = |password: &str| {
        let kafka = [
            ("security.protocol", "SASL_PLAINTEXT"),
            ("sasl.mechanism", "PLAIN"),
            ("sasl.username", "floe"),
            ("sasl.password", password),
        ];
        let config = config(&format!("127.0.0.1:{sasl}"), &["secured"], &kafka);
        KafkaSource::new(&config, QueryNames::of("secured"), ChunkSettings::default()).unwrap()
    };
    let begin = Instant::now();
    let error = with("wrong").available().unwrap_err();
    assert_eq!(error.kind(), Kind::Fatal, "{error}");
    assert!(error.to_string().contains("refuse the credentials"), "{error}");
    // Without waiting for the ten seconds that brokers may take to answer.
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    let mut source = with("right");
    let plan = everything(&mut source);
    assert_eq!(collect(source.read(&plan).unwrap()).unwrap().len(), 1);
}

/// The end of the partition is never reached: aborted records keep coming, and no record that is handed out.
#[test]
fn a_range_before_endless_aborted_records_ends() {
    let broker = Broker::shared();
    let topic = "aborted";
    broker.create_topic(topic, 1, &[]);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let producer = broker.transactional_producer("aborted");
            let timeout = Duration::from_secs(60);
            while !stop.load(Ordering::Relaxed) {
                producer.begin_transaction().unwrap();
                for _ in 0..50 {
                    let record: BaseRecord<'_, (), str> = BaseRecord::to(topic).partition(0).payload("aborted");
                    producer.send(record).map_err(|(e, _)| e).unwrap();
                    producer.flush(timeout).unwrap();
                }
                producer.abort_transaction(timeout).unwrap();
            }
        });
        let mut source = source(broker, &[topic]);
        let mut start = 0;
        let deadline = Instant::now() + PATIENCE;
        for _ in 0..5 {
            let end = loop {
                let end = everything(&mut source)[&TopicPartition::new(topic, 0)].end;
                if end > start {
                    break end;
                }
                assert!(Instant::now() < deadline);
                thread::sleep(Duration::from_millis(20));
            };
            let begin = Instant::now();
            let values = collect(source.read(&ranges(&[(topic, 0, start, end)])).unwrap()).unwrap();
            assert!(values.is_empty(), "{values:?}");
            assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
            start = end;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn brokers_that_never_answer_are_transient() {
    let config = config("127.0.0.1:1", &["any"], &[]);
    let mut source = KafkaSource::new(&config, QueryNames::of("nobody"), ChunkSettings::default()).unwrap();
    let error = source.available().unwrap_err();
    assert_eq!(error.kind(), Kind::Transient);
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

#[test]
fn wrong_settings_are_refused_without_their_value() {
    let config = config("127.0.0.1:1", &["any"], &[("sasl.mechanism", "hunter2"), ("no.such.key", "hunter2")]);
    let error = KafkaSource::new(&config, QueryNames::of("x"), ChunkSettings::default()).err().unwrap();
    assert_eq!(error.kind(), Kind::Fatal);
    assert!(!error.to_string().contains("hunter2"), "{error}");
}

/// `cargo test --release --test it source::speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn speed() {
    let broker = Broker::start_options(crate::support::broker::Options {
        heap: "768m".into(),
        quick_start: false,
        ..Default::default()
    });
    let topic = "speed";
    broker.create_topic(topic, 8, &[]);
    let payload = "x".repeat(190);
    for p in 0..8 {
        broker.produce(topic, Some(p), Some(b"device-000001"), (0..250_000).map(|_| &payload));
    }
    let mut source = source(&broker, &[topic]);
    for _ in 0..3 {
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        let plan = everything(&mut source);
        let chunks = source.read(&plan).unwrap();
        let (mut n, mut count) = (0, 0);
        for chunk in chunks {
            n += chunk.unwrap().records.len();
            count += 1;
        }
        let (wall, cpu) = (begin.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        let million = n as f64 / 1e6;
        println!("{n} in {count} chunks, {:.2} M msg/s, {:.3} CPU s per million", million / wall, cpu / million);
    }
}

/// User and system time of this process, from /proc/self/stat in hundredths.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}
