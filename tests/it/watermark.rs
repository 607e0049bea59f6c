use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::broker::{Broker, Rec};
use crate::support::check::{
    DELAY_MS, each_offset_once, offsets_in_tables, produced, records, rows_are_true, until_in_tables, windows,
    windows_are,
};
use crate::support::floe::Pipeline;
use crate::support::telemetry::{MINUTE_MS, START_MS, Telemetry, Truth};
use crate::support::turn;

/// A reading at so many seconds.
fn reading(partition: i32, device: u64, second: i64) -> Rec {
    let mut reading = Telemetry { invalid_per_mille: 0, ..Telemetry::default() }.reading(device);
    (reading.device, reading.event_ms) = (device, START_MS + second * 1000);
    let value = reading.value(&mut Vec::new()).map(<[u8]>::to_vec);
    Rec { partition: Some(partition), value, ..Rec::default() }
}

/// Start and number of rows of every window in the table, over all devices.
fn closed(pipeline: &Pipeline) -> BTreeMap<i64, i64> {
    let mut by_start = BTreeMap::new();
    for ((start, _), window) in windows(&pipeline.tables()) {
        *by_start.entry((start - START_MS) / MINUTE_MS).or_default() += window.events;
    }
    by_start
}

fn partition_min(topic: &str, idle_timeout: &str) -> Pipeline {
    let mut pipeline = Pipeline::new(&Broker::shared().bootstrap, topic);
    pipeline.set("event_time.policy", "partition-min").set("event_time.idle_timeout", idle_timeout);
    pipeline
}

/// The plans in the checkpoint, by batch.
fn plans(pipeline: &Pipeline) -> Vec<Value> {
    let mut files: Vec<_> =
        fs::read_dir(pipeline.checkpoint().join("offsets")).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let plan = |file| serde_json::from_str(fs::read_to_string(file).unwrap().lines().next().unwrap()).unwrap();
    files.into_iter().map(plan).collect()
}

/// The watermark of every batch, in seconds; panics if it ever went back.
fn watermarks(pipeline: &Pipeline) -> Vec<Option<i64>> {
    let of = |plan: &Value| plan["watermarks"]["evict_ms"].as_i64().map(|ms| (ms - START_MS) / 1000);
    let all: Vec<_> = plans(pipeline).iter().map(of).collect();
    assert!(all.is_sorted(), "the watermark goes back: {all:?}");
    all
}

/// The default keeps what is in time on its own partition: one is an hour ahead, each within the delay of its own time, batches
/// are small, and the process is stopped and started after each slice.
#[test]
fn a_partition_an_hour_ahead_makes_nothing_late() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "an_hour_ahead";
    broker.create_topic(topic, 2, &[]);
    let mut pipeline = partition_min(topic, "1 hour");
    let (mut truth, mut offsets) = (BTreeMap::<i64, i64>::new(), 0);
    for slice in 0..5_i64 {
        let rows: Vec<Rec> = (0..60_i64)
            .flat_map(|n| {
                // two minutes of disorder, as much as the delay
                let second = slice * 240 + n * 4 - (n * 37) % 120;
                *truth.entry(second.div_euclid(60)).or_default() += 1;
                *truth.entry((second + 3_600).div_euclid(60)).or_default() += 1;
                [reading(0, 1, second + 3_600), reading(1, 2, second)]
            })
            .collect();
        offsets += rows.len() as u64;
        broker.produce_records(topic, rows);
        pipeline.set("source.max_offsets_per_trigger", 17 + 11 * slice);
        pipeline.run();
    }
    assert_eq!(offsets_in_tables(&pipeline.tables()), offsets);
    let watermark = *watermarks(&pipeline).last().unwrap();
    let latest = (0..60).map(|n| 4 * 240 + n * 4 - (n * 37) % 120).max().unwrap();
    assert_eq!(watermark, Some(latest - 120), "the latest of the partition that is behind, less the delay");
    let in_time = truth.range(..(latest - 120) / 60).map(|(k, v)| (*k, *v)).collect();
    assert_eq!(closed(&pipeline), in_time, "no row is missing from a closed window");
    let told = pipeline.watermark();
    assert_eq!(told["held_by"]["partition"], 1, "{told}");
    assert_eq!(told["partitions"][1]["behind_ms"], 3_600_000, "{told}");
    assert_eq!(told["next_windows"][0]["waits_for"], json!([{"topic": topic, "partition": 1}]), "{told}");
}

