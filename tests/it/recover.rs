use std::fs;
use std::sync::OnceLock;

use crate::support::broker::Broker;
use crate::support::check::{DEAD_LETTERS, ROWS, WINDOWS, everything, fill, windows};
use crate::support::floe::{Ended, Pipeline};
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 5_000, ..Telemetry::default() }
}

fn topic() -> &'static str {
    static FILLED: OnceLock<&str> = OnceLock::new();
    FILLED.get_or_init(|| {
        fill(Broker::shared(), "recover", &telemetry());
        "recover"
    })
}

/// Five batches, and one without data that closes the last windows.
fn pipeline() -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic());
    pipeline.set("source.max_offsets_per_trigger", 1_000);
    pipeline
}

fn floe(pipeline: &Pipeline, arguments: &[&str]) -> Ended {
    let file = pipeline.config_file();
    let output = pipeline.command().args(arguments).arg(file).output().expect("floe");
    let text = [output.stdout, output.stderr].concat();
    Ended { status: output.status, output: String::from_utf8_lossy(&text).into_owned() }
}

fn recover(pipeline: &Pipeline) -> Ended {
    floe(pipeline, &["recover", "--from-table"])
}

fn lose_checkpoint(pipeline: &Pipeline) {
    fs::remove_dir_all(pipeline.checkpoint()).expect("a checkpoint");
}

