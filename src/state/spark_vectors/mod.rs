//! Replays real runs of Spark Structured Streaming (`tests/spark_vectors/`, or the folder in `FLOE_VECTORS`) through the
//! window functions, lanes and the state store: the same rows must come out of the same batches, at the same watermarks.
//! Every vector runs twice, with the state kept in memory and with the state recovered from deltas before every batch.

mod json;
mod replay;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use serde_json::Value;

/// What Floe does differently on purpose, and so is not to come out as it does in Spark.
const EXCEPTIONS: [(&str, &str); 3] = [
    ("append__group_by_event_time_itself", "grouped by the event time without a window; Floe aggregates in windows"),
    ("append__sum_overflow_across_batches_legacy", "the sum wraps; Floe's is null and leaves a dead letter"),
    ("append__sum_overflow_in_batch_legacy", "the sum wraps; Floe's is null and leaves a dead letter"),
];

/// What Floe cannot do yet.
fn not_yet(vector: &Value) -> Option<&'static str> {
    (vector["spec"]["output_mode"] != "append").then_some("output mode update")
}

/// By kind: how many there are, how many passed, and of the others how many are left out, by reason.
#[derive(Default)]
struct Count {
    all: usize,
    passed: usize,
    left_out: BTreeMap<&'static str, usize>,
}

#[test]
fn spark_vectors() {
    let folder = std::env::var_os("FLOE_VECTORS").map(PathBuf::from);
    let folder =
        folder.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests").join("spark_vectors"));
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    let mut counts: BTreeMap<&str, Count> = BTreeMap::new();
    let mut failures = Vec::new();
    // Past the capture of the test harness, which shows only what failed.
    let mut out = std::io::stdout().lock();
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let kind = match name.split("__").next().unwrap() {
            "append" => "append",
            "sliding" => "sliding",
            "update" => "update",
            "restart" => "restart",
            _ => continue,
        };
        let count = counts.entry(kind).or_default();
        count.all += 1;
        let vector: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        if let Some((_, reason)) = EXCEPTIONS.iter().find(|(exception, _)| *exception == name) {
            writeln!(out, "exception {name}: {reason}").unwrap();
            *count.left_out.entry("other than Spark on purpose").or_default() += 1;
        } else if let Some(reason) = not_yet(&vector) {
            *count.left_out.entry(reason).or_default() += 1;
        } else {
            match replay::replay(&vector, false).and_then(|()| replay::replay(&vector, true)) {
                Ok(()) => count.passed += 1,
                Err(e) => failures.push(format!("{name}: {e}")),
            }
        }
    }
    for (kind, count) in &counts {
        writeln!(out, "{kind}: {} of {} passed", count.passed, count.all).unwrap();
        for (reason, left_out) in &count.left_out {
            writeln!(out, "{kind}: {left_out} left out: {reason}").unwrap();
        }
    }
    assert!(counts.values().any(|c| c.passed > 0), "no vectors in {}", folder.display());
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}
