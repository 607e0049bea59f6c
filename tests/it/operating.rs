use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use crate::support::broker::Broker;
use crate::support::check::{everything, offsets_in_tables, records, until_in_tables};
use crate::support::floe::{Floe, Pipeline, http_get};
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 1_000, ..Telemetry::default() }
}

fn service(topic: &str, messages: u64) -> Pipeline {
    let broker = Broker::shared();
    broker.create_topic(topic, telemetry().partitions, &[]);
    broker.produce_records(topic, records(&telemetry(), 0..messages));
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.service("100 ms");
    pipeline
}

fn finish(mut pipeline: Pipeline, floe: Floe) {
    floe.terminate();
    floe.wait().expect_code(0);
    pipeline.remove("trigger").set("trigger.available_now", true).set("http.listen", "");
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// Kind and samples: labels and value.
type Metric = (String, Vec<(BTreeMap<String, String>, f64)>);

/// The text format of Prometheus, as strictly as its own parser reads it: names, labels, types before samples, samples
/// of one family together, histograms complete.
fn parse_metrics(text: &str) -> BTreeMap<String, Metric> {
    let name_ok = |name: &str| {
        name.chars()
            .enumerate()
            .all(|(i, c)| c.is_ascii_alphabetic() || "_:".contains(c) || (i > 0 && c.is_ascii_digit()))
            && !name.is_empty()
    };
    let mut types: BTreeMap<String, String> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut families: BTreeMap<String, Metric> = BTreeMap::new();
    let mut order: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    assert!(text.ends_with('\n'), "the last line ends");
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            assert!(helped.insert(rest.split(' ').next().unwrap().to_string()), "two HELP lines: {line}");
            assert!(rest.split_once(' ').is_some_and(|(_, help)| !help.trim().is_empty()), "no help: {line}");
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram", "summary", "untyped"].contains(&kind), "{line}");
            assert!(types.insert(name.into(), kind.into()).is_none(), "two TYPE lines: {line}");
            continue;
        }
        assert!(!line.starts_with('#'), "{line}");
        let (series, value) = line.rsplit_once(' ').unwrap();
        let value = match value {
            "+Inf" => f64::INFINITY,
            "-Inf" => f64::NEG_INFINITY,
            value => value.parse().unwrap_or_else(|_| panic!("{line}")),
        };
        assert!(seen.insert(series.to_string()), "two samples of one series: {line}");
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap_or_else(|| panic!("{line}"))),
            None => (series, ""),
        };
        assert!(name_ok(name), "{line}");
        let mut parsed = BTreeMap::new();
        let mut rest = labels;
        while !rest.is_empty() {
            let (label, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(name_ok(label) && !label.contains(':'), "{line}");
            let end = after
                .char_indices()
                .scan(false, |escaped, (i, c)| {
                    let found = (c == '"' && !*escaped).then_some(i);
                    *escaped = c == '\\' && !*escaped;
                    Some(found)
                })
                .flatten()
                .next()
                .unwrap_or_else(|| panic!("{line}"));
            assert!(parsed.insert(label.to_string(), after[..end].to_string()).is_none(), "{line}");
            rest = after[end + 1..].trim_start_matches(',');
        }
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|base| types.get(*base).is_some_and(|kind| kind == "histogram" || kind == "summary"))
            .unwrap_or(name);
        let kind = types.get(family).unwrap_or_else(|| panic!("no TYPE before {line}"));
        assert!(helped.contains(family), "no HELP for {line}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{line} is a {kind}");
        if order.last().is_none_or(|last| last != family) {
            assert!(!order.contains(&family.to_string()), "samples of {family} are not together");
            order.push(family.to_string());
        }
        families.entry(name.to_string()).or_insert_with(|| (kind.clone(), Vec::new())).1.push((parsed, value));
    }
    for (name, kind) in types.iter().filter(|(_, kind)| *kind == "histogram") {
        if let Some((_, buckets)) = families.get(&format!("{name}_bucket")) {
            let infinite = buckets.iter().filter(|(labels, _)| labels["le"] == "+Inf").count();
            assert_eq!(infinite, families[&format!("{name}_count")].1.len(), "{name}, a {kind}, has no +Inf bucket");
        }
    }
    families
}

