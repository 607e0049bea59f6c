use crate::support::broker::Broker;
use crate::support::check::{everything, fill, offsets_in_tables, records, until_in_tables};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 3_000, ..Telemetry::default() }
}

/// The one that starts later owns the checkpoint; the other one notices before it plans and leaves.
#[test]
fn the_later_of_two_survives() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "two_owners";
    broker.create_topic(topic, telemetry().partitions, &[]);
    broker.produce_records(topic, records(&telemetry(), 0..1_500));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.service("100 ms").set("source.max_offsets_per_trigger", 200);
    let tables = pipeline.tables();
    let mut first = pipeline.spawn();
    first.until("its first rows are in the table", |_| (offsets_in_tables(&tables) > 0).then_some(()));
    pipeline.service("100 ms");
    let mut second = pipeline.spawn();
    broker.produce_records(topic, records(&telemetry(), 1_500..3_000));
    first.wait().expect_code(3).expect_output(&["owner"]);
    until_in_tables(&mut second, &tables, 3_000);
    second.terminate();
    second.wait().expect_code(0);

    pipeline.remove("trigger").set("trigger.available_now", true);
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}

/// Paused in the middle of a batch, overtaken, and woken up: it exits, and nothing of what it did counts twice.
fn overtaken_at(step: &str) {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = format!("overtaken.{step}");
    fill(broker, &topic, &telemetry());
    let mut pipeline = Pipeline::new(&broker.bootstrap, &topic);
    pipeline.set("source.max_offsets_per_trigger", 800);
    let mut first = pipeline.spawn_with(&[("FLOE_FAILPOINT", &format!("{step}:stop:2"))]);
    first.until_stopped();
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
    first.signal(libc::SIGCONT);
    first.wait().expect_code(3);
    everything(&pipeline, broker, &telemetry());
    // What the first one left behind does not hurt whoever comes next.
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}

#[test]
fn overtaken_before_its_plan() {
    overtaken_at("plan.before_put");
}

#[test]
fn overtaken_after_its_plan() {
    overtaken_at("plan.after_put");
}

#[test]
fn overtaken_with_its_files_written() {
    overtaken_at("execute.files_written");
}

#[test]
fn overtaken_with_its_state_written() {
    overtaken_at("state.after_put");
}

#[test]
fn overtaken_before_its_commit() {
    overtaken_at("commit.metadata_written");
}

#[test]
fn overtaken_after_its_commit() {
    overtaken_at("commit.committed");
}

#[test]
fn overtaken_before_it_logs_its_commit() {
    overtaken_at("commit_log.before_put");
}

#[test]
fn overtaken_before_it_tidies() {
    overtaken_at("tidy");
}