/// The checkpoint is lost, rebuilt, and the pipeline goes on as if nothing had happened.
fn lost_at(step: &str) {
    let _turn = turn();
    let pipeline = pipeline();
    for nth in [2, 1, 3] {
        pipeline.run_failing(&format!("{step}:kill:{nth}")).expect_killed();
        lose_checkpoint(&pipeline);
        recover(&pipeline).expect_code(0).expect_output(&["done: up to batch", "open windows"]);
    }
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

#[test]
fn lost_after_a_plan() {
    lost_at("plan.after_put");
}

#[test]
fn lost_with_data_files_that_no_table_knows() {
    lost_at("execute.files_written");
}

#[test]
fn lost_after_the_tables_are_committed() {
    lost_at("commit.committed");
}

#[test]
fn lost_after_a_batch_is_done() {
    lost_at("tidy");
}

/// Where a catalog commits one table after another, some may have a batch and others not.
#[test]
fn lost_between_two_tables_of_a_batch() {
    let _turn = turn();
    for (begun, behind) in
        [(3, vec![ROWS]), (3, vec![WINDOWS, DEAD_LETTERS]), (2, vec![ROWS, WINDOWS]), (1, vec![DEAD_LETTERS])]
    {
        let pipeline = pipeline();
        pipeline.run_failing(&format!("plan.after_put:kill:{begun}")).expect_killed();
        let before: Vec<String> = behind.iter().map(|table| pointer(&pipeline, table)).collect();
        pipeline.run_failing("commit.committed:kill:1").expect_killed();
        for (table, location) in behind.iter().zip(&before) {
            set_pointer(&pipeline, table, location);
        }
        lose_checkpoint(&pipeline);
        let pending = format!("begun: batch {}", begun - 1);
        recover(&pipeline).expect_code(0).expect_output(&[&pending]);
        pipeline.run();
        everything(&pipeline, Broker::shared(), &telemetry());
    }
}

fn pointer(pipeline: &Pipeline, table: &str) -> String {
    let (namespace, name) = table.split_once('.').unwrap();
    let sql = "select metadata_location from iceberg_tables where table_namespace = ?1 and table_name = ?2";
    let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
    catalog.query_row(sql, [namespace, name], |row| row.get(0)).unwrap()
}

fn set_pointer(pipeline: &Pipeline, table: &str, location: &str) {
    let (namespace, name) = table.split_once('.').unwrap();
    let sql = "update iceberg_tables set metadata_location = ?3 where table_namespace = ?1 and table_name = ?2";
    let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
    assert_eq!(catalog.execute(sql, [namespace, name, location]).unwrap(), 1);
}

/// The watermark of each partition comes back as well.
#[test]
fn lost_with_watermarks_by_partition() {
    let _turn = turn();
    let run = |lose: bool| {
        let mut pipeline = pipeline();
        pipeline.set("event_time.policy", "partition-min").set("event_time.idle_timeout", "1 hour");
        pipeline.run_failing("commit.committed:kill:3").expect_killed();
        if lose {
            lose_checkpoint(&pipeline);
            recover(&pipeline).expect_code(0);
        }
        pipeline.run();
        windows(&pipeline.tables())
    };
    let (undisturbed, recovered) = (run(false), run(true));
    assert!(!undisturbed.is_empty());
    assert_eq!(undisturbed, recovered);
}

/// Rows that `floe dlq retry` has brought into the rows table were never in a window, and are not after it either.
#[test]
fn letters_tried_again_do_not_enter_open_windows() {
    let _turn = turn();
    let expect = "[[expect]]\nname = \"short\"\nsql = \"duration_ms % 5 <> 0\"\non_fail = \"dead_letter\"";
    let quality: toml::Table = expect.parse().unwrap();
    let run = |lose: bool| {
        let mut pipeline = pipeline();
        pipeline.set("quality", quality.clone());
        pipeline.run_failing("tidy:kill:3").expect_killed();
        if lose {
            pipeline.remove("quality");
            floe(&pipeline, &["dlq", "retry"]).expect_code(0);
            pipeline.set("quality", quality.clone());
            lose_checkpoint(&pipeline);
            recover(&pipeline).expect_code(0);
        }
        let rows: u64 = pipeline.tables().value("select count(*) from {telemetry.events}");
        pipeline.run();
        (rows, windows(&pipeline.tables()))
    };
    let (undisturbed, recovered) = (run(false), run(true));
    assert!(undisturbed.0 < recovered.0, "letters became rows: {} {}", undisturbed.0, recovered.0);
    assert!(!undisturbed.1.is_empty());
    assert_eq!(undisturbed.1, recovered.1);
}

#[test]
fn what_cannot_be_rebuilt_is_refused_with_what_was_found() {
    let _turn = turn();
    let mut pipeline = pipeline();
    recover(&pipeline).expect_code(3).expect_output(&["nothing to rebuild", "there is no such table"]);
    assert!(!pipeline.checkpoint().join("metadata.json").exists());
    pipeline.run_failing("tidy:kill:3").expect_killed();

    recover(&pipeline).expect_code(3).expect_output(&["never overwritten"]);
    lose_checkpoint(&pipeline);
    // A pipeline that has lost its checkpoint says what to do.
    pipeline.spawn().wait().expect_code(3).expect_output(&["floe recover --from-table"]);
    lose_checkpoint(&pipeline);

    pipeline.set("event_time.watermark_delay", "3 minutes");
    recover(&pipeline).expect_code(3).expect_output(&["another configuration"]);
    pipeline.set("event_time.watermark_delay", "2 minutes");
    pipeline.set("name", "other");
    recover(&pipeline).expect_code(3).expect_output(&["anything of pipeline \"other\"", "of pipeline telemetry"]);
    pipeline.set("name", "telemetry");
    recover(&pipeline).expect_code(0);
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// `floe.valid-through`: all windows that end by then are in the table, and no others.
#[test]
fn tables_say_how_far_windows_are_complete() {
    let _turn = turn();
    let pipeline = pipeline();
    let mut before = None;
    for nth in [2, 2, 2] {
        pipeline.run_failing(&format!("tidy:kill:{nth}")).expect_killed();
        let tables = pipeline.tables();
        let said = tables.table(WINDOWS).properties["floe.valid-through"].parse::<jiff::Timestamp>().unwrap();
        assert!(before <= Some(said));
        before = Some(said);
        let through_ms = said.as_millisecond();
        let truth = telemetry().truth();
        // In five batches of a stream whose disorder is less than the delay.
        let complete = truth.windows.iter().filter(|((start, _), _)| start + 60_000 <= through_ms);
        let found = windows(&tables);
        assert_eq!(found.len(), complete.count(), "through {said}");
    }
}
