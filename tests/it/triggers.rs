use std::thread::sleep;
use std::time::Duration;

use crate::support::broker::Broker;
use crate::support::check::{everything, offsets_in_tables, records, until_in_tables};
use crate::support::floe::{Floe, Pipeline};
use crate::support::telemetry::Telemetry;
use crate::support::turn;

/// A batch waits until it is worth its while, but not for ever.
#[test]
fn wait_for_enough_records_but_not_beyond_the_delay() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "enough";
    let telemetry = Telemetry { messages: 1_000, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(&telemetry, 0..300));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.service("50 ms").set("source.min_offsets_per_trigger", 500).set("source.max_trigger_delay", "1 hour");
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    floe.until_ready();
    sleep(Duration::from_secs(2));
    assert_eq!(offsets_in_tables(&tables), 0, "fewer than the minimum are left to gather");
    broker.produce_records(topic, records(&telemetry, 300..700));
    // It may run before the last of them is there, and leaves those for the next batch.
    until_in_tables(&mut floe, &tables, 500);
    let batch = offsets_in_tables(&tables);
    broker.produce_records(topic, records(&telemetry, 700..900));
    sleep(Duration::from_secs(2));
    assert_eq!(offsets_in_tables(&tables), batch);
    floe.terminate();
    floe.wait().expect_code(0);

    pipeline.set("source.max_trigger_delay", "1 second");
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &tables, 900);
    floe.terminate();
    floe.wait().expect_code(0);

    // What is there is drained, however little.
    broker.produce_records(topic, records(&telemetry, 900..1_000));
    pipeline.remove("trigger").set("trigger.available_now", true);
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
}

/// However much is waiting, a batch is as large as it may be, and the next one comes at its time.
#[test]
fn keep_to_their_interval() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "interval";
    let telemetry = Telemetry { messages: 1_000, ..Telemetry::default() };
    broker.create_topic(topic, telemetry.partitions, &[]);
    broker.produce_records(topic, records(&telemetry, 0..1_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.service("2 seconds").set("source.max_offsets_per_trigger", 250);
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    // By its metrics, which answer at once: a reader that takes seconds to start would see the first batch late.
    let until_batches = |floe: &mut Floe, count: f64| {
        let reached = |floe: &Floe| (floe.metric("floe_batches_total")? >= count).then_some(());
        floe.until(&format!("{count} batches are done"), reached)
    };
    until_batches(&mut floe, 1.0);
    let from = std::time::Instant::now();
    until_batches(&mut floe, 4.0);
    assert!(from.elapsed() > Duration::from_secs(3), "three more batches came within {:?}", from.elapsed());
    floe.terminate();
    floe.wait().expect_code(0);
    assert_eq!(offsets_in_tables(&tables), 1_000);
}