/// One partition an hour ahead, one that stays silent, one that falls silent and comes back, with a restart in between.
#[test]
fn an_idle_partition_is_waited_for_so_long_and_joins_again() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "idle";
    broker.create_topic(topic, 3, &[]);
    let mut pipeline = partition_min(topic, "10 seconds");
    pipeline.service("100 ms").set("event_time.watermark_delay", "2 minutes");
    let tables = pipeline.tables();
    let mut floe = pipeline.spawn();
    // Partition 2 has nothing: it is waited for, whatever comes meanwhile.
    broker.produce_records(topic, (0..10).flat_map(|m| [reading(0, 1, 3_600 + m * 60), reading(1, 2, m * 60)]));
    until_in_tables(&mut floe, &tables, 20);
    let held = floe.until("the holding partition is told", |floe| {
        let status = floe.status()?;
        let batch = status["batches"].as_array()?.iter().rfind(|b| b["counts"]["records"] != 0)?;
        Some(batch["eventTime"].clone())
    });
    assert_eq!(held.get("watermark"), None, "{held}");
    assert!(held.get("min").is_some() && held.get("avg").is_some() && held.get("max").is_some(), "{held}");
    // Then it is idle. Partition 1 decides: minute 9 less two.
    floe.until("partition 2 is idle", |_| (closed(&pipeline).len() == 7).then_some(()));
    assert_eq!(closed(&pipeline), (0..7).map(|m| (m, 1)).collect());
    let told = pipeline.watermark();
    assert_eq!(told["held_by"]["partition"], 1, "{told}");
    assert_eq!(told["partitions"][2]["idle"], true, "{told}");
    // The tables have a batch a moment before the metrics do.
    floe.until("the idle one is counted", |floe| (floe.metric("floe_watermark_idle_partitions")? == 1.0).then_some(()));
    assert_eq!(floe.metric("floe_watermark_held_by"), Some(1.0));
    assert_eq!(floe.metric("floe_watermark_partition_behind_seconds"), Some(3_600.0));
    assert_eq!(floe.metric("floe_late_rows_total"), Some(0.0));

    // Partition 1 falls silent, partition 0 does not, and the process is restarted in between: the wait goes on from the log.
    broker.produce_records(topic, [reading(0, 1, 3_600 + 10 * 60)]);
    until_in_tables(&mut floe, &tables, 21);
    floe.terminate();
    floe.wait().expect_code(0);
    assert_eq!(closed(&pipeline).len(), 7);
    let mut floe = pipeline.spawn();
    floe.until("partition 1 is idle", |_| {
        broker.produce_records(topic, [reading(0, 1, 3_600 + 11 * 60)]);
        sleep(Duration::from_millis(300));
        (closed(&pipeline).len() > 7).then_some(())
    });
    // Minutes 7 to 9 of partition 1, and those of partition 0 up to two minutes before its latest.
    floe.until("the watermark follows partition 0", |_| (closed(&pipeline).len() == 19).then_some(()));
    let before = closed(&pipeline);
    let watermark = watermarks(&pipeline).last().copied().flatten().unwrap();

    // It comes back. What is behind the watermark is late and counted; what is not, is not, and the watermark waits for it.
    broker
        .produce_records(topic, [reading(1, 2, 10 * 60), reading(1, 2, watermark + 30), reading(1, 2, watermark + 61)]);
    floe.until("the late row is counted", |floe| (floe.metric("floe_late_rows_total")? == 1.0).then_some(()));
    floe.until("partition 1 holds it again", |floe| {
        broker.produce_records(topic, [reading(0, 1, 2 * 3_600)]);
        let held_by = floe.status()?["batches"].as_array()?.last()?["eventTime"]["heldBy"].clone();
        (held_by["partition"] == 1).then_some(())
    });
    assert_eq!(closed(&pipeline), before);
    broker.produce_records(topic, [reading(1, 2, watermark + 10 * 60)]);
    floe.until("partition 1 lets it go", |_| closed(&pipeline).get(&(watermark / 60)).filter(|n| **n > 0).map(|_| ()));
    assert_eq!(floe.metric("floe_late_rows_total"), Some(1.0));
    watermarks(&pipeline);
    floe.terminate();
    floe.wait().expect_code(0);
    assert_eq!(pipeline.watermark()["committed"], true);
}

/// A partition that is added holds the watermark where it is, and its rows from there on are in time.
#[test]
fn a_new_partition_holds_the_watermark_where_it_is() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "new_partition";
    broker.create_topic(topic, 1, &[]);
    let pipeline = partition_min(topic, "1 hour");
    broker.produce_records(topic, (0..10).map(|m| reading(0, 1, m * 60)));
    pipeline.run();
    assert_eq!(closed(&pipeline), (0..7).map(|m| (m, 1)).collect());
    broker.add_partitions(topic, 2);
    broker.produce_records(topic, (10..30).map(|m| reading(0, 1, m * 60)));
    pipeline.run();
    assert_eq!(closed(&pipeline).len(), 7);
    assert_eq!(pipeline.watermark()["held_by"]["partition"], 1);
    broker.produce_records(topic, (7..20).map(|m| reading(1, 2, m * 60)));
    pipeline.run();
    let expected: BTreeMap<i64, i64> = (0..17).map(|m| (m, if m < 7 { 1 } else { 2 })).collect();
    assert_eq!(closed(&pipeline), expected);
    watermarks(&pipeline);
}

