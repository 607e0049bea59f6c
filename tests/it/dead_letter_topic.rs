use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::support::broker::{Broker, Rec};
use crate::support::check::{each_offset_once, everything, fill, produced, records};
use crate::support::floe::{Floe, Pipeline};
use crate::support::telemetry::Telemetry;
use crate::support::turn;

const PARTITIONS: i32 = 2;

#[derive(Debug)]
struct Published {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Published {
    fn fact(&self, name: &str) -> Option<String> {
        let value = self.headers.iter().rev().find(|(key, _)| key == name)?.1.clone()?;
        Some(String::from_utf8(value).unwrap())
    }

    fn place(&self) -> (String, i32, i64) {
        let fact = |name: &str| self.fact(name).unwrap_or_else(|| panic!("no {name} in {self:?}"));
        (fact("floe.topic"), fact("floe.partition").parse().unwrap(), fact("floe.offset").parse().unwrap())
    }
}

/// Everything that a reader of committed records finds in the topic.
fn published(broker: &Broker, topic: &str) -> Vec<Published> {
    let mut config = broker.client_config();
    config.set("group.id", "reader").set("isolation.level", "read_committed").set("enable.partition.eof", "true");
    let consumer: BaseConsumer = config.create().unwrap();
    let mut assignment = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        assignment.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&assignment).unwrap();
    let mut found = Vec::new();
    let mut ended = BTreeSet::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    while ended.len() < PARTITIONS as usize {
        assert!(Instant::now() < deadline, "the end of {topic} is out of reach: an open transaction?");
        match consumer.poll(Duration::from_millis(200)) {
            None => {}
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                ended.insert(partition);
            }
            Some(Err(e)) => panic!("{e}"),
            Some(Ok(message)) => {
                let headers = message.headers().unwrap();
                let headers = headers.iter().map(|h| (h.key.to_string(), h.value.map(<[u8]>::to_vec)));
                found.push(Published {
                    key: message.key().map(<[u8]>::to_vec),
                    value: message.payload().map(<[u8]>::to_vec),
                    headers: headers.collect(),
                });
            }
        }
    }
    found
}

/// The topic has each letter of the table that is a record, once, with the same facts.
fn as_in_the_table(pipeline: &Pipeline, broker: &Broker, topic: &str) -> usize {
    type Letter = (String, i32, i64, String, String, String, i64, i64);
    let letters: Vec<Letter> = pipeline.tables().query(
        "select topic, partition, \"offset\", reason, path, message, epoch_ms(timestamp), batch_id \
         from {telemetry.dead_letters} where reason not in ('data_loss', 'overflow') order by all",
    );
    let mut found: Vec<Letter> = published(broker, topic)
        .iter()
        .map(|record| {
            let fact = |name: &str| record.fact(name).unwrap_or_else(|| panic!("no {name} in {record:?}"));
            let (topic, partition, offset) = record.place();
            let number = |name: &str| fact(name).parse().unwrap();
            let (timestamp, batch) = (number("floe.timestamp"), number("floe.batch"));
            (topic, partition, offset, fact("floe.reason"), fact("floe.path"), fact("floe.message"), timestamp, batch)
        })
        .collect();
    found.sort();
    let places: BTreeMap<_, usize> = found.iter().fold(BTreeMap::new(), |mut places, letter| {
        *places.entry((&letter.0, letter.1, letter.2)).or_default() += 1;
        places
    });
    let doubled: Vec<_> = places.iter().filter(|(_, count)| **count > 1).collect();
    assert!(doubled.is_empty(), "published more than once: {doubled:?}");
    assert_eq!(found.len(), letters.len(), "published, in the table");
    assert_eq!(found, letters);
    found.len()
}

