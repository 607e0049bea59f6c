use rdkafka::producer::{BaseRecord, Producer};

use crate::support::broker::Broker;
use crate::support::check::{
    DELAY_MS, each_offset_once, everything, fill, produced, records, rows_are_true, windows_are,
};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

#[test]
fn drains_what_was_there_at_its_start() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "available_now";
    let telemetry = Telemetry { messages: 4_000, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(&telemetry, 0..2_000));
    let before = produced(broker, topic, telemetry.partitions);

    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 700);
    let mut floe = pipeline.spawn_with(&[("FLOE_FAILPOINT", "plan.after_put:stop")]);
    floe.until_stopped();
    broker.produce_records(topic, records(&telemetry, 2_000..4_000));
    floe.signal(libc::SIGCONT);
    floe.wait().expect_code(0);
    each_offset_once(&pipeline.tables(), topic, &before);

    pipeline.run();
    everything(&pipeline, broker, &telemetry);
}

#[test]
fn an_empty_topic_is_drained_at_once() {
    let broker = Broker::shared();
    broker.create_topic("nothing", 3, &[]);
    let pipeline = Pipeline::new(&broker.bootstrap, "nothing");
    pipeline.run();
    each_offset_once(&pipeline.tables(), "nothing", &Default::default());
}

/// Limits bound a batch, not a run.
#[test]
fn bounded_by_bytes_and_by_offsets() {
    let _turn = turn();
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 3_000, ..Telemetry::default() };
    fill(broker, "bounded", &telemetry);
    for (key, limit) in [("source.max_offsets_per_trigger", "500"), ("source.max_bytes_per_trigger", "100 KiB")] {
        let mut pipeline = Pipeline::new(&broker.bootstrap, "bounded");
        match limit.parse::<i64>() {
            Ok(number) => pipeline.set(key, number),
            Err(_) => pipeline.set(key, limit),
        };
        pipeline.run();
        everything(&pipeline, broker, &telemetry);
        let snapshots = pipeline.tables().table("telemetry.events").snapshots.len();
        assert!((3..=12).contains(&snapshots), "{snapshots} batches with {key} = {limit}");
    }
}

/// Records of aborted transactions fill half a topic and stand at its end, where nothing readable follows them.
#[test]
fn aborted_transactions_leave_no_trace_and_stop_nothing() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "aborted_transactions";
    let telemetry = Telemetry { messages: 600, partitions: 2, invalid_per_mille: 0, ..Telemetry::default() };
    let aborted = Telemetry { messages: 10_000, seed: 77, ..telemetry.clone() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    let producer = broker.transactional_producer("aborting");
    let send = |stream: &Telemetry, range| {
        for record in records(stream, range) {
            let to = BaseRecord::to(topic)
                .partition(record.partition.unwrap())
                .key(record.key.as_deref().unwrap())
                .payload(record.value.as_deref().unwrap());
            producer.send(to).map_err(|(e, _)| e).unwrap();
        }
    };
    let timeout = std::time::Duration::from_secs(60);
    for part in 0..2 {
        producer.begin_transaction().unwrap();
        send(&telemetry, part * 300..(part + 1) * 300);
        producer.commit_transaction(timeout).unwrap();
        producer.begin_transaction().unwrap();
        send(&aborted, part * 5_000..(part + 1) * 5_000);
        producer.flush(timeout).unwrap();
        producer.abort_transaction(timeout).unwrap();
    }

    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 900);
    pipeline.run();
    let tables = pipeline.tables();
    let truth = telemetry.truth();
    rows_are_true(&tables, &truth);
    windows_are(&tables, &truth.closed(DELAY_MS));
    let distinct: u64 =
        tables.value("select count(distinct (_kafka_partition, _kafka_offset)) from {telemetry.events}");
    assert_eq!(distinct, truth.valid);

    // A transaction still open hides what is behind it, and is read when it has been committed.
    producer.begin_transaction().unwrap();
    let more = Telemetry { messages: 50, seed: 3, start_ms: telemetry.start_ms + telemetry.span_ms, ..telemetry };
    send(&more, 0..50);
    producer.flush(timeout).unwrap();
    pipeline.run();
    rows_are_true(&tables, &truth);
    producer.commit_transaction(timeout).unwrap();
    // The markers are written a moment after that; whoever takes over the transactional id waits for them.
    broker.transactional_producer("aborting");
    pipeline.run();
    let rows: u64 = tables.value("select count(*) from {telemetry.events}");
    assert_eq!(rows, truth.valid + 50);
}