/// From Spark's policy to the default and back over one checkpoint: the watermark goes on from where it is.
#[test]
fn the_policy_may_change_over_a_checkpoint() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "policy";
    broker.create_topic(topic, 2, &[]);
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    broker.produce_records(topic, (0..10).flat_map(|m| [reading(0, 1, 600 + m * 60), reading(1, 2, m * 60)]));
    pipeline.run();
    let latest = |pipeline: &Pipeline| watermarks(pipeline).last().copied().flatten();
    assert_eq!(latest(&pipeline), Some(17 * 60));
    assert_eq!(closed(&pipeline).len(), 17);

    pipeline.set("event_time.policy", "partition-min");
    let told = pipeline.watermark();
    assert_eq!((&told["partitions"][1]["behind_ms"], &told["watermark"]), (&json!(600_000), &told["next_watermark"]));
    broker.produce_records(topic, [reading(0, 1, 3_600), reading(1, 2, 18 * 60)]);
    pipeline.run();
    assert_eq!(latest(&pipeline), Some(17 * 60), "partition 1 is behind the watermark and holds it");
    broker.produce_records(topic, [reading(1, 2, 20 * 60)]);
    pipeline.run();
    assert_eq!(latest(&pipeline), Some(18 * 60));

    pipeline.set("event_time.policy", "global-max");
    broker.produce_records(topic, [reading(1, 2, 21 * 60)]);
    pipeline.run();
    broker.produce_records(topic, [reading(0, 1, 3_660)]);
    pipeline.run();
    assert_eq!(latest(&pipeline), Some(61 * 60 - 120));
}

fn telemetry() -> Telemetry {
    Telemetry { messages: 2_000, partitions: 2, ..Telemetry::default() }
}

/// Two partitions with records, one without.
fn topic_with_an_empty_partition() -> &'static str {
    static FILLED: OnceLock<&str> = OnceLock::new();
    FILLED.get_or_init(|| {
        let (broker, telemetry) = (Broker::shared(), telemetry());
        broker.create_topic("empty_partition", 3, &[]);
        broker.produce_records("empty_partition", records(&telemetry, 0..telemetry.messages));
        "empty_partition"
    })
}

/// The batch that only the end of a wait brings about is planned by the clock and replayed by its plan.
#[test]
fn killed_in_the_batch_that_closes_windows_because_a_partition_is_idle() {
    let _turn = turn();
    let (broker, telemetry) = (Broker::shared(), telemetry());
    let (mut truth, mut latest) = (Truth::default(), BTreeMap::new());
    for index in 0..telemetry.messages {
        let reading = telemetry.reading(index);
        truth.add(&reading);
        if reading.invalid.is_none() {
            let latest = latest.entry(telemetry.partition(&reading)).or_insert(i64::MIN);
            *latest = reading.event_ms.max(*latest);
        }
    }
    let least = latest.values().min().copied().unwrap();
    let in_time = truth.closed(truth.max_event_ms - (least - DELAY_MS));
    let steps = [
        "plan.before_put",
        "plan.after_put",
        "execute.files_written",
        "commit.metadata_written",
        "commit.committed",
        "commit_log.before_put",
        "commit_log.after_put",
        "tidy",
    ];
    let pipelines = steps.map(|step| (step, partition_min(topic_with_an_empty_partition(), "10 seconds")));
    for (_, pipeline) in &pipelines {
        pipeline.run();
        assert_eq!(windows(&pipeline.tables()).len(), 0, "the empty partition is waited for");
        assert_eq!(watermarks(pipeline), [None]);
    }
    sleep(Duration::from_secs(10));
    for (step, pipeline) in &pipelines {
        pipeline.run_failing(&format!("{step}:kill")).expect_killed();
        let planned = plans(pipeline);
        pipeline.run();
        if *step != "plan.before_put" {
            assert_eq!(plans(pipeline), planned, "{step}: the plan that was logged is the plan");
        }
        assert_eq!(watermarks(pipeline), [None, Some((least - DELAY_MS - START_MS) / 1000)], "{step}");
        let tables = pipeline.tables();
        each_offset_once(&tables, &pipeline.topic, &produced(broker, &pipeline.topic, 3));
        rows_are_true(&tables, &truth);
        windows_are(&tables, &in_time);
    }
}

/// Before anything has run, and for a pipeline without windows, it says so.
#[test]
fn floe_watermark_says_when_there_is_none() {
    let _turn = turn();
    let mut pipeline = partition_min(topic_with_an_empty_partition(), "1 hour");
    let run = |pipeline: &Pipeline| {
        let output = pipeline.command().arg("watermark").arg(pipeline.config_file()).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (code, said) = run(&pipeline);
    assert!(code == Some(1) && said.contains("there is no checkpoint at"), "{code:?} {said}");
    pipeline.run();
    let (code, said) = run(&pipeline);
    assert!(code == Some(0) && said.contains("watermark not set yet"), "{code:?} {said}");
    assert!(said.contains("held back by empty_partition-2 since batch") || said.contains("none yet"), "{said}");
    pipeline.remove("windows");
    let (code, said) = run(&pipeline);
    assert!(code == Some(1) && said.contains("has no [[windows]]"), "{code:?} {said}");
}