fn pipeline(broker: &Broker, topic: &str, dead_letters: &str) -> Pipeline {
    broker.create_topic(dead_letters, PARTITIONS, &[("max.message.bytes", "2000000")]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("dead_letters.topic", dead_letters);
    pipeline
}

#[test]
fn a_letter_is_the_record_with_the_facts_in_headers() {
    let broker = Broker::shared();
    broker.create_topic("dlt_facts", 1, &[("max.message.bytes", "2000000"), ("retention.ms", "-1")]);
    let rec = |key: Option<&str>, value: Option<&[u8]>, headers: Vec<(String, Option<Vec<u8>>)>| Rec {
        partition: Some(0),
        key: key.map(|key| key.as_bytes().to_vec()),
        value: value.map(<[u8]>::to_vec),
        timestamp_ms: Some(1_767_225_600_123),
        headers,
    };
    let large = vec![b'x'; 1_500_000];
    let headers = vec![("trace".to_string(), Some(b"\xff\x00".to_vec())), ("none".to_string(), None)];
    broker.produce_records(
        "dlt_facts",
        [
            rec(Some("a key"), Some(b"{\"device_id\": \xfe"), headers.clone()),
            rec(None, Some(br#"{"device_id":"d"}"#), Vec::new()),
            rec(Some("gone"), None, Vec::new()),
            rec(None, Some(br#"{"device_id":"d","event_timestamp":"2026-01-01T00:00:00Z"}"#), Vec::new()),
            rec(Some("large"), Some(&large), Vec::new()),
        ],
    );
    let pipeline = pipeline(broker, "dlt_facts", "dlt_facts.dead");
    let ended = pipeline.run().expect_output(&["dead letters follow in topic dlt_facts.dead"]);
    drop(ended);
    assert_eq!(as_in_the_table(&pipeline, broker, "dlt_facts.dead"), 4);
    let mut found = published(broker, "dlt_facts.dead");
    found.sort_by_key(Published::place);
    assert_eq!(
        (found[0].key.as_deref(), found[0].value.as_deref()),
        (Some(b"a key".as_slice()), Some(b"{\"device_id\": \xfe".as_slice()))
    );
    assert_eq!(found[0].headers[..2], headers[..]);
    assert_eq!(found[0].fact("floe.timestamp").as_deref(), Some("1767225600123"));
    assert_eq!((found[1].key.as_deref(), found[1].fact("floe.reason").as_deref()), (None, Some("missing_field")));
    assert_eq!((found[2].value.as_deref(), found[2].fact("floe.reason").as_deref()), (None, Some("null_value")));
    assert_eq!(found[3].value.as_deref(), Some(large.as_slice()));
}

/// Before, within and after the transaction, and around the commit that owes it.
#[test]
fn killed_at_each_step() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 3_000, ..Telemetry::default() };
    fill(broker, "dlt_steps", &telemetry);
    let steps = [
        "commit.committed",
        "commit_log.after_put",
        "tidy",
        "dead_letter_topic.begin",
        "dead_letter_topic.sent",
        "dead_letter_topic.published",
    ];
    for (index, step) in steps.into_iter().enumerate() {
        let dead = format!("dlt_steps.dead-{index}");
        let mut pipeline = pipeline(broker, "dlt_steps", &dead);
        pipeline.set("source.max_offsets_per_trigger", 600);
        for nth in [1, 2, 1] {
            pipeline.run_failing(&format!("{step}:kill:{nth}")).expect_killed();
        }
        pipeline.run_failing(&format!("{step}:fail")).expect_code(0);
        everything(&pipeline, broker, &telemetry);
        let letters = as_in_the_table(&pipeline, broker, &dead);
        assert_eq!(letters as u64, telemetry.truth().dead_letters());
    }
}

/// A commit that merges manifests has those of batches before it in hand, and publishes none of them again.
#[test]
fn each_once_beyond_the_merging_of_manifests() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 700, invalid_per_mille: 300, ..Telemetry::default() };
    fill(broker, "dlt_merged", &telemetry);
    let mut pipeline = pipeline(broker, "dlt_merged", "dlt_merged.dead");
    pipeline.set("source.max_offsets_per_trigger", 10);
    pipeline.run();
    let batches = pipeline.tables().table("telemetry.dead_letters").snapshots.len();
    assert!(batches > 55, "{batches} commits are too few for a merge");
    let letters = as_in_the_table(&pipeline, broker, "dlt_merged.dead");
    assert_eq!(letters as u64, telemetry.truth().dead_letters());
}

#[test]
fn killed_at_random_moments() {
    let _turn = turn();
    let kills = 12u64;
    let seed = u64::from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos());
    eprintln!("seed {seed}");
    let broker = Broker::shared();
    let telemetry = Telemetry { seed, messages: kills * 300, invalid_per_mille: 200, ..Telemetry::default() };
    broker.create_topic("dlt_random", telemetry.partitions, &[]);
    let mut pipeline = pipeline(broker, "dlt_random", "dlt_random.dead");
    pipeline.set("source.max_offsets_per_trigger", 60).service("20 ms");
    let mut random = seed;
    for kill in 0..kills {
        broker.produce_records("dlt_random", records(&telemetry, kill * 300..(kill + 1) * 300));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut floe = pipeline.spawn();
        floe.until("the status page is served", |floe| floe.get("/healthz"));
        std::thread::sleep(Duration::from_millis((random >> 33) % 900));
        floe.kill();
    }
    pipeline.remove("trigger").set("trigger.available_now", true);
    pipeline.run();
    each_offset_once(&pipeline.tables(), "dlt_random", &produced(broker, "dlt_random", telemetry.partitions));
    let letters = as_in_the_table(&pipeline, broker, "dlt_random.dead");
    assert_eq!(letters as u64, telemetry.truth().dead_letters());
}

