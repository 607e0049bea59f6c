use std::fs;

use crate::support::broker::Broker;
use crate::support::check::everything;
use crate::support::floe::{Floe, Pipeline, free_port};
use crate::support::telemetry::Telemetry;

#[test]
fn shows_every_mistake_at_once() {
    let mut pipeline = Pipeline::new("127.0.0.1:9", "any");
    pipeline
        .set("source.max_offset_per_trigger", 5)
        .set("source.starting_offsets", "erliest")
        .set("trigger.interval", "soon")
        .set("event_time.column", "event_time")
        .set("rows.partition_by", vec!["week(event_timestamp)".to_string()])
        .set("http.listen", "nowhere")
        .set("unknown_section.key", true)
        .env("FLOE_SOURCE__MIN_OFFSETS_PER_TRIGGER", "many");
    let mistakes = [
        "max_offset_per_trigger",
        "max_offsets_per_trigger",
        "erliest",
        "soon",
        "event_time",
        "week",
        "nowhere",
        "unknown_section",
        "many",
        "FLOE_SOURCE__MIN_OFFSETS_PER_TRIGGER",
    ];
    pipeline.check().expect_code(2).expect_output(&mistakes);
    pipeline.spawn().wait().expect_code(2).expect_output(&mistakes);
}

#[test]
fn tries_out_whatever_the_pipeline_reaches_for() {
    let broker = Broker::shared();
    broker.create_topic("checked", 2, &[]);
    let pipeline = Pipeline::new(&broker.bootstrap, "checked");
    pipeline.check().expect_code(0).expect_output(&["broker", "checked", "catalog", "warehouse", "checkpoint"]);
    // It leaves nothing behind that a later run would stumble over.
    pipeline.run();
    pipeline.check().expect_code(0);
    pipeline.run();
}

#[test]
fn names_what_is_out_of_reach() {
    let address = format!("127.0.0.1:{}", free_port());
    let pipeline = Pipeline::new(&address, "any");
    let ended = pipeline.check().expect_output(&[&address]);
    assert!(matches!(ended.code(), Some(1..=3)), "{}", ended.output);

    let broker = Broker::shared();
    let ended = Pipeline::new(&broker.bootstrap, "no.such.topic").check().expect_output(&["no.such.topic"]);
    assert!(matches!(ended.code(), Some(1..=3)), "{}", ended.output);
}

#[test]
fn a_file_that_is_not_there_or_not_toml_is_named() {
    let pipeline = Pipeline::new("127.0.0.1:9", "any");
    let file = pipeline.dir().join("broken.toml");
    for contents in [None, Some("name = \"x\"\n[source\n")] {
        if let Some(contents) = contents {
            fs::write(&file, contents).unwrap();
        }
        for subcommand in ["check", "run"] {
            let mut command = pipeline.command();
            command.arg(subcommand).arg(&file);
            let ended = Floe::start(command, pipeline.dir(), 1_000, String::new()).wait();
            ended.expect_code(2).expect_output(&["broken.toml"]);
        }
    }
}

/// The environment wins over the file, a variable may come from a file, and the names of Spark jobs work.
#[test]
fn the_environment_wins() {
    let broker = Broker::shared();
    let telemetry = Telemetry { messages: 300, ..Telemetry::default() };
    crate::support::check::fill(broker, "from_environment", &telemetry);
    let mut pipeline = Pipeline::new("127.0.0.1:9", "from_file");
    let secret = pipeline.dir().join("bootstrap");
    fs::write(&secret, format!("{}\n", broker.bootstrap)).unwrap();
    let checkpoint = pipeline.dir().join("other-checkpoint");
    pipeline
        .env("KAFKA_TOPIC", "from_environment")
        .env("FLOE_SOURCE__BOOTSTRAP_SERVERS_FILE", secret.to_str().unwrap())
        .env("CHECKPOINT_LOCATION", checkpoint.to_str().unwrap())
        .env("FLOE_SOURCE__MAX_OFFSETS_PER_TRIGGER", "100");
    pipeline.topic = "from_environment".into();
    pipeline.run();
    everything(&pipeline, broker, &telemetry);
    assert!(checkpoint.join("metadata.json").exists());
    assert_eq!(pipeline.tables().table("telemetry.events").snapshots.len(), 3);
}

#[test]
fn secrets_are_not_shown() {
    let broker = Broker::shared();
    broker.create_topic("secretive", 1, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, "secretive");
    pipeline.kafka("sasl.password", "hunter2-and-more").kafka("sasl.username", "floe").env("RUST_LOG", "debug");
    for output in [pipeline.check().output, pipeline.spawn().wait().output] {
        assert!(!output.contains("hunter2"), "{output}");
    }
}