#[test]
fn metrics_health_and_status() {
    let _turn = turn();
    let pipeline = service("observed", 1_000);
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &pipeline.tables(), 1_000);
    floe.until_ready();
    // The batch after the data, which has none, works under the watermark that they have set.
    floe.until("the last batch is on the metrics page", |floe| {
        (floe.metric("floe_watermark_timestamp_seconds")? > 0.0).then_some(())
    });

    let (code, head, text) = http_get(&pipeline.http_address(), "/metrics").unwrap();
    assert_eq!(code, 200);
    assert!(head.to_lowercase().contains("content-type: text/plain"), "{head}");
    let metrics = parse_metrics(&text);
    let sum = |name: &str| {
        metrics.get(name).unwrap_or_else(|| panic!("{name} is not in\n{text}")).1.iter().map(|s| s.1).sum::<f64>()
    };
    let truth = telemetry().truth();
    // Lag per partition, rows in and out, dead letters by reason, late rows.
    assert_eq!(metrics["floe_source_lag_records"].1.len(), telemetry().partitions as usize);
    assert_eq!(sum("floe_source_records_total"), 1_000.0);
    let out =
        metrics["floe_sink_rows_total"].1.iter().find(|(labels, _)| labels["table"] == "telemetry.events").unwrap();
    assert_eq!(out.1, truth.valid as f64);
    for (reason, count) in &truth.dead {
        let found = metrics["floe_dead_letters_total"].1.iter().find(|(labels, _)| labels["reason"] == *reason);
        assert_eq!(found.map(|s| s.1), Some(*count as f64), "{reason}");
    }
    assert_eq!(sum("floe_late_rows_total"), 0.0);
    // Batch duration by stage.
    assert!(sum("floe_batch_stage_duration_seconds_count") >= 5.0);
    assert!(
        metrics["floe_batch_stage_duration_seconds_count"].1.iter().all(|(labels, _)| labels.contains_key("stage"))
    );
    // State, checkpoint, watermark, retries, last commit.
    assert!(sum("floe_state_groups") > 0.0 && sum("floe_state_bytes") > 0.0 && sum("floe_checkpoint_bytes") > 0.0);
    let watermark = (truth.max_event_ms - pipeline.delay_ms()) as f64 / 1000.0;
    assert!((sum("floe_watermark_timestamp_seconds") - watermark).abs() < 0.002, "{watermark}");
    assert!(sum("floe_watermark_delay_seconds") > 0.0);
    let _ = sum("floe_retries_total");
    assert!((0.0..60.0).contains(&sum("floe_last_commit_age_seconds")));

    assert_eq!(floe.get("/healthz").unwrap().0, 200);
    assert_eq!(floe.get("/readyz").unwrap().0, 200);
    assert_eq!(floe.get("/no-such-page").unwrap().0, 404);
    let (code, head, _) = http_get(&pipeline.http_address(), "/").unwrap();
    assert!(code == 200 && head.to_lowercase().contains("text/html"), "{head}");
    let status = floe.status().expect("/status is JSON");
    let text = status.to_string();
    for part in ["telemetry", "exactly once", "numInputRows", "batchId", "telemetry.events"] {
        assert!(text.contains(part), "{part} is not in {status:#}");
    }
    finish(pipeline, floe);
}

/// Somebody else's transaction holds the catalog: Floe says so, waits, and goes on by itself.
#[test]
fn a_locked_catalog() {
    let _turn = turn();
    let topic = "locked";
    let pipeline = service(topic, 300);
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    until_in_tables(&mut floe, &tables, 300);
    let lock = rusqlite::Connection::open(pipeline.catalog()).unwrap();
    lock.busy_timeout(Duration::from_secs(10)).unwrap();
    lock.execute_batch("begin exclusive").unwrap();
    Broker::shared().produce_records(topic, records(&telemetry(), 300..1_000));
    floe.until("it says that the catalog is locked", |floe| {
        floe.output().to_lowercase().contains("lock").then_some(())
    });
    sleep(Duration::from_secs(2));
    assert_eq!(offsets_in_tables(&tables), 300);
    lock.execute_batch("rollback").unwrap();
    drop(lock);
    until_in_tables(&mut floe, &tables, 1_000);
    finish(pipeline, floe);
}

/// A small file system of its own. None, with the reason on stderr, where mounting is not permitted.
struct Disk<'a>(&'a Path);

impl Disk<'_> {
    fn mount(folder: &Path) -> Option<Disk<'_>> {
        fs::create_dir_all(folder).unwrap();
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", "size=6m", "tmpfs"]).arg(folder).output();
        match output {
            Ok(output) if output.status.success() => Some(Disk(folder)),
            Ok(output) => {
                eprintln!("cannot mount a tmpfs: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(e) => {
                eprintln!("cannot mount a tmpfs: {e}");
                None
            }
        }
    }

    fn fill(&self) {
        let mut size = 1 << 20;
        for n in 0.. {
            // What did not fit whole has still taken the rest of the space.
            if fs::write(self.0.join(format!("ballast-{n}")), vec![0u8; size]).is_err() {
                size /= 16;
                if size == 0 {
                    return;
                }
            }
        }
    }

    fn free(&self) {
        for entry in fs::read_dir(self.0).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_str().unwrap().starts_with("ballast") {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Full under the warehouse, then under the checkpoint. Where a file system cannot be mounted, the process is forbidden
/// to write files of any size instead, which hits both.
#[test]
fn a_full_disk() {
    let _turn = turn();
    for full in ["warehouse", "checkpoint"] {
        let topic = format!("full_{full}");
        let pipeline = service(&topic, 300);
        let tables = pipeline.tables();
        let folder = pipeline.dir().join(full);
        let disk = Disk::mount(&folder);
        let mut floe = pipeline.spawn();
        until_in_tables(&mut floe, &tables, 300);
        let said = floe.output().len();
        let limit = |pid: i32, soft: &str| {
            let set =
                Command::new("prlimit").args(["--pid", &pid.to_string()]).arg(format!("--fsize={soft}:")).status();
            assert!(set.expect("prlimit (util-linux)").success());
        };
        match &disk {
            Some(disk) => disk.fill(),
            None => limit(floe.pid(), "0"),
        }
        Broker::shared().produce_records(&topic, records(&telemetry(), 300..1_000));
        if disk.is_some() {
            floe.until("it says that the disk is full", |floe| {
                let output = floe.output();
                output[said..].to_lowercase().contains("no space left").then_some(())
            });
        } else {
            sleep(Duration::from_secs(3));
        }
        sleep(Duration::from_secs(1));
        assert_eq!(offsets_in_tables(&tables), 300);
        match &disk {
            Some(disk) => disk.free(),
            None => limit(floe.pid(), "unlimited"),
        }
        until_in_tables(&mut floe, &tables, 1_000);
        finish(pipeline, floe);
    }
}
