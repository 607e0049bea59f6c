use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::support::broker::Broker;
use crate::support::check::{everything, fill};
use crate::support::floe::Pipeline;
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 10_000, devices: 400, ..Telemetry::default() }
}

/// Nobody writes to it after it is filled, so all tests here read the same one.
fn topic() -> &'static str {
    static FILLED: OnceLock<&str> = OnceLock::new();
    FILLED.get_or_init(|| {
        fill(Broker::shared(), "state", &telemetry());
        "state"
    })
}

/// Eighty batches and more, so that state files are merged at 64 of them at the latest, however slow the machine; some 6,000 groups
/// are open, in twenty minutes: a budget of 64 KiB holds less than a tenth of them.
fn pipeline(budget: &str) -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic());
    pipeline.set("source.max_offsets_per_trigger", 125).set("state.memory_budget", budget);
    pipeline.set("event_time.watermark_delay", "20 minutes");
    pipeline
}

/// The state files that the newest commit names, oldest first.
fn state_files(pipeline: &Pipeline) -> Vec<PathBuf> {
    let checkpoint = pipeline.checkpoint();
    let mut commits: Vec<PathBuf> =
        fs::read_dir(checkpoint.join("commits")).unwrap().map(|e| e.unwrap().path()).collect();
    commits.sort();
    let text = fs::read_to_string(commits.last().expect("a commit")).unwrap();
    let commit: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    commit["state"].as_array().unwrap().iter().map(|f| checkpoint.join(f["name"].as_str().unwrap())).collect()
}

#[test]
fn far_beyond_the_budget_nothing_fails() {
    let _turn = turn();
    for budget in ["0 B", "64 KiB"] {
        let mut pipeline = pipeline(budget);
        pipeline.env("FLOE_LOG", "info,floe::query=debug");
        pipeline.run().expect_output(&["windows have left memory", "state files compacted"]);
        everything(&pipeline, Broker::shared(), &telemetry());
    }
}

#[test]
fn killed_while_windows_leave_while_files_are_merged_and_during_recovery() {
    let _turn = turn();
    let mut pipeline = pipeline("64 KiB");
    for point in ["state.spill:kill:3", "state.compaction:kill", "state.spill:kill:7", "state.adopted:kill"] {
        pipeline.run_failing(point).expect_killed();
    }
    pipeline.set("state.memory_budget", "8 MiB");
    pipeline.run_failing("state.recovery:kill").expect_killed();
    pipeline.set("state.memory_budget", "64 KiB");
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
    // What was killed has left nothing behind but what the last commits name.
    let named = state_files(&pipeline).len();
    let there = fs::read_dir(pipeline.checkpoint().join("state")).unwrap().count();
    assert!(there <= named + 2 + 32, "{there} state files, {named} of them named");
}

#[test]
fn a_failure_on_the_way_is_tried_again() {
    let _turn = turn();
    for point in ["state.spill:fail:5", "state.compaction:fail", "state.adopted:fail"] {
        let pipeline = pipeline("64 KiB");
        pipeline.run_failing(point).expect_code(0).expect_output(&["failpoint state."]);
        everything(&pipeline, Broker::shared(), &telemetry());
    }
}

/// Windows that are in files only, in runs and in deltas: a file that is missing or cut short is found at the start, a byte at the latest when the
/// window closes; each time the file is named and nothing is emitted without it.
#[test]
fn a_missing_or_damaged_state_file_is_named() {
    let _turn = turn();
    let pipeline = pipeline("0 B");
    pipeline.run_failing("commit_log.after_put:kill:30").expect_killed();
    let files = state_files(&pipeline);
    let is_run = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "run");
    assert!(files.len() > 5 && is_run(&files[0]) && !is_run(&files[files.len() - 1]), "{files:?}");
    for file in [&files[0], &files[files.len() - 1]] {
        let name = file.file_name().unwrap().to_str().unwrap();
        let bytes = fs::read(file).unwrap();
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        for damaged in [None, Some(&bytes[..bytes.len() - 1]), Some(&bytes[..100]), Some(&flipped[..])] {
            match damaged {
                Some(damaged) => fs::write(file, damaged).unwrap(),
                None => fs::remove_file(file).unwrap(),
            }
            let copy = pipeline.spawn().wait();
            assert!(copy.output.contains(name), "{}", copy.output);
            copy.expect_code(3);
        }
        fs::write(file, bytes).unwrap();
    }
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

#[test]
fn floe_state_shows_the_open_windows() {
    let _turn = turn();
    let pipeline = pipeline("64 KiB");
    let show = || {
        let file = pipeline.config_file();
        let done = pipeline.command().arg("state").arg(file).output().unwrap();
        let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        (done.status.code(), text)
    };
    let (code, text) = show();
    assert!(code == Some(1) && text.contains("no checkpoint"), "{text}");
    pipeline.run();
    let (code, text) = show();
    assert_eq!(code, Some(0), "{text}");
    let windows: Vec<&str> = text.lines().filter(|line| line.starts_with("telemetry.device_minutes ")).collect();
    assert!((5..40).contains(&windows.len()), "{text}");
    assert!(text.contains(&format!("{} open windows", windows.len())), "{text}");
    assert!(windows[0].contains("2026-01-01T00:"), "{text}");
}
