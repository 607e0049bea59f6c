use std::thread::sleep;
use std::time::Duration;

use crate::support::broker::Broker;
use crate::support::check::{everything, fill, records, until_in_tables};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

const TOPIC: &str = "faults";

fn telemetry() -> Telemetry {
    Telemetry { messages: 4_000, ..Telemetry::default() }
}

fn drain_and_check(mut pipeline: Pipeline, broker: &Broker) {
    pipeline.remove("trigger").set("trigger.available_now", true).set("http.listen", "");
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}

/// Stopped between two batches, killed, and away when Floe starts: it says so, waits, and goes on by itself.
#[test]
fn stopped_and_restarted() {
    let _turn = turn();
    let broker = Broker::start();
    broker.create_topic(TOPIC, telemetry().partitions, &[]);
    broker.produce_records(TOPIC, records(&telemetry(), 0..1_000));
    let mut pipeline = Pipeline::new(&broker.bootstrap, TOPIC);
    pipeline.service("100 ms");
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &tables, 1_000);

    broker.stop();
    sleep(Duration::from_secs(2));
    broker.restart();
    broker.produce_records(TOPIC, records(&telemetry(), 1_000..2_000));
    until_in_tables(&mut floe, &tables, 2_000);

    broker.kill();
    floe.kill();
    let mut floe = pipeline.spawn();
    floe.until("it says that the broker is away", |floe| floe.output().contains("WARN").then_some(()));
    sleep(Duration::from_secs(1));
    broker.restart();
    broker.produce_records(TOPIC, records(&telemetry(), 2_000..4_000));
    until_in_tables(&mut floe, &tables, 4_000);
    floe.terminate();
    floe.wait().expect_code(0);
    drain_and_check(pipeline, &broker);
}

/// The batch is under way when the broker goes.
fn during_a_batch(disturb: impl Fn(&Broker), restore: impl Fn(&Broker)) {
    let _turn = turn();
    let broker = Broker::start();
    fill(&broker, TOPIC, &telemetry());
    let mut pipeline = Pipeline::new(&broker.bootstrap, TOPIC);
    // Little is fetched ahead, so that the batch cannot finish from memory.
    pipeline.set("execution.buffer", "16 MiB").kafka("fetch.message.max.bytes", "4096");
    let mut floe = pipeline.spawn_with(&[("FLOE_FAILPOINT", "execute.chunk:stop")]);
    floe.until_stopped();
    disturb(&broker);
    floe.signal(libc::SIGCONT);
    sleep(Duration::from_secs(4));
    restore(&broker);
    floe.wait().expect_code(0);
    drain_and_check(pipeline, &broker);
}

#[test]
fn killed_during_a_batch() {
    during_a_batch(Broker::kill, Broker::restart);
}

#[test]
fn frozen_during_a_batch() {
    during_a_batch(Broker::pause, Broker::resume);
}

#[test]
fn restarted_at_once_during_a_batch() {
    during_a_batch(Broker::restart, |_| {});
}

/// Frozen for long: the deadline of the stage passes, and the batch is done again from its plan.
#[test]
fn frozen_beyond_the_deadline() {
    let _turn = turn();
    let broker = Broker::start();
    fill(&broker, TOPIC, &telemetry());
    let mut pipeline = Pipeline::new(&broker.bootstrap, TOPIC);
    // Long enough for a busy machine to do the batch within it once the broker is back.
    pipeline.set("deadlines.add_batch", "5 seconds").set("deadlines.latest_offsets", "5 seconds");
    let mut floe = pipeline.spawn_with(&[("FLOE_FAILPOINT", "plan.after_put:stop")]);
    floe.until_stopped();
    broker.pause();
    floe.signal(libc::SIGCONT);
    floe.until("the deadline has passed", |floe| floe.output().contains("longer than its deadline").then_some(()));
    broker.resume();
    floe.wait().expect_code(0);
    pipeline.set("deadlines.add_batch", "10 minutes").set("deadlines.latest_offsets", "30 seconds");
    drain_and_check(pipeline, &broker);
}
