use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::support::broker::Broker;
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

/// The steps of the protocol, before and after each of its writes.
pub const STEPS: [&str; 10] = [
    "plan.before_put",
    "plan.after_put",
    "execute.chunk",
    "execute.files_written",
    "state.after_put",
    "commit.metadata_written",
    "commit.committed",
    "commit_log.before_put",
    "commit_log.after_put",
    "tidy",
];

fn telemetry() -> Telemetry {
    Telemetry { messages: 5_000, ..Telemetry::default() }
}

/// Nobody writes to it after it is filled, so all tests here read the same one.
fn topic() -> &'static str {
    static FILLED: OnceLock<&str> = OnceLock::new();
    FILLED.get_or_init(|| {
        fill(Broker::shared(), "exactly_once", &telemetry());
        "exactly_once"
    })
}

/// Five batches, and one without data that closes the last windows.
fn pipeline() -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic());
    pipeline.set("source.max_offsets_per_trigger", 1_000);
    pipeline
}

fn everything_once(pipeline: &Pipeline) {
    everything(pipeline, Broker::shared(), &telemetry());
}

#[test]
fn without_a_kill() {
    let _turn = turn();
    let pipeline = pipeline();
    pipeline.run();
    everything_once(&pipeline);
    // Once more: there is nothing to do, and nothing is done.
    pipeline.run();
    everything_once(&pipeline);
}

#[test]
fn pyiceberg_counts_as_duckdb_does() {
    let _turn = turn();
    let pipeline = pipeline();
    pipeline.run();
    let tables = pipeline.tables();
    for name in [ROWS, WINDOWS, DEAD_LETTERS] {
        let by_duckdb: u64 = tables.value(&format!("select count(*) from {{{name}}}"));
        let table = tables.table(name);
        assert_eq!(table.rows, Some(by_duckdb), "{name}");
        assert_eq!(table.format_version, 2, "{name}");
        assert!(by_duckdb > 0, "{name}");
    }
}

/// In the first batch, in the one after it, in the very batch that is being replayed, and then to the end.
fn killed_at(step: &str) {
    let _turn = turn();
    let pipeline = pipeline();
    for nth in [1, 2, 1] {
        pipeline.run_failing(&format!("{step}:kill:{nth}")).expect_killed();
    }
    pipeline.run();
    everything_once(&pipeline);
}

#[test]
fn killed_before_the_plan_is_logged() {
    killed_at("plan.before_put");
}

#[test]
fn killed_after_the_plan_is_logged() {
    killed_at("plan.after_put");
}

#[test]
fn killed_while_reading() {
    killed_at("execute.chunk");
}

#[test]
fn killed_after_the_data_files_are_written() {
    killed_at("execute.files_written");
}

#[test]
fn killed_after_the_state_is_written() {
    killed_at("state.after_put");
}

#[test]
fn killed_after_the_table_metadata_is_written() {
    killed_at("commit.metadata_written");
}

#[test]
fn killed_after_the_tables_are_committed() {
    killed_at("commit.committed");
}

#[test]
fn killed_before_the_commit_is_logged() {
    killed_at("commit_log.before_put");
}

#[test]
fn killed_after_the_commit_is_logged() {
    killed_at("commit_log.after_put");
}

#[test]
fn killed_before_tidying() {
    killed_at("tidy");
}

/// One batch after another, each killed at another step: every batch is a replay.
#[test]
fn killed_at_one_step_after_the_other() {
    let _turn = turn();
    let pipeline = pipeline();
    for step in STEPS {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
    }
    pipeline.run();
    everything_once(&pipeline);
}

/// A failure that is not a death takes the same road, in the process.
#[test]
fn failed_at_each_step() {
    let _turn = turn();
    for step in STEPS {
        let pipeline = pipeline();
        pipeline.run_failing(&format!("{step}:fail:2")).expect_code(0);
        everything_once(&pipeline);
    }
}

/// The last batch has no data: it only closes windows.
#[test]
fn killed_in_the_batch_without_data() {
    let _turn = turn();
    for step in ["plan.after_put", "execute.files_written", "commit.committed", "commit_log.after_put"] {
        let pipeline = pipeline();
        pipeline.run_failing(&format!("{step}:kill:6")).expect_killed();
        pipeline.run();
        everything_once(&pipeline);
    }
}

/// Every table names its last batch in a property, and every snapshot its own: number, digest of the plan, offsets, watermark.
#[test]
fn every_table_carries_the_marker() {
    let _turn = turn();
    let pipeline = pipeline();
    pipeline.run();
    let metadata = fs::read_to_string(pipeline.checkpoint().join("metadata.json")).unwrap();
    let query_id = metadata.split('"').find(|s| s.len() == 36).expect("the query's id").to_string();
    let marker_of = |map: &BTreeMap<String, String>| -> Option<Value> {
        serde_json::from_str(map.get(&format!("floe.{query_id}"))?).ok()
    };
    for name in [ROWS, WINDOWS, DEAD_LETTERS] {
        let table = pipeline.tables().table(name);
        let last = marker_of(&table.properties).unwrap_or_else(|| panic!("{name}: {:?}", table.properties));
        assert_eq!((&last["pipeline"], &last["batch"]), (&"telemetry".into(), &5.into()), "{name}");
        assert!(!table.snapshots.is_empty());
        for snapshot in &table.snapshots {
            let summary = &snapshot.summary;
            let marker = marker_of(summary).unwrap_or_else(|| panic!("{name}: {summary:?}"));
            let batch = marker["batch"].as_u64().unwrap();
            let plan = fs::read(pipeline.checkpoint().join(format!("offsets/{batch:020}.json"))).unwrap();
            let digest: String = Sha256::digest(&plan).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(marker["plan"], format!("sha256:{digest}"), "batch {batch} of {name}");
            assert!(summary["floe.offsets"].contains(topic()), "{summary:?}");
            assert!(summary["floe.watermark-ms"].parse::<i64>().is_ok(), "{summary:?}");
        }
    }
}