/// It wakes in the middle of its transaction, when another process has long done the same batch.
#[test]
fn a_process_that_slept_publishes_nothing_more() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 2_000, ..Telemetry::default() };
    fill(broker, "dlt_asleep", &telemetry);
    let mut pipeline = pipeline(broker, "dlt_asleep", "dlt_asleep.dead");
    pipeline.set("source.max_offsets_per_trigger", 500);
    let mut asleep = pipeline.spawn_with(&[("FLOE_FAILPOINT", "dead_letter_topic.sent:stop")]);
    asleep.until_stopped();
    pipeline.run();
    asleep.signal(libc::SIGCONT);
    asleep.wait().expect_code(3).expect_output(&["another"]);
    everything(&pipeline, broker, &telemetry);
    as_in_the_table(&pipeline, broker, "dlt_asleep.dead");
}

#[test]
fn turned_on_later_it_begins_with_the_next_batch() {
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 1_000, invalid_per_mille: 100, ..Telemetry::default() };
    broker.create_topic("dlt_later", telemetry.partitions, &[]);
    broker.produce_records("dlt_later", records(&telemetry, 0..500));
    broker.create_topic("dlt_later.dead", PARTITIONS, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlt_later");
    pipeline.run();
    let first: i64 = pipeline.tables().value("select max(batch_id) + 1 from {telemetry.dead_letters}");
    pipeline.set("dead_letters.topic", "dlt_later.dead");
    pipeline.run();
    assert!(published(broker, "dlt_later.dead").is_empty());
    broker.produce_records("dlt_later", records(&telemetry, 500..1_000));
    pipeline.run();
    let found = published(broker, "dlt_later.dead");
    let letters: usize =
        pipeline.tables().value(&format!("select count(*) from {{telemetry.dead_letters}} where batch_id >= {first}"));
    assert!(!found.is_empty());
    assert_eq!(found.len(), letters);
    assert!(found.iter().all(|record| record.fact("floe.batch").unwrap().parse::<i64>().unwrap() >= first));
}

#[test]
fn a_topic_that_is_missing_or_read_from_is_refused() {
    let broker = Broker::shared();
    fill(broker, "dlt_refused", &Telemetry { messages: 500, ..Telemetry::default() });
    let mut pipeline = Pipeline::new(&broker.bootstrap, "dlt_refused");
    let run = |pipeline: &Pipeline, subcommand: &str| {
        let file = pipeline.config_file();
        let mut command = pipeline.command();
        command.arg(subcommand).arg(file);
        Floe::start(command, pipeline.dir(), 1_000, String::new()).wait()
    };
    pipeline.set("dead_letters.topic", "dlt_refused.dead");
    run(&pipeline, "check").expect_code(1).expect_output(&["dlt_refused.dead does not exist", "create it"]);
    run(&pipeline, "run").expect_code(3).expect_output(&["dlt_refused.dead does not exist"]);
    broker.create_topic("dlt_refused.dead", PARTITIONS, &[]);
    run(&pipeline, "check").expect_code(0).expect_output(&["dlt_refused.dead: 2 partitions"]);
    pipeline.run();
    assert!(as_in_the_table(&pipeline, broker, "dlt_refused.dead") > 0);
    // Deleted and created again, it begins with what comes next.
    broker.delete_topic("dlt_refused.dead");
    std::thread::sleep(Duration::from_secs(1));
    broker.create_topic("dlt_refused.dead", PARTITIONS, &[]);
    pipeline.run();
    broker.produce("dlt_refused", Some(0), None, ["nonsense"]);
    pipeline.run();
    let last = published(broker, "dlt_refused.dead");
    assert!(last.iter().filter(|record| record.value.as_deref() == Some(b"nonsense")).count() == 1, "{last:?}");

    pipeline.set("dead_letters.topic", "dlt_refused");
    run(&pipeline, "check").expect_code(2).expect_output(&["read again for ever"]);
}
